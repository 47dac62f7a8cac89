"""From a network to a file that a runtime loads, checked against eager before it is returned."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nas.progress import say
from supernet.errors import InputError
from supernet.files import write_atomically
from supernet.model import build_model
from supernet.zoo import load_arch

Array = npt.NDArray[Any]

OPSET = 20
TOLERANCE = 1e-4  # of the largest logit, or absolute where logits are below 1


def onnx_bytes(model: nn.Module, example: Tensor) -> bytes:
    """Return `model` in eval mode as ONNX, for inputs of the example's shape.

    The TorchScript-based exporter is used: for these networks ONNX Runtime arrives at the same optimised graph as from
    the newer one, in a tenth of the time. Latency tables are measured on the graphs that this function writes.
    """
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation, and constants that tracing takes from shapes
        torch.onnx.export(
            model.eval(),
            (example,),
            file,  # type: ignore[arg-type]  # the TorchScript exporter writes to file objects
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
        )
    return file.getvalue()


def quantised(model: bytes, inputs: Sequence[Array]) -> bytes:
    """Return an ONNX model quantised statically to int8: QDQ form, weights per output channel, ranges of the activations
    from `inputs`, a list of float32 arrays of the shape of its only input."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.feeds = iter([{name: array} for array in inputs])

        def get_next(self) -> dict[str, Array] | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, prepared, result = (Path(folder) / name for name in ("plain.onnx", "prepared.onnx", "result.onnx"))
        plain.write_bytes(model)
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)  # batch norms into convolutions
        quantize_static(
            prepared,
            result,
            Reader(onnx.load(plain).graph.input[0].name),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return result.read_bytes()


def export_onnx(model: nn.Module, image_size: int, path: str | Path, batch: int = 1) -> float:
    """Write `model` as ONNX for batches of `batch` images and return its largest difference from eager.

    Raises:
        InputError: eager's logits are not finite, or ONNX Runtime's differ from them by more than 1e-4 (of the largest,
            or absolute where logits are below 1); nothing is written.
    """
    import onnxruntime

    example = torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.eval()(example).numpy()
    if not np.isfinite(expected).all():
        raise InputError("the network's logits are not finite: nothing is written; give the weights of a good training")
    data = onnx_bytes(model, example)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": example.numpy()})[0]
    difference = float(np.abs(found - expected).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):  # not: NaN is refused too
        raise InputError(
            f"the exported network differs from eager by {difference:.2g}, more than {TOLERANCE:g}: nothing is written"
        )
    write_atomically(path, data)
    return difference


def with_ordinary_values(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter and batch-norm statistic an ordinary value, distinct in every tensor, for timing.

    Initial layer scales (1e-5) and equal blocks would let a runtime meet subnormal numbers or merge constants; layer scales
    near 1 would let the values of a deep network leave the range of fp16.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if name.endswith("gamma"):
                tensor.uniform_(0.1, 0.3, generator=generator)
            elif name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("talking_head2.bias"):
                # The values of all positions are summed with it: larger ones would add up to infinity within ten blocks.
                tensor.uniform_(-0.01, 0.01, generator=generator)
            elif tensor.ndim == 1 or name.endswith("attention_biases"):
                tensor.uniform_(-0.5, 0.5, generator=generator)
            else:
                fan_in = tensor[0].numel()
                tensor.normal_(0, fan_in**-0.5, generator=generator)
    return model


def export_network(arch: str, weights: Path | None, out: Path) -> None:
    """Write the network as ONNX to `out` and print what was written; without weights, random ones, and it says so.

    One that multiplexes is written for one full group.
    """
    from nas.checkpoints import load_weights

    config = load_arch(arch)
    torch.manual_seed(0)
    model = build_model(config)
    if weights is None:
        say("no --weights: the file will hold random weights, good for timing only")
    else:
        load_weights(model, weights)
    size, batch = config.image_size, config.group_size
    difference = export_onnx(model, size, out, batch)
    print(f"{out}: ({batch}, 3, {size}, {size}) to ({batch}, {config.num_classes}), within {difference:.1e} of PyTorch")
