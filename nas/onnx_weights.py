"""ONNX models without their large weights, and random ones in their place: what is timed need not be carried or kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, numpy_helper

from nas.profilers.ort_session import made_weights

LARGE = 256  # elements; a weight of more is left out


def without_weights(data: bytes) -> tuple[bytes, list[dict[str, Any]]]:
    """Return an ONNX model whose large weights are left out, and what they are: name, dtype, shape, standard deviation.

    What has one value a channel stays, whatever its size: norms, biases, and the depthwise 1x1 convolutions of deploy forms.
    Their values (ones, or one less layer scale) are no noise around zero; nor are others that stay.
    """
    model = onnx.load_from_string(data)
    left_out = []
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= max([LARGE, *tensor.dims]):
            continue
        if tensor.data_type not in (TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8):
            continue
        array = numpy_helper.to_array(tensor)
        is_noise = np.isfinite(array).all() and abs(array.mean()) < array.std() / 2
        if tensor.data_type == TensorProto.FLOAT and not is_noise:
            continue  # the mask of an attention, a divisor
        dtype = str(array.dtype)
        left_out.append({"name": tensor.name, "dtype": dtype, "shape": list(array.shape), "std": round(float(array.std()), 6)})
        tensor.ClearField("float_data")
        tensor.ClearField("int32_data")
        tensor.raw_data = b""
        external_data_helper.set_external_data(tensor, location="made-on-the-device", offset=0, length=array.nbytes)
        tensor.ClearField("raw_data")
    return model.SerializeToString(), left_out


def with_weights(data: bytes, left_out: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the ONNX model whose large weights were left out, with random ones like them."""
    model, weights = onnx.load_from_string(data), made_weights(left_out)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights.pop(tensor.name), tensor.name))
    return model.SerializeToString()
