"""EfficientFormerV2's blocks and embedding in their deploy forms."""

from typing import Any

import torch
from torch import Tensor, nn

from supernet.deploy.forms import Form
from supernet.deploy.weights import convolution, copied, folded, identity, of_one_axis, positions


class Sum(nn.Module):
    """a(x) + b(x)."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def unified_mlp(mlp: Any, gamma: Tensor) -> nn.Sequential:
    first, middle, last = folded(mlp.fc1), folded(mlp.mid), folded(mlp.fc2, gamma)
    return nn.Sequential(first, copied(mlp.act), middle, copied(mlp.act), last)


class TalkingAttention(nn.Module):
    """EfficientFormerV2's attention on maps: (N, C, H, W) to the same.

    The heads' talk is a product of (heads, heads) with their logits; the biases pass it beforehand. Upsampling, of the form
    `matmul`, is a product with a constant (L, 4 L).
    """

    bias: Tensor
    upsampling: Tensor | None

    def __init__(self, module: Any, gamma: Tensor, form: Form) -> None:
        super().__init__()
        self.heads, self.side = module.num_heads, module.side
        halved = isinstance(module.stride_conv, nn.Sequential)
        self.stride_conv = folded(module.stride_conv) if halved else nn.Identity()
        self.q, self.k, self.v = folded(module.q, module.scale), folded(module.k), folded(module.v)
        self.v_local, self.act, self.proj = folded(module.v_local), copied(module.act), folded(module.proj, gamma)
        talk = module.talking_head1
        bias = torch.tensordot(talk.weight.double().flatten(1), module.attention_biases.double()[:, module.offsets], 1)
        self.register_buffer("bias", (bias + talk.bias.double()[:, None, None]).to(gamma))
        # of one axis, because a blocked layout would fill the few heads up to a whole block of channels
        self.talk1 = of_one_axis(convolution(talk.weight, None, gamma))
        self.talk2 = of_one_axis(module.talking_head2)
        self.upsample, self.enter = copied(module.upsample), identity(self.v.out_channels, gamma)
        product = halved and form == "matmul"
        self.register_buffer("upsampling", positions(self.upsample, self.side, gamma) if product else None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stride_conv(x)
        heads, side, length = self.heads, self.side, self.side**2
        v, values_dim = self.v(x), self.v.out_channels  # (N, heads * value_dim, side, side)
        q, k = (_by_head(conv(x), conv, heads, length) for conv in (self.q, self.k))
        values = _by_head(v, self.v, heads, length)
        scores = (
            self.talk1((q.transpose(2, 3) @ k).reshape(-1, heads, length**2)).reshape(-1, heads, length, length) + self.bias
        )
        weights = self.talk2(scores.softmax(3).reshape(-1, heads, length**2)).reshape(-1, heads, length, length)
        x = values @ weights.transpose(2, 3)  # (N, heads, value_dim, L)
        if self.upsampling is None:
            x = self.enter(x.reshape(-1, values_dim, side, side)) + self.v_local(v)
            return self.proj(self.act(self.upsample(x)))
        x = (x.reshape(-1, values_dim, length) + self.v_local(v).reshape(-1, values_dim, length)) @ self.upsampling
        return self.proj(self.act(x.reshape(-1, values_dim, 2 * side, 2 * side)))


def _by_head(x: Tensor, conv: nn.Conv2d, heads: int, length: int) -> Tensor:
    """What a convolution gives, (N, heads * D, H, W), to (N, heads, D, L)."""
    return x.reshape(-1, heads, conv.out_channels // heads, length)


class DownsamplingAttention(nn.Module):
    """Attention of every second position to all: (N, dim_in, H, W) to (N, dim, H/2, W/2), halves rounded up. Taking every
    second position is part of the centre of the queries' convolution of stride 2."""

    bias: Tensor

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.heads, self.side = module.num_heads, module.side
        self.local, self.q = folded([module.q.local], shortcut=True), folded(module.q.proj, module.scale)
        self.k, self.v = folded(module.k), folded(module.v)
        self.v_local, self.act, self.proj = folded(module.v_local), copied(module.act), folded(module.proj)
        self.enter = identity(self.v.out_channels, module.attention_biases)
        self.register_buffer("bias", module.attention_biases[:, module.offsets])  # (heads, L/4, L)
        self.length = module.offsets.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x)
        q = _by_head(self.q(self.local(x)), self.q, self.heads, self.side**2)
        k, values = (_by_head(map_, conv, self.heads, self.length) for map_, conv in ((self.k(x), self.k), (v, self.v)))
        weights = (q.transpose(2, 3) @ k + self.bias).softmax(3)  # (N, heads, L/4, L)
        x = (values @ weights.transpose(2, 3)).reshape(-1, self.v.out_channels, self.side, self.side)
        return self.proj(self.act(self.enter(x) + self.v_local(v)))
