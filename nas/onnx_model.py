"""From a network to ONNX, and from ONNX to a session of ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from nas.about import INPUT, OUTPUT
from supernet.errors import InputError, first_line

OPSET = 20


def onnx_bytes(model: nn.Module, example: Tensor, *, dynamic: bool = False) -> bytes:
    """Return `model` in eval mode as ONNX, for inputs of the example's shape; with `dynamic`, for any number of images.

    The TorchScript-based exporter is used: for these networks ONNX Runtime arrives at the same optimised graph as from
    the newer one, in a tenth of the time. Latency tables are measured on the graphs that this function writes.

    Raises:
        InputError: the network has an operation that ONNX lacks.
    """
    file = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints the graph that it cannot write
        warnings.simplefilter("ignore")  # deprecation, and constants that tracing takes from shapes
        try:
            torch.onnx.export(
                model.eval(),
                (example,),
                file,  # type: ignore[arg-type]  # the TorchScript exporter writes to file objects
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={name: {0: "batch"} for name in (INPUT, OUTPUT)} if dynamic else None,
            )
        except torch.onnx.OnnxExporterError as error:
            raise InputError(
                f"this network cannot be written as ONNX ({first_line(error)}): write the forward of its blocks with "
                f"operations that ONNX has in opset {OPSET}"
            ) from error
    return file.getvalue()


def onnx_session(model: bytes) -> Any:
    """Return an ONNX Runtime session on this machine's CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
