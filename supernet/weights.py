"""Weights into our networks: published ones, and those that a sub-network inherits from its supernet."""

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from math import isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernet.arch import ArchConfig, place_of
from supernet.authors import in_timm_names
from supernet.blocks import build_layer
from supernet.blocks.efficientformer_v2 import AttnFFNModule, FFNModule
from supernet.blocks.efficientvit import ConvStemModule
from supernet.blocks.layers import EmbeddingModule, StemModule
from supernet.blocks.vit import PatchStemModule
from supernet.elastic import ElasticSupernet
from supernet.errors import InputError
from supernet.metapath import Supernet
from supernet.units import UnitScores, at_widths, narrowed

AnySupernet = Supernet | ElasticSupernet
"""What sub-networks inherit their weights from."""

_CLASSIFIER = "head.fc."  # in our state dicts


class _Family(NamedTuple):
    """A family's name, and timm's names of what is not inside a stage."""

    name: str
    stem: str = "stem."
    stages: bool = True  # blocks are numbered within stages
    head_norm: str = "norm."
    classifiers: tuple[str, ...] = ("head.",)
    optional: tuple[str, ...] = ()  # classifiers that a network without distillation lacks
    norms_inside: bool = False  # timm has a convolution and its norm in one module

    @property
    def remedy(self) -> str:
        return f"give timm.create_model(name).state_dict() of the same {self.name} (timm 1.0.31), or its authors'"


_V1 = _Family("EfficientFormer", classifiers=("head.", "head_dist."), optional=("head_dist.",))
_V2 = _Family("EfficientFormerV2", classifiers=("head.", "head_dist."), optional=("head_dist.",), norms_inside=True)
_EFFICIENTVIT = _Family("EfficientViT of MSRA", "patch_embed.", head_norm="head.bn.", classifiers=("head.linear.",))
_VIT = _Family("ViT or DeiT", stem="", stages=False)


def _family(model: nn.Module) -> _Family:
    if any(isinstance(module, FFNModule | AttnFFNModule) for module in model.children()):
        return _V2
    return {ConvStemModule: _EFFICIENTVIT, PatchStemModule: _VIT}.get(type(getattr(model, "stem", None)), _V1)


def load_timm_weights(model: nn.Module, timm_state_dict: Mapping[str, Tensor]) -> None:
    """Load a timm 1.0.31 state dict (EfficientFormer, EfficientFormerV2, EfficientViT of MSRA, DeiT, ViT), or one of the code
    that the first three's authors published, into a network of `build_model`, whatever its image size.

    timm averages the logits of EfficientFormer's two classifiers; here their weights are averaged, which comes to the
    same. One that was made without distillation has one.
    Attention biases and position embeddings for a map of another size are resized. With another number of classes than the
    state dict's, the network's classifier (the last linear layer) keeps the fresh weights that it has. timm's
    `attention_bias_idxs` buffers are ignored, as they follow from the map's size. Values are cast to the network's own dtype
    and device.

    Raises:
        InputError: the model is not one of `build_model`; or the state dict lacks a tensor, or has one too many or one
            of another shape. The model is then as it was.
    """
    if not isinstance(timm_state_dict, Mapping):
        raise InputError(
            f"timm weights are a state dict, names to tensors, but this is {type(timm_state_dict).__name__}: give "
            "model.state_dict() of timm's network, or what torch.load(FILE, weights_only=True) returns"
        )
    given = {n: tensor for n, tensor in in_timm_names(timm_state_dict).items() if not str(n).endswith(".attention_bias_idxs")}
    own, family = model.state_dict(), _family(model)
    absent = {c for c in family.optional if not any(str(name).startswith(c) for name in given)}
    family = family._replace(classifiers=tuple(c for c in family.classifiers if c not in absent))
    sources = dict(_sources(model, family))
    _check_names(given, {name for names in sources.values() for name in names}, family)
    classes = given[f"{family.classifiers[0]}bias"].numel()
    misfits = []
    for key, names in sources.items():
        for name in names:
            allowed = _allowed(key, given[name], own[key], classes)
            if given[name].shape != allowed:
                misfits.append(f"{name} of shape {tuple(given[name].shape)}, not {tuple(allowed)}")
    if misfits:
        raise InputError(f"the state dict does not fit the network: it has {_first(misfits)}: {family.remedy}")
    model.load_state_dict({key: _converted(key, [given[n] for n in names], own[key]) for key, names in sources.items()})


def resize_attention_biases(table: Tensor, side: int) -> Tensor:
    """Return the bias table for a map of `side` x `side` positions: (heads, R * R) to (heads, side * side).

    The table is a grid over the absolute offsets (|dy|, |dx|). It is resized bilinearly with its corners aligned, so
    that offset 0 keeps its bias and the largest offset has the largest one's. Where R = side, the table is returned.

    Raises:
        InputError: the table is not (heads, R * R).
    """
    if not _is_bias_table(table):
        raise InputError(f"attention biases must have shape (heads, R * R) for an R x R map, but have {tuple(table.shape)}")
    old = isqrt(table.shape[1])
    if old == side:
        return table
    grid = table.reshape(1, -1, old, old)  # (1, heads, R, R)
    return F.interpolate(grid, (side, side), mode="bilinear", align_corners=True)[0].flatten(1)


def resize_position_embedding(embedding: Tensor, tokens: int) -> Tensor:
    """Return the position embedding for `tokens` tokens, 1 + S * S: (1, 1 + R * R, dim) to (1, 1 + S * S, dim).

    The class token's position, the first, is kept. The others are a grid, which is resized bicubically with antialiasing, as
    timm does it. Where R = S, the embedding is returned.

    Raises:
        InputError: the embedding is not (1, 1 + R * R, dim).
    """
    if not _is_position_embedding(embedding):
        raise InputError(f"a position embedding must have shape (1, 1 + R * R, dim), but has {tuple(embedding.shape)}")
    if embedding.shape[1] == tokens:
        return embedding
    old, new = isqrt(embedding.shape[1] - 1), isqrt(tokens - 1)
    grid = embedding[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, dim, R, R)
    resized = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    return torch.cat((embedding[:, :1], resized.flatten(2).transpose(1, 2)), 1)


def _is_position_embedding(tensor: Tensor) -> bool:
    return tensor.ndim == 3 and tensor.shape[1] > 1 and isqrt(tensor.shape[1] - 1) ** 2 == tensor.shape[1] - 1


def _is_bias_table(table: Tensor) -> bool:
    return table.ndim == 2 and table.shape[1] > 0 and isqrt(table.shape[1]) ** 2 == table.shape[1]


def _sources(model: nn.Module, family: _Family) -> Iterator[tuple[str, list[str]]]:
    """Yield every key of our state dict with its names in timm's: one, or one for each of several classifiers."""
    blocks: dict[int, int] = {}  # how many of timm's blocks stand before this one in each stage
    for layer, module in model.named_children():
        stage, part, _ = place_of(layer)
        if part == "join" or (stage is None and part != "head"):
            raise _not_ours(model, f"has a module {layer!r}")
        prefix = family.stem
        if stage is not None and part != "stem":
            prefix = f"stages.{stage}." if family.stages else ""
            if part == "embedding":
                prefix += "downsample."
            else:
                # Flat has no weights but an index, in timm as in the authors' code.
                prefix += f"blocks.{blocks.setdefault(stage, 0)}."
                blocks[stage] += 1
        for key in module.state_dict():
            own = f"{layer}.{key}"
            if own.startswith(_CLASSIFIER):
                yield own, [classifier + own.removeprefix(_CLASSIFIER) for classifier in family.classifiers]
            elif layer == "head":
                yield own, [family.head_norm + key.removeprefix("norm.")]
            else:
                yield own, [prefix + (_v2_name(module, key) if family.norms_inside else key)]
    if not blocks:
        raise _not_ours(model, "has no stages")


def _v2_name(module: nn.Module, key: str) -> str:
    """A tensor's name inside timm's module of EfficientFormerV2: there a convolution and its norm stand in one module."""
    match module:
        case StemModule():  # conv1.weight, norm1.weight to conv1.conv.weight, conv1.bn.weight
            return re.sub(r"^norm(\d)", r"conv\1.bn", re.sub(r"^conv(\d)", r"conv\1.conv", key))
        case EmbeddingModule():
            return re.sub(r"^norm", "conv.bn", re.sub(r"^conv", "conv.conv", key))
    return key


def _not_ours(model: nn.Module, why: str) -> InputError:
    return InputError(f"timm weights go into a network of build_model(arch), but this {type(model).__name__} {why}")


def _check_names(given: Mapping[str, object], expected: set[str], family: _Family) -> None:
    """Refuse a state dict that has not exactly the expected names, or holds something else than tensors."""
    no_tensors = [f"{name} ({type(value).__name__})" for name, value in given.items() if not isinstance(value, Tensor)]
    missing, unexpected = sorted(expected - given.keys()), sorted(given.keys() - expected)
    if no_tensors or len(missing) == len(expected):
        found = _first(no_tensors or unexpected)
        raise InputError(f"this is not the state dict of a timm {family.name}: it has {found}: {family.remedy}")
    faults = [f"lacks {_first(missing)}"] if missing else []
    faults += [f"has an unexpected {_first(unexpected)}"] if unexpected else []
    if faults:
        raise InputError(f"the state dict does not fit the network: it {' and '.join(faults)}: {family.remedy}")


def _allowed(key: str, tensor: Tensor, own: Tensor, classes: int) -> tuple[int, ...]:
    """The shape that a timm tensor must have to become `own`, our tensor of the name `key`."""
    if key.startswith(_CLASSIFIER):
        return (classes, *own.shape[1:])
    if key.endswith(".attention_biases") and _is_bias_table(tensor):
        return (own.shape[0], tensor.shape[1])
    if key.endswith(".pos_embed") and _is_position_embedding(tensor):
        return (1, tensor.shape[1], own.shape[2])
    return tuple(own.shape)


def _converted(key: str, tensors: list[Tensor], own: Tensor) -> Tensor:
    tensors = [tensor.to(own) for tensor in tensors]
    if key.startswith(_CLASSIFIER):  # possibly for another number of classes
        return torch.stack(tensors).mean(0) if tensors[0].shape == own.shape else own
    return at_size(key, tensors[0], own)


def _first(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else "nothing"


def at_size(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor of a network as it is in the same network at another image size, where it has the shape of `like`: a
    table of attention biases or a position embedding is resized, anything else is returned as it is."""
    if tensor.shape == like.shape:
        return tensor
    if name.endswith("attention_biases"):
        return resize_attention_biases(tensor, isqrt(like.shape[1]))
    if name.endswith("pos_embed"):
        return resize_position_embedding(tensor, like.shape[1])
    return tensor


def subnetwork(supernet: AnySupernet, arch: ArchConfig, kept: UnitScores | None = None, begin: int = 0) -> nn.Sequential:
    """Return the network `arch`, a member of the supernet's space, with weights inherited from the supernet; without its first
    `begin` layers.

    A narrowed stage, and what is inside its blocks, keeps the units that score highest in `kept`, or without it the first of
    each head, the same channels whatever blocks it has (`supernet.units.kept_channels`). Without it, every tensor of an elastic
    supernet is its leading slice, as it was trained. Batch-norm statistics are sliced too and do not fit a narrowed network
    until they are recomputed. `arch` has the supernet's image size. The network has the supernet's device and dtype.
    """
    space = supernet.space
    if arch.image_size != space.image_size:
        raise ValueError(f"{arch.name} is for {arch.image_size} px, the supernet for {space.image_size} px: use arch.at")
    member = space.fit(arch.without_mux())
    named = member.named_layers()[begin:]
    weight = next(supernet.parameters())
    with weight.device:  # where its weights are: nothing goes over the host
        model = nn.Sequential(OrderedDict((name, build_layer(layer)) for name, layer in named)).to(weight.dtype)
    if kept is None and isinstance(supernet, ElasticSupernet):
        for (name, layer), module in zip(named, model.children(), strict=True):
            module.load_state_dict(_leading(supernet.source(name, layer).state_dict(), module.state_dict()))
        return model
    wide = at_widths(member, [stage.widths[-1] for stage in space.stages])
    state = {
        f"{name}.{own}": tensor
        for name, layer in wide.named_layers()
        for own, tensor in supernet.source(name, layer).state_dict().items()
    }
    candidates = [stage.candidates for stage in space.stages]
    model.load_state_dict(narrowed(state, wide, member, kept, candidates, begin))
    return model


def fill(supernet: Supernet, model: nn.Module, arch: ArchConfig) -> None:
    """Copy the weights of `model`, the network `arch` with the supernet's largest widths, into the supernet's layers and into
    the candidates of its path, so that this path gives the network's logits. `arch` has the supernet's image size and classes,
    and no empty slot."""
    for (name, layer), module in zip(arch.named_layers(), model.children(), strict=True):
        supernet.source(name, layer).load_state_dict(module.state_dict())


def _leading(source: Mapping[str, Tensor], shaped: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: source[name][tuple(slice(n) for n in like.shape)] for name, like in shaped.items()}
