"""A network rewritten for inference: the same function of images, in fewer and cheaper operators.

Folded are: batch norm into the convolution or linear layer beside it, layer scale into the weights before it, the scale of
attention into the queries' weights, a shortcut around a depthwise convolution into its centre, two classifiers into their mean.
Attention biases are looked up once, and pass the heads that talk. What is cheapest depends on the shape and the device: see
`Form`.

The rewriting is computed in float64 and kept in the weights' own dtype. The network that is given stays as it is, and what
happens to its weights later does not reach what was made of it. Shapes: N images or groups, C channels, L positions.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from supernet import specs
from supernet.arch import ArchConfig
from supernet.blocks.concatplexer import Multiplexed
from supernet.blocks.efficientvit import ConvNorm
from supernet.deploy.efficientformer import PoolBlock, PoolTokens, TokenBlock
from supernet.deploy.efficientformer_v2 import DownsamplingAttention, Sum, TalkingAttention, unified_mlp
from supernet.deploy.efficientvit import PatchMerging, mixing_part, sandwich
from supernet.deploy.forms import FORMS, Form, default_form, has_forms, is_built_in
from supernet.deploy.heads import Head
from supernet.deploy.weights import Residual, copied, folded
from supernet.specs import Layer

__all__ = ["FORMS", "Form", "default_form", "deployed", "deployed_layer", "has_forms"]


def deployed(model: nn.Module, arch: ArchConfig, forms: Mapping[Layer, Form] | None = None) -> nn.Sequential:
    """Return the deploy form of a network of `build_model(arch)`, in eval mode: the same children under the same names, and in
    float64 the same logits to about 1e-9. `forms` are choices that stand in place of `default_form`.

    Raises:
        ValueError: the model's children are not the layers of the architecture.
    """
    layers = dict(arch.named_layers())
    children = dict(model.named_children())
    if list(layers) != list(children):
        raise ValueError(f"not a network of {arch.name}: its children are {', '.join(children)}")
    chosen = forms or {}
    made = OrderedDict((name, deployed_layer(children[name], layer, chosen.get(layer))) for name, layer in layers.items())
    return (Multiplexed(made) if arch.multiplexes else nn.Sequential(made)).eval()


def deployed_layer(module: nn.Module, layer: Layer, form: Form | None = None) -> nn.Module:
    """Return the deploy form of the module of one layer (`supernet.blocks.build_layer`), in eval mode. A user's own block is
    returned as a copy."""
    form = form or default_form(layer)
    with torch.no_grad():
        found = _made(module, layer, form)
    return found.eval().requires_grad_(False)


def _made(module: Any, layer: Layer, form: Form) -> nn.Module:
    if not is_built_in(layer.spec):
        return copied(module)
    match layer.spec:
        case specs.MB4D():
            return PoolBlock(module) if form == "conv" else PoolTokens(module, layer)
        case specs.MB3D() | specs.ViT():
            return TokenBlock(module, layer, form)
        case specs.FFN():
            return Residual(unified_mlp(module.mlp, module.ls2.gamma))
        case specs.AttnFFN():
            mixer = TalkingAttention(module.token_mixer, module.ls1.gamma, form)
            return nn.Sequential(Residual(mixer), Residual(unified_mlp(module.mlp, module.ls2.gamma)))
        case specs.AttnEmbedding():
            return Sum(DownsamplingAttention(module.attn), folded(module.conv))
        case specs.Sandwich():
            return sandwich(module, form, layer.resolution)
        case specs.Subsample():
            return nn.Sequential(mixing_part(*module.res1), PatchMerging(module.patchmerge), mixing_part(*module.res2))
        case specs.Stem():
            first, second = folded((module.conv1, module.norm1)), folded((module.conv2, module.norm2))
            return nn.Sequential(first, copied(module.act1), second, copied(module.act2))
        case specs.ConvStem():
            return nn.Sequential(*(folded(m) if isinstance(m, ConvNorm) else copied(m) for m in module))
        case specs.Embedding():
            return folded((module.conv, module.norm))
        case specs.Head() if not isinstance(layer.spec, specs.GroupHead):
            return Head(module)
    return copied(module)
