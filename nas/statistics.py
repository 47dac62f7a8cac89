"""How well a score ranks networks: rank correlation, fit by a line, regret, and intervals by resampling. numpy alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]


def kendall_tau(x: ArrayLike, y: ArrayLike) -> float:
    """Return Kendall's tau-b of two lists: concordant minus discordant pairs over all pairs, corrected for ties.

    1: the same order; -1: the opposite one. NaN where all of one list are equal, or there are fewer than two.
    """
    a, b = _paired(x, y)
    order_a, order_b = np.sign(a[:, None] - a), np.sign(b[:, None] - b)  # (n, n), each pair twice
    untied = float(np.sqrt((order_a**2).sum() * (order_b**2).sum()))
    return float((order_a * order_b).sum()) / untied if untied else float("nan")


def line(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """Return slope and intercept of the least-squares line of y on x. NaN where all x are equal."""
    a, b = _paired(x, y)
    spread = float(((a - a.mean()) ** 2).sum()) if len(a) else 0.0
    if not spread:
        return float("nan"), float("nan")
    slope = float(((a - a.mean()) * (b - b.mean())).sum()) / spread
    return slope, float(b.mean() - slope * a.mean())


def r_squared(x: ArrayLike, y: ArrayLike) -> float:
    """Return the share (0 to 1) of the variance of y that the least-squares line on x explains. NaN where there is none."""
    a, b = _paired(x, y)
    slope, intercept = line(a, b)
    spread = float(((b - b.mean()) ** 2).sum()) if len(b) else 0.0
    return 1 - float(((b - slope * a - intercept) ** 2).sum()) / spread if spread else float("nan")


def bootstrap(
    *values: ArrayLike, statistic: Callable[..., float], seed: int = 0, n: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Return the ends of the percentile interval of a statistic over `n` resamples, with replacement.

    Args:
        values: lists of one length; what stands at one place of them is resampled together.
        statistic: takes as many arrays. Resamples for which it is NaN are left out; NaN, NaN where all are.
        level: the share of resamples inside the interval.
    """
    arrays = [np.asarray(v, dtype=np.float64) for v in values]
    if len({len(a) for a in arrays}) != 1:
        raise ValueError(f"lists of lengths {[len(a) for a in arrays]} cannot be resampled together")
    rng = np.random.default_rng(seed)
    size = len(arrays[0])
    found = np.array([statistic(*(a[chosen] for a in arrays)) for chosen in (rng.integers(0, size, size) for _ in range(n))])
    found = found[~np.isnan(found)]
    if not len(found):
        return float("nan"), float("nan")
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def regret(score: ArrayLike, truth: ArrayLike, best_of: int = 1) -> float:
    """Return how far the truest of the `best_of` networks with the highest scores is below the truest of all.

    Both are higher for better networks. Of equal scores the one that stands first counts as higher.
    """
    a, b = _paired(score, truth)
    top = np.argsort(-a, kind="stable")[:best_of]
    return float(b.max() - b[top].max())


def regret_among(score: ArrayLike, truth: ArrayLike, among: int = 10) -> float:
    """Return the mean regret of taking the highest score among `among` networks (all, where there are fewer), over all choices
    of so many. Of equal scores the one that stands first counts as higher."""
    a, b = _paired(score, truth)
    n, k = len(a), min(among, len(a))
    # The share of choices in which the network of each rank, from 0 on, is the highest: the others are all of lower rank.
    shares = np.array([math.comb(n - 1 - rank, k - 1) / math.comb(n, k) for rank in range(n)])
    return float(shares @ np.sort(b)[::-1] - shares @ b[np.argsort(-a, kind="stable")])


def _paired(x: ArrayLike, y: ArrayLike) -> tuple[Values, Values]:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"two lists of one length are needed, not of shapes {a.shape} and {b.shape}")
    return a, b
