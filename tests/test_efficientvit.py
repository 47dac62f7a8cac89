"""EfficientViT's layers: windows, cascaded heads, what a block begins as, stems of every stride, and what runtimes get.

That they are the published ones is shown in test_weights_efficientvit.py.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tables import plain_calibration
from torch import Tensor, nn

from nas import cli
from nas.coreml_package import convert, operations
from nas.evaluation import recalibrate
from nas.measure import Model, build_module, with_ordinary_values
from nas.onnx_model import onnx_bytes
from nas.plan import work_for
from nas.table import LatencyTable, Row, measured_layers
from supernet.arch import ArchConfig, Stage
from supernet.blocks import build_layer
from supernet.blocks.efficientvit import CascadedGroupAttention, WindowAttention
from supernet.errors import InputError
from supernet.metapath import Supernet, sample_path
from supernet.model import build_model
from supernet.space import SearchSpace
from supernet.specs import MB3D, MB4D, ConvStem, Embedding, Head, Layer, Sandwich, Stem, Subsample, is_block
from supernet.weights import subnetwork
from supernet.zoo import zoo

BLOCK = Sandwich(16, num_heads=2, key_dim=4, q_kernels=(5, 3), window=4)
TINY = ("efficientvit-tiny", "mixed-tiny")
NETWORK = ArchConfig(
    "small",
    36,  # maps of 9 and 5 px: both are padded to windows of 4
    5,
    (
        Stage(16, 4, (BLOCK, BLOCK), ConvStem(16)),
        Stage(24, 2, (Sandwich(24, 3, 4, (3, 3, 3), 4, act="hardswish"),), Subsample(24, 16)),
    ),
    "mean_batch_norm",
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ordinary(module: nn.Module) -> nn.Module:
    """The module in float64 and eval mode, no weight at its initial value."""
    return with_ordinary_values(module.double().eval(), seed=0)


def built(spec: Any, resolution: int) -> nn.Module:
    return ordinary(build_layer(Layer(spec, resolution)))


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# -- Attention ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_is_that_of_the_formulas() -> None:
    """Position by position and head by head, on a 3x3 map: softmax over k of (q . k / sqrt(key_dim) + bias(|dy|, |dx|))."""
    attention = ordinary(CascadedGroupAttention(BLOCK, 3))
    x = noise(1, 16, 3, 3)
    outputs: list[Tensor] = []
    for head in range(2):
        chunk = x[:, 8 * head : 8 * head + 8] + (outputs[-1] if outputs else 0)
        qkv = attention.get_submodule(f"qkvs.{head}")(chunk)
        q, k, v = attention.get_submodule(f"dws.{head}")(qkv[:, :4])[0], qkv[0, 4:8], qkv[0, 8:]
        bias = attention.get_parameter("attention_biases")[head].view(3, 3)
        y = torch.empty(1, 8, 3, 3, dtype=torch.float64)
        places = [(row, column) for row in range(3) for column in range(3)]
        for r, c in places:
            score = [q[:, r, c] @ k[:, i, j] / 4**0.5 + bias[abs(r - i), abs(c - j)] for i, j in places]
            share = torch.stack(score).softmax(0)
            y[0, :, r, c] = sum(p * v[:, i, j] for p, (i, j) in zip(share, places, strict=True))
        outputs.append(y)
    expected = attention.get_submodule("proj")(torch.cat(outputs, 1))
    assert distance(attention(x), expected) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("resolution", [1, 3, 4, 5, 8, 9, 11])
def test_windows_are_those_of_the_map_padded_below_and_on_the_right(resolution: int) -> None:
    attention = ordinary(WindowAttention(BLOCK, resolution))
    inner = attention.get_submodule("attn")
    x = noise(2, 16, resolution, resolution)
    side = min(4, resolution)
    padded = torch.zeros(2, 16, 12, 12, dtype=torch.float64)
    padded[:, :, :resolution, :resolution] = x
    expected = torch.zeros_like(padded)
    for top in range(0, resolution, side):
        for left in range(0, resolution, side):
            window = (slice(None), slice(None), slice(top, top + side), slice(left, left + side))
            expected[window] = inner(padded[window])
    assert inner.get_parameter("attention_biases").shape == (2, side * side)
    assert distance(attention(x), expected[:, :, :resolution, :resolution]) < 1e-12


@torch.no_grad()
def test_a_window_does_not_see_another() -> None:
    attention = ordinary(WindowAttention(BLOCK, 9))
    x = noise(1, 16, 9, 9)
    changed = x.clone()
    changed[:, :, 5, 2] += 3  # in the second row of windows, the first column
    moved = (attention(changed) - attention(x)).abs().amax((0, 1)) > 1e-9
    assert moved[4:8, 0:4].all()
    assert moved.sum() == 16


@torch.no_grad()
def test_a_head_takes_what_the_head_before_gave() -> None:
    attention = CascadedGroupAttention(BLOCK, 4).double()
    ordinary(attention)
    x = noise(1, 16, 4, 4)
    last: list[Tensor] = []
    attention.qkvs[1].register_forward_hook(lambda module, given, result: last.append(given[0]))
    attention(x)
    attention.qkvs[0].conv.weight.zero_()  # type: ignore[operator, union-attr]
    attention(x)
    assert distance(last[0], last[1]) > 1e-3
    first = attention.qkvs[0].bn(torch.zeros(1, 16, 4, 4, dtype=torch.float64))[:, 8:]  # type: ignore[operator, union-attr]
    assert distance(last[1], x[:, 8:] + first) < 1e-12


@torch.no_grad()
def test_biases_loaded_after_use_take_effect() -> None:
    attention = ordinary(CascadedGroupAttention(BLOCK, 4))
    x = noise(1, 16, 4, 4)
    before = attention(x)
    attention.get_parameter("attention_biases").copy_(noise(2, 16))
    assert distance(attention(x), before) > 1e-3


# -- Layers ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("spec", "side", "shape"),
    [
        (BLOCK, 9, (16, 9)),
        (Sandwich(24, 3, 8, (3, 1, 7), 7, 1, "gelu"), 3, (24, 3)),
        (Sandwich(8, 1, 4, (3,)), 7, (8, 7)),
        (Subsample(24, 16), 9, (24, 5)),
        (Subsample(24, 16, 1, "hardswish"), 9, (24, 9)),
        (ConvStem(16), 33, (16, 3)),
        (ConvStem(16, 8), 32, (16, 4)),
        (ConvStem(16, 4), 33, (16, 9)),
        (ConvStem(16, 2), 32, (16, 16)),
    ],
    ids=str,
)
def test_shapes_are_those_that_the_layer_says_and_images_do_not_leak(spec: Any, side: int, shape: tuple[int, int]) -> None:
    layer = Layer(spec, side)
    module = built(spec, side)
    assert (layer.leaving.form, layer.leaving.dim, layer.leaving.side) == ("map", *shape)
    x = noise(3, layer.entering.dim, side, side)
    together = module(x)
    assert together.shape == (3, shape[0], shape[1], shape[1])
    assert distance(together[:1], module(x[:1])) < 1e-12
    changed = module(torch.cat([x[:1], -2 * x[1:]]))
    assert distance(together[:1], changed[:1]) < 1e-12
    assert distance(together[1:], changed[1:]) > 1e-3


@pytest.mark.parametrize(("stride", "widths"), [(2, [32]), (4, [16, 32]), (8, [8, 16, 32]), (16, [4, 8, 16, 32])])
def test_a_stem_doubles_its_width_at_each_convolution(stride: int, widths: list[int]) -> None:
    stem = build_layer(Layer(ConvStem(32, stride), 32))
    assert [m.out_channels for m in stem.modules() if isinstance(m, nn.Conv2d)] == widths


@torch.no_grad()
def test_a_block_begins_as_its_input_and_a_sub_sample_group_does_not() -> None:
    x = noise(2, 16, 9, 9)
    for mode in (True, False):
        block = build_layer(Layer(BLOCK, 9)).double().train(mode)
        assert torch.equal(block(x), x)
    group = build_layer(Layer(Subsample(24, 16), 9)).double()
    assert distance(group.get_submodule("res1")(x), x) > 0.1


def test_training_from_the_initial_values_reaches_every_weight_and_learns() -> None:
    torch.manual_seed(0)
    model = build_model(NETWORK)
    x, labels = torch.randn(20, 3, 36, 36), torch.arange(20) % 5
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    begin = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
        assert not torch.equal(parameter, begin[name]), name
    assert losses[-1] < 0.5 * losses[0]


# -- Head --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tokens", [False, True])
def test_the_head_is_mean_then_batch_norm_then_linear(tokens: bool) -> None:
    head = built(Head(16, 5, tokens, "mean_batch_norm"), 3)
    x = noise(4, 16, 3, 3)
    given = x.flatten(2).transpose(1, 2) if tokens else x
    norm, fc = head.get_submodule("norm"), head.get_submodule("fc")
    assert isinstance(norm, nn.BatchNorm1d)
    assert distance(head(given), fc(norm(x.mean((2, 3))))) < 1e-12
    head.train()
    means = x.mean((2, 3))
    normal = (means - means.mean(0)) / (means.var(0, correction=0) + norm.eps).sqrt()
    assert distance(head(given), fc(normal * norm.weight + norm.bias)) < 1e-12


@torch.no_grad()
def test_recalibration_fits_the_head_s_statistics() -> None:
    head = built(Head(16, 5, False, "mean_batch_norm"), 3)
    x = 3 * noise(300, 16, 3, 3) + noise(16, 1, 1, seed=1)
    recalibrate(nn.Sequential(head), x)
    means, norm = x.mean((2, 3)), head.get_submodule("norm")
    assert distance(norm.get_buffer("running_mean"), means.mean(0)) < 1e-12
    assert distance(norm.get_buffer("running_var"), means.var(0)) < 1e-12
    assert not head.training


# -- Runtimes ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("arch", [NETWORK, zoo("efficientvit_m1").at(96)], ids=["small", "m1 at 96 px"])
def test_onnx_equals_eager(arch: ArchConfig) -> None:
    model = with_ordinary_values(build_model(arch).eval(), 0)
    x = noise(1, 3, arch.image_size, arch.image_size).float()
    expected = model(x)
    session = onnxruntime.InferenceSession(onnx_bytes(model, x), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"image": x.numpy()})[0])
    assert distance(found, expected) < 1e-4 * expected.abs().max()
    other = torch.from_numpy(session.run(None, {"image": np.negative(x.numpy())})[0])
    assert distance(other, expected) > 1e-2 * expected.abs().max()


@pytest.mark.parametrize(
    "model",
    [
        (Layer(BLOCK, 9),),
        (Layer(MB4D(16), 4), Layer(Head(16, 10, False, "mean_batch_norm"), 4)),
        (Layer(MB3D(16), 4), Layer(Head(16, 10, True, "mean_batch_norm"), 4)),
        tuple(NETWORK.layers()),
    ],
    ids=lambda model: str(model[-1])[:40],
)
def test_blocks_convert_to_core_ml_without_casts_or_norms(model: Model) -> None:
    found = operations(convert(*build_module(model, deploy=True)))
    assert not {"cast", "batch_norm"} & set(found)


# -- Spaces ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_a_path_of_ints_equals_the_built_network(name: str) -> None:
    space = SearchSpace.load(name)
    torch.manual_seed(0)
    net = Supernet(space)
    with_ordinary_values(net, 0)
    net.double().eval()
    x = noise(2, 3, 32, 32)
    rng = random.Random(0)
    for _ in range(6):
        kinds = [[rng.choice(stage.kinds) for _ in range(stage.depth)] for stage in space.stages]
        arch = space.arch([stage.widths[-1] for stage in space.stages], kinds)
        expected = subnetwork(net, arch).double().eval()(x)
        assert distance(net(x, space.path(arch)), expected) < 1e-6 * expected.abs().max()  # inherited in float32


@pytest.mark.parametrize("name", TINY)
def test_narrowed_networks_run_and_mixtures_train(name: str) -> None:
    space = SearchSpace.load(name)
    torch.manual_seed(0)
    net = Supernet(space)
    x = noise(4, 3, 32, 32).float()
    rng = random.Random(1)
    for arch in [space.smallest, *(space.sample(rng) for _ in range(4))]:
        assert subnetwork(net, arch).eval()(x).isfinite().all()
    net(x, sample_path(list(net.logits), 1.0, torch.Generator().manual_seed(0))).logsumexp(1).sum().backward()
    scales = [p for n, p in net.named_parameters() if n.endswith("mixer.m.attn.proj.1.bn.weight")]
    assert scales and all(p.grad is not None and p.grad.any() for p in scales)  # they are zero, and leave it


@pytest.mark.parametrize("name", ["efficientvit", "efficientvit-tiny", "mixed", "mixed-tiny"])
def test_a_space_s_candidates_fit_all_its_widths(name: str) -> None:
    space = SearchSpace.load(name)
    assert all(len(stage.widths) <= 6 and not any(width % 16 for width in stage.widths) for stage in space.stages)
    kinds = {candidate.kind for stage in space.stages for candidate in stage.candidates}
    assert kinds == ({"mb4d", "mb3d", "sandwich", "identity"} if "mixed" in name else {"sandwich", "identity"})


def test_m4_is_in_the_space() -> None:
    assert zoo("efficientvit_m4") in SearchSpace.load("efficientvit")


MICRO = """
name: micro
image_size: 32
num_classes: 10
head: mean_batch_norm
stages:
- {stride: 4, entry: conv_stem, widths: [8], depth: 1, candidates: [{kind: sandwich, num_heads: 2, key_dim: 4}, identity]}
- {stride: 2, entry: subsample, widths: [16, 24], depth: 2, candidates: [{kind: sandwich, num_heads: 2, key_dim: 4}, identity]}
"""


def test_a_search_ends_with_the_entries_and_the_head_of_its_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "micro.yaml").write_text(MICRO)
    settings = "{weight_epochs: 1, mixture_epochs: 1, images_per_epoch: 128, recalibration_images: 32, score_images: 32}"
    (tmp_path / "settings.yaml").write_text(settings)
    space = SearchSpace.load("micro.yaml")
    rows = {layer: Row(1.0, 0.9, 1.1, "slope") for layer in measured_layers(space.layers())}
    meta = {"reference_ms": {"cached_ms": 0.25, "streaming_ms": 0.3}}
    table = LatencyTable("phone-npu", rows, (plain_calibration(space),), "imported", meta).save(tmp_path)
    arguments = ["--space", "micro.yaml", "--config", "settings.yaml", "--table", str(table), "--device", "phone-npu"]
    cli.search([*arguments, "--target-ms", "5", "--out", "run"])  # three layers are always there: two blocks may stay
    found = ArchConfig.load("run/searched.yaml")
    assert found in space
    assert found.head == "mean_batch_norm"
    assert [type(layer.spec) for layer in found.layers()].count(Sandwich) == 2
    cli.export(["run/searched.yaml", "--weights", "run/weights.safetensors", "--format", "onnx", "--out", "model.onnx"])


# -- Files, and what is refused ----------------------------------------------------------------------------------------


def test_knobs_survive_a_file(tmp_path: Path) -> None:
    NETWORK.save(tmp_path / "network.yaml")
    loaded = ArchConfig.load(tmp_path / "network.yaml")
    assert loaded.named_layers() == NETWORK.named_layers()
    assert "q_kernels: [5, 3]" in (tmp_path / "network.yaml").read_text()


def test_knobs_survive_a_latency_table(tmp_path: Path) -> None:
    layers = measured_layers([*NETWORK.layers(), Layer(Sandwich(8, 1, q_kernels=(3,)), 4)])
    table = LatencyTable("a-cpu", {layer: Row(1.0, 0.5, 1.5, "slope") for layer in layers})
    assert LatencyTable.load(table.save(tmp_path)).rows == table.rows


@pytest.mark.parametrize("name", TINY)
def test_every_layer_of_a_space_can_be_measured(name: str) -> None:
    """The pieces that its rows are made of have layers that fit each other, and run."""
    space = SearchSpace.load(name)
    work = work_for(space)
    assert set(work.rows) == set(measured_layers(space.layers()))
    pieces = {model for layer, terms in work.rows.items() if not is_block(layer.spec) for model in terms if model}
    for model in pieces:
        module, example = build_module(model, deploy=True)
        with torch.no_grad():
            assert module(example).isfinite().all()


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "heads that do not divide": (lambda: Sandwich(40, 3), "dim must be a multiple of num_heads, but 40 is none of 3"),
    "too few kernels": (lambda: Sandwich(16, 4, q_kernels=(3, 3)), "one entry for each of 4 heads, but is (3, 3)"),
    "even kernel": (lambda: Sandwich(16, 2, q_kernels=(3, 4)), "q_kernels must be a list of odd whole numbers"),
    "kernel as text": (lambda: Sandwich(16, 1, q_kernels=("3",)), "odd whole numbers"),  # type: ignore[arg-type]
    "one kernel": (lambda: Sandwich(16, 1, q_kernels=3), "odd whole numbers, but is 3"),  # type: ignore[arg-type]
    "window 0": (lambda: Sandwich(16, window=0), "window must be a whole number of at least 1, but is 0"),
    "ratio of a half": (lambda: Sandwich(16, ffn_ratio=0.5), "ffn_ratio must be a whole number"),  # type: ignore[arg-type]
    "activation": (lambda: Sandwich(16, act="swish"), "unknown Sandwich activation 'swish'"),
    "stem stride": (lambda: ConvStem(16, 1), "the stride of a conv_stem must be 2, 4, 8 or 16, but is 1"),
    "stem width": (lambda: ConvStem(12), "must be a multiple of 8, but is 12"),
    "sub-sample stride": (lambda: Subsample(16, 16, 4), "must be 1 or 2, but is 4"),
    "sub-sample activation": (lambda: Subsample(16, 16, act="elu"), "unknown Subsample activation 'elu'"),
    "head": (lambda: Head(16, form="mean_batch_nrm"), "did you mean mean_batch_norm"),
    "stem later": (
        lambda: ArchConfig("a", 32, 5, (Stage(16, 4, ()), Stage(16, 2, (), ConvStem(16)))),
        "a stage after the first is entered by one of embedding",
    ),
    "sub-sample first": (
        lambda: ArchConfig("a", 32, 5, (Stage(16, 2, (), Subsample(16, 16)),)),
        "the first stage is entered by one of stem, conv_stem",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        make()
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_width_that_a_candidate_cannot_have_is_refused_by_the_space(tmp_path: Path) -> None:
    text = (
        SearchSpace.load("efficientvit-tiny").to_yaml().replace("num_heads: 2", "num_heads: 3").replace("[5, 3]", "[5, 3, 3]")
    )
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(InputError, match="stage 1: Sandwich: dim must be a multiple of num_heads, but 32 is none of 3"):
        SearchSpace.load(tmp_path / "space.yaml")


def test_entries_without_knobs_are_the_ordinary_ones() -> None:
    kinds = {type(layer.spec) for layer in ArchConfig("a", 32, 5, (Stage(16, 4, ()), Stage(16, 2, ()))).layers()}
    assert kinds == {Stem, Embedding, Head}
