"""Processes that share evaluations find what one process finds, evaluate nothing twice, and end together."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from search_together import search

TESTS = Path(__file__).parent


@contextmanager
def two_processes(folder: Path, what: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Start two processes of a search as torchrun does, and leave none running."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    shared = {**os.environ, "PYTHONPATH": paths, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, str(TESTS / "search_together.py"), str(folder), what]
    processes = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()


def ended(folder: Path, what: str) -> tuple[list[int], list[str]]:
    """Return the exit codes of two processes of a search, and what each said."""
    with two_processes(folder, what) as processes:
        said = [process.communicate(timeout=300)[1] for process in processes]
        return [process.returncode for process in processes], said


def test_two_processes_find_what_one_finds_and_evaluate_nothing_twice(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    codes, said = ended(two, "searches")
    assert codes == [0, 0], said
    one.mkdir()
    search(one)
    for name in ("drops.csv", "trajectory.csv", "searched.yaml", "drops-recovered.csv"):
        assert (one / name).read_text() == (two / name).read_text(), name
    # Results come in another order, and none is missing.
    alone, known = ((folder / "evaluations.csv").read_text().splitlines() for folder in (one, two))
    assert sorted(alone) == sorted(known)
    evaluated = [(two / f"evaluated-{rank}").read_text().splitlines() for rank in range(2)]
    assert len(set(evaluated[0] + evaluated[1])) == len(evaluated[0] + evaluated[1]) == len(known) - 1
    assert min(map(len, evaluated)) > len(known) / 4  # both had their share


def test_a_refusal_ends_all_processes_with_its_code(tmp_path: Path) -> None:
    codes, said = ended(tmp_path / "refused", "refuses")
    assert codes == [2, 2]
    assert said[0].splitlines()[-1] == "search: this cannot be used: give something else"  # gloo may have warned before
    assert "search:" not in said[1]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are killed in another way here")
def test_where_one_process_dies_the_other_ends_and_what_is_known_is_kept(tmp_path: Path) -> None:
    codes, said = ended(tmp_path / "died", "dies")
    assert codes == [1, -signal.SIGKILL]
    assert said[0].splitlines()[-1] == "search: another process of this command has ended: the same command goes on from here"
    assert len((tmp_path / "died" / "evaluations.csv").read_text().splitlines()) > 1  # what came before the first exchange
