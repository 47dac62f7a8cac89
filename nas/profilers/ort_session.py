"""ONNX Runtime on this machine's CPU: sessions to time, the processor's name, and what there is to record about it.

Needs onnxruntime and numpy alone: this file travels to devices that have nothing else (see `job`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from nas.profilers.bench import now

PRECISIONS = ("fp32", "int8")
CACHE_LINE = 64  # bytes
CAN_PIN = hasattr(os, "sched_setaffinity")  # Linux can; macOS and Windows cannot


class OrtModel:
    """One ONNX model, its inputs filled and its outputs allocated once. Calling it is one inference.

    `weights` are the initializers that the model leaves out (as external data), by name.
    """

    def __init__(self, model: bytes, threads: int = 1, weights: Mapping[str, np.ndarray[Any, Any]] | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        if threads > 1:
            # Idle pools of other live sessions would keep spinning on the cores that this one needs.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        self._weights = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in (weights or {}).items()}
        if self._weights:
            options.add_external_initializers(list(self._weights), list(self._weights.values()))
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


def touch(size: int) -> Callable[[], object]:
    """Return what reads so many bytes of memory once, a number from every cache line."""
    return np.ones(size // 4, dtype=np.float32)[:: CACHE_LINE // 4].sum


def cpu_name() -> str:
    """Return the processor's own name for itself, as its system reports it; a small board's name, where it has one."""
    board = _read("/proc/device-tree/model")
    if board:
        return board.strip("\0 ")
    if Path("/proc/cpuinfo").exists():
        fields = dict(re.findall(r"^([^\t:]+?)\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text().split("\n\n")[0], re.M))
        name = fields.get("model name") or fields.get("Model") or fields.get("Hardware") or platform.machine()
        if name == platform.machine() and "CPU part" in fields:  # Arm servers tell numbers only
            name += f" {fields.get('CPU implementer', '')} {fields['CPU part']}"
        if not re.search(r"\d", name) and "model" in fields:
            # A hypervisor may hide the model ("AMD EPYC"): family and model number still tell CPUs apart.
            name += f" f{fields.get('cpu family', '')}m{fields['model']}"
        return name
    brand = _output("sysctl", "-n", "machdep.cpu.brand_string") if platform.system() == "Darwin" else None
    return brand or platform.processor() or platform.machine()


def cpu_id(name: str | None = None) -> str:
    """Return the id of a CPU, such as `xeon-platinum-8259cl-cpu`: its name without makers, clocks and filler words."""
    text = re.sub(r"\((r|tm|c)\)|@.*|\bwith\b.*", " ", (name or cpu_name()).lower())
    text = re.sub(r"\b(intel|amd|cpu|processor|genuine|\d+-core)\b", " ", text)
    words = re.findall(r"[a-z0-9]+", text)
    return "-".join([*words, "cpu"]) if words else f"{platform.machine().lower()}-cpu"


@contextlib.contextmanager
def pinned(threads: int = 1) -> Iterator[None]:
    """Keep this process on as many cores as it has threads meanwhile, where the system can.

    Sessions must be made inside, because ONNX Runtime's workers inherit the cores of the thread that makes them.
    """
    cores = os.sched_getaffinity(0) if CAN_PIN else set()
    if cores:
        os.sched_setaffinity(0, set(sorted(cores)[-threads:]))
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


def environment(threads: int, precision: str = "fp32", batch: int = 1) -> dict[str, Any]:
    """Return what is measured where: hardware, software, settings, power, load, and the time (UTC)."""
    try:
        load: tuple[float, ...] | None = os.getloadavg()
    except (AttributeError, OSError):
        load = None
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "core_kinds": _core_kinds(),
        "os": platform.platform(),
        "runtime": "onnxruntime",
        "runtime_version": onnxruntime.__version__,
        "python_version": platform.python_version(),
        "precision": precision,
        "batch": batch,
        "threads": threads,
        "pinned": CAN_PIN,
        "power": _power(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_average": load,
        "measured_at": now(),
    }


def warnings_about(place: Mapping[str, Any]) -> list[str]:
    """Return what speaks against trusting what is measured in this environment, a sentence each."""
    found = []
    if place["power"] == "battery":
        found.append("it runs on battery, where clocks are lower: connect the charger")
    if not place["pinned"]:
        kinds = f" of {place['core_kinds']}" if place["core_kinds"] else ""
        found.append(f"this system does not let a process choose its core{kinds}, so the intervals will be wider")
    if place["governor"] == "powersave" and not _read("/sys/devices/system/cpu/intel_pstate/status"):
        found.append("the clock governor is 'powersave': choose 'performance' where you may")
    load = place["load_average"]
    if load and place["cores"] and load[0] > place["cores"] / 2:
        found.append(f"other work keeps it busy (load {load[0]:.1f} on {place['cores']} cores): leave it alone meanwhile")
    throttled = throttle_state()
    if throttled:
        found.append(f"the processor is throttled ({throttled}): mend cooling or power supply first")
    return found


def throttle_state() -> str | None:
    """Return what a Raspberry Pi's firmware says of throttling now, None where there is nothing to say or to ask."""
    text = _read("/sys/devices/platform/soc/soc:firmware/get_throttled") or _output("vcgencmd", "get_throttled")
    match = re.search(r"(?:0x)?([0-9a-fA-F]+)\s*$", text or "")
    if not match:
        return None
    bits = int(match.group(1), 16)
    names = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}
    return ", ".join(name for bit, name in names.items() if bits >> bit & 1) or None


def _core_kinds() -> str | None:
    """Return how many cores of which kind an Apple chip has, such as "4 P and 6 E cores"."""
    if platform.system() != "Darwin":
        return None
    fast, slow = (_output("sysctl", "-n", f"hw.perflevel{level}.physicalcpu") for level in (0, 1))
    return f"{fast} P and {slow} E cores" if fast and slow else None


def _power() -> str | None:
    """Return "battery" or "mains", None where the system does not say."""
    if platform.system() == "Darwin":
        text = _output("pmset", "-g", "batt") or ""
        return "battery" if "Battery Power" in text else "mains" if "AC Power" in text else None
    supplies = list(Path("/sys/class/power_supply").glob("*"))
    mains = [_read(f"{supply}/online") for supply in supplies if _read(f"{supply}/type") == "Mains"]
    if not mains or not any(_read(f"{supply}/type") == "Battery" for supply in supplies):
        return None
    return "mains" if "1" in mains else "battery"


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _output(*command: str) -> str | None:
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
