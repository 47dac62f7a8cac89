"""Why the milliseconds can be believed: predictions beside measurements, and where the table comes from."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from nas.kept import described
from nas.report.run import Run, to_number
from nas.report.svg import Axis, Chart, legend
from nas.report.text import facts, missing, ms_of, to_the_minute


class Checked(NamedTuple):
    """A network whose milliseconds were both predicted and measured."""

    name: str
    predicted_ms: float
    ms: float
    low_ms: float
    high_ms: float
    style: str


def accuracy_section(run: Run) -> str:
    """How far the table's predictions are from measurements; how far sums of drops are from losses."""
    checked = checked_networks(run)
    page = f"<figure>{_agreement(checked)}</figure>" if checked else ""
    sums = _additivity(run)
    said = ""
    if run.calibration is not None:
        c = run.calibration
        said = (
            f"<p>On {c.n_check} networks of {escape(c.space)} that it was not fitted to, the table is off by "
            f"{c.mean_error_percent:.1f} % on average and {c.max_error_percent:.1f} % at most; {c.within_5_percent:.0f} % of "
            "them are within 5 %. Points in the band are within 5 %.</p>"
        )
    if not page:
        said += missing("No network that was measured is known, so there is nothing to draw.")
    return f'{said}<div class="charts">{page}{sums}</div>'


def checked_networks(run: Run) -> list[Checked]:
    """Return the networks that were measured: for the table's calibration, and in this run."""
    found = []
    if run.calibration is not None:
        for number, net in enumerate(run.calibration.networks, 1):
            low, high = net.ms - net.half_width_ms, net.ms + net.half_width_ms
            style = "fitted" if net.fitted else "mark"
            name = f"network {number} of the calibration ({'fitted' if net.fitted else 'not fitted'})"
            found.append(Checked(name, net.predicted_ms, net.ms, low, high, style))
    result = run.result
    own = described(run.arch.without_identity())
    for line in run.measurements:
        arch = run.network(line["network"]) if "one group" not in line["network"] else None
        predicted = run.predict_ms(arch) if arch is not None else None
        if line["network"] == own:
            predicted = float(result["predicted_ms"])
        if predicted is not None:
            ms, low, high = (to_number(line[name]) for name in ("ms", "low_ms", "high_ms"))
            style = "found" if line["network"] == own else "run"
            name = "the network found" if style == "found" else f"measured in this run: {line['network']}"
            found.append(Checked(name, predicted, ms, low, high, style))
    if not any(net.style == "found" for net in found) and result.get("measured_ms") is not None:
        ends = (result["measured_ms"], result["measured_low_ms"], result["measured_high_ms"])
        found.append(Checked("the network found", result["predicted_ms"], *ends, "found"))
    return [net for net in found if net.predicted_ms > 0 and net.ms > 0]


def _agreement(checked: Sequence[Checked]) -> str:
    values = [value for net in checked for value in (net.predicted_ms, net.ms)]
    log = max(values) / min(values) > 2
    x = Axis.around("predicted ms", values, log)
    y = Axis.around("measured ms", values, log)
    chart = Chart("measured against predicted milliseconds, with a band of 5 % on both sides", x, y)
    ends = (x.low, x.high)

    def inside(ms: float) -> float:
        return min(max(ms, y.low), y.high)

    # Twenty corners a side: on linear axes two would do, but the clipped ends of the band need their own.
    steps = [ends[0] * (ends[1] / ends[0]) ** (n / 20) for n in range(21)]
    chart.area([(v, inside(1.05 * v)) for v in steps] + [(v, inside(0.95 * v)) for v in reversed(steps)], "band")
    chart.line([(v, v) for v in ends], "equal")
    shapes = {
        "fitted": ("circle", "open-mark"),
        "mark": ("circle", "mark"),
        "run": ("diamond", "run"),
        "found": ("star", "found"),
    }
    for net in checked:
        shape, style = shapes[net.style]
        chart.interval(net.predicted_ms, inside(net.low_ms), inside(net.high_ms), "interval thin")
        off = 100 * (net.predicted_ms / net.ms - 1)
        title = f"{net.name}: predicted {ms_of(net.predicted_ms)}, measured {ms_of(net.ms)} ({off:+.1f} %)"
        chart.point(net.predicted_ms, net.ms, shape, style, title, 6 if shape == "star" else 4)
    texts = {
        "mark": "checked networks",
        "fitted": "networks of the fit",
        "run": "measured in this run",
        "found": "the network found",
    }
    used = [style for style in texts if any(net.style == style for net in checked)]
    entries = [(*shapes[style], texts[style]) for style in used]
    key = legend([*entries, ("line", "equal", "equal"), ("band", "band", "within 5 %")])
    return f"<figcaption>Milliseconds: measured against predicted</figcaption>{chart.html()}{key}"


def _additivity(run: Run) -> str:
    points = [
        (to_number(line["predicted_loss"]), to_number(line["loss"]), line["changes"]) for line in run.rows("additivity.csv")
    ]
    if not points:
        return ""
    values = [value for predicted, loss, _ in points for value in (predicted, loss)]
    axes = Axis.around("loss by the sum of drops, nats", values), Axis.around("loss as evaluated, nats", values)
    chart = Chart("loss against the sum of drops, of networks with several changes", *axes)
    chart.line([(axes[0].low, axes[0].low), (axes[0].high, axes[0].high)], "equal")
    for predicted, loss, changes in points:
        chart.point(predicted, loss, "circle", "mark", f"{changes} changes: sum {predicted:.4g}, evaluated {loss:.4g}", 4)
    figures = run.result.get("additivity") or {}
    known = [
        f"{text} {figures[name]:.2f}"
        for name, text in (("r_squared", "R²"), ("tau", "Kendall's τ"))
        if figures.get(name) is not None
    ]
    said = f" ({', '.join(known)})" if known else ""
    key = legend([("circle", "mark", "random networks"), ("line", "equal", "equal")])
    caption = f"Loss: whole networks against sums of drops{said}"
    return f"<figure><figcaption>{caption}</figcaption>{chart.html()}{key}</figure>"


def table_section(run: Run) -> str:
    """Who measured the table, on what, how, when, and how good it is."""
    table, result = run.table, run.result
    if table is None:
        rows = [("device", result["device"]), ("table", result["table"]), ("origin", result.get("provenance", "unknown"))]
        return missing(f"The table itself cannot be read: {run.why_no_table}.") + facts(rows)
    meta = table.meta
    rows = [
        ("device", table.device),
        ("hardware", table.hardware),
        ("system", meta.get("os")),
        (
            "origin",
            {"measured": "measured on this device", "imported": "imported: measured elsewhere, brought in as results"}.get(
                table.provenance, table.provenance
            ),
        ),
        ("runtime", _words(meta.get("runtime"), meta.get("runtime_version"))),
        ("export", meta.get("export")),
        ("threads", meta.get("threads")),
        ("precision", meta.get("precision")),
        ("images a call", table.batch),
        ("power", meta.get("power")),
        ("measured at", to_the_minute(meta.get("measured_at"))),
        ("rows", len(table.rows)),
        ("file", str(run.request.get("table") or result["table"])),
    ]
    c = run.calibration
    if c is not None:
        line = f"{c.scale:.4g} × rows {_term(c.scale_between)} × rows of stem and embeddings"
        if c.bend:
            line = f"({line}) × (1 + {c.bend:.3g} × the same)"
        rows.append(
            (
                "calibration",
                f"{line} {_term(c.offset_ms)} ms; fitted on {c.n_fit} whole networks of {c.space} at {c.image_size} px",
            )
        )
        rows.append(
            (
                "error",
                f"on {c.n_check} other networks {c.mean_error_percent:.1f} % on average, {c.max_error_percent:.1f} % at "
                f"most; {c.within_5_percent:.0f} % within 5 %, {c.within_10_percent:.0f} % within 10 %; Kendall's τ "
                f"{c.kendall_tau:.2f}",
            )
        )
    elif table.calibrations:
        rows.append(("calibration", "none for networks of this image size and these strides"))
    else:
        rows.append(("calibration", "none: the rows are summed as they are"))
    doubted = [layer for layer in dict.fromkeys(run.arch.layers()) if (row := table.rows.get(layer)) is not None and row.flag]
    if doubted:
        rows.append(("doubtful rows", "; ".join(f"{layer}: {table.rows[layer].flag}" for layer in doubted)))
    warnings = "".join(
        f'<p class="warning">While the table was measured: {escape(str(text))}</p>' for text in meta.get("warnings") or ()
    )
    return warnings + facts(rows)


def _term(value: float) -> str:
    return f"{'+' if value >= 0 else '−'} {abs(value):.4g}"


def _words(*parts: object) -> str:
    return " ".join(str(part) for part in parts if part is not None)
