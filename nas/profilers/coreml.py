"""Core ML: this Mac as a device, and which operations of a package leave the Neural Engine. Needs macOS."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nas.alone import MEASURING, turn
from nas.coreml_package import coremltools, package_bytes, save_package
from nas.export_forms import COREML
from nas.measure import CACHED, STREAMING, Model, build_module, name_of
from nas.profilers.bench import Disturbed, now
from nas.profilers.iphone import COMPUTE_UNITS, devicectl, run
from nas.profilers.ort_session import cpu_id, cpu_name, environment, touches
from nas.profilers.timing import (
    DISCARDED,
    DISCARDED_MS,
    MAX_CALLS,
    MIN_CALLS,
    VISIT_MS,
    Stopwatch,
    Touches,
    Visit,
    Workload,
)
from nas.progress import say
from supernet.errors import InputError

WARM_UP_MS = 300.0  # the Neural Engine's clock takes so long to rise,
WARM_UP_CALLS = 50  # and a fast model so many calls
LOAD_TIMEOUT_S = 60.0  # compiling for the Neural Engine takes seconds, or never ends
OLDEST_MACOS = (13, 0)  # has CPU_AND_NE
OLDEST_MACOS_WITH_PLANS = (14, 4)  # says where each operation runs
THERMAL_STATES = ("nominal", "fair", "serious", "critical")  # NSProcessInfoThermalState
HOT = THERMAL_STATES[2:]  # in which clocks are lowered
COOL_DOWN_S = 30.0  # before a visit that was dropped is made again,
TRIES = 20  # so often at most


def operations_off_npu(plan: Any) -> list[str]:
    """Return the types of the operations that a compute plan (coremltools' `MLComputePlan`) puts off the Neural Engine.

    A program that does nothing is left out: there is nothing in it to put anywhere.
    """
    found, pending = [], [function.block for function in plan.model_structure.program.functions.values()]
    while pending:
        for operation in pending.pop().operations:
            pending += operation.blocks
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            kind = operation.operator_name.rpartition(".")[2]  # "ios16.conv"
            if usage is None or kind in ("const", "identity"):
                continue
            if type(usage.preferred_compute_device).__name__ != "MLNeuralEngineComputeDevice":
                found.append(kind)
    return found


def off_npu(package: str | Path, device: Any = None) -> list[str]:
    """Return the types of a package's operations that do not run on the Neural Engine; empty: all of them do.

    `device` is a phone that coremltools has prepared (`phone_with_runner`), None this Mac. Needs macOS 14.4 or iOS 17.4.

    Raises:
        InputError: this is not a Mac, or its system is older.
    """
    _need_mac(OLDEST_MACOS_WITH_PLANS, "a compute plan")
    ct = coremltools()
    from coremltools.models.compute_plan import MLComputePlan

    compiled = ct.models.utils.compile_model(str(package))
    try:
        units = ct.ComputeUnit.CPU_AND_NE
        if device is None:
            return operations_off_npu(MLComputePlan.load_from_path(path=compiled, compute_units=units))
        from coremltools.models.ml_program.experimental import compute_plan_utils

        load = compute_plan_utils.load_compute_plan_from_path_on_device(path=compiled, compute_units=units, device=device)
        return operations_off_npu(asyncio.run(load))
    finally:
        shutil.rmtree(compiled, ignore_errors=True)


def phone_with_runner(udid: str, team_id: str) -> Any:
    """Build, sign and launch coremltools' model runner on a connected iPhone; return its device for `off_npu`. Minutes.

    Raises:
        InputError: coremltools finds no connected phone with this UDID.
    """
    coremltools()
    os.environ["PATH"] += f"{os.pathsep}{run(['xcode-select', '-p']).strip()}/usr/bin"  # it calls a bare `devicectl`
    # It knows a phone only while its tunnel is open; an idle one closes it, and any question opens it.
    devicectl("device", "info", "details", "--device", udid)
    from coremltools.models.ml_program.experimental.remote_device import AppSigningCredentials, Device, DeviceType

    phones = [device for device in Device.get_connected_devices(DeviceType.IPHONE) if device.udid == udid]
    if not phones:
        raise InputError(f"coremltools sees no connected iPhone {udid}: connect it by cable, unlock it and trust this Mac")
    credentials = AppSigningCredentials(
        development_team=team_id, bundle_identifier=f"org.metapath.modelrunner.{team_id.lower()}"
    )
    return asyncio.run(phones[0].prepare_for_model_debugging(credentials=credentials))


def macos_version() -> tuple[int, int] | None:
    """Return this Mac's system version, None elsewhere."""
    if platform.system() != "Darwin":
        return None
    major, minor = [*platform.mac_ver()[0].split("."), "0"][:2]
    return int(major), int(minor)


def _need_mac(oldest: tuple[int, int], what: str) -> None:
    found = macos_version()
    if found is None:
        raise InputError(
            f"{what} needs a Mac, and this is {platform.system()}: write a job folder here (nas-build-lut --device "
            "iphone15pro-npu --export-job DIR --format coreml) and have it timed by somebody who has one, or choose another "
            "--device"
        )
    if found < oldest:
        raise InputError(
            f"{what} needs macOS {oldest[0]}.{oldest[1]} or later, and this is {found[0]}.{found[1]}: update the system"
        )


class LoadGuard:
    """Loads each package and runs it once in a child process first: one that never ends compiling for the Neural Engine, or
    that ends its process, ends there.

    A thread would not do: Core ML's load does not let go of the interpreter.
    """

    def __init__(self, seconds: float = LOAD_TIMEOUT_S, load: Callable[[str, str], None] | None = None) -> None:
        self.seconds = seconds
        self.load = load or load_once
        self._pool: Any = None

    def check(self, package: Path, units: str, what: str) -> None:
        """Raise InputError if the package does not load and run, or not in time; `what` names it."""
        if self._pool is None:
            self._pool = multiprocessing.get_context("spawn").Pool(1)
            self._pool.apply(_be_ready)  # imports are not the package's time
        try:
            self._pool.apply_async(self.load, (str(package), units)).get(self.seconds)
        except multiprocessing.TimeoutError:
            self.close()
            raise InputError(
                f"{what} did not load and run within {self.seconds:g} s with {units}: choose --device mac-cpu, or a --space "
                "without it"
            ) from None
        except InputError:
            raise
        except Exception as error:
            raise _not_loaded(what, units, error) from error

    def close(self) -> None:
        """End the child process."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None


def _be_ready() -> None:
    if platform.system() == "Darwin":
        coremltools()


def load_once(package: str, units: str) -> None:
    """Load a package and run it once, in the process that may hang or die."""
    model = loaded(package, units)
    (port,) = model.get_spec().description.input
    CoreMlModel(model, tuple(port.type.multiArrayType.shape), port.name)()


def loaded(package: str, units: str) -> Any:
    """Return a package as an `MLModel` that can predict.

    Raises:
        RuntimeError: Core ML does not load it, of which coremltools would only warn.
    """
    ct = coremltools()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ct.models.MLModel(package, compute_units=ct.ComputeUnit[units])
    if model.__proxy__ is None:
        raise RuntimeError(str(model._framework_error or "this system does not know programs of its version"))
    return model


def _not_loaded(what: str, units: str, error: Exception) -> InputError:
    return InputError(f"{what} does not load with {units} ({' '.join(str(error).split())[:200]})")


@cache
def _input(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return a random input, which is kept while the process lives.

    Core ML lets go of an input a second after the call, on a thread of its own that does not hold the interpreter's lock: where
    it is the last to hold it, the process may crash (coremltools #2827). Single precision, as coremltools would convert half
    precision anew at every call.
    """
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


class CoreMlModel:
    """One loaded model and a random input. Calling it is one prediction; returns the framework's own nanoseconds of it, which
    are with its conversion of the input to fp16: coremltools gives it no other than single precision."""

    def __init__(self, model: Any, shape: Sequence[int], name: str = "x", folder: str | None = None) -> None:
        self.model = model
        if folder is not None:  # what the package is in goes when the model goes
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.inputs = {name: _input(tuple(shape))}

    def __call__(self) -> int:
        self.model.predict(self.inputs)
        return int(self.model.last_predict_duration_in_nano_seconds)


def counted_calls(run: Workload, between: Workload | None = None) -> float:
    """A burst (see `timing`) on the framework's counter: the median milliseconds, the first calls discarded."""

    def nanoseconds() -> int:
        found = run()
        assert isinstance(found, int)  # a CoreMlModel's
        return found

    spent = 0
    for call in range(DISCARDED):
        if call >= 2 and spent >= DISCARDED_MS * 1e6:
            break
        spent += nanoseconds()
    times: list[int] = []
    while len(times) < MIN_CALLS or (sum(times) < VISIT_MS * 1e6 and len(times) < MAX_CALLS):
        if between is not None:
            between()
        times.append(nanoseconds())
    return median(times) / 1e6


def thermal_state() -> str | None:
    """Return this Mac's thermal state, as `NSProcessInfo.thermalState` has it. None: it cannot be read."""
    ask = _thermal_question()
    state = ask() if ask is not None else -1
    return THERMAL_STATES[state] if 0 <= state < len(THERMAL_STATES) else None


@cache
def _thermal_question() -> Callable[[], int] | None:
    """Return what asks for the number of the thermal state, None where nothing can be asked."""
    pointer = ctypes.c_void_p
    try:
        ctypes.CDLL("/System/Library/Frameworks/Foundation.framework/Foundation")  # which has the class
        objc = ctypes.CDLL("/usr/lib/libobjc.A.dylib")
        find_class = ctypes.CFUNCTYPE(pointer, ctypes.c_char_p)(("objc_getClass", objc))
        selector = ctypes.CFUNCTYPE(pointer, ctypes.c_char_p)(("sel_registerName", objc))
        # One function sends every message, and is called with the types of the method that is meant.
        get_object = ctypes.CFUNCTYPE(pointer, pointer, pointer)(("objc_msgSend", objc))
        get_number = ctypes.CFUNCTYPE(ctypes.c_long, pointer, pointer)(("objc_msgSend", objc))
    except (OSError, AttributeError):
        return None
    info = find_class(b"NSProcessInfo")
    process, state = get_object(info, selector(b"processInfo")), selector(b"thermalState")
    if not process:  # nothing, which may be asked, answers 0, and that is a state
        return None
    return lambda: int(get_number(process, state))


class Heat:
    """This Mac's thermal state around visits: how often each was seen, and how many visits were dropped for it."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.dropped = 0

    def look(self) -> str | None:
        """Return the state now, and count it."""
        state = thermal_state()
        self.seen[state or "unknown"] += 1
        return state

    def warnings(self, state: str | None) -> list[str]:
        """Return what speaks against trusting what is measured in this state, after what was seen."""
        found = []
        if state is None:
            found.append("macOS does not tell its thermal state: slow visits cannot be told from those of a hot Mac")
        if state in HOT:
            found.append(f"this Mac is hot (thermal state {state}), where clocks are lower: let it cool")
        if self.dropped:
            found.append(f"{self.dropped} visits were dropped and repeated: this Mac was hot")
        return found


class CoolStopwatch(Stopwatch):
    """Drops visits before or after which the Mac was hot, rests for a while, and warms up anew."""

    def __init__(
        self, cached: Workload, streaming: Workload, heat: Heat, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        super().__init__(cached, streaming, burst=counted_calls, warm_up_ms=WARM_UP_MS, warm_up_calls=WARM_UP_CALLS)
        self.heat = heat
        self.sleep = sleep

    def visit(self, run: Workload, between: Workload | None = None) -> Visit:
        """Time one workload as any stopwatch does, while the Mac is not hot.

        Raises:
            Disturbed: it was in 20 visits in a row.
        """
        for attempt in range(TRIES):
            before = self.heat.look()
            visit = super().visit(run, between)
            states = (before, self.heat.look())
            if not set(states) & set(HOT):
                return visit
            self.heat.dropped += 1
            if self.heat.dropped == 1:
                say(f"this Mac is hot (thermal state {' to '.join(map(str, states))}): such visits are repeated after a rest")
            self.pause()
            self._warm.clear()
            if attempt < TRIES - 1:
                self.sleep(COOL_DOWN_S)
        raise Disturbed(
            f"this Mac was hot (thermal state {' to '.join(map(str, states))}) in {TRIES} visits in a row, with rests: "
            "cool it, or end other work, and give the same command again"
        )


@dataclass(frozen=True)
class CoreMlMac:
    """Core ML on this Mac. `unit`: npu (the Neural Engine, and the CPU for what falls off it) or cpu.

    `flags` fills as models are opened: the name of each that has operations off the Neural Engine -> "off-npu".
    """

    unit: str
    batch: int = 1
    flags: dict[str, str] = field(default_factory=dict, compare=False)
    guard: LoadGuard = field(default_factory=LoadGuard)
    heat: Heat = field(default_factory=Heat, compare=False)
    threads: int = 1
    precision: str = "fp16"

    @cached_property
    def id(self) -> str:
        """`<chip>-npu`, or `<chip>-coreml-cpu`, because `<chip>-cpu` is ONNX Runtime's; `-b8` for another batch."""
        chip = cpu_id().removesuffix("-cpu")
        kind = "npu" if self.unit == "npu" else "coreml-cpu"
        return f"{chip}-{kind}" + (f"-b{self.batch}" if self.batch != 1 else "")

    @property
    def compute_units(self) -> str:
        return COMPUTE_UNITS[self.unit]

    def environment(self) -> dict[str, Any]:
        place, state = environment(self.threads, self.precision, self.batch), thermal_state()
        found = [
            *(["it runs on battery, where clocks are lower: connect the charger"] if place["power"] == "battery" else []),
            *(["Core ML chooses its own cores, so the intervals will be wider"] if self.unit == "cpu" else []),
            *self.heat.warnings(state),
        ]
        return {
            **{name: place[name] for name in ("architecture", "cores", "core_kinds", "os", "python_version", "power")},
            "chip": cpu_name(),
            "load_average": place["load_average"],
            "runtime": "coreml",
            "runtime_version": f"coremltools {coremltools().__version__}, macOS {platform.mac_ver()[0]}",
            "torch_version": torch.__version__,
            "precision": self.precision,
            "batch": self.batch,
            "threads": self.threads,
            "export": COREML,
            "compute_units": self.compute_units,
            "input": "float32, converted to fp16 by Core ML within the time of a call",
            "warm_up_ms": WARM_UP_MS,
            "warm_up_calls": WARM_UP_CALLS,
            "thermal_state": state,
            "thermal_states": dict(self.heat.seen),
            "dropped_visits": self.heat.dropped,
            "warnings": found,
            "measured_at": now(),
        }

    def open(self, model: Model) -> tuple[Workload, int]:
        module, example = build_module(model, self.batch, deploy=True)
        name = name_of(model)
        folder = tempfile.mkdtemp()
        package = Path(folder) / "model.mlpackage"
        try:
            save_package(module, example, package, name)
            self.guard.check(package, self.compute_units, name)
            has_plans = self.unit == "npu" and (macos_version() or (0, 0)) >= OLDEST_MACOS_WITH_PLANS
            if has_plans and off_npu(package):
                self.flags[name] = "off-npu"
            try:
                ready = loaded(str(package), self.compute_units)
            except RuntimeError as error:
                raise _not_loaded(name, self.compute_units, error) from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return CoreMlModel(ready, tuple(example.shape), folder=folder), package_bytes(package)

    def stopwatch(self) -> Stopwatch:
        cached, streaming = self.open(CACHED)[0], self.open(STREAMING)[0]
        return CoolStopwatch(cached, streaming, self.heat)

    def between(self, most: int) -> Touches | None:
        """Touch other memory on the CPU; what the Neural Engine keeps of weights between two calls is not ours to clear."""
        return touches(most) if self.unit == "cpu" else None

    def exclusive(self) -> AbstractContextManager[None]:
        return turn(MEASURING)


def open_mac(device: str, threads: int | None = None, precision: str | None = None, batch: int | None = None) -> CoreMlMac:
    """Return the profiler of this Mac's Neural Engine (`mac-npu`) or CPU (`mac-cpu`) through Core ML.

    Raises:
        InputError: this is not a Mac, its system is too old, it has no Neural Engine, or there is no such setting.
    """
    if threads not in (None, 1):
        raise InputError(f"{device} has no --threads ({threads} given): Core ML chooses its own; leave the flag out")
    if precision not in (None, "fp16"):
        raise InputError(f"{device} is measured in fp16 only, not {precision}: leave --precision out")
    _need_mac(OLDEST_MACOS, f"--device {device}")
    unit = device.removeprefix("mac-")
    if unit == "npu" and platform.machine() != "arm64":
        raise InputError(f"this Mac's processor ({cpu_name()}) has no Neural Engine: choose --device mac-cpu")
    return CoreMlMac(unit, batch or 1)
