"""What is timed: models as sequences of layers, the references, and one workload by itself.

A *model* is a sequence of layers that runs as one session: a chain of blocks, a piece of a network, a whole network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nas.profilers.timing import Measurement, References, Stopwatch, Touches, Visit, Workload, median_reference, summarise
from nas.progress import say
from nas.table import LatencyTable
from supernet.arch import ArchConfig
from supernet.blocks import build_layer
from supernet.deploy import deployed_layer
from supernet.errors import InputError
from supernet.specs import MB3D, MB4D, Head, Layer, is_stem

Model = tuple[Layer, ...]

CACHED: Model = (Layer(MB4D(64), 16),) * 2
STREAMING: Model = (Layer(MB3D(192), 4),) * 4
"""The references that every visit is paired with, but a GPU's, which has its own; a table's sidecar has their milliseconds. The
first one's weights, 0.3 MB, stay in the inner caches; the second one's, 13 MB, do not."""
EMPTY: Model = ()
"""A session that does nothing: the price of a call."""

WHOLE_GOAL = 0.01  # half-width of a whole network's 95 % interval, of its ms
SESSION_VISITS = 4  # of one session of what is opened anew again and again ...
ALONE_MIN_VISITS, ALONE_MAX_VISITS = 24, 96  # ... and of all of them, where it is a network that is measured by itself
ANOTHER_PACE = 1.25  # times, more or less, that a reference took when the table was built: from there on it is said


@cache
def name_of(model: Model) -> str:
    """Return the name of a model in the samples file."""
    if not model:
        return "empty"
    if is_stem(model[0].spec) and isinstance(model[-1].spec, Head):
        return "network " + hashlib.sha256(repr(model).encode()).hexdigest()[:16]
    runs = [(str(layer), len(list(same))) for layer, same in groupby(model)]
    return " + ".join(f"{count} x {layer}" if count > 1 else layer for layer, count in runs)


def input_shape(model: Model, batch: int = 1) -> tuple[int, ...]:
    """Return the shape of a model's input.

    Raises:
        InputError: the batch is no whole number of the groups of images that the model has.
    """
    for layer in model:
        layer.leaving.shape(batch)
    return model[0].entering.shape(batch) if model else (batch, 3, 4, 4)


def build_module(model: Model, batch: int = 1, *, deploy: bool) -> tuple[nn.Module, Tensor]:
    """Return the module of a model, with `deploy` in its deploy form, and an input for it. Its weights are distinct ordinary
    values. CPUs and Core ML time the deploy form, NVIDIA GPUs the plain one (`nas.profilers.cuda` says why)."""
    example = torch.randn(input_shape(model, batch), generator=torch.Generator().manual_seed(0))
    module = nn.Sequential(*(build_layer(layer) for layer in model)) if model else nn.Identity()
    with_ordinary_values(module.eval(), seed=0)
    if deploy and model:
        module = nn.Sequential(*(deployed_layer(part, layer) for part, layer in zip(module.children(), model, strict=True)))
    return module, example


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


class Profiler(Protocol):
    """A device that can be timed from this process, with its settings.

    One that has `opens_quickly`, and says so, is opened anew more often; one that has `apart` (see `OrtCpu`) times a network or
    an ONNX model that stands alone in processes of their own.
    """

    @property
    def id(self) -> str:
        """The device id of the table that is measured with it."""
        ...

    @property
    def flags(self) -> Mapping[str, str]:
        """What speaks against a model that was opened, by its name: a word such as `off-npu`."""
        ...

    def environment(self) -> dict[str, Any]:
        """Return what is measured where; at least runtime, runtime_version, precision, batch, threads, export, warnings."""
        ...

    def open(self, model: Model) -> tuple[Workload, int]:
        """Return the workload that runs a model once, and the bytes that it holds."""
        ...

    def stopwatch(self) -> Stopwatch:
        """Return a stopwatch with the two references."""
        ...

    def between(self, most: int) -> Touches | None:
        """Return what makes, of a number of bytes up to `most`, what touches so much other memory between two timed calls; None
        where that is no use."""
        ...

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep what else this process does out of the way meanwhile; everything above is used inside."""
        ...


def table_reference(table: LatencyTable) -> References:
    """Return what the references take on a table's device, to normalise a measurement to it."""
    try:
        return References(**{name: float(ms) for name, ms in table.meta["reference_ms"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"the table of {table.device} does not say what the references take: build it anew with nas-build-lut"
        ) from error


@dataclass(frozen=True)
class Reopened:
    """A network that no ArchConfig describes, as what opens a workload of it."""

    open: Callable[[], Workload]


Onnx = bytes | Path  # a path where weights may lie in files beside it
Session = Callable[[int], list[Visit]]  # opens what is timed anew, and visits it so often


def measure_alone(
    profiler: Profiler, what: ArchConfig | Onnx | Reopened | Workload, reference: References | None, batch: int | None = None
) -> Measurement:
    """Time one network (with ordinary weights), ONNX model (on a CPU) or workload end to end until its 95 % interval is within
    1 %, or for 96 visits.

    It is opened anew every 4 visits, 6 times or more, on a CPU in a process of its own: where a session's memory happens to lie
    moves its times by some percent, for a small network by more, and the interval is of that too. (On a GPU it is the same
    capture again where memory suffices: see `NvidiaGpu.open`.) A workload stays as it is. `reference` is what the references
    take in the table that the result is to be compared with, and where one takes much longer or shorter now, that is said;
    without it, what they take now, which leaves the result as it was measured. `batch`: the images of a call, where they are
    not the profiler's; the references keep to its own.
    """
    with profiler.exclusive(), _sessions(profiler, what, batch) as session:
        visits: list[Visit] = []
        while len(visits) < ALONE_MAX_VISITS:
            visits += session(SESSION_VISITS)
            if len(visits) >= ALONE_MIN_VISITS:
                found = summarise(visits, reference, SESSION_VISITS)
                if found.half_width_ms <= WHOLE_GOAL * found.ms:
                    break
    if reference is not None:
        now = median_reference(visits)
        paces = (now.cached_ms / reference.cached_ms, now.streaming_ms / reference.streaming_ms)
        pace = max(paces, key=lambda pace: max(pace, 1 / pace))
        if not 1 / ANOTHER_PACE <= pace <= ANOTHER_PACE:
            say(
                f"warning: a reference workload takes {pace:.2f} times as long as when the table was built: what was measured "
                "is brought to the table's pace, but may be off by more than its interval says; "
                + ("measure again in a quieter hour" if pace > 1 else "build the table anew in a quiet hour")
            )
    return summarise(visits, reference, SESSION_VISITS)


@contextmanager
def _sessions(profiler: Any, what: ArchConfig | Onnx | Reopened | Workload, batch: int | None) -> Iterator[Session]:
    """Yield what opens a workload anew: in processes of their own where the profiler can, else in this one."""
    opening = profiler if batch is None else replace(profiler, batch=batch)
    if hasattr(profiler, "apart") and isinstance(what, ArchConfig | bytes | Path):
        with profiler.apart(opening.onnx(tuple(what.layers())) if isinstance(what, ArchConfig) else what) as apart:
            yield apart
        return
    watch = profiler.stopwatch()

    def session(visits: int) -> list[Visit]:
        match what:
            case ArchConfig():
                run = opening.open(tuple(what.layers()))[0]
            case Reopened():
                run = what.open()
            case bytes() | Path():
                raise TypeError("ONNX models are timed on CPUs alone")
            case _:
                run = what
        watch.pause()
        return [watch.visit(run) for _ in range(visits)]

    yield session
