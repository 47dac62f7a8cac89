"""Training: what every recipe shares, and the training of a found network."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.about import note
from nas.curves import curves
from nas.data import ImageData, augment, epoch_batches, normalise
from nas.evaluation import accuracy_of
from nas.progress import LINE_EVERY_S, duration, progress, say
from nas.request import claim
from supernet.arch import ArchConfig
from supernet.blocks.concatplexer import is_group_part
from supernet.blocks.efficientformer import LayerScale
from supernet.errors import InputError, unknown
from supernet.files import checked_fields, read_yaml, write_atomically
from supernet.model import build_model
from supernet.weights import at_size

MEASURED_STEPS = 10  # the first step is left out: it also allocates
UNDECAYED = ("attention_biases", "cls_token", "pos_embed", "segments", "pair_biases")  # beside vectors
PRECISIONS = ("auto", "fp32", "bf16")
CLASSIFIER = ("head.fc.weight", "head.fc.bias")


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
    text = f"{arch.to_yaml()}{_digest(weights)}"
    return Teacher(model.eval().requires_grad_(False), f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}")


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
    targets: Sequence[Mapping[str, Any]] = (),
) -> TrainingResult:
    """Train a network at its own image size, which is also the data's, and return how it does on `data.val`.

    The network gets the data's number of classes and loses its empty slots. It starts from random weights, or from
    the file `weights` (see `load_weights`), whose layer scales stay as they are. With a `teacher`, which sees the same
    augmented images, it learns from that too, as the recipe says. `folder` then holds `arch.yaml`, `model.safetensors`,
    `metrics.csv` (a row for each epoch; the learning rate is that of its last step, the training loss is smoothed) and
    `checkpoint.pt`, written after each epoch; and the curves of `nas.curves`. The next call with the same arguments goes on
    from there, to the same weights as if it had never stopped; if the training is finished, it returns its result. The weights
    name their classes, and the `targets` of the network's search (see `nas.about`), for nas-export. On one machine with one
    number of threads, the same seed gives the same weights.

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
    write_atomically(folder / "model.safetensors", safetensors.torch.save(tensors, note(data.classes, targets)))
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


def mixed_precision(device: torch.device, precision: str = "auto") -> torch.autocast:
    """Return the context in which a loss is computed: matrix products in bfloat16 by `precision` bf16, in fp32 by fp32.

    auto is bf16 on CUDA, and on a CPU with instructions for it (AVX-512 or AMX); elsewhere bfloat16 is emulated, so
    auto is fp32.
    """
    on = precision == "bf16"
    if precision == "auto":
        on = device.type == "cuda" or (device.type == "cpu" and _cpu_has_bfloat16())
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def _cpu_has_bfloat16() -> bool:
    try:
        has = torch.cpu.get_capabilities()
    except AttributeError:  # an older torch cannot say
        return False
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


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


def training_batch(data: ImageData, indices: Tensor, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the training images at `indices` (B,), augmented and normalised (B, 3, S, S), and labels (B,)."""
    pixels, labels = data.train.batch(indices)
    x = normalise(augment(pixels.to(device), generator, data.flips))
    return x.contiguous(memory_format=torch.channels_last), labels.to(device)


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
        "weights": None if weights is None else _digest(weights),
        "teacher": None if teacher is None else teacher.digest,
        "arch": arch.to_yaml(),
    }


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise InputError(f"the weights file {path} cannot be read: {error.strerror}") from error


def load_weights(model: nn.Module, path: str | Path, *, adapt: bool = False) -> None:
    """Load a `model.safetensors`, or the network of a `checkpoint.pt`, into a network of `build_model`.

    Names and shapes must be the network's own. With `adapt`, as a start for training, a classifier for another number
    of classes is left out (the network keeps its own), attention biases for a map of another size are resized, and a network
    that groups its images keeps its own parts for that; a line on stderr says so.

    Raises:
        InputError: the file cannot be read or does not fit. The network is then as it was.
    """
    load_state(model, _read_weights(Path(path)), Path(path), adapt=adapt)


def load_state(model: nn.Module, given: Mapping[str, Tensor], path: str | Path, *, adapt: bool = False) -> None:
    """Load weights that were read from `path` (which messages name), as `load_weights` does."""
    own = model.state_dict()
    if adapt:
        given = _adapted(given, own, path)
    faults = [f"lacks {name}" for name in own if name not in given]
    faults += [f"has an unexpected {name}" for name in given if name not in own]
    faults += [
        f"has {name} of shape {tuple(given[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if faults:
        more = f" and {len(faults) - 1} more such faults" if len(faults) > 1 else ""
        raise InputError(
            f"the weights file {path} does not fit the network: it {faults[0]}{more}: give the network that it was "
            "written for, whose YAML file lies beside it"
        )
    model.load_state_dict(given)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"the weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            found: Any = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, weights_only=True, map_location="cpu")["net"]
        if not all(isinstance(tensor, Tensor) for tensor in found.values()):
            raise TypeError("no state dict")
    except Exception as error:  # neither library has one base for what damaged files raise
        raise InputError(
            f"the weights file {path} cannot be read: give a model.safetensors or a checkpoint.pt of nas-train"
        ) from error
    return dict(found)


def _adapted(given: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Return the weights with the network's own classifier, resized attention biases and its own parts for groups of images,
    where that makes them fit."""
    adapted = dict(given)
    if parts := [name for name in own if name not in given and is_group_part(name)]:
        say(f"{path} knows no groups of images: the {len(parts)} tensors that groups need are learned anew")
        adapted.update({name: own[name] for name in parts})
    if all(n in given and n in own and given[n].shape[1:] == own[n].shape[1:] for n in CLASSIFIER):
        were, are = (len(tensors[CLASSIFIER[1]]) for tensors in (given, own))
        if were != are:
            say(f"the classifier of {path} is for {were} classes, not {are}: it is left out and learned anew")
            adapted.update({name: own[name] for name in CLASSIFIER})
    resized = [name for name in own if name in given and at_size(name, given[name], own[name]) is not given[name]]
    if resized:
        say(f"{len(resized)} tensors of {path} are for another image size (attention biases, positions): they are resized")
        adapted.update({name: at_size(name, given[name], own[name]) for name in resized})
    return adapted


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
    """Return optimizer groups: vectors, attention biases and what is added to tokens do not decay, everything else does."""
    decays: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in named:
        (free if parameter.ndim <= 1 or name.endswith(UNDECAYED) else decays).append(parameter)
    return [{"params": decays, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def cosine(step: int, steps: int) -> float:
    """Return the factor on the learning rate: linear warm-up over a twentieth of the steps, cosine to a hundredth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


class Stateful(Protocol):
    """A part of a checkpoint: a network, an optimizer, a History."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def save_checkpoint(path: Path, epoch: int, **parts: Stateful) -> None:
    """Write the state of a run after `epoch` epochs, whole or not at all."""
    file = io.BytesIO()
    torch.save({"epoch": epoch, **{name: part.state_dict() for name, part in parts.items()}}, file)
    write_atomically(path, file.getvalue())


def load_checkpoint(path: Path, **parts: Stateful) -> int:
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
