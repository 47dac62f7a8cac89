"""Parts that the families share: stem, embedding, change of layout, head.

Shapes: N images, C channels, H = W = the resolution that the layer is built for, L = H * W tokens.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernet.specs import Embedding, Flat, Head, Identity, Stem, Unflat


class Run(NamedTuple):
    """Consecutive positions of a tensor's axis that stand for the units `start` to `start + size` of one role.

    A role is a set of units that are cut together wherever they stand: `dim` and `dim_in` are the channels of the layer's stage
    and of the stage before, any other name is of the layer alone.
    """

    role: str
    start: int
    size: int
    query: bool = False
    """Whether the values here are a factor of queries, which attention divides by the square root of how many there are."""


Layout = Mapping[str, Mapping[int, tuple[Run, ...]]]
"""How a name of a tensor begins (the longest that fits counts), to the runs along its axes. A module class whose tensors have
axes that are neither a width nor an expansion of it says so by a static method `unit_layout(spec)` (supernet.units)."""


def query(*runs: Run) -> tuple[Run, ...]:
    """Return the same runs, of values that are a factor of queries."""
    return tuple(run._replace(query=True) for run in runs)


_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "hardswish": nn.Hardswish}


def activation(name: str) -> nn.Module:
    """Return the module of an activation of `supernet.specs.ACTIVATIONS`; GELU is the exact one."""
    return _ACTIVATIONS[name]()


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): while it trains, what a residual branch adds is left out for each sample with
    the chance `rate`, and otherwise divided by the chance of staying: (N, ...) to the same."""

    rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (kept / (1 - self.rate))


class StemModule(nn.Sequential):
    """Two 3x3 convolutions, each with batch norm and activation: (N, 3, S, S) to (N, dim, S/stride, S/stride)."""

    def __init__(self, spec: Stem, resolution: int) -> None:
        middle = spec.dim // 2
        first, second = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[spec.stride]
        super().__init__()
        self.conv1 = nn.Conv2d(3, middle, 3, first, 1)
        self.norm1 = nn.BatchNorm2d(middle)
        self.act1 = activation(spec.act)
        self.conv2 = nn.Conv2d(middle, spec.dim, 3, second, 1)
        self.norm2 = nn.BatchNorm2d(spec.dim)
        self.act2 = activation(spec.act)

    @staticmethod
    def unit_layout(spec: Stem) -> Layout:
        middle = (Run("middle", 0, spec.dim // 2),)
        return {"conv1.": {0: middle}, "norm1.": {0: middle}, "conv2.weight": {1: middle}}


class EmbeddingModule(nn.Sequential):
    """3x3 convolution and batch norm, no activation: (N, dim_in, H, W) to (N, dim, H/stride, W/stride)."""

    def __init__(self, spec: Embedding, resolution: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(spec.dim_in, spec.dim, 3, spec.stride, 1)
        self.norm = nn.BatchNorm2d(spec.dim)


class FlatModule(nn.Module):
    """(N, C, H, W) to (N, L, C)."""

    def __init__(self, spec: Flat, resolution: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class UnflatModule(nn.Module):
    """(N, L, C) to (N, C, H, W)."""

    def __init__(self, spec: Unflat, resolution: int) -> None:
        super().__init__()
        self.side = resolution

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, (self.side, self.side))


class IdentityModule(nn.Module):
    """An empty slot of a supernet: (N, C, H, W) unchanged."""

    def __init__(self, spec: Identity, resolution: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer_norm": nn.LayerNorm,
    "batch_norm": nn.BatchNorm2d,
    "mean_batch_norm": nn.BatchNorm1d,
    "class_token": partial(nn.LayerNorm, eps=1e-6),  # as published
}


class HeadModule(nn.Module):
    """Norm, mean over positions (or the class token) and linear, in the order of `spec.form`: tokens (N, L, C) or a map
    (N, C, H, W) to (N, num_classes)."""

    def __init__(self, spec: Head, resolution: int) -> None:
        super().__init__()
        self.tokens = spec.tokens
        self.form = spec.form
        self.norm = _NORMS[spec.form](spec.dim)
        self.fc = nn.Linear(spec.dim, spec.num_classes)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm.training or isinstance(self.norm, nn.LayerNorm):  # the norm alone, while its statistics are computed
            return self.fc(self.pooled(x))
        x = x.mean(1) if self.tokens else x.mean((2, 3))
        # In eval mode a batch norm is a factor and an offset for each channel: it may come after the mean, and be one with the
        # linear layer. No runtime merges it into what comes after it, and no convolution stands before it.
        norm: Any = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        return F.linear(x, self.fc.weight * scale, self.fc.bias + (self.fc.weight * shift).sum(1))

    def pooled(self, x: Tensor) -> Tensor:
        """Return what enters the classifier: (N, C)."""
        match self.form:
            case "layer_norm":
                return self.norm(x if self.tokens else x.flatten(2).transpose(1, 2)).mean(1)
            case "class_token":
                return self.norm(x[:, 0])
            case "batch_norm":
                return self.norm(x.transpose(1, 2).unsqueeze(3) if self.tokens else x).mean((2, 3))
        return self.norm(x.mean(1) if self.tokens else x.mean((2, 3)))


def offset_index(side: int) -> Tensor:
    """Return the index of every pair of positions' absolute offset: (L, L) int64, |dy| * side + |dx|, L = side * side.

    The order of the published bias tables (LeViT, EfficientFormer).
    """
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y[None]).abs() * side + (x[:, None] - x[None]).abs()
