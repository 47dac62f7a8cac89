"""Time an ONNX model in a process of its own: `apart.main` is what the child runs, with onnxruntime and numpy alone.

Where a session's memory happens to lie moves its times by a percent or two, and a process differs from another one by more:
on the machine of docs/accuracy.md by 2 to 4 % (standard deviation). A process that has opened many sessions is slower, too.
What a network takes where it is used, only fresh processes tell.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nas.profilers.bench import Failed
from nas.profilers.ort_session import OrtModel
from nas.profilers.timing import References, Stopwatch, Visit


def visits_apart(models: Sequence[Path], threads: int, visits: int) -> list[Visit]:
    """Return the visits of one session of the first of `models`, paired with both references, which are the others, in a child
    process, which runs on the cores that this one is kept on.

    Raises:
        Failed: the child ended without an answer; the last line that it wrote says why.
    """
    # The child is to find what this process finds, and nothing that happens to lie in the folder where it is started.
    code = f"import sys; sys.path[:] = {[str(p) for p in sys.path]}; from nas.profilers.apart import main; main()"
    command = [sys.executable or "python3", "-c", code, *map(str, models), str(threads), str(visits)]
    child = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    if child.returncode:
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        why = (child.stderr.strip().splitlines() or ["it says nothing"])[-1]
        size = models[0].stat().st_size / 1e6
        raise Failed(f"a process that was to time a model of {size:.0f} MB ended by {how}: {why}")
    return [Visit(raw_ms, References(*around)) for raw_ms, around in json.loads(child.stdout.splitlines()[-1])]


def main() -> None:
    """Print the visits of one session as a line of JSON: `[[ms, [ms of the cached, of the streaming reference]], ...]`."""
    *files, threads, visits = sys.argv[1:]
    run, cached, streaming = (OrtModel(Path(file), int(threads)) for file in files)
    watch = Stopwatch(cached, streaming)
    found = [watch.visit(run) for _ in range(int(visits))]
    print(json.dumps([(visit.raw_ms, visit.reference) for visit in found]))
