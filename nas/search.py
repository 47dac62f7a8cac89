"""One search from images to a checked network: every stage reads files and writes files of the run's folder."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

from nas.data import ImageData, load_data, natural_size
from nas.evaluation import Evaluator, accuracy_of, recalibrate
from nas.guarantee import Outcome, meet
from nas.kept import Checks, Remembered, described, write_csv
from nas.plan import for_batch
from nas.pretrained import Pretrained, layers_kept, on_data, pretrained_supernet, requested
from nas.profile import per_image
from nas.progress import progress, say
from nas.recovery import Recovered
from nas.request import claim
from nas.scores import ADDITIVITY_COLUMNS, Drops, Evaluate, additivity, measure_drops, single_changes
from nas.slimming import Limit, MobileEfficiency, Step, Trajectory, check_limits, rounded_up, slim, start_network
from nas.supernet_training import SupernetSettings, channel_method, logits_of, train_supernet, training_size
from nas.table import FEW_CLASSES, MANY_CLASSES, LatencyTable, Target, find_tables, table_folders, user_folder
from nas.taylor import channels
from nas.throughput import COLUMNS as THROUGHPUT_COLUMNS
from nas.throughput import Finalist, Found, GroupedPredictor, best_of, records, table_of, train_finalists, usable_ways
from supernet.arch import ArchConfig, MultiplexSpec
from supernet.errors import InputError, unknown
from supernet.files import write_atomically
from supernet.model import build_model, count
from supernet.space import SearchSpace, space_names
from supernet.specs import knobs_of
from supernet.units import UnitScores
from supernet.weights import AnySupernet, at_size, subnetwork

CANDIDATE = "candidate.yaml"  # a network that might be better and is to be measured on a device that is elsewhere


@dataclass(frozen=True)
class Request:
    """What a user asks of `nas-search`; None where a flag was left out."""

    target_ms: float
    device: str | None = None
    table: Path | None = None
    data: Path | None = None
    space: str | None = None
    strategy: str = "greedy"
    config: Path | None = None
    out: Path | None = None
    seed: int = 0
    init: str | None = None
    weights: str | None = None


def run_search(
    request: Request,
    space: SearchSpace | None = None,
    settings: SupernetSettings | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """Search, write the results to the run's folder, print them, and return the content of `result.json`.

    `space` and `settings` stand in for what `request` names; `again`: also where the folder has a result, because more is
    known of what networks take on the device.
    """
    target = Target(request.target_ms)
    settings = settings or SupernetSettings.load(request.config)
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
    device, table_path = resolve_table(request.device, request.table)
    space = groups_of(space, settings.objective, device, table_path)
    data = load_data(request.data, train_size, request.seed, settings.score_images)
    space = space.with_classes(len(data.classes))
    folder = request.out or Path("runs") / f"{space.name}-{target.ms:g}ms-seed{request.seed}"
    if given is not None:
        request = replace(request, space=str(folder / "space.yaml"))
        if not (folder / "request.json").exists():
            space.save(folder / "space.yaml")  # a refusal of the table names the command that measures this space
    table, table_path = usable_table(device, table_path, space, request)
    smallest_ms = table.predict_ms(space.smallest)
    if target.ms < smallest_ms:
        raise InputError(
            f"the target of {target.ms:g} ms is below the smallest network of {space.name} on {device}: "
            f"give at least {rounded_up(smallest_ms)} ms"
        )
    check_limits(space, limits_of(settings, space, None))
    claim(
        folder,
        {
            "command": "nas-search",
            "target_ms": target.ms,
            "device": device,
            "table": str(table_path.resolve()),
            "data": data.source,
            "data_fingerprint": data.fingerprint,
            "space": space.to_yaml(),
            "strategy": request.strategy,
            "settings": asdict(settings),
            "seed": request.seed,
            **({"init": given.arch.to_yaml(), "weights": given.digest} if given is not None else {}),
        },
        since={"settings": asdict(SupernetSettings())},
    )
    finished = folder / "result.json"
    if again or not finished.exists():
        _search(target, space, train_size, data, table, table_path, settings, request, folder, given)
    result: dict[str, Any] = json.loads(finished.read_text())
    _print_result(result, folder, data)
    return result


def _search(
    target: Target,
    space: SearchSpace,
    train_size: int,
    data: ImageData,
    table: LatencyTable,
    table_path: Path,
    settings: SupernetSettings,
    request: Request,
    folder: Path,
    given: Pretrained | None,
) -> None:
    ways: tuple[MultiplexSpec | None, ...] = (None,)
    if settings.objective == "throughput":
        ways = (None, *usable_ways(space, table))
    elif space.mux:
        own_pass = f"the objective is {settings.objective}, so each image has a pass of its own"
        say(f"{own_pass}: the groups (mux) of {space.name} are left out")
    supernet: AnySupernet
    if given is None:
        begin = None
        supernet = train_supernet(space.at(train_size), data, settings, request.seed, folder)
    else:
        begin = space.fit(given.arch.with_classes(len(data.classes)))
        original = on_data(given, data, settings, request.seed, folder)
        supernet = pretrained_supernet(
            original, begin.at(train_size), space.at(train_size), data, settings, request.seed, folder
        )
    logits = logits_of(supernet, settings) if begin is None else None
    base = begin or (space.largest if logits is None else start_network(space, logits))
    evaluator = evaluator_of(supernet, base, data, settings, folder)
    scored = Recovered(evaluator, data, settings, request.seed) if settings.recovery_steps else evaluator
    evaluate = Remembered(scored, folder / "evaluations.csv")
    drops = drops_of(space, base, evaluate)
    drops.save(folder / "drops.csv")
    importance = logits if logits is not None else drops.importance()
    write_csv(
        folder / "importance.csv",
        (
            {"stage": stage + 1, "slot": slot + 1, "kind": kind, "log_odds": value}
            for (stage, slot), odds in zip(space.slots, importance, strict=True)
            for kind, value in odds.items()
        ),
        ("stage", "slot", "kind", "log_odds"),
    )
    report_signal(space, begin or start_network(space, importance), evaluate, len(data.score), trained_here=begin is None)
    check_of_drops = additivity_of(space, drops, evaluate, settings, request.seed, folder)

    checks = Checks(folder / "measurements.csv", table)
    mes = efficiency_of(settings)

    def found_for(mux: MultiplexSpec | None) -> Outcome:
        predictor = GroupedPredictor(table, space, mux)
        limits = limits_of(settings, space, mux)

        def slim_to(budget_ms: float, start: Trajectory | None, landing: float) -> Trajectory:
            if start is None and begin is not None:
                start = Trajectory(begin, (), begin, predictor.predict_ms(begin), evaluate(begin))
            slimmed = partial(slim, space, importance, evaluate, predictor, score=settings.score, on_step=_say_step)
            found = slimmed(budget_ms, start=start, landing=landing, limits=limits, mes=mes)
            write_csv(folder / "trajectory.csv", found.records(), found.columns)
            return found

        if len(ways) > 1:
            say(f"each image by itself, at {target.ms:g} ms" if mux is None else f"groups of {mux.n}, at {target.ms:g} ms")
        return meet(target, slim_to, lambda arch: checks(space.multiplexed(arch, mux)), predictor.predict_ms(space.smallest))

    outcomes: dict[MultiplexSpec | None, Outcome] = {}
    for way in ways:
        try:
            outcomes[way] = found_for(way)
        except InputError as error:
            if way is None:
                raise
            say(f"groups of {way.n} are left out: {error}")
    finalists: list[Finalist] = []
    mux = None
    if len(outcomes) > 1:
        finalists = _finalists(outcomes, supernet, evaluator, data, checks, settings, request.seed, folder)
        mux = best_of(finalists).arch.mux
    outcome = outcomes[mux]
    trajectory, check = outcome.trajectory, outcome.check
    write_csv(folder / "trajectory.csv", trajectory.records(), trajectory.columns)
    candidate = folder / CANDIDATE
    candidate.unlink(missing_ok=True)
    if outcome.candidate is not None:
        space.multiplexed(outcome.candidate.arch, mux).without_identity().save(candidate)
    deployed = replace(space.multiplexed(trajectory.arch, mux).without_identity(), name=f"{space.name}-{target.ms:g}ms")
    if finalists:
        best = best_of(finalists)
        model = best.model
        loss, accuracy = accuracy_of(model, data.val.shuffled(request.seed))[0], best.val.mean
    else:
        unchanged = layers_kept(begin, trajectory.arch) if begin is not None else 0
        model = found_network(supernet, trajectory.arch, evaluator.recalibration, evaluator.kept, unchanged)
        loss, accuracy = accuracy_of(model, data.val)
    complexity = count(deployed)
    deployed.save(folder / "searched.yaml")
    write_atomically(folder / "weights.safetensors", save_safetensors(deployed_weights(model, deployed)))
    result = {
        "target_ms": target.ms,
        "device": table.device,
        "table": str(table_path),
        "provenance": table.provenance,
        "predicted_ms": table.predict_ms(deployed),
        "measured_ms": check.ms,
        "measured_low_ms": check.low_ms,
        "measured_high_ms": check.high_ms,
        "loss": loss,
        "accuracy": accuracy,
        "params": complexity.params,
        "macs": complexity.macs,
        "batch": table.meta.get("batch", 1),
        "seed": request.seed,
        "strategy": request.strategy,
        "space": space.name,
        "image_size": deployed.image_size,
        "supernet_image_size": train_size,
        "steps": len(trajectory.steps),
        "measured_networks": outcome.measured,
        "met": outcome.met,
        "candidate": str(candidate) if outcome.candidate is not None else None,
        "evaluations": evaluate.asked,
        "demonstration": data.demonstration,
        "skipped_images": len(data.skipped),
        "largest_of_space": not trajectory.steps,
        "objective": settings.objective,
        "mux": knobs_of(mux) if mux is not None else None,
        "importance": "logits" if logits is not None else "drops",
        "max_params": settings.max_params or None,
        "max_macs": settings.max_macs or None,
        "mes": mes.of(complexity.params, check.ms or table.predict_ms(deployed)) if mes is not None else None,
        "additivity": check_of_drops,
    }
    if given is not None and begin is not None:
        result["init"] = {
            "network": given.arch.name,
            "weights": given.source,
            "predicted_ms": table.predict_ms(begin),
            "accuracy": accuracy_of(original, data.val)[1],
            "teacher": str(folder / "teacher.yaml"),
        }
    if finalists:
        rows = records(finalists, best_of(finalists), table, settings.arrivals_per_second)
        write_csv(folder / "throughput.csv", rows, THROUGHPUT_COLUMNS)
        result["throughput"] = rows
    write_atomically(folder / "result.json", json.dumps(result, indent=2) + "\n")


def evaluator_of(
    supernet: AnySupernet, base: ArchConfig, data: ImageData, settings: SupernetSettings, folder: Path
) -> Evaluator:
    """Return what scores the supernet's networks; which channels narrow ones inherit is judged in `base`, a network at the
    largest widths, and kept in `folder/channels.json`."""
    images = settings.recalibration_images
    member = base.at(supernet.space.image_size)
    kept = channels(folder / "channels.json", supernet, member, data, images, channel_method(settings))
    return Evaluator(supernet, data, images, kept=kept)


def drops_of(space: SearchSpace, base: ArchConfig, evaluate: Evaluate) -> Drops:
    """Return the drop of every single change of the base network, with progress shown."""
    with progress("drops of single changes", len(single_changes(space, base)) + 1) as tick:
        return measure_drops(space, base, evaluate, tick)


def additivity_of(
    space: SearchSpace, drops: Drops, evaluate: Evaluate, settings: SupernetSettings, seed: int, folder: Path
) -> dict[str, float | None] | None:
    """Check the sum of the drops on random networks where the settings ask for it; write `additivity.csv`, say and return how
    good it is."""
    count = settings.additivity_networks
    if not count:
        return None
    with progress("networks with several changes", count) as tick:
        found = additivity(space, drops, evaluate, count, seed, tick)
    write_csv(folder / "additivity.csv", found.records, ADDITIVITY_COLUMNS)
    say(
        f"the sum of single drops on {len(found.records)} networks with several changes: R2 {found.r_squared:.2f}, Kendall's "
        f"tau {found.tau:.2f}, slope {found.slope:.2f}"
    )
    figures = {"r_squared": found.r_squared, "tau": found.tau, "slope": found.slope}
    # JSON has no NaN, which they are where all networks are equally good.
    return {"networks": len(found.records), **{k: None if math.isnan(v) else v for k, v in figures.items()}}


def limits_of(settings: SupernetSettings, space: SearchSpace, mux: MultiplexSpec | None) -> list[Limit]:
    """Return the hard limits of the settings, on the networks of the space with their images grouped by `mux`."""
    limits = []
    if settings.max_params:
        limits.append(Limit("params", lambda arch: count(space.multiplexed(arch, mux)).params, settings.max_params))
    if settings.max_macs:
        limits.append(Limit("macs", lambda arch: count(space.multiplexed(arch, mux)).macs, settings.max_macs))
    return limits


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


def groups_of(space: SearchSpace, objective: str, device: str, table: Path | None) -> SearchSpace:
    """Return the space with the ways of grouping images of which the calls of the device's table have whole groups.

    Raises:
        InputError: throughput is the objective, and there are none.
    """
    from nas.devices import open_profiler

    place = LatencyTable.load(table).meta if table is not None else open_profiler(device).environment()
    batch = int(place.get("batch", 1))
    if objective == "throughput" and not space.mux:
        with_groups = [name for name in space_names() if SearchSpace.load(name).mux]
        raise InputError(
            f"the objective throughput needs a space whose images may share passes (mux), but {space.name} has none: give a "
            f"--space such as {', '.join(with_groups)}, or leave the objective out"
        )
    kept = for_batch(space, batch)
    if objective == "throughput" and not kept.mux:
        n = max(mux.n for mux in space.mux)
        usual = re.sub(r"-b\d+$", "", device)
        raise InputError(
            f"the objective throughput needs calls of whole groups, but those of {device} have {batch}: give --device "
            f"{usual}-b{n}, or a larger multiple of {n}"
        )
    return kept


def resolve_table(device: str | None, table: Path | None) -> tuple[str, Path | None]:
    """Return the device id that the user means, and its table's path where there is one.

    Without either flag: the only table that the user measured or imported, else this machine's CPU.

    Raises:
        InputError: the device is unknown, several tables could be meant, or the table is of another device.
    """
    from nas.devices import HERE, known_devices, open_profiler

    here = open_profiler().id
    wanted = open_profiler(device).id if device in HERE else device
    if table is not None:
        of = LatencyTable.load(table).device
        if of != (wanted or here):
            asked = f"--device {device}" if device else f"this machine's CPU ({here})"
            raise InputError(f"the table {table} is of {of}, not of {asked}: give --device {of}, or another table")
        return of, table
    found = find_tables()
    if wanted is None:
        own = {d: p for d, p in found.items() if p.parent in (Path("latency_tables"), user_folder())}
        if len(own) > 1:
            raise InputError(f"there are tables of {', '.join(sorted(own))}: say which with --device")
        wanted = next(iter(own), here)
    if wanted not in found and wanted != here:
        try:
            open_profiler(wanted)
        except InputError:
            raise unknown("device", device, known_devices()) from None
    return wanted, found.get(wanted)


def usable_table(device: str, path: Path | None, space: SearchSpace, request: Request) -> tuple[LatencyTable, Path]:
    """Return the device's table and its path, with every row and the calibration that the space needs.

    What this machine's own table lacks is measured now, unless the user named the file.
    """
    from nas.audit import say_if_untrue
    from nas.devices import open_profiler, profiler_of
    from nas.lut import build_table

    table = LatencyTable.load(path) if path is not None else None
    profiler = profiler_of(table) if table is not None else open_profiler(device)
    if table is not None and path is not None:
        command = f"nas-build-lut --device {device} --missing --space {request.space or space.name} --out {path.parent}"
        if request.table is not None or profiler is None:
            table.require(space.layers(), command)
            table.predict_ms(space.smallest)  # refuses a table without a calibration for such networks
            own = table.calibrated_for(space)
            say_if_untrue(table)
            return own if own.calibrations else table, path
        now = profiler.environment()["runtime_version"]
        if table.meta.get("runtime_version") != now:
            say(
                f"warning: the table was measured with {table.meta['runtime']} {table.meta['runtime_version']}, this is "
                f"{now}: `{command.replace(' --missing', '')}` measures it anew"
            )
        say_if_untrue(table)
        if table.serves(space):
            return table.calibrated_for(space), path
    assert profiler is not None
    folder = path.parent if path is not None and path.parent in table_folders()[:2] else user_folder()
    say(
        f"this machine's table {'lacks rows of ' + space.name if table else f'({device}) is not there yet'}: measuring it first"
    )
    measured = space if space.num_classes > MANY_CLASSES else space.with_classes(FEW_CLASSES)
    table = build_table(profiler, measured, folder, only_missing=True)
    return table.calibrated_for(space), folder / f"{device}.csv"


def report_signal(
    space: SearchSpace, largest: ArchConfig, evaluate: Remembered, images: int, *, trained_here: bool = True
) -> None:
    """Say how far the largest network and the one without blocks are apart: what the scores have to go by."""
    kinds = [["identity"] * stage.depth for stage in space.stages]
    empty = space.arch(largest.widths, kinds)
    full, bare = evaluate(largest), evaluate(empty)
    say(
        f"on the {images} scoring images, as networks are scored: largest network loss {full.loss:.3f}, top-1 "
        f"{100 * full.accuracy:.1f} %; identity only loss {bare.loss:.3f}, top-1 {100 * bare.accuracy:.1f} %"
    )
    noise = 2 * math.sqrt(2 * full.accuracy * (1 - full.accuracy) / images)
    if full.accuracy - bare.accuracy <= noise or full.loss >= bare.loss:
        say(
            "warning: they are as good as equal, so the scores carry no signal and which blocks go is chance; "
            + (
                "train the supernet for longer (weight_epochs in --config) or on larger images"
                if trained_here
                else "give --init a network that was trained on such images"
            )
        )


def found_network(
    supernet: AnySupernet, arch: ArchConfig, images: torch.Tensor, kept: UnitScores | None = None, unchanged: int = 0
) -> torch.nn.Sequential:
    """Return the found network at the supernet's image size, with inherited weights, and statistics recomputed on `images` but
    for those of the first `unchanged` layers."""
    model = subnetwork(supernet, arch.at(supernet.space.image_size), kept)
    model = model.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    recalibrate(model, images, unchanged)
    return model.eval()


def deployed_weights(model: torch.nn.Sequential, deployed: ArchConfig) -> dict[str, torch.Tensor]:
    """Return the state of `model` under the names of the network to deploy, what depends on the image size at its size."""
    target = build_model(deployed)
    weights = {}
    for (name, module), source in zip(target.named_children(), model.children(), strict=True):
        for key, like in module.state_dict().items():
            value = source.state_dict()[key].cpu()
            weights[f"{name}.{key}"] = at_size(key, value, like).contiguous()
    return weights


def _say_step(step: Step) -> None:
    taken = step.taken
    say(
        f"{taken.action}: {step.ms:.4g} to {taken.ms:.4g} ms, loss {step.evaluation.loss:.4f} to {taken.evaluation.loss:.4f}"
        + (f" (of {len(step.options)} actions)" if len(step.options) > 1 else "")
    )


def _print_result(result: Mapping[str, Any], folder: Path, data: ImageData) -> None:
    if result["measured_ms"] is None:
        measured = f"not measured: {result['device']} is elsewhere (nas-search --from {folder} --verify measures it there)"
    else:
        measured = (
            f"measured {result['measured_ms']:.4g} ms (95 %: {result['measured_low_ms']:.4g} to "
            f"{result['measured_high_ms']:.4g}){per_image(result['measured_ms'], result['batch'])}"
        )
    print(f"{folder / 'searched.yaml'}")
    print(
        f"  target {result['target_ms']:g} ms on {result['device']}: predicted {result['predicted_ms']:.4g} ms, {measured}"
        + ("; THE TARGET IS MISSED" if result["met"] is False else "")
    )
    if result["candidate"]:
        print(f"  over 3 % is left: a slower network might fit ({result['candidate']}); --verify again measures it")
    mes = "" if result["mes"] is None else f", MES {result['mes']:.4g}"
    print(f"  {result['params'] / 1e6:.3g} M parameters, {result['macs'] / 1e6:.4g} M MACs at {result['image_size']} px{mes}")
    init = result.get("init")
    inherited = "the supernet" if init is None else init["network"]
    print(
        f"  top-1 {100 * result['accuracy']:.1f} % on {len(data.val)} validation images that the search did not see, with "
        f"weights inherited from {inherited}{' and trained a little' if 'throughput' in result else ''}"
    )
    if init is not None:
        print(f"  {init['network']} itself: predicted {init['predicted_ms']:.4g} ms, top-1 {100 * init['accuracy']:.1f} %")
    if "throughput" in result:
        print(table_of(result["throughput"], result["batch"]))
        print("  control: the same reduction without concatenation; whatever it is as good at is not the sharing's doing")
    if result["largest_of_space"] and init is not None:
        print(f"  {init['network']} meets the target as it is: nothing was taken away; give a lower --target-ms for less")
    elif result["largest_of_space"]:
        spaces = {name: count(SearchSpace.load(name).largest).macs for name in space_names()}
        larger = sorted((macs, name) for name, macs in spaces.items() if macs > result["macs"] and name != result["space"])
        advice = f"for the rest of the time, try --space {larger[0][1]}" if larger else "no larger space ships"
        print(f"  this is the largest network of {result['space']}: {advice}")
    if result["demonstration"]:
        print("  found on the embedded digits: a demonstration; give --data PATH for a network to ship")
    more = ""
    if init is not None:
        more = f" --weights {folder / 'weights.safetensors'} --teacher {init['teacher']} --recipe finetune"
    images = "" if data.demonstration else f" --data {data.source}"
    print(f"  next: nas-train {folder / 'searched.yaml'}{more}{images} --out {'tuned' if more else 'trained'}")
