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

*The seed* of each proposal is that of the search and the trial's number, less the trials before it that a kill ended, so
processes with the same seed propose different networks, and one process alone gives the same study again, killed or not.

Source: Optuna (Akiba et al., KDD 2019); its TPE (Bergstra et al., NeurIPS 2011) and NSGA-II (Deb et al., 2002). Repairing what
misses a constraint, and learning from the repaired, is common with evolutionary algorithms (Lamarckian repair).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import get_args

from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from nas.kept import described
from nas.progress import progress, say
from nas.proposals import Networks, Sampler, key
from nas.shared_study import Others, beating, opened, within_reach, worker
from nas.slimming import check_limits, rounded_up
from nas.table import Target
from nas.trajectory import Evaluation, Limit, NothingFits, Option, Predictor, SamplerName, Score, Step, Trajectory
from supernet.arch import ArchConfig
from supernet.errors import InputError, unknown
from supernet.space import SearchSpace

TRIALS = 200
OPTIONS = 6  # of the best networks that the answer lists
FRUITLESS = 3  # proposals in a row in whose place there was no new network: the space has no more
POLL_S = 0.5  # how often a process that has nothing to do looks whether the others are done


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
) -> Trajectory:
    """Return the best network of a study of `trials` networks of at most `budget` milliseconds and within the limits.

    The trajectory has one step, from `begin`; its options are the six best networks of the study, the best first. Where
    `begin` keeps the target and the limits itself, it is the answer, without a step (not with `front`). Called again, or by
    several processes at once, with the same study and storage, it goes on with it, and waits for trials that others run: all
    return the same network.

    A study that has trials of other budgets, the target's or a limit's (`nas.guarantee` changes them where a device disagrees
    with its table), goes on: those of its trials that keep these budgets count, and at least `more` are made under them. Asked
    again for budgets that it had before, it answers as it did then: trials that were made later, under others, do not count.

    Args:
        evaluate: a network to its loss and accuracy. Asked for networks that keep the target and the limits, and for `begin`.
        table: anything with `predict_ms(arch)`.
        budget: milliseconds.
        begin: the network that the trajectory starts from.
        study_name: see `nas.shared_study.study_name`.
        storage: a file (Optuna's journal), the URL of a database (`postgresql://...`, `mysql://...`, `sqlite:///...`), of
            `redis://...` or of Optuna's proxy `grpc://host:port`, or an Optuna storage.
        sampler: tpe or nsga2.
        trials: how many networks the study evaluates, all processes together.
        more: see above; None: a quarter of `trials`.
        known: networks that are evaluated first, in this order: those of them that keep the target and the limits.
        limits: what a network must keep beside the target: parameters, or the milliseconds on another device.
        score: what is minimised: the loss, or the error (1 - accuracy).
        front: minimise milliseconds too: the study's `best_trials` are the front.

    Raises:
        NothingFits: the budget or a limit is below the space's smallest network and all known ones, or no network is found
            that keeps them all.
        InputError: the budget is not positive; the sampler or the score is unknown; the storage cannot be used; a known
            network is not in the space; or `evaluate` gives no finite number for what is minimised.
        Failed: the storage went away meanwhile.
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
    networks = Networks(space, table, target.ms, limits, known)
    if networks.excess(networks.least) > 0:
        least_ms = min(table.predict_ms(arch) for arch in networks.sure)
        if target.ms < least_ms:
            raise NothingFits(
                f"the target of {target.ms:g} ms is below the fastest network that is known of {space.name}: "
                f"give at least {rounded_up(least_ms)} ms"
            )
        check_limits(space, limits)
    start = Step(table.predict_ms(begin), evaluate(begin), (), networks.limited(begin))
    if networks.excess(begin) == 0 and not front:
        return Trajectory(begin, (), begin, start.ms, start.evaluation)
    first = [networks.params(arch) for arch in known if networks.excess(networks.member(arch)) == 0]
    chosen = Sampler(sampler, networks, first, seed)
    metrics = ["loss" if score == "loss" else "error", *(["ms"] if front else [])]
    run = _Run(opened(study_name, storage, chosen, metrics), chosen, evaluate, score, front, start)
    with within_reach(storage):
        run.finish(trials, min(more, trials))
        options = tuple(run.best(trials, min(more, trials))[:OPTIONS])
    if not options:
        raise NothingFits(
            f"no network of {space.name} was found that keeps the target of {target.ms:g} ms and the limits together: give "
            "larger ones"
        )
    step = Step(start.ms, start.evaluation, options, start.figures)
    return Trajectory(begin, (step,), step.taken.arch, step.taken.ms, step.taken.evaluation)


class _Run:
    """One process's part of a study."""

    def __init__(
        self,
        study: Study,
        sampler: Sampler,
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
        self.others = Others()

    def finish(self, trials: int, more: int) -> None:
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
                    self._evaluate(trial)
                fruitless = fruitless + 1 if dropped in ("tried", "misses") and self.sampler.exhausted else 0

    def best(self, trials: int, more: int) -> list[Option]:
        """Return the networks of the study that keep the target and the limits, the best first.

        Where the study was done with these budgets (`finish`) at the last trial made under them, no later trial counts.
        """
        found = [t for t in self._trials(TrialState.COMPLETE) if self.networks.kept_by(t)]
        end = 1 + max((t.number for t in found if self._made_under_these(t)), default=-1)
        kept, fresh = self._done(below=end)
        if kept >= trials and fresh >= more:
            found = [t for t in found if t.number < end]
        found.sort(key=lambda t: (t.values[0], t.user_attrs["ms"], t.number))
        return [self._option(t.number, self.networks.arch(t.params), _evaluation(t)) for t in found]

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def _done(self, below: int | None = None) -> tuple[int, int]:
        """Return how many trials (of a number below) keep the target and the limits, and how many were made under them."""
        done = [
            t for t in self._trials(TrialState.COMPLETE) if self.networks.kept_by(t) and (below is None or t.number < below)
        ]
        return len(done), sum(map(self._made_under_these, done))

    def _made_under_these(self, trial: FrozenTrial) -> bool:
        return bool(trial.user_attrs.get("budgets") == self.networks.budgets)

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
        known = {"worker": worker(), "network": described(arch), "budgets": self.networks.budgets, **figures}
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
        if any(key(t.params) == key(trial.params) for t in before):
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

    def _evaluate(self, trial: Trial) -> None:
        """Evaluate a trial's network, and end the trial, unless another process has meanwhile."""
        arch = self.networks.arch(trial.params)
        try:
            with beating(trial):
                evaluation = self.evaluate(arch)
            value = evaluation.charge(self.score)
            if not math.isfinite(value):
                with suppress(RuntimeError):
                    trial.set_user_attr("dropped", "no number")  # the next one is drawn by another seed
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
                return
        say(f"trial {trial.number} was taken for lost: its network will be proposed again")

    def _end(self, number: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """End a trial, unless another process has: then False."""
        with suppress(RuntimeError):
            ended = self.study.tell(number, values, state, skip_if_finished=True)
            return ended.state == state
        return False

    def _option(self, number: int, arch: ArchConfig, evaluation: Evaluation) -> Option:
        ms = self.networks.table.predict_ms(arch)
        saved_ms = self.start.ms - ms
        drop = max(evaluation.charge(self.score) - self.start.evaluation.charge(self.score), 0.0)
        score = drop / saved_ms if saved_ms > 0 else math.nan
        figures = self.networks.limited(arch)
        return Option(f"trial {number}", -1, arch, ms, saved_ms, evaluation, score, saved_ms, figures)


def _evaluation(trial: FrozenTrial) -> Evaluation:
    return Evaluation(trial.user_attrs["loss"], trial.user_attrs.get("accuracy", math.nan))
