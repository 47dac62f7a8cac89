"""A target is met on the device or said to be missed, whatever the table believes."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from nas.guarantee import MEASUREMENTS, Goal, Outcome, meet
from nas.table import Target
from nas.trajectory import Check, Evaluation, NothingFits, Option, Step, Trajectory
from supernet.arch import ArchConfig, Stage
from supernet.errors import InputError

NOTHING = Evaluation(1.0)


def network(ms: float) -> ArchConfig:
    """A network that is told by its width and classes, and by whose name its milliseconds are known."""
    thousands, ones = divmod(round(1e6 * ms), 1000)
    return ArchConfig(f"{ms:.6f}", 32, 1 + ones, (Stage(8 * (1 + thousands), 1, ()),))


@dataclass
class Search:
    """Networks every `step` ms up to `largest`, of which the slowest within the budget is found."""

    step: float = 0.01
    largest: float = 3.0
    asked: int = 0

    def __call__(self, budgets: tuple[float, ...], start: Trajectory | None, landing: float) -> Trajectory:
        (budget_ms,) = budgets
        assert start is None or start.ms > budget_ms, "a trajectory is gone on from towards smaller networks only"
        self.asked += 1
        ms = min(self.largest, self.step * int(budget_ms / self.step + 1e-9))
        arch = network(ms)
        option = Option("shrink", 0, arch, ms, 1.0, NOTHING, 0.0)
        steps = () if ms == self.largest else (Step(self.largest, NOTHING, (option,)),)
        return Trajectory(network(self.largest), steps, arch, ms, NOTHING)


def goal(target: float, check: Callable[[ArchConfig], Check], fastest_ms: float = 0.1) -> Goal:
    """A device whose table says of a network what its name says."""
    return Goal(Target(target), lambda arch: float(arch.name), check, fastest_ms)


def run(target: float, factor: float, noise: float = 0.0, search: Search | None = None, seed: int = 0) -> tuple[Outcome, int]:
    rng = random.Random(seed)
    measured: list[str] = []

    def check(arch: ArchConfig) -> Check:
        measured.append(arch.name)
        ms = float(arch.name) * factor * (1 + noise * (rng.random() - 0.5))
        return Check(ms, 0.99 * ms, 1.01 * ms)

    return meet([goal(target, check)], search or Search()), len(measured)


@pytest.mark.parametrize("factor", [0.7, 0.9, 0.97, 1.0, 1.03, 1.1, 1.4])
@pytest.mark.parametrize("target", [0.5, 1.0, 2.0])
def test_a_table_that_is_off_by_a_factor_costs_one_more_measurement_and_no_target(factor: float, target: float) -> None:
    outcome, measured = run(target, factor)
    assert outcome.met
    assert outcome.check.high_ms is not None
    assert 0.97 * target <= outcome.check.high_ms <= target
    assert measured <= 3
    assert outcome.measured == measured


def test_noise_of_the_device_is_met_too() -> None:
    for seed in range(40):
        outcome, measured = run(1.0, 1.05, noise=0.06, seed=seed)
        assert outcome.met
        assert outcome.check.high_ms is not None
        assert outcome.check.high_ms <= 1.0
        assert measured <= MEASUREMENTS


def test_what_is_over_three_percent_is_given_back() -> None:
    outcome, measured = run(1.0, 0.8)
    assert measured == 2
    assert float(outcome.trajectory.arch.name) > 1.0, "slower by the table than the target, but not on the device"


def test_a_largest_network_that_fits_is_the_end() -> None:
    outcome, measured = run(50.0, 1.0)
    assert (outcome.met, measured) == (True, 1)
    assert not outcome.trajectory.steps


def test_where_no_network_lies_between_the_fitting_one_stands() -> None:
    outcome, measured = run(1.0, 1.0, search=Search(step=0.3))
    assert outcome.met
    assert float(outcome.trajectory.arch.name) == pytest.approx(0.9)
    assert measured <= MEASUREMENTS


def test_a_target_that_the_device_cannot_meet_is_said_to_be_missed_with_the_fastest_network_tried() -> None:
    outcome, measured = run(0.2, 4.0)
    assert not outcome.met
    assert measured <= MEASUREMENTS
    assert outcome.check.ms is not None
    assert outcome.check.ms > 0.2


def test_a_device_that_is_elsewhere_is_asked_once() -> None:
    asked: list[str] = []

    def check(arch: ArchConfig) -> Check:
        asked.append(arch.name)
        return Check()

    outcome = meet([goal(1.0, check)], Search())
    assert len(asked) == 1
    assert outcome.met is None, "nobody knows"
    assert outcome.check.ms is None
    assert outcome.measured == 0


def test_a_verified_network_stands_until_a_looser_one_is_measured_too() -> None:
    """Elsewhere, the first network was measured and leaves ten percent; the second one is unknown."""
    first: list[str] = []

    def check(arch: ArchConfig) -> Check:
        first.append(arch.name)
        return Check(0.88, 0.87, 0.9) if arch.name == first[0] else Check()

    outcome = meet([goal(1.0, check)], Search())
    assert outcome.met
    assert outcome.check.high_ms == 0.9
    assert outcome.candidate is not None
    assert float(outcome.candidate.arch.name) > float(outcome.trajectory.arch.name)


def test_a_tightened_budget_that_no_action_reaches_ends_the_search_with_what_was_found() -> None:
    search = Search()

    def stuck(budgets: tuple[float, ...], start: Trajectory | None, landing: float) -> Trajectory:
        if budgets[0] < 0.99:
            raise NothingFits("no action saves anything")
        return search(budgets, start, landing)

    outcome = meet([goal(1.0, lambda arch: Check(1.2, 1.19, 1.21))], stuck)
    assert outcome.met is False
    assert outcome.measured == 1


def test_what_is_wrong_in_a_repeated_search_is_told_and_is_no_missed_target() -> None:
    search = Search()

    def damaged(budgets: tuple[float, ...], start: Trajectory | None, landing: float) -> Trajectory:
        if search.asked:
            raise InputError("the file of evaluations is damaged")
        return search(budgets, start, landing)

    with pytest.raises(InputError, match="is damaged"):
        meet([goal(1.0, lambda arch: Check(1.2, 1.19, 1.21))], damaged)


def test_the_smallest_network_is_tried_before_giving_up() -> None:
    outcome, _ = run(0.5, 1.1, search=Search(step=0.001))
    assert outcome.met
    tried: list[float] = []

    def check(arch: ArchConfig) -> Check:
        tried.append(float(arch.name))
        ms = float(arch.name) * (1.0 if len(tried) > 1 else 1.2)
        return Check(ms, ms, ms)

    outcome = meet([goal(0.5, check, fastest_ms=0.45)], Search(step=0.001))
    assert tried[1] == pytest.approx(0.45), "0.415 was asked for"
    assert outcome.met


def test_of_networks_that_fit_the_best_is_chosen_and_not_the_slowest() -> None:
    """The device is quicker than its table says, so a slower network is tried; it is a worse one."""

    def check(arch: ArchConfig) -> Check:
        ms = 0.8 * float(arch.name)
        return Check(ms, ms, ms)

    outcome = meet([goal(1.0, check)], Search(), charge=lambda found: found.ms)
    assert outcome.measured == 2
    assert float(outcome.trajectory.arch.name) == 1.0
    assert outcome.met


@dataclass
class OfTwo:
    """Networks of two numbers, their milliseconds by either table, of which those with the largest sum are best."""

    networks: list[tuple[float, float]]

    def __call__(self, budgets: tuple[float, ...], start: Trajectory | None, landing: float) -> Trajectory:
        fitting = [n for n in self.networks if all(ms <= most for ms, most in zip(n, budgets, strict=True))]
        if not fitting:
            raise NothingFits("nothing fits")
        a, b = max(fitting, key=sum)
        arch = ArchConfig(f"{a} {b}", 32, 10, (Stage(round(1e3 * a) * 8, 1, ()), Stage(round(1e3 * b) * 8, 1, ())))
        option = Option("shrink", 0, arch, a, 1.0, NOTHING, 0.0)
        return Trajectory(arch, (Step(9.0, NOTHING, (option,)),), arch, a, Evaluation(-a - b))


def of_device(at: int, factor: float, target: float, here: bool = True) -> Goal:
    def predict(arch: ArchConfig) -> float:
        return float(arch.name.split()[at])

    def check(arch: ArchConfig) -> Check:
        ms = factor * predict(arch)
        return Check(ms, 0.99 * ms, 1.01 * ms) if here else Check()

    return Goal(Target(target), predict, check, 0.05)


@pytest.mark.parametrize("seed", range(30))
def test_two_targets_are_met_on_both_devices_however_far_their_tables_are_off(seed: int) -> None:
    rng = random.Random(seed)
    networks = [(a, a * rng.uniform(0.5, 2)) for a in (rng.uniform(0.1, 2) for _ in range(3000))]
    goals = [of_device(at, rng.uniform(0.85, 1.2), rng.uniform(0.5, 1.5)) for at in (0, 1)]
    outcome = meet(goals, OfTwo(networks), charge=lambda found: found.evaluation.loss)
    assert outcome.met
    highs = [check.high_ms for check in outcome.checks]
    shares = [high / goal.target.ms for high, goal in zip(highs, goals, strict=True) if high is not None]
    assert len(shares) == 2
    assert max(shares) <= 1
    assert max(shares) >= 0.9, "not by a network that is far too small"


def test_of_two_devices_the_one_that_is_not_here_keeps_its_tables_word() -> None:
    networks = [(a / 100, b / 100) for a in range(10, 200) for b in range(10, 200, 7)]
    goals = [of_device(0, 1.2, 1.0), of_device(1, 1.0, 0.8, here=False)]
    outcome = meet(goals, OfTwo(networks))
    assert outcome.met is None, "one of them is not known"
    assert outcome.checks[0].high_ms is not None
    assert outcome.checks[0].high_ms <= 1.0
    assert outcome.checks[1].high_ms is None
    assert goals[1].predict_ms(outcome.trajectory.arch) <= 0.8
