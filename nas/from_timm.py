"""timm's models, where timm is installed."""

from __future__ import annotations

import warnings
from typing import Any

from supernet.errors import InputError, first_line

TIMM = "timm:"  # what a name of timm's begins with


def import_timm() -> tuple[Any, str]:
    """Return timm, or None and why it cannot be imported. A torchvision that does not fit torch raises RuntimeError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import timm
    except Exception as error:
        return None, first_line(error)
    return timm, ""


def timm_with_weights(network: str) -> Any:
    """Return the timm model `timm:NAME` with its published weights.

    Raises:
        InputError: timm is missing, or cannot give it.
    """
    name = network.removeprefix(TIMM)
    timm, why_not = import_timm()
    if timm is None:
        raise InputError(f"{network} needs timm, which is not usable here ({why_not}): pip install timm, or give a file")
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # an unknown name, no pretrained weights, no network: each has its own exception
        raise InputError(
            f"timm cannot give {name} with its weights ({first_line(error)}): give a name of timm.list_pretrained(), or a file"
        ) from error
