"""Which form of each layer is the faster one on this machine: chains of the layer in ONNX Runtime, one thread, side by side."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import TypeVar

import torch
from torch import nn

from nas.measure import input_shape, with_ordinary_values
from nas.onnx_model import onnx_bytes
from nas.profilers.ort_session import OrtModel, pinned
from nas.progress import progress
from supernet.arch import ArchConfig
from supernet.blocks import build_layer
from supernet.deploy import FORMS, Form, default_form, deployed_layer, has_forms
from supernet.specs import Layer

Name = TypeVar("Name", bound=str)

CHAIN = 4  # blocks: what neighbours share is shared here, too
CLEARLY = 0.97  # of the default's time: what is not faster by more may be so by chance


def measured_forms(arch: ArchConfig, batch: int | None = None, rounds: int = 7, seconds: float = 0.2) -> dict[Layer, Form]:
    """Return the form of every layer of a network that has a choice, `forms` of `supernet.deploy.deployed`, for calls of
    `batch` images (None: one, or one group). It takes `rounds` * `seconds` for each such layer,
    and what making its models does."""
    layers = [layer for layer in dict.fromkeys(arch.layers()) if has_forms(layer)]
    found = {}
    with pinned(), progress("forms", len(layers)) as tick:
        for layer in layers:
            found[layer] = measured_form(layer, batch or arch.group_size, rounds, seconds)
            tick(1)
    return found


def measured_form(layer: Layer, batch: int = 1, rounds: int = 7, seconds: float = 0.2) -> Form:
    """Return the form that is clearly faster than the layer's default one, or that one."""
    usual = default_form(layer)
    models = {form: chain(layer, form, batch) for form in FORMS}
    ratios = []
    for number in range(rounds):
        # Opened anew, in turn one and the other first: where its memory happens to lie moves a session's time.
        runs = {form: OrtModel(models[form]) for form in (FORMS if number % 2 else FORMS[::-1])}
        for run in runs.values():
            run()
        times = one_round(runs, seconds)
        ratios.append(times[_other(usual)] / times[usual])
    return _other(usual) if median(ratios) < CLEARLY else usual


def chain(layer: Layer, form: Form, batch: int = 1) -> bytes:
    """Return the ONNX model of blocks of one layer in a row, in this form, with distinct ordinary weights."""
    blocks = with_ordinary_values(nn.Sequential(*(build_layer(layer) for _ in range(CHAIN))).eval(), seed=0)
    module = nn.Sequential(*(deployed_layer(block, layer, form) for block in blocks.children()))
    return onnx_bytes(module, torch.randn(input_shape((layer,), batch)))


def one_round(
    runs: Mapping[Name, Callable[[], object]], seconds: float, clock: Callable[[], float] = perf_counter
) -> dict[Name, float]:
    """Return the median seconds of a call of each, called in turn for so long, at least three times."""
    taken: dict[Name, list[float]] = {name: [] for name in runs}
    gc.disable()
    try:
        end = perf_counter() + seconds
        while perf_counter() < end or len(next(iter(taken.values()))) < 3:
            for name, run in runs.items():
                start = clock()
                run()
                taken[name].append(clock() - start)
    finally:
        gc.enable()
    return {name: median(times) for name, times in taken.items()}


def _other(form: Form) -> Form:
    return "matmul" if form == "conv" else "conv"
