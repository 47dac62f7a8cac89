"""A table is built from a device that the test knows by heart: its rows must come out, whatever kills the build."""

import csv
import errno
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

from nas import cli
from nas.calibration import fit, sidecar_tau
from nas.lut import build_table, rows_off_their_visits
from nas.measure import ALONE_MAX_VISITS, CACHED, EMPTY, SESSION_VISITS, STREAMING, Model, name_of
from nas.plan import Work, in_many_sessions, requested_space, slope, stratified, terms_of, work_for
from nas.profilers.bench import Bench, Calm, Goal, Plan, Samples, TooNoisy, carry_out
from nas.profilers.ort_cpu import OrtCpu
from nas.profilers.timing import References, Stopwatch, Visit, Workload
from nas.table import LatencyTable, measured_layers
from supernet.blocks import build_layer
from supernet.errors import InputError
from supernet.space import SearchSpace, StageSpace
from supernet.specs import MB3D, MB4D, Embedding, Flat, Head, Layer, Stem, Unflat, is_block

CALL_MS = 0.01


def small_space(widths: tuple[int, ...] = (16, 32)) -> SearchSpace:
    def stage(stride: int, widths: tuple[int, ...], *kinds: type[MB4D] | type[MB3D]) -> StageSpace:
        from supernet.specs import Identity

        return StageSpace(widths, stride, 2, (*(kind(widths[-1]) for kind in kinds), Identity(widths[-1])))

    return SearchSpace("small", 16, 10, (stage(2, widths, MB4D), stage(2, (32, 48), MB4D, MB3D)))


def cost(layer: Layer) -> float:
    """The milliseconds of a layer inside a network of the pretended device."""
    spec, side = layer
    match spec:
        case MB4D():
            return 2e-5 * spec.dim * side
        case MB3D():
            return 9e-5 * spec.dim * side
        case Head():
            return 1e-4 * spec.dim + 1e-6 * spec.num_classes * spec.dim
        case Embedding():
            return 1e-6 * spec.dim * spec.dim_in * side
        case Stem():
            return 5e-5 * spec.dim * side
        case Flat() | Unflat():
            return 1e-4 * spec.dim
    raise AssertionError(layer)


def session_end(layer: Layer) -> float:
    """What an end of a session costs where this block stands at it: a change of layout."""
    return 3e-6 * layer.spec.dim * layer.resolution if isinstance(layer.spec, MB4D | MB3D) else 0.0


def device_ms(model: Model) -> float:
    ends = session_end(model[0]) + session_end(model[-1]) if model else 0.0
    return CALL_MS + ends + sum(cost(layer) for layer in model)


class Device:
    """A pretended device: workloads that move a clock on."""

    id = "pretended-cpu"
    flags: Mapping[str, str] = {}

    def __init__(self, noise: float = 0.0) -> None:
        self.now = 0.0
        self.rng = random.Random(0)
        self.noise = noise
        self.runtime_version = "1.0"
        self.slowness = 1.0

    def environment(self) -> dict[str, Any]:
        return {
            "runtime": "pretence",
            "runtime_version": self.runtime_version,
            "precision": "fp32",
            "batch": 1,
            "threads": 1,
            "export": "none",
            "warnings": [],
        }

    def open(self, model: Model) -> tuple[Workload, int]:
        ms = device_ms(model)

        def run() -> None:
            self.now += ms * self.slowness * (1 + self.noise * self.rng.random()) * 1e6

        return run, 1000

    def stopwatch(self) -> Stopwatch:
        return Stopwatch(self.open(CACHED)[0], self.open(STREAMING)[0], lambda: round(self.now))

    def between(self, size: int) -> None:
        return None

    def exclusive(self) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.fixture
def device() -> Device:
    return Device()


def true_ms(terms: dict[Model, float]) -> float:
    return sum(weight * device_ms(model) for model, weight in terms.items())


def test_blocks_that_would_push_each_other_out_of_the_caches_are_have_shorter_chains() -> None:
    block = Layer(MB3D(192), 4)
    params = sum(p.numel() for p in build_layer(block).parameters())
    assert sorted(len(model) for model in slope(block, 4 * params)) == [1, 2, 4]
    assert {len(model): weight for model, weight in slope(block, 4 * params - 1).items()} == {1: -0.5, 3: 0.5}
    assert {len(model): weight for model, weight in slope(block, 3 * params - 1).items()} == {1: -1.0, 2: 1.0}
    assert slope(block, 1) == slope(block, 3 * params - 1)


def test_models_that_share_one_another_are_visited_until_every_row_is_known(tmp_path: Path) -> None:
    """Two rows share a model: the one is no reason to leave the other's own model alone."""
    rng = random.Random(0)
    machine = Device()

    def opened(name: str) -> tuple[Workload, int]:
        def run() -> None:
            machine.now += 1e6 * (1 + rng.random())

        return run, 1000

    plan = Plan((), (), (), "a", {}, passes=(32,))
    samples = Samples(tmp_path / "samples.csv", "")
    bench = Bench(samples, opened, machine.stopwatch(), rng, plan)
    goals = [Goal({"a": 1.0, "shared": -0.5}, 0.01), Goal({"b": 1.0, "shared": -0.5}, 0.01)]
    for limits in ((0, 12), (12, 32)):
        bench.measure(["a", "b", "shared"], goals, lambda _: None, limits)
    samples.close()
    assert {name: samples.count(name) for name in ("a", "b", "shared")} == {"a": 32, "b": 32, "shared": 32}


def test_what_opens_quickly_is_visited_in_many_sessions_if_they_differ(tmp_path: Path) -> None:
    machine, rng, opened = Device(), random.Random(0), Counter[str]()

    def open_model(name: str) -> tuple[Workload, int]:
        opened[name] += 1
        ms = 1.0 + (rng.gauss(0, 0.1) if name == "restless" else 0.0)

        def run() -> None:
            machine.now += ms * 1e6

        return run, 1000

    work = Work({}, [], small_space().smallest, Plan((), ("steady", "restless"), (), "steady", {}))
    plan, samples = in_many_sessions(work).plan, Samples(tmp_path / "samples.csv", "")
    carry_out(plan, Bench(samples, open_model, machine.stopwatch(), random.Random(0), plan), lambda _: None, None)
    samples.close()
    assert {name: samples.count(name) for name in opened} == {"steady": plan.min_visits, "restless": ALONE_MAX_VISITS}
    assert all(samples.count(name) == SESSION_VISITS * sessions for name, sessions in opened.items())


def test_the_table_of_what_opens_quickly_says_that_its_intervals_are_of_sessions_too(tmp_path: Path) -> None:
    """Every row's time is that of its models in some session, 5 % more or less: 24 sessions leave about 2 %, and visits of one
    session are alike."""

    class Quick(Device):
        opens_quickly = True

        def open(self, model: Model) -> tuple[Workload, int]:
            factor, ms = self.rng.gauss(1, 0.05), device_ms(model)

            def run() -> None:
                self.now += factor * ms * 1e6

            return run, 1000

    table = build_table(Quick(), small_space(), tmp_path)
    assert table.meta["statistics"]["session_visits"] == SESSION_VISITS
    assert all(row.visits <= ALONE_MAX_VISITS and row.visits % SESSION_VISITS == 0 for row in table.rows.values())
    covered = [row.low_ms <= cost(layer) <= row.high_ms for layer, row in table.rows.items()]
    assert mean(covered) > 0.8


def test_other_memory_is_touched_before_each_call_as_the_plan_says(tmp_path: Path) -> None:
    machine, touched = Device(), Counter[int]()

    def touches(size: int) -> Workload:
        def run() -> None:
            touched[size] += 1

        return run

    samples = Samples(tmp_path / "samples.csv", "")
    plan = Plan((), (), (), "small", {"small": 9000, "large": 3000, "huge": 0})
    assert plan.most_touched_bytes == 9000
    bench = Bench(
        samples, lambda name: (machine.open((Layer(MB4D(16), 8),))[0], 1), machine.stopwatch(), random.Random(0), plan
    )
    bench.measure(plan.touched_bytes, [], lambda _: None, (0, 12), touches)
    samples.close()
    assert set(touched) == {9000, 3000}, "nothing beside the huge one"


def test_a_piece_is_timed_in_the_working_set_of_a_typical_network() -> None:
    space = SearchSpace.load("efficientformer-tiny")
    work = work_for(space)

    def params(model: Model) -> int:
        return sum(p.numel() for layer in model for p in build_layer(layer).parameters())

    touched = {model: work.plan.touched_bytes.get(name) for name, model in work.models.items()}
    assert touched[EMPTY] == 4 * work.typical_params, "the weights of a typical network, in fp32"
    shortened = 0
    for layer, terms in work.rows.items():
        if is_block(layer.spec):
            longest = max(terms, key=len)
            left = max(0, 4 * (work.typical_params - params(longest)))
            assert {touched[chain] for chain in terms} == {left}, "else what a cold call costs once would be part of the slope"
            shortened += len(longest) < 4
        else:
            (whole,) = (model for model in terms if layer in model)
            assert touched[whole] == 4 * (work.typical_params - params(whole))
    assert shortened, "some blocks are so large that four of them are more than a typical network"
    halves = work_for(space, precision="int8").plan.touched_bytes
    assert {name: 4 * size for name, size in halves.items()} == work.plan.touched_bytes
    assert not any(name in work.plan.touched_bytes for name in work.plan.networks), "whole networks are timed in a plain loop"


@pytest.mark.parametrize("space", [small_space(), SearchSpace.load("efficientformer-tiny")])
def test_every_row_is_free_of_the_call_and_of_the_sessions_ends(space: SearchSpace) -> None:
    for layer in measured_layers(space.layers()):
        assert true_ms(terms_of(layer)) == pytest.approx(cost(layer), abs=1e-12), layer


def test_a_slope_is_the_least_squares_slope_over_chains_of_1_2_and_4() -> None:
    block = Layer(MB4D(16), 8)
    times = {1: 3.0, 2: 4.5, 4: 8.7}  # fitted by hand: centre 7/3; (3(-4/3) + 4.5(-1/3) + 8.7(5/3)) / (42/9)
    found = sum(weight * times[len(model)] for model, weight in slope(block).items())
    assert found == pytest.approx((3 * -4 + 4.5 * -1 + 8.7 * 5) / 14)


def test_chains_have_distinct_weights() -> None:
    from nas.measure import build_module

    module, _ = build_module((Layer(MB4D(16), 8),) * 4, deploy=False)
    weights = [block.mlp.fc1.weight for block in module.children()]
    assert all(not weights[0].equal(other) for other in weights[1:])


def test_the_table_of_a_known_device_is_what_the_device_costs(device: Device, tmp_path: Path) -> None:
    space = small_space()
    table = build_table(device, space, tmp_path)
    for layer, row in table.rows.items():
        assert row.ms == pytest.approx(cost(layer), rel=1e-3, abs=1e-6), layer
        assert row.method == ("slope" if isinstance(layer.spec, MB4D | MB3D) else "difference")
    (calibration,) = table.calibrations
    assert calibration.mean_error_percent < 0.01
    assert calibration.scale == pytest.approx(1, rel=1e-3)
    assert calibration.n_fit >= 10
    assert calibration.n_check >= 10
    assert calibration.offset_ms == pytest.approx(CALL_MS, rel=0.01)
    arch = space.sample(random.Random(5))
    assert table.predict_ms(arch) == pytest.approx(device_ms(tuple(arch.layers())), rel=1e-3)
    assert LatencyTable.load(tmp_path / f"{table.device}.csv").predict_ms(arch) == pytest.approx(
        table.predict_ms(arch), rel=1e-4
    )
    assert not list(tmp_path.glob("*.building.json")), "nothing is left to go on with"


def test_twenty_kills_lose_a_visit_each_at_most_and_change_no_row(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = small_space()
    whole = build_table(device, space, tmp_path / "whole")
    visits_needed = len((tmp_path / "whole" / f"{whole.device}.samples.csv").read_text().splitlines()) - 1

    rng = random.Random(7)
    real_add = Samples.add
    left = 0

    def add_until_killed(self: Samples, name: str, visit: Visit) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            self._file.write("2026-01-01T00:00:00.000+00:00,half a li")  # what a kill in the middle of a write leaves
            self._file.flush()
            raise KeyboardInterrupt
        real_add(self, name, visit)

    monkeypatch.setattr(Samples, "add", add_until_killed)
    for _ in range(20):
        left = rng.randrange(1, visits_needed // 22)
        with pytest.raises(KeyboardInterrupt):
            build_table(device, space, tmp_path / "killed")
        assert not list((tmp_path / "killed").glob("*.csv.*"))
        assert not (tmp_path / "killed" / f"{whole.device}.csv").exists(), "a table is whole or absent"
    monkeypatch.setattr(Samples, "add", real_add)
    table = build_table(device, space, tmp_path / "killed")
    assert table.rows.keys() == whole.rows.keys()
    for layer, row in table.rows.items():
        assert row.ms == pytest.approx(whole.rows[layer].ms, rel=1e-6)
    with (tmp_path / "killed" / f"{whole.device}.samples.csv").open() as file:
        lines = list(csv.reader(file))
    assert all(len(line) == 5 for line in lines), "no line is cut"
    assert len(lines) - 1 <= visits_needed + 20


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="forking is safe on Linux alone")
def test_a_build_that_the_system_kills_at_twenty_moments_gives_the_same_table(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("kill_at_random.py")), str(tmp_path), "build", "20"]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert json.loads(done.stdout or "null") == {"codes": [-9] * 20, "last": [0, 0]}, done.stderr
    lines: dict[str, list[list[str]]] = {}
    for out in ("whole", "killed"):
        with (tmp_path / out / "pretended-cpu.samples.csv").open() as file:
            lines[out] = list(csv.reader(file))
    assert {len(line) for line in lines["killed"]} == {5}, "no line is cut"
    assert len(lines["killed"]) - len(lines["whole"]) <= 20, "a kill loses one visit at most"
    whole, killed = (LatencyTable.load(tmp_path / out / "pretended-cpu.csv") for out in ("whole", "killed"))
    assert {layer: row.ms for layer, row in killed.rows.items()} == pytest.approx(
        {layer: row.ms for layer, row in whole.rows.items()}, rel=1e-6
    )
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_a_recalibration_measures_networks_alone(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large networks may change beside the references: rows stay, and what is made of them follows."""
    space, other = small_space((16, 32)), replace(small_space((16,)), name="other")
    for each in (space, other):
        before = build_table(device, each, tmp_path)

    def slower(model: Model) -> float:
        return real(model) * (1.05 if name_of(model).startswith("network") else 1)

    real, opened = device_ms, set[str]()
    monkeypatch.setattr("test_lut.device_ms", slower)
    open_model = Device.open
    monkeypatch.setattr(Device, "open", lambda self, model: (opened.add(name_of(model)), open_model(self, model))[1])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        add, left = Samples.add, iter(range(30))

        def add_until_killed(self: Samples, name: str, visit: Visit) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            add(self, name, visit)

        patch.setattr(Samples, "add", add_until_killed)
        build_table(device, space, tmp_path, only_networks=True)
    after = build_table(device, space, tmp_path, only_networks=True)
    assert {name.split(" ")[0] for name in opened - {name_of(CACHED), name_of(STREAMING)}} == {"network", "empty"}
    assert {layer: row.ms for layer, row in after.rows.items()} == {layer: row.ms for layer, row in before.rows.items()}
    arch = space.sample(random.Random(5))
    now, then = (table.calibrated_for(space).predict_ms(arch) for table in (after, before))
    assert now == pytest.approx(1.05 * then, rel=2e-3)
    kept, was = (next(c for c in table.calibrations if c.space == "other") for table in (after, before))
    assert kept == was
    assert not list(tmp_path.glob("*.building.json"))
    assert not rows_off_their_visits(after, tmp_path / f"{after.device}.samples.csv")


def test_what_there_is_to_warn_of_at_the_end_is_said_but_not_the_builds_own_load(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment, asked = device.environment, 0

    def later() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        warnings = ["it runs on battery", *(["it is throttled", "other work keeps it busy (load 1.3)"] if asked > 1 else [])]
        return environment() | {"warnings": warnings}

    monkeypatch.setattr(device, "environment", later)
    build_table(device, small_space((16,)), tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: it")]
    assert said == ["warning: it runs on battery", "warning: it is throttled"]


def test_what_cannot_be_recalibrated_is_refused(device: Device, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has not every row of small, which --recalibrate calibrates: measure them first"):
        build_table(device, small_space((16,)), tmp_path, only_networks=True)
    build_table(device, small_space((16,)), tmp_path)
    with pytest.raises(InputError, match="has not every row of small"):
        build_table(device, small_space((16, 32)), tmp_path, only_networks=True)
    device.runtime_version = "2.0"
    with pytest.raises(InputError, match=r"was measured with runtime_version 1\.0: build it anew without --recalibrate"):
        build_table(device, small_space((16,)), tmp_path, only_networks=True)


def kill_after(device: Device, space: SearchSpace, folder: Path, visits: int) -> None:
    """Begin a build, and kill it after so many visits."""
    add, left = Samples.add, visits

    def add_until_killed(self: Samples, name: str, visit: Visit) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        add(self, name, visit)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Samples, "add", add_until_killed)
        build_table(device, space, folder)


def visits_in(folder: Path) -> int:
    return len((folder / "pretended-cpu.samples.csv").read_text().splitlines()) - 1


def test_a_killed_build_is_gone_on_with_after_a_build_of_another_space(
    device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space, other = small_space(), replace(small_space((24,)), name="other")
    block = Layer(MB4D(48), 4)  # in both
    whole = build_table(device, space, tmp_path / "whole")
    kill_after(device, space, tmp_path / "killed", 300)
    kill_after(device, other, tmp_path / "killed", 100)
    device.flags = {name_of((block,) * 4): "off-npu"}  # which the build that opens the model is told
    build_table(device, other, tmp_path / "killed")
    device.flags = {}
    assert len(list((tmp_path / "killed").glob("*.building.json"))) == 1, "the first one's"
    before = visits_in(tmp_path / "killed")
    capsys.readouterr()
    table = build_table(device, space, tmp_path / "killed")
    assert "going on with the build that began at" in capsys.readouterr().err
    assert visits_in(tmp_path / "killed") - before <= visits_in(tmp_path / "whole") - 300, "what was measured counts"
    assert table.serves(space) and table.serves(other)
    for layer, row in whole.rows.items():
        assert table.rows[layer].ms == pytest.approx(row.ms, rel=1e-6)
    assert table.rows[block].flag == "off-npu", "its visits are those of the other build"
    assert rows_off_their_visits(table, tmp_path / "killed" / "pretended-cpu.samples.csv") == []
    assert not [*(tmp_path / "killed").glob("*.building.json"), *(tmp_path / "killed").glob("*.flags.json")]


def test_a_table_tells_what_there_was_to_warn_of_at_each_start_of_its_build(tmp_path: Path) -> None:
    class Warned(Device):
        said: tuple[str, ...] = ()

        def environment(self) -> dict[str, Any]:
            return {**super().environment(), "warnings": list(self.said)}

    device = Warned()
    for said in (("it runs on battery", "it is busy"), ("it is throttled", "it is busy")):
        device.said = said
        kill_after(device, small_space(), tmp_path, 50)
    device.said = ()
    table = build_table(device, small_space(), tmp_path)
    assert table.meta["warnings"] == ["it runs on battery", "it is busy", "it is throttled"]
    assert table.meta["at_end"]["warnings"] == []
    assert build_table(device, small_space(), tmp_path).meta["warnings"] == []


def test_a_killed_build_begins_anew_where_visits_of_another_kind_came_between(
    device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They lie in one file, and a build takes all of a span of time."""
    kill_after(device, small_space(), tmp_path, 100)
    device.runtime_version = "2.0"
    kill_after(device, small_space((24,)), tmp_path, 100)
    device.runtime_version = "1.0"
    capsys.readouterr()
    table = build_table(device, small_space(), tmp_path)
    assert "going on" not in capsys.readouterr().err
    last = (tmp_path / "pretended-cpu.samples.csv").read_text().splitlines()[200]  # the last of what was killed
    assert table.meta["builds"][0]["started"] > last.split(",")[0]


def test_missing_measures_only_what_is_not_there_and_keeps_the_rest(device: Device, tmp_path: Path) -> None:
    path = tmp_path / f"{build_table(device, small_space((16,)), tmp_path).device}.csv"
    first = LatencyTable.load(path)
    both = build_table(device, small_space((16, 32)), tmp_path, only_missing=True)
    assert set(first.rows) < set(both.rows)
    assert all(both.rows[layer] == row for layer, row in first.rows.items())
    assert not both.missing(small_space((16, 32)).layers())


def test_other_spaces_are_calibrated_anew_on_rows_that_they_share(
    device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space, other = small_space((16,)), replace(small_space((16, 32)), name="larger")
    networks = [space.sample(random.Random(seed)) for seed in range(5)]
    first = build_table(device, space, tmp_path)
    stem, row = next((layer, row) for layer, row in first.rows.items() if isinstance(layer.spec, Stem))
    changed = replace(first, rows={**first.rows, stem: replace(row, ms=3 * row.ms, high_ms=4 * row.ms)})
    changed.save(tmp_path)  # a row that the next build measures otherwise
    both = build_table(device, other, tmp_path)
    assert "the calibration for small, which shares rows, is fitted anew: off by 0.0 %" in capsys.readouterr().err
    assert [c.space for c in both.calibrations] == ["small", "larger"]
    old, new = first.calibrations[0], both.calibrations[0]
    assert [(n.arch, n.ms, n.fitted) for n in new.networks] == [(n.arch, n.ms, n.fitted) for n in old.networks]
    for arch in networks:
        assert both.calibrated_for(space).predict_ms(arch) == pytest.approx(device_ms(tuple(arch.layers())), rel=0.01)
    again = build_table(device, other, tmp_path)
    assert again.calibrations[0] == both.calibrations[0], "nothing has changed"


def test_a_table_of_another_runtime_is_not_extended(device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_table(device, small_space((16,)), tmp_path)
    device.runtime_version = "2.0"
    with pytest.raises(InputError, match=r"runtime_version 1\.0: build it anew without --missing$"):
        build_table(device, small_space((16, 32)), tmp_path, only_missing=True)
    with pytest.raises(InputError, match=r"build it anew without --missing \(its rows of small go with it\)$"):
        build_table(device, replace(small_space((24,)), name="other"), tmp_path, only_missing=True)
    capsys.readouterr()
    build_table(device, small_space((16, 32)), tmp_path)
    assert "this build replaces it, with its rows of small" in capsys.readouterr().err


def test_an_imported_table_is_not_completed_with_rows_measured_here(device: Device, tmp_path: Path) -> None:
    table = build_table(device, small_space((16,)), tmp_path)
    replace(table, provenance="imported").save(tmp_path)
    with pytest.raises(InputError, match="origin imported"):
        build_table(device, small_space((16, 32)), tmp_path, only_missing=True)


def test_a_table_whose_rows_were_measured_in_another_way_is_not_completed(device: Device, tmp_path: Path) -> None:
    table = build_table(device, small_space((16,)), tmp_path)
    replace(table, meta={name: value for name, value in table.meta.items() if name != "protocol"}).save(tmp_path)
    with pytest.raises(InputError, match="was measured with another protocol: build it anew without --missing"):
        build_table(device, small_space((16, 32)), tmp_path, only_missing=True)


def test_two_builds_of_one_table_are_each_held_to_their_own_visits(device: Device, tmp_path: Path) -> None:
    build_table(device, small_space((16,)), tmp_path)
    device.slowness = 1.07
    table = build_table(device, small_space((16, 32)), tmp_path)
    assert len(table.meta["builds"]) == 2
    said = table.meta["statistics"]
    assert said["passes"][-1] >= min(row.visits for row in table.rows.values()) >= said["min_visits"]
    assert rows_off_their_visits(table, tmp_path / "pretended-cpu.samples.csv") == []


def test_a_table_that_is_built_anew_whole_has_the_pace_of_the_day(device: Device, tmp_path: Path) -> None:
    device.slowness = 1.6
    slow = build_table(device, small_space(), tmp_path)
    device.slowness = 1.0
    fast = build_table(device, small_space(), tmp_path)
    largest = small_space().largest
    assert slow.predict_ms(largest) == pytest.approx(1.6 * fast.predict_ms(largest), rel=0.01)
    other = build_table(device, replace(small_space((24,)), name="other"), tmp_path)
    device.slowness = 1.6
    both = build_table(device, small_space(), tmp_path)
    assert both.meta["reference_ms"] == other.meta["reference_ms"], "rows of another space stay as they are"


def test_a_space_s_calibration_takes_the_place_of_its_own_alone(device: Device, tmp_path: Path) -> None:
    """Two networks of one name at two image sizes are two spaces."""
    space = small_space((16,))
    build_table(device, space, tmp_path)
    table = build_table(device, space.at(32), tmp_path)
    assert [(c.space, c.image_size) for c in table.calibrations] == [("small", 16), ("small", 32)]
    table = build_table(device, replace(small_space((24,)), name="small"), tmp_path)
    assert [(c.space, c.image_size) for c in table.calibrations] == [("small", 32), ("small", 16)], "the space was changed"


def test_a_damaged_table_is_built_anew_but_not_extended(device: Device, tmp_path: Path) -> None:
    path = tmp_path / f"{build_table(device, small_space((16,)), tmp_path).device}.csv"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="truncated"):
        build_table(device, small_space((16,)), tmp_path, only_missing=True)
    assert not build_table(device, small_space((16,)), tmp_path).missing(small_space((16,)).layers())
    assert LatencyTable.load(path)


def test_a_disturbed_network_does_not_pull_the_calibration() -> None:
    sums = np.linspace(0.1, 2.8, 16)
    measured = 0.02 + 1.1 * sums
    measured[11] *= 2
    assert fit(sums, 0.1 * (7 * np.arange(16) % 5), measured) == pytest.approx([0.02, 1.1, 0, 0], abs=0.003)


def test_a_calibration_knows_that_stem_and_embeddings_are_quicker_beside_each_other() -> None:
    sums, between = np.linspace(0.1, 2.8, 16), 0.1 * (7 * np.arange(16) % 5)
    assert fit(sums, between, 0.02 + 1.1 * sums - 0.3 * between) == pytest.approx([0.02, 1.1, -0.3, 0], rel=1e-3)


def test_a_larger_stem_is_never_said_to_be_faster() -> None:
    sums = np.linspace(1, 16, 16)
    between = 0.5 + 0.01 * (7 * np.arange(16) % 5)
    assert fit(sums, between, 0.02 + 1.1 * sums - 2 * between)[2] == 0


def test_a_calibration_of_networks_that_do_not_grow_with_their_rows_is_a_poor_one_but_one() -> None:
    sums = np.linspace(0.1, 0.2, 16)
    assert fit(sums, 0 * sums, 1 - 0.5 * sums) == pytest.approx([1, -0.5, 0, 0], abs=1e-3)


def test_a_calibration_knows_that_larger_networks_push_more_out_of_the_caches() -> None:
    sums, between = np.linspace(0.1, 2.8, 16), 0.1 * (7 * np.arange(16) % 5)
    line = 0.8 * sums + 0.2 * between
    bend = 0.2 / line.max()
    assert fit(sums, between, 0.02 + line + bend * line**2) == pytest.approx([0.02, 0.8, 0.2, bend], rel=0.02)


def test_a_calibration_without_an_order_to_tell_has_a_tau_that_json_can_hold() -> None:
    x = np.array([1.0, 3.0, 2.0])
    assert sidecar_tau(x, np.array([0.1, 0.2, 0.3])) == pytest.approx(1 / 3)
    assert sidecar_tau(np.ones(3), x) == sidecar_tau(x[:1], x[:1]) == sidecar_tau(x[:0], x[:0]) == 0


def test_a_table_tells_its_error_by_stage_and_kind_of_layer(device: Device, tmp_path: Path) -> None:
    table = build_table(device, small_space(), tmp_path)
    (found,) = table.calibrations
    assert len(found.error_by_stage_percent) == 2
    assert set(found.error_by_kind_percent) == {"stem", "embedding", "mb4d", "mb3d", "flat", "head"}
    assert sum(network.fitted for network in found.networks) == found.n_fit
    checked = [n for n in found.networks if not n.fitted]
    assert max(100 * abs(n.predicted_ms / n.ms - 1) for n in checked) == pytest.approx(found.max_error_percent)


def test_a_machine_that_comes_and_goes_is_waited_for_then_told_instead_of_measured(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, pause = device.open, Stopwatch.pause
    visits: list[Visit] = []
    paused_after: list[int] = []

    def waited_for(calm: Calm, visit: Visit) -> bool:
        visits.append(visit)
        return len(visits) == 3

    def noted(stopwatch: Stopwatch) -> None:
        paused_after.append(len(visits))
        pause(stopwatch)

    monkeypatch.setattr("nas.profilers.bench.Calm.waited_for", waited_for)
    monkeypatch.setattr(Stopwatch, "pause", noted)

    def swinging(model: Model) -> tuple[Workload, int]:
        run, size = plain(model)

        def run_at_some_pace() -> None:
            device.slowness = 4.0 if device.rng.random() < 0.02 else 1.0 if device.rng.random() < 0.02 else device.slowness
            for marker in tmp_path.glob("*.building.json"):  # as somebody does who gives up on a build
                marker.unlink()
            run()

        return run_at_some_pace, size

    device.open = swinging  # type: ignore[method-assign]
    with pytest.raises(TooNoisy, match="too busy or too hot"):
        build_table(device, small_space(), tmp_path)
    assert not (tmp_path / "pretended-cpu.csv").exists(), "nothing is written"
    assert len(visits) == len((tmp_path / "pretended-cpu.samples.csv").read_text().splitlines()) - 1, "each is looked at"
    assert 3 in paused_after, "the references' timing of before the wait does not serve the visit after it"
    device.open, device.slowness = plain, 1.0  # type: ignore[method-assign]
    assert build_table(device, small_space(), tmp_path).serves(small_space()), "the next build begins anew"


def test_a_build_that_is_refused_before_its_first_visit_leaves_nothing_behind(device: Device, tmp_path: Path) -> None:
    plain = device.open

    def refuses(model: Model) -> tuple[Workload, int]:
        if model not in (CACHED, STREAMING):
            raise InputError("this block cannot be compiled")
        return plain(model)

    device.open = refuses  # type: ignore[method-assign]
    with pytest.raises(InputError, match="cannot be compiled"):
        build_table(device, small_space(), tmp_path / "out")
    assert not (tmp_path / "out").exists()

    opened = 0

    def refuses_later(model: Model) -> tuple[Workload, int]:
        nonlocal opened
        opened += 1
        return plain(model) if opened < 20 else refuses(model)

    device.open = refuses_later  # type: ignore[method-assign]
    with pytest.raises(InputError, match="cannot be compiled"):
        build_table(device, small_space(), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("pretended-cpu.*.building.json"))) == 1, "there is something to go on with"


def test_what_disturbs_a_device_for_a_while_is_waited_for() -> None:
    said: list[str] = []
    now = 0.0
    quiet, busy = Visit(1.0, References(0.5, 1.0)), Visit(1.0, References(0.6, 4.0))

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    calm = Calm([quiet] * 49, said.append, sleep, lambda: now)
    assert not calm.waited_for(quiet)
    assert not calm.waited_for(busy), "nothing was measured for long enough to be worth it"
    now = 20.0
    assert [calm.waited_for(busy) for _ in range(5)] == [True, True, True, True, False], "15 of 20 seconds, not 16 more"
    assert now == 35.0
    assert len(said) == 1
    assert "takes 4 ms instead of 1" in said[0]
    now += 1000.0
    assert not calm.waited_for(quiet)
    assert calm.waited_for(busy)
    assert now == 1036.0, "after a calm visit it begins with a second again"


def test_calibration_networks_are_spread_over_the_space() -> None:
    space = small_space()
    networks = stratified(space, 12, random.Random(0))
    assert len(set(networks)) == 12
    costs = sorted(device_ms(tuple(arch.layers())) for arch in networks)
    low, high = (device_ms(tuple(arch.layers())) for arch in (space.smallest, space.largest))
    assert costs[0] - low < 0.25 * (high - low)
    assert costs[-1] > 0.5 * (low + high)


def test_a_word_about_a_model_is_carried_by_the_rows_it_serves(device: Device, tmp_path: Path) -> None:
    block = Layer(MB4D(16), 8)
    device.flags = {name_of((block,) * 4): "off-npu"}
    table = build_table(device, small_space(), tmp_path)
    assert table.rows[block].flag == "off-npu"
    assert LatencyTable.load(tmp_path / "pretended-cpu.csv").rows[block].flag == "off-npu"
    assert not table.rows[Layer(MB4D(32), 8)].flag


@pytest.mark.parametrize("factor", [1.1, 0.9])
def test_a_row_that_was_changed_by_hand_is_found_out(device: Device, tmp_path: Path, factor: float) -> None:
    table = build_table(device, small_space(), tmp_path)
    samples = tmp_path / "pretended-cpu.samples.csv"
    assert rows_off_their_visits(table, samples) == []
    for layer in table.rows:
        row = table.rows[layer]
        changed = replace(table, rows={**table.rows, layer: replace(row, ms=factor * row.ms)})
        former = replace(changed, meta={**changed.meta, "protocol": "one working set"})
        assert rows_off_their_visits(former, samples) == [], "the rows of a former protocol are other sums of their visits"
        (doubt,) = rows_off_their_visits(changed, samples)
        assert doubt.layer == layer
        assert doubt.expected_ms == pytest.approx(row.ms, rel=1e-4, abs=1e-9)


def test_a_full_disk_leaves_the_table_that_was_there(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_table(device, small_space((16,)), tmp_path)
    table = LatencyTable.load(tmp_path / "pretended-cpu.csv")
    asked: list[int] = []

    def full(handle: int) -> None:
        asked.append(handle)
        if len(asked) == 2:  # the sidecar
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="make room"):
        patch.setattr(os, "fsync", full)
        replace(table, rows=dict(list(table.rows.items())[1:])).save(tmp_path)
    assert LatencyTable.load(tmp_path / "pretended-cpu.csv").rows == table.rows


def test_the_plan_is_the_same_every_time() -> None:
    assert work_for(small_space()).plan == work_for(small_space()).plan


def test_a_space_of_few_networks_is_calibrated_on_all_of_them(device: Device, tmp_path: Path) -> None:
    few = small_space((16,))
    few = SearchSpace(few.name, few.image_size, few.num_classes, tuple(replace(s, widths=s.widths[-1:]) for s in few.stages))
    table = build_table(device, few, tmp_path)  # 3 x 6 = 18 networks, fewer than the 28 that are wanted
    assert table.calibrations[0].n_fit + table.calibrations[0].n_check == 18
    with pytest.raises(InputError, match="has 2 networks, too few"):
        build_table(device, SearchSpace("one", 16, 10, (replace(few.stages[0], depth=1),)), tmp_path)


def test_a_network_gives_a_space_around_it() -> None:
    space = requested_space(None, "efficientformer_l1")
    from supernet.zoo import zoo

    assert zoo("efficientformer_l1") in space
    assert small_space().smallest in SearchSpace.around(small_space().smallest), "even where stages are empty"
    assert all(len(stage.widths) == 1 for stage in space.stages)


def test_models_have_readable_names_and_networks_short_ones() -> None:
    assert name_of(EMPTY) == "empty"
    assert name_of(CACHED) == "2 x mb4d(dim=64) at 16 px"
    network = name_of(tuple(small_space().largest.layers()))
    assert network.startswith("network ")
    assert len(network) == 24


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_real_sessions_run_chains_and_networks_in_onnx_runtime(precision: str) -> None:
    profiler = OrtCpu(precision=precision)
    for model in (EMPTY, CACHED, (Layer(MB3D(16), 4),) * 2, tuple(small_space().largest.layers())):
        run, size = profiler.open(model)
        run()
        assert size > 0


def test_a_session_of_int8_computes_in_int8() -> None:
    import onnx

    model = onnx.load_from_string(OrtCpu(precision="int8").onnx((Layer(MB4D(16), 8),)))
    kinds = [node.op_type for node in model.graph.node]
    assert "QuantizeLinear" in kinds
    assert "BatchNormalization" not in kinds
    products = [t for t in model.graph.initializer if len(t.dims) == 4 and t.dims[1] > 1]  # not the mixers' depthwise ones
    assert {t.data_type for t in products} == {onnx.TensorProto.INT8}


def test_a_batch_is_the_first_side_of_what_is_timed() -> None:
    import onnx

    model = onnx.load_from_string(OrtCpu(batch=3).onnx((Layer(MB4D(16), 8),)))
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [3, 16, 8, 8]


@pytest.mark.parametrize(
    ("settings", "end"), [({}, "-cpu"), ({"threads": 2}, "-2t"), ({"precision": "int8", "batch": 8}, "-cpu-int8-b8")]
)
def test_settings_are_part_of_the_device_id(settings: dict[str, Any], end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.devices.usable_cpus", lambda: 2)
    profiler = OrtCpu(**settings)
    assert profiler.id.endswith(end)
    from nas.devices import open_profiler

    assert open_profiler(profiler.id) == profiler, "and an id gives the settings back"


@pytest.mark.parametrize(
    ("arguments", "settings", "folder", "only_missing"),
    [
        ([], (1, "fp32", 1), "tables", False),
        (["--threads", "2"], (2, "fp32", 1), "tables", False),
        (["--precision", "int8", "--batch", "8"], (1, "int8", 8), "tables", False),
        (["--missing"], (1, "fp32", 1), "tables", True),
        (["--out", "out"], (1, "fp32", 1), "out", False),
    ],
)
def test_what_the_command_is_given_is_what_is_built(
    arguments: list[str],
    settings: tuple[int, str, int],
    folder: str,
    only_missing: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nas.devices.usable_cpus", lambda: 2)
    monkeypatch.setattr("nas.table.user_folder", lambda: Path("tables"))
    small_space().save("space.yaml")
    asked: list[object] = []

    def noted(profiler: OrtCpu, space: SearchSpace, folder: Path, *, only_missing: bool, only_networks: bool) -> None:
        asked.extend([(profiler.threads, profiler.precision, profiler.batch), space, folder, only_missing])
        assert not only_networks

    monkeypatch.setattr("nas.lut.build_table", noted)
    cli.build_lut(["--device", "cpu", "--space", "space.yaml", *arguments])
    assert asked == [settings, small_space(), Path(folder), only_missing]


def test_more_threads_than_cpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from nas.devices import open_profiler
    from nas.profilers.bench import usable_cpus

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 3, 5}, raising=False)
    assert usable_cpus() == 3
    assert open_profiler("cpu", threads=3).id.endswith("-3t")
    with pytest.raises(InputError, match=r"--threads 4 is more .* give at most 3, or --export-job"):
        open_profiler("cpu", threads=4)
    monkeypatch.delattr(os, "sched_getaffinity")  # Linux alone has it
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert usable_cpus() == 5
