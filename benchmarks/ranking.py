"""How well do a supernet's scores rank networks of one latency?

    python benchmarks/ranking.py --data cifar10 --table latency_tables/my-cpu.csv --out ranking
    python benchmarks/ranking.py --data cifar10 --table latency_tables/my-cpu.csv --out ranking --part 1/2   # and 2/2 beside it
    python benchmarks/ranking.py --out ranking --report

Draws networks of a space within 5 % of one latency, trains each alone with several seeds, trains supernets in every way, and
scores the networks by each. Prints for every way of scoring: Kendall's tau-b with the networks' accuracy (mean over the
supernets' seeds, with a bootstrap interval over the networks), the regret of taking the best of ten by the score, and how far
supernets of other seeds agree; beside them what needs no supernet (MACs, parameters, a shuffled score), and the ceiling: how
far two seeds of the same training agree. Everything is kept under --out: the same command goes on after a kill, and --part
divides the work among processes.
"""

import argparse
import csv
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from nas.data import ImageData, Images, load_images
from nas.progress import say
from nas.table import LatencyTable
from nas.training import RECIPES, Recipe, train_network
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.space import SearchSpace

BAND = 0.05  # of the latency, to both sides
TRIES = 200_000  # random networks, to find enough within the band
VAL_IMAGES = 10_000  # a fifth of CIFAR-10: accuracy is known to half a point


def networks_in_band(space: SearchSpace, table: LatencyTable, ms: float, count: int) -> list[ArchConfig]:
    """Return `count` different random networks whose predicted latency is within the band about `ms`.

    Raises:
        InputError: there are too few.
    """
    rng = random.Random(0)
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


def with_larger_val(data: ImageData, images: int) -> ImageData:
    """Return the data with training images moved to the validation part until it has `images`."""
    missing = images - len(data.val)
    if missing <= 0:
        return data
    shuffled = data.train.shuffled(1)
    moved, kept = slice(missing), slice(missing, None)
    val = Images(
        data.val.pixels,
        torch.cat((data.val.rows, shuffled.rows[moved])),
        torch.cat((data.val.labels, shuffled.labels[moved])),
    )
    return replace(data, train=Images(shuffled.pixels, shuffled.rows[kept], shuffled.labels[kept]), val=val)


def last_row(metrics: Path, epochs: int) -> dict[str, str] | None:
    """Return the last epoch of a training that has finished."""
    rows = list(csv.DictReader(metrics.read_text().splitlines())) if metrics.exists() else []
    return rows[-1] if rows and int(rows[-1]["epoch"]) == epochs else None


def train_alone(arch: ArchConfig, seed: int, data: ImageData, recipe: Recipe, folder: Path) -> None:
    """Train one network with one seed, unless that is done."""
    if last_row(folder / "metrics.csv", recipe.epochs) is None:
        train_network(arch, data, recipe, folder, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an image folder")
    parser.add_argument("--table", type=Path, help="of the device whose milliseconds are to be equal")
    parser.add_argument("--space", default="efficientformer-tiny")
    parser.add_argument("--ms", type=float, help="the networks' latency (default: the median of 1,000 random networks)")
    parser.add_argument("--networks", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2, help="of each network's training")
    parser.add_argument("--epochs", type=int, default=4, help="of each network's training, over all images")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="do only every N-th piece of work, from the K-th on")
    parser.add_argument("--out", type=Path, default=Path("ranking"))
    given = parser.parse_args()
    part, parts = (int(number) for number in given.part.split("/"))

    data = with_larger_val(load_images(given.data, 32, seed=0, score_images=2000), VAL_IMAGES)
    space = SearchSpace.load(given.space).with_classes(len(data.classes))
    table = LatencyTable.load(given.table)
    rng = random.Random(1)
    median_ms = sorted(table.predict_ms(space.sample(rng)) for _ in range(1000))[500]
    files = [given.out / "networks" / f"{i:02d}.yaml" for i in range(given.networks)]
    if not files[-1].exists():
        for file, arch in zip(files, networks_in_band(space, table, given.ms or median_ms, given.networks), strict=True):
            arch.save(file)
    archs = [ArchConfig.load(file) for file in files]
    recipe = replace(RECIPES["quick"], epochs=given.epochs)

    work: list[Callable[[], None]] = []
    for seed in range(given.seeds):
        for i, arch in enumerate(archs):
            folder = given.out / "alone" / f"{i:02d}-seed{seed}"
            work.append(lambda a=arch, s=seed, f=folder: train_alone(a, s, data, recipe, f))
    for number, job in enumerate(work):
        if number % parts == part - 1:
            say(f"piece {number + 1} of {len(work)}")
            job()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
