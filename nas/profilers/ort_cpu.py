"""This machine's CPU through ONNX Runtime, on the graphs that `nas-export` writes."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from nas.alone import MEASURING, turn
from nas.device_ids import suffix
from nas.export_forms import ONNX
from nas.int8 import quantised
from nas.measure import CACHED, STREAMING, Model, Onnx, Session, build_module
from nas.onnx_model import onnx_bytes
from nas.onnx_weights import without_weights
from nas.profilers.apart import visits_apart
from nas.profilers.ort_session import OrtModel, cpu_id, environment, made_weights, pinned, touches, warnings_about, with_weights
from nas.profilers.timing import Stopwatch, Touches, Workload
from supernet.errors import FULL, InputError

Graph = tuple[bytes, list[dict[str, Any]]]  # a model without its large weights, and what they are


@dataclass(frozen=True)
class OrtCpu:
    """ONNX Runtime on this machine's CPU. `precision`: fp32, or int8 (quantised statically)."""

    threads: int = 1
    precision: str = "fp32"
    batch: int = 1
    flags: Mapping[str, str] = field(default_factory=dict, compare=False)
    opens_quickly: ClassVar[bool] = True  # so that a build can open every model in many sessions
    _graphs: dict[Model, Graph] = field(default_factory=dict, init=False, compare=False, repr=False)

    @cached_property
    def id(self) -> str:
        """`<processor>-cpu`, and what is not usual about the settings: `-4t`, `-int8`, `-b8`."""
        return cpu_id() + suffix(self.threads, self.precision, self.batch)

    def environment(self) -> dict[str, Any]:
        place = environment(self.threads, self.precision, self.batch)
        return {**place, "torch_version": torch.__version__, "export": ONNX[self.precision], "warnings": warnings_about(place)}

    def onnx(self, model: Model) -> bytes:
        """Return the ONNX form that is timed."""
        module, example = build_module(model, self.batch, deploy=True)
        data = onnx_bytes(module, example)
        return quantised(data, [example.numpy()]) if self.precision == "int8" and model else data

    def open(self, model: Model) -> tuple[Workload, int]:
        data = self._with_other_weights(model)
        return OrtModel(data, self.threads), len(data)

    def _with_other_weights(self, model: Model) -> bytes:
        """Return the ONNX form with random weights, as on other devices: it is kept without, as a build opens it many times."""
        if model not in self._graphs:
            self._graphs[model] = without_weights(self.onnx(model))
        graph, weights = self._graphs[model]
        return with_weights(graph, made_weights(weights))

    def stopwatch(self) -> Stopwatch:
        return Stopwatch(self.open(CACHED)[0], self.open(STREAMING)[0])

    @contextlib.contextmanager
    def apart(self, model: Onnx) -> Iterator[Session]:
        """Yield what times a model in processes of their own, a session in each."""
        cached, streaming = (self._with_other_weights(reference) for reference in (CACHED, STREAMING))
        with ExitStack() as held:
            try:
                folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
                files = []
                for number, one in enumerate((model, cached, streaming)):
                    files.append(one if isinstance(one, Path) else folder / f"{number}.onnx")
                    if isinstance(one, bytes):
                        files[-1].write_bytes(one)
            except OSError as error:
                why = (
                    f"the models to be timed cannot be written in {tempfile.gettempdir()} ({error.strerror or error}): make "
                    "room there, or set TMPDIR to another folder"
                )
                raise (OSError(error.errno, why) if error.errno in FULL else InputError(why)) from error
            yield lambda visits: visits_apart(files, self.threads, visits)

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
