"""EfficientFormerV2's blocks compute what their equations say, take the maps that they can, and export as they compute."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import refusal
from torch import Tensor, nn

from nas.export import checked_onnx, expectations
from nas.measure import with_ordinary_values
from nas.supernet_training import training_size
from supernet.arch import ArchConfig, Stage
from supernet.blocks import build_layer
from supernet.blocks.efficientformer import LayerScale
from supernet.metapath import Supernet, sample_path
from supernet.model import build_model
from supernet.ports import Port
from supernet.space import SearchSpace
from supernet.specs import FFN, MB3D, AttnEmbedding, AttnFFN, Embedding, Head, Layer, Stem, label
from supernet.weights import subnetwork
from supernet.zoo import zoo

FP16_MAX = 65504
SMALL: dict[str, Any] = {"num_heads": 2, "key_dim": 4, "attn_ratio": 3}
TINY = SearchSpace.load("efficientformerv2-tiny")
WIDE = SearchSpace.load("efficientformerv2")


def ready(layer: Layer) -> nn.Module:
    """A layer in eval mode and double precision, whose every weight and statistic differs from its neutral initial value."""
    return with_ordinary_values(build_layer(layer).eval(), seed=0).double()


def random_map(dim: int, side: int) -> Tensor:
    return torch.randn(2, dim, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# -- Blocks by their equations -----------------------------------------------------------------------------------------


def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, step: int, side: int) -> Tensor:
    """Attention position by position, without its projection: q (N, heads * D, H, W), `step` apart; k and v on `side`."""
    heads = module.get_parameter("attention_biases").shape[0]
    talks = hasattr(module, "talking_head1")
    q, k, v = (x.reshape(2, heads, -1, *x.shape[2:]) for x in (q, k, v))
    key_dim, rows = q.shape[2], q.shape[3]
    found = torch.zeros(2, heads, v.shape[2], rows, rows, dtype=q.dtype)
    for y in range(rows):
        for x in range(rows):
            scores = torch.zeros(2, heads, side, side, dtype=q.dtype)
            for ky in range(side):
                for kx in range(side):
                    bias = module.get_parameter("attention_biases")[:, abs(step * y - ky) * side + abs(step * x - kx)]
                    product = (q[:, :, :, y, x] * k[:, :, :, ky, kx]).sum(2)
                    scores[:, :, ky, kx] = product / key_dim**0.5 + bias
            weights = module.talking_head1(scores) if talks else scores  # type: ignore[operator]
            weights = weights.flatten(2).softmax(2).unflatten(2, (side, side))
            weights = module.talking_head2(weights) if talks else weights  # type: ignore[operator]
            found[:, :, :, y, x] = (weights[:, :, None] * v).sum((3, 4))
    return found.flatten(1, 2)


@torch.no_grad()
def test_a_feed_forward_block_adds_its_scaled_mlp() -> None:
    block: Any = ready(Layer(FFN(8, mlp_ratio=3, act="relu"), 5))
    x = random_map(8, 5)
    hidden = block.mlp.mid(block.mlp.fc1(x).relu()).relu()
    assert hidden.shape == (2, 24, 5, 5)
    assert block.mlp.mid.conv.weight.shape == (24, 1, 3, 3)
    expected = x + block.ls2.gamma[:, None, None] * block.mlp.fc2(hidden)
    assert torch.allclose(block(x), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_an_attention_block_attends_and_then_feeds_forward() -> None:
    block: Any = ready(Layer(AttnFFN(8, **SMALL), 3))
    x = random_map(8, 3)
    mixer = block.token_mixer
    v = mixer.v(x)
    mixed = mixer.proj(nn.functional.gelu(attend(mixer, mixer.q(x), mixer.k(x), v, 1, 3) + mixer.v_local(v)))
    y = x + block.ls1.gamma[:, None, None] * mixed
    assert torch.allclose(block(x), y + block.ls2(block.mlp(y)), rtol=0, atol=1e-12)


@torch.no_grad()
def test_attention_of_stride_2_stands_on_half_the_side_and_is_upsampled_before_its_activation() -> None:
    block: Any = ready(Layer(AttnFFN(8, **SMALL, stride=2), 6))
    x = random_map(8, 6)
    mixer = block.token_mixer
    inner = mixer.stride_conv(x)
    assert inner.shape == (2, 8, 3, 3)
    assert mixer.attention_biases.shape == (2, 9)
    v = mixer.v(inner)
    attended = attend(mixer, mixer.q(inner), mixer.k(inner), v, 1, 3) + mixer.v_local(v)
    whole = nn.functional.interpolate(attended, (6, 6), mode="bilinear", align_corners=False)
    y = x + block.ls1(mixer.proj(nn.functional.gelu(whole)))
    assert torch.allclose(block(x), y + block.ls2(block.mlp(y)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [4, 5])
@torch.no_grad()
def test_an_attention_embedding_asks_from_every_second_position(side: int) -> None:
    module: Any = ready(Layer(AttnEmbedding(16, 8, **SMALL), side))
    x = random_map(8, side)
    q, v = module.attn.q.proj(module.attn.q.local(x) + x[:, :, ::2, ::2]), module.attn.v(x)
    attended = attend(module.attn, q, module.attn.k(x), v, 2, side) + module.attn.v_local(v)
    expected = module.attn.proj(nn.functional.gelu(attended)) + module.conv(x)
    found = module(x)
    assert found.shape == (2, 16, -(-side // 2), -(-side // 2))
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [False, True])
@torch.no_grad()
def test_the_head_is_batch_norm_mean_and_linear_in_both_modes(tokens: bool) -> None:
    head: Any = ready(Layer(Head(8, 5, tokens, "batch_norm"), 3))
    x = random_map(8, 3) + 2
    given = x.flatten(2).transpose(1, 2) if tokens else x
    weights = head.norm.weight, head.norm.bias
    normed = nn.functional.batch_norm(x, head.norm.running_mean, head.norm.running_var, *weights)
    assert torch.allclose(head(given), head.fc(normed.mean((2, 3))), rtol=0, atol=1e-12)

    before = head.norm.running_mean.clone()
    head.train()
    own = nn.functional.batch_norm(x, None, None, *weights, training=True)
    assert torch.allclose(head(given), head.fc(own.mean((2, 3))), rtol=0, atol=1e-12)
    assert torch.allclose(head.norm.running_mean, 0.9 * before + 0.1 * x.mean((0, 2, 3)), rtol=0, atol=1e-12)


@torch.no_grad()
def test_biases_that_are_loaded_late_take_effect() -> None:
    for layer, name in ((Layer(AttnFFN(8, **SMALL), 4), "token_mixer"), (Layer(AttnEmbedding(8, 8, **SMALL), 4), "attn")):
        module = ready(layer)
        x = random_map(8, 4)
        before = module(x)
        state = module.state_dict()
        biases = f"{name}.attention_biases"
        module.load_state_dict(state | {biases: state[biases] + torch.arange(16) / 4})
        assert (module(x) - before).abs().max() > 1e-3
        assert not any(key.endswith("offsets") for key in state)
        assert module.eval() is module and module.train() is module


def test_layer_scales_are_found_by_their_type() -> None:
    scales = [module for module in build_model(zoo("efficientformerv2_s0")).modules() if isinstance(module, LayerScale)]
    assert len(scales) == 14 + 4, "one for each block, two for those with attention"


# -- What is refused ---------------------------------------------------------------------------------------------------


def test_attention_of_stride_2_needs_an_even_map() -> None:
    said = refusal(lambda: build_layer(Layer(AttnFFN(8, stride=2), 7)))
    assert "maps of an even side" in said and "7 px" in said
    build_layer(Layer(AttnFFN(8), 7))
    assert "13 px" in refusal(lambda: build_model(zoo("efficientformerv2_s0").at(208)))


def test_specs_refuse_what_they_cannot_be() -> None:
    assert "stride must be 1 or 2, but is 3" in refusal(lambda: AttnFFN(8, stride=3))
    assert "attn_embedding enters has stride 2, but its stride is 1" in refusal(lambda: AttnEmbedding(16, 8, stride=1))
    assert "mlp_ratio must be a whole number" in refusal(lambda: FFN(8, mlp_ratio=0))
    for make in (FFN, AttnFFN):
        assert "activation" in refusal(lambda make=make: make(8, act="swish"))
    assert "the first stage is entered by one of stem" in refusal(
        lambda: ArchConfig("a", 32, 5, (Stage(8, 2, (), AttnEmbedding(8, 8)),))
    )
    assert "has stride 2, but its stride is 1" in refusal(
        lambda: ArchConfig("a", 32, 5, (Stage(8, 4, ()), Stage(16, 1, (), AttnEmbedding(8, 8))))
    )


# -- In a network ------------------------------------------------------------------------------------------------------


def test_blocks_on_maps_stand_in_any_order_before_tokens() -> None:
    blocks = (AttnFFN(16, **SMALL), FFN(16), AttnFFN(16, **SMALL, stride=2), MB3D(16, **SMALL))
    arch = ArchConfig("mixed", 32, 5, (Stage(8, 4, (FFN(8),)), Stage(16, 2, blocks, AttnEmbedding(8, 8))), "batch_norm")
    layers = dict(arch.named_layers())
    assert layers["stage2_embedding"] == Layer(AttnEmbedding(16, 8), 8)
    assert layers["stage2_embedding"].leaving == Port("map", 16, 4) == layers["stage2_block1"].entering
    assert layers["head"] == Layer(Head(16, 5, tokens=True, form="batch_norm"), 4)
    assert build_model(arch).eval()(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_s0_s_layers_are_the_published_ones() -> None:
    arch = zoo("efficientformerv2_s0")
    layers = dict(arch.named_layers())
    assert layers["stem"] == Layer(Stem(32, 4, "gelu"), 224)
    assert layers["stage3_embedding"] == Layer(Embedding(96, 48), 28)
    assert layers["stage3_block2"] == Layer(FFN(96, 3), 14)
    assert layers["stage3_block6"] == Layer(AttnFFN(96, stride=2), 14)
    assert layers["stage4_embedding"] == Layer(AttnEmbedding(176, 96), 14)
    assert layers["stage4_block3"] == Layer(AttnFFN(176, 3), 7)
    assert layers["head"] == Layer(Head(176, 1000, False, "batch_norm"), 7)


@pytest.mark.parametrize(
    ("name", "widths", "depths", "attention"),
    [
        ("s0", (32, 48, 96, 176), (2, 2, 6, 4), 2),
        ("s1", (32, 48, 120, 224), (3, 3, 9, 6), 2),
        ("s2", (32, 64, 144, 288), (4, 4, 12, 8), 4),
        ("l", (40, 80, 192, 384), (5, 5, 15, 10), 6),
    ],
)
def test_the_zoo_holds_the_published_layouts_and_the_space_holds_them(
    name: str, widths: tuple[int, ...], depths: tuple[int, ...], attention: int
) -> None:
    arch = zoo(f"efficientformerv2_{name}")
    assert (arch.widths, arch.strides) == (widths, (4, 2, 2, 2))
    assert tuple(len(stage.blocks) for stage in arch.stages) == depths
    for number, stage in enumerate(arch.stages):
        suffix = attention if number >= 2 else 0
        kinds = [block.kind for block in stage.blocks]
        assert kinds == ["ffn"] * (len(kinds) - suffix) + ["attn_ffn"] * suffix
    assert arch in WIDE
    assert WIDE.fit(arch).without_identity() == arch
    assert set(arch.layers()) <= set(WIDE.layers())


# -- The spaces --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [WIDE, TINY], ids=lambda space: space.name)
def test_the_largest_network_has_attention_all_over_the_last_two_stages(space: SearchSpace) -> None:
    kinds = [{label(replace(block, dim=8)) for block in stage.blocks} for stage in space.largest.stages]  # type: ignore[type-var]
    assert kinds == [{"ffn"}, {"ffn"}, {"attn_ffn(stride=2)"}, {"attn_ffn"}]
    assert all(len(stage.widths) <= 6 for stage in space.stages)
    assert len(space.layers()) <= 160


def test_a_search_is_at_a_size_at_which_attention_can_be_halved() -> None:
    assert [WIDE.at(size).resolutions[2] for size in (113, 128, 129, 144)] == [8, 8, 9, 9]
    assert [WIDE.smallest_image_size(size) for size in (1, 113, 128, 129, 209)] == [113, 113, 128, 145, 209]
    assert TINY.smallest_image_size() == 29
    WIDE.at(128).check_searchable()
    said = refusal(WIDE.at(129).check_searchable)
    assert "at 129 px has maps of an odd side" in said and "the next size that it takes is 145 px" in said
    assert "has a last map of 3x3" in refusal(WIDE.at(96).check_searchable)
    assert training_size(TINY, 8) == 29
    assert training_size(WIDE, 129) == 145
    assert training_size(WIDE, 500) == 224


def test_what_a_candidate_is_called_is_its_own_even_with_all_knobs_at_their_defaults() -> None:
    first = WIDE.stages[0]
    assert first.kinds == ("ffn", "ffn(mlp_ratio=3)", "ffn(mlp_ratio=2)", "identity")
    assert [first.kind_of(candidate) for candidate in first.candidates] == list(first.kinds)


FULL_WIDTH = replace(TINY, stages=tuple(replace(stage, widths=stage.widths[-1:]) for stage in TINY.stages))


def supernet(space: SearchSpace) -> Supernet:
    net = Supernet(space).eval()
    with_ordinary_values(net, seed=0)
    return net


@torch.no_grad()
def test_a_path_of_ints_equals_the_built_network() -> None:
    net, rng = supernet(FULL_WIDTH), random.Random(0)
    members = [FULL_WIDTH.largest, FULL_WIDTH.smallest, *(FULL_WIDTH.sample(rng) for _ in range(8))]
    built = [subnetwork(net, arch).eval().double() for arch in members]
    net.double()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = []
    for arch, model in zip(members, built, strict=True):
        outputs.append(net(x, FULL_WIDTH.path(arch)))
        assert (outputs[-1] - model(x)).abs().max() < 1e-9, arch
    # The members are different networks, so that the equalities above say something.
    assert all((a - b).abs().max() > 1e-3 for n, a in enumerate(outputs) for b in outputs[:n])


def test_a_network_has_its_supernet_s_precision() -> None:
    net = supernet(TINY)
    for dtype in (torch.bfloat16, torch.float64):
        kinds = {tensor.dtype for tensor in subnetwork(net.to(dtype), TINY.smallest).parameters()}
        assert kinds == {dtype}


def test_a_narrowed_network_has_the_leading_channels() -> None:
    net, rng = supernet(TINY), random.Random(1)
    arch = TINY.arch([stage.widths[0] for stage in TINY.stages], [["ffn"] * 2, ["ffn"] * 2, ["attn_ffn"] * 4, ["attn_ffn"] * 3])
    own, whole = subnetwork(net, arch).state_dict(), net.state_dict()
    narrow, wide = "stage3_block2.token_mixer", "stages.2.1.candidates.0.token_mixer"
    assert torch.equal(own[f"{narrow}.q.conv.weight"], whole[f"{wide}.q.conv.weight"][:, :48])
    assert torch.equal(own[f"{narrow}.v_local.conv.weight"], whole[f"{wide}.v_local.conv.weight"])  # of no stage's width
    attention = "attn.q.local.weight"
    assert torch.equal(own[f"stage4_embedding.{attention}"], whole[f"embeddings.2.{attention}"][:48])
    for member in (TINY.sample(rng) for _ in range(5)):
        assert subnetwork(net, member).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_one_mixture_step_reaches_every_weight_and_every_logit() -> None:
    net = supernet(TINY)
    path = sample_path(list(net.logits), 1.0, torch.Generator().manual_seed(0))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    nn.functional.cross_entropy(net(x, path), torch.tensor([0, 1, 2, 3])).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


# -- Files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_sampled_network_is_exported_as_it_computes(seed: int) -> None:
    arch = TINY.largest if seed == 0 else TINY.sample(random.Random(seed))
    model = with_ordinary_values(build_model(arch), seed=seed)
    _, difference = checked_onnx(model, expectations(model, arch.image_size))
    assert difference < 1e-4


@torch.no_grad()
def test_ordinary_values_keep_the_deepest_network_within_half_precision() -> None:
    """Else a network in fp16 would compute with infinities when it is timed."""
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for layer in with_ordinary_values(build_model(WIDE.largest).eval(), seed=0):  # type: ignore[attr-defined]
        x = layer(x)
        assert x.abs().max() < FP16_MAX / 100
