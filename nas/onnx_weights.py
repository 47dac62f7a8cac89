"""ONNX models without their large weights: what is timed need not be carried or kept (see `ort_session.with_weights`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

LARGE = 256  # elements; a weight of more is left out


def without_weights(data: bytes) -> tuple[bytes, list[dict[str, Any]]]:
    """Return an ONNX model whose large weights are left out, and what they are: name, dtype, shape, standard deviation.

    What has one value a channel stays, whatever its size: norms, biases, and the depthwise 1x1 convolutions of deploy forms.
    Their values (ones, or one less layer scale) are no noise around zero; nor are others that stay.
    """
    model = onnx.load_from_string(data)
    left_out, kept = [], []
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.size > max([LARGE, *array.shape]) and _is_noise(tensor.data_type, array):
            std = round(float(array.std()), 6)
            left_out.append({"name": tensor.name, "dtype": str(array.dtype), "shape": list(array.shape), "std": std})
        else:
            kept.append(tensor)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model.SerializeToString(), left_out


def _is_noise(kind: int, array: np.ndarray[Any, Any]) -> bool:
    if kind == TensorProto.FLOAT:  # else it is the mask of an attention, a divisor
        return bool(np.isfinite(array).all() and abs(array.mean()) < array.std() / 2)
    return kind in (TensorProto.INT8, TensorProto.UINT8)
