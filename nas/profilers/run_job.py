"""Time the models of a job folder on this device: `python3 run_job.py`, here, with onnxruntime and numpy installed.

It writes `results.json`, which is brought back and read with `nas-build-lut --import-results results.json`. Stopped, it
goes on where it was when it is started again. Leave the device alone meanwhile, on mains power.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

PIP = shlex.quote(sys.executable or "python3") + " -m pip install"
IN_VENV = " (in a venv, where the system's Python takes no packages)"
if sys.version_info < (3, 10):  # noqa: UP036  the device may have less than this package needs
    sys.exit("run_job.py needs Python 3.10 or newer: this is " + sys.version.split()[0])
sys.dont_write_bytecode = True  # on a full disk, Python may leave half a file, and then reads it
LACKS = "its build needs instructions that this processor or system lacks. Install another one: "


def try_import() -> None:
    """Import the runtime in a child process first: one that this processor cannot execute may kill the process that does."""
    child = subprocess.run([sys.executable, "-c", "import numpy, onnxruntime"], capture_output=True)
    if child.returncode not in (0, 1):  # 1: an ImportError, which is told below
        from importlib.metadata import packages_distributions, version  # an older Python, refused above, has not both

        how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        package = packages_distributions().get("onnxruntime", ["onnxruntime"])[0]
        found = version(package)
        sys.exit(f"{package} {found} is killed by {how} on import here: {LACKS}{PIP} '{package}<{found}'")


if __name__ == "__main__" and "--probe" not in sys.argv:
    try_import()
try:
    import numpy  # noqa: F401
    import onnxruntime
except ImportError as error:
    sys.exit(f"run_job.py needs onnxruntime and numpy ({error}): {PIP} onnxruntime numpy{IN_VENV}")

try:
    from nas.profilers.bench import JOB_SCHEMA, Bench, Damaged, Failed, Plan, Samples, TooNoisy, carry_out, now, usable_cpus
    from nas.profilers.ort_session import (
        OrtModel,
        cpu_id,
        environment,
        made_weights,
        pinned,
        throttle_bits,
        throttle_state,
        throttles,
        touches,
        warnings_about,
        with_weights,
    )
    from nas.profilers.timing import Stopwatch, Workload
except (ImportError, SyntaxError) as error:  # a copy that was cut
    print(f"run_job.py: nas/ beside it is not whole ({error}): copy the whole job folder again", file=sys.stderr)
    sys.exit(2)

ASKED_EVERY_S = 5.0  # the firmware, about throttling
LOCK = "run_job.lock"


def refuse(why: str) -> NoReturn:
    """End as the package's commands do where they cannot use what they are given: one line, exit code 2."""
    print(f"run_job.py: {' '.join(why.split())}", file=sys.stderr)
    sys.exit(2)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a job folder; its models must be the ones that it names."""
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        schema, form = manifest["schema"], manifest["format"]
        expected = {entry["file"]: entry["sha256"] for entry in manifest["models"].values()}
    except OSError as error:
        refuse(f"{path} cannot be read ({error.strerror}): copy the whole job folder again")
    except (ValueError, KeyError, TypeError, AttributeError):
        refuse(f"{path} is not whole: copy the job folder again")
    if schema != JOB_SCHEMA or form != "onnx":
        refuse(f"it reads ONNX jobs of schema {JOB_SCHEMA}, this one is {form} {schema}: export the job anew")
    for file, sha256 in expected.items():
        try:
            found = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        except OSError as error:
            refuse(f"{file} cannot be read ({error.strerror}): copy the whole job folder again")
        if found != sha256:
            refuse(f"{file} is not the file that the manifest names: copy the job folder again")
    return manifest


def locked(folder: Path) -> TextIO:
    """Return the lock of a job folder, held until it is closed: two runs would slow each other and share one samples file.

    The lock is the operating system's, so a process that is killed loses it. The file stays: whoever removes one that another
    process has opened lets two of them in. Windows has no such lock.
    """
    try:
        file = (folder / LOCK).open("a+")
    except OSError as error:
        refuse(f"{folder} cannot be written ({error.strerror}): copy the job folder to where you may write")
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: POSIX allows both
        file.seek(0)
        refuse(
            f"{folder} is in use by another run_job.py ({file.read(200) or 'it has just begun'}): wait until it ends, or stop "
            "it; the same command then goes on"
        )
    except OSError as error:
        print(f"warning: {folder} cannot be locked ({error.strerror}): start no second run_job.py there meanwhile", flush=True)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def open_model(folder: Path, manifest: dict[str, Any], name: str) -> tuple[OrtModel, int]:
    """Return the session of a model, and its bytes with its weights, which are made here: random, as large as in training."""
    entry = manifest["models"][name]
    data = with_weights((folder / entry["file"]).read_bytes(), made_weights(entry["weights"]))
    return OrtModel(data, manifest["settings"]["threads"]), len(data)


def probe(folder: Path) -> None:
    """Run one model in a child process, so that a runtime that this processor cannot execute is told, not crashed on."""
    installed = onnxruntime.__version__
    command = [sys.executable, str(folder / "run_job.py"), "--probe"]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=600)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise SystemExit(
            f"onnxruntime {installed} has not run one small model in 10 minutes here: try another version"
        ) from None
    if child.returncode == 0:
        return
    if child.returncode < 0:
        raise SystemExit(
            f"onnxruntime {installed} is killed by signal {-child.returncode} here: {LACKS}{PIP} 'onnxruntime<{installed}'"
        )
    last = (child.stderr.strip().splitlines() or ["no message"])[-1]
    raise SystemExit(f"onnxruntime {installed} cannot run a model of this job ({last}): {PIP} -U onnxruntime")


class Progress:
    """A line now and then: how much is done, and how long the rest takes at this pace."""

    def __init__(self, total: float) -> None:
        self.total, self.done = total, 0.0
        self.started = self.said = time.monotonic()

    def __call__(self, visits: float) -> None:
        self.done += visits
        clock = time.monotonic()
        if clock - self.said > 15 and self.done:
            self.said = clock
            left = (clock - self.started) * (self.total - self.done) / self.done
            print(f"{100 * self.done / self.total:3.0f} % done, at most {left / 60:.0f} min left", flush=True)


class Throttling:
    """What a Raspberry Pi's firmware says of throttling while a job runs: what is so when it is asked, every few seconds, and
    what it keeps of the time between."""

    NOW = 0xF  # bits of its word; those of any time before are 16 bits higher

    def __init__(self, bits: Callable[[], int | None] = throttle_bits, clock: Callable[[], float] = time.monotonic) -> None:
        self.bits, self.clock = bits, clock
        self.found = 0
        self.last = bits()  # None: there is no such firmware
        self.asked = clock()
        if self.last is not None:
            self.found = self.last & self.NOW

    def watch(self) -> None:
        """Ask, if it was not asked lately."""
        if self.clock() - self.asked >= ASKED_EVERY_S:
            self.ask()

    def ask(self) -> None:
        if self.last is None:
            return
        self.asked, word = self.clock(), self.bits()
        if word is not None:
            self.found |= (word | (word & ~self.last) >> 16) & self.NOW
            self.last = word


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probe", action="store_true", help="run one model once, and end")
    parser.add_argument("--again", action="store_true", help="begin anew, instead of going on from what was measured before")
    given = parser.parse_args()
    folder = Path(__file__).resolve().parent
    manifest = read_manifest(folder)
    if given.probe:
        open_model(folder, manifest, manifest["references"][0])[0]()
        return
    settings = manifest["settings"]
    if settings["threads"] > usable_cpus():
        refuse(
            f"the job is of {settings['threads']} threads, more than the CPUs that this process may use: run it on "
            f"a device that has as many, or export it with --threads {usable_cpus()} at most"
        )
    try:
        with locked(folder):
            probe(folder)
            measure(folder, manifest, given.again)
    except OSError as error:
        raise SystemExit(
            f"run_job.py: {error.filename or folder}: {error.strerror}; the same command goes on from here"
        ) from None


def measure(folder: Path, manifest: dict[str, Any], again: bool) -> None:
    """Carry out the plan of a job, or what is left of it, and write its results; `again` begins anew."""
    settings, plan = manifest["settings"], Plan(**manifest["plan"])
    place = environment(settings["threads"], settings["precision"], settings["batch"])
    place["warnings"] = warnings_about(place)
    for warning in place["warnings"]:
        print(f"warning: {warning}", flush=True)
    print(f"timing {len(plan.pieces) + len(plan.networks)} models with onnxruntime {onnxruntime.__version__}", flush=True)
    throttling = Throttling()
    tick = Progress(plan.visits)

    def watched(visits: float) -> None:
        tick(visits)
        throttling.watch()

    job = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    # Of this processor: the folder may be carried on to another device, or lie in a home that several share.
    kept = folder / f"samples-{job[:8]}-{cpu_id()}-{onnxruntime.__version__}.csv"
    if again:
        kept.unlink(missing_ok=True)
    try:
        samples = Samples(kept, "")
    except Damaged as error:
        refuse(str(error))
    if samples.visits:
        print(f"going on from {kept.name}; --again begins anew", flush=True)
    with pinned(settings["threads"]):

        def opened(name: str) -> tuple[Workload, int]:
            return open_model(folder, manifest, name)

        cached, streaming = (opened(name)[0] for name in manifest["references"])
        stopwatch = Stopwatch(cached, streaming)
        bench = Bench(samples, opened, stopwatch, random.Random(manifest["seed"]), plan)
        try:
            carry_out(plan, bench, watched, touches(plan.most_touched_bytes))
        except Failed as error:
            if isinstance(error, TooNoisy):
                kept.rename(kept.with_suffix(".noisy"))
            raise SystemExit(f"run_job.py: {error}") from None
        except KeyboardInterrupt:
            raise SystemExit("run_job.py: stopped; the same command goes on from here") from None
        finally:
            samples.close()
    throttling.ask()
    if said := throttles(throttling.found) or throttle_state():
        place["warnings"].append(f"the processor was throttled meanwhile ({said}): mend cooling or power supply")
        print(f"warning: {place['warnings'][-1]}", flush=True)
    place["finished_at"] = now()
    results = {
        "schema": JOB_SCHEMA,
        "unit": "ms",
        "job_sha256": job,
        "device": manifest["device"],
        "environment": place,
        "started_at": samples.since,
        "finished_at": place["finished_at"],
        "visits": {name: [[v.raw_ms, *v.reference] for v in visits] for name, visits in samples.visits.items()},
        "flags": {},
    }
    part = folder / "results.json.part"
    part.write_text(json.dumps(results))
    os.replace(part, folder / "results.json")
    print(f"done: bring {folder / 'results.json'} back", flush=True)


if __name__ == "__main__":
    main()
