"""The slimming loop: blocks and width are removed by accuracy drop per millisecond until the target is met. No torch.

Source: EfficientFormer (Li et al., NeurIPS 2022), section 4.2, "latency driven slimming". What the paper leaves open is
settled here:

- *Importance.* A slot's score is the log-odds of its candidates together against identity, log((a_4D + a_3D) / a_I)
  with a = exp(logit): positive odds whatever the logits' sign. A stage's score is the sum of the odds of its slots that
  are still filled (an empty stage: 0).
- *Start.* Largest widths; every slot at its best-scoring candidate that is not identity; in every stage the token
  blocks are moved behind the others.
- *Action 1* empties the least important filled slot. *Action 2* turns the earliest token block of the network into the
  stage's best-scoring candidate that works on maps. *Action 3* narrows the least important stage by the smallest number
  of steps of its widths that saves enough. *Action 4*, where a stage has several candidates on maps, or several on
  tokens (other activations, expansions, mixers): one of them instead of another, where the log-odds lose least by it.
- An action that saves under 0.1 % of the target is not offered; the next slot or stage in the order of importance
  takes its place. Where no action saves as much, those that save anything are offered.
- *Score.* The rise in loss that `evaluate` sees (or the drop in accuracy), not below zero, for each millisecond saved.
  Ties go to more milliseconds saved, then to the earlier stage. Nothing is fine-tuned between actions.
- *Landing.* The loop may end well below the target. Then width that was removed is given back: of the networks that
  have the blocks of one of the last steps and any widths, those within 3 % under the target are considered; for each of
  the last three sets of blocks that have any, the few nearest to the loop's own widths are evaluated, and the best of all
  is taken, though it may be a little worse than the loop's end. Where there is none, the slowest network under the
  target is taken, if it is better than the loop's end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, get_args

from nas.table import Target
from supernet.arch import ArchConfig, Stage
from supernet.errors import InputError, unknown
from supernet.space import SearchSpace
from supernet.specs import Block, Identity, at_width, label

MIN_SAVING = 0.001  # of the target
LANDING = 0.03  # under the target
LANDING_TRIES = 6  # networks of the same blocks that are evaluated to choose where to land ...
LANDING_BLOCKS = 3  # ... of the blocks of so many steps

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
"""Of a trajectory's records: one for every option of every step."""

Importance = Sequence[Mapping[str, float]]  # for every slot of the space: log-odds of each kind against identity
Score = Literal["loss", "accuracy"]


class Evaluation(NamedTuple):
    """Loss (cross-entropy) and accuracy (0 to 1; NaN where unknown) of a network."""

    loss: float
    accuracy: float = math.nan


class Predictor(Protocol):
    """What the loop needs of a latency table."""

    def predict_ms(self, arch: ArchConfig) -> float: ...


_Saves = Callable[[ArchConfig], bool]


@dataclass(frozen=True)
class Option:
    """One action that was offered: what it does, the network it leads to, and what it costs and saves."""

    action: str
    stage: int
    arch: ArchConfig
    ms: float
    saved_ms: float
    evaluation: Evaluation
    score: float


@dataclass(frozen=True)
class Step:
    """One step of the loop: where it stood, and the options, the one that was taken first."""

    ms: float
    evaluation: Evaluation
    options: tuple[Option, ...]

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
                yield dict(zip(COLUMNS, values, strict=True))


def slim(
    space: SearchSpace,
    importance: Importance,
    evaluate: Callable[[ArchConfig], float | Evaluation],
    table: Predictor,
    budget: float | Target,
    *,
    score: Score = "loss",
    start: Trajectory | None = None,
    landing: float = LANDING,
    on_step: Callable[[Step], None] | None = None,
) -> Trajectory:
    """Return the loop's way from the largest network to one of at most `budget` milliseconds.

    Args:
        importance: for every slot of `space.slots`, each kind's log-odds against identity.
        evaluate: a network to its loss, or to its loss and accuracy.
        table: anything with `predict_ms(arch)`.
        budget: milliseconds.
        score: what a step is charged for: the rise in loss, or the drop in accuracy.
        start: a trajectory to go on from, for a tighter budget; its steps are kept, its landing is undone.
        landing: how far under the budget the end may lie, as a fraction of it, where networks are nearer.
        on_step: called after each step.

    Raises:
        InputError: the budget is not positive, or below the smallest network of the space; or `evaluate` gives no
            finite number for what is charged.
    """
    target = budget if isinstance(budget, Target) else Target(budget)
    if score not in get_args(Score):
        raise unknown("score", score, get_args(Score))
    if len(importance) != len(space.slots):
        raise InputError(f"importance has {len(importance)} slots, but space {space.name} has {len(space.slots)}")
    run = _Run(space, importance, evaluate, table, target, score, landing)
    smallest_ms = table.predict_ms(space.smallest)
    if target.ms < smallest_ms:
        raise InputError(
            f"the target of {target.ms:g} ms is below the smallest network of {space.name}: "
            f"give at least {rounded_up(smallest_ms)} ms"
        )
    arch = start_network(space, importance) if start is None else start.start
    begin = arch
    steps: list[Step] = []
    if start is not None:
        steps = [step for step in start.steps if not step.taken.action.startswith("land")]
        if steps:
            arch = steps[-1].taken.arch
    ms, evaluation = table.predict_ms(arch), run.evaluate(arch)
    while ms > target.ms:
        options = run.options(arch, ms, evaluation, MIN_SAVING * target.ms) or run.options(arch, ms, evaluation, 0.0)
        if not options:
            raise InputError(f"no action saves anything from {ms:.4g} ms on: give more than {target.ms:g} ms")
        steps.append(Step(ms, evaluation, tuple(options)))
        if on_step is not None:
            on_step(steps[-1])
        arch, ms, evaluation = steps[-1].taken.arch, steps[-1].taken.ms, steps[-1].taken.evaluation
    if steps and ms < (1 - landing) * target.ms:
        landed = run.landing(begin, steps)
        if landed:
            steps.append(Step(ms, evaluation, tuple(landed)))
            if on_step is not None:
                on_step(steps[-1])
            arch, ms, evaluation = landed[0].arch, landed[0].ms, landed[0].evaluation
    return Trajectory(begin, tuple(steps), arch, ms, evaluation)


def start_network(space: SearchSpace, importance: Importance) -> ArchConfig:
    """Return the network that the loop starts from: largest widths, every slot at its best-scoring candidate."""
    by_slot = dict(zip(space.slots, importance, strict=True))
    kinds = [
        [max(by_slot[i, j], key=lambda kind: by_slot[i, j][kind]) for j in range(stage.depth)]
        for i, stage in enumerate(space.stages)
    ]
    return space.arch([stage.widths[-1] for stage in space.stages], kinds, f"{space.name}-start")


def slot_score(log_odds: Mapping[str, float]) -> float:
    """Return log of the summed odds of a slot's candidates against identity."""
    top = max(log_odds.values())
    return top + math.log(sum(math.exp(value - top) for value in log_odds.values()))


def rounded_up(ms: float) -> str:
    """Four significant digits that are not below `ms`."""
    text = f"{ms:.4g}"
    return text if float(text) >= ms else f"{ms + 10 ** (math.floor(math.log10(ms)) - 3):.4g}"


class _Run:
    """One call of `slim`: its arguments, and what was evaluated already."""

    def __init__(
        self,
        space: SearchSpace,
        importance: Importance,
        evaluate: Callable[[ArchConfig], float | Evaluation],
        table: Predictor,
        target: Target,
        score: Score,
        within: float,
    ) -> None:
        self.space = space
        self.log_odds = dict(zip(space.slots, importance, strict=True))
        self._evaluate = evaluate
        self._known: dict[ArchConfig, Evaluation] = {}
        self.table = table
        self.target = target
        self.score: Score = score
        self.within = within

    def evaluate(self, arch: ArchConfig) -> Evaluation:
        if arch not in self._known:
            found = self._evaluate(arch)
            evaluation = found if isinstance(found, Evaluation) else Evaluation(float(found))
            charged = evaluation.loss if self.score == "loss" else evaluation.accuracy
            if not math.isfinite(charged):
                raise InputError(f"slimming charges {self.score}, but evaluating {arch.name} gives {charged} for it")
            self._known[arch] = evaluation
        return self._known[arch]

    def options(self, arch: ArchConfig, ms: float, before: Evaluation, least_ms: float) -> list[Option]:
        """Return the actions that are offered, best first: each saves something, and at least `least_ms`."""

        def saves(after: ArchConfig) -> bool:
            saved = ms - self.table.predict_ms(after)
            return saved > 0 and saved >= least_ms

        offered = (
            self._empty_slot(arch, saves),
            self._untoken(arch, saves),
            self._narrow(arch, saves),
            self._swap(arch, saves),
        )
        options = [self._option(*offer, ms, before) for offer in offered if offer is not None]
        return sorted(options, key=lambda option: (option.score, -option.saved_ms, option.stage))

    def _option(self, action: str, stage: int, arch: ArchConfig, ms: float, before: Evaluation) -> Option:
        after_ms = self.table.predict_ms(arch)
        after = self.evaluate(arch)
        drop = self._charge(after) - self._charge(before)
        return Option(action, stage, arch, after_ms, ms - after_ms, after, max(0.0, drop) / (ms - after_ms))

    def _charge(self, evaluation: Evaluation) -> float:
        return evaluation.loss if self.score == "loss" else 1 - evaluation.accuracy

    def _empty_slot(self, arch: ArchConfig, saves: _Saves) -> tuple[str, int, ArchConfig] | None:
        """Action 1: identity for the least important slot, the next one where that would not save anything."""
        filled = [(i, j) for i, j in self.space.slots if not isinstance(arch.stages[i].blocks[j], Identity)]
        for i, j in sorted(filled, key=lambda at: (slot_score(self.log_odds[at]), at)):
            after = _with_block(arch, i, j, Identity(arch.stages[i].width))
            if saves(after):
                return f"empty slot {j + 1} of stage {i + 1}", i, after
        return None

    def _untoken(self, arch: ArchConfig, saves: _Saves) -> tuple[str, int, ArchConfig] | None:
        """Action 2: the earliest token block becomes a block on maps."""
        for i, j in self.space.slots:
            stage = arch.stages[i]
            if not stage.blocks[j].tokens:
                continue
            choices = self.space.stages[i]
            maps = [choices.kind_of(c) for c in choices.candidates if not c.tokens and not isinstance(c, Identity)]
            if not maps:
                return None
            kind = max(maps, key=lambda kind: self.log_odds[i, j][kind])
            after = _with_block(arch, i, j, choices.candidate(kind, stage.width))
            action = f"{choices.kind_of(stage.blocks[j])} to {kind} in slot {j + 1} of stage {i + 1}"
            return (action, i, after) if saves(after) else None
        return None

    def _narrow(self, arch: ArchConfig, saves: _Saves) -> tuple[str, int, ArchConfig] | None:
        """Action 3: the least important stage, by as many steps of its widths as it takes to save anything."""

        def importance(i: int) -> float:
            blocks = enumerate(arch.stages[i].blocks)
            return sum(math.exp(slot_score(self.log_odds[i, j])) for j, b in blocks if not isinstance(b, Identity))

        for i in sorted(range(len(arch.stages)), key=lambda i: (importance(i), i)):
            width = arch.stages[i].width
            for narrower in sorted((w for w in self.space.stages[i].widths if w < width), reverse=True):
                after = _with_width(arch, i, narrower)
                if saves(after):
                    return f"narrow stage {i + 1} from {width} to {narrower}", i, after
        return None

    def _swap(self, arch: ArchConfig, saves: _Saves) -> tuple[str, int, ArchConfig] | None:
        """Action 4: another candidate of the same form in the slot where the odds lose least by it."""
        ways = []
        for i, j in self.space.slots:
            block, choices = arch.stages[i].blocks[j], self.space.stages[i]
            if isinstance(block, Identity):
                continue
            odds, now = self.log_odds[i, j], choices.kind_of(block)
            others = [c for c in choices.candidates if c.tokens == block.tokens and not isinstance(c, Identity)]
            ways += [(odds[now] - odds[kind], i, j, now, kind) for kind in map(choices.kind_of, others) if kind != now]
        for _, i, j, now, kind in sorted(ways):
            after = _with_block(arch, i, j, self.space.stages[i].candidate(kind, arch.stages[i].width))
            if saves(after):
                return f"{now} to {kind} in slot {j + 1} of stage {i + 1}", i, after
        return None

    def landing(self, begin: ArchConfig, steps: Sequence[Step]) -> list[Option]:
        """Return the ways that were tried from the loop's end to a network near under the target, the best first.

        Where there is none, to the slowest one under the target, if it is better than the loop's end.
        """
        end = steps[-1].taken
        slowest = (end.ms, end.arch)
        latest: dict[tuple[tuple[str, ...], ...], ArchConfig] = {}  # a step that narrows has its predecessor's blocks
        for arch in [step.taken.arch for step in reversed(steps)] + [begin]:
            latest.setdefault(_kinds(arch), arch)
        near: list[tuple[float, float, tuple[int, ...], ArchConfig]] = []
        groups = 0
        for blocks_of in latest.values():
            found = []
            for widths in itertools.product(*(stage.widths for stage in self.space.stages)):
                arch = _with_widths(blocks_of, widths)
                ms = self.table.predict_ms(arch)
                if (1 - self.within) * self.target.ms <= ms <= self.target.ms:
                    change = sum(abs(w - n) / n for w, n in zip(widths, end.arch.widths, strict=True))
                    found.append((change, -ms, widths, arch))
                elif slowest[0] < ms <= self.target.ms:
                    slowest = (ms, arch)
            near += sorted(found, key=lambda item: item[:3])[:LANDING_TRIES]
            groups += bool(found)
            if groups == LANDING_BLOCKS:
                break
        if near:
            near.sort(key=lambda item: (self._charge(self.evaluate(item[3])), *item[:2]))
            return [self._land(end, item[3]) for item in near]
        _, arch = slowest
        if arch is not end.arch and self._charge(self.evaluate(arch)) < self._charge(end.evaluation):
            return [self._land(end, arch)]
        return []

    def _land(self, end: Option, arch: ArchConfig) -> Option:
        changes = [
            f"stage {i + 1} {a.width} to {b.width}"
            for i, (a, b) in enumerate(zip(end.arch.stages, arch.stages, strict=True))
            if a.width != b.width
        ]
        pairs = zip(_kinds(end.arch), _kinds(arch), strict=True)
        if changed := sum(a != b for before, after in pairs for a, b in zip(before, after, strict=True)):
            changes.insert(0, f"{changed} block{'s' if changed > 1 else ''} back")
        ms = self.table.predict_ms(arch)
        return Option(f"land: {', '.join(changes)}", -1, arch, ms, end.ms - ms, self.evaluate(arch), math.nan)


def _kinds(arch: ArchConfig) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(label(block) for block in stage.blocks) for stage in arch.stages)


def _with_stage(arch: ArchConfig, i: int, stage: Stage) -> ArchConfig:
    return replace(arch, stages=(*arch.stages[:i], stage, *arch.stages[i + 1 :]))


def _with_block(arch: ArchConfig, i: int, j: int, block: Block) -> ArchConfig:
    blocks = arch.stages[i].blocks
    return _with_stage(arch, i, replace(arch.stages[i], blocks=(*blocks[:j], block, *blocks[j + 1 :])))


def _with_width(arch: ArchConfig, i: int, width: int) -> ArchConfig:
    blocks = tuple(at_width(block, width) for block in arch.stages[i].blocks)
    return _with_stage(arch, i, replace(arch.stages[i], width=width, blocks=blocks))


def _with_widths(arch: ArchConfig, widths: Sequence[int]) -> ArchConfig:
    for i, width in enumerate(widths):
        arch = _with_width(arch, i, width)
    return arch
