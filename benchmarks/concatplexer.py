"""What does it bring to take several images in one pass (ConcatPlexer), and what of it is the reduction's alone?

    python benchmarks/concatplexer.py --data cifar10 --epochs 5

Trains a small token network on an image folder (without one, on the embedded digits) with N = 1, 2, 4 images a group, and for
each N > 1 the control: the same reduction, segments and demultiplexers with every image a sequence of its own. Prints, side by
side: accuracy over random groupings of the validation images (mean and standard deviation), in groups of one class, and by
slot; and latency in ONNX Runtime on this CPU (one thread), all visited in shuffled rounds of one run and opened anew every 4
rounds, with the same number of images in flight. A ragged last group is filled, never dropped.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from latency_analysis import Opener, side_by_side

from nas.checkpoints import load_weights
from nas.data import ImageData, Images, load_images
from nas.onnx_model import onnx_bytes
from nas.profilers.ort_session import OrtModel, cpu_name
from nas.profilers.timing import Measurement, median_reference, summarise
from nas.progress import say
from nas.recipe import RECIPES
from nas.throughput import GROUPINGS, Accuracy, grouped_accuracy, wait_ms
from nas.training import train_network
from supernet.arch import ArchConfig, MultiplexSpec, Stage
from supernet.deploy import deployed
from supernet.errors import InputError
from supernet.model import build_model, count
from supernet.specs import PatchStem, ViT

SIZE, WIDTH, DEPTH, START = 32, 96, 6, 2  # 8 x 8 patches; two blocks for each image by itself


def networks(classes: int) -> dict[str, ArchConfig]:
    """Return the networks to compare by what they are called."""
    stage = Stage(WIDTH, 4, (ViT(WIDTH, num_heads=3),) * DEPTH, PatchStem(WIDTH))
    plain = ArchConfig("n1", SIZE, classes, (stage,), "class_token")
    found = {"N = 1": plain}
    for n in (2, 4):
        for mixing, what in (("full", ""), ("none", ", control")):
            mux = MultiplexSpec(n, start=START, mixing=mixing)
            found[f"N = {n}{what}"] = replace(plain, name=f"n{n}-{mixing}", mux=mux)
    return found


def few(images: Images, number: int) -> Images:
    """Return a random part of the images."""
    shuffled = images.shuffled(0)
    return Images(shuffled.pixels, shuffled.rows[:number], shuffled.labels[:number])


def latencies(
    models: dict[str, torch.nn.Module], groups: dict[str, int], in_flight: int, visits: int
) -> dict[str, Measurement]:
    """Return the time of `in_flight` images (`name`) and of one group (`name, one group`) of every network, in one run."""
    entries: dict[str, Opener] = {}
    for name, model in models.items():
        for key, batch in ((name, in_flight), (f"{name}, one group", groups[name])):
            entries[key] = partial(OrtModel, onnx_bytes(model, torch.randn(batch, 3, SIZE, SIZE)))
    made = side_by_side("networks", entries, visits)
    reference = median_reference([visit for done in made.values() for visit in done])
    return {key: summarise(done, reference) for key, done in made.items()}


def percent(shares: Sequence[float]) -> str:
    """Return shares as percents without the sign."""
    return " / ".join(f"{100 * share:.1f}" for share in shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an image folder; without it, the embedded digits")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=0, help="of an epoch and of the validation; 0: all")
    parser.add_argument("--in-flight", type=int, default=8, help="images that are timed together, a multiple of 4")
    parser.add_argument("--rate", type=float, default=100.0, help="images that arrive in a second, for the waiting time")
    parser.add_argument("--groupings", type=int, default=GROUPINGS)
    parser.add_argument("--visits", type=int, default=24, help="of each timed model")
    parser.add_argument("--out", type=Path, help="where the trainings are kept, and gone on with by the same command")
    given = parser.parse_args()
    if given.in_flight < 4 or given.in_flight % 4 or given.groupings < GROUPINGS:
        parser.error(f"--in-flight must be a multiple of 4 and --groupings at least {GROUPINGS}")

    data = load_images(given.data, SIZE, seed=0, score_images=64)
    val = few(data.val, given.images or len(data.val))
    with tempfile.TemporaryDirectory() as folder:
        compare(data, val, given, given.out or Path(folder))


def compare(data: ImageData, val: Images, given: argparse.Namespace, folder: Path) -> None:
    """Train, judge and time the networks, and print what was found."""
    recipe = replace(RECIPES["quick"], epochs=given.epochs, images_per_epoch=given.images, batch_size=64, learning_rate=1e-3)
    archs = networks(len(data.classes))
    models: dict[str, torch.nn.Module] = {}
    scores: dict[str, Accuracy] = {}
    for name, arch in archs.items():
        train_network(arch, data, recipe, folder / arch.name, seed=0)
        models[name] = build_model(arch)
        load_weights(models[name], folder / arch.name / "model.safetensors")
        scores[name] = grouped_accuracy(models[name], val, arch.group_size, given.groupings)
    say("timing all of them side by side")
    groups = {name: arch.group_size for name, arch in archs.items()}
    deploy = {name: deployed(model, archs[name]) for name, model in models.items()}
    times = latencies(deploy, groups, given.in_flight, given.visits)

    source = "scikit-learn's digits" if data.demonstration else Path(data.source).name
    print(f"{source}, {SIZE} px: {given.epochs} epochs of {given.images or len(data.train):,} images, {len(val):,} to validate")
    print(
        f"{cpu_name()}, ONNX Runtime, one thread; {given.in_flight} images in flight; {given.rate:g} images arrive a second\n"
    )
    columns = (
        "network",
        "MMACs an image",
        f"accuracy, % ({given.groupings} groupings, mean ± sd)",
        "by slot, %",
        "groups of one class, %",
        f"ms of {given.in_flight} images (95 %)",
        "ms an image",
        "ms of one group",
        "mean ms to fill a group",
        "mean ms to an answer",
    )
    print(f"| {' | '.join(columns)} |\n|---|" + "---:|" * (len(columns) - 1))
    for name, arch in archs.items():
        score, batch, group = scores[name], times[name], times[f"{name}, one group"]
        cells = [
            name,
            f"{count(arch).macs / 1e6:.1f}",
            f"{100 * score.mean:.2f} ± {100 * score.sd:.2f}",
            percent(score.slots),
            percent([score.one_class]),
            f"{batch.ms:.3f} ({batch.low_ms:.3f} to {batch.high_ms:.3f})",
            f"{batch.ms / given.in_flight:.4f}",
            f"{group.ms:.3f}",
        ]
        if arch.mux and arch.mux.mixing == "none":
            cells += ["no group", ""]  # its images need not wait
        else:
            waits = wait_ms(arch.group_size, given.rate / 1e3)
            cells += [f"{waits:.1f}", f"{waits + group.ms:.2f}"]
        print(f"| {' | '.join(cells)} |")
    print(
        "\nN > 1 serves throughput alone: an image waits for its group, and its answer depends on the others. The control\n"
        "has the same reduction, segments and demultiplexers without concatenation: what it is quicker by than N = 1 is the\n"
        "reduction's, not the sharing's."
    )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
