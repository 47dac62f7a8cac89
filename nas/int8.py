"""Static quantisation to int8 for ONNX Runtime: the graph, the images that give its ranges, and what it costs in accuracy.

Convolutions, linear layers and products with weights are computed in int8. Everything else stays float, which is both faster
and more exact: a residual sum, a pooling or a layer scale takes one pass over memory in float, but a dequantisation and a
quantisation as well in int8; and in attention the softmax and the products of activations with activations lose most of their few
bits, as most values are near zero. Weights have a scale for each output channel, activations one for each tensor, from the smallest
and the largest value seen. Sources: Jacob et al., CVPR 2018; Krishnamoorthi, arXiv 1806.08342.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nas.data import ImageData, Images, normalise
from nas.progress import progress, say
from supernet.errors import InputError

Array = npt.NDArray[Any]

IN_INT8 = ["Conv", "Gemm", "MatMul"]
CALIBRATION_IMAGES = 256


def quantised(model: bytes, inputs: Iterable[Array]) -> bytes:
    """Return an ONNX model quantised statically to int8: QDQ form, uint8 activations, int8 weights per output channel.

    Latency tables of int8 are measured on the graphs that this function writes.

    Args:
        model: has one input.
        inputs: float32 arrays of its shape, which give the ranges of the activations.

    Raises:
        InputError: there is no room for the temporary files that ONNX Runtime's quantiser needs.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.feeds = ({name: array} for array in inputs)

        def get_next(self) -> dict[str, Array] | None:
            return next(self.feeds, None)

    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain, prepared, result = (Path(folder) / name for name in ("plain.onnx", "prepared.onnx", "result.onnx"))
            plain.write_bytes(model)
            quant_pre_process(plain, prepared, skip_symbolic_shape=True)  # batch norms into convolutions
            quantize_static(
                prepared,
                result,
                Reader(onnx.load_from_string(model).graph.input[0].name),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=IN_INT8,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
            return result.read_bytes()
    except OSError as error:
        raise InputError(
            f"quantisation cannot write its temporary files in {tempfile.gettempdir()} ({error.strerror or error}): make room "
            "there, or set TMPDIR to another folder"
        ) from error


def quantise_on(model: bytes, data: ImageData, batch: int, seed: int) -> tuple[bytes, dict[str, Any]]:
    """Return an ONNX model, which takes `batch` images a call, quantised on training images; and what it costs.

    The figures: `accuracy` and `accuracy_fp32`, shares (0 to 1) of the validation images that are right after and before, in
    ONNX Runtime; `validation_images`, `calibration_images`.
    """
    count = min(CALIBRATION_IMAGES, len(data.train))
    say(f"int8: ranges from {count:,} training images, accuracy on {len(data.val):,} validation images")
    small = quantised(model, calibration_inputs(data, batch, seed))
    # Shuffled: groups of one class would be told apart too easily by a network that multiplexes.
    before, after = onnx_accuracy([model, small], data.val.shuffled(seed), batch)
    figures = {
        "accuracy": after,
        "accuracy_fp32": before,
        "validation_images": len(data.val),
        "calibration_images": count,
    }
    return small, figures


def calibration_inputs(data: ImageData, batch: int, seed: int, images: int = CALIBRATION_IMAGES) -> Iterator[Array]:
    """Yield normalised training images, drawn by `seed`, as float32 batches (batch, 3, S, S): `images` of them, or all, and
    where they make no whole batch, a few more than once."""
    count = min(images, len(data.train))
    drawn = np.random.default_rng([seed, 8]).choice(len(data.train), count, replace=False)
    drawn = np.resize(drawn, -(-count // batch) * batch)  # repeats the first ones at the end
    with progress("calibration", len(drawn)) as tick:
        for rows in drawn.reshape(-1, batch):
            yield normalise(data.train.batch(torch.from_numpy(rows))[0]).numpy()
            tick(batch)


def onnx_accuracy(models: Sequence[bytes], images: Images, batch: int) -> list[float]:
    """Return the shares (0 to 1) of images that each of some ONNX models gets right, in ONNX Runtime; `batch` is their own."""
    from nas.export import onnx_session

    sessions = [onnx_session(model) for model in models]
    right = np.zeros(len(models), int)
    with progress("accuracy", len(images)) as tick:
        for first in range(0, len(images), batch):
            rows = np.resize(np.arange(first, min(first + batch, len(images))), batch)  # the last batch is filled
            count = min(batch, len(images) - first)
            pixels, labels = images.batch(torch.from_numpy(rows))
            x, y = normalise(pixels).numpy(), labels.numpy()
            for at, session in enumerate(sessions):
                right[at] += (session.run(None, {"image": x})[0].argmax(1) == y)[:count].sum()
            tick(count)
    return [float(share) for share in right / len(images)]
