"""How true are this machine's latency tables? Prediction against measurement on random networks that no calibration saw.

    python benchmarks/table_error.py --space efficientformer-tiny --networks 50

The networks are drawn evenly from ten equal bins of predicted latency. Beside the table stands what a naive table would
say: the sum of every layer timed alone in its own session, in the same run, calibrated the same way and not at all.
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nas.lut import Bench, Samples, least_absolute, stratified
from nas.measure import name_of, table_reference
from nas.profilers.ort_cpu import cpu_name, device_id, pinned
from nas.profilers.timing import summarise
from nas.progress import progress
from nas.table import LatencyTable
from supernet.arch import ArchConfig
from supernet.space import SearchSpace

BINS = 10


def figures(predicted: Sequence[float], measured: Sequence[float]) -> str:
    """Mean absolute error, share within 5 %, largest error, and Kendall's tau."""
    p, m = np.asarray(predicted), np.asarray(measured)
    error = 100 * np.abs(p - m) / m
    pairs = np.sign(np.subtract.outer(p, p)) * np.sign(np.subtract.outer(m, m))
    tau = pairs.sum() / (len(p) * (len(p) - 1))
    return (
        f"mean {error.mean():5.2f} %   within 5 % {100 * (error <= 5).mean():5.1f} %   largest {error.max():5.1f} %   "
        f"bias {100 * (p / m - 1).mean():+5.2f} %   tau {tau:.3f}"
    )


def unseen(space: SearchSpace, table: LatencyTable, count: int, seed: int) -> list[ArchConfig]:
    """Draw networks evenly from ten equal bins of predicted latency."""
    rng = random.Random(seed)
    pool = {a.without_identity(): table.predict_ms(a) for a in (space.sample(rng) for _ in range(200 * count))}
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
    parser.add_argument("--networks", type=int, default=50)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--visits", type=int, default=100, help="of each network, at most")
    parser.add_argument("--table", help="a CSV file (default: this machine's)")
    given = parser.parse_args()

    space = SearchSpace.load(given.space)
    table = LatencyTable.load(given.table or device_id())
    reference = table_reference(table)
    fitted_on = {a.without_identity() for a in stratified(space, table, 28, random.Random(0))}
    networks = [a for a in unseen(space, table, given.networks, given.seed) if a not in fitted_on]
    alone = list(dict.fromkeys(layer for arch in networks for layer in arch.layers()))

    # One shuffled order for everything, in rounds: a machine that is slower for a minute slows all of it.
    models = [tuple(arch.layers()) for arch in networks] + [(layer,) for layer in alone]
    with tempfile.TemporaryDirectory() as folder, pinned():
        samples = Samples(Path(folder) / "samples.csv", "")
        shuffled = random.Random(0).sample(models, len(models))
        goals = [({model: 1.0}, 0.005, 0.0) for model in models]
        with progress("timing", len(models) * given.visits) as tick:
            Bench(samples, threads=1, seed=given.seed).measure(shuffled, goals, tick, (0, given.visits))
        samples.close()
    found = {model: summarise(samples.visits[name_of(model)], reference) for model in models}
    measured = [found[model] for model in models[: len(networks)]]
    ms = [m.ms for m in measured]
    isolated = {layer: found[(layer,)].ms for layer in alone}
    predicted = [table.predict_ms(arch) for arch in networks]
    plain = [sum(isolated[layer] for layer in arch.layers()) for arch in networks]
    design = np.stack([np.ones(len(ms)), plain], axis=1)
    refitted = design @ least_absolute(design, np.asarray(ms))
    print(f"{cpu_name()} ({table.device}), {table.meta['runtime']} {table.meta['runtime_version']}, one thread, batch 1")
    print(
        f"{space.name}: {len(networks)} networks from {min(ms):.3g} to {max(ms):.3g} ms, table of {table.meta['measured_at']}"
    )
    half = np.median([100 * m.half_width_ms / m.ms for m in measured])
    print(f"measured to a median half-width of {half:.2f} % (95 %)")
    print(f"  table                        {figures(predicted, ms)}")
    print(f"  sum of layers timed alone    {figures(plain, ms)}")
    print(f"  the same, offset and scale fitted to these very networks  {figures(refitted.tolist(), ms)}")


if __name__ == "__main__":
    main()
