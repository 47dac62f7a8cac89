"""State dicts of the code that the networks' authors published go in where timm's do.

The modules below have the names and shapes of that code's state dicts (snap-research/EfficientFormer at 0fd00b2,
microsoft/Cream at de2d467) and compute nothing.
"""

import argparse
from collections.abc import Iterable
from math import ceil
from pathlib import Path

import pytest
import torch
from test_weights import distance, logits, timm_logits, timm_shapes, zoo
from test_weights import timm_state as efficientformer_state
from test_weights_efficientvit import timm_state as efficientvit_state
from torch import Tensor, nn

from nas.pretrained import load_pretrained, starting_weights
from supernet.arch import ArchConfig
from supernet.authors import in_timm_names
from supernet.errors import InputError
from supernet.model import build_model
from supernet.specs import FFN, MB3D, AttnFFN, Sandwich
from supernet.weights import load_timm_weights

V1 = tuple(f"efficientformer_{size}" for size in ("l1", "l3", "l7"))
V2 = tuple(f"efficientformerv2_{size}" for size in ("s0", "s1", "s2", "l"))
EFFICIENTVIT = tuple(f"efficientvit_m{number}" for number in range(6))


# -- The authors' modules ------------------------------------------------------------------------------------------------


class Parts(nn.ModuleDict):
    """Modules by name, beside tensors of these shapes."""

    def __init__(self, parts: dict[str, nn.Module] | None = None, **shapes: tuple[int, ...]) -> None:
        super().__init__(parts)
        for name, shape in shapes.items():
            self.register_buffer(name, torch.empty(shape))


def conv(wide: int, out: int, kernel: int = 1, groups: int = 1) -> nn.Module:
    return nn.Conv2d(wide, out, kernel, groups=groups)


def normed(wide: int, out: int, kernel: int = 1, groups: int = 1) -> list[nn.Module]:
    return [conv(wide, out, kernel, groups), nn.BatchNorm2d(out)]


def biases(heads: int, queries: int, keys: int) -> dict[str, tuple[int, ...]]:
    return {"attention_biases": (heads, keys), "attention_bias_idxs": (queries, keys)}


def snap(arch: ArchConfig) -> nn.Module:
    """EfficientFormer or EfficientFormerV2 of snap-research/EfficientFormer."""
    widths, v2 = arch.widths, arch.name.startswith("efficientformerv2")
    first, last = widths[0], widths[-1]
    network: list[nn.Module] = []
    for index, (stage, side) in enumerate(zip(arch.stages, (56, 28, 14, 7), strict=True)):
        network.append(nn.Sequential(*(v2_block(b, index, side) for b in stage.blocks) if v2 else v1_blocks(stage.blocks)))
        if index < 3:
            network.append(embedding(stage.width, widths[index + 1], side if v2 and index == 2 else None))
    return Parts(
        {
            "patch_embed": nn.Sequential(*normed(3, first // 2, 3), nn.ReLU(), *normed(first // 2, first, 3), nn.ReLU()),
            "network": nn.ModuleList(network),
            "norm": nn.BatchNorm2d(last) if v2 else nn.LayerNorm(last),
            "head": nn.Linear(last, 1000),
            "dist_head": nn.Linear(last, 1000),
        }
    )


def v1_blocks(blocks: Iterable[object]) -> Iterable[nn.Module]:
    """A stage of EfficientFormer; before its first block of tokens stands one that flattens."""
    flat = False
    for block in blocks:
        d: int = block.dim  # type: ignore[attr-defined]
        scales = {"layer_scale_1": (d,), "layer_scale_2": (d,)}
        if not isinstance(block, MB3D):
            mlp = {"fc1": conv(d, 4 * d), "fc2": conv(4 * d, d), "norm1": nn.BatchNorm2d(4 * d), "norm2": nn.BatchNorm2d(d)}
            yield Parts({"token_mixer": nn.Identity(), "mlp": Parts(mlp)}, **scales)
            continue
        if not flat:
            yield nn.Identity()
            flat = True
        attention = Parts({"qkv": nn.Linear(d, 1536), "proj": nn.Linear(1024, d)}, **biases(8, 49, 49))
        linear = Parts({"fc1": nn.Linear(d, 4 * d), "fc2": nn.Linear(4 * d, d)})
        norms = {"norm1": nn.LayerNorm(d), "norm2": nn.LayerNorm(d)}
        yield Parts({"token_mixer": attention, "mlp": linear, **norms}, **scales)


def v2_block(block: object, index: int, side: int) -> nn.Module:
    assert isinstance(block, FFN | AttnFFN)
    d, hidden = block.dim, block.mlp_ratio * block.dim
    mlp = Parts(
        {
            "fc1": conv(d, hidden),
            "fc2": conv(hidden, d),
            "mid": conv(hidden, hidden, 3, hidden),
            "mid_norm": nn.BatchNorm2d(hidden),
            "norm1": nn.BatchNorm2d(hidden),
            "norm2": nn.BatchNorm2d(d),
        }
    )
    if isinstance(block, FFN):
        return Parts({"mlp": mlp}, layer_scale_2=(d, 1, 1))
    tokens = (ceil(side / 2) if index == 2 else side) ** 2
    mixer = {
        **qkv_of_v2(d, key_dim=32),
        "q": nn.Sequential(*normed(d, 256)),
        "talking_head1": conv(8, 8),
        "talking_head2": conv(8, 8),
        "proj": nn.Sequential(nn.GELU(), *normed(1024, d)),
        **({"stride_conv": nn.Sequential(*normed(d, d, 3, d))} if index == 2 else {}),
    }
    return Parts(
        {"token_mixer": Parts(mixer, **biases(8, tokens, tokens)), "mlp": mlp},
        layer_scale_1=(d, 1, 1),
        layer_scale_2=(d, 1, 1),
    )


def qkv_of_v2(d: int, key_dim: int) -> dict[str, nn.Module]:
    inner = 8 * 4 * key_dim
    return {
        "k": nn.Sequential(*normed(d, 8 * key_dim)),
        "v": nn.Sequential(*normed(d, inner)),
        "v_local": nn.Sequential(*normed(inner, inner, 3, inner)),
    }


def embedding(d: int, out: int, side: int | None) -> nn.Module:
    """What leads to the next stage; with the side of the map before it, the one by attention."""
    if side is None:
        return Parts({"proj": conv(d, out, 3), "norm": nn.BatchNorm2d(out)})
    query = Parts({"local": nn.Sequential(conv(d, d, 3, d)), "proj": nn.Sequential(*normed(d, 128))})
    projected = nn.Sequential(nn.GELU(), *normed(512, out))
    attention = Parts({**qkv_of_v2(d, key_dim=16), "q": query, "proj": projected}, **biases(8, ceil(side / 2) ** 2, side**2))
    return Parts({"attn": attention, "conv": conv(d, out, 3), "bn": nn.BatchNorm2d(out)})


def cbn(wide: int, out: int, kernel: int = 1, groups: int = 1) -> nn.Module:
    return Parts({"c": nn.Conv2d(wide, out, kernel, groups=groups, bias=False), "bn": nn.BatchNorm2d(out)})


def cream(arch: ArchConfig) -> nn.Module:
    """EfficientViT of microsoft/Cream."""
    lists: list[list[nn.Module]] = [[], [], []]
    for index, (stage, side) in enumerate(zip(arch.stages, (7, 7, 4), strict=True)):
        if index:
            before, d = arch.widths[index - 1], stage.width
            hidden = 4 * before
            squeezed = max(8, int(before + 4) // 8 * 8)  # a quarter of the hidden width, to a multiple of 8
            gate = Parts({"fc1": conv(hidden, squeezed), "fc2": conv(squeezed, hidden)})
            merging = {
                "conv1": cbn(before, hidden),
                "conv2": cbn(hidden, hidden, 3, hidden),
                "se": gate,
                "conv3": cbn(hidden, d),
            }
            lists[index] += [nn.Sequential(*local(before)), Parts(merging), nn.Sequential(*local(d))]
        for block in stage.blocks:
            assert isinstance(block, Sandwich)
            d, heads, keys = block.dim, block.num_heads, block.key_dim
            attention = Parts(
                {
                    "qkvs": nn.ModuleList(cbn(d // heads, 2 * keys + d // heads) for _ in range(heads)),
                    "dws": nn.ModuleList(cbn(keys, keys, block.q_kernels[head], keys) for head in range(heads)),
                    "proj": nn.Sequential(nn.ReLU(), cbn(d, d)),
                },
                **biases(heads, side**2, side**2),
            )
            mixer = Parts({"m": Parts({"attn": attention})})
            dw0, ffn0, dw1, ffn1 = *local(d), *local(d)
            lists[index].append(Parts({"dw0": dw0, "ffn0": ffn0, "mixer": mixer, "dw1": dw1, "ffn1": ffn1}))
    d = arch.widths[0]
    stem = [cbn(wide, out, 3) for wide, out in ((3, d // 8), (d // 8, d // 4), (d // 4, d // 2), (d // 2, d))]
    return Parts(
        {
            "patch_embed": nn.Sequential(stem[0], nn.ReLU(), stem[1], nn.ReLU(), stem[2], nn.ReLU(), stem[3]),
            **{f"blocks{number}": nn.Sequential(*blocks) for number, blocks in enumerate(lists, 1)},
            "head": Parts({"bn": nn.BatchNorm1d(arch.widths[-1]), "l": nn.Linear(arch.widths[-1], 1000)}),
        }
    )


def local(d: int) -> tuple[nn.Module, nn.Module]:
    return Parts({"m": cbn(d, d, 3, d)}), Parts({"m": Parts({"pw1": cbn(d, 2 * d), "pw2": cbn(2 * d, d)})})


def authors_state(name: str) -> dict[str, Tensor]:
    """The names and shapes of the authors' state dict, without values."""
    with torch.device("meta"):
        return dict((cream if name in EFFICIENTVIT else snap)(zoo(name)).state_dict())


def authors_weights(name: str) -> dict[str, Tensor]:
    """The authors' state dict with the golden weights of timm's."""
    values = (efficientvit_state if name in EFFICIENTVIT else efficientformer_state)(name)
    state = authors_state(name)
    none = torch.zeros(1)  # for what timm does not keep
    pairs = zip(state.items(), in_timm_names(state), strict=True)
    return {
        key: values[theirs].reshape(like.shape) if theirs in values else none.expand(like.shape)
        for (key, like), theirs in pairs
    }


# -- Names and shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*V1, *V2, *EFFICIENTVIT])
def test_names_and_shapes_become_timm_s(name: str) -> None:
    found = {key: tuple(tensor.shape) for key, tensor in in_timm_names(authors_state(name)).items()}
    expected = timm_shapes(name)
    assert {key: shape for key, shape in found.items() if not key.endswith("attention_bias_idxs")} == {
        key: shape for key, shape in expected.items() if not key.endswith("attention_bias_idxs")
    }


@pytest.mark.parametrize(
    ("name", "number"),
    list(zip((*V1, *EFFICIENTVIT), (281, 457, 649, 699, 615, 603, 675, 699, 835), strict=True)),
)
def test_the_authors_state_dicts_have_as_many_tensors_as_published(name: str, number: int) -> None:
    assert len(authors_state(name)) == number


@pytest.mark.parametrize(
    ("name", "authors", "timm"),
    [
        ("efficientformer_l1", "patch_embed.4.running_mean", "stem.norm2.running_mean"),
        ("efficientformer_l1", "network.0.2.layer_scale_2", "stages.0.blocks.2.ls2.gamma"),
        ("efficientformer_l1", "network.0.2.mlp.norm1.bias", "stages.0.blocks.2.mlp.norm1.bias"),
        ("efficientformer_l1", "network.5.norm.weight", "stages.3.downsample.norm.weight"),
        ("efficientformer_l1", "network.6.4.token_mixer.proj.bias", "stages.3.blocks.4.token_mixer.proj.bias"),
        ("efficientformer_l1", "dist_head.weight", "head_dist.weight"),
        ("efficientformerv2_s0", "patch_embed.3.weight", "stem.conv2.conv.weight"),
        ("efficientformerv2_s0", "network.3.norm.bias", "stages.2.downsample.conv.bn.bias"),
        ("efficientformerv2_s0", "network.5.attn.q.proj.1.weight", "stages.3.downsample.attn.q.proj.bn.weight"),
        ("efficientformerv2_s0", "network.5.attn.q.local.0.weight", "stages.3.downsample.attn.q.local.weight"),
        ("efficientformerv2_s0", "network.5.attn.proj.2.weight", "stages.3.downsample.attn.proj.bn.weight"),
        ("efficientformerv2_s0", "network.4.5.mlp.mid_norm.weight", "stages.2.blocks.5.mlp.mid.bn.weight"),
        ("efficientformerv2_s0", "network.4.5.mlp.norm2.weight", "stages.2.blocks.5.mlp.fc2.bn.weight"),
        ("efficientvit_m5", "blocks1.0.dw1.m.c.weight", "stages.0.blocks.0.dw1.m.conv.weight"),
        ("efficientvit_m5", "blocks2.2.1.m.pw2.bn.weight", "stages.1.downsample.res2.1.m.pw2.bn.weight"),
        ("efficientvit_m5", "blocks3.6.mixer.m.attn.dws.3.c.weight", "stages.2.blocks.3.mixer.m.attn.dws.3.conv.weight"),
        ("efficientvit_m5", "head.l.bias", "head.linear.bias"),
    ],
)
def test_each_tensor_is_the_one_of_its_place(name: str, authors: str, timm: str) -> None:
    state = authors_state(name)
    assert dict(zip(state, in_timm_names(state), strict=True))[authors] == timm


def test_timm_s_own_are_left_alone() -> None:
    for name in ("efficientformer_l1", "efficientformerv2_s0", "efficientvit_m1", "deit_tiny"):
        state = {key: torch.empty(shape, device="meta") for key, shape in timm_shapes(name).items()}
        assert in_timm_names(state) is state


# -- What is loaded ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["efficientformer_l1", "efficientformerv2_s0", "efficientvit_m1"])
def test_a_file_of_the_authors_gives_the_published_logits(name: str, tmp_path: Path) -> None:
    """As their training leaves it: under `model`, the training's arguments beside it."""
    file = tmp_path / "best.pth"
    torch.save({"model": authors_weights(name), "epoch": 299, "args": argparse.Namespace(lr=1e-3, model=name)}, file)
    read = load_pretrained(name, str(file), zoo(name))
    assert read.arch.num_classes == 1000
    model = build_model(read.arch).eval()
    model.load_state_dict(read.state)
    assert distance(logits(model), timm_logits(name)) < 1e-5 * timm_logits(name).std().clamp(min=1)
    assert not isinstance(starting_weights(name, str(file), zoo(name)), Path), "nas-train reads them too"


def test_convolutions_may_be_matrices_as_in_efficientvit_s_released_files() -> None:
    state = authors_weights("efficientvit_m1")
    flat = {
        key: tensor.squeeze((2, 3)) if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor
        for key, tensor in state.items()
    }
    assert sum(tensor.ndim == 2 for tensor in flat.values()) > 50
    first, second = build_model(zoo("efficientvit_m1")), build_model(zoo("efficientvit_m1"))
    load_timm_weights(first, state)
    load_timm_weights(second, flat)
    assert all(torch.equal(tensor, second.state_dict()[key]) for key, tensor in first.state_dict().items())


def test_a_network_that_its_authors_trained_without_distillation_has_one_classifier() -> None:
    state = {key: tensor for key, tensor in authors_weights("efficientformer_l1").items() if not key.startswith("dist_head.")}
    model = build_model(zoo("efficientformer_l1"))
    load_timm_weights(model, state)
    assert torch.equal(model.state_dict()["head.fc.weight"], state["head.weight"])


def test_another_network_s_are_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"does not fit the network: it .*, or its authors'$"):
        load_timm_weights(build_model(zoo("efficientformerv2_s0")), authors_state("efficientformerv2_s1"))
    with pytest.raises(InputError, match=r"does not fit the network: it lacks"):
        load_timm_weights(build_model(zoo("efficientformer_l1")), authors_state("efficientformerv2_s1"))
