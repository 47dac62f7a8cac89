"""The elastic supernet: every network of a space, at every width, with shared weights.

Source: Universally Slimmable Networks (Yu & Huang, ICCV 2019), section 3; EfficientFormerV2 (Li et al., ICCV 2023) has widths,
expansions and depth together. A network runs on the leading slice of every tensor: a narrower block is a part of a wider one.
Unlike EfficientFormerV2's, a batch norm has one scale and offset for all widths. The network is an argument and never state.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from supernet.arch import ArchConfig, layer_name
from supernet.blocks import build_layer
from supernet.errors import InputError
from supernet.recompute import recomputed
from supernet.space import SearchSpace, StageSpace
from supernet.specs import EXPANSIONS, Block, Flat, Identity, Layer, Unflat, is_block


class _Structure(NamedTuple):
    """A layer's module, to be run with tensors of these shapes that it is given: it has no weights of its own."""

    module: nn.Module
    shapes: dict[str, torch.Size]


class ElasticSupernet(nn.Module):
    """All networks of a space, each the leading slices of one set of weights.

    Candidates of a slot that differ only in expansion and activation share one module, the largest of them (see `sharing`);
    others have modules of their own, and every slot has its own. Batch-norm statistics are shared in the same way: while
    training each network uses its batch's, and they fit no single network until they are recomputed for it.

    Raises:
        InputError: a user's own block is no leading slice of the largest one that it would share weights with.
    """

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space
        self.checkpoint_activations = False
        """Whether blocks are computed again in the backward pass, to save memory. It changes no number."""
        self.layers = nn.ModuleDict()  # under the names of a built network's modules; for each slot, a list of them
        for name, layer in space.largest.named_layers():
            if not is_block(layer.spec) and not isinstance(layer.spec, Flat | Unflat):
                self.layers[name] = build_layer(layer)
        self._keys: dict[str, list[Hashable]] = {}  # for each slot, which blocks the modules of its list are for
        for stage, slot in space.slots:
            groups, name = sharing(space.stages[stage]), layer_name(stage, "block", slot)
            largest = (Layer(_largest(group), space.resolutions[stage]) for group in groups)
            self.layers[name] = nn.ModuleList(build_layer(layer) for layer in largest)
            self._keys[name] = [_key(group[0]) for group in groups]
        self._convert: Callable[[nn.Module], nn.Module] | None = None  # no lambda: processes send each other what is trained
        self._structures: dict[Layer, _Structure] = {}  # what forward has built so far; not part of the state
        for stage, (choices, resolution) in enumerate(zip(space.stages, space.resolutions, strict=True)):
            for block in (block for group in sharing(choices) for block in group):
                self._tensors(layer_name(stage, "block", 0), Layer(block, resolution))  # refuses what cannot share

    def forward(self, x: Tensor, arch: ArchConfig) -> Tensor:
        """Return logits (N, num_classes) of images (N, 3, S, S) by the network `arch`, a member of the space for images of S
        pixels; each image has a pass of its own.

        In eval mode it equals the built sub-network (`supernet.weights.subnetwork`).

        Raises:
            InputError: `arch` is not in the space.
        """
        if arch.image_size != self.space.image_size:
            raise ValueError(
                f"{arch.name} is for {arch.image_size} px, the supernet for {self.space.image_size} px: use arch.at"
            )
        for name, layer in self.space.fit(arch.without_mux()).named_layers():
            x = self._run(name, layer, x)
        return x

    def convert_layers(self, convert: Callable[[nn.Module], nn.Module]) -> None:
        """Let every layer run as what `convert` makes of its module, such as one whose batch norm is over several processes. It
        must keep the names of parameters and buffers."""
        self._convert = convert
        self._structures.clear()

    def source(self, name: str, layer: Layer) -> nn.Module:
        """Return the module whose leading slices are the weights of a network's layer of this name."""
        if isinstance(layer.spec, Flat | Unflat):
            return nn.Identity()
        module = self.layers[name]
        if not isinstance(module, nn.ModuleList):
            return module
        return module[self._keys[name].index(_key(layer.spec))]

    def _run(self, name: str, layer: Layer, x: Tensor) -> Tensor:
        module = self._structure(layer).module
        if module.training != self.training:
            module.train(self.training)
        tensors = self._tensors(name, layer)
        if self.checkpoint_activations and is_block(layer.spec) and torch.is_grad_enabled():
            return recomputed(module, tensors, x)
        y: Tensor = functional_call(module, tensors, (x,), tie_weights=False)
        return y

    def _tensors(self, name: str, layer: Layer) -> dict[str, Tensor]:
        """Return the parameters and buffers that a network's layer of this name runs with."""
        whole = self.source(name, layer).state_dict(keep_vars=True)
        return {key: leading(whole, key, shape, layer) for key, shape in self._structure(layer).shapes.items()}

    def _structure(self, layer: Layer) -> _Structure:
        if layer not in self._structures:
            like = next(self.parameters())
            with torch.random.fork_rng(devices=[]):  # what it would begin with is not used
                module = build_layer(layer).to(like.device, like.dtype)
                module = module if self._convert is None else self._convert(module)
            for part in module.modules():
                for name, parameter in part.named_parameters(recurse=False):
                    setattr(part, name, nn.Parameter(parameter.detach().to("meta")))
            self._structures[layer] = _Structure(module, {key: tensor.shape for key, tensor in module.state_dict().items()})
        return self._structures[layer]

    def _apply(self, *args: Any, **kwargs: Any) -> "ElasticSupernet":
        """Move or cast the weights; what was built for their old place is built anew when it is next used."""
        self._structures.clear()
        super()._apply(*args, **kwargs)
        return self


def sharing(stage: StageSpace) -> list[list[Block]]:
    """Return a stage's candidates but identity in groups that share their weights: those of a group differ only in expansion
    and activation. They are in the order of the candidates."""
    groups: dict[Hashable, list[Block]] = {}
    for candidate in stage.candidates:
        if not isinstance(candidate, Identity):
            groups.setdefault(_key(candidate), []).append(candidate)
    return list(groups.values())


def widest(stage: StageSpace) -> list[str]:
    """Return what the stage calls the candidates that have the largest expansion of those they share their weights with."""
    return [
        stage.kind_of(block)
        for group in sharing(stage)
        for block in group
        if all(getattr(block, knob) == getattr(_largest(group), knob) for knob in _expansions(block))
    ]


def leading(whole: Mapping[str, Tensor], name: str, shape: torch.Size, layer: Layer) -> Tensor:
    """Return the first entries along every dimension of a tensor of a module; gradients of them reach it.

    Raises:
        InputError: the tensor is not there, or has too few of them.
    """
    tensor = whole.get(name)
    if tensor is None or tensor.ndim != len(shape) or any(n > have for n, have in zip(shape, tensor.shape, strict=True)):
        has = "is not there" if tensor is None else f"has shape {tuple(tensor.shape)}"
        raise InputError(
            f"{layer} cannot share weights: of its tensor {name} {tuple(shape)} the largest one of its slot {has}: call the "
            f"block's knob something else than {', '.join(EXPANSIONS)} or act"
        )
    for dimension, n in enumerate(shape):
        if n < tensor.shape[dimension]:
            tensor = tensor.narrow(dimension, 0, n)
    return tensor


def _expansions(block: Any) -> list[str]:
    return [field.name for field in fields(block) if field.name in EXPANSIONS]


def _key(block: Any) -> Hashable:
    """What blocks that share their weights have in common."""
    knobs = [field.name for field in fields(block) if field.name not in (*EXPANSIONS, "act", "dim")]
    return type(block), *(getattr(block, knob) for knob in knobs)


def _largest(group: list[Block]) -> Block:
    """Return the block that all of a group are leading slices of."""
    first: Any = group[0]
    return replace(first, **{knob: max(getattr(block, knob) for block in group) for knob in _expansions(first)})
