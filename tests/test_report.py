"""The page about a search: its figures are those of the folder, it loads nothing, and it does without what is not there."""

import json
import random
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_spaces import stage_space
from tables import plain_calibration

from nas.kept import Checks, described, normalised_by, write_csv
from nas.report import write_report
from nas.report.device import published_networks
from nas.report.run import read_run
from nas.report.text import digits, joined
from nas.scores import ADDITIVITY_COLUMNS, measure_drops
from nas.slimming import MobileEfficiency, slim
from nas.table import CheckedNetwork, LatencyTable, Row, measured_layers
from nas.trajectory import Evaluation, Trajectory
from supernet.arch import ArchConfig, MultiplexSpec
from supernet.errors import InputError
from supernet.space import SearchSpace
from supernet.specs import Head, Layer, knobs_of

SPACE = SearchSpace(
    "micro",
    16,
    10,
    (
        stage_space((8, 16), 2, 2, "mb4d", "identity"),
        stage_space((16, 24, 32), 2, 3, "mb4d", "mb3d", "identity"),
    ),
)
VOID = ("meta", "br", "wbr", "img", "input", "link", "hr")
LOADING = ("src", "srcset", "data", "poster", "xlink:href", "background", "action")


class Page(HTMLParser):
    """A page's elements, in order, with their text; fails where tags are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split()).replace("\N{NO-BREAK SPACE}", " ")

    def of_class(self, name: str) -> list[dict[str, str]]:
        return [attributes for _, attributes in self.elements if name in attributes.get("class", "").split()]

    def titles(self) -> list[str]:
        return [
            attributes["title"].replace("\N{NO-BREAK SPACE}", " ") for _, attributes in self.elements if "title" in attributes
        ]


@pytest.fixture(autouse=True)
def few_published_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them take a while to read."""
    monkeypatch.setattr("nas.report.device.zoo_names", lambda: ["efficientvit_m0"])


def cost(layer: Layer) -> float:
    classes = layer.spec.num_classes if isinstance(layer.spec, Head) else 0
    return layer.spec.dim * layer.resolution / 1e4 + classes / 1e5


def table_of(space: SearchSpace) -> LatencyTable:
    rows = {layer: Row(cost(layer), 0.9 * cost(layer), 1.1 * cost(layer), "slope") for layer in measured_layers(space.layers())}
    calibration = replace(plain_calibration(space), offset_ms=0.011, scale=1.05, scale_between=-0.2)
    table = LatencyTable("toy-cpu", rows, (calibration,), "measured", {"runtime": "toyruntime", "threads": 3})
    checked = [
        CheckedNetwork(a.to_yaml(), 1.02 * table.predict_ms(a), 0.001, table.predict_ms(a), n == 0) for n, a in members()
    ]
    return replace(table, calibrations=(replace(calibration, networks=tuple(checked)),))


def members() -> list[tuple[int, ArchConfig]]:
    rng = random.Random(0)
    return list(enumerate(SPACE.sample(rng) for _ in range(4)))


def judged(arch: ArchConfig) -> Evaluation:
    """A loss in which every slot has a worth of its own."""
    loss = 3.0
    for number, stage in enumerate(SPACE.fit(arch.without_mux()).stages):
        loss -= stage.width / 20
        loss -= sum({"mb4d": 0.1, "mb3d": 0.17}.get(b.kind, 0.0) / (4 - number - slot) for slot, b in enumerate(stage.blocks))
    return Evaluation(loss, 1 / loss)


def finished(folder: Path, target: float = 0.6, result: Mapping[str, Any] | None = None, **options: Any) -> Trajectory:
    """Leave in `folder` what a search for this share of the largest network's milliseconds leaves; return its way."""
    table = table_of(SPACE)
    path = table.save(folder / "tables")
    known: dict[str, Evaluation] = {}

    def evaluate(arch: ArchConfig) -> Evaluation:
        return known.setdefault(described(arch), judged(arch))

    drops = measure_drops(SPACE, SPACE.largest, evaluate)
    drops.save(folder / "drops.csv")
    importance = drops.importance()
    lines = [
        {"stage": i + 1, "slot": j + 1, "kind": kind, "log_odds": value}
        for (i, j), odds in zip(SPACE.slots, importance, strict=True)
        for kind, value in odds.items()
    ]
    write_csv(folder / "importance.csv", lines, ("stage", "slot", "kind", "log_odds"))
    target_ms = target * table.predict_ms(SPACE.largest)
    found = slim(SPACE, importance, evaluate, table, target_ms, **options)
    write_csv(folder / "trajectory.csv", found.records(), found.columns)
    changed = [(n, a, drops.sum_for(a), judged(a).loss) for n, a in members()]
    rows = ({"network": described(a), "changes": n, "predicted_loss": p, "loss": loss} for n, a, p, loss in changed)
    write_csv(folder / "additivity.csv", rows, ADDITIVITY_COLUMNS)
    networks = ({"network": name, **evaluation._asdict()} for name, evaluation in known.items())
    write_csv(folder / "evaluations.csv", networks, ("network", "loss", "accuracy"))
    deployed = replace(found.arch.without_identity(), name="micro-found")
    deployed.save(folder / "searched.yaml")
    ms = {"ms": 0.98 * found.ms, "low_ms": 0.97 * found.ms, "high_ms": 0.99 * found.ms, "raw_ms": found.ms}
    measured = {"network": described(deployed), **ms, "measured_at": "2026-03-04T05:06:07.008+00:00"}
    measured |= normalised_by(table)
    stale = {**measured, "network": described(SPACE.largest), "cached_reference_ms": "0.123"}  # by a table that is gone
    write_csv(folder / "measurements.csv", [measured, stale], Checks.HEADER)
    request = {
        "command": "nas-search",
        "target_ms": target_ms,
        "device": "toy-cpu",
        "table": str(path),
        "data": "/pictures",
        "space": SPACE.to_yaml(),
        "strategy": "greedy",
        "settings": {"score": "loss"},
        "seed": 5,
    }
    values = {
        "target_ms": target_ms,
        "device": "toy-cpu",
        "table": str(path),
        "provenance": "measured",
        "predicted_ms": table.predict_ms(deployed),
        **{f"measured_{name}": value for name, value in ms.items()},
        "loss": 1.5,
        "accuracy": 0.625,
        "params": 123456,
        "macs": 7890000,
        "seed": 5,
        "strategy": "greedy",
        "space": "micro",
        "met": True,
        "network": described(found.arch),
        **(result or {}),
    }
    (folder / "request.json").write_text(json.dumps(request))
    (folder / "result.json").write_text(json.dumps(values))
    return found


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_milliseconds_of_the_layers_are_the_predicted_ones(tmp_path: Path) -> None:
    found = finished(tmp_path)
    page = page_of(tmp_path)
    shown = [float(attributes["data-ms"]) for _, attributes in page.elements if "data-ms" in attributes]
    assert len(shown) == len(found.arch.layers()) + 1  # and the offset
    assert sum(shown) == pytest.approx(found.ms)
    assert shown[-1] == 0.011


def test_a_page_loads_nothing_and_is_the_same_for_the_same_files(tmp_path: Path) -> None:
    finished(tmp_path)
    path = write_report(tmp_path)
    text = path.read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not set(LOADING) & attributes.keys()
        assert not attributes.get("href", "#").startswith(("http", "//", "file"))
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert {a["href"] for _, a in page.elements if "href" in a and a["href"][0] != "#"} <= {p.name for p in tmp_path.iterdir()}
    assert write_report(tmp_path).read_text() == text


def test_what_was_asked_and_found_is_at_the_top(tmp_path: Path) -> None:
    finished(
        tmp_path, result={"predicted_ms": 0.4321, "measured_ms": 0.44, "measured_low_ms": 0.435, "measured_high_ms": 0.4456}
    )
    change(tmp_path, "result.json", target_ms=0.5, demonstration=False)
    text = page_of(tmp_path).text
    for figure in ("0.5 ms", "0.432", "0.440", "0.435 to 0.446", "62.5", "123", "7.89", "The target is met", "1.8 % too low"):
        assert figure in text, figure
    assert "demonstration" not in text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"met": False}, "The target is missed"),
        ({"measured_ms": None, "measured_low_ms": None, "measured_high_ms": None, "met": None}, "Not measured"),
        ({"demonstration": True}, "not one to ship"),
        ({"candidate": "candidate.yaml"}, "A slower network might fit too"),
        ({"largest_of_space": True}, "Nothing had to be taken away: a larger space"),
        ({"max_params": 200000}, "at most 200 k"),
        ({"init": {"network": "mine", "weights": "w", "predicted_ms": 1.25, "accuracy": 0.9}}, "mine: top-1 90.0 %"),
        ({"versions": {"metapath-nas": "9.8.7"}}, "metapath-nas 9.8.7"),
    ],
)
def test_a_page_says_how_a_run_ended(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    finished(tmp_path, result=values)
    assert said in page_of(tmp_path).text


def device(name: str, target_ms: float, high_ms: float | None, batch: int = 1) -> dict[str, Any]:
    """What `result.json` says of a device; measured 1 % under the upper end of its interval."""
    ms, low_ms = (None, None) if high_ms is None else (0.99 * high_ms, 0.98 * high_ms)
    measured = {"measured_ms": ms, "measured_low_ms": low_ms, "measured_high_ms": high_ms}
    asked = {"device": name, "target_ms": target_ms, "table": f"{name}.csv", "batch": batch}
    return {**asked, "predicted_ms": 0.9 * target_ms, **measured}


@pytest.mark.parametrize(
    ("first", "second", "met", "verdict", "said", "unsaid"),
    [
        (7.9, None, None, "open", ["Not measured on b. The table predicts 1.08 ms on b", "7.82 ms measured on a"], ["is met"]),
        (None, 1.5, False, "bad", ["target is missed: 1.48 ms measured on b", "1.2 ms allowed", "a was not"], ["Not measured"]),
        (7.9, 1.5, False, "bad", ["The target is missed: 1.48 ms measured on b"], ["7.82 ms measured", "8 ms allowed"]),
        (8.5, 1.5, False, "bad", ["The targets are missed: 8.41 ms measured on a", "; 1.48 ms measured on b"], []),
        (7.9, 1.1, True, "good", ["All targets are met: 7.82 ms measured on a", "1.09 ms measured on b"], []),
        (None, None, None, "open", ["Not measured on a and b. The table predicts 7.20 ms on a and 1.08 ms on b"], []),
    ],
)
def test_the_verdict_is_of_all_devices_and_names_those_that_decide(
    tmp_path: Path,
    first: float | None,
    second: float | None,
    met: bool | None,
    verdict: str,
    said: list[str],
    unsaid: list[str],
) -> None:
    targets = [device("a", 8.0, first), device("b", 1.2, second)]
    finished(tmp_path, result={**targets[0], "targets": targets, "met": met})
    page = page_of(tmp_path)
    assert len(page.of_class("verdict")) == len(page.of_class(verdict)) == 1
    top = page.text.partition("predicted ")[0]
    for sentence in said:
        assert sentence in top
    for sentence in unsaid:
        assert sentence not in top


def test_a_call_is_told_of_each_device(tmp_path: Path) -> None:
    targets = [device("a", 8.0, 7.9), device("b", 1.2, 1.1)]
    finished(tmp_path, result={**targets[0], "targets": targets})
    assert "at most 8 ms on a and 1.2 ms on b for an image." in page_of(tmp_path).text
    targets[1]["batch"] = 64
    change(tmp_path, "result.json", targets=targets)
    assert "at most 8 ms on a for an image and 1.2 ms on b for a call of 64 images." in page_of(tmp_path).text


def test_what_the_network_kept_is_marked_in_its_slots(tmp_path: Path) -> None:
    """Empty slots too, which searched.yaml does not have."""
    found = finished(tmp_path)
    kinds = [b.kind for stage in found.arch.stages for b in stage.blocks]
    assert "identity" in kinds[:-1]
    titles = [title for title in page_of(tmp_path).titles() if title.endswith("(kept)")]
    wanted = [f"stage {i + 1}, slot {j + 1}, {kind}" for (i, j), kind in zip(SPACE.slots, kinds, strict=True)]
    for unit in ("log-odds", "rise in loss"):
        marked = [t for t in titles if unit in t or (unit == "rise in loss" and ": base" in t)]
        assert {t.partition(":")[0] for t in marked if t.startswith("stage")} == set(wanted)
    assert [t.partition(":")[0] for t in titles if t.startswith("width")] == [f"width {w}" for w in found.arch.widths]


def test_the_drops_are_shown_to_their_cells(tmp_path: Path) -> None:
    finished(tmp_path)
    titles = page_of(tmp_path).titles()
    assert any(t.startswith("stage 1, slot 2, identity: rise in loss 0.0333") for t in titles)
    assert any(t.startswith("width 8: rise in loss 0.4") for t in titles)
    assert sum("mb4d: base" in t for t in titles) == len(SPACE.slots)


def test_every_step_is_in_the_chart_and_in_the_table(tmp_path: Path) -> None:
    found = finished(tmp_path, target=0.4)
    text = page_of(tmp_path).text

    def read(ms: float) -> str:
        return f"{float(f'{ms:.6g}'):.4g}"  # the file has six digits

    for number, step in enumerate(found.steps, 1):
        assert f"step {number}: {step.taken.action}: {read(step.ms)} to {read(step.taken.ms)} ms" in text
        assert f"{number} {step.taken.action} {read(step.taken.ms)}" in text
    for option in found.steps[0].options[1:]:
        assert f"not taken: {option.action}" in text


def test_measured_networks_are_drawn_with_how_far_they_are_off(tmp_path: Path) -> None:
    found = finished(tmp_path)
    text = page_of(tmp_path).text
    assert f"the network found: predicted {found.ms:#.3g} ms, measured {0.98 * found.ms:#.3g} ms (+2.0 %)" in text
    assert "measured in this run" not in text, "the other line is of a table that is gone"
    assert "network 1 of the calibration (fitted)" in text and "network 4 of the calibration (not fitted)" in text
    assert text.count("(-2.0 %)") == 4


def test_other_measured_networks_of_a_run_are_known_by_their_names(tmp_path: Path) -> None:
    finished(tmp_path)
    run = read_run(tmp_path)
    for _, arch in members():
        again = run.network(described(arch))
        assert again is not None and again.layers() == arch.layers()
    grouped = replace(
        SPACE.largest, stages=(SPACE.largest.stages[0], SPACE.arch((16, 32), [["mb4d"] * 2, ["mb3d"] * 3]).stages[1])
    )
    grouped = replace(grouped, mux=MultiplexSpec(2, mixing="block"))
    known = run.network(described(grouped))
    assert known is not None and known.mux == grouped.mux and known.layers() == grouped.layers()
    assert run.network("8: nonsense | 16: mb4d") is None and run.network("no network") is None


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    finished(tmp_path)
    name = '<script>alert("x")</script> & co'
    ArchConfig.load(tmp_path / "searched.yaml")
    document = yaml.safe_load((tmp_path / "searched.yaml").read_text())
    (tmp_path / "searched.yaml").write_text(yaml.safe_dump({**document, "name": name}))
    change(
        tmp_path,
        "result.json",
        device=name,
        space=name,
        init={"network": name, "weights": name, "predicted_ms": 1, "accuracy": 0},
    )
    change(tmp_path, "request.json", data=name, init="x")
    page = page_of(tmp_path)
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.texts.count(name) >= 2


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("drops.csv", "no drops.csv"),
        ("importance.csv", "no importance.csv"),
        ("trajectory.csv", "no steps"),
        ("tables/toy-cpu.csv", "Without milliseconds"),
    ],
)
def test_what_is_missing_is_left_out_with_a_sentence(tmp_path: Path, missing: str, said: str) -> None:
    finished(tmp_path)
    assert said not in page_of(tmp_path).text
    (tmp_path / missing).unlink()
    assert said in page_of(tmp_path).text


def test_a_network_that_is_not_of_the_space_marks_no_slots(tmp_path: Path) -> None:
    finished(tmp_path, result={"network": "16: other | 32: mb4d"})
    assert "which slots the network found kept is not known" in page_of(tmp_path).text.lower()


@pytest.mark.parametrize(
    ("missing", "left_out"),
    [
        ("additivity.csv", "Loss: whole networks against sums of drops"),
        ("measurements.csv", "last on 2026-03-04 05:06 UTC"),
    ],
)
def test_what_needs_no_sentence_is_left_out_without_one(tmp_path: Path, missing: str, left_out: str) -> None:
    found = finished(tmp_path)
    assert left_out in page_of(tmp_path).text
    (tmp_path / missing).unlink()
    text = page_of(tmp_path).text
    assert left_out not in text and missing not in text
    assert f"the network found: predicted {found.ms:#.3g} ms, measured {0.98 * found.ms:#.3g} ms" in text  # by result.json


def test_a_space_that_cannot_be_read_is_done_without(tmp_path: Path) -> None:
    finished(tmp_path)
    change(tmp_path, "request.json", space="{}")
    assert "The space of this search cannot be read" in page_of(tmp_path).text


def test_a_table_that_has_changed_is_told(tmp_path: Path) -> None:
    finished(tmp_path, result={"predicted_ms": 99.0})
    assert "it predicted 99.0 ms then" in page_of(tmp_path).text


def test_a_run_without_steps(tmp_path: Path) -> None:
    found = finished(tmp_path, target=2.0, result={"largest_of_space": True})
    assert not found.steps
    assert "Nothing was taken away" in page_of(tmp_path).text


def test_a_run_for_mobile_efficiency_shows_its_score(tmp_path: Path) -> None:
    mes = MobileEfficiency(lambda arch: sum(arch.widths), size_unit=10)
    found = finished(tmp_path, mes=mes, result={"mes": 12.5, "objective": "mes"})
    text = page_of(tmp_path).text
    assert "12.5" in text and "mes after" in text
    assert f"{found.steps[0].taken.figures['mes']:.4g}" in text


def test_ways_of_sharing_a_pass_are_compared(tmp_path: Path) -> None:
    row = {
        "images_in_group": 1,
        "mixing": "alone",
        "chosen": True,
        "met": None,
        "ms": None,
        "measured": False,
        "ms_per_image": None,
        "group_ms": None,
        "wait_ms": 0.0,
        "response_ms": None,
        "accuracy": 0.5,
        "worst_slot_accuracy": 0.4,
        "one_class_accuracy": 0.45,
        "params": 1000,
    }
    other = {**row, "images_in_group": 2, "mixing": "full", "chosen": False, "ms_per_image": 0.125}
    mux = MultiplexSpec(2)
    finished(tmp_path, result={"throughput": [row, other], "objective": "throughput", "batch": 2, "mux": knobs_of(mux)})
    page = page_of(tmp_path)
    assert "each image by itself – –" in page.text and "groups of 2: full 0.125 –" in page.text
    assert len(page.of_class("chosen")) == 1


def test_the_frontier_is_drawn_with_the_target_and_the_published_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = finished(tmp_path)
    of_space = replace(SPACE.arch((8, 24), [["mb4d"] * 2, ["mb4d", "mb4d", "mb3d"]]), name="published")
    narrower = replace(SPACE.arch((8, 16), [["mb4d"] * 2, ["mb3d"] * 3]), name="other", image_size=32)
    known = {"published": of_space, "other": narrower}
    monkeypatch.setattr("nas.report.device.zoo_names", lambda: list(known))
    monkeypatch.setattr("nas.report.device.zoo", lambda name: known[name].with_classes(1000))
    assert "The frontier of this run was not computed" in page_of(tmp_path).text
    points = [(0.04, 2.5), (0.09, 2.25), (0.03, 2.75)]
    assert 0.04 < 0.6 * table_of(SPACE).predict_ms(SPACE.largest) < 0.09
    write_csv(tmp_path / "frontier.csv", [{"ms": ms, "loss": loss} for ms, loss in points], ("ms", "loss"))
    page = page_of(tmp_path)
    ms, loss = table_of(SPACE).predict_ms(of_space), judged(of_space).loss
    assert f"published: {ms:#.3g} ms predicted, loss {loss:.4g} by the sum of drops" in page.text
    assert "no rows of theirs: other" in page.text
    assert f"found: {found.ms:#.3g} ms, loss {found.evaluation.loss:.4g} by the sum of drops" in page.text
    assert f"At the {found.ms:#.3g} ms that the table says of the network found, it is 2.5" in page.text
    assert "exact for the scores" in page.text and "corrected by measurement" not in page.text
    (line,) = page.of_class("frontier")[:1]
    assert len(line["points"].split()) == 5  # steps from the quickest on: right, then down
    rows = [
        {"device": d, "ms": ms, "loss": loss} for d in ("another", "toy-cpu") for ms, loss in points[: 3 - (d == "another")]
    ]
    write_csv(tmp_path / "frontier.csv", rows, ("device", "ms", "loss"))
    assert page_of(tmp_path).of_class("frontier")[0]["points"] == line["points"]


def test_the_network_found_is_compared_at_its_own_milliseconds_when_the_budget_was_corrected(tmp_path: Path) -> None:
    """A device that is faster than its table: the network found is above the target by the table."""
    found = finished(tmp_path)
    points = [{"ms": factor * found.ms, "loss": loss} for factor, loss in ((0.8, 2.75), (0.95, 2.5), (1.0, 2.25), (1.1, 2.0))]
    write_csv(tmp_path / "frontier.csv", points, ("ms", "loss"))
    target = 0.97 * found.ms
    change(tmp_path, "result.json", target_ms=target, measured_ms=0.96 * found.ms, measured_networks=2)
    text = page_of(tmp_path).text
    assert f"At the {found.ms:#.3g} ms that the table says of the network found, it is 2.25;" in text
    assert f"The target is {target:g} ms, but the budget was corrected by measurement" in text
    # Slower than its table: it is below the target by more than the loop leaves.
    change(tmp_path, "result.json", target_ms=1.2 * found.ms, measured_ms=1.19 * found.ms)
    text = page_of(tmp_path).text
    assert "it is 2.25;" in text and "corrected by measurement" in text
    change(tmp_path, "result.json", measured_networks=1)
    assert "corrected by measurement" not in page_of(tmp_path).text


def test_a_frontier_that_is_not_proven_says_so(tmp_path: Path) -> None:
    finished(tmp_path)
    points = [{"ms": 0.03, "loss": 2.75, "gap": 0.0}, {"ms": 0.04, "loss": 2.5, "gap": 0.0625}]
    write_csv(tmp_path / "frontier.csv", points, ("ms", "loss", "gap"))
    text = page_of(tmp_path).text
    assert "up to 0.062 nats less may be possible" in text and "exact for the scores" not in text
    assert text.count("proven to 0.062 nats") == 1


def test_published_networks_are_predicted_as_the_frontier_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the calibration of the run's space, though another one of the table is nearer."""
    finished(tmp_path)
    of_space = replace(SPACE.arch((8, 24), [["mb4d"] * 2, ["mb4d", "mb4d", "mb3d"]]), name="published")
    monkeypatch.setattr("nas.report.device.zoo_names", lambda: ["published"])
    monkeypatch.setattr("nas.report.device.zoo", lambda name: of_space.with_classes(1000))
    table = table_of(SPACE)
    (own,) = table.calibrations
    at = table.sum_ms(of_space)
    near = replace(own, space="near", space_sha256="0" * 64, scale=2.0, networks=(), sum_low_ms=at / 2, sum_high_ms=at)
    both = replace(table, calibrations=(replace(own, sum_low_ms=2 * at, sum_high_ms=3 * at), near))
    both.save(tmp_path / "tables")
    ms = table.predict_ms(of_space)
    assert both.predict_ms(of_space) > 1.5 * ms
    (net,), _ = published_networks(read_run(tmp_path))
    assert net.ms == pytest.approx(ms)


def test_a_page_of_thousands_of_networks_stays_small(tmp_path: Path) -> None:
    found = finished(tmp_path, result={"strategy": "optuna"})
    step = found.steps[0]
    options = [replace(step.taken, action=f"trial {n}", ms=step.taken.ms * (1 - n / 20000)) for n in range(5000)]
    one = replace(found, steps=(replace(step, options=tuple(options)),))
    write_csv(tmp_path / "trajectory.csv", one.records(), one.columns)
    points = ({"ms": 0.02 + n / 1e5, "loss": 3 - n / 5000} for n in range(5000))
    write_csv(tmp_path / "frontier.csv", points, ("ms", "loss"))
    page = page_of(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 300_000
    assert 100 < len(page.of_class("lost")) < 1000


@pytest.mark.parametrize(
    ("strategy", "actions", "said", "unsaid"),
    [
        ("optuna", ["trial 7", "trial 3"], ["The best 2 of the networks that an Optuna study of 40 trials"], ["by the drops"]),
        ("exact", ["number 2 by the drops", "number 1 by the drops"], ["The best 2 by the drops"], ["did not reach", "nats."]),
        ("exact", ["number 1 by the drops, proven to 0.5 nats"], ["better by the drops, by at most 0.5 nats"], []),
        ("greedy", ["number 2 by the drops", "number 1 by the drops"], ["did not reach the target. The best 2"], []),
    ],
)
def test_how_a_network_was_chosen_is_in_the_words_of_its_strategy(
    tmp_path: Path, strategy: str, actions: list[str], said: list[str], unsaid: list[str]
) -> None:
    found = finished(tmp_path, result={"strategy": strategy, "gap": 0.5 if "proven" in actions[0] else 0.0})
    change(tmp_path, "request.json", settings={"score": "loss", "optuna_trials": 40})
    step = found.steps[0]
    one = replace(step, options=tuple(replace(step.taken, action=action) for action in actions))
    write_csv(tmp_path / "trajectory.csv", replace(found, steps=(one,)).records(), found.columns)
    text = page_of(tmp_path).text
    for sentence in said:
        assert sentence in text
    for sentence in ["1 step", "costs least", "actions that the step chose from", *unsaid]:
        assert sentence not in text
    # The loop may go on from there, when a measurement has tightened the budget.
    write_csv(tmp_path / "trajectory.csv", replace(found, steps=(one, *found.steps)).records(), found.columns)
    text = page_of(tmp_path).text
    assert said[0] in text and f"Then {len(found.steps)} step" in text


def test_the_command_asks_the_same_again(tmp_path: Path) -> None:
    finished(tmp_path)
    change(tmp_path, "request.json", data="/my pictures")
    text = write_report(tmp_path).read_text()
    command = text[text.index("<pre>nas-search") + 5 : text.index("</pre>")]
    words = shlex.split(command.replace("&#x27;", "'"))
    given = dict(zip(words[1::2], words[2::2], strict=True))
    assert given["--data"] == "/my pictures" and given["--seed"] == "5" and given["--device"] == "toy-cpu"
    assert given["--space"] == "space.yaml"  # micro does not ship
    assert float(given["--target-ms"]) == json.loads((tmp_path / "result.json").read_text())["target_ms"]
    assert "cache_gb" in text and "optuna_storage" in text


def test_a_run_that_began_with_a_network_shows_it(tmp_path: Path) -> None:
    init = {"network": "mine", "weights": "mine.safetensors", "predicted_ms": 1.25, "accuracy": 0.9}
    finished(tmp_path, result={"init": init})
    change(tmp_path, "request.json", init="name: <mine>\n")
    text = page_of(tmp_path).text
    assert "--init init.yaml --weights mine.safetensors --space space.yaml" in text
    assert "init.yaml name: <mine>" in text and "space.yaml name: micro" in text


def test_the_files_of_a_run_are_named_where_they_are(tmp_path: Path) -> None:
    targets = [device("a", 8.0, 7.9), device("b", 1.2, 1.1)]
    finished(tmp_path, result={**targets[0], "targets": targets})
    names = ["space.yaml", "study.journal", "measurements-a.csv", "measurements-b.csv"]
    assert not set(names) & {a.get("href") for _, a in page_of(tmp_path).elements}
    for name in names:
        (tmp_path / name).touch()
    assert set(names) <= {a.get("href") for _, a in page_of(tmp_path).elements}


def test_a_folder_without_a_finished_search_is_refused(tmp_path: Path) -> None:
    finished(tmp_path)
    (tmp_path / "result.json").unlink()
    with pytest.raises(InputError, match="holds no finished search"):
        write_report(tmp_path)


def test_reports_do_without_torch() -> None:
    code = "import sys, nas.report; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("number", "shown"),
    [(999.0, "999"), (999_400.0, "999 k"), (999_700.0, "1 M"), (999_600_000.0, "1 G"), (10_190e6, "10.2 G")],
)
def test_a_large_number_has_the_unit_of_what_it_is_rounded_to(number: float, shown: str) -> None:
    assert joined(number) == shown


def test_a_number_has_three_digits_and_no_dot_at_its_end() -> None:
    assert [digits(value) for value in (0.5, 9.996, 99.94, 99.97, 100.4)] == ["0.500", "10.0", "99.9", "100", "100"]
