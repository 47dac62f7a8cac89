"""Processes that share evaluations find what one process finds, evaluate nothing twice, and end together."""

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from search_together import search
from test_user_block import BLOCK, SPACE

from nas import distributed
from supernet import user_block
from supernet.elastic import ElasticSupernet
from supernet.metapath import Supernet
from supernet.space import SearchSpace

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


@pytest.mark.parametrize("kind", [Supernet, ElasticSupernet])
def test_what_was_trained_reaches_the_others_with_blocks_of_a_users_own(
    kind: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_blocks.py").write_text(BLOCK)
    (tmp_path / "space.yaml").write_text(SPACE)
    monkeypatch.chdir(tmp_path)
    wire: list[bytes] = []

    def broadcast(message: list[Any], _: int) -> None:
        if message[0] is None:
            message[0] = pickle.loads(wire.pop(0))
        else:
            wire.append(pickle.dumps(message[0]))

    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    monkeypatch.setattr(distributed, "connected", nullcontext)
    before = dict(user_block.loaded)
    try:
        user_block.loaded.clear()
        net = kind(SearchSpace.load("space.yaml"))
        distributed._tell("evaluator", net)

        # In another process, which has not run the user's file.
        user_block.loaded.clear()
        for name in [name for name in sys.modules if name.startswith("metapath_user")]:
            monkeypatch.delitem(sys.modules, name)
        what, received = distributed._told()
        assert what == "evaluator" and not wire
        assert received.space.to_yaml() == net.space.to_yaml()
        state = received.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    finally:
        user_block.loaded.clear()
        user_block.loaded.update(before)
