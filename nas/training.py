"""Training: what every recipe shares, and the training of a found network."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.progress import say
from supernet.blocks.efficientformer import LayerScale
from supernet.errors import InputError
from supernet.files import write_atomically


def accelerator(wanted: str = "auto") -> torch.device:
    """Return the device to train on: CUDA, then Apple's, then the CPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available[wanted]:
        usable = ", ".join(name for name, there in available.items() if there)
        raise InputError(f"this PyTorch finds no {wanted} device: use one of {usable}")
    return torch.device(wanted)


def set_layer_scale(model: nn.Module, value: float) -> None:
    """Set every layer scale of a network to one initial value."""
    for module in model.modules():
        if isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, value)


def parameter_groups(named: Iterator[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups: vectors and attention biases do not decay, everything else does."""
    decays: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in named:
        (free if parameter.ndim <= 1 or name.endswith("attention_biases") else decays).append(parameter)
    return [{"params": decays, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def cosine(step: int, steps: int) -> float:
    """Return the factor on the learning rate: linear warm-up over a twentieth of the steps, cosine to a hundredth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def save_checkpoint(path: Path, epoch: int, **parts: nn.Module | torch.optim.Optimizer) -> None:
    """Write the state of a run after `epoch` epochs, whole or not at all."""
    file = io.BytesIO()
    torch.save({"epoch": epoch, **{name: part.state_dict() for name, part in parts.items()}}, file)
    write_atomically(path, file.getvalue())


def load_checkpoint(path: Path, **parts: nn.Module | torch.optim.Optimizer) -> int:
    """Load the state that `save_checkpoint` wrote into the parts, if there is one; return how many epochs are done."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        epoch = int(state["epoch"])
    except Exception as error:  # torch.load has no common base for what damaged files raise
        raise InputError(f"the checkpoint {path} does not belong to this run or is damaged: remove it") from error
    say(f"going on from {path} after epoch {epoch}")
    return epoch
