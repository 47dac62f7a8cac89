"""Importance and drops as heat maps, with what the network found kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from nas.report.network import kinds_of, short
from nas.report.run import Run, to_number
from nas.report.text import missing
from supernet.specs import label


def choices_section(run: Run) -> str:
    """Importance and drops as heat maps, what the network kept marked."""
    if run.space is None:
        return missing("The space of this search cannot be read, so its choices are not shown.")
    kept = run.kept
    said = (
        "A cell with a frame and a dot is what the network found has in that slot."
        if kept
        else "Which slots the network found kept is not known: result.json does not say it in this space's words."
    )
    return f"<p>{said}</p>" + importance_map(run) + drops_map(run)


def importance_map(run: Run) -> str:
    lines = run.rows("importance.csv")
    if not lines:
        return missing("This run has no importance.csv.")
    values = {(int(line["stage"]), int(line["slot"]), line["kind"]): to_number(line["log_odds"]) for line in lines}
    source = {
        "drops": "from the drops below: the loss with the slot empty minus that with the candidate, over their median",
        "logits": "from the supernet's trained logits",
    }.get(str(run.result.get("importance")), "of the trained supernet")
    most = max((abs(v) for v in values.values() if math.isfinite(v)), default=1.0) or 1.0
    intro = (
        f"<h3>Importance</h3><p>Log-odds of each candidate against an empty slot, {source}. An empty slot has 0; slots with "
        "low values are emptied first.</p>"
    )

    def value(stage: int, slot: int, kind: str) -> float | None:
        return 0.0 if kind == "identity" else values.get((stage, slot, kind))

    return (
        intro
        + _scale(most, "log-odds", "an empty slot is likelier", "the block is likelier")
        + _maps(run, value, most, "log-odds")
    )


def drops_map(run: Run) -> str:
    """What each single change costs, kinds and widths."""
    lines = run.rows("drops.csv")
    if not lines:
        return missing("This run has no drops.csv: it is of a version that did not measure every single change.")
    base = next((line for line in lines if not line["stage"]), None)
    slots = {(int(x["stage"]), int(x["slot"]), x["option"]): to_number(x["drop_loss"]) for x in lines if x["slot"]}
    widths = {(int(x["stage"]), int(x["option"])): to_number(x["drop_loss"]) for x in lines if x["stage"] and not x["slot"]}
    most = max((abs(v) for v in (*slots.values(), *widths.values()) if math.isfinite(v)), default=1.0) or 1.0
    began = (
        ""
        if base is None
        else f" (loss {to_number(base['loss']):.3g}, top-1 {100 * to_number(base['accuracy']):.1f} % on the scoring images)"
    )
    intro = (
        f"<h3>Drops</h3><p>How much the loss (cross-entropy, in nats) rises when one thing alone is changed in the network "
        f"that slimming looks from{began}. “base” is what that network has.</p>"
    )
    page = intro + _scale(most, "rise in loss, nats", "better for it", "worse for it")
    page += _maps(run, lambda stage, slot, kind: slots.get((stage, slot, kind)), most, "rise in loss", base=True)
    assert run.space is not None
    rows = []
    for number, stage in enumerate(run.space.stages, 1):
        cells = [
            _cell(
                widths.get((number, width)),
                most,
                run.arch.widths[number - 1] == width,
                f"width {width}",
                "rise in loss",
                f"{width}",
            )
            for width in stage.widths
        ]
        rows.append(f'<tr><th scope="row">stage {number}</th>{"".join(cells)}</tr>')
    if any(len(stage.widths) > 1 for stage in run.space.stages):
        page += (
            '<figure class="map wide"><figcaption>Widths (channels)</figcaption><div class="scroll">'
            f'<table class="heat widths">'
            f"{''.join(rows)}</table></div></figure>"
        )
    return page


def _maps(run: Run, value: Callable[[int, int, str], float | None], most: float, unit: str, base: bool = False) -> str:
    """A table for each stage: slots across, candidates down. `value(stage, slot, kind)` is what a cell says."""
    assert run.space is not None
    kinds, drawn = kinds_of(run), []
    for number, stage in enumerate(run.space.stages, 1):
        names = {kind: label(candidate) for kind, candidate in zip(stage.kinds, stage.candidates, strict=True)}
        rows = []
        for kind, candidate in zip(stage.kinds, stage.candidates, strict=True):
            style = kinds.get(candidate.kind, "empty")
            cells = []
            for slot in range(1, stage.depth + 1):
                kept = run.kept is not None and run.kept[number - 1][slot - 1] == names[kind]
                place = f"stage {number}, slot {slot}, {kind}"
                cells.append(_cell(value(number, slot, kind), most, kept, place, unit, "", "base" if base else "–"))
            name = f'<i class="swatch {style}"></i>{escape(kind if ":" not in kind else short(kind))}'
            rows.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
        slots = "".join(f'<th scope="col">{slot}</th>' for slot in range(1, stage.depth + 1))
        drawn.append(
            f'<figure class="map"><figcaption>Stage {number}</figcaption><div class="scroll"><table class="heat">'
            f'<tr><th scope="col">slot</th>{slots}</tr>{"".join(rows)}</table></div></figure>'
        )
    return f'<div class="maps">{"".join(drawn)}</div>'


def _cell(value: float | None, most: float, kept: bool, place: str, unit: str, above: str = "", without: str = "base") -> str:
    over = f"<small>{above}</small>" if above else ""
    mark_kept = ' class="kept"' if kept else ""
    tail = " (kept)" if kept else ""
    if value is None or not math.isfinite(value):
        return f'<td{mark_kept} title="{escape(f"{place}: {without}{tail}")}">{over}<span>{without}</span></td>'
    share = math.copysign(math.sqrt(min(1.0, abs(value) / most)), value)
    style = f"--hot:{100 * max(share, 0):.0f}%;--cold:{100 * max(-share, 0):.0f}%"
    text = "0" if not value else f"{value:.1f}" if most >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"
    text = text.replace("-", "−")
    return (
        f'<td{mark_kept} style="{style}" title="{escape(f"{place}: {unit} {value:.4g}{tail}")}">{over}<span>{text}</span></td>'
    )


def _scale(most: float, unit: str, low: str, high: str) -> str:
    """The legend of a heat map: five shades with their values."""
    cells = "".join(
        _cell(sign * most * share**2, most, False, "legend", unit)
        for sign, share in ((-1, 1), (-1, 0.5), (1, 0), (1, 0.5), (1, 1))
    )
    return (
        f'<div class="scale"><span>{low}</span><table class="heat"><tr>{cells}</tr></table><span>{high}</span>'
        f"<small>{unit}; the shade grows with the root of it</small></div>"
    )
