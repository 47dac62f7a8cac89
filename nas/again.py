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
from nas.guarantee import SLACK
from nas.kept import complexity_of, described, network_name, read_evaluations, read_importance, write_csv
from nas.lookup import OnDevice, refuse_unlike, resolve_device
from nas.progress import per_image
from nas.request import Finished, claim, finished
from nas.scores import Drops
from nas.slimming import start_network
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
from nas.trajectory import Check
from supernet.errors import InputError
from supernet.files import write_atomically

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
    on = _devices(held, target_ms, device, targets, table)
    budgets = [Budgeted(each.table, each.table, each.target.ms) for each in on]
    refuse_unreachable(held.space, budgets)
    evaluations = read_evaluations(run / "evaluations.csv")
    importance = read_importance(run / "importance.csv", held.space)
    start = drops.base if "init" in held.request else start_network(held.space, importance)
    scores = Scores(held.space, start, importance, drops, drops.evaluation_for, settings["score"])
    limits = limits_of(held.space, None, settings.get("max_params", 0), settings.get("max_macs", 0))
    if strategy == "exact":
        found = exact(scores, budgets, limits, lambda arch: evaluations.get(described(arch)))
    else:
        found = choose("greedy", scores, budgets, limits, on_step=telling_steps())
    out = out or run / _name(held, budgets, strategy)
    devices = [each.record(found.arch.without_identity(), Check()) for each in on]
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
        name = network_name(held.space.name, [budget.ms for budget in budgets])
        replace(found.arch.without_identity(), name=name).save(out / "searched.yaml")
        write_csv(out / "trajectory.csv", found.records(), found.columns)
        tables = [budget.table for budget in budgets]
        write_csv(out / "frontier.csv", frontier_records(held.space, drops, tables), FRONTIER_COLUMNS)
        write_atomically(out / "result.json", json.dumps(result, indent=2) + "\n")
        _print(result, held, out)
        return result


def _devices(
    held: Finished,
    target_ms: float | None,
    device: str | None,
    targets: Sequence[tuple[str, float]],
    files: Sequence[Path],
) -> list[OnDevice]:
    """Return the targets with their devices' tables, as a search of the run's space uses these."""
    if target_ms is None and device is not None:
        raise InputError(f"--device {device} has no target: give --target {device}=MS, or --target-ms")
    own = {target["device"]: Path(target["table"]) for target in held.targets}
    given = {LatencyTable.load(path).device: path for path in files}
    wanted = [] if target_ms is None else [(device or held.targets[0]["device"], target_ms)]
    found: list[OnDevice] = []
    for name, ms in [*wanted, *targets]:
        id = resolve_device(name)
        path = given.pop(id, None) or own.get(id) or find_table(id)
        table = LatencyTable.load(path)
        if table.missing(held.space.layers()):
            from nas.devices import measuring  # with torch

            table.require(held.space.layers(), measuring(table, f"--space {held.space_file}"))
        say_if_untrue(table)
        found.append(OnDevice(Target(ms), table.for_space(held.space), path))
    refuse_unlike([each.name for each in found], given)
    return found


def _name(held: Finished, budgets: Sequence[Budgeted], strategy: str) -> str:
    """Return what the folder of an answer is called, in the run's: by its targets, devices that are not the run's, strategy."""
    own = [target["device"] for target in held.targets] == [budget.device for budget in budgets]
    parts = [f"{budget.ms:g}ms" if own else f"{budget.device}-{budget.ms:g}ms" for budget in budgets]
    return "-".join(["at", *parts, *([strategy] if strategy != "exact" else [])])


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
    if result["predicted_loss"] < 0 <= result["start_loss"] and result["loss"] is None:
        print("  no loss is below 0: the drops of so many changes do not add up, and --verify says what the network is worth")
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
