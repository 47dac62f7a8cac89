"""Recipes: how a found network is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nas.steps import PRECISIONS
from supernet.errors import InputError, unknown
from supernet.files import checked_fields, read_yaml


@dataclass(frozen=True)
class Recipe:
    """How a found network is trained: AdamW, warm-up over a twentieth of the steps, then cosine to a hundredth.

    Also the fields of `nas-train --recipe FILE`.
    """

    epochs: int
    """How often the training images are seen (or `images_per_epoch` of them); validation follows each time."""
    batch_size: int
    """Images a step; what is left over begins the next epoch."""
    learning_rate: float
    """The highest, after the warm-up."""
    layer_scale: float
    """Initial layer scale; the published 1e-5 suits trainings of hundreds of epochs. Given weights keep theirs."""
    clip_norm: float
    """The norm to which a longer gradient is shortened."""
    weight_decay: float = 0.025
    """AdamW's; biases, norms, layer scales and attention biases do not decay."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes; validation has none."""
    images_per_epoch: int = 0
    """0: all training images."""
    accelerator: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: str = "auto"
    """fp32, bf16 (matrix products in bfloat16, weights in fp32), or auto: bf16 where the hardware multiplies it itself."""
    distillation: Literal["soft", "hard"] = "soft"
    """What is learned from a teacher: soft, its probabilities (Hinton et al. 2015); hard, its decisions (DeiT)."""
    teacher_weight: float = 0.5
    """Share of the loss that is the teacher's; the labels have the rest."""
    teacher_temperature: float = 2.0
    """Of soft distillation: both sides' logits are divided by it."""

    def __post_init__(self) -> None:
        # Batch norm cannot train on one value, which is what one image is at the end of a small network.
        for name, least in (("epochs", 1), ("batch_size", 2), ("images_per_epoch", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, but is {getattr(self, name)}")
        for name in ("learning_rate", "layer_scale", "clip_norm", "teacher_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a positive number, but is {getattr(self, name)}")
        if self.distillation not in ("soft", "hard"):
            raise unknown("distillation", self.distillation, ("soft", "hard"))
        if not 0 <= self.teacher_weight <= 1:
            raise InputError(f"teacher_weight must be from 0 to 1, but is {self.teacher_weight}")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must be a number from 0 on, but is {self.weight_decay}")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing must be at least 0 and below 1, but is {self.label_smoothing}")
        if self.accelerator not in ("auto", "cpu", "cuda", "mps"):
            raise unknown("accelerator", self.accelerator, ("auto", "cpu", "cuda", "mps"))
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)


RECIPES: dict[str, Recipe] = {
    "quick": Recipe(epochs=30, batch_size=128, learning_rate=2e-3, layer_scale=0.1, clip_norm=5.0),
    # For a network that has its weights: they are to be mended, not learned anew.
    "finetune": Recipe(epochs=10, batch_size=128, learning_rate=5e-4, layer_scale=0.1, clip_norm=5.0),
}


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Return a recipe by its name, or read one from a YAML file.

    Raises:
        InputError: there is neither, or a field is unknown, missing, of another type, or not allowed.
    """
    text = str(name_or_path)
    if text in RECIPES:
        return RECIPES[text]
    if not text.endswith((".yaml", ".yml")) and "/" not in text:
        raise unknown("recipe", text, [*RECIPES, "a YAML file"])
    where = f"the recipe file {text}"
    given = checked_fields(Recipe, read_yaml(text, "the recipe file"), where)
    try:
        return Recipe(**given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
