"""How a network is chosen under the tables' word: the paper's loop, the exact frontier, or Optuna. No torch.

Each of them gets the same scores and budgets, and answers with a trajectory. Where the start network keeps the budgets, it is
the answer: nothing has to be taken away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nas.kept import described
from nas.progress import say
from nas.scores import Drop, Drops, Evaluate, single_changes
from nas.slimming import LANDING, Importance, MobileEfficiency, rounded_up, slim
from nas.solver import Budget, TooManyPairs, best, frontier, solutions
from nas.table import LatencyTable
from nas.trajectory import Evaluation, Limit, NothingFits, Option, Predictor, SamplerName, Score, Step, Trajectory, evaluate_all
from supernet.arch import ArchConfig, MultiplexSpec
from supernet.errors import InputError, unknown
from supernet.space import SearchSpace, space_names

SHORTLIST = 6  # networks, the best by the drops, that are evaluated as whole ones
STRATEGIES = ("greedy", "exact", "optuna")


@dataclass(frozen=True)
class Scores:
    """What a search knows of a space's networks: the one that it starts from, importance, drops of single changes, and what
    evaluates a whole network. `charged`: loss or accuracy."""

    space: SearchSpace
    start: ArchConfig
    importance: Importance
    drops: Drops
    evaluate: Evaluate
    charged: Score = "loss"

    def charge(self, evaluation: Evaluation) -> float:
        """Return what is to be small of a network."""
        return evaluation.charge(self.charged)

    @property
    def charged_drops(self) -> Drops:
        """The drops in what is charged: with `score: accuracy` their loss is the share of images that are wrong."""
        if self.charged == "loss":
            return self.drops

        def in_errors(drop: Drop) -> Drop:
            return drop._replace(drop_loss=drop.drop_accuracy, loss=1 - drop.accuracy)

        base = Evaluation(1 - self.drops.evaluation.accuracy, self.drops.evaluation.accuracy)
        singles = {change: in_errors(drop) for change, drop in self.drops.singles.items()}
        pairs = {pair: in_errors(drop) for pair, drop in self.drops.pairs.items()}
        return replace(self.drops, evaluation=base, singles=singles, pairs=pairs)

    @property
    def of_whole_networks(self) -> bool:
        """Whether whole networks are evaluated; in an answer by the drops alone, their sums stand in for that."""
        return self.evaluate != self.drops.evaluation_for

    def charge_of(self, found: Trajectory) -> float:
        return self.charge(found.evaluation)


@dataclass(frozen=True)
class Budgeted:
    """A device's table, what predicts a network's milliseconds there (the table, where images do not share passes), and how
    many there may be."""

    table: LatencyTable
    predictor: Predictor
    ms: float

    @property
    def device(self) -> str:
        return self.table.device

    def limit(self) -> Limit:
        return Limit(f"ms on {self.device}", self.predictor.predict_ms, self.ms)

    def budget(self) -> Budget:
        return Budget.milliseconds(self.table, self.ms)


def limits_of(space: SearchSpace, mux: MultiplexSpec | None, max_params: int, max_macs: int) -> list[Limit]:
    """Return the hard limits that are not 0, on the networks of the space with their images grouped by `mux`."""

    def counted(name: str) -> Callable[[ArchConfig], float]:
        def figure(arch: ArchConfig) -> float:
            from supernet.model import count  # with torch

            return float(getattr(count(space.multiplexed(arch, mux)), name))

        return figure

    return [Limit(name, counted(name), most) for name, most in (("params", max_params), ("macs", max_macs)) if most]


def no_drops(space: SearchSpace) -> Drops:
    """Return drops by which all networks of the space are equally good, for questions of latency alone."""
    changes = single_changes(space, space.largest)
    return Drops(space, space.largest, Evaluation(0.0, 0.0), dict.fromkeys(changes, Drop(0.0, 0.0, 0.0, 0.0)), {})


def fastest(space: SearchSpace, table: LatencyTable) -> ArchConfig | None:
    """Return the network of the space of which the table says the least; None where milliseconds are no sum over layers."""
    try:
        return frontier(space, no_drops(space), table)[0]
    except InputError:
        return None


def fastest_ms(space: SearchSpace, table: LatencyTable) -> float:
    """Return the least that the table says of a network of the space, milliseconds; of the smallest one where a network's
    milliseconds are no sum over its layers."""
    return table.predict_ms(fastest(space, table) or space.smallest)


def countable(space: SearchSpace, drops: Drops, table: LatencyTable) -> Drops:
    """Return the drops, without their pairs where these are more than the exact frontier can count, which is said."""
    if drops.pairs:
        try:
            solutions(space, drops, table)
        except TooManyPairs as error:
            say(f"warning: {error}: the search goes on without pairs (drop_pairs)")
            return replace(drops, pairs={})
    return drops


FRONTIER_COLUMNS = ("device", "ms", "loss", "gap", "network")


def frontier_records(space: SearchSpace, drops: Drops, tables: Sequence[LatencyTable]) -> Iterator[dict[str, object]]:
    """Yield the rows of `frontier.csv`: for each device, the networks that are the best by the drops for some latency there.

    None of a device where a network's milliseconds are no sum over its layers."""
    for table in tables:
        try:
            best_ones = solutions(space, drops, table)
        except InputError as error:
            say(f"no frontier on {table.device}: {error}")
            continue
        for found in best_ones:
            values = (table.device, found.ms, found.loss, found.gap, described(found.arch))
            yield dict(zip(FRONTIER_COLUMNS, values, strict=True))


def refuse_unreachable(space: SearchSpace, budgets: Sequence[Budgeted]) -> None:
    """Refuse targets that no network of the space meets by the tables, with the nearest that one does meet.

    Of several, the nearest are those of the network that is over its targets by the smallest factor.
    """
    for budget in budgets:
        least_ms = fastest_ms(space, budget.table)
        if budget.ms < least_ms:
            raise InputError(
                f"the target of {budget.ms:g} ms is below the fastest network of {space.name} on {budget.device}: give at "
                f"least {rounded_up(least_ms)} ms"
            )
    if len(budgets) == 1 or any(fastest(space, budget.table) is None for budget in budgets):
        return  # a search will tell
    nearest = space.smallest
    low, high = 1.0, max(budget.table.predict_ms(nearest) / budget.ms for budget in budgets)
    if high <= 1 or _within(space, budgets, 1.0) is not None:
        return
    while high > 1.0005 * low:
        middle = (low + high) / 2
        if (found := _within(space, budgets, middle)) is None:
            low = middle
        else:
            high, nearest = middle, found
    asked = " and ".join(f"{budget.ms:g} ms on {budget.device}" for budget in budgets)
    told = " and ".join(f"{rounded_up(budget.table.predict_ms(nearest))} ms on {budget.device}" for budget in budgets)
    raise InputError(f"no network of {space.name} takes at most {asked}: the nearest that one takes is {told}")


def _within(space: SearchSpace, budgets: Sequence[Budgeted], factor: float) -> ArchConfig | None:
    first, *others = (replace(budget, ms=factor * budget.ms) for budget in budgets)
    try:
        return best(space, no_drops(space), first.table, [first.ms, *(other.budget() for other in others)])[0].arch
    except InputError:
        return None


def check_strategy(strategy: str, objective: str) -> None:
    """Refuse a strategy that there is not, or that the objective does not have."""
    if strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    if strategy != "greedy" and objective != "latency":
        raise InputError(
            f"the objective {objective} is searched by the strategy greedy, not by {strategy}: leave one of them out"
        )


def greedy(
    scores: Scores,
    budgets: Sequence[Budgeted],
    limits: Sequence[Limit] = (),
    *,
    start: Trajectory | None = None,
    landing: float = LANDING,
    mes: MobileEfficiency | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Trajectory:
    """Return the paper's loop (`nas.slimming`): the first device's milliseconds are its target, the others' are limits.

    Args:
        start: what was found for looser budgets, to go on from.
        landing: how far under a budget the loop may end, as a fraction of it.
    """
    first, *others = budgets
    if start is None:
        ms = first.predictor.predict_ms(scores.start)
        start = Trajectory(scores.start, (), scores.start, ms, scores.evaluate(scores.start))
    return slim(
        scores.space,
        scores.importance,
        scores.evaluate,
        first.predictor,
        first.ms,
        score=scores.charged,
        start=start,
        landing=landing,
        only_better=True,
        limits=[*limits, *(budget.limit() for budget in others)],
        mes=mes,
        on_step=on_step,
    )


def exact(
    scores: Scores,
    budgets: Sequence[Budgeted],
    limits: Sequence[Limit] = (),
    evaluate: Callable[[ArchConfig], Evaluation | None] | None = None,
) -> Trajectory:
    """Return the best network that the drops admit within the budgets and limits (`nas.solver`).

    The drops need not add up to what a whole network loses. So the best few by them are evaluated as whole networks, and the
    best of those is the answer. Where `evaluate` says None of one of them, or is None itself, the best by the drops is.

    Raises:
        NothingFits: no network keeps budgets and limits.
        InputError: milliseconds are no sum over layers, or evaluating a network gives no finite number for what is charged.
    """
    space, begin = scores.space, scores.start
    first = budgets[0]
    keeps = all(b.predictor.predict_ms(begin) <= b.ms for b in budgets) and all(limit.is_met(begin) for limit in limits)
    ms = first.predictor.predict_ms(begin)
    at_start = (evaluate(begin) if evaluate is not None else None) or scores.drops.evaluation_for(begin)
    if keeps:
        return Trajectory(begin, (), begin, ms, at_start)
    within: list[float | Budget] = [
        first.ms,
        *(b.budget() for b in budgets[1:]),
        *(Budget(limit.name, limit.at_most) for limit in limits),
    ]
    beside = [*limits, *(budget.limit() for budget in budgets[1:])]
    found = best(space, scores.charged_drops, first.table, within, SHORTLIST)
    whole = evaluate_all(evaluate, [each.arch for each in found]) if evaluate is not None else [None] * len(found)
    known = [evaluation for evaluation in whole if evaluation is not None]
    all_known = len(known) == len(found)
    if not all_known:
        known = [scores.drops.evaluation_for(solution.arch) for solution in found]
    options = []
    for rank, (solution, evaluation) in enumerate(zip(found, known, strict=True), 1):
        action = f"number {rank} by the drops"
        figures = {limit.name: limit.of(solution.arch) for limit in beside}
        saved_ms = ms - solution.ms
        options.append(
            Option(action, -1, solution.arch, solution.ms, saved_ms, evaluation, math.nan, figures=figures, gap=solution.gap)
        )
    for option in options:
        if not math.isfinite(scores.charge(option.evaluation)):
            raise InputError(f"evaluating {option.arch.name} gives a {scores.charged} of {scores.charge(option.evaluation)}")
    if all_known:
        options.sort(key=lambda option: scores.charge(option.evaluation))
    step = Step(ms, at_start, tuple(options), {limit.name: limit.of(begin) for limit in beside})
    return Trajectory(begin, (step,), step.taken.arch, step.taken.ms, step.taken.evaluation)


@dataclass(frozen=True)
class Study:
    """An Optuna study: its name and storage, which sampler proposes, how many networks all its processes evaluate together."""

    name: str
    storage: str | Path
    sampler: SamplerName
    trials: int
    seed: int


def studied(scores: Scores, budgets: Sequence[Budgeted], limits: Sequence[Limit], study: Study) -> Trajectory:
    """Return the best network of an Optuna study (`nas.tuning`), whose first networks are the best few by the drops."""
    from nas.tuning import tune  # optuna takes a while to import

    first, *others = budgets
    return tune(
        scores.space,
        scores.evaluate,
        first.table,
        first.ms,
        scores.start,
        study_name=study.name,
        storage=study.storage,
        sampler=study.sampler,
        trials=study.trials,
        seed=study.seed,
        known=[option.arch for step in exact(scores, budgets, limits).steps for option in step.options],
        limits=[*limits, *(budget.limit() for budget in others)],
        score=scores.charged,
    )


def choose(
    strategy: str,
    scores: Scores,
    budgets: Sequence[Budgeted],
    limits: Sequence[Limit],
    *,
    start: Trajectory | None = None,
    landing: float = LANDING,
    mes: MobileEfficiency | None = None,
    study: Study | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Trajectory:
    """Return what a strategy finds within the budgets and limits; see `greedy`, `exact` and `studied`. `on_step`: called after
    each step of the loop.

    Where the loop cannot reach what some network keeps (no single action leads there), the best by the drops is taken.

    Raises:
        NothingFits: nothing is found.
        InputError: what the strategy refuses besides.
    """
    if strategy == "exact":
        found = exact(scores, budgets, limits, scores.evaluate)
        say_shortlist(found)
        return found
    if strategy == "optuna":
        assert study is not None, "optuna needs a study"
        return studied(scores, budgets, limits, study)
    try:
        return greedy(scores, budgets, limits, start=start, landing=landing, mes=mes, on_step=on_step)
    except NothingFits as error:
        if mes is not None or any(b.predictor is not b.table or fastest(scores.space, b.table) is None for b in budgets):
            raise  # there is no best by the drops
        try:
            found = exact(scores, budgets, limits, scores.evaluate)
        except NothingFits:
            raise error from None
        say(f"the loop does not reach it ({error}); the best by the drops does")
        if scores.of_whole_networks:
            say_shortlist(found)
        return found


def telling_steps() -> Callable[[Step], None]:
    """Return what says what a step of the loop did, and no step twice: under another budget the loop begins as before."""
    told: set[tuple[str, float]] = set()

    def tell(step: Step) -> None:
        taken = step.taken
        if (taken.action, step.ms) in told:
            return
        told.add((taken.action, step.ms))
        loss, after = step.evaluation.loss, taken.evaluation.loss
        of = f" (of {len(step.options)} actions)" if len(step.options) > 1 else ""
        say(f"{taken.action}: {step.ms:.4g} to {taken.ms:.4g} ms, loss {loss:.4f} to {after:.4f}{of}")

    return tell


def say_shortlist(found: Trajectory) -> None:
    """Say which of the best by the drops was the best as a whole network."""
    for step in found.steps:
        say(
            f"of the {len(step.options)} best by the drops, {step.taken.action} is the best as a whole network: "
            f"{step.ms:.4g} to {step.taken.ms:.4g} ms, loss {step.evaluation.loss:.4f} to {step.taken.evaluation.loss:.4f}"
        )


def exact_for(result: Mapping[str, Any]) -> str:
    """Return what the answer of the strategy exact is exact for, in one sentence, from a run's `result.json`."""
    found = result["additivity"]
    told = "was not checked"
    if found and found["r_squared"] is not None:
        told = f"is {found['r_squared']:.2f} on {found['networks']} random networks"
    proof = "exact" if not result.get("gap") else f"proven to {result['gap']:.3g} nats"
    return f"{proof} for the drops of changes, not for accuracy: how far they add up (R2) {told}"


def nothing_taken_away(space: SearchSpace, init: str | None) -> str:
    """Return what is said where the search's first network meets the target: the network `init` that it began with, or the
    largest one of the space."""
    if init is not None:
        return f"{init} meets the target as it is: nothing was taken away; give a lower --target-ms for less"
    larger = larger_space(space)
    advice = (
        f"for the rest of the time, try --space {larger}"
        if larger is not None
        else f"no larger space of its blocks ships for {space.image_size} px: for the rest of the time, give widths or depths "
        "more in a copy of its file"
    )
    return f"{space.name} at its largest widths, no slot empty, meets the target: nothing was taken away; {advice}"


def larger_space(space: SearchSpace) -> str | None:
    """Return the name of the next larger space that ships; None: there is none.

    A larger one has as many stages, each at least as wide and deep, and all of this one's kinds of block, and is for images of
    about this size (half to twice). One of the same kinds comes before others.
    """

    def extents(of: SearchSpace) -> list[int]:
        return [extent for stage in of.stages for extent in (stage.widths[-1], stage.depth)]

    def kinds(of: SearchSpace) -> set[str]:
        return {candidate.kind for stage in of.stages for candidate in stage.candidates}

    found = []
    for other in map(SearchSpace.load, space_names()):
        about = other.image_size / 2 <= space.image_size <= 2 * other.image_size
        pairs = list(zip(extents(space), extents(other), strict=False))
        holds = other.strides == space.strides and all(own <= theirs for own, theirs in pairs)
        if about and holds and kinds(space) <= kinds(other) and any(own < theirs for own, theirs in pairs):
            found.append((len(kinds(other)), extents(other), other.name))
    return min(found)[2] if found else None
