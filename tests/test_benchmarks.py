"""What the benchmarks print of made-up results whose figures are known by hand, what they refuse, and what a kill leaves."""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import additivity
import hypervolume
import one_session
import pretrained
import pytest
import ranking
import studies
import taylor
import torch
from refusals import refusal
from test_cli import SETTINGS, SPACE, additive_table

from nas.data import load_images
from nas.kept import write_csv
from nas.measure import CACHED, STREAMING, Model, with_ordinary_values
from nas.profilers.ort_cpu import OrtCpu
from nas.recipe import RECIPES
from nas.settings import SupernetSettings
from nas.statistics import bootstrap
from nas.supernet_training import train_supernet
from nas.taylor import calibration_batches, unit_scores
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.files import parse_yaml
from supernet.model import build_model
from supernet.space import SearchSpace

MICRO = SearchSpace.from_dict(parse_yaml(SPACE, "a space"), "a space")


# ---- ranking: eight networks, each larger than the one before

ACCURACIES = ([50.0, 51, 52, 53, 54, 55, 56, 57], [51.5, 50, 52, 53, 54, 55, 56, 57])  # by seed: the second swaps the first two
BY_SIZE = [float(at) for at in range(8)]


def larger_and_larger() -> list[ArchConfig]:
    """Networks of more and more blocks, each at two widths."""
    depths = ((0, 0), (1, 0), (2, 0), (2, 1))
    kinds = [[["mb4d"] * depth + ["identity"] * (2 - depth) for depth in of] for of in depths]
    return [MICRO.arch((8, width), of) for of in kinds for width in (16, 24)]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setattr(ranking, "bootstrap", partial(bootstrap, n=100))
    for seed, accuracies in enumerate(ACCURACIES):
        for i, accuracy in enumerate(accuracies):
            folder = tmp_path / "alone" / f"{i:02d}-seed{seed}"
            folder.mkdir(parents=True)
            (folder / "metrics.csv").write_text(f"epoch,val_accuracy\n1,{0.4 - accuracy / 1000}\n2,{accuracy / 100}\n")
    for seed in range(2):
        folder = ranking.folder_of(tmp_path, "elastic", seed)
        folder.mkdir(parents=True)
        rows = [{"network": i, "as MACs": size, "against MACs": -size} for i, size in enumerate(BY_SIZE)]
        write_csv(folder / "scores.csv", rows, list(rows[0]))
    return argparse.Namespace(out=tmp_path, seeds=2, epochs=2, supernet_seeds=2, space="micro", timed_in_band=False)


def test_a_study_s_report_compares_like_with_like(study: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    archs = larger_and_larger()
    macs = [ranking.count(arch).macs for arch in archs]
    assert macs == sorted(set(macs))
    table: Any = SimpleNamespace(device="a-cpu", predict_ms=lambda arch: float(archs.index(arch)))
    ranking.print_report(archs, table, study)
    said = capsys.readouterr().out
    # One of 28 pairs stands the other way round: 26 / 28.
    assert "two seeds of the same trainings agree with tau 0.93" in said
    assert "another seed's at the end with tau -0.93" in said, "what learns slowest is best here"
    # r = sin(pi / 2 * 0.929) = 0.994, of means of two 2 r / (1 + r) = 0.997, and 2 / pi * arcsin of its root.
    assert "a score that knew each network's mean over all seeds would have about 0.96" in said
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    head, rows = lines[0], {(line[0], line[2]): line for line in lines[2:]}
    assert {len(line) for line in lines} == {len(head)}

    def cell(row: tuple[str, str], column: str) -> str:
        return rows[row][next(at for at, name in enumerate(head) if name.startswith(column))]

    ours, other = ("elastic", "as MACs"), ("elastic", "against MACs")
    # Of the mean the first two are swapped; of the seeds alone, in one of both: (1 + 0.93) / 2.
    for row in (("none", "MACs"), ours):
        assert cell(row, "tau (95 %)").startswith("0.93 (")
        assert cell(row, "tau with one seed") == "0.96"
    assert cell(other, "tau (95 %)").startswith("-0.93 (")
    assert cell(other, "tau with one seed") == "-0.96"
    assert cell(("none", "MACs"), "tau above MACs'") == ""
    assert cell(ours, "tau above MACs'") == "0.00 (0.00 to 0.00)", "on each resample, both have the same networks"
    above, low, high = (float(text.strip("()")) for text in cell(other, "tau above MACs'").replace("to ", "").split())
    assert above == -1.86 and -2 <= low < above < high < -1
    assert cell(ours, "supernets agree") == "1.00" and cell(ours, "how many") == "2"
    # Among all eight the truest of 57 points, or what is first by the other way round, of 50.75: the mean of 50 and 51.5.
    assert cell(ours, "regret").startswith("0.00 (")
    assert cell(other, "regret").startswith("6.25 (")
    study.timed_in_band = True
    with pytest.raises(InputError, match="give --time first"):
        ranking.print_report(archs, table, study)
    rows_timed = [{"network": arch.name, "ms": 1.0 + 0.02 * at, "low_ms": 0, "high_ms": 0} for at, arch in enumerate(archs)]
    write_csv(study.out / ranking.TIMED, rows_timed, list(rows_timed[0]))
    ranking.print_report(archs, table, study)
    assert "6 networks of micro, 1.000 to 6.000 ms" in capsys.readouterr().out, "about 1.07 ms; the table says 1 to 6"


def test_shuffled_scores_have_the_range_that_single_ones_have(
    study: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    table: Any = SimpleNamespace(device="a-cpu", predict_ms=lambda arch: 1.0)
    ranking.print_report(larger_and_larger(), table, study)
    row = next(line for line in capsys.readouterr().out.splitlines() if "shuffled" in line)
    tau, low, high = (float(text.strip("()")) for text in row.split("|")[4].replace("to ", "").split())
    # Of orders of eight networks by chance, tau has the standard deviation sqrt(2 (2n + 5) / 9n(n - 1)) = 0.29.
    assert abs(tau) < 0.08
    assert -0.75 < low < -0.4 and 0.4 < high < 0.75


@pytest.mark.parametrize("flags", [["--networks", "7"], ["--supernet-images", "0"], ["--networks", "-1", "--report"]])
def test_a_study_of_too_little_is_refused(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ranking.py", "--table", "none.csv", "--out", str(tmp_path / "out"), *flags])
    assert flags[0] in refusal(ranking.main)
    assert not (tmp_path / "out").exists()


def test_a_way_s_epochs_have_images() -> None:
    assert ranking.settings_of(MICRO, "single paths", 400).images_per_epoch == 100
    for way in ranking.WAYS:
        assert "--supernet-images" in refusal(lambda way=way: ranking.settings_of(MICRO, way, 1))  # type: ignore[misc]


def test_cuts_of_no_seed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["taylor.py", "--network", "efficientformer-tiny", "--seeds", "0", "--out", str(tmp_path / "out")]
    )
    assert "--seeds" in refusal(taylor.main)
    assert not (tmp_path / "out").exists()


# ---- additivity and hypervolume in the folder of a search


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a search that was stopped as it began."""
    request = {
        "command": "nas-search",
        "space": MICRO.to_yaml(),
        "settings": SupernetSettings(**parse_yaml(SETTINGS, "settings"), mirror=False).deciding(),
        "seed": 0,
        "data": "digits",
        "table": str(tmp_path / "a-cpu.csv"),
    }
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "request.json").write_text(json.dumps(request))
    return folder


@pytest.mark.parametrize("script", [additivity, hypervolume])
def test_only_a_search_with_a_supernet_is_worked_on(script: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["script.py", "--run", str(folder)])
        return refusal(script.main)

    def untrained(*_: object) -> None:
        raise AssertionError("a supernet was trained")

    monkeypatch.setattr(studies, "train_supernet", untrained)
    assert "cannot be read" in refused(run.parent / "none")
    assert not (run.parent / "none").exists()
    assert "not trained yet" in refused(run)
    asked = json.loads((run / "request.json").read_text())
    for change, said in (
        ({"command": "benchmarks/additivity.py"}, "not of nas-search"),
        ({"init": "a network"}, "--init"),
        ({"seed": None}, "cannot be used"),
    ):
        (run / "request.json").write_text(json.dumps(asked | change))
        assert said in refused(run)
    assert [file.name for file in run.iterdir()] == ["request.json"]


@pytest.mark.parametrize("script", [additivity, hypervolume])
def test_a_search_that_is_at_work_is_left_alone(script: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Path] = []

    def refuse(folder: Path) -> None:
        held.append(folder)
        raise InputError("in use")

    monkeypatch.setattr(script, "alone", refuse)
    monkeypatch.setattr(sys, "argv", ["script.py", "--run", str(run)])
    assert refusal(script.main) == "in use"
    assert held == [run]


def test_a_run_s_images_are_mirrored_as_the_search_had_them(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flipping = replace(load_images(None, 16, seed=0, score_images=64), flips=True)
    monkeypatch.setattr(studies, "load_data", lambda *_: flipping)
    held = studies.Run.read(run)
    assert not studies.images_of(held.space, None, 0, held.settings).flips
    assert studies.images_of(held.space, None, 0, replace(held.settings, mirror=True)).flips
    train_supernet(held.space, flipping, held.settings, 0, run)
    before = (run / "supernet.pt").read_bytes()
    _, data = held.supernet()
    assert not data.flips
    assert (run / "supernet.pt").read_bytes() == before


def test_they_work_with_a_search_s_supernet(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = additive_table(MICRO, "a-cpu")
    table.save(run.parent)
    held = studies.Run.read(run)
    assert held.table.exists()
    train_supernet(held.space, studies.images_of(held.space, None, 0, held.settings), held.settings, 0, run)
    trained = (run / "supernet.pt").read_bytes()
    monkeypatch.setattr(sys, "argv", ["additivity.py", "--run", str(run), "--networks", "8", "--pairs", "2"])
    additivity.main()
    assert "| with 2 pairs |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["hypervolume.py", "--run", str(run), "--evaluations", "20", "--known", "3"])
    hypervolume.main()
    assert "| networks evaluated | exact | tpe cold |" in capsys.readouterr().out
    assert (run / "supernet.pt").read_bytes() == trained


# ---- pretrained: what was chosen by a timing stays


def test_a_killed_uniform_cut_keeps_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_images(None, 16, seed=0, score_images=64)
    arch = MICRO.largest.without_identity()
    one: Any = pretrained.Comparison.__new__(pretrained.Comparison)
    one.arch, one.data, one.folder, one.seed, one.teacher = arch, data, tmp_path, 0, None
    one.tuning = replace(RECIPES["quick"], epochs=1, images_per_epoch=64)
    model: Any = with_ordinary_values(build_model(arch), 0)
    one.original = model.eval()
    batches = calibration_batches(data, 64)
    one.scores, one.images = unit_scores(one.original, arch, batches, "magnitude"), torch.cat([x for x, _ in batches])

    def of_speed(ms_of_a_width: float) -> Callable[..., Any]:
        return lambda model, arch: SimpleNamespace(ms=ms_of_a_width * arch.widths[-1], high_ms=ms_of_a_width * arch.widths[-1])

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    target_ms = 0.75 * arch.widths[-1]
    one.timed = of_speed(1.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrained, "train_network", killed)
        one.uniform(target_ms, "uniform")
    start = (tmp_path / "uniform" / "start.safetensors").read_bytes()
    share = json.loads((tmp_path / "uniform" / "share.json").read_text())
    one.timed = of_speed(1.2)
    assert one.widest(target_ms)[0] < share, "now another one would be chosen"
    found = one.uniform(target_ms, "uniform")
    assert found.chosen == share
    assert found.ms == pytest.approx(1.2 * target_ms), "the one that met the target at the first timing"
    assert (tmp_path / "uniform" / "start.safetensors").read_bytes() == start
    with (tmp_path / "uniform" / "tuned" / "metrics.csv").open() as file:
        assert float(list(csv.DictReader(file))[-1]["val_accuracy"]) == pytest.approx(found.after, abs=1e-6)


# ---- guarantee: a network that was found, timed again


def test_a_session_in_a_process_of_its_own_tells_a_round_a_line(tmp_path: Path) -> None:
    profiler = OrtCpu()
    files = [tmp_path / name for name in ("network.onnx", "cached.onnx", "streaming.onnx")]
    models: list[Model] = [tuple(MICRO.smallest.layers()), CACHED, STREAMING]
    for file, model in zip(files, models, strict=True):
        file.write_bytes(profiler.onnx(model))
    command = [sys.executable, one_session.__file__, *map(str, files), "--rounds", "2"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2, "the first round does not count"
    for line in lines:
        network, cached, streaming = map(float, line.split())
        assert network > 0 and 0 < cached < streaming, "13 MB of weights against 0.3"
