"""The network found, drawn stage by stage with its milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from nas.report.run import Run
from nas.report.text import ms_of, signed
from supernet.arch import place_of
from supernet.errors import InputError
from supernet.specs import Layer, is_block, label

KINDS = {
    "mb4d": "pooling and an MLP, on maps",
    "mb3d": "self-attention and an MLP, on tokens",
    "ffn": "MLP with a depthwise convolution, on maps",
    "attn_ffn": "self-attention and an MLP with a depthwise convolution, on maps",
    "sandwich": "cascaded group attention between convolutions and MLPs, on maps",
    "vit": "transformer block, on tokens",
    "grouped_mb3d": "mb3d on the tokens of several images",
    "grouped_vit": "vit on the tokens of several images",
    "identity": "nothing: the slot is empty and costs nothing",
    "stem": "convolutions from the image to the first stage",
    "conv_stem": "convolutions from the image to the first stage",
    "patch_stem": "patches of the image become tokens",
    "embedding": "convolution between two stages: smaller map, other width",
    "attn_embedding": "attention and a convolution between two stages",
    "subsample": "convolutions and MLPs between two stages",
    "flat": "maps become tokens",
    "unflat": "tokens become maps",
    "join": "tokens of several images become one sequence",
    "head": "norm, mean over positions, classifier",
    "group_head": "norm and classifier of several images",
}


KNOBS = {
    "mlp_ratio": "hidden channels of a block's MLP, as a multiple of the stage's channels",
    "ffn_ratio": "hidden channels of a block's MLP, as a multiple of the stage's channels",
    "num_heads": "heads of the attention",
    "key_dim": "channels of a head's queries and keys",
    "attn_ratio": "channels of a head's values, as a multiple of key_dim",
    "act": "activation function",
    "stride": "of attention: computed on a map of half the side",
    "window": "side in pixels of the windows that attention stays in",
    "pool_size": "side in pixels of the pooling window",
    "q_kernels": "side in pixels of the convolution before each head's queries",
}


def network_section(run: Run) -> str:
    """The network stage by stage, each layer with its milliseconds."""
    arch, parts, rest, said = run.arch, [(n, layer, None) for n, layer in run.arch.named_layers()], None, ""
    times: list[tuple[str, Layer, float | None]] = list(parts)
    if run.own_table is None:
        said = f"<p class=missing>Without milliseconds: {escape(run.why_no_table)}.</p>"
    else:
        try:
            known, rest = run.own_table.parts_ms(arch)
            times = list(known)
        except InputError as error:
            said = f"<p class=missing>Without milliseconds: {escape(str(error))}.</p>"
    total = None if rest is None else sum(ms or 0.0 for _, _, ms in times) + rest
    if total is not None and abs(total / run.result["predicted_ms"] - 1) > 1e-3:
        said += (
            f"<p class=missing>The table has changed since the search: it predicted {ms_of(run.result['predicted_ms'])} then, "
            f"and {ms_of(total)} now. The milliseconds below are those of now.</p>"
        )
    kinds = kinds_of(run)
    most = max((ms for _, _, ms in times if ms is not None), default=0.0)
    stages: dict[int, list[tuple[str, Layer, float | None]]] = {}
    for name, layer, ms in times:
        at = place_of(name).stage
        stages.setdefault(len(arch.stages) + 1 if at is None else at + 1, []).append((name, layer, ms))
    rows = []
    for number, layers in sorted(stages.items()):
        head = number > len(arch.stages)
        own = [ms for _, _, ms in layers if ms is not None]
        time = f"<b>{ms_of(sum(own))}</b> <small>{100 * sum(own) / total:.0f} %</small>" if own and total else ""
        if head:
            what = f"<b>Head</b><br><small>{arch.num_classes} classes</small>"
        else:
            stage, side = arch.stages[number - 1], arch.resolutions[number - 1]
            what = (
                f"<b>Stage {number}</b><br><small>{side} × {side} px map<br>{stage.width} channels{_of_widths(run, number)}<br>"
                f"{len(stage.blocks)}{_of_slots(run, number)}</small>"
            )
        chips = "".join(_chip(name, layer, ms, most, kinds) for name, layer, ms in layers)
        rows.append(
            f'<div class="stage"><div class="what">{what}<div class="time">{time}</div></div>'
            f'<ol class="chips">{chips}</ol></div>'
        )
    if rest is not None and run.own_table is not None and run.own_table.calibrations:
        below = " Below zero: whole networks are quicker than the sum of their layers." if rest < 0 else ""
        rows.append(
            f'<div class="stage"><div class="what"><b>Offset</b><div class="time"><b>{ms_of(rest)}</b> <small>'
            f'{signed(100 * rest / (total or 1), 0)} %</small></div></div><p class="small" data-ms="{rest!r}">What a call '
            f"takes beside its layers, from the table's calibration on whole networks.{below}</p></div>"
        )
    sums = "" if total is None else f" Together they are the predicted <b>{ms_of(total)}</b>."
    intro = (
        f"<p>From the image ({arch.image_size} × {arch.image_size} px, top) to the logits (bottom); blocks in the order in "
        f"which they run. Milliseconds are the layers' rows in the latency table, times its calibration.{sums}</p>"
        if total is not None
        else "<p>From the image (top) to the logits (bottom); blocks in the order in which they run.</p>"
    )
    if arch.mux is not None:
        intro += f"<p>Groups of {arch.mux.n} images share the last stage's token blocks.</p>"
    return intro + said + _time_bar(stages, rest, total, kinds, len(arch.stages)) + "".join(rows) + _glossary(run, kinds)


def kinds_of(run: Run) -> dict[str, str]:
    """Return the style of every kind of block that the space, or the network, has."""
    found = {c.kind: None for stage in run.space.stages for c in stage.candidates} if run.space is not None else {}
    found |= {layer.spec.kind: None for layer in run.arch.layers() if is_block(layer.spec)}
    return {kind: f"k{number % 6}" for number, kind in enumerate(k for k in found if k != "identity")}


def _chip(name: str, layer: Layer, ms: float | None, most: float, kinds: Mapping[str, str]) -> str:
    spec = layer.spec
    kind, _, knobs = label(spec).partition("(")
    if not is_block(spec):
        knobs = " to ".join(str(getattr(spec, side)) for side in ("dim_in", "dim") if hasattr(spec, side)) + " channels"
    style = kinds.get(kind, "between")
    time = "" if ms is None else f"<b>{ms_of(ms)}</b>"
    bar = "" if ms is None or not most else f'<i class="bar {style}" style="width:{max(0.0, 100 * ms / most):.1f}%"></i>'
    exact = "" if ms is None else f' data-ms="{ms!r}"'
    return (
        f'<li class="chip{" plain" if style == "between" else ""}" title="{escape(f"{name}: {layer}")}"{exact}>'
        f'<span class="kind"><i class="swatch {style}"></i><span>{escape(short(kind)).replace("_", "_<wbr>")}</span></span>'
        f'<span class="knobs">{escape(knobs.rstrip(")"))}</span>{time}{bar}</li>'
    )


def short(kind: str) -> str:
    """Return a kind's name without the file of a user's own block."""
    return kind.rpartition(":")[2]


def _of_widths(run: Run, number: int) -> str:
    widths = run.space.stages[number - 1].widths if run.space is not None else ()
    return f" of {widths[0]} to {widths[-1]}" if len(widths) > 1 else ""


def _of_slots(run: Run, number: int) -> str:
    return f" of {run.space.stages[number - 1].depth} slots filled" if run.space is not None else " blocks"


def _time_bar(
    stages: Mapping[int, list[tuple[str, Layer, float | None]]],
    rest: float | None,
    total: float | None,
    kinds: Mapping[str, str],
    depth: int,
) -> str:
    """All layers in order, as wide as they are slow."""
    if total is None or rest is None:
        return ""
    groups = []
    for number, layers in sorted(stages.items()):
        known = [(name, layer, ms) for name, layer, ms in layers if ms is not None and ms > 0]
        share = sum(ms for _, _, ms in known) / total
        pieces = "".join(
            f'<i class="{kinds.get(layer.spec.kind, "between")}" style="flex:{1000 * ms / total:.2f}" '
            f'title="{escape(f"{name}: {ms_of(ms)}, {100 * ms / total:.1f} %")}"></i>'
            for name, layer, ms in known
        )
        text = "head" if number > depth else f'<span class="wide">stage </span>{number}'
        groups.append(
            f'<div class="group" style="flex:{1000 * share:.2f}"><div class="pieces">{pieces}</div>'
            f"<small>{text if share > 0.07 else ''}</small></div>"
        )
    if rest > 0:
        groups.append(
            f'<div class="group" style="flex:{1000 * rest / total:.2f}"><div class="pieces"><i class="offset" style="flex:1" '
            f'title="offset: {ms_of(rest)}"></i></div><small>{"offset" if rest > 0.07 * total else ""}</small></div>'
        )
    return f'<div class="timebar" role="img" aria-label="where the {ms_of(total)} go">{"".join(groups)}</div>'


def _glossary(run: Run, kinds: Mapping[str, str]) -> str:
    used = list(kinds)
    used += [k for k in dict.fromkeys(layer.spec.kind for layer in run.arch.layers()) if k not in kinds]
    if run.space is not None:
        used.append("identity")
    items = []
    for kind in used:
        style = kinds.get(kind, "empty" if kind == "identity" else "between")
        items.append(
            f'<li><i class="swatch {style}"></i><b>{escape(short(kind))}</b> '
            f"{escape(KINDS.get(kind, 'a block of your own'))}</li>"
        )
    blocks = [block for stage in run.arch.stages for block in stage.blocks]
    blocks += [c for stage in run.space.stages for c in stage.candidates] if run.space is not None else []
    text = " ".join(map(label, blocks))
    items += [f"<li><b>{knob}</b> {escape(what)}</li>" for knob, what in KNOBS.items() if f"{knob}=" in text]
    return f'<ul class="glossary">{"".join(items)}</ul>'
