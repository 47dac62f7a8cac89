"""A table by way of a job folder is the table that is built directly; what is not the job's own result is refused."""

import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from refusals import refusal
from test_lut import cost, device_ms, small_space

from nas import cli
from nas.devices import is_called
from nas.job import export_job
from nas.lut import import_medians, import_results, rows_off_their_visits
from nas.measure import ALONE_MIN_VISITS, CACHED, SESSION_VISITS, STREAMING, Model
from nas.onnx_weights import without_weights
from nas.plan import MANY_SESSIONS, Work, work_for
from nas.profilers.bench import JOB_SCHEMA, Failed, TooNoisy
from nas.profilers.ort_cpu import OrtCpu
from nas.profilers.ort_session import cpu_id, made_weights, with_weights
from nas.remote import build_over_ssh
from nas.ssh import Address, reach, run_over_ssh
from nas.table import LatencyTable
from supernet.errors import InputError
from supernet.files import PART
from supernet.space import SearchSpace
from supernet.specs import MB3D, MB4D, Layer

SPACE = small_space()


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No caches of the person who runs the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nas.job._cache", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def work() -> Work:
    return work_for(SPACE)


@pytest.fixture
def folder(tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job folder whose models are not looked at."""
    monkeypatch.setattr(OrtCpu, "onnx", lambda self, model: onnx.ModelProto().SerializeToString())
    export_job(tmp_path / "job", SPACE, work, device="pretended-cpu")
    return tmp_path / "job"


def pretended_results(folder: Path, work: Work, scale: float = 1.0) -> dict[str, Any]:
    """What a device that the test knows by heart writes."""
    import hashlib

    def visit(model: Model) -> list[float]:
        return [scale * device_ms(m) for m in (model, CACHED, STREAMING)]

    return {
        "schema": 4,
        "unit": "ms",
        "job_sha256": hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest(),
        "device": "pretended-cpu",
        "environment": {"cpu": "Pretence 9", "runtime_version": "1.0", "measured_at": "2026-01-01T00:00:00+00:00"},
        "started_at": "2026-01-01T00:00:00+00:00",
        "finished_at": "2026-01-01T01:00:00+00:00",
        "visits": {name: [visit(model)] * ALONE_MIN_VISITS for name, model in work.models.items()},
        "flags": {},
    }


def written(folder: Path, results: object) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps(results))
    return path


def test_the_results_of_a_device_make_its_table(folder: Path, work: Work, tmp_path: Path) -> None:
    table = import_results(written(folder, pretended_results(folder, work)), tmp_path / "out")
    for layer, row in table.rows.items():
        assert row.ms == pytest.approx(cost(layer), rel=1e-3, abs=1e-6), layer
    assert (table.device, table.provenance) == ("pretended-cpu", "imported")
    assert table.meta["runtime_version"] == "1.0"
    assert table.meta["threads"] == 1
    assert table.serves(SPACE)
    assert LatencyTable.load(tmp_path / "out" / "pretended-cpu.csv").rows.keys() == table.rows.keys()


def test_an_imported_row_that_was_changed_by_hand_is_found_out(folder: Path, work: Work, tmp_path: Path) -> None:
    path = written(folder, pretended_results(folder, work))
    samples = tmp_path / "out" / "pretended-cpu.samples.csv"
    for imported in (1, 2):
        table = import_results(path, tmp_path / "out")
        assert len(samples.read_text().splitlines()) == 1 + imported * ALONE_MIN_VISITS * len(work.models)
        assert rows_off_their_visits(table, samples) == []
        for layer, row in table.rows.items():
            if abs(row.ms) > 1e-6:
                changed = replace(table, rows={**table.rows, layer: replace(row, ms=1.1 * row.ms)})
                assert [doubt.layer for doubt in rows_off_their_visits(changed, samples)] == [layer]


def test_results_find_the_manifest_of_a_job_that_was_exported_here(folder: Path, work: Work, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = written(tmp_path / "elsewhere", pretended_results(folder, work))
    assert import_results(path, tmp_path / "out").device == "pretended-cpu"


def test_results_may_be_said_to_be_of_a_kind_of_device(
    folder: Path, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(folder, pretended_results(folder, work))
    with pytest.raises(InputError, match="is of pretended-cpu, not of cpu"):  # which is this machine's
        import_results(path, tmp_path / "out", "cpu")
    monkeypatch.setattr(OrtCpu, "id", "pretended-cpu")
    assert import_results(path, tmp_path / "out", "cpu").device == "pretended-cpu"
    assert is_called("iphone-npu", "iphone15pro-npu") and not is_called("iphone-npu", "iphone15pro-cpu")


def test_rows_of_models_that_the_device_could_not_load_are_left_out(folder: Path, work: Work, tmp_path: Path) -> None:
    results = pretended_results(folder, work)
    del results["visits"]["4 x mb4d(dim=16) at 8 px"]
    results["flags"] = {"4 x mb4d(dim=16) at 8 px": "timeout", "2 x mb3d(dim=48) at 4 px": "off-npu"}
    table = import_results(written(folder, results), tmp_path / "out")
    assert Layer(MB4D(16), 8) not in table.rows
    assert table.rows[Layer(MB3D(48), 4)].flag == "off-npu"
    assert not table.serves(SPACE)
    results["visits"] = {name: made for name, made in results["visits"].items() if not name.startswith("network")}
    results["flags"] |= dict.fromkeys(work.plan.networks, "load-error")
    with pytest.raises(InputError, match="only 0 of 28 networks could be measured"):
        import_results(written(folder, results), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def other_job(results: dict[str, Any]) -> None:
    results["job_sha256"] = "0" * 64


def no_mapping(results: dict[str, Any]) -> None:
    results["visits"] = [1, 2]


def other_form(results: dict[str, Any]) -> None:
    """A job that was exported before there was a deploy form."""
    path = Path("job/manifest.json")
    manifest = json.loads(path.read_text())
    manifest["settings"]["export"] = "torchscript, opset 20, plain form"
    path.write_text(json.dumps(manifest))
    results["job_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()


def somewhere_else(results: dict[str, Any]) -> None:
    """A manifest that somebody sends along, to be written outside the folder of tables."""
    import hashlib

    path = Path("job/manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "device": "../evil-cpu"}))
    results["job_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    results["device"] = "../evil-cpu"


def lacks_a_model(results: dict[str, Any]) -> None:
    del results["visits"]["4 x mb4d(dim=16) at 8 px"]


def stopped_early(results: dict[str, Any]) -> None:
    results["visits"]["4 x mb4d(dim=16) at 8 px"] = results["visits"]["4 x mb4d(dim=16) at 8 px"][:3]


def says_seconds(results: dict[str, Any]) -> None:
    results["unit"] = "s"


def is_in_seconds(results: dict[str, Any]) -> None:
    results["visits"] = {name: [[ms / 1000 for ms in v] for v in made] for name, made in results["visits"].items()}


def other_schema(results: dict[str, Any]) -> None:
    results["schema"] = 3


def other_device(results: dict[str, Any]) -> None:
    results["device"] = "another-cpu"


def not_a_number(results: dict[str, Any]) -> None:
    results["visits"]["empty"][0][0] = float("nan")


def no_hash(results: dict[str, Any]) -> None:
    del results["job_sha256"]


def no_unit(results: dict[str, Any]) -> None:
    del results["unit"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_form, r"another export form \(.*plain form; now .*deploy form\): export the job anew and run it"),
        (no_mapping, "no whole results file"),
        (no_hash, r"no whole results file \(it lacks job_sha256\)"),
        (somewhere_else, "cannot be a device id"),
        (other_job, "belongs to a job whose manifest"),
        (lacks_a_model, r"lacks 1 of \d+ models, '4 x mb4d\(dim=16\) at 8 px' first"),
        (stopped_early, "lacks 1 of"),
        (says_seconds, "are in 's'; only milliseconds"),
        (is_in_seconds, "look like seconds"),
        (other_schema, r"has schema 3, this version reads 4: export the job anew and run it"),
        (other_device, "results are of another-cpu"),
        (not_a_number, "not three positive times"),
        (no_unit, "no whole results file"),
    ],
)
def test_results_that_are_not_the_jobs_are_refused_in_one_line(
    folder: Path, work: Work, tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    results = pretended_results(folder, work)
    damage(results)
    with pytest.raises(InputError, match=message) as caught:
        import_results(written(folder, results), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists(), "nothing is written"


def too_noisy(results: dict[str, Any]) -> dict[str, Any]:
    """The same results of a device that was four times as slow every other time."""
    made = {name: [[ms * (1 + 3 * (i % 2)) for ms in v] for i, v in enumerate(v)] for name, v in results["visits"].items()}
    return {**results, "visits": made}


def test_results_of_a_device_that_was_too_busy_or_too_hot_make_no_table(folder: Path, work: Work, tmp_path: Path) -> None:
    path = written(folder, too_noisy(pretended_results(folder, work)))
    with pytest.raises(TooNoisy, match=r"too busy or too hot .* measure the job anew: python3 run_job\.py --again$"):
        import_results(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_of_a_device_that_could_run_no_model_are_refused(folder: Path, work: Work, tmp_path: Path) -> None:
    results = pretended_results(folder, work)
    results["flags"] = dict.fromkeys(results["visits"], "load-error")
    with pytest.raises(InputError, match=r"has no visits: the device could run none of the models \(load-error\)"):
        import_results(written(folder, results), tmp_path / "out")


def test_refused_results_are_measured_anew_but_not_those_that_have_no_place(
    folder: Path, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other machine keeps what it has measured of a job, and gives it again."""
    kept: dict[str, Any] = {}
    noisy = True

    def machine(address: Address, job: Path) -> Path:
        results = {**pretended_results(job, work), "device": None}
        return written(job, kept.setdefault(results["job_sha256"], too_noisy(results) if noisy else results))

    monkeypatch.setattr("nas.remote.reach", lambda address: None)
    monkeypatch.setattr("nas.remote.run_over_ssh", machine)
    with pytest.raises(TooNoisy):
        build_over_ssh("ssh://pi", SPACE, tmp_path / "out")
    noisy = False
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"the folder .*file cannot be written"):
        build_over_ssh("ssh://pi", SPACE, tmp_path / "file")
    assert build_over_ssh("ssh://pi", SPACE, tmp_path / "out").serves(SPACE)
    assert len(kept) == 2, "what was measured with no place for its table is taken from what was kept"


def test_a_job_is_gone_on_with_by_who_began_it_and_measured_anew_by_everybody_else(
    folder: Path, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device keeps visits by the job's hash, whoever hands it over."""
    asked: list[str] = []
    stops = True

    def machine(address: Address, job: Path) -> Path:
        results = {**pretended_results(job, work), "device": None}
        asked.append(results["job_sha256"])
        if stops:
            raise Failed("the connection broke")
        return written(job, results)

    monkeypatch.setattr("nas.remote.reach", lambda address: None)
    monkeypatch.setattr("nas.remote.run_over_ssh", machine)
    with pytest.raises(Failed):
        build_over_ssh("ssh://pi", SPACE, tmp_path / "out")
    stops = False
    for cache in ("cache", "cache", "of a colleague"):
        monkeypatch.setattr("nas.job._cache", lambda cache=cache: tmp_path / cache)
        build_over_ssh("ssh://pi", SPACE, tmp_path / "out")
    stopped, ended, again, elsewhere = asked
    assert stopped == ended, "what a killed command had measured is gone on with"
    assert len({ended, again, elsewhere}) == 3, "and what is finished is measured anew"


@pytest.mark.skipif(sys.platform == "win32", reason="the test speaks POSIX")
def test_an_import_waits_for_no_other_work_on_its_table_and_takes_nothing_from_it(
    folder: Path, work: Work, tmp_path: Path
) -> None:
    path, out = written(folder, pretended_results(folder, work)), tmp_path / "out"
    out.mkdir()
    marker = out / "pretended-cpu.01234567.building.json"
    marker.write_text("{}")
    import_results(path, out)
    assert marker.exists(), "a build that was killed goes on"
    assert not (out / "pretended-cpu.samples.csv").exists(), "and takes no visits of another device for its own"
    networks = list(itertools.islice(dict.fromkeys(work.networks), 3))
    for number, arch in enumerate(networks):
        arch.save(tmp_path / f"{number}.yaml")
    lines = [f"{tmp_path / f'{number}.yaml'},{number + 1}" for number in range(3)]
    (tmp_path / "medians.csv").write_text("\n".join(["network,ms", *lines]))
    holds = f"with alone({str(out)!r}, 'pretended-cpu'): print(1, flush=True); time.sleep(60)"
    imports = "import time\nfrom nas.alone import alone\n"
    with subprocess.Popen([sys.executable, "-c", imports + holds], stdout=-1) as first:
        assert first.stdout is not None and first.stdout.readline()
        with pytest.raises(InputError, match="in use by another process"):
            import_results(path, out)
        with pytest.raises(InputError, match="in use by another process"), pytest.MonkeyPatch.context() as patch:
            patch.setattr("nas.lut.find_table", lambda device: out / f"{device}.csv")
            import_medians(tmp_path / "medians.csv", None, "pretended-cpu")
        first.kill()


def test_medians_that_say_nothing_leave_the_table_as_it_is(folder: Path, work: Work, tmp_path: Path) -> None:
    """Xcode rounds: three networks may all take 1.31 ms."""
    import_results(written(folder, pretended_results(folder, work)), tmp_path / "out")
    before = (tmp_path / "out" / "pretended-cpu.meta.json").read_bytes()
    for number, arch in enumerate(itertools.islice(dict.fromkeys(work.networks), 3)):
        arch.save(tmp_path / f"{number}.yaml")
    for all_of_them in ("1.31", "2.5"):
        lines = [f"{tmp_path / f'{number}.yaml'},{all_of_them}" for number in range(3)]
        (tmp_path / "medians.csv").write_text("\n".join(["network,ms", *lines]))
        with pytest.raises(InputError, match="do not take longer the more their rows say"):
            import_medians(tmp_path / "medians.csv", tmp_path / "out", "pretended-cpu")  # of this folder's own table
    assert (tmp_path / "out" / "pretended-cpu.meta.json").read_bytes() == before


def test_results_of_other_hardware_of_the_same_name_are_refused(folder: Path, work: Work, tmp_path: Path) -> None:
    results = pretended_results(folder, work)
    results["environment"]["cpu"] = "Board 5"
    import_results(written(folder, results), tmp_path / "out")
    results["environment"]["cpu"] = "Board 4"
    with pytest.raises(InputError, match="measured on Board 5, but what is measured now on Board 4: give another --out"):
        import_results(written(folder, results), tmp_path / "out")


def test_a_cut_results_file_is_refused(folder: Path, work: Work, tmp_path: Path) -> None:
    path = written(folder, pretended_results(folder, work))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="is not whole JSON"):
        import_results(path, tmp_path / "out")


def test_the_same_request_gives_the_same_job_and_is_not_written_twice(folder: Path, work: Work, tmp_path: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in (folder / "models").iterdir()}
    export_job(folder, SPACE, work, device="pretended-cpu")
    assert before == {p.name: p.stat().st_mtime_ns for p in (folder / "models").iterdir()}
    export_job(tmp_path / "again", SPACE, work, device="pretended-cpu")
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()


def test_a_job_that_is_to_be_measured_anew_is_another_job_with_the_same_models(folder: Path, work: Work) -> None:
    before = json.loads((folder / "manifest.json").read_text())
    stamps = {p.name: p.stat().st_mtime_ns for p in (folder / "models").iterdir()}
    export_job(folder, SPACE, work, device="pretended-cpu", run=1)
    after = json.loads((folder / "manifest.json").read_text())
    assert after["models"] == before["models"]
    assert stamps == {p.name: p.stat().st_mtime_ns for p in (folder / "models").iterdir()}
    assert after["run"] == 1


def test_another_space_leaves_no_model_of_the_first_behind(folder: Path, work: Work) -> None:
    other = small_space((16,))
    export_job(folder, other, work_for(other), device="pretended-cpu", replaces=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {p.name for p in (folder / "models").iterdir()} == {Path(m["file"]).name for m in manifest["models"].values()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "other-cpu"], "of another device:"),
        (["--device", "pretended-cpu", "--space", "other.yaml"], "of another space:"),
        (["--device", "pretended-cpu", "--threads", "4"], "of another device and threads:"),
        (["--device", "pretended-cpu-b8", "--batch", "8", "--precision", "int8"], "of another device and precision and batch:"),
        ([], "of another device:"),
        (["--device", "iphone15-npu", "--format", "coreml"], "of another device and format and precision:"),
    ],
)
def test_a_job_of_another_request_is_not_written_over(
    folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    SPACE.save("space.yaml")
    small_space((16,)).save("other.yaml")
    (folder / "results.json").write_text("{}")
    next((folder / "models").iterdir()).unlink()  # a folder whose models were taken out is still that job's
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    given = arguments if "--space" in arguments else [*arguments, "--space", "space.yaml"]
    with pytest.raises(SystemExit) as ended:
        cli.build_lut([*given, "--export-job", str(folder)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert f"holds the job of pretended-cpu for space {SPACE.name}, which is {said} give another --export-job" in error
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_request_to_another_version_replaces_its_job(folder: Path, work: Work) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    earlier = {**manifest["settings"], "export": "torchscript, opset 20, plain form"}
    made_with = {**manifest["made_with"], "torch": "1.0"}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "settings": earlier, "made_with": made_with}))
    export_job(folder, SPACE, work, device="pretended-cpu")
    assert json.loads((folder / "manifest.json").read_text()) == manifest


def test_models_that_were_taken_out_are_written_again(folder: Path, work: Work) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "models").iterdir()}
    (folder / "models" / next(iter(before))).unlink()
    export_job(folder, SPACE, work, device="pretended-cpu")
    assert before == {path.name: path.read_bytes() for path in (folder / "models").iterdir()}


def test_a_job_without_a_device_names_itself_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SPACE.save("space.yaml")
    for name, device in (("a", []), ("b", ["--device", "cpu"])):
        cli.build_lut([*device, "--space", "space.yaml", "--export-job", name])
    assert json.loads(Path("a/manifest.json").read_text())["device"] is None
    assert Path("a/manifest.json").read_bytes() == Path("b/manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "named", "settings"),
    [
        (["pi-cpu-4t"], "pi-cpu-4t", (4, None, 1)),
        (["pi-cpu-4t", "--threads", "4", "--precision", "int8"], "pi-cpu-4t-int8", (4, "int8", 1)),
        (["pi-cpu-b8", "--batch", "8", "--precision", "int8"], "pi-cpu-int8-b8", (1, "int8", 8)),
        (["pi-cpu-int8-b8"], "pi-cpu-int8-b8", (1, "int8", 8)),
        (["pi-cpu", "--threads", "2"], "pi-cpu-2t", (2, None, 1)),
    ],
)
def test_what_an_id_says_of_settings_is_what_the_job_has(
    arguments: list[str], named: str, settings: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    SPACE.save("space.yaml")
    asked: dict[str, Any] = {}

    def noted(folder: Path, *_: object, **more: object) -> Path:
        asked.update(more)
        folder.mkdir()
        return folder / "manifest.json"

    monkeypatch.setattr("nas.remote.export_job", noted)
    cli.build_lut(["--device", *arguments, "--space", "space.yaml", "--export-job", "x"])
    assert asked["device"] == named
    assert (asked["threads"], asked["precision"], asked["batch"]) == settings


def test_a_folder_of_something_else_is_not_written_into(tmp_path: Path, work: Work) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="is no job folder"):
        export_job(tmp_path / "mine", SPACE, work, device="pretended-cpu")
    with pytest.raises(InputError, match="is no job folder"):
        export_job(tmp_path / "mine" / "thesis.tex", SPACE, work, device="pretended-cpu")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(("file", "text"), [("manifest.json", '{"name": "my app"}'), ("models/best.onnx", "mine")])
def test_files_that_happen_to_be_named_as_a_job_s_are_left_alone(file: str, text: str, tmp_path: Path, work: Work) -> None:
    path = tmp_path / "app" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(InputError, match="is no job folder"):
        export_job(tmp_path / "app", SPACE, work, device="pretended-cpu")
    assert path.read_text() == text


def test_what_a_kill_left_of_a_job_is_no_stranger(folder: Path, work: Work) -> None:
    """Its manifest is written last, under another name first."""
    manifest = folder / "manifest.json"
    text = manifest.read_bytes()
    manifest.rename(folder / f".manifest.json.abcdefgh{PART}")
    (folder / "run_job.lock").touch()
    export_job(folder, SPACE, work, device="pretended-cpu")
    assert manifest.read_bytes() == text
    assert not list(folder.glob(".*"))


def test_a_core_ml_job_without_coremltools_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_for(SPACE, precision="fp16")
    with monkeypatch.context() as patch:
        patch.setattr("nas.coreml_package.coremltools", lambda: None)
        patch.setattr("nas.coreml_package.save_package", lambda module, example, path, key: path.mkdir())
        manifest = export_job(tmp_path / "job", SPACE, work, device="apple-m2-npu", form="coreml")
    earlier = manifest.read_text().replace('"torch": "', '"torch": "1.')
    manifest.write_text(earlier)
    monkeypatch.setitem(sys.modules, "coremltools", None)
    for name in ("job", "new"):
        with pytest.raises(InputError, match="need coremltools"):
            export_job(tmp_path / name, SPACE, work, device="apple-m2-npu", form="coreml")
    assert manifest.read_text() == earlier
    assert not (tmp_path / "new").exists()


def test_results_cannot_say_of_themselves_that_they_were_measured_here(folder: Path, work: Work, tmp_path: Path) -> None:
    results = pretended_results(folder, work)
    results["environment"] |= {"provenance": "measured", "device": "other-cpu", "csv_sha256": "0", "calibrations": []}
    import_results(written(folder, results), tmp_path / "out")
    table = LatencyTable.load(tmp_path / "out" / "pretended-cpu.csv")
    assert table.provenance == "imported"
    assert table.calibrations


def test_models_travel_without_their_weights_and_compute_the_same_with_them() -> None:
    import onnxruntime

    data = OrtCpu().onnx((Layer(MB4D(320), 8),))
    light, weights = without_weights(data)
    assert len(light) < len(data) / 4
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load_from_string(data).graph.initializer}
    assert {w["name"]: tuple(w["shape"]) for w in weights} == {k: a.shape for k, a in arrays.items() if a.size > 320 * 4}
    factors = [array for array in arrays.values() if array.shape == (320, 1, 1, 1)]
    assert len(factors) == 2 and min(array.min() for array in factors) > 0, "kept and pooled: noise would not be like them"
    again = with_weights(light, {w["name"]: arrays[w["name"]] for w in weights})
    feed = {"image": np.random.default_rng(0).standard_normal((1, 320, 8, 8), dtype=np.float32)}
    whole, filled = (
        onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feed)[0] for model in (data, again)
    )
    assert np.array_equal(whole, filled)
    initializers = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load_from_string(again).graph.initializer}
    assert initializers.keys() == arrays.keys()
    assert all(np.array_equal(initializers[name], array) for name, array in arrays.items())
    for weight in weights:
        assert made_weights(weights)[weight["name"]].std() == pytest.approx(weight["std"], rel=0.02)


@pytest.fixture(scope="module")
def real_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of a very small space, exported as a user does."""
    folder = tmp_path_factory.mktemp("real")
    stages = tuple(replace(s, widths=s.widths[-1:]) for s in small_space((16,)).stages)
    SearchSpace("micro", 16, 10, stages).save(folder / "micro.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nas.job._cache", lambda: folder / "cache")
        cli.build_lut(["--device", "cpu", "--space", str(folder / "micro.yaml"), "--export-job", str(folder / "job")])
    manifest = json.loads((folder / "job" / "manifest.json").read_text())
    assert (manifest["plan"]["passes"], manifest["plan"]["session_visits"]) == (list(MANY_SESSIONS), SESSION_VISITS)
    # It is the path that is tested, not how narrow the intervals are
    manifest["plan"] |= {"passes": [3, 6], "min_visits": 6, "session_visits": 3}
    (folder / "job" / "manifest.json").write_text(json.dumps(manifest))
    return folder / "job"


def test_a_job_runs_with_onnxruntime_and_numpy_alone(real_job: Path, tmp_path: Path) -> None:
    """From export to table with the real runtime; torch, pandas and this package are kept from the child process."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("torch", "pandas", "onnx", "supernet", "rich", "yaml", "scipy"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} is not on the device')")
    environment = {**os.environ, "PYTHONPATH": str(blocked)}
    done = subprocess.run([sys.executable, "run_job.py"], cwd=real_job, capture_output=True, text=True, env=environment)
    if "too busy or too hot" in done.stderr:
        pytest.skip("this machine is too busy for anything to be timed")
    assert done.returncode == 0, done.stderr
    cli.build_lut(["--import-results", str(real_job / "results.json"), "--out", str(tmp_path / "out")])
    (path,) = (file for file in (tmp_path / "out").glob("*.csv") if not file.name.endswith(".samples.csv"))
    table = LatencyTable.load(path)
    assert table.device == OrtCpu().id, "the device named itself"
    assert table.serves(SearchSpace.load(real_job.parent / "micro.yaml"))
    assert table.meta["runtime"] == "onnxruntime"
    (samples,) = real_job.glob("samples-*.csv")
    visits = samples.read_bytes()
    again = subprocess.run([sys.executable, "run_job.py"], cwd=real_job, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert f"going on from {samples.name}; --again begins anew" in again.stdout
    assert samples.read_bytes() == visits, "a finished job has nothing left to time, and says its results again"


@pytest.mark.skipif(sys.platform == "win32", reason="a kill is another thing there")
def test_a_job_that_is_killed_in_its_midst_goes_on_and_loses_one_visit_at_most(real_job: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(real_job, tmp_path / "copy", ignore=shutil.ignore_patterns("samples-*", "results.json"))
    kept: list[str] = []
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "run_job.py"], cwd=copy, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as running:
            deadline = time.monotonic() + 300
            while running.poll() is None and len(lines_of(copy)) < len(kept) + 8 and time.monotonic() < deadline:
                time.sleep(0.01)
            running.kill()
        if running.returncode != -9:
            pytest.skip("this machine is too busy for the job to be watched")
        visits = lines_of(copy)
        assert visits[: len(kept)] == kept and len(visits) > len(kept), "what was measured is kept"
        kept = visits
    done = subprocess.run([sys.executable, "run_job.py"], cwd=copy, capture_output=True, text=True)
    if "too busy or too hot" in done.stderr:
        pytest.skip("this machine is too busy for anything to be timed")
    assert done.returncode == 0, done.stderr
    assert "going on from samples-" in done.stdout
    assert lines_of(copy)[: len(kept)] == kept
    results = json.loads((copy / "results.json").read_text())
    assert sum(len(visits) for visits in results["visits"].values()) == len(lines_of(copy)) - 1, "the header is no visit"


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
@pytest.mark.parametrize(("blocks", "said"), [(0, "File too large"), (1, "cannot be written (File too large): make room")])
def test_a_device_whose_disk_is_full_is_told_in_one_line(real_job: Path, tmp_path: Path, blocks: int, said: str) -> None:
    """Before anything is written, and in the midst of the visits."""
    copy = shutil.copytree(real_job, tmp_path / "copy", ignore=shutil.ignore_patterns("samples-*", "results.json"))
    limited = f"ulimit -f {blocks}; exec {shlex.quote(sys.executable)} run_job.py"
    done = subprocess.run(["sh", "-c", limited], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1
    assert said in done.stderr and "goes on from here" in done.stderr and done.stderr.count("\n") == 1
    assert not (copy / "results.json").exists()


def lines_of(job: Path) -> list[str]:
    """Return the whole lines of a job's visits."""
    return [line for path in job.glob("samples-*.csv") for line in path.read_text().splitlines(True) if line.endswith("\n")]


def test_throttling_is_asked_for_by_time_and_what_came_between_is_told() -> None:
    from nas.profilers.ort_session import throttles
    from nas.profilers.run_job import ASKED_EVERY_S, Throttling

    now, asked = 0.0, 0
    words: list[int | None] = []

    def bits() -> int | None:
        nonlocal asked
        asked += 1
        return words.pop(0)

    def after(*said: int | None) -> str | None:
        """A second between visits, and the firmware asked at both ends and in between."""
        nonlocal now, asked
        words[:], asked = said, 0
        found = Throttling(bits, lambda: now)
        while len(words) > 1:
            now += 1.0
            found.watch()
        found.ask()
        return throttles(found.found)

    assert after(0, 0, 0, 0) is None and asked == 4
    began = now
    after(0, 0, 0, 0)
    assert now - began == 2 * ASKED_EVERY_S
    assert after(0, 0b0100, 0, 0) == "throttled", "as it was when it was asked"
    assert after(0b0001, 0) == "under-voltage", "at the start"
    assert after(0, 0b1000) == "soft temperature limit", "at the end"
    assert after(0x50000, 0x50000) is None, "that was before"
    assert after(0x50000, 0x70000) == "clock capped", "between"
    assert after(0x10000, 0, 0x10000) == "under-voltage", "a driver had cleared it meanwhile"
    assert after(0, None, 0) is None, "an answer that lacks"
    assert after(None) is None and asked == 1, "no such firmware: it is not asked again"


def test_a_job_whose_model_was_changed_is_refused_on_the_device(real_job: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(real_job, copy)
    model = sorted((copy / "models").iterdir())[3]
    model.write_bytes(model.read_bytes() + b"x")
    done = subprocess.run([sys.executable, "run_job.py"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not the file that the manifest names" in done.stderr
    assert done.stderr.count("\n") == 1


def no_module(folder: Path) -> None:
    (folder / "nas" / "profilers" / "bench.py").unlink()


def half_a_module(folder: Path) -> None:
    path = folder / "nas" / "profilers" / "bench.py"
    path.write_text(path.read_text().replace("def carry_out(", "def carry_out((", 1))


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def half_a_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-100])


def former_manifest(folder: Path) -> None:
    """A job of before models were opened anew every few visits."""
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 3}))


def no_model(folder: Path) -> None:
    sorted((folder / "models").iterdir())[3].unlink()


def damaged_samples(folder: Path) -> None:
    import onnxruntime

    job = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    name = f"samples-{job[:8]}-{cpu_id()}-{onnxruntime.__version__}.csv"
    header = "measured_at,model,raw_ms,cached_reference_ms,streaming_reference_ms"
    (folder / name).write_text(f"{header}\n2026-01-01T00:00:00+00:00,empty,one,1,1\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_module, "nas/ beside it is not whole .*: copy the whole job folder again"),
        (half_a_module, "nas/ beside it is not whole .*: copy the whole job folder again"),
        (no_manifest, r"manifest\.json cannot be read .*: copy the whole job folder again"),
        (half_a_manifest, r"manifest\.json is not whole: copy the job folder again"),
        (former_manifest, "reads ONNX jobs of schema 4, this one is onnx 3: export the job anew"),
        (no_model, r"models/.* cannot be read .*: copy the whole job folder again"),
        (damaged_samples, "is damaged .*: remove it, and its visits are made again"),
    ],
)
def test_half_a_copy_of_a_job_is_refused_on_the_device_in_one_line(
    real_job: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    copy = shutil.copytree(real_job, tmp_path / "copy", ignore=shutil.ignore_patterns("samples-*"))
    damage(copy)
    done = subprocess.run([sys.executable, "run_job.py"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search(f"^run_job.py: .*{said}$", done.stderr) and done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such lock")
def test_two_runs_of_a_job_do_not_share_its_folder_and_a_killed_one_blocks_nobody(real_job: Path, tmp_path: Path) -> None:
    from nas.profilers.run_job import locked

    copy = shutil.copytree(real_job, tmp_path / "copy", ignore=shutil.ignore_patterns("samples-*"))
    holds = "from pathlib import Path\nfrom run_job import locked\nlock = locked(Path('.'))\nprint('held', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", holds], cwd=copy, stdin=-1, stdout=-1, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        second = subprocess.run([sys.executable, "run_job.py"], cwd=copy, capture_output=True, text=True)
        first.kill()
    assert second.returncode == 2
    assert f"in use by another run_job.py (process {first.pid} on " in second.stderr and second.stderr.count("\n") == 1
    assert not list(copy.glob("samples-*"))
    locked(copy).close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such lock")
def test_a_job_runs_where_nothing_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    from nas.profilers.run_job import locked

    monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows
    locked(tmp_path).close()
    monkeypatch.setitem(sys.modules, "fcntl", fcntl)

    def unknown_here(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unknown_here)
    locked(tmp_path).close()


def test_a_job_of_more_threads_than_the_device_has_is_refused_there(real_job: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(real_job, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["settings"]["threads"] = 4096
    (copy / "manifest.json").write_text(json.dumps(manifest))
    done = subprocess.run([sys.executable, "run_job.py"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 2
    assert "4096 threads, more than the CPUs that this process may use" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_runtime_that_the_processor_cannot_run_is_told_with_the_fix(real_job: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(real_job, copy)
    session = copy / "nas" / "profilers" / "ort_session.py"
    dies = "    def __init__(self, model, threads=1, weights=None):\n        os.kill(os.getpid(), 4)\n"
    session.write_text(session.read_text() + "\n\nclass OrtModel:\n" + dies)
    done = subprocess.run([sys.executable, "run_job.py"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1
    assert "is killed by signal 4" in done.stderr
    assert f"{shlex.quote(sys.executable)} -m pip install 'onnxruntime<" in done.stderr


@pytest.fixture
def dying_runtime(tmp_path: Path) -> str:
    """A PYTHONPATH with a runtime that this processor cannot import."""
    (tmp_path / "dies").mkdir()
    (tmp_path / "dies" / "onnxruntime.py").write_text("import os\nos.kill(os.getpid(), 4)\n")
    return str(tmp_path / "dies")


def test_a_runtime_that_kills_whoever_imports_it_is_told(real_job: Path, tmp_path: Path, dying_runtime: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(real_job, copy)
    place = {**os.environ, "PYTHONPATH": dying_runtime}
    done = subprocess.run([sys.executable, "run_job.py"], cwd=copy, capture_output=True, text=True, env=place)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "is killed by signal 4 on import here" in done.stderr
    assert f"{shlex.quote(sys.executable)} -m pip install 'onnxruntime<" in done.stderr


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake of ssh and scp alone: the other machine is a folder, and what they were asked is written down."""
    programs, home = tmp_path / "bin", tmp_path / "home"
    programs.mkdir()
    home.mkdir()
    said = f"open({str(tmp_path / 'asked')!r}, 'a').write(' '.join(['{{}}', *sys.argv[1:]]) + '\\n')"
    (programs / "ssh").write_text(
        f"#!{sys.executable}\nimport subprocess, sys\n{said.format('ssh')}\n"
        f"sys.exit(subprocess.run(sys.argv[-1], shell=True, cwd={str(home)!r}).returncode)\n"
    )
    (programs / "scp").write_text(
        f"#!{sys.executable}\nimport subprocess, sys\n{said.format('scp')}\n"
        f"paths = [a.replace('me@pi:', {str(home)!r} + '/') for a in sys.argv[1:] if a[0] != '-' and a != '2222']\n"
        "sys.exit(subprocess.run(['cp', '-r', *paths]).returncode)\n"
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path


def test_over_ssh_the_job_goes_there_runs_and_its_results_come_back(machine: Path, folder: Path, work: Work) -> None:
    results = pretended_results(folder, work)
    (folder / "run_job.py").write_text(f"open('results.json', 'w').write({json.dumps(results)!r})\n")
    found = run_over_ssh(Address.parse(f"ssh://me@pi:2222{sys.executable}"), folder)
    assert json.loads(found.read_text()) == results
    asked = (machine / "asked").read_text().splitlines()
    assert [line.split()[0] for line in asked] == ["ssh", "scp", "ssh", "scp"]
    assert all(" -p 2222 me@pi" in line for line in asked if line.startswith("ssh"))
    assert all(" -P 2222 " in line for line in asked if line.startswith("scp"))
    assert sys.executable in asked[2]


def test_a_step_that_fails_over_ssh_is_told_in_one_line(machine: Path, folder: Path) -> None:
    (folder / "run_job.py").write_text("raise SystemExit('run_job.py needs onnxruntime')\n")
    with pytest.raises(Failed, match=r"cannot run the job on me@pi: run_job\.py needs onnxruntime"):
        run_over_ssh(Address.parse(f"ssh://me@pi{sys.executable}"), folder)


@pytest.mark.parametrize(
    ("code", "said", "ends"),
    [(255, "ssh: Could not resolve hostname pi", 2), (255, "me@pi: Permission denied (publickey).", 2), (127, "no python3", 1)],
)
def test_a_machine_that_is_not_reached_costs_no_models(
    code: int, said: str, ends: int, machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (machine / "bin" / "ssh").write_text(
        f"#!{sys.executable}\nimport sys\nsys.stderr.write('a banner\\n' + {said!r} + '\\n')\nsys.exit({code})\n"
    )
    monkeypatch.setattr("nas.remote.export_job", lambda *_, **__: pytest.fail("models are written"))
    with pytest.raises(SystemExit) as ended:
        cli.build_lut(["--device", "ssh://me@pi"])
    assert ended.value.code == ends
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nas-build-lut: cannot")]
    assert f"cannot run python3 on me@pi: {said}" in line and "banner" not in line


def interpreter(path: Path, body: str) -> Address:
    """A program there that stands in for a Python."""
    path.write_text(body)
    path.chmod(0o755)
    return Address.parse(f"ssh://me@pi{path}")


@pytest.mark.skipif(sys.platform == "win32", reason="the test speaks POSIX")
def test_a_python_that_cannot_run_jobs_is_refused_before_anything_is_made_for_it(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dying_runtime: str
) -> None:
    reach(Address.parse(f"ssh://me@pi:2222{sys.executable}"))
    monkeypatch.setattr("nas.remote.export_job", lambda *_, **__: pytest.fail("models are written"))
    bare = interpreter(machine / "bare", f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    said = refusal(lambda: build_over_ssh(f"ssh://me@pi{bare.python}", SPACE, machine / "out"))
    assert said == (
        f"{bare.python} on me@pi cannot run jobs (No module named 'numpy'): run there: {bare.python} -m pip install "
        "onnxruntime numpy (in a venv, where the system's Python takes no packages)"
    )
    body = f"#!{sys.executable}\nimport sys\nassert sys.argv[1] == '-c'\nsys.version_info = (3, 9, 2)\nexec(sys.argv[2])\n"
    old = interpreter(machine / "python3.9", body)
    assert refusal(lambda: reach(old)) == (
        f"{old.python} on me@pi cannot run jobs (it is Python 3.9): give ssh://me@pi/path/to/python, one of 3.10 or newer"
    )
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", dying_runtime)
        said = refusal(lambda: reach(Address.parse(f"ssh://me@pi{sys.executable}")))
        assert "importing onnxruntime kills it" in said and f"{sys.executable} -m pip install 'onnxruntime<" in said
    with pytest.raises(Failed, match=r"cannot run /none/python on me@pi: .*([Nn]ot found|No such file)"):
        reach(Address.parse("ssh://me@pi/none/python"))


@pytest.mark.parametrize(
    "url", ["ssh://", "ssh:host", "ssh://-oProxyCommand=evil", "ssh://pi:abc", "ssh://pi:99999", "ssh://a b"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="is no address"):
        Address.parse(url)


def test_an_address_keeps_the_names_that_ssh_knows() -> None:
    assert Address.parse("ssh://MyPi") == Address("MyPi", None, "python3")
    assert Address.parse("ssh://pi@10.0.0.7:22/opt/venv/bin/python") == Address("pi@10.0.0.7", 22, "/opt/venv/bin/python")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "My Phone", "--export-job", "x"], "cannot be a device id"),
        (["--device", "pi-cpu", "--export-job", "x", "--format", "tflite"], "unknown format 'tflite'"),
        (["--device", "pi-cpu", "--export-job", "x", "--precision", "fp16"], "cannot have the precision 'fp16'"),
        (["--device", "iphone15-npu", "--export-job", "x"], "give --format coreml"),
        (["--device", "iphone15-cpu", "--export-job", "x"], "timed on a CPU, not on iphone15-cpu: give --format coreml"),
        (["--device", "apple-m2-npu-b8", "--export-job", "x"], "timed on a CPU, not on apple-m2-npu-b8: give a CPU's name"),
        (["--device", "apple-m2-coreml-cpu", "--export-job", "x"], "timed on a CPU, not on apple-m2-coreml-cpu"),
        (["--device", "iphone-npu", "--export-job", "x", "--format", "coreml"], "name the very one"),
        (["--export-job", "x", "--format", "coreml"], "--device iphone15pro-npu"),
        (["--export-job", "x", "--format", "tflite"], "unknown format 'tflite'"),
        (["--export-job", "x", "--missing"], "leave --missing out"),
        (["--export-job", "x", "--recalibrate"], "leave --recalibrate out"),
        (["--device", "cpu", "--missing", "--recalibrate"], "leave one of them out"),
        (["--device", "pi-cpu", "--export-job", "x", "--missing"], "leave --missing out"),
        (["--device", "ssh://pi:x"], "is no address"),
        (["--device", "iphone-npu", "--batch", "8"], "at batch 1"),
        (["--import-results", "none.json"], "cannot be read"),
        (["--import-results", "none.json", "--space", "micro"], "leave --space out"),
        (["--device", "pi-cpu-4t", "--threads", "2", "--export-job", "x"], "says threads 4, but --threads 2 was given"),
        (["--device", "apple-m2-npu", "--export-job", "x", "--format", "coreml"], "not on apple-m2-npu"),
        (["--device", "iphone15-npu", "--export-job", "x", "--format", "coreml", "--batch", "8"], "one image a call"),
        (["--device", "cpu", "--format", "onnx"], "add --export-job"),
        (["--device", "cpu", "--team-id", "T"], "give --device iphone-npu"),
    ],
)
def test_nas_build_lut_refuses_jobs_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.build_lut(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_int8_jobs_travel_light_too(tmp_path: Path) -> None:
    data, weights = without_weights(OrtCpu(precision="int8").onnx((Layer(MB4D(32), 8),)))
    assert {w["dtype"] for w in weights} == {"int8"}
    assert len(data) < 20_000
    manifest = {
        "settings": {"threads": 1},
        "models": {"block": {"file": "m.onnx", "weights": weights}},
    }
    (tmp_path / "m.onnx").write_bytes(data)
    from nas.profilers.run_job import open_model

    open_model(tmp_path, manifest, "block")[0]()


def test_a_job_is_of_the_schema_that_its_runner_takes(folder: Path) -> None:
    from nas.profilers import run_job

    assert json.loads((folder / "manifest.json").read_text())["schema"] == JOB_SCHEMA
    harness = Path(run_job.__file__).parent / "harness"
    assert f"kind.schema == {JOB_SCHEMA}, kind.format" in (harness / "Job.swift").read_text()
    bench = (harness / "Bench.swift").read_text()
    assert f'"schema": {JOB_SCHEMA},' in bench
    assert f"let sessionVisits = {SESSION_VISITS} " in bench and "plan.pieces.isEmpty ? rounds / sessionVisits : 2" in bench
