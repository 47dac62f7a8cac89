"""A study evaluates as many networks as it has trials, each of them under the target, whoever runs it and however often."""

import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from refusals import refusal
from small_spaces import stage_space

from nas import proposals, shared_study, tuning
from nas.kept import described
from nas.profilers.bench import Failed
from nas.shared_study import study_name
from nas.trajectory import Evaluation, Limit, SamplerName, Trajectory
from nas.tuning import tune
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.space import SearchSpace

SPACE = SearchSpace(
    "three",
    64,
    10,
    (
        stage_space((8, 16, 24), 2, 2, "mb4d", "identity"),
        stage_space((16, 24, 40), 2, 3, "mb4d", "mb3d", "identity"),
        stage_space((32,), 2, 2, "mb4d", "mb3d", "identity"),
    ),
)
BUDGET_MS = 4.0  # about one random network in seven is as fast
FULL = SPACE.largest


@dataclass(frozen=True)
class Table:
    """1 ms for everything that is no block, and for each block its width in channels times its kind's ms."""

    ms_per_channel: Mapping[str, float] = field(default_factory=lambda: {"mb4d": 1 / 16, "mb3d": 1 / 8, "identity": 0})

    def predict_ms(self, arch: ArchConfig) -> float:
        return 1 + sum(self.ms_per_channel[block.kind] * block.dim for stage in arch.stages for block in stage.blocks)


def loss_of(arch: ArchConfig) -> float:
    """1 for the best network; more for each slot that is not a token block, by the slot's weight, and for narrow stages."""
    loss = 1.0
    for i, stage in enumerate(arch.stages):
        loss += 0.3 * (1 - stage.width / SPACE.stages[i].widths[-1])
        loss += sum({"mb3d": 0.0, "mb4d": 0.04, "identity": 0.2}[b.kind] * (1 + i + j) for j, b in enumerate(stage.blocks))
    return loss


@dataclass
class Evaluator:
    """An additive loss that keeps what it was asked, in a file where processes share it."""

    asked: list[ArchConfig] = field(default_factory=list)
    file: Path | None = None
    seconds: float = 0.0
    hang_at: int | None = None
    beside: Path | None = None  # the file of another process: the first candidate waits, for a minute, until that one has one

    def __call__(self, arch: ArchConfig) -> Evaluation:
        self.asked.append(arch)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(described(arch) + "\n")
        if self.beside is not None and len(self.asked) == 2:
            until = time.monotonic() + 60
            while time.monotonic() < until and not (self.beside.exists() and self.beside.read_text().count("\n") >= 2):
                time.sleep(0.02)
        time.sleep(3600.0 if len(self.asked) == self.hang_at else self.seconds)
        return Evaluation(loss_of(arch), 1 / loss_of(arch))

    @property
    def candidates(self) -> list[ArchConfig]:
        """What was asked, the network that the trajectory begins with aside."""
        assert self.asked[0] == FULL
        return self.asked[1:]


def tuned(
    storage: str | Path | BaseStorage,
    evaluate: Evaluator | None = None,
    *,
    budget_ms: float = BUDGET_MS,
    sampler: SamplerName = "tpe",
    trials: int = 25,
    seed: int = 0,
    known: Sequence[ArchConfig] = (),
    limits: Sequence[Limit] = (),
    front: bool = False,
    more: int | None = None,
) -> Trajectory:
    return tune(
        SPACE,
        evaluate or Evaluator(),
        Table(),
        budget_ms,
        FULL,
        study_name="study",
        storage=storage,
        sampler=sampler,
        trials=trials,
        seed=seed,
        known=known,
        limits=limits,
        front=front,
        more=more,
    )


def opened(storage: Path | BaseStorage) -> Study:
    if isinstance(storage, Path):
        storage = JournalStorage(JournalFileBackend(str(storage)))
    return optuna.load_study(study_name="study", storage=storage)


def complete(storage: Path | BaseStorage) -> list[FrozenTrial]:
    return opened(storage).get_trials(states=(TrialState.COMPLETE,))


@pytest.fixture
def storage() -> InMemoryStorage:
    """For one process alone: a file would be waited for at every write."""
    return InMemoryStorage()


def networks() -> list[ArchConfig]:
    """Every network of the space, each once."""
    kinds = [itertools.product(stage.kinds, repeat=stage.depth) for stage in SPACE.stages]
    found = itertools.product(itertools.product(*(s.widths for s in SPACE.stages)), itertools.product(*kinds))
    return list(dict.fromkeys(SPACE.arch(widths, chosen) for widths, chosen in found))


SEEDS = [
    SPACE.arch((8, 16, 32), (("identity",) * 2, ("identity", "identity", "mb3d"), ("identity",) * 2)),  # 3 ms
    SPACE.arch((24, 40, 32), (("mb4d",) * 2, ("identity",) * 3, ("identity",) * 2)),  # 4 ms
]
TOO_SLOW = SPACE.arch((8, 16, 32), (("mb4d",) * 2, ("identity",) * 3, ("identity", "mb3d")))  # 6 ms


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_every_trial_is_another_network_under_the_target(storage: InMemoryStorage, sampler: SamplerName) -> None:
    evaluate = Evaluator()
    found = tuned(storage, evaluate, sampler=sampler, trials=45)  # more than two generations of NSGA-II

    assert len(evaluate.candidates) == len(set(evaluate.candidates)) == 45
    assert all(Table().predict_ms(arch) <= BUDGET_MS for arch in evaluate.candidates)
    assert [t.user_attrs["network"] for t in opened(storage).trials] == [described(a) for a in evaluate.candidates]
    best = min(evaluate.candidates, key=loss_of)
    assert found.evaluation.loss == loss_of(best) and found.arch == found.steps[0].taken.arch
    assert found.ms == Table().predict_ms(found.arch)


def test_it_comes_closer_to_the_best_network_than_random_ones_do() -> None:
    under = sorted(loss_of(arch) for arch in networks() if Table().predict_ms(arch) <= BUDGET_MS)
    near = under[len(under) // 50]  # 30 random networks under the target have one in this best fiftieth in 46 % of cases
    assert [tuned(InMemoryStorage(), trials=30, seed=seed).evaluation.loss <= near for seed in range(4)] == [True] * 4


def test_options_are_the_best_networks_of_the_study_the_best_first(storage: InMemoryStorage) -> None:
    evaluate = Evaluator()
    found = tuned(storage, evaluate)
    (step,) = found.steps
    assert [o.evaluation.loss for o in step.options] == sorted(map(loss_of, evaluate.candidates))[: tuning.OPTIONS]
    assert (found.start, step.ms, step.evaluation.loss) == (FULL, Table().predict_ms(FULL), loss_of(FULL))
    taken = step.taken
    assert taken.saved_ms == step.ms - taken.ms
    assert taken.score == pytest.approx((taken.evaluation.loss - loss_of(FULL)) / taken.saved_ms)
    assert next(iter(found.records()))["action"] == taken.action


def test_known_networks_come_first_and_are_never_beaten_by_the_answer(storage: InMemoryStorage) -> None:
    evaluate = Evaluator()
    found = tuned(storage, evaluate, known=[SEEDS[0], TOO_SLOW, SEEDS[1].without_identity()], trials=5)
    assert evaluate.candidates[:2] == SEEDS
    assert TOO_SLOW not in evaluate.asked and len(evaluate.candidates) == 5
    assert found.evaluation.loss <= min(map(loss_of, SEEDS))


def test_parameters_are_named_by_stage_and_slot(storage: InMemoryStorage) -> None:
    tuned(storage, known=SEEDS, trials=2)
    trial = complete(storage)[1]
    assert trial.params == {
        "stage1.width": 24,
        "stage1.slot1": "mb4d",
        "stage1.slot2": "mb4d",
        "stage2.width": 40,
        "stage2.slot1": "identity",
        "stage2.slot2": "identity",
        "stage2.slot3": "identity",
        "stage3.slot1": "identity",  # stage 3 has one width: nothing to choose
        "stage3.slot2": "identity",
    }
    attributes = trial.user_attrs
    assert trial.value == attributes["loss"] == loss_of(SEEDS[1])
    assert (attributes["accuracy"], attributes["ms"], attributes["budgets"]) == (1 / loss_of(SEEDS[1]), 4.0, {"ms": BUDGET_MS})


def test_the_same_seed_gives_the_same_study() -> None:
    asked = []
    for seed in (1, 1, 2):
        evaluate = Evaluator()
        tuned(InMemoryStorage(), evaluate, seed=seed, trials=20)
        asked.append(evaluate.asked)
    assert asked[0] == asked[1] != asked[2]


def test_limits_are_kept_like_the_target(storage: InMemoryStorage) -> None:
    other = Table({"mb4d": 1 / 8, "mb3d": 1 / 32, "identity": 0})  # a device that is slow at what the first is quick at
    limits = [Limit("ms_elsewhere", other.predict_ms, 3.0)]
    evaluate = Evaluator()
    found = tuned(storage, evaluate, limits=limits)
    assert len(evaluate.candidates) == 25
    assert all(t.predict_ms(a) <= m for a in evaluate.candidates for t, m in ((Table(), BUDGET_MS), (other, 3.0)))
    assert found.steps[0].taken.figures == {"ms_elsewhere": other.predict_ms(found.arch)}
    assert complete(storage)[0].user_attrs["ms_elsewhere"] <= 3.0


def test_the_error_may_be_what_is_minimised(storage: InMemoryStorage) -> None:
    evaluate = Evaluator()
    found = tune(
        SPACE, evaluate, Table(), BUDGET_MS, FULL, study_name="study", storage=storage, trials=8, score="accuracy", seed=3
    )
    assert found.evaluation.accuracy == max(1 / loss_of(arch) for arch in evaluate.candidates)
    assert [t.value for t in complete(storage)] == [1 - 1 / loss_of(arch) for arch in evaluate.candidates]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_front_has_two_objectives(storage: InMemoryStorage, sampler: SamplerName) -> None:
    evaluate = Evaluator()
    found = tuned(storage, evaluate, sampler=sampler, front=True, trials=30)
    points = [(loss_of(arch), Table().predict_ms(arch)) for arch in evaluate.candidates]
    assert [tuple(trial.values) for trial in complete(storage)] == points
    best = {tuple(trial.values) for trial in opened(storage).best_trials}
    assert best == {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert found.evaluation.loss == min(points)[0]


# -- Goes on -----------------------------------------------------------------------------------------------------------


def test_a_finished_study_is_not_evaluated_again(storage: InMemoryStorage) -> None:
    first, again = Evaluator(), Evaluator()
    found = tuned(storage, first)
    assert tuned(storage, again) == found
    assert again.candidates == []


def test_a_tighter_budget_counts_the_trials_that_keep_it_and_adds_some(storage: InMemoryStorage) -> None:
    tuned(storage, trials=20)
    kept = sum(trial.user_attrs["ms"] <= 3.5 for trial in complete(storage))
    assert 0 < kept < 20
    evaluate = Evaluator()
    found = tuned(storage, evaluate, budget_ms=3.5, trials=20)
    assert len(evaluate.candidates) == 20 - kept
    assert found.ms <= 3.5 and all(Table().predict_ms(arch) <= 3.5 for arch in evaluate.candidates)

    looser = Evaluator()  # all trials keep it: it is the new ones that are counted
    tuned(storage, looser, budget_ms=3.9, trials=20, more=7)
    assert len(looser.candidates) == 7
    assert len({trial.user_attrs["network"] for trial in complete(storage)}) == 20 + (20 - kept) + 7


def test_a_budget_that_a_study_was_done_with_has_the_same_answer_after_a_tighter_one() -> None:
    """A search that is killed after a miss asks again for what it was given before it tightened the budget."""
    better = 0
    for seed in range(6):
        storage = InMemoryStorage()
        budgets = (BUDGET_MS, 0.94 * BUDGET_MS, BUDGET_MS)
        first, tighter, again = (tuned(storage, budget_ms=ms, trials=8, more=8, seed=seed) for ms in budgets)
        assert again == first
        better += tighter.evaluation.loss < first.evaluation.loss
        assert tuned(storage, budget_ms=0.94 * BUDGET_MS, trials=8, more=8, seed=seed) == tighter
        assert len(complete(storage)) == 16
        more = tuned(storage, trials=20, seed=seed)  # a larger study counts all that it has
        assert more.evaluation.loss == min(trial.value for trial in complete(storage))
    assert better, "the networks of the tighter budget are no worse for the first one"


def test_another_limit_is_another_budget_too(storage: InMemoryStorage) -> None:
    """With several devices the milliseconds of the second are a limit, and only theirs may be corrected."""
    other = Table({"mb4d": 1 / 8, "mb3d": 1 / 32, "identity": 0})
    asked = []
    for at_most in (3.0, 3.2, 3.2):  # all trials keep the looser limit: it is the new ones that are counted
        evaluate = Evaluator()
        tuned(storage, evaluate, limits=[Limit("ms_elsewhere", other.predict_ms, at_most)], trials=12, more=5)
        asked.append(len(evaluate.candidates))
    assert asked == [12, 5, 0]
    assert complete(storage)[-1].user_attrs["budgets"] == {"ms": BUDGET_MS, "ms_elsewhere": 3.2}


def test_an_evaluation_that_fails_is_no_trial_that_counts(storage: InMemoryStorage) -> None:
    class Broken(Evaluator):
        def __call__(self, arch: ArchConfig) -> Evaluation:
            found = super().__call__(arch)
            return Evaluation(math.nan) if len(self.asked) == 4 else found

    broken = Broken()
    message = refusal(lambda: tuned(storage, broken, trials=6))
    assert "gives nan" in message
    evaluate = Evaluator()
    tuned(storage, evaluate, trials=6)
    assert evaluate.candidates[0] != broken.asked[-1], "what gives no number would give none again"
    assert len(evaluate.candidates) == 4  # two were done, the third has failed
    assert [t.state.name for t in opened(storage).trials] == ["COMPLETE"] * 2 + ["FAIL"] + ["COMPLETE"] * 4


def test_what_a_user_enqueues_is_evaluated_if_it_keeps_the_target(storage: InMemoryStorage) -> None:
    tuned(storage, trials=3)
    study = opened(storage)
    names = proposals.Networks(SPACE, Table(), BUDGET_MS, [])
    for arch in (TOO_SLOW, SEEDS[0]):
        study.enqueue_trial(names.params(arch))
    evaluate = Evaluator()
    tuned(storage, evaluate, trials=6)
    assert len(evaluate.candidates) == 3 and TOO_SLOW not in evaluate.asked and SEEDS[0] in evaluate.asked
    assert [t.state.name for t in opened(storage).trials].count("PRUNED") == 1


def test_a_space_with_few_networks_ends_the_study_early(storage: InMemoryStorage, capsys: pytest.CaptureFixture[str]) -> None:
    under = {arch for arch in networks() if Table().predict_ms(arch) <= 2.0}
    evaluate = Evaluator()
    found = tuned(storage, evaluate, budget_ms=2.0, trials=len(under) + 10)
    assert set(evaluate.candidates) == under and len(evaluate.candidates) == len(under)
    assert found.evaluation.loss == min(map(loss_of, under))
    assert "no other network" in capsys.readouterr().err


def test_a_target_that_the_first_network_meets_needs_no_study(storage: InMemoryStorage) -> None:
    found = tuned(storage, budget_ms=1000.0)
    assert (found.arch, found.steps) == (FULL, ())
    assert not storage.get_all_studies()


class SlowNarrow(Table):
    """A device on which the narrower width of the first stage costs 1 ms more."""

    def predict_ms(self, arch: ArchConfig) -> float:
        return super().predict_ms(arch) + (arch.stages[0].width == 8)


QUICK = SPACE.arch((16, 16, 32), (("identity",) * 2, ("identity",) * 3, ("identity",) * 2))  # 1 ms; the smallest takes 2 there


def test_a_known_network_may_be_faster_than_the_smallest(storage: InMemoryStorage) -> None:
    evaluate, elsewhere = Evaluator(), Limit("ms_elsewhere", SlowNarrow().predict_ms, 1.5)

    def found(table: Table, *known: ArchConfig, limits: Sequence[Limit] = ()) -> float:
        name = f"{type(table).__name__} {len(limits)}"
        return tune(
            SPACE, evaluate, table, 1.5, FULL, study_name=name, storage=storage, trials=2, known=known, limits=limits
        ).ms

    assert refusal(lambda: found(SlowNarrow())).endswith("give at least 2 ms")
    assert "ms_elsewhere" in refusal(lambda: found(Table(), limits=[elsewhere]))
    assert found(SlowNarrow(), QUICK) == found(Table(), QUICK, limits=[elsewhere]) == 1.0
    assert {arch.widths[0] for arch in evaluate.asked} == {16, 24}


def test_what_cannot_be_changed_to_keep_the_target_becomes_the_fastest_known_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposals.Networks, "neighbours", lambda self, params, rng: iter(()))
    networks = proposals.Networks(SPACE, SlowNarrow(), 1.5, [], [QUICK])
    assert networks.arch(networks.repaired(networks.params(FULL), random.Random(0))) == QUICK


def test_a_study_ends_where_nothing_keeps_target_and_limits_together(storage: InMemoryStorage) -> None:
    narrow = Limit("width", lambda arch: arch.stages[0].width, 8)
    with pytest.raises(InputError, match="and the limits together"):
        tune(SPACE, Evaluator(), SlowNarrow(), 1.5, FULL, study_name="s", storage=storage, known=[QUICK], limits=[narrow])


# -- Many processes ----------------------------------------------------------------------------------------------------


def work(
    storage: Path, log: Path, seconds: float, hang_at: int | None, trials: int, seed: int, beside: Path | None = None
) -> None:
    """What a process of its own does: its part of the study, and what it found."""
    evaluate = Evaluator(file=log, seconds=seconds, hang_at=hang_at, beside=beside)
    found = tuned(storage, evaluate, trials=trials, seed=seed, known=SEEDS)
    log.with_suffix(".found").write_text(found.arch.to_yaml())


def started(*args: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=work, args=args)
    process.start()
    return process


def test_two_processes_finish_a_study_together(tmp_path: Path) -> None:
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    processes = [started(tmp_path / "s", log, 0.05, None, 30, 0, other) for log, other in zip(logs, logs[::-1], strict=True)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    asked = [log.read_text().splitlines()[1:] for log in logs]  # the first is the network that both begin with
    assert all(asked), "one of them had nothing to do"
    done = complete(tmp_path / "s")
    assert len(done) == len(asked[0] + asked[1]) == len(set(asked[0] + asked[1])) == 30
    assert len({trial.user_attrs["worker"][-1] for trial in done}) == 2
    texts = [log.with_suffix(".found").read_text() for log in logs]
    best = min(done, key=lambda trial: trial.value)
    assert texts[0] == texts[1] and best.user_attrs["network"] == described(SPACE.fit(load(texts[0], tmp_path)))


def load(text: str, folder: Path) -> ArchConfig:
    (folder / "found.yaml").write_text(text)
    return ArchConfig.load(folder / "found.yaml")


def test_a_study_goes_on_after_a_kill(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    process = started(tmp_path / "s", log, 0.0, 8, 20, 0)
    while not log.exists() or len(log.read_text().splitlines()) < 8:  # in the middle of the seventh trial
        assert process.is_alive()
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    before = log.read_text().splitlines()[1:]
    assert len(complete(tmp_path / "s")) == 6

    evaluate = Evaluator()
    tuned(tmp_path / "s", evaluate, trials=20, known=SEEDS)
    assert len(evaluate.candidates) == 14
    assert not {described(arch) for arch in evaluate.candidates} & set(before[:6])
    states = [trial.state.name for trial in opened(tmp_path / "s").trials]
    assert states == ["COMPLETE"] * 6 + ["FAIL"] + ["COMPLETE"] * 14
    whole = Evaluator()
    tuned(tmp_path / "whole", whole, trials=20, known=SEEDS)
    assert [described(arch) for arch in whole.candidates[6:]] == [described(arch) for arch in evaluate.candidates]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a study's process sees; they pass where it sleeps."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    for module in (tuning, shared_study):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    return now


def test_a_process_elsewhere_is_lost_when_it_is_silent(storage: InMemoryStorage, clock: list[float]) -> None:
    tuned(storage, trials=3)
    trial = opened(storage).ask()
    trial.set_user_attr("worker", ["elsewhere", "", 1])
    others = shared_study.Others()
    for beat in range(4):  # as long as it is heard of it is there, however slow
        trial.set_user_attr("beat", beat)
        assert not others.lost(opened(storage).trials[-1])
        clock[0] += 0.9 * shared_study.GRACE_S
    began = clock[0]
    tuned(storage, trials=4)  # waits until the other is lost, and takes its place
    assert [t.state.name for t in opened(storage).trials] == ["COMPLETE"] * 3 + ["FAIL", "COMPLETE"]
    assert clock[0] - began == pytest.approx(shared_study.GRACE_S, abs=2 * tuning.POLL_S)


def test_of_two_last_trials_the_later_one_gives_way(
    storage: InMemoryStorage, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    tuned(storage, trials=4)
    ask = Study.ask

    def after_another(study: Study, distributions: Mapping[str, BaseDistribution]) -> Trial:
        monkeypatch.setattr(Study, "ask", ask)
        ask(study, dict(distributions)).set_user_attr("worker", ["elsewhere", "", 1])  # it has the last place, and goes silent
        return ask(study, dict(distributions))

    monkeypatch.setattr(Study, "ask", after_another)
    tuned(storage, trials=5)
    trials = opened(storage).trials[4:]
    assert [t.state.name for t in trials] == ["FAIL", "FAIL", "COMPLETE"]
    assert trials[1].user_attrs["dropped"] == "too many"


class BeforeAll:
    """A study as a process saw it that began before there were any trials."""

    def __init__(self, study: Study) -> None:
        self.study = study

    def __getattr__(self, name: str) -> object:
        return getattr(self.study, name)

    def get_trials(self, **_: object) -> list[FrozenTrial]:
        return []


@dataclass
class TimedEvaluator(Evaluator):
    """It also keeps the time of each evaluation."""

    clock: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def __call__(self, arch: ArchConfig) -> Evaluation:
        self.times.append(self.clock[0])
        return super().__call__(arch)


def run_elsewhere(storage: BaseStorage, *archs: ArchConfig) -> list[Trial]:
    """Let trials of these networks run in another place."""
    study, networks = opened(storage), proposals.Networks(SPACE, Table(), BUDGET_MS, [])
    trials = []
    for arch in archs:
        study.enqueue_trial(networks.params(arch))
        trials.append(study.ask(networks.distributions))
        trials[-1].set_user_attr("worker", ["elsewhere", "", "", 1])
    return trials


def test_processes_that_begin_at_once_do_not_wait_for_each_other(
    storage: InMemoryStorage, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    """They propose the same known network, as they do not see each other yet: then another, not none."""
    optuna.create_study(study_name="study", storage=storage)
    run_elsewhere(storage, SEEDS[0])
    sample = proposals.Sampler.sample_relative

    def sampled(self: Any, study: Any, trial: FrozenTrial, space: Any) -> Any:
        return sample(self, BeforeAll(study) if trial.number <= 2 * tuning.FRUITLESS else study, trial, space)  # type: ignore[arg-type]

    monkeypatch.setattr(proposals.Sampler, "sample_relative", sampled)
    evaluate = TimedEvaluator(clock=clock)
    tuned(storage, evaluate, known=SEEDS, trials=4)
    dropped = [t.user_attrs.get("dropped") for t in opened(storage).trials]
    assert dropped[: 2 * tuning.FRUITLESS + 2] == [None] + ["tried"] * 2 * tuning.FRUITLESS + [None]
    assert evaluate.times[:4] == [0.0] * 4  # three of four; the fourth trial is the other's, who goes silent


def test_a_network_is_taken_up_when_its_trial_fails_though_others_run(
    storage: InMemoryStorage, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    under = [arch for arch in networks() if Table().predict_ms(arch) <= 2.0]
    optuna.create_study(study_name="study", storage=storage)
    failing, running = run_elsewhere(storage, *under[-2:])
    sleep, evaluate = tuning.time.sleep, Evaluator()

    def slept(seconds: float) -> None:
        sleep(seconds)
        running.set_user_attr("beat", clock[0])
        failing.set_user_attr("beat", clock[0]) if clock[0] < 60 else opened(storage).tell(
            failing, state=TrialState.FAIL, skip_if_finished=True
        )
        if set(evaluate.candidates) == set(under[:-1]):
            opened(storage).tell(running, 1.0, skip_if_finished=True)
        assert clock[0] < 600, "it waits for trials that have nothing to do with it"

    monkeypatch.setattr(tuning.time, "sleep", slept)
    tuned(storage, evaluate, budget_ms=2.0, trials=len(under) + 10)
    assert set(evaluate.candidates) >= set(under[:-1])


def test_machines_of_one_name_are_told_apart(storage: InMemoryStorage) -> None:
    """Clones have one name and one number of the first namespace; a process number of one says nothing on the other."""
    optuna.create_study(study_name="study", storage=storage)
    (trial,) = run_elsewhere(storage, SEEDS[0])
    name, start, container, _ = shared_study.worker()
    for place, lost in (([name, start, container], True), ([name, "another start", container], False)):
        trial.set_user_attr("worker", [*place, 2**22 + 1])  # above the largest number of a process
        assert shared_study.Others().lost(opened(storage).trials[0]) is lost


def test_a_trial_that_was_taken_for_lost_does_not_count(storage: InMemoryStorage, capsys: pytest.CaptureFixture[str]) -> None:
    class Slow(Evaluator):
        def __call__(self, arch: ArchConfig) -> Evaluation:
            found = super().__call__(arch)
            if len(self.asked) == 3:
                opened(storage).tell(1, state=TrialState.FAIL)  # another process does not wait any longer
            return found

    evaluate = Slow()
    tuned(storage, evaluate, trials=4)
    assert len(complete(storage)) == 4 and len(evaluate.candidates) == 5
    assert "taken for lost" in capsys.readouterr().err


# -- Storages and refusals ---------------------------------------------------------------------------------------------


def test_any_storage_of_optuna(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    evaluate = {trials: Evaluator() for trials in (2, 3)}
    for trials, evaluator in evaluate.items():
        found = tune(
            SPACE,
            evaluator,
            Table(),
            BUDGET_MS,
            FULL,
            study_name="study",
            storage=url,
            trials=trials,
        )
    study = optuna.load_study(study_name="study", storage=url)
    assert len(study.trials) == sum(len(evaluator.candidates) for evaluator in evaluate.values()) == 3
    assert study.best_value == found.evaluation.loss == min(trial.value for trial in study.trials)
    assert study.metric_names == ["loss"]


def test_a_database_that_goes_away_is_told_in_one_line_and_the_study_goes_on(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"

    def renamed(table: str, name: str) -> None:
        with closing(sqlite3.connect(tmp_path / "s.db")) as database:
            database.execute(f"ALTER TABLE {table} RENAME TO {name}")

    class Away(Evaluator):
        def __call__(self, arch: ArchConfig) -> Evaluation:
            if len(self.asked) == 3:
                renamed("trials", "away")
            return super().__call__(arch)

    with pytest.raises(Failed) as failed:
        tuned(url, Away(), trials=4)
    message = str(failed.value)
    assert "s.db can no longer be used (" in message and "the same command goes on" in message and "\n" not in message
    renamed("away", "trials")
    evaluate = Evaluator()
    tuned(url, evaluate, trials=4)
    assert len(evaluate.candidates) == 2

    def wrong(arch: ArchConfig) -> Evaluation:
        raise ConnectionError("no fault of the storage")

    with pytest.raises(ConnectionError):
        tuned(url, wrong, trials=6)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [StorageInternalError("gone"), OSError(errno.ENOSPC, "No space left on device")])
def test_a_beat_that_is_not_heard_is_no_error_and_the_next_may_be(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_study, "BEAT_S", 0.0)
    said: list[int] = []
    heard, uncaught = threading.Event(), []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)

    class OneTrial:
        def set_user_attr(self, name: str, value: int) -> None:
            said.append(value)
            if value == 1:
                raise error
            heard.set()

    with shared_study.beating(OneTrial()):  # type: ignore[arg-type]
        assert heard.wait(60)
    assert said[:2] == [1, 2] and not uncaught


def test_studies_of_different_requests_have_different_names() -> None:
    request = {"target_ms": 4.0, "space": SPACE.to_yaml(), "seed": 0}
    name = study_name("three-4ms", request)
    assert name.startswith("three-4ms-") and name == study_name("three-4ms", dict(reversed(request.items())))
    assert name != study_name("three-4ms", {**request, "seed": 1})


def test_a_bad_storage_is_refused_in_one_line(tmp_path: Path) -> None:
    def refused(storage: str) -> str:
        return refusal(lambda: tuned(storage))

    assert "neither a file nor a URL" in refused("sqlite:study.db") and "neither" in refused("")
    assert "sqlite:////" in refused("sqlite:////no/such/folder/study.db")
    assert "unheard" in refused("unheard://somewhere/study")
    secret = refused("postgresql+nodriver://me:secret@host/studies")
    assert "me:***@host" in secret and "secret" not in secret
    (tmp_path / "journal").write_text("no journal\n")
    assert "journal" in refused(str(tmp_path / "journal"))


def test_what_cannot_be_met_is_refused(storage: InMemoryStorage) -> None:
    assert refusal(lambda: tuned(storage, budget_ms=0.5)).endswith("give at least 1 ms")
    least = Limit("blocks", lambda arch: 3.0 + len(arch.without_identity().stages[0].blocks), 2.0)
    assert "2 blocks" in refusal(lambda: tuned(storage, limits=[least]))
    assert "nsga2" in refusal(lambda: tuned(storage, sampler="nsga"))  # type: ignore[arg-type]
    assert "trials" in refusal(lambda: tuned(storage, trials=0))
    elsewhere = SearchSpace("other", 64, 10, (stage_space((48,), 2, 1, "mb4d", "identity"),)).smallest
    assert "strides" in refusal(lambda: tuned(storage, known=[elsewhere]))


def test_a_torn_last_line_of_a_journal_is_no_trial_and_the_study_goes_on(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    found = tuned(whole, trials=8)
    tuned(torn, trials=5)
    with torn.open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    evaluate = Evaluator()
    assert tuned(torn, evaluate, trials=8) == found
    assert len(evaluate.candidates) == 3
    assert all(json.loads(line) for line in torn.read_text().splitlines())


def test_a_line_that_is_torn_while_another_process_works_is_cut_off_by_it(tmp_path: Path) -> None:
    torn = tmp_path / "torn"

    class Torn(Evaluator):
        def __call__(self, arch: ArchConfig) -> Evaluation:
            if len(self.asked) == 3:
                with torn.open("ab") as file:
                    file.write(b'{"op_code":4,"wor')
            return super().__call__(arch)

    evaluate = Torn()
    tuned(torn, evaluate, trials=5)
    assert len(complete(torn)) == len(evaluate.candidates) == 5


@pytest.mark.parametrize("text", ["to buy: milk\n", "to buy: milk\nand more", '{"a": 1}', "SQLite format 3"])
def test_a_file_that_is_no_journal_is_left_as_it_is(text: str, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text(text)
    assert "notes cannot be used (it is no journal of Optuna)" in refusal(lambda: tuned(tmp_path / "notes"))
    assert (tmp_path / "notes").read_text() == text


def test_a_full_disk_is_told_as_such_when_a_study_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JournalFileBackend, "append_logs", full)
    with pytest.raises(OSError, match="No space left"):
        tuned(tmp_path / "s")


def test_a_process_that_was_killed_while_it_wrote_blocks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves its lock, in a folder that is usually given as a relative path."""
    monkeypatch.chdir(tmp_path)
    found = shared_study._storage("run/study.journal")
    assert isinstance(found, JournalStorage) and isinstance(found._backend, JournalFileBackend)
    found._backend._lock.acquire()  # and no release
    seconds = itertools.count(step=0.01)  # as time passes at every look, so does it for one that looks without sleeping
    slept = []
    clock = SimpleNamespace(monotonic=lambda: slept_enough(next(seconds) + sum(slept)), sleep=slept.append)

    def slept_enough(now: float) -> float:
        assert now < 120, "it waits for ever"
        return now

    monkeypatch.setattr("optuna.storages.journal._file.time", clock)
    optuna.create_study(storage=shared_study._storage("run/study.journal"), study_name="another")
    assert slept, "it did wait for the lock"
    assert not list(Path("run").glob("*.lock"))
