"""What another process does to networks, and what the references tell of it.

    python benchmarks/neighbours.py --space efficientformer-s

A shared machine has neighbours who come and go. This script has its own: in turn none, one that only computes, one that copies
64 MB back and forth, and one that trains (convolutions in PyTorch), each on one core. Beside each it times random networks of a
space, from small to large, and streams of attention blocks as heavy as the second reference (13 MB of weights) and heavier,
every session in a process of its own. It prints how much longer everything takes than beside none: on the clock, and at the
references' pace (with 95 % intervals), which is what is left of it in a prediction or a measurement of `nas-search`. Wants two
idle cores or more.
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import hypot
from statistics import median

import numpy as np
from two_builds import BUSY

from nas.measure import STREAMING, Model
from nas.profilers.ort_cpu import OrtCpu
from nas.profilers.timing import Visit, median_reference, summarise
from nas.progress import progress
from supernet.model import count, count_layer
from supernet.space import SearchSpace
from supernet.specs import MB3D, Layer

VISITS = 4  # of a session
COPIES = "import numpy\na, b = numpy.ones((2, 8_000_000))\nwhile True:\n    numpy.copyto(b, a)\n    numpy.copyto(a, b)\n"
TRAINS = """
import torch
torch.set_num_threads(1)
model = torch.nn.Sequential(*(torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(8)))
x = torch.randn(64, 64, 32, 32)
while True:
    model(x).square().mean().backward()
"""
NEIGHBOURS = {"none": "", "computes": BUSY, "copies": COPIES, "trains": TRAINS}


@contextmanager
def neighbour(code: str) -> Iterator[None]:
    """Keep another process busy meanwhile."""
    if not code:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", code])
    try:
        time.sleep(3)  # until it has imported what it needs
        yield
    finally:
        other.kill()
        other.wait()


def workloads(space: SearchSpace, networks: int) -> dict[str, Model]:
    """Return random networks, evenly spread over the multiply-accumulates of many, and streams of weights."""
    rng = random.Random(0)
    ordered = sorted((space.sample(rng) for _ in range(50 * networks)), key=lambda arch: count(arch).macs)
    chosen = [ordered[round(at)] for at in np.linspace(0, len(ordered) - 1, networks)]
    streams = {f"stream of {n} x mb3d(448)": (Layer(MB3D(448), 2),) * n for n in (3, 5)}
    return (
        {f"network {n}": tuple(arch.layers()) for n, arch in enumerate(chosen, 1)}
        | {"streaming reference": STREAMING}
        | streams
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="efficientformer-s")
    parser.add_argument("--networks", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=8, help="each beside every neighbour in turn")
    given = parser.parse_args()
    profiler = OrtCpu()
    models = workloads(SearchSpace.load(given.space), given.networks)
    visits: dict[tuple[str, str], list[Visit]] = {(who, what): [] for who in NEIGHBOURS for what in models}
    with progress("neighbours", given.rounds * len(visits)) as tick, ExitStack() as held:
        sessions = {what: held.enter_context(profiler.apart(profiler.onnx(model))) for what, model in models.items()}
        for _ in range(given.rounds):
            for who, code in NEIGHBOURS.items():
                with neighbour(code), profiler.exclusive():
                    for what, session in sessions.items():
                        visits[who, what] += session(VISITS)
                        tick(1)

    others = [who for who in NEIGHBOURS if who != "none"]
    heads = [f"beside one that {who}: clock, %" for who in others] + [f"{who}: references' pace, %" for who in others]
    print(f"{profiler.id}, {given.space}, {given.rounds} rounds; how much longer than alone")
    print("| | M weights | alone, ms | " + " | ".join(heads) + " |\n|---|---:|---:|" + "---:|" * len(heads))
    for what, model in models.items():
        alone = visits["none", what]
        ms, pace = median(v.raw_ms for v in alone), median_reference(alone)
        weights = sum(count_layer(layer).params for layer in model) / 1e6
        clock = [100 * (median(v.raw_ms for v in visits[who, what]) / ms - 1) for who in others]
        base = summarise(alone, pace, VISITS)
        cells = [f"{percent:+.1f}" for percent in clock]
        for who in others:
            beside = summarise(visits[who, what], pace, VISITS)
            width = hypot(base.half_width_ms / base.ms, beside.half_width_ms / beside.ms)
            cells.append(f"{100 * (beside.ms / base.ms - 1):+.1f} ± {100 * width:.1f}")
        print(f"| {what} | {weights:.1f} | {ms:.2f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
