"""Time one session of an ONNX model, in this process, which does nothing else.

    python benchmarks/one_session.py network.onnx cached.onnx streaming.onnx --threads 1 --rounds 3

Prints a line a round: the milliseconds of a call of the model (the median of some on the plain clock, after some that do not
count), and those of both references, the mean of before and after. The first round does not count: a core may be asleep.
"""

import argparse
import time
from pathlib import Path
from statistics import median

from nas.profilers.ort_session import OrtModel

CALLS, DISCARDED = 6, 4


def milliseconds(run: OrtModel) -> float:
    times = []
    for number in range(DISCARDED + CALLS):
        start = time.perf_counter_ns()
        run()
        if number >= DISCARDED:
            times.append((time.perf_counter_ns() - start) / 1e6)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs=3, help="the one that is timed, and the two references")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    run, *references = (OrtModel(path, given.threads) for path in given.models)
    for round_ in range(1 + given.rounds):
        before = [milliseconds(reference) for reference in references]
        ms = milliseconds(run)
        after = [milliseconds(reference) for reference in references]
        if round_:
            print(ms, *((b + a) / 2 for b, a in zip(before, after, strict=True)))


if __name__ == "__main__":
    main()
