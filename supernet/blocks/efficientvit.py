"""EfficientViT's layers (Liu et al., CVPR 2023; the behaviour is that of the authors' published code).

Every residual branch of a sandwich block begins as zero: the scale of its last batch norm does. Not to be confused with
MIT's EfficientViT, another network of the same name.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernet.blocks.layers import DropPath, Layout, Run, activation, offset_index, query
from supernet.specs import ConvStem, Sandwich, Subsample


class ConvNorm(nn.Sequential):
    """Convolution without bias that keeps the map's size at stride 1, and batch norm: (N, dim_in, H, W) to (N, dim, ...)."""

    def __init__(self, dim_in: int, dim: int, kernel: int = 1, stride: int = 1, groups: int = 1, *, zero: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(dim)
        if zero:
            nn.init.zeros_(self.bn.weight)


class ConvMlp(nn.Module):
    """1x1 convolution to `hidden` channels and back, activation between: (N, C, H, W) to the same. It begins as zero."""

    def __init__(self, dim: int, hidden: int, act: str) -> None:
        super().__init__()
        self.pw1 = ConvNorm(dim, hidden)
        self.act = activation(act)
        self.pw2 = ConvNorm(hidden, dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.act(self.pw1(x)))


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.m(x))


class CascadedGroupAttention(nn.Module):
    """Attention in which every head has a chunk of the channels, and adds to it what the head before gave: (N, C, H, W) to
    the same, H = W = side.

    The bias is looked up at every call, so weights that are loaded, moved or cast at any time take effect.
    """

    offsets: Tensor

    def __init__(self, spec: Sandwich, side: int) -> None:
        super().__init__()
        self.side, self.key_dim, self.value_dim = side, spec.key_dim, spec.dim // spec.num_heads
        self.scale = spec.key_dim**-0.5
        self.qkvs = nn.ModuleList(ConvNorm(self.value_dim, 2 * spec.key_dim + self.value_dim) for _ in range(spec.num_heads))
        self.dws = nn.ModuleList(
            ConvNorm(spec.key_dim, spec.key_dim, kernel, groups=spec.key_dim) for kernel in spec.q_kernels[: spec.num_heads]
        )
        self.proj = nn.Sequential(activation(spec.act), ConvNorm(spec.dim, spec.dim, zero=True))
        self.attention_biases = nn.Parameter(torch.zeros(spec.num_heads, side * side))
        self.register_buffer("offsets", offset_index(side), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        biases = self.attention_biases[:, self.offsets]  # (heads, L, L), L = side * side
        found: list[Tensor] = []
        for head, (chunk, qkv, dw) in enumerate(zip(x.split(self.value_dim, 1), self.qkvs, self.dws, strict=True)):
            mixed = qkv(chunk + found[-1] if found else chunk)
            q, k, v = mixed.split((self.key_dim, self.key_dim, self.value_dim), 1)
            attention = dw(q).flatten(2).transpose(1, 2) @ k.flatten(2) * self.scale + biases[head]  # (N, L, L)
            y = v.flatten(2) @ attention.softmax(2).transpose(1, 2)  # (N, value_dim, L)
            found.append(y.reshape(-1, self.value_dim, self.side, self.side))
        return self.proj(torch.cat(found, 1))


class WindowAttention(nn.Module):
    """Cascaded group attention in each `window` x `window` square of a map: (N, C, H, W) to the same.

    A map that is no multiple of the window is padded below and on the right with zeros, which take part in the attention, as
    they do in the published code. A map no larger than the window is one window.
    """

    def __init__(self, spec: Sandwich, resolution: int) -> None:
        super().__init__()
        self.dim, self.side, self.window = spec.dim, resolution, min(spec.window, resolution)
        self.windows = -(-resolution // self.window)  # along each side of the map
        self.attn = CascadedGroupAttention(spec, self.window)

    def forward(self, x: Tensor) -> Tensor:
        if self.windows == 1:
            return self.attn(x)
        c, w, n = self.dim, self.window, self.windows
        padding = n * w - self.side
        if padding:
            x = F.pad(x, (0, padding, 0, padding))
        # Rows of windows apart, then columns: tensors of at most four axes, which every runtime has.
        x = x.reshape(-1, c, n, w * n * w).transpose(1, 2)  # (N, n, C, w * n * w)
        x = x.reshape(-1, c * w, n, w).transpose(1, 2)  # (N * n, n, C * w, w)
        x = self.attn(x.reshape(-1, c, w, w))
        x = x.reshape(-1, n, c * w, w).transpose(1, 2)
        x = x.reshape(-1, n, c, w * n * w).transpose(1, 2)
        x = x.reshape(-1, c, n * w, n * w)
        return x[:, :, : self.side, : self.side] if padding else x


class SandwichModule(nn.Sequential):
    """Depthwise convolution, MLP, windowed attention, depthwise convolution, MLP, each added to its input: (N, C, H, W) to
    the same."""

    def __init__(self, spec: Sandwich, resolution: int) -> None:
        super().__init__()
        dim, hidden = spec.dim, spec.ffn_ratio * spec.dim
        self.dw0 = Residual(ConvNorm(dim, dim, 3, groups=dim, zero=True))
        self.ffn0 = Residual(ConvMlp(dim, hidden, spec.act))
        self.mixer = Residual(WindowAttention(spec, resolution))
        self.dw1 = Residual(ConvNorm(dim, dim, 3, groups=dim, zero=True))
        self.ffn1 = Residual(ConvMlp(dim, hidden, spec.act))

    @staticmethod
    def unit_layout(spec: Sandwich) -> Layout:
        """What a head gives is added to the next head's chunk, so its values are that chunk's channels; the last head's are its
        own."""
        heads, width, attention = spec.num_heads, spec.dim // spec.num_heads, "mixer.m.attn"
        chunks = [Run("dim", head * width, width) for head in range(heads)]
        values = [*chunks[1:], Run("value", 0, width)]
        found: dict[str, dict[int, tuple[Run, ...]]] = {f"{attention}.proj.1.conv.weight": {1: tuple(values)}}
        for head in range(heads):
            key = Run(f"key{head}", 0, spec.key_dim)
            found[f"{attention}.qkvs.{head}."] = {0: (key, key, values[head]), 1: (chunks[head],)}
            found[f"{attention}.dws.{head}."] = {0: (key,)}
            found[f"{attention}.dws.{head}.bn.weight"] = found[f"{attention}.dws.{head}.bn.bias"] = {0: query(key)}
        for name in ("ffn0", "ffn1"):
            hidden = (Run(f"{name}.hidden", 0, spec.ffn_ratio * spec.dim),)
            found |= {f"{name}.m.pw1.": {0: hidden}, f"{name}.m.pw2.conv.weight": {1: hidden}}
        return found


class SqueezeExcite(nn.Module):
    """A factor in (0, 1) for every channel, from the channels' means through `hidden` values: (N, C, H, W) to the same."""

    def __init__(self, dim: int, hidden: int, act: str) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = activation(act)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class PatchMerging(nn.Module):
    """Inverted bottleneck of four times the old width: (N, dim_in, H, W) to (N, dim, H/stride, W/stride)."""

    def __init__(self, spec: Subsample) -> None:
        super().__init__()
        hidden = 4 * spec.dim_in
        self.conv1 = ConvNorm(spec.dim_in, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, spec.stride, hidden)
        self.se = SqueezeExcite(hidden, spec.dim_in, spec.act)
        self.conv3 = ConvNorm(hidden, spec.dim)
        self.act = activation(spec.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.se(self.act(self.conv2(self.act(self.conv1(x))))))


class SubsampleModule(nn.Sequential):
    """Between two stages: (N, dim_in, H, W) to (N, dim, H/stride, W/stride)."""

    def __init__(self, spec: Subsample, resolution: int) -> None:
        super().__init__()

        def mixing(dim: int) -> nn.Sequential:
            # Unlike a sandwich block's, this convolution's branch does not begin as zero.
            return nn.Sequential(Residual(ConvNorm(dim, dim, 3, groups=dim)), Residual(ConvMlp(dim, 2 * dim, spec.act)))

        self.res1 = mixing(spec.dim_in)
        self.patchmerge = PatchMerging(spec)
        self.res2 = mixing(spec.dim)

    @staticmethod
    def unit_layout(spec: Subsample) -> Layout:
        before = (Run("before", 0, 2 * spec.dim_in),)
        merged = (Run("merged", 0, 4 * spec.dim_in),)
        squeezed = (Run("squeezed", 0, spec.dim_in),)
        after = (Run("after", 0, 2 * spec.dim),)
        return {
            "res1.1.m.pw1.": {0: before},
            "res1.1.m.pw2.conv.weight": {1: before},
            "patchmerge.conv1.": {0: merged},
            "patchmerge.conv2.": {0: merged},
            "patchmerge.se.fc1.": {0: squeezed, 1: merged},
            "patchmerge.se.fc2.": {0: merged, 1: squeezed},
            "patchmerge.conv3.conv.weight": {1: merged},
            "res2.1.m.pw1.": {0: after},
            "res2.1.m.pw2.conv.weight": {1: after},
        }


class ConvStemModule(nn.Sequential):
    """3x3 convolutions of stride 2 with batch norm, activation between them: (N, 3, S, S) to (N, dim, S/stride, S/stride)."""

    def __init__(self, spec: ConvStem, resolution: int) -> None:
        super().__init__()
        convolutions = spec.stride.bit_length() - 1  # log2
        dim_in = 3
        for number in range(1, convolutions + 1):
            dim = spec.dim >> (convolutions - number)
            if number > 1:
                self.add_module(f"act{number - 1}", activation(spec.act))
            self.add_module(f"conv{number}", ConvNorm(dim_in, dim, 3, 2))
            dim_in = dim

    @staticmethod
    def unit_layout(spec: ConvStem) -> Layout:
        convolutions = spec.stride.bit_length() - 1
        found: dict[str, dict[int, tuple[Run, ...]]] = {f"conv{number}.": {} for number in range(1, convolutions + 1)}
        for number in range(1, convolutions):
            between = (Run(f"between{number}", 0, spec.dim >> (convolutions - number)),)
            found[f"conv{number}."][0] = found[f"conv{number + 1}."][1] = between
        return found
