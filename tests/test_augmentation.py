"""Each augmentation does what defines it, image by image, and the same draws give the same images."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from elsewhere import Traffic
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from nas.augmentation import (
    Draws,
    augmented,
    draw,
    erased,
    erasing_noise,
    jittered,
    mixed,
    resized_crops,
    step_generator,
    training_indices,
)
from nas.data import epoch_batches, normalise
from nas.randaugment import OPERATIONS, operated
from nas.recipe import RECIPES, Recipe

PLAIN = Recipe(epochs=1, batch_size=8, learning_rate=1e-3, layer_scale=1.0, clip_norm=1.0, shift=0.0)
ALL = replace(PLAIN, crop_scale=0.2, rand_augment=9.0, color_jitter=0.4, mixup=0.8, cutmix=1.0, erasing=0.5, shift=0.125)


def images(count: int, side: int = 16, seed: int = 0) -> Tensor:
    """Pictures rather than noise: smooth, with some grain."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(30, 220, (4, 4, 3), dtype=np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        grain = rng.integers(-10, 10, (side, side, 3))
        found.append((np.asarray(coarse).astype(int) + grain).clip(0, 255).astype(np.uint8))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def done(recipe: Recipe, count: int = 64, side: int = 16, flips: bool = False) -> tuple[Tensor, Tensor, Draws, Tensor]:
    """The images before and after, the draws and the targets, of 10 classes."""
    pixels, labels = images(count, side), torch.arange(count) % 10
    draws = draw(count, side, recipe, flips, step_generator(0, 0, 0))
    x, targets = augmented(pixels, labels, draws, recipe, 10)
    return pixels, x, draws, targets


def as_pillow(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def levels(x: Tensor) -> Tensor:
    """Values from 0 to 1 as those of a picture."""
    return (x * 255).round().int()


def test_with_nothing_on_images_are_only_normalised() -> None:
    pixels, x, _, targets = done(PLAIN)
    torch.testing.assert_close(x, normalise(pixels), rtol=0, atol=1e-6)
    assert targets.tolist() == [i % 10 for i in range(64)], "and targets are the labels"


def test_draws_follow_from_seed_epoch_and_step_and_differ_between_images() -> None:
    first, again = (draw(32, 16, ALL, True, step_generator(3, 1, 7)) for _ in range(2))
    others = [draw(32, 16, ALL, True, step_generator(*key)) for key in ((4, 1, 7), (3, 2, 7), (3, 1, 8))]
    for field in fields(Draws):
        value = getattr(first, field.name)
        assert torch.equal(value, getattr(again, field.name)), field.name
        assert len(value) == 32
        assert len(value.unique(dim=0)) > 1, f"{field.name} differs between images"
        assert not any(torch.equal(value, getattr(other, field.name)) for other in others), field.name


def test_a_part_of_a_step_is_augmented_as_it_is_in_the_whole() -> None:
    pixels, whole, draws, targets = done(ALL, 12)
    for start, stop in ((0, 6), (6, 12)):
        part = augmented(pixels[start:stop], (torch.arange(12) % 10)[start:stop], draws.of(start, stop), ALL, 10)
        torch.testing.assert_close(part[0], whole[start:stop])
        torch.testing.assert_close(part[1], targets[start:stop])
    with pytest.raises(AssertionError, match="pair"):
        draws.of(3, 6)


@pytest.mark.parametrize("recipe", [PLAIN, replace(PLAIN, crop_scale=0.2)])
def test_images_are_mirrored_half_of_the_time_where_that_keeps_their_class(recipe: Recipe) -> None:
    flipped = draw(1000, 16, recipe, True, step_generator(0, 0, 0)).mirrored
    assert 400 < flipped.sum() < 600
    assert not draw(1000, 16, recipe, False, step_generator(0, 0, 0)).mirrored.any()
    pixels = images(2)
    draws = replace(draw(2, 16, recipe, False, step_generator(0, 0, 0)), mirrored=torch.tensor([True, False]))
    draws = replace(draws, crop=torch.tensor([[0, 0, 16, 16]] * 2))
    x, _ = augmented(pixels, torch.zeros(2, dtype=torch.int64), draws, recipe, 10)
    expected = torch.stack((pixels[0].flip(2), pixels[1]))
    torch.testing.assert_close(x, normalise(expected), rtol=0, atol=1e-5)


def test_shifts_reach_as_far_as_they_may_and_reflect_the_border() -> None:
    recipe = replace(PLAIN, shift=0.125)
    shift = draw(500, 16, recipe, False, step_generator(0, 0, 0)).shift
    assert shift.min() == -2 and shift.max() == 2, "an eighth of 16 px"
    pixels = images(1)
    draws = replace(draw(1, 16, recipe, False, step_generator(0, 0, 0)), shift=torch.tensor([[2, -1]]))
    x, _ = augmented(pixels, torch.tensor([0]), draws, recipe, 10)
    columns = pixels.roll(1, 3)
    columns[..., 0] = pixels[..., 1]  # reflected, the border itself not repeated
    rows = columns.roll(-2, 2)
    rows[:, :, 14], rows[:, :, 15] = columns[:, :, 14], columns[:, :, 13]
    torch.testing.assert_close(x, normalise(rows), rtol=0, atol=1e-6)


def test_crops_have_the_area_and_the_sides_that_they_may_have() -> None:
    recipe = replace(PLAIN, crop_scale=0.08)
    top, left, height, width = draw(3000, 64, recipe, True, step_generator(0, 0, 0)).crop.double().unbind(1)
    assert (top.min(), left.min()) == (0, 0)
    assert ((top + height).max(), (left + width).max()) == (64, 64), "they reach all borders, and none further"
    area, ratio = height * width / 64**2, width / height
    assert 0.075 < area.min() < 0.09 and area.max() > 0.95
    whole = (height == 64) & (width == 64)  # where no attempt fitted
    assert ratio[~whole].min() > 0.7 and ratio[~whole].max() < 1.4, "3/4 to 4/3, and the rounding to pixels"
    assert abs(ratio.log().mean()) < 0.02, "upright as often as lying"


@pytest.mark.parametrize(
    ("side", "size", "crop"), [(48, 48, (0, 0, 48, 48)), (48, 32, (5, 7, 20, 31)), (64, 48, (0, 0, 64, 64))]
)
def test_a_crop_is_resized_as_pillow_does_it(side: int, size: int, crop: tuple[int, int, int, int]) -> None:
    pixels = images(1, side)
    top, left, height, width = crop
    box = (left, top, left + width, top + height)
    cut = as_pillow(pixels[0]).crop(box).resize((size, size), Image.Resampling.BICUBIC)
    found = levels(resized_crops(pixels.float() / 255, torch.tensor([crop]), size))[0].permute(1, 2, 0)
    assert (found - torch.from_numpy(np.asarray(cut).astype(int))).abs().max() <= 1


def test_the_weights_of_crops_are_made_where_the_images_are() -> None:
    """They are larger than the images, of which there are thousands a second on a GPU."""
    crop = draw(8, 32, replace(PLAIN, crop_scale=0.2), True, step_generator(0, 0, 0)).crop
    pixels = torch.empty(8, 3, 32, 32, device="meta")
    with Traffic() as traffic:
        found = resized_crops(pixels, crop, 24)
    assert found.device.type == "meta" and found.shape == (8, 3, 24, 24)
    assert traffic.largest <= crop.numel(), "nothing larger than the draws is on the CPU"


# -- RandAugment -------------------------------------------------------------------------------------------------------

FILL = (124, 116, 104)  # ImageNet's mean
FACTOR = {-9.0: 0.19, 9.0: 1.81}
PILLOW = {
    "rotate": lambda im, level: im.rotate(3 * level, Image.Resampling.BICUBIC, fillcolor=FILL),
    "shear_x": lambda im, level: _affine(im, 1, 0.03 * level, 0, 0, 1, 0),
    "shear_y": lambda im, level: _affine(im, 1, 0, 0, 0.03 * level, 1, 0),
    "translate_x": lambda im, level: _affine(im, 1, 0, 0.045 * level * im.width, 0, 1, 0),
    "translate_y": lambda im, level: _affine(im, 1, 0, 0, 0, 1, 0.045 * level * im.height),
    "autocontrast": lambda im, level: ImageOps.autocontrast(im),
    "equalize": lambda im, level: ImageOps.equalize(im),
    "invert": lambda im, level: ImageOps.invert(im),
    "posterize": lambda im, level: ImageOps.posterize(im, 1),
    "solarize": lambda im, level: ImageOps.solarize(im, 26),
    "solarize_add": lambda im, level: im.point([min(255, i + 99) if i < 128 else i for i in range(256)] * 3),
    "color": lambda im, level: ImageEnhance.Color(im).enhance(FACTOR[level]),
    "contrast": lambda im, level: ImageEnhance.Contrast(im).enhance(FACTOR[level]),
    "brightness": lambda im, level: ImageEnhance.Brightness(im).enhance(FACTOR[level]),
    "sharpness": lambda im, level: ImageEnhance.Sharpness(im).enhance(FACTOR[level]),
}


def _affine(im: Image.Image, *matrix: float) -> Image.Image:
    return im.transform(im.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=FILL)


@pytest.mark.parametrize("level", [-9.0, 9.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_pillows(name: str, level: float) -> None:
    """At timm's strengths for a magnitude of 9. Pillow rounds in places, and its cubic kernel is a little softer."""
    pixels = images(1, 32)
    expected = torch.from_numpy(np.asarray(PILLOW[name](as_pillow(pixels[0]), level)).astype(int))
    number = torch.tensor([[OPERATIONS.index(name)]])
    found = levels(operated(pixels.float() / 255, number, torch.tensor([[level]])))[0].permute(1, 2, 0)
    off = (found - expected).abs()
    assert off.max() <= (6 if name in OPERATIONS[:5] else 1)
    assert off.double().mean() < 1
    assert set(PILLOW) == set(OPERATIONS)


def test_every_image_has_its_own_operations_in_their_order() -> None:
    pixels = images(3).float() / 255
    invert, brighter = OPERATIONS.index("invert"), OPERATIONS.index("brightness")
    operations = torch.tensor([[invert, brighter], [brighter, invert], [-1, -1]])
    found = operated(pixels, operations, torch.tensor([[9.0, 9.0]] * 3))
    torch.testing.assert_close(found[0], ((1 - pixels[0]) * 1.81).clamp(max=1))
    torch.testing.assert_close(found[1], 1 - (pixels[1] * 1.81).clamp(max=1))
    assert torch.equal(found[2], pixels[2]), "and one that drew none has none"


def test_magnitudes_vary_about_their_mean_and_half_of_the_operations_are_done() -> None:
    recipe = replace(PLAIN, rand_augment=9.0, rand_augment_ops=3)
    draws = draw(4000, 16, recipe, True, step_generator(0, 0, 0))
    assert draws.operations.shape == (4000, 3)
    share = (draws.operations >= 0).double().mean()
    assert 0.48 < share < 0.52
    counts = torch.bincount(draws.operations[draws.operations >= 0], minlength=len(OPERATIONS)) / (4000 * 3 * share)
    assert (counts * len(OPERATIONS) - 1).abs().max() < 0.2, "each as often as another"
    strength = draws.levels.abs()
    assert 8.95 < strength.mean() < 9.0, "9, of which 10 cuts a little off"
    assert 0.4 < strength.std() < 0.5 and strength.max() == 10
    assert 0.47 < (draws.levels > 0).double().mean() < 0.53, "both directions"


def test_jitter_is_within_its_bounds_and_multiplies() -> None:
    factors = draw(2000, 16, replace(PLAIN, color_jitter=0.4), True, step_generator(0, 0, 0)).jitter
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4
    grey = torch.full((1, 3, 4, 4), 0.5)
    torch.testing.assert_close(jittered(grey, torch.tensor([[1.2, 0.7, 1.4]])), torch.full_like(grey, 0.6), rtol=0, atol=0.01)


# -- Erasing, mixing, repeating ----------------------------------------------------------------------------------------


def test_erasing_puts_normal_noise_into_a_share_of_a_share_of_the_images() -> None:
    recipe = replace(PLAIN, erasing=0.25)
    pixels, x, draws, _ = done(recipe, 400, 32)
    changed = (x - normalise(pixels)).abs().amax(1) > 1e-5  # (400, 32, 32)
    some = changed.flatten(1).any(1)
    assert 0.2 < some.double().mean() < 0.3
    area = changed.flatten(1).double().mean(1)[some]
    assert area.min() >= 0.015 and area.max() <= 0.36, "2 to 33 %, and the rounding to pixels"
    for image in some.nonzero()[:5, 0].tolist():
        top, left, height, width = draws.erased[image].tolist()
        expected = torch.zeros(32, 32, dtype=torch.bool)
        expected[top : top + height, left : left + width] = True
        assert torch.equal(changed[image], expected), "it is one rectangle"
    noise = torch.cat([x[i][:, changed[i]].flatten() for i in some.nonzero()[:, 0].tolist()])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_noise_follows_from_its_images_seed_and_is_sent_at_once() -> None:
    boxes = torch.tensor([[1, 2, 5, 4], [0, 0, 0, 0], [3, 0, 2, 2], [0, 1, 7, 7]])
    seeds = torch.tensor([11, 12, 13, 14])
    x, noise = torch.zeros(4, 3, 8, 8), erasing_noise(boxes, seeds, 3, pinned=False)
    found = erased(x, boxes, noise)
    for image, ((top, left, height, width), seed) in enumerate(zip(boxes.tolist(), seeds.tolist(), strict=True)):
        expected = torch.zeros(3, 8, 8)
        drawn = torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))
        expected[:, top : top + height, left : left + width] = drawn
        assert torch.equal(found[image], expected), image
    elsewhere = x.to("meta")
    with Traffic() as traffic:
        erased(elsewhere, boxes, noise)
    assert traffic.sent == 1


def test_mixup_blends_neighbours_and_their_targets_by_the_same_share() -> None:
    pixels, x, draws, targets = done(replace(PLAIN, mixup=0.8), 7)
    before = normalise(pixels)
    assert torch.equal(draws.share[0::2][:3], draws.share[1::2]), "a pair has one share"
    assert len(draws.share.unique()) == 4, "each pair its own"
    for image in range(6):
        share = draws.share[image]
        torch.testing.assert_close(x[image], share * before[image] + (1 - share) * before[image ^ 1], rtol=0, atol=1e-5)
        assert targets[image, image] == share and targets[image, image ^ 1] == 1 - share
    torch.testing.assert_close(x[6], before[6], rtol=0, atol=1e-5)
    torch.testing.assert_close(targets.sum(1), torch.ones(7))


def test_cutmix_takes_as_much_of_the_target_as_of_the_area() -> None:
    pixels, x, draws, targets = done(replace(PLAIN, cutmix=1.0), 40)
    before = normalise(pixels)
    neighbours = before[torch.arange(40) ^ 1]
    same = (x - before).abs().amax(1) < 1e-5
    assert ((x - neighbours).abs().amax(1) < 1e-5).logical_or(same).all(), "every pixel is one of the two images'"
    kept = same.double().mean((1, 2))
    cut = draws.box[:, 2] > 0
    assert cut.sum() > 30, "where it rounds to nothing, nothing is cut"
    torch.testing.assert_close(kept, draws.share.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(targets.sum(1), torch.ones(40))
    own = targets[torch.arange(40), torch.arange(40) % 10]
    torch.testing.assert_close(own, draws.share)


def test_with_both_each_is_done_half_of_the_time_by_its_own_distribution() -> None:
    draws = draw(4000, 32, replace(PLAIN, mixup=0.8, cutmix=1.0), True, step_generator(0, 0, 0))
    cut = draws.box[:, 2] > 0
    assert 0.45 < cut.double().mean() < 0.55
    blended = draws.share[~cut].double()
    assert abs(blended.mean() - 0.5) < 0.03
    assert abs(blended.var() - 1 / (4 * 2.6)) < 0.01, "of a beta distribution with both parameters 0.8"
    only = draw(100, 32, replace(PLAIN, mixup=0.8, cutmix=1.0, cutmix_share=0.0), True, step_generator(0, 0, 0))
    assert not (only.box > 0).any()


def test_images_that_are_mixed_with_themselves_stay() -> None:
    x, targets = torch.randn(2, 3, 4, 4), torch.eye(2)
    found, taken = mixed(x, targets, torch.ones(2), torch.zeros(2, 4, dtype=torch.int64))
    assert torch.equal(found, x) and torch.equal(taken, targets)


def test_repeated_augmentation_has_each_image_several_times_in_a_step_and_never_beside_itself() -> None:
    recipe = replace(PLAIN, batch_size=10, repeats=3)
    epochs = [list(training_indices(100, recipe, 0, epoch)) for epoch in range(3)]
    assert [len(steps) for steps in epochs] == [10] * 3, "as many steps as without"
    for indices in epochs[0]:
        assert indices.shape == (10,)
        counts = indices.bincount(minlength=100)
        assert sorted(counts[counts > 0].tolist()) == [2, 2, 3, 3]
        assert (indices[1:] != indices[:-1]).all()
    seen = torch.cat([torch.cat(steps) for steps in epochs]).unique()
    assert len(seen) == 100, "120 places for different images in three epochs: each is seen before any comes back"


def test_a_step_of_few_images_has_two_to_mix() -> None:
    recipe = replace(PLAIN, batch_size=3, repeats=3)
    assert all(len(indices.unique()) == 2 for indices in training_indices(50, recipe, 0, 0))


def test_without_repeats_the_order_is_that_of_the_epochs() -> None:
    recipe = replace(PLAIN, batch_size=16, images_per_epoch=40)
    found, expected = list(training_indices(100, recipe, 5, 2)), list(epoch_batches(100, 16, 5, 2, 40))
    assert len(found) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_all_of_a_published_recipe_gives_images_and_shares_of_classes() -> None:
    recipe = replace(RECIPES["efficientformer"], color_jitter=0.3)
    _, x, _, targets = done(recipe, 33, 24, flips=True)
    assert x.shape == (33, 3, 24, 24) and x.isfinite().all()
    assert targets.shape == (33, 10)
    torch.testing.assert_close(targets.sum(1), torch.ones(33))
