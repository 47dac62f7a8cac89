"""Whatever is in a file that people write, edit or bring: it is used, or refused in one line. Nothing ends in a traceback."""

import hashlib
import io
import json
import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from odd_files import changed, csv_files, damaged, json_files, put, used_or_refused, yaml_files
from onnx import TensorProto, helper
from test_cli import SPACE, additive_table
from test_job import pretended_results
from test_lut import small_space

from nas import again, cli, request
from nas.audit import doubts, say_if_untrue
from nas.checkpoints import load_checkpoint, load_weights
from nas.job import export_job
from nas.kept import Checks, read_evaluations
from nas.lut import _Flags, _started, import_medians, import_results
from nas.measure import table_reference
from nas.operators import bound_model
from nas.plan import work_for
from nas.pretrained import load_pretrained
from nas.profilers.bench import Plan, Samples
from nas.profilers.ort_cpu import OrtCpu
from nas.recipe import RECIPES, load_recipe
from nas.report import write_report
from nas.scores import Drops
from nas.settings import SupernetSettings
from nas.table import LatencyTable
from nas.taylor import from_json
from nas.teacher import load_teacher
from supernet.arch import ArchConfig, Stage
from supernet.model import build_model
from supernet.space import SearchSpace
from supernet.specs import MB3D, MB4D
from supernet.user_block import loaded, user_block

ARCHS = """
name: every-kind
image_size: 32
num_classes: 10
mux: {n: 2, reducer: avg, start: 0, mixing: block}
stages:
- width: 16
  stride: 2
  entry: {kind: stem, act: gelu}
  blocks: [identity, mb4d, {kind: ffn, mlp_ratio: 2}, {kind: sandwich, num_heads: 2, q_kernels: [3, 5]}]
- width: 32
  stride: 2
  entry: {kind: attn_embedding, num_heads: 2}
  blocks: [{kind: attn_ffn, stride: 2, num_heads: 2}, {kind: mb4d, act: relu, pool_size: 5}]
- {width: 48, stride: 2, entry: subsample, blocks: [mb4d, {kind: mb3d, num_heads: 2, key_dim: 8}, mb3d]}
"""
SPACES = """
name: every-choice
image_size: 32
num_classes: 10
mux: [1, 2, {n: 4, reducer: avg}]
stages:
- {stride: 2, widths: {min: 8, max: 24, step: 8}, depth: 2, activations: [relu, gelu], candidates: [mb4d, identity]}
- {stride: 2, widths: [16, 32], depth: 3, entry: subsample,
  candidates: [{kind: mb4d, mlp_ratio: 2}, {kind: mb3d, num_heads: 2}, identity]}
"""
TINY = ArchConfig(
    "tiny", 16, 3, (Stage(8, 2, (MB4D(8),)), Stage(8, 2, (MB4D(8), MB3D(8, num_heads=2, key_dim=4, attn_ratio=2))))
)


@pytest.fixture(autouse=True)
def quiet(capsys: pytest.CaptureFixture[str]) -> None:
    """What readers say of 500 files is of no account."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


# -- YAML --------------------------------------------------------------------------------------------------------------


@given(content=yaml_files(ARCHS))
def test_a_network(content: bytes, folder: Path) -> None:
    def read() -> None:
        arch = ArchConfig.load(put(folder / "net.yaml", content))
        arch.save(folder / "again.yaml")
        assert ArchConfig.load(folder / "again.yaml") == arch
        assert len(arch.layers()) >= 2 and arch.without_identity().at(64).resolutions

    used_or_refused(read, "net.yaml")


@given(content=yaml_files(SPACES))
def test_a_space(content: bytes, folder: Path) -> None:
    def read() -> None:
        space = SearchSpace.load(put(folder / "space.yaml", content))
        space.save(folder / "again.yaml")
        assert SearchSpace.load(folder / "again.yaml") == space
        assert space.smallest in space

    used_or_refused(read, "space.yaml")


@given(content=yaml_files(yaml.safe_dump(asdict(SupernetSettings()))))
def test_settings_of_a_search(content: bytes, folder: Path) -> None:
    path = put(folder / "settings.yaml", content)
    used_or_refused(lambda: json.dumps(SupernetSettings.load(path).deciding()), "settings.yaml")
    used_or_refused(lambda: SupernetSettings.of_run(SupernetSettings().deciding(), path), "settings.yaml")


@given(content=yaml_files(yaml.safe_dump(asdict(RECIPES["quick"]))))
def test_a_recipe(content: bytes, folder: Path) -> None:
    path = put(folder / "recipe.yaml", content)
    used_or_refused(lambda: json.dumps(asdict(load_recipe(path))), "recipe.yaml")


# -- Latency tables ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> SearchSpace:
    return SearchSpace.load(put(tmp_path_factory.mktemp("space") / "micro.yaml", SPACE.encode()))


def table_text(name: str) -> str:
    """A file of a small table, as it is written."""
    import tempfile

    space = SearchSpace.from_dict(yaml.safe_load(SPACE), "micro")
    with tempfile.TemporaryDirectory() as written:
        additive_table(space, "board-cpu").save(written)
        return (Path(written) / name).read_text()


TABLE, SIDECAR = table_text("board-cpu.csv"), table_text("board-cpu.meta.json")


def use_table(path: Path, space: SearchSpace) -> None:
    table = LatencyTable.load(path)
    table.predict_ms(space.largest)
    table.serves(space)
    table_reference(table)
    doubts(table)
    say_if_untrue(table)
    table.save(path.parent / "again")


@given(content=csv_files(TABLE), hashed=st.sampled_from([True, True, True, False]))
def test_a_latency_table(content: bytes, hashed: bool, space: SearchSpace, folder: Path) -> None:
    path = put(folder / "board-cpu.csv", content)
    sidecar = {**json.loads(SIDECAR), **({"csv_sha256": hashlib.sha256(content).hexdigest()} if hashed else {})}
    put(folder / "board-cpu.meta.json", json.dumps(sidecar).encode())
    used_or_refused(lambda: use_table(path, space), "board-cpu")


@given(content=json_files(SIDECAR))
def test_the_sidecar_of_a_latency_table(content: bytes, space: SearchSpace, folder: Path) -> None:
    path = put(folder / "board-cpu.csv", TABLE.encode())
    put(folder / "board-cpu.meta.json", content)
    used_or_refused(lambda: use_table(path, space), "board-cpu", "the device")


@given(
    content=csv_files(
        "measured_at,model,raw_ms,cached_reference_ms,streaming_reference_ms\n" + "2026-01-01T00:00,a,1,2,3\n" * 3
    )
)
def test_the_visits_of_a_table_under_way(content: bytes, folder: Path) -> None:
    from nas.profilers.bench import Damaged

    path = put(folder / "board-cpu.samples.csv", content)
    try:
        samples = Samples(path, "2025")
    except Damaged as error:
        assert "board-cpu.samples.csv" in str(error) and "\n" not in str(error)
    else:
        samples.close()
        assert all(math.isfinite(visit.raw_ms) for visits in samples.visits.values() for visit in visits)


@given(content=json_files('{"space": "0", "runtime": "x", "started": "2026", "a": ["2026", "off-npu"], "warnings": ["hot"]}'))
def test_the_marks_of_a_table_under_way(content: bytes, space: SearchSpace, folder: Path) -> None:
    place = dict.fromkeys(("runtime", "runtime_version", "threads", "precision", "batch", "export"), "x")
    started, warnings = _started(put(folder / "x.building.json", content), space, place, Plan((), (), (), "", {}))
    assert started and all(isinstance(warning, str) for warning in warnings)
    assert isinstance(_Flags(put(folder / "x.flags.json", content), "2026").words, dict)


# -- Results from elsewhere --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OrtCpu, "onnx", lambda self, model: onnx.ModelProto().SerializeToString())
        patch.setattr("nas.job._cache", lambda: folder / "cache")
        export_job(folder / "job", small_space(), work_for(small_space()), device="pretended-cpu")
    return folder / "job"


def test_the_results_of_a_job(job: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_for(small_space())
    monkeypatch.setattr("nas.job._cache", lambda: folder / "cache")

    @given(content=json_files(json.dumps(pretended_results(job, work))))
    def each(content: bytes) -> None:
        path = put(job / "results.json", content)
        used_or_refused(lambda: import_results(path, folder / "tables"), "results.json", "the results are of", "device id")

    each()


@given(content=csv_files("network,ms\nnet0.yaml,1.5\nnet1.yaml,1.25\nnet2.yaml,2\nnet3.yaml,1.75\n"))
def test_medians_from_elsewhere(content: bytes, space: SearchSpace, folder: Path) -> None:
    import random

    where = folder / "medians"
    where.mkdir(exist_ok=True)
    table = additive_table(space, "board-cpu").save(where)
    rng = random.Random(3)
    for number in range(4):
        space.sample(rng).save(where / f"net{number}.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setattr("nas.lut.find_table", lambda device: table)
        path = put(where / "medians.csv", content)
        used_or_refused(
            lambda: import_medians(path, folder / "calibrated", "board-cpu"), "medians.csv", "the table of board-cpu"
        )


# -- Weights and models ------------------------------------------------------------------------------------------------


class Marker:
    """Code in a pickle: it would make a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("marker", "w")


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


STATE = build_model(TINY).state_dict()
STRANGE: list[Any] = [
    *({"net": Marker()}, Marker(), {"epoch": 1, "net": Marker()}, STATE | {"extra": Marker()}, [], {}, {"net": 3}, {"net": []}),
    *(3, None, torch.zeros(3), {"net": {}}, {"net": STATE | {"extra": torch.zeros(1)}}, {"net": {3: torch.zeros(1)}}),
    *({"state_dict": STATE}, {"model": STATE}, STATE, {"net": STATE, "epoch": -1}, {"net": STATE, "epoch": "x"}),
    {"net": {name: tensor.flatten() for name, tensor in STATE.items()}, "epoch": 1},
    {"net": {name: tensor.to_sparse() for name, tensor in STATE.items()}, "epoch": 1},
    {"net": {"head.fc.bias": torch.tensor(3.0)}, "epoch": 1},
    {"net": STATE | {"head.fc.bias": torch.tensor(3.0)}, "epoch": 1},
    {"net": STATE | {"head.fc.weight": torch.zeros(0, 8), "head.fc.bias": torch.zeros(0)}, "epoch": 1},
    {"net": STATE | {"head.fc.weight": torch.zeros(5, 8), "head.fc.bias": torch.zeros(5)}, "epoch": 1},
    {"net": {name: tensor.to(torch.complex64) for name, tensor in STATE.items()}, "epoch": 1},
    {"net": {name: tensor * math.nan for name, tensor in STATE.items()}, "epoch": 1},
]
CHECKPOINTS = [saved(content) for content in ({"net": STATE, "epoch": 2}, *STRANGE)]
CHECKPOINTS += [
    saved({"stages.0.blocks.0.ls1.gamma": torch.zeros(3), **more}) for more in ({}, {"head.bias": torch.tensor(2.0)})
]
CHECKPOINTS += [pickle.dumps(Marker()), pickle.dumps({"net": Marker()}), b"PK\x03\x04", b""]
SAFETENSORS = [
    safetensors.torch.save(tensors)
    for tensors in (
        STATE,
        {},
        {"a": torch.zeros(2)},
        {"head.fc.bias": torch.zeros(0)},
        STATE | {"head.fc.bias": torch.zeros(7), "head.fc.weight": torch.zeros(7, 8)},
        {name: tensor.to(torch.float8_e5m2) for name, tensor in STATE.items()},
    )
]


class Content(bytes):
    """Bytes that are told by their length: they would fill pages."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes, sha256 {hashlib.sha256(self).hexdigest()[:12]}>"


def damaged_one_of(files: list[bytes]) -> st.SearchStrategy[bytes]:
    numbers = st.sampled_from(range(len(files)))
    return st.one_of(numbers.map(lambda n: Content(files[n])), numbers.flatmap(lambda n: damaged(files[n]).map(Content)))


def use_weights(path: Path) -> None:
    load_weights(build_model(TINY), path)


def adapt_weights(path: Path) -> None:
    load_weights(build_model(TINY.at(32)), path, adapt=True)


def begin_with_weights(path: Path) -> None:
    load_pretrained("tiny.yaml", str(path), TINY)


def go_on_from(path: Path) -> None:
    load_checkpoint(path, net=build_model(TINY))


def learn_from(path: Path) -> None:
    TINY.save(path.with_name("teacher.yaml"))
    shutil.copyfile(path, path.with_name("teacher.safetensors"))
    load_teacher(path.with_name("teacher.yaml"), 32, "abc")


READERS = [use_weights, adapt_weights, begin_with_weights, go_on_from, learn_from]


@given(content=damaged_one_of(CHECKPOINTS), read=st.sampled_from(READERS))
def test_a_checkpoint(content: bytes, read: Callable[[Path], None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    path = put(folder / "weights.pt", content)
    used_or_refused(lambda: read(path), "weights.pt", "teacher.safetensors")
    assert not Path("marker").exists(), "code of the file was run"


@given(content=damaged_one_of(SAFETENSORS), read=st.sampled_from(READERS))
def test_safetensors(content: bytes, read: Callable[[Path], None], folder: Path) -> None:
    path = put(folder / "weights.safetensors", content)
    used_or_refused(lambda: read(path), "weights.safetensors", "teacher.safetensors")


def a_model() -> bytes:
    nodes = [helper.make_node("MatMul", ["image", "w"], ["y"]), helper.make_node("Relu", ["y"], ["logits"])]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 2], [0.5] * 6)
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("image", [1, 3]), ("logits", [1, 2]))]
    graph = helper.make_graph(nodes, "net", ports[:1], ports[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return bytes(model.SerializeToString())


@given(content=damaged(a_model()))
def test_a_model_to_be_timed(content: bytes, folder: Path) -> None:
    path = put(folder / "model.onnx", content)
    used_or_refused(lambda: bound_model(path, str(path)), "model.onnx")


# -- What a run has kept -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that has ended."""
    from test_cli import board_table

    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        board = board_table(folder, patch)
        ms = 0.8 * board.predict_ms(SearchSpace.load("micro.yaml").largest)
        where = ["--space", "micro.yaml", "--config", "settings.yaml", "--out", "run", "--strategy", "exact"]
        cli.search(["--target-ms", f"{ms:.6f}", "--device", "board-cpu", *where])
    return folder / "run"


KEPT = {
    "request.json": json_files,
    "result.json": json_files,
    "drops.csv": csv_files,
    "importance.csv": csv_files,
    "evaluations.csv": csv_files,
    "trajectory.csv": csv_files,
    "frontier.csv": csv_files,
    "searched.yaml": yaml_files,
    "space.yaml": yaml_files,
    "channels.json": json_files,
    "layers.csv": csv_files,
}


def readers_of(name: str, run: Path) -> list[Callable[[], object]]:
    """What reads a file that a run has kept: an answer for another target, the report, a search that goes on."""
    tables = [run.parent / "tables" / "board-cpu.csv"]
    given_space = SearchSpace.load(run.parent / "micro.yaml")

    def answer() -> None:
        shutil.rmtree(run.parent / "next", ignore_errors=True)
        again.answer(run, target_ms=0.05, table=tables, out=run.parent / "next", strategy="greedy")

    more: dict[str, Callable[[], object]] = {
        "request.json": lambda: request.claim(run, {"command": "nas-search", "settings": {"a": 1}, "seed": 3}),
        "drops.csv": lambda: Drops.load(run / name, given_space),
        "evaluations.csv": lambda: read_evaluations(run / name),
        "space.yaml": lambda: SearchSpace.load(run / name),
        "searched.yaml": lambda: ArchConfig.load(run / name),
        "channels.json": lambda: from_json(run / name),
    }
    return [answer, lambda: write_report(run), *([more[name]] if name in more else [])]


@pytest.mark.parametrize("name", KEPT)
def test_what_a_run_has_kept(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.report.device.published_networks", lambda run: ([], []))  # reading the zoo takes a second
    monkeypatch.chdir(run.parent)
    whole = (run / name).read_bytes()

    @given(content=KEPT[name](whole.decode()))
    def each(content: bytes) -> None:
        put(run / name, content)
        for read in readers_of(name, run):
            used_or_refused(read, name, str(run), "board-cpu", "the target", "smallest network")

    try:
        each()
    finally:
        put(run / name, whole)


@given(content=csv_files(",".join(Checks.HEADER) + "\n16: mb4d | 32: mb3d,1.5,1.4,1.6,2026-01-01,None,None,1.7\n"))
def test_measurements_that_a_run_has_kept(content: bytes, folder: Path, space: SearchSpace) -> None:
    path = put(folder / "measurements.csv", content)
    used_or_refused(lambda: Checks(path, additive_table(space, "board-cpu")), "measurements.csv")


# -- Blocks of a user's own --------------------------------------------------------------------------------------------

BLOCK = """
from dataclasses import dataclass
import torch

@dataclass(frozen=True)
class Mine:
    dim: int
    knob: int = 3

    def module(self, resolution):
        return torch.nn.Conv2d(self.dim, self.dim, 1)
"""
LINES = [
    "raise SystemExit",
    "raise KeyError",
    "import no_such",
    "1 / 0",
    "Mine = 3",
    "del Mine",
    "class Mine: pass",
    "(",
    "raise Exception('a\\nb')",
]
LINES += [
    "Mine.dim = property(lambda self: 1 / 0)",
    "Mine.module = 3",
    "Mine.tokens = 'x'",
    "Mine.__post_init__ = lambda self: 1 / 0",
    "exit(3)",
]
LINES += [
    "Mine.module = lambda self, resolution: 3",
    "Mine.module = lambda self: 3",
    "Mine.module = lambda self, r: torch.nn.Linear(1, 'x')",
]


@given(
    content=st.one_of(damaged(BLOCK.encode()), st.sampled_from(LINES).map(lambda line: f"{BLOCK}\n{line}\n".encode())),
    name=st.one_of(st.just("Mine"), st.sampled_from(["", "Other", "torch", "__name__", "a b", "é", "x" * 3000])),
    entry=changed({"kind": "mine.py:Mine", "knob": 4}),
)
def test_a_users_own_block(content: bytes, name: str, entry: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    number = hashlib.sha256(content).hexdigest()[:12]
    path = put(folder / f"block{number}.py", content)
    monkeypatch.chdir(folder)
    before = dict(loaded)

    def read() -> None:
        user_block(f"{path.name}:{name}")
        kind = {"kind": f"{path.name}:{name}"} if isinstance(entry, dict) and entry.get("kind") == "mine.py:Mine" else {}
        block = {**entry, **kind} if kind else entry
        document = {"name": "x", "image_size": 16, "num_classes": 3, "stages": [{"width": 16, "stride": 2, "blocks": [block]}]}
        build_model(ArchConfig.from_dict(document, f"the network file {path.name}"))

    try:
        used_or_refused(read, path.name)
    finally:
        loaded.clear()
        loaded.update(before)
        sys.modules.pop(f"metapath_user {path.resolve()}", None)
        path.unlink()


@given(
    kind=st.one_of(
        st.text(max_size=30),
        st.text(max_size=10).map(lambda text: f"{text}.py:Mine"),
        st.just("/:Mine"),
        st.just("\0.py:Mine"),
        st.just("y" * 400 + ".py:X"),
    )
)
def test_where_a_block_is_said_to_be(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    document = {"name": "x", "image_size": 16, "num_classes": 3, "stages": [{"width": 16, "stride": 2, "blocks": [kind]}]}
    used_or_refused(lambda: ArchConfig.from_dict(document, "the network file x.yaml"), "x.yaml")
