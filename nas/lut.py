"""Build a latency table: enumerate a space's layers, measure them in context, calibrate on whole networks.

Every row is a linear combination of the times of models (see `measure`):

- a block: the least-squares slope over chains of 1, 2 and 4 of it with distinct weights. What a session pays once (the
  call, a change of layout at its ends) has no part in a slope;
- stem, embedding, flat, unflat, head: a model in which blocks stand on the sides that they have in a network, minus
  those blocks' slopes, minus half of each one's chain intercept (its end of the session), minus the empty call.

Every visit is appended to `<device>.samples.csv`; a killed build goes on from there.
"""

from __future__ import annotations

import csv
import datetime
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nas.measure import EMPTY, MAX_VISITS, MIN_VISITS, WHOLE_GOAL, Model, name_of, session, stopwatch, table_reference
from nas.profilers.ort_cpu import OrtModel, device_id, environment, pinned
from nas.profilers.timing import Measurement, References, Visit, median_reference, summarise, visit_in_rounds
from nas.progress import Tick, progress, say
from nas.table import Calibration, LatencyTable, Row, measured_layers
from supernet.arch import MB3D, MB4D, ArchConfig, Embedding, Flat, Head, Layer, Stem, Unflat
from supernet.blocks import build_layer
from supernet.errors import InputError
from supernet.files import write_atomically
from supernet.model import build_model
from supernet.space import SearchSpace
from supernet.zoo import load_arch

Terms = dict[Model, float]
Array = npt.NDArray[np.float64]

CHAINS = (1, 2, 4)
CACHE_LINE = 64  # bytes
FIT_NETWORKS = 16  # fit the calibration
CHECK_NETWORKS = 12  # tell its error
FEWEST_NETWORKS = 12  # of a space: both parts shrink with it
ROW_GOAL = 0.02  # half-width of a row's 95 % interval, of the row ...
NETWORK_GOAL = 0.002  # ... or of the smallest network of the space, whichever is larger
BATCH_MODELS, BATCH_BYTES = 120, 1 << 30  # sessions that live at once


def _combine(*parts: tuple[float, Terms]) -> Terms:
    total: Terms = {}
    for factor, terms in parts:
        for model, weight in terms.items():
            total[model] = total.get(model, 0.0) + factor * weight
    return total


def slope(block: Layer) -> Terms:
    """Milliseconds of one more block in a chain."""
    centre = sum(CHAINS) / len(CHAINS)
    spread = sum((k - centre) ** 2 for k in CHAINS)
    return {(block,) * k: (k - centre) / spread for k in CHAINS}


def _boundary(block: Layer) -> Terms:
    """What one end of a session costs beside this block, without the empty call: half of the chain's intercept."""
    mean: Terms = {(block,) * k: 1 / len(CHAINS) for k in CHAINS}
    intercept = _combine((1.0, mean), (-sum(CHAINS) / len(CHAINS), slope(block)))
    return _combine((0.5, intercept), (-0.5, {EMPTY: 1.0}))


def terms_of(layer: Layer) -> Terms:
    """Return the models whose times make a layer's row, each with its weight."""
    spec, side = layer

    def on_map(dim: int, at: int) -> Layer:
        return Layer(MB4D(dim), at)

    def on_tokens(dim: int) -> Layer:
        return Layer(MB3D(dim), side)

    match spec:
        case Stem():
            before, after = [], [on_map(spec.dim, -(-side // spec.stride))]
        case Embedding():
            before, after = [on_map(spec.dim_in, side)], [on_map(spec.dim, -(-side // spec.stride))]
        case Flat():
            before, after = [on_map(spec.dim, side)], [on_tokens(spec.dim)]
        case Unflat():
            before, after = [on_tokens(spec.dim)], [on_map(spec.dim, side)]
        case Head():
            before, after = [on_tokens(spec.dim) if spec.tokens else on_map(spec.dim, side)], []
        case _:
            return slope(layer)
    context = before + after
    paid = [(-1.0, slope(block)) for block in context] + [(-1.0, _boundary(block)) for block in context]
    return _combine((1.0, {(*before, layer, *after): 1.0}), (-1.0, {EMPTY: 1.0}), *paid)


def requested_space(space: str | None, arch: str | None) -> SearchSpace:
    """Return the space whose rows a command asks for: by name or file, or the one around a network."""
    if arch is not None:
        return SearchSpace.around(load_arch(arch))
    return SearchSpace.load(space or "efficientformer-tiny")


def typical_weights(space: SearchSpace) -> int:
    """Return the bytes of weights of a typical network of the space: what passes through the caches between two runs of
    one of its layers. The median of 25 random networks."""
    rng = random.Random(0)
    with torch.device("meta"):
        models = [build_model(space.sample(rng)) for _ in range(25)]
    return 4 * int(median(sum(p.numel() for p in model.parameters()) for model in models))


class Samples:
    """Every visit of a build, on disk as soon as it is made."""

    HEADER = ("measured_at", "model", "raw_ms", "cached_reference_ms", "streaming_reference_ms")

    def __init__(self, path: Path, since: str) -> None:
        self.visits: dict[str, list[Visit]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]  # a kill may have cut the last line
            if whole != data:
                write_atomically(path, whole)
            for line in csv.DictReader(whole.decode().splitlines()):
                if line["measured_at"] >= since:
                    reference = References(float(line[self.HEADER[3]]), float(line[self.HEADER[4]]))
                    self.visits.setdefault(line["model"], []).append(Visit(float(line["raw_ms"]), reference))
        fresh = not path.exists() or not path.stat().st_size
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if fresh:
            self._writer.writerow(self.HEADER)

    def count(self, model: Model) -> int:
        return len(self.visits.get(name_of(model), ()))

    def add(self, name: str, visit: Visit) -> None:
        self.visits.setdefault(name, []).append(visit)
        times = (visit.raw_ms, *visit.reference)
        self._writer.writerow((_now(), name, *(f"{ms:.6g}" for ms in times)))
        self._file.flush()

    def reference(self) -> References:
        """The references' medians over everything measured."""
        return median_reference([visit for visits in self.visits.values() for visit in visits])

    def close(self) -> None:
        self._file.close()


class Bench:
    """Measures models on this CPU until their intervals are narrow enough."""

    def __init__(self, samples: Samples, threads: int, seed: int) -> None:
        self.samples = samples
        self.threads = threads
        self.rng = random.Random(seed)
        self.stopwatch = stopwatch(threads)

    def measure(
        self,
        models: Iterable[Model],
        goals: Sequence[tuple[Terms, float, float]],
        tick: Tick,
        limits: tuple[int, int] = (0, MAX_VISITS),
        between: Callable[[], object] | None = None,
    ) -> None:
        """Visit the models until every goal is met or a model has had `limits[1]` visits.

        A goal is (terms, fraction, floor_ms): the half-width of the combination's 95 % interval is to be at most
        max(fraction * value, floor_ms). Only the models that are live at once count; each model is live once. `tick` is
        told of visits made or not needed, for each model limits[1] - limits[0] in all.
        """
        floor, limit = limits
        models = list(dict.fromkeys(models))
        queue = [m for m in models if self.samples.count(m) < limit]
        tick((len(models) - len(queue)) * (limit - floor))

        def record(name: str, visit: Visit) -> None:
            self.samples.add(name, visit)
            tick(1)

        while queue:
            live: dict[str, OrtModel] = {}
            size = 0
            batch: list[Model] = []
            while queue and len(live) < BATCH_MODELS and size < BATCH_BYTES:
                batch.append(queue.pop(0))
                live[name_of(batch[-1])], more = session(batch[-1], self.threads)
                size += more
            before = sum(map(self.samples.count, batch))
            still_open = partial(self._open, batch, goals, limit)
            visit_in_rounds(live, self.stopwatch, still_open, record, self.rng, between)
            made = sum(map(self.samples.count, batch)) - before
            tick(len(batch) * (limit - floor) - made)

    def _open(self, batch: Sequence[Model], goals: Sequence[tuple[Terms, float, float]], limit: int) -> set[str]:
        """Return the names of the models of the batch that need another visit."""
        reference = self.samples.reference() if self.samples.visits else None
        found: dict[str, Measurement] = {}
        open_models = set()
        for model in batch:
            visits = self.samples.visits.get(name_of(model), [])
            if len(visits) < MIN_VISITS:
                open_models.add(name_of(model))
            else:
                found[name_of(model)] = summarise(visits, reference)
        here = {name_of(model) for model in batch}
        for terms, fraction, floor_ms in goals:
            named = {name_of(model): weight for model, weight in terms.items()}
            mine = [name for name in named if name in here]
            if not mine or any(name in open_models for name in mine):
                continue
            if any(name not in found and name not in self.samples.visits for name in named):
                continue  # the rest of the row comes in a later batch
            for name in named:
                if name not in found:
                    found[name] = summarise(self.samples.visits[name], reference)
            value = abs(sum(weight * found[name].ms for name, weight in named.items()))
            half = math.hypot(*(named[name] * found[name].half_width_ms for name in mine))
            if half > max(fraction * value, floor_ms):
                worst = max(mine, key=lambda name: abs(named[name]) * found[name].half_width_ms)
                open_models.update(
                    name
                    for name in mine
                    if abs(named[name]) * found[name].half_width_ms >= 0.5 * abs(named[worst]) * found[worst].half_width_ms
                )
        return {name for name in open_models if len(self.samples.visits.get(name, ())) < limit}


def build_cpu_table(
    space: SearchSpace, folder: Path, *, only_missing: bool = False, threads: int = 1, seed: int = 0
) -> LatencyTable:
    """Measure the rows of a space on this CPU, calibrate, write the table to `folder` and return it.

    Rows of other spaces that the table holds are kept. A killed build goes on where it was when it is called again.
    """
    torch.manual_seed(seed)
    device = device_id()
    path = folder / f"{device}.csv"
    old = _existing(path, only_missing)
    place = environment(threads)
    if old is not None:
        changed = [k for k in ("runtime_version", "threads", "precision", "export") if old.meta.get(k) != place[k]]
        if changed and only_missing:
            given = ", ".join(f"{k} {old.meta.get(k)}" for k in changed)
            raise InputError(f"the table {path} was measured with {given}: build it anew without --missing")
        if changed:
            old = None
    if networks_of(space) < FEWEST_NETWORKS:
        raise InputError(
            f"space {space.name} has {networks_of(space)} networks, too few to calibrate a table on (at least "
            f"{FEWEST_NETWORKS}): give the space that the network comes from"
        )
    layers = measured_layers(space.layers())
    if only_missing and old is not None:
        layers = [layer for layer in layers if layer not in old.rows]
        if not layers and any(c.space == space.name for c in old.calibrations):
            say(f"{path} already has every row of {space.name}")
            return old
    started = _started(folder / f"{device}.building.json", space, place)
    samples = Samples(folder / f"{device}.samples.csv", started)
    try:
        return _build(space, layers, old, samples, folder, device, place, threads, seed)
    finally:
        samples.close()


def networks_of(space: SearchSpace) -> int:
    """Return how many networks of different layers the space has: inside a stage only the number of each kind counts."""
    return math.prod(len(s.widths) * math.comb(s.depth + len(s.kinds) - 1, s.depth) for s in space.stages)


def _existing(path: Path, needed: bool) -> LatencyTable | None:
    """Return the table that is to be extended. A damaged one is replaced, unless its rows are needed."""
    if not path.exists():
        return None
    try:
        return LatencyTable.load(path)
    except InputError as error:
        if needed and not path.with_suffix(".building.json").exists():  # with it, a kill came while both were written
            raise
        say(f"{error}: this build replaces it")
        return None


def _build(
    space: SearchSpace,
    layers: list[Layer],
    old: LatencyTable | None,
    samples: Samples,
    folder: Path,
    device: str,
    place: Mapping[str, Any],
    threads: int,
    seed: int,
) -> LatencyTable:
    rows_terms = {layer: terms_of(layer) for layer in layers}
    models: list[Model] = [EMPTY]
    for terms in rows_terms.values():
        models.extend(terms)
    models = sorted(dict.fromkeys(models), key=lambda m: len(set(m)) > 1)  # chains first
    say(
        f"measuring {len(layers)} rows of {device} for {space.name} from {len(models)} models, one thread, with ONNX "
        f"Runtime {place['runtime_version']}; leave the machine alone meanwhile"
    )
    with pinned():
        bench = Bench(samples, threads, seed)
        smallest: Model = tuple(space.smallest.layers())
        bench.measure([smallest], [({smallest: 1.0}, WHOLE_GOAL, 0.0)], lambda _: None)
        floor_ms = NETWORK_GOAL * summarise(samples.visits[name_of(smallest)], samples.reference()).ms
        goals = [(terms, ROW_GOAL, floor_ms) for terms in rows_terms.values()]
        weights = typical_weights(space)
        others = np.ones(weights // 4, dtype=np.float32)[:: CACHE_LINE // 4]
        half = MAX_VISITS // 2
        with progress(device, (len(models) + FIT_NETWORKS + CHECK_NETWORKS) * MAX_VISITS) as tick:
            # Twice over: a machine that is slower for a minute slows rows and whole networks.
            bench.measure(models, goals, tick, (0, half), others.sum)
            first = _table(device, old, rows_terms, samples, place, half)
            networks = stratified(space, first, FIT_NETWORKS + CHECK_NETWORKS, random.Random(seed))
            whole: list[Model] = [tuple(arch.layers()) for arch in networks]
            whole_goals = [({model: 1.0}, WHOLE_GOAL, 0.0) for model in whole]
            bench.measure(whole, whole_goals, tick, (0, half))
            bench.measure(models, goals, tick, (half, MAX_VISITS), others.sum)
            bench.measure(whole, whole_goals, tick, (half, MAX_VISITS))
    table = _table(device, old, rows_terms, samples, place)
    reference = table_reference(table)
    totals = [table.totals(arch) for arch in networks]
    measured = [summarise(samples.visits[name_of(m)], reference).ms for m in whole]
    calibration = calibrate(space, totals, measured)
    kept = [c for c in (old.calibrations if old is not None else ()) if c.space != space.name]
    table = replace(table, calibrations=(*kept, calibration))
    written = table.save(folder)
    (folder / f"{device}.building.json").unlink(missing_ok=True)
    say(
        f"{written}: {len(table.rows)} rows; over {calibration.n_check} networks that took no part in the fit the prediction "
        f"is off by {calibration.mean_error_percent:.1f} % on average, {calibration.max_error_percent:.1f} % at most"
    )
    return table


def _table(
    device: str,
    old: LatencyTable | None,
    rows_terms: Mapping[Layer, Terms],
    samples: Samples,
    place: Mapping[str, Any],
    visits: int | None = None,
) -> LatencyTable:
    """Return the table without calibration; `visits`: from the first so many of each model only."""
    # One reference for all rows of a table: rows that were measured earlier stay as they are.
    reference = table_reference(old) if old is not None else samples.reference()
    rows = dict(old.rows) if old is not None else {}
    for layer, terms in rows_terms.items():
        found = {model: summarise(samples.visits[name_of(model)][:visits], reference) for model in terms}
        rows[layer] = _row(layer, terms, found)
    return LatencyTable(device, rows, meta={**place, "reference_ms": reference._asdict()})


def _started(marker: Path, space: SearchSpace, place: Mapping[str, Any]) -> str:
    """Return when the build that is to go on began; a marker left by a kill, of the same settings, says so."""
    request = {"space": space.name, **{k: place[k] for k in ("runtime_version", "torch_version", "threads", "export")}}
    if marker.exists():
        try:
            before = json.loads(marker.read_text())
        except ValueError:
            before = {}
        if {k: before.get(k) for k in request} == request:
            say(f"going on with the build that began at {before['started']}")
            return str(before["started"])
    started = _now()
    write_atomically(marker, json.dumps({**request, "started": started}, indent=2) + "\n")
    return started


def _row(layer: Layer, terms: Terms, found: Mapping[Model, Measurement]) -> Row:
    ms = sum(weight * found[model].ms for model, weight in terms.items())
    half = math.hypot(*(weight * found[model].half_width_ms for model, weight in terms.items()))
    alone = found.get((layer,))
    method = "slope" if (layer,) * CHAINS[-1] in terms else "difference"
    with torch.device("meta"):
        params = sum(p.numel() for p in build_layer(layer).parameters())
    return Row(ms, ms - half, ms + half, method, alone.ms if alone else None, params)


def stratified(space: SearchSpace, table: LatencyTable, number: int, rng: random.Random) -> list[ArchConfig]:
    """Return `number` random networks of the space, one from each of as many equal bins of the sum of rows.

    A space with fewer networks gives all of them.
    """
    pool = {a.without_identity(): table.sum_ms(a) for a in (space.sample(rng) for _ in range(40 * number))}
    if len(pool) <= number:
        return list(pool)
    low, high = min(pool.values()), max(pool.values())
    width = (high - low) / number or 1.0
    bins: dict[int, list[ArchConfig]] = {}
    for arch, ms in pool.items():
        bins.setdefault(min(number - 1, int((ms - low) / width)), []).append(arch)
    chosen = [rng.choice(members) for members in bins.values()]
    taken = set(chosen)
    rest = [arch for arch in pool if arch not in taken]
    return chosen + rng.sample(rest, number - len(chosen))


def calibrate(space: SearchSpace, totals: Sequence[tuple[float, float]], measured: Sequence[float]) -> Calibration:
    """Fit a calibration to about four networks in seven, spread over the latencies, and tell its error on the others.

    `totals` are each network's sum of rows (ms) and of parameters, `measured` its milliseconds. The fit minimises the sum
    of absolute relative errors, which a network that was disturbed cannot pull.
    """
    order = np.argsort([sum_ms for sum_ms, _ in totals])
    x, params = np.asarray(totals, dtype=float)[order].T
    y = np.asarray(measured, dtype=float)[order]
    check = np.zeros(len(x), dtype=bool)
    held_out = len(x) * CHECK_NETWORKS // (FIT_NETWORKS + CHECK_NETWORKS)
    check[np.linspace(1, len(x) - 2, held_out).round().astype(int)] = True  # the ends belong to the fit
    design = np.stack([np.ones(len(x)), x, x * params / 1e6], axis=1)
    fitted = least_absolute(design[~check], y[~check])
    predicted = design[check] @ fitted
    error = 100 * np.abs(predicted - y[check]) / y[check]
    pairs = np.sign(np.subtract.outer(predicted, predicted)) * np.sign(np.subtract.outer(y[check], y[check]))
    return Calibration(
        space=space.name,
        image_size=space.image_size,
        strides=space.strides,
        offset_ms=float(fitted[0]),
        scale=float(fitted[1]),
        scale_per_mparam=float(fitted[2]),
        sum_low_ms=float(x[0]),
        sum_high_ms=float(x[-1]),
        n_fit=int((~check).sum()),
        n_check=int(check.sum()),
        mean_error_percent=float(error.mean()),
        max_error_percent=float(error.max()),
        within_5_percent=float(100 * (error <= 5).mean()),
        kendall_tau=float(pairs.sum() / (len(pairs) * (len(pairs) - 1))),
    )


def least_absolute(design: Array, y: Array) -> Array:
    """Return the coefficients (k,) that minimise sum |design @ c - y| / y; design (n, k), y (n,). Reweighted least squares."""
    relative = design / y[:, None]
    weights = np.ones(len(y))
    for _ in range(100):
        found, *_ = np.linalg.lstsq(relative * weights[:, None], weights, rcond=None)
        weights = 1 / np.sqrt(np.maximum(np.abs(relative @ found - 1), 1e-6))
    return np.asarray(found)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
