"""The modules that realise the specs: one family a file, one literal table."""

from typing import Any

from torch import nn

from supernet import arch
from supernet.blocks import efficientformer, efficientformer_v2, efficientvit, layers, vit

MODULES: dict[type[Any], Any] = {
    arch.MB4D: efficientformer.MB4DModule,
    arch.MB3D: efficientformer.MB3DModule,
    arch.FFN: efficientformer_v2.FFNModule,
    arch.AttnFFN: efficientformer_v2.AttnFFNModule,
    arch.Sandwich: efficientvit.SandwichModule,
    arch.Identity: layers.IdentityModule,
    arch.Stem: layers.StemModule,
    arch.ConvStem: efficientvit.ConvStemModule,
    arch.ViT: vit.ViTModule,
    arch.Identity: layers.IdentityModule,
    arch.Stem: layers.StemModule,
    arch.PatchStem: vit.PatchStemModule,
    arch.Embedding: layers.EmbeddingModule,
    arch.AttnEmbedding: efficientformer_v2.AttnEmbeddingModule,
    arch.Subsample: efficientvit.SubsampleModule,
    arch.Flat: layers.FlatModule,
    arch.Unflat: layers.UnflatModule,
    arch.Head: layers.HeadModule,
}


def build_layer(layer: arch.Layer) -> nn.Module:
    """Return the module of one layer, for inputs of the layer's resolution.

    Raises:
        InputError: the block cannot work at this resolution.
    """
    spec, resolution = layer
    found = MODULES.get(type(spec))
    module: nn.Module = found(spec, resolution) if found else spec.module(resolution)  # type: ignore[union-attr]
    return module
