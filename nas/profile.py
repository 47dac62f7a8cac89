"""What one network takes and where it goes, printed for people (or as JSON)."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.audit import say_if_untrue
from nas.columns import print_columns
from nas.device_ids import KINDS, PHONES
from nas.export_forms import EarlierForm
from nas.from_timm import TIMM
from nas.progress import per_image, say
from nas.table import LatencyTable, find_tables
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.files import YAML
from supernet.specs import Layer

if TYPE_CHECKING:
    from nas.operators import Breakdown

MOSTLY = 3  # kinds of operator that are named beside a layer


def print_profile(network: str, device: str | None, *, layers: bool, as_json: bool, plot: Path | None = None) -> None:
    """Print the predicted and the measured milliseconds of a network.

    With `layers`, where they go too, by layer and by kind of operator, with a picture in `plot` (default:
    `<network>-layers.png`). On another device than this one there is only what its table says of each layer.
    """
    from nas.devices import no_table, open_profiler, profiler_of, table_of_kind
    from nas.networks import find_arch, load_model

    found = find_tables()
    device = table_of_kind(device) if device in PHONES else device
    if device in found:
        table: LatencyTable | None = LatencyTable.load(found[str(device)])
        assert table is not None
        profiler, wanted = profiler_of(table), table.device
    else:
        try:
            profiler = open_profiler(device or "cpu")
        except InputError as error:
            raise (error if device in KINDS else no_table(str(device))) from None
        wanted = profiler.id
        try:
            table = LatencyTable.load(found[wanted]) if wanted in found else None
        except EarlierForm as error:  # nobody asked for it by its name, and what is measured does not need it
            say(str(error))
            table = None
    plain = profiler == open_profiler()  # ONNX Runtime on this CPU, one thread, fp32, batch 1: what runs any ONNX model
    settings = table.meta if table is not None else profiler.environment() if profiler is not None else {}
    batch, threads = int(settings.get("batch", 1)), int(settings.get("threads", 1))
    arch = find_arch(network)
    if arch is not None:
        from nas.measure import input_shape

        input_shape(tuple(arch.layers()), batch)  # refuses a network whose groups of images the batch is not made of
    open_module = getattr(profiler, "open_module", None)  # a GPU times any module
    of_timm = arch is None and open_module is not None and not network.endswith(".onnx")
    if arch is None and not plain and not of_timm:
        known = "networks given as YAML or by a zoo name" + (", and timm's," if open_module is not None else "")
        raise InputError(
            f"{network} cannot be timed on {wanted}: there only {known} are known; leave --device out to measure it on this CPU"
        )
    if plot is not None and not plain:
        raise InputError(
            f"a picture is drawn of what runs on one thread of this CPU, not of what the table of {wanted} says: leave --plot "
            "out, or --device"
        )
    if layers and of_timm:
        raise InputError(f"the layers of {network} are measured on this CPU alone: leave --device out, or --layers")
    if layers and not plain and table is None:
        raise InputError(
            f"the milliseconds of layers on {wanted} are those of its table, and there is none: make it with `nas-build-lut "
            f"--device {wanted}`, or leave --device out to measure them on this CPU"
        )
    if layers and plain:
        from nas.layer_plot import check_plot_file

        plot = check_plot_file(plot or Path(f"{_short_name(network)}-layers.png"))
    predicted_ms = None if arch is None else _predict(table, arch, wanted, network, measured=profiler is not None)
    measured = breakdown = None
    if profiler is not None:
        from nas.measure import Reopened, measure_alone, table_reference

        reference = table_reference(table) if table is not None else None
        if plain:
            from nas.operators import bound_model, profile_operators

            model = load_model(network, arch)
            bound_model(model.onnx, network)  # refused before anything is timed
            measured = measure_alone(profiler, model.onnx, reference)
            if layers:
                breakdown = profile_operators(model.onnx, network, measured.ms, model.layers)
        elif arch is not None:
            measured = measure_alone(profiler, arch, reference)
        else:
            from nas.networks import timm_module

            assert open_module is not None
            module, example = timm_module(network, batch)
            # Inside measure_alone, whose settings hold for the compilation; and once, as each would be another.
            measured = measure_alone(profiler, Reopened(cache(lambda: open_module(module, example)[0])), reference)
    record: dict[str, Any] = {
        "network": network,
        "predicted_ms": predicted_ms,
        "measured_ms": measured.ms if measured else None,
        "measured_low_ms": measured.low_ms if measured else None,
        "measured_high_ms": measured.high_ms if measured else None,
        "raw_ms": measured.raw_ms if measured else None,
        "batch": batch,
        "device": wanted,
        "table": str(found[wanted]) if table is not None else None,
    }
    rows = _layer_rows(arch, table, breakdown) if layers else []
    if layers:
        record["layers"] = rows
    if breakdown is not None and plot is not None:
        from nas.layer_plot import plot_layers

        plot_layers(breakdown, f"{_short_name(network)}: {breakdown.ms:.3g} ms on {wanted}, batch 1, one thread", plot)
        record["operators"] = [asdict(kind) for kind in breakdown.operators]
        record["memory_bound_share"] = breakdown.memory_bound_share
        record["without_multiply_adds_share"] = breakdown.without_macs_share
        record["traced_ms"] = breakdown.traced_ms
        record["plot"] = str(plot)
    if as_json:
        print(json.dumps(record, indent=2))
        return
    if rows:
        _print_layers(rows, measured=breakdown is not None)
    if breakdown is not None:
        _print_operators(breakdown)
    print(f"{network} on {wanted}, batch {batch}, {threads} thread{'s' if threads > 1 else ''}")
    if arch is None:
        print("  predicted  not: tables know the layers of networks given as a YAML file or by a zoo name")
    else:
        said = "no table" if predicted_ms is None else f"{predicted_ms:.4g} ms{per_image(predicted_ms, batch)}"
        print(f"  predicted  {said}")
    if measured is not None:
        print(
            f"  measured   {measured.ms:.4g} ms (95 %: {measured.low_ms:.4g} to {measured.high_ms:.4g}; "
            f"{measured.visits} visits; raw {measured.raw_ms:.4g} ms){per_image(measured.ms, batch)}"
        )
    else:
        print("  measured   not here: this machine is another device")
    if breakdown is not None:
        print(
            f"  memory     {100 * breakdown.memory_bound_share:.0f} % of the time in memory-bound operators "
            f"({100 * breakdown.without_macs_share:.0f} % in those without multiply-adds)"
        )
        print(f"  picture    {plot}")


def _short_name(network: str) -> str:
    """Return what a network is called in titles and file names."""
    name = network.removeprefix(TIMM)
    return Path(name).stem if name.endswith((*YAML, ".onnx")) else name.replace("/", "_")


def _layer_rows(arch: ArchConfig | None, table: LatencyTable | None, breakdown: Breakdown | None) -> list[dict[str, Any]]:
    """Return a row for each layer: `ms` is what the table says (None without a row of it), `measured_ms` what was measured."""
    specs: dict[str, Layer] = dict(arch.named_layers()) if arch is not None else {}
    times = {layer.name: layer for layer in breakdown.layers} if breakdown is not None else {}
    rows: list[dict[str, Any]] = []
    for name in times or specs:
        spec = specs.get(name)
        known = table is not None and spec is not None and not table.missing([spec])
        row: dict[str, Any] = {"layer": name, "what": str(spec or ""), "ms": table.layer_ms(spec) if known else None}  # type: ignore
        if name in times:
            time = times[name]
            row |= {"measured_ms": time.ms, "share": time.share, "operators": time.operators}
        rows.append(row)
    return rows if times or any(row["ms"] is not None for row in rows) else []


def _print_layers(rows: list[dict[str, Any]], *, measured: bool) -> None:
    predicted = any(row["ms"] is not None for row in rows)
    described = any(row["what"] for row in rows)
    columns = {"layer": False}
    if described:
        columns |= {"what": False}
    if predicted:
        columns |= {"table ms": True}
    if measured:
        columns |= {"measured ms": True, "share": True, "mostly": False}
    lines = []
    for row in rows:
        cells = [row["layer"]]
        if described:
            cells.append(row["what"])
        if predicted:
            cells.append("" if row["ms"] is None else f"{row['ms']:.4f}")
        if measured:
            largest = [f"{kind} {ms:.3f}" for kind, ms in list(row["operators"].items())[:MOSTLY]]
            cells += [f"{row['measured_ms']:.4f}", f"{100 * row['share']:.1f} %", ", ".join(largest)]
        lines.append(cells)
    print_columns(columns, lines)


def _print_operators(breakdown: Breakdown) -> None:
    print_columns(
        {"operator": False, "measured ms": True, "share": True, "count": True},
        ([kind.operator, f"{kind.ms:.4f}", f"{100 * kind.share:.1f} %", str(kind.count)] for kind in breakdown.operators),
    )


def _predict(table: LatencyTable | None, arch: ArchConfig, device: str, network: str, *, measured: bool) -> float | None:
    """Return what a table says of a network; None, said why, where it cannot and the network is measured all the same."""
    if table is None:
        say(f"no latency table of {device}: make one with `nas-build-lut --device {device} --arch {network}`")
        return None
    from nas.devices import measuring

    say_if_untrue(table)
    try:
        table.require(arch.layers(), measuring(table, f"--arch {network}"))
        return table.predict_ms(arch)
    except InputError as error:
        if not measured:
            raise
        say(str(error))
        return None
