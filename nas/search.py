"""A search as it is asked for: its parts are found and fit together, and a folder is claimed, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nas.alone import alone
from nas.checkpoints import Pretrained
from nas.data import load_data, natural_size, refuse_among_images, say_if_demonstration
from nas.kept import REPORT, network_name
from nas.lookup import OnDevice, groups_of, places, resolve_device, usable_table
from nas.parallel import joined
from nas.pretrained import check_init, requested
from nas.report import write_report
from nas.request import Finished, claim, finished
from nas.result import print_result
from nas.search_stages import Work, carry_out
from nas.settings import SupernetSettings
from nas.slimming import check_limits, rounded_up
from nas.solver import check_additive
from nas.steps import accelerator
from nas.strategies import Budgeted, check_strategy, limits_of, refuse_unreachable
from nas.supernet_training import check_trainable, training_size
from nas.table import LatencyTable, RowsMissing
from supernet.errors import InputError
from supernet.files import read_json, reading, write_atomically
from supernet.space import SearchSpace

RUNS = Path("runs")  # where a search without --out has its folder
TRAINED = ("supernet.pt", "channels.json", "distillation.pt", "evaluations.csv")  # what another target changes nothing in
BEFORE = ("request.json", "space.yaml", "tensorboard")  # what a search's folder holds before anything is trained


@dataclass(frozen=True)
class Request:
    """What a user asks of `nas-search`; None or nothing where a flag was left out.

    `target_ms` on `device` is the first target, those of `targets` (device, milliseconds) are met beside it. `table`: files, of
    those devices.
    """

    target_ms: float | None = None
    device: str | None = None
    table: tuple[Path, ...] = ()
    data: Path | None = None
    space: str | None = None
    strategy: str = "greedy"
    config: Path | None = None
    out: Path | None = None
    seed: int = 0
    init: str | None = None
    weights: str | None = None
    targets: tuple[tuple[str, float], ...] = ()

    @property
    def all_targets(self) -> list[tuple[str | None, float]]:
        """Every target, the first one first.

        Raises:
            InputError: there is none.
        """
        first: list[tuple[str | None, float]] = [] if self.target_ms is None else [(self.device, self.target_ms)]
        if not first and not self.targets:
            raise InputError("say which latency the network may have: --target-ms 1.6")
        if not first and self.device is not None:
            raise InputError(f"--device {self.device} has no target: give --target {self.device}=MS, or --target-ms")
        return [*first, *self.targets]


def run_search(
    request: Request,
    space: SearchSpace | None = None,
    settings: SupernetSettings | None = None,
    again: bool = False,
    trained: Finished | None = None,
) -> dict[str, Any]:
    """Search, write the results to the run's folder, print them, and return the content of `result.json`.

    `space` and `settings` stand in for what `request` names; `again`: also where the folder has a result, because more is
    known of what networks take on the devices. `trained`: a search that differs in targets, devices or strategy alone; what it
    trained and evaluated is taken from there.
    """
    targets = request.all_targets
    settings = settings or SupernetSettings.load(request.config)
    refuse_among_images(request.out or RUNS, request.data)
    check_strategy(request.strategy, settings.objective)
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
    found = places(targets, request.table)
    for place in found:
        space = groups_of(space, settings.objective, place.device, place.table)
    data = load_data(request.data, train_size, request.seed, settings.score_images)
    data = replace(data, flips=data.flips and settings.mirror)
    space = space.with_classes(len(data.classes))
    folder = request.out or RUNS / run_name(space.name, [ms for _, ms in targets], request.seed)
    if trained is not None and data.fingerprint != trained.request["data_fingerprint"]:
        raise InputError(f"the images of {data.source} are not those of {trained.folder}: search anew, without --from")
    blocks = {"blocks": files} if (files := space.block_files()) else {}
    if trained is not None and blocks and trained.request.get("blocks") != files:
        raise InputError(f"{' and '.join(files)} is not what {trained.folder} was searched with: search anew, without --from")
    space_name = request.space or space.name
    if trained is not None:
        space_name = str(trained.space_file)
    elif given is not None:
        space_name = str(folder / "space.yaml")
    try:
        devices = tuple(OnDevice(place.target, *usable_table(place, space, space_name)) for place in found)
    except RowsMissing as error:
        if given is not None and trained is None:  # no file has the space yet that nas-build-lut is to be told of
            _leave_space(space, folder / "space.yaml", error)
        raise
    if settings.objective == "throughput" and len(devices) > 1:
        raise InputError("the objective throughput has one device: give one target, or leave the objective out")
    refuse_unreachable(space, [Budgeted(device.table, device.table, device.target.ms) for device in devices])
    if settings.objective != "latency":
        refuse_below_smallest(space, devices)
    check_limits(space, limits_of(space, None, settings.max_params, settings.max_macs))
    if request.strategy != "greedy":
        for device in devices:
            check_additive(space, device.table)
    accelerator(settings.accelerator)  # refuses one that this machine does not have
    if given is not None:
        check_init(settings, data, joined())
    elif trained is None:
        check_trainable(settings, data, joined())
    ended = folder / "result.json"
    if request.strategy == "optuna" and settings.optuna_storage and (again or not ended.exists()):
        from nas.shared_study import check_storage  # optuna takes a while to import

        check_storage(settings.optuna_storage)
    first = devices[0]
    several = [{"device": d.name, "target_ms": d.target.ms, "table": str(d.path.resolve())} for d in devices]
    shared = request.strategy == "optuna"  # whose processes share a study, and may share its folder
    with alone(folder, shared=shared):
        claim(
            folder,
            {
                "command": "nas-search",
                "target_ms": first.target.ms,
                "device": first.name,
                "table": str(first.path.resolve()),
                **({"targets": several} if len(several) > 1 else {}),
                "data": data.source,
                "data_fingerprint": data.fingerprint,
                "space": space.to_yaml(),
                **blocks,
                "strategy": request.strategy,
                "settings": settings.deciding(),
                "seed": request.seed,
                **({"init": given.arch.to_yaml(), "weights": given.digest} if given is not None else {}),
            },
            begun=shared or any(entry.name not in BEFORE for entry in folder.iterdir() if not entry.name.startswith(".")),
        )
        say_if_demonstration(data)
        space.save(folder / "space.yaml")
        if trained is not None:
            borrow(trained.folder, folder)
        if again or not ended.exists():
            (folder / REPORT).unlink(missing_ok=True)
            carry_out(Work(devices, space, train_size, data, settings, request.strategy, request.seed, folder, given, again))
        if not (folder / REPORT).exists():
            write_report(folder)
        do = "remove it, and give the same command again"
        result = read_json(ended, "the result file", do)
        with reading(str(ended), do):
            print_result(result, space, folder, data.source, len(data.val))
        return result


def _leave_space(space: SearchSpace, path: Path, refused: InputError) -> None:
    """Write the file that a refusal tells nas-build-lut to take the space from, in a folder that is not this search's yet.

    Raises:
        InputError: another file has that name, which is left as it is.
    """
    if path.exists() and (not path.is_file() or path.read_bytes() != space.to_yaml().encode()):
        raise InputError(
            f"the table lacks rows of this search's space, which {path} is to hold for nas-build-lut, but that is another "
            "file: give another --out"
        ) from refused
    space.save(path)


def refuse_below_smallest(space: SearchSpace, devices: Sequence[OnDevice]) -> None:
    """Refuse targets that only networks other than the smallest meet: the loop could not end but for the best by the drops."""
    for device in devices:
        least_ms = device.table.predict_ms(space.smallest)
        if device.target.ms < least_ms:
            raise InputError(
                f"the target of {device.target.ms:g} ms is below the smallest network of {space.name} on {device.name}: give "
                f"at least {rounded_up(least_ms)} ms, or leave the objective out"
            )


def search_from(run: Path, request: Request) -> dict[str, Any]:
    """Search for other targets, on other devices or by another strategy, with the supernet of a search that ended, and its
    evaluations. Of the request, targets, tables, strategy and folder count.

    Raises:
        InputError: the folder holds no finished search, or is to hold the new one too; or what `run_search` refuses.
    """
    held = finished(run)
    if request.out is not None and request.out.resolve() == run.resolve():
        raise InputError(f"{run} holds the search to start from: give another --out")
    if request.target_ms is not None and request.device is None:
        request = replace(request, device=held.targets[0]["device"])
    known = {LatencyTable.load(path).device for path in request.table}
    wanted = {resolve_device(device) for device, _ in request.all_targets if device is not None} - known
    tables = [Path(target["table"]) for target in held.targets if target["device"] in wanted]
    seed = held.request["seed"]
    out = request.out or RUNS / run_name(held.space.name, [ms for _, ms in request.all_targets], seed)
    return run_search(
        replace(request, table=(*request.table, *tables), data=held.data, seed=seed, out=out, **beginning(held)),
        space=held.space,
        settings=SupernetSettings.of_run(held.request["settings"], request.config),
        trained=held,
    )


def beginning(held: Finished) -> dict[str, Any]:
    """Return the network and the weights that a search began with, as `Request` names them, if it did (--init)."""
    if "init" not in held.request:
        return {}
    path = held.folder / "init.yaml"
    write_atomically(path, held.request["init"])
    return {"init": str(path), "weights": str(held.folder / "init" / "given.safetensors")}


def borrow(run: Path, folder: Path) -> None:
    """Take what a search trained and evaluated into the folder of another one, unless it is there."""
    paths = [run / name for name in TRAINED] + sorted((run / "init").glob("*"))
    for path in paths:
        to = folder / path.relative_to(run)
        if path.is_file() and not to.exists():
            write_atomically(to, path.read_bytes())


def run_name(space: str, targets_ms: Sequence[float], seed: int) -> str:
    """Return what the folder of a search is called."""
    return f"{network_name(space, targets_ms)}-seed{seed}"
