"""EfficientViT's block and embedding in their deploy forms."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernet.deploy.forms import Form
from supernet.deploy.weights import Residual, copied, folded, of_one_axis


def sandwich(module: Any, form: Form, side: int) -> nn.Sequential:
    """Return the five parts of a sandwich block for maps of this side."""
    before, after = (mixing_part(*pair, form, side) for pair in ((module.dw0, module.ffn0), (module.dw1, module.ffn1)))
    return nn.Sequential(before, Residual(Windows(module.mixer.m, form)), after)


def mixing_part(depthwise: Any, mlp: Any, form: Form = "conv", side: int = 0) -> nn.Sequential:
    """Return a depthwise convolution that adds its input, and an MLP that does; of the form `matmul`, for maps of this side."""
    first, last = folded(mlp.m.pw1), folded(mlp.m.pw2)
    if form == "conv":
        inner: nn.Module = nn.Sequential(first, copied(mlp.m.act), last)
    else:
        inner = Flattened(nn.Sequential(of_one_axis(first), copied(mlp.m.act), of_one_axis(last)), last.out_channels, side)
    return nn.Sequential(folded(depthwise.m, shortcut=True), Residual(inner))


class Flattened(nn.Module):
    """A part that takes (N, C, L), for maps (N, C, H, W)."""

    def __init__(self, m: nn.Module, channels: int, side: int) -> None:
        super().__init__()
        self.m, self.channels, self.side = m, channels, side

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.m(x.reshape(-1, self.channels, self.side**2))
        return y.reshape(-1, self.channels, self.side, self.side)


class PatchMerging(nn.Module):
    """Inverted bottleneck with squeeze-and-excitation: (N, dim_in, H, W) to (N, dim, H/stride, W/stride)."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.wide = nn.Sequential(folded(module.conv1), copied(module.act), folded(module.conv2), copied(module.act))
        se = module.se
        mean = nn.AdaptiveAvgPool2d(1)  # a runtime's own operator, where it has blocks of channels
        self.excite = nn.Sequential(mean, copied(se.fc1), copied(se.act), copied(se.fc2), nn.Sigmoid())
        self.narrow = folded(module.conv3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        return self.narrow(x * self.excite(x))


class Windows(nn.Module):
    """Cascaded group attention in each window of a map: (N, C, H, W) to the same. Windows are cut out and put together, which
    moves whole rows of them, where a transposition moves a few floats at a time."""

    def __init__(self, module: Any, form: Form) -> None:
        super().__init__()
        self.dim, self.side, self.window, self.windows = module.dim, module.side, module.window, module.windows
        self.attn = CascadedAttention(module.attn, form)

    def forward(self, x: Tensor) -> Tensor:
        n, size = self.windows, self.window
        if n == 1:
            return self.attn(x)
        padding = n * size - self.side
        if padding:
            x = F.pad(x, (0, padding, 0, padding))
        x = self.attn(torch.cat([window for band in x.split(size, 2) for window in band.split(size, 3)]))  # (n * n * N, ...)
        found = x.reshape(n * n, -1, self.dim, size, size).unbind(0)
        x = torch.cat([torch.cat(found[row : row + n], 3) for row in range(0, n * n, n)], 2)
        return x[:, :, : self.side, : self.side] if padding else x


class CascadedAttention(nn.Module):
    """Cascaded group attention of one window: (N, C, side, side) to the same.

    Queries, keys and values are one convolution of a chunk: of maps, or, of the form `matmul`, of one axis, (N, C, L), which is
    a product. They are parted as (N, C, L), and only queries become a map again, for their depthwise convolution.
    """

    bias: Tensor

    def __init__(self, module: Any, form: Form) -> None:
        super().__init__()
        self.side, self.key, self.value = module.side, module.key_dim, module.value_dim
        self.register_buffer("bias", module.attention_biases[:, module.offsets])
        convs, proj = [folded(qkv) for qkv in module.qkvs], folded(module.proj[1])
        self.flat = form == "matmul"
        self.qkvs = nn.ModuleList(of_one_axis(conv) if self.flat else conv for conv in convs)
        self.dws = nn.ModuleList(folded(dw, module.scale) for dw in module.dws)
        self.act = copied(module.proj[0])
        self.proj: nn.Module = of_one_axis(proj) if self.flat else proj

    def forward(self, x: Tensor) -> Tensor:
        key, value, side, length = self.key, self.value, self.side, self.side**2
        channels = len(self.qkvs) * value
        found: list[Tensor] = []
        for head, chunk in enumerate((x.reshape(-1, channels, length) if self.flat else x).split(value, 1)):
            qkv = self.qkvs[head](chunk + found[-1] if found else chunk)
            q, k, v = qkv.reshape(-1, 2 * key + value, length).split((key, key, value), 1)
            q = self.dws[head](q.reshape(-1, key, side, side)).reshape(-1, key, length)
            weights = (q.transpose(1, 2) @ k + self.bias[head]).softmax(2)  # (N, L, L)
            y = v @ weights.transpose(1, 2)  # (N, value_dim, L)
            found.append(y if self.flat else y.reshape(-1, value, side, side))
        y = self.proj(self.act(torch.cat(found, 1)))
        return y.reshape(-1, channels, side, side) if self.flat else y
