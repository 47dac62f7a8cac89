"""From what a user calls a device to what times it."""

from __future__ import annotations

from typing import Any

from nas.device_ids import GPUS, HERE, KINDS, MACS, PHONES, is_gpu, is_id, is_phone, settings_in, takes_jobs
from nas.measure import Profiler
from nas.profilers.bench import usable_cpus
from nas.table import LatencyTable, find_tables
from supernet.errors import InputError, unknown


def open_profiler(
    device: str = "cpu", threads: int | None = None, precision: str | None = None, batch: int | None = None
) -> Profiler:
    """Return the profiler of a kind of device, or of this machine's device of that id. None: the device's usual setting.

    Raises:
        InputError: the device is unknown or not here, or does not have such a setting.
    """
    if device in GPUS:
        from nas.profilers.cuda import open_gpu

        return open_gpu(device, threads, precision, batch)
    if device in MACS:
        from nas.profilers.coreml import open_mac

        return open_mac(device, threads, precision, batch)
    if device == "cpu":
        return _open_cpu(threads, precision, batch)
    if device in PHONES:
        raise InputError(f"{device} is a kind of device: say which one, such as iphone15pro-npu (nas-build-lut --list)")
    found = _of_id(device)
    if found is None and (is_id(device) or is_gpu(device)):
        raise InputError(f"{device} is not this machine's ({_open_cpu(None, None, None).id} is): {_elsewhere(device)}")
    if found is None:
        raise unknown("device", device, (*KINDS, _open_cpu(None, None, None).id))
    if (threads, precision, batch) != (None, None, None):
        raise InputError(f"the id {device} says its settings: leave --threads, --precision and --batch out, or give a kind")
    return found


def profiler_of(table: LatencyTable) -> Profiler | None:
    """Return the profiler that times a table's device with the table's settings, None if that is not this machine's."""
    settings = {name: table.meta.get(name) for name in ("threads", "precision", "batch")}
    return _matching(table.device, settings)


def measuring(table: LatencyTable, what: str) -> str:
    """Return how to measure more rows of a table's device: a command, with where it runs if that is not here. `what` says which
    rows, as --space or --arch."""
    elsewhere = table.provenance == "measured" and profiler_of(table) is None
    return table.building(what, missing=True) + (" on that machine" if elsewhere else "")


def table_of_kind(device: str) -> str:
    """Return the id of the only table of a kind of device that is elsewhere, such as iphone-npu.

    Raises:
        InputError: there is none, or there are several.
    """
    maker, unit = device.split("-")
    found = [id for id in find_tables() if id.startswith(maker) and id.endswith(f"-{unit}")]
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(
            f"there is no table of an {device} yet: make it with `nas-build-lut --device {device} --team-id TEAM` on a Mac to "
            "which the phone is connected (docs/coreml.md)"
        )
    raise InputError(
        f"{device} is a kind of device, and there are tables of {', '.join(found)}: say which one, such as --device {found[0]}"
    )


def is_called(device: str, id: str) -> bool:
    """Whether what a user calls a device, its id or a kind, means the device of this id, which need have no table yet."""
    if device in PHONES:
        return is_phone(id) and settings_in(id)[0].endswith(device.removeprefix("iphone"))
    return id == (open_profiler(device).id if device in HERE else device)


def no_table(device: str) -> InputError:
    """Return what is said of a device that has no table and is not this machine's: what makes one, where it is an id."""
    if not (is_id(device) or is_gpu(device)):
        return unknown("device", device, known_devices())
    here = _open_cpu(None, None, None).id
    return InputError(f"there is no table of {device}, which is not this machine ({here}): {_elsewhere(device)}")


def _elsewhere(device: str) -> str:
    """Return how another machine's device is measured: by a job that is brought to it, or by a command there."""
    if takes_jobs(device):
        job = f"write a job for it with `nas-build-lut --device {device} --export-job DIR"
        if is_phone(device):
            return f"{job} --format coreml`"
        return f"{job}`, reach it by `--device ssh://user@host`, or run `nas-build-lut` there"
    base, settings = settings_in(device)
    kind = "cuda" if is_gpu(device) else "mac-npu" if base.endswith("-npu") else "mac-cpu"
    given = "".join(f" --{name} {value}" for name, value in settings.items() if value is not None)
    return f"measure it there, with `nas-build-lut --device {kind}{given}`"


def _of_id(device: str) -> Profiler | None:
    """Return the profiler whose id this is."""
    return _matching(device, settings_in(device)[1])


def _matching(device: str, settings: dict[str, Any]) -> Profiler | None:
    for kind in ("cpu", *MACS, "cuda"):
        try:
            profiler = open_profiler(kind, **settings)
        except InputError:
            continue
        if profiler.id == device:
            return profiler
    return None


def _open_cpu(threads: int | None, precision: str | None, batch: int | None) -> Profiler:
    from nas.profilers.ort_cpu import OrtCpu
    from nas.profilers.ort_session import PRECISIONS

    if precision not in (None, *PRECISIONS):
        raise unknown("precision of a CPU", str(precision), PRECISIONS)
    if threads is not None and threads > usable_cpus():
        raise InputError(
            f"--threads {threads} is more than the CPUs that this process may use: give at most {usable_cpus()}, or "
            "--export-job DIR for a device that has as many"
        )
    return OrtCpu(threads or 1, precision or "fp32", batch or 1)


def known_devices() -> list[str]:
    """Return what `--device` takes here: kinds, this machine's CPU, and the devices that have tables."""
    return list(dict.fromkeys([*KINDS, _open_cpu(None, None, None).id, *find_tables()]))
