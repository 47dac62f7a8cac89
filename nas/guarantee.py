"""Meet a target on the device: measure what was found, repair what misses, give back what is left over. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nas.progress import say
from nas.slimming import LANDING, Trajectory
from nas.table import Target
from supernet.arch import ArchConfig, Stage
from supernet.errors import InputError

MEASUREMENTS = 6  # of found networks, at most
SLACK = 0.03  # of the target: more is given back, by a larger budget
NEARER = 0.01  # of the budget: where a search that is repeated is to end
AIM = 0.99  # of the target: where the upper end of the measured interval is to lie


@dataclass(frozen=True)
class Check:
    """How long a network took on the device itself, with its 95 % interval; None where it could not be measured."""

    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None


@dataclass(frozen=True)
class Outcome:
    """The network that was chosen, its check, and how many measured networks it took.

    `met` is None where it could not be measured. `candidate` is a network that might be better and could not be measured.
    """

    trajectory: Trajectory
    check: Check
    measured: int
    met: bool | None
    candidate: Trajectory | None = None


def meet(
    target: Target,
    slim_to: Callable[[float, Trajectory | None, float], Trajectory],
    check: Callable[[ArchConfig], Check],
    smallest_ms: float,
) -> Outcome:
    """Search for a network whose measured upper end (of its 95 % interval) is at most the target, and within 3 % of it.

    `slim_to(budget_ms, start, landing)` is the search under the table's word, from another trajectory on where one is given,
    to an end within the fraction `landing` under the budget. A network that misses tightens the budget by as much as the
    device disagrees; one that leaves more than 3 % loosens it. Ends after six measurements, or where no network lies between;
    of the networks that meet the target the slowest is chosen, of those that miss the fastest. A device that is not here is
    asked once, and the table's word stands.
    """
    budget_ms = target.ms
    fits_ms, misses_ms = 0.0, float("inf")  # the table's milliseconds of networks that are known to fit, and to miss
    best: Outcome | None = None
    trajectory: Trajectory | None = None
    measured: set[tuple[Stage, ...]] = set()
    for number in range(1, MEASUREMENTS + 1):
        tighter = trajectory if trajectory is not None and budget_ms < trajectory.ms else None
        try:
            trajectory = slim_to(budget_ms, tighter, LANDING if number == 1 else NEARER)
        except InputError:
            if best is None:
                raise
            break  # no action leads to the tightened budget
        name = trajectory.arch.without_identity().stages
        if name in measured:
            break  # no other network lies between what fits and what misses
        found = check(trajectory.arch)
        if found.high_ms is None:
            if best is not None and best.met:  # slack is not given back on the table's word alone
                return Outcome(best.trajectory, best.check, len(measured), True, candidate=trajectory)
            return Outcome(trajectory, found, len(measured), None)
        measured.add(name)
        met = found.high_ms <= target.ms
        here = Outcome(trajectory, found, len(measured), met)
        if best is None or _better(here, best):
            best = here
        if met:
            fits_ms = max(fits_ms, trajectory.ms)
            if found.high_ms >= (1 - SLACK) * target.ms or not trajectory.steps:
                break
        else:
            misses_ms = min(misses_ms, trajectory.ms)
        budget_ms = AIM * trajectory.ms * target.ms / found.high_ms
        if budget_ms >= misses_ms or budget_ms <= fits_ms:  # the measurements contradict each other by some percent
            budget_ms = (fits_ms + misses_ms) / 2 if fits_ms else 0.98 * misses_ms
        if not fits_ms and smallest_ms < misses_ms:
            budget_ms = max(budget_ms, smallest_ms)
        if budget_ms < smallest_ms or misses_ms - fits_ms < 0.002 * target.ms or number == MEASUREMENTS:
            break
        off = f"{100 * abs(1 - found.high_ms / target.ms):.1f} % {'under' if met else 'over'} the target"
        say(
            f"measured {found.ms:.4g} ms, up to {found.high_ms:.4g} ms, {off}: searching again with a budget of "
            f"{budget_ms:.4g} ms"
        )
    assert best is not None
    return Outcome(best.trajectory, best.check, len(measured), best.met)


def _better(one: Outcome, other: Outcome) -> bool:
    assert one.check.high_ms is not None and other.check.high_ms is not None
    if one.met != other.met:
        return bool(one.met)
    return (one.check.high_ms > other.check.high_ms) == one.met
