"""The frontier of the scores on the device, and the published networks by the same table."""

from __future__ import annotations

import itertools
import math
import re
from html import escape
from typing import NamedTuple

from nas.kept import described
from nas.report.run import Run, to_number
from nas.report.svg import Axis, Chart, legend
from nas.report.text import digits, missing, ms_of, or_dash
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.zoo import zoo, zoo_names

CORNERS = 1000  # of a frontier that are drawn


class Point(NamedTuple):
    """A network of the frontier: its loss by the sum of drops, and by how many nats there might be a better one."""

    ms: float
    loss: float
    gap: float


def frontier_points(run: Run) -> list[Point]:
    """Return the frontier on the first device, the quickest first; empty where the run has none."""
    rows = [row for row in run.rows("frontier.csv") if row.get("device", run.result["device"]) == run.result["device"]]
    points = [Point(to_number(row.get("ms")), to_number(row.get("loss")), to_number(row.get("gap", 0.0))) for row in rows]
    return sorted(point for point in points if all(map(math.isfinite, point)))


def device_section(run: Run) -> str:
    """The frontier with the target, and the published networks by the same table."""
    if run.table is None:
        return missing(f"Left out: {run.why_no_table}.")
    points = frontier_points(run)
    published, left_out = published_networks(run)
    page = _frontier(run, points, published) if points else ""
    if published:
        rows = []
        for net in published:
            rows.append(
                f"<tr><td>{escape(net.arch.name)}</td><td>{net.arch.image_size}</td><td>{digits(net.ms)}</td>"
                f"<td>{or_dash(net.measured_ms)}</td></tr>"
            )
        rows.append(
            f'<tr class="chosen"><td>{escape(run.arch.name)} (found)</td><td>{run.arch.image_size}</td>'
            f"<td>{digits(run.result['predicted_ms'])}</td><td>{or_dash(run.result.get('measured_ms'))}</td></tr>"
        )
        page += (
            '<div class="scroll"><table class="plain-table"><thead><tr><th>published network</th><th>image px</th>'
            f"<th>predicted ms</th><th>measured ms</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )
    classes = f"with {run.arch.num_classes} classes"
    page += (
        f"<p class=small>Published networks {classes}, by the same table. Left out, as the table has no rows of theirs: "
        f"{escape(', '.join(left_out))}.</p>"
        if left_out
        else f"<p class=small>Published networks {classes}, by the same table.</p>"
    )
    if not points:
        page = missing("The frontier of this run was not computed (there is no frontier.csv).") + page
    return page


class Published(NamedTuple):
    """A network of the zoo, by the run's table; its loss by the sum of drops where it is in the run's space."""

    arch: ArchConfig
    ms: float
    measured_ms: float | None
    loss: float | None


def published_networks(run: Run) -> tuple[list[Published], list[str]]:
    """Return the networks of the zoo that the run's table predicts, the quickest first, and the names of the others."""
    assert run.table is not None
    drops = run.drops
    found, left_out = [], []
    for name in zoo_names():
        arch = zoo(name).with_classes(run.arch.num_classes)
        ms = run.predict_ms(arch)  # as the frontier and the network found, where the space's calibration is of its kind
        try:
            ms = run.table.predict_ms(arch) if ms is None else ms
        except InputError:
            left_out.append(name)
            continue
        loss = None
        if drops is not None and run.space is not None and arch.image_size == run.space.image_size and arch in run.space:
            loss = drops.sum_for(arch)
        found.append(Published(arch, ms, _measured_ms(run, arch), loss))
    return sorted(found, key=lambda net: net.ms), left_out


def _measured_ms(run: Run, arch: ArchConfig) -> float | None:
    """Return the milliseconds of a network that the run, or the table's calibration, measured."""
    if run.space is not None and (arch.image_size, arch.strides) == (run.space.image_size, run.space.strides):
        for line in run.measurements:
            if line["network"] == described(arch):
                return to_number(line["ms"])
    assert run.table is not None
    wanted = _without_names(arch.to_yaml())
    nets = (net for calibration in run.table.calibrations for net in calibration.networks)
    return next((net.ms for net in nets if _without_names(net.arch) == wanted), None)


def _without_names(text: str) -> str:
    """Return a network's YAML without its name and its number of classes."""
    return re.sub(r"^(name|num_classes):.*\n", "", text, flags=re.MULTILINE)


def _frontier(run: Run, points: list[Point], published: list[Published]) -> str:
    drops, target = run.drops, run.target_ms
    found_ms = float(run.result["predicted_ms"])
    found_loss = drops.sum_for(run.member) if drops is not None and run.member is not None else None
    nets = [net for net in published if net.ms <= 2.5 * max(points[-1].ms, target)]
    xs = [point.ms for point in points] + [target, found_ms] + [net.ms for net in nets]
    ys = [point.loss for point in points] + [net.loss for net in nets if net.loss is not None]
    ys += [found_loss] if found_loss is not None else []
    log = max(xs) / min(xs) > 5
    chart = Chart(
        "the least loss that the scores admit at every number of milliseconds",
        Axis.around(f"predicted milliseconds on {run.result['device']}", xs, log),
        Axis.around("loss by the sum of drops, nats", ys),
    )
    stairs = [(points[0].ms, points[0].loss)]
    drawn = [*points[:: 1 + len(points) // CORNERS], points[-1]]  # of thousands, more than there are pixels
    for before, after in itertools.pairwise(dict.fromkeys(drawn)):
        stairs += [(after.ms, before.loss), (after.ms, after.loss)]
    chart.line(stairs, "frontier")
    for point in points if len(points) <= 150 else []:
        proven = f", proven to {point.gap:.2g} nats" if point.gap > 0 else ""
        chart.point(point.ms, point.loss, "circle", "dot", f"{ms_of(point.ms)}: loss {point.loss:.4g}{proven}", 2.2)
    chart.target(target, f"target {target:g} ms")
    low = chart.y.low
    for net in nets:
        title = f"{net.arch.name}: {ms_of(net.ms)} predicted"
        title += f", {ms_of(net.measured_ms)} measured" if net.measured_ms is not None else ""
        if net.loss is None:
            chart.point(net.ms, low, "triangle", "zoo", title + "; not in the space, so without a loss", 5)
        else:
            chart.point(net.ms, net.loss, "square", "zoo", f"{title}, loss {net.loss:.4g} by the sum of drops", 4.5)
        chart.note(net.ms, low if net.loss is None else net.loss, net.arch.name)
    if found_loss is not None:
        chart.point(
            found_ms, found_loss, "star", "found", f"found: {ms_of(found_ms)}, loss {found_loss:.4g} by the sum of drops", 6
        )
        chart.note(found_ms, found_loss, "found")
    key = [("line", "frontier", "the best that the scores admit")]
    key += [("star", "found", "the network found")] if found_loss is not None else []
    key += [("square", "zoo", "published network of the space")] if any(net.loss is not None for net in nets) else []
    key += [("triangle", "zoo", "published network, milliseconds alone")] if any(net.loss is None for net in nets) else []
    return f'{_in_words(run, points, found_loss)}<figure class="single">{chart.html()}{legend(key)}</figure>'


def _in_words(run: Run, points: list[Point], found_loss: float | None) -> str:
    """What the frontier is, how certain it is, and how near to it the network found is."""
    r2 = (run.result.get("additivity") or {}).get("r_squared")
    adds_up = "" if r2 is None else f"; on networks with several changes they explain {100 * r2:.0f} % of the loss's variance"
    gap = max(point.gap for point in points)
    exact = "That is exact for the scores, not for accuracy"
    if gap > 0:
        exact = f"That is by the scores, not by accuracy, and not proven: up to {gap:.2g} nats less may be possible"
    said = f"The least loss at every number of milliseconds, as the drops of single changes add up. {exact}{adds_up}."
    found_ms = float(run.result["predicted_ms"])
    least = [point.loss for point in points if point.ms <= found_ms * (1 + 1e-5)]  # the file has six digits
    if least and run.arch.mux is None:  # the frontier is of networks that give each image a pass of its own
        said += f" At the {ms_of(found_ms)} that the table says of the network found, it is {min(least):.3g}"
        said += f"; the network found has {found_loss:.3g}." if found_loss is not None else "."
        said += _corrected(run)
    return f"<p>{said}</p>"


def _corrected(run: Run) -> str:
    """Why the network found is not just under the target by the table, where that is because it was measured."""
    ms, target, measured_ms = float(run.result["predicted_ms"]), run.target_ms, run.result.get("measured_ms")
    again = int(run.result.get("measured_networks") or 0) > 1  # which is after a correction alone
    if measured_ms is None or not (ms > target or (again and ms < measured_ms)):
        return ""
    budgets = "budget was" if len(run.targets) == 1 else "budgets were"
    return (
        f" The target is {target:g} ms, but the {budgets} corrected by measurement: where the table says {ms_of(ms)}, the "
        f"device takes {ms_of(measured_ms)}."
    )
