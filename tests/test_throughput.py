"""Objective throughput: how many images share a pass is chosen beside the network, with its control, by what groups take."""

import csv
import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from tables import plain_calibration

import nas
from nas import cli
from nas.checkpoints import load_weights
from nas.data import Images, load_images
from nas.evaluation import Evaluator
from nas.guarantee import Outcome
from nas.kept import Checks
from nas.measure import measure_alone
from nas.plan import for_batch
from nas.profilers.ort_session import cpu_id
from nas.profilers.timing import Measurement, References, Visit
from nas.recipe import Recipe
from nas.search_stages import _finalists
from nas.settings import SupernetSettings
from nas.table import Calibration, LatencyTable, Row, measured_layers
from nas.throughput import (
    Accuracy,
    Finalist,
    Found,
    GroupedPredictor,
    best_of,
    grouped_accuracy,
    train_finalists,
    usable_ways,
    wait_ms,
)
from nas.training import train_network
from nas.trajectory import Check, Evaluation, Trajectory
from supernet.arch import ArchConfig, MultiplexSpec
from supernet.metapath import Supernet
from supernet.space import SearchSpace
from supernet.specs import MB3D, GroupedMB3D, Head, Layer

SPACE = """
name: micro-mux
image_size: 16
num_classes: 10
mux: [1, 2, 4]
stages:
- {stride: 2, widths: [8, 16], depth: 1, candidates: [mb4d, identity]}
- {stride: 2, widths: [16, 24], depth: 2, candidates: [{kind: mb3d, num_heads: 2, key_dim: 8}, identity]}
"""
SETTINGS = """
objective: throughput
weight_epochs: 1
mixture_epochs: 1
finalist_epochs: 1
images_per_epoch: 128
recalibration_images: 64
score_images: 64
arrivals_per_second: 100
"""


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nas.table.user_folder", lambda: tmp_path / "tables")
    monkeypatch.setattr("nas.lookup.user_folder", lambda: tmp_path / "tables")


@pytest.fixture
def space() -> SearchSpace:
    Path("micro.yaml").write_text(SPACE)
    Path("settings.yaml").write_text(SETTINGS)
    return SearchSpace.load("micro.yaml")


def cost(layer: Layer) -> float:
    """Token blocks are dear, and cheaper the more images share them; the rest is by width and side."""
    spec = layer.spec
    shared = spec.n if isinstance(spec, GroupedMB3D) else 1
    classes = spec.num_classes / 1e5 if isinstance(spec, Head) else 0.0
    return (0.05 / shared if isinstance(spec, MB3D) else 0.0) + spec.dim * layer.resolution / 1e4 + classes


def table_of(space: SearchSpace, batch: int, calibration: Calibration | None = None) -> LatencyTable:
    rows = {layer: Row(cost(layer), cost(layer), cost(layer), "slope") for layer in measured_layers(space.layers())}
    meta = {"batch": batch, "reference_ms": {"cached_ms": 0.25, "streaming_ms": 0.3}}
    return LatencyTable("phone-npu", rows, (calibration or plain_calibration(space),), "imported", meta)


def tokens_of(space: SearchSpace) -> ArchConfig:
    """The network with a token block in each slot of the last stage, and nothing before."""
    return space.arch([s.widths[0] for s in space.stages[:-1]] + [24], [["identity"], ["mb3d", "mb3d"]])


# -- What may be chosen --------------------------------------------------------------------------------------------------


def test_a_table_says_what_groups_take(space: SearchSpace) -> None:
    table, arch = table_of(space, 4), tokens_of(space)
    found = [GroupedPredictor(table, space, mux).predict_ms(arch) for mux in (None, *space.mux)]
    assert found == sorted(found, reverse=True)
    assert found[0] == table.predict_ms(arch)
    empty = space.smallest
    assert {GroupedPredictor(table, space, mux).predict_ms(empty) for mux in (None, *space.mux)} == {table.predict_ms(empty)}


def test_ways_that_save_less_than_the_table_is_off_by_are_left_out(
    space: SearchSpace, capsys: pytest.CaptureFixture[str]
) -> None:
    table = table_of(space, 4)
    archs = [space.arch([8, width], [["identity"], ["mb3d", "mb3d"]]) for width in (16, 24)]
    saved = [100 * max(1 - table.predict_ms(replace(a, mux=mux)) / table.predict_ms(a) for a in archs) for mux in space.mux]
    assert 0 < saved[0] < saved[1]
    assert usable_ways(space, table) == space.mux
    between = replace(plain_calibration(space), mean_error_percent=sum(saved) / 2)
    assert usable_ways(space, table_of(space, 4, between)) == space.mux[1:]
    err = capsys.readouterr().err
    assert f"groups of 2: at most {saved[0]:.1f} % less time a call" in err
    assert "left out" in err


def finalist(n: int, mixing: str, score: float, met: bool | None = True) -> Finalist:
    mux = MultiplexSpec(n, mixing=mixing) if n > 1 else None
    accuracy = Accuracy((score,) * 3, (score,) * n, score)
    arch = replace(nas.zoo("efficientformer_l1"), mux=mux)
    return Finalist(arch, Check(8.0, 7.9, 8.1), met, 3.0, torch.nn.Sequential(), accuracy, accuracy)


def test_the_best_on_the_scoring_images_is_chosen_but_no_control() -> None:
    finalists = [finalist(1, "full", 0.5), finalist(2, "full", 0.6), finalist(2, "none", 0.7, None), finalist(4, "full", 0.4)]
    assert best_of(finalists) is finalists[1]


def test_one_that_misses_the_target_is_not_chosen_while_another_meets_it() -> None:
    meets, misses, unknown = finalist(1, "full", 0.5), finalist(2, "full", 0.6, met=False), finalist(4, "full", 0.4, met=None)
    assert best_of([meets, misses]) is meets
    assert best_of([unknown, misses]) is unknown
    assert best_of([misses]) is misses


def test_the_time_to_fill_a_group_is_that_of_images_that_arrive_evenly() -> None:
    """Of n images in a group, the first waits for n - 1 more, the last for none."""
    waits = [k / 0.1 for k in range(4)]  # an image each 10 ms
    assert wait_ms(4, images_per_ms=0.1) == pytest.approx(sum(waits) / 4)
    assert wait_ms(1, images_per_ms=0.1) == 0


def test_accuracy_is_over_groupings_slots_and_groups_of_one_class() -> None:
    """A network that is right in slot 0 alone, and one that is right where a group is of one class."""

    class Slot(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            label = (x.mean((1, 2, 3)) > 0).long()
            right = torch.nn.functional.one_hot(label, 2).float()
            odd = torch.arange(len(x)) % 2 == 1
            return torch.where(odd[:, None], -right, right)

    pixels = torch.zeros(64, 3, 4, 4, dtype=torch.uint8)
    pixels[32:] = 255
    images = Images(pixels, torch.arange(64), (torch.arange(64) >= 32).long())
    found = grouped_accuracy(Slot(), images, 2)
    assert found.groupings == (0.5, 0.5, 0.5)
    assert found.slots == (1.0, 0.0)
    assert found.sd == 0

    class Neighbour(Slot):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            other = x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
            return torch.nn.functional.one_hot((other.mean((1, 2, 3)) > 0).long(), 2).float()

    found = grouped_accuracy(Neighbour(), images, 2)
    assert found.one_class == 1.0
    assert 0.2 < found.mean < 0.8
    assert len(set(found.groupings)) > 1


# -- A search ------------------------------------------------------------------------------------------------------------


def search(target: float, *more: str) -> None:
    arguments = ["--target-ms", f"{target:.6f}", "--space", "micro.yaml", "--config", "settings.yaml", "--out", "run", *more]
    cli.search([*arguments, "--table", "phone/phone-npu.csv", "--device", "phone-npu"])


def test_how_many_images_share_a_pass_is_searched(space: SearchSpace, capsys: pytest.CaptureFixture[str]) -> None:
    table = table_of(space, 4)
    table.save("phone")
    target = 0.8 * table.predict_ms(space.largest)
    search(target)
    out = capsys.readouterr().out
    rows = list(csv.DictReader(Path("run/throughput.csv").read_text().splitlines()))
    found = [(row["images_in_group"], row["mixing"]) for row in rows]
    assert found == [("1", "alone"), ("2", "full"), ("2", "control"), ("4", "full"), ("4", "control")]
    assert all(float(row["ms"]) <= target for row in rows if row["mixing"] != "control")
    assert all(row["ms"] == "" for row in rows if row["mixing"] == "control"), "neither measured nor rows: nothing is guessed"
    grouped = [row for row in rows if row["ms"]]
    assert [float(row["ms_per_image"]) for row in grouped] == pytest.approx([float(row["ms"]) / 4 for row in grouped], rel=1e-4)
    assert [float(row["wait_ms"]) for row in rows if row["wait_ms"]] == [0, 5, 15], "of 100 images in a second"
    result = json.loads(Path("run/result.json").read_text())
    arch = ArchConfig.load("run/searched.yaml")
    chosen = [row for row in rows if row["chosen"] == "True"]
    assert len(chosen) == 1
    assert (arch.mux.n if arch.mux else 1) == int(chosen[0]["images_in_group"])
    assert float(chosen[0]["score_accuracy"]) == max(float(r["score_accuracy"]) for r in rows if r["mixing"] != "control")
    assert result["accuracy"] == pytest.approx(float(chosen[0]["accuracy"]), rel=1e-4)
    assert result["predicted_ms"] == pytest.approx(table.predict_ms(arch))
    assert arch.without_mux() in space
    load_weights(nas.build_model(arch), "run/weights.safetensors")
    assert "control: the same reduction without concatenation" in out
    assert "not here" in out, "a phone's group is not timed from here"

    before = Path("run/result.json").read_bytes()
    search(target)
    assert Path("run/result.json").read_bytes() == before
    assert capsys.readouterr().out == out, "the same again is printed from what is kept"


def test_a_search_that_was_killed_goes_on_where_it_was(
    space: SearchSpace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table_of(space, 4).save("phone")
    target = 0.8 * table_of(space, 4).predict_ms(space.largest)
    trained: list[str] = []

    def killed(arch: ArchConfig, *rest: Any, **more: Any) -> Any:
        trained.append(arch.name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train_network(arch, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr("nas.throughput.train_network", killed)
        with pytest.raises(SystemExit) as ended:
            search(target)
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "nas-search: stopped; the same command goes on from here"
    assert not Path("run/result.json").exists()
    kept = Path("run/evaluations.csv").read_bytes()
    monkeypatch.setattr("nas.evaluation.Evaluator._evaluate", lambda *_: pytest.fail("what was evaluated is kept"))
    search(target)
    assert capsys.readouterr().err.count("has finished before") == 2
    assert Path("run/evaluations.csv").read_bytes() == kept
    assert len(Path("run/throughput.csv").read_text().splitlines()) == 6


def test_finalists_inherit_the_weights_of_their_own_slots(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot that was emptied before one that was kept does not hand its weights on."""
    data = load_images(None, 16, seed=0)
    supernet = Supernet(space)
    arch = space.arch([16, 24], [["mb4d"], ["identity", "mb3d"]])
    trajectory = Trajectory(arch, (), arch, 1.0, Evaluation(1.0))
    seen: dict[str, Any] = {}

    def train(found: Any, inherited: Any, *rest: Any) -> list[Finalist]:
        seen.update(found=found, file=inherited(arch))
        return []

    monkeypatch.setattr("nas.search_stages.train_finalists", train)
    checks = Checks(tmp_path / "m.csv", table_of(space, 4))
    settings = SupernetSettings(recalibration_images=16)
    outcomes = {None: Outcome(trajectory, (Check(),), 0, None), space.mux[0]: Outcome(trajectory, (Check(),), 0, None)}
    work: Any = SimpleNamespace(data=data, settings=settings, seed=0, folder=tmp_path, checks=lambda: [checks])
    judged: Any = SimpleNamespace(supernet=supernet, evaluator=Evaluator(supernet, data, 16))
    _finalists(work, judged, outcomes)
    assert [one.arch.group_size for one in seen["found"]] == [1, 2]
    kept = load_file(seen["file"])
    slots = [supernet.get_submodule(f"stages.1.{slot}.candidates.0.mlp.fc1").weight for slot in (0, 1)]
    assert not torch.equal(slots[0], slots[1])
    name = next(name for name in kept if name.startswith("stage2_block") and name.endswith("mlp.fc1.weight"))
    assert torch.equal(kept[name], slots[1])


def test_finalists_are_trained_in_the_parts_that_the_settings_say_where_these_are_whole_groups(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load_images(None, 16, seed=0)
    recipes: dict[int, Recipe] = {}

    def train(arch: ArchConfig, data: object, recipe: Recipe, folder: Path, seed: int, weights: object) -> None:
        recipes[arch.group_size] = recipe
        folder.mkdir(parents=True)
        save_file(nas.build_model(arch).state_dict(), folder / "model.safetensors")

    monkeypatch.setattr("nas.throughput.train_network", train)
    settings = SupernetSettings(batch_size=12, accumulate=2, compile=True, accelerator="cpu", images_per_epoch=24)
    found = [Found(space.multiplexed(space.largest, mux), Check(), None) for mux in (None, *space.mux)]
    train_finalists(
        found, lambda arch: tmp_path / "w", data, lambda arch: Check(), lambda arch: None, settings, tmp_path / "throughput", 0
    )
    assert {n: recipe.accumulate for n, recipe in recipes.items()} == {1: 2, 2: 2, 4: 1}
    assert all(recipe.compile for recipe in recipes.values())
    said = [line for line in capsys.readouterr().err.splitlines() if "whole groups" in line]
    assert len(said) == 2 and all("groups of 4" in line and "make no 2 equal parts" in line for line in said), "and its control"


def test_what_is_here_is_measured_in_whole_calls_and_by_the_group(space: SearchSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group alone is a call of its images, beside the references of the table's batch."""
    table = replace(table_of(space, 4), device=f"{cpu_id()}-b4")
    table.save("here")
    asked: list[tuple[int | None, int]] = []

    def measure(profiler: object, arch: ArchConfig, reference: object, batch: int | None = None) -> Measurement:
        asked.append((batch, arch.group_size))
        ms = table.predict_ms(arch) if arch.mux is None or arch.mux.mixing == "full" else 0.01
        ms *= 1 if batch is None else batch / 4
        return Measurement(ms, 0.99 * ms, 1.0 * ms, ms, ms, ms, ms, 20)

    monkeypatch.setattr("nas.measure.measure_alone", measure)
    target = 0.8 * table.predict_ms(space.largest)
    arguments = ["--target-ms", f"{target:.6f}", "--space", "micro.yaml", "--config", "settings.yaml", "--out", "run"]
    cli.search([*arguments, "--table", f"here/{table.device}.csv", "--device", table.device])
    rows = list(csv.DictReader(Path("run/throughput.csv").read_text().splitlines()))
    assert all(row["measured"] == "True" for row in rows)
    assert [row["group_ms"] != "" for row in rows] == [row["mixing"] != "control" for row in rows]
    for row in rows:
        if row["group_ms"]:
            assert float(row["group_ms"]) == pytest.approx(float(row["ms"]) * int(row["images_in_group"]) / 4, rel=1e-3)
            assert float(row["response_ms"]) == pytest.approx(float(row["group_ms"]) + float(row["wait_ms"]), rel=1e-3)
    assert {pair for pair in asked if pair[0] is not None} == {(1, 1), (2, 2), (4, 4)}


def test_a_group_is_timed_beside_the_references_of_the_tables_batch() -> None:
    @dataclass(frozen=True)
    class Device:
        batch: int = 4
        opened: ClassVar[list[int]] = []
        watched: ClassVar[list[int]] = []

        def open(self, model: object) -> tuple[object, int]:
            self.opened.append(self.batch)
            return (lambda: None), 0

        def stopwatch(self) -> Any:
            self.watched.append(self.batch)
            return self

        def pause(self) -> None: ...

        def visit(self, run: object) -> Visit:
            return Visit(1.0, References(0.25, 0.65))

        def exclusive(self) -> Any:
            return nullcontext()

    device: Any = Device()
    measure_alone(device, nas.zoo("efficientformer_l1"), None, batch=2)
    assert set(Device.opened) == {2}
    assert Device.watched == [4]


def test_a_target_without_token_blocks_has_nothing_to_share(space: SearchSpace, capsys: pytest.CaptureFixture[str]) -> None:
    table_of(space, 4).save("phone")
    search(1.001 * table_of(space, 4).predict_ms(space.smallest))
    assert capsys.readouterr().err.count("no token block is left at this target") == 2
    assert json.loads(Path("run/result.json").read_text())["mux"] is None


def test_for_latency_each_image_has_a_pass_of_its_own(space: SearchSpace, capsys: pytest.CaptureFixture[str]) -> None:
    table_of(space, 4).save("phone")
    Path("settings.yaml").write_text(SETTINGS.replace("throughput", "latency"))
    search(0.6 * table_of(space, 4).predict_ms(space.largest))
    assert "the groups (mux) of micro-mux are left out" in capsys.readouterr().err
    assert ArchConfig.load("run/searched.yaml").mux is None
    assert not Path("run/throughput.csv").exists()


def test_calls_without_whole_groups_are_refused_before_anything_is_measured(
    space: SearchSpace, capsys: pytest.CaptureFixture[str]
) -> None:
    for batch, left_out in ((1, "2, 4"), (2, "4"), (6, "4")):
        kept = for_batch(space, batch)
        assert [mux.n for mux in kept.mux] == [n for n in (2, 4) if batch % n == 0]
        assert f"groups of {left_out} (mux of micro-mux) are left out" in capsys.readouterr().err
    assert for_batch(space, 8) is not None and not capsys.readouterr().err
    table_of(for_batch(space, 1), 1).save("phone")
    with pytest.raises(SystemExit) as ended:
        search(1.0)
    assert ended.value.code == 2
    assert "give --device phone-npu-b4, or a larger multiple of 4" in capsys.readouterr().err
    assert not Path("run").exists()


def test_throughput_needs_a_space_with_groups(space: SearchSpace, capsys: pytest.CaptureFixture[str]) -> None:
    table_of(space, 4).save("phone")
    Path("micro.yaml").write_text(SPACE.replace("mux: [1, 2, 4]\n", ""))
    with pytest.raises(SystemExit) as ended:
        search(1.0)
    assert ended.value.code == 2
    assert "micro-mux has none: give a --space such as concatplexer" in capsys.readouterr().err


def test_an_unknown_objective_is_refused(space: SearchSpace, capsys: pytest.CaptureFixture[str]) -> None:
    table_of(space, 4).save("phone")
    Path("settings.yaml").write_text("objective: speed")
    with pytest.raises(SystemExit) as ended:
        search(1.0)
    assert ended.value.code == 2
    assert "unknown objective 'speed'" in capsys.readouterr().err
