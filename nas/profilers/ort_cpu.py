"""ONNX Runtime on this machine's CPU: sessions to time, the device's id, and what there is to record about it."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

CAN_PIN = hasattr(os, "sched_setaffinity")  # Linux can; macOS and Windows cannot


class OrtModel:
    """One ONNX model, its inputs filled and its outputs allocated once. Calling it is one inference."""

    def __init__(self, model: bytes, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        if threads > 1:
            # Idle pools of other live sessions would keep spinning on the cores that this one needs.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._binding = self.session.io_binding()
        rng = np.random.default_rng(0)
        self._arrays = []  # bound by address: they must outlive the binding
        for bind, ports in (
            (self._binding.bind_ortvalue_input, self.session.get_inputs()),
            (self._binding.bind_ortvalue_output, self.session.get_outputs()),
        ):
            for port in ports:
                if port.type != "tensor(float)":
                    raise TypeError(f"{port.name} is a {port.type}; only float32 inputs and outputs are timed")
                shape = [side if isinstance(side, int) else 1 for side in port.shape[:1]] + list(port.shape[1:])
                if not all(isinstance(side, int) for side in shape):
                    raise TypeError(f"{port.name} has the shape {port.shape}; only the batch may be left open")
                value = onnxruntime.OrtValue.ortvalue_from_numpy(rng.standard_normal(shape, dtype=np.float32))
                self._arrays.append(value)
                bind(port.name, value)

    def __call__(self) -> None:
        self.session.run_with_iobinding(self._binding)


def cpu_name() -> str:
    """Return the processor's own name for itself, as its system reports it."""
    if Path("/proc/cpuinfo").exists():
        fields = dict(re.findall(r"^([^\t:]+?)\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text().split("\n\n")[0], re.M))
        name = fields.get("model name") or fields.get("Model") or fields.get("Hardware") or platform.machine()
        if name == platform.machine() and "CPU part" in fields:  # Arm servers tell numbers only
            name += f" {fields.get('CPU implementer', '')} {fields['CPU part']}"
        if not re.search(r"\d", name) and "model" in fields:
            # A hypervisor may hide the model ("AMD EPYC"): family and model number still tell CPUs apart.
            name += f" f{fields.get('cpu family', '')}m{fields['model']}"
        return name
    if platform.system() == "Darwin":
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    return platform.processor() or platform.machine()


def device_id(name: str | None = None) -> str:
    """Return the id of a CPU, such as `xeon-platinum-8259cl-cpu`: its name without makers, clocks and filler words."""
    text = re.sub(r"\((r|tm|c)\)|@.*|\bwith\b.*", " ", (name or cpu_name()).lower())
    text = re.sub(r"\b(intel|amd|cpu|processor|genuine|\d+-core)\b", " ", text)
    words = re.findall(r"[a-z0-9]+", text)
    return "-".join([*words, "cpu"]) if words else f"{platform.machine().lower()}-cpu"


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Keep this thread on one core meanwhile, where the system can, and PyTorch to this thread.

    PyTorch's worker threads would inherit the core and wait for work on it, spinning, while something is timed there.
    """
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0) if CAN_PIN else set()
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(torch_threads)


def environment(threads: int) -> dict[str, Any]:
    """Return what was measured where: hardware, software, settings, load, and the time (UTC)."""
    try:
        load: tuple[float, ...] | None = os.getloadavg()
    except (AttributeError, OSError):
        load = None
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "os": platform.platform(),
        "runtime": "onnxruntime",
        "runtime_version": onnxruntime.__version__,
        "torch_version": torch.__version__,
        "python_version": platform.python_version(),
        "precision": "fp32",
        "batch": 1,
        "threads": threads,
        "export": "torchscript, opset 20, plain form",
        "pinned": CAN_PIN,
        "load_average": load,
        "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
