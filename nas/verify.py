"""Verify the network of a search on a device that is elsewhere: a job goes there, its results repair the search."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from typing import Any

from nas.alone import alone
from nas.device_ids import takes_jobs
from nas.job import end_run, export_job, place_of, read_results, run_of, visits_of
from nas.kept import Checks, measurements_file
from nas.lookup import OnDevice
from nas.measure import ALONE_MAX_VISITS, SESSION_VISITS, measure_alone, name_of, table_reference
from nas.plan import Work, in_many_sessions
from nas.profilers.bench import Plan, TooNoisy, refuse_noise
from nas.profilers.timing import summarise
from nas.progress import say
from nas.request import Finished, finished, interrupted
from nas.search import Request, beginning, run_search
from nas.search_stages import CANDIDATE
from nas.settings import UNBOUND, SupernetSettings
from nas.ssh import Address, reach, run_over_ssh
from nas.table import HARDWARE, LatencyTable, Target
from supernet.arch import ArchConfig
from supernet.errors import InputError, one_line
from supernet.space import SearchSpace


def verify(
    run: Path, device: str | None = None, results: Path | None = None, config: Path | None = None
) -> dict[str, Any] | None:
    """Measure the network that a search found, search on if it misses a target, and return the new result.

    Where a table's device is this machine's, it is measured here; at `device`, `ssh://user@host`, there. For others a job
    folder each is written, and None returned; its `results` are given in a second call.

    Called again after a kill, it first ends what was interrupted, and returns that.

    Raises:
        InputError: the folder holds no finished search, or the results are of another network.
        TooNoisy: the device was too busy or too hot.
    """
    if device is not None and results is not None:
        raise InputError(
            f"{results} is what a device has measured, --device {device} would measure anew: leave one of them out"
        )
    held = finished(run, or_interrupted=True)
    settings = SupernetSettings.of_run(held.request["settings"], config, UNBOUND)
    with alone(run):
        places = [OnDevice(Target(t["target_ms"]), LatencyTable.load(Path(t["table"])), Path(t["table"])) for t in held.targets]
        if interrupted(run):  # the network that the results are of may be replaced already; what they say is kept
            asked = device or results
            then = f"; {asked} is passed over, so give the same command again" if asked else ""
            say(f"a search in {run} was interrupted while it wrote what it had found: it ends first{then}")
        elif not _measured(run, held, places, device, results):
            return None
        return run_search(
            Request(
                targets=tuple((place.name, place.target.ms) for place in places),
                table=tuple(place.path for place in places),
                data=held.data,
                strategy=held.request["strategy"],
                out=run,
                seed=held.request["seed"],
                **beginning(held),
            ),
            space=held.space,
            settings=settings,
            again=True,
        )


def _measured(run: Path, held: Finished, places: list[OnDevice], device: str | None, results: Path | None) -> bool:
    """Measure the network, or keep what was measured of it; return False where jobs were written that are to be run first."""
    text = (run / "request.json").read_text(encoding="utf-8")
    arch = ArchConfig.load(_measured_network(run))
    which = {"request_sha256": hashlib.sha256(text.encode()).hexdigest(), "network": name_of(tuple(arch.layers()))}
    checks = {place.name: Checks(run / measurements_file(place.name, len(places)), place.table) for place in places}
    elsewhere = [place for place in places if checks[place.name].profiler is None and not checks[place.name].knows(arch)]
    elsewhere.sort(key=lambda place: not takes_jobs(place.name))  # what can be done is done before the rest is refused
    if results is None:
        address = Address.parse(device) if device is not None else None
        if address is not None and len(elsewhere) > 1:
            names = " and ".join(place.name for place in elsewhere)
            raise InputError(f"{names} are elsewhere, and {device} is one machine: leave --device out for a job folder of each")
        if address is not None and not elsewhere and not all(check.profiler is not None for check in checks.values()):
            files = " and ".join(check.path.name for check in checks.values() if check.profiler is None)
            say(f"what this network takes is known ({files}): nothing is measured at {device}")
        if address is not None and all(check.profiler is not None for check in checks.values()):
            raise InputError(f"{' and '.join(checks)} is measured on this machine, nothing at {device}: leave --device out")
        if address is not None and elsewhere:
            reach(address)  # first: the rest takes its time
        for place in places:
            profiler = checks[place.name].profiler
            if profiler is not None:
                checks[place.name].add(arch, measure_alone(profiler, arch, table_reference(place.table)))
        jobs = []
        for place in elsewhere:
            jobs.append(_export(_job_of(run, places, place), arch, place.table, held.space, which))
            if address is None:
                _say_how(jobs[-1], place.table, run)
        if address is None and jobs:
            return False
        if jobs:
            assert address is not None
            results = run_over_ssh(address, jobs[0])
    if results is not None:
        _take(run, results, places, checks, which, arch)
    return True


def _job_of(run: Path, places: list[OnDevice], place: OnDevice) -> Path:
    """Return the folder of the job for one of a search's devices."""
    return run / ("verify-job" if len(places) == 1 else f"verify-job-{place.name}")


def _say_how(job: Path, table: LatencyTable, run: Path) -> None:
    how = "copy it to the device, run `python3 run_job.py` there"
    if table.on_coreml:
        how = "run the job on the phone (docs/coreml.md)"
    back = f"nas-search --from {shlex.quote(str(run))} --verify results.json"
    print(f"{job}: {how}, bring results.json back, and give it to `{back}`")


def _take(
    run: Path, results: Path, places: list[OnDevice], checks: dict[str, Checks], which: dict[str, str], arch: ArchConfig
) -> None:
    """Keep what a device wrote of the network. Its job has ended then, and also where it cannot be used: the device would
    give the same again."""
    measured, manifest = read_results(results)
    if manifest["verify"] != which:
        raise InputError(f"{results} does not measure the network of this search: export its job with --from RUN --verify")
    place = next((place for place in places if place.name == manifest["device"]), None)
    if place is None:
        names = " or ".join(place.name for place in places)
        raise InputError(
            f"{results} is of {manifest['device']}, but the search was for {names}: give the results of its own job"
        )
    _refuse_another_device(results, measured, place.table)
    visits = visits_of(measured).get(which["network"])
    job, again = _job_of(run, places, place), f"nas-search --from {shlex.quote(str(run))} --verify"
    try:
        if visits is None:
            raise InputError(f"{results}: the device could not run the network ({measured['flags'][which['network']]})")
        refuse_noise(visits_of(measured), f"`{again}` makes a job anew: run it when the device has nothing else to do")
    except (InputError, TooNoisy):
        end_run(job)
        raise
    for warning in _warnings(measured, manifest, which["network"]):
        say(f"warning: {warning}")
    checks[place.name].add(arch, summarise(visits, table_reference(place.table), SESSION_VISITS))
    end_run(job)


def _warnings(results: dict[str, Any], manifest: dict[str, Any], network: str) -> list[str]:
    """Return what speaks against trusting what a device wrote of the network, a sentence each."""
    said = place_of(results, manifest)["warnings"]
    found = [one_line(str(warning)) for warning in said] if isinstance(said, list) else []
    if results["flags"].get(network) == "off-npu":
        found.append("some operations of the network ran off the Neural Engine: its time is that of the detour")
    return found


def _measured_network(run: Path) -> Path:
    """Return the file of the network that is to be measured: the candidate for more, where there is one."""
    candidate = run / CANDIDATE
    return candidate if candidate.exists() else run / "searched.yaml"


def _refuse_another_device(path: Path, results: dict[str, Any], table: LatencyTable) -> None:
    place = results["environment"]
    for name in HARDWARE:
        was, now = table.meta.get(name), place.get(name)
        if was and now and was != now:
            raise InputError(f"{path} was measured on {now}, but the table of {table.device} on {was}: run the job there")
    if place.get("runtime_version") not in (None, table.meta.get("runtime_version")):
        say(
            f"warning: measured with {place.get('runtime')} {place['runtime_version']}, the table with "
            f"{table.meta.get('runtime_version')}: they may differ"
        )


def _export(folder: Path, arch: ArchConfig, table: LatencyTable, space: SearchSpace, which: dict[str, str]) -> Path:
    name = which["network"]
    if not takes_jobs(table.device):
        raise InputError(f"networks for {table.device} are measured by nas-search on the machine with it, not by a job")
    plan = Plan(
        pieces=(),
        networks=(name,),
        rows=(),
        smallest=name,
        touched_bytes={},
        strict_visits=ALONE_MAX_VISITS,
    )
    export_job(
        folder,
        space,
        in_many_sessions(Work({}, [arch], arch, plan)),
        device=table.device,
        form="coreml" if table.on_coreml else "onnx",
        threads=int(table.meta.get("threads", 1)),
        precision=str(table.meta.get("precision", "fp32")),
        batch=table.batch,
        run=run_of(folder),
        verify=which,
        replaces=True,
    )
    return folder
