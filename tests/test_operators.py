"""Where the time goes: reading a trace, giving every operator to a layer, sums. No wall-clock figures."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from nas.layer_plot import check_plot_file, plot_layers
from nas.measure import with_ordinary_values
from nas.onnx_model import onnx_bytes
from nas.operators import (
    Node,
    bound_model,
    break_down,
    foreign_layers,
    grouped,
    own_layers,
    profile_operators,
    read_trace,
    trace_model,
)
from supernet.arch import ArchConfig, Stage
from supernet.deploy import deployed
from supernet.errors import InputError
from supernet.model import build_model, count
from supernet.space import SearchSpace, space_names
from supernet.specs import MB3D, MB4D

ARCH = ArchConfig(  # widths of whole memory blocks, so that ONNX Runtime pads no channels
    "mixed",
    32,
    10,
    (
        Stage(32, 4, (MB4D(32), MB4D(32))),
        Stage(48, 2, (MB4D(48), MB3D(48, num_heads=2, key_dim=8), MB3D(48, num_heads=2, key_dim=8))),
    ),
)
LAYERS = [name for name, _ in ARCH.named_layers()]


@pytest.fixture(scope="module")
def model() -> bytes:
    return onnx_bytes(with_ordinary_values(build_model(ARCH), seed=0), torch.randn(1, 3, 32, 32))


@pytest.fixture(scope="module")
def nodes(model: bytes) -> list[Node]:
    return trace_model(model, "mixed")


def kernel(name: str, operator: str, start: int, duration: int, inputs: list[Any], outputs: list[Any]) -> dict[str, Any]:
    """An operator's event as ONNX Runtime writes it."""
    shapes = {"input_type_shape": inputs, "output_type_shape": outputs}
    times = {"ts": start, "dur": duration}
    return {"cat": "Node", "name": f"{name}_kernel_time", **times, "args": {"op_name": operator, **shapes}}


def run_of(start: int, conv_us: int, relu_us: int) -> list[dict[str, Any]]:
    image, maps = {"float": [1, 3, 8, 8]}, {"float": [1, 4, 4, 4]}
    conv_inputs = [image, {"float": [4, 3, 3, 3]}, {"float": [4]}]
    return [
        {"cat": "Node", "name": "/a/conv/Conv_fence_before", "ts": start, "dur": 0, "args": {"op_name": "Conv"}},
        kernel("/a/conv/Conv", "Conv", start, conv_us, conv_inputs, [maps]),
        kernel("/b/act/Relu", "Relu", start + conv_us, relu_us, [maps], [maps]),
        {"cat": "Session", "name": "SequentialExecutor::Execute", "ts": start, "dur": 99, "args": {}},
        {"cat": "Session", "name": "model_run", "ts": start, "dur": 100, "args": {}},
    ]


def test_a_trace_becomes_operators_with_their_work() -> None:
    load = {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 50, "args": {}}
    times = [(900, 900), (10, 3), (12, 5), (11, 4), (500, 4)]  # a warm-up run, and one that was disturbed
    events = [load, *(event for number, (a, b) in enumerate(times) for event in run_of(1000 * (number + 1), a, b))]
    conv, relu = read_trace(events, warm_up=1)
    assert (conv.name, conv.operator, relu.name, relu.operator) == ("/a/conv/Conv", "Conv", "/b/act/Relu", "Relu")
    assert conv.traced_us == 11.5  # the mean of the middle half of 10, 11, 12, 500
    assert relu.traced_us == 4
    assert conv.macs == 4 * 4 * 4 * 3 * 3 * 3
    assert conv.moved_bytes == 4 * (3 * 8 * 8 + 4 * 3 * 3 * 3 + 4 + 4 * 4 * 4)
    assert relu.macs == 0
    assert relu.memory_bound


def test_the_body_of_a_loop_is_part_of_the_loop() -> None:
    one = {"float": [1]}
    events = [
        kernel("inner", "Add", 12, 3, [one, one], [one]),
        kernel("inner", "Add", 16, 3, [one, one], [one]),
        kernel("loop", "Loop", 10, 20, [one], [one]),
        kernel("last", "Neg", 30, 2, [one], [one]),
        {"cat": "Session", "name": "model_run", "ts": 10, "dur": 30, "args": {}},
    ]
    assert [node.name for node in read_trace(events, warm_up=0)] == ["loop", "last"]


def test_a_trace_without_runs_is_refused() -> None:
    with pytest.raises(InputError, match="no two runs alike"):
        read_trace(run_of(0, 5, 5), warm_up=1)


@pytest.mark.parametrize(
    ("operator", "inputs", "outputs", "macs", "bound"),
    [
        ("Conv", [[1, 64, 28, 28], [64, 1, 3, 3], [64]], [1, 64, 28, 28], 64 * 28 * 28 * 9, True),  # depthwise
        ("Conv", [[1, 48, 56, 56], [192, 48, 1, 1], [192]], [1, 192, 56, 56], 192 * 48 * 56 * 56, False),
        ("Gemm", [[49, 448], [1536]], [49, 1536], 49 * 448 * 1536, False),  # the weight is packed away
        ("Gemm", [[1, 448], [1000]], [1, 1000], 448 * 1000, True),  # a classifier reads each weight for one product
        ("Gemm", [[1, 448], [1000, 448], [1000]], [1, 1000], 448 * 1000, True),
        ("FusedMatMul", [[1, 8, 49, 32], [1, 8, 32, 49]], [1, 8, 49, 49], 8 * 49 * 49 * 32, False),
        ("MatMul", [[49, 49], [8, 49, 64]], [8, 49, 64], 8 * 49 * 49 * 64, False),  # the left factor is broadcast
        ("ReorderInput", [[1, 48, 56, 56]], [1, 48, 56, 56], 0, True),
        ("ConvTranspose", [[1, 8, 4, 4], [8, 8, 2, 2]], [1, 8, 8, 8], None, False),
    ],
)
def test_memory_bound_is_few_multiply_adds_for_every_byte(
    operator: str, inputs: list[list[int]], outputs: list[int], macs: int | None, bound: bool
) -> None:
    event = kernel("n", operator, 0, 1, [{"float": shape} for shape in inputs], [{"float": outputs}])
    (node,) = read_trace([event, {"name": "model_run", "ts": 0, "dur": 2}], warm_up=0)
    assert node.macs == macs
    assert node.memory_bound == bound


def test_every_operator_of_a_network_belongs_to_a_layer_and_the_parts_sum_to_its_latency(nodes: list[Node]) -> None:
    labels = own_layers(nodes, LAYERS)
    assert len(labels) == len(nodes)
    assert set(labels) == set(LAYERS)
    assert labels == sorted(labels, key=LAYERS.index), "layers run one after another"
    found = break_down(nodes, labels, 2.5, 0.0, LAYERS)
    assert [layer.name for layer in found.layers] == LAYERS
    assert sum(layer.ms for layer in found.layers) == pytest.approx(2.5)
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    assert sum(kind.ms for kind in found.operators) == pytest.approx(2.5)
    assert sum(kind.count for kind in found.operators) == len(nodes)
    for layer in found.layers:
        assert sum(layer.operators.values()) == pytest.approx(layer.ms)
    assert 0 < found.without_macs_share <= found.memory_bound_share < 1
    assert found.traced_ms == pytest.approx(sum(node.traced_us for node in nodes) / 1e3)


@pytest.mark.parametrize("space", [name for name in space_names() if name.endswith("-tiny")])
def test_every_layer_of_a_network_has_operators_in_the_form_that_is_timed(space: str) -> None:
    """The deploy form has modules within modules: `/stem/stem.0/Conv`."""
    arch = SearchSpace.load(space).largest
    names = [name for name, _ in arch.named_layers()]
    model = deployed(with_ordinary_values(build_model(arch), seed=0), arch)
    labels = own_layers(trace_model(onnx_bytes(model, torch.randn(1, 3, 32, 32)), space), names)
    assert list(dict.fromkeys(labels)) == names, "each has some, and they run one after another"


def test_the_trace_has_the_multiply_adds_of_the_network(nodes: list[Node]) -> None:
    """Up to layer scales that ONNX Runtime turns into convolutions."""
    macs = sum(node.macs or 0 for node in nodes)
    assert count(ARCH).macs <= macs <= 1.02 * count(ARCH).macs


def node(name: str, us: float = 1.0, operator: str = "Neg") -> Node:
    return Node(name, operator, us, 0, 8)


def test_what_the_runtime_adds_belongs_to_the_layer_that_follows() -> None:
    names = [
        "/stem/act2/Relu_output_0_nchwc",
        "ReorderOutput",
        "/block/pool/AveragePool",
        "gemm_input_reshape",
        "/block/fc/Gemm",
    ]
    assert own_layers([node(n) for n in names], ["stem", "block"]) == ["stem", "block", "block", "block", "block"]
    trailing = [node("ReorderInput"), node("/stem/Conv"), node("/unknown/Add"), node("ReorderOutput")]
    assert own_layers(trailing, ["stem", "block"]) == ["stem"] * 4


def test_foreign_models_are_grouped_by_their_scopes() -> None:
    blocks = [f"/stages/stages.{s}/stages.{s}.{b}/{part}/Conv" for s in (0, 1) for b in range(3) for part in ("a", "b")]
    labels = foreign_layers([node(n) for n in ["/stem/conv/Conv", "Reorder", *blocks, "/head/fc/Gemm"]])
    assert labels[:5] == ["stem", "stages.0.0", "stages.0.0", "stages.0.0", "stages.0.1"]
    assert len(set(labels)) == 8
    wrapped = [f"/net/encoder/block{n}/fc/Gemm" for n in range(8)]
    assert foreign_layers([node(n) for n in wrapped])[0] == "net/encoder/block0", "as deep as it takes"
    unnamed = ["node_conv2d", "node_mul/QuickGeluFusion/", "node_linear/MatMulAddFusion", "Reorder", "node_add"]
    assert foreign_layers([node(n) for n in unnamed]) == [], "what ONNX Runtime appends is no scope"


def test_what_tracing_costs_is_taken_off_before_scaling() -> None:
    found = break_down([node("/a/x", 2.0), node("/b/y", 11.0, "Conv")], ["a", "b"], 10.0, cost_us=1.0)
    assert [layer.ms for layer in found.layers] == pytest.approx([10 / 11, 100 / 11])
    assert found.traced_ms == pytest.approx(0.013)
    shorter = break_down([node("/a/x", 0.5), node("/b/y", 11.0)], ["a", "b"], 10.0, cost_us=1.0)
    assert [layer.ms for layer in shorter.layers] == pytest.approx([0, 10]), "never below nothing"
    nothing = break_down([node("/a/x", 0.5), node("/b/y", 0.5)], ["a", "b"], 10.0, cost_us=1.0)
    assert [layer.ms for layer in nothing.layers] == pytest.approx([5, 5])


def test_few_kinds_are_told_apart_and_the_rest_is_other() -> None:
    nodes = [node("/a/x", 5.0, "Conv"), node("/a/y", 3.0, "Gemm"), node("/a/z", 1.0, "Add"), node("/a/w", 1.0, "Mul")]
    found = break_down(nodes, ["a"] * 4, 10.0, 0.0)
    kinds, split = grouped(found, 2)
    assert kinds == ["Conv", "Gemm", "other"]
    assert split(found.layers[0]) == pytest.approx([5, 3, 2])
    assert grouped(found, 4)[0] == ["Conv", "Gemm", "Add", "Mul"]


class Foreign(nn.Sequential):
    """A model that is not ours, without anything that ONNX Runtime could take away."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))


def test_a_foreign_model_can_be_profiled_and_drawn(tmp_path: Path) -> None:
    file = tmp_path / "foreign.onnx"
    file.write_bytes(onnx_bytes(Foreign(), torch.randn(1, 3, 8, 8)))
    found = profile_operators(file, "foreign.onnx", 1.0, None)
    assert sum(layer.ms for layer in found.layers) == pytest.approx(1)
    for name in ("layers.png", "layers.svg"):
        plot_layers(found, "foreign", check_plot_file(tmp_path / name))
        assert (tmp_path / name).stat().st_size > 1000
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("path", "said"), [("layers.gif", "must end in .png"), ("nowhere/layers.png", "cannot be written")])
def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path, path: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_plot_file(tmp_path / path)


def test_a_picture_in_a_folder_that_may_not_be_written_to_is_refused_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(InputError, match=r"\(Read-only file system\): give --plot a file in a folder that may be written to"):
        check_plot_file(tmp_path / "layers.png")


def graph(
    operator: str,
    inputs: dict[str, tuple[int, list[Any]]],
    attributes: dict[str, Any] | None = None,
    out: int = TensorProto.FLOAT,
) -> bytes:
    ports = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    step = helper.make_node(operator, list(inputs), ["y"], **(attributes or {}))
    body = helper.make_graph([step], "g", ports, [helper.make_tensor_value_info("y", out, None)])
    found: onnx.ModelProto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return found.SerializeToString()


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "DOUBLE", "UINT8", "INT32", "INT64", "BOOL"])
def test_inputs_of_many_types_are_filled_and_an_open_batch_is_one(kind: str) -> None:
    model = graph("Cast", {"x": (getattr(TensorProto, kind), ["batch", 4])}, {"to": TensorProto.FLOAT})
    run = bound_model(model, "cast.onnx")
    run()
    assert run.session.get_inputs()[0].shape == ["batch", 4]


def test_several_inputs_are_filled() -> None:
    bound_model(graph("Add", {"a": (TensorProto.FLOAT, [2, 3]), "b": (TensorProto.FLOAT, [1, 3])}), "add.onnx")()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (graph("Relu", {"x": (TensorProto.FLOAT, ["n", 3, "h", "w"])}), "only the batch may be left open"),
        (graph("Identity", {"x": (TensorProto.STRING, [1])}, out=TensorProto.STRING), "is a tensor\\(string\\)"),
        (graph("Reshape", {"x": (TensorProto.FLOAT, [3]), "s": (TensorProto.INT64, [2])}), "cannot run m.onnx"),
        (b"no model", "cannot load m.onnx"),
    ],
)
def test_models_that_cannot_be_timed_are_refused_in_one_line(
    model: bytes, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=said) as refusal:
        bound_model(model, "m.onnx")
    assert "\n" not in str(refusal.value)
    assert capfd.readouterr().err == "", "ONNX Runtime itself says nothing"
