"""The modules that realise the specs: one family a file, one literal table."""

from typing import Any

from torch import nn

from supernet import specs
from supernet.blocks import concatplexer, efficientformer, efficientformer_v2, efficientvit, layers, vit
from supernet.errors import InputError
from supernet.user_block import users_code

MODULES: dict[type[Any], Any] = {
    specs.MB4D: efficientformer.MB4DModule,
    specs.MB3D: efficientformer.MB3DModule,
    specs.FFN: efficientformer_v2.FFNModule,
    specs.AttnFFN: efficientformer_v2.AttnFFNModule,
    specs.Sandwich: efficientvit.SandwichModule,
    specs.ViT: vit.ViTModule,
    specs.Identity: layers.IdentityModule,
    specs.Stem: layers.StemModule,
    specs.ConvStem: efficientvit.ConvStemModule,
    specs.PatchStem: vit.PatchStemModule,
    specs.Embedding: layers.EmbeddingModule,
    specs.AttnEmbedding: efficientformer_v2.AttnEmbeddingModule,
    specs.Subsample: efficientvit.SubsampleModule,
    specs.Flat: layers.FlatModule,
    specs.Unflat: layers.UnflatModule,
    specs.Join: concatplexer.JoinModule,
    specs.GroupedMB3D: concatplexer.GroupedMB3DModule,
    specs.GroupedViT: concatplexer.GroupedViTModule,
    specs.GroupHead: concatplexer.GroupHeadModule,
    specs.Head: layers.HeadModule,
}


def build_layer(layer: specs.Layer) -> nn.Module:
    """Return the module of one layer, for inputs of the layer's resolution.

    Raises:
        InputError: the block cannot work at this resolution.
    """
    spec, resolution = layer
    found = MODULES.get(type(spec))
    if found:
        module: nn.Module = found(spec, resolution)
        return module
    with users_code(spec.kind, "where its module is built"):
        module = spec.module(resolution)  # type: ignore[union-attr]
    if not isinstance(module, nn.Module):
        raise InputError(f"module() of the block {spec.kind!r} gives {type(module).__name__}, which is no torch.nn.Module")
    return module
