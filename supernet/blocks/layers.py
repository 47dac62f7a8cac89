"""Parts that the families share: stem, embedding, change of layout, head.

Shapes: N images, C channels, H = W = the resolution that the layer is built for, L = H * W tokens.
"""

import torch
from torch import Tensor, nn

from supernet.arch import Embedding, Flat, Head, Identity, Stem, Unflat

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "hardswish": nn.Hardswish}


def activation(name: str) -> nn.Module:
    """Return the module of an activation of `supernet.arch.ACTIVATIONS`; GELU is the exact one."""
    return _ACTIVATIONS[name]()


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


class HeadModule(nn.Module):
    """Layer norm over channels, mean over positions or the class token, linear: (N, L, C) or a map (N, C, H, W) to
    (N, num_classes)."""

    def __init__(self, spec: Head, resolution: int) -> None:
        super().__init__()
        self.tokens = spec.tokens
        self.of_class_token = spec.form == "class_token"
        self.norm = nn.LayerNorm(spec.dim, eps=1e-6 if self.of_class_token else 1e-5)  # as published
        self.fc = nn.Linear(spec.dim, spec.num_classes)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.tokens:
            x = x.flatten(2).transpose(1, 2)
        if self.of_class_token:
            return self.fc(self.norm(x[:, 0]))
        return self.fc(self.norm(x).mean(1))


def offset_index(side: int) -> Tensor:
    """Return the index of every pair of positions' absolute offset: (L, L) int64, |dy| * side + |dx|, L = side * side.

    The order of the published bias tables (LeViT, EfficientFormer).
    """
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y[None]).abs() * side + (x[:, None] - x[None]).abs()
