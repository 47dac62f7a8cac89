"""Tables of devices that this process does not run on: job folders, ssh, a connected iPhone."""

from __future__ import annotations

from pathlib import Path

from nas.lut import import_results
from nas.plan import work_for
from nas.profilers.job import FORMATS, check_device_id, export_job, job_folder, run_over_ssh
from nas.profilers.ort_cpu import suffix
from nas.progress import say
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
    """Write a job folder and say what to do with it. The device `cpu` names itself when the job runs there."""
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if form == "onnx" and (device.endswith("-npu") or device in ("cuda", "a100", "iphone-cpu", "mac-cpu")):
        raise InputError(f"a job of ONNX models is timed on a CPU, not on {device}: give --format coreml, or a CPU's name")
    if device != "cpu":
        check_device_id(device)
    path = export_job(
        folder,
        space,
        work_for(space),
        device=None if device == "cpu" else device,
        form=form,
        threads=threads or 1,
        precision=precision,
        batch=batch or 1,
    )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    way = "copy it to the device and run `python3 run_job.py` there, which needs onnxruntime and numpy"
    if form == "coreml":
        way = "docs/coreml.md says how a Mac runs it on the phone"
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
    threads, precision, batch = threads or 1, precision or "fp32", batch or 1
    job = job_folder(space, suffix(threads, precision, batch))
    export_job(job, space, work_for(space), device=None, threads=threads, precision=precision, batch=batch)
    return import_results(run_over_ssh(url, job), folder)


def build_on_iphone(device: str, space: SearchSpace, folder: Path, team_id: str | None, udid: str | None) -> LatencyTable:
    """Hand the job to a connected iPhone, run it there, and make the table of what comes back."""
    from nas.profilers.iphone import iphone_id, measure_on_iphone

    if team_id is None:
        raise InputError(f"say who signs the program on the phone: --device {device} --team-id ABCDE12345 (--check lists all)")
    unit = device.removeprefix("iphone-")
    found = iphone_id(udid, unit)
    job = job_folder(space, f"-{found}")
    export_job(job, space, work_for(space), device=found, form="coreml")
    return import_results(measure_on_iphone(job, unit=unit, team_id=team_id, udid=udid, say=say), folder)


def print_check(device: str, team_id: str | None, udid: str | None) -> None:
    """Print what Core ML measurements need, each line ok or the fix; exit code 1 if something is missing."""
    from nas.profilers.coreml_check import check

    if device not in ("mac-npu", "mac-cpu", "iphone-npu", "iphone-cpu"):
        raise InputError(f"--check is for mac-npu, mac-cpu, iphone-npu and iphone-cpu, not for {device}: leave it out")
    lines = check(device, team_id, udid)
    for what, ok, fix in lines:
        print(f"{'ok     ' if ok else 'missing'}  {what}" + ("" if ok else f": {fix}"))
    if not all(ok for _, ok, _ in lines):
        raise SystemExit(1)
