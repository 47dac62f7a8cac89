"""Killed anywhere, on a full disk, beside another process: nothing is lost, nothing is half written, and one line says why."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import board_table, refused
from test_lut import Device, small_space
from test_supernet_training import SETTINGS as SUPERNET
from test_supernet_training import SPACE as SMALL
from test_supernet_training import differing, labelled, trained
from test_verify import board_says

import nas
from nas import cli, supernet_training
from nas.alone import MEASURING, alone, turn
from nas.data import ImageData, load_images
from nas.lut import build_table
from nas.table import space_sha256
from supernet import files
from supernet.arch import ArchConfig, Stage
from supernet.errors import InputError
from supernet.files import PART, write_atomically
from supernet.space import SearchSpace
from supernet.specs import MB4D

OWN = {**os.environ, "PYTHONPATH": str(Path(nas.__file__).parents[1])}  # what a process of its own imports
posix = pytest.mark.skipif(os.name != "posix", reason="signals, limits and devices of POSIX")
TINY = ArchConfig("tiny", 16, 10, (Stage(8, 2, (MB4D(8),)), Stage(8, 2, (MB4D(8),))))
RECIPE = """{epochs: 3, batch_size: 64, learning_rate: 4.0e-3, layer_scale: 0.5, clip_norm: 5.0, images_per_epoch: 64,
accelerator: cpu}"""
TRAIN = ["tiny.yaml", "--recipe", "recipe.yaml", "--seed", "3"]


@cache
def digits(path: None, image_size: int, seed: int, score_images: int = 512, train_size: int | None = None) -> ImageData:
    """Loaded once for all the commands that are killed and begin again."""
    return load_images(path, image_size, seed, score_images=score_images, train_size=train_size)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    TINY.save("tiny.yaml")
    Path("recipe.yaml").write_text(RECIPE)
    monkeypatch.setattr("nas.data.load_data", digits)
    monkeypatch.setattr("nas.search.load_data", digits)


def ended(command: Callable[[list[str]], None], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """Run a command that ends early; return its exit code and the last line that it says."""
    with pytest.raises(SystemExit) as end:
        command(arguments)
    said = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line or line.startswith("usage:") for line in said)
    return end.value.code, said[-1]


def left_overs(folder: Path | str = ".") -> list[Path]:
    return [path for path in Path(folder).rglob(".*") if path.is_file()]


# -- A file is whole or absent -----------------------------------------------------------------------------------------

STEPS = [(files.tempfile, "mkstemp"), (files.os, "fdopen"), (files.os, "fsync"), (files.os, "chmod"), (files.os, "replace")]
FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device"), OSError, "make room; what was there before is as it was"),
    (OSError(errno.EFBIG, "File too large"), OSError, "File too large"),
    (OSError(errno.EROFS, "Read-only file system"), InputError, "choose another place"),
    (OSError(errno.EACCES, "Permission denied"), InputError, "(Permission denied)"),
    (KeyboardInterrupt(), KeyboardInterrupt, ""),
]


@pytest.mark.parametrize(("failure", "kind", "said"), FAILURES)
@pytest.mark.parametrize(("module", "step"), STEPS, ids=[step for _, step in STEPS])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    module: Any, step: str, failure: BaseException, kind: type[BaseException], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically("file", "old")

    def fail(*args: Any, **more: Any) -> None:
        if step == "fdopen":
            os.close(args[0])
        raise failure

    with monkeypatch.context() as patch, pytest.raises(kind) as failed:
        patch.setattr(module, step, fail)
        write_atomically("file", "new")
    assert said in str(failed.value) and not (kind is OSError and isinstance(failed.value, InputError))
    assert Path("file").read_text() == "old"
    assert not left_overs()


def test_a_mac_s_drive_is_asked_to_write_its_own_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    asked: list[int] = []
    monkeypatch.setattr(files.sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda handle, what: asked.append(what))
    monkeypatch.setattr(files.os, "fsync", lambda handle: asked.append(-1))
    write_atomically("file", "new")
    assert asked == [51]

    def unknown(handle: int, what: int) -> None:
        raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")

    monkeypatch.setattr(fcntl, "fcntl", unknown)
    write_atomically("file", "newer")
    assert asked == [51, -1]


def test_what_is_no_file_is_not_replaced() -> None:
    Path("folder").mkdir()
    with pytest.raises(InputError, match="no file has that name"):
        write_atomically("folder", "x")
    if os.name == "posix":
        with pytest.raises(InputError, match="no file has that name"):
            write_atomically(os.devnull, "x")
        assert Path(os.devnull).is_char_device()
    with pytest.raises(InputError, match=r"tiny\.yaml.x cannot be written"):
        write_atomically(Path("tiny.yaml") / "x", "x")
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically("x" * 300, "x")


# -- Killed at every write ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killed_until_done(work: Callable[[], Any], times: int = 1) -> set[str]:
    """Start the work again and again until it ends. It is killed, as far as it can see, whenever it writes a file that it has
    been killed at fewer than so many times: in the midst of the write, which leaves what is written so far, or right after it,
    in turns. Return the names of the files."""
    kills: Counter[str] = Counter()
    real = os.replace

    def write(temporary: str, path: Path) -> None:
        name = Path(path).name
        if kills[name] < times:
            kills[name] += 1
            if kills.total() % 2:
                real(temporary, path)
            raise Killed
        real(temporary, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "replace", write)
        patch.setattr(files, "_remove", lambda temporary: None)  # a process that is gone removes nothing
        for _ in range(100):
            with suppress(Killed):
                work()
                return set(kills)
    raise AssertionError("never done")


def test_a_training_that_is_killed_at_every_file_ends_with_the_same_weights(capsys: pytest.CaptureFixture[str]) -> None:
    cli.train([*TRAIN, "--out", "whole"])
    names = killed_until_done(lambda: cli.train([*TRAIN, "--out", "killed"]), times=2)
    assert names >= {"request.json", "checkpoint.pt", "metrics.csv", "arch.yaml", "model.safetensors"}
    for name in ("model.safetensors", "arch.yaml"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes()
    assert not left_overs("killed"), "what the killed ones left is removed"
    cli.export(["whole/arch.yaml", "--weights", "whole/model.safetensors", "--format", "onnx", "--out", "whole.onnx"])
    export = ["killed/arch.yaml", "--weights", "killed/model.safetensors", "--format", "onnx", "--out", "killed.onnx"]
    assert "killed.onnx" in killed_until_done(lambda: cli.export(export), times=2)
    assert Path("killed.onnx").read_bytes() == Path("whole.onnx").read_bytes()


def test_a_table_that_is_killed_at_every_file_is_the_same() -> None:
    space = small_space((16,))
    build_table(Device(), space, Path("whole"))
    names = killed_until_done(lambda: build_table(Device(), space, Path("killed")))
    marker = f"pretended-cpu.{space_sha256(space)[:8]}.building.json"
    assert names == {"pretended-cpu.csv", "pretended-cpu.meta.json", marker}
    assert Path("killed/pretended-cpu.csv").read_bytes() == Path("whole/pretended-cpu.csv").read_bytes()
    assert not left_overs("killed")


def test_a_search_that_is_killed_at_every_file_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nas.report.device.published_networks", lambda run: ([], []))  # for each of many searches
    table = board_table(tmp_path, monkeypatch)
    ms = 0.8 * table.predict_ms(SearchSpace.load("micro.yaml").largest)
    search = ["--target-ms", f"{ms:.6f}", "--device", "board-cpu", "--space", "micro.yaml", "--config", "settings.yaml"]
    cli.search([*search, "--out", "whole"])
    names = killed_until_done(lambda: cli.search([*search, "--out", "killed"]))
    assert {"request.json", "space.yaml", "supernet.pt", "channels.json", "evaluations.csv", "drops.csv"} <= names
    assert {"importance.csv", "frontier.csv", "trajectory.csv", "searched.yaml", "weights.safetensors"} <= names
    assert {"result.json", "report.html"} <= names
    for name in ("searched.yaml", "weights.safetensors", "drops.csv", "trajectory.csv", "evaluations.csv"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes(), name
    found, expected = (json.loads(Path(run, "result.json").read_text()) for run in ("killed", "whole"))
    assert found == expected
    assert not left_overs("killed")

    # Asked again for another target, by the drops alone.
    again = ["--from", "whole", "--target-ms", f"{0.7 * ms:.6f}"]
    cli.search([*again, "--out", "next"])
    names = killed_until_done(lambda: cli.search([*again, "--out", "again"]), times=2)
    assert names == {"request.json", "searched.yaml", "trajectory.csv", "frontier.csv", "result.json"}
    for name in ("searched.yaml", "result.json", "frontier.csv"):
        assert Path("again", name).read_bytes() == Path("next", name).read_bytes()

    # Measured on its device: what is exported, and what comes back.
    Path("whole").rename("run")
    assert "manifest.json" in killed_until_done(lambda: cli.search(["--from", "run", "--verify"]))
    results = board_says(0.99 * ms)
    assert "measurements.csv" in killed_until_done(lambda: cli.search(["--from", "run", "--verify", str(results)]))
    assert json.loads(Path("run/result.json").read_text())["met"] is True
    assert not left_overs("run")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="forking is safe on Linux alone")
def test_a_search_that_the_system_kills_at_five_moments_finds_the_same(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("kill_at_random.py")), str(tmp_path), "search", "5"]
    done = subprocess.run(command, capture_output=True, text=True, env=OWN | {"OPENBLAS_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["last"] == [0, 0] and -signal.SIGKILL in said["codes"], done.stderr
    for name in ("searched.yaml", "weights.safetensors", "drops.csv", "trajectory.csv", "evaluations.csv", "result.json"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes(), name
    assert not left_overs("killed")


def killed_at(name: str, after: bool, work: Callable[[], Any]) -> None:
    """Kill the work where it writes the file of this name: before the file has it, or right after."""
    real = os.replace

    def write(temporary: str, path: Path) -> None:
        if Path(path).name != name or after:
            real(temporary, path)
        if Path(path).name == name:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(files.os, "replace", write)
        patch.setattr(files, "_remove", lambda temporary: None)
        work()


def test_a_verification_that_is_killed_leaves_the_old_network_or_the_new_one_and_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nas.report.device.published_networks", lambda run: ([], []))  # for each of many searches
    table = board_table(tmp_path, monkeypatch)
    ms = 0.8 * table.predict_ms(SearchSpace.load("micro.yaml").largest)
    search = ["--target-ms", f"{ms:.6f}", "--device", "board-cpu", "--space", "micro.yaml", "--config", "settings.yaml"]
    search += ["--out", "run"]
    cli.search(search)
    cli.search(["--from", "run", "--verify"])
    verify = ["--from", "run", "--verify", str(board_says(1.3 * table.predict_ms(ArchConfig.load("run/searched.yaml"))))]
    written = ("trajectory.csv", "searched.yaml", "weights.safetensors", "result.json")

    def held() -> list[bytes]:
        return [Path("run", name).read_bytes() for name in written]

    old = held()
    shutil.copytree("run", "before")
    cli.search(verify)
    new = held()
    assert old[1] != new[1], "it missed, so that another network was found"
    for name, after, command in (
        ("trajectory.csv", False, search),
        ("searched.yaml", True, search),
        ("searched.yaml", True, verify),
        ("weights.safetensors", True, search),
        ("result.json", True, verify),
    ):
        shutil.rmtree("run")
        shutil.copytree("before", "run")
        killed_at(name, after, lambda: cli.search(verify))
        cli.search(command)
        assert held() == new, f"killed {'after' if after else 'at'} {name}"
    shutil.rmtree("run")
    shutil.copytree("before", "run")
    killed_at("measurements.csv", True, lambda: cli.search(verify))
    cli.search(search)
    assert held() == old, "nothing was replaced yet"
    shutil.rmtree("run")
    shutil.copytree("before", "run")
    Path("run/report.html").unlink()
    capsys.readouterr()
    cli.search(verify)
    assert "results.json is passed over, so give the same command again" in capsys.readouterr().err
    assert held() == old and Path("run/report.html").exists()
    cli.search(verify)
    assert held() == new


# -- Two processes -----------------------------------------------------------------------------------------------------


@posix
def test_a_second_process_is_refused_and_a_killed_one_blocks_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    cli.train([*TRAIN, "--out", "whole"])
    waits = (
        "import time, nas.training as t; from nas import cli; from pathlib import Path; step = t.train_step\n"
        "t.train_step = lambda *a, **k: (time.sleep(60 * Path('run/checkpoint.pt').exists()), step(*a, **k))[1]\n"
        f"cli.train({[*TRAIN, '--out', 'run']!r})"
    )
    first = subprocess.Popen([sys.executable, "-c", waits], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=OWN)
    try:
        for _ in range(6000):
            if Path("run/checkpoint.pt").exists() or first.poll() is not None:
                break
            time.sleep(0.02)
        assert Path("run/checkpoint.pt").exists()
        os.kill(first.pid, signal.SIGSTOP)  # it has begun, and has not ended
        capsys.readouterr()
        said = refused(cli.train, [*TRAIN, "--out", "run"], capsys)
        assert f"run is in use by another process ({first.pid} on " in said
        assert json.loads(Path("run/request.json").read_text())["command"] == "nas-train"
    finally:
        first.kill()
        first.wait()
    assert left_overs("run"), "the lock's file"
    cli.train([*TRAIN, "--out", "run"])
    assert Path("run/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert not left_overs("run")


def test_who_measures_waits_for_its_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes of a study would time the same network on the same core at the same moment."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    free = iter([False, False, True])
    waited: list[float] = []
    entered: list[int] = []
    monkeypatch.setattr("nas.alone._lock", lambda handle, shared: next(free))
    monkeypatch.setattr("nas.alone.time.sleep", waited.append)
    with turn(MEASURING):
        entered.append(len(waited))
    assert entered == [2]
    assert capsys.readouterr().err.count("waiting for another process of this machine (measuring)") == 1
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    with turn(MEASURING):
        entered.append(len(waited))
    assert entered == [2, 2], "where there is no place for a lock, nobody waits"


HOLD = "import sys, time; from nas.alone import alone\nwith alone('run', shared={shared}): print(1, flush=True); time.sleep(60)"


@posix
def test_processes_that_share_a_study_share_its_folder() -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD.format(shared=True)], stdout=subprocess.PIPE, env=OWN)
    try:
        assert first.stdout is not None and first.stdout.readline()
        with alone("run", shared=True):
            pass
        with pytest.raises(InputError, match="in use by another process"), alone("run"):
            pass
        with alone("run", "other-table"):  # other files of the folder
            pass
    finally:
        first.kill()
        first.communicate()
    with alone("run"), alone("run"):
        pass
    assert not Path("run/.lock").exists()


def test_a_file_system_without_locks_is_worked_on_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(handle: int, shared: bool) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("nas.alone._lock", no_locks)
    with alone("run"):
        assert Path("run").is_dir()
    assert "run cannot be locked (No locks available): let no second command work there" in capsys.readouterr().err
    assert not Path("run").exists(), "nothing was done there"


@posix
def test_what_another_process_is_writing_in_a_folder_below_stays() -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD.format(shared=False)], stdout=subprocess.PIPE, env=OWN)
    parts = [Path(f".here.x{PART}"), Path(f"run/.a.x{PART}"), Path(f"run/init/.b.x{PART}"), Path(f"free/.c.x{PART}")]
    try:
        assert first.stdout is not None and first.stdout.readline()
        for path in parts:
            write_atomically(path, "x")
        with alone("."):
            assert [path.exists() for path in parts] == [False, True, True, False]
    finally:
        first.kill()
        first.communicate()
    with alone("."):
        assert not any(path.exists() for path in parts), "its lock is gone with it"


def test_what_a_killed_process_left_half_written_is_removed() -> None:
    for name in (f".a.b{PART}", f"init/.c{PART}", ".a.other", f"a{PART}"):
        write_atomically(Path("run") / name, "x")
    with alone("run"):
        assert sorted(path.name for path in Path("run").rglob("*") if path.is_file()) == [".a.other", ".lock", f"a{PART}"]


# -- Disks and folders -------------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a file may have, as on a disk with as much left."""
    import resource

    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@posix
def test_a_full_disk_ends_a_training_with_one_line_and_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    cli.train([*TRAIN, "--out", "whole"])
    with files_of_at_most(9000):
        code, said = ended(cli.train, [*TRAIN, "--out", "run"], capsys)
    assert code == 1, "it is not the user's input"
    assert "run/checkpoint.pt cannot be written (File too large): make room" in said
    assert not left_overs("run")
    cli.train([*TRAIN, "--out", "run"])
    assert Path("run/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


@posix
@pytest.mark.parametrize("size", [300, 9000])
def test_a_full_disk_ends_a_build_with_one_line_and_it_goes_on(
    size: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before its first visit, and in the midst of them."""
    small_space((16,)).save("small.yaml")
    monkeypatch.setattr("nas.devices.open_profiler", lambda *_, **__: Device())
    build = ["--device", "cpu", "--space", "small.yaml"]
    cli.build_lut([*build, "--out", "whole"])
    capsys.readouterr()
    with files_of_at_most(size):
        code, said = ended(cli.build_lut, [*build, "--out", "tables"], capsys)
    assert code == 1 and "cannot be written (File too large): make room" in said
    assert not Path("tables/pretended-cpu.csv").exists()
    cli.build_lut([*build, "--out", "tables"])
    assert Path("tables/pretended-cpu.csv").read_bytes() == Path("whole/pretended-cpu.csv").read_bytes()
    assert not left_overs("tables")


@posix
@pytest.mark.parametrize("size", [9000, 40_000])
def test_a_full_disk_ends_a_search_with_one_line_and_it_goes_on(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = board_table(tmp_path, monkeypatch)
    ms = 0.8 * table.predict_ms(SearchSpace.load("micro.yaml").largest)
    search = ["--target-ms", f"{ms:.6f}", "--device", "board-cpu", "--space", "micro.yaml", "--config", "settings.yaml"]
    cli.search([*search, "--out", "whole"])
    capsys.readouterr()
    with files_of_at_most(size):
        code, said = ended(cli.search, [*search, "--out", "run"], capsys)
    assert code == 1 and "cannot be written (File too large): make room" in said
    cli.search([*search, "--out", "run"])
    for name in ("searched.yaml", "weights.safetensors", "result.json"):
        assert Path("run", name).read_bytes() == Path("whole", name).read_bytes(), name
    assert not left_overs("run")


READ_ONLY = [
    (cli.train, [*TRAIN, "--out", "disc/run"]),
    (cli.export, ["tiny.yaml", "--format", "onnx", "--out", "disc/model.onnx"]),
    (cli.build_lut, ["--device", "cpu", "--space", "small.yaml", "--out", "disc/tables"]),
    (cli.build_lut, ["--device", "cpu", "--space", "small.yaml", "--export-job", "disc/job"]),
    (cli.search, ["--target-ms", "1", "--device", "board-cpu", "--space", "micro.yaml", "--out", "disc/run"]),
    (cli.search, ["--target-ms", "1", "--device", "board-cpu", "--space", "micro.yaml", "--out", "disc"]),
]


@pytest.mark.parametrize(("command", "arguments"), READ_ONLY)
def test_a_read_only_disc_is_refused_and_left_as_it_was(
    command: Any, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may write to any folder, so the system's answers are given in its place."""
    board_table(tmp_path, monkeypatch)
    small_space((16,)).save("small.yaml")
    monkeypatch.setattr("nas.devices.open_profiler", lambda *_, **__: Device())
    Path("disc").mkdir()
    real = {"mkdir": os.mkdir, "os.open": os.open, "open": io.open, "replace": os.replace}

    def answering(name: str) -> Callable[..., Any]:
        def answer(path: Any, *args: Any, **more: Any) -> Any:
            writes = name in ("mkdir", "replace") or (
                bool(args and args[0] & (os.O_WRONLY | os.O_RDWR))
                if name == "os.open"
                else set(args[0] if args else more.get("mode", "r")) & set("wax+")
            )
            if writes and not isinstance(path, int) and Path(path).absolute().is_relative_to(tmp_path / "disc"):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return real[name](path, *args, **more)

        return answer

    for name, owner in (("mkdir", os), ("os.open", os), ("open", io), ("replace", os)):
        monkeypatch.setattr(owner, name.removeprefix("os."), answering(name))
    monkeypatch.setattr("builtins.open", answering("open"))
    code, said = ended(command, arguments, capsys)
    assert code == 2 and "disc" in said and "Read-only file system" in said
    assert not list(Path("disc").iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_output_that_cannot_be_written_is_told() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", "from nas import cli; cli.build_lut(['--list'])"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=OWN)
    assert (done.returncode, done.stderr) == (1, "nas-build-lut: No space left on device\n")


@posix
def test_a_reader_that_has_gone_ends_a_command_without_a_word() -> None:
    """As `head` does when it has seen enough."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        command = [sys.executable, "-c", "from nas import cli; cli.build_lut(['--list'])"]
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, env=OWN)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (cli.train, [*TRAIN, "--out", "recipe.yaml"]),
        (cli.train, [*TRAIN, "--out", "recipe.yaml/run"]),
        (cli.train, [*TRAIN, "--out", "x" * 300]),
        (cli.export, ["tiny.yaml", "--format", "onnx", "--out", "x" * 300 + ".onnx"]),
        (cli.export, ["tiny.yaml", "--format", "onnx", "--out", "recipe.yaml/model.onnx"]),
    ],
)
def test_a_place_that_is_none_is_refused(command: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, said = ended(command, arguments, capsys)
    assert code == 2 and ("cannot be written" in said or "File name too long" in said)
    assert sorted(path.name for path in Path().iterdir()) == ["recipe.yaml", "tiny.yaml"]


# -- Losses that are no number, checkpoints that do not fit ------------------------------------------------------------


@pytest.fixture(scope="module")
def noise() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return labelled(pixels, torch.randint(0, 3, (50,), generator=generator), 3)


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_a_supernets_loss_that_is_no_number_names_its_step_and_keeps_the_epoch_before(
    what: str, noise: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(noise, tmp_path / "whole")
    step = supernet_training.weight_step

    def diverging(net: Any, *args: Any) -> torch.Tensor:
        loss = step(net, *args)
        if args[-1] == 3:  # the fourth step, the last of the second epoch
            if what == "loss":
                return loss * torch.nan
            next(net.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
        return loss

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError) as diverged:
        patch.setattr(supernet_training, "weight_step", diverging)
        trained(noise, tmp_path / "run")
    assert "not finite at step 4, in epoch 2 of 5: lower learning_rate" in str(diverged.value)
    assert "supernet.pt holds weights of before" in str(diverged.value)
    assert not differing(whole, trained(noise, tmp_path / "run")), "the weights of epoch 1 are those to go on from"


@pytest.mark.parametrize("how", ["cut", "empty", "of another space", "of another command"])
def test_a_checkpoint_that_cannot_be_gone_on_with_is_refused(how: str, noise: ImageData, tmp_path: Path) -> None:
    trained(noise, tmp_path, settings=replace(SUPERNET, weight_epochs=1, mixture_epochs=1))
    path = tmp_path / "supernet.pt"
    space = SMALL
    match how:
        case "cut":
            path.write_bytes(path.read_bytes()[:-100])
        case "empty":
            path.write_bytes(b"")
        case "of another space":
            space = replace(SMALL, stages=SMALL.stages[:1])
        case "of another command":
            torch.save({"epoch": 3, "net": {}}, path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="does not belong to this run or is damaged: remove it"):
        supernet_training.train_supernet(space, noise, SUPERNET, 0, tmp_path)
    assert path.read_bytes() == before


def test_a_folder_of_another_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/request.json").write_text('{"command": "nas-search"}')
    assert "run holds another request (command nas-search, now nas-train" in refused(
        cli.train, [*TRAIN, "--out", "run"], capsys
    )


def test_a_search_that_failed_in_its_first_step_leaves_its_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise MemoryError

    table = board_table(tmp_path, monkeypatch)
    ms = 0.8 * table.predict_ms(SearchSpace.load("micro.yaml").largest)
    search = ["--target-ms", f"{ms:.6f}", "--device", "board-cpu", "--space", "micro.yaml", "--config", "settings.yaml"]
    search += ["--out", "run", "--seed"]
    monkeypatch.setattr(supernet_training, "weight_step", fail)
    monkeypatch.setattr(supernet_training, "mixture_step", fail)
    for seed in ("0", "1"):
        code, said = ended(cli.search, [*search, seed], capsys)
        assert code == 1 and "out of memory" in said
        assert json.loads(Path("run/request.json").read_text())["seed"] == int(seed)
    # Another process may be at work on a study here.
    assert "strategy greedy, now optuna" in refused(cli.search, [*search, "1", "--strategy", "optuna"], capsys)
    Path("run/channels.json").touch()
    assert "seed 1, now 2" in refused(cli.search, [*search, "2"], capsys)


# -- Files of strangers ------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("marker",)


@pytest.mark.parametrize(
    ("command", "arguments", "name"),
    [
        (cli.train, [*TRAIN, "--out", "run", "--weights", "evil.pt"], "evil.pt"),
        (cli.train, [*TRAIN, "--out", "run", "--weights", "evil.safetensors"], "evil.safetensors"),
        (cli.train, [*TRAIN, "--out", "run", "--teacher", "evil.yaml"], "evil.safetensors"),
        (cli.train, [*TRAIN, "--out", "run"], "run/checkpoint.pt"),
        (cli.export, ["tiny.yaml", "--weights", "evil.pt", "--format", "onnx", "--out", "m.onnx"], "evil.pt"),
        (cli.search, ["--init", "tiny.yaml", "--weights", "evil.pt", "--target-ms", "1"], "evil.pt"),
        (cli.search, ["--init", "tiny.yaml", "--weights", "evil.pth", "--target-ms", "1"], "evil.pth"),
        (cli.profile, ["evil.onnx"], "evil.onnx"),
    ],
)
def test_no_command_runs_the_code_in_a_pickle(
    command: Any, arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    TINY.save("evil.yaml")
    Path("run").mkdir()
    file = io.BytesIO()
    torch.save({"net": Evil(), "epoch": 1}, file)
    Path(name).write_bytes(file.getvalue())
    code, said = ended(command, arguments, capsys)
    assert code == 2 and Path(name).name in said
    assert not Path("marker").exists()
