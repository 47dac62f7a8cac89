"""One search from images to a checked network: every stage reads files and writes files of the run's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

from nas.about import note
from nas.alone import alone
from nas.data import ImageData, load_data, natural_size, say_if_demonstration
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
    write_importance,
)
from nas.kept import Checks, Remembered, described, write_complexity, write_csv
from nas.lookup import OnDevice, groups_of, places, resolve_device, usable_table
from nas.parallel import joined
from nas.pretrained import Pretrained, layers_kept, on_data, pretrained_supernet, requested
from nas.progress import say
from nas.recovery import Recovered
from nas.report import NAME as REPORT
from nas.report import write_report
from nas.request import Finished, claim, finished
from nas.result import print_result
from nas.settings import SupernetSettings
from nas.slimming import MobileEfficiency, check_limits, rounded_up, start_network
from nas.steps import accelerator
from nas.strategies import (
    FRONTIER_COLUMNS,
    Budgeted,
    Scores,
    Study,
    check_strategy,
    choose,
    fastest_ms,
    frontier_records,
    limits_of,
    refuse_unreachable,
    telling_steps,
)
from nas.supernet_training import check_trainable, logits_of, train_supernet, training_size
from nas.table import LatencyTable
from nas.throughput import COLUMNS as THROUGHPUT_COLUMNS
from nas.throughput import Finalist, Found, GroupedPredictor, best_of, records, train_finalists, usable_ways
from nas.trajectory import Trajectory
from supernet.arch import ArchConfig, MultiplexSpec
from supernet.errors import InputError, one_line
from supernet.files import read_json, reading, write_atomically
from supernet.model import count
from supernet.space import SearchSpace
from supernet.specs import knobs_of
from supernet.weights import AnySupernet

ADDITIVITY_NETWORKS = 50  # on which the sum of drops is checked where it decides
TRAINED = ("supernet.pt", "channels.json", "distillation.pt", "evaluations.csv")  # what another target changes nothing in
CANDIDATE = "candidate.yaml"  # a network that might be better and is to be measured on a device that is elsewhere


@dataclass(frozen=True)
class Request:
    """What a user asks of `nas-search`; None or nothing where a flag was left out.

    `target_ms` on `device` is the first target, those of `targets` (device, milliseconds) are met beside it. `table`: files, of
    those devices.
    """

    target_ms: float | None = None
    device: str | None = None
    table: tuple[Path, ...] = ()
    data: Path | None = None
    space: str | None = None
    strategy: str = "greedy"
    config: Path | None = None
    out: Path | None = None
    seed: int = 0
    init: str | None = None
    weights: str | None = None
    targets: tuple[tuple[str, float], ...] = ()

    @property
    def all_targets(self) -> list[tuple[str | None, float]]:
        """Every target, the first one first.

        Raises:
            InputError: there is none.
        """
        first: list[tuple[str | None, float]] = [] if self.target_ms is None else [(self.device, self.target_ms)]
        if not first and not self.targets:
            raise InputError("say which latency the network may have: --target-ms 1.6")
        if not first and self.device is not None:
            raise InputError(f"--device {self.device} has no target: give --target {self.device}=MS, or --target-ms")
        return [*first, *self.targets]


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

    def checks(self) -> list[Checks]:
        """Return what is known of each device's networks, and measures them where it is this machine's."""
        files = (measurements_file(self.devices, at) for at in range(len(self.devices)))
        return [Checks(self.folder / file, device.table) for file, device in zip(files, self.devices, strict=True)]


def run_search(
    request: Request,
    space: SearchSpace | None = None,
    settings: SupernetSettings | None = None,
    again: bool = False,
    trained: Finished | None = None,
) -> dict[str, Any]:
    """Search, write the results to the run's folder, print them, and return the content of `result.json`.

    `space` and `settings` stand in for what `request` names; `again`: also where the folder has a result, because more is
    known of what networks take on the devices. `trained`: a search that differs in targets, devices or strategy alone; what it
    trained and evaluated is taken from there.
    """
    targets = request.all_targets
    settings = settings or SupernetSettings.load(request.config)
    check_strategy(request.strategy, settings.objective)
    given: Pretrained | None = None
    if request.init is not None and request.weights is not None:
        given, around = requested(request.init, request.weights, request.space, settings)
        space = space or around
        # At its own size, whatever that of the images: there its weights mean something.
        train_size = training_size(space, space.image_size, settings.image_size)
    elif request.init is not None or request.weights is not None:
        raise InputError("--init NET and --weights FILE go together: a network, and the weights that it has")
    else:
        default = "efficientformer-s" if request.data else "efficientformer-tiny"
        space = space or SearchSpace.load(request.space or default)
        train_size = training_size(space, natural_size(request.data), settings.image_size)
    found = places(targets, request.table)
    for place in found:
        space = groups_of(space, settings.objective, place.device, place.table)
    data = load_data(request.data, train_size, request.seed, settings.score_images)
    space = space.with_classes(len(data.classes))
    folder = request.out or Path("runs") / run_name(space.name, [ms for _, ms in targets], request.seed)
    if trained is not None and data.fingerprint != trained.request["data_fingerprint"]:
        raise InputError(f"the images of {data.source} are not those of {trained.folder}: search anew, without --from")
    space_name = request.space or space.name
    if trained is not None:
        space_name = str(trained.space_file)
    elif given is not None:
        space_name = str(folder / "space.yaml")
    try:
        devices = tuple(OnDevice(place.target, *usable_table(place, space, space_name)) for place in found)
    except InputError as error:
        if given is not None and one_line(space_name) in str(error):  # in the command that measures what the table lacks
            _leave_space(space, folder / "space.yaml", error)
        raise
    if settings.objective == "throughput" and len(devices) > 1:
        raise InputError("the objective throughput has one device: give one target, or leave the objective out")
    refuse_unreachable(space, [Budgeted(device.table, device.table, device.target.ms) for device in devices])
    if settings.objective != "latency":
        refuse_below_smallest(space, devices)
    check_limits(space, limits_of(space, None, settings.max_params, settings.max_macs))
    accelerator(settings.accelerator)  # refuses one that this machine does not have
    if given is None and trained is None:
        check_trainable(settings, data, joined())
    first = devices[0]
    several = [{"device": d.name, "target_ms": d.target.ms, "table": str(d.path.resolve())} for d in devices]
    with alone(folder, shared=request.strategy == "optuna"):  # whose processes share a study, and may share its folder
        claim(
            folder,
            {
                "command": "nas-search",
                "target_ms": first.target.ms,
                "device": first.name,
                "table": str(first.path.resolve()),
                **({"targets": several} if len(several) > 1 else {}),
                "data": data.source,
                "data_fingerprint": data.fingerprint,
                "space": space.to_yaml(),
                "strategy": request.strategy,
                "settings": settings.deciding(),
                "seed": request.seed,
                **({"init": given.arch.to_yaml(), "weights": given.digest} if given is not None else {}),
            },
            since={"settings": SupernetSettings().deciding()},
        )
        say_if_demonstration(data)
        space.save(folder / "space.yaml")
        if trained is not None:
            borrow(trained.folder, folder)
        ended = folder / "result.json"
        if again or not ended.exists():
            (folder / REPORT).unlink(missing_ok=True)
            _search(Work(devices, space, train_size, data, settings, request.strategy, request.seed, folder, given))
        if not (folder / REPORT).exists():
            write_report(folder)
        do = "remove it, and give the same command again"
        result = read_json(ended, "the result file", do)
        with reading(str(ended), do):
            print_result(result, folder, data.source, len(data.val))
        return result


def _leave_space(space: SearchSpace, path: Path, refused: InputError) -> None:
    """Write the file that a refusal tells nas-build-lut to take the space from, in a folder that is not this search's yet.

    Raises:
        InputError: another file has that name, which is left as it is.
    """
    if path.exists() and (not path.is_file() or path.read_bytes() != space.to_yaml().encode()):
        raise InputError(
            f"the table lacks rows of this search's space, which {path} is to hold for nas-build-lut, but that is another "
            "file: give another --out"
        ) from refused
    space.save(path)


def refuse_below_smallest(space: SearchSpace, devices: Sequence[OnDevice]) -> None:
    """Refuse targets that only networks other than the smallest meet: the loop could not end but for the best by the drops."""
    for device in devices:
        least_ms = device.table.predict_ms(space.smallest)
        if device.target.ms < least_ms:
            raise InputError(
                f"the target of {device.target.ms:g} ms is below the smallest network of {space.name} on {device.name}: give "
                f"at least {rounded_up(least_ms)} ms, or leave the objective out"
            )


def search_from(run: Path, request: Request) -> dict[str, Any]:
    """Search for other targets, on other devices or by another strategy, with the supernet of a search that ended, and its
    evaluations. Of the request, targets, tables, strategy and folder count.

    Raises:
        InputError: the folder holds no finished search, or is to hold the new one too; or what `run_search` refuses.
    """
    held = finished(run)
    if request.out is not None and request.out.resolve() == run.resolve():
        raise InputError(f"{run} holds the search to start from: give another --out")
    if request.target_ms is not None and request.device is None:
        request = replace(request, device=held.targets[0]["device"])
    known = {LatencyTable.load(path).device for path in request.table}
    wanted = {resolve_device(device) for device, _ in request.all_targets if device is not None} - known
    tables = [Path(target["table"]) for target in held.targets if target["device"] in wanted]
    seed = held.request["seed"]
    out = request.out or Path("runs") / run_name(held.space.name, [ms for _, ms in request.all_targets], seed)
    return run_search(
        replace(request, table=(*request.table, *tables), data=held.data, seed=seed, out=out, **beginning(held)),
        space=held.space,
        settings=SupernetSettings.of_run(held.request["settings"], request.config),
        trained=held,
    )


def beginning(held: Finished) -> dict[str, Any]:
    """Return the network and the weights that a search began with, as `Request` names them, if it did (--init)."""
    if "init" not in held.request:
        return {}
    path = held.folder / "init.yaml"
    write_atomically(path, held.request["init"])
    return {"init": str(path), "weights": str(held.folder / "init" / "given.safetensors")}


def borrow(run: Path, folder: Path) -> None:
    """Take what a search trained and evaluated into the folder of another one, unless it is there."""
    paths = [run / name for name in TRAINED] + sorted((run / "init").glob("*"))
    for path in paths:
        to = folder / path.relative_to(run)
        if path.is_file() and not to.exists():
            write_atomically(to, path.read_bytes())


def run_name(space: str, targets_ms: Sequence[float], seed: int) -> str:
    """Return what the folder of a search is called."""
    return f"{network_name(space, targets_ms)}-seed{seed}"


def network_name(space: str, targets_ms: Sequence[float]) -> str:
    """Return what the network found in a search is called."""
    return "-".join([space, *(f"{ms:g}ms" for ms in targets_ms)])


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


def _search(work: Work) -> None:
    judged = _judged(work)
    outcomes = _outcomes(work, judged)
    finalists: list[Finalist] = []
    mux = None
    if len(outcomes) > 1:
        finalists = _finalists(
            outcomes,
            judged.supernet,
            judged.evaluator,
            work.data,
            work.checks()[0],
            work.settings,
            work.seed,
            work.folder,
        )
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
    drops = drops_of(space, base, evaluate)
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
    devices, space, settings, folder = work.devices, work.space, work.settings, work.folder
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
            found = choose(
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
            write_csv(folder / "trajectory.csv", found.records(), found.columns)
            return found

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
    """Write what was found: the network, its inherited weights, `result.json`."""
    devices, space, data, settings, folder = work.devices, work.space, work.data, work.settings, work.folder
    first, trajectory, begin = devices[0], outcome.trajectory, judged.begin
    write_csv(folder / "trajectory.csv", trajectory.records(), trajectory.columns)
    candidate = folder / CANDIDATE
    candidate.unlink(missing_ok=True)
    if outcome.candidate is not None:
        space.multiplexed(outcome.candidate.arch, mux).without_identity().save(candidate)
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
    deployed.save(folder / "searched.yaml")
    write_atomically(folder / "weights.safetensors", save_safetensors(deployed_weights(model, deployed), note(data.classes)))
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
        "versions": {name: version(name) for name in ("metapath-nas", "torch")},
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
        rows = records(finalists, best_of(finalists), first.table, settings.arrivals_per_second)
        write_csv(folder / "throughput.csv", rows, THROUGHPUT_COLUMNS)
        result["throughput"] = rows
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


def measurements_file(devices: Sequence[OnDevice], at: int) -> str:
    """Return the file of what networks take on one of the devices."""
    return "measurements.csv" if len(devices) == 1 else f"measurements-{devices[at].name}.csv"


def study_of(work: Work) -> Study:
    """Return the Optuna study of a search. Its name is the same wherever the same is asked for, whatever paths there are."""
    from nas.shared_study import study_name  # optuna takes a while to import

    settings = work.settings.deciding()
    if settings["accumulate"] == 1:
        del settings["accumulate"]  # studies were named before there was such a setting
    storage = work.settings.optuna_storage or work.folder / "study.journal"
    asked = {
        "targets": [(device.name, device.target.ms, device.digest()) for device in work.devices],
        "data": work.data.fingerprint,
        "space": work.space.to_yaml(),
        "settings": settings,
        "seed": work.seed,
        "given": work.given.digest if work.given is not None else None,
    }
    name = study_name(network_name(work.space.name, [device.target.ms for device in work.devices]), asked)
    return Study(name, storage, work.settings.optuna_sampler, work.settings.optuna_trials, work.seed)


def efficiency_of(settings: SupernetSettings) -> MobileEfficiency | None:
    """Return the mobile efficiency score with the settings' constants, where it is the objective."""
    if settings.objective != "mes":
        return None
    constants = (settings.mes_size_unit, settings.mes_latency_unit_ms, settings.mes_size_alpha, settings.mes_latency_alpha)
    return MobileEfficiency(lambda arch: count(arch).params, *constants)


def _finalists(
    outcomes: Mapping[MultiplexSpec | None, Outcome],
    supernet: AnySupernet,
    evaluator: Evaluator,
    data: ImageData,
    checks: Checks,
    settings: SupernetSettings,
    seed: int,
    folder: Path,
) -> list[Finalist]:
    """Return the networks of all ways of grouping and their controls, trained a little. A way whose network has no token block
    left is the one without grouping, and has no part in it."""
    found = []
    for mux, outcome in outcomes.items():
        arch = supernet.space.multiplexed(outcome.trajectory.arch, mux)
        if mux is not None and not arch.multiplexes:
            say(f"groups of {mux.n}: no token block is left at this target, so there is nothing to share")
        else:
            found.append(Found(arch, outcome.check, outcome.met))

    def inherited(arch: ArchConfig) -> Path:
        path = folder / "throughput" / f"inherited-{hashlib.sha256(described(arch).encode()).hexdigest()[:12]}.safetensors"
        if not path.exists():
            model = found_network(supernet, arch, evaluator.recalibration, evaluator.kept)
            write_atomically(path, save_safetensors(deployed_weights(model, arch.without_identity())))
        return path

    return train_finalists(found, inherited, data, checks, checks.group_ms, settings, folder / "throughput", seed)
