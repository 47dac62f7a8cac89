"""The picture of where a network's time goes: one bar a layer, split by kind of operator."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from nas.operators import Breakdown, grouped
from supernet.errors import InputError
from supernet.files import write_atomically

KINDS = 6
SUFFIXES = (".png", ".svg", ".pdf")
# Distinct for colour-blind readers too (Okabe and Ito); grey is for the rest.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
OTHER_COLOUR = "#b8b8b8"
BAR_INCHES = 0.24


def check_plot_file(path: Path) -> Path:
    """Return `path` if a picture can be written there.

    Raises:
        InputError: its ending is of no picture, or its folder is not there or may not be written to.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"the picture {path} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"the picture {path} cannot be written: give a file in a folder that is there")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise InputError(
            f"the picture {path} cannot be written ({error.strerror}): give --plot a file in a folder that may be written to"
        ) from error


def plot_layers(breakdown: Breakdown, title: str, path: Path) -> None:
    """Draw the layers' milliseconds as horizontal bars in execution order, split by the kinds of operator that take longest.

    A model without layers is drawn as one bar for each kind of operator. Rasterised without a display.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if breakdown.layers:
        names = [layer.name for layer in breakdown.layers]
        kinds, split = grouped(breakdown, KINDS)
        rows = [split(layer) for layer in breakdown.layers]
    else:
        names = [f"{kind.operator} x {kind.count}" for kind in breakdown.operators]
        kinds, rows = ["all"], [[kind.ms] for kind in breakdown.operators]
    totals = [sum(row) for row in rows]

    figure = Figure(figsize=(9, 1.7 + BAR_INCHES * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    positions = range(len(names))
    left = [0.0] * len(names)
    for number, kind in enumerate(kinds):
        parts = [row[number] for row in rows]
        colour = OTHER_COLOUR if kind == "other" else COLOURS[number]
        axes.barh(positions, parts, left=left, height=0.8, color=colour, label=kind)
        left = [a + b for a, b in zip(left, parts, strict=True)]
    decimals = 3 if max(totals) < 10 else 2
    for position, total in zip(positions, totals, strict=True):
        label = f"  {total:.{decimals}f}"
        axes.text(total, position, label, va="center_baseline", fontsize=8, color="#444444")
    axes.set_yticks(positions, names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first layer on top
    axes.set_xlim(0, 1.1 * max(totals))
    axes.set_xlabel("milliseconds of one call")
    axes.set_ylabel("layer, in execution order" if breakdown.layers else "kind of operator")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if len(kinds) > 1:
        figure.legend(loc="outside lower center", ncols=min(len(kinds), 7), frameon=False, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=path.suffix[1:].lower())
    write_atomically(path, picture.getvalue())
