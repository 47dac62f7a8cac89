"""Search again in a search that ended, for other targets or devices, by the drops that it measured: nothing is evaluated.

No torch, so that the answer comes at once.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nas.alone import alone
from nas.audit import say_if_untrue
from nas.device_ids import KINDS
from nas.guarantee import SLACK
from nas.kept import complexity_of, described, read_evaluations, write_csv
from nas.profile import per_image
from nas.request import Finished, claim, finished
from nas.scores import Drops
from nas.slimming import MOST_LOG_ODDS, Importance, start_network
from nas.strategies import (
    FRONTIER_COLUMNS,
    Budgeted,
    Scores,
    check_strategy,
    choose,
    exact,
    exact_for,
    frontier_records,
    limits_of,
    nothing_taken_away,
    refuse_unreachable,
    telling_steps,
)
from nas.table import LatencyTable, Target, find_table
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.files import read_csv, reading, write_atomically

STRATEGIES = ("exact", "greedy")  # those that need no more than drops


def answer(
    run: Path,
    *,
    target_ms: float | None = None,
    device: str | None = None,
    targets: Sequence[tuple[str, float]] = (),
    table: Sequence[Path] = (),
    strategy: str = "exact",
    out: Path | None = None,
) -> dict[str, Any]:
    """Find a network for other targets in the scores of a run, write and print it, and return the content of `result.json`.

    Of the best few by the drops the run may have evaluated all as whole networks; then that decides among them, as in a search.

    Args:
        run: the folder of a `nas-search` that ended.
        target_ms: milliseconds on `device` (None: the run's first one).
        targets: further devices, kinds or ids, and their milliseconds.
        table: files of the devices' tables; of the run's own devices, those that it used, else what is found by the id.
        strategy: exact or greedy.
        out: where `searched.yaml`, `result.json`, `trajectory.csv` and `frontier.csv` go (default: a folder in the run's).

    Raises:
        InputError: the run has not ended; a target cannot be met; a table lacks rows of the run's space.
    """
    check_strategy(strategy, "latency")
    if strategy not in STRATEGIES:
        raise InputError(f"{strategy} evaluates networks: add --verify, or give --strategy {' or '.join(STRATEGIES)}")
    held = finished(run)
    if out is not None and out.resolve() == run.resolve():
        raise InputError(f"{run} holds the search to answer from: give another --out")
    objective = held.request["settings"].get("objective", "latency")
    if objective != "latency":
        raise InputError(f"{run} was searched for {objective}, which an answer by drops does not have: add --verify")
    drops = Drops.load(run / "drops.csv", held.space)
    settings = held.request["settings"]
    budgets, paths = _budgets(held, target_ms, device, targets, table)
    refuse_unreachable(held.space, budgets)
    evaluations = read_evaluations(run / "evaluations.csv")
    importance = _importance(held)
    start = drops.base if "init" in held.request else start_network(held.space, importance)
    scores = Scores(held.space, start, importance, drops, drops.evaluation_for, settings["score"])
    limits = limits_of(held.space, None, settings.get("max_params", 0), settings.get("max_macs", 0))
    if strategy == "exact":
        found = exact(scores, budgets, limits, lambda arch: evaluations.get(described(arch)))
    else:
        found = choose("greedy", scores, budgets, limits, on_step=telling_steps())
    out = out or run / _name(held, budgets, strategy)
    devices = [_on_device(budget, path, found.arch) for budget, path in zip(budgets, paths, strict=True)]
    whole = evaluations.get(described(found.arch))
    params, macs = complexity_of(run / "layers.csv", found.arch)
    asked = [{name: device[name] for name in ("device", "target_ms", "table")} for device in devices]
    place = os.path.relpath(run.resolve(), out.resolve())  # an answer in the run's folder moves with it
    with alone(out):
        claim(out, {"command": "nas-search --from", "from": place, "targets": asked, "strategy": strategy})
        result = {
            **devices[0],
            "loss": whole.loss if whole is not None else None,
            "accuracy": None,
            "params": params,
            "macs": macs,
            "seed": held.request["seed"],
            "strategy": strategy,
            "from": str(run),
            "targets": devices,
            "network": described(found.arch),
            "predicted_loss": drops.sum_for(found.arch),
            "start_loss": drops.sum_for(start),
            "gap": found.gap,
            "largest_of_space": not found.steps,
            "additivity": held.result.get("additivity"),
        }
        name = "-".join([held.space.name, *(f"{budget.ms:g}ms" for budget in budgets)])
        replace(found.arch.without_identity(), name=name).save(out / "searched.yaml")
        write_csv(out / "trajectory.csv", found.records(), found.columns)
        tables = [budget.table for budget in budgets]
        write_csv(out / "frontier.csv", frontier_records(held.space, drops, tables), FRONTIER_COLUMNS)
        write_atomically(out / "result.json", json.dumps(result, indent=2) + "\n")
        _print(result, held, out)
        return result


def _budgets(
    held: Finished,
    target_ms: float | None,
    device: str | None,
    targets: Sequence[tuple[str, float]],
    files: Sequence[Path],
) -> tuple[list[Budgeted], list[Path]]:
    """Return the devices' tables, for the run's space, their milliseconds, and where the tables lie."""
    if target_ms is None and device is not None:
        raise InputError(f"--device {device} has no target: give --target {device}=MS, or --target-ms")
    own = {target["device"]: Path(target["table"]) for target in held.targets}
    given = {LatencyTable.load(path).device: path for path in files}
    wanted = [] if target_ms is None else [(device or held.targets[0]["device"], target_ms)]
    found, paths = [], []
    for name, ms in [*wanted, *targets]:
        id = _id(name)
        path = given.pop(id, None) or own.get(id) or find_table(id)
        table = LatencyTable.load(path)
        if table.missing(held.space.layers()):
            from nas.devices import measuring  # with torch

            table.require(held.space.layers(), measuring(table, f"--space {held.space_file}"))
        say_if_untrue(table)
        own_table = table.for_space(held.space)
        found.append(Budgeted(own_table, own_table, Target(ms).ms))
        paths.append(path)
    if given:
        raise InputError(f"the table {next(iter(given.values()))} is of {next(iter(given))}, which has no target")
    if twice := next((b.device for b in found if sum(b.device == c.device for c in found) > 1), None):
        raise InputError(f"there are two targets on {twice}: give one for each device")
    return found, paths


def _name(held: Finished, budgets: Sequence[Budgeted], strategy: str) -> str:
    """Return what the folder of an answer is called, in the run's: by its targets, devices that are not the run's, strategy."""
    own = [target["device"] for target in held.targets] == [budget.device for budget in budgets]
    parts = [f"{budget.ms:g}ms" if own else f"{budget.device}-{budget.ms:g}ms" for budget in budgets]
    return "-".join(["at", *parts, *([strategy] if strategy != "exact" else [])])


def _id(device: str) -> str:
    """Return a device's id. Only a kind of device, such as cpu, has to be looked up, which imports torch."""
    if "-" in device and device not in KINDS:
        return device
    from nas.lookup import resolve_device

    return resolve_device(device)


def _importance(held: Finished) -> Importance:
    path = held.folder / "importance.csv"
    do = f"search anew, or take {held.folder} from a copy"
    by_slot: dict[tuple[int, int], dict[str, float]] = {at: {} for at in held.space.slots}
    with reading(str(path), do):
        for line in read_csv(path, ("stage", "slot", "kind", "log_odds"), "the file of importance", do):
            by_slot[int(line["stage"]) - 1, int(line["slot"]) - 1][line["kind"]] = float(line["log_odds"])
    for (stage, slot), odds in by_slot.items():
        kinds = set(held.space.stages[stage].kinds) - {"identity"}
        if odds.keys() != kinds or not all(abs(value) < MOST_LOG_ODDS for value in odds.values()):
            raise InputError(
                f"{path} needs for slot {slot + 1} of stage {stage + 1} a number below {MOST_LOG_ODDS:g} for each of "
                f"{', '.join(sorted(kinds))}: {do}"
            )
    return [by_slot[at] for at in held.space.slots]


def _on_device(budget: Budgeted, path: Path, arch: ArchConfig) -> dict[str, Any]:
    return {
        "target_ms": budget.ms,
        "device": budget.device,
        "table": str(path),
        "provenance": budget.table.provenance,
        "predicted_ms": budget.table.predict_ms(arch.without_identity()),
        "measured_ms": None,
        "measured_low_ms": None,
        "measured_high_ms": None,
        "measured_raw_ms": None,
        "batch": budget.table.meta.get("batch", 1),
    }


def _print(result: Mapping[str, Any], held: Finished, out: Path) -> None:
    print(f"{out / 'searched.yaml'}")
    for device in result["targets"]:
        print(
            f"  target {device['target_ms']:g} ms on {device['device']}: predicted {device['predicted_ms']:.4g} ms"
            f"{per_image(device['predicted_ms'], device['batch'])} ({device['provenance']} table), not measured"
        )
    whole = "" if result["loss"] is None else f"; as a whole network {result['loss']:.4f}"
    print(
        f"  loss {result['predicted_loss']:.4f} by the drops of {held.folder}, {result['start_loss']:.4f} of its start "
        f"network{whole}"
    )
    if result["largest_of_space"]:
        print(f"  {nothing_taken_away(held.space, held.result['init']['network'] if 'init' in held.result else None)}")
    elif result["strategy"] == "exact":
        print(f"  {exact_for(result)}")
    for device in held.result.get("targets", [held.result]):
        off = device["measured_ms"] / device["predicted_ms"] - 1 if device["measured_ms"] else 0.0
        if abs(off) > SLACK and device["device"] in [each["device"] for each in result["targets"]]:
            print(
                f"  that search's own network took {100 * abs(off):.1f} % {'more' if off > 0 else 'less'} on "
                f"{device['device']} than its table says"
            )
    words = ["nas-search", "--from", str(held.folder)]
    for device in result["targets"]:
        words += ["--target", f"{device['device']}={device['target_ms']!r}", "--table", device["table"]]
    print(f"  next: {shlex.join([*words, '--strategy', result['strategy']])} --verify (evaluates and measures)")
