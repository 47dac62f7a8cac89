"""How well do a supernet's scores rank networks of one latency?

    python benchmarks/ranking.py --data cifar10 --table latency_tables/my-cpu.csv --out ranking
    python benchmarks/ranking.py --data cifar10 --table latency_tables/my-cpu.csv --out ranking --part 1/2   # and 2/2 beside it
    python benchmarks/ranking.py --table latency_tables/my-cpu.csv --out ranking --time   # the networks themselves, here
    python benchmarks/ranking.py --table latency_tables/my-cpu.csv --out ranking --report

Draws networks of a space within 5 % of one latency, trains each alone with several seeds, trains supernets in every way, and
scores the networks by each. Prints for every way of scoring: Kendall's tau-b with the networks' accuracy (mean over the
supernets' seeds, with a bootstrap interval over the networks), how far that is above the tau of MACs and of parameters (on the
same resampled networks), the regret of taking the best of ten by the score, and how far supernets of other seeds agree; beside
them what needs no supernet: MACs, parameters, and shuffled scores, with the range of 95 % of them. Accuracy is the mean over
the trainings' seeds. Two seeds of the same trainings agree as far as one line says; beside that stands each score's tau with
the accuracy of single seeds. Everything is kept under --out: the same command goes on after a kill, and --part divides the work
among processes. A report is of what the study in --out was asked for.
"""

import argparse
import csv
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from studies import finished_rows, part_of, table_sha256, take_claimed, train_alone, with_larger_val

from nas.data import ImageData, load_images
from nas.devices import profiler_of
from nas.judging import evaluator_of
from nas.kept import write_csv
from nas.measure import measure_alone, table_reference
from nas.progress import progress, say
from nas.recipe import RECIPES
from nas.recovery import Recovered
from nas.request import claim
from nas.scores import measure_drops
from nas.settings import SupernetSettings
from nas.slimming import start_network
from nas.statistics import bootstrap, kendall_tau, regret_among
from nas.supernet_training import logits_of, sandwich, single_path, train_supernet
from nas.table import LatencyTable
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.model import count
from supernet.space import SearchSpace

BAND = 0.05  # of the latency, to both sides
TRIES = 200_000  # random networks, to find enough within the band
VAL_IMAGES = 10_000  # of CIFAR-10's 50,000: accuracy is known to half a point
SCORE_IMAGES = 2000  # that supernets are scored on, and nothing else sees
EPOCHS = 4  # of a supernet's training, by paths or by mixtures: how often it is checkpointed
RECOVERY_STEPS = 20
FEWEST_NETWORKS = 8  # whose order says anything
SHUFFLES = 200
TIMED = "timed.csv"  # what the networks themselves take
NETWORKS_SEED = 0  # of the draws within the band
MEDIAN_SEED = 1  # of those whose median latency is the band's middle

WAYS: dict[str, dict[str, Any]] = {
    "mixture, uniform noise (the paper's)": {"weight_epochs": 0, "mixture_epochs": EPOCHS, "noise": "uniform"},
    "mixture, Gumbel noise": {"weight_epochs": 0, "mixture_epochs": EPOCHS, "noise": "gumbel"},
    "single paths": {"weight_epochs": EPOCHS, "mixture_epochs": 0},
    "fair paths": {"weight_epochs": EPOCHS, "mixture_epochs": 0, "paths": "fair"},
    "elastic": {"weight_epochs": EPOCHS, "mixture_epochs": 0, "paths": "elastic"},
    "single paths, then a mixture (nas-search's default)": {"weight_epochs": EPOCHS, "mixture_epochs": EPOCHS // 4},
}
"""The ways of training a supernet that are compared, each for the same multiply-accumulates."""
MIXTURE_EPOCH = 1 / 4  # of `images_per_epoch`, which an epoch of a mixture sees, where that is at least 1,024 images


def networks_in_band(space: SearchSpace, table: LatencyTable, ms: float, count: int) -> list[ArchConfig]:
    """Return `count` different random networks whose predicted latency is within the band about `ms`.

    Raises:
        InputError: there are too few.
    """
    rng = random.Random(NETWORKS_SEED)
    found: dict[ArchConfig, None] = {}
    for _ in range(TRIES):
        arch = space.sample(rng)
        if abs(table.predict_ms(arch) / ms - 1) <= BAND:
            found[arch] = None
            if len(found) == count:
                return [replace(a, name=f"network{i:02d}") for i, a in enumerate(found)]
    raise InputError(
        f"{len(found)} of {TRIES:,} random networks of {space.name} take {ms:g} ms, not {count}: give another --ms"
    )


def macs_of_an_image(space: SearchSpace, paths: str) -> float:
    """Return the multiply-accumulates of one image's forward pass in a step, the mean over some steps: of a way to train the
    weights by `paths`, or of a mixture."""
    generator = torch.Generator().manual_seed(0)
    widths = [stage.widths[-1] for stage in space.stages]
    empty = [["identity"] * stage.depth for stage in space.stages]

    def with_stage(i: int, kind: str) -> int:
        kinds = [[kind] * stage.depth if at == i else empty[at] for at, stage in enumerate(space.stages)]
        return count(space.arch(widths, kinds)).macs

    fixed = count(space.arch(widths, empty)).macs
    of_block = [[(with_stage(i, kind) - fixed) / stage.depth for kind in stage.kinds] for i, stage in enumerate(space.stages)]
    match paths:
        case "mixture":
            return fixed + sum(sum(of_block[i]) for i, _ in space.slots)
        case "elastic":
            return mean(sum(count(arch).macs for arch in sandwich(space, generator)) for _ in range(100))
        case "fair":
            number = max(len(stage.candidates) for stage in space.stages)
            return number * (fixed + sum(mean(of_block[i]) for i, _ in space.slots))
    drawn = [single_path(space, generator) for _ in range(1000)]
    return fixed + mean(sum(of_block[i][c] for (i, _), c in zip(space.slots, path, strict=True)) for path in drawn)


def settings_of(space: SearchSpace, way: str, images: int) -> SupernetSettings:
    """Return the settings of a way, which sees so many images that it takes as many multiply-accumulates as single paths do
    with `images`.

    Raises:
        InputError: those are too few for the way's epochs.
    """
    weight_epochs, mixture_epochs = WAYS[way]["weight_epochs"], WAYS[way]["mixture_epochs"]
    macs = weight_epochs * macs_of_an_image(space, WAYS[way].get("paths", "single")) if weight_epochs else 0.0
    macs += MIXTURE_EPOCH * mixture_epochs * macs_of_an_image(space, "mixture") if mixture_epochs else 0.0
    per_epoch = round(images * macs_of_an_image(space, "single") / macs)
    if per_epoch < 2:  # 0 would mean all
        raise InputError(f"{images} images of single paths are too few for a supernet of {way}: give more --supernet-images")
    return SupernetSettings(images_per_epoch=per_epoch, recovery_steps=RECOVERY_STEPS, **WAYS[way])


def score_networks(
    space: SearchSpace, archs: Sequence[ArchConfig], data: ImageData, settings: SupernetSettings, seed: int, folder: Path
) -> None:
    """Train a supernet and write `scores.csv`: what each way of scoring gives each network, higher for a better one."""
    if (folder / "scores.csv").exists():
        return
    supernet = train_supernet(space, data, settings, seed, folder)
    logits = logits_of(supernet, settings)
    base = space.largest if logits is None else start_network(space, logits)
    evaluate = evaluator_of(supernet, base, data, settings, folder)
    recovered = Recovered(evaluate, data, settings, seed)
    with progress("scoring", 2.0 * len(archs) + 31) as tick:
        drops = measure_drops(space, base, evaluate, on_progress=tick)
        odds = None if logits is None else dict(zip(space.slots, logits, strict=True))
        rows = []
        for arch in archs:
            member = space.fit(arch)
            row: dict[str, object] = {"network": arch.name}
            row["inherited weights"] = -evaluate(member).loss
            row["sum of drops"] = -drops.sum_for(member)
            if odds is not None:
                row["importance"] = sum(
                    odds[i, j].get(space.stages[i].kind_of(member.stages[i].blocks[j]), 0.0) for i, j in space.slots
                )
            tick(1)
            row[f"{settings.recovery_steps} steps of recovery"] = -recovered(member).loss
            tick(1)
            rows.append(row)
    write_csv(folder / "scores.csv", rows, list(rows[0]))


def time_networks(archs: Sequence[ArchConfig], table: LatencyTable, path: Path) -> None:
    """Time the networks on the table's device, which is this machine, and write what they take at the table's pace."""
    profiler, reference = profiler_of(table), table_reference(table)
    if profiler is None:
        raise InputError(f"{table.device} is another machine: give --time there")
    rows = []
    with progress("timing", len(archs)) as tick:
        for arch in archs:
            found = measure_alone(profiler, arch, reference)
            rows.append({"network": arch.name, "ms": found.ms, "low_ms": found.low_ms, "high_ms": found.high_ms})
            tick(1)
    write_csv(path, rows, list(rows[0]))


def timed_ms(path: Path) -> list[float]:
    """Return what the networks take when they are timed themselves."""
    if not path.exists():
        raise InputError(f"{path} is not there: give --time first, on the table's machine")
    return [float(line["ms"]) for line in csv.DictReader(path.read_text().splitlines())]


def print_report(archs: Sequence[ArchConfig], table: LatencyTable, given: argparse.Namespace) -> None:
    """Print what the finished pieces say: where it is asked for, of those networks alone that are timed within the band."""
    kept = list(range(len(archs)))
    if given.timed_in_band:
        ms = timed_ms(given.out / TIMED)
        kept = [i for i in kept if abs(ms[i] / float(np.median(ms)) - 1) <= BAND]
        archs = [archs[i] for i in kept]
    trainings = []  # [seed][network][epoch]
    for seed in range(given.seeds):
        files = [given.out / "alone" / f"{i:02d}-seed{seed}" / "metrics.csv" for i in kept]
        rows = [finished_rows(file, given.epochs) for file in files]
        if all(rows):
            trainings.append(rows)
    if not trainings:
        raise InputError(f"no seed's networks are all trained in {given.out}: run it without --report first")

    def accuracies(rows: Sequence[Sequence[Mapping[str, str]]], epoch: int) -> list[float]:
        return [100 * float(of_network[epoch - 1]["val_accuracy"]) for of_network in rows]

    of_seeds = [accuracies(rows, given.epochs) for rows in trainings]
    truth = np.mean(of_seeds, axis=0)
    predicted = [table.predict_ms(arch) for arch in archs]
    print(
        f"{len(archs)} networks of {given.space}, {min(predicted):.3f} to {max(predicted):.3f} ms on {table.device}; "
        f"trained alone for {given.epochs} epochs with {len(of_seeds)} seeds: {truth.min():.1f} to {truth.max():.1f} % "
        f"(sd {truth.std(ddof=1):.2f})"
    )
    if (given.out / TIMED).exists():
        measured = [timed_ms(given.out / TIMED)[i] for i in kept]
        middle = float(np.median(measured))
        inside = sum(abs(ms / middle - 1) <= BAND for ms in measured)
        counted = "" if given.timed_in_band else f", {inside} of {len(measured)} within 5 % of {middle:.3f} ms"
        print(f"timed themselves they take {min(measured):.3f} to {max(measured):.3f} ms{counted}")
    if len(of_seeds) > 1:
        taus = [kendall_tau(a, b) for a, b in itertools.combinations(of_seeds, 2)]
        print(f"two seeds of the same trainings agree with tau {mean(taus):.2f}, to which the tau with one seed compares")
        print(f"a score that knew each network's mean over all seeds would have about {ceiling(mean(taus), len(of_seeds)):.2f}")
        for epoch in range(1, given.epochs):
            early = [accuracies(rows, epoch) for rows in trainings]
            taus = [kendall_tau(early[a], of_seeds[b]) for a, b in itertools.permutations(range(len(early)), 2)]
            print(
                f"accuracy after epoch {epoch} of a network's own training, of {given.epochs}, agrees with another seed's at "
                f"the end with tau {mean(taus):.2f}"
            )
    columns = (
        "tau (95 %)",
        "tau with one seed",
        "tau above MACs' (95 %)",
        "tau above parameters' (95 %)",
        "regret of the best of ten, points (95 %)",
        "supernets agree, tau",
    )
    print(f"\n| supernet | how many | score | {' | '.join(columns)} |\n|---|---:|---|{'---:|' * len(columns)}")
    rivals = {
        "MACs": [float(count(arch).macs) for arch in archs],
        "parameters": [float(count(arch).params) for arch in archs],
        "milliseconds": predicted,
    }
    sizes = {name: rivals[name] for name in ("MACs", "parameters")}
    for name, score in rivals.items():
        _print_row("none", "", name, cells_of([score], of_seeds, {n: s for n, s in sizes.items() if n != name}))
    shuffled = [np.random.default_rng(seed).permutation(len(archs)).astype(float) for seed in range(SHUFFLES)]
    _print_row("none", "", "shuffled", cells_of_chance(shuffled, of_seeds))
    for way in WAYS:
        found: dict[str, list[list[float]]] = {}
        for seed in range(given.supernet_seeds):
            file = folder_of(given.out, way, seed) / "scores.csv"
            lines = list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []
            for name in [n for n in (lines[0] if lines else {}) if n != "network"]:
                found.setdefault(name, []).append([float(lines[i][name]) for i in kept])
        for name, scores in found.items():
            _print_row(way, str(len(scores)), name, cells_of(scores, of_seeds, sizes))


def ceiling(tau: float, seeds: int) -> float:
    """Return the tau that networks' true means have with their means over `seeds` seeds, where those of two seeds agree with
    `tau`, if all of them are normal: tau = 2 / pi arcsin(r), and means of n have the reliability n r / (1 + (n - 1) r)."""
    r = max(0.0, math.sin(math.pi / 2 * tau))
    return 2 / math.pi * math.asin(math.sqrt(seeds * r / (1 + (seeds - 1) * r)))


def cells_of(scores: Sequence[ArrayLike], truths: Sequence[ArrayLike], sizes: Mapping[str, ArrayLike]) -> list[str]:
    """Return what is printed of one way of scoring: means over the scores that it gave, one a supernet's seed.

    Args:
        truths: the networks' accuracies in percent, a list for each seed of their trainings.
        sizes: MACs and parameters, but what is the score itself, which has no distance from itself.
    """

    def tau(truth: ArrayLike, *scores: ArrayLike) -> float:
        return mean(kendall_tau(score, truth) for score in scores)

    def above(truth: ArrayLike, size: ArrayLike, *scores: ArrayLike) -> float:
        return tau(truth, *scores) - kendall_tau(size, truth)

    truth = np.mean(truths, axis=0)
    low, high = bootstrap(truth, *scores, statistic=tau)
    cells = [f"{tau(truth, *scores):.2f} ({low:.2f} to {high:.2f})", f"{mean(tau(one, *scores) for one in truths):.2f}"]
    for name in ("MACs", "parameters"):
        if name in sizes:
            low, high = bootstrap(truth, sizes[name], *scores, statistic=above)
            cells.append(f"{above(truth, sizes[name], *scores):.2f} ({low:.2f} to {high:.2f})")
        else:
            cells.append("")

    def regret(truth: ArrayLike, *scores: ArrayLike) -> float:
        return mean(regret_among(score, truth) for score in scores)

    low, high = bootstrap(truth, *scores, statistic=regret)
    agree = [kendall_tau(a, b) for a, b in itertools.combinations(scores, 2)]
    cells.append(f"{regret(truth, *scores):.2f} ({low:.2f} to {high:.2f})")
    return [*cells, f"{mean(agree):.2f}" if agree else ""]


def cells_of_chance(scores: Sequence[ArrayLike], truths: Sequence[ArrayLike]) -> list[str]:
    """Return what is printed of scores that know nothing: as of `cells_of`, but with the range of 95 % of them."""
    truth = np.mean(truths, axis=0)
    taus = [kendall_tau(score, truth) for score in scores]
    low, high = np.quantile(taus, [0.025, 0.975])
    with_one = mean(kendall_tau(score, one) for score in scores for one in truths)
    regrets = [regret_among(score, truth) for score in scores]
    least, most = np.quantile(regrets, [0.025, 0.975])
    regret = f"{mean(regrets):.2f} ({least:.2f} to {most:.2f})"
    return [f"{mean(taus):.2f} ({low:.2f} to {high:.2f})", f"{with_one:.2f}", "", "", regret, ""]


def _print_row(way: str, supernets: str, name: str, cells: Sequence[str]) -> None:
    print(f"| {way} | {supernets} | {name} | {' | '.join(cells)} |")


def folder_of(out: Path, way: str, seed: int) -> Path:
    """Return where a supernet and its scores are kept."""
    return out / "supernets" / f"{''.join(c if c.isalnum() else '-' for c in way)}-seed{seed}"


ASKED = ("space", "ms", "networks", "seeds", "epochs", "supernet_seeds", "supernet_images")
"""Settings that decide what is done; a report takes them from the study's folder."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an image folder")
    parser.add_argument("--table", type=Path, required=True, help="CSV file of the device whose milliseconds are to be equal")
    parser.add_argument("--space", default="efficientformer-tiny")
    parser.add_argument("--ms", type=float, help="the networks' latency (default: the median of 1,000 random networks)")
    parser.add_argument("--networks", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2, help="of each network's training")
    parser.add_argument("--epochs", type=int, default=4, help="of each network's training, over all images")
    parser.add_argument("--supernet-seeds", type=int, default=3)
    parser.add_argument(
        "--supernet-images", type=int, default=60_000, help="that single paths see in all; the other ways get the same MACs"
    )
    parser.add_argument("--time", action="store_true", help="time the networks on this machine, the table's, and end")
    parser.add_argument("--report", action="store_true", help="print what is finished, and end")
    parser.add_argument(
        "--timed-in-band",
        action="store_true",
        help="with --report: of those networks that are timed within 5 %% of their median",
    )
    parser.add_argument("--part", default="1/1", metavar="K/N", help="do only every N-th piece of work, from the K-th on")
    parser.add_argument("--out", type=Path, default=Path("ranking"))
    given = parser.parse_args()
    if given.timed_in_band and not given.report:
        parser.error("--timed-in-band is for --report")
    part, parts = part_of(given.part)
    if given.networks < FEWEST_NETWORKS:
        raise InputError(f"--networks must be at least {FEWEST_NETWORKS}, whose order says something, but is {given.networks}")
    if given.supernet_images < 1:
        raise InputError(f"--supernet-images must be at least 1, but is {given.supernet_images}")
    table = LatencyTable.load(given.table)
    sha256 = table_sha256(given.table)
    if (given.report or given.time) and take_claimed(given, ASKED).get("table_sha256") != sha256:
        raise InputError(f"{given.table} is not the table that the networks in {given.out} were drawn by: give that one")
    files = [given.out / "networks" / f"{i:02d}.yaml" for i in range(given.networks)]
    if given.time:
        time_networks([ArchConfig.load(file) for file in files], table, given.out / TIMED)
    if given.report:
        print_report([ArchConfig.load(file) for file in files], table, given)
    if given.report or given.time:
        return

    data = with_larger_val(load_images(given.data, 32, seed=0, score_images=SCORE_IMAGES), VAL_IMAGES)
    space = SearchSpace.load(given.space).with_classes(len(data.classes))
    rng = random.Random(MEDIAN_SEED)
    median_ms = sorted(table.predict_ms(space.sample(rng)) for _ in range(1000))[500]
    settings = {way: settings_of(space, way, given.supernet_images) for way in WAYS}
    # Drawn before the claim, which a latency that has too few networks would stand in the way of another one; written after it.
    drawn = [] if files[-1].exists() else networks_in_band(space, table, given.ms or median_ms, given.networks)
    asked = {name: value for name, value in vars(given).items() if name in ASKED}
    constants = {
        "score_images": SCORE_IMAGES,
        "val_images": VAL_IMAGES,
        "recovery_steps": RECOVERY_STEPS,
        "networks_seed": NETWORKS_SEED,
        "median_seed": MEDIAN_SEED,
        "ways": WAYS,
    }
    request = {"command": "benchmarks/ranking.py", "data": data.fingerprint, "table_sha256": sha256}
    claim(given.out, {**request, **asked, **constants})
    for file, arch in zip(files, drawn, strict=False):
        arch.save(file)
    archs = [ArchConfig.load(file) for file in files]
    recipe = replace(RECIPES["quick"], epochs=given.epochs)

    work: list[Callable[[], None]] = []
    for seed in range(max(given.seeds, given.supernet_seeds)):  # by seeds, so that there is soon a whole study of one
        if seed < given.seeds:
            for i, arch in enumerate(archs):
                work.append(partial(train_alone, arch, seed, data, recipe, given.out / "alone" / f"{i:02d}-seed{seed}"))
        if seed < given.supernet_seeds:
            for way in WAYS:
                folder = folder_of(given.out, way, seed)
                work.append(partial(score_networks, space, archs, data, settings[way], seed, folder))
    for number, job in enumerate(work):
        if number % parts == part - 1:
            say(f"piece {number + 1} of {len(work)}")
            job()
    if parts == 1:
        print_report(archs, table, given)


if __name__ == "__main__":
    try:
        main()
    except (InputError, FloatingPointError) as error:  # a training that diverged is told in one line, too
        raise SystemExit(str(error)) from None
