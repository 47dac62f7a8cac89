"""A network rewritten for inference: the same function of images, in fewer and cheaper operators.

Folded are: batch norm into the convolution or linear layer beside it, layer scale into the weights before it, the scale of
attention into the queries' weights, a shortcut around a depthwise convolution into its centre, two classifiers into their mean.
Attention biases are looked up once, and pass the heads that talk. What is cheapest depends on the shape and the device: see
`Form`.

The rewriting is computed in float64 and kept in the weights' own dtype. The network that is given stays as it is, and what
happens to its weights later does not reach what was made of it. Shapes: N images or groups, C channels, L positions.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernet import specs
from supernet.arch import ArchConfig
from supernet.blocks import concatplexer, efficientvit
from supernet.specs import Layer

Form = Literal["conv", "matmul"]
"""How a layer that can be computed in two ways is computed.

- `conv`: convolutions on maps. The pool mixer is an average pool between two depthwise 1x1 convolutions, linear layers of tokens
  are 1x1 convolutions, and upsampling is one of the runtime's operators.
- `matmul`: matrix products over positions. The pool mixer, upsampling, and the depthwise convolution of queries are products
  with a constant matrix of positions; linear layers are products over tokens.
"""

FORMS: tuple[Form, ...] = ("conv", "matmul")
BLOCK = 16  # channels: ONNX Runtime keeps maps in blocks of so many on AVX-512, and of 8 elsewhere


def deployed(model: nn.Module, arch: ArchConfig, forms: Mapping[Layer, Form] | None = None) -> nn.Sequential:
    """Return the deploy form of a network of `build_model(arch)`, in eval mode: the same children under the same names, and in
    float64 the same logits to about 1e-9. `forms` are choices that stand in place of `default_form`.

    Raises:
        ValueError: the model's children are not the layers of the architecture.
    """
    layers = dict(arch.named_layers())
    children = dict(model.named_children())
    if list(layers) != list(children):
        raise ValueError(f"not a network of {arch.name}: its children are {', '.join(children)}")
    chosen = forms or {}
    made = OrderedDict(
        (name, deployed_layer(children[name], layer, chosen.get(layer))) for name, layer in layers.items()
    )
    return (concatplexer.Multiplexed(made) if arch.multiplexes else nn.Sequential(made)).eval()


def deployed_layer(module: nn.Module, layer: Layer, form: Form | None = None) -> nn.Module:
    """Return the deploy form of the module of one layer (`supernet.blocks.build_layer`), in eval mode. A user's own block is
    returned as a copy."""
    form = form or default_form(layer)
    with torch.no_grad():
        found = _made(module, layer, form)
    return found.eval().requires_grad_(False)


def has_forms(layer: Layer) -> bool:
    """Whether the form of a layer is a choice."""
    match layer.spec:
        case specs.AttnFFN(stride=stride):
            return stride == 2
        case specs.MB4D() | specs.MB3D() | specs.ViT() | specs.Sandwich():
            return True
    return False


def default_form(layer: Layer) -> Form:
    """Return the form of a layer that was found to be the faster one in ONNX Runtime on a CPU with AVX-512, by its shape."""
    match layer.spec:
        case specs.AttnFFN():
            return "matmul"
        case specs.MB3D() | specs.ViT():
            # other widths do not enter the blocked layout, and only pay for the way there
            return "conv" if layer.spec.dim % BLOCK == 0 else "matmul"
        case specs.Sandwich(window=window):
            return "matmul" if min(window, layer.resolution) ** 2 <= BLOCK else "conv"
    return "conv"


def _made(module: Any, layer: Layer, form: Form) -> nn.Module:
    match layer.spec:
        case specs.MB4D():
            return PoolBlock(module, layer) if form == "conv" else PoolTokens(module, layer)
        case specs.MB3D() | specs.ViT():
            return TokenBlock(module, layer, form)
        case specs.FFN():
            return Residual(_unified_mlp(module.mlp, module.ls2.gamma))
        case specs.AttnFFN():
            mixer = TalkingAttention(module.token_mixer, module.ls1.gamma, form)
            return nn.Sequential(Residual(mixer), Residual(_unified_mlp(module.mlp, module.ls2.gamma)))
        case specs.AttnEmbedding():
            return Sum(DownsamplingAttention(module.attn), folded(*module.conv))
        case specs.Sandwich():
            return nn.Sequential(
                _mixing(module.dw0, module.ffn0),
                Residual(WindowAttention(module.mixer.m, form)),
                _mixing(module.dw1, module.ffn1),
            )
        case specs.Subsample():
            return nn.Sequential(_mixing(*module.res1), PatchMerging(module.patchmerge), _mixing(*module.res2))
        case specs.Stem():
            first, second = folded(module.conv1, module.norm1), folded(module.conv2, module.norm2)
            return nn.Sequential(first, _copy(module.act1), second, _copy(module.act2))
        case specs.ConvStem():
            return nn.Sequential(*(folded(*m) if isinstance(m, efficientvit.ConvNorm) else _copy(m) for m in module))
        case specs.Embedding():
            return folded(module.conv, module.norm)
        case specs.GroupHead():
            return GroupHead(module)
        case specs.Head():
            return Head(module)
    return _copy(module)


# Weights


def folded(conv: Any, norm: Any = None, scale: Tensor | float = 1.0, *, shortcut: bool = False) -> nn.Conv2d:
    """Return a convolution with the batch norm after it, and factors of its outputs, in its weights; with `shortcut` (a
    depthwise one) it adds its input."""
    weight = conv.weight.double()
    bias = conv.bias.double() if conv.bias is not None else weight.new_zeros(len(weight))
    if norm is not None:
        factor, offset = affine(norm)
        weight, bias = weight * _rows(factor, weight), bias * factor + offset
    weight, bias = weight * _rows(scale, weight), bias * scale
    if shortcut:
        weight[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] += 1
    return convolution(weight, bias, conv.weight, conv.stride, conv.padding, conv.groups)


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Return the factor and the offset of every channel that a batch norm is in eval mode."""
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return factor, norm.bias.double() - norm.running_mean.double() * factor


def convolution(
    weight: Tensor, bias: Tensor | None, like: Tensor, stride: Any = 1, padding: Any = 0, groups: int = 1
) -> nn.Conv2d:
    """Return a convolution with these weights, in the dtype and on the device of `like`."""
    size = (weight.shape[2], weight.shape[3])
    made = nn.Conv2d(weight.shape[1] * groups, len(weight), size, stride, padding, groups=groups, bias=bias is not None)
    return _filled(made.to(like), weight, bias)


def linear(weight: Tensor, bias: Tensor, like: Tensor) -> nn.Linear:
    return _filled(nn.Linear(weight.shape[1], len(weight)).to(like), weight, bias)


def _filled(made: Any, weight: Tensor, bias: Tensor | None) -> Any:
    made.weight.copy_(weight)
    if bias is not None:
        made.bias.copy_(bias)
    return made


def _rows(factor: Tensor | float, weight: Tensor) -> Tensor | float:
    return factor.reshape(-1, *[1] * (weight.ndim - 1)).to(weight) if isinstance(factor, Tensor) else factor


def _copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class Sum(nn.Module):
    """a(x) + b(x)."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


# EfficientFormer and ViT


class PoolBlock(nn.Module):
    """MB4D on maps: x + s (pool(x) - x) as (1 - s) x + s pool(x), where both factors are depthwise convolutions.

    A runtime that keeps maps in blocks of channels knows no subtraction there, nor products with a vector, but these; and one
    depthwise 3x3 convolution would be wrong at the borders, which the average does not pad.
    """

    def __init__(self, module: Any, layer: Layer) -> None:
        super().__init__()
        gamma = module.ls1.gamma.double()
        self.pool = nn.AvgPool2d(layer.spec.pool_size, 1, layer.spec.pool_size // 2, count_include_pad=False)  # type: ignore[union-attr]
        self.kept, self.pooled = (
            convolution(factor[:, None, None, None], None, module.ls1.gamma, groups=len(gamma))
            for factor in (1 - gamma, gamma)
        )
        mlp = module.mlp
        self.mlp = Residual(
            nn.Sequential(folded(mlp.fc1, mlp.norm1), _copy(mlp.act), folded(mlp.fc2, mlp.norm2, module.ls2.gamma.double()))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.kept(x) + self.pooled(self.pool(x)))


class PoolTokens(nn.Module):
    """MB4D on maps, computed over tokens: the pool mixer is a matrix of positions."""

    mixing: Tensor
    gamma: Tensor

    def __init__(self, module: Any, layer: Layer) -> None:
        super().__init__()
        self.side = side = layer.resolution
        identity = torch.eye(side * side, dtype=torch.float64, device=module.ls1.gamma.device)
        mixed = module.token_mixer(identity.view(-1, 1, side, side)).flatten(1).T  # (L, L)
        self.register_buffer("mixing", mixed.to(module.ls1.gamma))
        self.register_buffer("gamma", module.ls1.gamma.clone())
        mlp = module.mlp
        first, second = folded(mlp.fc1, mlp.norm1), folded(mlp.fc2, mlp.norm2, module.ls2.gamma.double())
        fc1, fc2 = (linear(conv.weight.flatten(1), conv.bias, conv.weight) for conv in (first, second))  # type: ignore[arg-type]
        self.mlp = Residual(nn.Sequential(fc1, _copy(mlp.act), fc2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # (N, L, C)
        x = self.mlp(x + (self.mixing @ x) * self.gamma)
        return x.transpose(1, 2).unflatten(2, (self.side, self.side))


class TokenBlock(nn.Module):
    """MB3D's and ViT's block, of single images or groups: (N, L, C) to the same."""

    def __init__(self, module: Any, layer: Layer, form: Form) -> None:
        super().__init__()
        attention = module.attn if isinstance(layer.spec, specs.ViT) else module.token_mixer
        first, second = (module.ls1.gamma, module.ls2.gamma) if hasattr(module, "ls1") else (1.0, 1.0)
        self.norm1, self.norm2 = _copy(module.norm1), _copy(module.norm2)
        port = layer.entering
        length = port.shape(port.group.n if port.group else 1)[1]
        self.attn = TokenAttention(attention, attention_bias(module, layer.spec), length, form, first)
        mlp = _copy(module.mlp)
        fc1, fc2 = (pointwise(fc, scale, form) for fc, scale in ((mlp.fc1, 1.0), (mlp.fc2, second)))
        self.mlp = nn.Sequential(fc1, mlp.act, fc2)
        self.rows = form == "conv"

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._of_norm(self.norm1(x), self.attn)
        return x + self._of_norm(self.norm2(x), self.mlp)

    def _of_norm(self, x: Tensor, inner: nn.Module) -> Tensor:
        if not self.rows:
            return inner(x)
        # a map of one row: (N, L, C) to (N, C, 1, L) and back
        return inner(x.unsqueeze(1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).squeeze(1)


def pointwise(layer: nn.Linear, scale: Tensor | float, form: Form) -> nn.Module:
    """Return a linear layer, with factors of its outputs in its weights, as one of tokens or as a 1x1 convolution of a map."""
    weight, bias = layer.weight.double() * _rows(scale, layer.weight.double()), layer.bias.double() * scale
    if form == "matmul":
        return linear(weight, bias, layer.weight)
    return convolution(weight[:, :, None, None], bias, layer.weight)


def attention_bias(module: Any, spec: Any) -> Tensor | None:
    """Return what a token block adds to the logits of its attention: (heads, L, L), (L, L), or None."""
    match spec:
        case specs.GroupedMB3D():
            return module.attention_bias()
        case specs.MB3D():
            return module.token_mixer.attention_biases[:, module.token_mixer.offsets]
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
            q, k, v = (part(x).reshape(-1, self.heads, d, self.length) for part, d in zip((self.q, self.k, self.v), self.dims))
            x = v @ self._weights(q.transpose(2, 3) @ k).transpose(2, 3)  # (N, heads, value_dim, L)
            return self.proj(x.reshape(-1, self.heads * self.dims[2], 1, self.length))
        qkv = self.qkv(x).reshape(-1, self.length, self.heads, sum(self.dims)).transpose(1, 2)
        q, k, v = qkv.split(self.dims, dim=3)
        x = self._weights(q @ k.transpose(2, 3)) @ v  # (N, heads, L, value_dim)
        return self.proj(x.transpose(1, 2).flatten(2))

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
    if hasattr(attention, "key_dim"):  # head by head
        return list(rows.unflatten(0, (heads, -1)).split((key, key, value), 1))
    return [part.unflatten(0, (heads, -1)) for part in rows.chunk(3)]


# EfficientFormerV2


def _unified_mlp(mlp: Any, gamma: Tensor) -> nn.Sequential:
    first, middle, last = folded(*mlp.fc1), folded(*mlp.mid), folded(*mlp.fc2, gamma.double())
    return nn.Sequential(first, _copy(mlp.act), middle, _copy(mlp.act), last)


class TalkingAttention(nn.Module):
    """EfficientFormerV2's attention on maps: (N, C, H, W) to the same.

    The heads' talk is a product of (heads, heads) with their logits, and passes the biases beforehand. Upsampling, of the form
    `matmul`, is a product with a constant (L, 4 L).
    """

    bias: Tensor
    upsampling: Tensor | None

    def __init__(self, module: Any, gamma: Tensor, form: Form) -> None:
        super().__init__()
        self.heads, self.side = module.num_heads, module.side
        halved = isinstance(module.stride_conv, nn.Sequential)
        self.stride_conv = folded(*module.stride_conv) if halved else nn.Identity()
        self.q, self.k, self.v = folded(*module.q, module.scale), folded(*module.k), folded(*module.v)
        self.v_local, self.proj = folded(*module.v_local), folded(*module.proj, gamma.double())
        self.act = _copy(module.act)
        talk = module.talking_head1.weight.double().flatten(1)
        bias = torch.tensordot(talk, module.attention_biases.double()[:, module.offsets], 1)
        bias = bias + module.talking_head1.bias.double()[:, None, None]
        self.register_buffer("bias", bias.to(gamma))
        # of three axes: ONNX Runtime would pad a map's few heads to a whole block of channels
        self.talk1 = _talk(module.talking_head1, bias=False)
        self.talk2 = _talk(module.talking_head2, bias=True)
        self.upsample = _copy(module.upsample)
        length = self.side**2
        identity = torch.eye(length, dtype=torch.float64, device=gamma.device).view(-1, 1, self.side, self.side)
        product = halved and form == "matmul"
        self.register_buffer("upsampling", self.upsample(identity).flatten(1).to(gamma) if product else None)
        self.blocked = _as_it_is(self.v.out_channels, gamma)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stride_conv(x)
        heads, length = self.heads, self.side**2
        v = self.v(x)  # (N, heads * value_dim, side, side)
        q, k, values = (_by_head(map_, heads, length) for map_ in (self.q(x), self.k(x), v))
        scores = self.talk1((q.transpose(2, 3) @ k).flatten(2)).reshape(-1, heads, length, length) + self.bias
        weights = self.talk2(scores.softmax(3).flatten(2)).reshape(-1, heads, length, length)
        x = values @ weights.transpose(2, 3)
        if self.upsampling is None:
            x = self.blocked(x.reshape(-1, v.shape[1], self.side, self.side)) + self.v_local(v)
            return self.proj(self.act(self.upsample(x)))
        x = (x.reshape(-1, v.shape[1], length) + self.v_local(v).flatten(2)) @ self.upsampling
        return self.proj(self.act(x.reshape(-1, v.shape[1], 2 * self.side, 2 * self.side)))


def _as_it_is(channels: int, like: Tensor) -> nn.Conv2d:
    return convolution(like.new_ones(channels, 1, 1, 1), None, like, groups=channels)


def _talk(conv: Any, *, bias: bool) -> nn.Conv1d:
    heads = len(conv.weight)
    return _filled(nn.Conv1d(heads, heads, 1, bias=bias).to(conv.weight), conv.weight.flatten(2), conv.bias if bias else None)


def _by_head(x: Tensor, heads: int, length: int) -> Tensor:
    """(N, heads * D, H, W) to (N, heads, D, L)."""
    return x.reshape(-1, heads, x.shape[1] // heads, length)


class DownsamplingAttention(nn.Module):
    """Attention of every second position to all: (N, dim_in, H, W) to (N, dim, H/2, W/2), halves rounded up. Taking every
    second position is the centre of the queries' convolution of stride 2."""

    bias: Tensor

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.heads, self.side = module.num_heads, module.side
        self.q = nn.Sequential(folded(module.q.local, shortcut=True), folded(*module.q.proj, module.scale))
        self.k, self.v = folded(*module.k), folded(*module.v)
        self.v_local, self.act, self.proj = folded(*module.v_local), _copy(module.act), folded(*module.proj)
        self.register_buffer("bias", module.attention_biases[:, module.offsets])

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x)
        every, all_ = self.side**2, x.shape[2] * x.shape[3]
        q = _by_head(self.q(x), self.heads, every)
        k, values = (_by_head(map_, self.heads, all_) for map_ in (self.k(x), v))
        weights = (q.transpose(2, 3) @ k + self.bias).softmax(3)  # (N, heads, L/4, L)
        x = (values @ weights.transpose(2, 3)).reshape(-1, v.shape[1], self.side, self.side)
        return self.proj(self.act(x + self.v_local(v)))


# EfficientViT


def _mixing(depthwise: Any, mlp: Any) -> nn.Sequential:
    """Return a depthwise convolution that adds its input, and an MLP that does."""
    inner = nn.Sequential(folded(*mlp.m.pw1), _copy(mlp.m.act), folded(*mlp.m.pw2))
    return nn.Sequential(folded(*depthwise.m, shortcut=True), Residual(inner))


class PatchMerging(nn.Module):
    """Inverted bottleneck with squeeze-and-excitation: (N, dim_in, H, W) to (N, dim, H/stride, W/stride)."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.wide = nn.Sequential(folded(*module.conv1), _copy(module.act), folded(*module.conv2), _copy(module.act))
        se = module.se
        pool = nn.AdaptiveAvgPool2d(1)  # a runtime's own operator for the mean of a map
        self.excite = nn.Sequential(pool, _copy(se.fc1), _copy(se.act), _copy(se.fc2), nn.Sigmoid())
        self.narrow = folded(*module.conv3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        return self.narrow(x * self.excite(x))


class CascadedAttention(nn.Module):
    """Cascaded group attention of one window: (N, C, side, side) to the same.

    `conv`: chunks stay maps; queries are one convolution, keys and values another. `matmul`: chunks are (N, C, L) and pass
    convolutions of one axis, which are products, and only queries become a map, for their depthwise convolution.
    """

    bias: Tensor

    def __init__(self, module: Any, form: Form) -> None:
        super().__init__()
        self.side, self.form, like = module.side, form, module.attention_biases
        self.key, self.value = module.key_dim, module.value_dim
        self.register_buffer("bias", like[:, module.offsets].clone())
        convs = [folded(*qkv) for qkv in module.qkvs]
        depthwise = [folded(*dw, module.scale) for dw in module.dws]
        if form == "conv":
            parts = [_rows_of(conv, (self.key, self.key + self.value)) for conv in convs]
            self.q = nn.ModuleList(nn.Sequential(q, dw) for (q, _), dw in zip(parts, depthwise, strict=True))
            self.kv = nn.ModuleList(kv for _, kv in parts)
        else:
            self.qkv = nn.ModuleList(_flat_conv(conv) for conv in convs)
            self.dws = nn.ModuleList(depthwise)
        self.act, self.proj = _copy(module.proj[0]), folded(*module.proj[1])

    def forward(self, x: Tensor) -> Tensor:
        length = self.side**2
        chunks = (x if self.form == "conv" else x.reshape(-1, x.shape[1], length)).split(self.value, 1)
        found: list[Tensor] = []
        for head, chunk in enumerate(chunks):
            y = chunk + found[-1] if found else chunk
            if self.form == "conv":
                q = self.q[head](y).reshape(-1, self.key, length)
                k, v = self.kv[head](y).reshape(-1, self.key + self.value, length).split((self.key, self.value), 1)
            else:
                q, k, v = self.qkv[head](y).split((self.key, self.key, self.value), 1)
                q = self.dws[head](q.reshape(-1, self.key, self.side, self.side)).reshape(-1, self.key, length)
            weights = (q.transpose(1, 2) @ k + self.bias[head]).softmax(2)
            y = v @ weights.transpose(1, 2)  # (N, value_dim, L)
            found.append(y.reshape(-1, self.value, self.side, self.side) if self.form == "conv" else y)
        x = self.act(torch.cat(found, 1))
        return self.proj(x.reshape(-1, x.shape[1], self.side, self.side))


def _rows_of(conv: Any, sizes: tuple[int, ...]) -> list[nn.Conv2d]:
    weights, biases = conv.weight.split(sizes), conv.bias.split(sizes)
    return [convolution(weight, bias, conv.weight) for weight, bias in zip(weights, biases, strict=True)]


def _flat_conv(conv: Any) -> nn.Conv1d:
    made = nn.Conv1d(conv.in_channels, conv.out_channels, 1).to(conv.weight)
    return _filled(made, conv.weight.flatten(2), conv.bias)


class WindowAttention(nn.Module):
    """Cascaded group attention in each window of a map: (N, C, H, W) to the same."""

    def __init__(self, module: Any, form: Form) -> None:
        super().__init__()
        self.inner = _copy(module)
        self.inner.attn = CascadedAttention(module.attn, form)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


# Heads


def classifier(head: Any) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of a head's classifier, the mean of both where it has a second one."""
    found = [head.fc, head.fc_dist] if getattr(head, "fc_dist", None) is not None else [head.fc]
    weights, biases = ([getattr(fc, name).double() for fc in found] for name in ("weight", "bias"))
    return sum(weights) / len(found), sum(biases) / len(found)  # type: ignore[return-value]


class Head(nn.Module):
    """Tokens (N, L, C) or a map (N, C, H, W) to logits; a batch norm is part of the classifier."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.form, self.tokens = module.form, module.tokens
        weight, bias = classifier(module)
        if isinstance(module.norm, nn.LayerNorm):
            self.norm = _copy(module.norm)
        else:
            factor, offset = affine(module.norm)
            weight, bias = weight * factor, bias + weight @ offset
        self.fc = linear(weight, bias, module.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "class_token":
            return self.fc(self.norm(x[:, 0]))
        if self.form == "layer_norm":
            x = x if self.tokens else x.flatten(2).transpose(1, 2)
            # the axis more keeps ONNX Runtime from merging the sum before it with the norm, into a slower operator
            return self.fc(self.norm(x.unsqueeze(1)).mean((1, 2)))
        return self.fc(x.mean(1) if self.tokens else F.adaptive_avg_pool2d(x, 1).flatten(1))


class GroupHead(nn.Module):
    """Sequences of groups to the logits of each image, with one classifier."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.inner = _copy(module)
        weight, bias = classifier(module)
        self.inner.fc = linear(weight, bias, module.fc.weight)  # type: ignore[assignment]
        self.inner.fc_dist = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)
