"""How anything is timed, on any device: shuffled rounds, paired with references, until the statistics suffice.

A *visit* times one workload a few times in a row, between two timings of two fixed reference workloads: one whose
weights stay in the processor's inner caches, and one that streams them. A slow clock slows both; a neighbour on a shared
machine who uses up the memory's bandwidth slows the second and every workload like it. A visit's sample is its ratio to
a mix of the two, to which those mixes count most that explain the workload's own ups and downs. An estimate is the median
over visits, its interval the order-statistic interval of the median, and where what was timed was opened several times at
least Student's interval of the mean of the sessions' medians.
"""

from __future__ import annotations

import gc
import math
import random
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median, stdev
from typing import NamedTuple

Clock = Callable[[], int]  # nanoseconds
Workload = Callable[[], object]  # one call of what is timed, returning when it is done
Touches = Callable[[int], Workload]  # a number of bytes -> what touches so much other memory
Burst = Callable[[Workload, Workload | None], float]  # times a workload, another one between its calls; ms of a call

WARM_UP_MS = 20.0  # an entry's first visit runs it this long beforehand, and at least so often:
WARM_UP_CALLS = 10
DISCARDED = 5  # calls at most at the begin of a visit, until the caches hold what they hold in a loop ...
DISCARDED_MS = 6.0  # ... which they do after so long, and at least two calls
MIN_CALLS = 3
MAX_CALLS = 9
VISIT_MS = 1.0  # timed calls are repeated within a visit until about this much is covered
MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the streaming reference
FEW_VISITS = 12  # with fewer, the mix cannot be told and is half and half
FEW_SESSIONS = 3  # with fewer, what they differ by is not known
NO_SPREAD = 1e-6  # of samples, relative: below it none is told from another


class References(NamedTuple):
    """Milliseconds of a call of the two references."""

    cached_ms: float
    streaming_ms: float


@dataclass(frozen=True)
class Visit:
    """The median milliseconds of a call within one visit, and of the references around it."""

    raw_ms: float
    reference: References


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of one call: the median over visits, normalised by the reference, with its 95 % interval.

    `raw_ms` is the median before normalisation; the minimum and the percentiles are of the normalised samples.
    """

    ms: float
    low_ms: float
    high_ms: float
    raw_ms: float
    p10_ms: float
    p25_ms: float
    p90_ms: float
    visits: int

    @property
    def half_width_ms(self) -> float:
        return (self.high_ms - self.low_ms) / 2


def summarise(visits: Sequence[Visit], reference: References | None = None, per_session: int = 0) -> Measurement:
    """Return the measurement that these visits make, normalised to a machine on which the references take `reference`
    (without it: what they took in these visits).

    `per_session`: the model was opened anew every so many visits (0: it is not known when). What a session's place in memory
    does to all of its visits, the interval then covers too, as far as three sessions or more tell.
    """
    base = reference or median_reference(visits)
    values = _normalised(visits, base, _mix(visits, base))
    samples = sorted(values)
    ms = median(samples)
    low, high = median_interval(samples)
    whole = range(0, len(values) - per_session + 1, per_session) if per_session else ()
    if len(whole) >= FEW_SESSIONS:
        half = mean_half_width([median(values[first : first + per_session]) for first in whole])
        low, high = min(low, ms - half), max(high, ms + half)
    return Measurement(
        ms=ms,
        low_ms=low,
        high_ms=high,
        raw_ms=median(v.raw_ms for v in visits),
        p10_ms=_at(samples, 0.1 * (len(samples) - 1)),
        p25_ms=_at(samples, 0.25 * (len(samples) - 1)),
        p90_ms=_at(samples, 0.9 * (len(samples) - 1)),
        visits=len(samples),
    )


def median_reference(visits: Sequence[Visit]) -> References:
    """Return the medians of the references over visits."""
    return References(median(v.reference.cached_ms for v in visits), median(v.reference.streaming_ms for v in visits))


def _mix(visits: Sequence[Visit], base: References) -> float:
    """Return the share of the streaming reference: the mean of `MIXES`, each weighted by the inverse square of the spread that
    it leaves in the samples. The one that leaves the least alone would often be so by chance."""
    if len(visits) < FEW_VISITS:
        return 0.5
    weights = [max(_spread(sorted(_normalised(visits, base, mix))), NO_SPREAD) ** -2 for mix in MIXES]
    return sum(weight * mix for weight, mix in zip(weights, MIXES, strict=True)) / sum(weights)


def _normalised(visits: Sequence[Visit], base: References, mix: float) -> list[float]:
    """Return the samples, in the visits' order: raw times the geometric mix of how much faster the references usually are."""
    return [
        v.raw_ms * (base.cached_ms / v.reference.cached_ms) ** (1 - mix) * (base.streaming_ms / v.reference.streaming_ms) ** mix
        for v in visits
    ]


def _spread(samples: Sequence[float]) -> float:
    """Return the interquartile range of an ascending sample, relative to its median."""
    n = len(samples)
    return (_at(samples, 0.75 * (n - 1)) - _at(samples, 0.25 * (n - 1))) / median(samples)


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


def mean_half_width(values: Sequence[float], confidence: float = 0.95) -> float:
    """Return half the width of Student's interval of the mean of independent values, of which it takes three or more."""
    degrees = len(values) - 1
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    # Student's quantile by its expansion in 1 / degrees (Abramowitz and Stegun 26.7.5): 0.2 % off at 5, less from there on.
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    quantile = sum(term / degrees**power for power, term in enumerate(terms))
    return quantile * stdev(values) / math.sqrt(len(values))


def _at(ordered: Sequence[float], position: float) -> float:
    below = math.floor(position)
    above = math.ceil(position)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def timed_calls(clock: Clock = time.perf_counter_ns) -> Burst:
    """Return a burst that times every call on the host's clock: the median, the first few calls discarded."""

    def burst(run: Workload, between: Workload | None = None) -> float:
        start = clock()
        for call in range(DISCARDED):
            if call >= 2 and clock() - start >= DISCARDED_MS * 1e6:
                break
            run()
        times: list[int] = []
        total = 0
        while len(times) < MIN_CALLS or (total < VISIT_MS * 1e6 and len(times) < MAX_CALLS):
            if between is not None:
                between()
            start = clock()
            run()
            times.append(clock() - start)
            total += times[-1]
        return median(times) / 1e6

    return burst


class Stopwatch:
    """Visits workloads; keeps the references' latest timing, so that one run of them serves two neighbouring visits.

    `burst` is how a device times a few calls in a row; without it, on the host's `clock`.
    """

    def __init__(
        self,
        cached: Workload,
        streaming: Workload,
        clock: Clock = time.perf_counter_ns,
        burst: Burst | None = None,
        warm_up_ms: float = WARM_UP_MS,
        warm_up_calls: int = WARM_UP_CALLS,
    ) -> None:
        self.references = (cached, streaming)
        self.clock = clock
        self.burst = burst or timed_calls(clock)
        self.warm_up_ms = warm_up_ms
        self.warm_up_calls = warm_up_calls
        self._warm: weakref.WeakSet[Workload] = weakref.WeakSet()
        self._before: References | None = None

    def visit(self, run: Workload, between: Workload | None = None) -> Visit:
        """Time one workload once between two timings of the references; `between` runs, untimed, before each call."""
        for reference in self.references:
            self._warm_up(reference)
        if self._warm_up(run) or self._before is None:
            self._before = self._time_references()
        before, raw, after = self._before, self.burst(run, between), self._time_references()
        self._before = after
        return Visit(raw, References(*((a + b) / 2 for a, b in zip(before, after, strict=True))))

    def pause(self) -> None:
        """Say that time passes before the next visit: the references' latest timing will not do for it."""
        self._before = None

    def _time_references(self) -> References:
        return References(*(self.burst(reference, None) for reference in self.references))

    def _warm_up(self, run: Workload) -> bool:
        """Run a workload for a while if it has not been; return whether that was so."""
        if run in self._warm:
            return False
        self._warm.add(run)
        start = self.clock()
        for _ in range(self.warm_up_calls):
            run()
        while self.clock() - start < self.warm_up_ms * 1e6:
            run()
        return True


def visit_in_rounds(
    entries: Mapping[str, Workload],
    stopwatch: Stopwatch,
    still_open: Callable[[], Iterable[str]],
    record: Callable[[str, Visit], None],
    rng: random.Random,
    between: Mapping[str, Workload] | None = None,
) -> None:
    """Visit the open entries in shuffled rounds; `record` takes each visit, and `still_open` says before each round which
    keys go on. Ends when none is open. The garbage collector is off meanwhile. `between`: what runs, untimed, before each call
    of an entry."""
    collecting = gc.isenabled()
    gc.disable()
    stopwatch.pause()
    try:
        while live := sorted(set(still_open()) & set(entries)):
            rng.shuffle(live)
            for key in live:
                record(key, stopwatch.visit(entries[key], between.get(key) if between else None))
    finally:
        if collecting:
            gc.enable()
