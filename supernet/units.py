"""Which parts of a layer's tensors belong together, and narrower layers and networks cut out of wider ones.

A *unit* is what can be removed from a layer: a channel of its stage, a hidden channel of an FFN, a dimension of a head's keys
or values. Its parts lie in several tensors and are cut together; `axes` says where they are. Units of one kind are a *role*:
`dim` (the stage's channels), `dim_in` (those of the stage before), `hidden` (of an FFN), `key0`, `value0`, ... (of each head)
and what else a layer has inside.

Widths and expansions are found by building the layer at another width and expansion without memory (the meta device), so a
user's own block is served too. Axes in which several roles stand side by side are known to the block's module
(`unit_layout`, next to the module). An axis of which neither is known keeps its first positions.

Source: EfficientViT (Liu et al., CVPR 2023, parameter reallocation) cuts coupled parts by importance; how is settled here. In
a sandwich block head i owns the i-th chunk of the channels, and what head i - 1 gives is added to it: each head keeps its own
best channels, so that it goes on reading what it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from supernet.arch import ArchConfig, Stage, place_of
from supernet.blocks import build_layer
from supernet.blocks.layers import Layout, Run
from supernet.errors import InputError, placed
from supernet.specs import EXPANSIONS, Block, Identity, Layer, Spec, at_width, is_embedding, label

Axes = tuple[tuple[Run, ...], ...]


@cache
def axes(layer: Layer) -> Mapping[str, Axes]:
    """Return the runs of units along every axis of every tensor of a layer's state dict; an axis without units has none.

    The mapping is shared: do not change it.
    """
    spec: Any = layer.spec
    module = _on_meta(layer)
    shapes = _layer_shapes(layer)
    ratio = next((knob for knob in EXPANSIONS if hasattr(spec, knob)), None)
    widths = [(knob, getattr(spec, knob)) for knob in ("dim", "dim_in") if hasattr(spec, knob)]
    resized = [(knob, width, *_shapes_with(layer, knob, 2 * width, width // 2)) for knob, width in widths]
    factor = getattr(spec, ratio) if ratio else 0
    larger, expanded = _shapes_with(layer, ratio, factor + 1) if ratio else (0, shapes)
    layout: Layout = module.unit_layout(spec) if hasattr(type(module), "unit_layout") else {}  # type: ignore[operator]

    def runs(name: str, axis: int) -> tuple[Run, ...]:
        size = shapes[name][axis]
        if larger != factor and expanded[name][axis] * factor == size * larger:
            return (Run("hidden", 0, size),)
        for knob, width, other, at_other in resized:
            if other != width == size and at_other[name][axis] == other:
                return (Run(knob, 0, size),)
        return ()

    found: dict[str, Axes] = {}
    for name, shape in shapes.items():
        known = layout.get(max((start for start in layout if name.startswith(start)), key=len, default=""), {})
        found[name] = tuple(known[axis] if axis in known else runs(name, axis) for axis in range(len(shape)))
    return found


def _on_meta(layer: Layer) -> nn.Module:
    with torch.device("meta"):
        return build_layer(layer)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _shapes_with(layer: Layer, knob: str, *values: int) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Return the first of the values that the layer's knob can have, and the shapes then; where a user's own block takes none
    of them, the knob's own value."""
    for value in values:
        try:
            changed: Any = replace(layer.spec, **{knob: value})  # type: ignore[type-var]
            return value, _shapes(_on_meta(Layer(changed, layer.resolution)))
        except Exception:  # whatever a user's block raises
            if not hasattr(layer.spec, "module"):
                raise
    return getattr(layer.spec, knob), _layer_shapes(layer)


@cache
def sections(layer: Layer) -> Mapping[str, tuple[int, ...]]:
    """Return where the sections of each role of a layer begin, and after them how many units it has.

    A role has several sections where parts of it stand apart, as the chunks of a sandwich block's heads do; cutting leaves the
    same share of each. The mapping is shared: do not change it.
    """
    found: dict[str, set[int]] = {}
    for name in axes(layer).values():
        for run in (run for runs in name for run in runs):
            found.setdefault(run.role, set()).update((run.start, run.start + run.size))
    return {role: tuple(sorted(bounds)) for role, bounds in found.items()}


def best(scores: Tensor | None, bounds: Sequence[int], kept: Sequence[int]) -> Tensor:
    """Return the units to keep, in ascending order: of each section those that score highest, the first of equals.

    Args:
        scores: of each unit; None: the first units are kept.
        bounds: where the sections begin, and the number of units.
        kept: the same of the cut role.

    Raises:
        InputError: a section would grow, or there is another number of sections.
    """
    if len(bounds) != len(kept) or any(b - a < d - c for (a, b), (c, d) in zip(pairwise(bounds), pairwise(kept), strict=True)):
        raise InputError(
            f"units in sections that end at {list(bounds[1:])} cannot be cut to {list(kept[1:])}: give fewer of each"
        )
    if scores is None:
        scores = -torch.arange(bounds[-1], dtype=torch.float64)
    if len(scores) != bounds[-1]:
        raise InputError(f"there are scores of {len(scores)} units, but {bounds[-1]} units: give the scores of this layer")
    found = []
    for (a, b), (c, d) in zip(pairwise(bounds), pairwise(kept), strict=True):
        order = scores[a:b].argsort(descending=True, stable=True)
        found.append(order[: d - c].sort().values.cpu() + a)
    return torch.cat(found)


def take(state: Mapping[str, Tensor], layer: Layer, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a layer's state dict with only the units `kept` of each role that is named, in the order given there.

    Where a head keeps fewer dimensions of its queries, they are scaled by as much as its attention is then divided by less.
    """
    return {name: _taken(tensor, axes(layer)[name], kept) for name, tensor in state.items()}


def _taken(tensor: Tensor, along: Axes, kept: Mapping[str, Tensor]) -> Tensor:
    for axis, runs in enumerate(along):
        if not any(run.role in kept for run in runs):
            continue
        positions, factors, begin = [], [], 0
        for run in runs:
            units = kept.get(run.role, torch.arange(run.start, run.start + run.size))
            here = units[(units >= run.start) & (units < run.start + run.size)] - run.start + begin
            positions.append(here)
            factors.append(torch.full((len(here),), (len(here) / run.size) ** 0.5 if run.query else 1.0))
            begin += run.size
        tensor = tensor.index_select(axis, torch.cat(positions).to(tensor.device))
        if any(run.query for run in runs):
            factor = torch.cat(factors).to(tensor)
            tensor = tensor * factor.view(-1, *[1] * (tensor.ndim - 1 - axis))
    return tensor


def cut(
    state: Mapping[str, Tensor],
    source: Layer,
    target: Layer,
    scores: Mapping[str, Tensor],
    kept: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the state dict of a narrower layer, with the best units of a trained wider one.

    What may be less is what has units: the widths, an FFN's expansion, a head's key dimension, and what is tied to them. Equal
    specs give the state dict as it is.

    Args:
        state: of the wider layer.
        source: the wider layer.
        target: the narrower one: the same kind of block, at the same resolution.
        scores: for each role, the importance of its units; roles left out keep their first units.
        kept: units of some roles that are settled already, such as a stage's channels; they come before the scores.

    Raises:
        InputError: the target is another kind of layer or has more of anything.
    """
    if type(source.spec) is not type(target.spec) or source.resolution != target.resolution:
        raise InputError(f"{target} cannot be cut out of {source}: give the same kind of layer, at the same resolution")
    ours, theirs = sections(source), sections(target)
    if ours and ours.keys() != theirs.keys():
        raise InputError(f"{target} cannot be cut out of {source}: give a layer with as many heads")
    chosen = dict(kept or {})
    try:
        for role, bounds in ours.items():
            if role not in chosen and bounds != theirs[role]:
                chosen[role] = best(scores.get(role), bounds, theirs[role])
    except InputError as error:
        raise InputError(f"{target} cannot be cut out of {source}: {error}") from error
    found = take(state, source, chosen)
    for name, shape in _layer_shapes(target).items():
        found[name] = found[name][tuple(slice(n) for n in shape)]  # axes of which nothing is known
        if tuple(found[name].shape) != shape:
            raise InputError(
                f"{target} cannot be cut out of {source}: its {name} has the shape {shape}, "
                f"not {tuple(found[name].shape)}: give a layer that differs in widths, expansion or key dimension alone"
            )
    return found


@cache
def _layer_shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
    return _shapes(_on_meta(layer))


@dataclass(frozen=True)
class UnitScores:
    """How important each unit of a network, or of a supernet's candidates at their largest widths, is.

    `stages`: for each stage, of each channel. `inside`: for each layer (`key`), for each role of its own, of each unit.
    """

    stages: tuple[Tensor, ...]
    inside: Mapping[str, Mapping[str, Tensor]]

    def of(self, name: str, spec: Spec) -> dict[str, Tensor]:
        """Return the scores of a layer's roles by the layer's name in its network (`ArchConfig.named_layers`), for `cut`."""
        at = stage_of(name, len(self.stages))
        found = {"dim": self.stages[at], **self.inside.get(key(name, spec), {})}
        return {**found, "dim_in": self.stages[at - 1]} if is_embedding(spec) else found


def key(name: str, spec: Spec) -> str:
    """Return what a layer is called in UnitScores: a slot's candidates share a name."""
    return f"{name} {label(spec)}"


def stage_of(name: str, stages: int) -> int:
    """Return the stage, counted from 0, whose channels the layer of this name leaves, or the head reads."""
    stage = place_of(name).stage
    return stages - 1 if stage is None else stage


def kept_channels(scores: Tensor | None, choices: Iterable[Block], resolution: int, width: int, narrower: int) -> Tensor:
    """Return which channels a stage of `width` keeps at the width `narrower`, in ascending order.

    One pattern for a stage and a width, whatever its blocks: every division into heads that one of `choices`, the blocks that
    may stand in the stage, makes of the channels is kept. Where 2 and 4 heads occur, each quarter keeps its own share, and so
    does each half.
    """
    blocks = [block for block in choices if not isinstance(block, Identity)]
    at = [[sections(Layer(at_width(b, w), resolution)).get("dim", (0, w)) for b in blocks] for w in (width, narrower)]
    bounds, kept = (sorted({0, w}.union(*found)) for w, found in zip((width, narrower), at, strict=True))
    return best(scores, bounds, kept)


def narrowed(
    state: Mapping[str, Tensor],
    source: ArchConfig,
    target: ArchConfig,
    scores: UnitScores | None = None,
    choices: Sequence[Sequence[Block]] | None = None,
    begin: int = 0,
) -> dict[str, Tensor]:
    """Return the state dict of `build_model(target)`, with the best units of a trained wider network.

    Args:
        state: of `build_model(source)`.
        source: the wider network.
        target: the narrower one: the same image size and stages, with narrower widths, FFNs and keys, and perhaps without some
            of the blocks. Its empty slots are kept, as they say which of the source's blocks are meant.
        scores: of the source; None: the first units are kept.
        choices: for each stage, the blocks whose division into heads its channels keep; None: those of the source.
        begin: how many of the first layers of the target are left out.

    Raises:
        InputError: the target has a layer that the source has not, or more of anything.
    """
    wide = dict(source.named_layers())
    by_layer: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        layer_name, _, own = name.partition(".")
        by_layer.setdefault(layer_name, {})[own] = tensor
    kept = []
    for at, (stage, narrower) in enumerate(zip(source.stages, target.stages, strict=True)):
        of, blocks = scores.stages[at] if scores else None, choices[at] if choices else stage.blocks
        with placed(f"stage {at + 1} of {target.name}"):
            kept.append(kept_channels(of, blocks, source.resolutions[at], stage.width, narrower.width))
    found: dict[str, Tensor] = {}
    for name, layer in target.named_layers()[begin:]:
        if not _layer_shapes(layer):
            continue
        if name not in wide:
            raise InputError(f"{target.name} has a layer {name} that {source.name} has not: give a network cut out of it")
        at = stage_of(name, len(kept))
        settled = {"dim": kept[at]} | ({"dim_in": kept[at - 1]} if is_embedding(layer.spec) else {})
        inside = scores.of(name, wide[name].spec) if scores else {}
        cut_out = cut(by_layer[name], wide[name], layer, inside, settled)
        found |= {f"{name}.{own}": tensor for own, tensor in cut_out.items()}
    return found


def at_widths(arch: ArchConfig, widths: Sequence[int]) -> ArchConfig:
    """Return the same network at other widths.

    Raises:
        InputError: a block cannot have its width.
    """
    stages: list[Stage] = []
    for stage, width in zip(arch.stages, widths, strict=True):
        stages.append(replace(stage, width=width, blocks=tuple(at_width(block, width) for block in stage.blocks)))
    return replace(arch, stages=tuple(stages))
