"""Ctrl-C and SIGTERM while steps are taken: the step under way ends, and what was computed is kept."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from nas.parallel import ALONE, Group

SAME_S = 5.0  # torchrun hands on a signal that a batch system has sent to every process: within this time both are one
GRACE_S = 30.0  # torchrun's, after which it kills


@contextmanager
def stopping(group: Group = ALONE) -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT or SIGTERM has come, which in the block stops nothing by itself.

    After a step, ask it, and where it says so, keep what there is and leave the block, which then raises KeyboardInterrupt. A
    second signal acts at once. Of the processes of a `group` the first alone is stopped; the others ignore the signal, as that
    one needs them until its step has ended, and end when it has gone. In another thread than the main one, which alone gets
    signals, nothing is changed.

    Raises:
        KeyboardInterrupt: at the end of the block, if a signal has come; in it, at the second one.
    """
    came: list[float] = []  # when

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if came and (group.size == 1 or now - came[0] > SAME_S):
            raise KeyboardInterrupt
        came.append(now)

    def asked() -> bool:
        return group.first and bool(came)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that Python did not set
    if asked():
        raise KeyboardInterrupt


def outlive(worker: int = 0) -> None:
    """Let a process that decodes images outlive the signals of a terminal, a batch system or torchrun, which all processes get:
    the step under way still needs it. It ends when the one that it works for lets it go, or `GRACE_S` after SIGTERM."""

    def later(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(GRACE_S, os._exit, (1,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, later)
