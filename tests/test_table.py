"""A table predicts from its own rows only, and refuses files that are not what they say."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nas.devices import measuring
from nas.lookup import resolve_table
from nas.table import Calibration, CheckedNetwork, LatencyTable, Row, Target, find_tables, measured_layers, space_sha256
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.space import SearchSpace
from supernet.specs import MB3D, MB4D, Head, Layer
from supernet.zoo import zoo

TINY = SearchSpace.load("efficientformer-tiny")
CALIBRATION = Calibration(
    space="efficientformer-tiny",
    space_sha256=space_sha256(TINY),
    image_size=32,
    strides=(1, 2, 2, 2),
    offset_ms=0.01,
    scale=1.05,
    scale_between=-0.1,
    sum_low_ms=0.1,
    sum_high_ms=3.0,
    n_fit=16,
    n_check=12,
    mean_error_percent=1.5,
    max_error_percent=4.0,
    within_5_percent=100.0,
    within_10_percent=100.0,
    kendall_tau=0.98,
    error_by_stage_percent=(0.1, -0.2, 0.3, -0.4),
    error_by_kind_percent={"mb4d": 0.5},
    networks=(CheckedNetwork(TINY.smallest.to_yaml(), 1.0, 0.01, 1.02, False),),
)

ROW = Row(0.5, 0.4, 0.6, "slope", 0.41, 0.45, 0.7, 12, 0.55, "noisy")


def cost(layer: Layer) -> float:
    """Made-up but additive milliseconds."""
    classes = layer.spec.num_classes if isinstance(layer.spec, Head) else 0
    return layer.spec.dim * layer.resolution / 1e4 + classes / 1e5


def table_of(space: SearchSpace, *calibrations: Calibration) -> LatencyTable:
    rows = {layer: Row(cost(layer), 0.9 * cost(layer), 1.1 * cost(layer), "slope") for layer in measured_layers(space.layers())}
    return LatencyTable("toy-cpu", rows, calibrations, "measured", {"origin": "toy"})


def test_a_prediction_is_the_calibrated_sum_of_the_rows() -> None:
    table = table_of(TINY, CALIBRATION)
    for arch in (TINY.smallest, TINY.largest):
        total = sum(cost(layer) for layer in arch.layers())
        assert table.sum_ms(arch) == pytest.approx(total)
        between = sum(cost(layer) for layer in arch.layers() if layer.spec.kind in ("stem", "embedding"))
        assert table.predict_ms(arch) == pytest.approx(0.01 + 1.05 * total - 0.1 * between)


def test_larger_networks_are_slower_than_their_rows_by_the_bend() -> None:
    bent = replace(CALIBRATION, bend=0.3)
    for line in (0.0, 0.2, 2.5):
        ms = bent.predict_ms(line / 1.05, 0.0)
        assert ms == pytest.approx(0.01 + line + 0.3 * line**2)
        assert bent.line_of(ms) == pytest.approx(line)
    assert bent.line_of(math.inf) == math.inf
    assert bent.line_of(0.005) == pytest.approx(-0.005)


@pytest.mark.parametrize("calibrations", [(CALIBRATION,), (replace(CALIBRATION, bend=0.3),), ()])
def test_the_parts_of_a_prediction_are_the_prediction(calibrations: tuple[Calibration, ...]) -> None:
    table = table_of(TINY, *calibrations)
    parts, rest = table.parts_ms(TINY.largest)
    assert [(name, layer) for name, layer, _ in parts] == TINY.largest.named_layers()
    assert sum(ms for _, _, ms in parts) + rest == pytest.approx(table.predict_ms(TINY.largest))
    assert rest == (0.01 if calibrations else 0.0)


def test_an_empty_slot_costs_nothing() -> None:
    table = table_of(TINY, CALIBRATION)
    arch = TINY.arch([32, 64, 128, 192], [["mb4d", "identity"], ["identity"] * 2, ["identity"] * 4, ["identity"] * 3])
    assert table.predict_ms(arch) == table.predict_ms(arch.without_identity())


def test_a_heads_classes_lie_on_the_line_through_10_and_1000() -> None:
    table = table_of(TINY, CALIBRATION)
    for classes in (2, 10, 37, 100, 1000):
        head = Layer(Head(192, classes), 4)
        assert table.layer_ms(head) == pytest.approx(cost(head)), "the made-up cost is linear in the classes"
    with pytest.raises(InputError, match="no row for head"):
        table.layer_ms(Layer(Head(192, 1001), 4))


def test_a_missing_row_is_an_error_that_names_row_device_and_command() -> None:
    table = table_of(TINY)
    lacking = replace(table, rows={k: v for k, v in table.rows.items() if k != Layer(MB4D(64), 16)})
    with pytest.raises(InputError, match=r"toy-cpu has no row for mb4d\(dim=64\) at 16 px.*nas-build-lut .*--missing"):
        lacking.predict_ms(TINY.largest)
    assert lacking.missing(TINY.layers()) == [Layer(MB4D(64), 16)]


def test_a_knob_is_part_of_the_key() -> None:
    table = table_of(TINY)
    with pytest.raises(InputError, match="mlp_ratio=3"):
        table.layer_ms(Layer(MB4D(64, mlp_ratio=3), 16))


def test_a_network_of_another_geometry_is_not_predicted() -> None:
    table = table_of(TINY, CALIBRATION)
    with pytest.raises(InputError, match="not calibrated for 224 px"):
        table.predict_ms(zoo("efficientformer_l1"))


def test_of_several_calibrations_the_nearest_in_latency_counts() -> None:
    high = replace(CALIBRATION, space="larger", offset_ms=1.0, sum_low_ms=5.0, sum_high_ms=9.0)
    table = table_of(TINY, high, CALIBRATION)
    total = table.sum_ms(TINY.smallest)
    assert table.predict_ms(TINY.smallest) == pytest.approx(CALIBRATION.predict_ms(*table.sums_ms(TINY.smallest)))
    assert total < 5


def test_of_several_calibrations_the_one_whose_networks_had_these_kinds_of_layers_counts() -> None:
    other = replace(CALIBRATION, space="other", offset_ms=1.0, error_by_kind_percent={"ffn": 0.5})
    table = table_of(TINY, other, CALIBRATION)
    assert table.predict_ms(TINY.largest) == pytest.approx(CALIBRATION.predict_ms(*table.sums_ms(TINY.largest)))


def test_a_file_holds_the_table_exactly_to_six_digits(tmp_path: Path) -> None:
    table = table_of(TINY, CALIBRATION)
    rows = {**table.rows, Layer(MB3D(64, num_heads=4), 8): ROW}
    path = replace(table, rows=rows).save(tmp_path)
    back = LatencyTable.load(path)
    assert set(back.rows) == set(rows)
    assert back.rows[Layer(MB3D(64, num_heads=4), 8)] == ROW
    assert back.calibrations == (CALIBRATION,)
    assert (back.device, back.provenance, back.meta["origin"]) == ("toy-cpu", "measured", "toy")
    for layer, row in rows.items():
        assert back.rows[layer].ms == pytest.approx(row.ms, rel=1e-5)
    assert ",".join(["mb3d", "8", "64", "", "", "", "4"]) in path.read_text(), "knobs at their default are left blank"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def edit_row(path: Path) -> None:
    path.write_text(path.read_text().replace("slope", "guess", 1))


def drop_sidecar(path: Path) -> None:
    path.with_suffix(".meta.json").unlink()


def cut_sidecar(path: Path) -> None:
    sidecar = path.with_suffix(".meta.json")
    sidecar.write_text(sidecar.read_text()[:100])


def other_schema(path: Path) -> None:
    sidecar = path.with_suffix(".meta.json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "schema": 99}))


def guessed(path: Path) -> None:
    sidecar = path.with_suffix(".meta.json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "provenance": "estimated"}))


def of_no_device(path: Path) -> None:
    sidecar = path.with_suffix(".meta.json")
    content = json.loads(sidecar.read_text())
    del content["device"]
    sidecar.write_text(json.dumps(content))


def falling(path: Path) -> None:
    sidecar = path.with_suffix(".meta.json")
    content = json.loads(sidecar.read_text())
    content["calibrations"][0]["scale"] = -1.0
    sidecar.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated or edited"),
        (edit_row, "truncated or edited"),
        (drop_sidecar, "is not there"),
        (cut_sidecar, "not whole JSON"),
        (other_schema, "schema 99"),
        (guessed, r"its provenance must be measured or imported, but is 'estimated'\): build it anew"),
        (of_no_device, r"it lacks device\): build it anew"),
        (falling, "a scale of -1, which must be above 0"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = table_of(TINY, CALIBRATION).save(tmp_path)
    damage(path)
    with pytest.raises(InputError, match=message) as caught:
        LatencyTable.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"), [(",slope,", ",guess,"), ("mb4d,", "mb5d,"), (",ms,", ",seconds,"), ("mb4d,16,32,,", "mb4d,16,wide,,")]
)
def test_a_csv_with_something_unknown_in_it_is_refused(tmp_path: Path, old: str, new: str) -> None:
    import hashlib

    path = table_of(TINY).save(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    sidecar = path.with_suffix(".meta.json")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "csv_sha256": digest}))
    with pytest.raises(InputError, match="cannot be read as a latency table"):
        LatencyTable.load(path)


def test_a_table_serves_a_space_whose_rows_and_calibration_it_has() -> None:
    table = table_of(TINY, CALIBRATION)
    assert table.serves(TINY)
    assert table.serves(TINY.with_classes(100)), "classes are interpolated"
    assert not table.serves(TINY.at(64))
    assert not table_of(TINY).serves(TINY), "no calibration"
    assert not replace(table, rows=dict(list(table.rows.items())[1:])).serves(TINY)
    renamed = replace(TINY, stages=(replace(TINY.stages[0], depth=1), *TINY.stages[1:]))
    assert not table.serves(renamed), "of the same name, but another space"


def test_tables_are_found_in_the_working_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nas.table.user_folder", lambda: tmp_path / "mine")
    table = table_of(TINY)
    in_user = table.save(tmp_path / "mine")
    assert find_tables()["toy-cpu"] == in_user
    table.save(tmp_path / "latency_tables")
    assert find_tables()["toy-cpu"] == Path("latency_tables/toy-cpu.csv")
    with pytest.raises(InputError, match=r"'toy-gpu' here \(there are tables of toy-cpu\): .*--device toy-gpu"):
        LatencyTable.load("toy-gpu")


def test_what_lies_beside_a_table_leads_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = table_of(TINY).save("latency_tables")
    (tmp_path / "latency_tables" / f"{path.stem}.samples.csv").touch()
    for given in ("latency_tables", f"latency_tables/{path.stem}.samples.csv"):
        with pytest.raises(InputError, match=f"give latency_tables/{path.stem}.csv"):
            LatencyTable.load(given)
    path.with_suffix(".meta.json").rename(tmp_path / "elsewhere.json")
    assert find_tables().get(path.stem) != path
    find_tables()
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"warning: {path} has no {path.stem}.meta.json beside it, so it is not used")


@pytest.mark.parametrize("ms", [0, -1, float("nan"), float("inf"), True, "1.6"])
def test_a_target_is_a_positive_number(ms: float) -> None:
    with pytest.raises(InputError, match="positive number of milliseconds"):
        Target(ms)


def test_the_modules_that_decide_do_without_torch() -> None:
    code = "import nas, nas.table, nas.slimming, supernet.zoo, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_layer_of_every_network_of_a_space_is_priced() -> None:
    import random

    table = table_of(TINY, CALIBRATION)
    rng = random.Random(3)
    archs: list[ArchConfig] = [TINY.sample(rng) for _ in range(100)]
    assert all(table.predict_ms(arch) > 0 for arch in archs)


def test_how_more_rows_are_measured_depends_on_where_the_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.profilers.ort_cpu.cpu_id", lambda: "this-cpu")
    table = table_of(TINY)
    here = replace(table, device="this-cpu")
    assert measuring(here, "--space s") == "`nas-build-lut --device this-cpu --missing --space s`"
    assert measuring(replace(table, provenance="measured"), "--space s").endswith("--missing --space s` on that machine")
    assert "--space s --export-job DIR`" in measuring(replace(table, provenance="imported"), "--space s")
    phone = replace(table, provenance="imported", meta={**table.meta, "runtime": "coreml"})
    assert "--space s --export-job DIR --format coreml`" in measuring(phone, "--space s")
    with pytest.raises(InputError, match="--arch FILE --export-job DIR --format coreml`"):
        replace(phone, rows={}).require(TINY.layers())


def test_tables_that_ship_are_nobodys_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout the working folder's `latency_tables` is the package's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nas.table.user_folder", lambda: tmp_path / "mine")
    monkeypatch.setattr("nas.profilers.ort_cpu.cpu_id", lambda: "this-cpu")
    table = table_of(TINY)
    path = table.save("latency_tables")
    assert resolve_table(None, None) == ("toy-cpu", Path("latency_tables/toy-cpu.csv")), "the user's only one"
    monkeypatch.setattr("nas.table._SHIPPED", tmp_path / "latency_tables")
    assert resolve_table(None, None) == ("this-cpu", None)
    assert resolve_table("toy-cpu", None) == ("toy-cpu", path), "asked for, it is found"
    here = replace(table, device="this-cpu").save("latency_tables")
    assert resolve_table(None, None) == ("this-cpu", here), "built here"
