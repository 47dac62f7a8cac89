"""What an NVIDIA driver says about its GPUs: names, slices, clocks, throttling, other processes. No torch.

Everything is asked through a `Driver`, which runs `nvidia-smi` and calls NVML, the library that comes with every driver.
Drivers differ in what they can tell; whatever one does not tell is None.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supernet.errors import InputError

WSL_SMI = "/usr/lib/wsl/lib/nvidia-smi"  # not always on the PATH there

REASONS = {
    0x1: "idle",
    0x2: "clock setting",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
    0x100: "display clock setting",
}
"""Why clocks are below their maximum: the bits of NVML's clock event reasons."""

THROTTLING = 0x4 | 0x8 | 0x20 | 0x40 | 0x80
"""The reasons for which a burst is dropped: heat and power. The power cap is one of them, although it is no fault: how far it
lowers the clock depends on what ran just before, so a network's time would depend on its neighbours in the shuffled round.
A pause before the next try lets the average power fall; a network that reaches the cap even so, by itself, is timed at it (see
`Bursts`). Idling is no reason to drop anything, and neither are clocks that somebody set: they are the same all the time."""
POWER_CAP = REASONS[0x4]
SETTINGS = 0x2 | 0x100
"""The reasons that somebody gave: locked clocks, clocks of applications, a display's."""

NOMINAL_GB = (2, 3, 4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 72, 80, 94, 96, 128, 141, 144, 180, 192, 288)
"""Sizes that GPUs are sold with. Drivers report less: error correction and the firmware take a part."""

SMI_EVERY_S = 0.5  # a call of nvidia-smi takes 20 to 50 ms
LOOK_EVERY_S = 0.5  # at clock, power and temperature, which change slowly


class Driver:
    """An NVIDIA driver: the only place that runs `nvidia-smi` and calls NVML."""

    def __init__(self) -> None:
        self._smi = shutil.which("nvidia-smi") or (WSL_SMI if Path(WSL_SMI).exists() else None)
        self._library: Any = None
        self._handles: dict[str, Any] = {}

    def smi(self, *arguments: str) -> str | None:
        """Return what `nvidia-smi` prints, None where it is missing or refuses."""
        if self._smi is None:
            return None
        try:
            done = subprocess.run([self._smi, *arguments], capture_output=True, text=True, check=True, timeout=30)  # noqa: S603
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
            return None
        return done.stdout

    def reasons(self, uuid: str) -> int | None:
        """Return the clock event reasons of a whole GPU, a bit mask; well below a millisecond. None: NVML cannot tell."""
        value = ctypes.c_ulonglong()
        for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):  # new, old
            if self._nvml(name, uuid, ctypes.byref(value)):
                return value.value
        return None

    def sm_mhz(self, uuid: str) -> int | None:
        """Return the clock of a whole GPU's multiprocessors, in MHz. None: NVML cannot tell."""
        value = ctypes.c_uint()
        sm = ctypes.c_int(1)  # NVML_CLOCK_SM
        return value.value if self._nvml("nvmlDeviceGetClockInfo", uuid, sm, ctypes.byref(value)) else None

    def power_w(self, uuid: str) -> float | None:
        """Return what a whole GPU draws, in watts (of most GPUs over the last second). None: NVML cannot tell."""
        value = ctypes.c_uint()  # milliwatts
        return value.value / 1000 if self._nvml("nvmlDeviceGetPowerUsage", uuid, ctypes.byref(value)) else None

    def temperature_c(self, uuid: str) -> int | None:
        """Return a whole GPU's temperature, in degrees Celsius. None: NVML cannot tell."""
        value = ctypes.c_uint()
        die = ctypes.c_int(0)  # NVML_TEMPERATURE_GPU
        return value.value if self._nvml("nvmlDeviceGetTemperature", uuid, die, ctypes.byref(value)) else None

    def _nvml(self, function: str, uuid: str, *arguments: Any) -> bool:
        """Call a function of NVML on a GPU; return whether that worked."""
        if self._library is None:
            self._library = _load_nvml()
        if not self._library:
            return False
        if uuid not in self._handles:
            handle = ctypes.c_void_p()
            failed = self._library.nvmlDeviceGetHandleByUUID(ctypes.c_char_p(uuid.encode()), ctypes.byref(handle))
            self._handles[uuid] = None if failed else handle
        call = getattr(self._library, function, None)
        return call is not None and self._handles[uuid] is not None and call(self._handles[uuid], *arguments) == 0


def _load_nvml() -> Any:
    """Return NVML, ready for calls; False where there is none."""
    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        return library if library.nvmlInit_v2() == 0 else False
    except (OSError, AttributeError):
        return False


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a slice of one. `name` and `uuid` are the whole GPU's (`uuid` None: the driver does not list it);
    `mig` is the profile of the slice, such as `1g.5gb`; `memory_gib` is what the driver reports of the whole GPU or slice."""

    name: str
    uuid: str | None
    memory_gib: float
    mig: str | None = None

    @property
    def id(self) -> str:
        """The device id: `a100-sxm4-80gb`, `rtx-4090-24gb`; of a slice `a100-mig-1g.5gb`."""
        words = re.findall(r"[a-z0-9]+", re.sub(r"\b(nvidia|geforce|graphics|gpu)\b", " ", self.name.lower()))
        plain = [word for word in words if not re.fullmatch(r"\d+gb", word)]
        if self.mig is not None:
            model = [word for word in plain if not re.fullmatch(r"(sxm|pcie|hbm|nvl)\d*e?", word)]
            return "-".join([*model, "mig", self.mig])
        return "-".join([*plain, f"{_nominal_gb(self.memory_gib)}gb"])

    @property
    def is_a100(self) -> bool:
        """Whether this is a whole A100: no slice, and no virtual GPU (`GRID A100-10C`)."""
        name = self.name.lower()
        virtual = "grid" in name or re.search(r"-\d+[abcq]\b", name)
        return self.mig is None and not virtual and re.search(r"\ba100\b", name) is not None


def _nominal_gb(gib: float) -> int:
    """Return the size that a GPU is sold with: the smallest known one that can hold what is reported."""
    return next((size for size in NOMINAL_GB if size >= 0.995 * gib), round(gib))


def find_gpu(driver: Driver, name: str, uuid: str | None, memory_bytes: int) -> Gpu:
    """Return the GPU that CUDA calls by this name and UUID, as the driver describes it.

    CUDA knows what CUDA_VISIBLE_DEVICES left visible; the driver lists everything. They are matched by UUID, which under MIG
    may be that of the slice or that of the GPU.

    Raises:
        InputError: the GPU is divided into slices and it cannot be told which of them this is.
    """
    whole, _, profile = name.partition(" MIG ")
    gib = memory_bytes / 2**30
    listed = _listed(driver)
    mine = [gpu for gpu in listed if uuid and (_same(gpu.uuid, uuid) or any(_same(s, uuid) for s in gpu.slices))]
    if not mine and len(listed) == 1:
        mine = listed
    if not mine:
        return Gpu(whole, None, gib, profile or None)
    gpu = mine[0]
    if not profile:
        profile = next((slice_ for u, slice_ in gpu.slices.items() if uuid and _same(u, uuid)), "")
    if not profile and query(driver, ("mig.mode.current",), gpu.uuid)["mig.mode.current"] == "Enabled":
        if len(set(gpu.slices.values())) != 1:
            raise InputError(
                f"{gpu.name} is divided into MIG slices and it cannot be told which one is used: set CUDA_VISIBLE_DEVICES to "
                "the UUID of one, from `nvidia-smi -L`"
            )
        profile = next(iter(gpu.slices.values()))
    return Gpu(whole, gpu.uuid, gib, profile or None)


@dataclass(frozen=True)
class _Listed:
    """A GPU in `nvidia-smi -L`, with the profiles of its slices by their UUIDs."""

    name: str
    uuid: str
    slices: Mapping[str, str]


def _listed(driver: Driver) -> list[_Listed]:
    found: list[_Listed] = []
    slices: dict[str, str] = {}
    for line in (driver.smi("-L") or "").splitlines():
        if match := re.match(r"GPU \d+: (.+) \(UUID: (\S+)\)", line):
            slices = {}
            found.append(_Listed(match[1], match[2], slices))
        elif match := re.match(r"\s+MIG (\S+)\s+Device\s+\d+: \(UUID: (\S+)\)", line):
            slices[match[2]] = match[1]
    return found


def _same(listed: str, uuid: str) -> bool:
    """Return whether a UUID that nvidia-smi lists (`GPU-...`, `MIG-...`) is the one that CUDA tells, without a prefix."""
    return listed.lower().removeprefix("gpu-").removeprefix("mig-") == uuid.lower().removeprefix("gpu-").removeprefix("mig-")


def query(driver: Driver, fields: Sequence[str], uuid: str) -> dict[str, str | None]:
    """Return what `nvidia-smi` says of a GPU, by field. A driver that does not know one of the fields refuses all of them;
    they are then asked for one by one."""
    text = driver.smi(f"--id={uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    values = [value.strip() for value in (text or "").strip().split(",")]
    if len(values) != len(fields):
        if len(fields) == 1:
            return {fields[0]: None}
        return {field: query(driver, (field,), uuid)[field] for field in fields}
    return {field: _told(value) for field, value in zip(fields, values, strict=True)}


def _told(value: str) -> str | None:
    """Return a value, None for what stands for one that is not known: `[N/A]`, `[Not Supported]`, `[Unknown Error]`, ..."""
    missing = not value or value.startswith("[") or value in ("N/A", "ERR!") or "not a valid field" in value
    return None if missing or value.startswith("Requested functionality") else value


def _number(value: str | None) -> float | None:
    match = re.match(r"-?\d+(\.\d+)?", value or "")
    return float(match[0]) if match else None


STATE = {
    "driver": "driver_version",
    "pstate": "pstate",
    "ecc": "ecc.mode.current",
    "mig_mode": "mig.mode.current",
    "persistence": "persistence_mode",
    "memory_mib": "memory.total",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "set_graphics_mhz": "clocks.applications.graphics",
    "max_sm_mhz": "clocks.max.sm",
    "max_memory_mhz": "clocks.max.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
"""What a sidecar has about a GPU, and the fields of nvidia-smi. The name's end is the unit."""


def state(driver: Driver, gpu: Gpu, our_share: bool) -> dict[str, Any]:
    """Return what the driver says of a GPU now; the UUID is hashed. `our_share`: whether this process is at work on it."""
    found: dict[str, Any] = {"name": gpu.name, "mig": gpu.mig, "uuid_sha256": None, **dict.fromkeys(STATE)}
    if gpu.uuid is not None:
        found["uuid_sha256"] = hashlib.sha256(gpu.uuid.encode()).hexdigest()[:16]
        told = query(driver, tuple(STATE.values()), gpu.uuid)
        for key, field in STATE.items():
            found[key] = _number(told[field]) if key.endswith(("_mib", "_mhz", "_w", "_c")) else told[field]
    mask = reasons(driver, gpu)
    found["throttle_reasons"] = None if mask is None else _names(mask)
    found["other_processes"] = _others(driver, gpu, our_share)
    return found


def reasons(driver: Driver, gpu: Gpu) -> int | None:
    """Return a GPU's clock event reasons, from NVML or else from nvidia-smi. None: nobody can tell."""
    if gpu.uuid is None:
        return None
    mask = driver.reasons(gpu.uuid)
    for field in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # the name since driver 535, the old one
        if mask is None:
            text = query(driver, (field,), gpu.uuid)[field]
            mask = int(text, 16) if text and re.fullmatch(r"0[xX][0-9a-fA-F]+", text) else None
    return mask


def _names(mask: int) -> list[str]:
    return [name for bit, name in REASONS.items() if mask & bit]


def _others(driver: Driver, gpu: Gpu, our_share: bool) -> int | None:
    """Return how many other processes compute on the whole GPU, None where the driver does not tell.

    A container's processes have other numbers outside: where this process is at work and its number is not listed, one of
    those listed is taken to be this one.
    """
    text = driver.smi("--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader") if gpu.uuid is not None else None
    if text is None:
        return None
    rows = [[value.strip() for value in line.split(",")] for line in text.splitlines() if "," in line]
    slices = next((tuple(listed.slices) for listed in _listed(driver) if listed.uuid == gpu.uuid), ())
    pids = {pid for uuid, pid in rows if (uuid == gpu.uuid or uuid in slices) and pid.isdecimal()}
    mine = {str(os.getpid())} & pids
    return len(pids - mine) - (1 if our_share and pids and not mine else 0)


def warnings_about(found: Mapping[str, Any]) -> list[str]:
    """Return what speaks against trusting what is measured in this state of a GPU, a sentence each."""
    said = []
    if found["driver"] is None:
        said.append(
            "nvidia-smi does not describe this GPU: clocks, throttling and other processes are not recorded; install the "
            "driver's tools"
        )
    elif found["throttle_reasons"] is None:
        said.append("the driver does not tell throttle reasons: slow bursts cannot be told from throttled ones")
    if found["other_processes"]:
        several = found["other_processes"] > 1
        said.append(f"{found['other_processes']} other process{'es use' if several else ' uses'} the GPU: leave it to this one")
    throttling = [name for bit, name in REASONS.items() if bit & THROTTLING and name in (found["throttle_reasons"] or ())]
    if throttling:
        said.append(f"it is throttled ({', '.join(throttling)}): let it cool, or give it more power")
    if found["persistence"] == "Disabled":
        said.append("persistence mode is off, so clocks take longer to rise: `sudo nvidia-smi -pm 1` where you may")
    if found["mig"]:
        said.append(f"it is a {found['mig']} slice: clocks and power are shared with the other slices of the {found['name']}")
    return said


class Watch:
    """Watches one GPU for throttling while bursts run on it, at a price that a burst can bear.

    NVML answers in microseconds and is asked several times a burst. Without it nvidia-smi is asked, every half second at most:
    then the burst during which it is asked stands for those since the last time.
    """

    def __init__(self, driver: Driver, gpu: Gpu, clock: Callable[[], float] = time.monotonic) -> None:
        self.driver = driver
        self.gpu = gpu
        self.clock = clock
        self.bursts = {"kept": 0, "kept_at_power_cap": 0, "dropped": 0}
        self.dropped_for: set[str] = set()
        self.held = 0  # by which settings clocks were held while bursts ran; an idle GPU does not tell
        # The first, lowest, highest and last while bursts ran, of what the driver has methods of these names for.
        self.seen: dict[str, dict[str, float]] = {"sm_mhz": {}, "power_w": {}, "temperature_c": {}}
        self._asked = -SMI_EVERY_S
        self._looked = -LOOK_EVERY_S
        self._failed_last = False

    def throttled(self) -> list[str]:
        """Return why the GPU is throttled now, nothing where it is not, nothing is known or it is not time to ask again."""
        if self.gpu.uuid is None:
            return []
        mask = self.driver.reasons(self.gpu.uuid)
        now = self.clock()
        if mask is None and (now - self._asked >= SMI_EVERY_S or self._failed_last):
            self._asked = now
            mask = reasons(self.driver, self.gpu)
        self.held |= (mask or 0) & SETTINGS
        found = _names((mask or 0) & THROTTLING)
        self._failed_last = bool(found)
        return found

    def look(self) -> None:
        """Note clock, power and temperature, every half second at most. To be called while the GPU is at work: an idle one's
        say nothing."""
        now = self.clock()
        if self.gpu.uuid is None or now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        for name, seen in self.seen.items():
            value: float | None = getattr(self.driver, name)(self.gpu.uuid)
            if value is not None:
                low, high = min(value, seen.get("lowest", value)), max(value, seen.get("highest", value))
                seen.update({"first": seen.get("first", value), "lowest": low, "highest": high, "last": value})

    def record(self, why: Sequence[str], *, kept: bool) -> None:
        """Count a burst during which the GPU was throttled for these reasons, if for any, and which was kept or dropped."""
        self.bursts["kept" if kept else "dropped"] += 1
        if kept and why:
            self.bursts["kept_at_power_cap"] += 1
        if not kept:
            self.dropped_for.update(why)

    def last(self) -> dict[str, float]:
        """Return clock, power and temperature when they were last looked at; nothing that never was."""
        return {name: seen["last"] for name, seen in self.seen.items() if seen}

    def summary(self) -> dict[str, Any]:
        """Return what a sidecar has about the bursts."""
        ranges = {name: dict(seen) for name, seen in self.seen.items()}
        return {**self.bursts, "dropped_for": sorted(self.dropped_for), "held_by": _names(self.held), **ranges}

    def warnings(self, max_sm_mhz: float | None) -> list[str]:
        """Return what speaks against trusting what was measured while bursts ran, a sentence each."""
        highest = self.seen["sm_mhz"].get("highest")
        known = highest is not None and max_sm_mhz is not None
        if not self.held or (known and highest >= max_sm_mhz):  # type: ignore[operator]
            return []
        at = f", at {highest:.0f} of {max_sm_mhz:.0f} MHz" if known else ""
        return [f"its clocks were held by a setting{at}: what was measured holds for that alone"]
