"""Training of a found network."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.checkpoints import digest, load_checkpoint, load_weights, save_checkpoint
from nas.curves import curves
from nas.data import ImageData, epoch_batches
from nas.evaluation import accuracy_of
from nas.progress import LINE_EVERY_S, duration, progress, say
from nas.recipe import Recipe
from nas.request import claim
from nas.steps import accelerator, cosine, mixed_precision, parameter_groups, set_layer_scale, training_batch
from nas.teacher import Teacher
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.files import write_atomically
from supernet.model import build_model

MEASURED_STEPS = 10  # the first step is left out: it also allocates


@dataclass(frozen=True)
class TrainingResult:
    """A trained network: `folder/arch.yaml` with the weights `folder/model.safetensors`."""

    arch: ArchConfig
    """As trained: with the data's classes, without empty slots."""
    loss: float
    """Mean cross-entropy on the validation images after the last epoch."""
    accuracy: float
    """Share of the validation images that are right (0 to 1) after the last epoch."""
    epochs: int
    folder: Path


def train_network(
    arch: ArchConfig,
    data: ImageData,
    recipe: Recipe,
    folder: Path,
    seed: int,
    *,
    weights: Path | None = None,
    teacher: Teacher | None = None,
) -> TrainingResult:
    """Train a network at its own image size, which is also the data's, and return how it does on `data.val`.

    The network gets the data's number of classes and loses its empty slots. It starts from random weights, or from
    the file `weights` (see `load_weights`), whose layer scales stay as they are. With a `teacher`, which sees the same
    augmented images, it learns from that too, as the recipe says. `folder` then holds `arch.yaml`, `model.safetensors`,
    `metrics.csv` (a row for each epoch; the learning rate is that of its last step, the training loss is smoothed) and
    `checkpoint.pt`, written after each epoch; and the curves of `nas.curves`. The next call with the same arguments goes on
    from there, to the same weights as if it had never stopped; if the training is finished, it returns its result. On one
    machine with one number of threads, the same seed gives the same weights.

    Raises:
        InputError: the image sizes differ, the folder holds another training, the weights do not fit, or there is no
            such accelerator.
        FloatingPointError: the loss is no longer finite.
    """
    if data.image_size != arch.image_size:
        raise InputError(
            f"network {arch.name!r} is for images of {arch.image_size} px, but the data are loaded at "
            f"{data.image_size} px: both must be the same"
        )
    folder = Path(folder)
    checkpoint = folder / "checkpoint.pt"
    arch = arch.without_identity().with_classes(len(data.classes))
    device = accelerator(recipe.accelerator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(arch)
    set_layer_scale(model, recipe.layer_scale)
    # After the layer scales, which are part of the weights.
    if weights is not None and not checkpoint.exists():
        load_weights(model, weights, adapt=True)
    # Claimed only now: what was refused so far leaves the folder free for the corrected request.
    defaults = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}
    claim(folder, _request(arch, data, recipe, seed, weights, teacher), since={**defaults, "teacher": None})
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), recipe.weight_decay), lr=recipe.learning_rate)
    history = History()
    first = load_checkpoint(checkpoint, net=model, optimizer=optimizer, history=history)
    if first < recipe.epochs:
        _run_epochs(model, optimizer, history, first, arch, data, recipe, checkpoint, seed, teacher)
    else:
        say(f"the training in {folder} has finished before: its result is returned")

    # Written anew even if finished before: a kill may have come between the last checkpoint and these files.
    history.write(folder / "metrics.csv")
    arch.save(folder / "arch.yaml")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(folder / "model.safetensors", safetensors.torch.save(tensors))
    last = history.rows[-1]
    return TrainingResult(arch, last["val_loss"], last["val_accuracy"], recipe.epochs, folder)


def _run_epochs(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: History,
    first: int,
    arch: ArchConfig,
    data: ImageData,
    recipe: Recipe,
    checkpoint: Path,
    seed: int,
    teacher: Teacher | None = None,
) -> None:
    """Train from epoch `first` (counted from 0) to the recipe's last, each followed by a checkpoint and a row."""
    device = next(model.parameters()).device
    size = recipe.images_per_epoch or len(data.train)
    per_epoch = max(1, size // recipe.batch_size)
    steps, step = per_epoch * recipe.epochs, per_epoch * first
    start = step
    if teacher is not None:
        teacher.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    say(
        f"training {arch.name} at {arch.image_size} px for {len(data.classes)} classes on {len(data.train):,} images: "
        f"epochs {first + 1} to {recipe.epochs}, {per_epoch} steps of {min(size, recipe.batch_size)}, on {device.type}"
    )
    # Groups of one class would be told apart too easily.
    val = data.val.shuffled(seed) if arch.multiplexes else data.val
    began = said = time.monotonic()
    with progress(arch.name, steps, step) as tick, curves(checkpoint.parent, step) as draw:
        for epoch in range(first, recipe.epochs):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            epoch_began, losses = time.monotonic(), []
            model.train()
            for indices in epoch_batches(len(data.train), recipe.batch_size, seed, epoch, size):
                rate = recipe.learning_rate * cosine(step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                x, y = training_batch(data, indices, generator, device)
                losses.append(train_step(model, optimizer, x, y, recipe, teacher))
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(
                        f"the loss of {arch.name} is not finite in epoch {epoch + 1}: lower the recipe's learning_rate"
                    )
                step += 1
                tick(1)
                if step == start + 1:
                    began = time.monotonic()
                if step == start + 1 + MEASURED_STEPS:
                    left = (time.monotonic() - began) / MEASURED_STEPS * (steps - step)
                    say(f"about {duration(left)} for the {steps - step:,} steps left, going by {MEASURED_STEPS} steps")
            loss, accuracy = accuracy_of(model, val)
            now = time.monotonic()
            history.rows.append(
                {
                    "epoch": epoch + 1,
                    "learning_rate": rate,
                    "train_loss": math.fsum(losses) / len(losses),
                    "val_loss": loss,
                    "val_accuracy": accuracy,
                    "seconds": round(now - epoch_began, 2),
                }
            )
            draw(
                {
                    "train/loss": enumerate(losses, step - len(losses) + 1),
                    "train/learning_rate": [(step, rate)],
                    "val/loss": [(step, loss)],
                    "val/accuracy": [(step, accuracy)],
                }
            )
            save_checkpoint(checkpoint, epoch + 1, net=model, optimizer=optimizer, history=history)
            history.write(checkpoint.with_name("metrics.csv"))
            if now - said >= LINE_EVERY_S or epoch + 1 == recipe.epochs:  # short epochs would flood the log
                said = now
                say(f"epoch {epoch + 1} of {recipe.epochs}: validation loss {loss:.4f}, top-1 {100 * accuracy:.2f} %")


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    teacher: Teacher | None = None,
) -> float:
    """Take one step on the normalised images `x` (B, 3, S, S) with labels `y` (B,); return the loss before it."""
    with mixed_precision(x.device, recipe.precision):
        taught = None
        if teacher is not None:
            with torch.no_grad():
                taught = teacher.network(x)
        loss = training_loss(model(x), y, recipe, taught)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    return loss.item()


def training_loss(logits: Tensor, labels: Tensor, recipe: Recipe, taught: Tensor | None = None) -> Tensor:
    """Return the loss of logits (B, classes) against labels (B,), and against a teacher's logits `taught` (B, classes).

    Source of the teacher's part: soft, Hinton et al. 2015, the divergence from its probabilities at a temperature T, times T^2;
    hard, DeiT (Touvron et al., ICML 2021), cross-entropy to the class that it decides for.
    """
    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    if taught is None:
        return loss
    if recipe.distillation == "hard":
        other = F.cross_entropy(logits, taught.argmax(1))
    else:
        t = recipe.teacher_temperature
        own, theirs = (logits.float() / t).log_softmax(1), (taught.float() / t).log_softmax(1)
        other = t * t * F.kl_div(own, theirs, reduction="batchmean", log_target=True)
    return (1 - recipe.teacher_weight) * loss + recipe.teacher_weight * other


@dataclass
class History:
    """The rows of `metrics.csv`, one an epoch; a part of the checkpoint, so that the file never has one too many."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.rows = list(state_dict["rows"])

    def write(self, path: Path) -> None:
        """Write the rows as CSV, whole or not at all."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(path, text.getvalue())


def _request(
    arch: ArchConfig, data: ImageData, recipe: Recipe, seed: int, weights: Path | None, teacher: Teacher | None
) -> dict[str, Any]:
    """Return what decides the outcome of a training, as `nas.request.claim` takes it."""
    return {
        "command": "nas-train",
        **asdict(recipe),
        "seed": seed,
        "data": data.source,
        "data_fingerprint": data.fingerprint,
        "training_images": len(data.train),
        "weights": None if weights is None else digest(weights),
        "teacher": None if teacher is None else teacher.digest,
        "arch": arch.to_yaml(),
    }
