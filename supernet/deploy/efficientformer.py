"""EfficientFormer's and ViT's blocks, single images' and groups', in their deploy forms."""

from typing import Any

import torch
from torch import Tensor, nn

from supernet import specs
from supernet.deploy.forms import Form
from supernet.deploy.weights import Residual, convolution, copied, folded, linear, positions, rows
from supernet.specs import Layer


class PoolBlock(nn.Module):
    """MB4D on maps: x + s (pool(x) - x) as (1 - s) x + s pool(x), where both factors are depthwise convolutions.

    A runtime that keeps maps in blocks of channels knows no subtraction there, nor products with a vector, but these; and one
    depthwise 3x3 convolution would be wrong at the borders, which the average does not pad.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        gamma, mixer, mlp = module.ls1.gamma, module.token_mixer, module.mlp
        self.pool = nn.AvgPool2d(mixer.kernel_size, mixer.stride, mixer.padding, count_include_pad=False)
        self.kept, self.pooled = (
            convolution(factor[:, None, None, None], None, gamma, groups=len(gamma))
            for factor in (1 - gamma.double(), gamma.double())
        )
        first, last = folded((mlp.fc1, mlp.norm1)), folded((mlp.fc2, mlp.norm2), module.ls2.gamma)
        self.mlp = Residual(nn.Sequential(first, copied(mlp.act), last))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.kept(x) + self.pooled(self.pool(x)))


class PoolTokens(nn.Module):
    """MB4D on maps, computed over tokens: the pool mixer is a matrix of positions."""

    mixing: Tensor
    gamma: Tensor

    def __init__(self, module: Any, layer: Layer) -> None:
        super().__init__()
        self.side = side = layer.resolution
        self.register_buffer("mixing", positions(module.token_mixer, side, module.ls1.gamma).T.contiguous())  # (L, L)
        self.register_buffer("gamma", module.ls1.gamma.clone())
        mlp = module.mlp
        first, last = folded((mlp.fc1, mlp.norm1)), folded((mlp.fc2, mlp.norm2), module.ls2.gamma)
        fc1, fc2 = (linear(conv.weight.flatten(1), conv.bias, conv.weight) for conv in (first, last))  # type: ignore[arg-type]
        self.mlp = Residual(nn.Sequential(fc1, copied(mlp.act), fc2))

    def forward(self, x: Tensor) -> Tensor:
        length = self.side**2
        x = x.reshape(-1, len(self.gamma), length).transpose(1, 2)  # (N, L, C)
        x = self.mlp(x + (self.mixing @ x) * self.gamma)
        return x.transpose(1, 2).reshape(-1, len(self.gamma), self.side, self.side)


class TokenBlock(nn.Module):
    """MB3D's and ViT's block, of single images or groups: (N, L, C) to the same."""

    def __init__(self, module: Any, layer: Layer, form: Form) -> None:
        super().__init__()
        attention = module.attn if isinstance(layer.spec, specs.ViT) else module.token_mixer
        first, second = (module.ls1.gamma, module.ls2.gamma) if hasattr(module, "ls1") else (1.0, 1.0)
        self.norm1, self.norm2 = copied(module.norm1), copied(module.norm2)
        port = layer.entering
        length = port.shape(port.group.n if port.group else 1)[1]
        self.attn = TokenAttention(attention, attention_bias(module, layer.spec), length, form, first)
        mlp = module.mlp
        fc1, fc2 = (pointwise(fc, scale, form) for fc, scale in ((mlp.fc1, 1.0), (mlp.fc2, second)))
        self.mlp = nn.Sequential(fc1, copied(mlp.act), fc2)
        self.as_map, self.dim = form == "conv", layer.spec.dim

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._of_norm(self.norm1(x), self.attn)
        return x + self._of_norm(self.norm2(x), self.mlp)

    def _of_norm(self, x: Tensor, inner: nn.Module) -> Tensor:
        if self.as_map:  # of one row: (N, L, C) to (N, C, 1, L) and back
            x = x.unsqueeze(1).permute(0, 3, 1, 2)
        x = inner(x)
        return x.permute(0, 2, 3, 1).reshape(-1, self.attn.length, self.dim) if self.as_map else x


def pointwise(layer: nn.Linear, scale: Tensor | float, form: Form) -> nn.Module:
    """Return a linear layer, with factors of its outputs in its weights, as one of tokens or as a 1x1 convolution of a map."""
    weight, bias = layer.weight.double(), layer.bias.double()
    weight, bias = weight * rows(scale, weight), bias * rows(scale, bias)
    if form == "matmul":
        return linear(weight, bias, layer.weight)
    return convolution(weight[:, :, None, None], bias, layer.weight)


def attention_bias(module: Any, spec: Any) -> Tensor | None:
    """Return what a token block adds to the logits of its attention: (heads, L, L), (L, L), or None."""
    match spec:
        case specs.GroupedMB3D():
            bias: Tensor = module.attention_bias()
            return bias
        case specs.MB3D():
            own: Tensor = module.token_mixer.attention_biases[:, module.token_mixer.offsets]
            return own
        case specs.GroupedViT():
            return torch.where(module.same, 0.0, -torch.inf).to(module.norm1.weight) if module.masked else None
    return None


class TokenAttention(nn.Module):
    """Self-attention of tokens: (N, L, C) to the same, or, of the form `conv`, (N, C, 1, L) to the same.

    As convolutions, queries, keys and values come head by head without a transposition. `bias` is added to the logits.
    """

    bias: Tensor | None

    def __init__(self, attention: Any, bias: Tensor | None, length: int, form: Form, scale: Tensor | float) -> None:
        super().__init__()
        self.heads, self.length, self.form = attention.num_heads, length, form
        qkv = attention.qkv
        key, value = _head_dims(attention)
        weight, offset = _by_part(attention, qkv.weight.double()), _by_part(attention, qkv.bias.double()[:, None])
        for part in (weight, offset):
            part[0] = part[0] * attention.scale
        self.dims = (key, key, value)
        if form == "conv":
            self.q, self.k, self.v = (
                convolution(w.flatten(0, 1)[:, :, None, None], b.flatten(), qkv.weight)
                for w, b in zip(weight, offset, strict=True)
            )
        else:
            self.qkv = linear(torch.cat(weight, 1).flatten(0, 1), torch.cat(offset, 1).flatten(), qkv.weight)
        self.proj = pointwise(attention.proj, scale, form)
        self.register_buffer("bias", None if bias is None else bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "conv":
            parts = zip((self.q, self.k, self.v), self.dims, strict=True)
            q, k, v = (part(x).reshape(-1, self.heads, dim, self.length) for part, dim in parts)
            x = v @ self._weights(q.transpose(2, 3) @ k).transpose(2, 3)  # (N, heads, value_dim, L)
            return self.proj(x.reshape(-1, self.heads * self.dims[2], 1, self.length))
        qkv = self.qkv(x).reshape(-1, self.length, self.heads, sum(self.dims)).transpose(1, 2)
        q, k, v = qkv.split(self.dims, dim=3)
        x = self._weights(q @ k.transpose(2, 3)) @ v  # (N, heads, L, value_dim)
        return self.proj(x.transpose(1, 2).reshape(-1, self.length, self.heads * self.dims[2]))

    def _weights(self, scores: Tensor) -> Tensor:
        return (scores if self.bias is None else scores + self.bias).softmax(3)


def _head_dims(attention: Any) -> tuple[int, int]:
    """Return a head's key and value dimensions."""
    if hasattr(attention, "key_dim"):
        return attention.key_dim, attention.value_dim
    width = attention.qkv.out_features // (3 * attention.num_heads)
    return width, width


def _by_part(attention: Any, rows: Tensor) -> list[Tensor]:
    """Split the rows of the weights of queries, keys and values: three of (heads, D, ...)."""
    heads, (key, value) = attention.num_heads, _head_dims(attention)
    if hasattr(attention, "key_dim"):  # MB3D's stand head by head, ViT's part by part
        return list(rows.unflatten(0, (heads, -1)).split((key, key, value), 1))
    return [part.unflatten(0, (heads, -1)) for part in rows.chunk(3)]
