"""A latency table: milliseconds of every layer on one device, with their origin, spread and error. No torch."""

from __future__ import annotations

import hashlib
import io
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import pandas as pd
import platformdirs

from nas.export_forms import require_current_form
from nas.progress import say
from supernet.arch import ArchConfig
from supernet.errors import LONGEST, InputError, first_line
from supernet.files import checked_fields, is_path, parse_yaml, read_json, refuse_folder, write_together
from supernet.space import SearchSpace, space_names
from supernet.specs import SPECS, Head, Layer, Spec, is_entry, knobs_of, spec_type_of
from supernet.user_block import is_foreign, loaded

SCHEMA = 2
METHODS = ("slope", "difference", "fitted")
ORIGINS = ("measured", "imported")  # of a table: there are no estimated ones
HARDWARE = ("cpu", "marketing_name")  # what a sidecar's hardware must be the same in, where both have it
ON_MEDIANS = "calibrated_on_medians"  # in a sidecar: networks that were timed elsewhere
FEW_CLASSES, MANY_CLASSES = 10, 1000  # heads are measured at these; a head's ms is linear in its classes

Numbers = TypeVar("Numbers", float, npt.NDArray[np.float64])


class RowsMissing(InputError):
    """A table has no row for a layer that is asked for; the message ends with how to measure it."""


@dataclass(frozen=True)
class Target:
    """A latency in milliseconds that a network must not exceed."""

    ms: float

    def __post_init__(self) -> None:
        if isinstance(self.ms, bool) or not isinstance(self.ms, int | float) or not 0 < self.ms < math.inf:
            raise InputError(f"the target must be a positive number of milliseconds, such as 1.6, but is {self.ms}")


@dataclass(frozen=True)
class Row:
    """Milliseconds of one layer, normalised, with a 95 % interval and the method that gave them.

    `p10_ms`, `p25_ms` and `p90_ms` are percentiles over single visits, `visits` the fewest visits of a model that the row
    is made of. `isolated_ms` is the time of the layer alone in a session, where it was measured: other memory is touched before
    its calls too. `flag` says what speaks against the row.
    """

    ms: float
    low_ms: float
    high_ms: float
    method: str
    p10_ms: float | None = None
    p25_ms: float | None = None
    p90_ms: float | None = None
    visits: int = 0
    isolated_ms: float | None = None
    flag: str = ""


@dataclass(frozen=True)
class CheckedNetwork:
    """A whole network that was measured for a calibration: to fit it, or to tell its error."""

    arch: str  # YAML
    ms: float
    half_width_ms: float
    predicted_ms: float
    fitted: bool

    def network(self) -> ArchConfig:
        where = "a network of the calibration"
        return ArchConfig.from_dict(parse_yaml(self.arch, where), where)

    def layers(self) -> list[Layer]:
        return self.network().layers()


@dataclass(frozen=True)
class Calibration:
    """From a network's rows to its milliseconds, fitted on networks of a space: `offset_ms + line * (1 + bend * line)` with
    `line = scale * sum + scale_between * sum_between`.

    `sum_between` is the part of the sum that stem and embeddings have: their rows were measured between blocks, and where a
    stage is empty they follow each other, which is quicker. `bend`, at least 0, is there because rows are measured among as
    many other weights as a typical network has: a larger network pushes more of its own out of the caches. The errors are
    those of predictions of *other* networks of the space, in percent of the measurement. `error_by_stage_percent` and
    `error_by_kind_percent` are the signed errors, weighted with each network's share of its milliseconds in that stage or
    kind of layer. `networks` are all that were measured.
    """

    space: str
    space_sha256: str
    image_size: int
    strides: tuple[int, ...]
    offset_ms: float
    scale: float
    scale_between: float
    sum_low_ms: float
    sum_high_ms: float
    n_fit: int
    n_check: int
    mean_error_percent: float
    max_error_percent: float
    within_5_percent: float
    within_10_percent: float
    kendall_tau: float
    error_by_stage_percent: tuple[float, ...] = ()
    error_by_kind_percent: Mapping[str, float] = field(default_factory=dict)
    networks: tuple[CheckedNetwork, ...] = ()
    bend: float = 0.0

    def predict_ms(self, sum_ms: float, between_ms: float) -> float:
        return float(calibrated_ms((self.offset_ms, self.scale, self.scale_between, self.bend), sum_ms, between_ms))

    def bent(self, line: float) -> float:
        """Return the factor between the line of a network and its milliseconds over the offset."""
        return float(bend_factor(line, self.bend))

    def steepness(self, line: float) -> float:
        """Return how many milliseconds a millisecond more of the line brings there."""
        return float(bend_factor(line, 2 * self.bend))

    def line_of(self, ms: float) -> float:
        """Return the line at which a network takes so many milliseconds."""
        over = ms - self.offset_ms
        if over <= 0 or math.isinf(over):
            return over
        return 2 * over / (1 + math.sqrt(1 + 4 * self.bend * over))

    def slope_of(self, layer: Layer) -> float:
        """Return what a millisecond of this layer's row adds to the line."""
        return self.scale + (self.scale_between if is_entry(layer.spec) else 0.0)


@dataclass(frozen=True)
class LatencyTable:
    """The rows of one device. Nothing is ever guessed: a layer without a row is an error.

    `meta` says where the numbers come from: hardware, software, settings, reference, dates. `foreign` are the lines of the CSV
    file whose blocks are a user's own, from a file that has not been asked for: they are kept as they are, and nothing is run.
    """

    device: str
    rows: Mapping[Layer, Row]
    calibrations: tuple[Calibration, ...] = ()
    provenance: str = "measured"
    meta: Mapping[str, Any] = field(default_factory=dict)
    foreign: tuple[Mapping[str, str], ...] = ()
    path: Path | None = field(default=None, compare=False)  # of the CSV file that it was read from

    @property
    def batch(self) -> int:
        """How many images a call has."""
        return int(self.meta.get("batch", 1))

    @property
    def on_coreml(self) -> bool:
        return self.meta.get("runtime") == "coreml"

    @property
    def hardware(self) -> str | None:
        """What was measured, by the name that its maker gives it."""
        gpu = self.meta["gpu"]["name"] if isinstance(self.meta.get("gpu"), dict) else None
        return self.meta.get("cpu") or gpu or self.meta.get("chip") or self.meta.get("marketing_name")

    def layer_ms(self, layer: Layer) -> float:
        """Return the milliseconds of a layer. A head's classes are interpolated between 10 and 1000.

        Raises:
            InputError: the table has no row for it.
        """
        row = self.rows.get(layer)
        if row is not None:
            return row.ms
        if isinstance(layer.spec, Head):
            few, many = (self.rows.get(end) for end in head_ends(layer))
            if few is not None and many is not None and layer.spec.num_classes <= MANY_CLASSES:
                share = (layer.spec.num_classes - FEW_CLASSES) / (MANY_CLASSES - FEW_CLASSES)
                return few.ms + share * (many.ms - few.ms)
        raise InputError(self._missing_message([layer]))

    def sum_ms(self, arch: ArchConfig) -> float:
        """Return the sum of the rows of a network's layers.

        Raises:
            InputError: the table has no row for one of them.
        """
        return self.sums_ms(arch)[0]

    def sums_ms(self, arch: ArchConfig) -> tuple[float, float]:
        """Return the sum of the rows of a network's layers, and that of its stem and embeddings, in milliseconds.

        Raises:
            InputError: the table has no row for one of them.
        """
        found = [(layer.spec, self.layer_ms(layer)) for layer in arch.layers()]
        return sum(ms for _, ms in found), sum(ms for spec, ms in found if is_entry(spec))

    def predict_ms(self, arch: ArchConfig) -> float:
        """Return the milliseconds of one call of the network on this device.

        The sum of its rows goes through the calibration of a space with the network's image size and strides; where
        several have them, the one whose networks had most of its kinds of layers, then the one whose networks were nearest in
        latency. A table without any calibration sums.

        Raises:
            InputError: rows are missing, or no calibration has the network's image size and strides.
        """
        if not self.calibrations:
            return self.sum_ms(arch)
        by = self.calibration_of(arch)
        return by.predict_ms(*self.sums_ms(arch))

    def parts_ms(self, arch: ArchConfig) -> tuple[list[tuple[str, Layer, float]], float]:
        """Return what each layer of a network has in its predicted milliseconds, with the name of its module, and what is left:
        the offset of the calibration. Together they are `predict_ms(arch)`.

        Raises:
            InputError: as `predict_ms`.
        """
        by = self.calibration_of(arch) if self.calibrations else None
        slope_of = by.slope_of if by is not None else lambda layer: 1.0
        parts = [(name, layer, slope_of(layer) * self.layer_ms(layer)) for name, layer in arch.named_layers()]
        if by is None:
            return parts, 0.0
        bent = by.bent(math.fsum(ms for _, _, ms in parts))
        return [(name, layer, bent * ms) for name, layer, ms in parts], by.offset_ms

    def calibration_of(self, arch: ArchConfig) -> Calibration:
        """Return the calibration that a network is predicted by; see `predict_ms`.

        Raises:
            InputError: none has the network's image size and strides; or several have, and the table has no row for one of its
                layers.
        """
        matching = [c for c in self.calibrations if (c.image_size, c.strides) == (arch.image_size, arch.strides)]
        if not matching:
            known = ", ".join(f"{c.space} ({c.image_size} px)" for c in self.calibrations)
            raise InputError(
                f"the table of {self.device} is not calibrated for {arch.image_size} px with strides {arch.strides}, "
                f"only for {known}: measure it with {self.building('--arch FILE')}, or with --space"
            )
        if len(matching) == 1:
            return matching[0]
        sum_ms, kinds = self.sum_ms(arch), {layer.spec.kind for layer in arch.layers()}

        def distance(c: Calibration) -> tuple[int, float]:
            return len(kinds - c.error_by_kind_percent.keys()), max(c.sum_low_ms - sum_ms, sum_ms - c.sum_high_ms, 0.0)

        return min(matching, key=distance)

    def serves(self, space: SearchSpace) -> bool:
        """Say whether every network of the space has its rows and a calibration."""
        return bool(self.calibrated_for(space).calibrations) and not self.missing(space.layers())

    def calibrated_for(self, space: SearchSpace) -> LatencyTable:
        """Return the table with the calibrations of this space alone: within one search, predictions must not jump where
        another calibration would be nearer."""
        own = space_sha256(space)
        return replace(self, calibrations=tuple(c for c in self.calibrations if c.space_sha256 == own))

    def for_space(self, space: SearchSpace) -> LatencyTable:
        """Return the table as a search of the space uses it: with the space's own calibrations; as it is, where it has none."""
        own = self.calibrated_for(space)
        return own if own.calibrations else self

    def missing(self, layers: Iterable[Layer]) -> list[Layer]:
        """Return those of the layers that have no row."""
        found = []
        for layer in layers:
            try:
                self.layer_ms(layer)
            except InputError:
                found.append(layer)
        return found

    def building(self, what: str, missing: bool = False) -> str:
        """Return the command that measures the device anew, or rows that are missing alone, into the folder that the table was
        read from. `what` says for which networks, as --space or --arch."""
        command = f"nas-build-lut --device {self.device}"
        working, own, _ = table_folders()
        out = ""  # the user's folder, where one that ships is added to as well
        if self.path is not None and self.path.parent != own and (self.path.parent == working or not ships(self.path)):
            out = f" --out {shlex.quote(str(self.path.parent))}"
        if self.provenance == "imported":
            form = " --format coreml" if self.on_coreml else ""
            then = f" (its results.json goes to `nas-build-lut --import-results results.json{out}`)" if out else ""
            return f"`{command} {what} --export-job DIR{form}`, a folder to run on that device{then}"
        return f"`{command} {'--missing ' if missing else ''}{what}{out}`"

    def require(self, layers: Iterable[Layer], how: str = "") -> None:
        """Refuse the table if one of the layers has no row. `how` to measure more of them is the end of the message.

        Raises:
            RowsMissing: one has none.
        """
        missing = self.missing(layers)
        if missing:
            raise RowsMissing(self._missing_message(missing, how))

    def _missing_message(self, missing: list[Layer], how: str = "") -> str:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        how = how or self.building("--arch FILE", missing=True)
        return f"the table of {self.device} has no row for {missing[0]}{others}: measure with {how}"

    def save(self, folder: str | Path) -> Path:
        """Write `<device>.csv` and, last, `<device>.meta.json`, which holds the CSV's hash; return the CSV's path."""
        csv = _to_csv(self.rows, self.foreign)
        path = Path(folder) / f"{self.device}.csv"
        sidecar = {
            **self.meta,  # first: what somebody's device said of itself replaces nothing below
            "schema": SCHEMA,
            "device": self.device,
            "provenance": self.provenance,
            "csv_sha256": hashlib.sha256(csv.encode()).hexdigest(),
            "calibrations": [asdict(c) for c in self.calibrations],
        }
        write_together({path: csv, path.with_suffix(".meta.json"): json.dumps(sidecar, indent=2) + "\n"})
        return path

    @classmethod
    def load(cls, id_or_path: str | Path, *, any_form: bool = False) -> LatencyTable:
        """Read a table by its device's id (see `find_table`) or from a CSV file with its sidecar beside it.

        With `any_form`, one that was measured on an earlier export form, or an unknown one, too: to be shown or replaced, not
        to predict.

        Raises:
            InputError: there is none, it is of another form, or the file is truncated, of another schema, or holds something
                not allowed.
        """
        text = str(id_or_path)
        if text not in find_tables():
            refuse_folder(text, *(file.name for file in sorted(Path(text).glob("*.csv")) if not _is_beside(file)))
        path = Path(text) if is_path(text, ".csv") else find_table(text)
        table = _load(path)
        if not any_form:
            spaces = [option_of(calibration.space) for calibration in table.calibrations] or ["--space SPACE"]
            remedy = f"build it anew: {' and '.join(map(table.building, spaces))}"
            require_current_form(f"the table {path}", table.meta, remedy)
        return table


def bend_factor(line: Numbers, bend: float) -> Numbers:
    """Return the factor between the line of a network, or of several (n,), and its milliseconds over the offset."""
    factor: Numbers = 1 + bend * np.maximum(line, 0.0)
    return factor


def calibrated_ms(fitted: Sequence[float] | npt.NDArray[np.float64], sum_ms: Numbers, between_ms: Numbers) -> Numbers:
    """Return what a fit says of a network, or of several (n,): see `Calibration`. `fitted`: offset_ms, scale, scale_between and
    bend."""
    offset_ms, scale, scale_between, bend = fitted
    line = scale * sum_ms + scale_between * between_ms
    return offset_ms + line * bend_factor(line, bend)


def option_of(space: str) -> str:
    """Return how a command names a space, or the network, of this name: those that do not ship are in files of the user's."""
    return f"--space {space if space in space_names() else 'FILE'}"


def space_sha256(space: SearchSpace) -> str:
    """Return what identifies the content of a space, whatever its number of classes."""
    return hashlib.sha256(space.with_classes(FEW_CLASSES).to_yaml().encode()).hexdigest()


def head_ends(layer: Layer) -> tuple[Layer, Layer]:
    """Return the two heads that a head's latency is interpolated between."""
    assert isinstance(layer.spec, Head)
    few, many = (replace(layer.spec, num_classes=n) for n in (FEW_CLASSES, MANY_CLASSES))
    return Layer(few, layer.resolution), Layer(many, layer.resolution)


def measured_layers(layers: Iterable[Layer]) -> list[Layer]:
    """Return the layers that need a row so that all of `layers` have a latency: heads at 10 and 1000 classes."""
    found: dict[Layer, None] = {}
    for layer in layers:
        if isinstance(layer.spec, Head):
            found.update(dict.fromkeys(head_ends(layer)))
            if layer.spec.num_classes > MANY_CLASSES:
                found[layer] = None
        else:
            found[layer] = None
    return list(found)


def user_folder() -> Path:
    """The folder of the tables that this user measured or imported."""
    return Path(platformdirs.user_data_dir("metapath-nas", appauthor=False)) / "latency_tables"


def table_folders() -> list[Path]:
    """Where tables are looked for, in order: the working folder, the user's data folder, the tables that ship."""
    return [Path("latency_tables"), user_folder(), _SHIPPED]


def ships(table: Path) -> bool:
    """Say whether a table lies among those that come with the package; in a checkout, those of the working folder do."""
    return table.parent.resolve() == _SHIPPED.resolve()


def find_tables() -> dict[str, Path]:
    """Return every table that can be found, by device id; the first folder that has an id wins."""
    found: dict[str, Path] = {}
    for folder in table_folders():
        for sidecar in sorted(folder.glob("*.meta.json")):
            device = sidecar.name.removesuffix(".meta.json")
            found.setdefault(device, folder / f"{device}.csv")
        for csv in sorted(folder.glob("*.csv")):
            if not _is_beside(csv) and not csv.with_name(f"{csv.stem}.meta.json").exists():
                _say_alone(csv)
    return found


def _is_beside(path: Path) -> bool:
    """Whether a file is one of those that lie beside a table."""
    return path.name.endswith((".meta.json", ".samples.csv"))


@cache
def _say_alone(csv: Path) -> None:
    say(f"warning: {csv} has no {csv.stem}.meta.json beside it, so it is not used: copy both files, or remove it")


def find_table(device: str) -> Path:
    """Return the table of a device id."""
    found = find_tables()
    if device not in found:
        there = f"there are tables of {', '.join(found)}" if found else "there is none of any device"
        raise InputError(
            f"no latency table of {device!r} here ({there}): measure it with `nas-build-lut --device {device}`, which says how "
            "where that is another machine"
        )
    return found[device]


_SHIPPED = Path(__file__).parents[1] / "latency_tables"
_SPEC_FIELDS = list(dict.fromkeys(f.name for spec in SPECS.values() for f in fields(spec)))
_ROW_FIELDS = [f.name for f in fields(Row)]
_COLUMNS = ["kind", "resolution", *_SPEC_FIELDS, *_ROW_FIELDS]


def _to_csv(rows: Mapping[Layer, Row], foreign: Sequence[Mapping[str, str]] = ()) -> str:
    lines: list[dict[str, str]] = [dict(line) for line in foreign]
    for (spec, resolution), row in rows.items():
        line: dict[str, object] = {"kind": spec.kind, "resolution": resolution}
        line.update({name: repr(v) if isinstance(v, float) else v for name, v in knobs_of(spec).items()})  # all digits
        line.update({f.name: getattr(row, f.name) for f in fields(Row)})
        lines.append({name: _cell(value) for name, value in line.items()})
    used = {name for line in lines for name in line}
    users = sorted(used - set(_COLUMNS))  # knobs of blocks that are not the package's
    columns = ["kind", "resolution", *_SPEC_FIELDS, *users, *_ROW_FIELDS]
    file = io.StringIO()
    frame = pd.DataFrame([{name: line.get(name, "") for name in columns} for line in lines], columns=columns)
    frame = frame.sort_values(["kind", "resolution", "dim"], key=_as_number, kind="stable")
    frame.to_csv(file, index=False, lineterminator="\n")
    return file.getvalue()


def _as_number(column: pd.Series) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce")
    return column if numbers.isna().any() else numbers


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _load(path: Path) -> LatencyTable:
    sidecar_path = path.with_suffix(".meta.json")
    if not path.is_file():
        raise InputError(f"the latency table {path} does not exist: give the path of a table's CSV file")
    if _is_beside(path):
        table = path.name.removesuffix(".meta.json").removesuffix(".samples.csv") + ".csv"
        raise InputError(f"{path} lies beside a latency table and is none: give {path.with_name(table)}")
    if not sidecar_path.is_file():
        raise InputError(f"the latency table {path} needs {sidecar_path}, which is not there: copy both files or build it anew")
    sidecar = read_json(sidecar_path, "the latency table's sidecar", "build the table anew with nas-build-lut")
    if sidecar.get("schema") != SCHEMA:
        given = sidecar.get("schema")
        raise InputError(f"{sidecar_path} has schema {given!r}, this version reads {SCHEMA}: build the table anew")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"the latency table {path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != sidecar.get("csv_sha256"):
        raise InputError(
            f"{path} is not the file that its sidecar describes (truncated or edited): build it anew with nas-build-lut"
        )
    try:
        frame = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
        everything: list[dict[str, str]] = [{str(k): str(v) for k, v in line.items()} for line in frame.to_dict("records")]
        foreign = [line for line in everything if is_foreign(line["kind"])]
        unknown_columns = sorted(set(frame.columns) - set(_COLUMNS) - {f.name for t in loaded.values() for f in fields(t)})
        if unknown_columns and not foreign:
            raise ValueError(f"unknown columns {unknown_columns}")
        rows = {_parse_layer(line): _parse_row(line) for line in everything if line not in foreign}
        device = sidecar.pop("device")
        calibrations = tuple(_parse_calibration(c) for c in sidecar.pop("calibrations"))
        provenance = sidecar.pop("provenance")
        _check_meta(sidecar)
        if not isinstance(device, str):
            raise ValueError("its device is no text")
        if provenance not in ORIGINS:
            raise ValueError(f"its provenance must be {' or '.join(ORIGINS)}, but is {provenance!r}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        why = first_line(error, LONGEST)
        raise InputError(f"{path} cannot be read as a latency table ({why}): build it anew with nas-build-lut") from error
    if device != path.stem:
        raise InputError(f"{path} is a table of {device}: give the file its own name back, {device}.csv")
    for name in ("schema", "csv_sha256"):
        sidecar.pop(name)
    return LatencyTable(device, rows, calibrations, provenance, sidecar, tuple(foreign), path)


def _parse_layer(line: Mapping[str, str]) -> Layer:
    spec_type = spec_type_of(line["kind"])
    types = get_type_hints(spec_type)
    knobs: dict[str, Any] = {}
    for knob in fields(spec_type):
        text = line.get(knob.name, "")
        if text:
            knobs[knob.name] = _parse_knob(text, types[knob.name])
    spec: Spec = spec_type(**knobs)
    return Layer(spec, int(line["resolution"]))


def _parse_knob(text: str, kind: Any) -> Any:
    if kind is bool:
        return text == "True"
    return tuple(int(part) for part in text.split()) if get_origin(kind) is tuple else kind(text)


def _parse_row(line: Mapping[str, str]) -> Row:
    values: dict[str, Any] = {}
    for name, kind in get_type_hints(Row).items():
        text = line.get(name, "")
        if kind is str:
            values[name] = text
        elif kind is int:
            values[name] = int(text)
        elif text or name in ("ms", "low_ms", "high_ms"):
            values[name] = float(text)
    row = Row(**values)
    if not (math.isfinite(row.ms) and row.low_ms <= row.ms <= row.high_ms):
        raise ValueError(f"{row.ms} ms is not within its interval from {row.low_ms} to {row.high_ms}")
    if row.method not in METHODS:
        raise ValueError(f"method {row.method!r} is none of {', '.join(METHODS)}")
    return row


def _parse_calibration(entry: Mapping[str, Any]) -> Calibration:
    where = "a calibration"
    given = checked_fields(Calibration, entry, where)
    networks = (checked_fields(CheckedNetwork, network, f"{where}: a network") for network in entry["networks"])
    given["networks"] = tuple(CheckedNetwork(**network) for network in networks)
    given["strides"] = tuple(map(int, entry["strides"]))
    given["error_by_stage_percent"] = tuple(map(float, entry["error_by_stage_percent"]))
    given["error_by_kind_percent"] = {str(kind): float(error) for kind, error in entry["error_by_kind_percent"].items()}
    found = Calibration(**given)
    decides = (found.offset_ms, found.scale, found.scale_between, found.bend, found.sum_low_ms, found.sum_high_ms)
    told = (found.mean_error_percent, *(value for n in found.networks for value in (n.ms, n.predicted_ms)))
    if not all(map(math.isfinite, (*decides, *told))):
        raise ValueError(f"the calibration for {found.space} has a number that is not finite")
    if found.scale <= 0:
        raise ValueError(f"the calibration for {found.space} has a scale of {found.scale:g}, which must be above 0")
    if found.bend < 0:
        raise ValueError(f"the calibration for {found.space} has a bend of {found.bend:g}, which must be at least 0")
    return found


def _check_meta(meta: Mapping[str, Any]) -> None:
    """Refuse a sidecar whose fields, where it has them, are not what is computed with."""
    for name in ("batch", "threads"):
        if name in meta and not (type(meta[name]) is int and meta[name] > 0):
            raise ValueError(f"{name} must be a whole number of at least 1, but is {meta[name]!r}")
    for name in ("builds", "warnings"):
        if not isinstance(meta.get(name, []), list):
            raise ValueError(f"{name} must be a list, but is {meta[name]!r}")
    references = meta.get("reference_ms", {})
    if not isinstance(references, Mapping) or not all(0 < float(ms) < math.inf for ms in references.values()):
        raise ValueError(f"reference_ms must hold positive milliseconds, but is {references!r}")
