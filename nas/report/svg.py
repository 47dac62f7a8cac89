"""Charts as inline SVG whose colours a style sheet gives, so that they follow the reader's light or dark mode. No torch.

The style sheet is `report.css`. Everything that can be pointed at has a `<title>`, which browsers show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 520, 360  # of the drawing, in its own units; a page scales it
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 30, 46  # room around the axes
CHARACTER = 6.6  # the width of one at the charts' font size
SHAPES = ("circle", "square", "diamond", "triangle", "cross", "star")


@dataclass(frozen=True)
class Axis:
    """One axis of a chart: what is on it, and from where to where."""

    label: str
    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, label: str, values: Iterable[float], log: bool = False) -> Axis:
        """Return the axis that holds all of the values, with a little room at both ends."""
        known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        if log:
            low, high = math.log(low), math.log(high)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
        low, high = low - room, high + room
        return cls(label, math.exp(low), math.exp(high), True) if log else cls(label, low, high)

    def share(self, value: float) -> float:
        """Return where a value lies: 0 at the low end, 1 at the high end."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-12))
        return (value - low) / (high - low)

    def ticks(self, most: int = 6) -> list[float]:
        """Return round values inside the axis."""
        if self.log and self.high / self.low > 8:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        else:
            rough = (self.high - self.low) / most
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= 0.999 * rough)
            first = math.ceil(self.low / step - 1e-9)
            found = [(first + number) * step for number in range(2 * most)]
        return [round(tick, 12) for tick in found if self.low <= tick <= self.high]


@dataclass
class Chart:
    """A chart in the making; `html` is the finished one. `what` says in a sentence what it shows, for those who do not see."""

    what: str
    x: Axis
    y: Axis
    parts: list[str] = field(default_factory=list)
    over: list[str] = field(default_factory=list)  # drawn last
    wall: float = math.inf  # where the target's line is

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point lies in the drawing."""
        return (
            LEFT + self.x.share(x) * (WIDTH - LEFT - RIGHT),
            TOP + (1 - self.y.share(y)) * (HEIGHT - TOP - BOTTOM),
        )

    def line(self, points: Sequence[tuple[float, float]], style: str) -> None:
        places = " ".join("{:.1f},{:.1f}".format(*self.at(*point)) for point in points)
        self.parts.append(f'<polyline class="{style}" points="{places}"/>')

    def area(self, points: Sequence[tuple[float, float]], style: str) -> None:
        places = " ".join("{:.1f},{:.1f}".format(*self.at(*point)) for point in points)
        self.parts.append(f'<polygon class="{style}" points="{places}"/>')

    def point(self, x: float, y: float, shape: str, style: str, title: str, size: float = 4.5) -> None:
        place, on_top = self.at(x, y), style.endswith("found")
        (self.over if on_top else self.parts).append(mark(*place, shape, style, title, size))

    def interval(self, x: float, low: float, high: float, style: str) -> None:
        """A vertical line from `low` to `high`: a measurement's interval."""
        self.line([(x, low), (x, high)], style)

    def target(self, x: float, text: str) -> None:
        """A vertical line over the whole height, with its text above; before the notes, which keep off it."""
        at, _ = self.at(x, self.y.low)
        self.wall = at
        self.parts.append(f'<line class="target" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        half = CHARACTER * len(text) / 2
        middle = min(max(at, LEFT + half), WIDTH - half)
        self.over.append(f'<text class="target" x="{middle:.1f}" y="{TOP - 8}" text-anchor="middle">{escape(text)}</text>')

    def note(self, x: float, y: float, text: str) -> None:
        """A word beside a point, on the side where there is room."""
        at, height = self.at(x, y)
        length = 14 + CHARACTER * len(text)
        right = at + length < WIDTH and not (at < self.wall < at + length and at - length > LEFT)
        anchor, at = ("start", at + 9) if right else ("end", at - 9)
        lower = height - 8 if height > TOP + 18 else height + 18
        self.over.append(f'<text class="note" x="{at:.1f}" y="{lower:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def html(self) -> str:
        frame = []
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        taken = -math.inf  # where the last label on the x axis ends
        for tick in self.x.ticks():
            at, _ = self.at(tick, self.y.low)
            frame.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>')
            half = CHARACTER * len(f"{tick:g}") / 2
            if at - half > taken + 6:
                taken = at + half
                frame.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{tick:g}</text>')
        above = math.inf
        for tick in self.y.ticks():
            _, at = self.at(self.x.low, tick)
            frame.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
            if above - at > 14:
                above = at
                frame.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
        frame.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
        frame.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(self.x.label)}</text>')
        middle = (TOP + bottom) / 2
        frame.append(
            f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(self.y.label)}</text>'
        )
        return (
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.what)}">'
            + "".join(frame + self.parts + self.over)
            + "</svg>"
        )


def mark(x: float, y: float, shape: str, style: str, title: str = "", size: float = 4.5) -> str:
    """Return one of SHAPES around (x, y)."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{size}">{inner}</circle>'
    return f'<path class="{style}" d="{_outline(x, y, shape, size)}">{inner}</path>'


def _outline(x: float, y: float, shape: str, size: float) -> str:
    match shape:
        case "square":
            corners = [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
        case "diamond":
            corners = [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)]
        case "triangle":
            corners = [(0, 1.2), (1.2, -0.9), (-1.2, -0.9)]
        case "cross":
            third = 0.45
            arms = [(-third, -1.2), (third, -1.2), (third, -third), (1.2, -third), (1.2, third), (third, third)]
            corners = arms + [(-a, -b) for a, b in arms]
        case "star":
            turns = [(math.pi / 5 * number, 1.6 if number % 2 == 0 else 0.7) for number in range(10)]
            corners = [(length * math.sin(turn), -length * math.cos(turn)) for turn, length in turns]
        case _:
            raise ValueError(f"{shape} is none of {SHAPES}")
    return "M" + "L".join(f"{x + size * a:.1f} {y + size * b:.1f}" for a, b in corners) + "Z"


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """Return the key of a chart: for each entry a shape of SHAPES (or `line`, `band`), its style, and what it is."""
    items = []
    for shape, style, text in entries:
        if shape == "line":
            picture = f'<line class="{style}" x1="0" x2="18" y1="8" y2="8"/>'
        elif shape == "band":
            picture = f'<rect class="{style}" x="0" y="2" width="18" height="12"/>'
        else:
            picture = mark(9, 8, shape, style)
        items.append(
            f'<li><svg viewBox="0 0 18 16" width="18" height="16" aria-hidden="true">{picture}</svg>{escape(text)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'
