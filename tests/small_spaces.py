"""Stages of small spaces, whose supernets train in seconds, and a block that draws."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from supernet.space import StageSpace
from supernet.specs import MB3D, MB4D, Block, Identity


@dataclass(frozen=True)
class Dropping:
    """A block of a user's own with dropout."""

    kind: ClassVar[str] = "dropping"
    tokens: ClassVar[bool] = False
    dim: int

    def module(self, resolution: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(self.dim, self.dim, 1), nn.Dropout(0.5), nn.BatchNorm2d(self.dim))


def stage_space(widths: tuple[int, ...], stride: int, depth: int, *kinds: str) -> StageSpace:
    top = widths[-1]
    blocks: dict[str, Block] = {
        "mb4d": MB4D(top, mlp_ratio=2),
        "mb3d": MB3D(top, mlp_ratio=2, num_heads=2, key_dim=4, attn_ratio=2),
        "dropping": Dropping(top),
        "identity": Identity(top),
    }
    return StageSpace(widths, stride, depth, tuple(blocks[kind] for kind in kinds))
