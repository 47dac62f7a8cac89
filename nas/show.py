"""Tables and latencies, printed for people (or as JSON)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nas.progress import say
from nas.table import LatencyTable, find_tables
from supernet.arch import ArchConfig
from supernet.errors import InputError, unknown
from supernet.zoo import load_arch


def print_tables() -> None:
    """Print every table that can be found: device, rows, spaces, error, where."""
    found = find_tables()
    if not found:
        print("no latency tables yet: measure this machine's with `nas-build-lut --device cpu`")
        return
    for device, path in found.items():
        try:
            table = LatencyTable.load(path)
        except InputError as error:
            print(f"{device}: unusable: {error}")
            continue
        date = str(table.meta.get("measured_at", "at an unknown time"))[:10]
        print(f"{device}: {len(table.rows)} rows, {table.provenance} {date}")
        for c in table.calibrations:
            print(f"  {c.space}: off by {c.mean_error_percent:.1f} % on average over {c.n_check} unseen networks")
        print(f"  {path}")


def print_profile(network: str, device: str | None, *, layers: bool, as_json: bool) -> None:
    """Print the predicted and the measured milliseconds of a network, by layer if asked."""
    from nas.devices import KINDS, known_devices, open_profiler, profiler_of
    from nas.measure import measure_alone, table_reference

    found = find_tables()
    if device in found:
        table: LatencyTable | None = LatencyTable.load(found[str(device)])
        assert table is not None
        profiler, wanted = profiler_of(table), table.device
    else:
        try:
            profiler = open_profiler(device or "cpu")
        except InputError as error:
            raise (error if device in KINDS else unknown("device", device, known_devices())) from None
        wanted = profiler.id
        table = LatencyTable.load(found[wanted]) if wanted in found else None
    predicted_ms: float | None = None
    arch: ArchConfig | None = None
    if network.endswith(".onnx"):
        if layers:
            raise InputError("--layers takes a network whose layers are known: give its YAML file instead of an ONNX model")
        run = _onnx_session(Path(network))
    else:
        arch = load_arch(network)
        predicted_ms = _predict(table, arch, wanted, network)
        run = None
    measured = None
    what = run or arch
    if profiler is not None and what is not None:
        measured = measure_alone(profiler, what, table_reference(table) if table is not None else None)
    record: dict[str, Any] = {
        "network": network,
        "predicted_ms": predicted_ms,
        "measured_ms": measured.ms if measured else None,
        "measured_low_ms": measured.low_ms if measured else None,
        "measured_high_ms": measured.high_ms if measured else None,
        "raw_ms": measured.raw_ms if measured else None,
        "device": wanted,
        "table": str(found[wanted]) if table is not None else None,
    }
    rows = []
    if layers and arch is not None and table is not None and not table.missing(arch.layers()):
        rows = [{"layer": name, "what": str(layer), "ms": table.layer_ms(layer)} for name, layer in arch.named_layers()]
        record["layers"] = rows
    if as_json:
        print(json.dumps(record, indent=2))
        return
    if rows:
        shown = Table(box=box.SIMPLE)
        for column in ("layer", "what", "ms"):
            shown.add_column(column, justify="right" if column == "ms" else "left")
        for row in rows:
            shown.add_row(str(row["layer"]), str(row["what"]), f"{row['ms']:.4f}")
        Console().print(shown)
    print(f"{network} on {wanted}, batch 1, one thread")
    print(f"  predicted  {'no table' if predicted_ms is None else f'{predicted_ms:.4g} ms'}")
    if measured is not None:
        print(
            f"  measured   {measured.ms:.4g} ms (95 %: {measured.low_ms:.4g} to {measured.high_ms:.4g}; "
            f"{measured.visits} visits; raw {measured.raw_ms:.4g} ms)"
        )
    else:
        print("  measured   not here: this machine is another device")


def _predict(table: LatencyTable | None, arch: ArchConfig, device: str, network: str) -> float | None:
    if table is None:
        say(f"no latency table of {device}: make one with `nas-build-lut --device cpu --arch {network}`")
        return None
    try:
        return table.predict_ms(arch)
    except InputError:
        missing = len(table.missing(arch.layers()))
        why = f"has no row for {missing} layers of it" if missing else f"is not calibrated for {arch.image_size} px"
        say(f"the table of {device} {why}: measure with `nas-build-lut --device cpu --missing --arch {network}`")
        return None


def _onnx_session(path: Path) -> Any:
    from nas.profilers.ort_session import OrtModel

    if not path.is_file():
        raise InputError(f"the model {path} does not exist: give an ONNX file")
    try:
        return OrtModel(path.read_bytes())
    except Exception as error:  # ONNX Runtime has no common base for what invalid models raise
        raise InputError(f"ONNX Runtime cannot load {path} ({str(error).splitlines()[0][:120]}): give a valid model") from error
