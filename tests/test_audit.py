"""Rows that are wrong are named; rows that are right are not."""

import random
import re
from dataclasses import replace

import pytest
import yaml
from tables import plain_calibration

from nas.audit import contradicted_rows, doubts, flagged, odd_rows, say_if_untrue
from nas.table import CheckedNetwork, LatencyTable, Row, measured_layers
from supernet.arch import ArchConfig
from supernet.space import SearchSpace
from supernet.specs import MB3D, MB4D, Head, Layer

SMALL = SearchSpace.load("efficientformer-s")
CHANGED = Layer(MB4D(320), 7)


def cost(layer: Layer) -> float:
    """Made-up milliseconds that grow with the width as real ones do: a little less than its square."""
    spec, side = layer
    blocks = 40.0 if isinstance(spec, MB3D) else 12.0
    return (blocks if isinstance(spec, MB3D | MB4D) else 1.0) * (spec.dim**1.8 + 50 * spec.dim) * side / 1e7


def table_of(noise: float = 0.0, off: float = 1.0) -> LatencyTable:
    """A table with normal noise in every row, one row of which is off by a factor."""
    rng = random.Random(1)
    rows = {}
    for layer in measured_layers(SMALL.layers()):
        ms = cost(layer) * rng.gauss(1, noise) * (off if layer == CHANGED else 1.0)
        method = "difference" if isinstance(layer.spec, Head) or layer.spec.kind in ("stem", "embedding") else "slope"
        rows[layer] = Row(ms, 0.99 * ms, 1.01 * ms, method, 0.97 * ms, 0.98 * ms, 1.05 * ms, 20)
    return LatencyTable("toy-cpu", rows)


@pytest.mark.parametrize("off", [1.1, 0.9, 1.3])
def test_a_row_off_the_curve_of_its_widths_is_named_with_what_it_should_be(off: float) -> None:
    found = odd_rows(table_of(0.01, off))
    (doubt,) = [d for d in found if d.layer == CHANGED]
    assert doubt.ms == pytest.approx(off * cost(CHANGED), rel=0.05)
    assert doubt.expected_ms == pytest.approx(cost(CHANGED), rel=0.05)
    assert len(found) <= 2


def test_rows_that_are_right_are_not_named() -> None:
    assert odd_rows(table_of(0.0)) == []
    assert len(odd_rows(table_of(0.02))) <= 3


def arch_of(network: CheckedNetwork) -> ArchConfig:
    return ArchConfig.from_dict(yaml.safe_load(network.arch), "a network")


def checked(table: LatencyTable, count: int, noise: float, shared: float = 1.0, seed: int = 2) -> LatencyTable:
    """The table with whole networks that were measured on the true device, with some noise and an error that all share."""
    rng = random.Random(seed)
    networks = []
    for _ in range(count):
        arch = SMALL.sample(rng).without_identity()
        ms = sum(cost(layer) for layer in arch.layers()) * shared * rng.gauss(1, noise)
        networks.append(CheckedNetwork(arch.to_yaml(), ms, 0.01 * ms, table.sum_ms(arch), False))
    return replace(table, calibrations=(replace(plain_calibration(SMALL), networks=tuple(networks)),))


def test_a_row_that_whole_networks_contradict_is_named() -> None:
    found = contradicted_rows(checked(table_of(off=1.5), 200, 0.01))
    (doubt,) = [d for d in found if d.layer == CHANGED]
    assert doubt.expected_ms == pytest.approx(cost(CHANGED), rel=0.05)
    assert re.fullmatch(r"whole networks say that it is \+(4[5-9]|5[0-5]) % off", doubt.why)


def test_how_far_a_row_is_off_is_told_where_the_calibration_bends() -> None:
    """A millisecond more of a row is more than a millisecond of a large network."""
    table = table_of(off=1.5)
    bent = replace(plain_calibration(SMALL), bend=0.05)
    networks = [
        replace(
            n,
            ms=bent.predict_ms(sum(cost(layer) for layer in n.layers()), 0.0),
            predicted_ms=bent.predict_ms(table.sum_ms(arch_of(n)), 0.0),
        )
        for n in checked(table, 100, 0.0).calibrations[0].networks
    ]
    (doubt,) = contradicted_rows(replace(table, calibrations=(replace(bent, networks=tuple(networks)),)))
    assert doubt.layer == CHANGED and doubt.expected_ms == pytest.approx(cost(CHANGED), rel=0.02)


def test_a_row_a_hundred_times_too_large_is_named_too() -> None:
    (doubt,) = [d for d in contradicted_rows(checked(table_of(off=100.0), 200, 0.01)) if d.layer == CHANGED]
    assert "whole networks say" in doubt.why


def test_a_row_that_the_other_widths_confirm_is_not_named() -> None:
    """Networks with it are slower than the table says, but not by its own doing."""
    right, wrong = table_of(0.002), table_of(0.002, off=0.6)
    (slower,) = checked(right, 400, 0.01).calibrations
    networks = []
    for network in slower.networks:
        beside = sum(0.4 * cost(layer) for layer in network.layers() if layer == CHANGED)
        networks.append(replace(network, ms=network.ms + beside))
    calibrations = (replace(slower, networks=tuple(networks)),)
    assert CHANGED not in {d.layer for d in contradicted_rows(replace(right, calibrations=calibrations))}
    lacking = (replace(slower, networks=tuple(replace(n, predicted_ms=wrong.sum_ms(arch_of(n))) for n in slower.networks)),)
    assert CHANGED in {d.layer for d in contradicted_rows(replace(wrong, calibrations=lacking))}


def test_networks_that_agree_contradict_nothing() -> None:
    assert contradicted_rows(checked(table_of(), 28, 0.015)) == []


def test_an_error_that_all_networks_share_or_chance_alone_contradict_no_row() -> None:
    """Most tables of few networks would have a row three standard errors off, of the hundred that are asked about."""
    right = table_of()
    named = [len(contradicted_rows(checked(right, 28, 0.05, shared=1.06, seed=seed))) for seed in range(24)]
    assert sum(number > 0 for number in named) <= 4  # 1 expected


def test_wide_intervals_and_spreads_are_flagged_where_they_matter() -> None:
    wide = Row(1.0, 0.9, 1.1, "slope", 0.95, 0.97, 1.05, 20)
    spread = Row(1.0, 0.99, 1.01, "slope", 0.9, 0.95, 1.3, 20)
    small = Row(0.001, -0.001, 0.003, "difference", 0.0, 0.0, 0.002, 20)
    good = Row(1.0, 0.99, 1.01, "slope", 0.95, 0.97, 1.05, 20)
    layers = [Layer(MB4D(width), 8) for width in (16, 32, 48, 64, 80)]
    told = replace(good, flag="off-npu")
    rows = flagged(dict(zip(layers, (wide, spread, small, good, told), strict=True)), floor_ms=0.01)
    assert [row.flag for row in rows.values()] == ["noisy", "noisy", "", "", "off-npu"]
    table = LatencyTable("toy-cpu", rows)
    assert [d.why for d in doubts(table)] == ["noisy", "noisy", "off-npu"]


@pytest.mark.parametrize(("percent", "said"), [(9.0, ""), (12.0, "are off by 12 % on average for efficientformer-s: measure")])
def test_a_table_that_is_far_off_warns(percent: float, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    far_off = replace(plain_calibration(SMALL), mean_error_percent=percent)
    say_if_untrue(replace(table_of(), calibrations=(far_off,)))
    err = capsys.readouterr().err
    assert said in err and bool(err) is bool(said)
