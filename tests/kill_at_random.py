"""Work that the system kills: `python kill_at_random.py FOLDER build|search KILLS`.

It is done once in FOLDER/whole; then it is begun in FOLDER/killed so many times, each time in a process that gets SIGKILL after
a random while, and let end at last. It prints the exit codes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from test_cli import SETTINGS, SPACE, additive_table
from test_lut import Device, small_space

from nas import cli
from nas.lut import build_table
from nas.profilers.bench import Samples
from nas.table import LatencyTable
from supernet.space import SearchSpace


def build(out: str, begun: Callable[[], object]) -> None:
    """Build a table of the pretended device, whose visits take no time, but for what is waited at each."""
    add = Samples.add

    def add_slowly(self: Samples, *args: Any) -> None:
        begun()
        time.sleep(0.003)
        add(self, *args)

    with patch.object(Samples, "add", add_slowly):
        build_table(Device(), small_space(), Path(out))


def search(out: str, begun: Callable[[], object]) -> None:
    begun()
    ms = 0.5 * LatencyTable.load(Path("tables/board-cpu.csv")).predict_ms(SearchSpace.load("micro.yaml").largest)
    where = ["--device", "board-cpu", "--table", "tables/board-cpu.csv", "--space", "micro.yaml", "--config", "settings.yaml"]
    cli.search(["--target-ms", f"{ms:.6f}", *where, "--out", out])


WORK = {"build": (build, 0.06), "search": (search, 1.0)}
"""What is killed, and after which share of its time at most, from where it says that it has begun."""


def main(folder: Path, what: str, kills: int) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    Path("micro.yaml").write_text(SPACE)
    Path("settings.yaml").write_text(SETTINGS)
    additive_table(SearchSpace.load("micro.yaml"), "board-cpu").save(Path("tables"))
    work, share = WORK[what]
    rng = random.Random(7)

    def ended(out: str, after: float | None) -> int:
        """Return the exit code of the work in a process of its own, which is killed after so many seconds."""
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            work(out, lambda: os.write(tell, b"."))
            os._exit(0)
        os.close(tell)
        if after is not None:
            os.read(told, 1)
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        os.close(told)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    start = time.monotonic()
    whole = ended("whole", None)
    seconds = time.monotonic() - start
    codes = [ended("killed", rng.uniform(0, share * seconds)) for _ in range(kills)]
    print(json.dumps({"codes": codes, "last": [whole, ended("killed", None)]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
