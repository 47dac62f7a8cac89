"""Tables of devices that this process does not run on: job folders, ssh, a connected iPhone."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nas.device_ids import GPUS, MACS, PHONES, is_core_ml, is_phone, settings_in, suffix
from nas.job import FORMATS, check_device_id, end_run, export_job, job_folder, read_results, run_of
from nas.lut import Unusable, import_results
from nas.plan import for_batch, in_many_sessions, work_for
from nas.profilers.bench import TooNoisy
from nas.progress import say
from nas.ssh import Address, reach, run_over_ssh
from nas.table import LatencyTable
from supernet.errors import InputError, unknown
from supernet.space import SearchSpace


def export(
    folder: Path,
    space: SearchSpace,
    device: str,
    form: str = "onnx",
    *,
    threads: int | None = None,
    precision: str | None = None,
    batch: int | None = None,
) -> None:
    """Write a job folder and say what to do with it. The device `cpu` names itself when the job runs there; the id of another
    one is lengthened by what is not usual about the settings.

    Raises:
        InputError: the format, the device id or a setting is not allowed, or the folder holds something else or another job.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    named = device
    if form == "onnx":
        if device in (*GPUS, *MACS) or is_core_ml(device):
            raise InputError(
                f"a job of ONNX models is timed on a CPU, not on {device}: give "
                + ("--format coreml, or " if is_phone(device) else "")
                + "a CPU's name"
            )
        base, said = settings_in(device)
        asked = {"threads": threads, "precision": precision, "batch": batch}
        for name, value in asked.items():
            if None not in (value, said[name]) and value != said[name]:
                raise InputError(f"the id {device} says {name} {said[name]}, but --{name} {value} was given: give one of them")
        threads, precision, batch = threads or said["threads"], precision or said["precision"], batch or said["batch"]
        named = base + suffix(threads or 1, precision or "fp32", batch or 1)
    else:
        if not is_phone(device):
            raise InputError(
                f"a Core ML job is run on an iPhone, not on {device}: give its id, such as iphone15pro-npu; a Mac measures "
                "itself, by nas-build-lut --device mac-npu there"
            )
        if batch not in (None, 1):
            raise InputError(f"a Core ML job has one image a call, but --batch {batch} was given: leave it out")
    if device != "cpu":
        check_device_id(named)
    space = for_batch(space, batch or 1)
    if form == "coreml":
        work = work_for(space, precision="fp16")
    else:
        work = in_many_sessions(work_for(space, precision=precision or "fp32"))
    path = export_job(
        folder,
        space,
        work,
        device=None if device == "cpu" else named,
        form=form,
        threads=threads or 1,
        precision=precision,
        batch=batch or 1,
    )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    way = "copy it to the device and run `python3 run_job.py` there, which needs onnxruntime and numpy"
    if form == "coreml":
        way = "on a Mac with the phone connected, `nas-build-lut --device iphone-npu --team-id T --import-results DIR` runs it"
    print(f"{path.parent}, {size:.0f} MB: {way};")
    print("bring results.json back, and give it to `nas-build-lut --import-results results.json`")


def build_over_ssh(
    url: str,
    space: SearchSpace,
    folder: Path,
    *,
    threads: int | None = None,
    precision: str | None = None,
    batch: int | None = None,
) -> LatencyTable:
    """Hand the job to another machine, run it there, and make the table of what comes back."""
    address = Address.parse(url)
    reach(address)  # first: the models take minutes to write
    threads, precision, batch = threads or 1, precision or "fp32", batch or 1
    space = for_batch(space, batch)
    port = f"-{address.port}" if address.port else ""
    job = job_folder(space, f"-{address.host}{port}{suffix(threads, precision, batch)}")
    work = in_many_sessions(work_for(space, precision=precision))
    export_job(job, space, work, device=None, threads=threads, precision=precision, batch=batch, run=run_of(job), replaces=True)
    results = run_over_ssh(address, job)
    with _ending(job):
        return import_results(results, folder)


def build_on_iphone(device: str, space: SearchSpace, folder: Path, team_id: str | None, udid: str | None) -> LatencyTable:
    """Hand the job to a connected iPhone, run it there, and make the table of what comes back."""
    from nas.profilers.iphone import iphone_id

    _need_team(device, team_id)
    found = iphone_id(udid, device.removeprefix("iphone-"))
    space = for_batch(space, 1)
    job = job_folder(space, f"-{found}")
    export_job(job, space, work_for(space, precision="fp16"), device=found, form="coreml", run=run_of(job), replaces=True)
    with _ending(job):
        return import_results(_measured_on_iphone(device, job, team_id, udid), folder)


def run_on_iphone(device: str, job: Path, folder: Path, team_id: str | None, udid: str | None) -> None:
    """Run a job folder, which somebody may have brought, on a connected iPhone, and make the table of what comes back; where
    the job measures the network of a search, say what reads its results."""
    results = _measured_on_iphone(device, job, team_id, udid)
    if read_results(results)[1]["verify"] is None:
        import_results(results, folder)
    else:
        print(f"{results}: bring it to the search: nas-search --from RUN --verify {shlex.quote(str(results))}")


def _measured_on_iphone(device: str, job: Path, team_id: str | None, udid: str | None) -> Path:
    from nas.profilers.iphone import measure_on_iphone

    team = _need_team(device, team_id)
    return measure_on_iphone(job, unit=device.removeprefix("iphone-"), team_id=team, udid=udid, say=say)


def _need_team(device: str, team_id: str | None) -> str:
    if team_id is None:
        raise InputError(f"say who signs the program on the phone: --device {device} --team-id ABCDE12345 (--check lists all)")
    return team_id


@contextmanager
def _ending(job: Path) -> Iterator[None]:
    """End a job of which the block makes a table: the next one is measured anew. Results that cannot be used end it too: the
    device has kept them, and would give the same ones again. Those that a table's folder has no place for do not."""
    try:
        yield
    except (Unusable, TooNoisy):
        _end(job)
        raise
    _end(job)


def _end(job: Path) -> None:
    end_run(job)
    (job / "results.json").unlink(missing_ok=True)


def print_check(device: str, team_id: str | None, udid: str | None) -> None:
    """Print what Core ML measurements need, each line ok or the fix; exit code 1 if something is missing."""
    from nas.profilers.coreml_check import check

    if device not in (*MACS, *PHONES):
        raise InputError(f"--check is for mac-npu, mac-cpu, iphone-npu and iphone-cpu, not for {device}: leave it out")
    lines = check(device, team_id, udid)
    for what, ok, fix in lines:
        print(f"{'ok     ' if ok else 'missing'}  {what}" + ("" if ok else f": {fix}"))
    if not all(ok for _, ok, _ in lines):
        raise SystemExit(1)
