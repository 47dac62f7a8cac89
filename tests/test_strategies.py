"""Targets on several devices are met together or refused; the best by the drops; what the loop does where it is stuck."""

import itertools
import math
import random
import subprocess
import sys
from dataclasses import replace

import pytest
from small_spaces import stage_space
from tables import plain_calibration

from nas.scores import Drop, Drops, changes_of, single_changes
from nas.strategies import (
    Budgeted,
    Scores,
    Study,
    choose,
    exact,
    fastest_ms,
    frontier_records,
    greedy,
    larger_space,
    limits_of,
    nothing_taken_away,
    refuse_unreachable,
)
from nas.table import LatencyTable, Row, measured_layers
from nas.trajectory import Evaluation, Limit, NothingFits, Trajectory
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.model import count
from supernet.space import SearchSpace

SPACE = SearchSpace(
    "two-devices",
    32,
    10,
    (
        stage_space((8, 16, 24), 4, 2, "mb4d", "identity"),
        stage_space((16, 24, 32), 2, 2, "mb4d", "mb3d", "identity"),
    ),
)


def table_of(device: str, seed: int, space: SearchSpace = SPACE) -> LatencyTable:
    """A table whose rows are at random, so that what is quick on one device may be slow on another."""
    rng = random.Random(seed)
    times = {layer: rng.uniform(0.01, 0.1) * layer.spec.dim for layer in measured_layers(space.layers())}
    rows = {layer: Row(ms, ms, ms, "slope") for layer, ms in times.items()}
    return LatencyTable(device, rows, (plain_calibration(space),))


def drops_of(seed: int, space: SearchSpace = SPACE) -> Drops:
    rng = random.Random(seed)
    singles = {c: Drop(rng.uniform(0, 0.3), rng.uniform(0, 0.1), 0.0, 0.0) for c in single_changes(space, space.largest)}
    return Drops(space, space.largest, Evaluation(1.0, 0.9), singles, {})


def scores_of(seed: int) -> Scores:
    drops = drops_of(seed)
    return Scores(SPACE, drops.base, drops.importance(), drops, drops.evaluation_for)


def all_networks(space: SearchSpace = SPACE) -> list[ArchConfig]:
    found = {}
    for widths in itertools.product(*(stage.widths for stage in space.stages)):
        slots = [itertools.product(stage.kinds, repeat=stage.depth) for stage in space.stages]
        for kinds in itertools.product(*slots):
            arch = space.arch(widths, kinds)
            found[arch.stages] = arch
    return list(found.values())


NETWORKS = all_networks()


def budgets_of(tables: list[LatencyTable], ms: list[float]) -> list[Budgeted]:
    return [Budgeted(table, table, most) for table, most in zip(tables, ms, strict=True)]


def keeps(arch: ArchConfig, budgets: list[Budgeted]) -> bool:
    return all(budget.table.predict_ms(arch) <= budget.ms for budget in budgets)


@pytest.mark.parametrize("strategy", ["greedy", "exact"])
def test_two_targets_are_met_on_both_devices_in_30_of_30_feasible_pairs(strategy: str) -> None:
    for seed in range(30):
        tables = [table_of("one-cpu", seed), table_of("two-npu", 100 + seed)]
        some = random.Random(seed).choice(NETWORKS)
        budgets = budgets_of(tables, [table.predict_ms(some) for table in tables])
        refuse_unreachable(SPACE, budgets)
        found = choose(strategy, scores_of(seed), budgets, (), start=None, landing=0.03)
        assert keeps(found.arch, budgets), seed
        assert found.evaluation == drops_of(seed).evaluation_for(found.arch)


@pytest.mark.parametrize("seed", range(8))
def test_exact_is_the_best_of_all_networks_on_both_devices(seed: int) -> None:
    tables = [table_of("one-cpu", seed), table_of("two-npu", 100 + seed)]
    some = random.Random(seed).choice(NETWORKS)
    budgets = budgets_of(tables, [1.1 * table.predict_ms(some) for table in tables])
    scores = scores_of(seed)
    found = exact(scores, budgets)
    best = min(scores.drops.sum_for(arch) for arch in NETWORKS if keeps(arch, budgets))
    assert found.evaluation.loss == pytest.approx(best, abs=1e-12)
    losses = [option.evaluation.loss for option in found.steps[0].options]
    assert losses == sorted(losses)
    assert found.evaluation.loss <= greedy(scores, budgets).evaluation.loss


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 6])
def test_targets_that_no_network_meets_together_are_refused_with_the_nearest_that_one_does(seed: int) -> None:
    tables = [table_of("one-cpu", seed), table_of("two-npu", 100 + seed)]
    least = [fastest_ms(SPACE, table) for table in tables]
    assert least == pytest.approx([min(map(table.predict_ms, NETWORKS)) for table in tables])
    budgets = budgets_of(tables, [1.0001 * ms for ms in least])
    assert not any(keeps(arch, budgets) for arch in NETWORKS), "the case is one of targets that exclude each other"

    with pytest.raises(
        InputError, match=r"the nearest that one takes is ([\d.]+) ms on one-cpu and ([\d.]+) ms on two-npu"
    ) as told:
        refuse_unreachable(SPACE, budgets)
    words = str(told.value).split()
    given = [float(words[at - 1]) for at, word in enumerate(words) if word == "ms"][-2:]
    nearest = budgets_of(tables, given)
    refuse_unreachable(SPACE, nearest)  # what it tells can be met
    factors = [max(t.predict_ms(a) / b.ms for t, b in zip(tables, budgets, strict=True)) for a in NETWORKS]
    told_factor = max(ms / budget.ms for ms, budget in zip(given, budgets, strict=True))
    assert told_factor == pytest.approx(min(factors), rel=2e-3)


def test_a_target_below_the_fastest_network_is_refused_with_the_least() -> None:
    table = table_of("one-cpu", 0)
    with pytest.raises(InputError, match=r"0\.01 ms is below the fastest network of two-devices on one-cpu: give at least"):
        refuse_unreachable(SPACE, budgets_of([table], [0.01]))


def test_the_best_few_by_the_drops_are_judged_as_whole_networks() -> None:
    scores = scores_of(3)
    table = table_of("one-cpu", 3)
    budgets = budgets_of([table], [0.6 * table.predict_ms(SPACE.largest)])
    by_drops = exact(scores, budgets)
    second = by_drops.steps[0].options[1].arch

    def whole(arch: ArchConfig) -> Evaluation:
        return Evaluation(0.5 if arch == second else 2.0)

    found = exact(scores, budgets, (), whole)
    assert found.arch == second
    assert found.steps[0].taken.action == "number 2 by the drops"
    assert {option.arch for option in found.steps[0].options} == {option.arch for option in by_drops.steps[0].options}
    unknown = exact(scores, budgets, (), lambda arch: whole(arch) if arch == second else None)
    assert unknown.arch == by_drops.arch, "one whole network says nothing beside five that are not known"


def test_a_whole_network_whose_loss_is_no_number_is_refused() -> None:
    scores, table = scores_of(2), table_of("one-cpu", 2)
    budgets = budgets_of([table], [0.5 * table.predict_ms(SPACE.largest)])
    worst = exact(scores, budgets).steps[0].options[-1].arch

    def whole(arch: ArchConfig) -> Evaluation:
        return Evaluation(math.nan if arch == worst else 1.0, 0.5)

    with pytest.raises(InputError, match=r"evaluating .* gives a loss of nan"):
        exact(scores, budgets, (), whole)


def test_exact_keeps_limits_on_parameters_and_macs() -> None:
    scores = scores_of(1)
    table = table_of("one-cpu", 1)
    start = count(SPACE.largest)
    limits = limits_of(SPACE, None, int(0.5 * start.params), int(0.6 * start.macs))
    found = exact(scores, budgets_of([table], [100.0]), limits)
    allowed = [arch for arch in NETWORKS if all(limit.is_met(arch) for limit in limits)]
    assert found.evaluation.loss == pytest.approx(min(map(scores.drops.sum_for, allowed)), abs=1e-12)
    assert set(found.steps[0].figures) == {"params", "macs"}


def test_a_start_that_keeps_everything_is_the_answer_of_every_strategy() -> None:
    scores = scores_of(1)
    table = table_of("one-cpu", 1)
    budgets = budgets_of([table], [2 * table.predict_ms(SPACE.largest)])
    for found in (exact(scores, budgets), greedy(scores, budgets)):
        assert isinstance(found, Trajectory)
        assert (found.arch, found.steps) == (SPACE.largest, ())


@pytest.mark.parametrize("strategy", ["greedy", "exact", "optuna"])
def test_that_nothing_fits_is_told_apart_from_what_is_wrong(strategy: str) -> None:
    """A search that is repeated with tighter budgets ends with what it has where nothing fits, and nowhere else."""
    tables, scores = [table_of("one-cpu", 0), table_of("two-npu", 1)], scores_of(0)
    study = Study("study", "unheard://somewhere", "tpe", 8, 0)
    half = [0.5 * table.predict_ms(SPACE.largest) for table in tables]
    for budgets, limits in (([1e-3, half[1]], []), ([half[0], 1e-3], []), (half, [Limit("params", lambda _: 2.0, 1.0)])):
        with pytest.raises(NothingFits):
            choose(strategy, scores, budgets_of(tables, budgets), limits, study=study)

    def damaged(arch: ArchConfig) -> Evaluation:
        raise InputError("the file of evaluations is damaged")

    with pytest.raises(InputError, match="is damaged") as refused:
        choose(strategy, replace(scores, evaluate=damaged), budgets_of(tables, half), (), study=study)
    assert not isinstance(refused.value, NothingFits)


def test_where_the_loop_is_stuck_the_best_by_the_drops_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """Every single change of the largest network is slower on the device, and other networks are quicker."""
    table, scores = table_of("one-cpu", 0), scores_of(0)

    class Odd(LatencyTable):
        def predict_ms(self, arch: ArchConfig) -> float:
            return 1e3 if len(changes_of(SPACE, SPACE.largest, arch)) == 1 else table.predict_ms(arch)

    odd = Odd(table.device, table.rows, table.calibrations)
    budgets = budgets_of([odd], [0.5 * table.predict_ms(SPACE.largest)])
    with pytest.raises(InputError, match="no action saves anything"):
        greedy(scores, budgets)
    found = choose("greedy", scores, budgets, (), start=None, landing=0.03)
    assert keeps(found.arch, budgets)
    said = capsys.readouterr().err
    assert "the best by the drops does" in said
    assert "as a whole network" not in said, "sums of drops alone were looked at"
    choose("greedy", replace(scores, evaluate=lambda arch: scores.drops.evaluation_for(arch)), budgets, ())
    assert "by the drops is the best as a whole network" in capsys.readouterr().err

    def damaged(arch: ArchConfig) -> Evaluation:
        if arch == found.arch:
            raise InputError("the file of evaluations is damaged")
        return scores.evaluate(arch)

    with pytest.raises(InputError, match="is damaged"):
        choose("greedy", replace(scores, evaluate=damaged), budgets, ())
    (line,) = table.calibrations
    two = tuple(replace(line, space=name, space_sha256=name) for name in ("a", "b"))
    with pytest.raises(NothingFits, match="no action saves anything"):  # there is no best by the drops
        choose("greedy", scores, budgets_of([replace(odd, calibrations=two)], [budgets[0].ms]), ())


def test_the_frontier_of_each_device_is_by_its_own_table() -> None:
    tables = [table_of("one-cpu", 5), table_of("two-npu", 6)]
    drops = drops_of(5)
    rows = list(frontier_records(SPACE, drops, tables))
    for table in tables:
        own = [(row["ms"], row["loss"]) for row in rows if row["device"] == table.device]
        best = math.inf
        by_hand = []
        for ms, loss in sorted((table.predict_ms(arch), drops.sum_for(arch)) for arch in NETWORKS):
            if loss < best - 1e-9:
                by_hand.append((ms, loss))
                best = loss
        assert own == [pytest.approx(point, abs=1e-9) for point in by_hand]


def test_a_limit_of_zero_is_none() -> None:
    assert limits_of(SPACE, None, 0, 0) == []
    (limit,) = limits_of(SPACE, None, 0, 10**6)
    assert isinstance(limit, Limit)
    assert limit.of(SPACE.largest) == count(SPACE.largest).macs


def test_strategies_do_without_torch() -> None:
    code = "import sys, nas.strategies, nas.again; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_larger_space_is_of_about_the_same_size_and_of_the_blocks() -> None:
    larger = {
        "efficientformer-s": "efficientformer-m",
        "efficientformer-m": "efficientformer-l",
        "efficientformer-l": None,
        "efficientformer-tiny": None,
        "efficientvit": None,  # the mixed one has more stages
        "concatplexer-tiny": None,
    }
    assert {name: larger_space(SearchSpace.load(name)) for name in larger} == larger
    assert larger_space(SearchSpace.load("efficientformer-s").at(192)) == "efficientformer-m"
    assert larger_space(SearchSpace.load("efficientformer-s").at(96)) is None, "others are made for much larger images"
    said = nothing_taken_away(SearchSpace.load("efficientformer-l"), None)
    assert "no larger space of its blocks ships for 224 px" in said and "--space" not in said
