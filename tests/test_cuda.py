"""NVIDIA GPUs without one: a fake of the driver and of CUDA's few calls, and everything above them as it is."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_deploy import LAYERS
from test_profile import stand_in_for_timm
from torch import Tensor, nn

from nas import cli
from nas.devices import open_profiler
from nas.lut import SAME, build_table
from nas.measure import CACHED, EMPTY, build_module, measure_alone
from nas.profilers import cuda, nvidia
from nas.profilers.bench import Disturbed
from nas.profilers.cuda import (
    ASK_EVERY_S,
    BATCH,
    BURST_MS,
    MAPS,
    PRODUCTS,
    Bursts,
    Captured,
    Cuda,
    Found,
    Graph,
    NvidiaGpu,
    compiled,
    open_gpu,
    placed,
)
from nas.profilers.nvidia import Driver, Gpu, Watch, find_gpu, query, state, warnings_about
from supernet.arch import ArchConfig, Stage
from supernet.errors import InputError
from supernet.model import build_model
from supernet.space import SearchSpace, StageSpace
from supernet.specs import MB3D, MB4D, Identity, Layer

UUID = "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77"
SLICE = "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f"
OTHER = "GPU-00000000-1111-2222-3333-444444444444"
GIB = 2**30

HEALTHY = {
    "driver_version": "570.86.10",
    "pstate": "P0",
    "ecc.mode.current": "Enabled",
    "mig.mode.current": "Disabled",
    "persistence_mode": "Enabled",
    "memory.total": "81920",
    "clocks.sm": "1410",
    "clocks.mem": "1593",
    "clocks.applications.graphics": "1410",
    "clocks.max.sm": "1410",
    "clocks.max.mem": "1593",
    "power.draw": "71.42",
    "power.limit": "400.00",
    "temperature.gpu": "34",
    "clocks_event_reasons.active": "0x0000000000000000",
}


@pytest.fixture(autouse=True)
def no_real_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pretended here need not wait for what is measured beside it."""
    monkeypatch.setattr("nas.profilers.cuda.turn", nullcontext)


@dataclass
class FakeDriver(Driver):
    """A driver that answers as nvidia-smi and NVML do; `nvml` None: without NVML."""

    fields: dict[str, str] = field(default_factory=lambda: dict(HEALTHY))
    gpus: str = f"GPU 0: NVIDIA A100-SXM4-80GB (UUID: {UUID})\n"
    apps: str = ""
    nvml: Callable[[], int] | None = lambda: 0
    mhz: Callable[[], int] = lambda: 1410
    watts: float = 250.0
    installed: bool = True
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def smi(self, *arguments: str) -> str | None:
        self.asked.append(arguments)
        if not self.installed:
            return None
        if arguments[0] == "-L":
            return self.gpus
        if arguments[0].startswith("--query-compute-apps"):
            return self.apps
        assert arguments[0].startswith("--id=GPU-"), "a whole GPU is asked about by its UUID"
        wanted = arguments[1].removeprefix("--query-gpu=").split(",")
        if any(name not in self.fields for name in wanted):
            return None  # 'Field "..." is not a valid field to query.', and an exit code
        return ", ".join(self.fields[name] for name in wanted) + "\n"

    def reasons(self, uuid: str) -> int | None:
        return None if self.nvml is None else self.nvml()

    def sm_mhz(self, uuid: str) -> int | None:
        return None if self.nvml is None else self.mhz()

    def power_w(self, uuid: str) -> float | None:
        return None if self.nvml is None else self.watts

    def temperature_c(self, uuid: str) -> int | None:
        return None if self.nvml is None else 61


@dataclass
class Line:
    """The time line of a GPU and of the process that feeds it, in milliseconds. The process hands over in no time, and its time
    passes only while it waits."""

    now: float = 0.0
    done: float = 0.0  # when the GPU will have done all that it was given

    @property
    def at_work(self) -> bool:
        return self.now < self.done


class FakeGraph:
    def __init__(self, ms: float, line: Line) -> None:
        self.ms = ms
        self.line = line

    def replay(self) -> None:
        self.line.done = max(self.line.done, self.line.now) + self.ms


class FakeEvent:
    def __init__(self, line: Line) -> None:
        self.line = line
        self.at = 0.0

    def record(self) -> None:
        self.at = max(self.line.done, self.line.now)

    def synchronize(self) -> None:
        self.line.now = max(self.line.now, self.at)

    def query(self) -> bool:
        return self.line.now >= self.at

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at


class FakeCuda(Cuda):
    """CUDA on which a graph takes as long as it says."""

    def __init__(
        self, name: str = "NVIDIA A100-SXM4-80GB", gib: float = 79.2, uuid: str | None = UUID, ms: float = 0.5
    ) -> None:
        super().__init__()
        self.found = Found(name, uuid and uuid.split("-", 1)[1], int(gib * GIB), (8, 0))
        self.ms = ms
        self.line = Line()
        self.bursts: list[tuple[int, int]] = []  # discarded and timed replays
        self.captured: list[tuple[nn.Module, Tensor]] = []

    @property
    def place(self) -> torch.device:
        return torch.device("cpu")

    def missing(self) -> str | None:
        return None

    def device(self) -> Found:
        return self.found

    def in_use(self) -> bool:
        return bool(self.captured)

    def wait(self) -> None:
        self.line.now = max(self.line.now, self.line.done)

    def rest(self) -> None:
        self.line.now += 1000 * ASK_EVERY_S

    def event(self) -> FakeEvent:
        return FakeEvent(self.line)

    def capture(self, module: nn.Module, example: Tensor) -> Graph:
        self.captured.append((module, example))
        return FakeGraph(self.ms, self.line)

    def elapsed_ms(self, graph: Graph, discarded: int, times: int, ask: Callable[[], object]) -> float:
        self.bursts.append((discarded, times))
        return super().elapsed_ms(graph, discarded, times, ask)


def gpu(name: str, gib: float, mig: str | None = None) -> Gpu:
    return Gpu(name, UUID, gib, mig)


A100 = gpu("NVIDIA A100-SXM4-80GB", 79.2)


def captured(ms: float, fake: FakeCuda) -> Captured:
    return Captured(FakeGraph(ms, fake.line), fake, (nn.Identity(), torch.zeros(1)))


# --- which GPU it is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gib", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.25, "a100-sxm4-80gb"),
        ("A100-SXM4-40GB", 39.59, "a100-sxm4-40gb"),
        ("NVIDIA A100-PCIE-40GB", 39.39, "a100-pcie-40gb"),
        ("NVIDIA A100 80GB PCIe", 79.15, "a100-pcie-80gb"),
        ("NVIDIA H200", 139.8, "h200-141gb"),
        ("NVIDIA GB10", 121.69, "gb10-128gb"),
        ("NVIDIA H100 PCIe", 79.6, "h100-pcie-80gb"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx-4090-24gb"),
        ("NVIDIA L4", 22.0, "l4-24gb"),  # error correction takes a part
        ("Tesla T4", 14.6, "tesla-t4-16gb"),
        ("NVIDIA GH200 480GB", 94.5, "gh200-96gb"),  # 480 GB is the processor's memory
        ("NVIDIA Future", 1000.4, "future-1000gb"),
    ],
)
def test_a_gpu_is_named_after_model_variant_and_memory(name: str, gib: float, expected: str) -> None:
    assert gpu(name, gib).id == expected


def test_a_slice_is_a_device_of_its_own() -> None:
    assert gpu("NVIDIA A100-SXM4-40GB", 4.75, "1g.5gb").id == "a100-mig-1g.5gb"
    assert gpu("NVIDIA A100 80GB PCIe", 9.5, "1g.10gb").id == "a100-mig-1g.10gb"
    assert gpu("NVIDIA H100 80GB HBM3", 39.5, "3g.40gb").id == "h100-mig-3g.40gb"


def test_the_id_says_which_settings_are_not_usual() -> None:
    assert NvidiaGpu(A100).id == "a100-sxm4-80gb"
    assert NvidiaGpu(A100, "bf16", 1).id == "a100-sxm4-80gb-bf16-b1"


@pytest.mark.parametrize(
    ("name", "mig", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", None, True),
        ("NVIDIA A100 80GB PCIe", None, True),
        ("NVIDIA A100-SXM4-40GB", "7g.40gb", False),  # all of it, but through MIG
        ("GRID A100-10C", None, False),
        ("NVIDIA A100-4-20C", None, False),
        ("NVIDIA A100X", None, False),
        ("NVIDIA A10", None, False),
        ("NVIDIA H100 PCIe", None, False),
    ],
)
def test_what_is_a_whole_a100(name: str, mig: str | None, expected: bool) -> None:
    assert gpu(name, 39.5, mig).is_a100 is expected


def test_the_gpu_that_cuda_uses_is_found_among_several_by_its_uuid() -> None:
    driver = FakeDriver(gpus=f"GPU 0: NVIDIA H200 (UUID: {OTHER})\nGPU 1: NVIDIA A100-SXM4-80GB (UUID: {UUID})\n")
    found = find_gpu(driver, "NVIDIA A100-SXM4-80GB", UUID.removeprefix("GPU-"), int(79.2 * GIB))
    assert (found.uuid, found.id) == (UUID, "a100-sxm4-80gb")


def test_one_of_several_that_the_driver_does_not_list_is_never_taken_for_another() -> None:
    driver = FakeDriver(gpus=f"GPU 0: NVIDIA H200 (UUID: {OTHER})\nGPU 1: NVIDIA H200 (UUID: {OTHER[:-1]}5)\n")
    found = find_gpu(driver, "NVIDIA A100-SXM4-80GB", UUID, int(79.2 * GIB))
    assert (found.uuid, found.id) == (None, "a100-sxm4-80gb")


SLICED = f"GPU 0: NVIDIA A100-SXM4-40GB (UUID: {UUID})\n  MIG 1g.5gb      Device  0: (UUID: {SLICE})\n"
TWO_SLICES = f"{SLICED}  MIG 3g.20gb     Device  1: (UUID: MIG-{UUID}/2/0)\n"


@pytest.mark.parametrize(
    ("name", "uuid", "listed", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", SLICE, TWO_SLICES, "1g.5gb"),  # CUDA's name says it
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", UUID, TWO_SLICES, "3g.20gb"),
        ("NVIDIA A100-SXM4-40GB", SLICE, TWO_SLICES, "1g.5gb"),  # the slice's UUID does
        ("NVIDIA A100-SXM4-40GB", UUID, SLICED, "1g.5gb"),  # there is only one
    ],
)
def test_a_slice_is_told_from_the_name_its_uuid_or_because_it_is_the_only_one(
    name: str, uuid: str, listed: str, expected: str
) -> None:
    driver = FakeDriver({**HEALTHY, "mig.mode.current": "Enabled"}, listed)
    found = find_gpu(driver, name, uuid.split("-", 1)[1], int(4.75 * GIB))
    assert (found.mig, found.uuid, found.name) == (expected, UUID, "NVIDIA A100-SXM4-40GB")


def test_a_slice_that_cannot_be_told_is_refused() -> None:
    driver = FakeDriver({**HEALTHY, "mig.mode.current": "Enabled"}, TWO_SLICES)
    with pytest.raises(InputError, match=r"divided into MIG slices.*CUDA_VISIBLE_DEVICES"):
        find_gpu(driver, "NVIDIA A100-SXM4-40GB", UUID, int(4.75 * GIB))


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cuda", "a100"])
def test_without_cuda_both_kinds_say_what_is_missing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(InputError, match=rf"--device {kind} needs CUDA: PyTorch \S+ is built without CUDA.*pip install"):
        open_gpu(kind, driver=FakeDriver())
    monkeypatch.setattr("nas.profilers.nvidia.Driver.smi", lambda self, *arguments: None)
    with pytest.raises(InputError, match=rf"there is no NVIDIA GPU here for --device {kind}.*--device cpu") as caught:
        open_profiler(kind)
    assert "\n" not in str(caught.value)


def test_a_machine_without_a_gpu_and_a_build_for_amd_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "no NVIDIA GPU or driver" in str(Cuda().missing())
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in str(Cuda().missing())


@pytest.mark.parametrize(
    ("fake", "driver", "named"),
    [
        (
            FakeCuda("NVIDIA H200", 139.8),
            FakeDriver(gpus=f"GPU 0: NVIDIA H200 (UUID: {UUID})\n"),
            r"here is NVIDIA H200: .*--device cuda.* as h200-141gb$",
        ),
        (
            FakeCuda("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4.75, SLICE),
            FakeDriver({**HEALTHY, "mig.mode.current": "Enabled"}, SLICED),
            r"a MIG slice \(1g.5gb\) of NVIDIA A100-SXM4-40GB: .*--device cuda.* as a100-mig-1g.5gb$",
        ),
    ],
)
def test_a100_on_anything_else_names_what_was_found_and_the_command_that_works(
    fake: FakeCuda, driver: FakeDriver, named: str
) -> None:
    with pytest.raises(InputError, match=named):
        open_gpu("a100", driver=driver, cuda=fake)
    assert named.endswith(f"{open_gpu('cuda', driver=driver, cuda=fake).id}$")


def test_a_whole_a100_is_an_a100() -> None:
    assert open_gpu("a100", driver=FakeDriver(), cuda=FakeCuda()).id == "a100-sxm4-80gb"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"precision": "int8"}, "unknown precision of a GPU 'int8'.*bf16, fp16, fp32"),
        ({"threads": 4}, "--threads 4 is for CPUs"),
        ({"batch": 0}, "positive number of images"),
    ],
)
def test_settings_that_a_gpu_does_not_have(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        open_gpu("cuda", **settings, driver=FakeDriver(), cuda=FakeCuda())


def test_a_gpu_that_cuda_cannot_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy() -> int:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.cuda, "current_device", busy)
    with pytest.raises(InputError, match="busy or unavailable\\)"):
        Cuda().device()


def test_a_gpu_beside_the_one_in_use_that_cudnn_is_too_new_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [SimpleNamespace(name="NVIDIA H100 PCIe", major=9, minor=0), SimpleNamespace(name="Tesla V100", major=7, minor=0)]

    def refuse() -> int:
        raise RuntimeError("cuDNN version 91900 is not compatible with devices with SM < 7.5. Please install\nanother")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpus[i])
    monkeypatch.setattr(torch.backends.cudnn, "version", refuse)
    with pytest.raises(InputError, match=r"too new for GPU 1 \(Tesla V100\), .* set CUDA_VISIBLE_DEVICES") as refused:
        Cuda().device()
    assert "\n" not in str(refused.value) and "H100" not in str(refused.value)
    del gpus[1]
    with pytest.raises(InputError, match=r"cannot use its cuDNN \(cuDNN version 91900 .* install\)"):
        Cuda().device()


def test_gpus_that_are_too_old() -> None:
    fake = FakeCuda("Tesla P100-PCIE-16GB", 15.9)
    fake.found = fake.found._replace(capability=(6, 0))
    with pytest.raises(InputError, match=r"compute capability 6\.0.*7\.0 or later"):
        open_gpu("cuda", driver=FakeDriver(), cuda=fake)
    fake.found = fake.found._replace(capability=(7, 5))
    with pytest.raises(InputError, match="does not compute in bf16"):
        open_gpu("cuda", precision="bf16", driver=FakeDriver(), cuda=fake)


# --- what the driver says ----------------------------------------------------------------------------------------------


def test_a_driver_that_does_not_know_a_field_is_asked_field_by_field() -> None:
    driver = FakeDriver({"clocks.sm": "1410", "temperature.gpu": "34"})
    found = query(driver, ("clocks.sm", "mig.mode.current", "temperature.gpu"), UUID)
    assert found == {"clocks.sm": "1410", "mig.mode.current": None, "temperature.gpu": "34"}


@pytest.mark.parametrize("said", ["[N/A]", "[Not Supported]", "[Unknown Error]", "N/A", "", "[Insufficient Permissions]"])
def test_what_a_driver_does_not_tell_is_none(said: str) -> None:
    driver = FakeDriver({**HEALTHY, "power.draw": said})
    found = state(driver, A100, False)
    assert found["power_w"] is None
    assert (found["sm_mhz"], found["power_limit_w"], found["temperature_c"]) == (1410, 400, 34)


def test_the_uuid_is_recorded_hashed() -> None:
    found = state(FakeDriver(), A100, False)
    assert len(found["uuid_sha256"]) == 16
    assert UUID not in repr(found)


def test_throttle_reasons_have_an_older_name() -> None:
    old = {**HEALTHY, "clocks_throttle_reasons.active": "0x0000000000000044"}
    del old["clocks_event_reasons.active"]
    found = state(FakeDriver(old, nvml=None), A100, False)
    assert found["throttle_reasons"] == ["power cap", "thermal (hardware)"]


@pytest.mark.parametrize(
    ("apps", "ours", "expected"),
    [
        ("", True, 0),
        (f"{UUID}, {os.getpid()}\n{UUID}, 99999999\n{OTHER}, 99999998\n", True, 1),
        (f"{UUID}, 4000001\n", True, 0),  # in a container: this process, by its number outside
        (f"{UUID}, 4000001\n", False, 1),
        ("No running processes found\n", True, 0),
    ],
)
def test_other_processes_of_this_gpu_are_counted(apps: str, ours: bool, expected: int) -> None:
    assert state(FakeDriver(apps=apps), A100, ours)["other_processes"] == expected


def test_other_slices_work_on_the_same_gpu() -> None:
    sliced = gpu("NVIDIA A100-SXM4-40GB", 4.75, "1g.5gb")
    found = state(FakeDriver(gpus=TWO_SLICES, apps=f"MIG-{UUID}/2/0, 99999999\n"), sliced, False)
    assert found["other_processes"] == 1


def test_a_quiet_gpu_gives_no_warning_and_a_disturbed_one_a_sentence_each() -> None:
    assert warnings_about(state(FakeDriver(), A100, False)) == []
    disturbed = {**HEALTHY, "persistence_mode": "Disabled"}
    driver = FakeDriver(disturbed, apps=f"{UUID}, 99999999\n", nvml=lambda: 0x20)
    said = " | ".join(warnings_about(state(driver, A100, False)))
    for part in ("1 other process uses", "throttled (thermal (software))", "persistence mode is off"):
        assert part in said


def test_without_nvidia_smi_it_works_and_says_what_is_not_known() -> None:
    driver = FakeDriver(installed=False, nvml=None)
    profiler = open_gpu("a100", driver=driver, cuda=FakeCuda())
    place = profiler.environment()
    assert place["driver"] is None
    assert "nvidia-smi does not describe this GPU" in place["warnings"][0]
    assert profiler.watch.throttled() == []


def test_nvidia_smi_that_is_missing_fails_or_hangs_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(nvidia, "WSL_SMI", "/nowhere/nvidia-smi")
    assert Driver().smi("-L") is None
    monkeypatch.setattr("shutil.which", lambda name: sys.executable)
    assert Driver().smi("-c", "print('GPU 0')") == "GPU 0\n"
    assert Driver().smi("-c", "raise SystemExit(9)") is None

    def hang(*args: object, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 30)

    monkeypatch.setattr(subprocess, "run", hang)
    assert Driver().smi("-L") is None


def test_without_nvml_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", nothing)
    assert Driver().reasons(UUID) is None
    assert Driver().sm_mhz(UUID) is None


def test_nvml_is_called_by_the_name_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldNvml:
        """As before driver 535: the reasons have their first name."""

        def nvmlInit_v2(self) -> int:
            return 0

        def nvmlDeviceGetHandleByUUID(self, uuid: Any, handle: Any) -> int:
            return 0 if uuid.value == UUID.encode() else 6

        def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, value: Any) -> int:
            value._obj.value = 0x40
            return 0

        def nvmlDeviceGetClockInfo(self, handle: Any, kind: Any, value: Any) -> int:
            value._obj.value = 1410
            return 0 if kind.value == 1 else 2

        def nvmlDeviceGetPowerUsage(self, handle: Any, value: Any) -> int:
            value._obj.value = 250_500  # milliwatts
            return 0

        def nvmlDeviceGetTemperature(self, handle: Any, sensor: Any, value: Any) -> int:
            value._obj.value = 61
            return 0 if sensor.value == 0 else 2

    monkeypatch.setattr("ctypes.CDLL", lambda name: OldNvml())
    driver = Driver()
    assert (driver.reasons(UUID), driver.sm_mhz(UUID)) == (0x40, 1410)
    assert (driver.power_w(UUID), driver.temperature_c(UUID)) == (250.5, 61)
    assert {driver.reasons(OTHER), driver.sm_mhz(OTHER), driver.power_w(OTHER), driver.temperature_c(OTHER)} == {None}


# --- bursts ------------------------------------------------------------------------------------------------------------


def bursts_of(fake: FakeCuda, driver: FakeDriver | None = None, sleep: Callable[[float], object] = lambda _: None) -> Bursts:
    return Bursts(fake, Watch(driver or FakeDriver(), A100), sleep)


@pytest.mark.parametrize("ms", [0.003, 0.5, 3.0, 40.0])
def test_a_burst_has_enough_replays_for_5_ms_and_discards_some_first(ms: float) -> None:
    fake = FakeCuda()
    bursts = bursts_of(fake)
    run = captured(ms, fake)
    assert bursts(run) == pytest.approx(ms)
    discarded, times = fake.bursts[-1]
    assert discarded >= 1
    assert BURST_MS <= times * ms <= max(2 * BURST_MS, 2 * ms)
    before = len(fake.bursts)
    assert bursts(run) == pytest.approx(ms)
    assert fake.bursts[before:] == [(discarded, times)], "the number of replays is kept"


@pytest.mark.parametrize("reason", [0x4, 0x8, 0x20, 0x40, 0x80])
def test_a_burst_under_throttling_is_dropped_and_repeated_after_a_pause(reason: int) -> None:
    said = [0, 0, reason, reason | 0x1, 0]
    fake, pauses = FakeCuda(), list[float]()
    bursts = bursts_of(fake, FakeDriver(nvml=lambda: said[len(fake.bursts) - 1]), pauses.append)
    run = captured(6.0, fake)
    assert [bursts(run), bursts(run), bursts(run)] == [6.0, 6.0, 6.0]
    assert bursts.watch.bursts == {"kept": 3, "kept_at_power_cap": 0, "dropped": 2}
    assert len(pauses) == 2 and pauses[1] > pauses[0] > 0
    assert len(bursts.watch.dropped_for) == 1
    assert fake.bursts[3][0] * 6.0 >= 50, "the clock rises again before the next try is timed"


@pytest.mark.parametrize(
    ("begins", "ends", "dropped"),
    [
        (12, 18, 1),  # all of the timed part: one call of 6 ms, after two that do not count
        (12, 12.5, 1),
        (14.5, 16.5, 1),  # in its middle alone
        (17, 18.5, 1),
        (0, 12, 0),  # before it: the clock has risen again
        (22, 99, 0),  # well after it
    ],
)
def test_the_reasons_that_count_are_those_of_the_timed_part(begins: float, ends: float, dropped: int) -> None:
    fake = FakeCuda()
    bursts = bursts_of(fake, FakeDriver(nvml=lambda: 0x40 if begins <= fake.line.now < ends else 0))
    assert bursts(captured(6.0, fake)) == 6.0
    assert bursts.watch.bursts == {"kept": 1, "kept_at_power_cap": 0, "dropped": dropped}


def test_clock_power_and_temperature_are_those_of_a_gpu_at_work() -> None:
    fake = FakeCuda()
    driver = FakeDriver(mhz=lambda: 1410 if fake.line.at_work and fake.line.now >= 12 else 210)
    bursts = bursts_of(fake, driver)
    bursts.watch.clock = lambda: fake.line.now  # a second here: every burst is looked at
    run = captured(6.0, fake)
    for watts in (250.0, 310.0, 290.0):
        driver.watts = watts
        bursts(run)
        fake.line.now += 1000
    found = bursts.watch.summary()
    assert found["sm_mhz"] == {"first": 1410, "lowest": 1410, "highest": 1410, "last": 1410}
    assert found["power_w"] == {"first": 250, "lowest": 250, "highest": 310, "last": 290}
    assert found["temperature_c"]["highest"] == 61


@pytest.mark.parametrize("reason", [0x1, 0x2, 0x10, 0x100])
def test_idling_and_clocks_that_somebody_set_are_no_throttling(reason: int) -> None:
    fake = FakeCuda()
    bursts = bursts_of(fake, FakeDriver(nvml=lambda: reason))
    assert bursts(captured(6.0, fake)) == 6.0
    assert bursts.watch.bursts == {"kept": 1, "kept_at_power_cap": 0, "dropped": 0}


@pytest.mark.parametrize("reason", [0x2, 0x100])
def test_clocks_that_are_held_are_told_at_the_end_as_an_idle_gpu_does_not_tell(reason: int) -> None:
    fake = FakeCuda()
    for mhz, at in ((1200, [", at 1200 of 1410 MHz"]), (1410, []), (None, [""])):
        driver = FakeDriver(nvml=lambda: reason if fake.line.at_work else 0x1, mhz=lambda mhz=mhz: mhz)
        opened = open_gpu("a100", driver=driver, cuda=fake)
        assert opened.environment()["warnings"] == []
        Bursts(fake, opened.watch)(captured(6.0, fake))
        said = [f"its clocks were held by a setting{part}: what was measured holds for that alone" for part in at]
        assert opened.environment()["warnings"] == said


def test_few_images_a_call_are_warned_of() -> None:
    for batch, said in ((64, []), (16, []), (8, ["8 images a call may not fill a GPU"]), (1, ["1 image a call may not"])):
        place = open_gpu("a100", batch=batch, driver=FakeDriver(), cuda=FakeCuda()).environment()
        assert [warning.startswith(part) for warning, part in zip(place["warnings"], said, strict=True)] == [True] * len(said)


def test_the_references_are_larger_than_the_caches_of_gpus() -> None:
    """One is of products, which follow the clock, one of maps that no cache holds."""
    side, width = MAPS[0].resolution, MAPS[0].spec.dim
    assert 2 * BATCH * side**2 * 4 * width > 126e6, "bytes of a map inside a block; a B200's cache is the largest"
    assert PRODUCTS[0].spec.dim > 4 * width, "more products for each byte"


@pytest.mark.parametrize("reasons", [(0x20,), (0x24,), (0x4, 0x20)])
def test_a_gpu_that_stays_throttled_cannot_be_measured(reasons: tuple[int, ...]) -> None:
    """By heat, at its power cap besides, or in turn with it."""
    fake = FakeCuda()
    bursts = bursts_of(fake, FakeDriver(nvml=lambda: reasons[len(fake.bursts) % len(reasons)]))
    with pytest.raises(Disturbed, match=r"throttled \(.*\) in 20 bursts in a row") as caught:
        bursts(captured(6.0, fake))
    assert "\n" not in str(caught.value)


def test_a_network_that_reaches_the_power_cap_whatever_ran_before_is_timed_at_it(capsys: pytest.CaptureFixture[str]) -> None:
    fake, pauses, at_cap = FakeCuda(), list[float](), True
    bursts = bursts_of(fake, FakeDriver(nvml=lambda: 0x4 if at_cap else 0), pauses.append)
    heavy, other = captured(6.0, fake), captured(7.0, fake)
    assert bursts(heavy) == 6.0
    assert len(pauses) == 3, "first it is given a chance to cool"
    assert [bursts(heavy), bursts(heavy)] == [6.0, 6.0]
    assert len(pauses) == 3, "once is enough"
    assert bursts(other) == 7.0
    assert len(pauses) == 6, "another network may need less power"
    at_cap = False
    assert bursts(heavy) == 6.0
    at_cap = True
    assert bursts(heavy) == 6.0
    assert len(pauses) == 9, "it does not always reach the cap, so pauses may help"
    assert bursts.watch.summary() | {"power_w": {}} == {
        "kept": 6,
        "kept_at_power_cap": 5,
        "dropped": 9,
        "dropped_for": ["power cap"],
        "held_by": [],
        "sm_mhz": {"first": 1410, "lowest": 1410, "highest": 1410, "last": 1410},
        "power_w": {},
        "temperature_c": {"first": 61, "lowest": 61, "highest": 61, "last": 61},
    }
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "power cap even after pauses" in said[0]


def test_without_nvml_nvidia_smi_is_asked_every_half_second_and_until_it_is_well_again() -> None:
    seconds = iter([0.0, 0.1, 0.4, 0.6, 0.7, 0.8])
    driver = FakeDriver(nvml=None)
    watch = Watch(driver, A100, clock=lambda: next(seconds))
    found = [watch.throttled() for _ in range(3)]
    assert found == [[], [], []] and len(driver.asked) == 1
    driver.fields["clocks_event_reasons.active"] = "0x0000000000000040"
    assert watch.throttled() == ["thermal (hardware)"]
    assert watch.throttled() == ["thermal (hardware)"], "0.1 s later: not before it is well again"
    driver.fields["clocks_event_reasons.active"] = "0x0000000000000000"
    assert watch.throttled() == []


# --- models ------------------------------------------------------------------------------------------------------------


def profiler(fake: FakeCuda | None = None, precision: str = "fp16", batch: int = 2) -> NvidiaGpu:
    return open_gpu("cuda", precision=precision, batch=batch, driver=FakeDriver(), cuda=fake or FakeCuda())


def test_a_model_is_opened_in_half_precision_channels_last_with_distinct_weights() -> None:
    fake = FakeCuda()
    block = Layer(MB4D(16), 8)
    run, size = profiler(fake).open((block, block))
    [(module, example)] = fake.captured
    assert example.shape == (2, 16, 8, 8)
    assert example.dtype == torch.float16 and example.is_contiguous(memory_format=torch.channels_last)
    for tensor in (*module.parameters(), *module.buffers()):
        assert tensor.dtype == torch.float16 or not tensor.is_floating_point()
        assert tensor.ndim != 4 or tensor.is_contiguous(memory_format=torch.channels_last)
    first, second = (next(child.parameters()) for child in module.children())
    assert not first.equal(second)
    assert size == run.bytes == sum(t.nbytes for t in (*module.parameters(), *module.buffers(), example))


def test_a_model_that_is_opened_again_is_not_compiled_again_unless_memory_is_short() -> None:
    for gib, compilations in ((79.2, 1), (1e-6, 2)):
        fake = FakeCuda(gib=gib)
        opened = profiler(fake)
        opened.open(CACHED)
        opened.open(CACHED)
        assert len(fake.captured) == compilations


def test_tokens_and_the_empty_model() -> None:
    fake = FakeCuda()
    profiler(fake).open((Layer(MB3D(32), 4),))
    profiler(fake).open(EMPTY)
    assert [tuple(example.shape) for _, example in fake.captured] == [(2, 16, 32), (2, 3, 4, 4)]


def test_a_module_of_ones_own_stays_as_it_is() -> None:
    fake = FakeCuda()
    module = nn.Conv2d(3, 8, 3)
    run, _ = profiler(fake).open_module(module, torch.zeros(2, 3, 8, 8))
    assert module.weight.dtype == torch.float32 and module.weight.requires_grad
    assert next(fake.captured[0][0].parameters()).dtype == torch.float16
    run()


def test_memory_that_does_not_suffice_and_outputs_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(module: nn.Module, example: Tensor) -> Graph:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    fake = FakeCuda()
    monkeypatch.setattr(fake, "capture", full)
    with pytest.raises(InputError, match="smaller --batch"):
        profiler(fake).open(CACHED)
    with pytest.raises(InputError, match="not finite in float16: give --precision bf16"):
        cuda.refuse_infinite(torch.tensor([1.0, float("inf")], dtype=torch.float16))
    cuda.refuse_infinite(torch.ones(2))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def lacks_a_compiler(*_: object) -> Any:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nor so")


@pytest.mark.parametrize(
    ("module", "backend", "said"),
    [
        (Branching(), "eager", r"cannot make one graph of this network \(Data-dependent branching\): write the forward"),
        (nn.ReLU(), lacks_a_compiler, r"cannot compile this network \(Failed to find C compiler\. .*\): it needs a C compiler"),
    ],
)
def test_what_torch_cannot_compile_is_refused_in_one_line(
    module: nn.Module, backend: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(fake, "capture", lambda module, example: compiled(module, backend)(example))
    with pytest.raises(InputError, match=said) as refused:
        profiler(fake, "fp32").open_module(module, torch.ones(2, 3))
    assert "\n" not in str(refused.value)


def test_a_network_is_timed_end_to_end() -> None:
    fake = FakeCuda(ms=0.5)
    opened = profiler(fake)
    own, _ = opened.open_module(nn.Conv2d(3, 8, 3), torch.zeros(2, 3, 8, 8))
    assert isinstance(own.graph, FakeGraph)
    own.graph.ms = 2.0
    found = measure_alone(opened, own, None)
    assert found.ms == pytest.approx(2.0)
    assert opened.environment()["gpu"]["bursts"]["kept"] >= 3 * found.visits - 2


def test_cudnn_chooses_the_references_algorithms_by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """By measurement it may choose others in the next process, whose figures are compared by them."""
    asked = []

    class Noting(FakeCuda):
        def capture(self, module: nn.Module, example: Tensor) -> Graph:
            asked.append(torch.backends.cudnn.benchmark)
            return super().capture(module, example)

    opened = open_gpu("cuda", driver=FakeDriver(), cuda=Noting())
    with opened.exclusive():
        opened.stopwatch()
        opened.open(EMPTY)
    assert asked == [False, False, True]


def test_settings_of_torch_are_given_back() -> None:
    def settings() -> tuple[bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = settings()
    with pytest.raises(KeyboardInterrupt), profiler().exclusive():
        assert settings() == (True, False, False)
        raise KeyboardInterrupt
    assert settings() == before


def test_the_environment_says_everything_that_a_tables_rows_must_share() -> None:
    place = profiler(precision="bf16").environment()
    assert {key: place[key] for key in SAME if key not in ("runtime_version", "export", "protocol")} == {
        "runtime": "torch inductor, CUDA graphs",
        "threads": 1,
        "precision": "bf16",
        "batch": 2,
    }
    assert torch.__version__ in place["runtime_version"]
    assert place["driver"] == "570.86.10" and place["gpu"]["name"] == "NVIDIA A100-SXM4-80GB"
    assert [warning.partition(":")[0] for warning in place["warnings"]] == ["2 images a call may not fill a GPU"]


def test_a_table_is_named_after_the_gpu_and_its_sidecar_describes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sized(FakeCuda):
        """A graph takes as long as its module has parameters."""

        def capture(self, module: nn.Module, example: Tensor) -> Graph:
            return FakeGraph(1.0 + sum(p.numel() for p in module.parameters()) / 1e4, self.line)

    def stage(stride: int, widths: tuple[int, ...]) -> StageSpace:
        return StageSpace(widths, stride, 2, (MB4D(widths[-1]), Identity(widths[-1])))

    monkeypatch.setattr(cuda, "WARM_UP_MS", 0.0)
    space = SearchSpace("small", 16, 10, (stage(2, (16, 32)), stage(2, (32, 48))))
    opened = open_gpu("cuda", driver=FakeDriver(), cuda=Sized())
    table = build_table(opened, space, tmp_path)
    assert table.device == "a100-sxm4-80gb" and (tmp_path / "a100-sxm4-80gb.csv").exists()
    block = Layer(MB4D(16), 8)
    params = sum(p.numel() for p in build_module((block,), deploy=False)[0].parameters())
    assert table.layer_ms(block) == pytest.approx(params / 1e4, rel=1e-3)
    assert (table.meta["batch"], table.meta["precision"]) == (64, "fp16")
    for key in ("name", "max_sm_mhz", "temperature_c", "power_limit_w", "throttle_reasons", "mig_mode", "other_processes"):
        assert table.meta["gpu"][key] is not None, key
    at_end = table.meta["at_end"]["gpu"]
    assert (table.meta["gpu"]["power_w"], at_end["power_w"]) == (71.42, 250), "at the end it is that of a GPU at work"
    assert at_end["bursts"]["power_w"]["highest"] == 250 and table.meta["gpu"]["bursts"]["power_w"] == {}


def test_in_a_container_this_process_is_no_other_once_it_is_at_work() -> None:
    opened = open_gpu("cuda", driver=FakeDriver(apps=f"{UUID}, 4000001\n"), cuda=FakeCuda())
    assert opened.environment()["gpu"]["other_processes"] == 1
    opened.open(CACHED)
    assert opened.environment()["gpu"]["other_processes"] == 0


ARCH = ArchConfig("small", 32, 10, (Stage(16, 4, (MB4D(16),)), Stage(32, 2, (MB4D(32), MB3D(32)))))


def test_what_is_timed_is_the_network_that_build_model_returns() -> None:
    fake = FakeCuda()
    profiler(fake).open(tuple(ARCH.layers()))
    timed, ours = ([type(part) for part in module.modules()] for module in (fake.captured[0][0], build_model(ARCH)))
    assert timed == ours and nn.BatchNorm2d in timed


def test_every_kind_of_layer_compiles_into_one_graph_for_model_after_model() -> None:
    """`fullgraph` raises at the first break; after eight models torch would refuse the ninth, were they not forgotten."""
    with torch.inference_mode():
        for model in (tuple(ARCH.layers()), *((layer,) for layer in LAYERS.values())):
            module, example = build_module(model, 4, deploy=False)
            expected = module(example)
            module, example = placed(module, example, torch.float32, torch.device("cpu"))
            assert torch.allclose(compiled(module, backend="eager")(example), expected, atol=1e-4)


@pytest.fixture
def at_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeCuda:
    """A machine with a GPU and timm, and without tables."""
    fake = FakeCuda()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nas.table.user_folder", lambda: tmp_path / "tables")
    monkeypatch.setattr(cuda, "WARM_UP_MS", 0.0)
    monkeypatch.setattr(cuda, "open_gpu", lambda *_: NvidiaGpu(A100, "fp16", 4, FakeDriver(), fake))
    monkeypatch.setitem(sys.modules, "timm", stand_in_for_timm())
    return fake


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_timm_model_is_profiled_on_a_gpu(at_a_gpu: FakeCuda, capsys: pytest.CaptureFixture[str]) -> None:
    cli.profile(["timm:smallnet", "--device", "cuda", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert (record["device"], record["batch"]) == ("a100-sxm4-80gb-b4", 4)
    assert (record["predicted_ms"], record["measured_ms"]) == (None, pytest.approx(0.5))
    shapes = [tuple(example.shape) for _, example in at_a_gpu.captured]
    assert shapes.count((4, 3, 8, 8)) == 1, "compiled once"


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    ("network", "said"),
    [
        (["timm:smallnet", "--layers"], "the layers of timm:smallnet are measured on this CPU alone"),
        (["timm:mobilenot_xs"], "timm cannot make its model mobilenot_xs (this model cannot be made)"),
        (["timm:nothing"], "unknown network"),
        (["some.onnx"], "networks given as YAML or by a zoo name, and timm's, are known"),
    ],
)
def test_what_a_gpu_does_not_profile(
    network: list[str], said: str, at_a_gpu: FakeCuda, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.profile([*network, "--device", "cuda"])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


def test_the_module_needs_no_gpu_and_wakes_none() -> None:
    code = "import nas.profilers.cuda, torch, sys; assert not torch.cuda.is_initialized(); assert 'pynvml' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(cuda.__file__).parents[2])
