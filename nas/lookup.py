"""Which tables a search goes by: found, refused, or measured now. No torch, until something is measured."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.device_ids import KINDS, PHONES
from nas.progress import say
from nas.table import FEW_CLASSES, MANY_CLASSES, LatencyTable, Target, find_tables, ships, table_folders, user_folder
from nas.trajectory import Check
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.space import SearchSpace, space_names


@dataclass(frozen=True)
class Place:
    """A target, the id of the device that it is on, and the path of that device's table, where it has one."""

    target: Target
    device: str
    table: Path | None
    named: bool  # the user named the table's file


@dataclass(frozen=True)
class OnDevice:
    """A target, and the table that says what networks take on its device."""

    target: Target
    table: LatencyTable
    path: Path

    @property
    def name(self) -> str:
        return self.table.device

    def digest(self) -> str:
        """Return a hash of all that the table says."""
        return hashlib.sha256(self.path.read_bytes() + self.path.with_suffix(".meta.json").read_bytes()).hexdigest()

    def record(self, arch: ArchConfig, check: Check) -> dict[str, Any]:
        """Return what `result.json` says of a network on this device."""
        return {
            "target_ms": self.target.ms,
            "device": self.name,
            "table": str(self.path),
            "provenance": self.table.provenance,
            "predicted_ms": self.table.predict_ms(arch),
            "measured_ms": check.ms,
            "measured_low_ms": check.low_ms,
            "measured_high_ms": check.high_ms,
            "measured_raw_ms": check.raw_ms,
            "batch": self.table.batch,
        }


def places(targets: Sequence[tuple[str | None, float]], tables: Sequence[Path] = ()) -> list[Place]:
    """Return where each target is to be met: a device, or None for the usual one, and its milliseconds.

    Raises:
        InputError: a device is unknown, or given twice, or a table is of none of them.
    """
    if len(targets) == 1:
        if len(tables) > 1:
            raise InputError(f"there is one target but {len(tables)} tables: give a --target DEVICE=MS for each")
        (device, ms) = targets[0]
        found = resolve_table(device, tables[0] if tables else None)
        return [Place(Target(ms), *found, named=bool(tables))]
    named = {LatencyTable.load(path).device: path for path in tables}
    result: list[Place] = []
    for device, ms in targets:
        # None means this machine's CPU where its table is given.
        path = named.pop(resolve_device(device or "cpu"), None)
        result.append(Place(Target(ms), *resolve_table(device, path), named=path is not None))
    refuse_unlike([place.device for place in result], named)
    return result


def refuse_unlike(devices: Sequence[str], left_over: Mapping[str, Path]) -> None:
    """Refuse two targets on one of the devices, and tables that are left over because they are of none of them."""
    if twice := next((id for id in devices if devices.count(id) > 1), None):
        raise InputError(f"there are two targets on {twice}: give one for each device")
    for device, path in left_over.items():
        raise InputError(f"the table {path} is of {device}, which has no target: those are on {' and '.join(devices)}")


def groups_of(space: SearchSpace, objective: str, device: str, table: Path | None) -> SearchSpace:
    """Return the space with the ways of grouping images of which the calls of the device's table have whole groups.

    Raises:
        InputError: throughput is the objective, and there are none.
    """
    from nas.devices import open_profiler
    from nas.plan import for_batch

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


def resolve_device(device: str) -> str:
    """Return a device's id: what is not a kind of device is one. Of a kind that is elsewhere it is that of its only table."""
    if device not in KINDS:
        return device
    from nas.devices import open_profiler, table_of_kind  # with torch

    return table_of_kind(device) if device in PHONES else open_profiler(device).id


def resolve_table(device: str | None, table: Path | None) -> tuple[str, Path | None]:
    """Return the device id that the user means, and its table's path where there is one.

    Without either flag: the only table that the user measured or imported, else this machine's CPU.

    Raises:
        InputError: the device is unknown, several tables could be meant, or the table is of another device.
    """
    from nas.devices import no_table, open_profiler

    here = open_profiler().id
    wanted = resolve_device(device) if device is not None else None
    if table is not None:
        of = LatencyTable.load(table).device
        if of != (wanted or here):
            asked = f"--device {device}" if device else f"this machine's CPU ({here})"
            raise InputError(f"the table {table} is of {of}, not of {asked}: give --device {of}, or another table")
        return of, table
    found = find_tables()
    if wanted is None:
        own = {id: path for id, path in found.items() if id == here or not ships(path)}
        if len(own) > 1:
            raise InputError(f"there are tables of {', '.join(sorted(own))}: say which with --device")
        wanted = next(iter(own), here)
    if wanted not in found and wanted != here:
        try:
            open_profiler(wanted)
        except InputError:
            raise no_table(wanted) from None
    return wanted, found.get(wanted)


def usable_table(place: Place, space: SearchSpace, space_name: str) -> tuple[LatencyTable, Path]:
    """Return the device's table and its path, with every row and the calibration that the space needs.

    `space_name`: what a command that measures the space calls it.

    What this machine's own table lacks is measured now, unless the user named the file.
    """
    from nas.audit import say_if_untrue
    from nas.devices import measuring, open_profiler, profiler_of
    from nas.lut import build_table, place_here, table_to_extend
    from nas.measure import table_reference

    device, path = place.device, place.table
    table = LatencyTable.load(path) if path is not None else None
    profiler = profiler_of(table) if table is not None else open_profiler(device)
    if table is not None and path is not None:
        if profiler is not None:
            table_reference(table)  # refuses, before anything is trained, a table that measurements cannot be compared with
        if place.named or profiler is None:
            table.require(space.layers(), measuring(table, f"--space {space_name}"))
            table.predict_ms(space.smallest)  # refuses a table without a calibration for such networks
            say_if_untrue(table)
            return table.for_space(space), path
        now, then = profiler.environment()["runtime_version"], table.meta.get("runtime_version")
        if then != now:
            say(
                f"warning: the table was measured with {table.meta.get('runtime')} {then or 'of an unknown version'}, this is "
                f"{now}: {_command(device, space_name, path.parent)} measures it anew"
            )
        say_if_untrue(table)
        if table.serves(space):
            return table.calibrated_for(space), path
    assert profiler is not None
    folder = path.parent if path is not None and path.parent in table_folders()[:2] else user_folder()
    if table is not None:  # what cannot be added to is refused before it is said that anything is measured
        anew = f"measure it anew with {_command(device, space_name, folder)}"
        table_to_extend(folder / f"{device}.csv", place_here(profiler), only_missing=True, space=space.name, anew=anew)
    if table is None:
        say(f"this machine's table ({device}) is not there yet: measuring it first")
    elif table.missing(space.layers()):
        say(f"this machine's table lacks rows of {space.name}: measuring it first")
    else:
        say(
            f"this machine's table has the rows of {space.name} and no calibration for it: measuring networks of it first "
            f"(where another space's may do, --table {shlex.quote(str(path))} takes the table as it is)"
        )
    measured = space if space.num_classes > MANY_CLASSES else space.with_classes(FEW_CLASSES)
    table = build_table(profiler, measured, folder, only_missing=True)
    return table.calibrated_for(space), folder / f"{device}.csv"


def _command(device: str, space_name: str, folder: Path) -> str:
    """Return the command that measures all rows of a space anew."""
    return f"`{shlex.join(['nas-build-lut', '--device', device, '--space', space_name, '--out', str(folder)])}`"
