"""Calibrations: from the sum of a network's rows to its milliseconds, fitted to whole networks, with the error on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.plan import CHECK_NETWORKS, FIT_NETWORKS
from nas.profilers.timing import Measurement
from nas.progress import say
from nas.statistics import kendall_tau
from nas.table import (
    Calibration,
    CheckedNetwork,
    LatencyTable,
    bend_factor,
    calibrated_ms,
    measured_layers,
    option_of,
    space_sha256,
)
from supernet.arch import ArchConfig, place_of
from supernet.errors import InputError
from supernet.space import SearchSpace

Array = npt.NDArray[np.float64]

BENDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)  # how much longer the longest network is than its line, tried
REPETITIONS = 6


def calibrate(
    space: SearchSpace, table: LatencyTable, networks: Sequence[ArchConfig], measured: Sequence[Measurement]
) -> Calibration:
    """Fit a calibration to about four networks in seven, spread over the latencies, and tell its error on the others.

    The fit minimises the sum of absolute relative errors, which a network that was disturbed cannot pull.
    """
    order = sorted(range(len(networks)), key=lambda i: table.sum_ms(networks[i]))
    check = np.zeros(len(order), dtype=bool)
    held_out = len(order) * CHECK_NETWORKS // (FIT_NETWORKS + CHECK_NETWORKS)
    check[np.linspace(1, len(order) - 2, held_out).round().astype(int)] = True  # the ends belong to the fit
    found = [(networks[i], measured[i].ms, measured[i].half_width_ms, not told) for i, told in zip(order, check, strict=True)]
    return _calibration(space.name, space_sha256(space), table, found)


def _calibration(
    space: str, sha256: str, table: LatencyTable, networks: Sequence[tuple[ArchConfig, float, float, bool]]
) -> Calibration:
    """Fit a calibration to networks with their milliseconds, half the width of their interval, and whether they are to be
    fitted; the others tell its error."""
    archs = [arch for arch, _, _, _ in networks]
    x, between = np.array([table.sums_ms(arch) for arch in archs]).T
    y = np.array([ms for _, ms, _, _ in networks])
    check = np.array([not fitted for _, _, _, fitted in networks])
    coefficients = fit(x[~check], between[~check], y[~check])
    _refuse_level(coefficients[1])
    predicted = calibrated_ms(coefficients, x, between)
    signed = 100 * (predicted - y)[check] / y[check]
    by_stage, by_kind = _shares(table, [arch for arch, told in zip(archs, check, strict=True) if told])
    return Calibration(
        space=space,
        space_sha256=sha256,
        image_size=archs[0].image_size,
        strides=archs[0].strides,
        offset_ms=float(coefficients[0]),
        scale=float(coefficients[1]),
        scale_between=float(coefficients[2]),
        bend=float(coefficients[3]),
        sum_low_ms=float(x.min()),
        sum_high_ms=float(x.max()),
        n_fit=int((~check).sum()),
        n_check=int(check.sum()),
        **_errors(predicted[check], y[check]),
        error_by_stage_percent=tuple(float(np.average(signed, weights=w)) if w.any() else 0.0 for w in by_stage),
        error_by_kind_percent={k: float(np.average(signed, weights=w)) for k, w in by_kind.items() if w.sum() > 0},
        networks=tuple(
            CheckedNetwork(arch.to_yaml(), ms, half_width_ms, float(said), fitted)
            for (arch, ms, half_width_ms, fitted), said in zip(networks, predicted, strict=True)
        ),
    )


def on_medians(calibration: Calibration, x: Array, y: Array) -> Calibration:
    """Return a calibration, its offset and scale fitted to the milliseconds `y` of whole networks whose rows sum to `x`; the
    error told is that of each one, left out in turn."""
    design = np.stack([np.ones(len(x)), x], axis=1)
    others = [np.arange(len(x)) != i for i in range(len(x))]
    left_out = np.array([design[i] @ least_absolute(design[m], y[m]) for i, m in enumerate(others)])
    offset_ms, scale = least_absolute(design, y)
    _refuse_level(scale)
    return replace(
        calibration,
        offset_ms=float(offset_ms),
        scale=float(scale),
        scale_between=0.0,
        bend=0.0,
        n_fit=len(x),
        n_check=len(x),
        sum_low_ms=float(x.min()),
        sum_high_ms=float(x.max()),
        **_errors(left_out, y),
        error_by_stage_percent=(),
        error_by_kind_percent={},
        networks=(),
    )


def _refuse_level(scale: float) -> None:
    """Refuse a fit by which networks whose rows say more do not take longer, beyond the rounding of a fit."""
    if not scale > 1e-9:
        raise InputError(
            "the networks do not take longer the more their rows say, so nothing can be fitted to them: measure in a quiet "
            "hour, or give networks that differ more, their milliseconds with more digits"
        )


def _errors(predicted: Array, measured: Array) -> dict[str, Any]:
    """Return how far predictions of milliseconds are off, as a calibration tells it."""
    errors = 100 * np.abs(predicted - measured) / measured
    return {
        "mean_error_percent": float(errors.mean()),
        "max_error_percent": float(errors.max()),
        "within_5_percent": float(100 * (errors <= 5).mean()),
        "within_10_percent": float(100 * (errors <= 10).mean()),
        "kendall_tau": sidecar_tau(predicted, measured),
    }


def refitted(calibration: Calibration, old: LatencyTable, table: LatencyTable) -> Calibration:
    """Return another space's calibration, fitted anew to its networks where rows of theirs were measured anew.

    Rows are measured in the working set of a typical network of the space that is built, so those that spaces share change with
    it by more than chance. The networks' milliseconds were measured at the table's pace, and stay.
    """
    changed = {layer for layer, row in old.rows.items() if layer not in table.rows or table.rows[layer].ms != row.ms}
    how = f"fit it anew with {table.building(option_of(calibration.space))}"
    try:
        networks = [(n.network(), n.ms, n.half_width_ms, n.fitted) for n in calibration.networks]
    except InputError:  # blocks of a user's own, from a file that was not given now
        networks = []
    if not networks:
        if changed:
            say(f"warning: the calibration for {calibration.space} may be of rows that were measured anew: {how}")
        return calibration
    used = set(measured_layers(layer for arch, *_ in networks for layer in arch.layers()))
    if not used & changed:
        return calibration
    if table.missing(used):
        say(f"warning: the calibration for {calibration.space} is of rows that are no longer there: {how}")
        return calibration
    found = _calibration(calibration.space, calibration.space_sha256, table, networks)
    say(
        f"the calibration for {calibration.space}, which shares rows, is fitted anew: off by {found.mean_error_percent:.1f} % "
        f"on average (before, {calibration.mean_error_percent:.1f} %)"
    )
    return found


def fit(sums: Array, between: Array, measured: Array) -> Array:
    """Return offset_ms, scale, scale_between and bend, from networks' sums of rows, of stems and embeddings among them, and
    milliseconds, each (n,).

    The bend is the one of a grid by which the others fit best; for each, the line that they make is found by repetition. Where
    the line does not rise, there is none. Where stems and embeddings hardly differ, noise may say that larger ones are faster:
    then they count as other rows do.
    """
    columns = np.stack([np.ones(len(sums)), sums, between], axis=1)
    straight = np.append(least_absolute(columns, measured), 0.0)
    tried = [straight]
    for bent in BENDS:
        found = straight
        for _ in range(REPETITIONS):
            line = columns[:, 1:] @ found[1:3]
            if line.max() <= 0:
                break
            bend = bent / line.max()
            factors = columns * np.stack([np.ones(len(line)), *2 * [bend_factor(line, bend)]], axis=1)
            found = np.append(least_absolute(factors, measured), bend)
        else:
            tried.append(found)
    best = min(tried, key=lambda found: float(np.abs(calibrated_ms(found, sums, between) / measured - 1).sum()))
    return fit(sums, 0 * between, measured) if between.any() and best[1] + best[2] <= 0 else best


def sidecar_tau(predicted: Array, measured: Array) -> float:
    """Return Kendall's tau-b of two samples (n,) for a table's sidecar: 0 where there is no order, as JSON has no NaN."""
    return float(np.nan_to_num(kendall_tau(predicted, measured)))


def _shares(table: LatencyTable, networks: Sequence[ArchConfig]) -> tuple[list[Array], dict[str, Array]]:
    """Return each network's share of its milliseconds in every stage, and in every kind of layer: arrays (networks,)."""
    by_stage = [np.zeros(len(networks)) for _ in networks[0].stages]
    by_kind: dict[str, Array] = {}
    for number, arch in enumerate(networks):
        total = table.sum_ms(arch)
        for name, layer in arch.named_layers():
            share = max(0.0, table.layer_ms(layer)) / total
            by_kind.setdefault(layer.spec.kind, np.zeros(len(networks)))[number] += share
            stage, part, _ = place_of(name)
            if stage is not None and part != "stem":
                by_stage[stage][number] += share
    return by_stage, by_kind


def least_absolute(design: Array, y: Array) -> Array:
    """Return the coefficients (k,) that minimise sum |design @ c - y| / y; design (n, k), y (n,). Reweighted least squares."""
    relative = design / y[:, None]
    weights = np.ones(len(y))
    for _ in range(100):
        found, *_ = np.linalg.lstsq(relative * weights[:, None], weights, rcond=None)
        weights = 1 / np.sqrt(np.maximum(np.abs(relative @ found - 1), 1e-6))
    return np.asarray(found)
