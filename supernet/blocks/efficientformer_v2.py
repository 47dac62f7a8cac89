"""EfficientFormerV2's blocks and its embedding by attention (Li et al., ICCV 2023; the behaviour is that of the authors'
published code).

Everything works on maps (N, C, H, W). Head and key dimensions do not depend on C. L = H * W positions.
"""

import torch
from torch import Tensor, nn

from supernet.blocks.efficientformer import LayerScale
from supernet.blocks.layers import DropPath, Layout, Run, activation, offset_index, query
from supernet.errors import InputError
from supernet.specs import FFN, AttnEmbedding, AttnFFN


class ConvNorm(nn.Sequential):
    """A convolution with bias and its batch norm: (N, dim_in, H, W) to (N, dim, H/stride, W/stride), rounded up."""

    def __init__(self, dim_in: int, dim: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2, groups=groups)
        self.bn = nn.BatchNorm2d(dim)


class UnifiedMlp(nn.Module):
    """1x1 convolution to `hidden` channels, 3x3 depthwise convolution, 1x1 convolution back: (N, C, H, W) to the same.

    Batch norm after all three, activation after the first two.
    """

    def __init__(self, dim: int, hidden: int, act: str) -> None:
        super().__init__()
        self.fc1 = ConvNorm(dim, hidden)
        self.mid = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.fc2 = ConvNorm(hidden, dim)
        self.act = activation(act)
        for conv in (self.fc1.conv, self.mid.conv, self.fc2.conv):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.mid(self.act(self.fc1(x)))))


class FFNModule(nn.Module):
    """Feed-forward block: (N, C, H, W) to the same."""

    def __init__(self, spec: FFN, resolution: int) -> None:
        super().__init__()
        self.mlp = UnifiedMlp(spec.dim, spec.mlp_ratio * spec.dim, spec.act)
        self.ls2 = LayerScale(spec.dim, tokens=False)
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.ls2(self.mlp(x)))


class MapAttention(nn.Module):
    """Self-attention on a map, (N, C, H, W) to the same: a learned bias for every absolute offset, heads that talk to one
    another before and after the softmax, and values that also pass a 3x3 depthwise convolution.

    With stride 2 it is computed on every second position in both directions and upsampled bilinearly. The bias is looked
    up at every call, so weights that are loaded, moved or cast at any time take effect.
    """

    offsets: Tensor

    def __init__(self, spec: AttnFFN, resolution: int) -> None:
        super().__init__()
        side = resolution // spec.stride
        heads, keys, values = _dims(spec)
        self.num_heads, self.side, self.scale = heads, side, spec.key_dim**-0.5
        halved = spec.stride == 2
        self.stride_conv = ConvNorm(spec.dim, spec.dim, 3, 2, groups=spec.dim) if halved else nn.Identity()
        self.q = ConvNorm(spec.dim, keys)
        self.k = ConvNorm(spec.dim, keys)
        self.v = ConvNorm(spec.dim, values)
        self.v_local = ConvNorm(values, values, 3, groups=values)
        self.talking_head1 = nn.Conv2d(heads, heads, 1)
        self.talking_head2 = nn.Conv2d(heads, heads, 1)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear") if halved else nn.Identity()
        self.act = activation(spec.act)
        self.proj = ConvNorm(values, spec.dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, side * side))
        self.register_buffer("offsets", offset_index(side), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stride_conv(x)
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = (_by_head(q, self.num_heads).transpose(2, 3) @ _by_head(k, self.num_heads)) * self.scale
        scores = self.talking_head1(scores + self.attention_biases[:, self.offsets])  # (N, heads, L, L)
        weights = self.talking_head2(scores.softmax(3))
        x = _by_head(v, self.num_heads) @ weights.transpose(2, 3)  # (N, heads, value_dim, L)
        x = _as_map(x, self.side) + self.v_local(v)
        return self.proj(self.act(self.upsample(x)))


class AttnFFNModule(nn.Module):
    """Attention block: (N, C, H, W) to the same, H = W = resolution, which is even where the attention has stride 2."""

    def __init__(self, spec: AttnFFN, resolution: int) -> None:
        super().__init__()
        if not spec.takes(resolution):
            raise InputError(
                f"attn_ffn with stride 2 takes maps of an even side, but stands on one of {resolution} px: choose an image "
                "size at which its stage's map is even, or stride 1"
            )
        self.token_mixer = MapAttention(spec, resolution)
        self.ls1 = LayerScale(spec.dim, tokens=False)
        self.mlp = UnifiedMlp(spec.dim, spec.mlp_ratio * spec.dim, spec.act)
        self.ls2 = LayerScale(spec.dim, tokens=False)
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.token_mixer(x)))
        return x + self.drop_path(self.ls2(self.mlp(x)))

    @staticmethod
    def unit_layout(spec: AttnFFN) -> Layout:
        return _attention_layout(spec, "token_mixer", "q")


class LocalGlobalQuery(nn.Module):
    """Queries of every second position, and of what is around it: (N, C, H, W) to (N, keys, H/2, W/2)."""

    def __init__(self, dim: int, keys: int) -> None:
        super().__init__()
        self.local = nn.Conv2d(dim, dim, 3, 2, 1, groups=dim)
        self.pool = nn.AvgPool2d(1, 2)  # of single positions: it only takes every second one
        self.proj = ConvNorm(dim, keys)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.local(x) + self.pool(x))


class DownsamplingAttention(nn.Module):
    """Attention of every second position to all: (N, dim_in, H, W) to (N, dim, H/2, W/2), halves rounded up.

    A learned bias for every absolute offset; values also pass a 3x3 depthwise convolution of stride 2.
    """

    offsets: Tensor

    def __init__(self, spec: AttnEmbedding, resolution: int) -> None:
        super().__init__()
        heads, keys, values = _dims(spec)
        self.num_heads, self.side, self.scale = heads, -(-resolution // 2), spec.key_dim**-0.5
        self.q = LocalGlobalQuery(spec.dim_in, keys)
        self.k = ConvNorm(spec.dim_in, keys)
        self.v = ConvNorm(spec.dim_in, values)
        self.v_local = ConvNorm(values, values, 3, 2, groups=values)
        self.act = activation(spec.act)
        self.proj = ConvNorm(values, spec.dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, resolution * resolution))
        from_all = offset_index(resolution).unflatten(0, (resolution, resolution))
        self.register_buffer("offsets", from_all[::2, ::2].flatten(0, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = (_by_head(q, self.num_heads).transpose(2, 3) @ _by_head(k, self.num_heads)) * self.scale
        weights = (scores + self.attention_biases[:, self.offsets]).softmax(3)  # (N, heads, L/4, L)
        x = _by_head(v, self.num_heads) @ weights.transpose(2, 3)  # (N, heads, value_dim, L/4)
        return self.proj(self.act(_as_map(x, self.side) + self.v_local(v)))


class AttnEmbeddingModule(nn.Module):
    """Downsampling attention plus a 3x3 convolution with batch norm: (N, dim_in, H, W) to (N, dim, H/2, W/2)."""

    def __init__(self, spec: AttnEmbedding, resolution: int) -> None:
        super().__init__()
        self.conv = ConvNorm(spec.dim_in, spec.dim, 3, 2)
        self.attn = DownsamplingAttention(spec, resolution)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x) + self.conv(x)

    @staticmethod
    def unit_layout(spec: AttnEmbedding) -> Layout:
        return _attention_layout(spec, "attn", "q.proj")


def _attention_layout(spec: AttnFFN | AttnEmbedding, attention: str, queries: str) -> Layout:
    """Heads one after the other, in queries, keys and values."""
    keys = tuple(Run(f"key{head}", 0, spec.key_dim) for head in range(spec.num_heads))
    values = tuple(Run(f"value{head}", 0, spec.attn_ratio * spec.key_dim) for head in range(spec.num_heads))
    return {
        f"{attention}.{queries}.": {0: keys},
        f"{attention}.{queries}.bn.weight": {0: query(*keys)},
        f"{attention}.{queries}.bn.bias": {0: query(*keys)},
        f"{attention}.k.": {0: keys},
        f"{attention}.v.": {0: values},
        f"{attention}.v_local.": {0: values},
        f"{attention}.proj.conv.weight": {1: values},
    }


def _dims(spec: AttnFFN | AttnEmbedding) -> tuple[int, int, int]:
    """Heads, and the channels of the keys and of the values of all heads."""
    keys = spec.num_heads * spec.key_dim
    return spec.num_heads, keys, keys * spec.attn_ratio


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(N, heads * D, H, W) to (N, heads, D, L)."""
    return x.unflatten(1, (heads, -1)).flatten(3)


def _as_map(x: Tensor, side: int) -> Tensor:
    """(N, heads, D, L) to (N, heads * D, side, side)."""
    return x.flatten(1, 2).unflatten(2, (side, side))
