"""Numbers and small pieces of text, as the page writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from html import escape


def facts(rows: Iterable[tuple[str, object]]) -> str:
    known = [(name, value) for name, value in rows if value is not None and value != ""]
    inner = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in known)
    return f'<dl class="facts">{inner}</dl>'


def missing(sentence: str) -> str:
    return f"<p class=missing>{escape(sentence)}</p>"


def digits(value: float) -> str:
    """Return a number with three digits that count, zeros among them."""
    text = f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"
    return text.replace("-", "−", 1) if value < 0 else text


def or_dash(value: float | None) -> str:
    return "–" if value is None else digits(value)


def signed(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}".replace("-", "−")


def ms_of(value: float) -> str:
    return f"{digits(value)} ms"


def percent_of(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "–"


def large(number: float) -> tuple[str, str]:
    """Return a large number and its unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:  # as it is rounded
            return f"{number / size:.3g}", unit
    return f"{number:g}", ""


def joined(number: float) -> str:
    value, unit = large(number)
    return f"{value} {unit}".strip()


def to_the_minute(text: object) -> str | None:
    """Return a time of the files to the minute."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d).*\+00:00", str(text))
    return f"{found[1]} {found[2]} UTC" if found else None if text is None else str(text)
