"""What recipes make of a network on your images: top-1, and how long that takes on this machine.

    python benchmarks/recipes.py run/searched.yaml --data cifar10 --out recipes --seeds 0 1 2

Trains the network from nothing by each recipe with each seed, as nas-train does; validation images are looked at after each
epoch and decide nothing. What is finished is kept in `--out`, and a run that was killed goes on. Seconds are those of the
epochs, validation included, as metrics.csv has them: leave the machine alone meanwhile.
"""

import argparse
import csv
import os
import statistics
from datetime import date
from pathlib import Path

import torch

from nas.data import load_data
from nas.profilers.ort_session import cpu_name
from nas.progress import duration
from nas.recipe import load_recipe
from nas.steps import accelerator
from nas.teacher import load_teacher
from nas.training import train_network
from supernet.model import count
from supernet.zoo import load_arch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", help="a YAML file or the name of a published network")
    parser.add_argument("--data", type=Path, help="images, as for nas-train (default: handwritten digits)")
    parser.add_argument("--recipes", nargs="+", default=["quick"], metavar="R", help="names or files (default: quick)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument("--teacher", metavar="NET", help="as for nas-train")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()

    arch = load_arch(given.arch)
    recipes = {name: load_recipe(name) for name in given.recipes}
    rows = []
    for seed in given.seeds:
        for name, recipe in recipes.items():
            # The images that are set apart are drawn by the seed: each seed has others, where the data have no val/. How large
            # training images are at hand is up to the recipe.
            train_size = recipe.cropped_size(arch.image_size)
            data = load_data(given.data, arch.image_size, seed, score_images=0, train_size=train_size)
            teacher = load_teacher(given.teacher, arch.image_size, data.classes) if given.teacher else None
            folder = given.out / f"{Path(name).stem}-seed{seed}"
            result = train_network(arch, data, recipe, folder, seed, teacher=teacher)
            with (folder / "metrics.csv").open() as file:
                seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
            rows.append((name, seed, result.epochs, result.accuracy, sum(seconds), statistics.median(seconds), max(seconds)))

    found = count(arch.without_identity().with_classes(len(data.classes)))
    device = accelerator(recipes[given.recipes[0]].accelerator)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    print(f"\n{machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; torch {torch.__version__}; {date.today()}")
    print(
        f"{given.arch}: {found.params / 1e6:.2f} M parameters, {found.macs / 1e6:.1f} M MACs at {arch.image_size} px; "
        f"{data.source}: {len(data.train):,} images to train, {len(data.val):,} to validate\n"
    )
    print("| recipe | seed | epochs | top-1 % | time | s an epoch: median | largest |")
    print("|---|---|---|---|---|---|---|")
    for name, seed, epochs, accuracy, total, median, largest in rows:
        print(f"| {name} | {seed} | {epochs} | {100 * accuracy:.2f} | {duration(total)} | {median:.1f} | {largest:.1f} |")


if __name__ == "__main__":
    main()
