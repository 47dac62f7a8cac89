"""Is the exact frontier exact, how long does it take, and what does the greedy loop give away?

    python benchmarks/solver.py --table latency_tables/<id>.csv --space efficientformer-s

Prints, in one run: the processor time of 30 slots with 10 options under one and two budgets, and of the whole frontier of the
space; over `--instances` instances of it, half of them with random drops and half with drops like those of a run (or, with
`--drops RUN/drops.csv`, with those and their random multiples), how many answers equal those of scipy's `milp`, whose networks'
losses are computed anew; and the gap of the greedy loop with the same drops as its evaluation.

A gap is a share of what can be gained: (the loss that greedy ends with - the exact least loss) / (the loss of the
smallest network of the space - the exact least loss), all of them as the drops predict. Where nothing can be gained, there is
none.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from nas.knapsack import Answer, cheapest, multiple_choice, trade_offs
from nas.progress import progress
from nas.scores import Change, Drop, Drops, single_changes
from nas.slimming import slim
from nas.solver import Budget, best, solutions
from nas.table import LatencyTable
from nas.trajectory import Evaluation
from supernet.arch import ArchConfig
from supernet.entries import placed_entry
from supernet.errors import InputError
from supernet.space import SearchSpace
from supernet.specs import Flat, Head, Layer, PatchStem, Unflat

OFF = 1e-6  # how far a budget is from where the answer changes, at least, in ms: milp keeps its constraints to about 1e-7


def milp_choices(loss: np.ndarray, costs: np.ndarray, limits: np.ndarray) -> float | None:
    """Return the least loss of a plain multiple-choice knapsack, computed anew from milp's rounded choice; None: infeasible.

    `loss` (slots, options), `costs` (slots, options, budgets), `limits` (budgets).
    """
    slots, options = loss.shape
    one_each = np.kron(np.eye(slots), np.ones(options))
    within = costs.reshape(-1, len(limits)).T
    found = milp(
        loss.ravel(),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(within, -np.inf, limits)],
        integrality=np.ones(loss.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        return None
    chosen = found.x.reshape(slots, options).argmax(axis=1)
    return float(loss[np.arange(slots), chosen].sum())


def milp_network(space: SearchSpace, drops: Drops, budgets: list[tuple[Callable[[Layer], float], float]]) -> ArchConfig | None:
    """Return the network with the least predicted loss that keeps the budgets, by an integer program of its own: a variable
    for each pair of widths of adjacent stages, for each width and kind of each slot, and for each width at which a stage has
    token blocks. None where there is none.

    `budgets`: what a layer counts, and how much all of them may.
    """
    index: dict[tuple[object, ...], int] = {}
    objective: list[float] = []
    layers: list[dict[Layer, int]] = []  # of each variable, with their number

    def variable(key: tuple[object, ...], loss: float, *counted: tuple[Layer, int]) -> None:
        index[key] = len(objective)
        objective.append(loss)
        layers.append(dict(counted))

    def drop(stage: int, slot: int | None, option: int | str) -> float:
        change = Change(stage, slot, option)
        return drops.singles[change].drop_loss if change in drops.singles else 0.0

    rows: list[tuple[dict[int, float], float, float]] = []
    sides = (space.image_size, *space.resolutions)
    in_class_tokens = isinstance(space.stages[0].entry, PatchStem)
    last = len(space.stages) - 1

    def head(width: int, tokens: bool) -> Layer:
        return Layer(Head(width, space.num_classes, tokens, space.head), sides[-1])

    for i, stage in enumerate(space.stages):
        for width in stage.widths:
            for before in space.stages[i - 1].widths if i else [None]:
                entry = Layer(placed_entry(stage.entry, width, before, stage.stride), sides[i])
                ends = [(head(width, in_class_tokens), 1)] if i == last else []
                variable(("width", i, before, width), drop(i, None, width), (entry, 1), *ends)
            for j in range(stage.depth):
                for kind in stage.kinds:
                    block = Layer(stage.candidate(kind, width), sides[i + 1])
                    variable(("slot", i, j, width, kind), drop(i, j, kind), *([(block, 1)] if kind != "identity" else []))
            if not in_class_tokens and any(c.tokens for c in stage.candidates):
                begun = {Layer(Flat(width), sides[i + 1]): 1}
                after = {head(width, True): 1, head(width, False): -1} if i == last else {Layer(Unflat(width), sides[i + 1]): 1}
                variable(("tokens", i, width), 0.0, *begun.items(), *after.items())
    for i, stage in enumerate(space.stages):
        tokens = [k for k, c in zip(stage.kinds, stage.candidates, strict=True) if c.tokens]
        maps = [k for k in stage.kinds if k not in tokens and k != "identity"]
        for width in stage.widths:
            enters = {index["width", i, before, width]: 1.0 for before in (space.stages[i - 1].widths if i else [None])}
            if i < last:
                leaves = {index["width", i + 1, width, next_]: -1.0 for next_ in space.stages[i + 1].widths}
                rows.append(({**enters, **leaves}, 0, 0))
            for j in range(stage.depth):
                own = {index["slot", i, j, width, kind]: -1.0 for kind in stage.kinds}
                rows.append(({**enters, **own}, 0, 0))
            if ("tokens", i, width) in index:
                begun = index["tokens", i, width]
                all_tokens = [{index["slot", i, j, width, k]: -1.0 for k in tokens} for j in range(stage.depth)]
                rows += [({begun: 1.0, **each}, 0, np.inf) for each in all_tokens]
                rows.append(({begun: 1.0, **{at: v for each in all_tokens for at, v in each.items()}}, -np.inf, 0))
        for j in range(stage.depth):
            for later in range(j + 1, stage.depth):
                both = {index["slot", i, j, w, k]: 1.0 for w in stage.widths for k in tokens}
                both |= {index["slot", i, later, w, k]: 1.0 for w in stage.widths for k in maps}
                rows.append((both, 0, 1))
    rows.append(({index["width", 0, None, w]: 1.0 for w in space.stages[0].widths}, 1, 1))
    for count, limit in budgets:
        costs = {at: sum(n * count(layer) for layer, n in counted.items()) for at, counted in enumerate(layers)}
        rows.append((costs, -np.inf, limit))
    entries = [(row, at, value) for row, (terms, _, _) in enumerate(rows) for at, value in terms.items()]
    row, at, value = zip(*entries, strict=True)
    matrix = coo_array((value, (row, at)), shape=(len(rows), len(objective))).tocsr()
    found = milp(
        np.array(objective),
        constraints=LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows]),
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        return None
    widths: list[int] = []
    kinds: list[list[str]] = []
    for i, stage in enumerate(space.stages):
        near = widths[-1] if i else None
        widths.append(max(stage.widths, key=lambda w: found.x[index["width", i, near, w]]))
        kinds.append([max(stage.kinds, key=lambda k: found.x[index["slot", i, j, widths[i], k]]) for j in range(stage.depth)])
    return space.arch(widths, kinds)


def counted_ms(space: SearchSpace, table: LatencyTable, target_ms: float) -> tuple[Callable[[Layer], float], float]:
    """Return what a layer counts of the table's milliseconds, by the space's calibration, and what all of them may."""
    (calibration,) = table.calibrated_for(space).calibrations

    def count(layer: Layer) -> float:
        return table.layer_ms(layer) * calibration.slope_of(layer)

    return count, calibration.line_of(target_ms)


def made_up_drops(space: SearchSpace, seed: int, like_a_run: bool) -> Drops:
    """Return drops of the largest network: uniform over all options, or like those that a trained supernet has: an emptied slot
    costs more than another kind, later slots of a stage less, a width more the narrower it is, and some drops are negative."""
    rng = random.Random(seed)
    base = space.largest
    singles = {}
    for change in single_changes(space, base):
        drop = rng.random()
        if like_a_run and change.slot is None:
            drop = rng.gauss(1.0, 0.2) * (space.stages[change.stage].widths[-1] / int(change.option) - 1)
        elif like_a_run:
            empty = 1.0 if change.option == "identity" else 0.5
            drop = 0.2 * empty * (rng.lognormvariate(0, 1) / (1 + (change.slot or 0)) - 0.1)
        singles[change] = Drop(drop, 0.0, 0.0, 0.0)
    return Drops(space, base, Evaluation(1.0, 0.5), singles, {})


def varied(drops: Drops, seed: int) -> Drops:
    """Return drops of a run, each times a number from 0.5 to 2 of its own; seed 0: as they are."""
    rng = random.Random(seed)
    factors = {change: 2 ** rng.uniform(-1, 1) if seed else 1.0 for change in drops.singles}
    singles = {change: drop._replace(drop_loss=factors[change] * drop.drop_loss) for change, drop in drops.singles.items()}
    return Drops(drops.space, drops.base, drops.evaluation, singles, {})


def seconds(work: Callable[[], object]) -> float:
    """Return the processor seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def times(repeats: int) -> None:
    for name in ("random losses", "losses that grow as costs fall"):
        for budgets in (1, 2):
            exact, front, unproven = [], [], 0
            for seed in range(repeats):
                rng = np.random.default_rng(seed)
                costs = rng.uniform(size=(30, 10, budgets))
                loss = rng.uniform(size=(30, 10))
                if name != "random losses":
                    loss = 0.5 * loss + 1 - costs.mean(axis=2)
                middle = rng.integers(0, 10, 30)
                limits = [float(limit) for limit in costs[np.arange(30), middle].sum(axis=0)]
                steps = multiple_choice(loss, costs)
                answers: list[Answer] = []
                exact.append(seconds(lambda: answers.extend(cheapest(steps, limits))))  # noqa: B023
                front.append(seconds(lambda: answers.extend(trade_offs(steps, limits))))  # noqa: B023
                unproven += any(answer.gap > 0 for answer in answers)
            print(
                f"30 slots, 10 options, {name}, {budgets} budget{'s' * (budgets > 1)}: the best in at most {max(exact):.2f} s, "
                f"its frontier in at most {max(front):.2f} s ({repeats} instances, {unproven} not proven)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, help="a table's CSV file or device id, with a calibration of the space")
    parser.add_argument("--space", default="efficientformer-s")
    parser.add_argument("--drops", type=Path, help="drops.csv of a run of the space")
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=10, help="instances of 30 slots and 10 options")
    given = parser.parse_args()
    space = SearchSpace.load(given.space)
    table = LatencyTable.load(given.table).calibrated_for(space)
    if not table.calibrations:
        raise InputError(f"the table {given.table} has no calibration of {space.name}: nas-build-lut --space {space.name}")
    measured = Drops.load(given.drops, space) if given.drops else None
    times(given.repeats)

    spent, sizes, equal, two = [], [], 0, []
    gaps: dict[bool, list[float]] = {False: [], True: []}
    with progress("instances", given.instances) as tick:
        for seed in range(given.instances):
            like_a_run = seed % 2 == 1
            drops = varied(measured, seed // 2) if measured and like_a_run else made_up_drops(space, seed, like_a_run)
            frontier = []
            spent.append(seconds(lambda: frontier.extend(solutions(space, drops, table))))  # noqa: B023
            sizes.append(len(frontier))
            low, high = table.predict_ms(space.smallest), frontier[-1].ms
            target_ms, found = off_the_answers(space, drops, table, random.Random(seed), low, high)
            arch = milp_network(space, drops, [counted_ms(space, table, target_ms)])
            loss = drops.sum_for(arch) if arch is not None else None
            same = loss is not None and abs(loss - found) < 1e-9
            equal += same
            if not same:
                print(f"instance {seed}: milp {loss}, exact {found}, at most {target_ms!r} ms", file=sys.stderr)
            greedy = slim(space, drops.importance(), drops.evaluation_for, table, target_ms, only_better=True)
            gain = drops.sum_for(space.smallest) - found
            if gain > 1e-9:
                gaps[like_a_run].append((greedy.evaluation.loss - found) / gain)
            if seed < given.repeats:
                params = Budget.params(0.8 * count_params(best(space, drops, table, target_ms)[0].arch))
                two.append(seconds(lambda: solutions(space, drops, table, [target_ms, params])))  # noqa: B023
            tick(1)
    print(
        f"whole frontier of {space.name} on {table.device}: {np.median(spent):.2f} s, at most {max(spent):.2f} s, of "
        f"{min(sizes)} to {max(sizes)} networks; with a second budget, parameters, at most {max(two):.2f} s"
    )
    print(f"equal to milp: {equal} of {given.instances}")
    for like_a_run, part in gaps.items():
        if not part:
            continue
        name = "random drops" if not like_a_run else "a run's drops" if measured else "drops like a run's"
        median, tenth, largest = (100 * np.quantile(part, q) for q in (0.5, 0.9, 1.0))
        print(
            f"greedy's gap, {name}, as a share of what the exact answer gains over the smallest network: "
            f"median {median:.1f} %, p90 {tenth:.1f} %, max {largest:.1f} %; "
            f"better than exact in {sum(gap < -1e-9 for gap in part)} of {len(part)}"
        )


def count_params(arch: ArchConfig) -> int:
    from supernet.model import count

    return count(arch).params


def off_the_answers(
    space: SearchSpace, drops: Drops, table: LatencyTable, rng: random.Random, low: float, high: float
) -> tuple[float, float]:
    """Return a random target (ms) near which the answer does not change, and the least loss."""
    while True:
        target_ms = rng.uniform(low + 2 * OFF, high)
        below, above = (best(space, drops, table, target_ms + off)[0].loss for off in (-OFF, OFF))
        if below == above:
            return target_ms, below


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
