"""Stages of small spaces, whose supernets train in seconds."""

from supernet.space import StageSpace
from supernet.specs import MB3D, MB4D, Block, Identity


def stage_space(widths: tuple[int, ...], stride: int, depth: int, *kinds: str) -> StageSpace:
    top = widths[-1]
    blocks: dict[str, Block] = {
        "mb4d": MB4D(top, mlp_ratio=2),
        "mb3d": MB3D(top, mlp_ratio=2, num_heads=2, key_dim=4, attn_ratio=2),
        "identity": Identity(top),
    }
    return StageSpace(widths, stride, depth, tuple(blocks[kind] for kind in kinds))
