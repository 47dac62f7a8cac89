"""The frontier of the scores on the device, and the published networks by the same table."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
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


def device_section(run: Run, frontier: Sequence[tuple[float, float]] | None) -> str:
    """The frontier with the target, and the published networks by the same table."""
    if run.table is None:
        return missing(f"Left out: {run.why_no_table}.")
    known = (
        frontier
        if frontier is not None
        else [
            (to_number(row.get("ms")), to_number(row.get("loss")))
            for row in run.rows("frontier.csv")
            if row.get("device", run.result["device"]) == run.result["device"]
        ]
    )
    points = sorted(p for p in known if all(map(math.isfinite, p)))
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
        try:
            ms = run.table.predict_ms(arch)
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


def _frontier(run: Run, points: list[tuple[float, float]], published: list[Published]) -> str:
    drops, target = run.drops, run.target_ms
    found_ms = float(run.result["predicted_ms"])
    found_loss = drops.sum_for(run.member) if drops is not None and run.member is not None else None
    nets = [net for net in published if net.ms <= 2.5 * max(points[-1][0], target)]
    xs = [ms for ms, _ in points] + [target, found_ms] + [net.ms for net in nets]
    ys = [loss for _, loss in points] + [net.loss for net in nets if net.loss is not None]
    ys += [found_loss] if found_loss is not None else []
    log = max(xs) / min(xs) > 5
    chart = Chart(
        "the least loss that the scores admit at every number of milliseconds",
        Axis.around(f"predicted milliseconds on {run.result['device']}", xs, log),
        Axis.around("loss by the sum of drops, nats", ys),
    )
    stairs = [points[0]]
    drawn = [*points[:: 1 + len(points) // CORNERS], points[-1]]  # of thousands, more than there are pixels
    for before, after in itertools.pairwise(dict.fromkeys(drawn)):
        stairs += [(after[0], before[1]), after]
    chart.line(stairs, "frontier")
    for ms, loss in points if len(points) <= 150 else []:
        chart.point(ms, loss, "circle", "dot", f"{ms_of(ms)}: loss {loss:.4g}", 2.2)
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
    r2 = (run.result.get("additivity") or {}).get("r_squared")
    exact = f"; on networks with several changes they explain {100 * r2:.0f} % of the loss's variance" if r2 is not None else ""
    best = [loss for ms, loss in points if ms <= target]
    there = f" At the target it is {min(best):.3g}" if best else ""
    if there:
        there += f"; the network found has {found_loss:.3g}." if found_loss is not None else "."
    return (
        f"<p>The least loss at every number of milliseconds, as the drops of single changes add up. That is exact for the "
        f"scores, not for accuracy{exact}.{there}</p>"
        f'<figure class="single">{chart.html()}{legend(key)}</figure>'
    )
