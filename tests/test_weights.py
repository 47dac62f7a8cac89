"""Published weights give the published networks' logits; what does not fit is refused and changes nothing.

Golden files: golden/make_efficientformer.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from golden.recipe import images, weight
from torch import Tensor, nn
from torch.func import functional_call

from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.model import build_model, count
from supernet.specs import MB3D, Identity
from supernet.weights import load_timm_weights, resize_attention_biases

ROOT = Path(__file__).parent.parent
NAMES = ("efficientformer_l1", "efficientformer_l3", "efficientformer_l7")
L1 = NAMES[0]
BIASES = "stages.3.blocks.4.token_mixer.attention_biases"

State = dict[str, Tensor]


def zoo(name: str) -> ArchConfig:
    return ArchConfig.load(ROOT / "supernet" / "zoo" / f"{name}.yaml")


@cache
def timm_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of timm's state dict."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz", allow_pickle=False) as golden:
        pairs = zip(golden["names"].tolist(), golden["shapes"].tolist(), strict=True)
        return {key: tuple(int(side) for side in shape.split("x") if side) for key, shape in pairs}


def timm_logits(name: str) -> Tensor:
    """timm's logits of the two images: (2, 1000) float64."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz", allow_pickle=False) as golden:
        return torch.from_numpy(golden["logits"])


def timm_state(name: str) -> State:
    """timm's state dict with the golden weights."""
    return {key: torch.from_numpy(weight(key, shape)) for key, shape in timm_shapes(name).items()}


@pytest.fixture(scope="module")
def l1_state() -> State:
    return timm_state(L1)


def logits(model: nn.Module, size: int = 224) -> Tensor:
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        result: Tensor = model(torch.from_numpy(images(2, size)).to(dtype))
    return result


def distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


# -- Parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_timm_weights_give_timm_s_logits(name: str) -> None:
    model = build_model(zoo(name)).eval()
    state = timm_state(name)
    load_timm_weights(model, state)
    assert distance(logits(model), timm_logits(name)) < 1e-5

    load_timm_weights(model.double(), state)
    assert distance(logits(model), timm_logits(name)) < 1e-12


def test_the_two_images_have_different_logits() -> None:
    first, second = timm_logits(L1)
    assert distance(first, second) > 0.1


def plain_batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, training: bool, momentum: float, eps: float
) -> Tensor:
    """A batch norm in eval mode with gradients for its statistics too, which PyTorch's own does not have."""
    assert not training
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    return (x - mean.view(shape)) * ((var + eps).rsqrt() * weight).view(shape) + bias.view(shape)


def still(model: nn.Module, expected: Tensor) -> set[str]:
    """Return the tensors of a network in double precision, statistics too, that no logit shows. A loader that forgot any other
    one could not pass the parity test."""
    state = {name: t.detach().clone().requires_grad_() for name, t in model.state_dict().items() if t.is_floating_point()}
    with patch.object(nn.functional, "batch_norm", plain_batch_norm):
        found = functional_call(model, state, (torch.from_numpy(images(2, 224)).double(),))
    assert distance(found, expected) < 1e-11
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (found * weights).sum().backward()
    moved = {name for name, tensor in state.items() if tensor.grad is not None and tensor.grad.abs().max() > 1e-6}
    return state.keys() - moved


def test_every_tensor_moves_the_logits(l1_state: State) -> None:
    model = build_model(zoo(L1)).double().eval()
    load_timm_weights(model, l1_state)
    assert still(model, timm_logits(L1)) == set()


def test_flat_takes_an_index_among_timm_s_blocks() -> None:
    assert "stages.3.blocks.4.token_mixer.qkv.weight" in timm_shapes(L1)
    assert not [key for key in timm_shapes(L1) if key.startswith("stages.3.blocks.3.")]


def test_empty_slots_do_not_shift_the_weights(l1_state: State) -> None:
    arch = zoo(L1)
    empty, blocks = Identity(448), arch.stages[3].blocks
    padded = replace(arch.stages[3], blocks=(empty, *blocks[:2], empty, *blocks[2:]))
    model = build_model(replace(arch, stages=(*arch.stages[:3], padded))).eval()
    load_timm_weights(model, l1_state)
    assert distance(logits(model), timm_logits(L1)) < 1e-5


# -- When weights take effect ------------------------------------------------------------------------------------------


def test_weights_loaded_after_eval_and_use_take_effect(l1_state: State) -> None:
    model = build_model(zoo(L1)).eval()
    before = logits(model)
    load_timm_weights(model, l1_state)
    assert distance(before, timm_logits(L1)) > 1e-3
    assert distance(logits(model), timm_logits(L1)) < 1e-5


def test_eval_returns_the_module() -> None:
    for module in build_model(zoo(L1)).modules():
        assert module.eval() is module
        assert module.train() is module


def test_loading_leaves_the_state_dict_as_it_was(l1_state: State) -> None:
    model = build_model(zoo(L1))
    load_timm_weights(model, l1_state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for key, tensor in l1_state.items():
        assert np.array_equal(tensor.numpy(), weight(key, tuple(tensor.shape))), key


# -- Other classes, other image sizes ----------------------------------------------------------------------------------


def test_another_number_of_classes_keeps_the_fresh_classifier(l1_state: State) -> None:
    model = build_model(zoo(L1).with_classes(10))
    fresh = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    load_timm_weights(model, l1_state)
    loaded = model.state_dict()
    assert torch.equal(loaded["head.fc.weight"], fresh["head.fc.weight"])
    assert torch.equal(loaded["head.fc.bias"], fresh["head.fc.bias"])
    assert torch.equal(loaded["head.norm.weight"], l1_state["norm.weight"])
    assert torch.equal(loaded["stem.conv1.weight"], l1_state["stem.conv1.weight"])


@pytest.mark.parametrize(("size", "side"), [(192, 6), (225, 8), (256, 8)])
def test_weights_load_at_another_image_size(size: int, side: int, l1_state: State) -> None:
    model = build_model(zoo(L1).at(size)).eval()
    load_timm_weights(model, l1_state)
    given = l1_state[BIASES]
    biases = model.state_dict()["stage4_block4.token_mixer.attention_biases"]
    assert biases.shape == (8, side * side)
    assert torch.equal(biases[:, 0], given[:, 0])
    assert torch.isfinite(logits(model, size)).all()


def test_at_the_same_size_the_biases_are_untouched(l1_state: State) -> None:
    model = build_model(zoo(L1))
    load_timm_weights(model, l1_state)
    given = l1_state[BIASES]
    assert torch.equal(model.state_dict()["stage4_block4.token_mixer.attention_biases"], given)
    assert resize_attention_biases(given, 7) is given


@pytest.mark.parametrize("side", [1, 4, 6, 7, 8, 12])
def test_a_plane_over_the_offsets_stays_that_plane(side: int) -> None:
    """Biases that are linear in (|dy|, |dx|) as shares of the map are so at every size; |dy| and |dx| do not swap."""

    def plane(side: int) -> Tensor:
        share = torch.arange(side, dtype=torch.float64) / max(side - 1, 1)
        return torch.stack([head + 2 * share[:, None] - 5 * share[None] for head in range(3)]).flatten(1)

    torch.testing.assert_close(resize_attention_biases(plane(7), side), plane(side))


# -- Sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "params"), list(zip(NAMES, (11_840_928, 30_893_000, 81_460_328), strict=True)))
def test_parameters_are_timm_s_less_one_classifier(name: str, params: int) -> None:
    buffers = ("running_mean", "running_var", "num_batches_tracked", "attention_bias_idxs")
    timm = sum(int(np.prod(shape)) for key, shape in timm_shapes(name).items() if not key.endswith(buffers))
    assert count(zoo(name)).params == params == timm - 1000 * (zoo(name).widths[-1] + 1)


@pytest.mark.parametrize(("name", "giga"), list(zip(NAMES, (1.2913, 3.9066, 10.1193), strict=True)))
def test_macs_follow_the_formulas(name: str, giga: float) -> None:
    """`giga`: the published networks' convolutions and matrix products at 224 px in 1e9 MACs, with two classifiers."""
    arch = zoo(name)
    first, last = arch.widths[0], arch.widths[-1]
    macs = 9 * 3 * (first // 2) * 112**2 + 9 * (first // 2) * first * 56**2 + 1000 * last
    for before, stage, side in zip(arch.stages, arch.stages[1:], (28, 14, 7), strict=False):
        macs += 9 * before.width * stage.width * side**2
    for stage, side in zip(arch.stages, (56, 28, 14, 7), strict=True):
        c, n = stage.width, side**2
        for block in stage.blocks:
            macs += (8 * c * c + 2560 * c) * n + 1280 * n * n if isinstance(block, MB3D) else 8 * c * c * n
    assert count(arch).macs == macs
    assert round((macs + 1000 * last) / 1e9, 4) == giga


def test_l1_has_1_290_836_736_macs() -> None:
    assert count(zoo(L1)).macs == 1_290_836_736


# -- What is refused ---------------------------------------------------------------------------------------------------


def without(key: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if name != key}


def having(key: str, value: object) -> Callable[[State], State]:
    return lambda state: {**state, key: value}  # type: ignore[dict-item]


REFUSED: dict[str, tuple[Callable[[State], State], str]] = {
    "missing": (without("stages.0.blocks.1.ls1.gamma"), "lacks stages.0.blocks.1.ls1.gamma:"),
    "missing second classifier": (without("head_dist.weight"), "lacks head_dist.weight:"),
    "missing biases": (without(BIASES), f"lacks {BIASES}:"),
    "unexpected": (having("stages.3.blocks.3.gamma", torch.zeros(1)), "has an unexpected stages.3.blocks.3.gamma:"),
    "wrong shape": (having("stem.conv1.weight", torch.zeros(16, 3, 3, 3)), "(16, 3, 3, 3), not (24, 3, 3, 3): give"),
    "transposed": (having("stages.3.blocks.4.mlp.fc1.weight", torch.zeros(448, 1792)), "(448, 1792), not (1792, 448)"),
    "broadcastable": (having("norm.weight", torch.ones(1)), "norm.weight of shape (1,), not (448,)"),
    "biases of no square": (
        having(BIASES, torch.zeros(8, 50)),
        "(8, 50), not (8, 49)",
    ),
    "biases of other heads": (
        having(BIASES, torch.zeros(4, 36)),
        "(4, 36), not (8, 36)",
    ),
    "classifiers of unlike classes": (having("head_dist.weight", torch.zeros(10, 448)), "(10, 448), not (1000, 448)"),
    "classifier of another width": (having("head.weight", torch.zeros(1000, 96)), "(1000, 96), not (1000, 448)"),
    "another network": (lambda _: timm_state(NAMES[1]), "does not fit the network: it lacks"),
    "another family": (lambda _: {"conv1.weight": torch.zeros(64, 3, 7, 7)}, "not the state dict of a timm"),
    "a whole checkpoint": (lambda state: {"state_dict": state}, "it has state_dict (dict)"),  # type: ignore[dict-item]
    "nothing": (lambda _: {}, "it has nothing"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(
    change: Callable[[State], State], message: str, l1_state: State
) -> None:
    model = build_model(zoo(L1))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(InputError) as refusal:
        load_timm_weights(model, change(l1_state))
    assert message in str(refusal.value)
    assert "timm.create_model" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2))], ids=["leaf", "other"])
def test_a_model_that_is_not_ours_is_refused(model: nn.Module, l1_state: State) -> None:
    with pytest.raises(InputError, match=r"^timm weights go into a network of build_model\(arch\), but .*$"):
        load_timm_weights(model, l1_state)


@pytest.mark.parametrize("shape", [(8, 50), (8, 0), (49,), (1, 8, 49)])
def test_a_bias_table_is_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"^attention biases must have shape \(heads, R \* R\) .*$"):
        resize_attention_biases(torch.zeros(shape), 7)
