"""What a trained supernet says: the score of its networks, the drops of single changes, and the found network's own weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from nas.data import ImageData
from nas.evaluation import Evaluator, recalibrate
from nas.kept import Remembered, write_csv
from nas.progress import progress, say
from nas.scores import (
    ADDITIVITY_COLUMNS,
    Additivity,
    Drops,
    Evaluate,
    additivity,
    measure_drops,
    measure_pairs,
    pairs_to_measure,
    single_changes,
)
from nas.settings import SupernetSettings
from nas.supernet_training import channel_method
from nas.taylor import channels
from supernet.arch import ArchConfig
from supernet.model import build_model
from supernet.space import SearchSpace
from supernet.units import UnitScores
from supernet.weights import AnySupernet, at_size, subnetwork


def evaluator_of(
    supernet: AnySupernet, base: ArchConfig, data: ImageData, settings: SupernetSettings, folder: Path
) -> Evaluator:
    """Return what scores the supernet's networks; which channels narrow ones inherit is judged in `base`, a network at the
    largest widths, and kept in `folder/channels.json`."""
    images = settings.recalibration_images
    member = base.at(supernet.space.image_size)
    kept = channels(folder / "channels.json", supernet, member, data, images, channel_method(settings))
    return Evaluator(supernet, data, images, settings.cache_bytes, kept)


def drops_of(space: SearchSpace, base: ArchConfig, evaluate: Evaluate, pairs: int) -> Drops:
    """Return the drop of every single change of the base network, and of so many pairs of them, with progress shown."""
    with progress("drops of single changes", len(single_changes(space, base)) + 1) as tick:
        drops = measure_drops(space, base, evaluate, tick)
    if not pairs:
        return drops
    with progress("drops of pairs", len(pairs_to_measure(drops, pairs))) as tick:
        return measure_pairs(drops, evaluate, pairs, tick)


def additivity_of(
    space: SearchSpace, drops: Drops, evaluate: Evaluate, count: int, seed: int, folder: Path
) -> dict[str, float | None] | None:
    """Check the sum of the drops on `count` random networks, if any; write `additivity.csv`, say and return how good it is."""
    if not count:
        return None
    with progress("networks with several changes", count) as tick:
        found = additivity(space, replace(drops, pairs={}), evaluate, count, seed, tick)
    say(_how_far(found, "the sum of single drops"))
    if drops.pairs:  # the networks are the same ones, and known
        found = additivity(space, drops, evaluate, count, seed)
        say(_how_far(found, f"with those of {len(drops.pairs)} pairs"))
    write_csv(folder / "additivity.csv", found.records, ADDITIVITY_COLUMNS)
    figures = {"r_squared": found.r_squared, "tau": found.tau, "slope": found.slope}
    # JSON has no NaN, which they are where all networks are equally good.
    return {"networks": len(found.records), **{k: None if math.isnan(v) else v for k, v in figures.items()}}


def _how_far(found: Additivity, what: str) -> str:
    return (
        f"{what} on {len(found.records)} networks with several changes: R2 {found.r_squared:.2f}, Kendall's tau "
        f"{found.tau:.2f}, slope {found.slope:.2f}"
    )


def report_signal(
    space: SearchSpace, largest: ArchConfig, evaluate: Remembered, images: int, *, trained_here: bool = True
) -> None:
    """Say how far the largest network and the one without blocks are apart: what the scores have to go by."""
    kinds = [["identity"] * stage.depth for stage in space.stages]
    empty = space.arch(largest.widths, kinds)
    full, bare = evaluate(largest), evaluate(empty)
    say(
        f"on the {images} scoring images, as networks are scored: largest network loss {full.loss:.3f}, top-1 "
        f"{100 * full.accuracy:.1f} %; identity only loss {bare.loss:.3f}, top-1 {100 * bare.accuracy:.1f} %"
    )
    noise = 2 * math.sqrt(2 * full.accuracy * (1 - full.accuracy) / images)
    if full.accuracy - bare.accuracy <= noise or full.loss >= bare.loss:
        worse = bare.accuracy - full.accuracy > noise
        say(
            "warning: "
            + ("the largest is the worse one: its blocks have not learned yet" if worse else "they are as good as equal")
            + ", so the scores carry no signal and which blocks go is chance; "
            + (
                "train the supernet for longer (weight_epochs in --config) or on larger images"
                if trained_here
                else "give --init a network that was trained on such images"
            )
        )


def found_network(
    supernet: AnySupernet, arch: ArchConfig, images: torch.Tensor, kept: UnitScores | None = None, unchanged: int = 0
) -> torch.nn.Sequential:
    """Return the found network at the supernet's image size, with inherited weights, and statistics recomputed on `images` but
    for those of the first `unchanged` layers."""
    model = subnetwork(supernet, arch.at(supernet.space.image_size), kept)
    model = model.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    recalibrate(model, images, unchanged)
    return model.eval()


def deployed_weights(model: torch.nn.Sequential, deployed: ArchConfig) -> dict[str, torch.Tensor]:
    """Return the state of `model` under the names of the network to deploy, what depends on the image size at its size."""
    target = build_model(deployed)
    weights = {}
    for (name, module), source in zip(target.named_children(), model.children(), strict=True):
        for key, like in module.state_dict().items():
            value = source.state_dict()[key].cpu()
            weights[f"{name}.{key}"] = at_size(key, value, like).contiguous()
    return weights
