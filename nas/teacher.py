"""Networks that others learn from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from nas.checkpoints import digest, load_weights
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.model import build_model
from supernet.weights import at_size


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained network whose outputs another one learns from."""

    network: nn.Module
    """In eval mode, its weights frozen: normalised images (B, 3, S, S) to logits (B, classes), S the student's image size."""
    digest: str
    """Of the architecture and its weights."""


def load_teacher(network: str | Path, image_size: int, num_classes: int) -> Teacher:
    """Return the network of a YAML file that has its weights beside it, at this image size.

    The weights of `teacher.yaml` are `teacher.safetensors`, and so on; those of nas-train's `arch.yaml` are
    `model.safetensors`, those of nas-search's `searched.yaml` are `weights.safetensors`. What of them depends on the image size
    is resized.

    Raises:
        InputError: one of the two files is missing or cannot be used, or the network has other classes.
    """
    path = Path(network)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(
            f"the teacher {network} is no YAML file: give one that has its weights beside it, such as the teacher.yaml of "
            "nas-search --init, or the arch.yaml of nas-train"
        )
    arch = ArchConfig.load(path).without_identity()
    weights = path.with_suffix(".safetensors")
    if not weights.exists():
        weights = path.with_name({"arch": "model", "searched": "weights"}.get(path.stem, path.stem) + ".safetensors")
    if arch.num_classes != num_classes:
        raise InputError(
            f"the teacher {path} knows {arch.num_classes} classes, but the data have {num_classes}: give one that was "
            "trained on them"
        )
    own = build_model(arch)
    load_weights(own, weights)
    model = build_model(arch.at(image_size))
    given = own.state_dict()
    model.load_state_dict({name: at_size(name, given[name], like) for name, like in model.state_dict().items()})
    text = f"{arch.to_yaml()}{digest(weights)}"
    return Teacher(model.eval().requires_grad_(False), f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}")
