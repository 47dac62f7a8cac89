"""Meet the targets on the devices: measure what was found, repair what misses, give back what is left over. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from nas.progress import say
from nas.slimming import LANDING
from nas.table import Target
from nas.trajectory import Check, NothingFits, Trajectory
from supernet.arch import ArchConfig, Stage

MEASUREMENTS = 6  # of found networks, at most
SLACK = 0.03  # of the target: more is given back, by a larger budget
NEARER = 0.01  # of the budget: where a search that is repeated is to end
AIM = 0.99  # of the target: where the upper end of the measured interval is to lie


@dataclass(frozen=True)
class Goal:
    """A target on a device: what its table says of networks, what the device itself says, and its table's fastest network."""

    target: Target
    predict_ms: Callable[[ArchConfig], float]
    check: Callable[[ArchConfig], Check]
    fastest_ms: float


@dataclass(frozen=True)
class Outcome:
    """The network that was chosen, its check on each goal's device, and how many measured networks it took.

    `met` is None where it could not be measured. `candidate` is a network that might be better and could not be measured.
    """

    trajectory: Trajectory
    checks: tuple[Check, ...]
    measured: int
    met: bool | None
    candidate: Trajectory | None = None

    @property
    def check(self) -> Check:
        """The check on the first goal's device."""
        return self.checks[0]


Search = Callable[[tuple[float, ...], Trajectory | None, float], Trajectory]


@dataclass
class _Budget:
    """What a goal's table may say of the next network, and what it said of those that are known to fit and to miss."""

    goal: Goal
    ms: float = field(init=False)
    fits_ms: float = 0.0
    misses_ms: float = math.inf

    def __post_init__(self) -> None:
        self.ms = self.goal.target.ms

    def learn(self, predicted_ms: float, high_ms: float) -> None:
        if high_ms <= self.goal.target.ms:
            self.fits_ms = max(self.fits_ms, predicted_ms)
        else:
            self.misses_ms = min(self.misses_ms, predicted_ms)

    def correct(self, predicted_ms: float, high_ms: float) -> None:
        """Set the budget to where the device would be a little under the target, if it goes on to disagree as it did."""
        self.ms = AIM * predicted_ms * self.goal.target.ms / high_ms
        if self.ms >= self.misses_ms:  # the measurements contradict each other by some percent
            self.ms = (self.fits_ms + self.misses_ms) / 2 if self.fits_ms else 0.98 * self.misses_ms
        elif self.ms <= self.fits_ms:
            self.ms = (self.fits_ms + self.misses_ms) / 2 if self.misses_ms < math.inf else (1 + NEARER) * self.fits_ms
        if not self.fits_ms and self.goal.fastest_ms < self.misses_ms:
            self.ms = max(self.ms, self.goal.fastest_ms)

    @property
    def exhausted(self) -> bool:
        """Whether no other network can lie between those that fit and those that miss."""
        return self.ms < self.goal.fastest_ms or self.misses_ms - self.fits_ms < 0.002 * self.goal.target.ms


def meet(goals: Sequence[Goal], search: Search, charge: Callable[[Trajectory], float] | None = None) -> Outcome:
    """Search for a network whose measured upper end (of its 95 % interval) is at most the target on every goal's device, and on
    one of them within 3 % of it.

    `search(budgets, start, landing)` is the search under the tables' word, for a budget in milliseconds on each device, from
    another trajectory on where one is given, to an end within the fraction `landing` under a budget. A network that misses
    on a device tightens that budget by as much as the device disagrees; one that leaves more than 3 % everywhere loosens
    them. Ends after six measurements, or where no network lies between. Of the networks that meet the targets the best by
    `charge` (such as the loss; the less the better) is chosen, of equally good ones the slowest; of those that miss, the
    nearest. A device that is not here is not measured: its table's word stands.

    Raises:
        NothingFits: the first search finds nothing within the targets. A later one's is the end of the repairs.
    """
    budgets = [_Budget(goal) for goal in goals]
    best: tuple[bool, float, float] | None = None
    outcome: Outcome | None = None
    trajectory: Trajectory | None = None
    measured: set[tuple[Stage, ...]] = set()
    asked: tuple[float, ...] = ()
    for number in range(1, MEASUREMENTS + 1):
        wanted = tuple(budget.ms for budget in budgets)
        tighter = None
        if trajectory is not None and all(now <= was for now, was in zip(wanted, asked, strict=True)):
            at = [goal.predict_ms(trajectory.arch) for goal in goals]
            tighter = trajectory if any(ms > most for ms, most in zip(at, wanted, strict=True)) else None
        try:
            trajectory = search(wanted, tighter, LANDING if number == 1 else NEARER)
        except NothingFits:
            if outcome is None:
                raise
            break  # nothing leads to the tightened budget
        asked = wanted
        name = trajectory.arch.without_identity().stages
        if name in measured:
            break  # no other network lies between what fits and what misses
        checks = tuple(goal.check(trajectory.arch) for goal in goals)
        known = [(b, b.goal.predict_ms(trajectory.arch), c.high_ms) for b, c in zip(budgets, checks, strict=True) if c.high_ms]
        nearest = max((high / budget.goal.target.ms for budget, _, high in known), default=0.0)
        if len(known) < len(goals) and nearest <= 1:
            if outcome is not None and outcome.met:  # slack is not given back on a table's word alone
                return Outcome(outcome.trajectory, outcome.checks, len(measured), True, candidate=trajectory)
            return Outcome(trajectory, checks, len(measured), None)
        measured.add(name)
        met = nearest <= 1
        rank = (not met, (charge(trajectory) if charge is not None else 0.0) if met else 0.0, -nearest if met else nearest)
        if best is None or rank < best:
            best, outcome = rank, Outcome(trajectory, checks, len(measured), met)
        for budget, predicted, high in known:
            budget.learn(predicted, high)
        if (met and (nearest >= 1 - SLACK or not trajectory.steps)) or number == MEASUREMENTS:
            break
        changed = [(b, predicted, high) for b, predicted, high in known if met or high > b.goal.target.ms]
        for budget, predicted, high in changed:
            budget.correct(predicted, high)
        if any(budget.exhausted for budget, _, _ in changed):
            break
        off = f"{100 * abs(1 - nearest):.1f} % {'under' if met else 'over'} the target"
        say(
            f"measured {_listed(high for _, _, high in known)} ms at the upper end, {off}: searching again with a budget of "
            f"{_listed(budget.ms for budget in budgets)} ms"
        )
    assert outcome is not None
    return Outcome(outcome.trajectory, outcome.checks, len(measured), outcome.met)


def _listed(values: Iterable[float]) -> str:
    return " and ".join(f"{value:.4g}" for value in values)
