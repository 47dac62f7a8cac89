"""The stages of one search, from a supernet to a checked network: each reads files and writes files of the run's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save as save_safetensors

from nas.about import note, version_of
from nas.checkpoints import Pretrained
from nas.data import ImageData
from nas.distributed import in_all, shared
from nas.evaluation import Evaluator, accuracy_of
from nas.guarantee import Goal, Outcome, meet
from nas.judging import (
    additivity_of,
    deployed_weights,
    drops_of,
    evaluator_of,
    found_network,
    report_signal,
)
from nas.kept import (
    Checks,
    Remembered,
    described,
    measurements_file,
    network_name,
    write_complexity,
    write_csv,
    write_importance,
)
from nas.lookup import OnDevice
from nas.pretrained import as_given, layers_kept, on_data, pretrained_supernet
from nas.progress import say
from nas.recovery import Recovered
from nas.settings import SupernetSettings
from nas.slimming import MobileEfficiency, start_network
from nas.strategies import (
    FRONTIER_COLUMNS,
    Budgeted,
    Scores,
    Study,
    choose,
    countable,
    fastest_ms,
    frontier_records,
    limits_of,
    telling_steps,
)
from nas.supernet_training import logits_of, train_supernet
from nas.throughput import COLUMNS as THROUGHPUT_COLUMNS
from nas.throughput import Finalist, Found, GroupedPredictor, best_of, records, train_finalists, usable_ways
from nas.trajectory import Trajectory
from supernet.arch import ArchConfig, MultiplexSpec
from supernet.errors import InputError
from supernet.files import write_atomically
from supernet.model import count
from supernet.space import SearchSpace
from supernet.specs import knobs_of
from supernet.weights import AnySupernet

ADDITIVITY_NETWORKS = 50  # on which the sum of drops is checked where it decides
CANDIDATE = "candidate.yaml"  # a network that might be better and is to be measured on a device that is elsewhere


@dataclass(frozen=True)
class Work:
    """A request whose parts were found and fit together."""

    devices: tuple[OnDevice, ...]
    space: SearchSpace
    train_size: int
    data: ImageData
    settings: SupernetSettings
    strategy: str
    seed: int
    folder: Path
    given: Pretrained | None
    again: bool = False
    """Whether the folder has a result, which this one's is to replace."""

    def checks(self) -> list[Checks]:
        """Return what is known of each device's networks, and measures them where it is this machine's."""
        n = len(self.devices)
        return [Checks(self.folder / measurements_file(device.name, n), device.table) for device in self.devices]


@dataclass(frozen=True)
class Judged:
    """A trained supernet and what it says of the networks: everything that a strategy goes by.

    `begin` and `original`: with --init, the network to begin with, and the same trained on the images. `additivity`: how far
    the drops add up, where that was checked.
    """

    supernet: AnySupernet
    evaluator: Evaluator
    evaluate: Remembered
    scores: Scores
    importance_from: str
    additivity: dict[str, float | None] | None
    begin: ArchConfig | None
    original: torch.nn.Sequential | None


def carry_out(work: Work) -> None:
    """Train, judge, search, measure, and write what was found to the run's folder."""
    judged = _judged(work)
    outcomes = _outcomes(work, judged)
    finalists: list[Finalist] = []
    mux = None
    if len(outcomes) > 1:
        finalists = _finalists(work, judged, outcomes)
        mux = best_of(finalists).arch.mux
    _write(work, judged, outcomes[mux], mux, finalists)


def _judged(work: Work) -> Judged:
    """Train the supernet, and judge by it; write what is judged."""
    space, data, settings, folder = work.space, work.data, work.settings, work.folder
    supernet, begin, original = _supernet(work)
    logits = logits_of(supernet, settings) if begin is None else None
    base = begin or (space.largest if logits is None else start_network(space, logits))
    evaluator = evaluator_of(supernet, base, data, settings, folder)
    scored = Recovered(evaluator, data, settings, work.seed) if settings.recovery_steps else evaluator
    evaluate = Remembered(shared(scored), folder / "evaluations.csv")
    drops = drops_of(space, base, evaluate, settings.drop_pairs)
    drops = countable(space, drops, work.devices[0].table)
    drops.save(folder / "drops.csv")
    write_complexity(folder / "layers.csv", space)
    importance = logits if logits is not None else drops.importance()
    write_importance(folder / "importance.csv", space, importance)
    start = begin or start_network(space, importance)
    report_signal(space, start, evaluate, len(data.score), trained_here=begin is None)
    networks = settings.additivity_networks or (ADDITIVITY_NETWORKS if work.strategy == "exact" else 0)
    additivity = additivity_of(space, drops, evaluate, networks, work.seed, folder)
    tables = [device.table for device in work.devices]
    write_csv(folder / "frontier.csv", frontier_records(space, drops, tables), FRONTIER_COLUMNS)
    scores = Scores(space, start, importance, drops, evaluate, settings.score)
    source = "logits" if logits is not None else "drops"
    return Judged(supernet, evaluator, evaluate, scores, source, additivity, begin, original)


def _outcomes(work: Work, judged: Judged) -> dict[MultiplexSpec | None, Outcome]:
    """Search, and measure, for each way of grouping images: None, a pass for each, and for throughput those of the space."""
    devices, space, settings = work.devices, work.space, work.settings
    ways: tuple[MultiplexSpec | None, ...] = (None,)
    if settings.objective == "throughput":
        ways = (None, *usable_ways(space, devices[0].table))
    elif space.mux:
        own_pass = f"the objective is {settings.objective}, so each image has a pass of its own"
        say(f"{own_pass}: the groups (mux) of {space.name} are left out")
    checks = work.checks()
    mes = efficiency_of(settings)
    study = study_of(work) if work.strategy == "optuna" else None

    def found_for(mux: MultiplexSpec | None) -> Outcome:
        predictors = [GroupedPredictor(d.table, space, mux) if mux is not None else d.table for d in devices]
        limits = limits_of(space, mux, settings.max_params, settings.max_macs)
        tell = telling_steps()

        def search(budgets: tuple[float, ...], start: Trajectory | None, landing: float) -> Trajectory:
            within = [Budgeted(d.table, p, ms) for d, p, ms in zip(devices, predictors, budgets, strict=True)]
            return choose(
                work.strategy,
                judged.scores,
                within,
                limits,
                start=start,
                landing=landing,
                mes=mes,
                study=study,
                on_step=tell,
            )

        def goal(at: int) -> Goal:
            predict_ms = predictors[at].predict_ms
            least_ms = fastest_ms(space, devices[at].table) if mux is None else predict_ms(space.smallest)
            return Goal(devices[at].target, predict_ms, lambda arch: checks[at](space.multiplexed(arch, mux)), least_ms)

        if len(ways) > 1:
            say("each image by itself" if mux is None else f"groups of {mux.n}")
        return meet([goal(at) for at in range(len(devices))], search, judged.scores.charge_of)

    outcomes: dict[MultiplexSpec | None, Outcome] = {}
    for way in ways:
        try:
            outcomes[way] = found_for(way)
        except InputError as error:
            if way is None:
                raise
            say(f"groups of {way.n} are left out: {error}")
    return outcomes


def _write(work: Work, judged: Judged, outcome: Outcome, mux: MultiplexSpec | None, finalists: Sequence[Finalist]) -> None:
    """Write what was found: the network, its inherited weights, `result.json`.

    All of it is computed before the first file is written, and the result comes last: a folder without one has not ended, and
    the same command goes on in it.
    """
    devices, space, data, settings, folder = work.devices, work.space, work.data, work.settings, work.folder
    first, trajectory, begin = devices[0], outcome.trajectory, judged.begin
    candidate = folder / CANDIDATE
    name = network_name(space.name, [device.target.ms for device in devices])
    deployed = replace(space.multiplexed(trajectory.arch, mux).without_identity(), name=name)
    if finalists:
        best = best_of(finalists)
        model = best.model
        loss, accuracy = accuracy_of(model, data.val.shuffled(work.seed))[0], best.val.mean
    else:
        unchanged = layers_kept(begin, trajectory.arch) if begin is not None else 0
        evaluator = judged.evaluator
        model = found_network(judged.supernet, trajectory.arch, evaluator.recalibration, evaluator.kept, unchanged)
        loss, accuracy = accuracy_of(model, data.val)
    complexity = count(deployed)
    weights = deployed_weights(model, deployed)
    if begin is not None:
        weights |= as_given(load_safetensors(folder / "teacher.safetensors"), begin, trajectory.arch)
    saved = save_safetensors(weights, note(data.classes))
    on_devices = [device.record(deployed, check) for device, check in zip(devices, outcome.checks, strict=True)]
    ms = on_devices[0]["measured_ms"] or on_devices[0]["predicted_ms"]
    mes = efficiency_of(settings)
    result = {
        **on_devices[0],
        "loss": loss,
        "accuracy": accuracy,
        "params": complexity.params,
        "macs": complexity.macs,
        "seed": work.seed,
        "strategy": work.strategy,
        "space": space.name,
        "image_size": deployed.image_size,
        "supernet_image_size": work.train_size,
        "steps": len(trajectory.steps),
        "measured_networks": outcome.measured,
        "met": outcome.met,
        "targets": on_devices,
        "candidate": str(candidate) if outcome.candidate is not None else None,
        "evaluations": judged.evaluate.asked,
        "score_loss": trajectory.evaluation.loss,
        "network": described(trajectory.arch),
        "gap": trajectory.gap,
        "demonstration": data.demonstration,
        "skipped_images": len(data.skipped),
        "largest_of_space": not trajectory.steps,
        "objective": settings.objective,
        "mux": knobs_of(mux) if mux is not None else None,
        "importance": judged.importance_from,
        "max_params": settings.max_params or None,
        "max_macs": settings.max_macs or None,
        "mes": mes.of(complexity.params, ms) if mes is not None else None,
        "additivity": judged.additivity,
        "versions": {name: version_of(name) for name in ("metapath-nas", "torch")},
    }
    if work.given is not None and begin is not None and judged.original is not None:
        result["init"] = {
            "network": work.given.arch.name,
            "weights": work.given.source,
            "predicted_ms": first.table.predict_ms(begin),
            "accuracy": accuracy_of(judged.original, data.val)[1],
            "teacher": str(folder / "teacher.yaml"),
        }
    if finalists:
        result["throughput"] = records(finalists, best_of(finalists), first.table, settings.arrivals_per_second)
    if work.again:  # what it says is not of the files that now take the place of its own
        (folder / "result.json").unlink(missing_ok=True)
    write_csv(folder / "trajectory.csv", trajectory.records(), trajectory.columns)
    candidate.unlink(missing_ok=True)
    if outcome.candidate is not None:
        space.multiplexed(outcome.candidate.arch, mux).without_identity().save(candidate)
    deployed.save(folder / "searched.yaml")
    write_atomically(folder / "weights.safetensors", saved)
    if finalists:
        write_csv(folder / "throughput.csv", result["throughput"], THROUGHPUT_COLUMNS)
    write_atomically(folder / "result.json", json.dumps(result, indent=2) + "\n")


def _supernet(work: Work) -> tuple[AnySupernet, ArchConfig | None, torch.nn.Sequential | None]:
    """Return the trained supernet; with --init also the network that the search begins with, and the trained original."""
    if work.given is None:
        space = work.space.at(work.train_size)
        return in_all(train_supernet, space, work.data, work.settings, work.seed, work.folder), None, None
    begin = work.space.fit(work.given.arch.with_classes(len(work.data.classes)))
    original = on_data(work.given, work.data, work.settings, work.seed, work.folder)
    at = work.train_size
    supernet = pretrained_supernet(original, begin.at(at), work.space.at(at), work.data, work.settings, work.seed, work.folder)
    return supernet, begin, original


def study_of(work: Work) -> Study:
    """Return the Optuna study of a search. Its name is the same wherever the same is asked for, whatever paths there are."""
    from nas.shared_study import study_name  # optuna takes a while to import

    storage = work.settings.optuna_storage or work.folder / "study.journal"
    asked = {
        "targets": [(device.name, device.target.ms, device.digest()) for device in work.devices],
        "data": work.data.fingerprint,
        "space": work.space.to_yaml(),
        "settings": work.settings.deciding(),
        "seed": work.seed,
        "given": work.given.digest if work.given is not None else None,
        **({"blocks": files} if (files := work.space.block_files()) else {}),
    }
    name = study_name(network_name(work.space.name, [device.target.ms for device in work.devices]), asked)
    return Study(name, storage, work.settings.optuna_sampler, work.settings.optuna_trials, work.seed)


def efficiency_of(settings: SupernetSettings) -> MobileEfficiency | None:
    """Return the mobile efficiency score with the settings' constants, where it is the objective."""
    if settings.objective != "mes":
        return None
    constants = (settings.mes_size_unit, settings.mes_latency_unit_ms, settings.mes_size_alpha, settings.mes_latency_alpha)
    return MobileEfficiency(lambda arch: count(arch).params, *constants)


def _finalists(work: Work, judged: Judged, outcomes: Mapping[MultiplexSpec | None, Outcome]) -> list[Finalist]:
    """Return the networks of all ways of grouping and their controls, trained a little. A way whose network has no token block
    left is the one without grouping, and has no part in it."""
    folder = work.folder / "throughput"
    judged.evaluator.forget()  # trainings want the memory
    found = []
    for mux, outcome in outcomes.items():
        arch = judged.supernet.space.multiplexed(outcome.trajectory.arch, mux)
        if mux is not None and not arch.multiplexes:
            say(f"groups of {mux.n}: no token block is left at this target, so there is nothing to share")
        else:
            found.append(Found(arch, outcome.check, outcome.met))

    def inherited(arch: ArchConfig) -> Path:
        path = folder / f"inherited-{hashlib.sha256(described(arch).encode()).hexdigest()[:12]}.safetensors"
        if not path.exists():
            model = found_network(judged.supernet, arch, judged.evaluator.recalibration, judged.evaluator.kept)
            write_atomically(path, save_safetensors(deployed_weights(model, arch.without_identity())))
        return path

    checks = work.checks()[0]
    return train_finalists(found, inherited, work.data, checks, checks.group_ms, work.settings, folder, work.seed)
