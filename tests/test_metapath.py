"""The supernet is every network of its space at once: a path picks or mixes candidates, and nothing is remembered."""

import copy
import math
import random
from collections.abc import Callable

import pytest
import torch
from small_spaces import stage_space
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from supernet.elastic import ElasticSupernet
from supernet.metapath import MetaPath, Noise, Supernet, sample_path
from supernet.space import SearchSpace
from supernet.specs import Identity, Layer
from supernet.units import UnitScores
from supernet.weights import subnetwork

EULER = 0.5772  # the mean of Gumbel noise


# Tokens in stages 3 and 4, so that the network goes back to maps before the last embedding; identity's place varies.
WIDE = SearchSpace(
    "wide",
    16,
    5,
    (
        stage_space((16,), 1, 2, "mb4d", "identity"),
        stage_space((16,), 2, 1, "identity", "mb4d"),
        stage_space((24,), 2, 3, "mb4d", "mb3d", "identity"),
        stage_space((32,), 1, 2, "mb3d", "identity", "mb4d"),
    ),
)
NARROWABLE = SearchSpace(
    "narrowable",
    8,
    3,
    (stage_space((8, 16), 1, 1, "mb4d", "identity"), stage_space((16, 24), 2, 2, "mb4d", "mb3d", "identity")),
)


def supernet(space: SearchSpace, seed: int = 0) -> Supernet:
    """A supernet in eval mode whose every weight, statistic and logit differs from its neutral initial value."""
    torch.manual_seed(seed)
    net = Supernet(space).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return net


def images(space: SearchSpace, number: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 3, space.image_size, space.image_size, generator=generator).to(dtype)


def random_paths(space: SearchSpace, number: int) -> list[tuple[int, ...]]:
    rng = random.Random(0)
    return [space.path(space.sample(rng)) for _ in range(number)]


def one_hot(space: SearchSpace, path: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    sizes = [len(space.stages[stage].candidates) for stage, _ in space.slots]
    return [torch.eye(size, dtype=dtype)[index] for size, index in zip(sizes, path, strict=True)]


# -- A path is a network -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_path_of_ints_equals_the_built_network() -> None:
    net = supernet(WIDE)
    rng = random.Random(0)
    members = [WIDE.largest, WIDE.smallest, *(WIDE.sample(rng) for _ in range(20))]
    built = [subnetwork(net, arch).eval().double() for arch in members]
    net.double()
    x = images(WIDE, dtype=torch.float64)

    layers = {name for arch in members for name, _ in arch.named_layers()}
    assert {"stage3_flat", "stage3_unflat", "stage4_flat"} <= layers
    outputs = []
    for arch, model in zip(members, built, strict=True):
        y = net(x, WIDE.path(arch))
        assert (y - model(x)).abs().max() < 1e-9, arch
        outputs.append(y)
    # The members are different networks, so that the equalities above say something.
    assert all((a - b).abs().max() > 1e-3 for n, a in enumerate(outputs) for b in outputs[:n])


@torch.no_grad()
def test_a_one_hot_weight_vector_equals_the_int() -> None:
    net = supernet(WIDE).double()
    x = images(WIDE, dtype=torch.float64)
    for path in random_paths(WIDE, 8):
        mixed = net(x, one_hot(WIDE, path, torch.float64))
        assert (mixed - net(x, path)).abs().max() < 1e-9


@torch.no_grad()
def test_a_slot_s_mixture_is_the_weighted_sum_of_its_candidates() -> None:
    net = supernet(WIDE).double()
    slot = net.get_submodule("stages.2.0")
    assert isinstance(slot, MetaPath)
    x = torch.randn(2, 24, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    alone = [slot(x, index) for index in range(3)]
    mixed = slot(x, torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64))
    assert torch.equal(alone[2], x)  # identity
    assert (mixed - (0.2 * alone[0] + 0.5 * alone[1] + 0.3 * alone[2])).abs().max() < 1e-12


@torch.no_grad()
def test_nothing_is_remembered_between_two_paths() -> None:
    net = supernet(WIDE)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = images(WIDE)
    one, other = random_paths(WIDE, 2)
    mixture = sample_path(list(net.logits), 1.0, torch.Generator().manual_seed(0))
    alone = [net(x, one), net(x, other), net(x, mixture)]
    interleaved = [net(x, one), net(x, mixture), net(x, other), net(x, one), net(x, mixture)]
    assert [torch.equal(a, alone[i]) for a, i in zip(interleaved, (0, 2, 1, 0, 2), strict=True)] == [True] * 5
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@torch.no_grad()
def test_images_of_a_batch_do_not_leak_into_one_another() -> None:
    net = supernet(WIDE).double()
    x = images(WIDE, 3, torch.float64)
    mixture = [weights.double() for weights in sample_path(list(net.logits), 1.0, torch.Generator().manual_seed(0))]
    together = net(x, mixture)
    changed = net(torch.cat([x[:1], x[1:] * -7]), mixture)
    assert (together[0] - changed[0]).abs().max() < 1e-12
    assert (together[1:] - changed[1:]).abs().max() > 1e-3


@pytest.mark.parametrize("path", [(0,) * 7, (0,) * 9, ()])
def test_a_path_of_another_length_is_refused(path: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{len(path)} entries for 8 slots"):
        supernet(WIDE)(images(WIDE), path)


@pytest.mark.parametrize("choice", [-1, 2, torch.ones(1), torch.ones(3)])
def test_a_choice_that_its_slot_does_not_have_is_refused(choice: int | Tensor) -> None:
    with pytest.raises(ValueError, match="slot with 2"):
        supernet(WIDE)(images(WIDE), [choice] + [0] * 7)


# -- Learning ----------------------------------------------------------------------------------------------------------


def test_one_mixture_step_reaches_every_weight_and_every_logit() -> None:
    net = supernet(WIDE)  # in train mode a batch norm hides the bias before it
    path = sample_path(list(net.logits), 1.0, torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(net(images(WIDE, 4), path), torch.tensor([0, 1, 2, 3])).backward()
    assert {name for name, _ in net.named_parameters() if name.startswith("logits.")} == {f"logits.{i}" for i in range(8)}
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    identities = [slot.candidates[1] for slot in net.get_submodule("stages.0").children() if isinstance(slot, MetaPath)]
    assert len(identities) == 2 and not any(list(module.parameters()) for module in identities)


def test_an_int_path_trains_what_it_runs_and_nothing_else() -> None:
    net = supernet(WIDE).train()
    net(images(WIDE), WIDE.path(WIDE.smallest)).sum().backward()
    reached = {name.split(".")[0] for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert reached == {"stem", "embeddings", "head"}


def saved_for_backward(net: nn.Module, x: Tensor, way: object) -> tuple[int, Tensor]:
    """How many values a forward pass keeps, and its output."""
    kept: dict[int, int] = {}
    weights = {p.data_ptr() for p in net.parameters()}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in weights:
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = net(x, way)
    return sum(kept.values()), y


@pytest.mark.parametrize("kind", ["mixture", "path", "elastic"])
def test_checkpointed_activations_change_no_number_but_the_memory(kind: str) -> None:
    torch.manual_seed(0)
    net = ElasticSupernet(WIDE) if kind == "elastic" else Supernet(WIDE)
    x = images(WIDE, 4)
    way: object = WIDE.largest if kind == "elastic" else WIDE.path(WIDE.largest)
    found = []
    for checkpointing in (False, True):
        copied = copy.deepcopy(net)
        if kind == "mixture":
            assert isinstance(copied, Supernet)
            way = sample_path(list(copied.logits), 1.0, torch.Generator().manual_seed(0))
        copied.checkpoint_activations = checkpointing
        kept, y = saved_for_backward(copied, x, way)
        nn.functional.cross_entropy(y, torch.tensor([0, 1, 2, 3])).backward()
        gradients = {name: p.grad for name, p in copied.named_parameters() if p.grad is not None}
        found.append((kept, y, gradients, copied.state_dict()))
    (plain, y, gradients, state), (less, *again) = found
    assert less < plain / 2
    torch.testing.assert_close(again, [y, gradients, state], rtol=0, atol=0)
    counts = {name: int(value) for name, value in state.items() if name.endswith("num_batches_tracked")}
    assert max(counts.values()) == 1 and any("mlp" in name for name, count in counts.items() if count)


def test_importance_is_the_log_odds_against_identity() -> None:
    net = supernet(NARROWABLE)
    with torch.no_grad():
        net.logits[0].copy_(torch.tensor([1.5, -0.5]))  # mb4d, identity
        net.logits[1].copy_(torch.tensor([0.25, 2.0, -1.0]))  # mb4d, mb3d, identity
        net.logits[2].copy_(torch.tensor([-3.0, -1.0, 2.0]))
    assert net.importance() == [{"mb4d": 2.0}, {"mb4d": 1.25, "mb3d": 3.0}, {"mb4d": -5.0, "mb3d": -3.0}]
    odds = net.logits[1].softmax(0)
    assert math.exp(net.importance()[1]["mb3d"]) == pytest.approx((odds[1] / odds[2]).item())


def test_a_mixture_in_bfloat16_on_a_gpu_stays_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are fp32, and autocast on GPUs widens all that addcmul takes: twice the memory for every slot."""
    slot = MetaPath([Layer(Identity(8), 4), Layer(Identity(8), 4)])
    # Tensors that say they are on a GPU, where there may be none.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with FakeTensorMode(), torch.autocast("cuda", torch.bfloat16):
        x, weights = torch.empty(2, 8, 4, 4, dtype=torch.bfloat16, device="cuda"), torch.empty(2, device="cuda")
        assert slot(x, weights).dtype == torch.bfloat16
        assert slot(x.float(), weights).dtype == torch.float32


# -- Sampled paths -----------------------------------------------------------------------------------------------------


def draw(logits: list[Tensor], tau: float, seed: int = 0, noise: Noise = "gumbel") -> list[Tensor]:
    return sample_path(logits, tau, torch.Generator().manual_seed(seed), noise)


@pytest.mark.parametrize("noise", ["gumbel", "uniform"])
def test_a_seed_gives_one_path_and_its_weights_sum_to_one(noise: Noise) -> None:
    logits = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (2, 3, 3)]
    path = draw(logits, 0.7, 0, noise)
    assert [weights.shape for weights in path] == [(2,), (3,), (3,)]
    for weights, again, other in zip(path, draw(logits, 0.7, 0, noise), draw(logits, 0.7, 1, noise), strict=True):
        assert weights.sum().item() == pytest.approx(1, abs=1e-6)
        assert (weights > 0).all()
        assert torch.equal(weights, again)
        assert not torch.equal(weights, other)


def test_slots_with_equal_logits_draw_noise_of_their_own() -> None:
    one, other = draw([torch.zeros(3), torch.zeros(3)], 1.0)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("noise", ["gumbel", "uniform"])
def test_gradients_reach_the_logits(noise: Noise) -> None:
    logits = [torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)]
    sum(weights[0] for weights in draw(logits, 0.7, 0, noise)).backward()  # type: ignore[union-attr]
    for logit in logits:
        assert logit.grad is not None and logit.grad.isfinite().all()
        assert logit.grad[0] > 0 > logit.grad[1]  # the first candidate's weight rises with its own logit


@pytest.mark.parametrize("tau", [0, 0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match="tau must be positive"):
        sample_path([torch.zeros(2)], tau)


def test_other_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="gumbel or uniform"):
        sample_path([torch.zeros(2)], 1.0, noise="normal")  # type: ignore[arg-type]


def test_a_low_temperature_gives_nearly_one_candidate_and_a_high_one_all() -> None:
    logits = [torch.zeros(3)] * 200
    assert sum(bool(weights.max() > 0.999) for weights in draw(logits, 1e-4)) >= 198
    assert all(weights.isfinite().all() for weights in draw(logits, 1e-6))
    assert all((weights - 1 / 3).abs().max() < 0.01 for weights in draw(logits, 1e3))


def noise_drawn(noise: Noise, quantile: float) -> Tensor:
    """Return 200,000 draws, taken back out of the weights of one slot and counted from their `quantile`.

    tau * log(weight) is logit + noise - constant.
    """
    logit = torch.linspace(-2, 2, 200_000, dtype=torch.float64)
    (weights,) = draw([logit], 0.5, 3, noise)
    found = 0.5 * weights.log() - logit
    return found - found.quantile(quantile)


def test_uniform_noise_is_uniform_on_0_to_1() -> None:
    noise = noise_drawn("uniform", 0)
    assert 0.999 < (noise.max() - noise.min()).item() < 1
    assert noise.mean().item() == pytest.approx(1 / 2, abs=0.005)
    assert noise.var().item() == pytest.approx(1 / 12, abs=0.001)


def test_gumbel_noise_has_gumbel_s_mean_and_variance() -> None:
    noise = noise_drawn("gumbel", math.exp(-1))  # a Gumbel variable is below 0 with probability 1/e
    assert noise.mean().item() == pytest.approx(EULER, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_with_gumbel_noise_a_candidate_wins_as_often_as_its_softmax_says() -> None:
    logit = torch.tensor([1.0, 0.0, -1.0])
    winners = torch.stack([weights.argmax() for weights in draw([logit] * 20_000, 1.0)])
    assert (winners.bincount() / 20_000 - logit.softmax(0)).abs().max() < 0.015


# -- Inherited weights -------------------------------------------------------------------------------------------------


def weight_of(model: nn.Module, name: str) -> Tensor:
    return model.state_dict()[name]


def test_a_narrowed_network_has_the_leading_slices() -> None:
    net = supernet(NARROWABLE)
    arch = NARROWABLE.arch((8, 16), (("mb4d",), ("identity", "mb3d")))
    model = subnetwork(net, arch)
    whole: Callable[[str], Tensor] = net.state_dict().__getitem__

    # From stage 1 (8 of 16 channels) to stage 2 (16 of 24): a 3x3 convolution (out, in, 3, 3).
    assert whole("embeddings.0.conv.weight").shape == (24, 16, 3, 3)
    assert torch.equal(weight_of(model, "stage2_embedding.conv.weight"), whole("embeddings.0.conv.weight")[:16, :8])
    assert torch.equal(weight_of(model, "stage2_embedding.norm.running_mean"), whole("embeddings.0.norm.running_mean")[:16])
    # q, k and v have 2 heads x (4 + 4 + 8) rows at every width; only what they read is narrowed.
    qkv = "token_mixer.qkv.weight"
    assert whole(f"stages.1.1.candidates.1.{qkv}").shape == (32, 24)
    assert torch.equal(weight_of(model, f"stage2_block2.{qkv}"), whole(f"stages.1.1.candidates.1.{qkv}")[:, :16])
    # The supernet's own weights are copied, not shared.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert whole("embeddings.0.conv.weight").any()


def test_every_slot_inherits_from_its_own_candidate() -> None:
    net = supernet(NARROWABLE)
    arch = NARROWABLE.arch((16, 24), (("identity",), ("mb4d", "mb4d")))
    model = subnetwork(net, arch)
    assert "stage1_block1" not in dict(model.named_children())
    for slot in (1, 2):
        own = net.state_dict()[f"stages.1.{slot - 1}.candidates.0.mlp.fc1.weight"]
        assert torch.equal(weight_of(model, f"stage2_block{slot}.mlp.fc1.weight"), own)


@pytest.mark.parametrize("scored", [True, False])
def test_a_network_is_made_on_the_supernet_s_device(scored: bool) -> None:
    """PyTorch's meta device stands in for a GPU: what was made on the CPU could not be filled from it."""
    net = supernet(NARROWABLE).to("meta")
    scores = UnitScores(tuple(torch.arange(stage.widths[-1]) for stage in NARROWABLE.stages), {}) if scored else None
    model = subnetwork(net, NARROWABLE.arch((8, 16), (("mb4d",), ("identity", "mb3d"))), scores)
    names = [name for name, _ in model.named_buffers()]
    assert "stage2_block2.token_mixer.offsets" in names, "what is in no state dict, too"
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
