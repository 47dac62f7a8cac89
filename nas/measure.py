"""What is timed on this CPU: models as sequences of layers, the reference, and whole networks end to end.

A *model* is a sequence of layers that runs as one session: a chain of blocks, a piece of a network, a whole network.
"""

from __future__ import annotations

import hashlib
from functools import cache
from itertools import groupby

import torch
from torch import Tensor, nn

from nas.export import onnx_bytes, with_ordinary_values
from nas.profilers.ort_cpu import OrtModel, pinned
from nas.profilers.timing import Measurement, References, Stopwatch, Visit, summarise
from nas.table import LatencyTable
from supernet.arch import MB3D, MB4D, ArchConfig, Embedding, Head, Layer, Stem, Unflat
from supernet.blocks import build_layer
from supernet.errors import InputError

Model = tuple[Layer, ...]

CACHED: Model = (Layer(MB4D(64), 16),) * 2
STREAMING: Model = (Layer(MB3D(192), 4),) * 4
"""The references that every visit is paired with; a table's sidecar has their milliseconds. The first one's weights, 0.3 MB,
stay in the inner caches; the second one's, 13 MB, do not."""
EMPTY: Model = ()
"""A session that does nothing: the price of a call."""

WHOLE_GOAL = 0.01  # half-width of a whole network's 95 % interval, of its ms
MIN_VISITS, MAX_VISITS = 12, 32
ALONE_MAX_VISITS = 100  # of a session that is measured by itself


@cache
def name_of(model: Model) -> str:
    """Return the name of a model in the samples file."""
    if not model:
        return "empty"
    if isinstance(model[0].spec, Stem) and isinstance(model[-1].spec, Head):
        return "network " + hashlib.sha256(repr(model).encode()).hexdigest()[:16]
    runs = [(str(layer), len(list(same))) for layer, same in groupby(model)]
    return " + ".join(f"{count} x {layer}" if count > 1 else layer for layer, count in runs)


def build_module(model: Model) -> tuple[nn.Module, Tensor]:
    """Return the module of a model, with distinct ordinary weights, and an input for it (batch 1)."""
    generator = torch.Generator().manual_seed(0)
    if not model:
        return nn.Identity(), torch.randn(1, 3, 4, 4, generator=generator)
    module = nn.Sequential(*(build_layer(layer) for layer in model))
    spec, side = model[0]
    if isinstance(spec, Stem):
        shape: tuple[int, ...] = (1, 3, side, side)
    elif getattr(spec, "tokens", False) or isinstance(spec, Unflat):
        shape = (1, side * side, spec.dim)
    else:
        shape = (1, spec.dim_in if isinstance(spec, Embedding) else spec.dim, side, side)
    return with_ordinary_values(module, seed=0), torch.randn(shape, generator=generator)


def session(model: Model, threads: int = 1) -> tuple[OrtModel, int]:
    """Return the session of a model, and the bytes of its ONNX form."""
    data = onnx_bytes(*build_module(model))
    return OrtModel(data, threads), len(data)


def network_session(arch: ArchConfig, threads: int = 1) -> OrtModel:
    """Return the session of a whole network with ordinary weights."""
    return session(tuple(arch.layers()), threads)[0]


def table_reference(table: LatencyTable) -> References:
    """Return what the references take on a table's device, to normalise a measurement to it."""
    try:
        return References(**{name: float(ms) for name, ms in table.meta["reference_ms"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"the table of {table.device} does not say what the references take: build it anew with nas-build-lut"
        ) from error


def stopwatch(threads: int = 1) -> Stopwatch:
    """Return a stopwatch with the two references."""
    return Stopwatch(session(CACHED, threads)[0], session(STREAMING, threads)[0])


def measure_session(run: OrtModel, reference: References | None, threads: int = 1) -> Measurement:
    """Time one session end to end until its 95 % interval is within 1 %, or for 100 visits.

    `reference` is what the references take in the table that the result is to be compared with; without it, what they
    take now, which leaves the result as it was measured.
    """
    with pinned():
        watch = stopwatch(threads)
        visits: list[Visit] = []
        while len(visits) < ALONE_MAX_VISITS:
            visits.append(watch.visit(run))
            if len(visits) >= 2 * MIN_VISITS:
                found = summarise(visits, reference)
                if found.half_width_ms <= WHOLE_GOAL * found.ms:
                    break
    return summarise(visits, reference)
