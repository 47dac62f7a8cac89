"""Which rows of a table are not to be trusted: noisy ones, and ones that their neighbours or whole networks contradict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from nas.progress import say
from nas.table import LatencyTable, Row
from supernet.errors import InputError
from supernet.specs import Layer, label

Array = npt.NDArray[np.float64]

NOISY = "noisy"  # the flag
NOISY_SPREAD = 0.3  # (p90 - p10) / ms
NOISY_INTERVAL = 0.05  # half-width / ms; narrower than this, a row's own interval is no reason for doubt
FEWEST_WIDTHS = 5  # of a series of rows, for the others to say what a row should be
ODD = 0.06  # a row this far from the curve through the other widths is named, if that is also ...
DEVIATIONS = 3.0  # ... so many times what is usual in its series
FEWEST_NETWORKS = 3  # that have a row, for them to say anything of it ...
SMALL_SHARE = 0.02  # ... which must be so much of their milliseconds
UNTRUE_PERCENT = 10.0  # a table with a larger error warns at every use
CONTRADICTED = 0.08  # whole networks say that so much of a row is too much, or lacking ...
CHANCE = 0.05  # ... and would say so of any row of a calibration that is right about so often
FITTED = 6  # numbers that were fitted to these errors: the calibration's four, their mean, and the row's


@dataclass(frozen=True)
class Doubt:
    """A row that is not to be trusted, what it should be where something says so, and why, in a few words."""

    layer: Layer
    ms: float
    expected_ms: float | None
    why: str


def flagged(rows: Mapping[Layer, Row], floor_ms: float) -> dict[Layer, Row]:
    """Return the rows with NOISY in the flag of those whose interval or spread is wide; nothing below `floor_ms` matters."""
    return {
        layer: replace(row, flag=row.flag or NOISY) if _noisy(row, floor_ms) else row  # a word from the device stays
        for layer, row in rows.items()
    }


def _noisy(row: Row, floor_ms: float) -> bool:
    half = (row.high_ms - row.low_ms) / 2
    spread = row.p90_ms - row.p10_ms if row.p90_ms is not None and row.p10_ms is not None else 0.0
    return half > max(NOISY_INTERVAL * abs(row.ms), floor_ms) or spread > max(NOISY_SPREAD * abs(row.ms), 6 * floor_ms)


def doubts(table: LatencyTable) -> list[Doubt]:
    """Return the rows that are flagged, those that lie off the curve of the other widths, and those that the whole
    networks of the calibrations contradict."""
    found = [Doubt(layer, row.ms, None, row.flag) for layer, row in table.rows.items() if row.flag]
    return [*found, *odd_rows(table), *contradicted_rows(table)]


def odd_rows(table: LatencyTable) -> list[Doubt]:
    """Return the blocks' rows that lie off the smooth curve through the other widths of the same block."""
    found = []
    for layers, off, usual in _series(table):
        i = int(np.abs(off / usual).argmax())  # a wrong row bends the curve for the others: the worst alone is named
        if abs(off[i]) > max(ODD, DEVIATIONS * usual[i]):
            why = f"{100 * math.expm1(off[i]):+.0f} % off the curve through the other widths"
            ms = table.rows[layers[i]].ms
            found.append(Doubt(layers[i], ms, ms * math.exp(-off[i]), why))
    return found


def _series(table: LatencyTable) -> Iterator[tuple[list[Layer], Array, Array]]:
    """Yield the layers of every block that has rows at enough widths, how far (log ms) each row is off the curve through the
    others, and how far is usual there."""
    series: dict[tuple[str, int], list[Layer]] = {}
    for layer, row in table.rows.items():
        if row.method == "slope" and row.ms > 0:
            series.setdefault((label(layer.spec), layer.resolution), []).append(layer)
    for layers in series.values():
        if len(layers) >= FEWEST_WIDTHS:
            layers.sort(key=lambda layer: layer.spec.dim)
            x, y = np.log(np.array([(layer.spec.dim, table.rows[layer].ms) for layer in layers])).T
            yield layers, *_off_the_curve(x, y)


def _off_the_curve(x: Array, y: Array) -> tuple[Array, Array]:
    """Return how far every point (n,) is off the curve through all others, and how far is usual for a point there.

    The curve is a polynomial in x, of degree 2, or 3 for nine points or more; leaving a point out is done by its leverage.
    """
    design = np.vander((x - x.mean()) / x.std(), 4 if len(x) >= 9 else 3)
    q, _ = np.linalg.qr(design)
    leverage = (q * q).sum(axis=1)
    residual = y - q @ (q.T @ y)
    spread = 1.4826 * float(np.median(np.abs(residual) / np.sqrt(1 - leverage)))
    return residual / (1 - leverage), np.maximum(spread, 1e-12) / np.sqrt(1 - leverage)


def contradicted_rows(table: LatencyTable) -> list[Doubt]:
    """Return the rows that the errors of a calibration's whole networks contradict.

    If a fraction d of one row is too much and everything else is right, d times what a network's prediction owes to the row
    (its derivative by the row, times the row) is too much; the row should then be 1 - d of what it is, so d is at most 1. The
    least-squares d of every row, beside an error that all networks share, is compared with what the networks' other errors
    leave open; the more rows are asked about, the more of them would be off by chance. A row that the other widths of its block
    confirm is not named: what ails the networks is then something that its share goes along with.
    """
    found: dict[Layer, Doubt] = {}
    off_curve = {layer: float(far) for layers, off, _ in _series(table) for layer, far in zip(layers, off, strict=True)}
    for calibration in table.calibrations:
        errors, shares = [], []
        for network in calibration.networks:
            try:
                layers = network.layers()
            except InputError:  # blocks of a user's own, from a file that was not given now
                continue
            if not layers or network.predicted_ms <= 0 or table.missing(layers):
                continue
            parts = [(layer, calibration.slope_of(layer) * table.layer_ms(layer)) for layer in layers]
            steepness = calibration.steepness(sum(ms for _, ms in parts))
            share: dict[Layer, float] = {}
            for layer, ms in parts:
                share[layer] = share.get(layer, 0.0) + steepness * ms / network.predicted_ms
            errors.append(1 - network.ms / network.predicted_ms)
            shares.append(share)
        asked: dict[Layer, Array] = {}
        for layer in dict.fromkeys(layer for share in shares for layer in share):
            s = np.array([share.get(layer, 0.0) for share in shares])
            if (s > 0).sum() >= FEWEST_NETWORKS and s[s > 0].mean() >= SMALL_SHARE and np.ptp(s) > 0:
                asked[layer] = s - s.mean()
        freedom = len(errors) - FITTED
        if freedom < 1 or not asked:
            continue
        deviations = _deviations(CHANCE / len(asked), freedom)
        e = np.array(errors) - np.mean(errors)
        for layer, s in asked.items():
            weight = float(s @ s)
            too_much = float(s @ e) / weight
            rest = e - too_much * s
            open_ = math.sqrt(float(rest @ rest) / freedom / weight)
            if too_much - deviations * open_ > 1 or abs(too_much) <= max(CONTRADICTED, deviations * open_):
                continue  # more than all of the row: whatever it is, it is not the row; or too little to say
            claimed = -math.log(max(1 - too_much, 1e-9))
            if abs(off_curve.get(layer, claimed)) < abs(claimed) / 2:
                continue
            ms = table.layer_ms(layer)
            if too_much < 1:
                why = f"whole networks say that it is {100 * too_much / (1 - too_much):+.0f} % off"
                found[layer] = Doubt(layer, ms, ms * (1 - too_much), why)
            else:
                found[layer] = Doubt(layer, ms, None, "whole networks say that it is far too much")
    return list(found.values())


def _deviations(chance: float, freedom: int) -> float:
    """Return how many standard errors an estimate strays with that chance, to either side: Student's t, by the first terms of
    Cornish and Fisher's expansion."""
    z = NormalDist().inv_cdf(1 - chance / 2)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def say_if_untrue(table: LatencyTable) -> None:
    """Warn of calibrations whose error on unseen networks is large."""
    for c in table.calibrations:
        if c.mean_error_percent > UNTRUE_PERCENT:
            say(
                f"warning: predictions of the table of {table.device} are off by {c.mean_error_percent:.0f} % on average for "
                f"{c.space}: measure it anew on a quiet machine"
            )
