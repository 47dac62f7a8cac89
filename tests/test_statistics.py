"""Rank correlation, fit, regret and intervals are what their definitions say."""

import itertools
import math
import random

import numpy as np
import pytest

from nas.statistics import bootstrap, kendall_tau, line, r_squared, regret, regret_among


def test_tau_of_an_order_and_its_opposite() -> None:
    values = [0.3, 1.0, 2.0, 7.0]
    assert kendall_tau(values, [10 * v**3 for v in values]) == 1
    assert kendall_tau(values, [-v for v in values]) == -1
    # One of six pairs is turned round: (5 - 1) / 6.
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)


def test_tau_b_by_its_definition_with_ties() -> None:
    rng = random.Random(0)
    for _ in range(20):
        x, y = ([rng.randrange(4) for _ in range(9)] for _ in range(2))
        pairs = list(itertools.combinations(range(9), 2))
        agreement = sum(int(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])) for i, j in pairs)
        untied = math.sqrt(sum(x[i] != x[j] for i, j in pairs) * sum(y[i] != y[j] for i, j in pairs))
        assert kendall_tau(x, y) == pytest.approx(agreement / untied)


def test_tau_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for ties in (3, 10, 10**9):
        x, y = rng.integers(0, ties, 40), rng.integers(0, ties, 40)
        assert kendall_tau(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)


@pytest.mark.parametrize(("x", "y"), [([1, 1, 1], [1, 2, 3]), ([1, 2], [3, 3]), ([1], [1]), ([], [])])
def test_what_has_no_order_has_no_tau(x: list[float], y: list[float]) -> None:
    assert math.isnan(kendall_tau(x, y))


def test_lists_of_different_lengths_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="one length"):
        kendall_tau([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="resampled together"):
        bootstrap([1, 2], [1, 2, 3], statistic=kendall_tau)


def test_a_line_and_what_it_explains() -> None:
    x = np.array([0.0, 1.0, 2.0, 3.0])
    assert line(x, 0.4 * x + 2) == pytest.approx((0.4, 2.0))
    assert r_squared(x, 0.4 * x + 2) == pytest.approx(1)
    assert r_squared(x, -x) == pytest.approx(1), "a line may fall"
    # Means 1.5 and 1; the products of the differences from them sum to 3, the squares of those of x to 5.
    y = np.array([0.0, 1.0, 1.0, 2.0])
    assert line(x, y) == pytest.approx((0.6, 0.1))
    assert r_squared(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    assert math.isnan(r_squared([1, 1], [1, 2])) and math.isnan(r_squared([1, 2], [1, 1]))


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        low, high = bootstrap(rng.normal(5, 1, 40), statistic=np.mean, seed=seed, n=200, level=0.9)
        covered += low <= 5 <= high
    assert 80 <= covered <= 97


def test_the_interval_is_decided_by_the_seed_and_resamples_pairs() -> None:
    x = np.arange(30.0)
    assert bootstrap(x, x**2, statistic=kendall_tau) == (1.0, 1.0), "pairs stay together, so any resample is in order"
    noisy = x + np.random.default_rng(0).normal(0, 8, 30)
    first = bootstrap(x, noisy, statistic=kendall_tau, seed=3, n=100)
    assert first == bootstrap(x, noisy, statistic=kendall_tau, seed=3, n=100)
    assert first != bootstrap(x, noisy, statistic=kendall_tau, seed=4, n=100)
    assert first[0] < kendall_tau(x, noisy) < first[1]
    assert all(math.isnan(end) for end in bootstrap([1, 1], [1, 2], statistic=kendall_tau))


def test_regret_is_what_the_best_scored_lacks() -> None:
    truth = [0.50, 0.60, 0.55, 0.58]
    assert regret(truth, truth) == 0
    assert regret([1, 0, 3, 2], truth) == pytest.approx(0.05)  # 0.55 was taken, 0.60 was there
    assert regret([1, 0, 3, 2], truth, best_of=2) == pytest.approx(0.02)
    assert regret([1, 0, 3, 2], truth, best_of=4) == 0
    assert regret([0, 0, 0, 0], truth) == pytest.approx(0.10), "of equal scores the first is taken"


def test_regret_among_a_few_is_that_of_all_where_all_are_among_them() -> None:
    truth, score = [0.50, 0.60, 0.55, 0.58], [1, 0, 3, 2]
    assert regret_among(score, truth, among=4) == pytest.approx(0.05)
    # Of the six pairs: (0, 1) 0.1, (1, 2) 0.05, (1, 3) 0.02, (2, 3) 0.03; the others 0.
    assert regret_among(score, truth, among=2) == pytest.approx(0.20 / 6)
