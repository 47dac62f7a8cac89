"""The frontier has the best network for every latency, as all networks of small spaces and integer programs say."""

import itertools
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from refusals import refusal
from small_spaces import stage_space
from tables import plain_calibration

from benchmarks.solver import OFF, counted_ms, made_up_drops, milp_choices, milp_network
from nas.dominance import efficient
from nas.knapsack import cheapest, multiple_choice, trade_offs
from nas.scores import Drop, Drops, pairs_to_measure, single_changes
from nas.slimming import slim
from nas.solver import Budget, Solution, best, frontier, solutions
from nas.strategies import countable
from nas.table import LatencyTable, Row
from supernet.arch import ArchConfig
from supernet.model import count, count_layer
from supernet.space import SearchSpace, StageSpace
from supernet.specs import Head, at_width, is_entry

EXACT = 1e-9


def shrunk(name: str) -> SearchSpace:
    """A named space with some hundred networks: few widths, two slots in the last stages, blocks on maps and on tokens."""
    space = SearchSpace.load(name)
    stages = []
    for number, stage in enumerate(space.stages):
        late = len(space.stages) - number
        tokens = [c for c in stage.candidates if c.tokens][:1]
        maps = [c for c in stage.candidates if not c.tokens and c.kind != "identity"][: 2 if late == 1 else 1]
        widths = stage.widths[:2] if late == 2 or len(space.stages) == 1 else stage.widths[:1]
        blocks = [at_width(c, widths[-1]) for c in (*maps, *tokens, *(c for c in stage.candidates if c.kind == "identity"))]
        depth = min(stage.depth, {1: 2, 2: 2}.get(late, 1))
        stages.append(StageSpace(widths, stage.stride, depth, tuple(blocks), stage.entry))
    return replace(space, stages=tuple(stages), mux=())


def made_up_table(space: SearchSpace, seed: int, calibrated: bool = True, device: str = "thing-cpu") -> LatencyTable:
    """Larger layers take longer, by and large; Flat and heads on tokens are not free."""
    rng = random.Random(seed)

    def ms(layer: object) -> float:
        return 0.02 + rng.random() * getattr(getattr(layer, "spec"), "dim") / 100  # noqa: B009

    rows = {layer: Row(value := ms(layer), value, value, "slope") for layer in space.layers()}
    line = replace(plain_calibration(space), offset_ms=0.05, scale=1.1, scale_between=-0.2, bend=0.1)
    return LatencyTable(device, rows, (line,) if calibrated else ())


def members(space: SearchSpace) -> list[ArchConfig]:
    """Every network of a space, once."""
    found: dict[ArchConfig, None] = {}
    slots = itertools.product(*(stage.kinds for stage in space.stages for _ in range(stage.depth)))
    for kinds, widths in itertools.product(slots, itertools.product(*(stage.widths for stage in space.stages))):
        rest = iter(kinds)
        found[space.arch(widths, [[next(rest) for _ in range(stage.depth)] for stage in space.stages])] = None
    return list(found)


def expected(points: list[tuple[float, float, ArchConfig]]) -> list[ArchConfig]:
    """The networks with a lower loss than all that are as fast, of (ms, loss, network)."""
    kept: list[tuple[float, float, ArchConfig]] = []
    for point in sorted(points, key=lambda each: each[:2]):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return [arch for _, _, arch in kept]


# -- All networks of small spaces --------------------------------------------------------------------------------------

FAMILIES = ("efficientformer-tiny", "efficientformerv2-tiny", "efficientvit-tiny", "concatplexer-tiny", "mixed-tiny")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_frontier_is_that_of_all_networks(name: str) -> None:
    space = shrunk(name)
    everything = members(space)
    params = {arch: count(arch).params for arch in everything}
    for seed in (0, 1):
        table, other = made_up_table(space, seed, calibrated=seed == 0), made_up_table(space, seed + 9)
        rng = random.Random(seed)
        drops = made_up_drops(space, seed, like_a_run=seed == 1)
        drops = Drops(space, rng.choice(everything), drops.evaluation, {}, {})  # any network may be the base
        singles = {c: Drop(rng.random(), 0, 0, 0) for c in single_changes(space, drops.base)}
        drops = replace(drops, singles=singles)
        points = [(table.predict_ms(arch), drops.sum_for(arch), arch) for arch in everything]

        found = solutions(space, drops, table)
        assert [solution.arch for solution in found] == expected(points) == frontier(space, drops, table)
        for solution in found:
            assert solution == Solution(
                solution.arch, drops.sum_for(solution.arch), table.predict_ms(solution.arch), {}, gap=0.0
            )

        # A target that a network meets to the last digit; another device; parameters.
        target, middle = points[len(points) // 3][0], everything[len(everything) // 2]
        other_ms, most = 1.2 * other.predict_ms(middle), 1.3 * params[middle]
        budgets = [target, Budget.milliseconds(other, other_ms), Budget.params(most)]
        kept = [p for p in points if p[0] <= target and other.predict_ms(p[2]) <= other_ms and params[p[2]] <= most]
        assert frontier(space, drops, table, target) == expected([p for p in points if p[0] <= target])
        if not kept:
            assert "together" in refusal(lambda: frontier(space, drops, table, budgets))  # noqa: B023
            continue
        limited = solutions(space, drops, table, budgets)
        assert [solution.arch for solution in limited] == expected(kept)
        for solution in limited:
            figures = {"ms on thing-cpu": other.predict_ms(solution.arch), "params": params[solution.arch]}
            assert solution.figures == figures
        losses = [solution.loss for solution in best(space, drops, table, budgets, 7)]
        assert losses == pytest.approx(sorted(p[1] for p in kept)[:7], abs=EXACT)


SPACE = SearchSpace(
    "three",
    16,
    10,
    (
        stage_space((8, 16), 2, 1, "mb4d", "identity"),
        stage_space((16, 24), 2, 3, "mb4d", "mb3d", "identity"),
        stage_space((16, 24), 1, 2, "mb4d", "mb3d", "identity"),
    ),
)


@pytest.mark.parametrize("number", [5, None])
def test_drops_of_pairs_are_counted(number: int | None) -> None:
    table, rng = made_up_table(SPACE, 3), random.Random(3)
    drops = made_up_drops(SPACE, 3, like_a_run=False)
    drops = replace(drops, pairs={pair: Drop(rng.gauss(0, 0.5), 0, 0, 0) for pair in pairs_to_measure(drops, number)})
    points = [(table.predict_ms(arch), drops.sum_for(arch), arch) for arch in members(SPACE)]
    assert frontier(SPACE, drops, table) == expected(points)
    assert best(SPACE, drops, table, 1.5)[0].loss == pytest.approx(min(loss for ms, loss, _ in points if ms <= 1.5), abs=EXACT)


def test_pairs_that_are_too_many_to_count_are_left_out_with_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, drops = made_up_table(SPACE, 3), made_up_drops(SPACE, 3, like_a_run=False)
    paired = replace(drops, pairs={pair: Drop(0.1, 0, 0, 0) for pair in pairs_to_measure(drops)})
    assert countable(SPACE, paired, table) == paired and countable(SPACE, drops, table) == drops
    states = 12  # a width and a kind in one slot have 2 x 3
    monkeypatch.setattr("nas.solver.MOST_STATES", states)
    assert countable(SPACE, paired, table) == drops
    assert "the search goes on without pairs (drop_pairs)" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["efficientformer-s", "mixed-tiny", "efficientformerv2-tiny", "efficientvit"])
def test_no_random_network_of_a_whole_space_is_better(name: str) -> None:
    space = SearchSpace.load(name)
    table, drops = made_up_table(space, 5), made_up_drops(space, 5, like_a_run=True)
    found = solutions(space, drops, table)
    assert all(solution.gap == 0 and solution.arch in space for solution in found)
    rng = random.Random(5)
    for arch in (space.smallest, space.largest, *(space.sample(rng) for _ in range(60))):
        ms = table.predict_ms(arch)
        assert min(solution.loss for solution in found if solution.ms <= ms) <= drops.sum_for(arch) + EXACT


# -- Integer programs --------------------------------------------------------------------------------------------------


def instance(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses and costs of a knapsack, and limits that no sum comes near to. Every third has costs in few steps, as slots of
    one stage have; half of the losses grow as costs fall, as those of real blocks do."""
    rng = np.random.default_rng(seed)
    slots, options, budgets = int(rng.integers(3, 11)), int(rng.integers(2, 7)), 1 + seed % 2
    costs = rng.uniform(0.01, 1, (slots, options, budgets))
    if seed % 3 == 0:
        costs = np.ceil(8 * costs) / 8
    loss = rng.uniform(size=(slots, options))
    if seed % 4 < 2:
        loss = 0.3 * loss + 0.7 * (1 - costs.mean(axis=2))
    some = costs[np.arange(slots), rng.integers(0, options, slots)].sum(axis=0)
    return loss, costs, (np.floor(8 * some) / 8 + 0.06 if seed % 3 == 0 else some * 1.01 + OFF)


@pytest.mark.parametrize("part", range(4))
def test_a_knapsack_is_solved_as_milp_solves_it(part: int) -> None:
    for seed in range(part, 160, 4):
        loss, costs, limits = instance(seed)
        truth = milp_choices(loss, costs, limits)
        steps = multiple_choice(loss, costs)
        near = [cheapest(steps, list(limits + off)) for off in (-OFF, OFF)]
        if [len(n) for n in near] == [1, 1] and near[0][0].options != near[1][0].options:
            continue  # milp keeps its constraints less exactly than this
        found, front = cheapest(steps, list(limits)), trade_offs(steps, list(limits))
        assert (truth is None) == (not found) == (not front)
        if truth is not None:
            assert found[0].loss == pytest.approx(truth, abs=EXACT)
            assert front[-1].loss == pytest.approx(truth, abs=EXACT)
            assert found[0].gap == front[-1].gap == 0


def test_networks_are_those_that_milp_finds_and_never_worse_than_greedy() -> None:
    tiny = SearchSpace.load("efficientformer-tiny")
    for seed in range(40):
        space = tiny if seed % 10 == 0 else shrunk(FAMILIES[seed % 5])
        table, drops = made_up_table(space, seed), made_up_drops(space, seed, like_a_run=seed % 2 == 1)
        low, high = table.predict_ms(space.smallest), table.predict_ms(space.largest)
        target = low + (high - low) * random.Random(seed).uniform(0.05, 0.9)
        below, found, above = (best(space, drops, table, target + off)[0] for off in (-OFF, 0, OFF))
        if below.loss != above.loss:
            continue
        arch = milp_network(space, drops, [counted_ms(space, table, target)])
        assert arch is not None
        assert found.loss == pytest.approx(drops.sum_for(arch), abs=EXACT)
        assert found.ms <= target
        greedy = slim(space, drops.importance(), drops.evaluation_for, table, target)
        assert found.loss <= greedy.evaluation.loss + EXACT


# -- Too large, dominance, refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_what_is_given_up_is_in_the_gap(budgets: int) -> None:
    rng = np.random.default_rng(budgets)
    costs = rng.uniform(size=(9, 5, budgets))
    loss = 1 - costs.mean(axis=2) + 0.1 * rng.uniform(size=(9, 5))
    limits = list(costs[np.arange(9), rng.integers(0, 5, 9)].sum(axis=0))
    steps = multiple_choice(loss, costs)
    exact, front = cheapest(steps, limits)[0], trade_offs(steps, limits)
    assert exact.gap == 0 and all(answer.gap == 0 for answer in front)
    assert front[-1].loss == pytest.approx(exact.loss, abs=EXACT)
    gaps = []
    for most in (2, 20):
        (found,) = cheapest(steps, limits, most=most)
        assert 0 <= found.loss - exact.loss <= found.gap + EXACT
        gaps.append(found.gap)
        for answer in trade_offs(steps, limits, most=most):
            truth = min(true.loss for true in front if true.costs[0] <= answer.costs[0] + EXACT)
            assert -EXACT <= answer.loss - truth <= answer.gap + EXACT
            assert all(cost <= limit for cost, limit in zip(answer.costs, limits, strict=True))
    assert gaps[0] > 0


def test_a_frontier_that_is_not_proven_says_so() -> None:
    space = SearchSpace.load("efficientformer-tiny")
    table, drops = made_up_table(space, 1), made_up_drops(space, 1, like_a_run=True)
    with pytest.warns(UserWarning, match="not proven"):
        frontier(space, drops, table, most=3)


@pytest.mark.parametrize("costs", [0, 1, 2, 3])
def test_dominance_keeps_what_nothing_else_is_as_good_as(costs: int) -> None:
    rng = np.random.default_rng(costs)
    for size in (0, 1, 2, 3, 17, 64, 90):
        node, cost, loss = rng.integers(0, 3, size), rng.integers(0, 9, (size, costs)), rng.integers(0, 9, size)
        keep = efficient(node, cost, loss)
        values = np.column_stack([cost, loss])
        rows = [(n, *row) for n, row in zip(node.tolist(), values.tolist(), strict=True)]
        best_rows = {
            a for a in rows if not any(b != a and b[0] == a[0] and all(x <= y for x, y in zip(b, a, strict=True)) for b in rows)
        }
        kept = [row for row, kept in zip(rows, keep, strict=True) if kept]
        assert best_rows <= set(kept)
        if costs < 3:
            assert sorted(kept) == sorted(best_rows)


def test_layers_add_up_to_what_a_network_counts() -> None:
    for name in FAMILIES:
        space = SearchSpace.load(name)
        for arch in (space.smallest, space.largest, space.sample(random.Random(1))):
            layers = [count_layer(layer) for layer in arch.layers()]
            assert tuple(map(sum, zip(*layers, strict=True))) == count(arch)


def test_what_cannot_be_met_or_does_not_add_up_is_refused() -> None:
    table, drops = made_up_table(SPACE, 0), made_up_drops(SPACE, 0, like_a_run=True)
    smallest = table.predict_ms(SPACE.smallest)
    message = refusal(lambda: frontier(SPACE, drops, table, 0.5 * smallest))
    least = float(message.split()[-1])
    assert "below every network" in message and frontier(SPACE, drops, table, least)[-1]
    assert "params" in refusal(lambda: best(SPACE, drops, table, [smallest, Budget.params(10)]))
    assert "positive" in refusal(lambda: frontier(SPACE, drops, table, 0))
    assert "one number" in refusal(lambda: frontier(SPACE, drops, table, [1.0, 2.0]))
    assert "once" in refusal(lambda: frontier(SPACE, drops, table, [Budget.macs(1e9), Budget.macs(1e8)]))
    assert "measure them in it" in refusal(lambda: frontier(replace(SPACE, stages=SPACE.stages[:2]), drops, table))
    (line,) = table.calibrations
    others = tuple(replace(line, space=name, space_sha256=name) for name in ("a", "b"))
    assert "nothing adds up" in refusal(lambda: frontier(SPACE, drops, replace(table, calibrations=others)))
    # Another space's calibration, and one of another size, as predict_ms has it.
    assert frontier(SPACE, drops, replace(table, calibrations=others[:1])) == frontier(SPACE, drops, table)
    assert "not calibrated" in refusal(
        lambda: frontier(SPACE, drops, replace(table, calibrations=(replace(others[0], image_size=99),)))
    )
    rows = {layer: row for layer, row in table.rows.items() if not isinstance(layer.spec, Head)}
    assert "no row for head" in refusal(lambda: frontier(SPACE, drops, replace(table, rows=rows)))


def test_the_calibration_counts_between_stages_by_itself_and_bends() -> None:
    table = made_up_table(SPACE, 0)
    arch = SPACE.largest
    between = sum(table.layer_ms(la) for la in arch.layers() if is_entry(la.spec))
    line = 1.1 * table.sum_ms(arch) - 0.2 * between
    assert table.predict_ms(arch) == pytest.approx(0.05 + line + 0.1 * line**2)


def test_solving_needs_no_torch() -> None:
    code = "import sys, nas; nas.frontier; import nas.knapsack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
