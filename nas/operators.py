"""Where a network's time goes: the operators that ONNX Runtime really runs, by layer and by kind.

ONNX Runtime fuses, reorders and renames what was exported. Its own trace of a run says which operators are left and how long
each takes. A trace explains a latency; the latency itself is measured without it, because tracing costs time:

- inside each operator's own figure, one to two microseconds whatever the operator does. A chain of operators that do nothing
  tells how much on this machine, and that is taken off every operator;
- between operators, and by whatever else the traced runs were slower. So the rest is scaled to the latency measured without
  tracing: the parts sum to that.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from nas.profilers.ort_session import OrtModel, pinned
from supernet.errors import InputError, first_line

Model = bytes | Path  # ONNX; a path where weights may lie in files beside it

WARM_UP_RUNS = 5
MIN_RUNS, MAX_RUNS = 12, 200
TRACE_S = 1.0  # traced runs are repeated until about this long has passed
NOTHING_OPERATORS = 200  # of the chain that tells what tracing costs

MEMORY_BOUND = 4.0
"""FLOP (two a multiply-add) per byte of inputs, weights and outputs, each moved once, below which an operator counts as
memory-bound. Reshapes, sums, norms, pools and activations have no multiply-adds, so 0; a depthwise 3x3 convolution in fp32 has
2.2, a classifier at batch 1 0.5, a 1x1 convolution from 48 to 192 channels 19."""
CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv")
PRODUCTS = ("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "TransposeMatMul")
OTHER_MULTIPLY_ADDS = (
    *("Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "ConvTranspose", "Einsum", "DeformConv"),
    *("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
    *("MatMulNBits", "LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"),
)
"""Operators with multiply-adds that their shapes in a trace do not tell; they count as not memory-bound."""

SCOPE_DEPTHS = (1, 2, 3, 4)
FEW_LAYERS = 8  # a foreign model whose scopes make fewer layers than this is looked into one scope deeper
SCOPED = 0.25  # of the nodes must have scopes for them to mean layers; the runtime adds up to two nodes for each one
ELSEWHERE = "(no scope)"


@dataclass(frozen=True)
class Node:
    """One operator of the optimised graph.

    `traced_us` is its time in a trace, the mean of the middle half of the runs (a trace has whole microseconds only).
    `macs` are its multiply-adds (None: its shapes do not tell), `moved_bytes` its inputs, weights and outputs, each once.
    """

    name: str
    operator: str
    traced_us: float
    macs: int | None
    moved_bytes: int

    @property
    def memory_bound(self) -> bool:
        return self.macs == 0 or (self.macs is not None and 2 * self.macs < MEMORY_BOUND * self.moved_bytes)


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds and share of a layer; `operators` are the milliseconds of each kind of operator in it, largest first."""

    name: str
    ms: float
    share: float
    operators: dict[str, float]


@dataclass(frozen=True)
class OperatorTime:
    """Milliseconds, share and count of one kind of operator."""

    operator: str
    ms: float
    share: float
    count: int


@dataclass(frozen=True)
class Breakdown:
    """Where the milliseconds of one call go. Layers are in execution order, operators are sorted by time.

    `ms` is the latency without tracing, which layers and operators sum to; `traced_ms` is the plain sum of the trace.
    `memory_bound_share` is the share of time in operators below MEMORY_BOUND, `without_macs_share` in those of them that have
    no multiply-adds at all. `layers` is empty where the model's nodes have no scopes.
    """

    ms: float
    traced_ms: float
    layers: tuple[LayerTime, ...]
    operators: tuple[OperatorTime, ...]
    memory_bound_share: float
    without_macs_share: float


def bound_model(model: Model, name: str, trace_prefix: str | None = None) -> OrtModel:
    """Return any ONNX model as a workload with one thread, tried once.

    Raises:
        InputError: ONNX Runtime cannot load or run the model, or one of its inputs cannot be filled; `name` says which model.
    """
    try:
        found = OrtModel(model, trace_prefix=trace_prefix)
    except ValueError as error:
        raise InputError(f"{name} cannot be timed: {error}") from error
    except Exception as error:  # ONNX Runtime has no common base for what invalid models raise
        raise InputError(f"ONNX Runtime cannot load {name} ({first_line(error)}): give a valid model") from error
    try:
        found()
    except Exception as error:
        raise InputError(f"ONNX Runtime cannot run {name} ({first_line(error)}): give a model that runs") from error
    return found


def trace_model(model: Model, name: str) -> list[Node]:
    """Run a model under ONNX Runtime's profiler, on one core, and return its operators in execution order.

    Raises:
        InputError: the model cannot be loaded or run.
    """
    with tempfile.TemporaryDirectory() as folder, pinned():
        run = bound_model(model, name, str(Path(folder) / "trace"))
        started, runs = time.perf_counter(), 0
        while runs < WARM_UP_RUNS + MIN_RUNS or (time.perf_counter() - started < TRACE_S and runs < MAX_RUNS):
            run()
            runs += 1
        events = json.loads(Path(run.session.end_profiling()).read_text(encoding="utf-8"))
    return read_trace(events, WARM_UP_RUNS + 1)  # the session was tried once, too


def read_trace(events: Sequence[Mapping[str, Any]], warm_up: int) -> list[Node]:
    """Return the operators of a Chrome trace of ONNX Runtime in execution order, its first `warm_up` runs left out.

    What runs inside another operator (the branches of an If, the body of a Loop) is part of that operator.

    Raises:
        InputError: the trace does not hold that many runs, or its runs differ in their operators.
    """
    runs: list[list[Mapping[str, Any]]] = []
    current: list[Mapping[str, Any]] = []
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            current.append(event)
        elif event.get("name") == "model_run":
            runs.append(_outermost(current))
            current = []
    runs = runs[warm_up:]
    names = [[str(event["name"]).removesuffix("_kernel_time") for event in run] for run in runs]
    if not runs or any(other != names[0] for other in names):
        raise InputError("ONNX Runtime's trace of this model has no two runs alike, so its operators cannot be told apart")
    nodes = []
    for name, *same in zip(names[0], *runs, strict=True):
        arguments = same[0]["args"]
        inputs, outputs = (_tensors(arguments.get(f"{side}_type_shape", [])) for side in ("input", "output"))
        macs, moved_bytes = _work(arguments["op_name"], inputs, outputs)
        nodes.append(Node(name, arguments["op_name"], _middle_mean([e["dur"] for e in same]), macs, moved_bytes))
    return nodes


def _outermost(events: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the node events of one run that do not run inside another, by start."""
    found: list[Mapping[str, Any]] = []
    end = -math.inf
    # An operator and the first one inside it may start in the same microsecond; the outer one takes longer.
    for event in sorted(events, key=lambda e: e["ts"]):
        inside = event["ts"] < end and event["ts"] + event["dur"] <= end
        if inside:
            continue
        if found and event["ts"] == found[-1]["ts"] and found[-1]["dur"] > 0:
            found.pop()
        found.append(event)
        end = event["ts"] + event["dur"]
    return found


def _middle_mean(durations: Sequence[int]) -> float:
    """Return the mean of the middle half: as robust as a median is here, and finer than the whole numbers it is given."""
    ordered = sorted(durations)
    cut = len(ordered) // 4
    middle = ordered[cut : len(ordered) - cut]
    return sum(middle) / len(middle)


def _tensors(entries: Sequence[Mapping[str, Sequence[int]]]) -> list[tuple[str, tuple[int, ...]]]:
    """Return type and shape of each tensor of a trace's `[{"float": [1, 3, 224, 224]}, ...]`."""
    return [(kind, tuple(shape)) for entry in entries for kind, shape in entry.items()]


_BYTES = {"float": 4, "float16": 2, "bfloat16": 2, "double": 8, "int64": 8, "uint64": 8, "int32": 4, "uint32": 4, "int16": 2}


def _work(
    operator: str, inputs: Sequence[tuple[str, tuple[int, ...]]], outputs: Sequence[tuple[str, tuple[int, ...]]]
) -> tuple[int | None, int]:
    """Return the multiply-adds of an operator (None: not known) and the bytes that it moves at least."""
    moved = sum(math.prod(shape) * _BYTES.get(kind, 1) for kind, shape in [*inputs, *outputs])
    if operator not in (*CONVOLUTIONS, *PRODUCTS, *OTHER_MULTIPLY_ADDS):
        return 0, moved
    shapes = [shape for _, shape in inputs]
    if not outputs or not shapes or operator in OTHER_MULTIPLY_ADDS:
        return None, moved
    out = outputs[0][1]
    if operator in CONVOLUTIONS:
        if len(shapes) < 2 or len(shapes[1]) < 3:
            return None, moved
        return math.prod(out) * math.prod(shapes[1][1:]), moved
    if not out or not math.prod(out):
        return None, moved
    # MatMul may broadcast either factor; the left one of the others, which may be transposed, meets every column.
    macs = math.prod(out) * shapes[0][-1] if operator == "MatMul" else math.prod(shapes[0]) * out[-1]
    if not any(len(shape) >= 2 for shape in shapes[1:]):
        # The weight was packed beforehand and is not among the inputs any more.
        moved += macs // math.prod(out) * out[-1] * _BYTES.get(inputs[0][0], 1)
    return macs, moved


def tracing_cost_us() -> float:
    """Return the microseconds that tracing adds to every operator's own time on this machine."""
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [helper.make_node("Neg", [f"x{n}"], [f"x{n + 1}"], name=f"n{n}") for n in range(NOTHING_OPERATORS)]
    ends = [helper.make_tensor_value_info(f"x{n}", float32, [8]) for n in (0, NOTHING_OPERATORS)]
    graph = helper.make_graph(nodes, "nothing", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    traced = trace_model(model.SerializeToString(), "a chain of operators")
    return sum(node.traced_us for node in traced) / len(traced)


def own_layers(nodes: Sequence[Node], layers: Collection[str]) -> list[str]:
    """Return the layer of every node of a network of ours, by the scope of its name that is a layer (`/stem/stem.1/Relu` is the
    stem's).

    Nodes that ONNX Runtime adds have no scope: changes of memory layout (ReorderInput, ReorderOutput, Reshape around a Gemm),
    and sums fused with the norm after them (SkipLayerNormalization). They prepare the input of what runs next, so they
    belong to its layer; after the last node with a scope, to that one's.
    """
    return _carried_back([next((part for part in node.name.split("/") if part in layers), None) for node in nodes])


def foreign_layers(nodes: Sequence[Node]) -> list[str]:
    """Return the layer of every node of a model that is not ours, by as many scopes of the nodes' names as make eight layers.

    `/stages/stages.0/stages.0.1/conv/Conv` has the scopes `stages.0.1`, `conv`. Nodes without a scope belong to the layer that
    runs next. Empty where few nodes have scopes.
    """
    scopes = [_scopes(node.name) for node in nodes]
    if sum(bool(s) for s in scopes) < SCOPED * len(nodes):
        return []
    found: list[str] = []
    for depth in SCOPE_DEPTHS:
        found = _carried_back(["/".join(s[:depth]) or None for s in scopes])
        if len(set(found)) >= FEW_LAYERS:
            break
    return found


def _scopes(name: str) -> list[str]:
    """Return the modules that a node's name goes through, without what ONNX Runtime appends to a fused node's name.

    Of `stages`, `stages.0` only the inner one says anything.
    """
    parts = [part for part in name.split("/") if part and not part.endswith("Fusion")]
    return [part for part, inner in itertools.pairwise(parts) if not inner.startswith(f"{part}.")]


def _carried_back(labels: Sequence[str | None]) -> list[str]:
    """Give what has no label the next one's, and what comes after all labels the last one's."""
    last = next((label for label in reversed(labels) if label is not None), ELSEWHERE)
    found = []
    for label in reversed(labels):
        last = label if label is not None else last
        found.append(last)
    return found[::-1]


def break_down(nodes: Sequence[Node], labels: Sequence[str], ms: float, cost_us: float, order: Sequence[str] = ()) -> Breakdown:
    """Sum nodes by layer and by kind of operator.

    Args:
        nodes: what was traced, in execution order.
        labels: the layer of each node; empty where there are none.
        ms: the latency without tracing, which the parts are scaled to.
        cost_us: what tracing added to every node's time.
        order: the names of all layers, where known: those without a node are listed with 0 ms.
    """
    net_us = [max(0.0, node.traced_us - cost_us) for node in nodes]
    if not sum(net_us):  # nothing but operators too short to tell: they are all alike
        net_us = [1.0] * len(nodes)
    scale = ms / sum(net_us)
    times = [us * scale for us in net_us]
    layers: dict[str, dict[str, float]] = {name: {} for name in order}
    for label, node, part in zip(labels, nodes, times, strict=bool(labels)):
        inside = layers.setdefault(label, {})
        inside[node.operator] = inside.get(node.operator, 0.0) + part
    kinds: dict[str, float] = {}
    for node, part in zip(nodes, times, strict=True):
        kinds[node.operator] = kinds.get(node.operator, 0.0) + part
    counts = Counter(node.operator for node in nodes)
    return Breakdown(
        ms=ms,
        traced_ms=sum(node.traced_us for node in nodes) / 1e3,
        layers=tuple(
            LayerTime(name, sum(inside.values()), sum(inside.values()) / ms, dict(_largest_first(inside)))
            for name, inside in layers.items()
        ),
        operators=tuple(OperatorTime(kind, part, part / ms, counts[kind]) for kind, part in _largest_first(kinds)),
        memory_bound_share=sum(t for node, t in zip(nodes, times, strict=True) if node.memory_bound) / ms,
        without_macs_share=sum(t for node, t in zip(nodes, times, strict=True) if node.macs == 0) / ms,
    )


def _largest_first(times: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(times.items(), key=lambda item: -item[1])


def profile_operators(model: Model, name: str, ms: float, layers: Sequence[str] | None) -> Breakdown:
    """Trace a model and say where its `ms` milliseconds go; `layers` are its layers' names if it is a network of ours.

    Raises:
        InputError: the model cannot be loaded or run.
    """
    nodes = trace_model(model, name)
    labels = foreign_layers(nodes) if layers is None else own_layers(nodes, layers)
    return break_down(nodes, labels, ms, tracing_cost_us(), layers or ())


def grouped(breakdown: Breakdown, kinds: int) -> tuple[list[str], Callable[[LayerTime], list[float]]]:
    """Return the names of the `kinds` kinds of operator that take longest, then `other`, and a function that splits a
    layer's milliseconds among them."""
    chosen = [kind.operator for kind in breakdown.operators[:kinds]]
    rest = len(breakdown.operators) > kinds

    def split(layer: LayerTime) -> list[float]:
        parts = [layer.operators.get(kind, 0.0) for kind in chosen]
        return [*parts, max(0.0, layer.ms - sum(parts))] if rest else parts

    return [*chosen, "other"] if rest else chosen, split
