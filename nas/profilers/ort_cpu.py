"""This machine's CPU through ONNX Runtime, on the graphs that `nas-export` writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch

from nas.alone import MEASURING, turn
from nas.device_ids import suffix
from nas.export_forms import ONNX
from nas.int8 import quantised
from nas.measure import CACHED, STREAMING, Model, build_module
from nas.onnx_model import onnx_bytes
from nas.profilers.ort_session import OrtModel, cpu_id, environment, pinned, touches, warnings_about
from nas.profilers.timing import Stopwatch, Touches, Workload


@dataclass(frozen=True)
class OrtCpu:
    """ONNX Runtime on this machine's CPU. `precision`: fp32, or int8 (quantised statically)."""

    threads: int = 1
    precision: str = "fp32"
    batch: int = 1
    flags: Mapping[str, str] = field(default_factory=dict, compare=False)

    @cached_property
    def id(self) -> str:
        """`<processor>-cpu`, and what is not usual about the settings: `-4t`, `-int8`, `-b8`."""
        return cpu_id() + suffix(self.threads, self.precision, self.batch)

    def environment(self) -> dict[str, Any]:
        place = environment(self.threads, self.precision, self.batch)
        return {**place, "torch_version": torch.__version__, "export": ONNX[self.precision], "warnings": warnings_about(place)}

    def onnx(self, model: Model) -> bytes:
        """Return the ONNX form that is timed."""
        return _onnx(model, self.batch, self.precision)

    def open(self, model: Model) -> tuple[Workload, int]:
        data = self.onnx(model)
        return OrtModel(data, self.threads), len(data)

    def stopwatch(self) -> Stopwatch:
        return Stopwatch(self.open(CACHED)[0], self.open(STREAMING)[0])

    def between(self, most: int) -> Touches:
        return touches(most)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Pin the process, when no other one of this package times anything, and keep PyTorch to this thread: its workers would
        inherit the core and wait on it, spinning, meanwhile."""
        torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with turn(MEASURING), pinned(self.threads):
                yield
        finally:
            torch.set_num_threads(torch_threads)


@lru_cache(maxsize=1)  # a network that is timed by itself is opened anew many times
def _onnx(model: Model, batch: int, precision: str) -> bytes:
    module, example = build_module(model, batch, deploy=True)
    data = onnx_bytes(module, example)
    return quantised(data, [example.numpy()]) if precision == "int8" and model else data
