"""How important each removable unit of a trained network is: what decides which channels a narrowed stage keeps, and which
parts of an FFN or of an attention head are left where it is made smaller.

Sources: Molchanov et al. (CVPR 2019), the change of the loss when a unit is set to zero, to first order gradient times weight
summed over the unit's parts; EfficientViT (Liu et al., CVPR 2023), which allots widths, keys and FFNs by it. How it is averaged
is settled here: absolute for each calibration batch, since the sum over all of them is near zero in a trained network, then the
mean over batches, so that scores do not depend on their number. Only the order within a role counts, never one role against
another. Which parts belong together is in supernet.units.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.data import ImageData, normalise
from nas.evaluation import recalibrate
from nas.progress import progress
from supernet.arch import ArchConfig
from supernet.errors import InputError, unknown
from supernet.files import read_json, reading, write_atomically
from supernet.metapath import Supernet
from supernet.specs import Identity, Layer
from supernet.units import UnitScores, axes, key, sections, stage_of
from supernet.weights import AnySupernet, subnetwork

Method = Literal["taylor", "magnitude", "first"]
"""What a unit's importance is: taylor; the L2 norm of its weights; or that it stands before others."""

BATCH = 16  # images of a calibration batch

Batch = tuple[Tensor, Tensor]
_Unit = tuple[str, str]  # where a role's units are counted ("stage 0", or a layer's name), and the role


def calibration_batches(
    data: ImageData, images: int, device: torch.device | str = "cpu", seed: int = 0, batch: int = BATCH
) -> list[Batch]:
    """Return random training images, normalised (B, 3, S, S), with labels (B,), without augmentation.

    `images` is how many at most. All batches are whole, unless there are fewer images than one takes: absolute values are taken
    of a batch's mean, which of fewer images is larger, so that a last batch of one would drown the others.
    """
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:images]
    found = []
    whole = len(order) // batch * batch or len(order)
    for indices in order[:whole].split(batch):
        pixels, labels = data.train.batch(indices)
        x = normalise(pixels.to(device)).contiguous(memory_format=torch.channels_last)
        found.append((x, labels.to(device)))
    return found


def unit_scores(
    model: nn.Sequential,
    arch: ArchConfig,
    batches: Iterable[Batch],
    method: Method = "taylor",
    on_batch: Callable[[float], None] | None = None,
) -> UnitScores:
    """Return the importance of every unit of a trained network: `build_model(arch)`, its batch-norm statistics up to date.

    Args:
        model: its weights stay as they are; it is left in eval mode.
        batches: normalised images (B, 3, S, S) with labels (B,), on the model's device; only taylor looks at them.
        on_batch: called with 1 after each batch.

    Raises:
        InputError: there is no such method, taylor has no batches, or the gradients are not finite.
    """
    if method not in get_args(Method):
        raise unknown("channels", method, get_args(Method))
    layers = dict(arch.named_layers())
    parameters = dict(model.eval().named_parameters())
    if method == "first":
        found = {unit: -torch.arange(size, dtype=torch.float64) for unit, size in _units(arch, layers).items()}
    elif method == "magnitude":
        squares = {name: weight.detach().square() for name, weight in parameters.items()}
        found = {unit: total.sqrt() for unit, total in _summed(squares, arch, layers).items()}
    else:
        found, count = {}, 0
        parameters = {name: weight for name, weight in parameters.items() if weight.requires_grad}  # a fixed one has no part
        for x, y in batches:
            loss = F.cross_entropy(model(x), y)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            products = {
                name: weight.detach() * gradient
                for (name, weight), gradient in zip(parameters.items(), gradients, strict=True)
                if gradient is not None
            }
            for unit, total in _summed(products, arch, layers).items():
                found[unit] = found.get(unit, 0) + total.abs()
            count += 1
            if on_batch is not None:
                on_batch(1)
        if not count:
            raise InputError("taylor needs calibration images, but there are none: give at least one batch")
        found = {unit: total / count for unit, total in found.items()}
        if not all(total.isfinite().all() for total in found.values()):
            raise InputError(f"the gradients of {arch.name} are not finite, so taylor cannot judge its units: train it anew")
    inside: dict[str, dict[str, Tensor]] = {}
    for (place, role), scores in found.items():
        if role != "dim":
            inside.setdefault(key(place, layers[place].spec), {})[role] = scores
    return UnitScores(tuple(found[f"stage {at}", "dim"] for at in range(len(arch.stages))), inside)


def _unit(name: str, role: str, arch: ArchConfig) -> _Unit:
    """Return where a layer's role is counted: `dim` and `dim_in` are the channels of a stage, which many layers share."""
    if role not in ("dim", "dim_in"):
        return name, role
    return f"stage {stage_of(name, len(arch.stages)) - (role == 'dim_in')}", "dim"


def _units(arch: ArchConfig, layers: dict[str, Layer]) -> dict[_Unit, int]:
    """Return how many units each role has."""
    return {_unit(name, role, arch): ends[-1] for name, layer in layers.items() for role, ends in sections(layer).items()}


def _summed(values: dict[str, Tensor], arch: ArchConfig, layers: dict[str, Layer]) -> dict[_Unit, Tensor]:
    """Return what the parts of every unit sum up to, of values that are shaped as the network's parameters."""
    found = {unit: torch.zeros(size, dtype=torch.float64) for unit, size in _units(arch, layers).items()}
    for name, value in values.items():
        layer, _, own = name.partition(".")
        for axis, runs in enumerate(axes(layers[layer])[own]):
            if not runs:
                continue
            along = value.movedim(axis, 0).reshape(value.shape[axis], -1).sum(1).cpu().double()  # Apple's GPU has no float64
            for run, part in zip(runs, along.split([run.size for run in runs]), strict=True):
                found[_unit(layer, run.role, arch)][run.start : run.start + run.size] += part
    return found


def supernet_scores(supernet: Supernet, start: ArchConfig, batches: Sequence[Batch], method: Method = "taylor") -> UnitScores:
    """Return the importance of every unit of a supernet's candidates at their largest widths, for `subnetwork(kept=...)`.

    The channels of the stages, and what is inside its blocks, are judged in `start`, the network that slimming begins with, as
    it is this one, and what is left of it, that is narrowed. What is inside other candidates is judged in the networks that
    have one candidate in all slots of a stage. Batch-norm statistics are recomputed on the images of the batches first.

    Args:
        start: a member of the space at its largest widths.
        batches: as `calibration_batches` gives them.
    """
    space = supernet.space
    if start.widths != tuple(stage.widths[-1] for stage in space.stages):
        raise InputError(f"{start.name} has the widths {start.widths}: give a network of {space.name} at its largest widths")
    device = next(supernet.parameters()).device
    choices = [
        [kind for kind, candidate in zip(s.kinds, s.candidates, strict=True) if not isinstance(candidate, Identity)]
        for s in space.stages
    ]
    uniform = (
        space.arch(start.widths, [[kinds[at % len(kinds)]] * s.depth for kinds, s in zip(choices, space.stages, strict=True)])
        for at in range(max(map(len, choices)))
    )
    first = replace(space.fit(start.at(space.image_size)), name=space.name)
    networks = list(dict.fromkeys([first, *uniform]))
    found: list[UnitScores] = []
    images = torch.cat([x for x, _ in batches])
    with progress(f"judging channels ({method})", len(networks) * len(batches)) as tick:
        for arch in networks:
            model = subnetwork(supernet, arch).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            if method == "taylor":
                recalibrate(model, images)
            found.append(unit_scores(model, arch, batches, method, tick))
    inside = {name: roles for scores in reversed(found) for name, roles in scores.inside.items()}
    return UnitScores(found[0].stages, inside)


def channels(
    path: Path, supernet: AnySupernet, start: ArchConfig, data: ImageData, images: int, method: Method
) -> UnitScores | None:
    """Return what decides which channels the sub-networks of a search keep; None, the leading slices, for `first`, and where no
    stage has several widths.

    Kept in the file `path`, so that a search that was killed goes on with the same.

    Raises:
        InputError: the file cannot be read, or is damaged.
    """
    if method == "first" or all(len(stage.widths) == 1 for stage in supernet.space.stages):
        return None
    if not isinstance(supernet, Supernet):
        raise InputError(f"an elastic supernet's narrow networks have its first channels, but channels is {method}: give first")
    if not path.exists():
        device = next(supernet.parameters()).device
        scores = supernet_scores(supernet, start, calibration_batches(data, images, device), method)
        write_atomically(path, to_json(scores, method))
    return from_json(path)  # what is written is rounded: the first run takes what a later one will


def to_json(scores: UnitScores, method: Method) -> str:
    """Return scores as the text of a file, rounded to six digits."""

    def rounded(values: Tensor) -> list[float]:
        return [float(f"{value:.6g}") for value in values.tolist()]

    content = {
        "method": method,
        "stages": [rounded(values) for values in scores.stages],
        "inside": {name: {role: rounded(values) for role, values in roles.items()} for name, roles in scores.inside.items()},
    }
    return json.dumps(content) + "\n"


def from_json(path: Path) -> UnitScores:
    """Return the scores that a file holds.

    Raises:
        InputError: it cannot be read, or is damaged.
    """
    do = "remove it, and the scores are computed again"
    content = read_json(path, "the file of channels", do)
    with reading(str(path), do):
        stages = tuple(torch.tensor(values, dtype=torch.float64) for values in content["stages"])
        inside = {
            name: {role: torch.tensor(values, dtype=torch.float64) for role, values in roles.items()}
            for name, roles in content["inside"].items()
        }
    return UnitScores(stages, inside)
