"""The first signal waits for the step under way, the second one does not; of several processes the first alone stops."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from nas import stopping
from nas.parallel import Group
from nas.stopping import outlive


def send(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Fail, and put things right, where a test leaves other handlers than it found."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    after = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_at_the_end_of_the_block(number: signal.Signals) -> None:
    done = False
    with pytest.raises(KeyboardInterrupt), stopping.stopping() as asked:
        assert not asked()
        send(number)
        done = asked()
    assert done


def test_the_second_signal_acts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stopping.stopping():
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_an_error_in_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(FloatingPointError), stopping.stopping():
        send()
        raise FloatingPointError


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_that_torchrun_hands_on_again_is_the_same_one(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "SAME_S", float("inf"))
    ended, group = [], Group(rank, 2)
    try:
        with stopping.stopping(group) as asked:
            send()
            send()
            ended.append(asked())
    except KeyboardInterrupt:
        ended.append(True)
    assert ended == ([True, True] if group.first else [False]), "the first process alone stops"
    monkeypatch.setattr(stopping, "SAME_S", -1.0)
    with pytest.raises(KeyboardInterrupt), stopping.stopping(group):
        send()
        with pytest.raises(KeyboardInterrupt):
            send()
        raise KeyboardInterrupt


def test_another_thread_changes_no_handlers() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with stopping.stopping() as asked:
            found.extend([asked(), signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, before]


@pytest.mark.parametrize("grace", [0.0, 3600.0])
def test_a_decoding_process_outlives_signals_for_a_while(grace: float, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    ended = threading.Event()
    monkeypatch.setattr(stopping, "GRACE_S", grace)
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    try:
        outlive()
        send(signal.SIGINT)
        assert not ended.is_set()
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert ended.wait(60) if not grace else not ended.is_set()
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
