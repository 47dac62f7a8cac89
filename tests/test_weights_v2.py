"""EfficientFormerV2: published weights give the published networks' logits, at their own and at another image size.

Golden files: golden/make_efficientformer_v2.py.
"""

import re
from collections.abc import Callable
from math import isqrt

import numpy as np
import pytest
import torch
from golden.recipe import weight
from test_weights import ROOT, State, distance, logits, still, timm_logits, timm_shapes, timm_state, zoo
from torch import Tensor, nn

from supernet.errors import InputError
from supernet.model import build_model, count
from supernet.specs import AttnFFN
from supernet.weights import load_timm_weights

NAMES = ("efficientformerv2_s0", "efficientformerv2_s1", "efficientformerv2_s2", "efficientformerv2_l")
S0 = NAMES[0]
EXACT = 1e-10  # of the logits' spread: the deepest network, with random weights, makes 1e5 of double precision's rounding
HALVED_BIASES = "stages.2.blocks.4.token_mixer.attention_biases"
DOWNSAMPLE_BIASES = "stages.3.downsample.attn.attention_biases"


def at_256(name: str) -> tuple[State, Tensor]:
    """The golden weights of timm's network for 256 px, and its first 100 logits of the two images: (2, 100) float64."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz", allow_pickle=False) as golden:
        pairs = zip(golden["names"].tolist(), golden["shapes_256"].tolist(), strict=True)
        shapes = {key: tuple(int(side) for side in shape.split("x") if side) for key, shape in pairs}
        expected = torch.from_numpy(golden["logits_256"])
    return {key: torch.from_numpy(weight(key, shape)) for key, shape in shapes.items()}, expected


@pytest.fixture(scope="module")
def s0_state() -> State:
    return timm_state(S0)


@pytest.fixture(scope="module")
def s0() -> nn.Module:
    return build_model(zoo(S0)).eval()


@pytest.fixture(scope="module")
def s0_double() -> nn.Module:
    return build_model(zoo(S0)).double().eval()


# -- Parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_timm_weights_give_timm_s_logits(name: str) -> None:
    model = build_model(zoo(name)).double().eval()
    expected = timm_logits(name)
    load_timm_weights(model, timm_state(name))
    assert distance(logits(model), expected) < EXACT * expected.std()


@pytest.mark.parametrize("name", NAMES)
def test_timm_weights_give_timm_s_logits_at_256_px(name: str) -> None:
    model = build_model(zoo(name).at(256)).double().eval()
    state, expected = at_256(name)
    load_timm_weights(model, state)
    assert distance(logits(model, 256)[:, :100], expected) < EXACT * expected.std()


def test_timm_weights_give_timm_s_logits_in_single_precision(s0_state: State) -> None:
    model = build_model(zoo(S0)).eval()
    load_timm_weights(model, s0_state)
    assert distance(logits(model), timm_logits(S0)) < 1e-5 * timm_logits(S0).std()


def test_the_two_images_have_different_logits() -> None:
    for expected in (timm_logits(S0), at_256(S0)[1]):
        assert distance(expected[0], expected[1]) > 0.1


def test_a_network_that_timm_made_without_distillation_has_one_classifier(s0: nn.Module, s0_state: State) -> None:
    alone = {key: tensor for key, tensor in s0_state.items() if not key.startswith("head_dist.")}
    load_timm_weights(s0, alone)
    found = s0.state_dict()
    for name in ("weight", "bias"):
        assert torch.equal(found[f"head.fc.{name}"], alone[f"head.{name}"].float())
    twice = alone | {f"head_dist.{name}": alone[f"head.{name}"] for name in ("weight", "bias")}
    expected = logits(s0)
    load_timm_weights(s0, twice)
    assert distance(logits(s0), expected) < 1e-6, "the mean of two equal classifiers"
    del twice["head_dist.weight"]
    with pytest.raises(InputError, match=r"it lacks head_dist.weight: give"):
        load_timm_weights(s0, twice)
    with pytest.raises(InputError, match=r"this is str: give model\.state_dict"):
        load_timm_weights(s0, "s0.pth")  # type: ignore[arg-type]


UNSEEN = {  # a softmax does not see what it adds to all keys of a query alike
    *(
        f"{attention}{name}"
        for attention in ("attn.", "token_mixer.")
        for name in ("k.conv.bias", "k.bn.bias", "k.bn.running_mean")
    ),
    "token_mixer.talking_head1.bias",
}


def test_every_tensor_moves_the_logits_but_those_of_keys_alike_which_are_loaded_too(
    s0_double: nn.Module, s0_state: State
) -> None:
    load_timm_weights(s0_double, s0_state)
    unseen = still(s0_double, timm_logits(S0))
    assert {re.sub(r".*?(?=attn\.|token_mixer\.)", "", name) for name in unseen} == UNSEEN
    own = s0_double.state_dict()
    for ending in UNSEEN:
        given = [tensor.double() for name, tensor in s0_state.items() if name.endswith(ending)]
        found = [own[name] for name in own if name.endswith(ending)]
        assert len(given) == len(found) > 0
        assert all(torch.equal(a, b) for a, b in zip(given, found, strict=True))


def test_v2_s_weights_do_not_go_into_v1_nor_v1_s_into_v2(s0_state: State) -> None:
    for model, state in ((zoo("efficientformer_l1"), s0_state), (zoo(S0), timm_state("efficientformer_l1"))):
        with pytest.raises(InputError, match="the state dict does not fit the network: it lacks"):
            load_timm_weights(build_model(model), state)


# -- Other classes, other image sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "side"), [(160, 5), (256, 8), (224, 7)])
def test_weights_load_at_another_image_size(size: int, side: int, s0_state: State) -> None:
    model = build_model(zoo(S0).at(size)).eval()
    load_timm_weights(model, s0_state)
    own = model.state_dict()
    for ours, theirs, sides in (
        ("stage3_block5.token_mixer.attention_biases", HALVED_BIASES, side),  # at half resolution
        ("stage4_embedding.attn.attention_biases", DOWNSAMPLE_BIASES, 2 * side),
    ):
        assert own[ours].shape == (8, sides**2)
        # The offsets 0 and the largest keep their biases.
        assert torch.allclose(own[ours][:, [0, -1]], s0_state[theirs][:, [0, -1]])
    assert torch.isfinite(logits(model, size)).all()


def test_another_number_of_classes_keeps_the_fresh_classifier(s0_state: State) -> None:
    model = build_model(zoo(S0).with_classes(10))
    fresh = model.get_parameter("head.fc.weight").clone()
    load_timm_weights(model, s0_state)
    assert torch.equal(model.get_parameter("head.fc.weight"), fresh)
    assert torch.equal(model.get_parameter("head.norm.weight"), s0_state["norm.weight"])


# -- Sizes -------------------------------------------------------------------------------------------------------------

PARAMS = (3_423_256, 5_960_560, 12_421_112, 25_937_288)
GIGA = (0.3959, 0.6520, 1.2469, 2.5525)


@pytest.mark.parametrize(("name", "params"), list(zip(NAMES, PARAMS, strict=True)))
def test_parameters_are_timm_s_less_one_classifier(name: str, params: int) -> None:
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    timm = sum(int(np.prod(shape)) for key, shape in timm_shapes(name).items() if not key.endswith(buffers))
    assert count(zoo(name)).params == params == timm - 1000 * (zoo(name).widths[-1] + 1)


@pytest.mark.parametrize(("name", "giga"), list(zip(NAMES, GIGA, strict=True)))
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
            ratio = block.mlp_ratio  # type: ignore[union-attr]
            macs += (2 * ratio * c * c + 9 * ratio * c) * n
            if isinstance(block, AttnFFN):
                assert (block.num_heads, block.key_dim, block.attn_ratio) == (8, 32, 4)
                inner = 49  # the attention of stage 3 stands on half the side
                macs += 9 * c * inner if block.stride == 2 else 0
                macs += (2 * 256 * c + 1024 * c + 9 * 1024) * inner + (256 + 2 * 8 * 8 + 1024) * inner**2 + 1024 * c * n
    before = arch.widths[2]
    macs += (128 * before + 512 * before) * 196 + (9 * before + 128 * before + 9 * 512) * 49
    macs += (128 + 512) * 49 * 196 + 512 * last * 49
    assert count(arch).macs == macs
    assert round((macs + 1000 * last) / 1e9, 4) == giga


# -- What is refused ---------------------------------------------------------------------------------------------------


def without(key: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if name != key}


REFUSED: dict[str, tuple[Callable[[State], State], str]] = {
    "no talking head": (without("stages.2.blocks.4.token_mixer.talking_head1.bias"), "lacks stages.2.blocks.4.token_mixer"),
    "no convolution of stride 2": (
        without("stages.2.blocks.5.token_mixer.stride_conv.conv.weight"),
        "lacks stages.2.blocks.5.token_mixer.stride_conv.conv.weight:",
    ),
    "biases of no square": (lambda s: s | {DOWNSAMPLE_BIASES: torch.zeros(8, 195)}, "(8, 195), not (8, 196)"),
    "biases of other heads": (lambda s: s | {HALVED_BIASES: torch.zeros(4, 49)}, "(4, 49), not (8, 49)"),
    "another size of the family": (lambda _: timm_state(NAMES[1]), "it lacks stages.2.blocks.4.ls1.gamma and 177 more and has"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(
    change: Callable[[State], State], message: str, s0_state: State
) -> None:
    model = build_model(zoo(S0))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(InputError) as refusal:
        load_timm_weights(model, change(s0_state))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_bias_table_has_the_side_of_its_map() -> None:
    shapes = timm_shapes(S0)
    assert (isqrt(shapes[HALVED_BIASES][1]), isqrt(shapes[DOWNSAMPLE_BIASES][1])) == (7, 14)
