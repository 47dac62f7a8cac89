"""EfficientViT's block and embedding in their deploy forms."""

from typing import Any

import torch
from torch import Tensor, nn

from supernet.deploy.forms import Form
from supernet.deploy.weights import Residual, convolution, copied, folded, of_one_axis


def sandwich(module: Any, form: Form, side: int) -> nn.Sequential:
    """Return the five parts of a sandwich block for maps of this side."""
    before, after = (mixing_part(*pair, form, side) for pair in ((module.dw0, module.ffn0), (module.dw1, module.ffn1)))
    return nn.Sequential(before, Residual(_windows(module.mixer.m, form)), after)


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


def _windows(module: Any, form: Form) -> nn.Module:
    """Return attention in each window of a map: the windows as they are, around another attention."""
    made = copied(module)
    made.attn = CascadedAttention(module.attn, form)
    return made


class CascadedAttention(nn.Module):
    """Cascaded group attention of one window: (N, C, side, side) to the same.

    `conv`: chunks stay maps; queries are one convolution, keys and values another. `matmul`: chunks are (N, C, L) and pass
    convolutions of one axis, which are products, and only queries become a map, for their depthwise convolution.
    """

    bias: Tensor

    def __init__(self, module: Any, form: Form) -> None:
        super().__init__()
        self.side, self.form = module.side, form
        self.key, self.value = module.key_dim, module.value_dim
        self.register_buffer("bias", module.attention_biases[:, module.offsets])
        convs = [folded(qkv) for qkv in module.qkvs]
        self.dws = nn.ModuleList(folded(dw, module.scale) for dw in module.dws)
        if form == "conv":
            self.q = nn.ModuleList(_slice(conv, 0, self.key) for conv in convs)
            self.kv = nn.ModuleList(_slice(conv, self.key, conv.out_channels) for conv in convs)
        else:
            self.qkv = nn.ModuleList(of_one_axis(conv) for conv in convs)
        self.act, proj = copied(module.proj[0]), folded(module.proj[1])
        self.proj = proj if form == "conv" else of_one_axis(proj)

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        channels = len(self.dws) * self.value
        maps = x if self.form == "conv" else x.reshape(-1, channels, self.side**2)
        for head, chunk in enumerate(maps.split(self.value, 1)):
            q, k, v = self._qkv(head, chunk + found[-1] if found else chunk)
            weights = (q.transpose(1, 2) @ k + self.bias[head]).softmax(2)  # (N, L, L)
            y = v @ weights.transpose(1, 2)  # (N, value_dim, L)
            found.append(y.reshape(-1, self.value, self.side, self.side) if self.form == "conv" else y)
        y = self.proj(self.act(torch.cat(found, 1)))
        return y if self.form == "conv" else y.reshape(-1, channels, self.side, self.side)

    def _qkv(self, head: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (N, D, L) each."""
        length = self.side**2
        if self.form == "conv":
            q = self.q[head](x)
            k, v = self.kv[head](x).reshape(-1, self.key + self.value, length).split((self.key, self.value), 1)
        else:
            q, k, v = self.qkv[head](x).split((self.key, self.key, self.value), 1)
            q = q.reshape(-1, self.key, self.side, self.side)
        return self.dws[head](q).reshape(-1, self.key, length), k, v


def _slice(conv: nn.Conv2d, start: int, end: int) -> nn.Conv2d:
    assert conv.bias is not None
    return convolution(conv.weight[start:end], conv.bias[start:end], conv.weight)
