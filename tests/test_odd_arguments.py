"""Whatever is typed after a command: it is done, or refused in one line with exit code 2. The work itself is left out."""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas import cli, command
from supernet.arch import ArchConfig, Stage
from supernet.specs import MB4D

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "nas-build-lut": cli.build_lut,
    "nas-search": cli.search,
    "nas-profile": cli.profile,
    "nas-train": cli.train,
    "nas-export": cli.export,
}
VALUES = st.one_of(
    st.sampled_from(
        [
            *(
                "",
                " ",
                "0",
                "-1",
                "1",
                "1.5",
                "nan",
                "inf",
                "1e999",
                "-inf",
                "9" * 30,
                "9" * 5000,
                "٣",
                "½",
                "1_0",
                "cpu",
                "cpu=",
                "=3",
            ),
            *(
                "cpu=3",
                "cpu=nan",
                "phone-npu=1",
                "ssh://a b",
                "ssh://me@pi",
                "no-such-cpu",
                "quick",
                "onnx",
                "coreml",
                "torch",
                "optuna",
            ),
            *(
                "net.yaml",
                "net.yml",
                "folder",
                "folder/",
                ".",
                "..",
                "/",
                "/dev/null",
                "file",
                "file/x",
                "nowhere/x.yaml",
                "nowhere.onnx",
            ),
            *(
                "a b.yaml",
                "é.yaml",
                "😀",
                "n" * 300,
                "n" * 300 + ".yaml",
                "a\nb",
                "a\x1b[2Jb",
                "\udcff.yaml",
                "-",
                "--",
                "-x",
                "*",
                "~",
            ),
            *(
                "model.onnx",
                "weights.pt",
                "weights.safetensors",
                "table.csv",
                "timm:nothing",
                "efficientformer-tiny",
                "deit_tiny",
            ),
        ]
    ),
    st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=12),
)


def parser_of(name: str) -> argparse.ArgumentParser:
    """A command's parser, which it makes when it is called."""
    found: list[argparse.ArgumentParser] = []

    class Asked(Exception):
        pass

    def parse(self: argparse.ArgumentParser, *_: Any) -> None:
        found.append(self)
        raise Asked

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Asked):
        patch.setattr(command.Parser, "parse_args", parse)
        COMMANDS[name]([])
    return found[0]


@st.composite
def typed(draw: st.DrawFn, name: str) -> list[str]:
    """Arguments for a command: flags that it has, mostly, with values that mostly are none."""
    actions = [action for action in parser_of(name)._actions if "--help" not in action.option_strings]
    arguments: list[str] = []
    for action in draw(st.lists(st.sampled_from(actions), max_size=5)):
        flag = action.option_strings[-1:]
        if action.nargs == 0:
            arguments += flag
        elif flag and draw(st.booleans()):
            arguments.append(f"{flag[0]}={draw(VALUES)}")
        else:
            arguments += [*flag, draw(VALUES)]
    needed = [["net.yaml"] if not a.option_strings else [a.option_strings[-1], "out"] for a in actions if a.required]
    if draw(st.integers(0, 4)):
        arguments += [each for one in needed if one[0] not in arguments for each in one]
    return arguments + (draw(st.sampled_from([[], [], [], ["--no-such-flag"], ["more"]])))


@pytest.fixture
def idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long is not done; what reads its input is."""
    for module in ("nas.search", "nas.verify", "nas.remote"):  # or they would be imported with what is pretended, and keep it
        importlib.import_module(module)
    monkeypatch.chdir(tmp_path)
    ArchConfig("tiny", 16, 10, (Stage(8, 2, (MB4D(8),)), Stage(8, 2, (MB4D(8),)))).save("net.yaml")
    Path("folder").mkdir()
    for name in ("file", "a b.yaml", "model.onnx", "weights.pt", "weights.safetensors", "table.csv"):
        Path(name).write_text("x")
    monkeypatch.setattr("nas.table.user_folder", lambda: tmp_path / "tables")
    monkeypatch.setattr("nas.lookup.user_folder", lambda: tmp_path / "tables")
    monkeypatch.setattr("nas.job._cache", lambda: tmp_path / "cache")
    data = SimpleNamespace(classes=tuple("0123456789"))
    done = SimpleNamespace(accuracy=0.5, loss=1.0, epochs=1, folder=Path("out"))
    monkeypatch.setattr("nas.training.train_network", lambda *_, **__: done)
    monkeypatch.setattr("nas.data.load_data", lambda *_, **__: data)
    monkeypatch.setattr("nas.search.run_search", lambda *_, **__: {"met": True})
    monkeypatch.setattr("nas.networks.onnx_bytes", lambda *_: b"")  # deit_tiny, say, takes seconds
    monkeypatch.setattr("nas.lut.build_table", lambda *_, **__: None)
    monkeypatch.setattr("nas.remote.export", lambda *_, **__: None)
    monkeypatch.setattr("nas.remote.build_over_ssh", lambda *_, **__: None)
    monkeypatch.setattr(
        "nas.measure.measure_alone", lambda *_, **__: SimpleNamespace(ms=1, low_ms=1, high_ms=1, raw_ms=1, visits=1)
    )


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", COMMANDS)
def test_odd_arguments_are_refused_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    @given(arguments=typed(name))
    def each(arguments: list[str]) -> None:
        capsys.readouterr()
        try:
            COMMANDS[name](arguments)
        except SystemExit as end:
            said = capsys.readouterr().err
            assert end.code == 2, (end.code, said)
            lines = said.splitlines()
            assert lines[-1].startswith(f"{name}: ") and lines[-1].isprintable(), lines
            assert not any(line.startswith(("usage:", "Traceback")) for line in lines), lines
            assert len([line for line in lines if line.startswith(f"{name}: ")]) == 1

    each()
