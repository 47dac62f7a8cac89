"""The Vision Transformer's stem and block (Dosovitskiy et al., ICLR 2021; DeiT, Touvron et al., ICML 2021; behaviour as in
timm's VisionTransformer: layer norms with eps 1e-6, biases in all linear layers, no layer scale).

Shapes: N images, L = 1 + tokens of the map, the class token first, C = dim.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from supernet.blocks.efficientformer import Mlp
from supernet.blocks.layers import DropPath, Layout, Run, query
from supernet.errors import InputError
from supernet.specs import PatchStem, ViT

EPS = 1e-6


class PatchStemModule(nn.Module):
    """Patch convolution, class token, position embedding: (N, 3, S, S) to (N, 1 + (S / stride) ** 2, dim).

    Raises:
        InputError: the image is not a whole number of patches wide.
    """

    def __init__(self, spec: PatchStem, resolution: int) -> None:
        super().__init__()
        if resolution % spec.stride:
            raise InputError(
                f"patch_stem cuts images into patches of {spec.stride} px, but {resolution} px is no multiple: "
                f"give {max(1, round(resolution / spec.stride)) * spec.stride} px"
            )
        # timm's names
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, spec.dim, spec.stride, spec.stride)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (resolution // spec.stride) ** 2, spec.dim))
        for tensor in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(tensor, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1) + self.pos_embed


class SelfAttention(nn.Module):
    """Multi-head self-attention: (N, L, C) to the same. `bias` is added to the logits: (L, L), or None."""

    def __init__(self, spec: ViT) -> None:
        super().__init__()
        self.num_heads = spec.num_heads
        self.scale = (spec.dim // spec.num_heads) ** -0.5
        self.qkv = nn.Linear(spec.dim, 3 * spec.dim)
        self.proj = nn.Linear(spec.dim, spec.dim)
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # all of q, then all of k, then all of v, each head by head, in the published weights
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, N, heads, L, C / heads)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attention = (q @ k.transpose(2, 3)) * self.scale
        if bias is not None:
            attention = attention + bias
        return self.proj((attention.softmax(3) @ v).transpose(1, 2).flatten(2))


class ViTModule(nn.Module):
    """Transformer block: tokens (N, L, C) to the same, for any L."""

    def __init__(self, spec: ViT, resolution: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.dim, eps=EPS)
        self.attn = SelfAttention(spec)
        self.norm2 = nn.LayerNorm(spec.dim, eps=EPS)
        self.mlp = Mlp(spec.dim, spec.mlp_ratio * spec.dim, spec.act)
        self.drop_path = DropPath()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), bias))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    @staticmethod
    def unit_layout(spec: ViT) -> Layout:
        keys = tuple(Run(f"key{head}", 0, spec.dim // spec.num_heads) for head in range(spec.num_heads))
        values = tuple(key._replace(role=f"value{head}") for head, key in enumerate(keys))
        return {"attn.qkv.": {0: (*query(*keys), *keys, *values)}, "attn.proj.weight": {1: values}}
