"""The cheapest choices under budgets: a multiple-choice knapsack in steps, solved exactly. No torch.

A problem is a list of steps. At each of them one option is taken, which has a loss, costs, and a node that it leads to; the
options of the next step are those of that node. The choice of all steps has the sum of the losses and the sums of the costs.
With one node everywhere this is the multiple-choice knapsack problem; in general, the shortest path problem with resource
constraints.

*Method.* Dynamic programming over partial choices (labels), node by node. Of two labels at a node, one that is worse in
nothing makes the other needless. A label is needless too if a lower bound says that none of its completions can win: the
Lagrangian relaxation, which with good multipliers is the bound of linear programming. Its value for the rest of the steps is
computed once, from the end, for every node and multiplier. What it is compared with, the incumbents, are labels completed by
the relaxation's own choices. Pisinger's algorithm for the multiple-choice knapsack problem prunes by such bounds (European
Journal of Operational Research 83, 1995); labels and dominance are as in Irnich and Desaulniers, "Shortest path problems with
resource constraints" (2005).

*Exactness.* Losses and costs are rounded to whole numbers of about 1e-14 of their largest sum, so that equal sums are equal. In
these units nothing is rounded any more but the bounds, which have room for it. Where there are more labels than `most`, the
least promising are given up, and the bounds of these say how much better than what was found anything can be: the gap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nas.dominance import Ints, efficient
from supernet.errors import InputError

Floats = NDArray[np.float64]

DIGITS = 14  # of the largest sum of a column, in whole units
MOST = 100_000  # labels of a step ...
NARROW = (2_000,)  # ... in the last search; in the ones before
HULL = 64  # multipliers of a frontier with one budget ...
GRID = 64  # ... and of one with several
COARSE = 8  # windows in a wide one
_CHUNK = 1 << 16  # labels whose bounds are computed at once


@dataclass(frozen=True)
class Step:
    """What can be taken at each of n nodes: k options at most, with d costs.

    `to` (n, k): the node that an option leads to. `loss` (n, k), `costs` (n, k, d). `allowed` (n, k): whether there is such an
    option. The first step has one node, and the last leads to node 0 alone.
    """

    to: NDArray[np.int64]
    loss: Floats
    costs: Floats
    allowed: NDArray[np.bool_]


class Answer(NamedTuple):
    """The option taken at each step, its loss and costs, and the gap: by how much, at most, anything that costs no more
    (for `cheapest`: anything that is not among the answers) can have a lower loss. 0 is proven."""

    options: tuple[int, ...]
    loss: float
    costs: tuple[float, ...]
    gap: float


def multiple_choice(loss: Floats, costs: Floats) -> list[Step]:
    """Return the steps of a plain multiple-choice knapsack: `loss` (slots, options), `costs` (slots, options, budgets)."""
    one = np.ones((1, loss.shape[1]), bool)
    none = np.zeros((1, loss.shape[1]), np.int64)
    return [Step(none, of[None], cost[None], one) for of, cost in zip(loss, costs, strict=True)]


def trade_offs(steps: Sequence[Step], limits: Sequence[float], most: int = MOST) -> list[Answer]:
    """Return all choices within the limits that are not dominated in (first cost, loss), by ascending cost; of choices equal in
    both, one. Every limit may be infinite. The last answer has the least loss of all.

    With a first limit this is the answer for every smaller one too; the others are limits that each choice keeps. Empty where
    no choice keeps them.

    Raises:
        InputError: nothing was found, but `most` was too few to say that there is nothing.
    """
    return _Search(steps, limits, axis=True, count=1, most=most).answers()


def cheapest(steps: Sequence[Step], limits: Sequence[float], count: int = 1, most: int = MOST) -> list[Answer]:
    """Return the `count` choices with the least loss within the limits, the best first; fewer where there are no more.

    Raises:
        InputError: nothing was found, but `most` was too few to say that there is nothing.
    """
    return _Search(steps, limits, axis=False, count=count, most=most).answers()


class _Labels(NamedTuple):
    """Partial choices: node, sums of loss and costs, the label of the step before and the option taken after it; which
    window of multipliers is the most promising for it."""

    node: Ints
    loss: Ints
    costs: Ints
    parent: Ints
    option: Ints
    window: Ints

    def of(self, index: Ints | NDArray[np.bool_]) -> _Labels:
        return _Labels(*(field[index] for field in self))


class _Suffix(NamedTuple):
    """The relaxation's best completion from each node, for each multiplier: its value, the option that begins it, and its loss
    and costs."""

    value: Floats  # (nodes, multipliers)
    option: Ints
    total: Ints  # (nodes, multipliers, 1 + costs)


class _Search:
    """One problem in whole units, its multipliers, and the incumbents so far.

    With `axis`, the first cost is no budget alone but the axis of a frontier: the range of its values is divided into windows,
    each with the multiplier that bounds best there. Without, there is one window, the budgets, with several multipliers.
    """

    def __init__(self, steps: Sequence[Step], limits: Sequence[float], *, axis: bool, count: int, most: int) -> None:
        self.axis, self.count, self.most = axis, count, most
        self._round(steps, limits)
        everything = self._suffixes(np.eye(1 + len(self.limits)))
        self.feasible = bool((everything[0].value[0, 1:] <= self.limits).all())
        if not self.feasible:
            return
        # Budgets against each other: shares of the limits, which together are 1 at most.
        shares = 1 / np.maximum(self.limits, 1.0)
        self.combined = np.array([shares / len(shares)])
        self.least = [suffix.value[:, 1:] for suffix in everything]
        mixed = self._suffixes(np.concatenate([np.zeros((1, 1)), self.combined], axis=1))
        self.least_combined = [suffix.value for suffix in mixed]
        multipliers, self.edges = self._windows()
        self.windows, self.per_window = multipliers.shape[:2]
        self.multipliers = multipliers.reshape(self.windows * self.per_window, len(self.limits))
        self.suffixes = self._suffixes(self._weights(self.multipliers))
        room = 1e-14 * (self.size + self.multipliers @ self.sizes)
        self.room = room * len(steps)
        self.incumbents = np.empty((0, 2), np.int64)  # first cost, loss: ascending, descending
        self.sources = np.empty((0, 3), np.int64)  # step, label and multiplier that each comes from
        self.past: list[tuple[int, ...]] = []
        self.given_up: Floats | None = None  # the least bounds of labels that were given up

    def _round(self, steps: Sequence[Step], limits: Sequence[float]) -> None:
        """Go over to whole units, and leave out the limits that nothing can break (not the axis)."""

        def largest(of: Floats, step: Step) -> float:
            return float(np.abs(of[step.allowed]).max(initial=0.0))

        def decimals(total: float) -> int:
            return DIGITS - math.ceil(math.log10(total)) if total > 0 else 0

        loss_total = sum(largest(step.loss, step) for step in steps)
        totals = [sum(largest(step.costs[..., at], step) for step in steps) for at in range(len(limits))]
        self.columns = [at for at, limit in enumerate(limits) if totals[at] > limit or (self.axis and at == 0)]
        self.all_steps, self.all_limits = steps, limits
        self.loss_unit = 10.0 ** decimals(loss_total)
        units = [10.0 ** decimals(totals[at]) for at in self.columns]
        self.size = loss_total * self.loss_unit
        self.sizes = np.array([totals[at] * unit for at, unit in zip(self.columns, units, strict=True)])
        self.to, self.allowed, self.terms = [], [], []
        for step in steps:
            columns = [
                step.loss * self.loss_unit,
                *(step.costs[..., at] * u for at, u in zip(self.columns, units, strict=True)),
            ]
            self.to.append(step.to)
            self.allowed.append(step.allowed)
            self.terms.append(np.rint(np.where(step.allowed[..., None], np.stack(columns, -1), 0.0)).astype(np.int64))
        # Each step's rounding is half a unit at most: a limit that a sum meets exactly must not be missed by it.
        whole = [
            min(math.floor(min(limits[at] * unit, 4e18)) + len(steps), math.ceil(size) + len(steps))
            for at, unit, size in zip(self.columns, units, self.sizes, strict=True)
        ]
        self.limits = np.array(whole, np.int64)

    def _weights(self, multipliers: Floats) -> Floats:
        return np.concatenate([np.ones((*multipliers.shape[:-1], 1)), multipliers], axis=-1)

    def _suffixes(self, weights: Floats) -> list[_Suffix]:
        """Return, for each step and once more for the end, the completions with the least `weights` @ (loss, costs)."""
        every = np.arange(len(weights))
        found = [
            _Suffix(
                np.zeros((1, len(weights))),
                np.zeros((1, len(weights)), np.int64),
                np.zeros((1, len(weights), 1 + len(self.limits)), np.int64),
            )
        ]
        for to, allowed, terms in zip(reversed(self.to), reversed(self.allowed), reversed(self.terms), strict=True):
            after = found[-1]
            values = terms.astype(np.float64) @ weights.T + after.value[to]  # (nodes, options, multipliers)
            values[~allowed] = np.inf
            option = values.argmin(axis=1)
            rows = np.arange(len(to))[:, None]
            total = terms[rows, option] + after.total[to[rows, option], every]
            found.append(_Suffix(values[rows, option, every], option, total))
        return found[::-1]

    # -- Multipliers ---------------------------------------------------------------------------------------------------

    def _windows(self) -> tuple[Floats, Floats]:
        """Return multipliers (windows, multipliers of a window, costs) and the upper end of each window on the axis."""
        if not len(self.limits):
            return np.zeros((1, 1, 0)), np.array([np.inf])
        if not self.axis:
            start = np.full((1, len(self.limits)), 1.0) * self.size / np.maximum(self.sizes, 1.0)
            best = self._improved(start, np.ones(len(self.limits), bool))
            near = [best[0]]
            for at in range(len(self.limits)):
                for factor in (0.7, 1.4):
                    near.append(best[0] * np.where(np.arange(len(self.limits)) == at, factor, 1.0))
            return np.array([near]), np.array([np.inf])
        slopes = self._slopes()
        multipliers = np.zeros((len(slopes), len(self.limits)))
        multipliers[:, 0] = slopes
        if len(self.limits) > 1:
            kept = slopes[slopes > 0]
            slopes = np.geomspace(kept.max(), kept.min(), GRID) if len(kept) else np.ones(1)
            start = np.full((len(slopes), len(self.limits)), 1.0) * self.size / np.maximum(self.sizes, 1.0)
            start[:, 0] = slopes
            multipliers = self._improved(start, np.arange(len(self.limits)) > 0)
        # The windows' ends are where a multiplier's bound, a line on the axis, meets the next one's.
        value = self._suffixes(self._weights(multipliers))[0].value[0] - multipliers[:, 1:] @ self.limits[1:]
        fall = multipliers[:-1, 0] - multipliers[1:, 0]
        rise = value[:-1] - value[1:]
        meet = np.divide(rise, fall, out=np.zeros_like(rise), where=fall > 0)
        return multipliers[:, None], np.append(np.maximum.accumulate(np.floor(meet)), np.inf)

    def _slopes(self) -> Floats:
        """Return the slopes of the convex hull of all choices' (first cost, loss), the steepest first: that of each edge."""

        def points(weights: Floats) -> Ints:
            return self._suffixes(weights)[0].total[0][:, :2]

        only = np.zeros((2, 1 + len(self.limits)))
        only[0, 0] = only[1, 1] = 1.0
        nearly = 1e-9 * self.size / max(self.sizes[0], 1.0)
        only[0, 1], only[1, 0] = nearly, nearly
        hull = {tuple(point) for point in points(only).tolist()}
        tried: dict[float, None] = {}
        while len(tried) < HULL:
            ordered = sorted(hull)
            slopes = [(a[0] - b[0]) / (b[1] - a[1]) for a, b in _edges(ordered)]
            new = [slope for slope in dict.fromkeys(slopes) if slope not in tried][: HULL - len(tried)]
            if not new:
                break
            tried.update(dict.fromkeys(new))
            weights = np.zeros((len(new), 1 + len(self.limits)))
            weights[:, 0], weights[:, 1] = 1.0, new
            hull |= {tuple(point) for point in points(weights).tolist()}
        return np.array(sorted(tried, reverse=True) or [0.0])

    def _improved(self, multipliers: Floats, free: NDArray[np.bool_]) -> Floats:
        """Return the multipliers (n, costs) with their `free` columns changed so that the relaxation bounds as well as it can.

        The bound is concave in them. Search by steps in their logarithms, along the axes and in random directions.
        """
        rng = np.random.default_rng(0)
        count, axes = len(multipliers), np.flatnonzero(free)
        step = np.full(count, 4.0)
        for _ in range(60):
            unit = np.eye(len(free))[axes]
            around = rng.normal(size=(6 * (len(axes) > 1), len(free))) * free
            directions = np.concatenate([np.zeros((1, len(free))), unit, -unit, unit / 3, -unit / 3, around])
            tried = multipliers[:, None] * np.exp(step[:, None, None] * directions)  # (n, directions, costs)
            value = self._suffixes(self._weights(tried.reshape(-1, len(free))))[0].value[0].reshape(count, -1)
            best = (value - tried[..., free] @ self.limits[free]).argmax(axis=1)
            multipliers = tried[np.arange(count), best]
            step = np.where(best == 0, step / 3, step)
            if (step < 0.003).all():
                break
        return multipliers

    # -- Labels --------------------------------------------------------------------------------------------------------

    def answers(self) -> list[Answer]:
        if not self.feasible:
            return []
        # A narrow search first: with the incumbents that it finds, the next one needs far fewer labels.
        for most in (*(narrow for narrow in NARROW if narrow < self.most), self.most):
            layers = self._search(most)
            if self.given_up is None:
                break
            self._remember(layers)
        return self._chosen(layers)

    def _search(self, most: int) -> list[_Labels]:
        """Return the labels of each step, at most so many of a step."""
        self.given_up = None
        none = np.zeros(1, np.int64)
        layers = [_Labels(none, none, np.zeros((1, len(self.limits)), np.int64), none, none, none)]
        anew = np.zeros(self.windows, np.int64)  # the empty choice once in each window
        self._complete(0, layers[0].of(anew)._replace(window=np.arange(self.windows)), anew)
        for number in range(1, len(self.to) + 1):
            labels = self._extended(number, layers[-1])
            labels = labels.of(self._efficient(number, labels))
            labels = self._within_most(number, labels, most)
            self._complete(number, labels, np.arange(len(labels.node)))
            layers.append(labels)
        return layers

    def _remember(self, layers: list[_Labels]) -> None:
        """Keep the options of the incumbents, whose labels are about to be forgotten."""
        for row in self.sources:
            if row[0] >= 0:
                self.past.append(self._completed(layers, *row.tolist()))
                row[:] = -1, len(self.past) - 1, 0

    def _extended(self, number: int, labels: _Labels) -> _Labels:
        """Return the labels with each option of their nodes, those that can win."""
        to, allowed, terms = self.to[number - 1], self.allowed[number - 1], self.terms[number - 1]
        parts = []
        rows = max(1, _CHUNK // to.shape[1])
        for begin in range(0, max(1, len(labels.node)), rows):
            node = labels.node[begin : begin + rows]
            at, option = np.nonzero(allowed[node])
            own = terms[node[at], option]
            parent = at + begin
            new = _Labels(
                to[node[at], option],
                labels.loss[parent] + own[:, 0],
                labels.costs[parent] + own[:, 1:],
                parent,
                option,
                np.zeros(len(at), np.int64),
            )
            least = new.costs + self.least[number][new.node]
            can = np.asarray((least <= self.limits).all(axis=1), bool)
            if len(self.limits) > 1:
                both = new.costs @ self.combined[0] + self.least_combined[number][new.node, 0]
                can &= both <= self.combined[0] @ self.limits + 1e-9
            new = new.of(can)
            if self.windows > COARSE:  # a few wide windows rule out most of what all of them would
                wide = np.arange(COARSE // 2, self.windows, COARSE)
                edges = np.append(self.edges[COARSE - 1 : self.windows - 1 : COARSE], np.inf)[: len(wide)]
                edges[-1] = np.inf
                over = self._bounds(number, new, wide) - self._thresholds(wide, edges)
                new = new.of(np.asarray((over <= 0).any(axis=1), bool))
            slack, window = self._slack(self._bounds(number, new))
            parts.append(new._replace(window=window).of(slack <= 0))
        return _Labels(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))

    def _bounds(self, number: int, labels: _Labels, some: Ints | None = None) -> Floats:
        """Return, for labels of a step and every multiplier (or some), the least loss + multiplier @ costs of a completion."""
        value, multipliers = self.suffixes[number].value, self.multipliers
        if some is not None:
            value, multipliers = value[:, some], multipliers[some]
        bounds: Floats = labels.costs.astype(np.float64) @ multipliers.T
        bounds += labels.loss[:, None]
        bounds += value[labels.node] if len(value) > 1 else value
        return bounds

    def _slack(self, bounds: Floats) -> tuple[Floats, Ints]:
        """Return by how much each label's bound misses winning in its best window (above 0: it cannot win), and that window."""
        over = bounds - self._thresholds(np.arange(len(self.multipliers)), self.edges)
        if self.per_window > 1:
            over = over.reshape(len(bounds), self.windows, self.per_window).max(axis=2)
        window = over.argmin(axis=1)
        return over[np.arange(len(over)), window], window

    def _thresholds(self, some: Ints, edges: Floats) -> Floats:
        """Return for these multipliers what a completion's loss + multiplier @ costs must not exceed to win in its window; on
        the axis, a multiplier's window ends at its edge."""
        worst = math.ceil(self.size) + len(self.to)  # what no choice can exceed
        multipliers, room = self.multipliers[some], self.room[some]
        if not self.axis:
            upper = self.incumbents[-1, 1] if len(self.incumbents) else worst
            found: Floats = upper + multipliers @ self.limits + room
            return found
        # The incumbents' loss is a step function of the axis. With the line added it is largest at the steps' ends.
        least = math.floor(self.least[0][0, 0])
        cost, loss = np.concatenate([[[least, worst]], self.incumbents]).T
        ends = np.append(cost[1:] - 1, self.limits[0])
        inner = np.clip(np.minimum(edges, float(self.limits[0])), 0, None).astype(np.int64)
        inner = inner[inner >= cost[0]]
        at = np.concatenate([ends, inner])
        step = np.searchsorted(cost, at, side="right") - 1
        window = np.minimum(np.searchsorted(edges, at, side="left"), len(edges) - 1)
        most = np.full(len(edges), -np.inf)
        np.maximum.at(most, window, loss[step] + multipliers[window, 0] * at)
        return most + multipliers[:, 1:] @ self.limits[1:] + room

    def _efficient(self, number: int, labels: _Labels) -> Ints:
        """Return the labels that fewer than `count` others at the same node are at least as good as, and perhaps more."""
        counts = len(self.limits) if number < len(self.to) else int(self.axis)  # at the end, limits are kept or not
        left = np.arange(len(labels.node))
        kept = []
        for _ in range(self.count):
            keep = efficient(labels.node[left], labels.costs[left, :counts], labels.loss[left])
            kept.append(left[keep])
            left = left[~keep]
            if not len(left):
                break
        return np.sort(np.concatenate(kept))

    def _within_most(self, number: int, labels: _Labels, most: int) -> _Labels:
        """Give up the least promising labels where there are too many; each window keeps as many."""
        if len(labels.node) <= most:
            return labels
        bounds = self._bounds(number, labels)
        slack, window = self._slack(bounds)
        order = np.lexsort((slack, window))
        rank = np.empty(len(order), np.int64)  # in its window
        rank[order] = np.arange(len(order)) - np.searchsorted(window[order], window[order])
        order = np.lexsort((slack, rank))
        lost = bounds[order[most:]].min(axis=0)
        self.given_up = lost if self.given_up is None else np.minimum(self.given_up, lost)
        return labels.of(np.sort(order[:most]))

    def _complete(self, number: int, labels: _Labels, index: Ints) -> None:
        """Complete labels as the relaxation of their window would, and keep those completions that are incumbents."""
        for nth in range(self.per_window):
            multiplier = labels.window * self.per_window + nth
            total = self.suffixes[number].total[labels.node, multiplier]
            costs = labels.costs + total[:, 1:]
            keeps = (costs <= self.limits).all(axis=1)
            loss = (labels.loss + total[:, 0])[keeps]
            source = np.stack([np.full(len(index), number), index, multiplier], axis=1)[keeps]
            if self.axis:
                points = np.concatenate([self.incumbents, np.stack([costs[keeps, 0], loss], axis=1)])
                sources = np.concatenate([self.sources, source])
                order = np.lexsort((points[:, 1], points[:, 0]))
                points, sources = points[order], sources[order]
                lowest = np.minimum.accumulate(points[:, 1])
                better = np.append(True, points[1:, 1] < lowest[:-1])[: len(points)]
                self.incumbents, self.sources = points[better], sources[better]
            elif len(loss) >= self.count:
                # Different labels of a step have different completions: the last of the best `count` bounds all of them.
                best = np.argsort(loss, kind="stable")[: self.count]
                if not len(self.incumbents) or loss[best[-1]] < self.incumbents[-1, 1]:
                    self.incumbents = np.stack([np.zeros(self.count, np.int64), loss[best]], axis=1)
                    self.sources = source[best]

    # -- Answers -------------------------------------------------------------------------------------------------------

    def _chosen(self, layers: list[_Labels]) -> list[Answer]:
        end = layers[-1]
        chosen = [tuple(options) for options in self._options(layers, len(self.to), np.arange(len(end.node))).tolist()]
        if self.given_up is not None:  # what was given up may have been on the way to an incumbent
            self._remember(layers)
            chosen += [self.past[at] for _, at, _ in self.sources.tolist()]
        found = [self._answer(options) for options in dict.fromkeys(chosen)]
        if not found and self.given_up is not None:
            raise InputError(
                f"among {self.most} partial choices at a time none was found that keeps the budgets, and none is ruled out: "
                f"search among more of them, or give larger budgets"
            )
        if not self.axis:
            return [answer for _, _, answer in sorted(found, key=lambda each: each[:2])][: self.count]
        answers: list[Answer] = []
        lowest: int | None = None
        for _, loss, answer in sorted(((cost, loss, answer) for loss, cost, answer in found), key=lambda each: each[:2]):
            if lowest is None or loss < lowest:
                answers.append(answer)
                lowest = loss
        return answers

    def _options(self, layers: list[_Labels], number: int, index: Ints) -> Ints:
        """Return the options (labels, steps) that lead to labels of a step."""
        taken = []
        for labels in reversed(layers[1 : number + 1]):
            taken.append(labels.option[index])
            index = labels.parent[index]
        return np.stack(taken[::-1], axis=1) if taken else np.empty((len(index), 0), np.int64)

    def _completed(self, layers: list[_Labels], number: int, label: int, multiplier: int) -> tuple[int, ...]:
        options = self._options(layers, number, np.array([label]))[0].tolist()
        node = int(layers[number].node[label])
        for at in range(number, len(self.to)):
            option = int(self.suffixes[at].option[node, multiplier])
            options.append(option)
            node = int(self.to[at][node, option])
        return tuple(options)

    def _answer(self, options: tuple[int, ...]) -> tuple[int, int, Answer]:
        """Return loss and first cost in whole units, and the answer."""
        node, total = 0, np.zeros(1 + len(self.limits), np.int64)
        losses, costs = [], []
        for step, terms, option in zip(self.all_steps, self.terms, options, strict=True):
            total += terms[node, option]
            losses.append(float(step.loss[node, option]))
            costs.append(step.costs[node, option])
            node = int(step.to[node, option])
        gap = 0.0
        if self.given_up is not None:
            at_most = self.limits.astype(np.float64)
            if self.axis:
                at_most[0] = total[1]
            bound = (self.given_up - self.room - self.multipliers @ at_most).max()
            gap = max(0.0, float(total[0] - bound)) / self.loss_unit
        sums = np.array(costs).T if len(self.all_limits) else np.empty((0, 0))
        answer = Answer(options, math.fsum(losses), tuple(math.fsum(column) for column in sums), gap)
        return int(total[0]), int(total[1]) if len(total) > 1 else 0, answer


def _edges(points: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the edges of the lower convex hull of (loss, cost) points, given by ascending loss."""
    hull: list[tuple[int, ...]] = []
    for loss, cost in points:
        if hull and cost >= hull[-1][1]:
            continue  # dominated
        while len(hull) > 1:
            (l0, c0), (l1, c1) = hull[-2:]
            if (l1 - l0) * (c0 - cost) < (loss - l0) * (c0 - c1):
                break
            hull.pop()
        hull.append((loss, cost))
    return [(b, a) for a, b in itertools.pairwise(hull)]
