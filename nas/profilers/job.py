"""Measure on a device that runs elsewhere: a folder of models goes there, `results.json` comes back.

The folder holds `manifest.json` (the plan, and every model's hash), the models without their large weights, which are
made on the device, and, for ONNX, `run_job.py` with the very modules that time this machine's CPU. The same request
gives the same folder, byte for byte, so a device goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import onnx
import platformdirs
import torch
from onnx import TensorProto, external_data_helper, numpy_helper

from nas.measure import CACHED, STREAMING, build_module, input_shape, name_of
from nas.plan import Work
from nas.profilers.bench import MIN_MS_OF_A_CALL
from nas.profilers.ort_cpu import EXPORT_FORMS, OrtCpu
from nas.profilers.timing import References, Visit
from nas.progress import Tick, progress, say
from nas.table import space_sha256
from supernet.errors import InputError
from supernet.files import write_atomically
from supernet.space import SearchSpace

SCHEMA = 1
FORMATS = ("onnx", "coreml")
LARGE = 256  # elements; a weight of more is made on the device
TRAVELLING = ("__init__", "timing", "bench", "ort_session")  # modules of nas.profilers that run_job.py needs
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
    verify: Mapping[str, Any] | None = None,
) -> Path:
    """Write a job folder and return its manifest's path. It is whole or has no manifest.

    `device` is the id that the table will have; None: the device names itself. `verify` names the run of a search whose
    found network is to be measured, instead of a table.
    """
    if device is not None:
        check_device_id(device)
    settings = _settings(form, device, threads, precision, batch)
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "device": device,
        "format": form,
        "space": space.to_yaml(),
        "seed": seed,
        "settings": settings,
        "timing": {
            "warm_up_ms": 300,
            "warm_up_calls": 50,
            "discarded": 5,
            "min_calls": 3,
            "max_calls": 9,
            "visit_ms": 1.0,
            "load_timeout_s": 60,
            "seed": seed,
        },
        "plan": {
            **asdict(work.plan),
            "batch_models": 32,
            "batch_bytes": DEVICE_BATCH_BYTES,
        },
        "rows": [str(layer) for layer in work.rows],
        "references": [name_of(CACHED), name_of(STREAMING)],
        "verify": verify,
        "made_with": {"torch": torch.__version__, "onnx": onnx.__version__},
        "models": {},
    }
    if _is_there(folder / "manifest.json", manifest):
        say(f"{folder} already holds this job")
        return folder / "manifest.json"
    (folder / "models").mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    models = work.models
    with progress(f"writing {len(models)} models", len(models)) as tick:
        _write_models(folder, models, manifest, OrtCpu(threads, settings["precision"], batch), form, tick)
    if form == "onnx":
        here = Path(__file__).parent
        (folder / "nas" / "profilers").mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "nas" / "__init__.py", "")
        for name in TRAVELLING:
            shutil.copyfile(here / f"{name}.py", folder / "nas" / "profilers" / f"{name}.py")
        shutil.copyfile(here / "run_job.py", folder / "run_job.py")
    text = json.dumps(manifest, indent=1) + "\n"
    write_atomically(_kept_manifest(hashlib.sha256(text.encode()).hexdigest()), text)
    write_atomically(folder / "manifest.json", text)
    return folder / "manifest.json"


def _is_there(path: Path, request: Mapping[str, Any]) -> bool:
    """Say whether the manifest is there and differs from the request by its models alone."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return {**found, "models": {}} == json.loads(json.dumps(request))


def job_folder(space: SearchSpace, settings: str) -> Path:
    """Where a job that this machine hands over itself is kept."""
    return _cache() / "jobs" / f"{space.name}-{space_sha256(space)[:8]}{settings}"


def _cache() -> Path:
    return Path(platformdirs.user_cache_dir("metapath-nas", appauthor=False))


def check_device_id(device: str) -> None:
    """Refuse what cannot be a device id."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*-(cpu|npu|gpu)(-[a-z0-9.-]+)?", device):
        raise InputError(
            f"{device!r} cannot be a device id: give <model>-<unit>, small letters, digits, dots and dashes, such as "
            "raspberrypi5-cpu or iphone15pro-npu"
        )


def _settings(form: str, device: str | None, threads: int, precision: str | None, batch: int) -> dict[str, Any]:
    if form == "onnx":
        precision = precision or "fp32"
        if precision not in EXPORT_FORMS:
            raise InputError(f"an ONNX job cannot have the precision {precision!r}: allowed are {', '.join(EXPORT_FORMS)}")
        common = {"runtime": "onnxruntime", "export": EXPORT_FORMS[precision]}
    else:
        if precision not in (None, "fp16") or threads != 1:
            raise InputError("a Core ML job has the precision fp16 and one thread: leave --precision and --threads out")
        if device is None:
            raise InputError("a Core ML job must say whose it is: --device iphone15pro-npu, say")
        unit = "CPU_ONLY" if device.endswith("-cpu") else "CPU_AND_NE"
        precision = "fp16"
        common = {"runtime": "coreml", "export": "mlprogram, iOS 16, fp16 in and out", "compute_units": unit}
    return {**common, "precision": precision, "batch": batch, "threads": threads}


def _write_models(
    folder: Path, models: Mapping[str, Any], manifest: dict[str, Any], profiler: OrtCpu, form: str, tick: Tick
) -> None:
    for number, (name, model) in enumerate(models.items()):
        entry: dict[str, Any]
        if form == "onnx":
            data, weights = without_weights(profiler.onnx(model))
            entry = {"file": f"models/m{number:04d}.onnx", "sha256": hashlib.sha256(data).hexdigest(), "weights": weights}
            write_atomically(folder / entry["file"], data)
        else:
            from nas.profilers.coreml import package_sha256, save_package

            entry = {"file": f"models/m{number:04d}.mlpackage"}
            path = folder / entry["file"]
            if not path.exists():
                module, example = build_module(model, profiler.batch)
                save_package(module, example, path, key=name)
            shape = list(input_shape(model, profiler.batch))
            entry |= {"sha256": package_sha256(path), "input": {"name": "x", "shape": shape, "dtype": "float16"}}
        manifest["models"][name] = entry
        tick(1)


def without_weights(data: bytes) -> tuple[bytes, list[dict[str, Any]]]:
    """Return an ONNX model whose large weights are left out, and what they are: name, dtype, shape, standard deviation."""
    model = onnx.load_from_string(data)
    left_out = []
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= LARGE or tensor.data_type not in (TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8):
            continue
        array = numpy_helper.to_array(tensor)
        dtype = str(array.dtype)
        left_out.append({"name": tensor.name, "dtype": dtype, "shape": list(array.shape), "std": round(float(array.std()), 6)})
        tensor.ClearField("float_data")
        tensor.ClearField("int32_data")
        tensor.raw_data = b""
        external_data_helper.set_external_data(tensor, location="made-on-the-device", offset=0, length=array.nbytes)
        tensor.ClearField("raw_data")
    return model.SerializeToString(), left_out


def _kept_manifest(sha256: str) -> Path:
    """Where the manifest of a job that was exported here is kept, so that results find it."""
    return _cache() / "jobs" / f"{sha256}.json"


def read_results(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the results of a job and the manifest that they belong to, which lies beside them or was exported here.

    Raises:
        InputError: it is no results file, its job is unknown, a model lacks visits, or the numbers are not milliseconds.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        job = results["job_sha256"]
        schema, unit, visits, place = (results[k] for k in ("schema", "unit", "visits", "environment"))
    except OSError as error:
        raise InputError(f"the results file {path} cannot be read ({error.strerror}): give what run_job.py wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no whole results file ({error}): bring results.json from the device again") from error
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema!r}, this version reads {SCHEMA}: export the job anew and run it")
    if unit != "ms":
        raise InputError(f"the times in {path} are in {unit!r}; only milliseconds ('ms') are taken: run the job's own program")
    manifest = _manifest_of(path, str(job))
    plan = manifest["plan"]
    needed = {*plan["pieces"], *plan["networks"]}
    missing = [name for name in sorted(needed) if len(visits.get(name, ())) < plan["min_visits"]]
    missing = [name for name in missing if name not in results.get("flags", {})]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of {len(needed)} models, {missing[0]!r} first: start run_job.py on the device again, "
            "it goes on where it was"
        )
    for name, made in visits.items():
        for visit in made:
            if not (len(visit) == 3 and all(isinstance(ms, int | float) and 0 < ms < math.inf for ms in visit)):
                raise InputError(f"{path} has a visit of {name!r} that is not three positive times: {visit}")
    quickest = min((ms for made in visits.values() for visit in made for ms in visit), default=math.inf)
    if quickest < MIN_MS_OF_A_CALL:
        raise InputError(
            f"the shortest time in {path} is {quickest:.2g} ms, which no call of a runtime takes: the times look like "
            "seconds; run the job's own program"
        )
    if not isinstance(place, dict):
        raise InputError(f"{path} does not say where it was measured: run the job's own program")
    return results, manifest


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
    """Return what a table says of where the results were measured."""
    place = {"runtime_version": "unknown", "warnings": [], **results["environment"], **manifest["settings"]}
    return {**place, "job_sha256": results["job_sha256"], "started_at": results.get("started_at")}


def device_of(results: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Return the device id of results: the manifest's, or from what the device says of its processor."""
    from nas.profilers.ort_cpu import suffix
    from nas.profilers.ort_session import cpu_id

    if results.get("device") != manifest["device"]:
        raise InputError(
            f"the results are of {results.get('device')}, their job is for {manifest['device']}: run the job on its own device"
        )
    if manifest["device"] is not None:
        return str(manifest["device"])
    settings = manifest["settings"]
    return cpu_id(str(results["environment"].get("cpu", ""))) + suffix(
        *(settings[k] for k in ("threads", "precision", "batch"))
    )


def run_over_ssh(url: str, folder: Path) -> Path:
    """Copy a job folder to `ssh://user@host[:port][/path/to/python]`, run it there, and bring its results back.

    The system's ssh and scp do it, with their configuration and keys; the folder stays there, so that a run that is
    stopped goes on.

    Raises:
        InputError: the address cannot be read, or one of the steps failed.
    """
    parts = urlsplit(url)
    if parts.scheme != "ssh" or not parts.hostname or parts.query:
        raise InputError(f"{url!r} is no address: give ssh://user@host, or ssh://user@host:port/path/to/python")
    host = f"{parts.username}@{parts.hostname}" if parts.username else parts.hostname
    if host.startswith("-"):
        raise InputError(f"{url!r} is no address: a host cannot begin with a dash")
    python = parts.path or "python3"
    job = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    there = f"metapath-nas-job-{job[:12]}"
    ssh = ["ssh", *(["-p", str(parts.port)] if parts.port else [])]
    scp = ["scp", "-q", *(["-P", str(parts.port)] if parts.port else [])]
    say(f"copying {folder} to {host}:{there}")
    _step(f"make a folder on {host}", [*ssh, host, f"mkdir -p {there}"])
    sent = [str(path) for path in sorted(folder.iterdir()) if path.name in ("manifest.json", "models", "nas", "run_job.py")]
    _step(f"copy the job to {host}", [*scp, "-r", *sent, f"{host}:{there}/"])
    say(f"running it on {host}")
    _step(f"run the job on {host}", [*ssh, host, f"cd {there} && {shlex.quote(python)} run_job.py"], shown=True)
    _step(f"bring the results from {host}", [*scp, f"{host}:{there}/results.json", str(folder / "results.json")])
    return folder / "results.json"


def _step(what: str, command: Sequence[str], shown: bool = False) -> None:
    try:
        done = subprocess.run(command, stdout=None if shown else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # noqa: S603
    except OSError as error:
        raise InputError(f"cannot {what}: {command[0]} is not there ({error.strerror}); install an OpenSSH client") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"cannot {what}: {last}")
