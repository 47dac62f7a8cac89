"""What is to be measured so that a space's layers have rows and its networks a calibration.

Every row is a linear combination of the times of models (see `measure`):

- a block: the least-squares slope over chains of 1, 2 and 4 of it with distinct weights. What a session pays once (the
  call, a change of layout at its ends) has no part in a slope. Where four of it have more weights than a typical network,
  which would push each other out of the caches as in no network, the chains are shorter;
- stem, embedding, flat, unflat, join, head: a model in which blocks stand on the sides that they have in a network, minus
  half of a chain of two of each of these blocks: one block, its end of the session, and half of the call. These blocks are as
  cheap as their kind can be, because their own time only adds noise.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median

import torch

from nas.measure import ALONE_MAX_VISITS, ALONE_MIN_VISITS, CACHED, EMPTY, SESSION_VISITS, STREAMING, Model, name_of
from nas.profilers.bench import Plan
from nas.progress import say
from nas.table import measured_layers
from supernet.arch import ArchConfig
from supernet.blocks import build_layer
from supernet.errors import InputError, unknown
from supernet.model import count_layer
from supernet.ports import Port
from supernet.space import SearchSpace
from supernet.specs import MB3D, MB4D, Layer, ViT, in_group, is_block
from supernet.zoo import load_arch

Terms = dict[Model, float]

CHAINS = ((1, 2, 4), (1, 3), (1, 2))
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # of a weight
PROTOCOL = "equal memory beside chains, weighted mix"  # how rows are measured: those of another way are no part of a sum
FIT_NETWORKS = 16  # fit the calibration
CHECK_NETWORKS = 12  # tell its error
FEWEST_NETWORKS = 12  # of a space: both parts shrink with it
MANY_SESSIONS = tuple(range(SESSION_VISITS, ALONE_MAX_VISITS + 1, SESSION_VISITS))
"""The passes where a model is opened quickly: sessions differ by more than visits of one session."""


def _combine(*parts: tuple[float, Terms]) -> Terms:
    total: Terms = {}
    for factor, terms in parts:
        for model, weight in terms.items():
            total[model] = total.get(model, 0.0) + factor * weight
    return total


def slope(block: Layer, params: float = math.inf) -> Terms:
    """Milliseconds of one more block in a chain; `params`: parameters that a chain of more than two may have."""
    chains = next((c for c in CHAINS if params == math.inf or c[-1] * _params(block) <= params), CHAINS[-1])
    centre = sum(chains) / len(chains)
    spread = sum((k - centre) ** 2 for k in chains)
    return {(block,) * k: (k - centre) / spread for k in chains}


def _cheap(port: Port) -> Layer | None:
    """Return the cheapest block that stands on one side of a layer, None beside an image or logits."""
    form, dim, side, group = port
    match form:
        case "map":
            return Layer(MB4D(dim, mlp_ratio=1), side)
        case "tokens":
            return Layer(_cheap_mb3d(dim), side)
        case "class_tokens":
            return Layer(ViT(dim, num_heads=1, mlp_ratio=1), side)
        case "groups":
            assert group is not None
            token_block = ViT(dim, num_heads=1, mlp_ratio=1) if group.class_token else _cheap_mb3d(dim)
            return Layer(in_group(token_block, group), side)
    return None


def _cheap_mb3d(dim: int) -> MB3D:
    return MB3D(dim, mlp_ratio=1, num_heads=1, key_dim=8, attn_ratio=1)


def terms_of(layer: Layer, params: float = math.inf) -> Terms:
    """Return the models whose times make a layer's row, each with its weight in it; `params`: as in `slope`."""
    if is_block(layer.spec):
        return slope(layer, params)
    before, after = ([block] if (block := _cheap(port)) else [] for port in (layer.entering, layer.leaving))
    context = [(block, block) for block in before + after]
    ends = [(-0.5, {model: 1.0}) for model in (*context, *[EMPTY] * (2 - len(context)))]
    return _combine((1.0, {(*before, layer, *after): 1.0}), *ends)


@dataclass(frozen=True)
class Work:
    """The layers that are to have rows, the terms of each one's row, and the whole networks; `plan` says it in names.
    `typical_params`: parameters of a typical network of the space, where rows are to be measured."""

    rows: dict[Layer, Terms]
    networks: list[ArchConfig]
    smallest: ArchConfig
    plan: Plan
    typical_params: int = 0

    @property
    def models(self) -> dict[str, Model]:
        """Every model by its name, the references too."""
        pieces = (model for terms in self.rows.values() for model in terms)
        found = {name_of(model): model for model in (CACHED, STREAMING, EMPTY, *pieces)}
        whole = [tuple(arch.layers()) for arch in (self.smallest, *self.networks)]
        return found | {name_of(model): model for model in whole}


def for_batch(space: SearchSpace, batch: int) -> SearchSpace:
    """Return the space with those ways of grouping images of which a call of `batch` images has whole groups."""
    kept = tuple(mux for mux in space.mux if batch % mux.n == 0)
    if kept != space.mux:
        left_out = ", ".join(str(mux.n) for mux in space.mux if mux not in kept)
        say(f"a call has {batch} image{'s' if batch > 1 else ''}: groups of {left_out} (mux of {space.name}) are left out")
    return replace(space, mux=kept)


def work_for(space: SearchSpace, layers: Sequence[Layer] | None = None, seed: int = 0, precision: str = "fp32") -> Work:
    """Return what is to be measured for a space; `layers`: only for the rows of these. `precision`: of the weights.

    Raises:
        InputError: the space has too few networks to calibrate a table on, or there is no such precision.
    """
    if precision not in BYTES:
        raise unknown("precision", precision, BYTES)
    if networks_of(space) < FEWEST_NETWORKS:
        raise InputError(
            f"space {space.name} has {networks_of(space)} networks, too few to calibrate a table on (at least "
            f"{FEWEST_NETWORKS}): give the space that the network comes from"
        )
    params = typical_params(space)
    rows = {layer: terms_of(layer, params) for layer in (measured_layers(space.layers()) if layers is None else layers)}
    pieces = sorted(dict.fromkeys(model for terms in rows.values() for model in terms), key=lambda m: len(set(m)) > 1)
    pieces = [EMPTY, *(model for model in pieces if model != EMPTY)]
    networks = stratified(space, FIT_NETWORKS + CHECK_NETWORKS, random.Random(seed))
    plan = Plan(
        pieces=tuple(map(name_of, pieces)),
        networks=tuple(name_of(tuple(arch.layers())) for arch in networks),
        rows=tuple({name_of(model): weight for model, weight in terms.items()} for terms in rows.values()),
        smallest=name_of(tuple(space.smallest.layers())),
        touched_bytes={name_of(model): BYTES[precision] * left for model, left in _left_of(params, pieces).items()},
    )
    return Work(rows, networks, space.smallest, plan, params)


def in_many_sessions(work: Work) -> Work:
    """Return the work with every model opened anew every few visits, as a network is that is timed by itself."""
    plan = replace(work.plan, min_visits=ALONE_MIN_VISITS, passes=MANY_SESSIONS, session_visits=SESSION_VISITS)
    return replace(work, plan=plan)


def _left_of(params: int, models: Sequence[Model]) -> dict[Model, int]:
    """Return how many of a typical network's `params` each model leaves to other layers.

    Chains of one block all leave what the longest of them leaves: what a cold call costs once falls with how much other memory
    was touched before it, and would not drop out of a slope over chains that differ in that.
    """
    longest: dict[Layer, int] = {}
    for model in models:
        if len(set(model)) == 1:
            longest[model[0]] = max(longest.get(model[0], 0), len(model))

    def of(model: Model) -> int:
        return longest[model[0]] * _params(model[0]) if len(set(model)) == 1 else sum(map(_params, model))

    return {model: max(0, params - of(model)) for model in models}


def requested_space(space: str | None, arch: str | None) -> SearchSpace:
    """Return the space whose rows a command asks for: by name or file, or the one around a network."""
    if arch is not None:
        return SearchSpace.around(load_arch(arch))
    return SearchSpace.load(space or "efficientformer-tiny")


def typical_params(space: SearchSpace) -> int:
    """Return how many parameters a typical network of the space has: what passes through the caches between two runs of one of
    its layers. The median of 25 random networks."""
    rng = random.Random(0)
    return int(median(sum(map(_params, space.sample(rng).layers())) for _ in range(25)))


@cache
def _params(layer: Layer) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_layer(layer).parameters())


def networks_of(space: SearchSpace) -> int:
    """Return how many networks of different layers the space has: inside a stage only the number of each kind counts."""
    return math.prod(len(s.widths) * math.comb(s.depth + len(s.kinds) - 1, s.depth) for s in space.stages)


def stratified(space: SearchSpace, number: int, rng: random.Random) -> list[ArchConfig]:
    """Return `number` networks of the space: the smallest, the largest, and random ones, from bins of
    MACs, as far as the space has networks there.

    A space with fewer networks gives all of them.
    """
    ends = [replace(arch.without_identity(), name=space.name) for arch in (space.smallest, space.largest)]
    pool = {arch: _macs(arch) for arch in (random_network(space, rng).without_identity() for _ in range(40 * number))}
    if len({*pool, *ends}) <= number:
        return list({**dict.fromkeys(ends), **pool})
    for arch in ends:
        pool.pop(arch, None)
    number -= len(ends)
    chosen: dict[ArchConfig, None] = {}
    # Half of them from bins of equal width, half from bins of equal ratio: small networks are as many as large ones.
    for scale, count in ((float, number - number // 2), (math.log, number // 2)):
        left = {arch: scale(macs) for arch, macs in pool.items() if arch not in chosen}
        low, width = min(left.values()), (max(left.values()) - min(left.values())) / count or 1.0
        bins: dict[int, list[ArchConfig]] = {}
        for arch, size in left.items():
            bins.setdefault(min(count - 1, int((size - low) / width)), []).append(arch)
        chosen |= dict.fromkeys(rng.choice(members) for members in bins.values())
    rest = [arch for arch in pool if arch not in chosen]
    return [*ends, *chosen, *rng.sample(rest, number - len(chosen))]


def random_network(space: SearchSpace, rng: random.Random) -> ArchConfig:
    """Return a random network of the space, of any depth: slots drawn alike would rarely leave a network shallow or full."""
    widths, _ = space.draw(rng)
    emptied, kinds = rng.random(), []
    for stage in space.stages:
        filled = [kind for kind in stage.kinds if kind != "identity"]
        kinds.append(["identity" if rng.random() < emptied else rng.choice(filled) for _ in range(stage.depth)])
    arch = space.arch(widths, kinds)
    ways = list(dict.fromkeys(space.multiplexed(arch, mux) for mux in (None, *space.mux)))
    return rng.choice(ways) if space.mux else arch


def _macs(arch: ArchConfig) -> int:
    return sum(_layer_macs(layer) for layer in arch.layers())


@cache
def _layer_macs(layer: Layer) -> int:
    images = max(port.group.n if port.group else 1 for port in (layer.entering, layer.leaving))
    return count_layer(layer, images).macs // images
