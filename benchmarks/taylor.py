"""Which units should a narrower network keep? Gradient times weight (Taylor) against weight norms against the first ones.

    python benchmarks/taylor.py --data cifar10 --network efficientformer-tiny --epochs 30 --out taylor-network
    python benchmarks/taylor.py --data cifar10 --space efficientformer-tiny --epochs 8 --out taylor-supernet

With --network a network is trained, then all of its stages, or all of its FFNs, or the keys of all of its heads are cut to
shares of what they were. With --space a supernet is trained, and sub-networks of the network that slimming begins with inherit
narrower stages. Every seed has its own training and its own calibration images; batch-norm statistics are recomputed on those.
Prints top-1 on the validation images right after the cut, and after --recover epochs of training: mean and standard deviation
over seeds, and the differences seed by seed. Goes on where it was killed when the same command is given.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import get_args

import torch
from safetensors.torch import save as save_safetensors

from nas.checkpoints import load_weights
from nas.data import ImageData, Images, load_images
from nas.evaluation import accuracy_of, recalibrate
from nas.judging import deployed_weights, found_network
from nas.progress import say
from nas.recipe import RECIPES, Recipe
from nas.request import claim
from nas.settings import SupernetSettings
from nas.slimming import start_network
from nas.steps import accelerator
from nas.supernet_training import train_supernet, training_size
from nas.taylor import Method, calibration_batches, supernet_scores, unit_scores
from nas.training import train_network
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.files import write_atomically
from supernet.model import build_model, count
from supernet.space import SearchSpace, space_names
from supernet.specs import EXPANSIONS, Block
from supernet.units import at_widths, narrowed
from supernet.zoo import load_arch

METHODS: tuple[Method, ...] = get_args(Method)
KNOBS = {"ffn": EXPANSIONS, "key": ("key_dim",)}


@dataclass(frozen=True)
class Cut:
    """A narrower network: what was made smaller, to which share, and by which method."""

    what: str
    share: float
    method: Method
    arch: ArchConfig
    model: torch.nn.Sequential

    @property
    def name(self) -> str:
        return f"{self.what} {self.share:g} {self.method}"


def network_of(name: str) -> ArchConfig:
    """Return the network of a YAML file or of the zoo; of a space, the one that has each stage's candidates in turn."""
    if name not in space_names():
        return load_arch(name)
    space = SearchSpace.load(name)
    kinds = [[kind for kind in stage.kinds if kind != "identity"] for stage in space.stages]
    turns = [[of[slot % len(of)] for slot in range(s.depth)] for of, s in zip(kinds, space.stages, strict=True)]
    return space.arch([stage.widths[-1] for stage in space.stages], turns)


def smaller(block: Block, what: str, share: float) -> Block:
    """Return the block with its expansion, or its key dimension, at a share of what it is, at least 1."""
    knob = next((knob for knob in KNOBS[what] if hasattr(block, knob)), None)
    if knob is None:
        return block
    return replace(block, **{knob: max(1, round(share * getattr(block, knob)))})  # type: ignore[type-var]


def target_of(arch: ArchConfig, what: str, share: float) -> ArchConfig:
    """Return a network with what is named at a share of what it is; widths at the nearest that the blocks can have."""
    if what == "width":
        return at_widths(arch, [stage.widths[0] for stage in SearchSpace.around(arch, width_shares=(share,)).stages])
    stages = (replace(s, blocks=tuple(smaller(block, what, share) for block in s.blocks)) for s in arch.stages)
    return replace(arch, stages=tuple(stages))


def cuts_of_network(
    arch: ArchConfig, data: ImageData, recipe: Recipe, given: argparse.Namespace, seed: int, folder: Path
) -> Iterator[Cut]:
    """Train the network, and yield it and what is cut out of it."""
    train_network(arch, data, recipe, folder, seed)
    model = build_model(arch)
    load_weights(model, folder / "model.safetensors")
    device = accelerator()
    model = model.to(device)
    batches = calibration_batches(data, given.calibration_images, device, seed)
    images = torch.cat([x for x, _ in batches])
    recalibrate(model, images)
    yield Cut("whole", 1.0, "first", arch, model)
    for method in METHODS:
        scores = unit_scores(model, arch, batches, method)
        for what in given.what:
            for share in given.shares:
                target = target_of(arch, what, share)
                if target == arch:
                    continue
                cut_out = build_model(target)
                cut_out.load_state_dict(narrowed(model.state_dict(), arch, target, scores))
                cut_out = cut_out.to(device)
                recalibrate(cut_out, images)
                yield Cut(what, share, method, target, cut_out)


def cuts_of_space(
    space: SearchSpace, data: ImageData, settings: SupernetSettings, given: argparse.Namespace, seed: int, folder: Path
) -> Iterator[Cut]:
    """Train the supernet, and yield the network that slimming begins with and narrower ones."""
    supernet = train_supernet(space, data, settings, seed, folder)
    start = start_network(space, supernet.importance())
    batches = calibration_batches(data, given.calibration_images, next(supernet.parameters()).device, seed)
    images = torch.cat([x for x, _ in batches])
    yield Cut("whole", 1.0, "first", start, found_network(supernet, start, images))
    for method in METHODS:
        kept = None if method == "first" else supernet_scores(supernet, start, batches, method)
        made: set[ArchConfig] = set()
        for share in given.shares:
            widths = [min(s.widths, key=lambda w, s=s: abs(w - share * s.widths[-1])) for s in space.stages]  # type: ignore[misc]
            target = at_widths(start, widths)
            if target not in made:  # a space has no widths below its smallest
                yield Cut("width", share, method, target, found_network(supernet, target, images, kept))
            made.add(target)


def judged(cut: Cut, data: ImageData, val: Images, recovery: Recipe | None, seed: int, folder: Path) -> dict[str, object]:
    """Return the record of a cut network: its size, and its accuracy at once and after recovery."""
    deployed = cut.arch.without_identity()
    size = count(deployed)
    record: dict[str, object] = {"seed": seed, "what": cut.what, "share": cut.share, "method": cut.method}
    record |= {"macs": size.macs, "params": size.params, "widths": list(deployed.widths)}
    record["accuracy"] = accuracy_of(cut.model, val)[1]
    if recovery is not None:
        place = folder / cut.name.replace(" ", "-")
        weights = folder / f"{place.name}.safetensors"
        if not weights.exists():
            write_atomically(weights, save_safetensors(deployed_weights(cut.model, deployed)))
        train_network(replace(deployed, name=cut.name), data, recovery, place, seed, weights=weights)
        model = build_model(deployed)
        load_weights(model, place / "model.safetensors")
        record["recovered"] = accuracy_of(model.to(accelerator()), val)[1]
    say(f"seed {seed}, {cut.name}: {100 * float(record['accuracy']):.2f} %")  # type: ignore[arg-type]
    return record


def report(records: list[dict[str, object]], measure: str) -> None:
    """Print a table: a line for each budget, the methods beside each other, and their differences seed by seed."""

    def values(what: object, share: object, method: object) -> list[float]:
        rows = (r for r in records if (r["what"], r["share"], r["method"]) == (what, share, method))
        return [100 * float(r[measure]) for r in sorted(rows, key=lambda r: int(r["seed"]))]  # type: ignore[call-overload, arg-type]

    def spread(numbers: list[float]) -> str:
        return f"{mean(numbers):.2f} ± {stdev(numbers):.2f}" if len(numbers) > 1 else f"{numbers[0]:.2f}"

    print(f"whole: {spread(values('whole', 1.0, 'first'))} %")
    columns = ("cut", "share", "MMACs", *METHODS, "taylor - magnitude", "taylor - first")
    print(f"| {' | '.join(columns)} |\n|---|" + "---:|" * (len(columns) - 1))
    for what, share in dict.fromkeys((r["what"], r["share"]) for r in records if r["what"] != "whole"):
        own = {method: values(what, share, method) for method in METHODS}
        macs = mean(float(r["macs"]) for r in records if (r["what"], r["share"]) == (what, share))  # type: ignore[arg-type]
        apart = [spread([a - b for a, b in zip(own["taylor"], own[m], strict=True)]) for m in ("magnitude", "first")]
        print(f"| {what} | {share} | {macs / 1e6:.2f} | {' | '.join(spread(own[m]) for m in METHODS)} | {' | '.join(apart)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an image folder; without it, the embedded digits")
    parser.add_argument("--network", help="a YAML file, a name of the zoo, or of a space: its candidates in turn")
    parser.add_argument("--space", help="a supernet of this space instead of a network")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10, help="of the training; of a supernet's single paths")
    parser.add_argument("--images", type=int, default=0, help="of an epoch; 0: all")
    parser.add_argument("--recover", type=int, default=0, help="epochs of training after the cut, at half the learning rate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25], help="the budgets")
    parser.add_argument("--what", nargs="+", choices=("width", *KNOBS), help="is cut, of a network (default: all three)")
    parser.add_argument("--calibration-images", type=int, default=256)
    parser.add_argument("--val-images", type=int, default=0, help="0: all")
    parser.add_argument("--out", type=Path, required=True, help="where it is kept, and gone on with by the same command")
    given = parser.parse_args()
    if (given.network is None) == (given.space is None):
        parser.error("give either --network or --space")
    if given.space and given.what:
        parser.error("--what is of a --network: of a --space, the widths of its stages are cut")
    if given.seeds < 1:
        raise InputError(f"--seeds must be at least 1, but is {given.seeds}")
    given.what = given.what or ["width", *KNOBS]
    run(given)


def run(given: argparse.Namespace) -> None:
    """Train, cut and judge for each seed, and print what was found."""
    recipe = replace(RECIPES["quick"], epochs=given.epochs, images_per_epoch=given.images)
    recovery = replace(recipe, epochs=given.recover, learning_rate=recipe.learning_rate / 2) if given.recover else None
    settings = SupernetSettings(weight_epochs=given.epochs, images_per_epoch=given.images)
    size = given.image_size
    if given.space:
        of = SearchSpace.load(given.space)
        size = training_size(of, size)
    data = load_images(given.data, size, seed=0, score_images=64)
    val = data.val.shuffled(0)
    val = Images(val.pixels, val.rows[: given.val_images or len(val)], val.labels[: given.val_images or len(val)])
    request = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items() if name != "out"}
    trained_by = asdict(settings) if given.space else asdict(recipe)
    # More seeds, budgets and cuts may be asked for later: what is there of others stays.
    bound = {name: value for name, value in request.items() if name not in ("data", "seeds", "shares", "what")}
    claim(given.out, {"command": "benchmarks/taylor.py", **bound, "data": data.fingerprint, "training": trained_by})
    results = given.out / "results.json"
    records: list[dict[str, object]] = json.loads(results.read_text()) if results.exists() else []
    for seed in range(given.seeds):
        folder = given.out / f"seed{seed}"
        if given.space:
            cuts = cuts_of_space(of.at(size).with_classes(len(data.classes)), data, settings, given, seed, folder)
        else:
            arch = network_of(given.network).at(size).with_classes(len(data.classes)).without_identity()
            cuts = cuts_of_network(arch, data, recipe, given, seed, folder)
        known = {(r["seed"], r["what"], r["share"], r["method"]) for r in records}
        for cut in cuts:
            if (seed, cut.what, cut.share, cut.method) not in known:
                records.append(judged(cut, data, val, recovery, seed, folder))
                write_atomically(results, json.dumps(records, indent=1) + "\n")
    of_what = ("width",) if given.space else given.what
    chosen = {("whole", 1.0), *((what, share) for what in of_what for share in given.shares)}
    records = [r for r in records if (r["what"], r["share"]) in chosen and r["seed"] in range(given.seeds)]
    print(f"settings: {request}\ntraining: {trained_by}")
    print(f"{data.source}: {len(data.train):,} training images, {len(val):,} to validate, on {accelerator().type}\n")
    print("top-1 right after the cut, batch-norm statistics recomputed (mean ± standard deviation over seeds)")
    report(records, "accuracy")
    if recovery is not None:
        print(f"\nafter {given.recover} epochs of recovery")
        report(records, "recovered")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
