"""DeiT-Tiny and ViT-B/16: timm's logits with timm's weights; class tokens through networks, spaces and tables.

Golden files: golden/make_vit.py.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden.recipe import images, weight
from safetensors.torch import save_file
from test_weights import still
from torch import Tensor, nn

from nas import coreml_package
from nas.checkpoints import load_weights
from nas.data import IMAGENET_MEAN, IMAGENET_STD
from nas.measure import build_module, input_shape
from nas.onnx_model import onnx_bytes
from nas.plan import terms_of
from nas.pretrained import _renormalise, load_pretrained
from nas.steps import parameter_groups
from supernet.arch import ArchConfig, Stage
from supernet.errors import InputError
from supernet.metapath import Supernet
from supernet.model import build_model, count
from supernet.ports import Port
from supernet.space import SearchSpace, StageSpace
from supernet.specs import MB3D, MB4D, Head, Identity, Layer, PatchStem, ViT
from supernet.weights import load_timm_weights, resize_position_embedding, subnetwork
from supernet.zoo import zoo

NAMES = ("deit_tiny", "vit_b16")
TINY = NAMES[0]

State = dict[str, Tensor]


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def timm_shapes(name: str) -> dict[str, tuple[int, ...]]:
    pairs = zip(golden(name)["names"].tolist(), golden(name)["shapes"].tolist(), strict=True)
    return {key: tuple(map(int, shape.split("x"))) for key, shape in pairs}


def timm_state(name: str, size: int = 224) -> State:
    """The golden weights under timm's names, for a network of this image size."""
    shapes = timm_shapes(name)
    shapes["pos_embed"] = (1, 1 + (size // 16) ** 2, shapes["pos_embed"][2])
    return {key: torch.from_numpy(weight(key, shape)) for key, shape in shapes.items()}


def logits(model: nn.Module, size: int = 224) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.from_numpy(images(2, size)).to(next(model.parameters()).dtype))
    return found


def distance(a: Tensor, b: Tensor | np.ndarray) -> float:
    return (a.double() - torch.as_tensor(b)).abs().max().item()


def small(blocks: int = 3, image_size: int = 16, num_classes: int = 5) -> ArchConfig:
    # the stem's own width and stride are its stage's
    stage = Stage(24, 4, tuple(ViT(24, num_heads=3) for _ in range(blocks)), PatchStem(8))
    return ArchConfig("small", image_size, num_classes, (stage,), "class_token")


def test_weights_of_images_that_were_normalised_otherwise_give_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's ViTs, but for DeiT, have seen values from -1 to 1."""
    state = timm_state(TINY)
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    theirs = SimpleNamespace(state_dict=lambda: state, pretrained_cfg=half)
    monkeypatch.setattr("nas.pretrained.timm_with_weights", lambda name: theirs)
    read = load_pretrained(TINY, f"timm:{TINY}", zoo(TINY))
    model = build_model(read.arch).double().eval()
    model.load_state_dict(read.state)
    as_it_is = build_model(zoo(TINY)).double().eval()
    load_timm_weights(as_it_is, state)
    pixels = torch.from_numpy(images(2, 224)).double().clamp(0, 1)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        expected = as_it_is((pixels - 0.5) / 0.5)
        assert distance(model((pixels - mean) / std), expected) < 1e-5 * expected.abs().max()
        assert distance(as_it_is((pixels - mean) / std), expected) > 1e-2 * expected.abs().max()


def test_a_stem_with_padding_cannot_be_normalised_otherwise() -> None:
    with pytest.raises(InputError, match=r"mean \(0\.5, 0\.5, 0\.5\) .*: give weights of those"):
        _renormalise(build_model(zoo("efficientvit_m0")), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# -- Parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_timm_weights_give_timm_s_logits(name: str) -> None:
    model = build_model(zoo(name)).eval()
    load_timm_weights(model, timm_state(name))
    assert distance(logits(model), golden(name)["logits"]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_timm_weights_of_160_px_give_timm_s_logits_there(name: str) -> None:
    model = build_model(zoo(name).at(160)).double().eval()
    load_timm_weights(model, timm_state(name, 160))
    assert distance(logits(model, 160), golden(name)["logits_160"]) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_224_px_at_160_px_give_timm_s_logits(name: str) -> None:
    """The position embedding is resized as timm resizes it."""
    model = build_model(zoo(name).at(160)).eval()
    load_timm_weights(model, timm_state(name))
    assert distance(logits(model, 160), golden(name)["logits_160_resized"]) < 1e-5
    assert distance(logits(model, 160), golden(name)["logits_160"]) > 1e-3


def test_every_tensor_moves_the_logits() -> None:
    model = build_model(zoo(TINY)).double().eval()
    load_timm_weights(model, timm_state(TINY))
    assert still(model, torch.as_tensor(golden(TINY)["logits"])) == set()


def test_another_number_of_classes_keeps_the_fresh_classifier() -> None:
    model = build_model(zoo(TINY).with_classes(10))
    fresh = model.head.fc.weight.clone()  # type: ignore[union-attr]
    load_timm_weights(model, timm_state(TINY))
    assert torch.equal(model.head.fc.weight, fresh)  # type: ignore[union-attr]
    assert torch.equal(model.head.norm.weight, timm_state(TINY)["norm.weight"])  # type: ignore[union-attr]


@pytest.mark.parametrize("fault", ["lacks", "unexpected", "shape", "tokens"])
def test_what_does_not_fit_is_refused_and_changes_nothing(fault: str) -> None:
    state = timm_state(TINY)
    if fault == "lacks":
        del state["blocks.3.attn.qkv.bias"]
    elif fault == "unexpected":
        state["blocks.12.norm1.bias"] = torch.zeros(192)
    elif fault == "shape":
        state["blocks.3.attn.qkv.weight"] = torch.zeros(192, 576)
    else:
        state["pos_embed"] = torch.zeros(1, 198, 192)
    model = build_model(zoo(TINY))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"^the state dict does not fit the network: .*timm\.create_model.*$"):
        load_timm_weights(model, state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_own_weights_for_another_size_are_adapted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = build_model(small())
    save_file(given.state_dict(), tmp_path / "model.safetensors")
    model = build_model(small(image_size=24))
    load_weights(model, tmp_path / "model.safetensors", adapt=True)
    resized = resize_position_embedding(given.stem.pos_embed, 37)  # type: ignore[union-attr, arg-type]
    assert torch.equal(model.stem.pos_embed, resized)  # type: ignore[union-attr, arg-type]
    assert "1 tensors of" in capsys.readouterr().err


def test_what_is_added_to_tokens_does_not_decay() -> None:
    free = parameter_groups(build_model(small()).named_parameters(), 0.05)[1]["params"]
    assert sum(p.ndim == 3 for p in free) == 2  # class token, position embedding


def test_a_resized_position_embedding_keeps_the_class_token_s_and_the_order() -> None:
    """A plane over the grid rises from left to right and from top to bottom at every size."""

    def plane(side: int) -> Tensor:
        y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
        grid = torch.stack((10 + y + 0.5 / side, 20 + 3 * x + 1.5 / side), 2).flatten(0, 1)
        return torch.cat((torch.tensor([[5.0, 7.0]]), grid))[None]

    same = plane(6)
    assert resize_position_embedding(same, 37) is same
    for side in (3, 4, 9, 12):
        found = resize_position_embedding(plane(6), 1 + side * side)
        assert torch.equal(found[:, 0], plane(side)[:, 0])
        inner = (slice(None), slice(1, -1), slice(1, -1))
        grids = [t[:, 1:].unflatten(1, (side, side))[inner] for t in (found, plane(side))]
        torch.testing.assert_close(grids[0], grids[1], atol=0.06, rtol=0)  # the borders bend


@pytest.mark.parametrize("shape", [(1, 198, 8), (1, 1, 8), (197, 8)])
def test_a_position_embedding_is_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"^a position embedding must have shape \(1, 1 \+ R \* R, dim\), but has .*$"):
        resize_position_embedding(torch.zeros(shape), 10)


# -- Sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "params"), list(zip(NAMES, (5_717_416, 86_567_656), strict=True)))
def test_parameters_are_timm_s(name: str, params: int) -> None:
    assert count(zoo(name)).params == params == sum(int(np.prod(shape)) for shape in timm_shapes(name).values())


@pytest.mark.parametrize(("name", "giga"), list(zip(NAMES, (1.25, 17.56), strict=True)))
def test_macs_follow_the_formula(name: str, giga: float) -> None:
    """`giga`: as printed for convolutions, linear layers and the products of attention at 224 px."""
    c, n = zoo(name).widths[0], 197
    macs = 16 * 16 * 3 * c * 196 + 12 * (12 * c * c * n + 2 * n * n * c) + 1000 * c
    assert count(zoo(name)).macs == macs
    assert round(macs / 1e9, 2) == giga


# -- The network ---------------------------------------------------------------------------------------------------------


def test_a_patch_stem_leaves_tokens_so_nothing_is_flattened() -> None:
    names = [name for name, _ in zoo("vit_b16").named_layers()]
    assert names == ["stem", *(f"stage1_block{i}" for i in range(1, 13)), "head"]
    for one, other in zip(zoo("vit_b16").layers(), zoo("vit_b16").layers()[1:], strict=False):
        assert one.leaving == other.entering
    assert zoo("vit_b16").layers()[0].leaving == Port("class_tokens", 768, 14)


def test_yaml_holds_the_whole_network(tmp_path: Path) -> None:
    for arch in (zoo("deit_tiny"), zoo("vit_b16"), small()):
        arch.save(tmp_path / "arch.yaml")
        assert ArchConfig.load(tmp_path / "arch.yaml") == arch


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "another block after a patch stem": (
        lambda: Stage(24, 4, (ViT(24), MB3D(24)), PatchStem(24)),
        "this stage has mb3d after patch_stem",
    ),
    "a map block after a patch stem": (
        lambda: Stage(24, 4, (MB4D(24),), PatchStem(24)),
        "this stage has mb4d after patch_stem",
    ),
    "vit after another stem": (lambda: Stage(24, 4, (ViT(24),)), "this stage has vit after the default entry"),
    "a second stage": (
        lambda: replace(small(), stages=(small().stages[0], Stage(24, 2, (MB4D(24),)))),
        "a network that begins with patch_stem has one stage",
    ),
    "another head": (lambda: replace(small(), head="layer_norm"), "the head class_token goes with the entry patch_stem"),
    "its head elsewhere": (
        lambda: ArchConfig("a", 16, 5, (Stage(24, 4, (MB4D(24),)),), "class_token"),
        "the head class_token goes with the entry patch_stem",
    ),
    "narrower blocks in a space": (
        lambda: StageSpace((24, 48), 4, 2, (ViT(48), Identity(48)), PatchStem(48)),
        "a stage with vit blocks has one width",
    ),
    "heads that do not divide the width": (lambda: ViT(32, num_heads=3), "dim must be a multiple of num_heads"),
    "a broken patch": (lambda: build_model(small().at(18)), "18 px is no multiple: give 16 px"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_network_is_refused_in_a_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        make()
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_images_of_a_batch_do_not_meet() -> None:
    model = build_model(small()).eval()
    batch = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(batch)[1:2], model(batch[1:2]))


def test_the_exported_network_is_the_eager_one() -> None:
    import onnxruntime

    model, image = build_model(small()).eval(), torch.randn(1, 3, 16, 16)
    session = onnxruntime.InferenceSession(onnx_bytes(model, image), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"image": image.numpy()})[0], model(image), atol=1e-5)


@pytest.mark.coreml
@pytest.mark.parametrize("layer", dict.fromkeys(small().layers()), ids=str)
def test_every_layer_converts_to_core_ml(layer: Layer) -> None:
    coreml_package.convert(*build_module((layer,), deploy=True))


# -- Spaces and tables ---------------------------------------------------------------------------------------------------


def test_a_supernet_of_vit_blocks_is_each_of_its_networks() -> None:
    torch.manual_seed(0)
    space = SearchSpace.around(small())
    supernet, batch = Supernet(space).eval(), torch.randn(2, 3, 16, 16)
    rng = random.Random(1)
    for arch in (space.largest, space.smallest, space.sample(rng)):
        with torch.no_grad():
            torch.testing.assert_close(supernet(batch, space.path(arch)), subnetwork(supernet, arch).eval()(batch))
    with torch.no_grad():
        mixed = supernet(batch, [torch.tensor([0.5, 0.5])] * 3)
    assert mixed.shape == (2, 5)


def test_without_blocks_the_head_still_reads_the_class_token() -> None:
    arch = replace(small(), stages=(replace(small().stages[0], blocks=(Identity(24),)),))
    head = arch.layers()[-1]
    assert head == Layer(Head(24, 5, tokens=True, form="class_token"), 4)
    assert build_model(arch)(torch.zeros(2, 3, 16, 16)).shape == (2, 5)


def test_every_layer_is_measured_among_tokens_with_a_class_token() -> None:
    stem, block, *_, head = small().layers()
    assert input_shape((block,), 2) == (2, 17, 24) == input_shape((head,), 2)
    assert input_shape((stem,)) == (1, 3, 16, 16)
    for layer in (stem, block, head):
        for model in terms_of(layer):
            module, example = build_module(model, deploy=True)
            assert torch.isfinite(module(example)).all()
    assert any(len(model) == 2 and model[0] == stem and isinstance(model[1].spec, ViT) for model in terms_of(stem))
