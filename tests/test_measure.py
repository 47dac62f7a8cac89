"""A network that is timed by itself: how often it is opened, and what is said of the machine's pace."""

import errno
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_lut import Device

import nas
from nas.measure import ALONE_MAX_VISITS, CACHED, SESSION_VISITS, STREAMING, Reopened, measure_alone
from nas.profilers import apart, ort_cpu
from nas.profilers.bench import Failed
from nas.profilers.ort_cpu import OrtCpu
from nas.profilers.timing import References, Visit, Workload
from supernet.errors import InputError


def test_a_network_of_any_kind_is_opened_anew_as_often_as_one_of_ours() -> None:
    device = Device(noise=0.5)
    opened = []

    def open_one() -> Workload:
        opened.append(device.open(CACHED)[0])
        return opened[-1]

    found = measure_alone(device, Reopened(open_one), None)
    assert len(opened) == -(-found.visits // SESSION_VISITS) > 1


def test_a_measurement_at_another_pace_than_the_table_s_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """How much a network slows down beside busy neighbours is not what the references do: accuracy.md has figures."""
    device = Device()
    paces = [1.3, 1.2, 0.5]
    now = device.stopwatch().visit(device.open(CACHED)[0]).reference
    for slower in paces:
        at_the_table = References(now.cached_ms / slower, now.streaming_ms)
        measure_alone(device, Reopened(lambda: device.open(CACHED)[0]), at_the_table)
    busier, quieter = capsys.readouterr().err.splitlines()
    assert busier.startswith("warning: a reference workload takes 1.30 times as long as when the table was built")
    assert busier.endswith("measure again in a quieter hour")
    assert "takes 0.50 times as long" in quieter and quieter.endswith("build the table anew in a quiet hour")


def test_on_a_cpu_every_session_is_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes differ from each other by 5 %, sessions of one process by nothing: the interval is of the former."""
    started: list[tuple[bytes, ...]] = []

    def visits_apart(models: Sequence[Path], threads: int, visits: int) -> list[Visit]:
        started.append(tuple(path.read_bytes() for path in models))
        assert (threads, visits) == (2, SESSION_VISITS)
        return [Visit(1.0 + 0.1 * (len(started) % 2), References(1.0, 1.0))] * visits

    monkeypatch.setattr(ort_cpu, "visits_apart", visits_apart)
    profiler, arch = OrtCpu(threads=2), nas.zoo("efficientvit_m0")
    found = measure_alone(profiler, arch, None)
    assert len(started) == ALONE_MAX_VISITS / SESSION_VISITS and found.visits == ALONE_MAX_VISITS
    assert found.low_ms < 1.04 and found.high_ms > 1.06
    assert len(set(started)) == 1 and started[0][0] == profiler.onnx(tuple(arch.layers()))
    for data, reference in zip(started[0][1:], (CACHED, STREAMING), strict=True):
        assert len(data) == pytest.approx(len(profiler.onnx(reference)), rel=0.01)
    measure_alone(profiler, b"any model", None)
    assert started[-1][0] == b"any model"


def test_a_process_times_one_session_and_finds_what_this_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not the standard library')")
    monkeypatch.chdir(tmp_path)
    profiler = OrtCpu()
    with profiler.apart(profiler.onnx(CACHED)) as session:
        visits = session(3)
    assert len(visits) == 3 and all(min(visit.raw_ms, *visit.reference) > 0 for visit in visits)


def test_a_process_that_fails_is_said_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(Failed) as told:
        apart.visits_apart([broken] * 3, 1, 1)
    assert "a process that was to time a model of 0 MB ended by exit code 1: " in str(told.value)
    assert "\n" not in str(told.value)


def test_a_full_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    with pytest.raises(InputError, match=r"not there.*set TMPDIR"), OrtCpu().apart(b"any model"):
        pass

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left.*set TMPDIR"), OrtCpu().apart(b"any model"):
        pass  # no InputError, which would be the request's fault, and of which a search for throughput leaves a grouping out
