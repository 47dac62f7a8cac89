"""What was asked and what was found, at the top of the page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

from nas.report.run import Run
from nas.report.svg import Axis, mark
from nas.report.text import digits, joined, large, ms_of, or_dash


def headline(run: Run) -> str:
    """What was asked, what was found."""
    result = run.result
    calls = [_call(each) for each in run.targets]
    own = len(set(calls)) > 1  # a call is not the same on every device
    most = " and ".join(
        f"<b>{each['target_ms']:g} ms</b> on <b>{escape(each['device'])}</b>{f' for {call}' if own else ''}"
        for each, call in zip(run.targets, calls, strict=True)
    )
    objective = {"mes": ", by mobile efficiency", "throughput": ", by throughput"}.get(result.get("objective", ""), "")
    asked = (
        f"Asked: a network of the space <b>{escape(result.get('space', 'unknown'))}</b> that takes at most {most}"
        f"{'' if own else f' for {calls[0]}'}{objective}."
    )
    page = f'<p class="kicker">Search report</p><h1>{escape(run.arch.name)}</h1><p class="asked">{asked}</p>'
    style, sign, verdict = _verdict(run)
    page += f'<div class="verdict {style}"><span class="sign" aria-hidden="true">{sign}</span><p>{verdict}</p></div>'
    if run.demonstration:
        page += (
            '<p class="warning"><b>A demonstration.</b> This search was on the embedded handwritten digits, to show the tool '
            "at work. Its network is not one to ship: give your own images with <code>--data</code>.</p>"
        )
    return f"{page}{_tiles(run)}{_gauge(run)}{_devices(run)}"


def _call(device: Mapping[str, Any]) -> str:
    batch = int(device.get("batch", 1))
    return "an image" if batch == 1 else f"a call of {batch} images"


def _devices(run: Run) -> str:
    """Every device's target and milliseconds, where there are several."""
    if len(run.targets) == 1:
        return ""
    rows = "".join(
        f"<tr><td>{escape(each['device'])}</td><td>{each['target_ms']:g}</td><td>{digits(each['predicted_ms'])}</td>"
        f"<td>{or_dash(each['measured_ms'])}</td></tr>"
        for each in run.targets
    )
    head = "<tr><th>device</th><th>target ms</th><th>predicted ms</th><th>measured ms</th></tr>"
    table = f'<table class="plain-table"><thead>{head}</thead><tbody>{rows}</tbody></table>'
    first = f"The other sections are of {escape(run.result['device'])}."
    return f'<div class="scroll">{table}</div><p class="small">{first}</p>'


def _verdict(run: Run) -> tuple[str, str, str]:
    """How the run ended, with the devices that decide it: those that are elsewhere, those that miss, or all."""
    result, several = run.result, len(run.targets) > 1
    measured = [each for each in run.targets if each.get("measured_high_ms") is not None]
    elsewhere = [each for each in run.targets if each.get("measured_high_ms") is None]
    if run.met is None:
        where = " and ".join(escape(each["device"]) for each in elsewhere)
        predicted = " and ".join(
            ms_of(each["predicted_ms"]) + (f" on {escape(each['device'])}" if several else "") for each in elsewhere
        )
        there = "".join(f" {_measured(each, several)}." for each in measured)
        return (
            "open",
            "?",
            f"<b>Not measured{f' on {where}' if several else ''}.</b> The table predicts {predicted}; {where} "
            f"{'was' if len(elsewhere) == 1 else 'were'} not at hand. <code>nas-search --from "
            f"{escape(shlex.quote(str(run.folder)))} --verify</code> measures the network there, or says how.{there}",
        )
    missed = [each for each in measured if each["measured_high_ms"] > each["target_ms"]]
    deciding = measured if run.met else missed or measured
    told = "; ".join(_measured(each, several) for each in deciding)
    more = ""
    if result.get("largest_of_space"):
        began = result.get("init", {}).get("network")
        more = (
            f" {escape(began)} meets it as it is." if began else " Nothing had to be taken away: a larger space may do better."
        )
    if result.get("candidate"):
        more += " A slower network might fit too: <code>--verify</code> again measures it."
    if run.met:
        return "good", "✓", f"<b>{'All targets are' if several else 'The target is'} met:</b> {told}.{more}"
    more += "".join(f" {escape(each['device'])} was not at hand." for each in elsewhere)
    return "bad", "✗", f"<b>{'The targets are' if len(missed) > 1 else 'The target is'} missed:</b> {told}.{more}"


def _measured(device: Mapping[str, Any], several: bool) -> str:
    return (
        f"{ms_of(device['measured_ms'])} measured on {escape(device['device']) if several else 'the device'} (95 % interval: "
        f"{digits(device['measured_low_ms'])} to {digits(device['measured_high_ms'])}), {device['target_ms']:g} ms allowed"
    )


def _tiles(run: Run) -> str:
    result, batch = run.result, int(run.result.get("batch", 1))
    an_image = f"by the table; {ms_of(result['predicted_ms'] / batch)} an image" if batch > 1 else ""
    off = ""
    if result.get("measured_ms"):
        percent = 100 * (result["predicted_ms"] / result["measured_ms"] - 1)
        off = f"the prediction is {abs(percent):.1f} % too {'high' if percent > 0 else 'low'}"
    limits = {name: result.get(f"max_{name}") for name in ("params", "macs")}
    trained = "the supernet" if not result.get("init") else result["init"]["network"]
    more = " and a short training" if "throughput" in result else ""
    tiles = [
        ("predicted", digits(result["predicted_ms"]), "ms", an_image or "by the latency table"),
        ("measured", digits(result["measured_ms"]), "ms", off) if off else ("measured", "–", "", "the device is elsewhere"),
        (
            "top-1 accuracy",
            f"{100 * result['accuracy']:.1f}",
            "%",
            f"on images that the search did not see, with weights inherited from {trained}{more}, before nas-train",
        ),
        ("parameters", *large(result["params"]), f"at most {joined(limits['params'])}" if limits["params"] else ""),
        (
            "MACs",
            *large(result["macs"]),
            f"at most {joined(limits['macs'])}"
            if limits["macs"]
            else f"multiply-accumulates of an image of {run.arch.image_size} px",
        ),
    ]
    if result.get("mes") is not None:
        tiles.append(("MES", f"{result['mes']:.3g}", "", "mobile efficiency score: small and fast is high"))
    if result.get("init"):
        began = result["init"]
        tiles.append(
            ("began with", digits(began["predicted_ms"]), "ms", f"{began['network']}: top-1 {100 * began['accuracy']:.1f} %")
        )
    drawn = "".join(
        f'<div class="tile"><dt>{name}</dt><dd><b>{value}</b> {unit}</dd><dd class="small">{escape(note)}</dd></div>'
        for name, value, unit, note in tiles
    )
    return f'<dl class="tiles">{drawn}</dl>'


def _gauge(run: Run) -> str:
    """The target, what was predicted and what was measured, on one line of milliseconds."""
    result, width, left = run.result, 520, 84
    ends = [run.target_ms, result["predicted_ms"]]
    ends += [result[name] for name in ("measured_low_ms", "measured_high_ms") if result.get(name) is not None]
    axis = Axis.around("ms", ends)

    def at(ms: float) -> float:
        return left + axis.share(ms) * (width - left - 24)

    target = at(run.target_ms)
    text = f"target {run.target_ms:g} ms"
    place = min(max(target, left + 4 * len(text)), width - 4 * len(text))
    drawn = [
        f'<rect class="allowed" x="{left}" y="22" width="{target - left:.1f}" height="62"/>',
        f'<line class="target" x1="{target:.1f}" x2="{target:.1f}" y1="22" y2="84"/>',
        f'<text class="target" x="{place:.1f}" y="15" text-anchor="middle">{text}</text>',
        f'<text x="{left - 8}" y="44" text-anchor="end">predicted</text>',
        mark(at(result["predicted_ms"]), 40, "diamond", "open-mark", f"predicted {ms_of(result['predicted_ms'])}", 5),
    ]
    for tick in axis.ticks(5):
        drawn.append(f'<text x="{at(tick):.1f}" y="102" text-anchor="middle">{tick:g} ms</text>')
        drawn.append(f'<line class="axis" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="84" y2="88"/>')
    if result.get("measured_ms") is not None:
        low, ms, high = (result[f"measured_{end}"] for end in ("low_ms", "ms", "high_ms"))
        title = f"measured {ms_of(ms)} (95 %: {digits(low)} to {digits(high)})"
        drawn.append(f'<text x="{left - 8}" y="70" text-anchor="end">measured</text>')
        drawn.append(f'<line class="interval" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="66" y2="66"/>')
        drawn.append(mark(at(ms), 66, "circle", "found", title, 5))
    drawn.append(f'<line class="axis" x1="{left}" x2="{width - 24}" y1="84" y2="84"/>')
    said = f"target {run.target_ms:g} ms, predicted {ms_of(result['predicted_ms'])}"
    return f'<svg class="gauge" viewBox="0 0 {width} 108" role="img" aria-label="{said}">{"".join(drawn)}</svg>'
