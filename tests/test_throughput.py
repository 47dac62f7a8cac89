"""Objective throughput: how many images share a pass is chosen beside the network, with its control, by what groups take."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refusals import refusal
from tables import plain_calibration

import nas
from nas import cli
from nas.data import Images
from nas.table import Calibration, LatencyTable, Row, measured_layers
from nas.throughput import Accuracy, Contender, Grouped, best_of, grouped_accuracy, most_tokens, usable_ways
from nas.training import load_weights
from supernet.arch import ArchConfig, MultiplexSpec
from supernet.space import SearchSpace
from supernet.specs import MB3D, GroupedMB3D, Head, Layer

SPACE = """
name: micro-mux
image_size: 16
num_classes: 10
mux: [1, 2, 4]
stages:
- {stride: 2, widths: [8, 16], depth: 1, candidates: [mb4d, identity]}
- {stride: 2, widths: [16, 24], depth: 2, candidates: [{kind: mb3d, num_heads: 2}, identity]}
"""
SETTINGS = """
objective: throughput
weight_epochs: 1
mixture_epochs: 1
contest_epochs: 1
images_per_epoch: 128
recalibration_images: 64
score_images: 64
arrivals_per_second: 100
"""


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nas.table.user_folder", lambda: tmp_path / "tables")
    monkeypatch.setattr("nas.search.user_folder", lambda: tmp_path / "tables")


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


# -- What may be chosen --------------------------------------------------------------------------------------------------


def test_a_table_says_what_groups_take(space: SearchSpace) -> None:
    table, arch = table_of(space, 4), most_tokens(space)
    found = [Grouped(table, space, mux).predict_ms(arch) for mux in (None, *space.mux)]
    assert found == sorted(found, reverse=True)
    assert found[0] == table.predict_ms(arch)
    empty = space.smallest
    assert {Grouped(table, space, mux).predict_ms(empty) for mux in (None, *space.mux)} == {table.predict_ms(empty)}


def test_ways_that_save_less_than_the_table_is_off_by_are_left_out(
    space: SearchSpace, capsys: pytest.CaptureFixture[str]
) -> None:
    table, arch = table_of(space, 4), most_tokens(space)
    alone_ms = table.predict_ms(arch)
    saved = [100 * (1 - table.predict_ms(replace(arch, mux=mux)) / alone_ms) for mux in space.mux]
    assert 0 < saved[0] < saved[1]
    assert usable_ways(space, table) == space.mux
    between = replace(plain_calibration(space), mean_error_percent=sum(saved) / 2)
    assert usable_ways(space, table_of(space, 4, between)) == space.mux[1:]
    err = capsys.readouterr().err
    assert f"groups of 2: at most {saved[0]:.1f} % less time a call" in err
    assert "left out" in err


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_a_table_whose_calls_are_no_whole_groups_is_refused(space: SearchSpace, batch: int) -> None:
    said = refusal(lambda: usable_ways(space, table_of(space, batch)))
    assert "need a table of a batch that is a multiple of" in said
    assert "nas-build-lut --device cpu --batch" in said


def contender(n: int, mixing: str, score: float) -> Contender:
    mux = MultiplexSpec(n, mixing=mixing) if n > 1 else None
    accuracy = Accuracy((score,) * 3, (score,) * n, score)
    arch = replace(nas.zoo("efficientformer_l1"), mux=mux)
    return Contender(arch, 8.0, True, 3.0, torch.nn.Sequential(), accuracy, accuracy)


def test_the_best_on_the_scoring_images_is_chosen_but_no_control() -> None:
    contest = [contender(1, "full", 0.5), contender(2, "full", 0.6), contender(2, "none", 0.7), contender(4, "full", 0.4)]
    assert best_of(contest) is contest[1]


def test_the_time_to_fill_a_group_is_that_of_images_that_arrive_evenly() -> None:
    """Of n images in a group, the first waits for n - 1 more, the last for none."""
    waits = [k / 0.1 for k in range(4)]  # an image each 10 ms
    assert contender(4, "full", 0.5).fill_ms(images_per_ms=0.1) == pytest.approx(sum(waits) / 4)
    assert contender(4, "none", 0.5).fill_ms(0.1) == contender(1, "full", 0.5).fill_ms(0.1) == 0


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
    target = 0.6 * table.predict_ms(most_tokens(space))
    search(target)
    out = capsys.readouterr().out
    rows = list(csv.DictReader(Path("run/throughput.csv").read_text().splitlines()))
    found = [(row["images_in_group"], row["mixing"]) for row in rows]
    assert found == [("1", "alone"), ("2", "full"), ("2", "control"), ("4", "full"), ("4", "control")]
    assert all(float(row["ms"]) <= target for row in rows if row["mixing"] != "control")
    assert all(row["ms"] == "" for row in rows if row["mixing"] == "control"), "neither measured nor rows: nothing is guessed"
    grouped = [row for row in rows if row["ms"]]
    assert [float(row["ms_per_image"]) for row in grouped] == pytest.approx([float(row["ms"]) / 4 for row in grouped], rel=1e-4)
    assert [float(row["fill_ms"]) for row in rows] == [0, 5, 0, 15, 0], "of 100 images in a second"
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


def test_a_target_without_token_blocks_has_nothing_to_share(space: SearchSpace, capsys: pytest.CaptureFixture[str]) -> None:
    table_of(space, 4).save("phone")
    search(1.001 * table_of(space, 4).predict_ms(space.smallest))
    assert capsys.readouterr().err.count("no token block is left at this target") == 2
    assert json.loads(Path("run/result.json").read_text())["mux"] is None


def test_for_latency_each_image_has_a_pass_of_its_own(space: SearchSpace, capsys: pytest.CaptureFixture[str]) -> None:
    alone = replace(space, mux=())
    table_of(alone, 1).save("phone")
    Path("settings.yaml").write_text(SETTINGS.replace("throughput", "latency"))
    search(0.6 * table_of(alone, 1).predict_ms(most_tokens(alone)))
    assert "the groups (mux) of micro-mux are left out" in capsys.readouterr().err
    assert ArchConfig.load("run/searched.yaml").mux is None
    assert not Path("run/throughput.csv").exists()


def test_an_unknown_objective_is_refused(space: SearchSpace, capsys: pytest.CaptureFixture[str]) -> None:
    table_of(space, 4).save("phone")
    Path("settings.yaml").write_text("objective: speed")
    with pytest.raises(SystemExit) as ended:
        search(1.0)
    assert ended.value.code == 2
    assert "unknown objective 'speed'" in capsys.readouterr().err
