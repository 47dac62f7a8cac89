"""The metapath model in timm: created, loaded, fine-tuned and taken apart as timm's own are. Needs timm."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refusal
from safetensors.torch import save_file
from test_features import ALL, CLASS_TOKEN, UNFLAT, images, trained

import nas
from nas.from_timm import import_timm
from supernet.arch import ArchConfig

timm, why_not = import_timm()
if timm is None:
    wanted = "pip install 'metapath-nas[timm]', with a torchvision that fits this torch"
    pytest.skip(f"timm is not usable here ({why_not}): {wanted}", allow_module_level=True)

import nas.timm_models  # noqa: E402 - it needs timm


@pytest.fixture(params=ALL, ids=lambda arch: arch.name)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ArchConfig, str, str]:
    """A network, its YAML file, its weights."""
    arch: ArchConfig = request.param
    arch.save(tmp_path / "searched.yaml")
    save_file(trained(arch).state_dict(), tmp_path / "model.safetensors")
    return arch, str(tmp_path / "searched.yaml"), str(tmp_path / "model.safetensors")


def create(arch: str | ArchConfig, **more: Any) -> Any:
    return timm.create_model("metapath", arch=arch, **more).eval()


def test_it_is_the_network(saved: tuple[ArchConfig, str, str]) -> None:
    arch, file, weights = saved
    model = create(file, checkpoint_path=weights)
    with torch.inference_mode():
        expected = trained(arch)(images())
        torch.testing.assert_close(model(images()), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(model.forward_head(model.forward_features(images())), expected, rtol=0, atol=1e-4)
        pooled = model.forward_head(model.forward_features(images()), pre_logits=True)
        torch.testing.assert_close(model.get_classifier()(pooled), expected, rtol=0, atol=1e-4)
    assert pooled.shape == (2, model.num_features)


def test_features_only_takes_the_whole_networks_weights(saved: tuple[ArchConfig, str, str]) -> None:
    arch, file, weights = saved
    backbone = create(file, checkpoint_path=weights, features_only=True)
    expected = nas.features(file, weights).eval()
    with torch.inference_mode():
        for a, b in zip(backbone(images()), expected(images()), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        _, maps = create(file, checkpoint_path=weights).forward_intermediates(images(), 1)
    torch.testing.assert_close(maps[0], expected(images())[-1], rtol=0, atol=0)
    assert backbone.feature_info.channels() == list(arch.widths)
    assert backbone.feature_info.reduction() == expected.strides


def test_features_at_another_size_of_chosen_stages() -> None:
    backbone = create(UNFLAT, features_only=True, out_indices=(1, 3), img_size=64, num_classes=7)
    assert [tuple(m.shape) for m in backbone(images(64))] == [(2, 8, 32, 32), (2, 16, 8, 8)]
    assert backbone.feature_info.channels() == [8, 16]
    last_two = create(UNFLAT, features_only=True, out_indices=2)
    assert last_two.feature_info.reduction() == [4, 8]


def test_the_classifier_is_the_users() -> None:
    assert create(UNFLAT).num_classes == 5
    model = create(UNFLAT, num_classes=7)
    assert model(images()).shape == (2, 7)
    model.reset_classifier(0)
    assert model(images()).shape == (2, model.num_features) == (2, 16)
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3)
    assert create(UNFLAT, num_classes=0)(images()).shape == (2, 16)


def test_timm_knows_how_images_are_prepared() -> None:
    config = timm.data.resolve_model_data_config(create(UNFLAT))
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == nas.timm_models.IMAGENET_MEAN
    assert config["crop_pct"] == 1.0
    assert json.dumps(create(CLASS_TOKEN).default_cfg), "timm writes it to the hub as JSON"


def test_layer_wise_decay_knows_every_parameter() -> None:
    from timm.optim import create_optimizer_v2

    model = create(UNFLAT)
    groups = create_optimizer_v2(model, opt="adamw", weight_decay=0.05, layer_decay=0.5).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert set(scale) == {id(p) for p in named.values()}
    first, last = named["stem.conv1.weight"], named["head.fc.weight"]
    middle = named["stage3_block1.mlp.fc1.weight"]
    assert scale[id(first)] < scale[id(middle)] < scale[id(last)] == 1
    assert decay[id(named["stage3_block2.token_mixer.attention_biases"])] == 0
    assert decay[id(middle)] == 0.05


def test_what_it_does_not_have_is_refused() -> None:
    assert 'arch="searched.yaml"' in refusal(lambda: timm.create_model("metapath"))
    assert "drop_path_rate" in refusal(lambda: create(UNFLAT, drop_path_rate=0.1))
    assert "square RGB" in refusal(lambda: create(UNFLAT, img_size=(32, 64)))
    assert "global_pool must be avg" in refusal(lambda: create(UNFLAT).reset_classifier(3, "max"))
