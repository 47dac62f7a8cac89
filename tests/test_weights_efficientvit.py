"""timm's EfficientViT weights give timm's logits, also where maps are padded to windows; sizes are the published ones.

Golden files: golden/make_efficientvit.py.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from golden.recipe import efficientvit_weight
from test_weights import ROOT, State, distance, having, logits, still, timm_logits, timm_shapes, without, zoo
from torch import Tensor

from supernet.errors import InputError
from supernet.model import build_model, count
from supernet.specs import Sandwich
from supernet.weights import load_timm_weights

NAMES = tuple(f"efficientvit_m{number}" for number in range(6))
M1 = NAMES[1]  # stages of 2 and 3 heads, q kernels of 7, 5 and 3
BIASES = "stages.2.blocks.2.mixer.m.attn.attention_biases"


def timm_state(name: str) -> State:
    """timm's state dict with the golden weights."""
    return {key: torch.from_numpy(efficientvit_weight(key, shape)) for key, shape in timm_shapes(name).items()}


def padded_logits(name: str) -> Tensor:
    """timm's logits at 256 px, whose maps of 16 and 8 px are no multiples of the window: (2, 1000) float64."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz", allow_pickle=False) as golden:
        return torch.from_numpy(golden["logits_256"])


@pytest.fixture(scope="module")
def m1_state() -> State:
    return timm_state(M1)


# -- Parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_timm_weights_give_timm_s_logits(name: str) -> None:
    state = timm_state(name)
    for size, expected in ((224, timm_logits(name)), (256, padded_logits(name))):
        model = build_model(zoo(name).at(size)).eval()
        load_timm_weights(model, state)
        assert distance(logits(model, size), expected) < 1e-5

        load_timm_weights(model.double(), state)
        assert distance(logits(model, size), expected) < 1e-12


def test_images_and_sizes_have_different_logits() -> None:
    first, second = timm_logits(M1)
    assert distance(first, second) > 0.1
    assert distance(timm_logits(M1), padded_logits(M1)) > 0.1


def test_every_tensor_moves_the_logits(m1_state: State) -> None:
    model = build_model(zoo(M1)).double().eval()
    load_timm_weights(model, m1_state)
    assert still(model, timm_logits(M1)) == set()


# -- Other classes, other image sizes ----------------------------------------------------------------------------------


def test_another_number_of_classes_keeps_the_fresh_classifier(m1_state: State) -> None:
    model = build_model(zoo(M1).with_classes(10))
    fresh = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    load_timm_weights(model, m1_state)
    loaded = model.state_dict()
    assert torch.equal(loaded["head.fc.weight"], fresh["head.fc.weight"])
    assert torch.equal(loaded["head.fc.bias"], fresh["head.fc.bias"])
    assert torch.equal(loaded["head.norm.running_var"], m1_state["head.bn.running_var"])
    assert torch.equal(loaded["stem.conv4.conv.weight"], m1_state["patch_embed.conv4.conv.weight"])


@pytest.mark.parametrize(("size", "sides"), [(112, (7, 4, 2)), (224, (7, 7, 4)), (320, (7, 7, 5)), (448, (7, 7, 7))])
def test_biases_are_resized_only_where_the_window_is_another(size: int, sides: tuple[int, ...], m1_state: State) -> None:
    model = build_model(zoo(M1).at(size)).eval()
    load_timm_weights(model, m1_state)
    for stage, side in enumerate(sides):
        given = m1_state[f"stages.{stage}.blocks.0.mixer.m.attn.attention_biases"]
        biases = model.state_dict()[f"stage{stage + 1}_block1.mixer.m.attn.attention_biases"]
        assert biases.shape == (given.shape[0], side * side)
        assert torch.equal(biases[:, 0], given[:, 0])
        assert biases.shape != given.shape or torch.equal(biases, given)
    assert torch.isfinite(logits(model, size)).all()


# -- Sizes -------------------------------------------------------------------------------------------------------------

PUBLISHED = [
    (2_349_436, 79.2),
    (2_980_560, 167.1),
    (4_187_554, 201.0),
    (6_900_722, 262.7),
    (8_804_228, 299.3),
    (12_473_772, 521.6),
]


@pytest.mark.parametrize(("name", "params", "mega"), [(n, *p) for n, p in zip(NAMES, PUBLISHED, strict=True)])
def test_parameters_and_macs_are_the_published_ones(name: str, params: int, mega: float) -> None:
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    timm = sum(int(np.prod(shape)) for key, shape in timm_shapes(name).items() if not key.endswith(buffers))
    assert count(zoo(name)).params == params == timm
    assert round(count(zoo(name)).macs / 1e6, 1) == mega


@pytest.mark.parametrize("name", NAMES)
def test_macs_follow_the_formulas(name: str) -> None:
    arch = zoo(name)
    c = arch.widths[0]
    macs = 9 * (3 * c // 8 * 112**2 + c // 8 * c // 4 * 56**2 + c // 4 * c // 2 * 28**2 + c // 2 * c * 14**2)

    def mixing(c: int, n: int) -> int:  # a depthwise convolution and an MLP on n positions
        return (9 * c + 4 * c * c) * n

    for before, stage, old, new in zip(arch.widths, arch.widths[1:], (14, 7), (7, 4), strict=False):
        macs += mixing(before, old**2) + mixing(stage, new**2)
        macs += 4 * before * before * old**2 + (9 + stage) * 4 * before * new**2 + 2 * 4 * before * before
    for stage, windows, side, window in zip(arch.stages, (4, 1, 1), (14, 7, 4), (7, 7, 4), strict=True):
        for block in stage.blocks:
            assert isinstance(block, Sandwich)
            c, n, heads, kd = stage.width, window**2, block.num_heads, block.key_dim
            attention = c * (2 * kd + c // heads) + c * c + kd * sum(k * k for k in block.q_kernels[:heads])
            macs += 2 * mixing(c, side**2) + windows * (attention * n + heads * n * n * (kd + c // heads))
    assert count(arch).macs == macs + 1000 * arch.widths[-1]


# -- What is refused ---------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[State], State], str]] = {
    "missing": (without("stages.1.downsample.patchmerge.se.fc1.bias"), "lacks stages.1.downsample.patchmerge.se.fc1.bias:"),
    "unexpected": (having("head_dist.bn.weight", torch.zeros(192)), "has an unexpected head_dist.bn.weight:"),
    "wrong shape": (having("head.bn.weight", torch.ones(1)), "head.bn.weight of shape (1,), not (192,)"),
    "biases of no square": (having(BIASES, torch.zeros(3, 15)), "(3, 15), not (3, 16)"),
    "biases of other heads": (having(BIASES, torch.zeros(4, 16)), "(4, 16), not (3, 16)"),
    "classifier of another width": (having("head.linear.weight", torch.zeros(1000, 96)), "(1000, 96), not (1000, 192)"),
    "another network": (lambda _: timm_state(NAMES[2]), "does not fit the network: it lacks"),
    "another family": (lambda _: {"stem.conv1.weight": torch.zeros(24, 3, 3, 3)}, "not the state dict of a timm EfficientViT"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(
    change: Callable[[State], State], message: str, m1_state: State
) -> None:
    model = build_model(zoo(M1))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(InputError) as refusal:
        load_timm_weights(model, change(m1_state))
    assert message in str(refusal.value)
    assert "of the same EfficientViT of MSRA" in str(refusal.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
