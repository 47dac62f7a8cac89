"""What a run's folder keeps of a search, so that nothing is evaluated or measured twice."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nas.alone import MEASURING, turn
from nas.profilers.bench import now
from nas.profilers.timing import Measurement
from nas.table import LatencyTable
from nas.trajectory import Check, Evaluation, evaluations
from supernet.arch import ArchConfig, Stage, mux_from_entry
from supernet.errors import InputError
from supernet.files import read_csv, reading, write_atomically
from supernet.space import SearchSpace
from supernet.specs import at_width, knobs_of, label

if TYPE_CHECKING:
    from nas.slimming import Importance

REPORT = "report.html"
COMPLEXITY = ("layer", "params", "macs")
IMPORTANCE = ("stage", "slot", "kind", "log_odds")
LARGEST_LOG_ODDS = 700  # exp takes no larger ones


class Remembered:
    """An evaluator whose results are kept in a file, so that a search that is killed does not evaluate again."""

    def __init__(self, evaluate: Callable[[ArchConfig], Evaluation], path: Path) -> None:
        self.evaluate = evaluate
        self.path = path
        self.asked = 0
        self._known = read_evaluations(path)

    def __call__(self, arch: ArchConfig) -> Evaluation:
        ((_, evaluation),) = self.each([arch])
        return evaluation

    def each(self, archs: Sequence[ArchConfig]) -> Iterator[tuple[int, Evaluation]]:
        """Yield what is known first; evaluate the rest at once, each network once, and keep each as soon as it is known."""
        self.asked += len(archs)
        new: dict[str, list[int]] = {}  # where in `archs` a network stands
        for at, arch in enumerate(archs):
            network = described(arch)
            if network in self._known:
                yield at, self._known[network]
            else:
                new.setdefault(network, []).append(at)
        names = list(new)
        for number, evaluation in evaluations(self.evaluate, [archs[places[0]] for places in new.values()]):
            # Other processes may write the file too: those of an Optuna study that share a folder.
            self._known = {**read_evaluations(self.path), **self._known, names[number]: evaluation}
            records = ({"network": k, "loss": repr(v.loss), "accuracy": repr(v.accuracy)} for k, v in self._known.items())
            write_csv(self.path, records, ("network", "loss", "accuracy"))
            yield from ((at, evaluation) for at in new[names[number]])


def read_evaluations(path: Path) -> dict[str, Evaluation]:
    """Return what `Remembered` keeps in a file: networks as `described` says them, and their evaluations."""
    if not path.exists():
        return {}
    do = "remove it, and what it held is evaluated again"
    lines = read_csv(path, ("network", "loss", "accuracy"), "the file of evaluations", do)
    with reading(str(path), do):
        return {line["network"]: Evaluation(float(line["loss"]), float(line["accuracy"])) for line in lines}


def write_importance(path: Path, space: SearchSpace, importance: Importance) -> None:
    """Write `importance.csv`: each slot's kinds and their log-odds against identity."""
    records = (
        {"stage": stage + 1, "slot": slot + 1, "kind": kind, "log_odds": value}
        for (stage, slot), odds in zip(space.slots, importance, strict=True)
        for kind, value in odds.items()
    )
    write_csv(path, records, IMPORTANCE)


def read_importance(path: Path, space: SearchSpace) -> Importance:
    """Return what `write_importance` keeps in a file.

    Raises:
        InputError: it is no such file, or not of this space.
    """
    do = f"search anew, or take {path.parent} from a copy"
    by_slot: dict[tuple[int, int], dict[str, float]] = {at: {} for at in space.slots}
    with reading(str(path), do):
        for line in read_csv(path, IMPORTANCE, "the file of importance", do):
            by_slot[int(line["stage"]) - 1, int(line["slot"]) - 1][line["kind"]] = float(line["log_odds"])
    for (stage, slot), odds in by_slot.items():
        kinds = set(space.stages[stage].kinds) - {"identity"}
        if odds.keys() != kinds or not all(abs(value) < LARGEST_LOG_ODDS for value in odds.values()):
            raise InputError(
                f"{path} needs for slot {slot + 1} of stage {stage + 1} a number below {LARGEST_LOG_ODDS} for each of "
                f"{', '.join(sorted(kinds))}: {do}"
            )
    return [by_slot[at] for at in space.slots]


def measurements_file(device: str, devices: int) -> str:
    """Return the file of what networks take on a device, one of so many of a search."""
    return "measurements.csv" if devices == 1 else f"measurements-{device}.csv"


def normalised_by(table: LatencyTable) -> dict[str, str]:
    """Return the references of a table as a file of measurements has them, in a column each."""
    given = table.meta.get("reference_ms")
    held = given if isinstance(given, dict) else {}
    return {f"{name}_reference_ms": repr(held.get(f"{name}_ms")) for name in ("cached", "streaming")}


class Checks:
    """What networks take on the device: measured here, or read from what was measured elsewhere. Kept in a file, so that
    neither is done twice; what was normalised by another table's references is passed over."""

    HEADER = ("network", "ms", "low_ms", "high_ms", "measured_at", "cached_reference_ms", "streaming_reference_ms", "raw_ms")

    def __init__(self, path: Path, table: LatencyTable) -> None:
        from nas.devices import profiler_of

        self.path = path
        self.table = table
        self.profiler = profiler_of(table)
        self.references = normalised_by(table)
        self.known = self._read()

    def _read(self) -> dict[str, tuple[Check, str]]:
        """Return what the file holds."""
        found: dict[str, tuple[Check, str]] = {}
        if self.path.exists():
            do = "remove it, and what it held is measured again"
            lines = read_csv(self.path, self.HEADER, "the file of measurements", do)
            with reading(str(self.path), do):
                for line in lines:
                    ms, low_ms, high_ms, raw_ms = (float(line[name]) for name in ("ms", "low_ms", "high_ms", "raw_ms"))
                    if not (0 < low_ms <= ms <= high_ms < math.inf and 0 < raw_ms < math.inf):
                        raise ValueError(f"{line['network']} has {ms} ms between {low_ms} and {high_ms}, raw {raw_ms}")
                    if all(line[name] == said for name, said in self.references.items()):
                        found[line["network"]] = Check(ms, low_ms, high_ms, raw_ms), line["measured_at"]
        return found

    def __call__(self, arch: ArchConfig) -> Check:
        """Return how long a network takes, if it is known, or if the table's device is this machine's."""
        return self._check(described(arch.without_identity()), arch)

    def group_ms(self, arch: ArchConfig) -> float | None:
        """Return how long a call of one group of images, or of one image, takes, if the table's device is this machine's."""
        return self._check(f"{described(arch.without_identity())} | one group", arch, arch.group_size).ms

    def _check(self, name: str, arch: ArchConfig, batch: int | None = None) -> Check:
        from nas.measure import measure_alone, table_reference

        if not self._is_known(name):
            if self.profiler is None:
                return Check()
            with turn(MEASURING):  # processes of a study would time the same network at once
                if not self._is_known(name):
                    found = measure_alone(self.profiler, arch, table_reference(self.table), batch)
                    if not self._is_known(name):  # else another machine was first, and all go on from the same milliseconds
                        self._keep(name, found)
        return self.known[name][0]

    def _is_known(self, name: str) -> bool:
        """Whether it was measured: by this process, or by another one of an Optuna study that shares the folder."""
        if name not in self.known:
            self.known = {**self._read(), **self.known}
        return name in self.known

    def knows(self, arch: ArchConfig) -> bool:
        """Whether it was measured."""
        return self._is_known(described(arch.without_identity()))

    def add(self, arch: ArchConfig, found: Measurement) -> None:
        """Keep a measurement."""
        self._keep(described(arch.without_identity()), found)

    def _keep(self, name: str, found: Measurement) -> None:
        self.known = {**self._read(), **self.known, name: (Check(found.ms, found.low_ms, found.high_ms, found.raw_ms), now())}
        # With all digits: a budget that follows from a measurement is the same for whoever reads it.
        of_each = {n: {k: repr(float(v)) for k, v in asdict(check).items()} for n, (check, _) in self.known.items()}
        records = ({"network": n, **of_each[n], "measured_at": at, **self.references} for n, (_, at) in self.known.items())
        write_csv(self.path, records, self.HEADER)


def write_complexity(path: Path, space: SearchSpace) -> None:
    """Write `layers.csv`: the parameters and MACs of each layer that a network of the space can have, images by themselves."""
    from supernet.model import count_layer  # with torch, which readers of the file can do without

    counts = {str(layer): count_layer(layer) for layer in replace(space, mux=()).layers()}
    write_csv(path, ({"layer": k, "params": v.params, "macs": v.macs} for k, v in counts.items()), COMPLEXITY)


def complexity_of(path: Path, arch: ArchConfig) -> tuple[int, int]:
    """Return the parameters and MACs of a network by the file of `write_complexity`.

    Raises:
        InputError: the file cannot be read, or lacks one of the network's layers.
    """
    do = "search anew, or take the run from a copy"
    lines = read_csv(path, COMPLEXITY, "the file of layers", do)
    with reading(str(path), do):
        counts = {line["layer"]: (int(line["params"]), int(line["macs"])) for line in lines}
        params, macs = zip(*(counts[str(layer)] for layer in arch.layers()), strict=True)
    return sum(params), sum(macs)


def described(arch: ArchConfig) -> str:
    """Return a network of a space as one line: a stage's width and its blocks' kinds, stage by stage, and its groups."""
    stages = [f"{s.width}: {' '.join(label(b) for b in s.blocks)}" for s in arch.stages]
    groups = [f"mux: {' '.join(f'{k}={v}' for k, v in knobs_of(arch.mux).items())}"] if arch.mux is not None else []
    return " | ".join(stages + groups)


def network_of(text: str, space: SearchSpace) -> ArchConfig | None:
    """Return the network that `described` wrote as this text; None where it is of another space, or another version's."""
    stages, mux, parts = [], None, text.split(" | ")
    try:
        if parts[-1].startswith("mux:"):
            knobs = (knob.split("=") for knob in parts.pop().split()[1:])
            mux = mux_from_entry({name: int(value) if value.isdigit() else value for name, value in knobs})
        for part, choices in zip(parts, space.stages, strict=True):
            width, _, labels = part.partition(":")
            known = {label(candidate): candidate for candidate in choices.candidates}
            blocks = tuple(at_width(known[name], int(width)) for name in re.findall(r"[^\s(]+(?:\([^)]*\))?", labels))
            stages.append(Stage(int(width), choices.stride, blocks, choices.entry))
        return ArchConfig("evaluated", space.image_size, space.num_classes, tuple(stages), space.head, mux)
    except (KeyError, TypeError, ValueError):  # an InputError is a ValueError
        return None


def network_name(space: str, targets_ms: Sequence[float]) -> str:
    """Return what the network found in a search is called."""
    return "-".join([space, *(f"{ms:g}ms" for ms in targets_ms)])


def write_csv(path: Path, records: Iterable[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Write records as CSV with these columns."""
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for line in records:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
    write_atomically(path, file.getvalue())
