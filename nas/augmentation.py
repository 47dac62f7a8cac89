"""Augmentation of training images, batch by batch on the accelerator.

All that is random is drawn first, on the CPU, for all images of a step (`draw`), and then done to the images at hand
(`augmented`): the same draws give the same images on every device, and a process that has a part of the step's images takes its
part of the draws. Shapes: B images, R = their side, S = the side that the network takes, in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nas.data import IMAGENET_MEAN, IMAGENET_STD, epoch_batches, shifted
from nas.parallel import ALONE, Group
from nas.randaugment import OPERATIONS, operated
from nas.recipe import Recipe

ATTEMPTS = 10  # at a rectangle that fits the image
ERASED_AREA = (0.02, 1 / 3)  # shares of the image
ERASED_RATIO = 1 / 0.3  # of the sides, at most


@dataclass(frozen=True, eq=False)
class Draws:
    """What is drawn for the images of a step, the first axis being the images: on the CPU."""

    shift: Tensor
    """(B, 2) int64: rows and columns, in pixels."""
    mirrored: Tensor
    """(B,) bool."""
    crop: Tensor
    """(B, 4) int64: top, left, height, width."""
    operations: Tensor
    """(B, rand_augment_ops) int64 into `nas.randaugment.OPERATIONS`; -1: none."""
    levels: Tensor
    """(B, rand_augment_ops): from 0 to 10, and negative where an operation with two directions goes the other way."""
    jitter: Tensor
    """(B, 3): the factors of brightness, contrast and saturation."""
    erased: Tensor
    """(B, 4) int64: top, left, height, width of what becomes noise."""
    noise: Tensor
    """(B,) int64: the seed of the noise."""
    share: Tensor
    """(B,): of an image that is mixed with its neighbour, what remains; the two of a pair have the same."""
    box: Tensor
    """(B, 4) int64: top, left, height, width of what the neighbour's pixels replace; no height: they are blended."""

    def of(self, start: int, stop: int) -> Draws:
        """Return the draws of the images from `start`, which is even as pairs stay together, up to `stop`."""
        assert start % 2 == 0, "a pair of mixed images is in one part"
        return Draws(*(getattr(self, field.name)[start:stop] for field in fields(self)))


def step_generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """Return the generator of a step of an epoch, both counted from 0."""
    sequence = np.random.SeedSequence([seed % 2**64, epoch, step])
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def seed_draws(seed: int, epoch: int, step: int, group: Group = ALONE) -> None:
    """Seed PyTorch's own generators, by which a network draws (dropout in a user's block), for a step of an epoch: a training
    that goes on after a kill then draws as one that was never stopped. Each process draws for its own images."""
    torch.manual_seed(int(torch.randint(2**62, (1,), generator=step_generator(seed, epoch, step))) + group.rank)


def training_indices(n: int, recipe: Recipe, seed: int, epoch: int) -> Iterator[Tensor]:
    """Yield the index tensors (B,), int64, of the steps of an epoch (counted from 0) over `n` images.

    With repeated augmentation (Hoffer et al., CVPR 2020, as in DeiT) the images of a step follow one another `repeats` times,
    so that an image does not stand beside itself; the last ones may have a repeat less. A step has two different ones at least,
    unless it has one alone.
    """
    batch, steps = steps_of(n, recipe)
    different = max(-(-batch // recipe.repeats), min(2, batch))
    for indices in epoch_batches(n, different, seed, epoch, steps * different):
        yield indices.repeat(recipe.repeats)[:batch]


def steps_of(n: int, recipe: Recipe) -> tuple[int, int]:
    """Return how many images a step has, and how many steps an epoch, over `n` images."""
    size = recipe.images_per_epoch or n
    return min(size, recipe.batch_size), max(1, size // recipe.batch_size)


# -- Drawing -----------------------------------------------------------------------------------------------------------


def draw(count: int, side: int, recipe: Recipe, flips: bool, generator: torch.Generator, size: int | None = None) -> Draws:
    """Draw for `count` images of `side` pixels, which become `size` pixels (None: the same); `flips`: whether a mirrored image
    keeps its class."""
    size = size or side
    reach = min(round(side * recipe.shift), side - 1)
    shift = torch.randint(-reach, reach + 1, (count, 2), generator=generator)
    mirrored = (torch.rand(count, generator=generator) < 0.5) & flips
    crop = torch.tensor([0, 0, side, side]).repeat(count, 1)
    if recipe.crop_scale < 1:
        found = _rectangles(count, side, (recipe.crop_scale, 1.0), recipe.crop_ratio, side, generator)
        crop = torch.where(found[:, 2:3] > 0, found, crop)
    operations, levels = _draw_operations(count, recipe, generator)
    jitter = 1 + recipe.color_jitter * (2 * torch.rand(count, 3, generator=generator) - 1)
    erased = torch.zeros(count, 4, dtype=torch.int64)
    if recipe.erasing:
        chosen = torch.rand(count, 1, generator=generator) < recipe.erasing
        erased = _rectangles(count, size, ERASED_AREA, ERASED_RATIO, size - 1, generator) * chosen
    noise = torch.randint(2**62, (count,), generator=generator)
    share, box = _draw_mixes(count, size, recipe, generator)
    return Draws(shift, mirrored, crop, operations, levels, jitter, erased, noise, share, box)


def _rectangles(
    count: int, side: int, area: tuple[float, float], ratio: float, largest: int, generator: torch.Generator
) -> Tensor:
    """Draw the top, left, height and width (count, 4) of rectangles in a square: of a uniform share of its area and sides whose
    ratio is uniform on a logarithmic scale. The first of some attempts whose sides are at most `largest` counts; else all
    are 0."""
    areas = (area[0] + (area[1] - area[0]) * torch.rand(count, ATTEMPTS, generator=generator)) * side * side
    ratios = (math.log(ratio) * (2 * torch.rand(count, ATTEMPTS, generator=generator) - 1)).exp()
    heights, widths = ((areas * by).sqrt().round().long() for by in (1 / ratios, ratios))
    fits = (heights >= 1) & (widths >= 1) & (heights <= largest) & (widths <= largest)
    first = fits.int().argmax(1, keepdim=True)
    height, width = (sides.gather(1, first) * fits.any(1, keepdim=True) for sides in (heights, widths))
    where = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    top, left = ((where[:, i, None] * (side - length + 1)).long() for i, length in enumerate((height, width)))
    return torch.cat((top, left, height, width), 1)


def _draw_operations(count: int, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = (count, recipe.rand_augment_ops if recipe.rand_augment else 0)
    operations = torch.randint(len(OPERATIONS), shape, generator=generator)
    done = torch.rand(shape, generator=generator) < 0.5
    levels = recipe.rand_augment + recipe.rand_augment_std * torch.randn(shape, generator=generator)
    sign = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
    return torch.where(done, operations, -1), levels.clamp(0, 10) * sign


def _draw_mixes(count: int, side: int, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw what remains of each image (count,), and the boxes (count, 4): for each pair of neighbours."""
    pairs = (count + 1) // 2
    share, box = torch.ones(pairs), torch.zeros(pairs, 4, dtype=torch.int64)
    if recipe.mixes:
        # torch draws from a beta distribution with its global generator alone
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        mixup, cutmix = (
            torch.from_numpy(rng.beta(a, a, pairs)) if a else torch.ones(pairs) for a in (recipe.mixup, recipe.cutmix)
        )
        both = recipe.mixup > 0 and recipe.cutmix > 0
        cuts = torch.from_numpy(rng.random(pairs)) < (recipe.cutmix_share if both else float(recipe.cutmix > 0))
        length = (side * (1 - cutmix).sqrt()).long()
        begin = torch.from_numpy(rng.integers(0, side, (pairs, 2))) - length[:, None] // 2
        end = (begin + length[:, None]).clamp(max=side)
        begin = begin.clamp(min=0)
        box = torch.cat((begin, end - begin), 1) * cuts[:, None]
        share = torch.where(cuts, 1 - box[:, 2] * box[:, 3] / side**2, mixup).float()
    return share.repeat_interleave(2)[:count], box.repeat_interleave(2, 0)[:count]


# -- Doing -------------------------------------------------------------------------------------------------------------


def augmented(
    pixels: Tensor, labels: Tensor, draws: Draws, recipe: Recipe, classes: int, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return uint8 images (B, 3, R, R) augmented and normalised as (B, 3, S, S), S = `size` (None: R), and what they are to be
    taken for: the labels (B,), or where images are mixed, the classes' shares (B, classes).

    In this order: resized crop or shift, flip, RandAugment, colour jitter, normalisation, erasing, mixup or cutmix.
    """
    size = size or pixels.shape[2]
    # Before anything waits for the accelerator, which may be busy with the step before.
    noise = erasing_noise(draws.erased, draws.noise, pixels.shape[1], pixels.device.type == "cuda") if recipe.erasing else None
    if recipe.crop_scale < 1 or size != pixels.shape[2]:
        x = resized_crops(pixels.float() / 255, draws.crop, size)
        x = torch.where(draws.mirrored.to(x.device)[:, None, None, None], x.flip(3), x)
    else:
        x = shifted(pixels, draws.shift, draws.mirrored).float() / 255
    if recipe.rand_augment:
        x = operated(x, draws.operations, draws.levels)
    if recipe.color_jitter:
        x = jittered(x, draws.jitter)
    mean, std = (torch.tensor(figures, device=x.device).view(3, 1, 1) for figures in (IMAGENET_MEAN, IMAGENET_STD))
    x = (x - mean) / std
    if noise is not None:
        x = erased(x, draws.erased, noise)
    if not recipe.mixes:
        return x, labels
    return mixed(x, F.one_hot(labels, classes).float(), draws.share, draws.box)


def resized_crops(x: Tensor, crop: Tensor, size: int) -> Tensor:
    """Return the crops (B, 4) of images (B, 3, R, R), values from 0 to 1, resized to (B, 3, S, S): bicubic with antialiasing,
    Pillow's.

    Columns and rows are resampled one after the other, each by a matrix product, which every device has.
    """
    # Moved first: what is made of these few numbers is larger than the images.
    top, left, height, width = crop.to(x.device).float().unbind(1)
    rows, columns = (_resampling(first, length, size, x.shape[2]) for first, length in ((top, height), (left, width)))
    return _in_levels(rows[:, None] @ _in_levels(x @ columns[:, None].transpose(2, 3)))


def _in_levels(x: Tensor) -> Tensor:
    """Return the values in the 256 levels of a picture."""
    return (x * 255).round().clamp(0, 255) / 255


def _resampling(first: Tensor, length: Tensor, size: int, side: int) -> Tensor:
    """Return the weights (B, size, side) with which a target pixel is made of the source's, of which `length` (B,) from `first`
    (B,) on are the crop: the cubic kernel with a = -0.5."""
    first, length = first[:, None, None], length[:, None, None]
    scale = length / size
    source = torch.arange(side, device=first.device)[None, None] + 0.5
    target = torch.arange(size, device=first.device)[None, :, None] + 0.5
    distance = ((source - first - target * scale) / scale.clamp_min(1)).abs()
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = weights * ((source > first) & (source < first + length))  # what is outside the crop has no part in it
    return weights / weights.sum(2, keepdim=True)


def jittered(x: Tensor, factors: Tensor) -> Tensor:
    """Return images (B, 3, S, S), values from 0 to 1, with their brightness, contrast and saturation multiplied by (B, 3)."""
    from kornia.enhance import (
        adjust_brightness_accumulative,
        adjust_contrast_with_mean_subtraction,
        adjust_saturation_with_gray_subtraction,
    )

    brightness, contrast, saturation = factors.to(x.device).unbind(1)
    x = adjust_brightness_accumulative(x, brightness)
    x = adjust_contrast_with_mean_subtraction(x, contrast)
    return adjust_saturation_with_gray_subtraction(x, saturation)


def erasing_noise(boxes: Tensor, seeds: Tensor, channels: int, pinned: bool) -> Tensor:
    """Return the normal noise of the boxes (B, 4) in images of so many channels: one vector on the CPU, box after box.

    An image's noise follows from its seed (B,). `pinned`: whether the vector is in memory that a GPU copies from by itself.
    """
    sizes = (channels * boxes[:, 2] * boxes[:, 3]).tolist()
    noise, generator = torch.empty(sum(sizes), pin_memory=pinned), torch.Generator()
    for own, seed in zip(noise.split(sizes), seeds.tolist(), strict=True):
        own.normal_(generator=generator.manual_seed(seed))
    return noise


def erased(x: Tensor, boxes: Tensor, noise: Tensor) -> Tensor:
    """Return normalised images (B, 3, S, S) with noise, of `erasing_noise`, in the boxes (B, 4).

    Source: random erasing (Zhong et al., AAAI 2020), each pixel with noise of its own, as timm's mode `pixel`.
    """
    x, noise = x.clone(), noise.to(x.device, non_blocking=noise.is_pinned())
    begin = 0
    for image, (top, left, height, width) in enumerate(boxes.tolist()):
        if height:
            end = begin + x.shape[1] * height * width
            x[image, :, top : top + height, left : left + width] = noise[begin:end].view(-1, height, width)
            begin = end
    return x


def mixed(x: Tensor, targets: Tensor, share: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """Return images (B, 3, S, S) and targets (B, classes), each mixed with its neighbour: the first with the second, the third
    with the fourth, and so on; one that is left over stays as it is.

    Of an image the `share` (B,) remains, of its target too: by blending (mixup, Zhang et al., ICLR 2018), or where the
    neighbour takes the `box` (B, 4), by that (cutmix, Yun et al., ICCV 2019).
    """
    neighbour = (torch.arange(len(x)) ^ 1).clamp(max=len(x) - 1).to(x.device)
    share, box = share.to(x.device), box.to(x.device)
    cuts = box[:, 2] > 0
    begin, end = box[:, :2], box[:, :2] + box[:, 2:]
    positions = torch.arange(x.shape[2], device=x.device)
    inside = (positions >= begin[..., None]) & (positions < end[..., None])  # (B, 2, S)
    inside = inside[:, 0, :, None] & inside[:, 1, None, :]  # (B, S, S)
    kept = torch.where(cuts[:, None, None], (~inside).float(), share[:, None, None])[:, None]
    x = x * kept + x[neighbour] * (1 - kept)
    return x, targets * share[:, None] + targets[neighbour] * (1 - share[:, None])
