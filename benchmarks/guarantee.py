"""Does the tool keep its word? Targets over the whole range of a space, searched and measured, and measured again later.

    python benchmarks/guarantee.py --targets 30 --space efficientformer-tiny --out tiny.json
    python benchmarks/guarantee.py --again tiny.json

The search is the tool's own, by its strategy greedy or exact: under the table's word, measuring on this machine, repairing,
giving back what is left where a network that scores no worse is nearer. Only what a network is worth is made up (additive,
random), so that nothing has to be trained. The second command times the networks that were found by code of its own, from
ONNX files: in shuffled order, each in several processes that do nothing else (`one_session.py`), as where a session's memory
lies moves its times, and a process that has opened many sessions is slower. It prints them as they are; at the table's pace
as the tool has it, by a geometric mix of the two references' slowness to which those count most that leave the samples little
spread; and by the mean of both.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median, quantiles, stdev

import yaml

from nas.devices import open_profiler, profiler_of
from nas.guarantee import SLACK, Goal, Outcome, meet
from nas.measure import CACHED, STREAMING, Model, measure_alone, table_reference
from nas.profilers.ort_cpu import OrtCpu
from nas.progress import progress
from nas.scores import measure_drops
from nas.slimming import start_network
from nas.strategies import Budgeted, Scores, choose, fastest_ms
from nas.table import LatencyTable, Target
from nas.trajectory import Check, Evaluation, Trajectory
from supernet.arch import ArchConfig
from supernet.space import SearchSpace
from supernet.specs import Identity

SESSIONS, ROUNDS = 5, 3
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Worth:
    """A made-up loss: every block is worth something, a slot's kinds differ, and every doubling of a width helps."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        rng = random.Random(seed)
        self.space = space
        self.kinds = [{kind: rng.random() for kind in space.stages[i].kinds} for i, _ in space.slots]
        self.widths = [rng.random() for _ in space.stages]

    def __call__(self, arch: ArchConfig) -> Evaluation:
        loss = 3.0
        for (i, j), worth in zip(self.space.slots, self.kinds, strict=True):
            block = arch.stages[i].blocks[j]
            loss -= 0.0 if isinstance(block, Identity) else 0.1 * worth[block.kind]
        loss -= sum(
            0.2 * w * s.width / c.widths[-1] for w, s, c in zip(self.widths, arch.stages, self.space.stages, strict=True)
        )
        return Evaluation(loss, 0.0)

    @property
    def importance(self) -> list[dict[str, float]]:
        return [{kind: 2 * value - 1 for kind, value in worth.items() if kind != "identity"} for worth in self.kinds]


def search(space: SearchSpace, table: LatencyTable, target_ms: float, strategy: str, seed: int) -> Outcome:
    """Return what the tool finds for one target."""
    worth, profiler = Worth(space, seed), profiler_of(table)
    assert profiler is not None, f"{table.device} is not this machine"
    drops = measure_drops(space, space.largest, worth)
    scores = Scores(space, start_network(space, worth.importance), worth.importance, drops, worth)

    def within(budgets: tuple[float, ...], start: Trajectory | None, landing: float) -> Trajectory:
        return choose(strategy, scores, [Budgeted(table, table, budgets[0])], [], start=start, landing=landing)

    def check(arch: ArchConfig) -> Check:
        found = measure_alone(profiler, arch, table_reference(table))
        return Check(found.ms, found.low_ms, found.high_ms)

    goal = Goal(Target(target_ms), table.predict_ms, check, fastest_ms(space, table))
    return meet([goal], within, scores.charge_of)


def first(given: argparse.Namespace) -> None:
    space = SearchSpace.load(given.space)
    table = LatencyTable.load(given.table or open_profiler().id)
    table = table.calibrated_for(space)
    profiler = profiler_of(table)
    assert profiler is not None, f"{table.device} is not this machine"
    # From what the device, not the table alone, says that the smallest network needs.
    floor_ms = measure_alone(profiler, space.smallest, table_reference(table)).high_ms
    low, high = 1.02 * max(floor_ms, table.predict_ms(space.smallest)), table.predict_ms(space.largest)
    targets = [low + (high - low) * i / given.targets for i in range(given.targets)]
    found = []
    with progress("targets", len(targets)) as tick:
        for number, target_ms in enumerate(targets):
            outcome = search(space, table, target_ms, given.strategy, given.seed + number)
            arch = outcome.trajectory.arch.without_identity()
            predicted = table.predict_ms(arch)
            found.append(
                {
                    "target_ms": target_ms,
                    "predicted_ms": predicted,
                    "measured_ms": outcome.check.ms,
                    "high_ms": outcome.check.high_ms,
                    "measured_networks": outcome.measured,
                    "largest": not outcome.trajectory.steps,
                    "arch": arch.to_yaml(),
                }
            )
            tick(1)
    asked = {"table": str(given.table or table.device), "space": space.name, "strategy": given.strategy}
    record = {**asked, "at": time.time(), "found": found}
    given.out.write_text(json.dumps(record, indent=1))
    slack = [100 * (1 - f["high_ms"] / f["target_ms"]) for f in found]
    met = [s for s in slack if s >= 0]
    error = [100 * abs(f["predicted_ms"] / f["measured_ms"] - 1) for f in found]
    print(f"{table.device}, {space.name}, {given.strategy}: {len(found)} targets from {low:.3g} to {targets[-1]:.3g} ms")
    print(
        f"  upper end of the measured interval at or under the target: {len(met)} of {len(found)}"
        + (f", farthest over {-min(slack):.1f} %" if len(met) < len(found) else "")
    )
    if met:
        print(
            f"  slack of these: {mean(met):.2f} % on average, {max(met):.1f} % at most, at most {100 * SLACK:g} % in "
            f"{sum(s <= 100 * SLACK for s in met)}"
        )
    print(
        f"  networks measured a target: {mean(f['measured_networks'] for f in found):.2f}; the table's word was off by "
        f"{mean(error):.1f} % on average, {max(error):.1f} % at most"
    )


def again(given: argparse.Namespace) -> None:
    record = json.loads(given.again.read_text())
    table = LatencyTable.load(record["table"])
    profiler, reference = profiler_of(table), table_reference(table)
    assert isinstance(profiler, OrtCpu), f"{table.device} is not this machine's CPU"
    archs = [ArchConfig.from_dict(yaml.safe_load(f["arch"]), "a network") for f in record["found"]]

    rng = random.Random(0)
    raw: list[list[float]] = [[] for _ in archs]
    slowness: list[list[tuple[float, float]]] = [[] for _ in archs]
    with tempfile.TemporaryDirectory() as folder, progress("again", SESSIONS * len(archs)) as tick, profiler.exclusive():

        def file_of(name: str, model: Model) -> str:
            file = Path(folder) / f"{name}.onnx"
            file.write_bytes(profiler.onnx(model))
            return str(file)

        references = [file_of("cached", CACHED), file_of("streaming", STREAMING)]
        files = [file_of(str(number), tuple(arch.layers())) for number, arch in enumerate(archs)]
        settings = ["--threads", str(table.meta["threads"]), "--rounds", str(ROUNDS)]
        for _ in range(SESSIONS):
            for number in rng.sample(range(len(archs)), len(archs)):
                script = Path(__file__).with_name("one_session.py")
                command = [sys.executable, str(script), files[number], *references, *settings]
                told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                for line in told.splitlines():
                    ms, cached, streaming = map(float, line.split())
                    raw[number].append(ms)
                    slowness[number].append((cached / reference.cached_ms, streaming / reference.streaming_ms))
                tick(1)
    targets = [f["target_ms"] for f in record["found"]]

    def paced(number: int, share: float) -> list[float]:
        """The samples of a network with the streaming reference's slowness to the power of `share`, the other's to the rest."""
        return [ms / (c ** (1 - share) * s**share) for ms, (c, s) in zip(raw[number], slowness[number], strict=True)]

    def spread(sample: list[float]) -> float:
        low, middle, high = quantiles(sample, n=4)
        return (high - low) / middle

    def mixed(number: int) -> list[float]:
        """The samples by the mean of `SHARES`, weighted by the inverse squares of the spreads that they leave."""
        weights = [spread(paced(number, share)) ** -2 for share in SHARES]
        return paced(number, sum(w * share for w, share in zip(weights, SHARES, strict=True)) / sum(weights))

    numbers = range(len(archs))
    of_sessions = [[median(r[s * ROUNDS : (s + 1) * ROUNDS]) for s in range(SESSIONS)] for r in raw]
    spread_percent = median(100 * stdev(of_network) / mean(of_network) for of_network in of_sessions)
    print(f"one session of a network differs from another by {spread_percent:.1f} % (standard deviation, median over networks)")
    by_spread = [mixed(number) for number in numbers]
    both = [paced(number, 0.5) for number in numbers]
    for name, found in (("at the table's pace", by_spread), ("by the mean of both references", both), ("as it is", raw)):
        over = [100 * (median(s) / t - 1) for s, t in zip(found, targets, strict=True)]
        print(
            f"{table.device}, {record['space']}, {(time.time() - record['at']) / 60:.0f} min later, {name}: "
            f"{sum(o <= 1 for o in over)} of {len(over)} at most 1 % over the target, {sum(o <= 0 for o in over)} at or under "
            f"it; farthest over {max(over):+.1f} %, on average {mean(over):+.1f} %"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="efficientformer-tiny")
    parser.add_argument("--strategy", choices=("greedy", "exact"), default="greedy")
    parser.add_argument("--targets", type=int, default=30)
    parser.add_argument("--table", help="a CSV file or a device id (default: this machine's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("guarantee.json"))
    parser.add_argument("--again", type=Path, metavar="FILE", help="time what the first command found")
    given = parser.parse_args()
    if given.again is not None:
        again(given)
    else:
        first(given)


if __name__ == "__main__":
    main()
