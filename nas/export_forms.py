"""The form in which networks are exported and timed for each kind of device. No torch.

A table predicts the form that it was measured on: one of an earlier form would predict other graphs than those that are
exported, measured and verified now, so it is refused, here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from supernet.errors import InputError

ONNX = {
    "fp32": "torchscript, opset 20, deploy form",
    "int8": "torchscript, opset 20, deploy form, static QDQ per channel of products with weights, mixers and logits float",
}
COREML = "mlprogram, iOS 16, fp16 in and out, deploy form"
CUDA = "plain form, torch.compile (default mode, one graph), channels-last, TF32 off"
CUDA_RUNTIME = "torch inductor, CUDA graphs"


def current_form(settings: Mapping[str, Any]) -> str | None:
    """Return the form that is timed now with a table's `runtime` and `precision`; None where this package times no such."""
    match settings.get("runtime"):
        case "onnxruntime":
            return ONNX.get(str(settings.get("precision")))
        case "coreml":
            return COREML
        case runtime if runtime == CUDA_RUNTIME:
            return CUDA
    return None


class EarlierForm(InputError):
    """Measurements are of a form that is no longer exported."""


def require_current_form(what: str, settings: Mapping[str, Any], remedy: str) -> None:
    """Refuse measurements (`what`) whose `settings` name another form in `export` than the current one.

    Raises:
        EarlierForm: it is another form; the message ends in `remedy`.
    """
    was, now = settings.get("export"), current_form(settings)
    if None not in (was, now) and was != now:
        raise EarlierForm(f"{what} was measured on another export form ({was}; now {now}): {remedy}")
