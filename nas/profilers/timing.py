"""How anything is timed, on any device: shuffled rounds, paired with a reference, until the statistics suffice.

A *visit* times one workload a few times in a row, between two timings of a fixed reference workload. A shared or
throttling machine slows both alike, so a visit's sample is its ratio to the reference. An *entry* is a workload with a
key; its estimate is the median over visits, its interval the order-statistic interval of the median.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

Clock = Callable[[], int]  # nanoseconds

WARM_UP_MS = 20.0  # an entry's first visit runs it this long beforehand
MIN_CALLS = 3
MAX_CALLS = 9
VISIT_MS = 1.0  # calls are repeated within a visit until about this much time is covered


@dataclass(frozen=True)
class Visit:
    """The median milliseconds of a call within one visit, and of the reference just before and after it."""

    raw_ms: float
    reference_ms: float


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of one call: the median over visits, normalised by the reference, with its 95 % interval.

    `raw_ms` is the median before normalisation; `min_ms`, `p10_ms` and `p90_ms` are of the normalised samples.
    """

    ms: float
    low_ms: float
    high_ms: float
    raw_ms: float
    min_ms: float
    p10_ms: float
    p90_ms: float
    visits: int

    @property
    def half_width_ms(self) -> float:
        return (self.high_ms - self.low_ms) / 2


def summarise(visits: Sequence[Visit], reference_ms: float | None = None) -> Measurement:
    """Return the measurement that these visits make, normalised to a machine on which the reference takes `reference_ms`
    (without one: what it took in these visits)."""
    if reference_ms is None:
        reference_ms = median(v.reference_ms for v in visits)
    samples = sorted(v.raw_ms * reference_ms / v.reference_ms for v in visits)
    low, high = median_interval(samples)
    return Measurement(
        ms=median(samples),
        low_ms=low,
        high_ms=high,
        raw_ms=median(v.raw_ms for v in visits),
        min_ms=samples[0],
        p10_ms=samples[int(0.1 * (len(samples) - 1))],
        p90_ms=samples[math.ceil(0.9 * (len(samples) - 1))],
        visits=len(samples),
    )


def median_interval(ordered: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return the distribution-free interval of the median of an ascending sample.

    Its ends are order statistics (binomial, normal approximation, ends interpolated); fewer than six samples cannot
    reach 95 %, so the interval is then the whole range.
    """
    n = len(ordered)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(n) / 2
    low = max(0.0, (n - 1) / 2 - half)
    high = min(n - 1.0, (n - 1) / 2 + half)
    return _at(ordered, low), _at(ordered, high)


def _at(ordered: Sequence[float], position: float) -> float:
    below = math.floor(position)
    above = math.ceil(position)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


class Stopwatch:
    """Visits workloads; keeps the reference's latest timing, so that one run of it serves two neighbouring visits."""

    def __init__(self, reference: Callable[[], object], clock: Clock = time.perf_counter_ns) -> None:
        self.reference = reference
        self.clock = clock
        self._warm: set[int] = set()
        self._before = 0.0

    def visit(self, run: Callable[[], object], between: Callable[[], object] | None = None) -> Visit:
        """Time one workload once between two timings of the reference; `between` runs, untimed, before each of its calls."""
        self._warm_up(self.reference)
        first_visit = self._warm_up(run)
        if first_visit or not self._before:
            self._before = self._burst(self.reference)
        raw = self._burst(run, between)
        after = self._burst(self.reference)
        visit = Visit(raw, (self._before + after) / 2)
        self._before = after
        return visit

    def _warm_up(self, run: Callable[[], object]) -> bool:
        if id(run) in self._warm:
            return False
        self._warm.add(id(run))
        start = self.clock()
        for _ in range(10):
            run()
        while self.clock() - start < WARM_UP_MS * 1e6:
            run()
        return True

    def _burst(self, run: Callable[[], object], between: Callable[[], object] | None = None) -> float:
        """Median milliseconds of a call; the first call is discarded."""
        run()
        times: list[int] = []
        total = 0
        while len(times) < MIN_CALLS or (total < VISIT_MS * 1e6 and len(times) < MAX_CALLS):
            if between is not None:
                between()
            start = self.clock()
            run()
            times.append(self.clock() - start)
            total += times[-1]
        return median(times) / 1e6


def visit_in_rounds(
    entries: Mapping[str, Callable[[], object]],
    stopwatch: Stopwatch,
    still_open: Callable[[], Iterable[str]],
    record: Callable[[str, Visit], None],
    rng: random.Random,
    between: Callable[[], object] | None = None,
) -> None:
    """Visit the open entries in shuffled rounds; `record` takes each visit, and `still_open` says before each round which
    keys go on. Ends when none is open. The garbage collector is off meanwhile. `between` as in `Stopwatch.visit`."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        while live := sorted(set(still_open()) & set(entries)):
            rng.shuffle(live)
            for key in live:
                record(key, stopwatch.visit(entries[key], between))
    finally:
        if collecting:
            gc.enable()
