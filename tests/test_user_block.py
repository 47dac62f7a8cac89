"""A block of a user's own, a spec and a module in their own file, works wherever the package's blocks do."""

import hashlib
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from refusals import refusal
from test_cli import additive_table
from test_lut import Device, device_ms, small_space

import nas
from nas.audit import contradicted_rows
from nas.data import load_data
from nas.lut import build_table
from nas.measure import Model
from nas.onnx_model import onnx_bytes
from nas.plan import work_for
from nas.profilers.ort_cpu import OrtCpu
from nas.profilers.timing import Workload
from nas.recipe import RECIPES
from nas.request import Finished
from nas.search import Request, run_search
from nas.search_stages import Work, study_of
from nas.table import LatencyTable, Row, measured_layers
from nas.training import train_network
from supernet import user_block
from supernet.arch import ArchConfig
from supernet.blocks import build_layer
from supernet.deploy import deployed, deployed_layer, has_forms
from supernet.errors import InputError
from supernet.metapath import Supernet
from supernet.model import build_model
from supernet.space import SearchSpace
from supernet.specs import MB4D, Layer
from supernet.units import UnitScores, axes, cut, sections
from supernet.weights import subnetwork

BLOCK = """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Gated:
    dim: int
    kernel: int = 3
    scales: tuple[int, ...] = (1, 2)

    def module(self, resolution):
        return GatedModule(self)


class GatedModule(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.conv = nn.Conv2d(spec.dim, spec.dim, spec.kernel, padding=spec.kernel // 2, groups=spec.dim)
        self.norm = nn.BatchNorm2d(spec.dim)

    def forward(self, x):
        return x + x * torch.sigmoid(self.norm(self.conv(x)))
"""

SUBCLASS = """
from dataclasses import dataclass

from torch import nn

from supernet.specs import MB4D


@dataclass(frozen=True)
class Doubled(MB4D):
    def module(self, resolution):
        return Twice(nn.Conv2d(self.dim, self.dim, 1))


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)
"""

SPACE = """
name: gated
image_size: 16
num_classes: 10
stages:
- {stride: 2, widths: [16, 32], depth: 2, candidates: [{kind: "my_blocks.py:Gated", kernel: 5}, mb4d, identity]}
- {stride: 2, widths: [32, 48], depth: 2, candidates: ["my_blocks.py:Gated", mb4d, mb3d, identity]}
"""


class GatedDevice(Device):
    """The pretended device; a user's block takes 0.02 ms on it."""

    def open(self, model: Model) -> tuple[Workload, int]:
        users = [layer for layer in model if ".py:" in layer.spec.kind]
        ms = device_ms(tuple(layer for layer in model if layer not in users)) + 0.02 * len(users)

        def run() -> None:
            self.now += ms * 1e6

        return run, 1000


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SearchSpace:
    (tmp_path / "my_blocks.py").write_text(BLOCK)
    (tmp_path / "space.yaml").write_text(SPACE)
    monkeypatch.chdir(tmp_path)
    return SearchSpace.load("space.yaml")


def test_it_is_a_candidate_of_a_space_and_goes_through_yaml(space: SearchSpace, tmp_path: Path) -> None:
    assert space.stages[0].kinds == ("my_blocks.py:Gated", "mb4d", "identity")
    arch = space.largest
    arch.save(tmp_path / "largest.yaml")
    back = nas.ArchConfig.load(tmp_path / "largest.yaml")
    assert back.stages == arch.stages and back in space
    space.save(tmp_path / "again.yaml")
    assert SearchSpace.load(tmp_path / "again.yaml") == space


def test_its_weights_are_inherited_from_a_supernet(space: SearchSpace) -> None:
    torch.manual_seed(0)
    net = Supernet(space).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for arch in (space.largest, space.sample(random.Random(1))):
            wide = space.arch([s.widths[-1] for s in space.stages], [[b.kind for b in s.blocks] for s in arch.stages])
            torch.testing.assert_close(subnetwork(net, wide).eval()(x), net(x, space.path(wide)))
            assert subnetwork(net, arch).eval()(x).shape == (2, 10)


def test_its_channels_are_kept_with_those_of_its_stage(space: SearchSpace) -> None:
    block = space.stages[0].candidates[0]
    assert all(along[0][0].role == "dim" for name, along in axes(Layer(block, 8)).items() if "num_batches" not in name)
    net = Supernet(space)
    scores = UnitScores((torch.arange(32.0), torch.arange(48.0)), {})
    arch = space.arch((16, 32), ((block.kind, "mb4d"), (block.kind, "mb3d")))
    model, wide = subnetwork(net, arch, scores), net.get_submodule("stages.0.0.candidates.0")
    assert torch.equal(model.get_parameter("stage1_block1.conv.weight"), wide.get_parameter("conv.weight")[16:])
    assert torch.equal(
        model.get_parameter("stage2_embedding.conv.weight"), net.get_parameter("embeddings.0.conv.weight")[16:, 16:]
    )


def test_what_is_inside_it_keeps_its_first_units_unless_its_module_knows_them() -> None:
    from dataclasses import dataclass
    from typing import ClassVar

    from supernet.blocks.layers import Layout, Run

    class Mlp(torch.nn.Sequential):
        def __init__(self, dim: int) -> None:
            super().__init__(torch.nn.Conv2d(dim, 2 * dim, 1), torch.nn.ReLU(), torch.nn.Conv2d(2 * dim, dim, 1))

    class Known(Mlp):
        @staticmethod
        def unit_layout(spec: "Block") -> Layout:
            inner = (Run("inner", 0, 2 * spec.dim),)
            return {"0.": {0: inner}, "2.weight": {1: inner}}

    @dataclass(frozen=True)
    class Block:
        kind: ClassVar[str] = "mine"
        tokens: ClassVar[bool] = False
        dim: int
        known: bool = False
        narrowest: int = 1
        widest: int = 99

        def __post_init__(self) -> None:
            if not self.narrowest <= self.dim <= self.widest:
                raise ValueError("no such width")

        def module(self, resolution: int) -> torch.nn.Module:
            return Known(self.dim) if self.known else Mlp(self.dim)

    scores = {"dim": torch.arange(8.0), "inner": torch.arange(16.0)}
    for known, inner in ((False, slice(8)), (True, slice(8, 16))):
        wide, narrow = (Layer(Block(dim, known), 4) for dim in (8, 4))
        state = build_layer(wide).state_dict()
        found = cut(state, wide, narrow, scores)
        assert torch.equal(found["0.weight"], state["0.weight"][inner, 4:])
        assert torch.equal(found["2.bias"], state["2.bias"][4:])
    # A block that cannot be wider is built narrower; of one that can be neither nothing is known.
    for narrowest, kept in ((1, slice(4, 8)), (5, slice(4))):
        wide = Layer(Block(8, widest=8, narrowest=narrowest), 4)
        assert sections(wide) == ({"dim": (0, 8)} if narrowest == 1 else {})
        found = cut(state, wide, Layer(Block(4, widest=8), 4), scores)
        assert torch.equal(found["2.bias"], state["2.bias"][kept])


def test_it_has_rows_and_is_searched(space: SearchSpace, tmp_path: Path) -> None:
    table = build_table(GatedDevice(), space, tmp_path / "tables")
    users = {layer: row for layer, row in table.rows.items() if ".py:" in layer.spec.kind}
    assert {(layer.spec.dim, layer.resolution) for layer in users} == {(16, 8), (32, 8), (32, 4), (48, 4)}
    assert all(row.ms == pytest.approx(0.02, abs=1e-4) for row in users.values())
    assert nas.LatencyTable.load(tmp_path / "tables" / "pretended-cpu.csv").rows.keys() == table.rows.keys()

    importance = [{kind: float(".py:" in kind) for kind in space.stages[i].kinds if kind != "identity"} for i, _ in space.slots]
    budget = 0.7 * table.predict_ms(space.largest)
    found = nas.slim(space, importance, lambda arch: -float(sum(arch.widths)), table, budget)
    assert found.ms <= budget
    assert any(".py:" in block.kind for stage in found.arch.stages for block in stage.blocks)


def test_a_table_keeps_its_rows_where_its_file_was_not_asked_for(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = build_table(GatedDevice(), space, tmp_path / "tables")
    csv = tmp_path / "tables" / "pretended-cpu.csv"
    monkeypatch.setattr("supernet.user_block.loaded", {})
    (tmp_path / "my_blocks.py").write_text("raise RuntimeError('this file must not be run')")
    later = nas.LatencyTable.load(csv)
    assert len(later.rows) + len(later.foreign) == len(table.rows)
    assert len(later.foreign) == 4
    before = csv.read_text()
    assert sorted(later.save(tmp_path / "other").read_text().split()) == sorted(before.split())
    both = build_table(Device(), small_space((24,)), tmp_path / "tables")
    assert both.foreign == later.foreign, "another space's build keeps them too"
    assert [c.space for c in both.calibrations] == [*(c.space for c in table.calibrations), "small"]
    assert not contradicted_rows(both), "networks of blocks that are not known say nothing"


@pytest.fixture
def request_for_it(space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """A search in the folder `run`, which ends as soon as the folder is claimed."""

    def begun(work: Work) -> None:
        Path("begun").touch()
        raise SystemExit

    monkeypatch.setattr("nas.search.carry_out", begun)
    table = additive_table(space, "board-cpu").save(tmp_path / "tables")
    return Request(10.0, "board-cpu", (table,), space="space.yaml", out=Path("run"), strategy="optuna")


def searched(request: Request, **more: Any) -> None:
    """Begin a search, as a process of its own does."""
    Path("begun").unlink(missing_ok=True)
    for module in [name for name in sys.modules if name.startswith("metapath_user_")]:
        del sys.modules[module]
    user_block.loaded.pop("my_blocks.py:Gated", None)
    with pytest.raises(SystemExit):
        run_search(request, **more)
    assert Path("begun").exists()


def test_a_file_that_was_edited_is_another_request(request_for_it: Request) -> None:
    searched(request_for_it)
    searched(request_for_it)
    held = json.loads(Path("run/request.json").read_text())
    assert held["blocks"] == {"my_blocks.py": hashlib.sha256(BLOCK.encode()).hexdigest()[:16]}

    Path("my_blocks.py").write_text(BLOCK.replace("torch.sigmoid", "torch.tanh"))
    assert 'run holds another request (blocks {"my_blocks.py": ' in refusal(lambda: searched(request_for_it))
    finished = Finished(Path("run"), held, {}, SearchSpace.load("space.yaml"))
    other = replace(request_for_it, target_ms=9.0, out=Path("other"))
    assert "my_blocks.py is not what run was searched with" in refusal(lambda: searched(other, trained=finished))
    assert not Path("other").exists()

    Path("my_blocks.py").write_text(BLOCK)
    searched(request_for_it)
    searched(other, trained=finished)


def test_a_study_of_an_edited_block_is_another_one(request_for_it: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []

    def named(work: Work) -> None:
        names.append(study_of(work).name)
        Path("begun").touch()
        raise SystemExit

    monkeypatch.setattr("nas.search.carry_out", named)
    for out, gate in (("a", "torch.sigmoid"), ("b", "torch.sigmoid"), ("c", "torch.tanh")):
        Path("my_blocks.py").write_text(BLOCK.replace("torch.sigmoid", gate))
        searched(replace(request_for_it, out=Path(out)))
    assert names[0] == names[1] != names[2]


def test_a_search_without_a_users_block_has_the_request_that_it_had() -> None:
    assert SearchSpace.load("efficientformer-tiny").block_files() == {}


def test_a_training_is_not_gone_on_with_once_its_block_was_edited(space: SearchSpace, tmp_path: Path) -> None:
    arch = replace(space.largest, num_classes=10)
    data = load_data(None, 16, seed=0)
    recipe = replace(RECIPES["quick"], epochs=1, images_per_epoch=64, batch_size=32)
    train_network(arch, data, recipe, Path("trained"), 0)
    held = json.loads(Path("trained/request.json").read_text())
    assert held["blocks"] == {"my_blocks.py": hashlib.sha256(BLOCK.encode()).hexdigest()[:16]}
    Path("trained/request.json").write_text(json.dumps(held | {"blocks": {"my_blocks.py": "another"}}))
    assert "trained holds another request (blocks" in refusal(lambda: train_network(arch, data, recipe, Path("trained"), 0))


def test_it_is_exported(space: SearchSpace) -> None:
    model = nas.build_model(space.largest).eval()
    x = torch.randn(1, 3, 16, 16)
    session = onnxruntime.InferenceSession(onnx_bytes(model, x), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(session.run(None, {"image": x.numpy()})[0]), model(x), atol=1e-4)


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        ("x * x.mean().item()", r"the operations of .*Gated.* cannot be counted, .* such as \.item\(\)"),
        (
            "x + torch.fft.rfft2(x).abs().mean()",
            r"cannot be written as ONNX \(Exporting the operator .*fft_rfft2.*\): write the forward of its blocks with",
        ),
    ],
)
def test_a_forward_that_cannot_be_measured_is_refused_in_one_line(
    forward: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("supernet.user_block.loaded", {})
    (tmp_path / "my_blocks.py").write_text(BLOCK.replace("x + x * torch.sigmoid(self.norm(self.conv(x)))", forward))
    (tmp_path / "space.yaml").write_text(SPACE)
    monkeypatch.chdir(tmp_path)
    space = SearchSpace.load("space.yaml")
    with pytest.raises(InputError, match=said) as refused:
        for model in work_for(space).models.values():
            OrtCpu().onnx(model)
    assert "\n" not in str(refused.value) and not capsys.readouterr().out


def test_it_may_be_handed_to_a_space_in_python() -> None:
    from dataclasses import dataclass
    from typing import ClassVar

    from supernet.space import StageSpace
    from supernet.specs import Identity

    @dataclass(frozen=True)
    class Scaled:
        kind: ClassVar[str] = "scaled"
        tokens: ClassVar[bool] = False
        dim: int

        def module(self, resolution: int) -> torch.nn.Module:
            return torch.nn.Conv2d(self.dim, self.dim, 1)

    space = SearchSpace("scaled", 16, 10, (StageSpace((16,), 2, 1, (Scaled(16), Identity(16))),))
    assert isinstance(build_layer(Layer(Scaled(16), 8)), torch.nn.Conv2d)
    assert nas.build_model(space.largest)(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


PICKY = """
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Picky:
    dim: int
    ratio: float = 0.5

    def __post_init__(self):
        if self.dim % 3:
            raise ValueError("three groups")

    def module(self, resolution):
        return nn.Conv2d(self.dim, self.dim, 1, groups=3)
"""


def test_a_width_that_it_refuses_in_its_own_words_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("picky.py").write_text(PICKY)
    stage = "{{stride: 2, widths: {}, depth: 1, candidates: ['picky.py:Picky', identity]}}"
    text = f"{{{{name: a, image_size: 16, num_classes: 3, stages: [{stage}]}}}}"
    Path("picky.yaml").write_text(text.format([24, 32, 48]))
    with pytest.raises(InputError, match=r"'picky\.py:Picky' fails with ValueError \(three groups\) at width 32"):
        SearchSpace.load("picky.yaml")
    acting = PICKY.replace("ratio: float = 0.5", "act: str = 'gelu'").replace("self.dim % 3", "self.act == 'tanhh'")
    Path("acting.py").write_text(acting)
    text_of_acts = text.replace("picky.py", "acting.py").replace("stride: 2,", "stride: 2, activations: {acts},")
    refusals = {"[gelu, tanhh]": r"fails with ValueError \(three groups\) with act tanhh", "[[gelu]]": "must be names"}
    for acts, words in refusals.items():
        Path("acting.yaml").write_text(text_of_acts.format([24], acts=acts))
        with pytest.raises(InputError, match=words):
            SearchSpace.load("acting.yaml")
    Path("picky.yaml").write_text(text.format([24, 48]))
    around = SearchSpace.around(SearchSpace.load("picky.yaml").largest, width_shares=(0.66,))
    assert around.stages[0].widths == (24, 48), "32, which would be nearer, it cannot have"


def test_a_knob_of_many_digits_finds_its_row_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("picky.py").write_text(PICKY)
    entry = "{kind: 'picky.py:Picky', ratio: 1.3333333333333333}"
    stages = f"[{{stride: 2, widths: [24], depth: 1, candidates: [{entry}, identity]}}]"
    Path("picky.yaml").write_text(f"{{name: a, image_size: 16, num_classes: 3, stages: {stages}}}")
    space = SearchSpace.load("picky.yaml")
    rows = {layer: Row(1.0, 0.9, 1.1, "slope") for layer in measured_layers(space.layers())}
    path = LatencyTable("board-cpu", rows).save(tmp_path / "tables")
    assert LatencyTable.load(path, any_form=True).rows.keys() == rows.keys()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing.py:Gated", "missing.py, which is not there"),
        ("my_blocks.py:Other", "Other of my_blocks.py is not a block"),
        ("my_blocks.py:GatedModule", "GatedModule of my_blocks.py is not a block"),
        ("gated", "unknown block kind 'gated'"),
    ],
)
@pytest.mark.usefixtures("space")
def test_what_is_no_block_is_refused(kind: str, words: str) -> None:
    document = {"name": "x", "image_size": 16, "num_classes": 10, "stages": [{"width": 16, "stride": 2, "blocks": [kind]}]}
    with pytest.raises(InputError) as refused:
        ArchConfig.from_dict(document, "the network file x.yaml")
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_subclass_of_a_built_in_block_is_deployed_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("doubled.py").write_text(SUBCLASS)
    found = {
        "name": "own",
        "image_size": 16,
        "num_classes": 3,
        "stages": [{"width": 8, "stride": 4, "blocks": ["doubled.py:Doubled"]}],
    }
    arch = ArchConfig.from_dict(found, "the test")
    (block,) = (layer for layer in arch.layers() if layer.spec.kind == "doubled.py:Doubled")
    assert not has_forms(block) and has_forms(Layer(MB4D(8), 4))
    model = build_model(arch).eval()
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(deployed(model, arch)(image), model(image))
    copied, own = deployed_layer(model.stage1_block1, block), model.stage1_block1
    assert type(copied) is type(own) and copied is not own
