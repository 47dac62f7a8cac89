"""ONNX Runtime on this machine's CPU: sessions to time, the processor's name, and what there is to record about it.

Needs onnxruntime and numpy alone: this file travels to devices that have nothing else (see `job`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from nas.profilers.bench import now

Array = np.ndarray[Any, Any]

PRECISIONS = ("fp32", "int8")
CACHE_LINE = 64  # bytes
ONNX_TYPES = {"float32": 1, "uint8": 2, "int8": 3}  # of a TensorProto
THROTTLES = ("under-voltage", "clock capped", "throttled", "soft temperature limit")  # of a Raspberry Pi: a bit each
CLOCK = r"@\s*[\d.]+\s*[gGmM][hH]z"  # in a processor's name
BUSY = "other work keeps it busy"
CAN_PIN = hasattr(os, "sched_setaffinity")  # Linux can; macOS and Windows cannot


class OrtModel:
    """One ONNX model in a session, its inputs filled and bound. Calling it is one inference.

    Floats are normal noise, uint8 uniform noise, other integers and booleans ones, which are valid tokens and masks. An open
    batch is 1. With `trace_prefix` ONNX Runtime's profiler writes a trace there.

    Raises:
        ValueError: an input has an open size other than the batch, or a type that cannot be filled.
    """

    def __init__(
        self,
        model: bytes | Path,
        threads: int = 1,
        trace_prefix: str | None = None,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4  # errors are raised; they need not be printed as well
        if threads > 1:
            # Idle pools of other live sessions would keep spinning on the cores that this one needs.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if trace_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = trace_prefix
        source = str(model) if isinstance(model, Path) else model
        self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._options = onnxruntime.RunOptions()
        self._options.log_severity_level = 4
        self._binding = self.session.io_binding()
        rng = np.random.default_rng(0)
        self._values = []  # bound by address: they must outlive the binding
        for port in self.session.get_inputs():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(_filled(port, rng))
            self._values.append(value)
            self._binding.bind_ortvalue_input(port.name, value)
        # Memory for an output whose shape is known is allocated once; other outputs are allocated by each run.
        for port in self.session.get_outputs():
            if port.type == "tensor(float)" and all(isinstance(side, int) and side > 0 for side in port.shape):
                value = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty(port.shape, np.float32))
                self._values.append(value)
                self._binding.bind_ortvalue_output(port.name, value)
            else:
                self._binding.bind_output(port.name)

    def __call__(self) -> None:
        self.session.run_with_iobinding(self._binding, self._options)


def made_weights(entries: Iterable[Mapping[str, Any]]) -> dict[str, Array]:
    """Return random weights for a model that was stored without its own: normal ones of their standard deviation, and uniform
    integers. Each entry has name, dtype, shape and std."""
    rng = np.random.default_rng(0)
    weights = {}
    for weight in entries:
        if weight["dtype"] == "float32":
            weights[weight["name"]] = rng.standard_normal(weight["shape"], dtype=np.float32) * np.float32(weight["std"])
        else:
            weights[weight["name"]] = rng.integers(-127, 128, weight["shape"]).astype(weight["dtype"])
    return weights


def with_weights(model: bytes, weights: Mapping[str, Array]) -> bytes:
    """Return an ONNX model with these initializers in it, as in a file: given apart from it (`add_external_initializers`), they
    made a streaming workload 3 % faster.

    Without the onnx package: of messages that follow each other, protobuf reads the sum. A tensor has dims (field 1), data_type
    (2), name (8) and raw_data (9); it is an initializer (5) of the model's graph (7).
    """
    parts: list[bytes | memoryview] = []  # put together once, as a small device has no room for copies of large weights
    for name, array in weights.items():
        dims = b"".join(_varint(1 << 3) + _varint(side) for side in array.shape)
        kind = _varint(2 << 3) + _varint(ONNX_TYPES[str(array.dtype)])
        named = dims + kind + _lead(8, len(name.encode())) + name.encode() + _lead(9, array.nbytes)
        parts += [_lead(5, len(named) + array.nbytes), named, array.data.cast("B")]
    return b"".join([model, _lead(7, sum(map(len, parts))), *parts])


def _lead(field: int, size: int) -> bytes:
    """Return what stands before `size` bytes of a field."""
    return _varint(field << 3 | 2) + _varint(size)


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def _filled(port: Any, rng: np.random.Generator) -> Array:
    """Return an array for an input of a model; an open batch is 1."""
    sides = [side if isinstance(side, int) and side >= 0 else None for side in port.shape]
    if sides and sides[0] is None:
        sides[0] = 1
    if None in sides:
        given = [side if isinstance(side, int) else str(side or "?") for side in port.shape]
        raise ValueError(
            f"its input {port.name!r} is {given}: only the batch may be left open; export it at fixed sizes, or fix them with "
            "python -m onnxruntime.tools.make_dynamic_shape_fixed"
        )
    size = [side for side in sides if side is not None]
    kind = port.type.removeprefix("tensor(").removesuffix(")")
    if kind in ("float", "float16", "double"):
        return rng.standard_normal(size, dtype=np.float32).astype({"float": "f4", "float16": "f2", "double": "f8"}[kind])
    if kind == "uint8":
        return rng.integers(0, 256, size, np.uint8)
    if kind in ("int32", "int64", "bool"):
        return np.ones(size, np.dtype(kind))
    raise ValueError(
        f"its input {port.name!r} is a {port.type}: inputs may be float, float16, double, uint8, int32, int64 or bool tensors"
    )


def touches(most: int) -> Callable[[int], Callable[[], object]]:
    """Return what makes, of a number of bytes up to `most`, what reads so much memory once, a number from every cache line."""
    lines = np.ones(most // 4, dtype=np.float32)[:: CACHE_LINE // 4]
    return lambda size: lines[: size // CACHE_LINE].sum


def cpu_name() -> str:
    """Return the processor's own name for itself, as its system reports it; a small board's name, where it has one."""
    board = _read("/proc/device-tree/model")
    if board and not board.startswith("linux,"):  # as virtual machines call themselves, whatever their processor
        return board.strip("\0 ")
    if Path("/proc/cpuinfo").exists():
        parts = Path("/proc/cpuinfo").read_text().rstrip().split("\n\n")  # a processor each, and on a board the last is its own
        fields, of_all = (dict(re.findall(r"^([^\t:]+?)\s*:\s*(.*)$", parts[at], re.M)) for at in (0, -1))
        name = of_all.get("Model") or fields.get("model name") or of_all.get("Hardware") or platform.machine()
        if name == platform.machine() and "CPU part" in fields:  # Arm servers tell numbers only
            name += f" {fields.get('CPU implementer', '')} {fields['CPU part']}"
        if not re.search(r"\d", re.sub(CLOCK, "", name)) and "model" in fields:
            # A hypervisor may hide the model ("AMD EPYC", "Intel Xeon @ 2.20GHz"): family and model number tell CPUs apart.
            name += f" f{fields.get('cpu family', '')}m{fields['model']}"
        return name
    brand = _output("sysctl", "-n", "machdep.cpu.brand_string") if platform.system() == "Darwin" else None
    return brand or platform.processor() or platform.machine()


def cpu_id(name: str | None = None) -> str:
    """Return the id of a CPU, such as `xeon-platinum-8259cl-cpu`: its name without makers, clocks and filler words."""
    text = re.sub(rf"\((r|tm|c)\)|{CLOCK}|\bwith\b.*", " ", (name or cpu_name()).lower())
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
        os.sched_setaffinity(0, _chosen(threads))
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


def _chosen(threads: int) -> list[int]:
    """Return the cores to run on: one of the threads that share a core, as long as there are cores; of the fastest kind the
    last ones, as interrupts mostly go to the first.

    The number alone does not tell: Intel's hybrid CPUs have their small cores last under Linux, most Arm chips first, and
    threads of one core stand side by side in some CPUs and apart in others.
    """
    cores = sorted(os.sched_getaffinity(0), key=lambda core: (_capacity(core), core), reverse=True)
    whole = {_siblings(core): core for core in reversed(cores)}  # of each, the one that comes first
    return sorted(cores, key=lambda core: whole[_siblings(core)] != core)[:threads]


def _siblings(core: int) -> str:
    """Return which threads share a core with this one, as Linux says it."""
    return _read(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") or str(core)


def _capacity(core: int) -> int:
    """Return what Linux says of a core's speed beside the others': up to 1024 on Arm, 1 and 0 on a hybrid Intel, else 0."""
    told = _read(f"/sys/devices/system/cpu/cpu{core}/cpu_capacity")
    if told is not None and told.isdigit():
        return int(told)
    for span in (_read("/sys/devices/cpu_core/cpus") or "").split(","):  # such as 0-15
        first, _, last = span.partition("-")
        if first.isdigit() and int(first) <= core <= int(last or first):
            return 1
    return 0


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
        "governor": _read(f"/sys/devices/system/cpu/cpu{_chosen(1)[0] if CAN_PIN else 0}/cpufreq/scaling_governor"),
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
    if place["pinned"] and place["core_kinds"] and len({_capacity(core) for core in _chosen(place["threads"])}) > 1:
        found.append(f"{place['threads']} threads run on unlike cores ({place['core_kinds']}): give as many as are alike")
    if place["pinned"] and len({_siblings(core) for core in _chosen(place["threads"])}) < place["threads"]:
        found.append(f"some of the {place['threads']} threads share a core: give as many as there are cores")
    if place["governor"] == "powersave" and not _read("/sys/devices/system/cpu/intel_pstate/status"):
        found.append("the clock governor is 'powersave': choose 'performance' where you may")
    load = place["load_average"]
    if load and place["cores"] and load[0] > place["cores"] / 2:
        found.append(f"{BUSY} (load {load[0]:.1f} on {place['cores']} cores): leave it alone meanwhile")
    throttled = throttle_state()
    if throttled:
        found.append(f"the processor is throttled ({throttled}): mend cooling or power supply first")
    return found


def throttle_state(cooling: Path = Path("/sys/class/thermal")) -> str | None:
    """Return what says that the clock is held down now, None where nothing does: a Raspberry Pi's firmware; Linux's cooling
    devices of processors (a Jetson's, a laptop's); `pmset` on a Mac that tells its speed limit."""
    found = [throttles(throttle_bits() or 0)]
    for device in sorted(cooling.glob("cooling_device*")):
        kind, state = _read(f"{device}/type") or "", _read(f"{device}/cur_state") or ""
        if re.search("processor|cpu", kind, re.I) and state.isdigit() and int(state) > 0:
            found.append(f"{kind} cools at step {state}")
    if platform.system() == "Darwin":
        limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", _output("pmset", "-g", "therm") or "")
        if limit and int(limit[1]) < 100:
            found.append(f"speed limit {limit[1]} %")
    return ", ".join(sorted({word for word in found if word})) or None


def throttles(bits: int) -> str | None:
    """Return in words what the lowest bits of the firmware's word say."""
    return ", ".join(name for bit, name in enumerate(THROTTLES) if bits >> bit & 1) or None


def throttle_bits() -> int | None:
    """Return the firmware's word: bits 0 to 3 are of now, bits 16 to 19 of any time before. None where there is none to ask."""
    text = _read("/sys/devices/platform/soc/soc:firmware/get_throttled") or _output("vcgencmd", "get_throttled")
    match = re.search(r"(?:0x)?([0-9a-fA-F]+)\s*$", text or "")
    return int(match.group(1), 16) if match else None


def _core_kinds() -> str | None:
    """Return how many cores of which kind there are where they differ: "4 P and 6 E cores", or by what Linux says of them."""
    if CAN_PIN:
        found = Counter(_capacity(core) for core in os.sched_getaffinity(0))
        kinds = " and ".join(f"{found[capacity]} of capacity {capacity}" for capacity in sorted(found, reverse=True))
        return kinds if len(found) > 1 else None
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
