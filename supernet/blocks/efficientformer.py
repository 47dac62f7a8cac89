"""EfficientFormer's two blocks (Li et al., NeurIPS 2022; the behaviour is that of the authors' published code).

Where paper and code differ, the code is followed: the pool mixer is `pool(x) - x`, and attention is scaled by
key_dim ** -0.5.
"""

import torch
from torch import Tensor, nn

from supernet.blocks.layers import DropPath, Layout, Run, activation, offset_index, query
from supernet.specs import MB3D, MB4D

LAYER_SCALE = 1e-5  # the published initial value; a recipe may set another


class PoolMixer(nn.AvgPool2d):
    """Average over `pool_size` squared, borders not padded, minus the input: (N, C, H, W) to the same."""

    def __init__(self, pool_size: int) -> None:
        super().__init__(pool_size, 1, pool_size // 2, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x


class LayerScale(nn.Module):
    """A learned factor for each channel, of a map (N, C, H, W) or of tokens (N, L, C)."""

    def __init__(self, dim: int, *, tokens: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), LAYER_SCALE))
        self.shape = (dim,) if tokens else (dim, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(self.shape)


class ConvMlp(nn.Module):
    """1x1 convolution to `hidden` channels and back, batch norm after both, activation between: (N, C, H, W) to the same."""

    def __init__(self, dim: int, hidden: int, act: str) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.act = activation(act)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.norm2 = nn.BatchNorm2d(dim)
        for conv in (self.fc1, self.fc2):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.fc2(self.act(self.norm1(self.fc1(x)))))


class MB4DModule(nn.Module):
    """Pool block: (N, C, H, W) to the same."""

    def __init__(self, spec: MB4D, resolution: int) -> None:
        super().__init__()
        self.token_mixer = PoolMixer(spec.pool_size)
        self.ls1 = LayerScale(spec.dim, tokens=False)
        self.mlp = ConvMlp(spec.dim, spec.mlp_ratio * spec.dim, spec.act)
        self.ls2 = LayerScale(spec.dim, tokens=False)
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.token_mixer(x)))
        return x + self.drop_path(self.ls2(self.mlp(x)))


class Attention(nn.Module):
    """Multi-head self-attention with a learned bias for every absolute offset: (N, L, C) to the same.

    Head and key dimensions do not depend on C. The bias is looked up at every call, so weights that are loaded, moved
    or cast at any time take effect. A `bias` (heads, L, L) that is given stands in its place.
    """

    offsets: Tensor

    def __init__(self, spec: MB3D, side: int) -> None:
        super().__init__()
        self.num_heads, self.key_dim = spec.num_heads, spec.key_dim
        self.value_dim = spec.attn_ratio * spec.key_dim
        self.scale = spec.key_dim**-0.5
        self.qkv = nn.Linear(spec.dim, spec.num_heads * (2 * spec.key_dim + self.value_dim))
        self.proj = nn.Linear(spec.num_heads * self.value_dim, spec.dim)
        self.attention_biases = nn.Parameter(torch.zeros(spec.num_heads, side * side))
        self.register_buffer("offsets", offset_index(side), persistent=False)
        _init_linear(self.qkv, self.proj)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is None:
            bias = self.attention_biases[:, self.offsets]
        # q, k and v are interleaved head by head in the published weights: split after the heads are apart.
        qkv = self.qkv(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, L, 2 * key_dim + value_dim)
        q, k, v = qkv.split((self.key_dim, self.key_dim, self.value_dim), dim=3)
        attention = (q @ k.transpose(2, 3)) * self.scale + bias  # (N, heads, L, L)
        x = attention.softmax(3) @ v  # (N, heads, L, value_dim)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear to `hidden` channels, activation, linear back: (N, L, C) to the same."""

    def __init__(self, dim: int, hidden: int, act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = activation(act)
        self.fc2 = nn.Linear(hidden, dim)
        _init_linear(self.fc1, self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class MB3DModule(nn.Module):
    """Attention block: tokens (N, L, C) to the same, L = resolution ** 2, or that of the `bias` (heads, L, L) given."""

    def __init__(self, spec: MB3D, resolution: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.dim)
        self.token_mixer = Attention(spec, resolution)
        self.ls1 = LayerScale(spec.dim, tokens=True)
        self.norm2 = nn.LayerNorm(spec.dim)
        self.mlp = Mlp(spec.dim, spec.mlp_ratio * spec.dim, spec.act)
        self.ls2 = LayerScale(spec.dim, tokens=True)
        self.drop_path = DropPath()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.ls1(self.token_mixer(self.norm1(x), bias)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))

    @staticmethod
    def unit_layout(spec: MB3D) -> Layout:
        keys = [Run(f"key{head}", 0, spec.key_dim) for head in range(spec.num_heads)]
        values = [Run(f"value{head}", 0, spec.attn_ratio * spec.key_dim) for head in range(spec.num_heads)]
        by_head = [(*query(key), key, value) for key, value in zip(keys, values, strict=True)]
        return {
            "token_mixer.qkv.": {0: tuple(run for head in by_head for run in head)},
            "token_mixer.proj.weight": {1: tuple(values)},
        }


def _init_linear(*layers: nn.Linear) -> None:
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
