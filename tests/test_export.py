"""The exported file computes what eager computes, or there is none."""

import errno
import json
import math
import os
import platform
import re
import subprocess
import sys
import unicodedata
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from hosts import be_mac
from PIL import Image
from refusals import refusal
from safetensors.torch import save_file
from torch import Tensor, nn

from nas import cli, coreml_package
from nas.about import note, targets_of_file
from nas.data import load_images, normalise
from nas.export import _given_to_coreml, checked_onnx, expectations, export_coreml, export_network, export_torch, torch_program
from nas.int8 import CalibrationInputs, quantised
from nas.job import export_job
from nas.measure import name_of, with_ordinary_values
from nas.onnx_model import onnx_bytes, onnx_session
from nas.pixels import decode
from nas.plan import Work
from nas.profilers import coreml
from nas.profilers.bench import Failed, Plan
from nas.profilers.ort_cpu import OrtCpu
from supernet.arch import ArchConfig, Stage
from supernet.blocks.efficientformer import LAYER_SCALE, LayerScale
from supernet.deploy import deployed
from supernet.errors import InputError
from supernet.model import build_model
from supernet.space import SearchSpace
from supernet.specs import FFN, MB3D, MB4D, AttnFFN, PatchStem, Sandwich, ViT

MB3D_16 = MB3D(16, num_heads=2, key_dim=8, attn_ratio=2)
MAP_HEAD = ArchConfig("map-head", 32, 5, (Stage(8, 4, (MB4D(8),)), Stage(16, 2, (MB4D(16), MB4D(16)))))
TOKEN_HEAD = ArchConfig("token-head", 32, 5, (Stage(8, 4, (MB4D(8),)), Stage(16, 2, (MB4D(16), MB3D_16))))
UNFLAT = ArchConfig(
    "unflat",
    32,
    5,
    (Stage(8, 2, ()), Stage(8, 1, (MB4D(8),)), Stage(16, 2, (MB4D(16), MB3D_16)), Stage(16, 2, (MB3D_16,))),
)
VIT = ArchConfig("vit", 32, 5, (Stage(16, 8, (ViT(16, num_heads=2),), PatchStem(16, 8)),), "class_token")
SANDWICH = ArchConfig("sandwich", 32, 5, (Stage(16, 4, (Sandwich(16, num_heads=2, key_dim=8, window=3),)),), "batch_norm")
ATTN_FFN = ArchConfig(
    "attn-ffn",
    32,
    5,
    (
        Stage(8, 4, (FFN(8),)),
        Stage(16, 2, (FFN(16), AttnFFN(16, num_heads=2, key_dim=8, stride=2), AttnFFN(16, num_heads=2, key_dim=8))),
    ),
)
ODD = UNFLAT.at(45)  # maps of 23, 23, 12 and 6


@pytest.mark.parametrize("arch", [MAP_HEAD, TOKEN_HEAD, UNFLAT, ODD], ids=["map-head", "token-head", "unflat", "odd"])
def test_exported_equals_eager(arch: ArchConfig) -> None:
    model = with_ordinary_values(build_model(arch), seed=1)
    exported, difference = checked_onnx(model, expectations(model, arch.image_size))
    image = torch.randn(1, 3, arch.image_size, arch.image_size, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        expected = model.eval()(image).numpy()
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {"image": image.numpy()})[0]
    assert found.shape == (1, 5)
    assert np.ptp(expected) > 0.01, "else equality would say nothing"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert 0 <= difference <= 1e-4


def test_export_is_of_eval_mode() -> None:
    model = build_model(MAP_HEAD).train()
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    onnx_bytes(model, image)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()), "statistics are untouched"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_refused(value: float, tmp_path: Path) -> None:
    model = with_ordinary_values(build_model(TOKEN_HEAD), seed=1)
    with torch.no_grad():
        model.get_parameter("head.fc.weight")[0, 0] = value
    arch, weights, path = tmp_path / "net.yaml", tmp_path / "model.safetensors", tmp_path / "out" / "model.onnx"
    TOKEN_HEAD.save(arch)
    save_file(model.state_dict(), weights)
    path.parent.mkdir()
    path.write_bytes(b"the last good export")
    with pytest.raises(InputError, match="not finite: nothing is written"):
        export_network(str(arch), weights, path)
    assert path.read_bytes() == b"the last good export", "an earlier file is left as it was"
    assert list(path.parent.iterdir()) == [path], "and nothing lies beside it"


def test_a_file_that_computes_something_else_is_our_fault_and_not_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_ordinary_values(build_model(MAP_HEAD), seed=1)
    other = onnx_bytes(with_ordinary_values(build_model(MAP_HEAD), seed=2), torch.zeros(1, 3, 32, 32))
    monkeypatch.setattr("nas.export.onnx_bytes", lambda *_, **__: other)
    with pytest.raises(Failed, match="differs from eager"):
        checked_onnx(model, expectations(model, 32))
    arch, out = tmp_path / "net.yaml", tmp_path / "m.onnx"
    MAP_HEAD.save(arch)
    with pytest.raises(SystemExit) as ended:
        cli.export([str(arch), "--out", str(out)])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and "please report it" in line
    assert not out.exists()


def test_a_program_that_computes_something_else_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = with_ordinary_values(build_model(MAP_HEAD), seed=1)
    other = torch_program(with_ordinary_values(build_model(MAP_HEAD), seed=2), torch.zeros(1, 3, 32, 32))
    monkeypatch.setattr("nas.export.torch_program", lambda *_, **__: other)
    out = tmp_path / "m.pt2"
    out.write_text("old")
    with pytest.raises(Failed, match="differs from eager"):
        export_torch(model, expectations(model, 32), out, {})
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_a_package_that_computes_something_else_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a Mac, where Core ML runs it: here everything of Core ML is made up."""
    model = with_ordinary_values(build_model(MAP_HEAD), seed=1)
    expected = expectations(model, 32)
    logits = expected[0][1]
    off = 0.06 * max(1.0, float(np.abs(logits).max()))  # a little more than fp16 explains

    def save(path: str) -> None:
        Path(path).mkdir()
        Path(path, "Manifest.json").write_text("new")

    predicted: list[Any] = []

    def load(path: str, compute_units: str) -> SimpleNamespace:
        assert compute_units == "cpu", "where the Neural Engine's compiler would hang or die, the numbers can still be checked"
        assert Path(path, "Manifest.json").read_text() == "new", "what would be written is what is checked"
        return SimpleNamespace(predict=lambda given: predicted.append(given) or {"logits": (logits + off).astype(np.float16)})

    tools = SimpleNamespace(models=SimpleNamespace(MLModel=load), ComputeUnit=SimpleNamespace(CPU_ONLY="cpu"))
    be_mac(monkeypatch)
    monkeypatch.setattr(coreml_package, "convert", lambda *_: SimpleNamespace(user_defined_metadata={}, save=save))
    monkeypatch.setattr(coreml_package, "_make_reproducible", lambda package: None)
    monkeypatch.setattr(coreml_package, "coremltools", lambda: tools)
    out = tmp_path / "m.mlpackage"
    out.mkdir()
    (out / "Manifest.json").write_text("old")
    with pytest.raises(Failed, match="differs from eager"):
        export_coreml(model, expected, out, {})
    assert (out / "Manifest.json").read_text() == "old" and list(tmp_path.iterdir()) == [out]
    off = 0.0
    difference = export_coreml(model, expected, out, {})
    assert difference is not None and difference < 0.01
    given = predicted[-1]["image"]
    assert given.dtype == np.float32 and any(kept is given for kept in _given_to_coreml), "Core ML is not its only owner"
    assert (out / "Manifest.json").read_text() == "new"


def test_what_a_file_holds_is_told_where_there_is_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.export(["searched.yaml", "--out", "searched.yaml/m.onnx"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line
    cli.export(["searched.yaml", "--out", "m.onnx"])
    assert "the file holds random weights" in capsys.readouterr().err


def test_ordinary_values_are_ordinary_and_distinct() -> None:
    model = with_ordinary_values(build_model(UNFLAT), seed=0)
    scales = [module.gamma for module in model.modules() if isinstance(module, LayerScale)]
    assert len(scales) == 8, "two for each block"
    assert all(scale.abs().min() > 1000 * LAYER_SCALE for scale in scales), "none is left at its initial value"
    variances = [b for n, b in model.named_buffers() if n.endswith("running_var")]
    assert variances and all(v.min() > 0 for v in variances)
    shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            assert tensor.isfinite().all()
            shapes[tuple(tensor.shape)].append(tensor)
    assert any(len(tensors) > 2 for tensors in shapes.values()), "there are equal shapes to compare"
    for shape, tensors in shapes.items():
        for at, tensor in enumerate(tensors):
            assert not any(torch.equal(tensor, other) for other in tensors[:at]), f"two equal tensors of shape {shape}"


def test_ordinary_values_follow_the_seed() -> None:
    first, again, other = (with_ordinary_values(build_model(MAP_HEAD), seed) for seed in (0, 0, 1))
    pairs = zip(first.parameters(), again.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)


# -- The command's formats -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A searched and trained network: arch.yaml, result.json, weights that name their classes."""
    monkeypatch.chdir(tmp_path)
    UNFLAT.save("searched.yaml")
    target = {"device": "phone-npu", "target_ms": 1.5, "table": "/home/me/phone-npu.csv", "measured_ms": None}
    Path("result.json").write_text(json.dumps({"targets": [target]}))
    model = with_ordinary_values(build_model(UNFLAT), seed=1)
    save_file(model.state_dict(), "model.safetensors", note(CLASSES))
    return tmp_path


CLASSES = ("daisy", "rose", "tulip", "Löwenzahn", "no, none")


def write(out: str, **given: Any) -> None:
    export_network("searched.yaml", "model.safetensors", Path(out), **given)


def eager(images: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = with_ordinary_values(build_model(UNFLAT), seed=1).eval()(images)
    return logits


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(
    ("arch", "form"),
    [*((arch, "deploy") for arch in (MAP_HEAD, UNFLAT, VIT, ATTN_FFN, SANDWICH)), (UNFLAT, "plain"), (SANDWICH, "plain")],
    ids=lambda value: getattr(value, "name", value),
)
def test_an_open_batch_takes_any_number_of_images(arch: ArchConfig, form: str) -> None:
    model = with_ordinary_values(build_model(arch), seed=1).eval()
    written = deployed(model, arch) if form == "deploy" else model
    exported, _ = checked_onnx(written, expectations(written, 32, "dynamic"), dynamic=True)
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    program = torch_program(written, images(1), dynamic=True).module()
    for count in (1, 2, 5):
        with torch.inference_mode():
            expected = model(images(count)).numpy()
            np.testing.assert_allclose(program(images(count)).numpy(), expected, rtol=0, atol=1e-4)
        found = session.run(None, {"image": images(count).numpy()})[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_every_file_says_what_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("m.onnx")
    write("m.pt2", batch="dynamic")
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list(CLASSES)
    expected = {"device": "phone-npu", "target_ms": 1.5, "table": "phone-npu.csv", "image_size": 32}
    assert json.loads(about["targets"]) == [expected]
    assert (about["image_size"], about["batch"], about["form"]) == ("32", "1", "deploy")
    assert ArchConfig.from_dict(yaml.safe_load(about["arch"]), "the file") == UNFLAT
    # The other file is read where there is nothing but torch.
    torch.save(images(3), "x.pt")
    code = (
        "import sys; sys.modules['nas'] = sys.modules['supernet'] = None\nimport json, torch\ninside = {'metadata.json': ''}\n"
        "program = torch.export.load('m.pt2', extra_files=inside)\nx = torch.load('x.pt', weights_only=True)\n"
        "print(json.dumps([program.module()(x).tolist(), inside['metadata.json']]))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    logits, inside = json.loads(ran.stdout)
    assert json.loads(inside) == {**about, "batch": "dynamic", "form": "plain"}, "the form that tables of that runtime are of"
    np.testing.assert_allclose(logits, eager(images(3)).numpy(), rtol=0, atol=1e-4)
    assert "(N, 3, 32, 32) to (N, 5)" in capsys.readouterr().out


def test_milliseconds_stand_only_in_a_file_of_what_was_timed() -> None:
    devices = ("xeon-cpu", "xeon-cpu-int8", "xeon-cpu-b8", "iphone15pro-npu", "iphone15pro-cpu", "apple-m2-coreml-cpu", "a100")
    usual: dict[str, Any] = {"image_size": 224, "batch": 1, "format": "onnx", "form": "deploy", "int8": False}
    figures = {"target_ms": 9, "predicted_ms": 8, "measured_ms": 7, "image_size": 224}
    targets = [{"device": d, **figures, "batch": 8 if d.endswith("b8") else 1} for d in devices]

    def timed(**given: Any) -> list[str]:
        kept = targets_of_file(targets, **(usual | given))
        assert [t["device"] for t in kept] == list(devices) and all(t["target_ms"] == 9 for t in kept)
        assert all(("predicted_ms" in t) == ("measured_ms" in t) for t in kept)
        return [t["device"] for t in kept if "measured_ms" in t]

    assert timed() == ["xeon-cpu"]
    assert timed(batch=8) == ["xeon-cpu-b8"]
    assert timed(batch="dynamic") == []
    assert timed(int8=True) == ["xeon-cpu-int8"]
    assert timed(format="coreml") == ["iphone15pro-npu", "iphone15pro-cpu", "apple-m2-coreml-cpu"]
    for other in ({"format": "torch"}, {"form": "plain"}, {"form": "fastest"}, {"image_size": 192}):
        assert timed(**other) == []


def test_the_fastest_form_is_what_was_measured_to_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def one_round(runs: Any, seconds: float) -> dict[str, float]:
        asked.append(runs)
        return {"conv": 2.0, "matmul": 1.0}

    monkeypatch.setattr("nas.forms.one_round", one_round)
    write("fastest.onnx", form="fastest", batch="dynamic")
    assert asked
    write("deploy.onnx")
    fastest, deploy = (kinds_of(Path(f"{form}.onnx").read_bytes()) for form in ("fastest", "deploy"))
    assert deploy["AveragePool"] == 2 and fastest["AveragePool"] == 0, "the pool mixer became products"
    about = onnx_session(Path("fastest.onnx").read_bytes()).get_modelmeta().custom_metadata_map
    assert about["form"] == "fastest"


@pytest.mark.coreml
def test_a_core_ml_package_is_whole_and_says_what_was_not_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MAP_HEAD.save("searched.yaml")
    save_file(build_model(MAP_HEAD).state_dict(), "model.safetensors", note(CLASSES))
    write("m.mlpackage")
    found = coreml_package.coremltools().models.MLModel("m.mlpackage", skip_model_load=True)
    assert json.loads(found.user_defined_metadata["classes"]) == list(CLASSES)
    (entering,), (leaving,) = (found.get_spec().description.input, found.get_spec().description.output)
    assert (entering.name, leaving.name) == ("image", "logits")
    assert ("NOT CHECKED" in capsys.readouterr().out) == (platform.system() != "Darwin")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_folder_of_the_users_is_no_package(folder: Path) -> None:
    Path("mine.mlpackage").mkdir()
    Path("mine.mlpackage/thesis.txt").touch()
    assert "left as it is" in refusal(lambda: write("mine.mlpackage"))
    assert Path("mine.mlpackage/thesis.txt").exists()


@pytest.mark.parametrize("out", ["m.onnx", "m.pt2", "m.mlpackage"])
def test_a_full_disk_leaves_the_old_file(out: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if out == "m.mlpackage":  # converting takes seconds and is not what fails
        monkeypatch.setattr(coreml_package, "convert", lambda *_: SimpleNamespace(user_defined_metadata={}, save=full))
        Path(out).mkdir()
    old = Path(out, "Manifest.json") if out == "m.mlpackage" else Path(out)
    old.write_text("old")
    monkeypatch.setattr("supernet.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write(out)
    assert old.read_text() == "old"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")], "nothing half-written"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"out": "m.txt"}, ".onnx or .mlpackage or .pt2"),
        ({"out": "m.onnx", "format": "coreml"}, "ends in .mlpackage"),
        ({"out": "m.onnx", "form": "fast"}, "allowed: deploy, fastest, plain"),
        ({"out": "m.mlpackage", "batch": "dynamic"}, "give a number"),
        ({"out": "m.pt2", "form": "fastest"}, "ends in .onnx, or --form deploy"),
        ({"out": "m.pt2", "int8": True}, "int8 is for ONNX Runtime"),
        ({"out": "m.onnx", "data": Path("photos")}, "add --int8"),
        ({"out": "m.onnx", "int8": True}, "knows 5 classes (daisy, rose, tulip, ...), but digits has 10"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], said: str, folder: Path) -> None:
    assert said in refusal(lambda: write(**given))
    assert not list(folder.glob("m.*x")) and not Path("m.pt2").exists()


def test_weights_of_another_image_size_are_resized(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    UNFLAT.at(48).save("searched.yaml")
    write("m.onnx", form="plain")
    printed = capsys.readouterr()
    assert "(1, 3, 48, 48) to (1, 5)" in printed.out
    assert "2 tensors of model.safetensors are for another image size" in printed.err


def test_the_class_count_is_that_of_the_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    UNFLAT.with_classes(1000).save("searched.yaml")
    write("m.onnx")
    printed = capsys.readouterr()
    assert "to (1, 5)" in printed.out
    assert "says 1000 classes, but model.safetensors knows 5" in printed.err


# -- int8 ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["deploy", "plain"])
@pytest.mark.parametrize("arch", [UNFLAT, VIT, ATTN_FFN, SANDWICH], ids=lambda arch: arch.name)
def test_int8_keeps_the_function_and_leaves_the_rest_float(arch: ArchConfig, form: str) -> None:
    model = with_ordinary_values(build_model(arch), seed=1).eval()
    plain = onnx_bytes(deployed(model, arch) if form == "deploy" else model, images(1))
    small = quantised(plain, list(images(16).numpy()[:, None]))
    graph = onnx.load_from_string(small).graph
    kinds = Counter(node.op_type for node in graph.node)
    attentions = sum(isinstance(layer.spec, (MB3D, ViT, AttnFFN)) for layer in arch.layers())
    assert kinds["Softmax"] == attentions or arch is SANDWICH
    assert arch is not UNFLAT or not kinds["Gelu"]
    maker = {name: node.op_type for node in graph.node for name in node.output}
    maker |= dict.fromkeys((tensor.name for tensor in graph.initializer), "constant")
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    inside = ["DequantizeLinear"] * 2
    for node in graph.node:
        of = [maker.get(name, "") for name in node.input]
        if node.op_type == "Conv":
            is_float = "/talk" in node.name or shapes.get(node.input[1], ())[1:] == (1, 1, 1)
            assert (of[:2] == inside) is not is_float, f"{node.name}: {of}"
            assert not is_float or of[1] == "constant", f"{node.name}: {of}"
        elif node.op_type == "Gemm":
            assert of[:2] == inside, f"{node.name}: {of}"
        elif node.op_type == "QuantizeLinear":
            assert of[0] != "Softmax", node.name
    made = {name: node for node in graph.node for name in node.output}
    rounded = {
        name
        for node in graph.node
        if node.op_type == "DequantizeLinear" and maker.get(node.input[0]) == "QuantizeLinear"
        if maker.get(made[node.input[0]].input[0]) == "Add"
        for name in node.output
    }
    assert bool(rounded) is (arch is not VIT), "sums are rounded where a product in int8 reads them; ViT's are read by norms"
    for node in graph.node:
        assert not rounded.intersection(node.input) or maker.get(node.input[1]) == "DequantizeLinear", (
            f"{node.name}: a float sum"
        )
    floats = [node for node in graph.node if node.op_type == "Conv" and maker[node.input[1]] != "DequantizeLinear"]
    if form == "deploy":  # kept and pooled of MB4D; two talks of AttnFFN, and what enters the layout
        expected = {"unflat": 2 * 2, "vit": 0, "attn-ffn": 2 * 2 + 2, "sandwich": 0}[arch.name]
        assert len(floats) == expected, [node.name for node in floats]
    before, after = onnx_session(plain), onnx_session(small)
    assert maker[graph.output[0].name] == "Gemm", "logits are not rounded to 256 values"
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used, "ONNX Runtime warns of each that is not"
    pairs = [tuple(s.run(None, {"image": x[None]})[0] for s in (before, after)) for x in images(32).numpy()]
    expected, found = (np.concatenate(logits) for logits in zip(*pairs, strict=True))
    assert 0 < np.abs(found - expected).mean() < 0.1 * expected.std()


def test_onnx_runtime_makes_a_table_of_gelu(tmp_path: Path) -> None:
    plain = onnx_bytes(with_ordinary_values(build_model(MAP_HEAD), seed=1), images(1))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "as-run.onnx")
    options.log_severity_level = 3
    small = quantised(plain, [images(1).numpy()])
    onnxruntime.InferenceSession(small, options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "as-run.onnx").graph.node)
    assert kinds["QLinearSigmoid"] == kinds["QLinearMul"] == 3 and not kinds["Gelu"] + kinds["Sigmoid"]


def kinds_of(model: bytes) -> Counter[str]:
    """Count the operators, except those that stand for constants that are equal, as initial values are."""
    return Counter(node.op_type for node in onnx.load_from_string(model).graph.node if node.op_type != "Identity")


FAMILIES = [UNFLAT, VIT, ATTN_FFN, SANDWICH]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("arch", FAMILIES, ids=lambda arch: arch.name)
def test_the_table_s_graph_is_the_exported_one(
    arch: ArchConfig, precision: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole networks of a table (its calibration's), and what nas-export writes by default: the same operators."""
    arch = arch.with_classes(10)
    arch.save("searched.yaml")
    save_file(with_ordinary_values(build_model(arch), seed=1).state_dict(), "model.safetensors")
    monkeypatch.setattr("nas.int8.CalibrationInputs", partial(CalibrationInputs, images=8))  # it is the operators that count
    write("m.onnx", int8=precision == "int8")
    timed = kinds_of(OrtCpu(precision=precision).onnx(tuple(arch.layers())))
    assert timed == kinds_of(Path("m.onnx").read_bytes())
    if arch.name == "unflat":
        assert timed["Sub"] == 0 and timed["AveragePool"] == 2, "the deploy form"
        assert timed["Gelu"] == (0 if precision == "int8" else 4)


@pytest.mark.parametrize("arch", FAMILIES, ids=lambda arch: arch.name)
def test_the_core_ml_table_s_package_is_the_exported_one(
    arch: ArchConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made into packages; that it converts is test_coreml's."""
    given = []

    def save_package(module: nn.Module, example: Tensor, path: Path, *_: Any, **__: Any) -> None:
        if module(example).shape != (1, 5):  # a job's references
            return path.mkdir()
        given.append(kinds_of(onnx_bytes(module, example)))
        raise InputError("enough")

    for module in (coreml, coreml_package):
        monkeypatch.setattr(module, "save_package", save_package)
        monkeypatch.setattr(module, "coremltools", lambda: None)
    arch.save("searched.yaml")
    layers = tuple(arch.layers())
    plan = Plan(pieces=(), networks=(name_of(layers),), rows=(), smallest=name_of(layers), touched_bytes={}, passes=(1,))
    for way in (
        lambda: export_network("searched.yaml", None, Path("m.mlpackage")),
        lambda: coreml.CoreMlMac("npu").open(layers),
        lambda: export_job(
            Path("job"), SearchSpace.around(arch), Work({}, [arch], arch, plan), device="phone-npu", form="coreml"
        ),
    ):
        assert "enough" in refusal(way)
    assert given[0] == given[1] == given[2]


def test_calibration_is_told_of_many_inputs_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """A build quantises hundreds of models, each on one input, and has its own line."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    quantised(onnx_bytes(module, images(1)), [images(1).numpy()])
    assert not capsys.readouterr().err
    quantised(onnx_bytes(module, images(1)), list(images(3).numpy()[:, None]))
    assert "calibration: done" in capsys.readouterr().err


def test_int8_prints_and_keeps_what_it_costs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = UNFLAT.with_classes(10)
    digits.save("searched.yaml")
    model = with_ordinary_values(build_model(digits), seed=1)
    save_file(model.state_dict(), "model.safetensors")
    write("m.onnx", int8=True, batch=8)
    session = onnx_session(Path("m.onnx").read_bytes())
    about = session.get_modelmeta().custom_metadata_map
    figures = json.loads(about["int8"])
    data = load_images(None, 32, 0, score_images=1)
    x = normalise(data.val.batch(torch.arange(len(data.val)))[0]).numpy()
    x = np.concatenate([x, x])[: -(-len(x) // 8) * 8]
    logits = np.concatenate([session.run(None, {"image": part})[0] for part in x.reshape(-1, 8, 3, 32, 32)])[: len(data.val)]
    assert figures["accuracy"] == pytest.approx((logits.argmax(1) == data.val.labels.numpy()).mean(), abs=1e-9)
    assert (figures["validation_images"], figures["calibration_images"]) == (len(data.val), 128)
    assert json.loads(about["classes"]) == [str(digit) for digit in range(10)], "the weights did not say: the data do"
    assert "before quantisation" in capsys.readouterr().out


def test_int8_takes_the_classes_by_name_however_accents_are_written(folder: Path) -> None:
    classes = sorted(unicodedata.normalize("NFD", name) for name in CLASSES)
    for number, name in enumerate(classes):
        place = folder / "photos" / name
        place.mkdir(parents=True)
        for count in range(4):
            Image.new("RGB", (32, 32), (40 * number, 60 * count, 0)).save(place / f"{count}.png")
    said = refusal(lambda: write("m.onnx", int8=True, data=Path("photos")))
    assert f"(number 1 of 5 is {classes[0]!r}, not 'daisy')" in said, "as many classes, in another order"
    known = [unicodedata.normalize("NFC", name) for name in classes]
    save_file(with_ordinary_values(build_model(UNFLAT), seed=1).state_dict(), "model.safetensors", note(known))
    write("m.onnx", int8=True, data=Path("photos"))
    about = onnx_session(Path("m.onnx").read_bytes()).get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == known, "written as the network's weights do"


def test_calibration_draws_training_images_by_the_seed() -> None:
    data = load_images(None, 8, 0, score_images=1)
    first, again, other = (CalibrationInputs(data, 3, seed, images=7) for seed in (0, 0, 1))
    assert len(first) == 3 and first[0].shape == (3, 3, 8, 8), "a batch that is not full is filled"
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


# -- Without this package ------------------------------------------------------------------------------------------------------


def test_the_lines_of_the_page_run_where_nothing_of_ours_is(folder: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
    (lines,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "onnxruntime" in code]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 10, "ten lines, as promised"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is stored lies on its side
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save("rose.jpg", exif=exif)
    stored = np.asarray(Image.open("rose.jpg")).transpose(2, 0, 1)
    upright, lying = (eager(normalise(torch.from_numpy(pixels.copy())[None]))[0] for pixels in (decode("rose.jpg", 32), stored))
    state = with_ordinary_values(build_model(UNFLAT), seed=1).state_dict()
    state["head.fc.bias"] -= (upright + lying) / 2  # so that the network tells the one from the other
    save_file(state, "model.safetensors", note(CLASSES))
    write("flowers.onnx")
    blocked = "import sys\nfor name in ('nas', 'supernet', 'torch', 'onnx'):\n    sys.modules[name] = None\n"
    ran = subprocess.run(
        [sys.executable, "-c", blocked + lines, "flowers.onnx", "rose.jpg"],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        check=True,
    )
    assert ran.stdout.strip() == CLASSES[int((upright - lying).argmax())], "the class of what training saw"
