"""Carry out a plan of measurements: visit every model until the rows that it serves are known well enough.

Models go by name here; who opens them, and where, is the caller's business. Python's standard library alone: this file
travels to devices that have nothing else (see `job`).
"""

from __future__ import annotations

import bisect
import csv
import datetime
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from nas.profilers.timing import (
    Measurement,
    References,
    Stopwatch,
    Touches,
    Visit,
    Workload,
    median_reference,
    summarise,
    visit_in_rounds,
)

Tick = Callable[[float], object]  # told how many visits were made or are not needed
Open = Callable[[str], tuple[Workload, int]]  # a model's name -> its workload, and the bytes that it holds

JOB_SCHEMA = 4  # of a job folder: its plan and its results; the Swift program has it too
MIN_MS_OF_A_CALL = 5e-4  # no runtime answers sooner: shorter times are in another unit
LOOSER = 2.0  # times as wide as the goals say intervals may be after `Plan.strict_visits` visits
TOO_NOISY = 2.5  # p90 over p10 of a reference's milliseconds
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
MOST_WAITING_S = 600.0  # of all pauses, which are not longer in all than what was measured meanwhile
ENOUGH = 50  # visits, to know by how much the references vary


class Failed(Exception):
    """Something outside the user's input failed: a connection, a device, an exporter."""


class Disturbed(Failed):
    """The device cannot be measured now; what was measured is kept, and the same command goes on."""


class TooNoisy(Failed):
    """What was measured cannot be trusted, because the device was too busy or too hot; it is not to be gone on with."""


class Damaged(Failed):
    """A samples file does not hold what was written to it."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} was changed by hand or is damaged ({why}): remove it, and its visits are made again")


@dataclass(frozen=True)
class Goal:
    """The half-width of the 95 % interval of sum(weight * ms of model) is to be at most max(fraction * value, floor_ms)."""

    terms: Mapping[str, float]
    fraction: float
    floor_ms: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What is to be visited until when; plain data, so that it can travel.

    `pieces` are the models that rows are made of, `rows` the terms of every row (model -> weight), `networks` whole
    networks. A row is known when its interval is within `row_goal` of it, or within `floor` of what `smallest`, the
    smallest network, takes; a network when its interval is within `network_goal`. `touched_bytes` is how much other memory
    is read before each timed call of a piece, by devices that can: in a network the weights of other layers pass through
    the caches between two runs of a layer.

    A pass opens every model anew that it visits. After `strict_visits` visits, twice the goals will do. With
    `session_visits` every pass makes so many, and intervals are of what sessions differ by, too.
    """

    pieces: tuple[str, ...]
    networks: tuple[str, ...]
    rows: tuple[Mapping[str, float], ...]
    smallest: str
    touched_bytes: Mapping[str, int]
    row_goal: float = 0.02
    floor: float = 0.002
    network_goal: float = 0.01
    min_visits: int = 12
    strict_visits: int = 32
    passes: tuple[int, ...] = (6, 12, 32, 64)  # visits of a model by the end of each pass
    session_visits: int = 0
    batch_models: int = 120  # that are open at once
    batch_bytes: int = 1 << 30

    @property
    def most_touched_bytes(self) -> int:
        return max(self.touched_bytes.values(), default=0)

    @property
    def visits(self) -> int:
        """How many visits it may take."""
        return (len(self.pieces) + len(self.networks)) * self.passes[-1]


class Samples:
    """Every visit of a build, on disk as soon as it is made."""

    HEADER = ("measured_at", "model", "raw_ms", "cached_reference_ms", "streaming_reference_ms")

    def __init__(self, path: Path, since: str) -> None:
        self.path = path
        self.visits: dict[str, list[Visit]] = {}
        self.since = now()  # of the first visit
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:  # a kill cut the last line
                with path.open("r+b") as file:
                    file.truncate(len(whole))
            self.visits = read_samples(path, since)
            times = [line["measured_at"] for line in _whole_lines(path) if line["measured_at"] >= since]
            self.since = min(times, default=self.since)
        fresh = not path.exists() or not path.stat().st_size
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if fresh:
            self._writer.writerow(self.HEADER)

    def count(self, model: str) -> int:
        return len(self.visits.get(model, ()))

    def add(self, model: str, visit: Visit, at: str | None = None) -> None:
        """Keep a visit; `at` stands as its time in the file (now, if not given)."""
        self.visits.setdefault(model, []).append(visit)
        times = (visit.raw_ms, *visit.reference)
        try:
            self._writer.writerow((at or now(), model, *(f"{ms:.6g}" for ms in times)))
            self._file.flush()
        except OSError as error:
            raise Failed(
                f"{self.path} cannot be written ({error.strerror}): make room; the same command goes on from here"
            ) from error

    def close(self) -> None:
        """Close the file; one without a single line of visits goes."""
        with suppress(OSError):  # of what could not be written, which was said
            self._file.flush()
        empty = os.fstat(self._file.fileno()).st_size <= len(",".join(self.HEADER)) + 1
        with suppress(OSError):
            self._file.close()
        if empty:
            self.path.unlink(missing_ok=True)


def read_samples(path: Path, since: str = "", until: str = "9999") -> dict[str, list[Visit]]:
    """Return the visits of a samples file that were made between two times, by model. A line that was cut is left out."""
    visits: dict[str, list[Visit]] = {}
    for line in _whole_lines(path):
        if since <= line["measured_at"] <= until:
            try:
                raw_ms, *references = times = [float(line[name]) for name in Samples.HEADER[2:]]
            except ValueError as error:
                raise Damaged(path, str(error)) from error
            if not all(0 < ms < math.inf for ms in times):
                raise Damaged(path, f"{line['model']!r} has a visit of {times} ms")
            visits.setdefault(line["model"], []).append(Visit(raw_ms, References(*references)))
    return visits


def _whole_lines(path: Path) -> Iterator[Mapping[str, str]]:
    """Yield the lines of a samples file that have a cell in every column."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        try:
            for line in csv.DictReader(file):
                if all(line.get(name) for name in Samples.HEADER):
                    yield line
        except csv.Error as error:
            raise Damaged(path, str(error)) from error


def reference_of(visits: Mapping[str, Sequence[Visit]]) -> References:
    """Return the references' medians over everything measured."""
    return median_reference([visit for of_model in visits.values() for visit in of_model])


class Bench:
    """Visits models until their intervals are narrow enough. `say` is told when it waits for a device that is busy."""

    def __init__(
        self,
        samples: Samples,
        open_model: Open,
        stopwatch: Stopwatch,
        rng: random.Random,
        plan: Plan,
        say: Callable[[str], object] = print,
    ) -> None:
        self.samples = samples
        self.open_model = open_model
        self.stopwatch = stopwatch
        self.rng = rng
        self.plan = plan
        self.calm = Calm([visit for visits in samples.visits.values() for visit in visits], say)

    def measure(
        self,
        models: Iterable[str],
        goals: Sequence[Goal],
        tick: Tick,
        limits: tuple[int, int],
        touches: Touches | None = None,
    ) -> None:
        """Visit the models until every goal is met or a model has had `limits[1]` visits.

        Only the models that are live at once count; each model is live once. `tick` is told of visits made or not
        needed, for each model limits[1] - limits[0] in all.
        """
        floor, limit = limits
        queue = list(dict.fromkeys(models))
        needed = self._open(queue, goals, limit)
        tick(sum(limit - floor if name not in needed else min(limit, self.samples.count(name)) - floor for name in queue))
        queue = [name for name in queue if name in needed]

        def record(name: str, visit: Visit) -> None:
            self.samples.add(name, visit)
            tick(1)
            if self.calm.waited_for(visit):
                self.stopwatch.pause()

        while queue:
            live: dict[str, Workload] = {}
            between: dict[str, Workload] = {}
            size = 0
            while queue and len(live) < self.plan.batch_models and size < self.plan.batch_bytes:
                name = queue.pop(0)
                live[name], more = self.open_model(name)
                if touches is not None and (touched := self.plan.touched_bytes.get(name, 0)):
                    between[name] = touches(touched)
                size += more
            visit_in_rounds(live, self.stopwatch, partial(self._open, list(live), goals, limit), record, self.rng, between)
            tick(sum(limit - self.samples.count(name) for name in live))

    def _open(self, batch: Sequence[str], goals: Sequence[Goal], limit: int) -> set[str]:
        """Return the models of the batch that need another visit."""
        visits = self.samples.visits
        reference, per_session = reference_of(visits) if visits else None, self.plan.session_visits
        found: dict[str, Measurement] = {}
        open_models = set()
        for model in batch:
            made = self.samples.count(model)
            if made < self.plan.min_visits or (per_session and made % per_session):  # sessions are made whole
                open_models.add(model)
            else:
                found[model] = summarise(visits[model], reference, per_session)
        here = set(batch)
        for goal in goals:
            mine = [model for model in goal.terms if model in here]
            if not mine or any(model not in found for model in mine):
                continue
            if any(model not in found and model not in visits for model in goal.terms):
                continue  # the rest of the row comes in a later batch
            for model in goal.terms:
                if model not in found:
                    found[model] = summarise(visits[model], reference, per_session)
            allowed_ms = max(goal.fraction * abs(sum(w * found[model].ms for model, w in goal.terms.items())), goal.floor_ms)
            half = {model: abs(goal.terms[model]) * found[model].half_width_ms for model in mine}
            if math.hypot(*half.values()) > allowed_ms:
                open_models.update(model for model, width in half.items() if width > allowed_ms / math.sqrt(len(half)))
        return {model for model in open_models if self.samples.count(model) < limit}


class Calm:
    """Waits while a device is far busier than it was: what disturbs it, such as an update, may soon be over."""

    def __init__(
        self,
        visits: Iterable[Visit],
        say: Callable[[str], object],
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.times = tuple(sorted(times) for times in zip(*(v.reference for v in visits), strict=True)) or ([], [])
        self.say, self.sleep, self.clock = say, sleep, clock
        self.started = clock()
        self.waited_s = 0.0
        self.pause_s = FIRST_PAUSE_S

    def waited_for(self, visit: Visit) -> bool:
        """Pause after a visit during which the device was too busy, longer each time in a row; return whether it did."""
        busy = ""
        for times, ms in zip(self.times, visit.reference, strict=True):
            bisect.insort(times, ms)
            usual = times[len(times) // 10]
            if len(times) >= ENOUGH and ms > TOO_NOISY * usual:
                busy = f"its reference workload takes {ms:.3g} ms instead of {usual:.3g}"
        most = min(MOST_WAITING_S, self.clock() - self.started - self.waited_s)
        if not busy or self.waited_s + self.pause_s > most:
            self.pause_s = FIRST_PAUSE_S
            return False
        if not self.waited_s:
            self.say(f"the device is busy ({busy}): waiting for it")
        self.sleep(self.pause_s)
        self.waited_s += self.pause_s
        self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)
        return True


def carry_out(plan: Plan, bench: Bench, tick: Tick, touches: Touches | None) -> None:
    """Make the visits of a plan.

    Networks, and then rows, are gone through several times: where a session's memory happens to lie, which moves its times by
    some percent, is drawn anew each time. Networks come first, as in a process that has opened and closed hundreds of sessions
    large ones take longer, by more than the references tell; what uses the table is in no such process.

    Raises:
        TooNoisy: the references varied so much that nothing measured beside them can be trusted.
    """
    alone = [Goal({plan.smallest: 1.0}, plan.network_goal)]
    bench.measure([plan.smallest], alone, lambda _: None, (0, plan.passes[0]))
    samples = bench.samples
    floor_ms = plan.floor * summarise(samples.visits[plan.smallest], reference_of(samples.visits)).ms
    passes = [
        (floor, limit, LOOSER if floor >= plan.strict_visits else 1.0)
        for floor, limit in zip((0, *plan.passes), plan.passes, strict=False)
    ]
    for floor, limit, looser in passes:
        networks = [Goal({model: 1.0}, looser * plan.network_goal) for model in plan.networks]
        bench.measure(plan.networks, networks, tick, (floor, limit))
        refuse_noise(samples.visits)
    for floor, limit, looser in passes:
        rows = [Goal(terms, looser * plan.row_goal, looser * floor_ms) for terms in plan.rows]
        bench.measure(plan.pieces, rows, tick, (floor, limit), touches)
        refuse_noise(samples.visits)


def refuse_noise(
    visits: Mapping[str, Sequence[Visit]], do: str = "End other work, wait, and give the same command again"
) -> None:
    """Refuse visits between which the references, which are always the same work, varied too much; `do` is what helps.

    Raises:
        TooNoisy: they did.
    """
    for place, name in enumerate(References._fields):
        times = sorted(visit.reference[place] for of_model in visits.values() for visit in of_model)
        low, high = times[len(times) // 10], times[9 * len(times) // 10]
        if high > TOO_NOISY * low:
            raise TooNoisy(
                f"the device is too busy or too hot to be measured: its reference workload took {low:.3g} to {high:.3g} ms "
                f"({name}, 10th to 90th percentile, of {median(times):.3g}); nothing is written. {do}"
            )


def usable_cpus() -> int:
    """Return how many CPUs this process may use, as far as its system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def now() -> str:
    """Return the time, UTC, to the millisecond."""
    utc = datetime.timezone.utc  # noqa: UP017  Python 3.10, which devices may have, has no datetime.UTC
    return datetime.datetime.now(utc).isoformat(timespec="milliseconds")
