"""The rivals of a search are as large as their target allows, and the study of search quality counts right."""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import search_quality
import studies
import torch
from mobilenet_v2 import SMALL_IMAGE_STRIDES, MobileNetV2, rounded
from quality_choices import keep_drops, networks_evaluated, settings_of
from quality_estimate import Pace, hours_left, trainings_at_a_target
from quality_report import (
    BEST,
    L1,
    MEDIAN,
    RANDOM,
    RANDOM_SEARCH,
    Chosen,
    Trained,
    differences,
    interval,
    report,
    scores_of,
)
from quality_supernets import ranking
from rivals import (
    Time,
    best_scored,
    complexity,
    different,
    digest,
    draw_at_target,
    largest_l1,
    largest_that_fits,
    random_at_target,
    random_networks,
    scaled_l1,
)
from search_quality import groups_of, shared_out, training_seeds
from small_spaces import stage_space
from studies import claim_supernet, content_of, hold_out, new_model, part_of, take_claimed, train_model
from tables import plain_calibration

import nas
from nas.data import load_data, load_images
from nas.kept import Remembered, described, read_evaluations, write_csv
from nas.profilers.ort_cpu import OrtCpu
from nas.recipe import Recipe
from nas.request import claim
from nas.scores import measure_drops
from nas.settings import SupernetSettings
from nas.table import LatencyTable, Row, measured_layers
from nas.training import train_network
from nas.trajectory import Evaluation
from supernet.arch import ArchConfig, Stage
from supernet.errors import InputError
from supernet.model import build_model
from supernet.space import SearchSpace
from supernet.specs import MB3D, MB4D, Head, Layer, is_stem


@pytest.fixture
def given(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        out=tmp_path,
        space="efficientformer-tiny",
        targets=[0.5, 0.8],
        strategies=["greedy", "exact"],
        seeds=3,
        crossed=False,
        random=20,
        epochs=4,
        images_per_epoch=0,
        recovery_steps=0,
    )


# ---- MobileNetV2


def test_mobilenet_has_the_published_parameters_and_macs() -> None:
    params, macs = complexity(MobileNetV2())
    assert params == 3_504_872
    assert macs == pytest.approx(300e6, rel=0.01)  # the paper's table 4
    with torch.device("meta"):
        wide = MobileNetV2(1.4).module()
    assert sum(p.numel() for p in wide.parameters()) == pytest.approx(6.9e6, rel=0.15)  # table 4 again


def test_mobilenet_on_small_images_ends_on_a_map_of_4_px() -> None:
    network = MobileNetV2(0.35, 32, 10, SMALL_IMAGE_STRIDES)
    model = network.module().eval()
    sides = []
    x = torch.zeros(1, 3, 32, 32)
    for module in list(model)[:-1]:
        x = module(x)
        sides.append(x.shape[-1])
    assert sorted(set(sides)) == [4, 8, 16, 32] and sides[-1] == 4
    assert model[-1](x).shape == (1, 10)
    assert network.widths == (16, 8, 8, 16, 24, 32, 56, 112, 1280)  # those of the published 0.35


def test_mobilenet_channels_are_multiples_of_8_that_lose_at_most_a_tenth() -> None:
    assert [rounded(c) for c in (1, 8, 11.2, 12, 84, 33.6)] == [8, 8, 16, 16, 88, 32]
    assert all(rounded(c / 10) % 8 == 0 and rounded(c / 10) >= 0.09 * c for c in range(1, 4000))


# ---- scaled rivals


def test_l1_at_its_own_size_is_l1() -> None:
    assert scaled_l1(1, 1, (4, 2, 2, 2), 224, 1000).stages == nas.zoo("efficientformer_l1").stages


def test_a_scaled_l1_keeps_its_proportions_and_one_attention_block_last() -> None:
    arch = scaled_l1(0.5, 0.5, (1, 2, 2, 2), 32, 10)
    assert arch.widths == (24, 48, 112, 224)
    assert [len(stage.blocks) for stage in arch.stages] == [2, 1, 3, 2]
    assert [type(block) for block in arch.stages[-1].blocks] == [MB4D, MB3D]
    tiny = scaled_l1(0.1, 0.1, (1, 2, 2, 2), 32, 10)
    assert [len(stage.blocks) for stage in tiny.stages] == [1, 1, 1, 1] and isinstance(tiny.stages[-1].blocks[-1], MB3D)


@pytest.mark.parametrize("limit", range(-1, 12))
def test_the_largest_that_fits_is_found_where_latency_rises(limit: int) -> None:
    asked: list[int] = []

    def fits(candidate: int) -> bool:
        asked.append(candidate)
        return candidate <= limit

    assert largest_that_fits(range(10), fits) == (None if limit < 0 else min(limit, 9))
    assert len(asked) <= 6


def test_a_network_that_is_faster_than_a_smaller_one_is_found() -> None:
    ms = [1, 2, 3, 4, 9, 9, 4, 9, 5, 9, 9, 9, 4]
    found = largest_that_fits(range(13), lambda at: ms[at] <= 5)
    assert found in (8, 12)  # 6 and 8 lie behind ones that miss, never more than two
    assert largest_that_fits(range(3), lambda at: at == 2) == 2  # the smallest ones miss


def test_rounding_gives_a_network_once() -> None:
    same = [scaled_l1(share, share, (1, 2, 2, 2), 32, 10) for share in (0.5, 0.501, 0.6)]
    assert [arch.widths for arch in different(same)] == [same[0].widths, same[2].widths]


def test_between_two_scales_l1_grows_in_width_or_in_depth_alone() -> None:
    space = SearchSpace.load("efficientformer-tiny")

    def blocks(arch: ArchConfig) -> list[int]:
        return [len(stage.blocks) for stage in arch.stages]

    uniform = scaled_l1(0.41, 0.41, space.strides, 32, 10)
    deeper = scaled_l1(0.42, 0.42, space.strides, 32, 10)  # 6 x 0.42 is rounded to one block more
    assert sum(blocks(deeper)) > sum(blocks(uniform))
    wide = largest_l1(space, lambda arch: sum(blocks(arch)) < sum(blocks(deeper)) and sum(arch.widths) < 500)
    assert wide is not None and blocks(wide) == blocks(uniform)
    assert sum(uniform.widths) < sum(wide.widths) < 500
    deep = largest_l1(space, lambda arch: sum(blocks(arch)) < 12 and sum(arch.widths) <= sum(uniform.widths))
    assert deep is not None and deep.widths == uniform.widths
    assert sum(blocks(uniform)) < sum(blocks(deep)) < 12
    assert largest_l1(space, lambda arch: False) is None


def test_a_network_is_the_same_whatever_its_name_and_its_empty_slots() -> None:
    space = SearchSpace.load("efficientformer-tiny")
    arch = space.arch((16, 32, 64, 96), (["identity", "mb4d"], ["mb4d"] * 2, ["mb4d"] * 4, ["identity"] * 3))
    assert digest(arch) == digest(replace(arch, name="other").without_identity())
    assert digest(arch) != digest(arch.with_classes(7))


# ---- random rivals


def named(ms: float) -> ArchConfig:
    return ArchConfig(f"{ms:g}", 32, 10, (Stage(16, 1, ()),))


def ms_of(arch: ArchConfig) -> Time:
    ms = float(arch.name)
    return Time(ms, ms, ms)


def test_random_networks_lie_just_under_the_target_where_there_are_enough() -> None:
    draws = [named(ms) for ms in (1.2, 0.99, 0.5, 0.98, 1.001, 0.971, 0.999)]
    assert [arch.name for arch in draw_at_target(iter(draws), ms_of, 1.0, 2)] == ["0.99", "0.98"]
    # Of those that are farther under, the slowest; never one that misses.
    few = [named(ms) for ms in (1.2, 0.99, 0.5, 0.9, 1.1)]
    assert [arch.name for arch in draw_at_target(iter(few), ms_of, 1.0, 2)] == ["0.99", "0.9"]
    assert [arch.name for arch in draw_at_target(iter(few), ms_of, 1.0, 4)] == ["0.99", "0.9", "0.5"]


def test_random_search_scores_as_many_as_it_may_and_takes_the_best_that_fits() -> None:
    losses = {"1.2": 0.1, "0.99": 0.5, "0.98": 0.3, "0.97": 0.0}
    asked: list[str] = []

    def loss_of(arch: ArchConfig) -> float:
        asked.append(arch.name)
        return losses[arch.name]

    draws = (named(float(ms)) for ms in losses)
    assert best_scored(draws, loss_of, ms_of, 1.0, 3).name == "0.98"
    assert asked == ["1.2", "0.99", "0.98"]
    assert best_scored(iter([named(1.2)]), loss_of, ms_of, 1.0, 3) is None
    # One near the target goes before a better one that is far under it, which is taken where there is no other.
    losses |= {"0.8": 0.0, "0.7": 0.1}
    assert best_scored(iter([named(0.8), named(0.99)]), loss_of, ms_of, 1.0, 3).name == "0.99"
    assert best_scored(iter([named(1.2), named(0.7), named(0.8)]), loss_of, ms_of, 1.0, 3).name == "0.8"


def rows_of_cost(space: SearchSpace, cost: Callable[[Layer], float]) -> dict[Layer, Row]:
    return {layer: Row(cost(layer), cost(layer), cost(layer), "slope") for layer in measured_layers(space.layers())}


@pytest.mark.parametrize("share", [0.7, 1.0, 1.4])
def test_random_networks_are_near_the_target_where_the_table_is_not(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    space = SearchSpace("wide", 32, 10, (stage_space(tuple(range(8, 1608, 8)), 2, 1, "mb4d", "identity"),))
    table = LatencyTable("toy-cpu", rows_of_cost(space, lambda layer: float(layer.spec.dim) if is_stem(layer.spec) else 0.0))
    measured: list[float] = []

    def check(arch: ArchConfig) -> Time:
        ms = share * arch.widths[0]  # the table says 1.0 for each channel
        measured.append(ms)
        return Time(0.99 * ms, 0.98 * ms, ms)

    draws = random_at_target(space, table, check, 800.0, random.Random(0))
    found = [share * arch.widths[0] for arch in itertools.islice(draws, 8)]
    assert all(0.94 * 800 <= ms <= 1.001 * 800 for ms in found)
    assert len(measured) == 5 and all(0.95 * 800 * share <= ms <= 800 * share for ms in measured)  # those that correct it
    monkeypatch.setattr("rivals.TRIES", 5000)
    assert not list(random_at_target(space, table, check, 1.0, random.Random(0)))


@pytest.mark.parametrize("calibrated", [True, False])
def test_random_networks_are_those_draws_of_the_space_that_the_table_says_are_near(
    calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though few of them are built to ask it."""
    space = SearchSpace.load("efficientformer-tiny")
    rows = rows_of_cost(space, lambda layer: 0.0 if isinstance(layer.spec, Head) else layer.spec.dim * layer.resolution / 1e4)
    by = replace(plain_calibration(space), offset_ms=0.1, scale=0.9, scale_between=0.2, bend=0.05)
    table = LatencyTable("toy-cpu", rows, (by,) if calibrated else ())
    rng = random.Random(0)
    draws = [space.sample(rng) for _ in range(1000)]
    target_ms = sorted(table.predict_ms(arch) for arch in draws)[50]
    expected = [arch for arch in draws if 0.95 * target_ms <= table.predict_ms(arch) <= target_ms]
    built: list[ArchConfig] = []
    build = SearchSpace.arch

    def noted(self: SearchSpace, *given: Any) -> ArchConfig:
        built.append(build(self, *given))
        return built[-1]

    monkeypatch.setattr(SearchSpace, "arch", noted)
    found = list(itertools.islice(random_networks(space, table, target_ms, random.Random(0)), len(expected)))
    assert len(expected) > 10
    assert found == expected
    assert len(expected) <= len(built) < len(draws) / 2


# ---- images and trainings


def write_images(folder: Path, per_class: int) -> None:
    from PIL import Image

    rng = random.Random(0)
    for name, shade in (("dark", 40), ("light", 200)):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            Image.new("RGB", (8, 8), (shade + rng.randrange(40),) * 3).save(folder / name / f"{number}.png")


def test_what_is_held_out_is_seen_by_no_search(tmp_path: Path) -> None:
    write_images(tmp_path / "all" / "train", 30)
    folder = hold_out(tmp_path / "all", tmp_path / "study" / "images", 20)
    names = {part: {f"{f.parent.name}/{f.name}" for f in (folder / part).glob("*/*")} for part in ("train", "val")}
    assert [sum(name.startswith(kind) for name in names["val"]) for kind in ("dark", "light")] == [10, 10]
    assert len(names["train"]) == 40 and not names["train"] & names["val"]
    for seed in (0, 1):  # a search of any seed divides the training part alone
        data = load_images(folder, 8, seed, score_images=8)
        assert (len(data.train), len(data.score), len(data.val)) == (32, 8, 20)
    assert hold_out(tmp_path / "all", tmp_path / "study" / "images", 20) == folder
    assert hold_out(folder, tmp_path / "other", 5) == folder  # it has a val/ already
    with pytest.raises(InputError, match="--val-images"):
        hold_out(tmp_path / "all", tmp_path / "third", 60)


def test_what_was_held_out_is_not_taken_for_other_images(tmp_path: Path) -> None:
    write_images(tmp_path / "all", 30)
    write_images(tmp_path / "others", 31)
    folder = hold_out(tmp_path / "all", tmp_path / "images", 20)
    (tmp_path / "all").rename(tmp_path / "moved")
    assert hold_out(tmp_path / "moved", folder, 20) == folder
    for source, images in (("moved", 10), ("others", 20)):
        with pytest.raises(InputError, match=r"made of other images .* another --out"):
            hold_out(tmp_path / source, folder, images)
    (folder / studies.NOTE).unlink()  # an earlier version's
    assert hold_out(tmp_path / "others", folder, 10) == folder
    assert len(list((folder / "val").glob("*/*"))) == 20


def test_any_network_is_trained_by_the_same_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images", 40)
    data = load_images(tmp_path / "images", 8, 0, score_images=8)
    recipe = Recipe(epochs=2, batch_size=16, learning_rate=2e-3, layer_scale=0.1, clip_norm=5.0)
    arch = ArchConfig("small", 8, 2, (Stage(16, 2, (MB4D(16), MB3D(16, num_heads=2, key_dim=8))),))
    result = train_network(arch, data, recipe, tmp_path / "ours", seed=3)
    model = new_model(lambda: build_model(arch), recipe, 3)
    train_model(model, "the same", data, recipe, 3, tmp_path / "any")
    ours = build_model(arch)
    ours.load_state_dict(nas_weights(result.folder))
    for (name, a), b in zip(model.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    # After a kill it goes on from its checkpoint, and ends where it would have.
    with monkeypatch.context() as patched:
        patched.setattr(studies.History, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))  # after a checkpoint
        with pytest.raises(KeyboardInterrupt):
            train_model(new_model(lambda: build_model(arch), recipe, 3), "killed", data, recipe, 3, tmp_path / "killed")
    assert not (tmp_path / "killed" / "metrics.csv").exists()
    again = new_model(lambda: build_model(arch), recipe, 9)
    train_model(again, "again", data, recipe, 3, tmp_path / "killed")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))
    metrics = (tmp_path / "any" / "metrics.csv").read_text()
    assert (tmp_path / "killed" / "metrics.csv").read_text() == metrics
    # Killed between the last checkpoint and the metrics, it is finished, and has them all the same.
    (tmp_path / "killed" / "metrics.csv").unlink()
    train_model(new_model(lambda: build_model(arch), recipe, 9), "ended", data, recipe, 3, tmp_path / "killed")
    assert (tmp_path / "killed" / "metrics.csv").read_text() == metrics


def test_a_training_that_diverges_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images", 40)
    data = load_images(tmp_path / "images", 8, 0, score_images=8)
    recipe = Recipe(epochs=2, batch_size=16, learning_rate=2e-3, layer_scale=0.1, clip_norm=5.0)
    arch = ArchConfig("small", 8, 2, (Stage(16, 2, (MB4D(16),)),))
    monkeypatch.setattr(studies, "train_step", lambda *_: float("nan"))
    with pytest.raises(FloatingPointError, match=r"epoch 1, at step 1: .*learning_rate"):
        train_model(new_model(lambda: build_model(arch), recipe, 0), "small", data, recipe, 0, tmp_path / "out")
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def nas_weights(folder: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(folder / "model.safetensors")


# ---- what a search evaluated


def test_a_search_is_charged_for_the_networks_that_it_chose_by_whatever_else_was_evaluated(tmp_path: Path) -> None:
    space = SearchSpace("two", 32, 10, (stage_space((8, 16), 2, 2, "mb4d", "identity"),))
    archs = [space.arch([w], [kinds]) for w in (16, 8) for kinds in itertools.product(("mb4d", "identity"), repeat=2)]
    run, later = tmp_path / "run", tmp_path / "later"
    run.mkdir()
    evaluate = Remembered(lambda arch: Evaluation(sum(arch.widths) / 7, 0.5), run / "evaluations.csv")
    measure_drops(space, space.largest, evaluate).save(run / "drops.csv")  # the base, a width, two slots: 4 networks
    target = {"device": "board-cpu", "target_ms": 1.0, "table": "board-cpu.csv"}
    request = {
        "strategy": "greedy",
        "data": "digits",
        "seed": 0,
        "settings": {"score": "loss"},
        "space": space.to_yaml(),
        **target,
    }
    (run / "request.json").write_text(json.dumps(request))
    (run / "result.json").write_text(json.dumps({**target, "predicted_ms": 0.9, "measured_ms": None}))
    assert networks_evaluated(run) == 4
    beyond = [arch for arch in archs if described(arch) not in read_evaluations(run / "evaluations.csv")]
    assert len(beyond) == 4
    evaluate(beyond[0])
    evaluate(beyond[0])  # again, as a search does that goes on after a kill
    assert networks_evaluated(run) == 5
    # Of the networks that drops are checked on, one is among those of the drops themselves, and two are new.
    checked = [space.largest, *beyond[1:3]]
    for arch in checked:
        evaluate(arch)
    write_csv(run / "additivity.csv", [{"network": described(arch)} for arch in checked], ["network"])
    assert networks_evaluated(run) == 5
    # Another search with the same supernet begins with the drops, and with nothing else that the first one evaluated.
    keep_drops(run, later)
    known, kept = (read_evaluations(folder / "evaluations.csv") for folder in (run, later))
    assert len(kept) == 4 and described(space.largest) in kept
    assert all(known[name] == evaluation for name, evaluation in kept.items())
    Remembered(lambda _: Evaluation(1.0, 0.5), later / "evaluations.csv")(beyond[0])
    keep_drops(run, later)  # it has begun: it keeps what it has
    assert len(read_evaluations(later / "evaluations.csv")) == 5


def test_another_table_is_another_study(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("a")
    table = LatencyTable("a", {}, meta={"reference_ms": {"cached_ms": 1.0, "streaming_ms": 2.0}})
    found = content_of(file, table)
    claim(tmp_path / "out", found)
    claim(tmp_path / "out", content_of(file, table))
    slower = replace(table, meta={"reference_ms": {"cached_ms": 1.1, "streaming_ms": 2.0}})
    with pytest.raises(InputError, match="reference_ms"):
        claim(tmp_path / "out", content_of(file, slower))
    file.write_text("b")
    with pytest.raises(InputError, match="table_sha256"):
        claim(tmp_path / "out", content_of(file, table))


def test_a_supernet_goes_on_in_its_own_folder_alone(tmp_path: Path) -> None:
    space, data = SearchSpace.load("efficientformer-tiny"), load_data(None, 8, 0)
    settings = SupernetSettings(weight_epochs=1)
    for _ in range(2):
        claim_supernet(tmp_path / "own", "a benchmark", space, settings, 0, data)
    with pytest.raises(InputError, match="seed 0, now 1"):
        claim_supernet(tmp_path / "own", "a benchmark", space, settings, 1, data)
    request = {
        "command": "nas-search",
        "target_ms": 1.0,
        "space": space.to_yaml(),
        "settings": {"weight_epochs": 1},  # an earlier version had fewer
        "seed": 0,
        "data_fingerprint": data.fingerprint,
    }
    claim(tmp_path / "run", request)
    claim_supernet(tmp_path / "run", "a benchmark", space, settings, 0, data)
    with pytest.raises(InputError, match="another settings and seed"):
        claim_supernet(tmp_path / "run", "a benchmark", space, SupernetSettings(), 1, data)


def test_a_report_is_of_what_was_asked_for(tmp_path: Path) -> None:
    given = argparse.Namespace(out=tmp_path, epochs=4, other=1)
    with pytest.raises(InputError, match="holds no study"):
        take_claimed(given, ["epochs"])
    claim(tmp_path, {"epochs": 9, "other": 2})
    assert take_claimed(given, ["epochs"]) == {"epochs": 9, "other": 2}
    assert (given.epochs, given.other) == (9, 1)


def of_this_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What gives the study a command, with a made-up table of this machine's CPU."""
    space = SearchSpace.load("efficientformer-tiny")
    place = {**OrtCpu().environment(), "reference_ms": {"cached_ms": 1.0, "streaming_ms": 2.0}}
    table = LatencyTable(OrtCpu().id, rows_of_cost(space, lambda layer: 0.1), (plain_calibration(space),), meta=place)
    file = table.save(folder)

    def command(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", ["search_quality.py", "--table", str(file), "--out", str(folder / "out"), *flags])
        search_quality.main()

    return command


def test_a_refused_command_leaves_the_images_to_the_corrected_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images", 30)
    command = of_this_cpu(tmp_path, monkeypatch)
    monkeypatch.setattr(search_quality, "say_estimate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))  # it begins
    with pytest.raises(InputError, match="training images"):
        command("--data", str(tmp_path / "images"), "--val-images", "58")
    assert not (tmp_path / "out" / "images").exists()
    with pytest.raises(KeyboardInterrupt):
        command("--data", str(tmp_path / "images"), "--val-images", "20")
    assert len(list((tmp_path / "out" / "images" / "val").glob("*/*"))) == 20
    with pytest.raises(InputError, match="another request"):
        command("--data", str(tmp_path / "images"), "--val-images", "20", "--epochs", "9")
    assert (tmp_path / "out" / "images").is_dir(), "it is the study's"


def test_networks_are_chosen_by_one_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = of_this_cpu(tmp_path, monkeypatch)
    for flags in ([], ["--choose"]):
        with pytest.raises(InputError, match=r"not chosen yet .*seed1.*: choose first, with --choose and without --part"):
            command("--data", str(tmp_path / "images"), "--part", "1/2", *flags)
    assert not (tmp_path / "out").exists()


# ---- what is done, and how long it takes


@pytest.mark.parametrize("parts", [1, 2, 3, 20])
def test_every_piece_is_done_once_and_the_parts_are_about_equal(given: argparse.Namespace, parts: int) -> None:
    work = [group.work for group in groups_of(given)]
    shares = shared_out(work, parts)
    assert len(shares) == parts
    assert sorted(itertools.chain(*shares)) == list(range(len(work)))
    if parts <= 3:
        loads = [sum(work[at] for at in share) for share in shares]
        assert max(loads) - min(loads) <= max(work)


def test_parts_are_counted_from_one() -> None:
    assert part_of("2/3") == (2, 3)
    for text in ("0/2", "3/2", "1", "1/", "a/b"):
        with pytest.raises(InputError, match="--part"):
            part_of(text)


def test_who_is_trained_with_which_seed(given: argparse.Namespace) -> None:
    assert training_seeds(chosen("exact", seed=2), given) == [2]
    assert training_seeds(chosen(RANDOM), given) == [0]
    assert training_seeds(chosen(L1), given) == [0, 1, 2]
    assert trainings_at_a_target(given) == 3 * 3 + 20 + 2 * 3
    given.crossed = True
    assert training_seeds(chosen("exact", seed=2), given) == [0, 1, 2]
    assert trainings_at_a_target(given) == 3 * 9 + 20 + 2 * 3


def test_the_estimate_is_the_sum_of_what_is_left(given: argparse.Namespace) -> None:
    pace = Pace(training=[3600.0, 7200.0], supernet=3600.0, evaluation=3.6, measurement=3.6)
    whole = hours_left(pace, given, [], [0, 0])
    assert whole["supernets"] == pytest.approx(3)
    assert whole["trainings"] == pytest.approx(35 * 1 + 35 * 2)
    assert whole["evaluations"] == pytest.approx(3 * 2 * 3 * 200 / 1000)
    later = hours_left(pace, given, ["seed0", "random-0.5ms"], [5, 35])
    assert later["supernets"] == pytest.approx(2)
    assert later["trainings"] == pytest.approx(30)
    assert later["measurements"] < whole["measurements"]
    everything = [group.name for group in groups_of(given)]
    assert sum(hours_left(pace, given, everything, [35, 35]).values()) == 0


def test_supernet_images_are_divided_over_the_epochs(tmp_path: Path) -> None:
    settings = settings_of(None, 60_000)
    assert settings.weight_epochs * settings.images_per_epoch == 60_000
    (tmp_path / "mixture.yaml").write_text("weight_epochs: 0\nmixture_epochs: 4\n")
    assert settings_of(tmp_path / "mixture.yaml", 60_000).images_per_epoch == 60_000  # of which each epoch sees a quarter


@pytest.mark.parametrize("setting", ["max_params: 1000000", "max_macs: 1000000", "objective: mes"])
def test_networks_are_compared_at_equal_latency_alone(tmp_path: Path, setting: str) -> None:
    (tmp_path / "config.yaml").write_text(setting + "\n")
    with pytest.raises(InputError, match=r"config\.yaml sets .*: leave them out"):
        settings_of(tmp_path / "config.yaml", 0)


# ---- the report


def chosen(method: str, target_ms: float = 0.5, seed: int | None = None, name: str = "x", high_ms: float = 0.49) -> Chosen:
    return Chosen(
        method, target_ms, seed, name, f"{method}{name}{target_ms}{seed}", 0.485, high_ms, None, 1_000_000, 10_000_000
    )


def trained(figures: Mapping[tuple[str, float], list[float]]) -> list[Trained]:
    found = []
    for (method, target_ms), values in figures.items():
        for number, top1 in enumerate(values):
            searched = method in ("greedy", "exact", RANDOM_SEARCH)
            one = chosen(method, target_ms, number if searched else None, str(number))
            found.append(Trained(one, 0 if method == RANDOM else number, top1))
    return found


FIGURES = {
    ("greedy", 0.5): [60.0, 62.0, 61.0],
    ("exact", 0.5): [63.0, 61.0, 65.0],
    (RANDOM, 0.5): [50.0, 64.0, 52.0, 55.0],
    (RANDOM_SEARCH, 0.5): [60.0, 60.0, 61.0],
    (L1, 0.5): [59.0, 61.0],
    ("greedy", 0.8): [70.0, 70.0, 70.0],
    (RANDOM, 0.8): [66.0, 67.0, 68.0],
}


def test_scores_are_paired_by_the_seed_of_the_training() -> None:
    scores = scores_of(trained(FIGURES))
    assert scores["exact", 0.5] == {0: 63.0, 1: 61.0, 2: 65.0}
    assert scores[MEDIAN, 0.5] == {None: 53.5} and scores[BEST, 0.5] == {None: 64.0}
    assert differences(scores["exact", 0.5], scores[RANDOM_SEARCH, 0.5]) == {0: 3.0, 1: 1.0, 2: 4.0}
    assert differences(scores["exact", 0.5], scores[L1, 0.5]) == {0: 4.0, 1: 0.0}  # its third seed is not finished
    assert differences(scores["exact", 0.5], scores[BEST, 0.5]) == {0: -1.0, 1: -3.0, 2: 1.0}
    assert differences({}, scores[L1, 0.5]) == {}


def test_trainings_that_share_a_supernet_count_once_by_their_mean(given: argparse.Namespace) -> None:
    crossed = [
        Trained(chosen("greedy", seed=s), k, top1) for s, k, top1 in ((0, 0, 60.0), (1, 0, 62.0), (0, 1, 70.0), (1, 1, 72.0))
    ]
    alone = [Trained(chosen(L1), k, top1) for k, top1 in ((0, 60.0), (1, 64.0))]
    scores = scores_of([*crossed, *alone])
    assert scores["greedy", 0.5] == {0: 65.0, 1: 67.0}  # two searches, not two trainings
    assert scores[L1, 0.5] == {0: 60.0, 1: 64.0}
    facts = {"machine": "a machine", "software": "a runtime", "val_images": 100, "train_images": 400}
    text = report([*crossed, *alone], argparse.Namespace(**{**vars(given), "crossed": True}), 6, facts, date(2026, 1, 2))
    assert "over searches, each the mean of its network's trainings" in text and "paired by search seed" in text


def test_a_mean_over_targets_has_an_interval_over_seeds() -> None:
    of_seed = {0: 1.0, 1: 2.0, 2: 6.0}
    alone = interval([of_seed])
    assert alone == "+3.00 (+1.00 to +6.00)"
    # The same at three targets is no more than at one: there are three supernets, not nine.
    assert interval([of_seed] * 3) == alone
    # What a seed gains at one target and loses at another is no uncertainty of the mean.
    assert interval([{0: 1.0, 1: 5.0}, {0: 5.0, 1: 1.0}]) == "+3.00 (+3.00 to +3.00)"
    assert interval([{0: 1.0}, {0: 2.0}]) == "+1.50"
    assert interval([{}, {}]) == ""


def test_the_report_says_what_the_figures_say(given: argparse.Namespace) -> None:
    facts = {"machine": "a machine", "software": "a runtime", "val_images": 10_000, "train_images": 40_000}
    given.targets = [0.4, 0.5, 0.8]
    text = report(trained(FIGURES), given, 35, facts, date(2026, 1, 2))
    assert "Nothing is trained at 0.4 ms." in text and "0.4 ms:" not in text
    assert "2026-01-02" in text and "a machine" in text and "40,000 images" in text
    assert "21 of at most 70 trainings are finished" in text
    lines = text.splitlines()
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in lines if line.startswith("|")}
    assert "63.00 ± 2.00" in rows["0.5", "exact"]
    assert "53.50 ± 6.18" in rows["0.5", MEDIAN]
    assert rows["0.5", BEST].endswith("| 64.00 |")
    assert "+2.67 (+1.00 to +4.00)" in rows["exact", "0.5"]  # above random search
    assert "| +9.50" in rows["exact", "0.5"]  # above the median of the random networks
    # Every strategy is held to the aims, in a fixed order: not the one that did best.
    begins = [line for line in lines if line.startswith("Aims")]
    assert [line.split(",")[1].strip(" :") for line in begins] == ["exact", "greedy"]
    assert "headline before any result" in begins[0] and "headline" not in begins[1]
    exact, greedy = (lines[lines.index(line) + 2 :][:3] for line in begins)
    assert exact[0] == "- at least 0 points above random, best: 0.5 ms: -1.00, missed; 0.8 ms: nothing to compare"
    assert greedy[0] == "- at least 0 points above random, best: 0.5 ms: -3.00, missed; 0.8 ms: +2.00, met"
    assert greedy[2] == "- at least 1 points above EfficientFormer-L1, scaled: 0.5 ms: +1.00, met; 0.8 ms: nothing to compare"


def test_networks_that_are_not_just_under_their_target_are_counted(given: argparse.Namespace) -> None:
    facts = {"machine": "a machine", "software": "a runtime", "val_images": 100, "train_images": 400}
    ones = [
        Trained(chosen("greedy", seed=s, name=str(s), high_ms=high), s, 50.0) for s, high in ((0, 0.49), (1, 0.47), (2, 0.51))
    ]
    text = report(ones, given, 3, facts, date(2026, 1, 2))
    assert "2 of these networks are not within 3 % under their target" in text
    assert "| -2.0 to 6.0 |" in text
    # A network that two strategies found, or that stands as median and as best, is one.
    same = [replace(one, chosen=replace(one.chosen, method="exact")) for one in ones]
    alone = Trained(chosen(RANDOM, name="r", high_ms=0.3), 0, 50.0)
    text = report([*ones, *same, alone], given, 7, facts, date(2026, 1, 2))
    assert "3 of these networks are not within 3 % under their target" in text


def test_supernets_are_held_to_the_order_of_the_trained_random_networks(
    given: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = SearchSpace.load("efficientformer-tiny")
    archs = [space.sample(random.Random(number)) for number in range(4)]
    truth = [50.0, 54.0, 52.0, 51.0]
    losses = [[4.0, 1.0, 2.0, 3.0], [0.1, 0.4, 0.3, 0.2]]  # of one that knows the order, and of one that turns it round

    class Scorer:
        def __init__(self, seed: int) -> None:
            self.seed = seed

        def each(self, asked: list[ArchConfig]) -> list[tuple[int, Evaluation]]:
            found = [(at, Evaluation(losses[self.seed][archs.index(arch)])) for at, arch in enumerate(asked)]
            return found[::-1]  # the order is its own

    opened = []

    def scorer_of(study: Any, seed: int, folder: Path, run: Path, steps: int) -> Scorer:
        assert steps == given.recovery_steps
        opened.append((folder.relative_to(given.out).as_posix(), run.relative_to(given.out).as_posix()))
        return Scorer(seed)

    monkeypatch.setattr("quality_supernets.scorer_of", scorer_of)
    ones = [replace(chosen(RANDOM, name=str(at)), macs=at, params=-at, arch=str(at)) for at in range(4)]
    study = SimpleNamespace(given=given, out=given.out, settings=SupernetSettings(), network=lambda one: archs[int(one.arch)])
    of_others = [Trained(chosen("exact", seed=0), 0, 99.0), Trained(chosen(RANDOM, target_ms=0.8), 0, 60.0)]
    given.seeds = 2
    text = ranking(study, [*(Trained(one, 0, top1) for one, top1 in zip(ones, truth, strict=True)), *of_others])  # type: ignore[arg-type]
    assert opened == [(f"seed{s}/ranking", f"seed{s}/0.5ms-greedy") for s in (0, 1)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert [row[:4] for row in rows] == [
        ["0.5", "4", "51.75 ± 1.71", way] for way in ("2 supernets", "their mean", "multiply-adds", "parameters")
    ], "one network at 0.8 ms says nothing of an order"
    assert [row[4].split()[0] for row in rows] == ["0.00", "1.00", "0.00", "0.00"], "the first one's losses differ by more"
    assert [row[5] for row in rows] == ["2.00", "0.00", "3.00", "4.00"], "the mean of 0 and 4; of the largest; of the smallest"
    given.seeds, given.recovery_steps, opened[:] = 1, 40, []
    best = ranking(study, [Trained(one, 0, top1) for one, top1 in zip(ones, truth, strict=True)]).splitlines()[2]  # type: ignore[arg-type]
    assert "| 1 supernet, after 40 steps each |" in best and "| 1.00 (1.00 to 1.00) | 0.00 |" in best
    assert opened == [("seed0/ranking-40-steps", "seed0/0.5ms-greedy")]
    with pytest.raises(InputError, match="random networks that are trained"):
        ranking(study, of_others)  # type: ignore[arg-type]
