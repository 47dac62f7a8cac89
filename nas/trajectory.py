"""What a search says of networks, and of its way to the one that it found. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeVar

from supernet.arch import ArchConfig
from supernet.errors import InputError

COLUMNS = (
    "step",
    "taken",
    "action",
    "ms_before",
    "ms_after",
    "saved_ms",
    "loss_before",
    "loss_after",
    "accuracy_before",
    "accuracy_after",
    "score",
)
"""Of a trajectory's records: one for every option of every step. `score` is the drop per millisecond saved; with limits or MES,
`Trajectory.columns` has more, among them the gain (`gain_ms`, `gain_mes`) that the drop is divided by."""

Score = Literal["loss", "accuracy"]
SamplerName = Literal["tpe", "nsga2"]  # of an Optuna study; here, as Optuna takes a while to import


class NothingFits(InputError):
    """No network keeps the budgets and limits that were asked for, or none was found."""


class Evaluation(NamedTuple):
    """Loss (cross-entropy) and accuracy (0 to 1; NaN where unknown) of a network."""

    loss: float
    accuracy: float = math.nan

    def charge(self, score: Score) -> float:
        """Return what is to be small: the loss, or the share of images that are wrong."""
        return self.loss if score == "loss" else 1 - self.accuracy


@dataclass(frozen=True)
class Check:
    """How long a network took on a device itself, with its 95 % interval, at its table's pace, and as the clock had it
    (`raw_ms`); None where it could not be measured."""

    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    raw_ms: float | None = None


Found = TypeVar("Found")


def evaluations(evaluate: Callable[[ArchConfig], Found], archs: Sequence[ArchConfig]) -> Iterator[tuple[int, Found]]:
    """Yield what `evaluate` says of each network, with the network's place in `archs`, as soon as it is known.

    An evaluator that does better with many networks at once has a method `each`, which takes them and yields the same in an
    order of its own: it may go first through what shares most, or share them between processes.
    """
    each = getattr(evaluate, "each", None)
    if each is not None:
        yield from each(archs)
        return
    for at, arch in enumerate(archs):
        yield at, evaluate(arch)


def evaluate_all(
    evaluate: Callable[[ArchConfig], Found], archs: Sequence[ArchConfig], on_progress: Callable[[float], None] | None = None
) -> list[Found]:
    """Return what `evaluate` says of each network; `on_progress` is called with 1 as each is known."""
    found: dict[int, Found] = {}
    for at, evaluation in evaluations(evaluate, archs):
        found[at] = evaluation
        if on_progress is not None:
            on_progress(1)
    return [found[at] for at in range(len(archs))]


class Predictor(Protocol):
    """What the loop needs of a latency table."""

    def predict_ms(self, arch: ArchConfig) -> float: ...


@dataclass(frozen=True)
class Limit:
    """A hard limit beside the target: what `of` says of a network must be at most `at_most`."""

    name: str
    of: Callable[[ArchConfig], float]
    at_most: float

    def is_met(self, arch: ArchConfig, share: float = 1.0) -> bool:
        return self.of(arch) <= share * self.at_most


@dataclass(frozen=True)
class Option:
    """One action that was offered: what it does, the network it leads to, and what it costs and saves.

    `gain`: what the score divides by, milliseconds or MES. `figures`: of the limits, and the MES, where there are any.
    `gap`: of a network that was solved for, by how many nats another may be better by the drops; 0 where none is, proven.
    `lands`: whether it gives back near the target, which is undone where the loop goes on."""

    action: str
    stage: int
    arch: ArchConfig
    ms: float
    saved_ms: float
    evaluation: Evaluation
    score: float
    gain: float = math.nan
    figures: Mapping[str, float] = field(default_factory=dict)
    gap: float = 0.0
    lands: bool = False


@dataclass(frozen=True)
class Step:
    """One step of the loop: where it stood, and the options, the one that was taken first."""

    ms: float
    evaluation: Evaluation
    options: tuple[Option, ...]
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def taken(self) -> Option:
        return self.options[0]


@dataclass(frozen=True)
class Trajectory:
    """The whole loop: the network it began with, its steps, and the network it found."""

    start: ArchConfig
    steps: tuple[Step, ...]
    arch: ArchConfig
    ms: float
    evaluation: Evaluation

    @property
    def gap(self) -> float:
        """By how many nats another network may be better by the drops, where the last step was solved for."""
        return self.steps[-1].taken.gap if self.steps else 0.0

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the records: COLUMNS; where there are limits or MES, the gain and their figures too."""
        names = list(self.steps[0].figures) if self.steps else []
        figures = [f"{name}_{when}" for name in names for when in ("before", "after")]
        return (*COLUMNS, *([self._gain] if names else []), *figures)

    @property
    def _gain(self) -> str:
        return "gain_mes" if "mes" in self.steps[0].figures else "gain_ms"

    def records(self) -> Iterator[dict[str, object]]:
        """Yield a flat record for every option of every step, in the columns of `trajectory.csv`."""
        for number, step in enumerate(self.steps, 1):
            for option in step.options:
                values = (
                    number,
                    option is step.taken,
                    option.action,
                    step.ms,
                    option.ms,
                    option.saved_ms,
                    step.evaluation.loss,
                    option.evaluation.loss,
                    step.evaluation.accuracy,
                    option.evaluation.accuracy,
                    option.score,
                )
                record = dict(zip(COLUMNS, values, strict=True))
                if step.figures:
                    record[self._gain] = option.gain
                for name, before in step.figures.items():
                    record |= {f"{name}_before": before, f"{name}_after": option.figures[name]}
                yield record
