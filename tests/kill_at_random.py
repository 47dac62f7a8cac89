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
from supernet import files
from supernet.space import SearchSpace


def build(out: str, begun: Callable[[], object]) -> None:
    """Build a table of the pretended device, whose visits take no time, but for a moment in which a kill can come."""
    add = Samples.add

    def add_and_say(self: Samples, *args: Any) -> None:
        begun()
        time.sleep(0.003)
        add(self, *args)

    with patch.object(Samples, "add", add_and_say):
        build_table(Device(), small_space(), Path(out))


def search(out: str, begun: Callable[[], object]) -> None:
    """Search for a network on a table; a file that gets its name is a sign of life."""
    ms = 0.5 * LatencyTable.load(Path("tables/board-cpu.csv")).predict_ms(SearchSpace.load("micro.yaml").largest)
    where = ["--device", "board-cpu", "--table", "tables/board-cpu.csv", "--space", "micro.yaml", "--config", "settings.yaml"]
    replace = os.replace

    def replace_and_say(*names: Any) -> None:
        replace(*names)
        begun()

    with patch.object(files.os, "replace", replace_and_say):
        cli.search(["--target-ms", f"{ms:.6f}", *where, "--out", out])


WORK = {"build": (build, 38), "search": (search, 5)}
"""What is killed, and after how many signs of life at most."""


def main(folder: Path, what: str, kills: int) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    Path("micro.yaml").write_text(SPACE)
    Path("settings.yaml").write_text(SETTINGS)
    additive_table(SearchSpace.load("micro.yaml"), "board-cpu").save(Path("tables"))
    work, most = WORK[what]
    rng = random.Random(7)

    def ended(out: str, signs: int = 0) -> int:
        """Return the exit code of the work in a process of its own, which is killed a moment after so many signs of life."""
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            work(out, lambda: os.write(tell, b"."))
            os._exit(0)
        os.close(tell)
        for _ in range(signs):
            os.read(told, 1)
        if signs:
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        os.close(told)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    whole = ended("whole")
    codes = [ended("killed", rng.randint(1, most)) for _ in range(kills)]
    print(json.dumps({"codes": codes, "last": [whole, ended("killed")]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
