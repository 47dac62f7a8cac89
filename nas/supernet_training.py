"""Training the supernet: weights and importance by two optimizers, checkpointed each epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nas.data import ImageData, epoch_batches
from nas.progress import progress, say
from nas.slimming import Score
from nas.training import (
    accelerator,
    cosine,
    load_checkpoint,
    parameter_groups,
    save_checkpoint,
    set_layer_scale,
    training_batch,
)
from supernet.errors import InputError, unknown
from supernet.files import checked_fields, read_yaml
from supernet.metapath import Noise, Supernet, sample_path
from supernet.space import SearchSpace

COUNTS = ("weight_epochs", "score_images", "recalibration_images", "finalist_epochs", "init_epochs")
IDENTITY_SHARE = 0.25  # of sampled slots are empty while weights warm up on single paths
MIXTURE_IMAGES = 1024  # an epoch of the mixture sees at least, or all that there are


@dataclass(frozen=True)
class SupernetSettings:
    """How a supernet is trained and its sub-networks are scored: the fields of `nas-search --config FILE`.

    First the weights alone learn on single sampled paths (`weight_epochs`), then weights and logits learn by the
    Gumbel-Softmax mixture (`mixture_epochs`), the temperature falling from `tau_start` to `tau_end`.
    """

    image_size: int = 0
    """Pixels to train at; 0: the data's size, enlarged until the last stage's map is 4x4, at most the deployed size."""
    weight_epochs: int = 8
    mixture_epochs: int = 2
    images_per_epoch: int = 0
    """Images that an epoch of single paths sees, an epoch of the mixture a quarter of them (at least 1,024); 0: all on a
    GPU, 6,000 at most on a CPU."""
    batch_size: int = 64
    learning_rate: float = 2e-3
    """Of the weights, by AdamW; warm-up over a twentieth of the steps, then cosine to a hundredth."""
    weight_decay: float = 0.025
    logit_learning_rate: float = 0.03
    """Of the logits, by Adam."""
    tau_start: float = 2.0
    tau_end: float = 0.5
    noise: Noise = "gumbel"
    """gumbel, or uniform as the EfficientFormer paper prints it."""
    layer_scale: float = 0.5
    """Initial layer scale; at the published 1e-5 a short training never wakes the blocks."""
    label_smoothing: float = 0.1
    clip_norm: float = 5.0
    score: Score = "loss"
    """What slimming charges an action for: loss (rise in cross-entropy) or accuracy."""
    score_images: int = 512
    recalibration_images: int = 256
    accelerator: str = "auto"
    """auto, cpu, cuda or mps."""
    objective: str = "latency"
    """latency, or throughput: images may share a pass in the ways that the space's `mux` has, and how is searched too."""
    finalist_epochs: int = 4
    """Of throughput: how long the networks found for each way, and their controls, are trained before one is chosen."""
    arrivals_per_second: float = 0.0
    """Of throughput: images that come in, for the time that one waits for its group; 0: as many as are worked off."""
    init_epochs: int = 4
    """Of --init: how long the network is trained as a whole before slimming, where its classifier is new to the data."""
    distillation_steps: int = 200
    """Of --init: steps of block-wise distillation of the blocks that may replace the network's own; 0: none."""

    def __post_init__(self) -> None:
        choices = (("noise", ("gumbel", "uniform")), ("score", ("loss", "accuracy")), ("objective", ("latency", "throughput")))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if self.accelerator not in ("auto", "cpu", "cuda", "mps"):
            raise unknown("accelerator", self.accelerator, ("auto", "cpu", "cuda", "mps"))
        # Batch norm cannot train on one value, which is what one image is at the end of a small network.
        for name, least in (("batch_size", 2), *((name, 1) for name in COUNTS)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, but is {getattr(self, name)}")
        for name in ("learning_rate", "logit_learning_rate", "tau_start", "tau_end", "layer_scale", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a positive number, but is {getattr(self, name)}")
        for name in ("image_size", "mixture_epochs", "images_per_epoch", "distillation_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, but is {getattr(self, name)}")
        for name in ("weight_decay", "arrivals_per_second"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number of at least 0, but is {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing must be at least 0 and below 1, but is {self.label_smoothing}")

    @classmethod
    def load(cls, path: str | Path | None) -> SupernetSettings:
        """Read the settings that a YAML file gives; the others have their defaults."""
        if path is None:
            return cls()
        return cls(**checked_fields(cls, read_yaml(path, "the config file"), f"the config file {path}"))


def training_size(space: SearchSpace, data_size: int, wanted: int = 0) -> int:
    """Return the image size to train a supernet at: the data's, or the next that the space takes (the last map at least
    4x4), and at most the deployed size. `wanted` (not 0) is taken as it is.

    Raises:
        InputError: the space does not take the size that results.
    """
    size = wanted or min(space.smallest_image_size(data_size), space.image_size)
    space.at(size).check_searchable()
    return size


def epoch_size(settings: SupernetSettings, data: ImageData) -> int:
    """Return how many images an epoch sees: those asked for, else all on a GPU, 6,000 at most on a CPU."""
    on_cpu = accelerator(settings.accelerator).type == "cpu"
    return settings.images_per_epoch or (min(6000, len(data.train)) if on_cpu else len(data.train))


def temperature(done: float, start: float, end: float) -> float:
    """Return the temperature after the share `done` (0 to 1) of the mixture's steps: geometric from start to end."""
    return start * (end / start) ** done


def single_path(space: SearchSpace, generator: torch.Generator) -> list[int]:
    """Return a random single path: a quarter of the slots empty, the other candidates equally often."""
    path = []
    for stage, _ in space.slots:
        kinds = space.stages[stage].kinds
        shares = [IDENTITY_SHARE if k == "identity" else (1 - IDENTITY_SHARE) / (len(kinds) - 1) for k in kinds]
        path.append(int(torch.multinomial(torch.tensor(shares), 1, generator=generator)))
    return path


def train_supernet(space: SearchSpace, data: ImageData, settings: SupernetSettings, seed: int, folder: Path) -> Supernet:
    """Train the supernet of `space` (at the size of `data`) and return it, in eval mode.

    A checkpoint is written to `folder/supernet.pt` after each epoch; the next call with the same arguments goes on
    from it. On one machine with one number of threads, the same seed gives the same weights.
    """
    device = accelerator(settings.accelerator)
    torch.manual_seed(seed)
    net = Supernet(space)
    set_layer_scale(net, settings.layer_scale)
    net = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    named = ((n, p) for n, p in net.named_parameters() if not n.startswith("logits."))
    weights = torch.optim.AdamW(parameter_groups(named, settings.weight_decay), lr=settings.learning_rate)
    logits = torch.optim.Adam(net.logits, lr=settings.logit_learning_rate, betas=(0.5, 0.999))
    per_epoch = epoch_size(settings, data)
    in_mixture = min(per_epoch, max(MIXTURE_IMAGES, per_epoch // 4))

    def images_of(epoch: int) -> int:
        return per_epoch if epoch < settings.weight_epochs else in_mixture

    epochs = settings.weight_epochs + settings.mixture_epochs
    steps_of = [max(1, images_of(epoch) // settings.batch_size) for epoch in range(epochs)]
    steps, mixture_steps = sum(steps_of), sum(steps_of[settings.weight_epochs :])
    checkpoint = folder / "supernet.pt"
    first = load_checkpoint(checkpoint, net=net, weights=weights, logits=logits)
    step = sum(steps_of[:first])
    say(
        f"training the supernet of {space.name} at {space.image_size} px on {len(data.train):,} images: {steps} steps "
        f"of {settings.batch_size}, the last {mixture_steps} of them mixtures, on {device.type}"
    )
    done_cost = step + 2 * sum(steps_of[settings.weight_epochs : first])
    with progress("supernet", sum(steps_of) + 2 * mixture_steps, done_cost) as tick:
        for epoch in range(first, epochs):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            mixing = epoch >= settings.weight_epochs
            losses = []
            net.train()
            for indices in epoch_batches(len(data.train), settings.batch_size, seed, epoch, images_of(epoch)):
                x, y = training_batch(data, indices, generator, device)
                for group in weights.param_groups:
                    group["lr"] = settings.learning_rate * cosine(step, steps)
                if mixing:
                    done = (step - (steps - mixture_steps)) / max(1, mixture_steps - 1)
                    tau = temperature(min(1.0, done), settings.tau_start, settings.tau_end)
                    path: Any = sample_path(list(net.logits), tau, generator, settings.noise)
                else:
                    path = single_path(space, generator)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    loss = F.cross_entropy(net(x, path), y, label_smoothing=settings.label_smoothing)
                weights.zero_grad(set_to_none=True)
                logits.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(list(net.weights()), settings.clip_norm)
                weights.step()
                if mixing:
                    logits.step()
                losses.append(loss.item())
                step += 1
                tick(3 if mixing else 1)
            if not math.isfinite(sum(losses)):
                raise FloatingPointError(f"the supernet's loss is not finite in epoch {epoch + 1}: lower learning_rate")
            save_checkpoint(checkpoint, epoch + 1, net=net, weights=weights, logits=logits)
    return net.eval()
