"""Measure on a device that runs elsewhere: a folder of models goes there, `results.json` comes back.

The folder holds `manifest.json` (the plan, and every model's hash), the models without their large weights, which are
made on the device, and, for ONNX, `run_job.py` with the very modules that make the visits of this machine's own table. The
same request gives the same folder, byte for byte, so a device goes on where it was. What this machine hands over itself has
a number beside, because the device may have kept an earlier job of the same request, from here or from elsewhere (see
`run_of`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import platformdirs
import torch

from nas.device_ids import PHONES, is_id, suffix
from nas.export_forms import COREML, ONNX, require_current_form
from nas.measure import CACHED, STREAMING, Model, build_module, input_shape, name_of
from nas.onnx_weights import without_weights
from nas.plan import PROTOCOL, Work
from nas.profilers.bench import JOB_SCHEMA, MIN_MS_OF_A_CALL
from nas.profilers.ort_cpu import OrtCpu
from nas.profilers.ort_session import cpu_id
from nas.profilers.timing import DISCARDED, MAX_CALLS, MIN_CALLS, VISIT_MS, References, Visit
from nas.progress import Tick, progress, say
from nas.table import space_sha256
from supernet.errors import InputError, first_line
from supernet.files import PART, parse_yaml, read_json, write_atomically
from supernet.space import SearchSpace

FORMATS = ("onnx", "coreml")
PROFILERS = Path(__file__).parent / "profilers"
RUN = "run"  # in a job folder that this machine hands over itself: the number of the job in progress
OURS = {"models", "nas", "run_job.py", "run_job.lock", "results.json", RUN}  # in a job folder, beside its manifest
REQUEST = ("device", "format", "space", "seed", "verify", "threads", "precision", "batch")  # in a manifest and its settings
TRAVELLING = ("__init__", "timing", "bench", "ort_session", "run_job")  # modules of nas.profilers
DEVICE_BATCH_BYTES = 256 << 20  # of models that are open at once on a device of unknown memory


def export_job(
    folder: Path,
    space: SearchSpace,
    work: Work,
    *,
    device: str | None,
    form: str = "onnx",
    threads: int = 1,
    precision: str | None = None,
    batch: int = 1,
    seed: int = 0,
    run: int = 0,
    verify: Mapping[str, Any] | None = None,
    replaces: bool = False,
) -> Path:
    """Write a job folder and return its manifest's path. It is whole or has no manifest.

    `device` is the id that the table will have; None: the device names itself. The same request again is the same job, which a
    device goes on with; `run` tells those apart that are to be measured anew. `verify` names the run of a search whose found
    network is to be measured, instead of a table. `replaces`: the folder is this package's own, where a job replaces that of
    another request.

    Raises:
        InputError: the device id, the format or a setting is not allowed, or the folder holds something else or, unless it
            `replaces` that, the job of another request.
    """
    if device is not None:
        check_device_id(device)
    settings = _settings(form, device, threads, precision, batch)
    manifest: dict[str, Any] = {
        "schema": JOB_SCHEMA,
        "device": device,
        "format": form,
        "space": space.to_yaml(),
        "seed": seed,
        "run": run,
        "protocol": PROTOCOL,
        "settings": settings,
        "plan": {
            **asdict(work.plan),
            "batch_models": 32,
            "batch_bytes": DEVICE_BATCH_BYTES,
        },
        "rows": [str(layer) for layer in work.rows],
        "references": [name_of(CACHED), name_of(STREAMING)],
        "verify": verify,
        "made_with": {"torch": torch.__version__, "onnx": onnx.__version__, "code_sha256": _code_sha256()},
        "models": {},
    }
    if form == "coreml":
        from nas.profilers.coreml import LOAD_TIMEOUT_S, WARM_UP_CALLS, WARM_UP_MS

        manifest["timing"] = {
            "warm_up_ms": int(WARM_UP_MS),
            "warm_up_calls": WARM_UP_CALLS,
            "discarded": DISCARDED,
            "min_calls": MIN_CALLS,
            "max_calls": MAX_CALLS,
            "visit_ms": VISIT_MS,
            "load_timeout_s": int(LOAD_TIMEOUT_S),
            "seed": seed,
        }
    before, asked = _manifest_there(folder), json.loads(json.dumps(manifest))
    if before is not None and not replaces:
        _refuse_another(folder, before, asked)
    if before is not None and {**before, "models": {}} == asked and before["models"].keys() == work.models.keys():
        say(f"{folder} already holds this job")
        return folder / "manifest.json"
    if form == "coreml":
        from nas.coreml_package import coremltools

        coremltools()  # it may be missing: before what is there goes
    known = before["models"] if before is not None and before["made_with"] == manifest["made_with"] else {}
    try:
        (folder / "models").mkdir(parents=True, exist_ok=True)
        for left_over in [folder / "manifest.json", *folder.glob(f".*{PART}")]:
            left_over.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be written ({error.strerror}): give another --export-job") from error
    models = work.models
    with progress(f"writing {len(models)} models", len(models)) as tick:
        _write_models(folder, models, manifest, known, OrtCpu(threads, settings["precision"], batch), form, tick)
    kept = {Path(entry["file"]).name for entry in manifest["models"].values()}
    for left_over in [path for path in (folder / "models").iterdir() if _is_model(path) and path.name not in kept]:
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
    if form == "onnx":
        package = folder / "nas" / "profilers"
        package.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "nas" / "__init__.py", "")
        for name in TRAVELLING:
            to = folder / "run_job.py" if name == "run_job" else package / f"{name}.py"
            shutil.copyfile(PROFILERS / f"{name}.py", to)
    text = json.dumps(manifest, indent=1) + "\n"
    write_atomically(_kept_manifest(hashlib.sha256(text.encode()).hexdigest()), text)
    write_atomically(folder / "manifest.json", text)
    return folder / "manifest.json"


def _code_sha256() -> str:
    """Return what identifies the code that travels."""
    return hashlib.sha256(b"".join((PROFILERS / f"{name}.py").read_bytes() for name in TRAVELLING)).hexdigest()


def _manifest_there(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a job folder, with those models that are there; None where there is no such folder or an empty
    one."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    strangers = {path.name for path in folder.iterdir()} - {*OURS, "manifest.json"} if folder.is_dir() else {folder.name}
    strangers = {name for name in strangers if not name.startswith(("samples-", ".DS_")) and not name.endswith(PART)}
    strangers |= {path.name for path in folder.glob("models/*") if not _is_model(path)}
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        there = {name: entry for name, entry in found["models"].items() if (folder / entry["file"]).exists()}
        if "made_with" in found and isinstance(found["settings"], dict):
            return {**found, "models": there}
        strangers.add("manifest.json")
    except (KeyError, TypeError, AttributeError):
        strangers.add("manifest.json")
    except (OSError, ValueError):
        pass  # a kill came before it was written
    if strangers:
        raise InputError(f"{folder} is there and is no job folder: give --export-job a folder that is new or empty")
    return None


def _is_model(path: Path) -> bool:
    """Whether a file or folder is named as the models of jobs are."""
    return re.fullmatch(r"[0-9a-f]{16}\.(onnx|mlpackage)", path.name) is not None or path.name.endswith(PART)


def _refuse_another(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to write a job (manifest `now`) over one of another request (`before`). What the version of this package decides,
    such as the export form, is no request: what an earlier version exported is exported anew in its place."""
    was, wanted = ({**manifest, **manifest["settings"]} for manifest in (before, now))
    if differing := [name for name in REQUEST if was.get(name) != wanted.get(name)]:
        space = parse_yaml(was.get("space"), f"the space of the job in {folder}").get("name")
        whose = was.get("device") or "a device that names itself"
        raise InputError(
            f"{folder} holds the job of {whose} for space {space}, which is of another {' and '.join(differing)}: "
            "give another --export-job"
        )


def job_folder(space: SearchSpace, settings: str) -> Path:
    """Where a job that this machine hands over itself is kept."""
    return _cache() / "jobs" / f"{space.name}-{space_sha256(space)[:8]}{settings}"


def run_of(folder: Path) -> int:
    """Return the number of the job in progress in a folder, a new one where there is none.

    Devices keep what they have measured of a job, by its manifest's hash. With a number of its own, a job that is handed over
    anew, here or from a machine that knows nothing of this one, is measured anew; one that was stopped keeps its number.
    """
    path = folder / RUN
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    number = time.time_ns()
    write_atomically(path, f"{number}\n")
    return number


def end_run(folder: Path) -> None:
    """Let the next job of a folder be measured anew: the results of this one were read."""
    (folder / RUN).unlink(missing_ok=True)


def _cache() -> Path:
    return Path(platformdirs.user_cache_dir("metapath-nas", appauthor=False))


def check_device_id(device: str) -> None:
    """Refuse what cannot be the id of a device that runs elsewhere."""
    if device in PHONES:
        raise InputError(f"{device} is a kind of device: name the very one, such as {device.replace('iphone', 'iphone15pro')}")
    if not is_id(device):
        raise InputError(
            f"{device!r} cannot be a device id: give <model>-<unit>, small letters, digits, dots and dashes, such as "
            "raspberrypi5-cpu or iphone15pro-npu"
        )


def _settings(form: str, device: str | None, threads: int, precision: str | None, batch: int) -> dict[str, Any]:
    if form == "onnx":
        precision = precision or "fp32"
        if precision not in ONNX:
            raise InputError(f"an ONNX job cannot have the precision {precision!r}: allowed are {', '.join(ONNX)}")
        common = {"runtime": "onnxruntime", "export": ONNX[precision]}
    else:
        if precision not in (None, "fp16") or threads != 1:
            raise InputError("a Core ML job has the precision fp16 and one thread: leave --precision and --threads out")
        if device is None:
            raise InputError("a Core ML job must say whose it is: --device iphone15pro-npu, say")
        unit = "CPU_ONLY" if device.endswith("-cpu") else "CPU_AND_NE"
        precision = "fp16"
        common = {"runtime": "coreml", "export": COREML, "compute_units": unit}
    return {**common, "precision": precision, "batch": batch, "threads": threads}


def _write_models(
    folder: Path,
    models: Mapping[str, Model],
    manifest: dict[str, Any],
    known: Mapping[str, Any],
    profiler: OrtCpu,
    form: str,
    tick: Tick,
) -> None:
    """Write the models and say them in the manifest; `known` are entries of models that are there."""
    for name, model in models.items():
        # A model's file is named after all that it is made of, so what a kill left behind can be gone on with.
        key = hashlib.sha256(f"{name} {json.dumps(manifest['settings'])} {manifest['made_with']}".encode()).hexdigest()[:16]
        entry: dict[str, Any] = {"file": f"models/{key}.{'onnx' if form == 'onnx' else 'mlpackage'}"}
        if known.get(name, {}).get("file") == entry["file"]:
            entry = known[name]
        elif form == "onnx":
            data, weights = without_weights(profiler.onnx(model))
            entry |= {"sha256": hashlib.sha256(data).hexdigest(), "weights": weights}
            write_atomically(folder / entry["file"], data)
        else:
            from nas.coreml_package import package_sha256, save_package

            path = folder / entry["file"]
            if not path.exists():
                module, example = build_module(model, profiler.batch, deploy=True)
                save_package(module, example, path, key=name)
            shape = list(input_shape(model, profiler.batch))
            entry |= {"sha256": package_sha256(path), "input": {"name": "x", "shape": shape, "dtype": "float16"}}
        manifest["models"][name] = entry
        tick(1)


def _kept_manifest(sha256: str) -> Path:
    """Where the manifest of a job that was exported here is kept, so that results find it."""
    return _cache() / "jobs" / f"{sha256}.json"


def read_results(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the results of a job and the manifest that they belong to, which lies beside them or was exported here.

    Visits of models that the device could not go on with (flagged, but not as off the Neural Engine) are left out.

    Raises:
        InputError: it is no results file, its job is unknown, a model lacks visits, or the numbers are not milliseconds.
    """
    try:
        results = read_json(path, "the results file", "bring results.json from the device again")
        job, schema, unit, place = (results[k] for k in ("job_sha256", "schema", "unit", "environment"))
        flags = {str(name): str(word) for name, word in (results.get("flags") or {}).items()}
        failed = {name for name, word in flags.items() if word != "off-npu"}
        visits = {
            str(name): [list(map(float, v)) for v in made] for name, made in results["visits"].items() if name not in failed
        }
        if not isinstance(place, dict):
            raise ValueError("it does not say where it was measured")
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        why = first_line(error)
        raise InputError(f"{path} is no whole results file ({why}): bring results.json from the device again") from error
    if schema != JOB_SCHEMA:
        raise InputError(f"{path} has schema {schema!r}, this version reads {JOB_SCHEMA}: export the job anew and run it")
    if unit != "ms":
        raise InputError(f"the times in {path} are in {unit!r}; only milliseconds ('ms') are taken: run the job's own program")
    manifest = _manifest_of(path, str(job))
    require_current_form(str(path), manifest["settings"], "export the job anew and run it")
    plan = manifest["plan"]
    needed = {*plan["pieces"], *plan["networks"]} - failed
    missing = [name for name in sorted(needed) if len(visits.get(name, ())) < plan["min_visits"]]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of {len(needed)} models, {missing[0]!r} first: start run_job.py on the device again, "
            "it goes on where it was"
        )
    for name, made in visits.items():
        for visit in made:
            if not (len(visit) == 3 and all(0 < ms < math.inf for ms in visit)):
                raise InputError(f"{path} has a visit of {name!r} that is not three positive times: {visit}")
    quickest = min((ms for made in visits.values() for visit in made for ms in visit), default=math.inf)
    if quickest < MIN_MS_OF_A_CALL:
        raise InputError(
            f"the shortest time in {path} is {quickest:.2g} ms, which no call of a runtime takes: the times look like "
            "seconds; run the job's own program"
        )
    return {**results, "visits": visits, "flags": flags}, manifest


def _manifest_of(path: Path, job: str) -> dict[str, Any]:
    for candidate in (path.parent / "manifest.json", _kept_manifest(job)):
        with contextlib.suppress(OSError):
            data = candidate.read_bytes()
            if hashlib.sha256(data).hexdigest() == job:
                manifest: dict[str, Any] = json.loads(data)
                return manifest
    raise InputError(
        f"{path} belongs to a job whose manifest (sha256 {job[:12]}...) is neither beside it nor was exported here: "
        "put it into its job's folder, or run this job's own program"
    )


def visits_of(results: Mapping[str, Any]) -> dict[str, list[Visit]]:
    """Return the visits of a results file, by model."""
    return {
        name: [Visit(float(raw), References(float(cached), float(streaming))) for raw, cached, streaming in made]
        for name, made in results["visits"].items()
    }


def place_of(results: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a table says of where the results were measured.

    An app that a person ran by hand leaves the warnings to whoever reads its results.
    """
    warnings = []
    if manifest["format"] == "coreml":
        from nas.profilers.iphone import warnings_about

        warnings = warnings_about(results)
    place = {"runtime_version": "unknown", "warnings": warnings, **results["environment"], **manifest["settings"]}
    return {**place, "job_sha256": results["job_sha256"], "started_at": results.get("started_at")}


def device_of(results: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Return the device id of results: the manifest's, or from what the device says of its processor."""
    if results.get("device") != manifest["device"]:
        raise InputError(
            f"the results are of {results.get('device')}, their job is for {manifest['device']}: run the job on its own device"
        )
    if manifest["device"] is not None:
        check_device_id(str(manifest["device"]))
        return str(manifest["device"])
    settings = manifest["settings"]
    return cpu_id(str(results["environment"].get("cpu", ""))) + suffix(
        *(settings[k] for k in ("threads", "precision", "batch"))
    )
