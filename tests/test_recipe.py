"""Recipes: the published values, the learning rate step by step, files, and what is refused."""

import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import yaml

from nas import cli
from nas.augmentation import training_indices
from nas.recipe import RECIPES, Recipe, load_recipe
from nas.settings import SupernetSettings
from nas.steps import cosine
from supernet.errors import InputError

RECIPE = Recipe(epochs=3, batch_size=32, learning_rate=4e-3, layer_scale=0.5, clip_norm=5.0)


def test_recipes_by_name_and_from_files(tmp_path: Path) -> None:
    assert load_recipe("quick") == RECIPES["quick"]
    path = tmp_path / "mine.yaml"
    path.write_text("{epochs: 2, batch_size: 16, learning_rate: 0.001, layer_scale: 1, clip_norm: 1.0}")
    assert load_recipe(path) == Recipe(2, 16, 0.001, 1.0, 1.0), "what is left out has its default"
    path.write_text("{epochs: 2, batch_size: 16, learning_rate: 1e-3, layer_scale: 1, clip_norm: 1E+1}")
    assert load_recipe(path) == Recipe(2, 16, 0.001, 1.0, 10.0), "numbers as people write them, which YAML 1.1 takes for text"
    with pytest.raises(InputError, match=r"unknown recipe 'quik': did you mean quick\?"):
        load_recipe("quik")
    path.write_text("{epochs: 2, batch_sise: 16}")
    with pytest.raises(InputError, match=r"mine\.yaml: unknown field 'batch_sise': did you mean batch_size "):
        load_recipe(path)
    path.write_text("{epochs: 0, batch_size: 16, learning_rate: 0.001, layer_scale: 1, clip_norm: 1.0}")
    with pytest.raises(InputError, match=r"mine\.yaml: epochs must be at least 1, but is 0"):
        load_recipe(path)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_back_from_a_file_with_every_field(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(asdict(RECIPES[name])))
    assert load_recipe(path) == RECIPES[name]


@pytest.mark.parametrize("name", RECIPES)
def test_a_printed_recipe_is_a_file_of_it(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.train(["--print-recipe", name])
    assert end.value.code == 0
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_recipe(path) == RECIPES[name]


def test_an_unknown_recipe_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.train(["--print-recipe", "quik"])
    assert end.value.code == 2
    assert "unknown recipe 'quik'" in capsys.readouterr().err


def test_quick_and_finetune_do_what_they_did() -> None:
    """What a version without the other fields meant: a folder of it goes on."""
    for name in ("quick", "finetune"):
        first = {"epochs", "batch_size", "learning_rate", "layer_scale", "clip_norm"}
        defaults = {f.name: f.default for f in fields(Recipe) if f.name not in first}
        assert {k: v for k, v in asdict(RECIPES[name]).items() if k not in first} == defaults
        assert not RECIPES[name].mixes
        rates = [RECIPES[name].rate(step, 128, 10) for step in range(100)]
        assert rates == [RECIPES[name].learning_rate * cosine(step, 10 * RECIPES[name].epochs) for step in range(100)]


def test_the_published_recipes_learning_rates() -> None:
    """EfficientFormer: 1e-3 for 1024 images, 3e-3 for 3072; EfficientViT's code: 1e-3 for 512, so 4e-3 for 8 times 256."""
    former, vit = RECIPES["efficientformer"], RECIPES["efficientvit"]
    assert former.highest_rate(former.batch_size) == pytest.approx(1e-3)
    assert former.highest_rate(3072) == pytest.approx(3e-3)
    assert vit.highest_rate(vit.batch_size) == pytest.approx(4e-3)
    assert RECIPES["quick"].highest_rate(7) == RECIPES["quick"].learning_rate, "which is not scaled"
    for recipe in (former, vit):
        steps = 125
        rates = [recipe.rate(step, recipe.batch_size, steps) for step in range(300 * steps)]
        top = recipe.highest_rate(recipe.batch_size)
        assert rates[5 * steps - 1] == pytest.approx(top), "after five epochs"
        assert rates[5 * steps] == max(rates) == top
        assert rates[0] == pytest.approx(recipe.warm_up_rate, abs=2 * top / (5 * steps))
        rise = rates[1] - rates[0]
        assert rates[300] - rates[299] == pytest.approx(rise), "linear"
        assert rates[-1] == pytest.approx(1e-5, rel=1e-3) and min(rates[5 * steps :]) >= 1e-5
        middle = rates[(5 + 300) * steps // 2]
        assert middle == pytest.approx((top + 1e-5) / 2, rel=1e-3), "a cosine is at half of its way in the middle"


def test_a_cooldown_stays_at_the_lowest_rate() -> None:
    recipe = replace(RECIPE, epochs=2, cooldown_epochs=3, minimum_rate=1e-4)
    assert recipe.all_epochs == 5
    rates = [recipe.rate(step, 32, 10) for step in range(50)]
    assert rates[20:] == [pytest.approx(1e-4)] * 30
    assert rates[18] > rates[19] > rates[20]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 1),
        ("images_per_epoch", -1),
        ("images_per_epoch", 1),
        ("images_per_epoch", 100_000_001),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("layer_scale", -1.0),
        ("clip_norm", math.inf),
        ("clip_norm", -1.0),
        ("weight_decay", -0.1),
        ("label_smoothing", 1.0),
        ("accelerator", "gpu"),
        ("precision", "fp16"),
        ("distillation", "medium"),
        ("teacher_weight", 1.5),
        ("teacher_temperature", 0.0),
        ("learning_rate_batch", -1),
        ("warm_up_epochs", 4.0),
        ("minimum_rate", math.nan),
        ("cooldown_epochs", -1),
        ("clip_agc", 0.01),  # beside clip_norm
        ("learning_rate", 1e300),
        ("ema", 1.0),
        ("drop_path", 1.0),
        ("shift", 1.0),
        ("crop_scale", 0.0),
        ("crop_scale", 1.5),
        ("crop_ratio", 0.5),
        ("rand_augment", 11.0),
        ("rand_augment_ops", 0),
        ("color_jitter", 2.0),
        ("mixup", -0.1),
        ("cutmix", math.inf),
        ("cutmix_share", 1.1),
        ("erasing", -1.0),
        ("repeats", 0),
        ("repeats", 33),  # above batch_size
    ],
)
def test_impossible_recipes_are_refused(field: str, value: object) -> None:
    with pytest.raises(InputError, match=field):
        Recipe(**{**asdict(RECIPE), field: value})


def test_the_most_that_is_allowed_makes_no_long_lists() -> None:
    recipe = replace(RECIPE, images_per_epoch=100_000_000, repeats=32)
    first = next(training_indices(5, recipe, 0, 10**6))
    assert len(first) == 32 and len(set(first.tolist())) == 2, "two images, over and over"
    with pytest.raises(InputError, match="images_per_epoch must be at most 100000000"):
        SupernetSettings(images_per_epoch=100_000_001)


def test_a_head_that_would_learn_nothing_is_refused() -> None:
    for share in (0.0, 1.0):
        with pytest.raises(InputError, match="distillation_head"):
            replace(RECIPE, distillation_head=True, teacher_weight=share)
