"""What the files of a finished search's folder say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nas.kept import measurements_file, network_of, normalised_by
from nas.scores import Drops
from nas.table import Calibration, LatencyTable
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.files import parse_yaml, read_csv, read_json
from supernet.space import SearchSpace
from supernet.specs import label


@dataclass(frozen=True)
class Run:
    """What the files of a run's folder say; None for what could not be had, and why."""

    folder: Path
    request: Mapping[str, Any]
    result: Mapping[str, Any]
    arch: ArchConfig
    space: SearchSpace | None
    table: LatencyTable | None
    why_no_table: str

    def rows(self, name: str) -> list[dict[str, str]]:
        """Return the lines of a CSV file of the folder, none where it is missing."""
        try:
            return read_csv(self.folder / name, (), "the file")
        except InputError:
            return []

    @property
    def measurement_files(self) -> list[str]:
        """The files of what networks took on each target's device."""
        return [measurements_file(target["device"], len(self.targets)) for target in self.targets]

    @property
    def measurements(self) -> list[dict[str, str]]:
        """What networks took on the first device, but for what was normalised by another table's references."""
        lines = self.rows(self.measurement_files[0])
        if self.table is None:
            return lines
        return [line for line in lines if normalised_by(self.table).items() <= line.items()]

    @property
    def targets(self) -> list[Mapping[str, Any]]:
        """What was asked of each device and found for it; the first one's is in the result itself too."""
        found: list[Mapping[str, Any]] = self.result.get("targets", [self.result])
        return found

    @property
    def target_ms(self) -> float:
        return float(self.result["target_ms"])

    @property
    def met(self) -> bool | None:
        """Whether the measured network keeps every target; None where a device that decides it did not measure it."""
        known: bool | None = self.result["met"]
        return known

    @property
    def demonstration(self) -> bool:
        return bool(self.result.get("demonstration", self.request.get("data") == "digits"))

    @cached_property
    def own_table(self) -> LatencyTable | None:
        """The table as the search used it: with the calibration of its space alone, where there is one."""
        if self.table is None or self.space is None:
            return self.table
        return self.table.for_space(self.space)

    @cached_property
    def calibration(self) -> Calibration | None:
        """What the found network's rows become its milliseconds by."""
        if self.own_table is None or not self.own_table.calibrations:
            return None
        try:
            return self.own_table.calibration_of(self.arch)
        except InputError:
            return None

    @cached_property
    def drops(self) -> Drops | None:
        """What every single change costs."""
        try:
            return None if self.space is None else Drops.load(self.folder / "drops.csv", self.space)
        except (InputError, OSError):
            return None

    def predict_ms(self, arch: ArchConfig) -> float | None:
        """Return what the run's table says of a network, where it has its rows."""
        if self.own_table is None:
            return None
        try:
            return self.own_table.predict_ms(arch)
        except InputError:
            return None

    @cached_property
    def member(self) -> ArchConfig | None:
        """The found network with its empty slots where they were, which `searched.yaml` leaves out; None where that is not
        known."""
        text = self.result.get("network")
        return self.network(text) if isinstance(text, str) else None

    @property
    def kept(self) -> list[list[str]] | None:
        """What the found network has in each slot, stage by stage; None where that is not known."""
        return None if self.member is None else [[label(block) for block in stage.blocks] for stage in self.member.stages]

    def network(self, text: str) -> ArchConfig | None:
        """Return the network of the space that `described` wrote as `text`, or None."""
        return None if self.space is None else network_of(text, self.space)


def read_run(folder: Path) -> Run:
    try:
        names = ("request", "result")
        request, result = (read_json(folder / f"{name}.json", "the file", "a search writes it") for name in names)
    except InputError as error:
        raise InputError(
            f"{folder} holds no finished search ({error}): give the --out folder of a nas-search that ended"
        ) from error
    space = table = None
    why = ""
    with suppress(InputError, KeyError, TypeError):  # a user's own block whose file is gone, an old request
        space = SearchSpace.from_dict(parse_yaml(request["space"], "its space"), f"the space of {folder}")
    path = Path(request.get("table") or result["table"])
    try:
        table = LatencyTable.load(path, any_form=True)
    except InputError as error:
        why = str(error)
    return Run(folder, request, result, ArchConfig.load(folder / "searched.yaml"), space, table, why)


def to_number(text: object) -> float:
    """Return the number of a CSV's cell, or NaN."""
    try:
        return float(str(text))
    except ValueError:
        return math.nan
