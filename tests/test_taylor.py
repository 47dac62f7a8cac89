"""Units that do nothing are found by gradient times weight, and what a search keeps of it is the same after a kill."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from refusals import refusal
from torch import Tensor, nn

from nas import taylor
from nas.data import ImageData, Images
from nas.evaluation import Evaluator
from nas.settings import SupernetSettings
from nas.slimming import slim
from nas.supernet_training import channel_method
from nas.taylor import BATCH, calibration_batches, channels, from_json, supernet_scores, to_json, unit_scores
from supernet.arch import ArchConfig
from supernet.metapath import Supernet
from supernet.model import build_model
from supernet.space import SearchSpace, StageSpace
from supernet.specs import MB3D, MB4D, AttnEmbedding, AttnFFN, Identity, Sandwich, Stem
from supernet.units import at_widths, key, sections
from supernet.weights import subnetwork

KEYS = {"num_heads": 2, "key_dim": 8, "attn_ratio": 2}
SPACE = SearchSpace(
    "small",
    8,
    3,
    (
        StageSpace((8, 16), 1, 2, (MB4D(16, mlp_ratio=2), Sandwich(16, num_heads=2), Identity(16)), Stem(8)),
        StageSpace((8, 16), 2, 2, (AttnFFN(16, **KEYS), MB3D(16, **KEYS), Identity(16)), AttnEmbedding(8, 8, **KEYS)),
    ),
    head="batch_norm",
)
LARGEST = SPACE.largest


def pictures(number: int, seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (number, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(number), torch.randint(0, 3, (number,), generator=generator))


@pytest.fixture(scope="module")
def data() -> ImageData:
    return ImageData(pictures(40, 0), pictures(30, 1), pictures(30, 2), ("a", "b", "c"), 8, False, False, (), "", "")


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    torch.manual_seed(0)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape) * 0.3)


@pytest.fixture
def model() -> nn.Sequential:
    found = build_model(LARGEST)
    randomise(found)
    return found


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    net = Supernet(SPACE)
    randomise(net)
    return net.eval()


def test_it_is_the_change_of_the_loss_to_first_order(model: nn.Sequential, data: ImageData) -> None:
    """Of hidden channels and values: the derivative of the loss by a factor on the unit, seen from one side alone.

    A factor on what the second convolution reads is gradient times weight summed over the convolution's column.
    """
    ((x, y),) = calibration_batches(data, 40, batch=40)
    scores = unit_scores(model, LARGEST, [(x, y)])
    hidden = scores.inside[key("stage1_block1", LARGEST.stages[0].blocks[0])]["hidden"]
    mlp = model.get_submodule("stage1_block1.mlp")
    gate = torch.ones(len(hidden), requires_grad=True)
    handle = mlp.get_submodule("act").register_forward_hook(lambda _, __, out: out * gate[:, None, None])
    F.cross_entropy(model(x), y).backward()
    handle.remove()
    # The parts before the activation add their own share: it is 0 for a unit without weights, and sums up with this one.
    own = torch.zeros(len(hidden))
    for name in ("fc1.weight", "fc1.bias", "norm1.weight", "norm1.bias"):
        parameter = mlp.get_parameter(name)
        assert parameter.grad is not None
        own += (parameter * parameter.grad).detach().reshape(len(own), -1).sum(1)
    assert gate.grad is not None
    torch.testing.assert_close(hidden.float(), (gate.grad + own).abs(), rtol=1e-4, atol=1e-6)


def test_scores_are_averaged_over_batches(model: nn.Sequential, data: ImageData) -> None:
    batches = calibration_batches(data, 40)
    assert [len(y) for _, y in batches] == [BATCH, BATCH], "a last one of 8 would count for more"
    assert [len(y) for _, y in calibration_batches(data, 8)] == [8]
    whole = unit_scores(model, LARGEST, batches)
    alone = [unit_scores(model, LARGEST, [batch]) for batch in batches]
    torch.testing.assert_close(whole.stages[1], torch.stack([one.stages[1] for one in alone]).mean(0))
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training
    assert torch.equal(calibration_batches(data, 40, seed=1)[0][0], calibration_batches(data, 16, seed=1)[0][0])
    assert not torch.equal(calibration_batches(data, 40, seed=1)[0][0], batches[0][0])


def test_a_weight_that_is_fixed_has_no_part_in_it(model: nn.Sequential, data: ImageData) -> None:
    fixed = copy.deepcopy(model)
    dict(fixed.named_parameters())["stem.conv2.weight"].requires_grad_(False)
    found = unit_scores(fixed, LARGEST, calibration_batches(data, 8))
    free = unit_scores(model, LARGEST, calibration_batches(data, 8))
    torch.testing.assert_close(found.stages[1], free.stages[1])
    assert found.stages[0].shape == free.stages[0].shape and not torch.equal(found.stages[0], free.stages[0])


def test_every_unit_of_every_layer_has_a_score(model: nn.Sequential, data: ImageData) -> None:
    for method in ("taylor", "magnitude", "first"):
        scores = unit_scores(model, LARGEST, calibration_batches(data, 16), method)  # type: ignore[arg-type]
        assert [len(of) for of in scores.stages] == [16, 16]
        for name, layer in LARGEST.named_layers():
            own = scores.of(name, layer.spec)
            assert {role: len(values) for role, values in own.items()} == {r: ends[-1] for r, ends in sections(layer).items()}
            if method != "first":
                assert all(bool((values > 0).any()) for values in own.values())


Planted = Callable[[nn.Module], None]


def useless_hidden(model: nn.Module) -> None:
    """What is large going in is not read."""
    mlp = model.get_submodule("stage1_block1.mlp")
    mlp.get_parameter("fc1.weight")[3:9] *= 30
    mlp.get_parameter("fc2.weight")[:, 3:9] = 0


def useless_values(model: nn.Module) -> None:
    mixer = model.get_submodule("stage2_block1.token_mixer")
    mixer.get_parameter("v.conv.weight")[16 + 3 : 16 + 9] *= 30  # of the second head
    mixer.get_parameter("proj.conv.weight")[:, 16 + 3 : 16 + 9] = 0


def useless_channels(model: nn.Module) -> None:
    """The first stage's channels 3 to 8 are large, and read by nothing."""
    model.get_parameter("stem.conv2.weight")[3:9] *= 30
    for name in ("stage1_block1.mlp.fc1.weight", "stage1_block2.mlp.fc1.weight", "stage2_embedding.conv.conv.weight"):
        model.get_parameter(name)[:, 3:9] = 0
    for name in ("k.conv.weight", "v.conv.weight", "q.proj.conv.weight"):
        model.get_parameter(f"stage2_embedding.attn.{name}")[:, 3:9] = 0


@pytest.mark.parametrize(
    ("plant", "layer", "role"),
    [
        (useless_hidden, "stage1_block1", "hidden"),
        (useless_values, "stage2_block1", "value1"),
        (useless_channels, "stage1_block1", "dim"),
    ],
)
def test_taylor_finds_useless_units_that_magnitude_takes_for_the_best(
    plant: Planted, layer: str, role: str, model: nn.Sequential, data: ImageData
) -> None:
    with torch.no_grad():
        plant(model)
    found = {}
    for method in ("taylor", "magnitude"):
        scores = unit_scores(model, LARGEST, calibration_batches(data, 32), method)  # type: ignore[arg-type]
        found[method] = scores.of(layer, dict(LARGEST.named_layers())[layer].spec)[role]
    assert set(found["taylor"].argsort()[:6].tolist()) == set(range(3, 9))
    assert found["taylor"][3:9].abs().max() < 1e-9
    assert set(found["magnitude"].argsort()[-6:].tolist()) == set(range(3, 9))


def test_magnitude_is_the_norm_of_all_coupled_weights(model: nn.Sequential) -> None:
    scores = unit_scores(model, LARGEST, [], "magnitude")
    hidden = scores.inside[key("stage1_block1", LARGEST.stages[0].blocks[0])]["hidden"]
    mlp = model.get_submodule("stage1_block1.mlp")
    rows = [mlp.get_parameter(f"{name}") for name in ("fc1.weight", "fc1.bias", "norm1.weight", "norm1.bias")]
    together = torch.cat([row.reshape(32, -1) for row in rows] + [mlp.get_parameter("fc2.weight")[..., 0, 0].T], 1)
    torch.testing.assert_close(hidden.float(), together.norm(dim=1).detach())


def test_first_keeps_what_the_leading_slices_keep_where_no_head_owns_channels(supernet: Supernet) -> None:
    space = SPACE
    arch = space.arch((8, 8), ((space.stages[0].kinds[0], "identity"), ("attn_ffn", "mb3d")))
    scores = supernet_scores(supernet, space.largest, calibration_batches_of(2), "first")
    # one of the first stage's candidates has two heads, so that each of them keeps the first half of its own channels
    kept = subnetwork(supernet, arch, scores).get_parameter("stem.norm2.weight")
    first = supernet.stem.get_parameter("norm2.weight")
    assert torch.equal(kept, torch.cat((first[:4], first[8:12])))
    assert torch.equal(kept, subnetwork(supernet, arch).get_parameter("stem.norm2.weight")), "as without any scores"
    wide = subnetwork(supernet, arch).get_submodule("stage2_block1").state_dict()
    own = subnetwork(supernet, arch, scores).get_submodule("stage2_block1").state_dict()
    assert all(torch.equal(wide[name], own[name]) for name in wide)


def calibration_batches_of(number: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 3) for _ in range(number)]


def test_all_candidates_of_a_supernet_are_judged_and_its_channels_in_the_first_network(supernet: Supernet) -> None:
    batches = calibration_batches_of(2)
    start = SPACE.arch((16, 16), (("sandwich", SPACE.stages[0].kinds[0]), ("attn_ffn", "mb3d")))
    scores = supernet_scores(supernet, start, batches)
    for at, stage in enumerate(SPACE.stages, 1):
        for slot in range(1, stage.depth + 1):
            for candidate in stage.candidates[:-1]:
                assert key(f"stage{at}_block{slot}", candidate) in scores.inside
    other = supernet_scores(supernet, SPACE.largest, batches)
    assert not torch.equal(scores.stages[0], other.stages[0])
    again = supernet_scores(supernet, start, batches)
    assert all(torch.equal(a, b) for a, b in zip(scores.stages, again.stages, strict=True))
    assert "largest widths" in refusal(lambda: supernet_scores(supernet, at_widths(start, (8, 16)), batches))


def test_evaluations_with_kept_channels_do_not_depend_on_what_was_evaluated_before(supernet: Supernet, data: ImageData) -> None:
    scores = supernet_scores(supernet, SPACE.largest, calibration_batches(data, 32))
    rng = random.Random(0)
    networks = [SPACE.largest, SPACE.smallest, *(SPACE.sample(rng) for _ in range(8))]
    alone = {arch: Evaluator(supernet, data, memory_bytes=0, kept=scores)(arch) for arch in networks}
    evaluate = Evaluator(supernet, data, kept=scores)
    for arch in rng.sample(networks * 2, 2 * len(networks)):
        assert evaluate(arch) == alone[arch]
    assert evaluate.layers_run < sum(len(SPACE.fit(arch).layers()) for arch in networks * 2)
    assert any(Evaluator(supernet, data)(arch) != alone[arch] for arch in networks)  # the first channels are others
    assert Evaluator(supernet, data)(SPACE.largest) == alone[SPACE.largest]


def test_a_search_goes_on_with_the_same_channels(
    supernet: Supernet, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "channels.json"
    start = SPACE.largest
    first = channels(path, supernet, start, data, 32, "taylor")
    assert first is not None and json.loads(path.read_text())["method"] == "taylor"

    def not_again(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(taylor, "supernet_scores", not_again)
    again = channels(path, supernet, start, data, 32, "taylor")
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(first.stages, again.stages, strict=True))
    assert to_json(first, "taylor") == to_json(again, "taylor") == path.read_text()
    assert channels(tmp_path / "none.json", supernet, start, data, 32, "first") is None
    path.write_text(path.read_text()[:50])
    assert "is not whole JSON: remove it" in refusal(lambda: from_json(path))
    path.write_text('{"stages": 3, "inside": {}}')
    assert "cannot be used" in refusal(lambda: from_json(path))
    path.unlink()
    path.mkdir()
    assert "cannot be read (" in refusal(lambda: from_json(path)), "which says nothing of what it holds"


def test_what_cannot_be_judged_is_refused(model: nn.Sequential, data: ImageData) -> None:
    assert "unknown channels 'best'" in refusal(lambda: unit_scores(model, LARGEST, [], "best"))  # type: ignore[arg-type]
    assert "calibration images" in refusal(lambda: unit_scores(model, LARGEST, []))
    with torch.no_grad():
        model.get_parameter("head.fc.weight").fill_(torch.nan)
    assert "not finite" in refusal(lambda: unit_scores(model, LARGEST, calibration_batches(data, 16)))
    assert "unknown channels 'random'" in refusal(lambda: SupernetSettings(channels="random"))  # type: ignore[arg-type]


def test_an_elastic_supernet_keeps_the_first_channels_as_it_was_trained() -> None:
    assert channel_method(SupernetSettings()) == "taylor"
    assert channel_method(SupernetSettings(paths="elastic", mixture_epochs=0)) == "first"
    said = refusal(lambda: SupernetSettings(paths="elastic", mixture_epochs=0, channels="taylor"))
    assert "first channels" in said


def test_a_network_with_tokens_and_layer_norms_is_judged() -> None:
    tiny = SearchSpace.load("efficientformer-tiny")
    kinds = [["identity"] * 2, ["mb4d", "identity"], ["mb4d"] * 3 + ["mb3d"], ["mb3d"] * 3]
    arch = tiny.arch(tiny.smallest.widths, kinds)
    scores = unit_scores(build_model(arch), arch, [(torch.randn(4, 3, 32, 32), torch.arange(4))])
    assert [len(of) for of in scores.stages] == list(arch.widths)
    assert scores.inside[key("stage4_block3", arch.stages[3].blocks[2])].keys() == sections(arch.layers()[-2]).keys() - {"dim"}


class Units:
    """A thousandth of a millisecond for every hidden channel and every key dimension."""

    def predict_ms(self, arch: ArchConfig) -> float:
        blocks = [block for stage in arch.stages for block in stage.blocks]
        return sum(getattr(b, "mlp_ratio", 0) * b.dim + 8 * getattr(b, "key_dim", 0) for b in blocks) / 1000 + 0.01


def test_slimming_lowers_expansions_and_keys_around_a_network() -> None:
    """Where an empty slot would cost most, another candidate of the same form is taken: a smaller one, as it costs less."""
    tiny = SearchSpace.load("efficientformer-tiny")
    arch = tiny.arch((16, 32, 64, 96), (["mb4d"] * 2, ["mb4d"] * 2, ["mb4d"] * 4, ["mb3d"] * 3))
    space = SearchSpace.around(arch, ffn_ratios=(3, 2), key_dims=(16,))
    # the network's own blocks score best, and the smaller ones by their size
    odds = [{kind: -float(at) for at, kind in enumerate(space.stages[i].kinds) if kind != "identity"} for i, _ in space.slots]
    worth = Units()

    def loss(found: ArchConfig) -> float:
        empty = sum(isinstance(block, Identity) for stage in found.stages for block in stage.blocks)
        tokens = sum(block.tokens for block in found.stages[-1].blocks)
        return 10 * empty - 10 * tokens - worth.predict_ms(found)

    found = slim(space, odds, loss, worth, 0.55 * worth.predict_ms(arch))
    assert found.start.stages == arch.stages
    blocks = [block for stage in found.arch.stages for block in stage.blocks]
    assert sorted({block.kind for block in blocks}) == ["mb3d", "mb4d"] and found.arch.widths == arch.widths
    assert any(isinstance(block, MB3D) and block.key_dim == 16 for block in blocks)
    assert any(isinstance(block, MB4D) and block.mlp_ratio < 4 for block in blocks)
    assert "mb4d to mb4d(mlp_ratio=3) in slot 1 of stage 1" in [step.taken.action for step in found.steps]
