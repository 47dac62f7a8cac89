"""Training of a found network."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.about import note
from nas.augmentation import augmented, draw, step_generator, steps_of, training_indices
from nas.checkpoints import (
    CHECKPOINT_EVERY_S,
    History,
    Pretrained,
    digest,
    load_checkpoint,
    load_state,
    load_weights,
    save_checkpoint,
)
from nas.curves import Points, curves
from nas.data import ImageData, Images
from nas.ema import MovingAverage
from nas.evaluation import accuracy_of
from nas.parallel import ALONE, Group, connected
from nas.pixels import AHEAD, Files, loaded, workers
from nas.progress import LINE_EVERY_S, Tick, duration, progress, say
from nas.recipe import Recipe
from nas.request import claim
from nas.steps import (
    Ahead,
    accelerator,
    check_compiler,
    check_parts,
    clip_by_weights,
    mixed_precision,
    own_draws,
    parameter_groups,
    repeated_shapes,
    say_if_hardly_compiled,
    set_layer_scale,
)
from nas.stopping import stopping
from nas.teacher import Teacher
from supernet.arch import ArchConfig
from supernet.distillation import add_second_classifier, one_classifier
from supernet.errors import InputError
from supernet.files import read_csv, reading, write_atomically
from supernet.model import build_model, set_drop_path
from supernet.user_block import file_digests

WORK = ("checkpoint.pt", "metrics.csv", "model.safetensors")  # a folder without one has nothing of a training yet
MEASURED_STEPS = 10  # by whose time that of the rest is estimated


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
    weights: Path | Pretrained | None = None,
    teacher: Teacher | None = None,
    targets: Sequence[Mapping[str, Any]] = (),
    group: Group = ALONE,
) -> TrainingResult:
    """Train a network at its own image size, which is also the data's, and return how it does on `data.val`.

    The network gets the data's number of classes and loses its empty slots. It starts from random weights, or from given ones:
    those of a file (see `load_weights`), or of `nas.pretrained.load_pretrained`; their layer scales stay as they are. With a
    `teacher`, which sees the same augmented images, it learns from that too, as the recipe says. `folder` then holds
    `arch.yaml`, `model.safetensors` (with the recipe's `ema`, the average of the weights; of two classifiers, the one that does
    what they do together), `metrics.csv` (a row for each epoch; the learning rate is that of its last step, the training loss
    is smoothed) and `checkpoint.pt`, written before and after each validation, and every ten minutes in a long epoch; and the
    curves of `nas.curves`. The next call with the same arguments goes on from there, to the same weights as if it had never
    stopped; if the training is finished, it returns its result, also where `checkpoint.pt` has been deleted. The weights name
    their classes, and the `targets` of the network's search (see `nas.about`), for nas-export. On CPUs, on one machine with one
    number of threads, the same seed gives the same weights; on a GPU they are the same up to rounding.
    The processes of a `group` all call this; each has its rows of every batch, and the first one alone writes.

    Raises:
        InputError: the image sizes differ, the folder holds another training, the weights do not fit, or there is no
            such accelerator.
        FloatingPointError: the loss, or its gradient, is no longer finite. A checkpoint, if there is one yet, is of before.
    """
    if data.image_size != arch.image_size:
        raise InputError(
            f"network {arch.name!r} is for images of {arch.image_size} px, but the data are loaded at "
            f"{data.image_size} px: both must be the same"
        )
    folder = Path(folder)
    checkpoint = folder / "checkpoint.pt"
    arch = arch.without_identity().with_classes(len(data.classes))

    request = group.agreed(lambda: _request(arch, data, recipe, seed, weights, teacher))
    group.alike({name: value for name, value in request.items() if name != "data"})  # copies may lie elsewhere

    def untrained() -> nn.Module:
        device = group.device(accelerator(recipe.accelerator))
        _check_division(steps_of(len(data.train), recipe)[0], arch, recipe, group, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build_model(arch)
        set_layer_scale(model, recipe.layer_scale)
        # After the layer scales, which are part of the weights.
        if weights is not None and not checkpoint.exists():
            if isinstance(weights, Path):
                load_weights(model, weights, adapt=True, classes=data.classes)
            else:
                load_state(model, weights.state, weights.source, adapt=True)
        if teacher is not None and recipe.distillation_head:
            add_second_classifier(model)
        set_drop_path(model, recipe.drop_path)
        return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    model = group.agreed(untrained)
    # Claimed only now: what was refused so far leaves the folder free for the corrected request.
    begun = any((folder / name).exists() for name in WORK)
    group.agreed(lambda: claim(folder, request, begun) if group.first else None)
    if ended := group.from_first(lambda: _ended(folder, recipe)):
        say(f"the training in {folder} has finished before: its result is returned")
        return TrainingResult(arch, *ended, recipe.all_epochs, folder)
    model = group.synchronised(model)
    # Compiled first: PyTorch does not look into a DistributedDataParallel, and would compile some of the layers, unnoticed.
    # Inside of one it compiles the network in pieces, at the borders of the buckets in which gradients are exchanged.
    network = group.divided(torch.compile(model) if recipe.compile else model)  # type: ignore[arg-type]
    run = _Run(
        model=model,
        network=network,
        optimizer=torch.optim.AdamW(parameter_groups(model.named_parameters(), recipe.weight_decay), lr=recipe.learning_rate),
        average=MovingAverage(model, recipe.ema) if recipe.ema else None,
        history=History(),
        arch=arch,
        data=data,
        recipe=recipe,
        seed=seed,
        teacher=teacher,
        checkpoint=checkpoint,
        group=group,
    )
    first = load_checkpoint(checkpoint, group, **run.parts)
    if first < recipe.all_epochs:
        with connected():
            _run_epochs(run, first)
    else:
        say(f"the training in {folder} has finished before: its result is returned")

    if group.first:
        # Written anew even if finished before: a kill may have come between the last checkpoint and these files.
        run.history.write(folder / "metrics.csv")
        arch.save(folder / "arch.yaml")
        state = one_classifier((run.average.network if run.average is not None else run.model).state_dict())
        tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        write_atomically(folder / "model.safetensors", safetensors.torch.save(tensors, note(run.data.classes, targets)))
    last, of = run.history.rows[-1], "val" if run.average is None else "ema"
    return TrainingResult(arch, last[f"{of}_loss"], last[f"{of}_accuracy"], recipe.all_epochs, folder)


def _ended(folder: Path, recipe: Recipe) -> tuple[float, float] | None:
    """Return the loss and the accuracy of a training that ended, and whose checkpoint has been deleted since."""
    path = folder / "metrics.csv"
    if (folder / "checkpoint.pt").exists() or not (folder / "model.safetensors").exists() or not path.exists():
        return None
    names = [f"{'ema' if recipe.ema else 'val'}_{name}" for name in ("loss", "accuracy")]
    do = "give another --out"
    rows = read_csv(path, ["epoch", *names], "the metrics file", do)
    with reading(f"the metrics file {path}", do):
        last = max(rows, key=lambda row: int(row["epoch"]), default={"epoch": "0"})
        return (float(last[names[0]]), float(last[names[1]])) if int(last["epoch"]) == recipe.all_epochs else None


def _check_division(batch: int, arch: ArchConfig, recipe: Recipe, group: Group, device: torch.device) -> None:
    """Refuse a batch that cannot be divided as it is to be, and compilation where nothing can be compiled."""
    rows = group.rows(batch)
    own = rows.stop - rows.start
    check_parts(own, recipe.accumulate)
    part = own // recipe.accumulate
    if part != batch and part % arch.group_size:
        least = math.lcm(2, arch.group_size) * group.size * recipe.accumulate
        raise InputError(
            f"{arch.name} takes {arch.group_size} images at once, but a step's {batch} would be divided into parts of {part}: "
            f"give a batch_size that is a multiple of {least}"
        )
    if arch.multiplexes and recipe.mixes:
        raise InputError(
            f"{arch.name} takes {arch.group_size} images at once, which mixup and cutmix would mix with each other: give a "
            "recipe with mixup: 0 and cutmix: 0"
        )
    if recipe.compile:
        check_compiler(device)


@dataclass(frozen=True, eq=False)
class _Run:
    """A training under way."""

    model: nn.Module
    network: nn.Module
    """The model as it is trained: compiled, divided among processes."""
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None
    history: History
    arch: ArchConfig
    data: ImageData
    recipe: Recipe
    seed: int
    teacher: Teacher | None
    checkpoint: Path
    group: Group

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        average = {} if self.average is None else {"ema": self.average}
        return {"net": self.model, "optimizer": self.optimizer, "history": self.history, **average}

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def batch(self) -> int:
        """Images a step."""
        return steps_of(len(self.data.train), self.recipe)[0]

    @property
    def per_epoch(self) -> int:
        """Steps an epoch."""
        return steps_of(len(self.data.train), self.recipe)[1]

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.recipe.rate(step, self.batch, self.per_epoch)

    def save(self, epoch: int) -> None:
        """Write a checkpoint: `epoch` epochs are done, and of the next the steps that the history has losses of."""
        if self.group.first:
            save_checkpoint(self.checkpoint, epoch, **self.parts)


def _run_epochs(run: _Run, first: int) -> None:
    """Train from epoch `first` (counted from 0) to the recipe's last, each followed by a checkpoint and a row."""
    recipe, history = run.recipe, run.history
    steps = run.per_epoch * recipe.all_epochs
    if run.teacher is not None:
        run.teacher.network.to(run.device)
    _introduce(run, first)
    # Groups of one class would be told apart too easily.
    val = run.data.val.shuffled(run.seed) if run.arch.multiplexes else run.data.val
    said = time.monotonic()
    done = run.per_epoch * first
    with (
        own_draws(run.device),
        repeated_shapes(run.device),
        progress(run.arch.name, steps, done + len(history.losses)) as tick,
        curves(run.checkpoint.parent, done) as draw_curves,
    ):
        step_taken = _estimating(tick, steps - done - len(history.losses), *_measured(run.data.train))
        for epoch in range(first, recipe.all_epochs):
            _run_epoch(run, epoch, step_taken)
            _finish_epoch(run, epoch, val, draw_curves)
            if epoch == first and epoch + 1 < recipe.all_epochs:
                left = recipe.all_epochs - epoch - 1
                rest, them = duration(history.rows[-1]["seconds"] * left), "epochs" if left > 1 else "epoch"
                say(f"about {rest} for the {left:,} {them} left, going by this one as a whole, validation included")
            now = time.monotonic()
            if now - said >= LINE_EVERY_S or epoch + 1 == recipe.all_epochs:  # short epochs would flood the log
                said = now
                row = history.rows[-1]
                averaged = f"; of the average {100 * row['ema_accuracy']:.2f} %" if "ema_accuracy" in row else ""
                say(
                    f"epoch {epoch + 1} of {recipe.all_epochs}: validation loss {row['val_loss']:.4f}, top-1 "
                    f"{100 * row['val_accuracy']:.2f} %{averaged}"
                )


def _introduce(run: _Run, first: int) -> None:
    recipe = run.recipe
    demonstration = " of handwritten digits (no --data: a demonstration)" if run.data.demonstration else ""
    say(
        f"training {run.arch.name} at {run.arch.image_size} px for {len(run.data.classes)} classes on {len(run.data.train):,} "
        f"images{demonstration}: epochs {first + 1} to {recipe.all_epochs}, {run.per_epoch} steps of {run.batch}, on "
        f"{run.device.type}"
    )
    if recipe.learning_rate_batch:
        say(
            f"the recipe's learning rate, {recipe.learning_rate:g} for {recipe.learning_rate_batch} images a step, comes to "
            f"{recipe.highest_rate(run.batch):g} for {run.batch}"
        )
    if recipe.compile:
        say_if_hardly_compiled(run.model)
    if recipe.distillation_head and run.teacher is None:
        say("no teacher is given (--teacher): it learns from the labels alone")


def _measured(images: Images) -> tuple[int, int]:
    """Return how many steps to leave out before the time of a step is measured, and by how many it is.

    The first step also allocates. Where images are decoded ahead, the first batches of each worker process are ready before
    they are needed; only then do steps take as long as decoding, where that is what takes long.
    """
    if not isinstance(images.pixels, Files):
        return 1, MEASURED_STEPS
    return 1 + AHEAD * workers(), max(MEASURED_STEPS, AHEAD * workers())


def _estimating(tick: Tick, steps: int, skipped: int, measured: int) -> Callable[[], None]:
    """Return what is to be called after each of `steps` steps; it says how long the rest will take, by the mean of `measured`
    steps after the first `skipped` ones. Of a short training, these are a fourth of all at most."""
    if skipped + measured > max(steps // 4, 1 + MEASURED_STEPS):
        skipped, measured = 1, MEASURED_STEPS
    taken, began = 0, 0.0

    def step_taken() -> None:
        nonlocal taken, began
        tick(1)
        taken += 1
        if taken == skipped:
            began = time.monotonic()
        if taken == skipped + measured:
            left = steps - taken
            rest = duration((time.monotonic() - began) / measured * left)
            say(
                f"about {rest} for the {left:,} steps left, going by {measured} steps; what changes that: the recipe's "
                "epochs, images_per_epoch, batch_size and precision, the image size, and the teacher"
            )

    return step_taken


def _run_epoch(run: _Run, epoch: int, step_taken: Callable[[], None]) -> None:
    """Take the steps of an epoch (counted from 0) that the history has no losses of yet, and write a checkpoint.

    Raises:
        KeyboardInterrupt: a signal has stopped it, after a step that the checkpoint has.
    """
    history, began, before = run.history, time.monotonic(), run.history.seconds
    saved = began
    run.model.train()
    batches = Ahead(_batches(run, epoch))
    with stopping(run.group) as asked:
        for at, (x, y, seed) in enumerate(batches, len(history.losses)):
            step = run.per_epoch * epoch + at
            for parameters in run.optimizer.param_groups:
                parameters["lr"] = run.rate(step)
            torch.manual_seed(seed)
            # While an accelerator computes the step, the images of the next one are made.
            loss = train_step(run.model, run.optimizer, x, y, run.recipe, run.teacher, run.network, run.group, batches.make)
            if not math.isfinite(loss):
                kept = f" and --weights {run.checkpoint}, which is of before" if run.checkpoint.exists() else ""
                raise FloatingPointError(
                    f"the loss of {run.arch.name} is not finite in epoch {epoch + 1}, at step {step + 1}: train with a recipe "
                    f"of a lower learning_rate, into another --out{kept}"
                )
            if run.average is not None:
                run.average.update(run.model)
            history.losses.append(loss)
            step_taken()
            now = time.monotonic()
            history.seconds = before + now - began
            if now - saved >= CHECKPOINT_EVERY_S and at + 1 < run.per_epoch:
                run.save(epoch)
                saved = now
            if asked():
                break
        run.save(epoch)  # a kill while it validates, which may take long, loses no steps


def _batches(run: _Run, epoch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield, for each step of an epoch that the history has no losses of yet, the images and targets of this process's rows,
    and the seed of what the network itself draws, drop path.

    All that is random in the step follows from the seed, the epoch and the step's place in it; what is drawn for an image does
    not depend on the number of processes.
    """
    first, size = len(run.history.losses), run.arch.image_size
    order = itertools.islice(training_indices(len(run.data.train), run.recipe, run.seed, epoch), first, None)
    own = (indices[run.group.rows(len(indices))] for indices in order)
    for at, (pixels, labels) in enumerate(loaded(run.data.train, own, run.device), first):
        generator, whole = step_generator(run.seed, epoch, at), len(labels) * run.group.size
        draws = draw(whole, pixels.shape[2], run.recipe, run.data.flips and run.recipe.mirror, generator, size)
        seed = int(torch.randint(2**62, (1,), generator=generator)) + run.group.rank  # each process for its own images
        rows = run.group.rows(whole)
        x, y = augmented(pixels, labels, draws.of(rows.start, rows.stop), run.recipe, len(run.data.classes), size)
        yield x.contiguous(memory_format=torch.channels_last), y, seed


def _finish_epoch(run: _Run, epoch: int, val: Images, draw_curves: Callable[[Points], None]) -> None:
    """Validate, add a row to the history and points to the curves, and write a checkpoint."""
    history, began = run.history, time.monotonic()
    loss, accuracy = accuracy_of(run.model, val, run.group)
    scores = {"val_loss": loss, "val_accuracy": accuracy}
    if run.average is not None:
        loss, accuracy = accuracy_of(run.average.network, val, run.group)
        scores |= {"ema_loss": loss, "ema_accuracy": accuracy}
    step, losses = run.per_epoch * (epoch + 1), history.losses
    rate = run.rate(step - 1)
    seconds = round(history.seconds + time.monotonic() - began, 2)
    history.rows.append(
        {
            "epoch": epoch + 1,
            "learning_rate": rate,
            "train_loss": math.fsum(losses) / len(losses),
            **scores,
            "seconds": seconds,
        }
    )
    curve = {name.replace("_", "/", 1): [(step, value)] for name, value in scores.items()}
    draw_curves({"train/loss": enumerate(losses, step - len(losses) + 1), "train/learning_rate": [(step, rate)], **curve})
    history.losses, history.seconds = [], 0.0
    run.save(epoch + 1)
    if run.group.first:
        history.write(run.checkpoint.with_name("metrics.csv"))


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    teacher: Teacher | None = None,
    network: nn.Module | None = None,
    group: Group = ALONE,
    meanwhile: Callable[[], None] = lambda: None,
) -> float:
    """Take one step on the normalised images `x` (B, 3, S, S) with targets `y`, labels (B,) or shares of the classes
    (B, classes); return the loss before it. Where the loss or its gradient is not finite, no step is taken and nan returned.

    `network`: the model as `group.divided` returns it, where the images are this process's of a larger batch. `meanwhile` is
    called while an accelerator is still busy, before its loss is waited for.
    """
    network = network if network is not None else model
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=x.device)
    images = -(-len(x) // recipe.accumulate)
    for done in range(0, len(x), images):
        part, targets = x[done : done + images], y[done : done + images]
        # Gradients are exchanged once, in the last part's backward pass.
        alone = group.size > 1 and done + images < len(x)
        with network.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            with mixed_precision(x.device, recipe.precision):
                taught = None
                if teacher is not None:
                    with torch.no_grad():
                        taught = teacher.network(part)
                of_part = training_loss(network(part), targets, recipe, taught) * (len(part) / len(x))
            of_part.backward()
        loss = loss + of_part.detach()
    loss = group.mean(loss)
    group.average_statistics(model)
    parameters = dict(model.named_parameters())
    # Of infinity, nothing is shortened.
    norm = nn.utils.clip_grad_norm_(parameters.values(), recipe.clip_norm or math.inf)
    meanwhile()
    value = loss.item()
    if not (norm.isfinite() and math.isfinite(value)):  # a loss can be infinite where its gradient is not
        return math.nan
    if recipe.clip_agc:
        # All but the classifier, as in the source.
        clip_by_weights((p for name, p in parameters.items() if not name.startswith("head.fc.")), recipe.clip_agc)
    optimizer.step()
    return value


def training_loss(
    outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor, recipe: Recipe, taught: Tensor | None = None
) -> Tensor:
    """Return the loss of logits (B, classes) against labels (B,) or shares of the classes (B, classes), and against a teacher's
    logits `taught` (B, classes). Of a pair of logits, the first is the labels', the second the teacher's.

    Source of the teacher's part: soft, Hinton et al. 2015, the divergence from its probabilities at a temperature T, times T^2;
    hard, DeiT (Touvron et al., ICML 2021), cross-entropy to the class that it decides for.
    """
    logits, student = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
    if taught is None:
        return loss
    if recipe.distillation == "hard":
        other = F.cross_entropy(student, taught.argmax(1))
    else:
        t = recipe.teacher_temperature
        own, theirs = ((_wide(logits) / t).log_softmax(1) for logits in (student, taught))
        other = t * t * F.kl_div(own, theirs, reduction="batchmean", log_target=True)
    return (1 - recipe.teacher_weight) * loss + recipe.teacher_weight * other


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _request(
    arch: ArchConfig, data: ImageData, recipe: Recipe, seed: int, weights: Path | Pretrained | None, teacher: Teacher | None
) -> dict[str, Any]:
    """Return what decides the outcome of a training, as `nas.request.claim` takes it."""
    blocks = file_digests(block.kind for stage in arch.stages for block in stage.blocks)
    return {
        "command": "nas-train",
        **asdict(recipe),
        "seed": seed,
        "data": data.source,
        "data_fingerprint": data.fingerprint,
        "training_images": len(data.train),
        "train_image_size": data.train_size,
        "weights": None if weights is None else digest(weights) if isinstance(weights, Path) else weights.digest,
        "teacher": None if teacher is None else teacher.digest,
        "arch": arch.to_yaml(),
        **({"blocks": blocks} if blocks else {}),
    }
