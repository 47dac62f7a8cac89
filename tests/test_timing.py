"""Rounds, pairing with the reference, and statistics, on a clock that the test turns."""

import gc
import math
import random
from collections import Counter
from collections.abc import Callable
from statistics import mean, median, quantiles, stdev

import pytest

from nas.profilers.timing import References, Stopwatch, Visit, mean_half_width, median_interval, summarise, visit_in_rounds


class Machine:
    """A clock in nanoseconds, and workloads that move it on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slowness = 1.0
        self.crowding = 1.0  # how much slower memory is because of neighbours

    def clock(self) -> int:
        return round(self.now)

    def workload(self, ms: float, noise: Callable[[], float] = lambda: 0.0, streams: float = 0.0) -> Callable[[], None]:
        def run() -> None:
            self.now += (ms + noise()) * self.slowness * self.crowding**streams * 1e6

        return run

    def stopwatch(self) -> Stopwatch:
        return Stopwatch(self.workload(0.5), self.workload(0.8, streams=1.0), self.clock)


def test_a_visit_is_the_workload_between_two_timings_of_the_references() -> None:
    machine = Machine()
    stopwatch = machine.stopwatch()
    assert stopwatch.visit(machine.workload(2.0)) == Visit(2.0, References(0.5, 0.8))


def test_a_slower_machine_slows_workload_and_reference_alike() -> None:
    machine = Machine()
    stopwatch = machine.stopwatch()
    run = machine.workload(2.0)
    visits = []
    for turn in range(30):
        machine.slowness = 1.0 if turn % 3 else 1.7
        stopwatch.visit(machine.workload(0.1))  # the reference is timed anew before the visit that counts
        visits.append(stopwatch.visit(run))
    found = summarise(visits, References(0.5, 0.8))
    assert found.ms == pytest.approx(2.0, rel=1e-6), "the normalised median does not know the slowness"
    assert found.high_ms - found.low_ms < 1e-6
    assert max(v.raw_ms for v in visits) == pytest.approx(3.4), "the raw time does"


@pytest.mark.parametrize("streams", [0.0, 0.5, 1.0])
def test_crowded_memory_slows_what_streams_and_the_mix_of_references_knows(streams: float) -> None:
    machine = Machine()
    stopwatch = machine.stopwatch()
    run = machine.workload(2.0, streams=streams)
    rng = random.Random(3)
    visits = []
    for _ in range(30):
        machine.crowding = rng.uniform(1.0, 1.4)
        stopwatch.visit(machine.workload(0.1))
        visits.append(stopwatch.visit(run))
    found = summarise(visits, References(0.5, 0.8))
    assert found.ms == pytest.approx(2.0, rel=1e-6), "as on a machine to itself"
    assert found.high_ms - found.low_ms < 1e-6


def test_what_runs_between_calls_is_not_timed() -> None:
    machine = Machine()
    stopwatch = machine.stopwatch()
    between = machine.workload(100.0)
    assert stopwatch.visit(machine.workload(2.0), between).raw_ms == pytest.approx(2.0)


def test_a_single_disturbed_call_does_not_move_a_visit() -> None:
    machine = Machine()
    calls = iter([0.0] * 17 + [50.0] + [0.0] * 1000)
    stopwatch = machine.stopwatch()
    assert stopwatch.visit(machine.workload(2.0, lambda: next(calls))).raw_ms == pytest.approx(2.0)


def test_the_result_is_expressed_on_the_tables_machine() -> None:
    visits = [Visit(3.0, References(1.5, 2.4))] * 8
    assert summarise(visits, References(0.5, 0.8)).ms == pytest.approx(1.0)
    assert summarise(visits).ms == pytest.approx(3.0), "without a table it is what was measured"


def test_the_interval_of_the_median_covers_it_about_19_times_in_20() -> None:
    rng = random.Random(1)
    covered = 0
    for _ in range(2000):
        low, high = median_interval(sorted(rng.lognormvariate(0, 0.5) for _ in range(25)))
        covered += low <= 1.0 <= high
    assert 0.93 <= covered / 2000 <= 0.97


def test_the_interval_covers_what_sessions_do_to_their_visits() -> None:
    """A model takes 1 ms, in each session some percent more or less, and so does each visit beside that."""
    rng = random.Random(0)
    beside = References(0.5, 0.8)
    covered = {0: 0, 4: 0}
    for _ in range(300):
        of_session = [math.exp(rng.gauss(0, 0.01)) for _ in range(6)]
        visits = [Visit(ms * math.exp(rng.gauss(0, 0.01)), beside) for ms in of_session for _ in range(4)]
        for per_session in covered:
            found = summarise(visits, beside, per_session)
            covered[per_session] += found.low_ms <= 1 <= found.high_ms
    assert covered[4] >= 0.93 * 300
    assert covered[0] < 0.88 * 300, "the sessions here are too alike to tell"


@pytest.mark.parametrize(("degrees", "quantile"), [(5, 2.5706), (11, 2.2010), (23, 2.0687)])
def test_student_s_interval_is_that_of_the_tables(degrees: int, quantile: float) -> None:
    values = [float(number) for number in range(degrees + 1)]
    exact = quantile * stdev(values) / math.sqrt(degrees + 1)
    assert mean_half_width(values) == pytest.approx(exact, rel=2e-3)


def test_the_interval_of_few_samples_is_their_whole_range() -> None:
    assert median_interval([1.0, 2.0, 5.0]) == (1.0, 5.0)


def test_rounds_visit_what_is_open_in_shuffled_order_until_nothing_is() -> None:
    machine = Machine()
    counts: Counter[str] = Counter()
    order: list[str] = []

    def record(key: str, visit: Visit) -> None:
        counts[key] += 1
        order.append(key)
        assert not gc.isenabled(), "the collector must not run into a timing"

    visit_in_rounds(
        {key: machine.workload(1.0) for key in "abcdef"},
        machine.stopwatch(),
        lambda: [key for key in "abcdefz" if counts[key] < (7 if key == "c" else 4)],
        record,
        random.Random(0),
    )
    assert counts == {"a": 4, "b": 4, "c": 7, "d": 4, "e": 4, "f": 4}
    assert order[:6] != order[6:12], "every round has its own order"
    assert sorted(order[:6]) == sorted(order[6:12])
    assert gc.isenabled()


def test_a_mix_by_all_spreads_errs_less_than_the_one_that_happens_to_leave_the_least() -> None:
    """A workload that is half streaming, on a machine whose memory is a quarter slower than when the table was built."""
    base, rng = References(0.5, 0.8), random.Random(5)
    weighted, chosen = [], []
    for _ in range(100):
        visits = []
        for _ in range(20):
            crowding = rng.uniform(1.2, 1.3)
            noise = rng.gauss(1, 0.02)
            visits.append(Visit(2.0 * crowding**0.5 * noise, References(0.5, 0.8 * crowding)))
        weighted.append(abs(summarise(visits, base).ms / 2.0 - 1))
        samples = [[v.raw_ms * (0.8 / v.reference.streaming_ms) ** mix for v in visits] for mix in (0, 0.25, 0.5, 0.75, 1)]
        chosen.append(abs(median(min(samples, key=relative_spread)) / 2.0 - 1))
    assert mean(weighted) < 0.7 * mean(chosen)


def relative_spread(samples: list[float]) -> float:
    low, middle, high = quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle
