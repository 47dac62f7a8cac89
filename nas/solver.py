"""The exact frontier: of all networks of a space, the best that the drops admit for every latency, under budgets. No torch.

What is predicted for a network must be a sum over its choices: its loss (`nas.scores.Drops`), its milliseconds on each table,
its parameters and MACs. Then a network is a path from the image to the logits: stage by stage a width, then slot by slot a
candidate. What a choice adds depends on the stage's width, on the width before it for an embedding, and on whether tokens
have begun (then `Flat` has been paid, `Unflat` or a head on tokens is to come, and no block on maps may follow). That is the
state; with pairs of changes among the drops, so are the kinds in slots whose pairs are not complete. `nas.knapsack` finds the
paths.

*What is exact* is the answer to the drops. How well they stand for a network's loss, `nas.scores.additivity` says. Each image
has a pass of its own: a space's `mux` is not among the choices.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nas.knapsack import MOST, Answer, Step, cheapest, trade_offs
from nas.scores import Change, Drops
from nas.slimming import rounded_up
from nas.table import Calibration, LatencyTable
from nas.trajectory import NothingFits
from supernet.arch import ArchConfig, layer_name
from supernet.errors import InputError
from supernet.space import SearchSpace
from supernet.specs import Layer

MOST_STATES = 20_000  # of a slot


class TooManyPairs(InputError):
    """Drops with more pairs, or pairs of more slots, than the solver can count."""


@dataclass(frozen=True)
class Budget:
    """An upper bound on what adds up over a network's layers: made by `milliseconds`, `params` or `macs`."""

    name: str
    at_most: float
    table: LatencyTable | None = None

    def __post_init__(self) -> None:
        if isinstance(self.at_most, bool) or not isinstance(self.at_most, int | float) or not self.at_most > 0:
            raise InputError(f"a budget must be a positive number of {self.name}, but is {self.at_most!r}")

    @classmethod
    def milliseconds(cls, table: LatencyTable, at_most: float) -> Budget:
        """At most so many milliseconds a call on the table's device."""
        return cls(f"ms on {table.device}", at_most, table)

    @classmethod
    def params(cls, at_most: float) -> Budget:
        """At most so many parameters."""
        return cls("params", at_most)

    @classmethod
    def macs(cls, at_most: float) -> Budget:
        """At most so many multiply-accumulates of an image."""
        return cls("macs", at_most)


Budgets = float | Sequence[float | Budget | None] | None


@dataclass(frozen=True)
class Solution:
    """A network, its predicted loss (nats) and milliseconds, and the figure of each further budget by its name.

    `gap`: by how much, at most, the loss of a network as fast (in `best`: of one that is not listed) can be lower. 0: none is.
    """

    arch: ArchConfig
    loss: float
    ms: float
    figures: Mapping[str, float] = field(default_factory=dict)
    gap: float = 0.0


def frontier(
    space: SearchSpace, drops: Drops, table: LatencyTable, budgets: Budgets = None, *, most: int = MOST
) -> list[ArchConfig]:
    """Return the networks that are the best for some latency, by ascending milliseconds: each has a lower predicted loss than
    every network that is as fast. The last is the answer for the budget; the last of at most T milliseconds that for T.

    `table.predict_ms` and `drops.sum_for` say what is predicted of each; `solutions` returns that too. Arguments and errors
    are its.

    Warns:
        UserWarning: the instance was too large for `most`; `solutions` has the gaps.
    """
    found = solutions(space, drops, table, budgets, most=most)
    gap = max(solution.gap for solution in found)
    if gap > 0:
        warnings.warn(
            f"the frontier of {space.name} is not proven: a network as fast may be better by up to {gap:.3g} nats", stacklevel=2
        )
    return [solution.arch for solution in found]


def solutions(
    space: SearchSpace, drops: Drops, table: LatencyTable, budgets: Budgets = None, *, most: int = MOST
) -> list[Solution]:
    """Return the frontier with what is predicted of each network.

    Args:
        drops: of this space, at any image size.
        table: whose milliseconds the frontier is over; by its calibration for the space.
        budgets: milliseconds on `table`, or a sequence of those (or None for any) and of `Budget`s, which every network of
            the frontier keeps. None: the whole frontier.
        most: partial networks of a slot that are kept at once. With more the answer may be none, and has a gap.

    Raises:
        NothingFits: no network keeps the budgets.
        InputError: a figure is no sum over layers; or a table has no row for a layer.
    """
    problem = _Problem(space, drops, table, budgets)
    answers = trade_offs(problem.steps, problem.limits, most)
    found = [solution for answer in answers if (solution := problem.solution(answer)) is not None]
    if len(found) < len(answers):
        # What is over a budget by the last digit of a sum of floats may have hidden what keeps it.
        tighter = [figure.limit(figure.at_most * (1 - 1e-12)) for figure in problem.figures]
        again = map(problem.solution, trade_offs(problem.steps, tighter, most))
        found += [*problem.best(1, most), *(solution for solution in again if solution is not None)]
    if not found:
        raise problem.nothing()
    kept: list[Solution] = []
    for solution in sorted(found, key=lambda each: (each.ms, each.loss)):
        if not kept or solution.loss < kept[-1].loss:
            kept.append(solution)
    return kept


def best(
    space: SearchSpace, drops: Drops, table: LatencyTable, budgets: Budgets, count: int = 1, *, most: int = MOST
) -> list[Solution]:
    """Return the `count` networks with the least predicted loss that keep the budgets, the best first; all there are, where
    there are fewer. Arguments and errors are those of `solutions`."""
    problem = _Problem(space, drops, table, budgets)
    found = problem.best(count, most)
    if not found:
        raise problem.nothing()
    return found


# -- What adds up ----------------------------------------------------------------------------------------------------------


class _Figure(NamedTuple):
    """What a budget counts: the sum of `of` each layer, which `limit` says the most of for a most of the figure. `total`: the
    figure itself, as it is predicted; it grows with the sum."""

    name: str
    at_most: float
    limit: Callable[[float], float]
    of: Callable[[Layer], float]
    total: Callable[[ArchConfig], float]


def _milliseconds(space: SearchSpace, table: LatencyTable, name: str, at_most: float) -> _Figure:
    own = table.for_space(space)
    matching = [c for c in own.calibrations if (c.image_size, c.strides) == (space.image_size, space.strides)]
    if own.calibrations and not matching:
        own.predict_ms(space.smallest)  # refuses it in its own words
    if len(matching) > 1:
        names = ", ".join(c.space for c in matching)
        raise InputError(
            f"the table of {table.device} has {len(matching)} calibrations for networks of {space.name} ({names}), but not one "
            f"of its own, and over several nothing adds up: measure it with {table.building('--space SPACE')}"
        )
    line: Calibration | None = matching[0] if matching else None

    def of(layer: Layer) -> float:
        ms = own.layer_ms(layer)
        return ms if line is None else ms * line.slope_of(layer)

    return _Figure(name, at_most, line.line_of if line is not None else _itself, of, own.predict_ms)


def check_additive(space: SearchSpace, table: LatencyTable) -> None:
    """Refuse a table by which the milliseconds of the space's networks are no sum over their layers."""
    _milliseconds(space, table, "ms", math.inf)


def _itself(at_most: float) -> float:
    return at_most


def _counted(name: str, at_most: float) -> _Figure:
    from supernet.model import count, count_layer  # these build the layers, with torch

    def of(layer: Layer) -> float:
        return float(getattr(count_layer(layer), name))

    return _Figure(name, at_most, _itself, of, lambda arch: getattr(count(arch), name))


def _figures(space: SearchSpace, table: LatencyTable, budgets: Budgets) -> list[_Figure]:
    """Return the table's milliseconds, then each further budget."""
    given = list(budgets) if isinstance(budgets, Sequence) else [budgets]
    targets = [each for each in given if not isinstance(each, Budget)]
    if len(targets) > 1:
        raise InputError(f"budgets have one number, the milliseconds on {table.device}, but {targets} were given: use Budget")
    at_most = targets[0] if targets and targets[0] is not None else math.inf
    found = [_milliseconds(space, table, "ms", Budget("ms", at_most).at_most)]
    for budget in given:
        if isinstance(budget, Budget):
            if budget.table is not None:
                found.append(_milliseconds(space, budget.table, budget.name, budget.at_most))
            else:
                found.append(_counted(budget.name, budget.at_most))
    names = [figure.name for figure in found]
    if len(set(names)) < len(names):
        raise InputError(f"each budget stands once, but {', '.join(names)} were given: give one of each")
    return found


# -- Networks as paths -------------------------------------------------------------------------------------------------------


class _Taken(NamedTuple):
    """An option of a step: a stage's width, or the kind in a slot; None for the head."""

    stage: int
    choice: int | str | None


_State = tuple[int, bool, tuple[str | None, ...]]  # width, tokens begun, kinds in the slots whose pairs are not complete
_Arc = tuple[_State, float, tuple[float, ...], _Taken]  # where an option leads to, its loss and costs, and what it is


class _Problem:
    """A space's networks as the steps of a knapsack, and back."""

    def __init__(self, space: SearchSpace, drops: Drops, table: LatencyTable, budgets: Budgets) -> None:
        if drops.space.stages != space.stages:
            raise InputError(f"these drops are of the space {drops.space.name}, not of {space.name}: measure them in it")
        self.space, self.drops = space, drops
        self.figures = _figures(space, table, budgets)
        self._rows: dict[Layer, tuple[float, ...]] = {}
        base = space.stages, drops.space.fit(drops.base).stages
        self.base_widths = [stage.width for stage in base[1]]
        self.base_kinds = [[c.kind_of(b) for b in s.blocks] for c, s in zip(*base, strict=True)]
        self.taken: list[list[list[_Taken]]] = []  # of each step, for each node, its options
        self.steps = self._steps()
        self.limits = [figure.limit(figure.at_most) for figure in self.figures]

    def nothing(self) -> NothingFits:
        """What to say where no network keeps the budgets."""
        asked = [f"{f.at_most:.12g} {f.name}" for f in self.figures if f.at_most < math.inf]
        for figure, least in zip(self.figures, self.least(), strict=True):
            if least > figure.at_most:
                return NothingFits(
                    f"at most {figure.at_most:.12g} {figure.name} is below every network of {self.space.name}: give at least "
                    f"{rounded_up(least)}"
                )
        return NothingFits(f"no network of {self.space.name} keeps {' and '.join(asked)} together: give more of one of them")

    def least(self) -> list[float]:
        """Return the least of each figure that a network of the space can have."""
        found = []
        for at, figure in enumerate(self.figures):
            steps = [Step(s.to, s.costs[..., at], s.costs[..., :0], s.allowed) for s in self.steps]
            (answer,) = cheapest(steps, [])
            found.append(figure.total(self._network(answer.options)[0]))
        return found

    def best(self, count: int, most: int) -> list[Solution]:
        more = 0
        while True:
            answers = cheapest(self.steps, self.limits, count + more, most)
            found = [solution for answer in answers if (solution := self.solution(answer)) is not None]
            if len(found) >= count or len(answers) < count + more:
                return sorted(found, key=lambda each: (each.loss, each.ms))[:count]
            more = 2 * more + count  # some are over a budget by the last digit of a sum of floats

    def solution(self, answer: Answer) -> Solution | None:
        """Return what the project predicts of the network; None where that is over a budget."""
        arch, loss = self._network(answer.options)
        ms, *others = (figure.total(arch) for figure in self.figures)
        if any(value > figure.at_most for value, figure in zip((ms, *others), self.figures, strict=True)):
            return None
        names = (figure.name for figure in self.figures[1:])
        return Solution(arch, loss, ms, dict(zip(names, others, strict=True)), answer.gap)

    def _network(self, options: Sequence[int]) -> tuple[ArchConfig, float]:
        """Return a network and its predicted loss."""
        widths: list[int] = []
        kinds: list[list[str]] = [[] for _ in self.space.stages]
        node = 0
        for step, taken, option in zip(self.steps, self.taken, options, strict=True):
            stage, choice = taken[node][option]
            if isinstance(choice, int):
                widths.append(choice)
            elif choice is not None:
                kinds[stage].append(choice)
            node = int(step.to[node, option])
        arch = self.space.arch(widths, kinds)
        if self.drops.pairs:
            return arch, self.drops.sum_for(arch)
        # The same sum, without looking for what is otherwise than in the base: a frontier may have thousands of networks.
        terms = [self._drop(i, None, width) for i, width in enumerate(widths)]
        terms += [self._drop(i, j, kind) for i, stage in enumerate(kinds) for j, kind in enumerate(stage)]
        return arch, self.drops.evaluation.loss + math.fsum(terms)

    def _costs(self, *layers: Layer | None) -> tuple[float, ...]:
        """Return the sum of each figure over some layers."""
        found = [0.0] * len(self.figures)
        for layer in layers:
            if layer is not None:
                if layer not in self._rows:
                    self._rows[layer] = tuple(figure.of(layer) for figure in self.figures)
                found = [a + b for a, b in zip(found, self._rows[layer], strict=True)]
        return tuple(found)

    def _layers(self, stage: int, width_before: int | None, width: int, kind: str) -> dict[str, Layer]:
        """Return the layers, by name, of a network that has this kind in the stage's first slot and no other block."""
        widths = [s.widths[0] for s in self.space.stages]
        widths[stage] = width
        if width_before is not None:
            widths[stage - 1] = width_before
        kinds = [["identity"] * s.depth for s in self.space.stages]
        kinds[stage][0] = kind
        return dict(self.space.arch(widths, kinds).named_layers())

    def _drop(self, stage: int, slot: int | None, option: str | int) -> float:
        now = self.base_widths[stage] if slot is None else self.base_kinds[stage][slot]
        return 0.0 if option == now else self.drops.singles[Change(stage, slot, option)].drop_loss

    def _steps(self) -> list[Step]:
        steps: list[Step] = []
        states: list[_State] = [(0, False, ())]
        for i, stage in enumerate(self.space.stages):
            entries = self._entries(i, states)
            states = self._add(steps, entries)
            pairs = _Pairs(self.drops, i)
            alone = {w: {kind: self._layers(i, None, w, kind) for kind in stage.kinds} for w in stage.widths}
            for j in range(stage.depth):
                states = self._add(steps, self._slot(i, j, states, alone, pairs))
        last = len(self.space.stages) - 1
        heads: list[list[_Arc]] = []
        for width, begun, _ in states:
            tokens = next((c for c in self.space.stages[last].kinds if self._is_token(last, c)), None) if begun else None
            layers = self._layers(last, None, width, tokens or "identity")
            heads.append([((0, False, ()), self.drops.evaluation.loss, self._costs(layers["head"]), _Taken(last, None))])
        self._add(steps, heads)
        return steps

    def _is_token(self, stage: int, kind: str) -> bool:
        choices = self.space.stages[stage]
        return kind != "identity" and choices.candidates[choices.kinds.index(kind)].tokens

    def _entries(self, i: int, states: Sequence[_State]) -> list[list[_Arc]]:
        """Return the ways into a stage: each of its widths, from each state of the stage before."""
        found = []
        for before, begun, _ in states:
            tokens = next((kind for kind in self.space.stages[i - 1].kinds if i and self._is_token(i - 1, kind)), None)
            arcs: list[_Arc] = []
            for width in self.space.stages[i].widths:
                layers = self._layers(i, before if i else None, width, "identity")
                unflat = None
                if begun and i:
                    assert tokens is not None
                    unflat = self._layers(i - 1, None, before, tokens).get(layer_name(i - 1, "unflat"))
                entry = layers[layer_name(i, "embedding")]
                costs = self._costs(entry, unflat)
                arcs.append(((width, False, ()), self._drop(i, None, width), costs, _Taken(i, width)))
            found.append(arcs)
        return found

    def _slot(
        self, i: int, j: int, states: Sequence[_State], alone: Mapping[int, Mapping[str, dict[str, Layer]]], pairs: _Pairs
    ) -> list[list[_Arc]]:
        found = []
        for width, begun, kept in states:
            arcs: list[_Arc] = []
            for kind in self.space.stages[i].kinds:
                is_token = self._is_token(i, kind)
                if begun and not is_token and kind != "identity":
                    continue  # blocks on tokens are the last of their stage
                layers = alone[width][kind]
                flat = layers.get(layer_name(i, "flat")) if is_token and not begun else None
                costs = self._costs(layers.get(layer_name(i, "block", 0)), flat)
                loss = self._drop(i, j, kind)
                for slot, other in enumerate(kept):
                    loss += pairs.slots.get((slot, other, j, kind), 0.0)
                loss += pairs.widths.get((width, j, kind), 0.0)
                after = (width, begun or is_token, pairs.kept(kept, j, kind))
                arcs.append((after, loss, costs, _Taken(i, kind)))
            found.append(arcs)
        return found

    def _add(self, steps: list[Step], arcs: list[list[_Arc]]) -> list[_State]:
        """Append a step with these options of each node; return the states that it leads to."""
        states = {state: number for number, state in enumerate(dict.fromkeys(arc[0] for node in arcs for arc in node))}
        if len(states) > MOST_STATES:
            raise TooManyPairs(
                f"the {len(self.drops.pairs)} pairs of these drops tie so many slots to each other that a stage has over "
                f"{MOST_STATES} states: measure fewer pairs, or give the drops without any (pairs={{}})"
            )
        shape = len(arcs), max(map(len, arcs))
        to, allowed = np.zeros(shape, np.int64), np.zeros(shape, bool)
        loss, costs = np.zeros(shape), np.zeros((*shape, len(self.figures)))
        for n, node in enumerate(arcs):
            for k, (state, drop, cost, _) in enumerate(node):
                to[n, k], loss[n, k], costs[n, k], allowed[n, k] = states[state], drop, cost, True
        steps.append(Step(to, loss, costs, allowed))
        self.taken.append([[arc[3] for arc in node] for node in arcs])
        return list(states)


class _Pairs:
    """The drops of pairs inside a stage: of two slots' kinds, and of a width and a slot's kind."""

    def __init__(self, drops: Drops, stage: int) -> None:
        self.slots: dict[tuple[int, str | None, int, str], float] = {}
        self.widths: dict[tuple[int, int, str], float] = {}
        self.last: dict[tuple[int, str], int] = {}  # the last slot that a kind in a slot has a pair with
        for a, b, drop in _ordered(drops, stage):
            if a.slot is None:
                assert b.slot is not None
                self.widths[int(a.option), b.slot, str(b.option)] = drop
            else:
                assert b.slot is not None
                self.slots[a.slot, str(a.option), b.slot, str(b.option)] = drop
                key = a.slot, str(a.option)
                self.last[key] = max(b.slot, self.last.get(key, 0))

    def kept(self, before: tuple[str | None, ...], slot: int, kind: str) -> tuple[str | None, ...]:
        """Return the kinds in the slots so far, None where no pair with a later slot is to come."""
        kinds = (*before, kind)
        kept = (k if k is not None and self.last.get((at, k), -1) > slot else None for at, k in enumerate(kinds))
        return tuple(kept) if self.slots else ()


def _ordered(drops: Drops, stage: int) -> Iterator[tuple[Change, Change, float]]:
    """Yield a stage's pairs and their drops, a width before a slot, an earlier slot before a later one."""
    for pair, drop in drops.pairs.items():
        a, b = sorted(pair, key=lambda change: -1 if change.slot is None else change.slot)
        if a.stage == stage:
            yield a, b, drop.drop_loss
