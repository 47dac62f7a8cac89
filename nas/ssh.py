"""A job folder on another machine and back, with the system's ssh and scp."""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nas.profilers.bench import Failed
from nas.progress import say
from supernet.errors import InputError

SSH_FAILED = 255  # its exit code where it is ssh that failed, not what it ran
REFUSED = 78  # that of `_trial` where it refuses; shells and Python have other ones


@dataclass(frozen=True)
class Address:
    """Another machine, as ssh knows it, and the Python to use there."""

    host: str
    port: int | None
    python: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Return the address of `ssh://user@host[:port][/path/to/python]`."""
        match = re.fullmatch(r"ssh://((?:[\w.-]+@)?\w[\w.-]*)(?::(\d{1,5}))?(/[^?#\s]*)?", url)
        if not match or int(match[2] or 22) > 65535:
            raise InputError(f"{url!r} is no address: give ssh://user@host, or ssh://user@host:port/path/to/python")
        return cls(match[1], int(match[2]) if match[2] else None, match[3] or "python3")


def reach(address: Address) -> None:
    """Ask another machine for its Python, with what a job needs: before anything is made for it, they must be there.

    Raises:
        InputError: there is no ssh here, it does not get there, or that Python cannot run jobs.
        Failed: there is no such Python there.
    """
    say(f"asking {address.host} for {address.python}")
    command = [*_ssh(address), address.host, f"{shlex.quote(address.python)} -c {shlex.quote(_trial(address))}"]
    _step(f"run {address.python} on {address.host}", command, first=True)


def _trial(address: Address) -> str:
    """Return a program, for any Python, that refuses in one line where this one cannot run jobs. It is one line itself, which
    all shells take in quotes."""
    cannot = f"{address.python} on {address.host} cannot run jobs ("
    port = f":{address.port}" if address.port else ""
    newer = f"): give ssh://{address.host}{port}/path/to/python, one of 3.10 or newer"
    in_venv = " (in a venv, where the system's Python takes no packages)"
    install = f"): run there: {shlex.quote(address.python)} -m pip install onnxruntime numpy{in_venv}"
    dies = "importing onnxruntime kills it: its build needs instructions that the processor lacks"
    another = f"): install another version there: {shlex.quote(address.python)} -m pip install '"
    program = f"""
import subprocess, sys
def refuse(why, do):
    sys.stderr.write({cannot!r} + why + do + chr(10))
    sys.exit({REFUSED})
if sys.version_info < (3, 10):
    refuse("it is Python %d.%d" % tuple(sys.version_info[:2]), {newer!r})
if subprocess.call([sys.executable, "-c", "import numpy, onnxruntime"], stderr=subprocess.DEVNULL) not in (0, 1):
    from importlib.metadata import packages_distributions, version
    package = packages_distributions().get("onnxruntime", ["onnxruntime"])[0]
    refuse({dies!r}, {another!r} + package + "<" + version(package) + "'")
try:
    import numpy, onnxruntime
except ImportError as error:
    refuse(" ".join(str(error).split())[:200], {install!r})
"""
    return f"exec({program!r})"


def _ssh(address: Address) -> list[str]:
    return ["ssh", *(["-p", str(address.port)] if address.port else [])]


def run_over_ssh(address: Address, folder: Path) -> Path:
    """Copy a job folder to another machine, run it there, and bring its results back.

    The system's ssh and scp do it, with their configuration and keys; the folder stays there, so that a run that is
    stopped goes on.

    Raises:
        InputError: there is no ssh here.
        Failed: one of the steps failed.
    """
    host, port = address.host, address.port
    job = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    there = f"metapath-nas-job-{job[:12]}"
    ssh = _ssh(address)
    scp = ["scp", "-q", *(["-P", str(port)] if port else [])]
    say(f"copying {folder} to {host}:{there}")
    _step(f"make a folder on {host}", [*ssh, host, f"mkdir -p {there}"])
    sent = [str(path) for path in sorted(folder.iterdir()) if path.name in ("manifest.json", "models", "nas", "run_job.py")]
    _step(f"copy the job to {host}", [*scp, "-r", *sent, f"{host}:{there}/"])
    say(f"running it on {host}")
    _step(f"run the job on {host}", [*ssh, host, f"cd {there} && {shlex.quote(address.python)} run_job.py"], shown=True)
    _step(f"bring the results from {host}", [*scp, f"{host}:{there}/results.json", str(folder / "results.json")])
    return folder / "results.json"


def _step(what: str, command: Sequence[str], shown: bool = False, first: bool = False) -> None:
    out = sys.stderr if shown else subprocess.DEVNULL
    try:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True)  # noqa: S603
    except OSError as error:
        raise InputError(f"cannot {what}: {command[0]} is not there ({error.strerror}); install an OpenSSH client") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        if first and done.returncode == SSH_FAILED:  # later on, a connection that worked has broken
            raise InputError(f"cannot {what}: {last}; give an address and a user that `ssh` gets to")
        if first and done.returncode == REFUSED:
            raise InputError(last)
        raise Failed(f"cannot {what}: {last}")
