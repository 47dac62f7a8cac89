"""The tutorial's commands, extracted from its page and run in order, as a reader would type them.

Nothing on the page is changed. What is replaced: the archive, by one of the same format with a few noisy images; and, for the
table and the search, the clock and what it times, by the pretended device of test_lut. All other work is real.
"""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import test_lut

from nas import cli
from nas.profilers.ort_cpu import OrtCpu
from supernet.arch import ArchConfig

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def blocks() -> list[tuple[str, str]]:
    """Language and text of every fenced block of the page, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def write_archive(path: Path, per_class: int = 2) -> None:
    """An archive of the format of CIFAR-10's binary version: every class has a colour of its own, under noise."""
    rng = np.random.default_rng(0)

    def records(count: int) -> bytes:
        labels = np.tile((np.arange(10, dtype=np.uint8) + 3) % 10, count)  # the real archive's first test image is a cat, too
        colours = np.random.default_rng(1).integers(40, 215, (10, 3, 1))[labels]
        pixels = (colours + rng.normal(0, 25, (len(labels), 3, 1024))).clip(0, 255).astype(np.uint8)
        return np.concatenate([labels[:, None], pixels.reshape(len(labels), -1)], axis=1).tobytes()

    contents = {"data_batch_1.bin": records(per_class), "data_batch_2.bin": records(1), "test_batch.bin": records(2)}
    contents |= {"batches.meta.txt": ("\n".join(CLASSES) + "\n").encode(), "readme.html": b"<html></html>"}
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def pretend(patch: pytest.MonkeyPatch) -> None:
    """Time the pretended device wherever this machine's CPU would be timed."""
    device = test_lut.Device()
    patch.setattr(OrtCpu, "open", lambda self, model: device.open(model))
    patch.delattr(OrtCpu, "apart")  # what is pretended is in this process
    patch.setattr(OrtCpu, "stopwatch", lambda self: device.stopwatch())
    patch.setattr(OrtCpu, "between", lambda self, size: None)
    patch.setattr(OrtCpu, "exclusive", lambda self: nullcontext())


def give(words: list[str]) -> None:
    """Run a command of the package, in this process, to its end."""
    command = getattr(cli, words[0].removeprefix("nas-").replace("-", "_"))
    with pytest.MonkeyPatch.context() as patch:
        if words[0] in ("nas-build-lut", "nas-search"):
            pretend(patch)
        try:
            command(words[1:])
        except SystemExit as end:
            assert not end.code, f"{shlex.join(words)} ends with {end.code}"


def test_the_tutorial_from_its_first_line_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("nas.table.user_folder", lambda: tmp_path / "tables")
    monkeypatch.setattr("nas.lookup.user_folder", lambda: tmp_path / "tables")
    write_archive(home / "Downloads" / "cifar-10-binary.tar.gz")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    said = ""
    for language, text in blocks():
        if language != "sh":  # a file, named by its first line
            assert not re.search(r"(import|from) (nas|supernet|torch)", text), "the page says that scripts need nothing of ours"
            Path(text.split()[1].rstrip(":")).write_text(text)
            continue
        for line in text.splitlines():
            words = shlex.split(line)
            if words[0].startswith("nas-"):
                give(words)
            else:
                env = {**os.environ, "PATH": path}
                done = subprocess.run(["sh", "-c", line], env=env, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                said = done.stdout.strip() or said

    assert len(list(Path("cifar10/train").glob("*/*.png"))) == 30 and len(list(Path("cifar10/val/cat").iterdir())) == 2
    (table,) = Path("latency_tables").glob("*.meta.json")
    result = json.loads(Path("search/result.json").read_text())
    assert result["device"] == table.name.removesuffix(".meta.json") and result["met"]
    assert result["measured_high_ms"] <= result["target_ms"] == 0.4, "the target of the page is within what the space can"
    assert Path("search/report.html").stat().st_size > 0
    other = ArchConfig.load("search-0.3ms/searched.yaml")
    searched, trained = ArchConfig.load("search/searched.yaml"), ArchConfig.load("trained/arch.yaml")
    assert other.stages != searched.stages == trained.stages
    assert Path("cifar10.png").stat().st_size > 0
    assert said in CLASSES, "the last script names a class"
