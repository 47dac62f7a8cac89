"""The commands as a user types them: what they need to start, what they refuse, and one search from end to end."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import yaml
from PIL import Image
from refusals import refusal
from safetensors.torch import load_file, save_file
from tables import plain_calibration
from test_lut import device_ms
from test_tutorial import pretend

from nas import cli
from nas.about import targets_beside
from nas.lookup import Place, places, usable_table
from nas.lut import SAME, place_here
from nas.measure import Profiler, with_ordinary_values
from nas.parallel import Group
from nas.pretrained import space_of
from nas.profilers.ort_cpu import OrtCpu
from nas.profilers.ort_session import cpu_id
from nas.profilers.timing import Measurement
from nas.scores import Drops
from nas.table import LatencyTable, Row, Target, measured_layers
from supernet.arch import ArchConfig
from supernet.model import build_model, count
from supernet.space import SearchSpace
from supernet.specs import Head, Identity, Layer
from supernet.zoo import zoo

Command = Callable[[list[str]], None]

SPACE = """
name: micro
image_size: 16
num_classes: 10
stages:
- {stride: 2, widths: [8, 16], depth: 2, candidates: [mb4d, identity]}
- {stride: 2, widths: [16, 24, 32], depth: 2, candidates: [mb4d, {kind: mb3d, num_heads: 2}, identity]}
"""
V2_SPACE = """
name: micro-v2
image_size: 16
num_classes: 10
head: batch_norm
stages:
- {stride: 2, widths: [8, 16], depth: 2, candidates: [ffn, {kind: ffn, mlp_ratio: 2}, identity], entry: {kind: stem, act: gelu}}
- stride: 2
  widths: [16, 24]
  depth: 2
  candidates: [{kind: attn_ffn, num_heads: 2}, {kind: attn_ffn, num_heads: 2, stride: 2}, ffn, identity]
  entry: {kind: attn_embedding, num_heads: 2}
"""
SETTINGS = "{weight_epochs: 1, mixture_epochs: 1, images_per_epoch: 256, recalibration_images: 64, score_images: 64}"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither tables nor runs of the person who runs the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nas.table.user_folder", lambda: tmp_path / "tables")
    monkeypatch.setattr("nas.lookup.user_folder", lambda: tmp_path / "tables")


def cost(layer: Layer) -> float:
    classes = layer.spec.num_classes if isinstance(layer.spec, Head) else 0
    return layer.spec.dim * layer.resolution / 1e4 + classes / 1e5


def additive_table(space: SearchSpace, device: str, scale: float = 1.0) -> LatencyTable:
    rows = {
        layer: Row(scale * cost(layer), 0.9 * scale * cost(layer), 1.1 * scale * cost(layer), "slope")
        for layer in measured_layers(space.layers())
    }
    meta = {"reference_ms": {"cached_ms": 0.25, "streaming_ms": 0.3}}
    return LatencyTable(device, rows, (plain_calibration(space),), "imported", meta)


def board_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LatencyTable:
    """The only table of a user whose device is elsewhere, in a folder with `micro.yaml` and `settings.yaml`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nas.table.user_folder", lambda: tmp_path / "tables")
    monkeypatch.setattr("nas.lookup.user_folder", lambda: tmp_path / "tables")
    monkeypatch.setattr("nas.job._cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(OrtCpu, "onnx", lambda self, model: b"")
    Path("micro.yaml").write_text(SPACE)
    Path("settings.yaml").write_text(SETTINGS)
    found = additive_table(SearchSpace.load("micro.yaml"), "board-cpu")
    found.save(tmp_path / "tables")
    return found


@pytest.fixture
def space_file(tmp_path: Path) -> Path:
    path = tmp_path / "micro.yaml"
    path.write_text(SPACE)
    return path


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture
def phone_table(tmp_path: Path, space_file: Path) -> Path:
    return additive_table(SearchSpace.load(space_file), "phone-npu").save(tmp_path / "phone")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(8):
            image = Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8))
            image.save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def refused(command: Command, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that is to refuse its input; return the one line that it prints."""
    with pytest.raises(SystemExit) as ended:
        command([str(argument) for argument in arguments])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines, "a refusal says why"
    said_before = [line for line in lines[:-1] if not line.startswith(("reading", "skipped"))]
    assert not [line for line in said_before if "broken" not in line and "classes;" not in line], lines
    return lines[-1]


COMMANDS = ("build_lut", "search", "profile", "train", "export")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_without_torch_and_pandas(name: str) -> None:
    code = (
        f"import sys; from nas import cli\ntry:\n    cli.{name}(['--help'])\nexcept SystemExit as end:\n"
        "    assert end.code == 0\nassert not {'torch', 'pandas', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "example:" in done.stdout


def test_the_door_in_a_checkout_is_the_command() -> None:
    door = Path(__file__).parents[1] / "search.py"
    done = subprocess.run([sys.executable, str(door), "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: nas-search")


@pytest.mark.parametrize("target", ["0", "-1", "nan", "inf", "fast", ""])
def test_a_target_that_is_no_time_is_refused(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = "positive number of milliseconds" if target else "--target-ms= is empty"
    assert said in refused(cli.search, [f"--target-ms={target}"], capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--space", "efficientformer-tin"], "did you mean efficientformer-tiny"),
        (["--space", "nowhere/space.yaml"], "give the path of a space's YAML file, or one of concatplexer"),
        (["--strategy", "gredy"], "did you mean greedy"),
        (["--device", "cpuu"], "did you mean cpu"),
        (["--config", "none.yaml"], "give the path of a YAML file of settings"),
        (["--table", "none.csv"], "none.csv does not exist: give the path"),
        (["--data", "nowhere"], "does not exist"),
        (["--seed", "-1"], "not a seed"),
        (["--sede", "1"], "unrecognized arguments"),
        (["--init", "efficientformer_l1"], "--init NET and --weights FILE go together"),
        (["--weights", "l1.pth"], "--init NET and --weights FILE go together"),
        (["--init", "efficientformer_l1", "--weights", "none.pth"], "none.pth does not exist: give a model"),
        (["--init", "efficientformer_l1", "--weights", "none.pth", "--strategy", "best"], "unknown strategy"),
        (["--init", "efficientformer_l1", "--weights", "none.pth", "--space", "efficientvit"], "leave --space out"),
    ],
)
def test_nas_search_refuses_in_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(cli.search, ["--target-ms", "1", *arguments], capsys)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("weight_epochs: many", "weight_epochs must be a whole number"),
        ("weigth_epochs: 3", "did you mean weight_epochs"),
        ("tau_end: 0", "tau_end must be a positive number"),
        ("noise: gumble", "did you mean gumbel"),
        ("accelerator: cuda", "finds no cuda device"),
        ("[1, 2]", "must hold a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_bad_config_file_is_refused(
    settings: str,
    said: str,
    tmp_path: Path,
    space_file: Path,
    phone_table: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "bad.yaml").write_text(settings)
    arguments = ["--target-ms", "9", "--space", space_file, "--table", phone_table, "--device", "phone-npu"]
    assert said in refused(cli.search, [*map(str, arguments), "--config", str(tmp_path / "bad.yaml"), "--out", "out"], capsys)
    assert not Path("out").exists()


def test_a_target_below_the_smallest_network_is_refused_with_what_can_be_reached(
    space_file: Path, phone_table: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--target-ms", "0.001", "--space", str(space_file), "--table", str(phone_table), "--device", "phone-npu"]
    line = refused(cli.search, [*arguments, "--out", "out"], capsys)
    smallest_ms = sum(cost(layer) for layer in SearchSpace.load(space_file).smallest.layers())
    named = float(line.split("give at least ")[1].split()[0])
    assert smallest_ms <= named <= 1.001 * smallest_ms
    assert not (tmp_path / "out").exists(), "nothing is written for a request that cannot be met"


@pytest.mark.parametrize("strategy", ["exact", "optuna"])
def test_a_strategy_that_cannot_go_by_a_table_is_refused_before_the_folder_is_claimed(
    strategy: str, space_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = additive_table(SearchSpace.load(space_file), "phone-npu")
    (line,) = table.calibrations
    others = tuple(replace(line, space=name, space_sha256=name) for name in ("a", "b"))
    path = replace(table, calibrations=others).save(tmp_path / "phone")
    where = ["--table", str(path), "--device", "phone-npu", "--space", str(space_file), "--out", "out"]
    said = refused(cli.search, ["--target-ms", "0.5", "--strategy", strategy, *where], capsys)
    assert "2 calibrations" in said and "nothing adds up" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("sqlite:study.db", "neither a file nor a URL"),
        ("postgresql+nodriver://me@host/studies", "postgresql+nodriver://me@host/studies cannot be used"),
        ("notes.txt", "notes.txt cannot be used"),
    ],
)
def test_an_optuna_storage_that_cannot_be_used_is_refused_before_the_folder_is_claimed(
    storage: str, said: str, space_file: Path, phone_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("no journal\n")
    (tmp_path / "optuna.yaml").write_text(yaml.safe_dump({**yaml.safe_load(SETTINGS), "optuna_storage": storage}))
    where = ["--table", str(phone_table), "--device", "phone-npu", "--space", str(space_file), "--out", "out"]
    where += ["--config", "optuna.yaml", "--strategy", "optuna"]
    assert said in refused(cli.search, ["--target-ms", "0.5", *where], capsys)
    assert not (tmp_path / "out").exists()


def test_parts_of_a_step_that_are_not_equal_are_refused_before_the_folder_is_claimed(
    tmp_path: Path, space_file: Path, settings_file: Path, phone_table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings_file.write_text(yaml.safe_dump({**yaml.safe_load(SETTINGS), "accumulate": 7}))
    where = ["--space", str(space_file), "--config", str(settings_file), "--out", "out"]
    said = refused(cli.search, ["--target-ms", "1000", "--device", "phone-npu", "--table", str(phone_table), *where], capsys)
    assert "accumulate 7 does not divide" in said
    assert not (tmp_path / "out").exists()


def test_tables_that_do_not_fit_are_refused(
    space_file: Path, phone_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--target-ms", "1", "--space", str(space_file)]
    line = refused(cli.search, [*base, "--table", str(phone_table)], capsys)
    assert "is of phone-npu" in line, "this machine is no phone"
    assert "give --device phone-npu" in line
    assert "is of phone-npu" in refused(cli.search, [*base, "--device", "cpu", "--table", str(phone_table)], capsys)

    own = additive_table(SearchSpace.load(space_file), cpu_id())
    lacking = {k: v for k, v in own.rows.items() if not (k.spec.kind == "mb3d" and k.spec.dim == 24)}
    path = LatencyTable(own.device, lacking, own.calibrations, "measured", own.meta).save(tmp_path / "own")
    line = refused(cli.search, [*base, "--table", str(path)], capsys)
    assert "no row for mb3d(dim=24, num_heads=2) at 4 px" in line
    assert "--missing" in line

    path.write_bytes(path.read_bytes()[:-30])
    assert "truncated" in refused(cli.search, [*base, "--table", str(path)], capsys)


def test_several_measured_tables_ask_for_a_choice(tmp_path: Path, space_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("phone-npu", "board-cpu"):
        additive_table(SearchSpace.load(space_file), device).save(tmp_path / "tables")
    line = refused(cli.search, ["--target-ms", "1", "--space", str(space_file)], capsys)
    assert "board-cpu, phone-npu" in line
    assert "--device" in line


def test_a_map_on_which_nothing_can_be_chosen_is_refused(space_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space_file.write_text(SPACE.replace("image_size: 16", "image_size: 12"))
    line = refused(cli.search, ["--target-ms", "1", "--space", str(space_file)], capsys)
    assert "last map of 3x3" in line


def test_data_without_classes_is_refused(photos: Path, space_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--target-ms", "1", "--space", str(space_file), "--data"]
    empty = photos / "empty"
    empty.mkdir()
    assert "is empty" in refused(cli.search, [*base, str(empty)], capsys)
    (empty / "one").mkdir()
    Image.new("RGB", (8, 8)).save(empty / "one" / "a.png")
    assert "one class only" in refused(cli.search, [*base, str(empty)], capsys)


def test_from_images_to_a_network_within_its_target(
    photos: Path, space_file: Path, settings_file: Path, phone_table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "cat" / "broken.png").write_bytes(b"no image")
    space = SearchSpace.load(space_file).with_classes(2)
    table = LatencyTable.load(phone_table)
    target = 0.55 * table.predict_ms(space.largest)
    arguments = ["--target-ms", f"{target:.6f}", "--space", str(space_file), "--config", str(settings_file), "--out", "run"]
    arguments += ["--table", str(phone_table), "--device", "phone-npu", "--data", str(photos)]
    cli.search(arguments)
    out = capsys.readouterr()
    assert "broken.png" in out.err
    assert "1 broken images were skipped" in out.err
    assert "identity only" in out.err

    run = Path("run")
    result = json.loads((run / "result.json").read_text())
    arch = ArchConfig.load(run / "searched.yaml")
    assert arch in space
    assert arch.num_classes == 2, "the classes are the data's"
    assert not any(isinstance(block, Identity) for stage in arch.stages for block in stage.blocks)
    assert result["predicted_ms"] == pytest.approx(table.predict_ms(arch))
    assert result["predicted_ms"] <= target
    assert result["measured_ms"] is None, "the phone is not here"
    assert result["provenance"] == "imported"
    assert result["skipped_images"] == 1
    assert result["params"] > 0
    drops = Drops.load(run / "drops.csv", space)
    assert drops.base == space.fit(drops.base) and result["importance"] == "logits"
    names = ("importance.csv", "channels.json", "trajectory.csv", "evaluations.csv", "weights.safetensors", "supernet.pt")
    for name in names:
        assert (run / name).stat().st_size > 0

    # The same request again only prints; another one is refused, and nothing is lost.
    before = (run / "result.json").read_bytes()
    cli.search(arguments)
    assert (run / "result.json").read_bytes() == before
    assert "training the supernet" not in capsys.readouterr().err
    line = refused(cli.search, [*arguments, "--seed", "1"], capsys)
    assert "another request (seed 0, now 1)" in line
    assert (run / "result.json").read_bytes() == before

    # What was found trains and is exported.
    recipe = {"epochs": 1, "batch_size": 4, "learning_rate": 0.001, "layer_scale": 0.1, "clip_norm": 1.0}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    cli.train(
        [
            "run/searched.yaml",
            "--data",
            str(photos),
            "--out",
            "trained",
            "--recipe",
            "recipe.yaml",
            "--weights",
            "run/weights.safetensors",
        ]
    )
    assert "top-1" in capsys.readouterr().out
    cli.export(["trained/arch.yaml", "--weights", "trained/model.safetensors", "--format", "onnx", "--out", "model.onnx"])
    assert "model.onnx" in capsys.readouterr().out
    about = onnxruntime.InferenceSession("model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["cat", "dog"]
    (target,) = json.loads(about["targets"])
    assert target["target_ms"] == json.loads((run / "result.json").read_text())["target_ms"], "through both commands"
    assert target["batch"] == 1
    (kept,) = targets_beside("trained/arch.yaml")
    assert kept == kept | target, "and through a training that goes on from the first one's files"
    cli.profile(["model.onnx", "--json"])
    profile = json.loads(capsys.readouterr().out)
    assert profile["measured_low_ms"] <= profile["measured_ms"] <= profile["measured_high_ms"]
    assert profile["predicted_ms"] is None


def test_size_is_limited_and_counts_where_asked_and_importance_may_come_from_drops(
    photos: Path, space_file: Path, settings_file: Path, phone_table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = SearchSpace.load(space_file).with_classes(2)
    table = LatencyTable.load(phone_table)
    smallest, largest = count(space.smallest), count(space.largest)
    most = (smallest.params + largest.params) // 2
    target = 1.1 * table.predict_ms(space.largest)  # only the parameters are too many
    settings = {
        **yaml.safe_load(SETTINGS),
        "mixture_epochs": 0,
        "objective": "mes",
        "mes_size_unit": 1e4,
        "recovery_steps": 2,
        "additivity_networks": 5,
        "drop_pairs": 3,
    }
    arguments = ["--target-ms", f"{target:.6f}", "--space", str(space_file), "--config", str(settings_file), "--out", "run"]
    arguments += ["--table", str(phone_table), "--device", "phone-npu", "--data", str(photos)]
    settings_file.write_text(yaml.safe_dump({**settings, "max_macs": smallest.macs - 1}))
    line = refused(cli.search, arguments, capsys)
    assert f"give at least {smallest.macs}" in line and not Path("run").exists()

    settings_file.write_text(yaml.safe_dump({**settings, "max_params": most}))
    cli.search(arguments)
    said = capsys.readouterr().err
    assert "the sum of single drops on 5 networks" in said and "with those of 3 pairs on 5 networks" in said
    assert len(Drops.load(Path("run/drops.csv"), space).pairs) == 3
    result = json.loads(Path("run/result.json").read_text())
    arch = ArchConfig.load("run/searched.yaml")
    assert result["params"] == count(arch).params <= most < largest.params
    assert (result["max_params"], result["max_macs"], result["importance"]) == (most, None, "drops")
    assert result["mes"] == pytest.approx(100 * (result["params"] / 1e4) ** -0.5 / result["predicted_ms"])
    assert result["additivity"]["networks"] == 5 == len(Path("run/additivity.csv").read_text().splitlines()) - 1
    assert "gain_mes" in Path("run/trajectory.csv").read_text().splitlines()[0]
    assert Drops.load(Path("run/drops.csv"), space).base == space.arch(space.largest.widths, [["mb4d"] * 2, ["mb4d"] * 2])


TINY = """
name: mine
image_size: 32
num_classes: 10
stages:
- {width: 16, stride: 2, blocks: [mb4d, mb4d]}
- {width: 32, stride: 2, blocks: [mb4d, {kind: mb3d, num_heads: 2, key_dim: 8, attn_ratio: 2}]}
"""
INIT_SETTINGS = """
{images_per_epoch: 256, recalibration_images: 64, score_images: 64, distillation_steps: 30, init_epochs: 1, batch_size: 32}
"""


def test_from_a_network_with_weights_to_a_smaller_one_that_learns_from_it(
    tmp_path: Path, settings_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text(TINY)
    Path("recipe.yaml").write_text("{epochs: 3, batch_size: 64, learning_rate: 0.004, layer_scale: 0.5, clip_norm: 5}")
    settings_file.write_text(INIT_SETTINGS)
    cli.train(["mine.yaml", "--out", "trained", "--recipe", "recipe.yaml"])
    whole = ArchConfig.load("trained/arch.yaml")
    space = space_of(whole)
    table = additive_table(space, "phone-npu")
    target = 0.6 * table.predict_ms(whole)
    arguments = ["--init", "trained/arch.yaml", "--weights", "trained/model.safetensors", "--target-ms", f"{target:.6f}"]
    arguments += ["--config", str(settings_file), "--out", "run", "--device", "phone-npu"]
    arguments += ["--table", str(table.save(tmp_path / "phone"))]
    capsys.readouterr()
    cli.search(arguments)
    out = capsys.readouterr()
    assert "training" not in out.err, "it knows the data, so that nothing is trained but its replacements"
    assert "blocks that may replace others learn for 30 steps" in out.err
    arch = ArchConfig.load("run/searched.yaml")
    assert arch in space
    assert table.predict_ms(arch) <= target
    result = json.loads(Path("run/result.json").read_text())
    assert result["init"]["network"] == "mine"
    assert result["init"]["predicted_ms"] == pytest.approx(table.predict_ms(whole))
    assert ArchConfig.load("run/teacher.yaml") == whole
    teacher, given = load_file("run/teacher.safetensors"), load_file("trained/model.safetensors")
    assert all((teacher[name] == given[name]).all() for name in given)
    assert SearchSpace.load("run/space.yaml") == space

    # The same request goes on; with other weights it is another one.
    before = Path("run/result.json").read_bytes()
    cli.search(arguments)
    assert Path("run/result.json").read_bytes() == before
    Path("run/result.json").unlink()
    cli.search(arguments)
    assert Path("run/result.json").read_bytes() == before, "what was killed before its end comes to the same"
    other = [a if a != "trained/model.safetensors" else "run/other.safetensors" for a in arguments]
    save_file({name: tensor + 0.1 if tensor.is_floating_point() else tensor for name, tensor in given.items()}, other[3])
    capsys.readouterr()
    assert "another request (weights " in refused(cli.search, other, capsys)

    # The command that is printed is the next one.
    command = shlex.split(out.out.split("next: nas-train ")[1].split("\n")[0])
    assert command[1:5] == ["--weights", "run/weights.safetensors", "--teacher", "run/teacher.yaml"]
    Path("short.yaml").write_text(
        "{epochs: 1, images_per_epoch: 256, batch_size: 64, learning_rate: 0.0005, layer_scale: 0.1, clip_norm: 5}"
    )
    cli.train(["short.yaml" if word == "finetune" else word for word in command])
    assert "top-1" in capsys.readouterr().out
    assert ArchConfig.load("tuned/arch.yaml").stages == arch.stages


def test_a_network_that_meets_the_target_as_it_is_stays_as_it_is(
    tmp_path: Path, settings_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text(TINY)
    settings_file.write_text(INIT_SETTINGS)
    whole = ArchConfig.load("mine.yaml")
    table = additive_table(space_of(whole), "phone-npu")
    save_file(build_model(whole.with_classes(3)).state_dict(), "three.safetensors")
    arguments = ["--init", "mine.yaml", "--weights", "three.safetensors", "--target-ms", "99", "--out", "run"]
    arguments += ["--config", str(settings_file), "--device", "phone-npu", "--table", str(table.save(tmp_path / "phone"))]
    cli.search(arguments)
    out = capsys.readouterr()
    assert "mine knows 3 classes, the data have 10" in out.err
    assert "meets the target as it is" in out.out
    assert ArchConfig.load("run/searched.yaml").stages == whole.stages
    found, teacher = load_file("run/weights.safetensors"), load_file("run/teacher.safetensors")
    assert all((found[name] == teacher[name]).all() for name in teacher), "batch-norm statistics too"


def test_at_a_smaller_supernet_too_it_is_written_as_it_was_given(
    tmp_path: Path, settings_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attention biases are not resized to the supernet's size and back."""
    monkeypatch.setattr("nas.pretrained.accuracy_of", lambda *_: (0.5, 0.8))  # it knows the data
    Path("mine.yaml").write_text(TINY)
    settings_file.write_text(INIT_SETTINGS.replace("}", ", image_size: 16}").replace("steps: 30", "steps: 0"))
    whole = ArchConfig.load("mine.yaml")
    table = additive_table(space_of(whole), "phone-npu")
    given = with_ordinary_values(build_model(whole), 0).state_dict()
    save_file(given, "w.safetensors")
    arguments = ["--init", "mine.yaml", "--weights", "w.safetensors", "--target-ms", "99", "--out", "run"]
    arguments += ["--config", str(settings_file), "--device", "phone-npu", "--table", str(table.save(tmp_path / "phone"))]
    cli.search(arguments)
    found = load_file("run/weights.safetensors")
    assert found.keys() == given.keys()
    assert [name for name in given if not (found[name] == given[name]).all()] == []


def test_with_init_settings_that_cannot_be_used_leave_the_folder_free(
    tmp_path: Path, settings_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mine.yaml").write_text(TINY)
    whole = ArchConfig.load("mine.yaml")
    table = additive_table(space_of(whole), "phone-npu")
    save_file(build_model(whole.with_classes(3)).state_dict(), "three.safetensors")
    arguments = ["--init", "mine.yaml", "--weights", "three.safetensors", "--target-ms", "99", "--out", "run"]
    arguments += ["--config", str(settings_file), "--device", "phone-npu", "--table", str(table.save(tmp_path / "phone"))]
    settings_file.write_text(INIT_SETTINGS.replace("}", ", accumulate: 3}"))
    assert "accumulate 3 does not divide the 32 images" in refused(cli.search, arguments, capsys)

    def nothing_compiles(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("torch.compile", nothing_compiles)
    settings_file.write_text(INIT_SETTINGS.replace("}", ", compile: true}"))
    assert "torch.compile does not work here (no C++ compiler)" in refused(cli.search, arguments, capsys)
    settings_file.write_text(INIT_SETTINGS)
    monkeypatch.setattr("nas.search.joined", lambda: Group(0, 3))
    assert "a batch of 32 images cannot be divided among 3 processes" in refused(cli.search, arguments, capsys)
    assert not Path("run").exists()


def test_a_table_without_the_rows_of_a_network_names_the_command_that_measures_them(
    tmp_path: Path, space_file: Path, phone_table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text(TINY)
    save_file(build_model(ArchConfig.load("mine.yaml")).state_dict(), "w.safetensors")
    arguments = ["--init", "mine.yaml", "--weights", "w.safetensors", "--target-ms", "1", "--out", "run"]
    line = refused(cli.search, [*arguments, "--device", "phone-npu", "--table", str(phone_table)], capsys)
    assert "--space run/space.yaml" in line
    space = space_of(ArchConfig.load("mine.yaml"))
    assert SearchSpace.load("run/space.yaml") == space
    assert "--space run/space.yaml" in refused(
        cli.search, [*arguments, "--device", "phone-npu", "--table", str(phone_table)], capsys
    )

    Path("run/space.yaml").write_text("my own space")
    line = refused(cli.search, [*arguments, "--device", "phone-npu", "--table", str(phone_table)], capsys)
    assert "run/space.yaml" in line and "another file: give another --out" in line
    assert Path("run/space.yaml").read_text() == "my own space"

    whole = additive_table(space, "phone-npu").save(tmp_path / "whole")
    arguments[arguments.index("1")] = "0.0001"
    assert "give at least" in refused(cli.search, [*arguments, "--device", "phone-npu", "--table", str(whole)], capsys)
    assert Path("run/space.yaml").read_text() == "my own space"
    arguments[arguments.index("run")] = "other"
    refused(cli.search, [*arguments, "--device", "phone-npu", "--table", str(whole)], capsys)
    assert not Path("other").exists(), "only what a refusal names is left behind"


def test_a_network_found_in_another_family_is_of_its_space(space_file: Path, settings_file: Path, tmp_path: Path) -> None:
    space_file.write_text(V2_SPACE)
    space = SearchSpace.load(space_file)
    table = additive_table(space, "phone-npu")
    target = 0.55 * table.predict_ms(space.largest)
    arguments = ["--target-ms", f"{target:.6f}", "--space", str(space_file), "--config", str(settings_file), "--out", "run"]
    cli.search([*arguments, "--table", str(table.save(tmp_path / "phone")), "--device", "phone-npu"])
    arch = ArchConfig.load("run/searched.yaml")
    assert arch in space, "its head, its entries and its blocks' knobs are the space's"
    assert table.predict_ms(arch) <= target
    cli.export(["run/searched.yaml", "--weights", "run/weights.safetensors", "--format", "onnx", "--out", "model.onnx"])


def test_a_target_that_the_largest_network_meets_ends_with_it(
    space_file: Path, settings_file: Path, phone_table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--target-ms", "99", "--space", str(space_file), "--config", str(settings_file), "--out", "run"]
    cli.search([*arguments, "--table", str(phone_table), "--device", "phone-npu", "--seed", "3"])
    out = capsys.readouterr()
    assert "demonstration" in out.err
    assert "next: nas-train run/searched.yaml --weights run/weights.safetensors --out trained" in out.out
    assert "micro at its largest widths, no slot empty, meets the target: nothing was taken away" in out.out
    assert (
        "no larger space of its blocks ships for 16 px: for the rest of the time, give widths or depths more in a copy"
        in out.out
    )
    assert ArchConfig.load("run/searched.yaml").widths == (16, 32)
    cli.search(["--from", "run", "--target-ms", "99", "--out", "again"])
    assert "meets the target: nothing was taken away; no larger space" in capsys.readouterr().out


def this_machine_takes(factor: float, table: LatencyTable, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let networks take so many times what the table says where they are measured; return those milliseconds as they come."""
    asked: list[float] = []

    def measure(profiler: object, arch: ArchConfig, reference: object, batch: int | None = None) -> Measurement:
        ms = factor * table.predict_ms(arch)
        asked.append(ms)
        return Measurement(ms, 0.99 * ms, 1.01 * ms, ms, ms, ms, ms, 20)

    for module in ("measure", "verify"):
        monkeypatch.setattr(f"nas.{module}.measure_alone", measure)
    return asked


def test_a_network_that_misses_on_the_device_is_repaired(
    space_file: Path, settings_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table says half of what the device takes at first: the budget is tightened until the device agrees."""
    space = SearchSpace.load(space_file)
    table = additive_table(space, cpu_id())
    path = table.save(tmp_path / "tables")
    largest_ms = table.predict_ms(space.largest)
    asked = this_machine_takes(1.2, table, monkeypatch)
    target = 0.8 * largest_ms
    arguments = ["--target-ms", f"{target:.6f}", "--space", str(space_file), "--config", str(settings_file), "--out", "run"]
    cli.search([*arguments, "--table", str(path)])
    result = json.loads(Path("run/result.json").read_text())
    assert 2 <= len(asked) <= 4
    assert result["measured_high_ms"] <= target
    assert result["measured_high_ms"] == pytest.approx(1.01 * 1.2 * result["predicted_ms"])


def test_a_target_that_no_network_meets_on_the_device_ends_with_exit_code_1(
    space_file: Path,
    settings_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The table says a thousandth of what the device takes. What was found is written all the same."""
    space = SearchSpace.load(space_file)
    table = additive_table(space, cpu_id())
    path = table.save(tmp_path / "tables")
    this_machine_takes(1e3, table, monkeypatch)
    target = f"{0.8 * table.predict_ms(space.largest):.6f}"
    search = ["--target-ms", target, "--space", str(space_file), "--config", str(settings_file), "--table", str(path)]
    for command in ([*search, "--out", "run"], ["--from", "run", "--verify"]):
        with pytest.raises(SystemExit) as ended:
            cli.search(command)
        assert ended.value.code == 1
        assert "THE TARGET IS MISSED" in capsys.readouterr().out
        assert json.loads(Path("run/result.json").read_text())["met"] is False
        for name in ("searched.yaml", "weights.safetensors", "trajectory.csv", "report.html"):
            assert Path("run", name).stat().st_size > 0


def test_where_this_machine_has_no_table_one_is_measured_first(
    photos: Path,
    space_file: Path,
    settings_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr("nas.profilers.ort_cpu.cpu_id", lambda: "this-cpu")
    space = SearchSpace.load(space_file)
    search = ["--space", str(space_file), "--config", str(settings_file), "--data", str(photos), "--out", "run"]
    cli.search([*search, "--target-ms", f"{0.8 * device_ms(tuple(space.largest.layers())):.6f}"])
    assert "this machine's table (this-cpu) is not there yet: measuring it first\n" in capsys.readouterr().err
    path = tmp_path / "tables" / "this-cpu.csv"
    assert LatencyTable.load(path).serves(space), "with any number of classes"
    result = json.loads(Path("run/result.json").read_text())
    assert (result["table"], result["provenance"], result["met"]) == (str(path), "measured", True)

    monkeypatch.setattr("nas.lut.build_table", lambda *_, **__: pytest.fail("the table is there"))
    assert "give at least" in refused(cli.search, [*search, "--target-ms", "0.000001"], capsys), "nothing else is said"


@pytest.mark.parametrize(
    ("there", "folder"), [("tables", "tables"), ("latency_tables", "latency_tables"), ("shipped", "tables")]
)
def test_what_a_table_of_this_machine_lacks_is_measured_beside_it_unless_it_ships(
    there: str,
    folder: str,
    space_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("nas.profilers.ort_cpu.cpu_id", lambda: "this-cpu")
    monkeypatch.setattr("nas.table._SHIPPED", tmp_path / "shipped")
    other = replace(additive_table(SearchSpace.load("efficientformer-tiny"), "this-cpu"), provenance="measured")
    version = "1.0" if there == "shipped" else onnxruntime.__version__  # what ships is not added to
    as_here = {**place_here(OrtCpu()), "runtime_version": version}
    replace(other, meta={**other.meta, **{name: as_here[name] for name in SAME}}).save(there)
    asked: list[tuple[str, int, Path, bool]] = []

    def build(profiler: Profiler, space: SearchSpace, into: Path, *, only_missing: bool) -> LatencyTable:
        asked.append((profiler.id, space.num_classes, tmp_path / into, only_missing))
        return additive_table(space, profiler.id)

    monkeypatch.setattr("nas.lut.build_table", build)
    for classes, measured in ((2, 10), (1001, 1001)):  # up to 1000 lie between the rows of 10 and 1000
        space = SearchSpace.load(space_file).with_classes(classes)
        (place,) = places([(None, 1.0)])
        assert place.table is not None
        table, path = usable_table(place, space, "micro.yaml")
        assert asked.pop() == ("this-cpu", measured, tmp_path / folder, True)
        assert tmp_path / path == tmp_path / folder / "this-cpu.csv" and table.serves(space)
        err = capsys.readouterr().err
        assert "this machine's table lacks rows of micro: measuring it first\n" in err
        anew = f"`nas-build-lut --device this-cpu --space micro.yaml --out {place.table.parent}` measures it anew"
        said = f"measured with onnxruntime 1.0, this is {onnxruntime.__version__}: {anew}\n"
        assert (said in err) == (there == "shipped")
    space = SearchSpace.load(space_file).with_classes(10)
    of_another = replace(plain_calibration(space), space="other", space_sha256="0")
    known = replace(additive_table(space, "this-cpu"), calibrations=(of_another,), provenance="measured")
    known = replace(known, meta={**known.meta, **{name: place_here(OrtCpu())[name] for name in SAME}})
    assert place.table is not None
    known.save(place.table.parent)
    usable_table(place, space, "micro.yaml")
    assert asked.pop()[3], "networks of it are measured, to calibrate"
    err = capsys.readouterr().err
    assert "has the rows of micro and no calibration for it: measuring networks of it first" in err
    assert f"--table {place.table} takes the table as it is" in err


def test_a_table_of_this_machine_that_cannot_be_added_to_is_refused_with_the_command_that_replaces_it(
    space_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The user never typed --missing, and is not told that anything is measured."""
    monkeypatch.setattr("nas.profilers.ort_cpu.cpu_id", lambda: "this-cpu")
    monkeypatch.setattr("nas.table.user_folder", lambda: tmp_path / "my tables")
    monkeypatch.setattr("nas.lut.build_table", lambda *_, **__: pytest.fail("it is measured"))
    other = replace(additive_table(SearchSpace.load("efficientformer-tiny"), "this-cpu"), provenance="measured")
    as_here = {name: place_here(OrtCpu())[name] for name in SAME}
    path = replace(other, meta={**other.meta, **as_here, "protocol": "former"}).save(tmp_path / "my tables")
    space = SearchSpace.load(space_file)
    said = refusal(lambda: usable_table(Place(Target(1.0), "this-cpu", path, named=False), space, "my space.yaml"))
    command = f"`nas-build-lut --device this-cpu --space 'my space.yaml' --out '{tmp_path / 'my tables'}'`"
    assert said == (
        f"the table {path} was measured with protocol former: measure it anew with {command} "
        "(its rows of efficientformer-tiny go with it)"
    )
    assert "measuring" not in capsys.readouterr().err


def test_a_table_of_this_machine_that_measurements_cannot_be_compared_with_is_refused_first(
    space_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.profilers.ort_cpu.cpu_id", lambda: "this-cpu")
    space = SearchSpace.load(space_file)
    table = replace(additive_table(space, "this-cpu"), meta={})
    place = Place(Target(1.0), "this-cpu", table.save(tmp_path), named=True)
    assert "does not say what the references take" in refusal(lambda: usable_table(place, space, "micro.yaml"))


def test_nas_profile_without_a_table_names_the_command_that_makes_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], space_file: Path
) -> None:
    SearchSpace.load(space_file).largest.save("net.yaml")
    cli.profile(["net.yaml", "--json"])
    out = capsys.readouterr()
    record = json.loads(out.out)
    assert record["predicted_ms"] is None
    assert record["table"] is None
    assert record["measured_ms"] > 0
    assert record["device"] == cpu_id()
    assert f"nas-build-lut --device {cpu_id()} --arch net.yaml" in out.err


def test_nas_profile_predicts_by_layer_for_a_device_that_is_not_here(
    tmp_path: Path, space_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = SearchSpace.load(space_file)
    table = additive_table(space, "phone-npu")
    table.save(tmp_path / "tables")
    space.largest.save("net.yaml")
    cli.profile(["net.yaml", "--device", "phone-npu", "--layers", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["measured_ms"] is None
    assert record["predicted_ms"] == pytest.approx(table.predict_ms(space.largest), rel=1e-4)
    assert sum(row["ms"] for row in record["layers"]) == pytest.approx(record["predicted_ms"], rel=1e-4)
    cli.profile(["net.yaml", "--device", "phone-npu", "--layers"])
    shown = capsys.readouterr().out
    assert "stage1_block1" in shown
    assert "predicted" in shown


@pytest.mark.parametrize(("percent", "said"), [(9.0, ""), (12.0, "are off by 12 % on average for micro")])
def test_nas_profile_warns_of_a_table_that_is_far_off(
    percent: float, said: str, tmp_path: Path, space_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = SearchSpace.load(space_file)
    far_off = replace(plain_calibration(space), mean_error_percent=percent)
    replace(additive_table(space, "phone-npu"), calibrations=(far_off,)).save(tmp_path / "tables")
    space.largest.save("net.yaml")
    cli.profile(["net.yaml", "--device", "phone-npu"])
    err = capsys.readouterr().err
    assert said in err and bool(err) is bool(said)


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (cli.profile, ["trained"], "trained is a folder: give trained/arch.yaml"),
        (cli.export, ["trained", "--out", "x.onnx"], "trained is a folder: give trained/arch.yaml"),
        (cli.profile, ["trained/arch.pt2"], "trained/arch.pt2 is neither an ONNX file nor a network's YAML"),
        (cli.export, ["efficientformer_l1", "--out", "x.onnx", "--weights", "trained"], "give trained/model.safetensors"),
        (cli.search, ["--target-ms", "1", "--data", ".", "--out", "run"], "would lie among the images of .: give an --out"),
        (cli.search, ["--target-ms", "1", "--data", "."], "the results, in runs, would lie among the images"),
        (
            cli.train,
            ["efficientformer_l1", "--data", "trained", "--out", "trained/new"],
            "would lie among the images of trained",
        ),
        (cli.profile, ["efficientformer_l2"], "did you mean efficientformer_l"),
        (cli.profile, ["nowhere.yaml"], "give the path of a network's YAML file"),
        (cli.profile, ["nowhere.onnx"], "does not exist"),
        (cli.profile, ["efficientformer_l1", "--device", "gpu"], "unknown device 'gpu'"),
        (cli.train, ["efficientformer_l9", "--out", "t"], "unknown network"),
        (cli.train, ["efficientformer_l1", "--out", "t", "--recipe", "quik"], "did you mean quick"),
        (cli.train, ["efficientformer_l1", "--out", "t", "--recipe", "finetun"], "did you mean finetune"),
        (cli.train, ["efficientformer_l1", "--out", "t", "--recipe", "none.yaml"], "or one of quick, finetune"),
        (cli.train, ["efficientformer_l1", "--out", "t", "--teacher", "none.yaml"], "the teacher none.yaml: the network"),
        (cli.train, ["efficientformer_l1", "--out", "t", "--teacher", "none.pt2"], "the teacher none.pt2 cannot be used"),
        (cli.build_lut, ["--import-results", "none.json"], "bring results.json from the device again"),
        (cli.export, ["efficientformer_l1", "--format", "onyx", "--out", "m"], "did you mean onnx"),
        (cli.export, ["efficientformer_l1", "--format", "onnx", "--out", "m.onnx", "--weights", "no.pt"], "no.pt"),
        (cli.build_lut, [], "--device cpu"),
        (cli.build_lut, ["--check"], "--check --device iphone-npu (or iphone-cpu, mac-npu, mac-cpu)"),
        (cli.build_lut, ["--list", "--space", "efficientformer-s"], "--list measures nothing: leave --space out"),
        (cli.build_lut, ["--show", "cpu", "--threads", "2"], "--show measures nothing: leave --threads out"),
        (
            cli.build_lut,
            ["--check", "--device", "mac-npu", "--export-job", "d"],
            "--check measures nothing: leave --export-job",
        ),
        (cli.build_lut, ["--device", "pi-cpu", "--export-job", "d", "--out", "t"], "give it with --import-results"),
        (cli.build_lut, ["--device", "cpu", "--threads", "4096"], "--threads 4096 is more than the CPUs"),
        (cli.build_lut, ["--device", "a1000"], "unknown device 'a1000'"),
        (cli.build_lut, ["--device", "cpu", "--space", "tiny"], "efficientformer-tiny"),
        (cli.build_lut, ["--device", "cpu", "--space", "a", "--arch", "b"], "not allowed with"),
    ],
)
def test_the_other_commands_refuse_in_one_line(
    command: Command, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("trained").mkdir()
    for name in ("arch.yaml", "arch.pt2", "model.safetensors"):
        Path("trained", name).touch()
    assert said in refused(command, arguments, capsys)


def test_the_demonstration_is_told_only_where_work_begins(
    space_file: Path, phone_table: Path, settings_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text(TINY)
    Path("recipe.yaml").write_text("{epochs: 1, batch_size: 64, learning_rate: 0.001, layer_scale: 0.1, clip_norm: 5}")
    training = ["mine.yaml", "--out", "trained", "--recipe", "recipe.yaml"]
    cli.train(training)
    assert "(no --data: a demonstration)" in capsys.readouterr().err
    assert "another request (seed 0, now 1)" in refused(cli.train, [*training, "--seed", "1"], capsys)
    arguments = ["--target-ms", "99", "--space", str(space_file), "--table", str(phone_table), "--device", "phone-npu"]
    assert "another request" in refused(cli.search, [*arguments, "--out", "trained"], capsys)
    assert "mine.yaml" in refused(cli.search, [*arguments, "--out", "mine.yaml"], capsys)


def test_the_tables_are_listed(tmp_path: Path, space_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.build_lut(["--list"])
    assert "nas-build-lut --device cpu" in capsys.readouterr().out, "with none, the command that makes one"
    additive_table(SearchSpace.load(space_file), "phone-npu").save(tmp_path / "tables")
    cli.build_lut(["--list"])
    assert "phone-npu" in capsys.readouterr().out
    additive_table(SearchSpace.load(space_file), cpu_id()).save(tmp_path / "tables")
    cli.build_lut(["--show", "cpu", "--out", str(tmp_path)])
    assert cpu_id() in capsys.readouterr().out, "a kind of device is that of this machine"


def test_a_table_without_a_date_says_so(tmp_path: Path, space_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = additive_table(SearchSpace.load(space_file), "phone-npu")
    table.save(tmp_path / "tables")
    cli.build_lut(["--list"])
    assert "imported at an unknown time\n" in capsys.readouterr().out
    cli.build_lut(["--show", "phone-npu"])
    assert "phone-npu: imported at an unknown time\n" in capsys.readouterr().out
    replace(table, meta={**table.meta, "measured_at": "2026-01-02T03:04:05.678+00:00"}).save(tmp_path / "tables")
    cli.build_lut(["--list"])
    assert "imported 2026-01-02\n" in capsys.readouterr().out
    cli.build_lut(["--show", "phone-npu"])
    assert "phone-npu: imported 2026-01-02T03:04\n" in capsys.readouterr().out


def test_public_names_are_those_of_the_design() -> None:
    import nas

    assert {
        "ArchConfig",
        "LatencyTable",
        "SearchSpace",
        "build_model",
        "count",
        "features",
        "load_timm_weights",
        "slim",
        "zoo",
        "zoo_names",
    } <= set(nas.__all__)
    assert nas.zoo("efficientformer_l1") == zoo("efficientformer_l1")
    assert all(getattr(nas, name) is not None for name in nas.__all__)


@pytest.mark.parametrize(("closed", "said"), [(">&-", ""), ("2>&-", "kept"), (">&- 2>&-", "")])
def test_a_stream_that_is_closed_fails_nothing(closed: str, said: str) -> None:
    """What is for stderr does not go to stdout, where JSON may be expected."""
    work = "from nas.command import run_command; run_command('c', lambda: (print('kept'), say('for people')))"
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, f"from nas.progress import say; {work}"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, said)
