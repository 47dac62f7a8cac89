"""The slimming loop: blocks and width are removed by accuracy drop per millisecond until the target is met. No torch.

Beside the milliseconds there may be hard limits, and the drop may be charged to size and latency together (MES).

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
  is taken, though it may be worse than the loop's end, by much where narrow stages do badly with inherited weights;
  unless `only_better` is asked for: then the loop's end stands before a network that is slower and worse. Where
  there is none, the slowest network under the target is taken, if it is better than the loop's end.

*Limits* (`Limit`: parameters, MACs) are ours. The loop goes on until the target and all of them are met. An action's gain is
the milliseconds that it saves while the target is not met, and for each limit that is not met yet the share of it that is
saved, times the target: saving a tenth of a limit counts like saving a tenth of the target. So what saves parameters and no
time is offered while it is the parameters that are too many. The score is the drop per gain. No action may break what is met
already; landing keeps to the limits, and is left out where one of them is as near as it would land.

*MES* (`MobileEfficiency`; EfficientFormerV2, Li et al., ICCV 2023, section 3.3): an action's gain is the rise in the mobile
efficiency score, and its score the drop per gain. Here the source evaluates every single action (its frontier), not one of
each type, and so does the loop: every slot emptied, every stage narrowed by one step, every block by every other candidate of
its form (a lower expansion); and the earliest token block turned into one on maps. Importance only says where to start.
Target, limits and landing are the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from nas.table import Target
from nas.trajectory import Evaluation, Limit, NothingFits, Option, Predictor, Score, Step, Trajectory, evaluate_all
from supernet.arch import ArchConfig, Stage
from supernet.errors import InputError, unknown
from supernet.space import SearchSpace
from supernet.specs import Block, Identity, at_width, label

MIN_SAVING = 0.001  # of the target
LANDING = 0.03  # under the target
LANDING_TRIES = 6  # networks of the same blocks that are evaluated to choose where to land ...
LANDING_BLOCKS = 3  # ... of the blocks of so many steps
MOST_LOG_ODDS = 700.0  # of a slot, beyond which its odds are no finite number

Importance = Sequence[Mapping[str, float]]  # for every slot of the space: log-odds of each kind against identity

_Offer = tuple[str, int, ArchConfig]  # what is done, in which stage, what it leads to
_Places = Iterator[list[_Offer]]  # where an action may be taken, the best first; in each place ways, the mildest first


@dataclass(frozen=True)
class MobileEfficiency:
    """The mobile efficiency score: 100 (params / size_unit)^-size_alpha (ms / latency_unit_ms)^-latency_alpha.

    `params`: a network to its parameters. The constants are EfficientFormerV2's as we have them, second-hand, for milliseconds
    on an iPhone 12.
    """

    params: Callable[[ArchConfig], float]
    size_unit: float = 3e6
    latency_unit_ms: float = 1.0
    size_alpha: float = 0.5
    latency_alpha: float = 1.0

    def of(self, params: float, ms: float) -> float:
        size, latency = params / self.size_unit, ms / self.latency_unit_ms
        return float(100 * size**-self.size_alpha * latency**-self.latency_alpha)

    def __call__(self, arch: ArchConfig, ms: float) -> float:
        return self.of(self.params(arch), ms)


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
    only_better: bool = False,
    limits: Sequence[Limit] = (),
    mes: MobileEfficiency | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Trajectory:
    """Return the loop's way from the largest network to one of at most `budget` milliseconds, and within the limits.

    Args:
        importance: for every slot of `space.slots`, each kind's log-odds against identity.
        evaluate: a network to its loss, or to its loss and accuracy. What is compared is asked for at once (`evaluations`).
        table: anything with `predict_ms(arch)`.
        budget: milliseconds.
        score: what a step is charged for: the rise in loss, or the drop in accuracy.
        start: a trajectory to go on from, for a tighter budget; its steps are kept, its landing is undone.
        landing: how far under the budget the end may lie, as a fraction of it, where networks are nearer.
        only_better: land only at a network that is no worse than the loop's end, and so perhaps farther under the budget.
        limits: what the network must keep beside the budget.
        mes: charge drops per gain of this score, over all single actions, instead of per millisecond saved.
        on_step: called after each step.

    Raises:
        NothingFits: the budget or a limit is below the smallest network of the space, or no action leads there.
        InputError: the budget is not positive; or `evaluate` gives no finite number for what is charged, or the importance is
            not of the space.
    """
    target = budget if isinstance(budget, Target) else Target(budget)
    if score not in get_args(Score):
        raise unknown("score", score, get_args(Score))
    check_importance(space, importance)
    run = _Run(space, importance, evaluate, table, target, score, landing, limits, mes)
    smallest_ms = table.predict_ms(space.smallest)
    if target.ms < smallest_ms:
        raise NothingFits(
            f"the target of {target.ms:g} ms is below the smallest network of {space.name}, at which slimming ends: "
            f"give at least {rounded_up(smallest_ms)} ms"
        )
    check_limits(space, limits)
    arch = start_network(space, importance) if start is None else start.start
    begin = arch
    steps: list[Step] = []
    if start is not None:
        steps = [step for step in start.steps if not step.taken.lands]
        if steps:
            arch = steps[-1].taken.arch
    ms, evaluation = table.predict_ms(arch), run.evaluate(arch)
    while ms > target.ms or run.unmet(arch):
        options = run.options(arch, ms, evaluation, MIN_SAVING) or run.options(arch, ms, evaluation, 0.0)
        if not options:
            missed = [f"{target.ms:g} ms"] if ms > target.ms else []
            missed += [f"{limit.at_most:.12g} {limit.name}" for limit in run.unmet(arch)]
            raise NothingFits(f"no action saves anything from {ms:.4g} ms on: give more than {' and '.join(missed)}")
        steps.append(Step(ms, evaluation, tuple(options), run.figures(arch, ms)))
        if on_step is not None:
            on_step(steps[-1])
        arch, ms, evaluation = steps[-1].taken.arch, steps[-1].taken.ms, steps[-1].taken.evaluation
    if steps and ms < (1 - landing) * target.ms and all(limit.is_met(arch, 1 - landing) for limit in limits):
        landed = run.landing(begin, steps)
        if landed and not (only_better and run.is_worse(landed[0].evaluation, evaluation)):
            steps.append(Step(ms, evaluation, tuple(landed), run.figures(arch, ms)))
            if on_step is not None:
                on_step(steps[-1])
            arch, ms, evaluation = landed[0].arch, landed[0].ms, landed[0].evaluation
    return Trajectory(begin, tuple(steps), arch, ms, evaluation)


def check_importance(space: SearchSpace, importance: Importance) -> None:
    """Refuse an importance that has not, for every slot of the space, a finite number for each kind but identity."""
    if len(importance) != len(space.slots):
        raise InputError(f"importance has {len(importance)} slots, but space {space.name} has {len(space.slots)}")
    for (i, j), odds in zip(space.slots, importance, strict=True):
        kinds = [kind for kind in space.stages[i].kinds if kind != "identity"]
        if set(odds) != set(kinds):
            raise InputError(
                f"importance must have {', '.join(kinds)} for slot {j + 1} of stage {i + 1} of space {space.name}, but has "
                f"{', '.join(map(str, odds)) or 'nothing'}"
            )
        for kind, value in odds.items():
            if not math.isfinite(value):
                raise InputError(f"importance must be finite, but is {value} for {kind} in slot {j + 1} of stage {i + 1}")


def start_network(space: SearchSpace, importance: Importance) -> ArchConfig:
    """Return the network that the loop starts from: largest widths, every slot at its best-scoring candidate."""
    by_slot = dict(zip(space.slots, importance, strict=True))
    kinds = [
        [max(by_slot[i, j], key=lambda kind: by_slot[i, j][kind]) for j in range(stage.depth)]
        for i, stage in enumerate(space.stages)
    ]
    return space.arch([stage.widths[-1] for stage in space.stages], kinds, f"{space.name}-start")


def check_limits(space: SearchSpace, limits: Sequence[Limit]) -> None:
    """Refuse a limit that the smallest network of the space does not keep, with the least that it can be."""
    for limit in limits:
        least = limit.of(space.smallest)
        if not least <= limit.at_most:
            raise NothingFits(
                f"at most {limit.at_most:.12g} {limit.name} is below the smallest network of {space.name}: give at least "
                f"{least:.12g}"
            )


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
        limits: Sequence[Limit],
        mes: MobileEfficiency | None,
    ) -> None:
        self.space = space
        self.log_odds = dict(zip(space.slots, importance, strict=True))
        self._evaluate = evaluate
        self._known: dict[ArchConfig, Evaluation] = {}
        self.table = table
        self.target = target
        self.score: Score = score
        self.within = within
        self.limits = limits
        self.mes = mes

    def evaluate(self, *archs: ArchConfig) -> Evaluation:
        """Evaluate networks, those that are not known yet at once; return the evaluation of the first."""
        new = [arch for arch in dict.fromkeys(archs) if arch not in self._known]
        for arch, found in zip(new, evaluate_all(self._evaluate, new), strict=True):
            evaluation = found if isinstance(found, Evaluation) else Evaluation(float(found))
            charged = evaluation.loss if self.score == "loss" else evaluation.accuracy
            if not math.isfinite(charged):
                raise InputError(f"slimming charges {self.score}, but evaluating {arch.name} gives {charged} for it")
            self._known[arch] = evaluation
        return self._known[archs[0]]

    def unmet(self, arch: ArchConfig) -> list[Limit]:
        return [limit for limit in self.limits if not limit.is_met(arch)]

    def figures(self, arch: ArchConfig, ms: float) -> dict[str, float]:
        """Return what the limits are about, and the MES, where there are any."""
        found = {limit.name: limit.of(arch) for limit in self.limits}
        return found if self.mes is None else {**found, "mes": self.mes(arch, ms)}

    def gain(self, arch: ArchConfig, ms: float, after: ArchConfig) -> float:
        """Return what an action gains towards what is not met yet, in milliseconds; or in MES. 0 where it would break what is
        met."""
        after_ms = self.table.predict_ms(after)
        if ms <= self.target.ms < after_ms:
            return 0.0
        unmet = self.unmet(arch)
        if any(limit not in unmet and not limit.is_met(after) for limit in self.limits):
            return 0.0
        if self.mes is not None:
            return self.mes(after, after_ms) - self.mes(arch, ms)
        gained = ms - after_ms if ms > self.target.ms else 0.0
        return gained + sum(self.target.ms * (limit.of(arch) - limit.of(after)) / limit.at_most for limit in unmet)

    def options(self, arch: ArchConfig, ms: float, before: Evaluation, least: float) -> list[Option]:
        """Return the actions that are offered, best first: each gains something, and at least the share `least` of the target
        (of the MES). One of each type; all of them where MES is what counts."""
        least_gain = least * (self.target.ms if self.mes is None else self.mes(arch, ms))

        def gains(after: ArchConfig) -> bool:
            gain = self.gain(arch, ms, after)
            return gain > 0 and gain >= least_gain

        offered: list[_Offer] = []
        for places in (self._empty_slot(arch), self._untoken(arch), self._narrow(arch), self._swap(arch)):
            mildest = (next((offer for offer in ways if gains(offer[2])), None) for ways in places)
            found = (offer for offer in mildest if offer is not None)
            offered += itertools.islice(found, None if self.mes is not None else 1)
        self.evaluate(arch, *(after for _, _, after in offered))
        options = [self._option(*offer, arch, ms, before) for offer in offered]
        return sorted(options, key=lambda option: (option.score, -option.gain, option.stage))

    def _option(self, action: str, stage: int, after: ArchConfig, arch: ArchConfig, ms: float, before: Evaluation) -> Option:
        after_ms, gain = self.table.predict_ms(after), self.gain(arch, ms, after)
        evaluation = self.evaluate(after)
        score = max(0.0, self._charge(evaluation) - self._charge(before)) / gain
        return Option(action, stage, after, after_ms, ms - after_ms, evaluation, score, gain, self.figures(after, after_ms))

    def is_worse(self, one: Evaluation, other: Evaluation) -> bool:
        return self._charge(one) > self._charge(other)

    def _charge(self, evaluation: Evaluation) -> float:
        return evaluation.charge(self.score)

    def _empty_slot(self, arch: ArchConfig) -> _Places:
        """Action 1: identity for the least important slot, the next one where that would not gain anything."""
        filled = [(i, j) for i, j in self.space.slots if not isinstance(arch.stages[i].blocks[j], Identity)]
        for i, j in sorted(filled, key=lambda at: (slot_score(self.log_odds[at]), at)):
            yield [(f"empty slot {j + 1} of stage {i + 1}", i, _with_block(arch, i, j, Identity(arch.stages[i].width)))]

    def _untoken(self, arch: ArchConfig) -> _Places:
        """Action 2: the earliest token block becomes a block on maps."""
        for i, j in self.space.slots:
            stage = arch.stages[i]
            if not stage.blocks[j].tokens:
                continue
            choices = self.space.stages[i]
            maps = [choices.kind_of(c) for c in choices.candidates if not c.tokens and not isinstance(c, Identity)]
            if not maps:
                continue  # another stage may have some
            kind = max(maps, key=lambda kind: self.log_odds[i, j][kind])
            after = _with_block(arch, i, j, choices.candidate(kind, stage.width))
            action = f"{choices.kind_of(stage.blocks[j])} to {kind} in slot {j + 1} of stage {i + 1}"
            yield [(action, i, after)]
            return

    def _narrow(self, arch: ArchConfig) -> _Places:
        """Action 3: the least important stage, by as many steps of its widths as it takes to gain anything."""

        def importance(i: int) -> float:
            blocks = enumerate(arch.stages[i].blocks)
            odds = (slot_score(self.log_odds[i, j]) for j, b in blocks if not isinstance(b, Identity))
            return sum(math.exp(min(score, MOST_LOG_ODDS)) for score in odds)

        for i in sorted(range(len(arch.stages)), key=lambda i: (importance(i), i)):
            width = arch.stages[i].width
            narrower = sorted((w for w in self.space.stages[i].widths if w < width), reverse=True)
            yield [(f"narrow stage {i + 1} from {width} to {w}", i, _with_width(arch, i, w)) for w in narrower]

    def _swap(self, arch: ArchConfig) -> _Places:
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
            yield [(f"{now} to {kind} in slot {j + 1} of stage {i + 1}", i, after)]

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
                elif slowest[0] < ms <= self.target.ms and not self.unmet(arch):
                    slowest = (ms, arch)
            nearest = (item for item in sorted(found, key=lambda item: item[:3]) if not self.unmet(item[3]))
            kept = list(itertools.islice(nearest, LANDING_TRIES))
            near += kept
            groups += bool(kept)
            if groups == LANDING_BLOCKS:
                break
        if near:
            self.evaluate(*(arch for *_, arch in near))
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
        action, evaluation, figures = f"land: {', '.join(changes)}", self.evaluate(arch), self.figures(arch, ms)
        return Option(action, -1, arch, ms, end.ms - ms, evaluation, math.nan, figures=figures, lands=True)


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
