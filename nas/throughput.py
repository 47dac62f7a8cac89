"""Objective throughput: images may share a pass, and how many do is searched beside the network (ConcatPlexer).

For each way of grouping that the space has, and for each image by itself, a network is slimmed to the target: what a network
is worth is judged with its images by themselves, what it takes with them grouped. Then all are trained for a few epochs from
the supernet's weights, each beside its control: the same reduction without concatenation. The best on the scoring images, over
several random groupings, is chosen. The network of each image by itself is the narrower one at an equal time a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from nas.data import ImageData, Images, normalise
from nas.devices import profiler_of
from nas.guarantee import Check
from nas.measure import measure_alone, table_reference
from nas.progress import say
from nas.slimming import Predictor
from nas.supernet_training import SupernetSettings, epoch_size
from nas.table import LatencyTable
from nas.training import RECIPES, load_weights, train_network
from supernet.arch import ArchConfig, MultiplexSpec
from supernet.errors import InputError
from supernet.model import build_model, count
from supernet.space import SearchSpace
from supernet.specs import label

GROUPINGS = 3  # random ones that an accuracy is the mean of
BATCH = 256  # images evaluated at once, a multiple of every group
COLUMNS = (
    "images_in_group",
    "mixing",
    "chosen",
    "ms",
    "measured",
    "ms_per_image",
    "group_ms",
    "fill_ms",
    "answer_ms",
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
class Grouped:
    """What a table says of networks whose images are grouped in one way."""

    table: Predictor
    space: SearchSpace
    mux: MultiplexSpec | None

    def predict_ms(self, arch: ArchConfig) -> float:
        return self.table.predict_ms(self.space.multiplexed(arch, self.mux))


def usable_ways(space: SearchSpace, table: LatencyTable) -> tuple[MultiplexSpec, ...]:
    """Return the ways of grouping that can pay on a device: those that save the largest network more than the table is off by.

    Raises:
        InputError: a call of the table's is no whole number of groups.
    """
    batch = int(table.meta.get("batch", 1))
    for mux in space.mux:
        if batch % mux.n:
            raise InputError(
                f"groups of {mux.n} images need a table of a batch that is a multiple of {mux.n}, but that of {table.device} "
                f"has batch {batch}: measure one with `nas-build-lut --device cpu --batch {mux.n} --space {space.name}`, and "
                "give its id with --device"
            )
    largest = most_tokens(space)
    alone_ms = table.predict_ms(largest)
    error = max((c.mean_error_percent for c in table.calibrations), default=0.0)
    usable = []
    for mux in space.mux:
        saved = 100 * (1 - table.predict_ms(space.multiplexed(largest, mux)) / alone_ms)
        pays = saved > error
        say(
            f"groups of {mux.n}: at most {saved:.1f} % less time a call, for the network with the most token blocks"
            + ("" if pays else f"; the table is off by {error:.1f} % on average: left out")
        )
        if pays:
            usable.append(mux)
    return tuple(usable)


def most_tokens(space: SearchSpace) -> ArchConfig:
    """Return the largest network with a token block in every slot of the last stage."""
    kinds = [[next(k for k in s.kinds if k != "identity")] * s.depth for s in space.stages]
    last = space.stages[-1]
    tokens = [kind for kind, candidate in zip(last.kinds, last.candidates, strict=True) if candidate.tokens]
    kinds[-1] = [tokens[0]] * last.depth
    return space.arch([s.widths[-1] for s in space.stages], kinds)


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
def _right(model: nn.Module, images: Images, order: torch.Tensor) -> torch.Tensor:
    """Return which of the images, grouped in this order, are right: (n,) bool, in this order."""
    device = next(model.parameters()).device
    found = []
    for indices in order.split(BATCH):
        pixels, labels = images.batch(indices)
        found.append(model(normalise(pixels.to(device))).argmax(1).cpu() == labels)
    return torch.cat(found)


def grouped_accuracy(model: nn.Module, images: Images, n: int, groupings: int = GROUPINGS) -> Accuracy:
    """Return how a network that takes groups of `n` does on the images; a ragged last group is filled, never dropped."""
    model.eval()
    slot = torch.arange(len(images)) % n
    generator = torch.Generator().manual_seed(0)
    found = [_right(model, images, torch.randperm(len(images), generator=generator)).double() for _ in range(groupings)]
    by_class = _right(model, images, images.labels.argsort(stable=True)).double()
    return Accuracy(
        tuple(hits.mean().item() for hits in found),
        tuple(mean(hits[slot == at].mean().item() for hits in found) for at in range(n)),
        by_class.mean().item(),
    )


def without_concatenation(arch: ArchConfig) -> ArchConfig:
    """Return the control: the same reduction, segments and demultiplexers, with each image a sequence of its own."""
    assert arch.mux is not None
    return replace(arch, mux=replace(arch.mux, mixing="none", readout="slot"))


@dataclass(frozen=True)
class Contender:
    """A network that was trained a little, judged and timed."""

    arch: ArchConfig
    ms: float | None
    """Of a call at the table's batch, measured where the device is here (`measured`), else predicted; None for a control of
    which the table has no rows."""
    measured: bool
    group_ms: float | None
    """Of one group alone, None where the device is not here."""
    model: nn.Sequential
    """At the size of the data."""
    score: Accuracy
    val: Accuracy

    @property
    def n(self) -> int:
        """How many images share a pass."""
        return self.arch.mux.n if self.arch.mux else 1

    @property
    def control(self) -> bool:
        return self.arch.mux is not None and self.arch.mux.mixing == "none"

    def fill_ms(self, images_per_ms: float) -> float:
        """Return the mean time that an image waits until its group is full, of images that arrive evenly."""
        return 0.0 if self.control else (self.n - 1) / (2 * images_per_ms)


def contend(
    found: Sequence[tuple[ArchConfig, Check]],
    inherited: Callable[[ArchConfig], Path],
    data: ImageData,
    table: LatencyTable,
    checks: Callable[[ArchConfig], Check],
    settings: SupernetSettings,
    folder: Path,
    seed: int,
) -> list[Contender]:
    """Train, judge and time the networks that were found, each with groups followed by its control.

    Goes on where a kill stopped it.

    Args:
        found: networks at the deployed size, and what they took on the device.
        inherited: a network without groups, at the size of the data, to the file of its weights from the supernet.
        checks: a network to what it takes on the device.
    """
    recipe = replace(
        RECIPES["quick"],
        epochs=settings.contest_epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate / 2,  # the weights are no random ones
        images_per_epoch=epoch_size(settings, data),
        accelerator=settings.accelerator,
    )
    everything = []
    for arch, check in found:
        everything.append((arch, check))
        if arch.multiplexes:
            control = without_concatenation(arch)
            everything.append((control, checks(control)))
    contenders = []
    for arch, check in everything:
        name = "alone" if arch.mux is None else f"{arch.mux.n}-from-{arch.mux.start}-{arch.mux.mixing}"
        small = replace(arch.at(data.image_size).without_identity(), name=f"{arch.name} ({name})")
        train_network(small, data, recipe, folder / name, seed, weights=inherited(small.without_mux()))
        model = build_model(small)
        load_weights(model, folder / name / "model.safetensors")
        n = arch.mux.n if arch.mux else 1
        ms = check.ms
        if ms is None and not table.missing(arch.layers()):
            ms = table.predict_ms(arch)
        contenders.append(
            Contender(
                arch,
                ms,
                check.ms is not None,
                group_ms(table, arch),
                model,
                grouped_accuracy(model, data.score, n),
                grouped_accuracy(model, data.val, n),
            )
        )
    return contenders


def group_ms(table: LatencyTable, arch: ArchConfig) -> float | None:
    """Return the milliseconds of one group (or image) alone, None where the device is not here."""
    profiler: Any = profiler_of(table)
    if profiler is None:
        return None
    alone = replace(profiler, batch=arch.mux.n if arch.mux else 1)
    return measure_alone(alone, arch, table_reference(table)).ms


def best_of(contenders: list[Contender]) -> Contender:
    """Return the contender that is right most often on the scoring images; controls do not stand for election."""
    return max((one for one in contenders if not one.control), key=lambda one: one.score.mean)


def records(contenders: list[Contender], chosen: Contender, batch: int, arrivals_per_s: float) -> list[dict[str, object]]:
    """Return what is known of the contenders, in the columns of throughput.csv. `arrivals_per_s`: images that come in a second;
    0: as many as the network works off."""
    rows: list[dict[str, object]] = []
    for one in contenders:
        complexity = count(one.arch)
        worked_off = 0.0 if one.ms is None else batch / one.ms
        fill_ms = one.fill_ms(arrivals_per_s / 1e3 or worked_off)
        mixing = "alone" if one.arch.mux is None else "control" if one.control else one.arch.mux.mixing
        values = (
            one.n,
            mixing,
            one is chosen,
            one.ms,
            one.measured,
            None if one.ms is None else one.ms / batch,
            one.group_ms,
            fill_ms,
            None if one.group_ms is None else fill_ms + one.group_ms,
            one.score.mean,
            one.val.mean,
            one.val.sd,
            min(one.val.slots),
            one.val.one_class,
            complexity.params,
            complexity.macs,
            " | ".join(f"{s.width}: {' '.join(label(b) for b in s.blocks)}" for s in one.arch.without_identity().stages),
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def table_of(rows: list[dict[str, Any]], batch: int) -> str:
    """Return the records as lines for people."""
    header = ("", "group", f"ms of {batch}", "ms an image", "ms of a group", "ms to fill it", "top-1 %", "worst slot", "M MACs")
    lines = [header]
    for row in rows:
        alone = row["images_in_group"] == 1
        group = "none" if alone else f"{row['images_in_group']}, {row['mixing']}"
        lines.append(
            (
                "->" if row["chosen"] else "",
                group,
                "no rows" if row["ms"] is None else f"{row['ms']:.4g}" + ("" if row["measured"] else " (predicted)"),
                "" if row["ms"] is None else f"{row['ms_per_image']:.4g}",
                "not here" if row["group_ms"] is None else f"{row['group_ms']:.4g}",
                f"{row['fill_ms']:.3g}",
                f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_sd']:.1f}",
                f"{100 * row['worst_slot_accuracy']:.1f}",
                f"{row['macs'] / 1e6:.4g}",
            )
        )
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    return "\n".join("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
