"""Optuna over the networks of a space: the best network under a target, or a front of loss and latency. No torch.

A trial of the study is one network that keeps the target and the limits: nothing else is ever evaluated. A sampler's proposal
that misses them is changed before it becomes a trial, place by place at random, each time to something that misses them by
less (a stage one width narrower, another candidate in a slot), until it keeps them; in the place of one that has been tried
comes the nearest that has not. Optuna learns from the network that was evaluated, never from the one that was proposed.
So a study of 200 trials evaluates 200 different networks, however few of all networks keep the target.

*Parameters* are called `stage1.width` and `stage1.slot2`, counted from 1; a stage with one width has no parameter for it.
Blocks on tokens stand behind the others of their stage, and a trial's parameters say what stands where, so two trials with
different parameters are different networks. The value is what is charged (the loss, or the error); the user attributes
of a trial have the rest: `network`, `ms`, `loss`, `accuracy`, one for each limit, and the `budgets` that it was made under, the
target's (`ms`) and each limit's.

*Many processes* that share a storage work on one study, and evaluate as many networks as it has trials between them. Each
trial has a number that the storage gives once; one that finds enough trials, or its own network, under smaller numbers is
dropped. A process that was killed leaves a trial running: on its own machine others see that it is gone, and elsewhere that
its trial has been silent for two minutes; it is marked as failed and another takes its place.

*The seed* of each proposal is that of the search and the trial's number, so processes with the same seed propose different
networks, and one process alone gives the same study again.

Source: Optuna (Akiba et al., KDD 2019); its TPE (Bergstra et al., NeurIPS 2011) and NSGA-II (Deb et al., 2002). Repairing what
misses a constraint, and learning from the repaired, is common with evolutionary algorithms (Lamarckian repair).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend, JournalStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from nas.kept import described
from nas.progress import progress, say
from nas.slimming import Evaluation, Limit, Option, Predictor, Score, Step, Trajectory, check_limits, rounded_up
from nas.table import Target
from supernet.arch import ArchConfig
from supernet.errors import InputError, first_line, unknown
from supernet.space import SearchSpace

SamplerName = Literal["tpe", "nsga2"]

TRIALS = 200
OPTIONS = 6  # of the best networks that the answer lists
POPULATION = 20  # of NSGA-II: ten generations in 200 trials; Optuna's own 50 would leave four
FRUITLESS = 3  # proposals in a row in whose place there was no new network: the space has no more
BEAT_S = 20.0  # how often a running trial says that its process is alive
GRACE_S = 120.0  # a running trial that has been silent for so long has lost its process
ASKED_S = 30.0  # the same before a trial says whose it is: only the sampler works meanwhile
BOOT = "/proc/sys/kernel/random/boot_id"  # of this start of this machine; clones share name and the namespace's number
POLL_S = 0.5  # how often a process that has nothing to do looks whether the others are done

Params = Mapping[str, Any]


def study_name(label: str, request: Mapping[str, Any]) -> str:
    """Return what the study of a request is called: `label` and a hash of all that the request says.

    Different requests in one storage are then different studies. `request`: what JSON can hold, and the same on every machine
    that is to take part: no paths, and nothing of the storage itself.
    """
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    return f"{label}-{digest[:12]}"


def tune(
    space: SearchSpace,
    evaluate: Callable[[ArchConfig], Evaluation],
    table: Predictor,
    budget: float | Target,
    begin: ArchConfig,
    *,
    study_name: str,
    storage: str | Path | BaseStorage,
    sampler: SamplerName = "tpe",
    trials: int = TRIALS,
    more: int | None = None,
    seed: int = 0,
    known: Sequence[ArchConfig] = (),
    limits: Sequence[Limit] = (),
    score: Score = "loss",
    front: bool = False,
    on_trial: Callable[[Option], None] | None = None,
) -> Trajectory:
    """Return the best network of a study of `trials` networks of at most `budget` milliseconds and within the limits.

    The trajectory has one step, from `begin`; its options are the six best networks of the study, the best first. Where
    `begin` keeps the target and the limits itself, it is the answer, without a step (not with `front`). Called again, or by
    several processes at once, with the same study and storage, it goes on with it, and waits for trials that others run: all
    return the same network.

    A study that has trials of other budgets, the target's or a limit's (`nas.guarantee` changes them where a device disagrees
    with its table), goes on: those of its trials that keep these budgets count, and at least `more` are made under them.

    Args:
        evaluate: a network to its loss and accuracy. Asked for networks that keep the target and the limits, and for `begin`.
        table: anything with `predict_ms(arch)`.
        budget: milliseconds.
        begin: the network that the trajectory starts from.
        study_name: see the function `study_name`.
        storage: a file (Optuna's journal), the URL of a database (`postgresql://...`, `mysql://...`, `sqlite:///...`), of
            `redis://...` or of Optuna's proxy `grpc://host:port`, or an Optuna storage.
        sampler: tpe or nsga2.
        trials: how many networks the study evaluates, all processes together.
        more: see above; None: a quarter of `trials`.
        known: networks that are evaluated first, in this order: those of them that keep the target and the limits.
        limits: what a network must keep beside the target: parameters, or the milliseconds on another device.
        score: what is minimised: the loss, or the error (1 - accuracy).
        front: minimise milliseconds too: the study's `best_trials` are the front.
        on_trial: called after each network that this process evaluated.

    Raises:
        InputError: the budget is not positive, or it or a limit is below the space's smallest network and all known ones, or
            no network is found that keeps them all; the sampler or the score is unknown; the storage cannot be used; a known
            network is not in the space; or `evaluate` gives no finite number for what is minimised.
    """
    target = budget if isinstance(budget, Target) else Target(budget)
    if sampler not in get_args(SamplerName):
        raise unknown("optuna sampler", sampler, get_args(SamplerName))
    if score not in get_args(Score):
        raise unknown("score", score, get_args(Score))
    more = -(-trials // 4) if more is None else more
    for name, value in (("trials", trials), ("more", more)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, but is {value!r}")
    networks = _Networks(space, table, target.ms, limits, known)
    if networks.excess(networks.least) > 0:
        least_ms = min(table.predict_ms(arch) for arch in networks.sure)
        if target.ms < least_ms:
            raise InputError(
                f"the target of {target.ms:g} ms is below the fastest network that is known of {space.name}: "
                f"give at least {rounded_up(least_ms)} ms"
            )
        check_limits(space, limits)
    start = Step(table.predict_ms(begin), evaluate(begin), (), networks.limited(begin))
    if networks.excess(begin) == 0 and not front:
        return Trajectory(begin, (), begin, start.ms, start.evaluation)
    first = [networks.params(arch) for arch in known if networks.excess(networks.member(arch)) == 0]
    chosen = _Sampler(sampler, networks, first, seed)
    metrics = ["loss" if score == "loss" else "error", *(["ms"] if front else [])]
    run = _Run(_opened(study_name, storage, chosen, metrics), chosen, evaluate, score, front, start)
    run.finish(trials, min(more, trials), on_trial)
    options = tuple(run.best()[:OPTIONS])
    if not options:
        raise InputError(
            f"no network of {space.name} was found that keeps the target of {target.ms:g} ms and the limits together: give "
            "larger ones"
        )
    step = Step(start.ms, start.evaluation, options, start.figures)
    return Trajectory(begin, (step,), step.taken.arch, step.taken.ms, step.taken.evaluation)


class _Networks:
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
        if _key(params) not in tried:
            return params
        passed, ways = {_key(params)}, deque([params])
        while ways:
            for near in self.neighbours(ways.popleft(), rng):
                if _key(near) not in passed and self.excess(self.arch(near)) == 0:
                    if _key(near) not in tried:
                        return near
                    passed.add(_key(near))
                    ways.append(near)
        return params


def _distribution(options: Sequence[Any]) -> BaseDistribution:
    """Return whole numbers in equal steps as such, so that samplers know their order, and all else as categories."""
    if all(type(option) is int for option in options):
        steps = {b - a for a, b in itertools.pairwise(options)}
        if len(steps) == 1:
            return IntDistribution(options[0], options[-1], step=steps.pop())
    return CategoricalDistribution(options)


def _key(params: Params) -> frozenset[tuple[str, Any]]:
    return frozenset(params.items())


class _Sampler(BaseSampler):
    """Proposes networks that keep the target and the limits and have not been tried: first the known ones, then Optuna's.

    Optuna's sampler is made anew for each trial, with a seed of its own: it keeps nothing that is not in the study.
    `exhausted` says of the last proposal that there was nothing new to propose; a network that another process proposes at the
    same moment is new to both.
    """

    def __init__(self, name: SamplerName, networks: _Networks, first: Sequence[Params], seed: int) -> None:
        self.name = name
        self.networks = networks
        self.first = first
        self.seed = seed
        self.exhausted = False

    def _proposer(self, trial: FrozenTrial) -> BaseSampler:
        seed = random.Random(f"{self.seed} {trial.number}").randrange(1 << 32)
        return TPESampler(seed=seed) if self.name == "tpe" else NSGAIISampler(population_size=POPULATION, seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.networks.distributions

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        proposer = self._proposer(trial)
        # Also for a known network: NSGA-II notes here which generation the trial belongs to.
        proposed = proposer.sample_relative(study, trial, proposer.infer_relative_search_space(study, trial))
        others = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
        tried = {_key(other.params) for other in others if other.number != trial.number}
        self.exhausted = False
        for params in self.first:
            if _key(params) not in tried:
                return dict(params)
        for name, distribution in search_space.items():
            if name not in proposed:
                proposed[name] = proposer.sample_independent(study, trial, name, distribution)
        found = self.networks.untried(proposed, tried, random.Random(f"{self.seed} {trial.number} change"))
        self.exhausted = _key(found) in tried or self.networks.excess(self.networks.arch(found)) > 0
        return found

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._proposer(trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._proposer(trial).after_trial(study, trial, state, values)


class _Run:
    """One process's part of a study."""

    def __init__(
        self,
        study: Study,
        sampler: _Sampler,
        evaluate: Callable[[ArchConfig], Evaluation],
        score: Score,
        front: bool,
        start: Step,
    ) -> None:
        self.study = study
        self.sampler = sampler
        self.networks = sampler.networks
        self.evaluate = evaluate
        self.score = score
        self.front = front
        self.start = start
        self.others = _Others()

    def finish(self, trials: int, more: int, on_trial: Callable[[Option], None] | None) -> None:
        """Evaluate networks until `trials` of the study keep the budgets, and at least `more` were made under them."""
        kept, fresh = self._done()
        missing = max(trials - kept, more - fresh)
        fruitless, ended, waiting = 0, 0, False
        with progress("trials", max(trials, missing + kept), kept) as tick:
            while True:
                before, (kept, fresh) = kept, self._done()
                tick(kept - before)
                if kept >= trials and fresh >= more:
                    return
                running = self._running()
                if (now := self._ended()) != ended:
                    fruitless, ended = 0, now  # one that has failed gives its network back
                if fruitless >= FRUITLESS and not running:
                    say(f"{self.networks.space.name} has no other network within the budget: the study ends with {kept} trials")
                    return
                if fruitless >= FRUITLESS or (kept + running >= trials and fresh + running >= more):
                    if not waiting:
                        say(f"waiting for {running} trials that other processes run")
                    waiting = True
                    time.sleep(POLL_S)
                    continue
                trial = self.study.ask(self.networks.distributions)
                dropped = self._dropped(trial, trials, more)
                if dropped is None:
                    found = self._evaluated(trial)
                    if found is not None and on_trial is not None:
                        on_trial(found)
                fruitless = fruitless + 1 if dropped in ("tried", "misses") and self.sampler.exhausted else 0

    def best(self) -> list[Option]:
        """Return the networks of the study that keep the target and the limits, the best first."""
        found = [t for t in self._trials(TrialState.COMPLETE) if self.networks.kept_by(t)]
        found.sort(key=lambda t: (t.values[0], t.user_attrs["ms"], t.number))
        return [self._option(t.number, self.networks.arch(t.params), _evaluation(t)) for t in found]

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def _done(self, below: int | None = None) -> tuple[int, int]:
        """Return how many trials (of a number below) keep the target and the limits, and how many were made under them."""
        done = [
            t for t in self._trials(TrialState.COMPLETE) if self.networks.kept_by(t) and (below is None or t.number < below)
        ]
        return len(done), sum(t.user_attrs.get("budgets") == self.networks.budgets for t in done)

    def _ended(self) -> int:
        """Return how many trials have ended, but for those that missed, or gave way to another of the same network."""
        ended = self._trials(TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)
        return sum(t.user_attrs.get("dropped") not in ("tried", "misses") for t in ended)

    def _running(self, below: int | None = None) -> int:
        """Return how many trials (of a number below) others run, and end those whose process is gone."""
        running = 0
        for trial in self._trials(TrialState.RUNNING):
            if below is not None and trial.number >= below:
                continue
            if self.others.lost(trial):
                self._end(trial.number, TrialState.FAIL)
            else:
                running += 1
        return running

    def _dropped(self, trial: Trial, trials: int, more: int) -> str | None:
        """End a trial that is not to be evaluated; say why not: it misses the target, or was tried, or is one too many."""
        arch = self.networks.arch(trial.params)
        figures = {"ms": self.networks.table.predict_ms(arch), **self.networks.limited(arch)}
        known = {"worker": _worker(), "network": described(arch), "budgets": self.networks.budgets, **figures}
        try:
            for name, value in known.items():
                trial.set_user_attr(name, value)
        except RuntimeError:
            return "lost"  # another process has ended it: the sampler took so long
        if self.networks.excess(arch) > 0:  # somebody enqueued it
            self._drop(trial, "misses", TrialState.PRUNED)
            return "misses"
        # What has a smaller number was there before this trial, and its process sees it too: no two give way to each other.
        while True:
            running = self._running(below=trial.number)
            before = [t for t in self._trials(TrialState.COMPLETE, TrialState.RUNNING) if t.number < trial.number]
            if all(t.params.keys() >= self.networks.options.keys() for t in before):
                break
            time.sleep(POLL_S / 10)  # until another process has said which network its trial is
        kept, fresh = self._done(below=trial.number)
        if any(_key(t.params) == _key(trial.params) for t in before):
            self._drop(trial, "tried", TrialState.FAIL)
            return "tried"
        if kept + running >= trials and fresh + running >= more:
            self._drop(trial, "too many", TrialState.FAIL)
            return "too many"
        return None

    def _drop(self, trial: Trial, why: str, state: TrialState) -> None:
        with suppress(RuntimeError):  # another process has ended it
            trial.set_user_attr("dropped", why)
        self._end(trial.number, state)

    def _evaluated(self, trial: Trial) -> Option | None:
        """Evaluate a trial's network. None: another process has ended the trial meanwhile."""
        arch = self.networks.arch(trial.params)
        try:
            with _beating(trial):
                evaluation = self.evaluate(arch)
            value = _charged(evaluation, self.score)
            if not math.isfinite(value):
                raise InputError(f"Optuna minimises the {self.score}, but evaluating {arch.name} gives {value} for it")
        except BaseException:
            self._end(trial.number, TrialState.FAIL)
            raise
        with suppress(RuntimeError):
            trial.set_user_attr("loss", evaluation.loss)
            if math.isfinite(evaluation.accuracy):
                trial.set_user_attr("accuracy", evaluation.accuracy)
            ms = self.networks.table.predict_ms(arch)
            if self._end(trial.number, TrialState.COMPLETE, [value, *([ms] if self.front else [])]):
                return self._option(trial.number, arch, evaluation)
        say(f"trial {trial.number} was taken for lost: its network will be proposed again")
        return None

    def _end(self, number: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """End a trial, unless another process has: then False."""
        with suppress(RuntimeError):
            ended = self.study.tell(number, values, state, skip_if_finished=True)
            return ended.state == state
        return False

    def _option(self, number: int, arch: ArchConfig, evaluation: Evaluation) -> Option:
        ms = self.networks.table.predict_ms(arch)
        saved_ms = self.start.ms - ms
        drop = max(_charged(evaluation, self.score) - _charged(self.start.evaluation, self.score), 0.0)
        score = drop / saved_ms if saved_ms > 0 else math.nan
        figures = self.networks.limited(arch)
        return Option(f"trial {number}", -1, arch, ms, saved_ms, evaluation, score, saved_ms, figures)


def _charged(evaluation: Evaluation, score: Score) -> float:
    return evaluation.loss if score == "loss" else 1 - evaluation.accuracy


def _evaluation(trial: FrozenTrial) -> Evaluation:
    return Evaluation(trial.user_attrs["loss"], trial.user_attrs.get("accuracy", math.nan))


class _Others:
    """Which running trials have lost their process. Clocks of different machines are never compared."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[object, float]] = {}  # of each trial: what it last said, and when it was new here

    def lost(self, trial: FrozenTrial) -> bool:
        """Say so of a trial that is none of this process's own at this moment."""
        *place, pid = trial.user_attrs.get("worker", [None])
        *here, own_pid = _worker()
        if place == here and (pid == own_pid or not _alive(pid)):
            return True
        heard, now = (trial.user_attrs.get("beat"), len(trial.user_attrs), len(trial.params)), time.monotonic()
        if trial.number not in self._seen or self._seen[trial.number][0] != heard:
            self._seen[trial.number] = heard, now
        return now - self._seen[trial.number][1] > (GRACE_S if place else min(ASKED_S, GRACE_S))


def _worker() -> list[Any]:
    """Return what tells processes apart: the machine, the container where there are such, and the process's number."""
    return [*_place(), os.getpid()]


@cache
def _place() -> tuple[str, str, str]:
    """Return the machine's name, what no other machine of that name has, and the container."""
    try:
        boot, container = Path(BOOT).read_text(encoding="ascii").strip(), os.readlink("/proc/self/ns/pid")
    except OSError:  # not on Linux
        boot, container = f"{uuid.getnode():x}", ""
    return platform.node(), boot, container


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # os.kill would end it there; its beats will tell
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@contextmanager
def _beating(trial: Trial) -> Iterator[None]:
    """Let other processes see, while a trial runs, that this process is alive."""
    over = threading.Event()

    def beat() -> None:
        with suppress(RuntimeError):  # another process has ended the trial
            for number in itertools.count(1):
                if over.wait(BEAT_S):
                    return
                trial.set_user_attr("beat", number)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _opened(name: str, storage: str | Path | BaseStorage, sampler: BaseSampler, metrics: list[str]) -> Study:
    """Return the study of this name, made if it is not there yet."""
    shown = _without_password(str(storage)) if isinstance(storage, str | Path) else type(storage).__name__
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            storage=_storage(storage),
            sampler=sampler,
            study_name=name,
            directions=["minimize"] * len(metrics),
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(metrics)
    except InputError:
        raise
    except Exception as error:  # each database's driver has its own
        raise InputError(
            f"the Optuna storage {shown} cannot be used ({first_line(error)}): give a file, or a URL such as "
            "postgresql://user@host/database"
        ) from error
    finally:
        optuna.logging.set_verbosity(verbosity)
    return study


def _storage(storage: str | Path | BaseStorage) -> BaseStorage:
    if isinstance(storage, BaseStorage):
        return storage
    text = str(storage)
    scheme, has_scheme, _ = text.partition("://")
    if not has_scheme:
        if not text or re.match(r"\w[\w+]+:", text):  # two letters at least: C: is a drive
            raise InputError(
                f"the Optuna storage {text!r} is neither a file nor a URL: give a file such as study.journal, or a URL such as "
                "sqlite:///study.db or postgresql://user@host/database"
            )
        Path(text).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(text))
    if scheme == "grpc":
        url = urlsplit(text)
        return optuna.storages.GrpcStorageProxy(host=url.hostname or "localhost", port=url.port or 13000)
    if scheme.startswith("redis"):
        return JournalStorage(JournalRedisBackend(text))
    # SQLite lets one process write at a time: the others wait. A server may have closed a connection during an evaluation.
    from sqlalchemy.exc import DBAPIError  # Optuna's own requirement for databases

    engine = {"connect_args": {"timeout": 60}} if scheme.startswith("sqlite") else {"pool_pre_ping": True}
    for pause_s in (0.3, 1.0, 3.0):
        with suppress(DBAPIError):  # two processes that begin at once both make the tables, and one of them cannot
            return RDBStorage(text, engine_kwargs=engine)
        time.sleep(pause_s)
    return RDBStorage(text, engine_kwargs=engine)


def _without_password(url: str) -> str:
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", url)
