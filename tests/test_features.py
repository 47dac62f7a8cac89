"""A backbone gives the maps of the network's own stages, token stages too, at its own image size and at another."""

from pathlib import Path

import pytest
import torch
from refusals import refusal
from safetensors.torch import save_file

import nas
from nas.feature_maps import Features
from nas.measure import with_ordinary_values
from supernet.arch import ArchConfig, MultiplexSpec, Stage
from supernet.model import build_model
from supernet.specs import MB3D, MB4D, AttnEmbedding, AttnFFN, PatchStem, Sandwich, ViT
from supernet.weights import at_size

TOKENS = MB3D(16, num_heads=2, key_dim=8, attn_ratio=2)
UNFLAT = ArchConfig(
    "unflat",
    32,
    5,
    (Stage(8, 2, ()), Stage(8, 1, (MB4D(8),)), Stage(16, 2, (MB4D(16), TOKENS)), Stage(16, 2, (TOKENS,))),
)
MAPS = ArchConfig(
    "maps",
    32,
    5,
    (
        Stage(8, 4, (Sandwich(8, num_heads=2, key_dim=4, window=4),)),
        Stage(16, 2, (AttnFFN(16, num_heads=2, key_dim=8, attn_ratio=2),), AttnEmbedding(16, 8, num_heads=2, key_dim=8)),
    ),
    "batch_norm",
)
CLASS_TOKEN = ArchConfig("vit", 32, 5, (Stage(16, 8, (ViT(16, num_heads=2),), PatchStem(16, 8)),), "class_token")
ALL = (UNFLAT, MAPS, CLASS_TOKEN)


def images(side: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))


def trained(arch: ArchConfig) -> torch.nn.Sequential:
    return with_ordinary_values(build_model(arch), seed=1).eval()  # type: ignore[return-value]


@pytest.mark.parametrize("arch", ALL, ids=lambda arch: arch.name)
def test_maps_have_the_stated_channels_and_strides(arch: ArchConfig) -> None:
    backbone = nas.features(arch).eval()
    maps = backbone(images())
    assert [tuple(m.shape) for m in maps] == [
        (2, c, 32 // s, 32 // s) for c, s in zip(backbone.channels, backbone.strides, strict=True)
    ]
    assert backbone.channels == list(arch.widths)
    assert [info["reduction"] for info in backbone.feature_info] == backbone.strides
    assert all(info["module"] in dict(backbone.named_children()) for info in backbone.feature_info)


@pytest.mark.parametrize("arch", ALL, ids=lambda arch: arch.name)
def test_the_maps_are_those_of_the_network(arch: ArchConfig, tmp_path: Path) -> None:
    model = trained(arch)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    arch.save(tmp_path / "arch.yaml")
    backbone = nas.features(tmp_path / "arch.yaml", tmp_path / "model.safetensors").eval()
    entering: dict[str, torch.Tensor] = {}
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda _, given, __, name=name: entering.update({name: given[0]}))
    with torch.inference_mode():
        model(images())
        maps = backbone(images())
    for stage, found in enumerate(maps, 1):
        after = entering.get(f"stage{stage + 1}_embedding", entering["head"])  # on maps, whatever the stage ended with
        if after.ndim == 3:
            cut = after.shape[1] - found.shape[2] * found.shape[3]  # a class token
            after = after[:, cut:].transpose(1, 2).reshape(found.shape)
        torch.testing.assert_close(found, after, rtol=0, atol=0)


def test_only_what_is_needed_is_kept() -> None:
    backbone = nas.features(UNFLAT, out_indices=(1, -2))
    assert backbone.out_indices == (1, 2)
    assert list(dict(backbone.named_children()))[-1] == "stage3_block2", "neither the last stage nor the head"
    assert [m.shape[2] for m in backbone.eval()(images())] == [16, 8]
    assert not backbone.load_state_dict(trained(UNFLAT).state_dict()).unexpected_keys


@pytest.mark.parametrize("arch", [UNFLAT, CLASS_TOKEN], ids=lambda arch: arch.name)
def test_another_image_size_resizes_what_depends_on_it(arch: ArchConfig, tmp_path: Path) -> None:
    model, larger = trained(arch), build_model(arch.at(64)).eval()
    given = model.state_dict()
    larger.load_state_dict({name: at_size(name, given[name], like) for name, like in larger.state_dict().items()})
    save_file(given, tmp_path / "model.safetensors")
    resized = nas.features(arch, tmp_path / "model.safetensors", image_size=64).eval()
    expected = Features(larger, arch.at(64))
    with torch.inference_mode():
        for a, b in zip(resized(images(64)), expected(images(64)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("arch", [UNFLAT, CLASS_TOKEN], ids=lambda arch: arch.name)
def test_weights_of_the_size_that_is_asked_for_stay_as_they_are(arch: ArchConfig, tmp_path: Path) -> None:
    model = trained(arch.at(64))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    backbone = nas.features(arch, tmp_path / "model.safetensors", image_size=64).eval()
    expected = Features(model, arch.at(64))
    with torch.inference_mode():
        for a, b in zip(backbone(images(64)), expected(images(64)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_has_no_maps_is_refused() -> None:
    assert "the stages 0 to 3" in refusal(lambda: nas.features(UNFLAT, out_indices=(0, 4)))
    assert "out_indices []" in refusal(lambda: nas.features(UNFLAT, out_indices=()))
    grouped = ArchConfig("mux", 32, 5, CLASS_TOKEN.stages, "class_token", MultiplexSpec(2))
    assert "without mux" in refusal(lambda: nas.features(grouped))
