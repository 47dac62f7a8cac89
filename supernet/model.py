"""From an ArchConfig to a torch module, and what it counts."""

from collections import OrderedDict
from functools import cache
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from supernet.arch import ArchConfig, place_of
from supernet.blocks import build_layer
from supernet.blocks.concatplexer import Multiplexed
from supernet.blocks.layers import DropPath
from supernet.errors import InputError, first_line
from supernet.specs import Layer


class Complexity(NamedTuple):
    """Parameters, and multiply-accumulates of one image."""

    params: int
    macs: int


def build_model(arch: ArchConfig) -> nn.Sequential:
    """Return the network: (N, 3, S, S) float to (N, num_classes) logits, S = arch.image_size.

    Its modules are the architecture's layers, in their order and under their names (`stem`, `stage1_block1`, ...,
    `head`). Where it multiplexes (`arch.mux`), N may be any number: the last group is filled. Batch norm and layer scale have
    the published initial values; weights are random.
    """
    layers = OrderedDict((name, build_layer(layer)) for name, layer in arch.named_layers())
    return Multiplexed(layers) if arch.multiplexes else nn.Sequential(layers)


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Let a network of `build_model` be trained with stochastic depth: the chance that a block's residual branch is left out
    for an image grows linearly from 0 in the first block to `rate` in the last. It plays no part in eval mode."""
    blocks = [module for name, module in model.named_children() if place_of(name).part == "block"]
    for number, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(module, DropPath):
                module.rate = rate * number / max(1, len(blocks) - 1)


def count(arch: ArchConfig) -> Complexity:
    """Return the exact parameters and MACs of a network, without computing it. A network that multiplexes has the MACs of one
    image of a full group.

    MACs are those of convolutions, linear layers and the two products of attention, for one image; pooling, norms and
    activations are not counted.
    """
    images = arch.group_size
    layers = [count_layer(layer, images) for layer in arch.layers()]
    return Complexity(sum(params for params, _ in layers), sum(macs for _, macs in layers) // images)


@cache  # a search counts many networks of few layers
def count_layer(layer: Layer, images: int = 1) -> Complexity:
    """Return a layer's parameters, and its MACs for a number of images. They add up to those of the network."""
    try:
        with torch.device("meta"):
            module = build_layer(layer).eval()
            entering = torch.empty(layer.entering.shape(images))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(entering)
    except (RuntimeError, TypeError) as error:  # a user's block that looks at the values of its tensors
        raise InputError(
            f"the operations of {layer} cannot be counted, because tensors have no values there ({first_line(error)}): write "
            "its forward without values of tensors, such as .item()"
        ) from error
    return Complexity(sum(p.numel() for p in module.parameters()), counter.get_total_flops() // 2)
