"""`nas-profile`: what people have, where its time goes, and refusals."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tables import plain_calibration
from torch import nn

from nas import cli
from nas.onnx_model import onnx_bytes
from nas.profilers.timing import Measurement
from nas.table import LatencyTable, Row, measured_layers
from supernet.arch import ArchConfig, Stage
from supernet.space import SearchSpace
from supernet.specs import MB3D, MB4D, Head

ARCH = ArchConfig("small", 16, 10, (Stage(8, 2, (MB4D(8),)), Stage(16, 2, (MB4D(16), MB3D(16, num_heads=2)))))
LAYERS = [name for name, _ in ARCH.named_layers()]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tables of the person who runs the tests, a processor of ours, and a latency without waiting for one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nas.table.user_folder", lambda: tmp_path / "tables")
    monkeypatch.setattr("nas.profilers.ort_cpu.cpu_id", lambda: "this-cpu")
    measured = Measurement(2.0, 1.9, 2.1, 2.2, 1.85, 1.9, 2.3, 30)
    monkeypatch.setattr("nas.measure.measure_alone", lambda profiler, what, reference: measured)
    ARCH.save("small.yaml")


def save_table(folder: Path, device: str) -> LatencyTable:
    rows = {
        layer: Row(0.1 + 0.01 * isinstance(layer.spec, Head), 0.0, 1.0, "slope") for layer in measured_layers(ARCH.layers())
    }
    calibration = plain_calibration(SearchSpace.around(ARCH))
    table = LatencyTable(device, rows, (calibration,), "imported", {"reference_ms": {"cached_ms": 0.25, "streaming_ms": 0.3}})
    table.save(folder)
    return table


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.profile(arguments)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_layers_have_the_tables_milliseconds_beside_the_measured_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = save_table(tmp_path / "tables", "this-cpu")
    cli.profile(["small.yaml", "--layers", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in record["layers"]] == LAYERS
    assert sum(row["measured_ms"] for row in record["layers"]) == pytest.approx(record["measured_ms"])
    assert sum(row["ms"] for row in record["layers"]) == pytest.approx(table.predict_ms(ARCH))
    assert sum(kind["share"] for kind in record["operators"]) == pytest.approx(1)
    assert 0 < record["without_multiply_adds_share"] <= record["memory_bound_share"] <= 1
    assert record["plot"] == "small-layers.png"
    assert Path("small-layers.png").stat().st_size > 1000


def test_numbers_stay_whole_in_a_narrow_terminal_and_lines_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    cli.profile(["small.yaml", "--layers"])
    assert re.search(r"\d\.\d{4} +\d+\.\d %", narrow := capsys.readouterr().out) and "…" not in narrow
    monkeypatch.delenv("COLUMNS")
    cli.profile(["small.yaml", "--layers"])
    assert re.search(r"stage2_flat .*\d\.\d{4} .*Transpose \d\.\d{3}", capsys.readouterr().out)


def test_people_get_tables_and_a_picture_where_they_want_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    cli.profile(["small.yaml", "--plot", "mine.png"])
    shown = capsys.readouterr().out
    for said in ("stage2_flat", "measured ms", "mostly", "Conv", "count", "memory-bound operators", "mine.png"):
        assert said in shown
    assert "table ms" not in shown, "there is no table"
    assert Path("mine.png").exists()


def test_without_layers_there_is_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    cli.profile(["small.yaml", "--json"])
    assert "layers" not in json.loads(capsys.readouterr().out)
    assert not list(Path().glob("*.png"))


def test_an_onnx_file_has_layers_too(capsys: pytest.CaptureFixture[str]) -> None:
    parts = [nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)) for c in (3, 8, 8, 8)]
    Path("mine.onnx").write_bytes(onnx_bytes(nn.Sequential(*parts), torch.randn(1, 3, 8, 8)))
    cli.profile(["mine.onnx", "--layers", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["predicted_ms"] is None
    assert [row["layer"] for row in record["layers"]] == ["0.1", "0.2", "1.1", "1.2", "2.1", "2.2", "3.1"]
    assert sum(row["measured_ms"] for row in record["layers"]) == pytest.approx(record["measured_ms"])


def stand_in_for_timm() -> ModuleType:
    """A module with the three functions of timm that are used."""
    timm = ModuleType("timm")
    names = ["smallnet", "mobilenot_xs"]

    def create_model(name: str, pretrained: bool) -> nn.Module:
        assert not pretrained, "nothing is downloaded"
        if name != "smallnet":
            raise RuntimeError("this model cannot be made\nfor many reasons")
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
        model(torch.zeros(1, 3, 8, 8))
        model.pretrained_cfg = {"input_size": (3, 8, 8)}
        return model

    timm.__dict__.update(is_model=names.__contains__, list_models=lambda: names, create_model=create_model)
    return timm


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("name", ["timm:smallnet", "smallnet"])
def test_a_timm_model_is_known_by_its_name(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", stand_in_for_timm())
    cli.profile([name, "--layers", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["network"] == name
    assert record["measured_ms"] == 2.0
    assert record["plot"] == "smallnet-layers.png"


def test_unknown_names_say_what_there_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", stand_in_for_timm())
    assert "did you mean mobilenot_xs" in refused(["mobilenet_xs"], capsys)
    assert "did you mean efficientformer_l" in refused(["efficientformer_l2"], capsys)
    assert "timm.list_models()" in refused(["timm:hf-hub:someone/something"], capsys)
    assert "mobilenot_xs cannot be exported to ONNX (this model cannot be made)" in refused(["mobilenot_xs"], capsys)


@pytest.mark.parametrize("error", [ImportError("No module named 'timm'"), RuntimeError("torchvision does not fit\ntorch")])
def test_a_timm_that_cannot_be_imported_counts_as_not_installed(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name == "timm":
                raise error

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    said = refused(["efficientformer_l2"], capsys)
    assert "did you mean efficientformer_l" in said
    assert f"({str(error).splitlines()[0]}): pip install timm" in said
    assert "pip install timm" in refused(["timm:smallnet"], capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["small.yaml", "--plot", "picture.gif"], "must end in .png, .svg or .pdf"),
        (["small.yaml", "--layers", "--plot", "nowhere/picture.png"], "cannot be written"),
        (["nowhere.onnx", "--layers"], "does not exist"),
        (["small.onnx", "--device", "phone-npu"], "cannot be timed on phone-npu"),
        (["small.yaml", "--device", "phone-npu", "--plot", "picture.png"], "leave --plot out"),
        (["small.yaml", "--device", "this-cpu-int8", "--layers"], "`nas-build-lut --device this-cpu-int8`"),
    ],
)
def test_refusals(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_table(tmp_path / "tables", "phone-npu")
    assert said in refused(arguments, capsys)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.profile(["--help"])
    shown = capsys.readouterr().out
    for example in ("timm:mobilevit_xs --layers", "model.onnx --layers --plot"):
        assert f"nas-profile {example}" in shown


def test_a_table_of_an_earlier_form_is_left_out_unless_it_was_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = save_table(tmp_path / "tables", "this-cpu")
    earlier = {"runtime": "onnxruntime", "precision": "fp32", "export": "torchscript, opset 20, plain form"}
    replace(table, meta={**table.meta, **earlier}).save(tmp_path / "tables")
    cli.profile(["small.yaml", "--json"])
    said = capsys.readouterr()
    record = json.loads(said.out)
    assert record["predicted_ms"] is None and record["measured_ms"] == 2.0
    assert "another export form" in said.err and "nas-build-lut --device this-cpu" in said.err
    assert "another export form" in refused(["small.yaml", "--device", "this-cpu"], capsys)


def test_a_row_that_is_missing_is_named_with_the_command_for_its_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(ARCH, stages=(replace(ARCH.stages[0], width=24, blocks=()), ARCH.stages[1])).save("wider.yaml")
    replace(save_table(tmp_path / "tables", "this-cpu"), provenance="measured").save(tmp_path / "tables")
    cli.profile(["wider.yaml"])  # measured all the same
    said = capsys.readouterr().err
    assert "has no row for stem" in said
    assert "`nas-build-lut --device this-cpu --missing --arch wider.yaml`" in said
    save_table(tmp_path / "tables", "board-cpu")
    said = refused(["wider.yaml", "--device", "board-cpu"], capsys)
    assert "has no row for stem" in said
    assert "`nas-build-lut --device board-cpu --arch wider.yaml --export-job DIR`" in said


def test_a_kind_that_is_elsewhere_means_its_only_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["small.yaml", "--device", "iphone-npu"], capsys)
    assert "`nas-build-lut --device iphone-npu --team-id TEAM` on a Mac" in said
    for device, form in (("iphone15pro-npu", " --format coreml"), ("raspberrypi5-cpu", "")):
        said = refused(["small.yaml", "--device", device], capsys)
        assert f"no table of {device}" in said and f"`nas-build-lut --device {device} --export-job DIR{form}`" in said
    for device, there in (
        ("apple-m2-npu-b8", "mac-npu --batch 8"),
        ("apple-m2-coreml-cpu", "mac-cpu"),
        ("a100-mig-1g.5gb", "cuda"),
        ("rtx-4090-24gb-bf16", "cuda --precision bf16"),
    ):
        said = refused(["small.yaml", "--device", device], capsys)
        assert f"no table of {device}" in said and f"measure it there, with `nas-build-lut --device {there}`" in said
    table = save_table(tmp_path / "tables", "iphone15pro-npu")
    save_table(tmp_path / "tables", "iphone15pro-cpu")
    cli.profile(["small.yaml", "--device", "iphone-npu", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["device"] == "iphone15pro-npu"
    assert record["predicted_ms"] == pytest.approx(table.predict_ms(ARCH))
    save_table(tmp_path / "tables", "iphone14-npu")
    said = refused(["small.yaml", "--device", "iphone-npu"], capsys)
    assert "iphone14-npu" in said
    assert "iphone15pro-npu" in said
