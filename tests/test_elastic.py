"""Every network of a space is the leading slices of the elastic supernet, in what it computes and in what it trains."""

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refusals import refusal
from small_spaces import stage_space
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nas.data import ImageData, Images
from nas.evaluation import Evaluator, recalibrate
from nas.judging import found_network
from supernet.arch import ArchConfig
from supernet.elastic import ElasticSupernet, sharing, widest
from supernet.model import build_model
from supernet.space import SearchSpace, StageSpace
from supernet.specs import FFN, MB3D, MB4D, Identity
from supernet.weights import subnetwork

SMALL = SearchSpace(
    "small",
    8,
    3,
    (
        stage_space((8, 16), 1, 1, "mb4d", "identity"),
        stage_space((16, 24), 2, 3, "mb4d", "mb3d", "identity"),
        stage_space((8, 16, 24), 1, 1, "mb3d", "mb4d", "identity"),
    ),
)


def elastic(space: SearchSpace) -> ElasticSupernet:
    """An elastic supernet in double whose every weight and statistic differs from its neutral initial value."""
    torch.manual_seed(0)
    net = ElasticSupernet(space)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return net.double()  # after all values are there: a built network is float32, and takes them over exactly


def images(space: SearchSpace, number: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 3, space.image_size, space.image_size, generator=generator, dtype=torch.float64)


def members(space: SearchSpace, number: int) -> list[ArchConfig]:
    rng = random.Random(0)
    return [space.largest, space.smallest, *(space.sample(rng) for _ in range(number))]


# -- A network is a slice ----------------------------------------------------------------------------------------------


TINY = ["efficientformer-tiny", "mixed-tiny", "efficientformerv2-tiny", "efficientvit-tiny", "concatplexer-tiny"]


@pytest.mark.parametrize("name", TINY)
def test_a_network_equals_the_built_one_and_trains_exactly_its_slices(name: str) -> None:
    space = SearchSpace.load(name)
    net, x = elastic(space), images(space)
    archs = members(space, 2)
    networks = [subnetwork(net, arch).double() for arch in archs]
    with torch.no_grad():
        for arch, built in zip(archs, networks, strict=True):
            assert (net.eval()(x, arch) - built.eval()(x)).abs().max() < 1e-9

    for arch, built in zip(archs, networks, strict=True):
        # Training, on the batch's statistics: the same output, and the same gradients, in the leading slices alone.
        net.zero_grad()
        alone, shared = built.train()(x), net.train()(x, arch)
        assert (alone - shared).abs().max() < 1e-9
        alone.square().sum().backward()
        shared.square().sum().backward()
        untouched = {id(parameter) for parameter in net.parameters()}
        for (layer_name, layer), module in zip(space.fit(arch).named_layers(), built.children(), strict=True):
            sources = dict(net.source(layer_name, layer).named_parameters())
            for key, own in module.named_parameters():
                whole = sources[key]
                untouched.discard(id(whole))
                assert own.grad is not None and whole.grad is not None
                expected = torch.zeros_like(whole)
                expected[tuple(slice(n) for n in own.shape)] = own.grad
                torch.testing.assert_close(whole.grad, expected, rtol=1e-6, atol=1e-9, msg=f"{layer_name}.{key}")
        assert all(p.grad is None for p in net.parameters() if id(p) in untouched)
        assert untouched or arch != space.smallest


def test_two_networks_of_a_space_are_different_and_nothing_is_remembered() -> None:
    net, x = elastic(SMALL).eval(), images(SMALL)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    archs = members(SMALL, 6)
    with torch.no_grad():
        alone = [net(x, arch) for arch in archs]
        random.Random(0).shuffle(order := list(range(len(archs))))
        assert all(torch.equal(net(x, archs[i]), alone[i]) for i in order)
    assert all((a - b).abs().max() > 1e-3 for n, a in enumerate(alone) for b in alone[:n])
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_training_collects_the_statistics_of_the_channels_that_ran() -> None:
    net = elastic(SMALL).train()
    before = {name: value.clone() for name, value in net.state_dict().items() if "running_mean" in name}
    net(images(SMALL), SMALL.smallest)  # 8, 16 and 8 channels
    after = net.state_dict()
    means = "layers.stem.norm2.running_mean"
    assert (after[means][:8] != before[means][:8]).all() and torch.equal(after[means][8:], before[means][8:])
    changed = {name for name, mean in before.items() if not torch.equal(mean, after[name])}
    assert {name.split(".")[1] for name in changed} == {"stem", "stage2_embedding", "stage3_embedding"}


def test_other_image_sizes_and_other_networks_are_refused() -> None:
    net = elastic(SMALL)
    with pytest.raises(ValueError, match=r"16 px, the supernet for 8 px: use arch\.at"):
        net(images(SMALL), SMALL.largest.at(16))
    other = SearchSpace("other", 8, 3, (*SMALL.stages[:2], stage_space((32,), 1, 1, "mb4d", "identity")))
    assert "stage 3 of other-largest has width 32" in refusal(lambda: net(images(SMALL), other.largest))


# -- What shares weights -----------------------------------------------------------------------------------------------


def test_expansions_and_activations_share_and_heads_do_not() -> None:
    blocks = (
        MB4D(16, mlp_ratio=2),
        MB3D(16, num_heads=2, key_dim=4),
        MB4D(16, mlp_ratio=4, act="relu"),
        Identity(16),
        MB3D(16, num_heads=4, key_dim=4),
        MB4D(16, mlp_ratio=4),
    )
    stage = StageSpace((8, 16), 1, 2, blocks)
    assert sharing(stage) == [[blocks[0], blocks[2], blocks[5]], [blocks[1]], [blocks[4]]]
    assert widest(stage) == [stage.kinds[2], stage.kinds[5], stage.kinds[1], stage.kinds[4]]

    net = ElasticSupernet(SearchSpace("sharing", 8, 3, (stage,)))
    slots = [net.get_submodule(f"layers.stage1_block{slot}") for slot in (1, 2)]
    assert [len(list(slot.children())) for slot in slots] == [3, 3]
    assert net.get_parameter("layers.stage1_block1.0.mlp.fc1.weight").shape == (64, 16, 1, 1)
    assert not set(map(id, slots[0].parameters())) & set(map(id, slots[1].parameters()))


def test_a_smaller_expansion_is_the_leading_part_of_the_larger() -> None:
    stage = StageSpace((16,), 1, 1, (FFN(16), FFN(16, mlp_ratio=2), Identity(16)))
    space = SearchSpace("expansions", 8, 3, (stage,), "batch_norm")
    net = elastic(space)
    model = subnetwork(net, space.arch((16,), ((stage.kinds[1],),)))
    whole = net.get_parameter("layers.stage1_block1.0.mlp.fc2.conv.weight")
    assert whole.shape == (16, 64, 1, 1)
    assert torch.equal(model.get_parameter("stage1_block1.mlp.fc2.conv.weight").double(), whole[:, :32])


BLOCK = """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Gated:
    dim: int
    mlp_ratio: int = 1
    act: str = "gelu"

    def module(self, resolution):
        return GatedModule(self)


class GatedModule(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.into = nn.Conv2d(spec.dim, spec.mlp_ratio * spec.dim, 1)
        self.norm = nn.BatchNorm2d(spec.mlp_ratio * spec.dim)
        self.back = nn.Conv2d(spec.mlp_ratio * spec.dim, spec.dim, 1)
        self.register_buffer("ramp", torch.linspace(0, 1, spec.dim)[:, None, None], persistent=False)

    def forward(self, x):
        return x + self.ramp * self.back(torch.sigmoid(self.norm(self.into(x))))


@dataclass(frozen=True)
class Uneven:
    dim: int
    mlp_ratio: int = 1

    def module(self, resolution):
        return nn.Conv2d(self.dim, self.dim, 3, padding=1, groups=self.mlp_ratio)  # more groups, smaller weights
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], SearchSpace]:
    (tmp_path / "blocks.py").write_text(BLOCK)
    monkeypatch.chdir(tmp_path)

    def space(kind: str) -> SearchSpace:
        candidates: list[object] = [f"blocks.py:{kind}", {"kind": f"blocks.py:{kind}", "mlp_ratio": 2}, "identity"]
        stage = {"stride": 2, "widths": [16, 32], "depth": 2, "candidates": candidates}
        document = {"name": "users", "image_size": 16, "num_classes": 3, "stages": [stage]}
        return SearchSpace.from_dict(document, "the space")

    return space


def test_a_user_s_own_block_shares_in_the_same_way(users: Callable[[str], SearchSpace]) -> None:
    space = users("Gated")
    net, x = elastic(space), images(space)
    assert net.get_parameter("layers.stage1_block1.0.into.weight").shape == (64, 32, 1, 1)
    archs = members(space, 6)
    networks = [subnetwork(net, arch).double() for arch in archs]
    with torch.no_grad():
        for training in (False, True):
            for arch, built in zip(archs, networks, strict=True):
                difference = net.train(training)(x, arch) - built.train(training)(x)
                assert difference.abs().max() < 1e-9  # the buffer too is of the network's width


def test_a_user_s_block_that_is_no_slice_is_refused(users: Callable[[str], SearchSpace]) -> None:
    space = users("Uneven")
    message = refusal(lambda: ElasticSupernet(space))
    assert "weight (32, 32, 3, 3)" in message and "(32, 16, 3, 3)" in message and "something else than mlp_ratio" in message


# -- Places, randomness, copies ----------------------------------------------------------------------------------------


def test_what_is_built_follows_the_weights_and_holds_none() -> None:
    net, x = ElasticSupernet(SMALL).eval(), images(SMALL)
    with torch.no_grad():
        single = net(x.float(), SMALL.largest)
        built = [structure.module for structure in net._structures.values()]
        assert built and all(p.is_meta for module in built for p in module.parameters())
        assert (net.double()(x, SMALL.largest) - single).abs().max() < 1e-4  # in double now, buffers and all
        again = copy.deepcopy(net)
        for parameter in again.parameters():
            parameter.zero_()
        assert not again(x, SMALL.largest).any() and net(x, SMALL.largest).any()
    assert not any("_structures" in name for name in net.state_dict())


def test_running_a_network_draws_nothing_from_the_global_generator() -> None:
    net = elastic(SMALL)
    before = torch.get_rng_state()
    net(images(SMALL), SMALL.largest)
    assert torch.equal(torch.get_rng_state(), before)


# -- What evaluates it -------------------------------------------------------------------------------------------------


def test_it_is_evaluated_as_any_supernet() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 8, 8), generator=generator, dtype=torch.uint8)
    parts = Images(pixels, torch.arange(40), torch.randint(0, 3, (40,), generator=generator))
    data = ImageData(parts, parts, parts, ("a", "b", "c"), 8, False, False, (), "", "")
    net = elastic(SMALL).float()
    evaluate = Evaluator(net, data)
    losses = []
    for arch in members(SMALL, 4):
        model = build_model(SMALL.fit(arch))
        model.load_state_dict(subnetwork(net, arch).state_dict())
        recalibrate(model, evaluate.recalibration)
        found = found_network(net, arch, evaluate.recalibration)
        with torch.no_grad():
            logits = model(evaluate.images)
            torch.testing.assert_close(found(evaluate.images), logits)
        expected = nn.functional.cross_entropy(logits.double(), data.score.labels).item()
        assert evaluate(arch).loss == pytest.approx(expected, rel=1e-5)
        losses.append(expected)
    assert max(losses) - min(losses) > 0.01
