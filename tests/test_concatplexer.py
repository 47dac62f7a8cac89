"""ConcatPlexer: one image a group is the plain network; a mask between images is each image by itself; nothing is dropped."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nas import coreml_package
from nas.data import Images, load_images
from nas.export import export_network
from nas.measure import build_module, with_ordinary_values
from nas.onnx_model import onnx_bytes
from nas.plan import random_network, terms_of
from nas.recipe import RECIPES
from nas.steps import parameter_groups
from nas.table import LatencyTable, Row
from nas.training import train_network
from supernet.arch import ArchConfig, MultiplexSpec, Stage
from supernet.blocks.concatplexer import Reducer, places
from supernet.errors import InputError
from supernet.model import build_model, count
from supernet.ports import Group
from supernet.space import SearchSpace
from supernet.specs import MB3D, MB4D, PatchStem, ViT
from supernet.zoo import zoo

VIT = ArchConfig("vit", 24, 5, (Stage(24, 4, (ViT(24, num_heads=3),) * 3, PatchStem(8)),), "class_token")  # maps of 6 x 6
META = ArchConfig(
    "meta", 28, 5, (Stage(16, 4, (MB4D(16), MB3D(16, num_heads=2, key_dim=8), MB3D(16, num_heads=2, key_dim=8))),)
)
PLAIN = {"vit": VIT, "meta": META}  # META: of 7 x 7, which windows of two do not fit

MUX = replace(VIT, mux=MultiplexSpec(2))

SPECS = {
    f"{name} {mux.n} {mux.reducer} from {mux.start}, {mux.mixing}, {mux.readout}": replace(arch, mux=mux)
    for name, arch in PLAIN.items()
    for mux in (
        MultiplexSpec(2),
        MultiplexSpec(4, readout="shared"),
        MultiplexSpec(8, "avg", 1),
        MultiplexSpec(2, "none", 1),
        MultiplexSpec(4, mixing="block"),
        MultiplexSpec(2, mixing="none"),
    )
}


def build(arch: ArchConfig) -> torch.nn.Module:
    """The network with weights far from their first values: a segment or a pair of zero would not show."""
    return with_ordinary_values(build_model(arch).eval(), seed=0)


def group_of(arch: ArchConfig) -> Group:
    group = arch.layers()[-1].entering.group
    assert group is not None
    return group


def images(count: int, arch: ArchConfig) -> Tensor:
    return torch.randn(count, 3, arch.image_size, arch.image_size, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def logits(model: torch.nn.Module, x: Tensor) -> Tensor:
    found: Tensor = model(x)
    return found


# -- One image in a group ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", PLAIN.values(), ids=PLAIN)
def test_one_image_a_group_is_no_multiplexing_to_the_bit(plain: ArchConfig) -> None:
    found = []
    for mux in (None, MultiplexSpec(1), MultiplexSpec(1, "avg", 7, "none")):
        torch.manual_seed(0)
        model = build_model(replace(plain, mux=mux)).eval()
        found.append((model.state_dict(), logits(model, images(3, plain))))
        assert count(replace(plain, mux=mux)) == count(plain)
        assert not replace(plain, mux=mux).multiplexes
    for state, y in found[1:]:
        assert state.keys() == found[0][0].keys()
        assert all(torch.equal(tensor, found[0][0][key]) for key, tensor in state.items())
        assert torch.equal(y, found[0][1])


# -- Who meets whom ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reducer", ["conv", "avg", "none"])
@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("plain", PLAIN.values(), ids=PLAIN)
def test_a_block_mask_is_each_image_by_itself(plain: ArchConfig, n: int, reducer: str) -> None:
    """The control without concatenation has the same weights and, in float64, the same logits."""
    masked, alone = (build(replace(plain, mux=MultiplexSpec(n, reducer, 1, mixing))).double() for mixing in ("block", "none"))
    alone.load_state_dict(masked.state_dict())
    x = images(2 * n + 1, plain).double()
    torch.testing.assert_close(logits(masked, x), logits(alone, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("arch", SPECS.values(), ids=SPECS)
def test_only_images_of_a_group_that_mixes_meet(arch: ArchConfig) -> None:
    assert arch.mux is not None
    n, model = arch.mux.n, build(arch)
    x = images(2 * n, arch)
    other = x.clone()
    other[0] = torch.randn_like(other[0])
    moved = (logits(model, x) - logits(model, other)).abs().amax(1)
    assert moved[0] > 1e-3
    assert (moved[1:n] > 1e-6).all() == (arch.mux.mixing == "full")
    if arch.mux.mixing != "full":
        assert (moved[1:n] < 1e-6).all()
    assert (moved[n:] < 1e-6).all()


@pytest.mark.parametrize("arch", SPECS.values(), ids=SPECS)
def test_a_ragged_last_group_is_filled_with_its_own_images(arch: ArchConfig) -> None:
    assert arch.mux is not None
    n, model = arch.mux.n, build(arch)
    x = images(n + 1, arch)
    found = logits(model, x)
    assert found.shape == (n + 1, 5)
    torch.testing.assert_close(found[:n], logits(model, x[:n]))
    torch.testing.assert_close(found[n:], logits(model, x[n:].expand(n, -1, -1, -1))[:1])


@pytest.mark.parametrize("plain", PLAIN.values(), ids=PLAIN)
def test_filling_repeats_the_last_images_in_turn(plain: ArchConfig) -> None:
    model = build(replace(plain, mux=MultiplexSpec(8)))
    x = images(3, plain)
    torch.testing.assert_close(logits(model, x), logits(model, x[[0, 1, 2, 0, 1, 2, 0, 1]])[:3])


# -- What each part does -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        "stage1_join.reducer.conv.weight",
        "stage1_join.segments",
        "stage1_block2.pair_biases",
        "stage1_block3.pair_biases",
        "head.demultiplexers.1.fc1.weight",
    ],
)
def test_every_part_decides(part: str) -> None:
    arch = replace(META, mux=MultiplexSpec(2, mixing="full"))
    model = build(arch)
    before = logits(model, images(2, arch))
    with torch.no_grad():
        model.get_parameter(part).zero_()
    assert (logits(model, images(2, arch)) - before).abs().max() > 1e-4


def test_a_pair_s_scalar_is_between_its_images_alone() -> None:
    """A very low one for (0, 1) keeps image 1 from image 0, not the other way round."""
    arch = replace(META, mux=MultiplexSpec(2))
    model = build(arch)
    with torch.no_grad():
        for block in ("stage1_block2", "stage1_block3"):
            model.get_parameter(f"{block}.pair_biases")[0, 1] = -1e9
    x = images(2, arch)
    first, second = x.clone(), x.clone()
    first[0], second[1] = torch.randn_like(x[0]), torch.randn_like(x[1])
    assert (logits(model, second) - logits(model, x))[0].abs().max() < 1e-6
    assert (logits(model, first) - logits(model, x))[1].abs().max() > 1e-4


def test_inside_an_image_the_bias_is_the_plain_network_s() -> None:
    """Without reduction, segments and demultiplexers, a mask gives the plain network's logits, with its weights."""
    for plain in PLAIN.values():
        model = build(replace(plain, mux=MultiplexSpec(2, "none", mixing="block"))).double()
        with torch.no_grad():
            for key, tensor in model.named_parameters():
                if "segments" in key or ("fc2" in key and "demultiplexers" in key):
                    tensor.zero_()
        network = build_model(plain).eval().double()
        network.load_state_dict({key: model.state_dict()[key] for key in network.state_dict()})
        x = images(4, plain).double()
        torch.testing.assert_close(logits(model, x), logits(network, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("plain", PLAIN.values(), ids=PLAIN)
def test_what_is_shared_has_as_much_of_each_image(plain: ArchConfig) -> None:
    """Without segments and pair scalars slots are alike, so the order of the images in a group changes nothing."""
    model = build(replace(plain, mux=MultiplexSpec(4, start=1, readout="shared"))).double()
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if key.endswith(("segments", "pair_biases")):
                tensor.zero_()
    x = images(4, plain).double()
    torch.testing.assert_close(logits(model, x), logits(model, x[[2, 0, 3, 1]]), rtol=1e-8, atol=1e-8)
    assert (logits(model, x)[0] - logits(model, x)[1]).abs().max() > 1e-3, "each slot has its own demultiplexer"


@pytest.mark.parametrize(("n", "sides"), [(2, (7, 4)), (4, (4, 4)), (8, (4, 2)), (16, (2, 2))])
def test_windows_cover_the_map_and_keep_its_offsets(n: int, sides: tuple[int, int]) -> None:
    group = Group(n, "avg", "full", "slot", class_token=False)
    reducer = Reducer(8, 7, "avg", group.window)
    constant = torch.full((1, 49, 8), 3.0)
    assert reducer(constant).shape == (1, sides[0] * sides[1], 8)
    torch.testing.assert_close(reducer(constant), torch.full((1, sides[0] * sides[1], 8), 3.0))
    firsts = places(7, group.window)
    assert len(firsts) == sides[0] * sides[1] == group.length(7) // n
    assert firsts.max() < 7
    # tokens that are their own position: a window's first is where `places` says
    rows = torch.arange(7.0).repeat_interleave(7)
    height = group.window[0]
    inside = firsts[:, 0] + height <= 7
    torch.testing.assert_close(
        reducer(rows[None, :, None].expand(1, 49, 8))[0, inside, 0], firsts[inside, 0] + (height - 1) / 2
    )


def test_the_convolution_starts_as_the_average() -> None:
    x = torch.randn(2, 49, 8)
    torch.testing.assert_close(Reducer(8, 7, "conv", (2, 2))(x), Reducer(8, 7, "avg", (2, 2))(x))


@pytest.mark.parametrize("arch", SPECS.values(), ids=SPECS)
def test_every_parameter_is_trained(arch: ArchConfig) -> None:
    assert arch.mux is not None
    model = build_model(arch).train()
    model(images(arch.mux.n, arch)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_segments_and_pairs_do_not_decay() -> None:
    model = build(replace(META, mux=MultiplexSpec(2)))
    free = {id(p) for p in parameter_groups(model.named_parameters(), 0.05)[1]["params"]}
    assert {id(model.get_parameter(p)) for p in ("stage1_join.segments", "stage1_block2.pair_biases")} <= free


@pytest.mark.parametrize("arch", SPECS.values(), ids=SPECS)
def test_eval_returns_the_module_and_weights_loaded_after_it_take_effect(arch: ArchConfig) -> None:
    assert arch.mux is not None
    source, model = build(arch), build_model(arch).eval()
    x = images(arch.mux.n, arch)
    logits(model, x)
    model.load_state_dict(source.state_dict())
    assert torch.equal(logits(model, x), logits(source, x))
    for module in model.modules():
        assert module.eval() is module


@pytest.mark.parametrize("arch", SPECS.values(), ids=SPECS)
def test_the_exported_network_is_the_eager_one(arch: ArchConfig) -> None:
    import onnxruntime

    assert arch.mux is not None
    model, x = build(arch), images(arch.mux.n + 1, arch)
    session = onnxruntime.InferenceSession(onnx_bytes(model, x), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"image": x.numpy()})[0], logits(model, x), atol=1e-4)


def test_a_group_is_what_nas_export_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MUX.save(tmp_path / "arch.yaml")
    export_network(str(tmp_path / "arch.yaml"), None, tmp_path / "model.onnx")
    assert "(2, 3, 24, 24) to (2, 5)" in capsys.readouterr().out


@pytest.mark.coreml
@pytest.mark.parametrize("mux", [MultiplexSpec(2), MultiplexSpec(2, "avg", mixing="block")], ids=lambda mux: mux.mixing)
@pytest.mark.parametrize("plain", PLAIN.values(), ids=PLAIN)
def test_it_converts_to_core_ml(plain: ArchConfig, mux: MultiplexSpec) -> None:
    arch = replace(plain, mux=mux)
    coreml_package.convert(build(arch), images(2, arch))


# -- As layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", SPECS.values(), ids=SPECS)
def test_each_layer_takes_what_the_one_before_it_leaves(arch: ArchConfig) -> None:
    n, model, x = group_of(arch).n, build(arch), images(2 * group_of(arch).n, arch)
    layers = arch.named_layers()
    for (name, layer), (_, after) in zip(layers, [*layers[1:], layers[-1]], strict=True):
        assert x.shape == layer.entering.shape(2 * n), name
        x = logits(model.get_submodule(name), x)
        assert x.shape == layer.leaving.shape(2 * n), name
        assert layer is after or layer.leaving == after.entering
    assert [name for name, _ in layers if name.endswith("join")] == ["stage1_join"]


@pytest.mark.parametrize("arch", SPECS.values(), ids=SPECS)
def test_every_layer_has_a_row_of_its_own(arch: ArchConfig, tmp_path: Path) -> None:
    """Keys of a table: written and read, and measured in models of whole groups."""
    layers = arch.layers()
    table = LatencyTable("d", {layer: Row(0.1 * i, 0.1 * i, 0.1 * i, "slope") for i, layer in enumerate(layers, 1)})
    read = LatencyTable.load(table.save(tmp_path))
    assert set(read.rows) == set(layers)
    assert read.predict_ms(arch) == pytest.approx(table.sum_ms(arch))
    n = group_of(arch).n
    for layer in layers:
        for model in terms_of(layer):
            module, x = build_module(model, 2 * n, deploy=True)
            assert not model or logits(module, x).shape == model[-1].leaving.shape(2 * n)


def test_a_space_with_it_has_its_layers_and_its_networks(tmp_path: Path) -> None:
    space = replace(SearchSpace.around(META), mux=(MultiplexSpec(2), MultiplexSpec(4, start=1)))
    space.save(tmp_path / "space.yaml")
    assert SearchSpace.load(tmp_path / "space.yaml") == space
    mixed = [random_network(space, random.Random(seed)) for seed in range(100)]
    assert {arch.mux for arch in mixed} == {None, *space.mux}
    assert {layer for arch in mixed for layer in arch.layers()} <= set(space.layers())
    assert not space.multiplexed(space.smallest, MultiplexSpec(2)).multiplexes, "no token block, no group"
    assert replace(META, mux=MultiplexSpec(2)) in SearchSpace.around(replace(META, mux=MultiplexSpec(2)))
    text = (tmp_path / "space.yaml").read_text().replace("mux:\n- {n: 2}\n- {n: 4, start: 1}", "mux: [1, 2, {n: 4, start: 1}]")
    (tmp_path / "short.yaml").write_text(text)
    assert SearchSpace.load(tmp_path / "short.yaml") == space


# -- Counts --------------------------------------------------------------------------------------------------------------


def test_vit_b16_mux2_is_within_a_point_of_the_paper_s_saving() -> None:
    """Of ViT-B/16's MACs an image. The configuration is ours: the paper says neither N nor where the group is formed."""
    plain, grouped = count(zoo("vit_b16")).macs, count(zoo("vit_b16_mux2")).macs
    assert (plain, grouped) == (17_563_828_224, 13_341_803_520)
    assert abs(100 * (1 - grouped / plain) - 23.5) < 1


def test_macs_of_an_image_follow_the_formula() -> None:
    """ViT-B/16, two images from block 7 on: 2 * (1 + 14 * 7) tokens in a sequence."""
    c = 768

    def block(tokens: int) -> int:
        return 12 * c * c * tokens + 2 * tokens * tokens * c

    stem, reducer, demultiplexer, classifier = 16 * 16 * 3 * c * 196, 2 * c * c * 98, 2 * c * c, 1000 * c
    macs = stem + 6 * block(197) + reducer + 6 * block(2 * 99) // 2 + demultiplexer + classifier
    assert count(zoo("vit_b16_mux2")).macs == macs


@pytest.mark.parametrize("plain", PLAIN.values(), ids=PLAIN)
def test_the_saving_is_the_reduction_s(plain: ArchConfig) -> None:
    """Concatenation alone costs, since attention is quadratic; the control without it is the cheaper."""
    whole = count(plain).macs
    macs = {
        (reducer, mixing): count(replace(plain, mux=MultiplexSpec(4, reducer, mixing=mixing))).macs
        for reducer in ("avg", "none")
        for mixing in ("full", "none")
    }
    assert macs["avg", "none"] < macs["avg", "full"] < whole < macs["none", "full"]


# -- Training ------------------------------------------------------------------------------------------------------------


def test_nas_train_validates_on_mixed_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image folder's validation images lie class by class; a group of one class would flatter the network."""
    data = load_images(None, 24, seed=0)
    order = data.val.labels.argsort(stable=True)
    data = replace(data, val=Images(data.val.pixels, data.val.rows[order], data.val.labels[order]))
    assert (data.val.labels.diff() >= 0).all()
    seen = []

    def accuracy_of(model: torch.nn.Module, images: Images, *_: Any) -> tuple[float, float]:
        seen.append(images)
        return 1.0, 0.1

    monkeypatch.setattr("nas.training.accuracy_of", accuracy_of)
    recipe = replace(RECIPES["quick"], epochs=1, images_per_epoch=8, batch_size=4, accelerator="cpu")
    train_network(MUX, data, recipe, tmp_path, seed=0)
    assert sorted(seen[0].rows.tolist()) == sorted(data.val.rows.tolist())
    assert (seen[0].labels.diff() < 0).any()
    every = torch.arange(len(data.val))
    pairs = dict(zip(data.val.rows.tolist(), data.val.labels.tolist(), strict=True))
    assert [pairs[row] for row in seen[0].rows.tolist()] == seen[0].batch(every)[1].tolist()


# -- As data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [*SPECS.values(), replace(VIT, mux=MultiplexSpec(1)), VIT])
def test_yaml_holds_mux(arch: ArchConfig, tmp_path: Path) -> None:
    arch.save(tmp_path / "arch.yaml")
    assert ArchConfig.load(tmp_path / "arch.yaml") == arch
    assert ("mux" in (tmp_path / "arch.yaml").read_text()) == (arch.mux is not None)


def test_a_wrong_key_in_a_file_is_named(tmp_path: Path) -> None:
    text = replace(VIT, mux=MultiplexSpec(2)).to_yaml().replace("mux: {n: 2}", "mux: {n: 2, mixin: full}")
    (tmp_path / "arch.yaml").write_text(text)
    with pytest.raises(InputError, match=r"mux: unknown field 'mixin': did you mean mixing"):
        ArchConfig.load(tmp_path / "arch.yaml")


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "three": (lambda: MultiplexSpec(3), "n must be a power of two"),
    "none": (lambda: MultiplexSpec(0), "n must be a whole number of at least 1"),
    "a start below 0": (lambda: MultiplexSpec(2, start=-1), "start must be a whole number"),
    "an unknown reducer": (lambda: MultiplexSpec(2, "pool"), "unknown mux reducer 'pool'"),
    "an unknown mixing": (lambda: MultiplexSpec(2, mixing="ful"), "did you mean full"),
    "an unknown readout": (lambda: MultiplexSpec(2, readout="class"), "unknown mux readout"),
    "shared under a mask": (
        lambda: MultiplexSpec(2, mixing="block", readout="shared"),
        "the readout shared needs the mixing full",
    ),
    "no block left": (lambda: replace(VIT, mux=MultiplexSpec(2, start=3)), "has 3 and start is 3"),
    "no token block": (
        lambda: ArchConfig("maps", 32, 5, (Stage(16, 4, (MB4D(16),)),), mux=MultiplexSpec(2)),
        "mux needs a token block",
    ),
    "a space without it": (lambda: SearchSpace.around(VIT).fit(MUX), "which space vit does not"),
    "a space of one image": (
        lambda: replace(SearchSpace.around(VIT), mux=(MultiplexSpec(1),)),
        "each image by itself (n = 1) is always a choice",
    ),
    "a space with too few token blocks": (
        lambda: replace(SearchSpace.around(VIT), mux=(MultiplexSpec(2, start=3),)),
        "from the one after start 3 on, but no network of vit has as many",
    ),
    "a table without its rows": (lambda: LatencyTable("d", {}).predict_ms(MUX), "has no row for"),
    "a model for no whole group": (
        lambda: build_module(tuple(MUX.layers()), batch=3, deploy=True),
        "a call of 3 is no whole number of groups of 2 images",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        make()
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
