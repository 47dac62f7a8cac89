"""Recipes: how a found network is trained."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import yaml

from nas.steps import MOST_IMAGES, MOST_RATE, PRECISIONS, cosine
from supernet.errors import InputError, unknown
from supernet.files import checked_fields, is_path, read_yaml


@dataclass(frozen=True)
class Recipe:
    """How a found network is trained: AdamW, warm-up, then cosine; the augmentations, each off by default; the teacher's part.

    Also the fields of `nas-train --recipe FILE`. docs/training.md says where the values of the named ones come from.
    """

    epochs: int
    """Epochs, of as many steps as the training images (or `images_per_epoch`) are batches; validation follows each. With
    `repeats` each of them sees as many fewer different images."""
    batch_size: int
    """Images a step, of all processes together; what is left over begins the next epoch."""
    learning_rate: float
    """The highest, after the warm-up."""
    layer_scale: float
    """Initial layer scale; the published 1e-5 suits trainings of hundreds of epochs. Given weights keep theirs."""
    clip_norm: float
    """The norm to which a longer gradient is shortened; 0: none is."""
    weight_decay: float = 0.025
    """AdamW's; biases, norms, layer scales and attention biases do not decay."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes; validation has none."""
    images_per_epoch: int = 0
    """0: all training images."""
    accelerator: str = "auto"
    """auto (CUDA where there is one, else the CPU), cpu, cuda or mps."""
    accumulate: int = 1
    """Parts in which a process's images of a step go through the network, one after the other, where memory is short. Batch
    norm sees each part by itself."""
    compile: bool = False
    """Whether the network is compiled for training (torch.compile): minutes before the first step. On a CPU we saw no
    gain from it; on GPUs it is untested."""
    precision: str = "auto"
    """fp32, bf16 (matrix products in bfloat16, weights in fp32), or auto: bf16 where the hardware multiplies it itself."""
    distillation: Literal["soft", "hard"] = "soft"
    """What is learned from a teacher: soft, its probabilities (Hinton et al. 2015); hard, its decisions (DeiT)."""
    teacher_weight: float = 0.5
    """Share of the loss that is the teacher's; the labels have the rest."""
    teacher_temperature: float = 2.0
    """Of soft distillation: both sides' logits are divided by it."""
    distillation_head: bool = False
    """Whether the teacher is learned from by a second classifier, while there is a teacher; at the end the two are averaged."""

    learning_rate_batch: int = 0
    """Images a step that `learning_rate` is meant for: with others it is scaled in proportion. 0: it is not."""
    warm_up_epochs: float = 0.0
    """Epochs in which the rate rises linearly; 0: a twentieth of the training."""
    warm_up_rate: float = 0.0
    """The rate from which it rises."""
    minimum_rate: float = 0.0
    """The rate to which the cosine falls; 0: a hundredth of the highest."""
    cooldown_epochs: int = 0
    """Further epochs at that rate, after `epochs`."""
    clip_agc: float = 0.0
    """Adaptive gradient clipping (Brock et al. 2021): a unit's gradient is at most this share of its weights' norm; 0: off."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is then what is kept; 0: the weights themselves are."""
    drop_path: float = 0.0
    """Stochastic depth: the chance that the last block's branches are left out for an image; it grows from 0 block by block."""

    mirror: bool = True
    """Whether images are mirrored, left to right, half of the time; not to be where that makes another class of them."""
    shift: float = 0.125
    """Images are shifted by up to this share of their side, the border reflected; without effect where they are cropped."""
    crop_scale: float = 1.0
    """The smallest share of its area to which an image is cropped, and then resized; 1: it is not."""
    crop_source: float = 8 / 7
    """Where they are cropped: the side of the square that crops are taken from, as a multiple of the network's, but no more
    than the images have."""
    crop_ratio: float = 4 / 3
    """Of the crop's sides, at most; and at least one over it."""
    rand_augment: float = 0.0
    """Magnitude of RandAugment, from 0 (off) to 10, of the operations that increase with it."""
    rand_augment_std: float = 0.5
    """Standard deviation of the magnitude, drawn for each operation."""
    rand_augment_ops: int = 2
    """Operations for an image, each done half of the time."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation change by a factor of up to 1 plus or minus this."""
    mixup: float = 0.0
    """Both parameters of the beta distribution of mixup's share; 0: no mixup."""
    cutmix: float = 0.0
    """Both parameters of the beta distribution of cutmix's share; 0: no cutmix."""
    cutmix_share: float = 0.5
    """With both: how often it is cutmix."""
    erasing: float = 0.0
    """The chance that a rectangle of an image, of 2 to 33 % of it, becomes noise."""
    repeats: int = 1
    """Repeated augmentation: how often an image is in a step, augmented anew; an epoch has as many fewer different images."""

    def __post_init__(self) -> None:
        # Batch norm cannot train on one value, which is what one image is at the end of a small network.
        _at_least(self, epochs=1, batch_size=2, images_per_epoch=0, cooldown_epochs=0, repeats=1, rand_augment_ops=1)
        _at_least(self, accumulate=1, crop_source=1)
        _at_least(self, learning_rate_batch=0, clip_norm=0, weight_decay=0, warm_up_epochs=0, warm_up_rate=0, minimum_rate=0)
        _at_least(self, clip_agc=0, rand_augment_std=0, mixup=0, cutmix=0, crop_ratio=1)
        if self.images_per_epoch == 1:
            raise InputError("images_per_epoch must be 0, for all, or at least 2, but is 1")
        if self.images_per_epoch > MOST_IMAGES:
            raise InputError(
                f"images_per_epoch must be at most {MOST_IMAGES}, but is {self.images_per_epoch}: give more epochs"
            )
        if self.repeats > self.batch_size:
            raise InputError(f"repeats must be at most batch_size, {self.batch_size}, but is {self.repeats}")
        for name in ("learning_rate", "layer_scale", "teacher_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a positive number, but is {getattr(self, name)}")
        for name in ("learning_rate", "layer_scale", "teacher_temperature", "weight_decay", "clip_norm", "clip_agc"):
            if getattr(self, name) > MOST_RATE:
                raise InputError(f"{name} must be at most {MOST_RATE:g}, but is {getattr(self, name)}")
        for name in ("teacher_weight", "erasing", "cutmix_share", "color_jitter", "crop_scale"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be from 0 to 1, but is {getattr(self, name)}")
        for name in ("label_smoothing", "ema", "drop_path", "shift"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 0 and below 1, but is {getattr(self, name)}")
        if not 0 <= self.rand_augment <= 10:
            raise InputError(f"rand_augment must be from 0 to 10, but is {self.rand_augment}")
        if self.crop_scale == 0:
            raise InputError("crop_scale must be above 0, as nothing is left of an image otherwise: 0.08 is usual, 1 is off")
        if self.warm_up_epochs > self.epochs:
            raise InputError(f"warm_up_epochs must be at most epochs, {self.epochs}, but is {self.warm_up_epochs}")
        if self.clip_norm and self.clip_agc:
            raise InputError("clip_norm and clip_agc are two ways to clip gradients: set one of them to 0")
        if self.distillation_head and self.teacher_weight in (0, 1):
            raise InputError("with distillation_head, teacher_weight must be above 0 and below 1, or one head learns nothing")
        for name, allowed in (
            ("distillation", ("soft", "hard")),
            ("accelerator", ("auto", "cpu", "cuda", "mps")),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)

    @property
    def all_epochs(self) -> int:
        """Epochs with those of the cooldown."""
        return self.epochs + self.cooldown_epochs

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, so that a target is a share of two classes."""
        return self.mixup > 0 or self.cutmix > 0

    def cropped_size(self, image_size: int) -> int:
        """Return the side in pixels at which training images are to be at hand for a network of this image size."""
        return round(image_size * self.crop_source) if self.crop_scale < 1 else image_size

    def highest_rate(self, batch: int) -> float:
        """Return the learning rate after the warm-up, at this many images a step."""
        return self.learning_rate * (batch / self.learning_rate_batch if self.learning_rate_batch else 1)

    def rate(self, step: int, batch: int, per_epoch: int) -> float:
        """Return the learning rate of a step, counted from 0, where an epoch has `per_epoch` steps of `batch` images."""
        highest = self.highest_rate(batch)
        warm_up = max(1, round(self.warm_up_epochs * per_epoch)) if self.warm_up_epochs else None
        lowest = min(1.0, self.minimum_rate / highest) if self.minimum_rate else 0.01
        return highest * cosine(step, per_epoch * self.epochs, warm_up, min(1.0, self.warm_up_rate / highest), lowest)


def _at_least(recipe: Recipe, **least: float) -> None:
    for name, lowest in least.items():
        if not lowest <= getattr(recipe, name) < math.inf:
            raise InputError(f"{name} must be at least {lowest}, but is {getattr(recipe, name)}")


RECIPES: dict[str, Recipe] = {
    "quick": Recipe(epochs=30, batch_size=128, learning_rate=2e-3, layer_scale=0.1, clip_norm=5.0),
    # For a network that has its weights: they are to be mended, not learned anew.
    "finetune": Recipe(epochs=10, batch_size=128, learning_rate=5e-4, layer_scale=0.1, clip_norm=5.0),
}

# The published settings, from the papers and their code; docs/training.md names the sources.
RECIPES["efficientformer"] = Recipe(
    epochs=300,
    batch_size=1024,
    learning_rate=1e-3,
    learning_rate_batch=1024,
    layer_scale=1e-5,
    clip_norm=0.0,
    clip_agc=0.01,
    warm_up_epochs=5.0,
    warm_up_rate=1e-5,
    minimum_rate=1e-5,
    distillation="hard",
    distillation_head=True,
    ema=0.99996,
    crop_scale=0.08,
    rand_augment=9.0,
    mixup=0.8,
    cutmix=1.0,
    erasing=0.25,
    repeats=3,
)
# The family has no layer scale.
RECIPES["efficientvit"] = replace(
    RECIPES["efficientformer"], batch_size=2048, learning_rate_batch=512, clip_agc=0.02, warm_up_rate=1e-6
)


def recipe_text(name: str) -> str:
    """Return a named recipe as the text of a recipe's YAML file.

    Raises:
        InputError: there is no such recipe.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return f"# the recipe {name}; docs/training.md says what each is\n" + yaml.safe_dump(asdict(RECIPES[name]), sort_keys=False)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Return a recipe by its name, or read one from a YAML file.

    Raises:
        InputError: there is neither, or a field is unknown, missing, of another type, or not allowed.
    """
    text = str(name_or_path)
    if text in RECIPES:
        return RECIPES[text]
    if not is_path(text):
        raise unknown("recipe", text, [*RECIPES, "a YAML file"])
    where = f"the recipe file {text}"
    content = read_yaml(text, "the recipe file", f"give the path of a recipe's YAML file, or one of {', '.join(RECIPES)}")
    given = checked_fields(Recipe, content, where, "nas-train --print-recipe quick writes a whole one")
    try:
        return Recipe(**given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
