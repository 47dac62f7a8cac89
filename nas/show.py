"""Tables and latencies, printed for people (or as JSON)."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nas.progress import say
from nas.table import LatencyTable, Row, find_tables
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


def show_table(device: str, folder: Path) -> None:
    """Print one table for people, and draw its blocks' milliseconds over their width into `folder`/<device>.png."""
    from nas.audit import doubts

    table = LatencyTable.load(device)
    meta = table.meta
    threads = meta.get("threads")
    settings = (
        f"{meta.get('runtime')} {meta.get('runtime_version')}, {meta.get('precision')}, batch {meta.get('batch')}, "
        f"{threads} thread{'s' if threads != 1 else ''}"
    )
    print(f"{table.device}: {table.provenance} {str(meta.get('measured_at', 'at an unknown time'))[:16]}")
    print(f"  {meta.get('cpu') or meta.get('gpu') or meta.get('device_name', '')}, {meta.get('os', '')}")
    print(f"  {settings}")
    for warning in meta.get("warnings", ()):
        print(f"  warning: {warning}")
    for c in table.calibrations:
        print(f"{c.space}, {c.image_size} px: predictions of {c.n_check} networks that took no part in the fit ({c.n_fit} did)")
        print(
            f"  off by {c.mean_error_percent:.1f} % on average, {c.max_error_percent:.1f} % at most; within 5 %: "
            f"{c.within_5_percent:.0f} %, within 10 %: {c.within_10_percent:.0f} %; Kendall tau {c.kendall_tau:.2f}"
        )
        print(f"  ms = {c.offset_ms:.4g} + ({c.scale:.4g} + {c.scale_per_mparam:.4g} x million parameters) x sum of rows")
        signed = [f"stage {i} {e:+.1f} %" for i, e in enumerate(c.error_by_stage_percent, 1)]
        signed += [f"{kind} {e:+.1f} %" for kind, e in c.error_by_kind_percent.items()]
        print(f"  signed error, weighted by share: {', '.join(signed)}")
    shown = Table(box=box.SIMPLE)
    for column in ("kind", "at px", "rows", "method", "ms", "half-width", "flagged"):
        shown.add_column(column, justify="left" if column in ("kind", "method") else "right")
    groups: dict[tuple[str, int], list[Row]] = {}
    for (spec, side), row in table.rows.items():
        groups.setdefault((spec.kind, side), []).append(row)
    for (kind, side), rows in sorted(groups.items()):
        half = median(50 * (row.high_ms - row.low_ms) / abs(row.ms) if row.ms else 0.0 for row in rows)
        ends = f"{min(r.ms for r in rows):.4g} to {max(r.ms for r in rows):.4g}"
        cells = [kind, side, len(rows), rows[0].method, ends, f"{half:.1f} %", sum(bool(r.flag) for r in rows) or ""]
        shown.add_row(*map(str, cells))
    Console().print(shown)
    for doubt in doubts(table):
        expected = f", not {doubt.expected_ms:.4g}" if doubt.expected_ms is not None else ""
        print(f"  {doubt.layer}: {doubt.ms:.4g} ms{expected}: {doubt.why}")
    path = folder / f"{table.device}.png"
    draw_table(table, path)
    print(f"drawn: {path}")


def draw_table(table: LatencyTable, path: Path) -> None:
    """Draw the milliseconds of every kind of block over its width, a line for each resolution, with 95 % intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: dict[str, dict[int, list[tuple[int, Row]]]] = {}
    for (spec, side), row in table.rows.items():
        if row.method == "slope":
            lines.setdefault(spec.kind, {}).setdefault(side, []).append((spec.dim, row))
    figure = Figure(figsize=(5.2 * max(1, len(lines)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(lines)), squeeze=False, sharey=True)[0]
    for axis, (kind, sides) in zip(axes, sorted(lines.items()), strict=False):
        for side, points in sorted(sides.items(), reverse=True):
            widths, rows = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            middle = [row.ms for row in rows]
            spread = [[row.ms - row.low_ms for row in rows], [row.high_ms - row.ms for row in rows]]
            axis.errorbar(widths, middle, yerr=spread, marker="o", markersize=3, linewidth=1, capsize=2, label=f"{side} px")
        axis.set(title=kind, xlabel="width (channels)", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize="small")
    axes[0].set_ylabel(f"ms of one call, batch {table.meta.get('batch', 1)}")
    figure.suptitle(f"{table.device}: {table.meta.get('runtime')} {table.meta.get('precision')}", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


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
