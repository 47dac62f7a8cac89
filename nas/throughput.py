"""Objective throughput: images may share a pass, and how many do is searched beside the network (ConcatPlexer).

For each way of grouping that the space has, and for each image by itself, a network is slimmed to the target: what a network
is worth is judged with its images by themselves, what it takes with them grouped. Then all are trained for a few epochs from
the supernet's weights, each beside its control: the same reduction without concatenation. The best on the scoring images, over
several random groupings, is chosen. The network of each image by itself is the narrower one at an equal time a call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from nas.augmentation import steps_of
from nas.checkpoints import load_weights
from nas.data import ImageData, Images, normalise
from nas.kept import described
from nas.progress import say
from nas.settings import SupernetSettings
from nas.steps import accelerator
from nas.supernet_training import short_recipe
from nas.table import LatencyTable
from nas.training import train_network
from nas.trajectory import Check, Predictor
from supernet.arch import ArchConfig, MultiplexSpec
from supernet.model import build_model, count
from supernet.space import SearchSpace

GROUPINGS = 3  # random ones that an accuracy is the mean of
BATCH = 256  # images that are judged at once, or one group
COLUMNS = (
    "images_in_group",
    "mixing",
    "chosen",
    "met",
    "ms",
    "measured",
    "ms_per_image",
    "group_ms",
    "wait_ms",
    "response_ms",
    "score_accuracy",
    "accuracy",
    "accuracy_sd",
    "worst_slot_accuracy",
    "one_class_accuracy",
    "params",
    "macs",
    "network",
)
"""Of throughput.csv: a row for each network that was compared."""


@dataclass(frozen=True)
class GroupedPredictor:
    """What a table says of networks whose images are grouped in one way."""

    table: Predictor
    space: SearchSpace
    mux: MultiplexSpec | None

    def predict_ms(self, arch: ArchConfig) -> float:
        return self.table.predict_ms(self.space.multiplexed(arch, self.mux))


def usable_ways(space: SearchSpace, table: LatencyTable) -> tuple[MultiplexSpec, ...]:
    """Return the ways of grouping that can pay on a device: those that save some network more than the table is off by."""
    error = max((c.mean_error_percent for c in table.calibrations), default=0.0)
    usable = []
    for mux in space.mux:
        saved = max(1 - GroupedPredictor(table, space, mux).predict_ms(a) / table.predict_ms(a) for a in _most_to_share(space))
        pays = 100 * saved > error
        say(
            f"groups of {mux.n}: at most {100 * saved:.1f} % less time a call, where the last stage is nearly all of a network"
            + ("" if pays else f"; the table is off by {error:.1f} % on average: left out")
        )
        if pays:
            usable.append(mux)
    return tuple(usable)


def _most_to_share(space: SearchSpace) -> list[ArchConfig]:
    """Return the networks with least before the last stage and a token block in each of its slots, at each of its widths."""
    last = space.stages[-1]
    token = next(kind for kind, block in zip(last.kinds, last.candidates, strict=True) if block.tokens)
    kinds = [*(["identity"] * stage.depth for stage in space.stages[:-1]), [token] * last.depth]
    return [space.arch([*(s.widths[0] for s in space.stages[:-1]), width], kinds) for width in last.widths]


@dataclass(frozen=True)
class Accuracy:
    """Shares of images that are right: of each random grouping, of each slot (the mean over groupings), and in groups of one
    class."""

    groupings: tuple[float, ...]
    slots: tuple[float, ...]
    one_class: float

    @property
    def mean(self) -> float:
        return mean(self.groupings)

    @property
    def sd(self) -> float:
        return stdev(self.groupings)


@torch.no_grad()
def _right(model: nn.Module, images: Images, order: torch.Tensor, n: int) -> torch.Tensor:
    """Return which of the images, grouped by n in this order, are right: (images,) bool, in this order."""
    device = next(model.parameters()).device
    found = []
    for indices in order.split(max(n, BATCH // n * n)):
        pixels, labels = images.batch(indices)
        found.append(model(normalise(pixels.to(device))).argmax(1).cpu() == labels)
    return torch.cat(found)


def grouped_accuracy(model: nn.Module, images: Images, n: int, groupings: int = GROUPINGS) -> Accuracy:
    """Return how a network that takes groups of `n` does on the images; a ragged last group is filled, never dropped."""
    model.eval()
    slot = torch.arange(len(images)) % n
    generator = torch.Generator().manual_seed(0)
    found = [_right(model, images, torch.randperm(len(images), generator=generator), n).double() for _ in range(groupings)]
    by_class = _right(model, images, images.labels.argsort(stable=True), n).double()
    return Accuracy(
        tuple(hits.mean().item() for hits in found),
        tuple(mean(hits[slot == at].mean().item() for hits in found) for at in range(n)),
        by_class.mean().item(),
    )


def control_of(arch: ArchConfig) -> ArchConfig:
    """Return the same reduction, segments and demultiplexers, with each image a sequence of its own."""
    assert arch.mux is not None
    return replace(arch, mux=replace(arch.mux, mixing="none", readout="slot"))


def wait_ms(n: int, images_per_ms: float) -> float:
    """Return the mean time that an image waits until its group of n is full, of images that arrive evenly."""
    return (n - 1) / (2 * images_per_ms)


@dataclass(frozen=True)
class Finalist:
    """A network that was trained a little, judged and timed."""

    arch: ArchConfig
    check: Check
    """What a call at the table's batch takes, where the device is here."""
    met: bool | None
    """Whether that is at most the target; None where it is not known, and of controls."""
    group_ms: float | None
    """Of one group alone, None where the device is not here, and of controls."""
    model: nn.Sequential
    """At the size of the data."""
    score: Accuracy
    val: Accuracy

    @property
    def is_control(self) -> bool:
        return self.arch.mux is not None and self.arch.mux.mixing == "none"


@dataclass(frozen=True)
class Found:
    """The end of slimming in one way: a member of the space, at the deployed size, its empty slots kept."""

    arch: ArchConfig
    check: Check
    met: bool | None


def train_finalists(
    found: Sequence[Found],
    inherited: Callable[[ArchConfig], Path],
    data: ImageData,
    check: Callable[[ArchConfig], Check],
    group_ms: Callable[[ArchConfig], float | None],
    settings: SupernetSettings,
    folder: Path,
    seed: int,
) -> list[Finalist]:
    """Train, judge and time the networks that were found, each with groups followed by its control.

    Goes on where a kill stopped it.

    Args:
        inherited: a network of the supernet to the file of its weights, under the names of the network without empty slots.
        check: a network to what a call takes on the device.
        group_ms: a network to what one group takes on the device.
    """
    recipe = short_recipe(settings, data, settings.finalist_epochs, 1 / 2)
    everything: dict[ArchConfig, Found] = {}
    for one in found:
        everything[one.arch] = one
        if one.arch.multiplexes:
            control = control_of(one.arch)
            everything.setdefault(control, Found(control, check(control), None))
    finalists = []
    for one in everything.values():
        arch, n = one.arch.at(data.image_size), one.arch.group_size
        name = f"groups of {n}, {one.arch.mux.mixing}" if one.arch.mux is not None else "each image by itself"
        # Its empty slots decide which weights it inherits.
        digest = hashlib.sha256(arch.to_yaml().encode()).hexdigest()[:12]
        small = replace(arch.without_identity(), name=f"{arch.name} ({name})")
        parts = _parts(small, steps_of(len(data.train), recipe)[0], settings.accumulate)
        own = replace(recipe, accumulate=parts)
        train_network(small, data, own, folder / digest, seed, weights=inherited(arch.without_mux()))
        model = build_model(small)
        load_weights(model, folder / digest / "model.safetensors")
        model = model.to(accelerator(settings.accelerator))
        is_control = one.arch.mux is not None and one.arch.mux.mixing == "none"
        finalists.append(
            Finalist(
                one.arch.without_identity(),
                one.check,
                one.met,
                None if is_control else group_ms(one.arch),
                model,
                grouped_accuracy(model, data.score, n),
                grouped_accuracy(model, data.val, n),
            )
        )
    return finalists


def _parts(arch: ArchConfig, batch: int, accumulate: int) -> int:
    """Return in how many parts a step's images go through a network: `accumulate`, where each is whole groups, else 1."""
    part, over = divmod(batch, accumulate)
    if accumulate == 1 or (not over and part >= 2 and part % arch.group_size == 0):
        return accumulate
    say(f"{arch.name}: a step's {batch} images make no {accumulate} equal parts of whole groups (accumulate): at once instead")
    return 1


def best_of(finalists: Sequence[Finalist]) -> Finalist:
    """Return the finalist that is right most often on the scoring images, of those that meet the target if any does. Controls
    are not chosen."""
    free = [one for one in finalists if not one.is_control]
    return max([one for one in free if one.met is not False] or free, key=lambda one: one.score.mean)


def records(
    finalists: Sequence[Finalist], chosen: Finalist, table: LatencyTable, arrivals_per_second: float
) -> list[dict[str, Any]]:
    """Return what is known of the finalists, in the columns of throughput.csv. `arrivals_per_second`: images that come in; 0:
    as many as the network works off."""
    batch = table.batch
    rows: list[dict[str, Any]] = []
    for one in finalists:
        ms = one.check.ms
        if ms is None and not table.missing(one.arch.layers()):
            ms = table.predict_ms(one.arch)
        wait = response = None
        if not one.is_control:
            assert ms is not None  # slimming had a prediction
            wait = wait_ms(one.arch.group_size, arrivals_per_second / 1e3 or batch / ms)
            response = None if one.group_ms is None else wait + one.group_ms
        complexity = count(one.arch)
        values = (
            one.arch.group_size,
            "alone" if one.arch.mux is None else "control" if one.is_control else one.arch.mux.mixing,
            one is chosen,
            one.met,
            ms,
            one.check.ms is not None,
            None if ms is None else ms / batch,
            one.group_ms,
            wait,
            response,
            one.score.mean,
            one.val.mean,
            one.val.sd,
            min(one.val.slots),
            one.val.one_class,
            complexity.params,
            complexity.macs,
            described(one.arch.without_mux()),
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def mega(number: float) -> str:
    """Return a number in millions, to four digits."""
    return f"{number / 1e6:.4g}" if number < 9.9995e9 else f"{number / 1e6:.0f}"


def table_of(rows: Sequence[dict[str, Any]], batch: int) -> str:
    """Return the records as lines for people."""
    header = (
        "",
        "group",
        f"ms of {batch}",
        "ms an image",
        "ms of a group",
        "ms to fill it",
        "top-1 %",
        "worst slot",
        "of one class",
        "M MACs",
    )
    lines = [header]
    for row in rows:
        control = row["mixing"] == "control"
        known = "no rows" if row["ms"] is None else f"{row['ms']:.4g}" + ("" if row["measured"] else " (predicted)")
        lines.append(
            (
                "->" if row["chosen"] else "",
                "none" if row["mixing"] == "alone" else f"{row['images_in_group']}, {row['mixing']}",
                known + (" MISSES" if row["met"] is False else ""),
                "" if row["ms"] is None else f"{row['ms_per_image']:.4g}",
                "" if control else "not here" if row["group_ms"] is None else f"{row['group_ms']:.4g}",
                "" if control else f"{row['wait_ms']:.3g}",
                f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_sd']:.1f}",
                f"{100 * row['worst_slot_accuracy']:.1f}",
                f"{100 * row['one_class_accuracy']:.1f}",
                mega(row["macs"]),
            )
        )
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    return "\n".join("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
