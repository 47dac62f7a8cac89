"""Verify the network of a search on a device that is elsewhere: a job goes there, its results repair the search."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from nas.job import Address, export_job, read_results, run_over_ssh, visits_of
from nas.kept import Checks
from nas.measure import measure_alone, name_of, table_reference
from nas.plan import Work
from nas.profilers.bench import Plan
from nas.profilers.timing import summarise
from nas.progress import say
from nas.search import CANDIDATE, Request, run_search
from nas.supernet_training import SupernetSettings
from nas.table import LatencyTable
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.files import write_atomically
from supernet.space import SearchSpace

VISITS = (12, 36, 60)  # of the network, by the end of each pass


def verify(run: Path, device: str | None = None, results: Path | None = None) -> dict[str, Any] | None:
    """Measure the network that a search found, search on if it misses its target, and return the new result.

    Where the table's device is this machine's, it is measured here; at `device`, `ssh://user@host`, there. Otherwise a job
    folder is written, and None returned; its `results` are given in a second call.

    Raises:
        InputError: the folder holds no finished search, or the results are of another network.
    """
    request, text = _finished(run)
    table = LatencyTable.load(Path(request["table"]))
    candidate = run / CANDIDATE
    arch = ArchConfig.load(candidate if candidate.exists() else run / "searched.yaml")
    checks = Checks(run / "measurements.csv", table)
    which = {"request_sha256": hashlib.sha256(text.encode()).hexdigest(), "network": name_of(tuple(arch.layers()))}
    if results is None and checks.profiler is not None:
        checks.add(arch, measure_alone(checks.profiler, arch, table_reference(table)))
    else:
        if results is None:
            address = Address.parse(device) if device is not None else None
            job = _export(run / "verify-job", arch, table, request, which)
            if address is None:
                how = (
                    "run the job on the phone (docs/coreml.md)"
                    if table.meta.get("runtime") == "coreml"
                    else ("copy it to the device, run `python3 run_job.py` there")
                )
                print(f"{job}: {how}, bring results.json back, and give it to `nas-search --from {run} --verify results.json`")
                return None
            results = run_over_ssh(address, job)
        measured, manifest = read_results(results)
        if manifest["verify"] != which:
            raise InputError(f"{results} does not measure the network of {run}: export its job with --from {run} --verify")
        _refuse_another_device(results, measured, table)
        visits = visits_of(measured).get(which["network"])
        if visits is None:
            raise InputError(f"{results}: the device could not run the network ({measured['flags'][which['network']]})")
        checks.add(arch, summarise(visits, table_reference(table)))
    return run_search(
        Request(
            target_ms=request["target_ms"],
            device=request["device"],
            table=Path(request["table"]),
            data=None if request["data"] == "digits" else Path(request["data"]),
            strategy=request["strategy"],
            out=run,
            seed=request["seed"],
            **_start(run, request),
        ),
        space=SearchSpace.from_dict(yaml.safe_load(request["space"]), f"the space of {run}"),
        settings=SupernetSettings(**request["settings"]),
        again=True,
    )


def _start(run: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The network and the weights that the search began with, if it did (--init)."""
    if "init" not in request:
        return {}
    path = run / "init.yaml"
    write_atomically(path, request["init"])
    return {"init": str(path), "weights": str(run / "init" / "given.safetensors")}


def _finished(run: Path) -> tuple[dict[str, Any], str]:
    try:
        text = (run / "request.json").read_text(encoding="utf-8")
        request = json.loads(text)
        json.loads((run / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{run} holds no finished search ({error}): give the --out folder of a nas-search that ended"
        ) from error
    return request, text


def _refuse_another_device(path: Path, results: dict[str, Any], table: LatencyTable) -> None:
    place = results["environment"]
    for name in ("cpu", "marketing_name"):
        was, now = table.meta.get(name), place.get(name)
        if was and now and was != now:
            raise InputError(f"{path} was measured on {now}, but the table of {table.device} on {was}: run the job there")
    if place.get("runtime_version") not in (None, table.meta.get("runtime_version")):
        say(
            f"warning: measured with {place.get('runtime')} {place['runtime_version']}, the table with "
            f"{table.meta.get('runtime_version')}: they may differ"
        )


def _export(folder: Path, arch: ArchConfig, table: LatencyTable, request: dict[str, Any], which: dict[str, str]) -> Path:
    name = which["network"]
    if "-cpu" not in table.device and "-npu" not in table.device:
        raise InputError(f"networks for {table.device} are measured by nas-search on the machine with it, not by a job")
    plan = Plan(pieces=(), networks=(name,), rows=(), smallest=name, between_bytes=0, passes=VISITS)
    export_job(
        folder,
        SearchSpace.from_dict(yaml.safe_load(request["space"]), "the space of the search"),
        Work({}, [arch], arch, plan),
        device=table.device,
        form="coreml" if table.meta.get("runtime") == "coreml" else "onnx",
        threads=int(table.meta.get("threads", 1)),
        precision=str(table.meta.get("precision", "fp32")),
        batch=int(table.meta.get("batch", 1)),
        verify=which,
    )
    return folder
