"""Which networks an Optuna study tries: networks as parameters, and the sampler. No torch.

See `nas.tuning` for how what is proposed keeps the target.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from nas.trajectory import Limit, Predictor, SamplerName
from supernet.arch import ArchConfig
from supernet.space import SearchSpace

Params = Mapping[str, Any]

POPULATION = 20  # of NSGA-II: ten generations in 200 trials; Optuna's own 50 would leave four


class Networks:
    """The networks of a space as parameters of a study, and which of them keep the target and the limits."""

    def __init__(
        self,
        space: SearchSpace,
        table: Predictor,
        budget_ms: float,
        limits: Sequence[Limit],
        known: Sequence[ArchConfig] = (),
    ) -> None:
        self.space = space
        self.table = table
        self.budget_ms = budget_ms
        self.limits = limits
        self.budgets = {"ms": budget_ms, **{limit.name: limit.at_most for limit in limits}}
        # Where a table has narrow layers that are slow, the smallest network is not the fastest.
        self.sure = (space.smallest, *map(self.member, known))
        self.least = min(self.sure, key=lambda arch: (self.excess(arch), table.predict_ms(arch)))
        self.options: dict[str, tuple[Any, ...]] = {}
        for number, stage in enumerate(space.stages, 1):
            self.options[f"stage{number}.width"] = stage.widths
            self.options |= {f"stage{number}.slot{slot}": stage.kinds for slot in range(1, stage.depth + 1)}
        self.options = {name: options for name, options in self.options.items() if len(options) > 1}
        self.distributions = {name: _distribution(options) for name, options in self.options.items()}

    def member(self, arch: ArchConfig) -> ArchConfig:
        """Return a network as a member of the space; each image by itself, as no weights depend on the groups."""
        return self.space.fit(arch.without_mux())

    def params(self, arch: ArchConfig) -> dict[str, Any]:
        """Return the parameters of a network of the space."""
        found: dict[str, Any] = {}
        for number, (choices, stage) in enumerate(zip(self.space.stages, self.member(arch).stages, strict=True), 1):
            found[f"stage{number}.width"] = stage.width
            found |= {f"stage{number}.slot{slot}": choices.kind_of(block) for slot, block in enumerate(stage.blocks, 1)}
        return {name: found[name] for name in self.options}

    def arch(self, params: Params) -> ArchConfig:
        """Return the network with these parameters, its token blocks moved behind the others of their stage."""
        widths, kinds = [], []
        for number, stage in enumerate(self.space.stages, 1):
            widths.append(params.get(f"stage{number}.width", stage.widths[0]))
            kinds.append([params[f"stage{number}.slot{slot}"] for slot in range(1, stage.depth + 1)])
        return self.space.arch(widths, kinds)

    def limited(self, arch: ArchConfig) -> dict[str, float]:
        """Return what the limits are about."""
        return {limit.name: limit.of(arch) for limit in self.limits}

    def excess(self, arch: ArchConfig) -> float:
        """Return by how much a network misses the target and the limits: the shares above them, added up; 0 if it keeps all."""
        misses = [(self.table.predict_ms(arch), self.budget_ms), *((limit.of(arch), limit.at_most) for limit in self.limits)]
        return sum(max(value / at_most - 1, math.ulp(0.0)) if value > at_most else 0.0 for value, at_most in misses)

    def kept_by(self, trial: FrozenTrial) -> bool:
        """Say whether the network of a trial keeps the target and the limits, by the trial's own figures."""
        figures = trial.user_attrs
        within = all(figures.get(limit.name, math.inf) <= limit.at_most for limit in self.limits)
        return within and bool(figures.get("ms", math.inf) <= self.budget_ms)

    def neighbours(self, params: Params, rng: random.Random) -> Iterator[dict[str, Any]]:
        """Yield the networks with one change, in random order: a stage one width wider or narrower, another candidate."""
        changes = []
        for name, options in self.options.items():
            at = options.index(params[name])
            near = options[max(at - 1, 0) : at + 2] if name.endswith(".width") else options
            changes += [(name, option) for option in near if option != params[name]]
        rng.shuffle(changes)
        for name, option in changes:
            yield self.params(self.arch({**params, name: option}))

    def repaired(self, params: Params, rng: random.Random) -> dict[str, Any]:
        """Return a network near the given one that keeps the target and the limits; `least` where none is found."""
        params = self.params(self.arch(params))
        excess = self.excess(self.arch(params))
        while excess > 0:
            for near in self.neighbours(params, rng):
                left = self.excess(self.arch(near))
                if left < excess:
                    params, excess = near, left
                    break
            else:  # nothing near misses them by less
                return self.params(self.least)
        return params

    def untried(self, params: Params, tried: set[frozenset[tuple[str, Any]]], rng: random.Random) -> dict[str, Any]:
        """Return the nearest network that keeps the target and the limits and has not been tried; if all have, one that has.

        Nearest by single changes through networks that keep them all, in random order where several are as near.
        """
        params = self.repaired(params, rng)
        if key(params) not in tried:
            return params
        passed, ways = {key(params)}, deque([params])
        while ways:
            for near in self.neighbours(ways.popleft(), rng):
                if key(near) not in passed and self.excess(self.arch(near)) == 0:
                    if key(near) not in tried:
                        return near
                    passed.add(key(near))
                    ways.append(near)
        return params


def _distribution(options: Sequence[Any]) -> BaseDistribution:
    """Return whole numbers in equal steps as such, so that samplers know their order, and all else as categories."""
    if all(type(option) is int for option in options):
        steps = {b - a for a, b in itertools.pairwise(options)}
        if len(steps) == 1:
            return IntDistribution(options[0], options[-1], step=steps.pop())
    return CategoricalDistribution(options)


def key(params: Params) -> frozenset[tuple[str, Any]]:
    return frozenset(params.items())


class Sampler(BaseSampler):
    """Proposes networks that keep the target and the limits and have not been tried: first the known ones, then Optuna's.

    Optuna's sampler is made anew for each trial, with a seed of its own: it keeps nothing that is not in the study.
    `exhausted` says of the last proposal that there was nothing new to propose; a network that another process proposes at the
    same moment is new to both.
    """

    def __init__(self, name: SamplerName, networks: Networks, first: Sequence[Params], seed: int) -> None:
        self.name = name
        self.networks = networks
        self.first = first
        self.seed = seed
        self.exhausted = False

    def _seed(self, study: Study, trial: FrozenTrial) -> str:
        """Return what a proposal is drawn by: its number but for trials that were lost, so that a kill changes nothing."""
        failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        lost = sum(other.number < trial.number and "dropped" not in other.user_attrs for other in failed)
        return f"{self.seed} {trial.number - lost}"

    def _proposer(self, study: Study, trial: FrozenTrial) -> BaseSampler:
        seed = random.Random(self._seed(study, trial)).randrange(1 << 32)
        return TPESampler(seed=seed) if self.name == "tpe" else NSGAIISampler(population_size=POPULATION, seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.networks.distributions

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        proposer = self._proposer(study, trial)
        # Also for a known network: NSGA-II notes here which generation the trial belongs to.
        proposed = proposer.sample_relative(study, trial, proposer.infer_relative_search_space(study, trial))
        others = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
        tried = {key(other.params) for other in others if other.number != trial.number}
        self.exhausted = False
        for params in self.first:
            if key(params) not in tried:
                return dict(params)
        for name, distribution in search_space.items():
            if name not in proposed:
                proposed[name] = proposer.sample_independent(study, trial, name, distribution)
        found = self.networks.untried(proposed, tried, random.Random(f"{self._seed(study, trial)} change"))
        self.exhausted = key(found) in tried or self.networks.excess(self.networks.arch(found)) > 0
        return found

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._proposer(study, trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._proposer(study, trial).after_trial(study, trial, state, values)
