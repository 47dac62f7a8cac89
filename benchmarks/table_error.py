"""How true are this machine's latency tables? Prediction against measurement on random networks that no calibration saw.

    python benchmarks/table_error.py --space efficientformer-s --networks 100

The networks are drawn evenly from ten equal bins of predicted latency. Beside the table stand what naive tables would say, in
the same run: the sum of every layer timed alone in its own session (the median of many calls), calibrated the same way and not
at all; and the sum of single calls of every layer, the first of its session. All of them are at the pace that the machine
had when the table was built, as the references tell it.

The networks that the table was calibrated on are timed again in the same rounds. How far they are from what they took then is
what the machine has changed by since, beside the references; and the table's rows, calibrated on what they take now, are what a
table built in this very hour would say.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nas.calibration import calibrate, least_absolute
from nas.devices import profiler_of
from nas.measure import Model, Profiler, name_of, table_reference
from nas.plan import random_network
from nas.profilers.bench import Bench, Goal, Plan, Samples
from nas.profilers.ort_cpu import OrtCpu
from nas.profilers.timing import References, Stopwatch, Visit, summarise
from nas.progress import progress
from nas.statistics import kendall_tau
from nas.table import LatencyTable
from supernet.arch import ArchConfig
from supernet.space import SearchSpace
from supernet.specs import Layer

BINS = 10
OPEN = 30  # sessions at once


def figures(predicted: Sequence[float], measured: Sequence[float]) -> str:
    """Mean absolute error, share within 5 %, largest error, and Kendall's tau."""
    p, m = np.asarray(predicted), np.asarray(measured)
    error = 100 * np.abs(p - m) / m
    return (
        f"mean {error.mean():5.2f} %   within 5 % {100 * (error <= 5).mean():5.1f} %   within 10 % "
        f"{100 * (error <= 10).mean():5.1f} %   largest {error.max():5.1f} %   bias {100 * (p / m - 1).mean():+5.2f} %   "
        f"tau {kendall_tau(p, m):.3f}"
    )


def single_calls(profiler: Profiler, watch: Stopwatch, layers: Sequence[Layer], reference: References) -> dict[Layer, float]:
    """Milliseconds of the first call of each layer's session, at the pace at which the references take `reference`."""
    found = {}
    with progress("single calls", len(layers)) as tick:
        for layer in layers:
            run = profiler.open((layer,))[0]
            start = time.perf_counter_ns()
            run()
            raw_ms = (time.perf_counter_ns() - start) / 1e6
            watch.pause()  # the references are timed now, after the call: before it they would have filled the caches
            now = watch.visit(watch.references[0]).reference
            found[layer] = summarise([Visit(raw_ms, now)], reference).ms
            tick(1)
    return found


def unseen(space: SearchSpace, table: LatencyTable, count: int, seed: int) -> list[ArchConfig]:
    """Draw networks evenly from ten equal bins of predicted latency."""
    rng = random.Random(seed)
    pool = {a.without_identity(): table.predict_ms(a) for a in (random_network(space, rng) for _ in range(200 * count))}
    low, high = min(pool.values()), max(pool.values())
    chosen: list[ArchConfig] = []
    for number in range(BINS):
        inside = [a for a, ms in pool.items() if min(BINS - 1, int((ms - low) / (high - low) * BINS)) == number]
        chosen += rng.sample(inside, min(len(inside), count // BINS))
    rest = [arch for arch in pool if arch not in chosen]
    return chosen + rng.sample(rest, count - len(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="efficientformer-tiny")
    parser.add_argument("--networks", type=int, default=100)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--visits", type=int, default=30, help="of each network and layer, at most")
    parser.add_argument("--table", help="a CSV file (default: this machine's)")
    given = parser.parse_args()

    space = SearchSpace.load(given.space)
    table = LatencyTable.load(given.table) if given.table else LatencyTable.load(OrtCpu().id)
    table = table.calibrated_for(space)
    profiler, reference = profiler_of(table), table_reference(table)
    assert profiler is not None, f"{table.device} is not this machine"
    then = [network for c in table.calibrations for network in c.networks]
    seen = [network.network() for network in then]
    stages_seen = {arch.stages for arch in seen}
    networks = [a for a in unseen(space, table, given.networks, given.seed) if a.stages not in stages_seen]
    alone = list(dict.fromkeys(layer for arch in networks for layer in arch.layers()))
    pieces: dict[str, Model] = {name_of((layer,)): (layer,) for layer in alone}
    whole: dict[str, Model] = {name_of(tuple(arch.layers())): tuple(arch.layers()) for arch in (*networks, *seen)}
    models = pieces | whole
    passes = (given.visits // 3, 2 * given.visits // 3, given.visits)
    plan = Plan((), tuple(models), (), next(iter(models)), {}, passes=passes, batch_models=OPEN)
    with tempfile.TemporaryDirectory() as folder, profiler.exclusive():
        watch = profiler.stopwatch()
        samples = Samples(Path(folder) / "samples.csv", "")
        bench = Bench(samples, lambda name: profiler.open(models[name]), watch, random.Random(given.seed), plan)
        with progress("timing", plan.visits) as tick:
            # Networks first, as in a build: in a process that has opened hundreds of sessions they take longer.
            for names in (sorted(whole), sorted(pieces)):
                random.Random(0).shuffle(names)  # in rounds: a machine that is slower for a minute slows all of them
                goals = [Goal({name: 1.0}, 0.005) for name in names]
                for limits in zip((0, *passes), passes, strict=False):
                    bench.measure(names, goals, tick, limits)
        samples.close()
        once = single_calls(profiler, watch, alone, reference)
    found = {name: summarise(visits, reference) for name, visits in samples.visits.items()}
    measured = [found[name_of(tuple(arch.layers()))] for arch in networks]
    ms = [m.ms for m in measured]
    again = [found[name_of(tuple(arch.layers()))] for arch in seen]
    change = [100 * (now.ms / network.ms - 1) for now, network in zip(again, then, strict=True)]
    anew = replace(table, calibrations=(calibrate(space, table, seen, again),))
    isolated = {layer: found[name_of((layer,))].ms for layer in alone}
    predicted = [table.predict_ms(arch) for arch in networks]
    plain = [sum(isolated[layer] for layer in arch.layers()) for arch in networks]
    first = [sum(once[layer] for layer in arch.layers()) for arch in networks]
    design = np.stack([np.ones(len(ms)), plain], axis=1)
    refitted = design @ least_absolute(design, np.asarray(ms))
    meta = table.meta
    print(
        f"{meta.get('cpu')} ({table.device}), {meta['runtime']} {meta['runtime_version']}, threads {meta['threads']}, batch 1"
    )
    print(
        f"{space.name}: {len(networks)} networks from {min(ms):.3g} to {max(ms):.3g} ms, table of {meta['measured_at'][:16]}, "
        f"calibrated on {sum(c.n_fit for c in table.calibrations)} networks"
    )
    half = np.median([100 * m.half_width_ms / m.ms for m in measured])
    print(f"measured to a median half-width of {half:.2f} % (95 %)")
    print(
        f"the table's own {len(seen)} networks differ from what they took when it was built by {np.median(change):+.1f} % "
        f"(median; {min(change):+.1f} to {max(change):+.1f} %)"
    )
    print(f"  table                                     {figures(predicted, ms)}")
    print(f"  the same, calibrated anew on its networks {figures([anew.predict_ms(arch) for arch in networks], ms)}")
    print(f"  sum of layers timed alone                 {figures(plain, ms)}")
    print(f"  the same, fitted to these very networks   {figures(refitted.tolist(), ms)}")
    print(f"  sum of single calls without warm-up       {figures(first, ms)}")


if __name__ == "__main__":
    main()
