"""Progress of long work: a bar with the time left on a terminal, else plain lines, all on stderr. How times are said."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nas.parallel import is_first

FIRST_LINE_S = 4.0
LINE_EVERY_S = 15.0

Tick = Callable[[float], None]


def say(message: str) -> None:
    """Print one line for people on stderr; stdout is for results. Of several processes, the first one speaks."""
    if is_first():
        print(message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return a duration as people say it: `45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def per_image(ms: float, batch: int) -> str:
    """Return what stands beside the milliseconds of a call at a larger batch than 1."""
    return f", {ms / batch:.4g} ms an image" if batch > 1 else ""


@contextmanager
def progress(what: str, total: float, done: float = 0.0) -> Iterator[Tick]:
    """Show how far `what` is; yields a function that takes how much has been done since its last call.

    `done` is what an earlier run had done already; it does not count for the time left.
    """
    if not is_first():
        yield lambda amount: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total)
            bar.advance(task, done)
            yield lambda amount: bar.advance(task, amount)
        return

    start = time.monotonic()
    state = {"now": done, "said": start - LINE_EVERY_S + FIRST_LINE_S}

    def tick(amount: float) -> None:
        state["now"] += amount
        now = time.monotonic()
        finished = state["now"] >= total
        share = (state["now"] - done) / (total - done) if total > done else 1.0
        if share > 0.02 and now - state["said"] >= LINE_EVERY_S and not finished:
            state["said"] = now
            left = (now - start) / (state["now"] - done) * (total - state["now"])
            say(f"{what}: {100 * state['now'] / total:.0f} %, {duration(left)} left")

    yield tick
    if state["now"] > done:
        say(f"{what}: done in {duration(time.monotonic() - start)}")
