"""MobileNetV2 (Sandler et al., CVPR 2018, table 2) at any width and stride: a network that users know, to compare with.

It is no ArchConfig: its stages are entered by inverted residuals that change width or stride, and its head has a convolution
of its own, and neither is among the entries and heads that an ArchConfig may have. So it is a plain torch module.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
"""Expansion, width and blocks of each row of table 2."""
STEM, LAST = 32, 1280
IMAGENET_STRIDES = (2, 1, 2, 2, 2, 1, 2, 1)
"""Of the stem, then of each stage's first block."""
SMALL_IMAGE_STRIDES = (1, 1, 1, 2, 2, 1, 2, 1)
"""For 32 px, as is customary on CIFAR: the stem and the first stage of stride 2 keep the map, so the last one is 4 x 4."""
DIVISOR = 8


def rounded(channels: float) -> int:
    """Return the multiple of 8 that is nearest to `channels`, at least 8 and not under nine tenths of them.

    Source: `_make_divisible` of the published TensorFlow code.
    """
    nearest = max(DIVISOR, int(channels + DIVISOR / 2) // DIVISOR * DIVISOR)
    return nearest + DIVISOR if nearest < 0.9 * channels else nearest


@dataclass(frozen=True)
class MobileNetV2:
    """The network's description. `width` multiplies every number of channels; that before the classifier only where it is above
    1, as published (section 5, "Trade-off hyper parameters")."""

    width: float = 1.0
    image_size: int = 224
    num_classes: int = 1000
    strides: tuple[int, ...] = IMAGENET_STRIDES

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the stem, of each stage, and before the classifier."""
        scaled = (rounded(self.width * channels) for channels in (STEM, *(channels for _, channels, _ in STAGES)))
        return (*scaled, rounded(max(1.0, self.width) * LAST))

    def module(self) -> nn.Sequential:
        """Return the network with new weights: (N, 3, S, S), S = image_size, to (N, num_classes)."""
        stem, *widths, last = self.widths
        net = nn.Sequential(ConvNormAct(3, stem, 3, self.strides[0]))
        for (before, after), (expansion, _, blocks), stride in zip(
            pairwise((stem, *widths)), STAGES, self.strides[1:], strict=True
        ):
            for number in range(blocks):
                first = number == 0
                net.append(InvertedResidual(before if first else after, after, expansion, stride if first else 1))
        net.append(ConvNormAct(widths[-1], last, 1))
        net.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, self.num_classes)))
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
                nn.init.zeros_(module.bias)
        return net


class ConvNormAct(nn.Sequential):
    """A convolution that keeps the map (but for its stride), batch norm, ReLU6."""

    def __init__(self, dim_in: int, dim: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(dim), nn.ReLU6()
        )


class InvertedResidual(nn.Module):
    """Expansion, depthwise 3x3 convolution, linear projection; added to the input where that has the output's shape.

    (N, dim_in, H, W) to (N, dim, H / stride, W / stride).
    """

    def __init__(self, dim_in: int, dim: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * dim_in
        self.residual = stride == 1 and dim_in == dim
        expand = [ConvNormAct(dim_in, hidden, 1)] if expansion > 1 else []
        self.layers = nn.Sequential(
            *expand,
            ConvNormAct(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y
