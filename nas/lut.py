"""Build a latency table: measure what a space needs (see `plan`), make rows of it, calibrate on whole networks.

Every visit is appended to `<device>.samples.csv`; a killed build goes on from there. Its marker, one a space, says since when
its visits are in that file; those that another space's build has made meanwhile are visits of the same models, and count.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas.alone import alone
from nas.audit import NOISY, Doubt, doubts, flagged, say_if_untrue
from nas.calibration import calibrate, on_medians, refitted
from nas.devices import is_called
from nas.job import device_of, place_of, read_results, visits_of
from nas.measure import Model, Profiler, name_of, table_reference
from nas.plan import FEWEST_NETWORKS, PROTOCOL, Terms, Work, for_batch, in_many_sessions, terms_of, work_for
from nas.profilers.bench import (
    LOOSER,
    Bench,
    Damaged,
    Plan,
    Samples,
    TooNoisy,
    carry_out,
    now,
    read_samples,
    reference_of,
    refuse_noise,
)
from nas.profilers.ort_session import BUSY
from nas.profilers.timing import Measurement, Visit, Workload, summarise
from nas.progress import progress, say
from nas.table import HARDWARE, ON_MEDIANS, Calibration, LatencyTable, Row, find_table, measured_layers, space_sha256
from supernet.errors import InputError, placed
from supernet.files import parse_yaml, read_csv, read_json, reading, write_atomically
from supernet.space import SearchSpace
from supernet.specs import Layer, is_block
from supernet.zoo import load_arch

FEWEST_MEDIANS = 3  # typed from elsewhere, to calibrate on
SAME_MS = 0.005  # a row farther from what its visits say was changed by hand; samples have six digits
FLAG_FLOOR = 0.005  # of a typical network's milliseconds: narrower intervals of rows do not matter
SAME = ("runtime", "runtime_version", "threads", "precision", "batch", "export", "protocol")  # in all rows of a table


def build_table(
    profiler: Profiler,
    space: SearchSpace,
    folder: Path,
    *,
    only_missing: bool = False,
    only_networks: bool = False,
    seed: int = 0,
) -> LatencyTable:
    """Measure the rows of a space on a device, calibrate, write the table to `folder` and return it.

    Rows of other spaces that the table holds are kept. A killed build goes on where it was when it is called again.

    Args:
        only_missing: measure those rows that the table there does not have, and whole networks.
        only_networks: measure whole networks alone, and calibrate the rows that are there on them.

    Raises:
        InputError: the space is too small, or the table there was measured otherwise and is only to be completed, or has not
            all rows that are to be calibrated.
        Failed: the device was too busy or too hot to be measured; nothing is written.
    """
    with alone(folder, profiler.id):
        return _built(profiler, space, folder, only_missing, only_networks, seed)


def place_here(profiler: Profiler) -> dict[str, Any]:
    """Return what a table says of how its rows are measured now."""
    return {**profiler.environment(), "protocol": PROTOCOL}


def _built(
    profiler: Profiler, space: SearchSpace, folder: Path, only_missing: bool, only_networks: bool, seed: int
) -> LatencyTable:
    torch.manual_seed(seed)
    path = folder / f"{profiler.id}.csv"
    place = place_here(profiler)
    space = for_batch(space, int(place["batch"]))
    anew = f"build it anew without --{'recalibrate' if only_networks else 'missing'}"
    old = table_to_extend(path, place, only_missing or only_networks, space=space.name, anew=anew)
    layers = measured_layers(space.layers())
    if only_networks:
        if old is None or any(layer not in old.rows for layer in layers):
            raise InputError(
                f"{path} has not every row of {space.name}, which --recalibrate calibrates: measure them first, without it"
            )
        layers = []
    if only_missing and old is not None:
        layers = [layer for layer in layers if layer not in old.rows]
        if not layers and old.serves(space):
            say(f"{path} already has every row of {space.name}")
            return old
    work = work_for(space, layers, seed, place["precision"])
    work = in_many_sessions(work) if getattr(profiler, "opens_quickly", False) else work
    sha256 = space_sha256(space)  # a part of it names a build, another one a recalibration: neither goes on with the other
    marker = folder / f"{profiler.id}.{sha256[8:16] if only_networks else sha256[:8]}.building.json"
    _forget(m for m in _markers(folder, profiler.id) if not _is_of(m, place))  # the visits from here on are no part of those
    for warning in place["warnings"]:
        say(f"warning: {warning}")
    started, place["warnings"] = _started(marker, space, place, work.plan)
    flags = _Flags(folder / f"{profiler.id}.flags.json", started)
    try:
        samples = Samples(folder / f"{profiler.id}.samples.csv", started)
    except Damaged as error:
        raise InputError(str(error)) from error
    rows = f"{len(layers)} rows of {profiler.id} for {space.name} from {len(work.plan.pieces)} models and "
    if only_networks:
        rows = f"no row of {profiler.id} for {space.name}, but "
    say(
        f"measuring {rows}{len(work.networks)} networks, {place['runtime']} {place['runtime_version']}, {place['precision']}, "
        f"batch {place['batch']}, threads {place['threads']}; leave the machine alone meanwhile"
    )
    models = work.models
    try:
        with profiler.exclusive(), progress(profiler.id, work.plan.visits) as tick:

            def opened(name: str) -> tuple[Workload, int]:
                found = profiler.open(models[name])
                flags.update(profiler.flags)
                return found

            bench = Bench(samples, opened, profiler.stopwatch(), random.Random(seed), work.plan, say)
            carry_out(work.plan, bench, tick, profiler.between(work.plan.most_touched_bytes))
    except TooNoisy:
        _forget(_markers(folder, profiler.id))  # the next build begins anew, of whatever space: these visits are in all of them
        raise
    except InputError:
        if not samples.visits:  # nothing to go on with
            marker.unlink(missing_ok=True)
        raise
    finally:
        samples.close()
    build = {"started": started, "finished": now(), "typical_params": work.typical_params}
    place["builds"] = [*(old.meta.get("builds", ()) if old is not None else ()), build]
    at_end = {name: value for name, value in profiler.environment().items() if value != place.get(name)}
    for warning in at_end.get("warnings", ()):
        if warning not in place["warnings"] and not warning.startswith(BUSY):  # with this build
            say(f"warning: {warning}")
    place = {**place, "seed": seed, "statistics": _statistics(asdict(work.plan)), "at_end": at_end}
    table = write_table(profiler.id, space, work, samples.visits, place, old, folder, flags=flags.words)
    marker.unlink(missing_ok=True)
    if not _markers(folder, profiler.id):  # nobody goes on with these visits
        flags.path.unlink(missing_ok=True)
    return table


def write_table(
    device: str,
    space: SearchSpace,
    work: Work,
    visits: Mapping[str, Sequence[Visit]],
    place: Mapping[str, Any],
    old: LatencyTable | None,
    folder: Path,
    *,
    provenance: str = "measured",
    flags: Mapping[str, str],
) -> LatencyTable:
    """Make the table of what was measured, write it to `folder`, say how true it is, and return it as it is written.

    `flags` are words about models (off-npu, timeout, load-error): the rows that they serve carry them, and rows of models
    that could not be visited are left out.

    Raises:
        InputError: too few whole networks could be measured to calibrate.
    """
    if old is not None and _replaces_all(space, work, old):
        old = None  # nor does the pace stay that it was measured at
    # One reference for all rows of a table: rows that were measured earlier stay as they are.
    reference = table_reference(old) if old is not None else reference_of(visits)
    rows, per_session = dict(old.rows) if old is not None else {}, work.plan.session_visits
    for layer, terms in work.rows.items():
        names = [name_of(model) for model in terms]
        words = sorted({flags[name] for name in names if name in flags})
        if not all(name in visits for name in names):
            say(f"warning: {layer} has no row, because a model of it could not be measured ({', '.join(words)})")
            rows.pop(layer, None)
            continue
        found = {model: summarise(visits[name_of(model)], reference, per_session) for model in terms}
        rows[layer] = replace(row_of(layer, terms, found), flag=" ".join(words))
    meta = {**place, "reference_ms": reference._asdict()}
    table = LatencyTable(device, rows, (), provenance, meta, old.foreign if old is not None else ())
    networks = [arch for arch in work.networks if name_of(tuple(arch.layers())) in visits and not table.missing(arch.layers())]
    if len(networks) < FEWEST_NETWORKS:
        raise InputError(
            f"only {len(networks)} of {len(work.networks)} networks could be measured, at least {FEWEST_NETWORKS} are needed "
            "to calibrate the table: nothing is written"
        )
    measured = [summarise(visits[name_of(tuple(arch.layers()))], reference, per_session) for arch in networks]
    table = replace(table, rows=flagged(rows, FLAG_FLOOR * float(np.median([m.ms for m in measured]))))
    calibration = calibrate(space, table, networks, measured)
    kept = [refitted(c, old, table) for c in old.calibrations if not _is_replaced(c, space)] if old is not None else []
    if old is not None and not all(c.networks for c in kept):
        meta |= {name: old.meta[name] for name in (ON_MEDIANS,) if name in old.meta}
    table = replace(table, calibrations=(*kept, calibration), meta=meta)
    written = table.save(folder)
    say(
        f"{written}: {len(table.rows)} rows; over {calibration.n_check} networks that took no part in the fit the prediction "
        f"is off by {calibration.mean_error_percent:.1f} % on average, {calibration.max_error_percent:.1f} % at most"
    )
    for doubt in doubts(table):
        if doubt.why != NOISY:
            say(f"warning: the row of {doubt.layer}, {doubt.ms:.4g} ms, is doubtful: {doubt.why}")
    say_if_untrue(table)
    # With six digits: a search that goes by it now, and one that goes on with the file, go by the same milliseconds.
    return LatencyTable.load(written, any_form=True)


def _statistics(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return by which rule the newest visits were made and summed up."""
    return {
        **{name: plan[name] for name in ("passes", "min_visits", "row_goal", "floor", "network_goal")},
        "session_visits": plan.get("session_visits", 0),
        "strict_visits": plan.get("strict_visits"),
        "after_strict_visits": f"of what is not known to {LOOSER:g} times the goals",
        "estimate": "median over visits, each the median of its calls, divided by how much slower the references were",
        "interval": "95 %, of a model's median by order statistics, with session_visits of the mean of its sessions' medians, "
        "too; of a row, its models' half-widths in quadrature",
    }


def _replaces_all(space: SearchSpace, work: Work, old: LatencyTable) -> bool:
    """Whether nothing of a table stays when the space is measured."""
    rows = set(old.rows) <= set(work.rows) and not old.foreign
    return rows and all(_is_replaced(c, space) for c in old.calibrations)


def _is_replaced(calibration: Calibration, space: SearchSpace) -> bool:
    """Whether a space's new calibration takes the place of this one: it is of the space, or of what the space was."""
    was = (calibration.space, calibration.image_size, calibration.strides)
    return was == (space.name, space.image_size, space.strides)


class Unusable(InputError):
    """The results of a device cannot be used. Reading them again changes nothing; measuring anew may."""


@contextmanager
def _judged() -> Iterator[None]:
    """Say of the refusals of a block of code that they are about results."""
    try:
        yield
    except InputError as error:
        raise Unusable(str(error)) from error


def import_results(path: Path, folder: Path, device: str | None = None) -> LatencyTable:
    """Make the table of a job's results, write it to `folder`, the visits beside it, and return it. `device`: what they must
    be of, an id or a kind.

    Raises:
        Unusable: the results are not whole, not of their job, not of `device`, or not in milliseconds.
        TooNoisy: the device was too busy or too hot.
        InputError: the folder cannot be written, or another process works on the device's table.
    """
    with _judged():
        found, space, work, results, place = _results_of(path, device)
    with alone(folder, found):
        old = table_to_extend(folder / f"{found}.csv", place, only_missing=False, provenance="imported")
        # Stamped as of now, as a device's own clock may be wrong. A build of this very machine that is to go on would take them
        # for its own.
        at, visits, kept = now(), visits_of(results), not _markers(folder, found)
        build = {"started": at, "finished": at, "typical_params": work.typical_params}
        place["builds"] = [*(old.meta.get("builds", ()) if old is not None else ()), *([build] if kept else [])]
        with _judged():
            table = write_table(found, space, work, visits, place, old, folder, provenance="imported", flags=results["flags"])
        if kept:
            samples = Samples(folder / f"{found}.samples.csv", at)
            try:
                for model, of_model in visits.items():
                    for visit in of_model:
                        samples.add(model, visit, at)
            finally:
                samples.close()
        return table


def _results_of(path: Path, device: str | None) -> tuple[str, SearchSpace, Work, dict[str, Any], dict[str, Any]]:
    """Return whose the results of a job are, its space and work, the results, and where they were measured."""
    results, manifest = read_results(path)
    if manifest["verify"] is not None:
        raise InputError(f"{path} measures the network of a search: give it to nas-search --from RUN --verify")
    found = device_of(results, manifest)
    if device is not None and not is_called(device, found):
        raise InputError(f"{path} is of {found}, not of {device}: leave --device out, or bring the results of {device}")
    space = SearchSpace.from_dict(parse_yaml(manifest["space"], "the job's space"), "the job's space")
    place = {**place_of(results, manifest), "protocol": manifest.get("protocol")}
    if manifest["format"] == "onnx":  # an app makes its visits by a rule of its own
        place["statistics"] = _statistics(manifest["plan"])
    layers = measured_layers(space.layers())
    named = {str(layer): layer for layer in layers}
    if not set(manifest["rows"]) <= set(named):
        raise InputError(f"{path} is of a job that another version of this package exported: export and run it anew")
    work = work_for(space, [named[name] for name in manifest["rows"]], manifest["seed"], place["precision"])
    work = replace(work, plan=replace(work.plan, session_visits=int(manifest["plan"].get("session_visits", 0))))
    if list(work.plan.networks) != manifest["plan"]["networks"]:
        raise InputError(f"{path} is of a job that another version of this package exported: export and run it anew")
    if not results["visits"]:
        words = ", ".join(sorted(set(results["flags"].values())))
        raise InputError(f"{path} has no visits: the device could run none of the models ({words})")
    anew = "docs/coreml.md says how" if manifest["format"] == "coreml" else "python3 run_job.py --again"
    refuse_noise(visits_of(results), f"End other work there, let it cool, and measure the job anew: {anew}")
    if "warnings" not in results["environment"]:
        for warning in place["warnings"]:
            say(f"warning: {warning}")
    return found, space, work, results, place


def import_medians(path: Path, folder: Path | None, device: str | None) -> LatencyTable:
    """Calibrate a table anew on whole networks that somebody timed otherwise, such as with Xcode's performance report.

    `path` is a CSV file with the columns `network` (a YAML file or a name of the zoo) and `ms` (the median of a call). The rows
    stay; offset and scale are fitted to these networks, and the error told is that of each one left out in turn.

    Raises:
        InputError: the file cannot be read, has under three networks, or the table lacks rows or a calibration for them.
    """
    if device is None:
        raise InputError(f"say whose medians {path} holds: --device ID, of a table that is there (--list)")
    own = folder / f"{device}.csv" if folder is not None else None  # a table that is there is not replaced by another one
    beside = own if own is not None and own.exists() else find_table(device)
    folder = folder or beside.parent
    with alone(folder, device):
        return _on_medians(path, folder, device, LatencyTable.load(beside))


def _on_medians(path: Path, folder: Path, device: str, table: LatencyTable) -> LatencyTable:
    do = "give a CSV file with the columns network,ms and numbers of milliseconds"
    with reading(str(path), do):
        lines = [(line["network"], float(line["ms"])) for line in read_csv(path, ("network", "ms"), "the file of medians", do)]
    with placed(str(path)):
        archs = [load_arch(network) for network, _ in lines]
    y = np.array([ms for _, ms in lines])
    if len(archs) < FEWEST_MEDIANS or not (np.isfinite(y) & (y > 0)).all():
        raise InputError(
            f"{path} has {len(archs)} networks: give at least {FEWEST_MEDIANS}, each with its milliseconds above 0"
        )
    geometries = {(arch.image_size, arch.strides) for arch in archs}
    calibrated = [c for c in table.calibrations if {(c.image_size, c.strides)} == geometries]
    if not calibrated:
        raise InputError(f"the table of {device} has no calibration for the image size and strides of the networks in {path}")
    table.require(layer for arch in archs for layer in arch.layers())
    x = np.array([table.sum_ms(arch) for arch in archs])
    with placed(str(path)):
        fitted = {c.space_sha256: on_medians(c, x, y) for c in calibrated}
    kept = tuple(fitted.get(c.space_sha256, c) for c in table.calibrations)
    table = replace(table, calibrations=kept, meta={**table.meta, ON_MEDIANS: [network for network, _ in lines]})
    written, error = table.save(folder), next(iter(fitted.values())).mean_error_percent
    say(f"{written}: calibrated on {len(x)} networks; each one left out in turn, the others say it to {error:.1f} %")
    say_if_untrue(table)
    return table


def table_to_extend(
    path: Path,
    place: Mapping[str, Any],
    only_missing: bool,
    provenance: str = "measured",
    *,
    space: str = "",
    anew: str = "build it anew without --missing",
) -> LatencyTable | None:
    """Return the table that is to be extended, if it was measured in the same way. A damaged one is replaced, unless its
    rows are needed.

    Raises:
        InputError: it is of other hardware, or its rows are needed and it is damaged or was measured in another way; `anew` is
            what helps, which measures those of `space`.
    """
    if not path.exists():
        return None
    try:
        old = LatencyTable.load(path, any_form=True)
    except InputError as error:
        if only_missing and not _markers(path.parent, path.stem):  # with one, a kill came while both were written
            raise
        say(f"{error}: this build replaces it")
        return None
    for name in HARDWARE:
        if old.meta.get(name) and place.get(name) and old.meta[name] != place[name]:
            raise InputError(
                f"the table {path} was measured on {old.meta[name]}, but what is measured now on {place[name]}: give another "
                "--out, or move that table away"
            )
    was = {**old.meta, "origin": old.provenance}
    here = {**place, "origin": provenance}
    changed = [k for k in (*SAME, "origin") if was.get(k) != here.get(k)]
    given = ", ".join(f"{k} {was[k]}" if was.get(k) is not None else f"another {k}" for k in changed)
    if changed and only_missing:
        others = ", ".join(sorted({c.space for c in old.calibrations} - {space}))
        go = f" (its rows of {others} go with it)" if others else ""
        raise InputError(f"the table {path} was measured with {given}: {anew}{go}")
    if changed:
        spaces = ", ".join(c.space for c in old.calibrations)
        say(f"{path} was measured with {given}: this build replaces it, with its rows of {spaces}")
    return None if changed else old


def _markers(folder: Path, device: str) -> list[Path]:
    """Return the markers of a device's builds that have not ended."""
    return list(folder.glob(f"{device}.{'[0-9a-f]' * 8}.building.json"))


def _is_of(marker: Path, place: Mapping[str, Any]) -> bool:
    """Whether the build of a marker measures as it is measured now."""
    try:
        before = read_json(marker, "the marker of a build")
    except InputError:
        return False
    return all(before.get(name) == place.get(name) for name in SAME)


def _forget(markers: Iterable[Path]) -> None:
    """Let builds that have not ended begin anew."""
    for marker in markers:
        marker.unlink(missing_ok=True)


def _started(marker: Path, space: SearchSpace, place: Mapping[str, Any], plan: Plan) -> tuple[str, list[str]]:
    """Return when the build that is to go on began, and what there was to warn of at each of its starts; a marker left by a
    kill, of the same settings, says so."""
    request = {"space": space_sha256(space), "passes": list(plan.passes), **{k: place.get(k) for k in SAME}}
    started, warnings = now(), list(place.get("warnings", ()))
    with suppress(InputError):  # there is none
        before = read_json(marker, "the marker of a build")
        if {k: before.get(k) for k in request} == request and isinstance(before.get("started"), str):
            started = before["started"]
            say(f"going on with the build that began at {started}")
            earlier = before.get("warnings")
            warnings = list(dict.fromkeys([*map(str, earlier if isinstance(earlier, list) else ()), *warnings]))
    write_atomically(marker, json.dumps({**request, "started": started, "warnings": warnings}, indent=2) + "\n")
    return started, warnings


def rows_off_their_visits(table: LatencyTable, samples: Path) -> list[Doubt]:
    """Return the rows that are not what the visits of any of a table's builds, in its samples file, make of them: somebody
    changed them. Rows whose models that file lacks are not looked at, nor those of a former protocol, which made others of
    their visits."""
    if table.meta.get("protocol") != PROTOCOL:
        return []
    reference = table_reference(table)
    try:
        with reading(f"the sidecar of {table.device}", "build the table anew with nas-build-lut"):
            builds = [
                (float(b.get("typical_params", math.inf)), read_samples(samples, str(b["started"]), str(b["finished"])))
                for b in table.meta.get("builds", ())
            ]
    except Damaged as error:
        raise InputError(str(error)) from error
    found = []
    for layer, row in table.rows.items():
        said = [
            row_of(layer, terms, {model: summarise(visits[name_of(model)], reference) for model in terms})
            for params, visits in builds
            for terms in [terms_of(layer, params)]
            if all(name_of(model) in visits for model in terms)
        ]
        if said and all(abs(again.ms - row.ms) > SAME_MS * abs(again.ms) + 1e-6 for again in said):
            found.append(Doubt(layer, row.ms, said[-1].ms, "its own visits say otherwise"))
    return found


class _Flags:
    """Words about models, kept in a file beside the visits of a device: what a build may go on with has words too, whichever
    build said them. `words` are those since this build `started`."""

    def __init__(self, path: Path, started: str) -> None:
        self.path = path
        self._all: dict[str, tuple[str, str]] = {}  # model -> when, and what
        with suppress(InputError, TypeError, ValueError):
            self._all = {str(name): (str(at), str(word)) for name, (at, word) in read_json(path, "the file of flags").items()}
        self.words = {name: word for name, (at, word) in self._all.items() if at >= started}

    def update(self, words: Mapping[str, str]) -> None:
        if not words.items() <= self.words.items():
            self.words |= words
            self._all |= {name: (now(), word) for name, word in words.items()}
            write_atomically(self.path, json.dumps(self._all, indent=1) + "\n")


def row_of(layer: Layer, terms: Terms, found: Mapping[Model, Measurement]) -> Row:
    """Return the row that these measurements of its models make.

    Percentiles are those of single visits of the row's largest model, as far from the row as that model's weight in it says.
    """
    ms = sum(weight * found[model].ms for model, weight in terms.items())
    half = math.hypot(*(weight * found[model].half_width_ms for model, weight in terms.items()))
    alone = found.get((layer,))
    largest = max(terms, key=len)
    whole, share = found[largest], terms[largest]
    return Row(
        ms=ms,
        low_ms=ms - half,
        high_ms=ms + half,
        method="slope" if is_block(layer.spec) else "difference",
        p10_ms=ms + share * (whole.p10_ms - whole.ms),
        p25_ms=ms + share * (whole.p25_ms - whole.ms),
        p90_ms=ms + share * (whole.p90_ms - whole.ms),
        visits=min(m.visits for m in found.values()),
        isolated_ms=alone.ms if alone else None,
    )
