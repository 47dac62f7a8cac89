"""Static quantisation to int8 for ONNX Runtime: the graph, the images that give its ranges, and what it costs in accuracy.

What is computed in int8, and how (benchmarks/int8.py prints what it costs):

- Convolutions, linear layers and products with weights. Residual sums, pooling and layer scale stay float, and so do the
  depthwise 1x1 convolutions that a deploy form has in their place: what passes them is the sum that goes through the whole
  network. In attention, softmax, the heads' talk and the products of activations with activations stay float too: most values
  are near zero, where 8 bits have few steps. A shortcut that a deploy form folds into a depthwise 3x3 convolution
  (EfficientViT's blocks) is part of that convolution, and so in int8.
- GELU between two of them is x * sigmoid(1.702 x) (Hendrycks and Gimpel, arXiv 1606.08415), off by at most 0.02, about one
  step of 8 bits: of 256 inputs the sigmoid is a table, and the product an int8 one.
- Weights have a scale for each output channel, activations one for each tensor; their ranges leave a ten-thousandth of the
  values out, which a few outliers would otherwise stretch (Wu et al., arXiv 2004.09602).
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nas.about import INPUT
from nas.data import ImageData, Images, normalise
from nas.progress import progress, say
from supernet.errors import FULL, InputError

Array = npt.NDArray[Any]

IN_INT8 = ["Conv", "Gemm", "MatMul"]
WITHIN = 99.99  # per cent of an activation's values that its range holds
CALIBRATION_IMAGES = 128


def quantised(model: bytes, inputs: Sequence[Array]) -> bytes:
    """Return an ONNX model quantised statically to int8: QDQ form, uint8 activations, int8 weights per output channel.

    Latency tables of int8 are measured on the graphs that this function writes.

    Args:
        model: has one input.
        inputs: float32 arrays of its shape, which give the ranges of the activations; each is asked for once, in order.

    Raises:
        InputError: there is no room for the temporary files that ONNX Runtime's quantiser needs.
    """
    return gelu_by_table(quantised_products(model, inputs))


def quantised_products(model: bytes, inputs: Sequence[Array]) -> bytes:
    """Do the same, with GELU left as it is."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """One input at a time, so that the activations of all of them are never in memory at once."""

        def __init__(self, name: str) -> None:
            self.name = name
            self.set_range(0, len(inputs))

        def __len__(self) -> int:
            return len(inputs)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.rows = iter(range(start_index, end_index))

        def get_next(self) -> dict[str, Array] | None:
            row = next(self.rows, None)
            if row is None:
                return None
            tick(1)
            return {self.name: inputs[row]}

    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),  # its own reports
            # One input is a table's, whose build has its own line and opens hundreds of models.
            progress("calibration", len(inputs)) if len(inputs) > 1 else contextlib.nullcontext(lambda amount: None) as tick,
        ):
            warnings.simplefilter("ignore")
            plain, prepared, result = (Path(folder) / name for name in ("plain.onnx", "prepared.onnx", "result.onnx"))
            plain.write_bytes(model)
            quant_pre_process(plain, prepared, skip_symbolic_shape=True)  # batch norms into convolutions
            graph = onnx.load(prepared).graph
            shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
            quantize_static(
                prepared,
                result,
                Reader(graph.input[0].name),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=IN_INT8,
                nodes_to_quantize=[n.name for n in graph.node if _in_int8(n, shapes)],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.Percentile,
                extra_options={"CalibPercentile": WITHIN, "CalibStridedMinMax": 1},
            )
            return with_float_sums(result.read_bytes())
    except OSError as error:
        why = (
            f"quantisation cannot write its temporary files in {tempfile.gettempdir()} ({error.strerror or error}): make room "
            "there, or set TMPDIR to another folder"
        )
        raise (OSError(error.errno, why) if error.errno in FULL else InputError(why)) from error


def _in_int8(node: Any, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Say whether a node is a product with weights whose result is to be one of int8; `shapes` are the constants'."""
    if node.op_type not in IN_INT8 or node.input[1] not in shapes:
        return False
    if node.op_type != "Conv":
        return True
    depthwise_1x1 = shapes[node.input[1]][1:] == (1, 1, 1)
    return not depthwise_1x1 and "/talk" not in node.name  # talking_head1 and 2, in the deploy form talk1 and 2


def with_float_sums(model: bytes) -> bytes:
    """Return a quantised ONNX model in which what reads a sum in float reads the sum itself, and whose logits are float: of 256
    values two classes would often have the same, and the range that is left out would be that of the surest.

    Where one reader of a tensor is a product in int8, ONNX Runtime's quantiser gives all its readers the values rounded to 8
    bits. What a product in int8 gives stays as it is: it leaves that product in 8 bits.
    """
    import onnx

    proto = onnx.load_from_string(model)
    maker = {name: node for node in proto.graph.node for name in node.output}

    def made_by(name: str, kind: str) -> Any:
        node = maker.get(name)
        return node if node is not None and node.op_type == kind else None

    for node in proto.graph.node:
        in_float = node.op_type == "Conv" and made_by(node.input[1], "DequantizeLinear") is None
        if not in_float and node.op_type not in ("Add", "Sub", "AveragePool", "LayerNormalization"):
            continue
        for at, name in enumerate(node.input):
            rounded = made_by(name, "DequantizeLinear")
            quantisation = rounded and made_by(rounded.input[0], "QuantizeLinear")
            if quantisation and made_by(quantisation.input[0], "Add"):
                node.input[at] = quantisation.input[0]
    for output in proto.graph.output:
        rounded = made_by(output.name, "DequantizeLinear")
        quantisation = rounded and made_by(rounded.input[0], "QuantizeLinear")
        product = quantisation and maker.get(quantisation.input[0])
        if product and product.op_type in ("Gemm", "MatMul"):
            product.output[0] = output.name
            proto.graph.node.remove(rounded)
            proto.graph.node.remove(quantisation)
    used = {name for node in proto.graph.node for name in node.input}
    for tensor in [tensor for tensor in proto.graph.initializer if tensor.name not in used]:
        proto.graph.initializer.remove(tensor)  # ONNX Runtime warns of each
    return bytes(proto.SerializeToString())


def gelu_by_table(model: bytes) -> bytes:
    """Return a quantised ONNX model in which every GELU between two quantised tensors is x * sigmoid(1.702 x), in nodes that
    ONNX Runtime fuses into a table of 256 entries and an int8 product."""
    import onnx
    from onnx import helper, numpy_helper

    proto = onnx.load_from_string(model)
    graph = proto.graph
    maker = {name: node for node in graph.node for name in node.output}
    users = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[Any] = []
    steps = [
        numpy_helper.from_array(np.array(1 / 256, np.float32), "sigmoid_scale"),
        numpy_helper.from_array(np.array(0, np.uint8), "sigmoid_zero_point"),
    ]
    replaced = False

    def leaves_quantised(name: str) -> bool:
        return bool(users[name]) and all(
            user.op_type == "QuantizeLinear" or (user.op_type == "Reshape" and leaves_quantised(user.output[0]))
            for user in users[name]
        )

    for node in graph.node:
        entering, reshapes = maker.get(node.input[0]) if node.op_type == "Gelu" else None, []
        while entering is not None and entering.op_type == "Reshape":  # of tokens, around a product
            reshapes.append(entering)
            entering = maker.get(entering.input[0])
        if entering is None or entering.op_type != "DequantizeLinear" or not leaves_quantised(node.output[0]):
            nodes.append(node)
            continue
        replaced = True
        quantised_x, scale, zero_point = entering.input
        stretched = np.array(1.702 * numpy_helper.to_array(constants[scale]), np.float32)  # the factor costs nothing here
        graph.initializer.append(numpy_helper.from_array(stretched, f"{node.name}_scale"))

        def add(kind: str, inputs: list[str], result: str, of: str = node.name) -> str:
            nodes.append(helper.make_node(kind, inputs, [result], f"{of}_{kind}_{len(nodes)}"))
            return result

        x = add("DequantizeLinear", [quantised_x, f"{node.name}_scale", zero_point], f"{node.name}_stretched")
        gate = add("Sigmoid", [x], f"{node.name}_sigmoid")
        gate = add("QuantizeLinear", [gate, steps[0].name, steps[1].name], f"{node.name}_gate_quantised")
        gate = add("DequantizeLinear", [gate, steps[0].name, steps[1].name], f"{node.name}_gate")
        # a dequantisation of its own for each user, which is what is fused
        x = add("DequantizeLinear", [quantised_x, scale, zero_point], f"{node.name}_x")
        y = add("Mul", [x, gate], f"{node.name}_product" if reshapes else node.output[0])
        for number, reshape in enumerate(reversed(reshapes), 1):
            y = add("Reshape", [y, reshape.input[1]], f"{node.name}_{number}" if number < len(reshapes) else node.output[0])
    if not replaced:
        return model
    graph.initializer.extend(steps)
    used = {name for node in nodes for name in node.input} | {port.name for port in graph.output}
    del graph.node[:]
    graph.node.extend(node for node in nodes if used.intersection(node.output))
    return bytes(proto.SerializeToString())


def quantise_on(model: bytes, data: ImageData, batch: int, seed: int) -> tuple[bytes, dict[str, Any]]:
    """Return an ONNX model, which takes `batch` images a call, quantised on training images; and what it costs.

    The figures: `accuracy` and `accuracy_fp32`, shares (0 to 1) of the validation images that are right after and before, in
    ONNX Runtime; `validation_images`, `calibration_images`.
    """
    inputs = CalibrationInputs(data, batch, seed)
    say(f"int8: ranges from {inputs.images:,} training images, accuracy on {len(data.val):,} validation images")
    small = quantised(model, inputs)
    # Shuffled: groups of one class would be told apart too easily by a network that multiplexes.
    before, after = onnx_accuracy([model, small], data.val.shuffled(seed), batch)
    figures = {
        "accuracy": after,
        "accuracy_fp32": before,
        "validation_images": len(data.val),
        "calibration_images": inputs.images,
    }
    return small, figures


class CalibrationInputs(Sequence[Array]):
    """Normalised training images, drawn by `seed`, as float32 batches (batch, 3, S, S): `images` of them, or all, and where
    they make no whole batch, a few more than once. Batches are decoded when they are asked for."""

    def __init__(self, data: ImageData, batch: int, seed: int, images: int = CALIBRATION_IMAGES) -> None:
        self.data = data
        self.images = min(images, len(data.train))
        drawn = np.random.default_rng([seed, 8]).choice(len(data.train), self.images, replace=False)
        self.rows = np.resize(drawn, -(-self.images // batch) * batch).reshape(-1, batch)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.rows)

    def __getitem__(self, at: Any) -> Any:
        pixels, _ = self.data.train.batch(torch.from_numpy(self.rows[at]))
        return normalise(pixels).numpy()


def onnx_accuracy(models: Sequence[bytes], images: Images, batch: int) -> list[float]:
    """Return the shares (0 to 1) of images that each of some ONNX models gets right, in ONNX Runtime; `batch` is their own."""
    from nas.onnx_model import onnx_session

    sessions = [onnx_session(model) for model in models]
    right = np.zeros(len(models), int)
    with progress("accuracy", len(images)) as tick:
        for first in range(0, len(images), batch):
            rows = np.resize(np.arange(first, min(first + batch, len(images))), batch)  # the last batch is filled
            count = min(batch, len(images) - first)
            pixels, labels = images.batch(torch.from_numpy(rows))
            x, y = normalise(pixels).numpy(), labels.numpy()
            for at, session in enumerate(sessions):
                right[at] += (session.run(None, {INPUT: x})[0].argmax(1) == y)[:count].sum()
            tick(count)
    return [float(share) for share in right / len(images)]
