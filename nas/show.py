"""Latency tables, printed and drawn for people."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from nas.columns import print_columns
from nas.table import ON_MEDIANS, LatencyTable, Row, find_table, find_tables
from supernet.errors import InputError
from supernet.specs import label


def print_tables() -> None:
    """Print every table that can be found: device, rows, spaces, error, where."""
    found = find_tables()
    if not found:
        print("no latency tables yet: measure this machine's with `nas-build-lut --device cpu`")
        return
    for device, path in found.items():
        try:
            table = LatencyTable.load(path, any_form=True)
        except InputError as error:
            print(f"{device}: unusable: {error}")
            continue
        print(f"{device}: {len(table.rows)} rows, {table.provenance} {_when(table, 'YYYY-MM-DD')}")
        for c in table.calibrations:
            print(f"  {c.space}: off by {c.mean_error_percent:.1f} % on average over {c.n_check} unseen networks")
        print(f"  {path}")


def _when(table: LatencyTable, form: str) -> str:
    """Return when a table was measured, as far as `form` goes."""
    at = table.meta.get("measured_at")
    return str(at)[: len(form)] if at is not None else "at an unknown time"


def show_table(device: str, folder: Path) -> None:
    """Print one table for people, and draw its blocks' milliseconds over their width into `folder`/<device>.png."""
    from nas.audit import NOISY, doubts
    from nas.lut import rows_off_their_visits

    path = Path(device) if device.endswith(".csv") else find_table(device)
    table = LatencyTable.load(path, any_form=True)
    samples = path.with_suffix(".samples.csv")
    wrong = rows_off_their_visits(table, samples) if samples.is_file() else []
    meta = table.meta
    threads = meta.get("threads")
    settings = (
        f"{meta.get('runtime')} {meta.get('runtime_version')}, {meta.get('precision')}, batch {meta.get('batch')}, "
        f"{threads} thread{'s' if threads != 1 else ''}"
    )
    print(f"{table.device}: {table.provenance} {_when(table, 'YYYY-MM-DDThh:mm')}")
    print(f"  {table.hardware or 'hardware unknown'}, {meta.get('os', 'system unknown')}")
    print(f"  {settings}")
    for warning in meta.get("warnings", ()):
        print(f"  warning: {warning}")
    for c in table.calibrations:
        how = f"{c.n_check} networks that took no part in the fit to {c.n_fit} others"
        if meta.get(ON_MEDIANS) and not c.networks:
            how = f"{c.n_check} networks timed elsewhere, each left out of the fit in turn"
        print(f"{c.space}, {c.image_size} px: predictions of {how}")
        print(
            f"  off by {c.mean_error_percent:.1f} % on average, {c.max_error_percent:.1f} % at most; within 5 %: "
            f"{c.within_5_percent:.0f} %, within 10 %: {c.within_10_percent:.0f} %; Kendall tau {c.kendall_tau:.2f}"
        )
        sign = "-" if c.scale_between < 0 else "+"
        line = f"{c.scale:.4g} x sum of rows {sign} {abs(c.scale_between):.4g} x those of stem and embeddings"
        if c.bend:
            line = f"({line}) x (1 + {c.bend:.3g} x the same)"
        print(f"  ms = {c.offset_ms:.4g} + {line}")
        signed = [f"stage {i} {e:+.1f} %" for i, e in enumerate(c.error_by_stage_percent, 1)]
        signed += [f"{kind} {e:+.1f} %" for kind, e in c.error_by_kind_percent.items()]
        print(f"  signed error, weighted by share: {', '.join(signed)}")
    groups: dict[tuple[str, int], list[Row]] = {}
    for (spec, side), row in table.rows.items():
        groups.setdefault((spec.kind, side), []).append(row)
    lines = []
    for (kind, side), rows in sorted(groups.items()):
        half = median(50 * (row.high_ms - row.low_ms) / abs(row.ms) if row.ms else 0.0 for row in rows)
        ends = f"{min(r.ms for r in rows):.4g} to {max(r.ms for r in rows):.4g}"
        cells = [kind, side, len(rows), rows[0].method, ends, f"{half:.1f} %", sum(bool(r.flag) for r in rows) or ""]
        lines.append(list(map(str, cells)))
    names = ("kind", "at px", "rows", "method", "ms", "half-width", "flagged")
    print_columns({name: name not in ("kind", "method") for name in names}, lines)
    for doubt in (*(d for d in doubts(table) if d.why != NOISY), *wrong):  # noisy rows are counted above
        expected = f", not {doubt.expected_ms:.4g}" if doubt.expected_ms is not None else ""
        print(f"  {doubt.layer}: {doubt.ms:.4g} ms{expected}: {doubt.why}")
    picture = folder / f"{table.device}.png"
    draw_table(table, picture)
    print(f"drawn: {picture}")


def draw_table(table: LatencyTable, path: Path) -> None:
    """Draw the milliseconds of every kind of block over its width, a line for each resolution, with 95 % intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: dict[str, dict[int, list[tuple[int, Row]]]] = {}
    for (spec, side), row in table.rows.items():
        if row.method == "slope":
            lines.setdefault(label(spec), {}).setdefault(side, []).append((spec.dim, row))
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
    axes[0].set_ylabel(f"ms of one call, batch {table.batch}")
    figure.suptitle(f"{table.device}: {table.meta.get('runtime')} {table.meta.get('precision')}", fontsize="medium")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"the picture {path} cannot be written ({error.strerror}): give another folder with --out") from error
