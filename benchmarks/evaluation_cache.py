"""What keeping activations saves: how many layers a search computes to evaluate its networks, with the cache, if nothing that
identical beginnings share were computed twice, and without a cache. And whether all of them decide alike.

    python benchmarks/evaluation_cache.py --table TABLE.csv
    python benchmarks/evaluation_cache.py --table TABLE.csv --arithmetic --space efficientformer-s --sizes 128 224

The first command trains a supernet a little, and evaluates and slims with it as nas-search does (single changes, the loop,
landing), for several targets: with the cache and without. The second one computes nothing: it goes through the networks that
slimming asks for where what they are worth is made up (random, additive), and counts what the cache of a given memory would
have had, with activations of the size that they have at an image size. Flat and Unflat, which compute nothing, are not counted.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from guarantee import Worth
from studies import claim_supernet

from nas.data import load_data
from nas.evaluation import Evaluator
from nas.judging import evaluator_of
from nas.kept import described
from nas.prefixes import PrefixCache, Tree, cheapest_order
from nas.scores import Drops, measure_drops
from nas.settings import SupernetSettings
from nas.slimming import Importance, slim, start_network
from nas.supernet_training import logits_of, train_supernet, training_size
from nas.table import LatencyTable
from nas.trajectory import Evaluation, Trajectory, evaluations
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.space import SearchSpace

Evaluate = Callable[[ArchConfig], Evaluation]
GIB = 2**30


class Once:
    """Evaluates no network twice, as a search does, and remembers what was asked for together."""

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate = evaluate
        self.known: dict[str, Evaluation] = {}
        self.batches: list[list[ArchConfig]] = []

    def __call__(self, arch: ArchConfig) -> Evaluation:
        return next(evaluation for _, evaluation in list(self.each([arch])))

    def each(self, archs: Sequence[ArchConfig]) -> Iterator[tuple[int, Evaluation]]:
        new = {described(arch): arch for arch in archs if described(arch) not in self.known}
        if new:
            self.batches.append(list(new.values()))
        for at, evaluation in evaluations(self.evaluate, list(new.values())):
            self.known[list(new)[at]] = evaluation
        yield from ((at, self.known[described(arch)]) for at, arch in enumerate(archs))


def search(
    space: SearchSpace, evaluate: Evaluate, table: LatencyTable, target_ms: float, logits: Importance | None
) -> tuple[Drops, Trajectory]:
    """Return the drops of single changes and what slimming finds, as nas-search does it."""
    base = space.largest if logits is None else start_network(space, logits)
    drops = measure_drops(space, base, evaluate)
    return drops, slim(space, logits or drops.importance(), evaluate, table, target_ms, only_better=True)


def targets(space: SearchSpace, table: LatencyTable, number: int) -> list[float]:
    low, high = table.predict_ms(space.smallest), table.predict_ms(space.largest)
    return [low + (high - low) * at / (number + 1) for at in range(1, number + 1)]


def least(space: SearchSpace, batches: Sequence[Sequence[ArchConfig]]) -> int:
    """Return how many layers there are to compute if nothing is computed twice."""
    tree = Tree()
    for arch in (arch for batch in batches for arch in batch):
        tree.nodes(space.fit(arch.at(space.image_size)).named_layers())
    return tree.layers()


def trained(given: argparse.Namespace) -> None:
    space, settings = SearchSpace.load(given.space), SupernetSettings(**given.settings)
    size = training_size(space, given.sizes[0] if given.sizes else 32, settings.image_size)
    data = load_data(given.data, size, given.seed, settings.score_images)
    space = space.with_classes(len(data.classes))
    table = LatencyTable.load(given.table).calibrated_for(space)
    if given.run is not None:
        claim_supernet(given.run, "benchmarks/evaluation_cache.py", space, settings, given.seed, data)
    with tempfile.TemporaryDirectory() as folder:
        net = train_supernet(space.at(size), data, settings, given.seed, given.run or Path(folder))
        logits = logits_of(net, settings)
        base = space.largest if logits is None else start_network(space, logits)
        made = evaluator_of(net, base, data, settings, given.run or Path(folder))
    for target_ms in targets(space, table, given.targets):
        found = {}
        for name, memory in (
            ("default", made.memory_bytes),
            *((f"{g:g} GiB", int(g * GIB)) for g in given.memory),
            ("none", 0),
        ):
            evaluate = Evaluator(net, data, settings.recalibration_images, memory, made.kept)
            once = Once(evaluate)
            drops, trajectory = search(space, once, table, target_ms, logits)
            found[name] = (evaluate, once, drops, trajectory)
        without, once, *_ = found["none"]
        fewest = least(space.at(size), once.batches)
        print(
            f"{space.name} at {size} px, {len(without.images)} scoring and {len(without.recalibration)} recalibration images, "
            f"to {target_ms:.3g} ms: {len(once.known)} networks, {len(found['none'][3].steps)} steps"
        )
        print(f"  layers to compute: {fewest} that identical beginnings allow, {without.layers_run} without a cache")
        for name, (evaluate, _, drops, trajectory) in found.items():
            alike = (drops.singles, trajectory) == (found["none"][2].singles, found["none"][3])
            memory = f"{evaluate.memory_bytes / GIB:.3g} GiB"
            print(
                f"  {name} ({memory}): {evaluate.layers_run}, {evaluate.layers_run / fewest:.3f} times what is allowed; "
                f"decisions and numbers {'identical' if alike else 'DIFFER'}"
            )


def arithmetic(given: argparse.Namespace) -> None:
    space = SearchSpace.load(given.space)
    table = LatencyTable.load(given.table).calibrated_for(space)
    runs = []
    for seed in range(given.seed, given.seed + given.runs):
        worth = Worth(space, seed)
        for target_ms in targets(space, table, given.targets):
            once = Once(worth)
            search(space, once, table, target_ms, None)
            runs.append(once.batches)
    print(f"{space.name}: {len(runs)} runs, {sum(len(batch) for batches in runs for batch in batches)} networks")
    for size in given.sizes or [space.image_size]:
        at_size = space.at(size)
        fewest = sum(least(at_size, batches) for batches in runs)
        for images in given.images:
            asked, chain, counts = 0, 0, []
            for memory in given.memory:
                counted = [replay(at_size, batches, images, int(memory * GIB)) for batches in runs]
                counts.append(sum(layers for layers, _, _ in counted) / fewest)
                asked, chain = sum(layers for _, layers, _ in counted), counted[0][2]
            print(
                f"  {size} px, {images} images: the largest network's activations are {chain / GIB:.2f} GiB; without a cache "
                f"{asked / fewest:.2f} times what identical beginnings allow; with "
                + ", ".join(f"{memory:g} GiB {count:.3f}" for memory, count in zip(given.memory, counts, strict=True))
            )


def replay(space: SearchSpace, batches: Sequence[Sequence[ArchConfig]], images: int, memory: int) -> tuple[int, int, int]:
    """Return how many layers are computed with a cache of `memory` bytes, how many without any, and the bytes of all
    activations of the space's largest network, the last ones aside."""
    tree = Tree()
    cache: PrefixCache[None] = PrefixCache(tree, memory)
    run = asked = 0
    for batch in batches:
        layers = [space.fit(arch.at(space.image_size)).named_layers() for arch in batch]
        nodes = [tree.nodes(named) for named in layers]
        order = cheapest_order(nodes)
        cache.begin([nodes[at] for at in order])
        for place, at in enumerate(order):
            start, _ = cache.longest(nodes[at], place)
            for node, (name, _) in list(zip(nodes[at], layers[at], strict=True))[start:]:
                run += not tree.is_free(node)
                if node != nodes[at][-1]:
                    cache.keep(node, None, images * activation_bytes(space, batch[at], name))
            asked += sum(not tree.is_free(node) for node in nodes[at])
    named = space.largest.named_layers()
    free = [tree.is_free(node) for node in tree.nodes(named)]
    sizes = [activation_bytes(space, space.largest, name) for name, _ in named[:-1]]
    return run, asked, images * sum(size for size, none in zip(sizes, free, strict=False) if not none)


def activation_bytes(space: SearchSpace, arch: ArchConfig, name: str) -> int:
    """Return the bytes of one image behind the layer of this name, in fp32."""
    stage = 0 if name == "stem" else int(name.removeprefix("stage").partition("_")[0]) - 1
    return 4 * arch.widths[stage] * space.resolutions[stage] ** 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, help="a CSV file or a device id")
    parser.add_argument("--space", default="efficientformer-tiny")
    parser.add_argument("--sizes", type=int, nargs="+", help="of images, in pixels")
    parser.add_argument("--targets", type=int, default=2, help="how many, evenly between the smallest and the largest network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=float, nargs="+", default=[1, 2, 4, 8], metavar="GIB")
    real = parser.add_argument_group("with a trained supernet")
    real.add_argument("--data", type=Path, help="image folders (default: the embedded digits)")
    real.add_argument("--run", type=Path, help="where the supernet is kept, or the folder of a search of the same settings")
    real.add_argument(
        "--settings",
        type=settings_of,
        default={"weight_epochs": 2, "mixture_epochs": 1},
        metavar="NAME=NUMBER,...",
        help="of the supernet's training and of scoring, as in nas-search --config",
    )
    counted = parser.add_argument_group("without computing")
    counted.add_argument("--arithmetic", action="store_true", help="count only")
    counted.add_argument("--runs", type=int, default=4, help="made-up worths, each for all targets")
    counted.add_argument("--images", type=int, nargs="+", default=[768, 2256], help="scoring and recalibration images together")
    given = parser.parse_args()
    torch.set_num_threads(1)
    (arithmetic if given.arithmetic else trained)(given)


def settings_of(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in (pair.split("=") for pair in text.split(","))}


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
