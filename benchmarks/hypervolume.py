"""Fronts of loss and latency: hypervolume over networks evaluated, of the exact solver and of Optuna, side by side.

    python benchmarks/hypervolume.py --run runs/mine --evaluations 400
    python benchmarks/hypervolume.py --table my-cpu.csv --space efficientformer-tiny --additive

With --run, networks are evaluated by the supernet of a search that ended, or was stopped once its supernet was trained; with
--additive, by the sum of its drops (without a run: of made-up ones), for which the exact front cannot be beaten. What the
solver needs, the drops of all single changes, is evaluated too: it counts for `exact` and for `seeded` (Optuna after the drops
and some networks of the exact front), and `cold` is Optuna alone. The hypervolume is that of all networks evaluated so far that
keep the target, as a share of the rectangle between the reference (the target; the loss of guessing, or of the smallest
network) and the ideal (the latency of the smallest network; the least loss that any method found). Killed, it goes on with the
same command.
"""

import argparse
import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from optuna.storages import InMemoryStorage
from studies import Run

from nas.alone import alone
from nas.judging import evaluator_of
from nas.kept import Remembered, described
from nas.progress import progress
from nas.proposals import SamplerName
from nas.recovery import Recovered
from nas.scores import Drops, measure_drops, single_changes
from nas.slimming import start_network
from nas.solver import frontier
from nas.supernet_training import logits_of
from nas.table import LatencyTable
from nas.trajectory import Evaluation
from nas.tuning import tune
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.files import write_atomically
from supernet.space import SearchSpace

Point = tuple[float, float]  # milliseconds, loss


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Return the area that the points dominate: all that is at least as slow and as lossy as one of them, up to the reference.

    Two objectives, both minimised (Zitzler & Thiele, 1999): from the fastest point on, each that has a lower loss than those
    before it adds a rectangle, from its milliseconds to the reference's and from its loss to the least before it.
    """
    area, least = 0.0, reference[1]
    for ms, loss in sorted(points):
        if ms < reference[0] and loss < least:
            area += (reference[0] - ms) * (least - loss)
            least = loss
    return area


def coarse_to_fine(networks: Sequence[ArchConfig]) -> list[ArchConfig]:
    """Return the networks of a front so that the first ones, however many, are spread over it: ends, middle, quarters."""
    order, gaps = [0, len(networks) - 1], [(0, len(networks) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return [networks[at] for at in dict.fromkeys(order)]


def made_up(space: SearchSpace, seed: int) -> Callable[[ArchConfig], Evaluation]:
    """Return an additive loss: each slot's candidates against identity, and narrow stages, cost what the seed says."""

    def share(*place: object) -> float:
        digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
        return 0.5 + int.from_bytes(digest[:4], "big") / (1 << 32)

    def evaluate(arch: ArchConfig) -> Evaluation:
        loss = 0.5
        for i, (stage, choices) in enumerate(zip(space.fit(arch).stages, space.stages, strict=True)):
            loss += 0.6 * (1 - stage.width / choices.widths[-1]) * share(i)
            for j, block in enumerate(stage.blocks):
                kind = choices.kind_of(block)
                loss += (0.2 if kind == "identity" else 0.1 if kind == choices.kinds[0] else 0.03) * share(i, j, kind)
        return Evaluation(loss)

    return evaluate


def of_run(run: Run) -> tuple[SearchSpace, LatencyTable, Drops, Callable[[ArchConfig], Evaluation]]:
    """Return the space of a run, its table, its drops, and how its supernet does on a network."""
    space, settings, seed, folder = run.space, run.settings, run.seed, run.folder
    supernet, data = run.supernet()
    logits = logits_of(supernet, settings)
    base = space.largest if logits is None else start_network(space, logits)
    kept, of_search = folder / "hypervolume-evaluations.csv", folder / "evaluations.csv"
    if of_search.exists() and not kept.exists():  # the search evaluated in the same way
        write_atomically(kept, of_search.read_text())
    evaluator = evaluator_of(supernet, base, data, settings, folder)
    evaluate = Remembered(Recovered(evaluator, data, settings, seed) if settings.recovery_steps else evaluator, kept)
    if (folder / "drops.csv").exists():
        drops = replace(Drops.load(folder / "drops.csv", space), pairs={})  # whose evaluations are not counted
    else:
        with progress("drops of single changes", len(single_changes(space, base)) + 1) as tick:
            drops = measure_drops(space, base, evaluate, tick)
    return space, LatencyTable.load(run.table).calibrated_for(space), drops, evaluate


class Recorded:
    """An evaluator that notes what it was asked, each network once, in order."""

    def __init__(self, evaluate: Callable[[ArchConfig], Evaluation], table: LatencyTable, ignored: ArchConfig) -> None:
        self.evaluate = evaluate
        self.table = table
        self.ignored = described(ignored)
        self.points: dict[str, Point] = {}

    def __call__(self, arch: ArchConfig) -> Evaluation:
        found = self.evaluate(arch)
        if described(arch) != self.ignored:  # where the trajectory begins: none of the search's candidates
            self.points.setdefault(described(arch), (self.table.predict_ms(arch), found.loss))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the folder of a nas-search")
    parser.add_argument("--table", help="a latency table: a file or a device's id (without --run)")
    parser.add_argument("--space", default="efficientformer-tiny", help="(without --run)")
    parser.add_argument("--additive", action="store_true", help="evaluate by the sum of the drops")
    parser.add_argument("--target-ms", type=float, help="default: halfway from the smallest network to the largest")
    parser.add_argument("--evaluations", type=int, default=300, help="of each method")
    parser.add_argument("--known", type=int, default=20, help="networks of the exact front that Optuna is seeded with")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    run = Run.read(given.run) if given.run is not None else None
    with alone(run.folder) if run is not None else nullcontext():
        compare(given, run)


def compare(given: argparse.Namespace, run: Run | None) -> None:
    """Evaluate networks as each method chooses them, and print how the hypervolumes grow."""
    if run is not None:
        space, table, drops, evaluate = of_run(run)
    elif given.table is not None and given.additive:
        space = SearchSpace.load(given.space)
        table = LatencyTable.load(given.table).calibrated_for(space)
        evaluate = made_up(space, given.seed)
        drops = measure_drops(space, space.largest, evaluate)
    else:
        raise InputError("give --run RUN, or --table FILE and --additive")
    if given.additive:
        evaluate = drops.evaluation_for
    smallest_ms, largest_ms = table.predict_ms(space.smallest), table.predict_ms(drops.base)
    target_ms = given.target_ms or (smallest_ms + largest_ms) / 2
    front = coarse_to_fine(frontier(space, drops, table, target_ms))
    paid = Recorded(evaluate, table, drops.base)
    with progress("drops of single changes", len(drops.singles)) as tick:
        measure_drops(space, drops.base, paid, tick)

    histories: dict[str, list[Point]] = {}
    exact = Recorded(evaluate, table, drops.base)
    exact.points.update(paid.points)
    with progress("exact", len(front)) as tick:
        for arch in front:
            if len(exact.points) < given.evaluations:
                exact(arch)
            tick(1)
    histories["exact"] = list(exact.points.values())
    samplers: tuple[SamplerName, ...] = ("tpe", "nsga2")
    for sampler in samplers:
        for way in ("cold", "seeded"):
            asked = Recorded(evaluate, table, drops.base)
            if way == "seeded":
                asked.points.update(paid.points)
            tune(
                space,
                asked,
                table,
                target_ms,
                drops.base,
                study_name=f"{sampler} {way}",
                storage=InMemoryStorage(),
                sampler=sampler,
                trials=max(given.evaluations - len(asked.points), 1),
                seed=given.seed,
                known=front[: given.known] if way == "seeded" else (),
                front=True,
            )
            histories[f"{sampler} {way}"] = list(asked.points.values())

    under = [point for points in histories.values() for point in points if point[0] <= target_ms]
    guessing = math.log(space.num_classes) if given.run is not None and not given.additive else evaluate(space.smallest).loss
    reference, ideal = (target_ms, guessing), (smallest_ms, min(loss for _, loss in under))
    whole = (reference[0] - ideal[0]) * (reference[1] - ideal[1])
    print(
        f"{space.name} on {table.device}, at most {target_ms:.4g} ms, reference loss {guessing:.4g}, least {ideal[1]:.4g}, ",
        end="",
    )
    print(f"seed {given.seed}, {'additive' if given.additive else 'supernet'}")
    print(f"drops: {len(paid.points)} networks (+ the base); exact front: {len(front)} networks, {given.known} of them seeds")
    print(f"| networks evaluated | {' | '.join(histories)} |")
    print("|---" * (1 + len(histories)) + "|")
    marks = {step * 10**power for power in range(1, 5) for step in (1, 2, 5)} | {len(paid.points), given.evaluations}
    for count in sorted(mark for mark in marks if mark <= given.evaluations):
        cells = []
        for points in histories.values():
            share = hypervolume([p for p in points[:count] if p[0] <= target_ms], reference) / whole
            cells.append(f"{share:.3f}")
        print(f"| {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
