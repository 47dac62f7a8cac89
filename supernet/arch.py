"""What a network is: block specs, Stage, ArchConfig, and their YAML form. No torch.

A spec is three things at once: an entry of an ArchConfig, the argument (with the resolution) of the module that
realises it, and, with the resolution, the key of its row in a latency table.

Resolutions are the side in pixels of the square map that *enters* a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml

from supernet.errors import InputError, unknown
from supernet.files import checked_fields, read_yaml, write_atomically

WIDTH_STEP = 8  # the finest grid of the published networks (EfficientFormerV2: 40, 120)


def _positive(spec: object, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if type(value) is not int or value < 1:
            raise InputError(f"{type(spec).__name__}: {name} must be a whole number of at least 1, but is {value!r}")


@dataclass(frozen=True)
class MB4D:
    """Pool block on maps (EfficientFormer, Meta4D): `x + ls1 * (pool(x) - x)`, then a convolutional MLP."""

    kind: ClassVar[str] = "mb4d"
    tokens: ClassVar[bool] = False
    dim: int
    mlp_ratio: int = 4
    pool_size: int = 3

    def __post_init__(self) -> None:
        _positive(self, "dim", "mlp_ratio", "pool_size")
        if self.pool_size % 2 == 0:
            raise InputError(f"MB4D: pool_size must be odd, but is {self.pool_size}")


@dataclass(frozen=True)
class MB3D:
    """Attention block on tokens (EfficientFormer, Meta3D): pre-norm attention with a learned bias, then an MLP."""

    kind: ClassVar[str] = "mb3d"
    tokens: ClassVar[bool] = True
    dim: int
    mlp_ratio: int = 4
    num_heads: int = 8
    key_dim: int = 32
    attn_ratio: int = 4

    def __post_init__(self) -> None:
        _positive(self, "dim", "mlp_ratio", "num_heads", "key_dim", "attn_ratio")


@dataclass(frozen=True)
class Identity:
    """An empty slot: its input is its output; it costs nothing and is left out of a built network."""

    kind: ClassVar[str] = "identity"
    tokens: ClassVar[bool] = False
    dim: int

    def __post_init__(self) -> None:
        _positive(self, "dim")


@dataclass(frozen=True)
class Stem:
    """Two 3x3 convolutions from the image to `dim` channels; together they reduce the map by `stride` (1, 2 or 4)."""

    kind: ClassVar[str] = "stem"
    dim: int
    stride: int = 4

    def __post_init__(self) -> None:
        _positive(self, "dim")
        if self.stride not in (1, 2, 4):
            raise InputError(f"the first stage's stride must be 1, 2 or 4, but is {self.stride!r}")


@dataclass(frozen=True)
class Embedding:
    """A 3x3 convolution with batch norm between two stages, from `dim_in` to `dim` channels."""

    kind: ClassVar[str] = "embedding"
    dim: int
    dim_in: int
    stride: int = 2

    def __post_init__(self) -> None:
        _positive(self, "dim", "dim_in")
        if self.stride not in (1, 2):
            raise InputError(f"the stride of a stage after the first must be 1 or 2, but is {self.stride!r}")


@dataclass(frozen=True)
class Flat:
    """(N, C, H, W) to (N, H*W, C), once, before the first token block of a stage."""

    kind: ClassVar[str] = "flat"
    dim: int


@dataclass(frozen=True)
class Unflat:
    """(N, H*W, C) back to (N, C, H, W), once, after the last token block of a stage that an embedding follows."""

    kind: ClassVar[str] = "unflat"
    dim: int


@dataclass(frozen=True)
class Head:
    """Layer norm, mean over positions, one linear classifier. `tokens` says what enters: tokens or a map."""

    kind: ClassVar[str] = "head"
    dim: int
    num_classes: int = 1000
    tokens: bool = False

    def __post_init__(self) -> None:
        _positive(self, "dim", "num_classes")


Block = MB4D | MB3D | Identity
Spec = Block | Stem | Embedding | Flat | Unflat | Head

BLOCKS: dict[str, type[Block]] = {"mb4d": MB4D, "mb3d": MB3D, "identity": Identity}
SPECS: dict[str, type[Spec]] = {
    **BLOCKS,
    "stem": Stem,
    "embedding": Embedding,
    "flat": Flat,
    "unflat": Unflat,
    "head": Head,
}


class Layer(NamedTuple):
    """A spec at a resolution: one module of a network, one row of a latency table."""

    spec: Spec
    resolution: int

    def __str__(self) -> str:
        knobs = ", ".join(
            f"{f.name}={getattr(self.spec, f.name)}"
            for f in fields(self.spec)
            if f.default is MISSING or getattr(self.spec, f.name) != f.default
        )
        return f"{self.spec.kind}({knobs}) at {self.resolution} px"


@dataclass(frozen=True)
class Stage:
    """Blocks of one width. `stride` is the reduction on entering, by the stem or an embedding."""

    width: int
    stride: int
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        check_width(self.width)
        begun = False
        for block in self.blocks:
            if block.dim != self.width:
                raise InputError(f"a block of dim {block.dim} stands in a stage of width {self.width}")
            if begun and not block.tokens and not isinstance(block, Identity):
                raise InputError(f"token blocks must be the last of their stage, but {block.kind} follows one")
            begun = begun or block.tokens


@dataclass(frozen=True)
class ArchConfig:
    """A network: image size, classes, stages. Everything else (resolutions, Flat, Unflat, embeddings) is derived."""

    name: str
    image_size: int
    num_classes: int
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        _positive(self, "image_size", "num_classes")
        if not self.stages:
            raise InputError(f"network {self.name!r} has no stages")
        Stem(self.stages[0].width, self.stages[0].stride)
        for before, stage in zip(self.stages, self.stages[1:], strict=False):
            Embedding(stage.width, before.width, stage.stride)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(stage.width for stage in self.stages)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(stage.stride for stage in self.stages)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The side of each stage's map in pixels."""
        return stage_resolutions(self.image_size, self.strides)

    def at(self, image_size: int) -> ArchConfig:
        """Return the same network for square images of `image_size` pixels."""
        return replace(self, image_size=image_size)

    def with_classes(self, num_classes: int) -> ArchConfig:
        """Return the same network with another number of classes."""
        return replace(self, num_classes=num_classes)

    def without_identity(self) -> ArchConfig:
        """Return the same network with its empty slots left out."""
        stages = tuple(
            replace(stage, blocks=tuple(b for b in stage.blocks if not isinstance(b, Identity))) for stage in self.stages
        )
        return replace(self, stages=stages)

    def named_layers(self) -> list[tuple[str, Layer]]:
        """Return the network's layers in order, each with the name of its module. Blocks keep their slot's number."""
        layers: list[tuple[str, Layer]] = []
        entering, width, in_tokens = self.image_size, 0, False
        for number, (stage, resolution) in enumerate(zip(self.stages, self.resolutions, strict=True), 1):
            if number == 1:
                layers.append(("stem", Layer(Stem(stage.width, stage.stride), entering)))
            else:
                if in_tokens:
                    layers.append((f"stage{number - 1}_unflat", Layer(Unflat(width), entering)))
                embedding = Embedding(stage.width, width, stage.stride)
                layers.append((f"stage{number}_embedding", Layer(embedding, entering)))
            in_tokens = False
            for slot, block in enumerate(stage.blocks, 1):
                if isinstance(block, Identity):
                    continue
                if block.tokens and not in_tokens:
                    layers.append((f"stage{number}_flat", Layer(Flat(stage.width), resolution)))
                    in_tokens = True
                layers.append((f"stage{number}_block{slot}", Layer(block, resolution)))
            entering, width = resolution, stage.width
        layers.append(("head", Layer(Head(width, self.num_classes, in_tokens), entering)))
        return layers

    def layers(self) -> list[Layer]:
        """Return the network's layers in order; empty slots have none."""
        return [layer for _, layer in self.named_layers()]

    def to_yaml(self) -> str:
        document = {
            "name": self.name,
            "image_size": self.image_size,
            "num_classes": self.num_classes,
            "stages": [
                {"width": s.width, "stride": s.stride, "blocks": [block_entry(b) for b in s.blocks]} for s in self.stages
            ],
        }
        return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=120)

    def save(self, path: str | Path) -> None:
        """Write the network as YAML; the file is whole or absent."""
        write_atomically(path, self.to_yaml())

    @classmethod
    def load(cls, path: str | Path) -> ArchConfig:
        """Read a network from YAML.

        Raises:
            InputError: the file is missing, or a field is unknown, missing, of another type, or not allowed.
        """
        return cls.from_dict(read_yaml(path, "the network file"), f"the network file {path}")

    @classmethod
    def from_dict(cls, document: dict[str, Any], where: str) -> ArchConfig:
        given = checked_fields(cls, document, where)
        with placed(where):
            stages = []
            for number, entry in enumerate(checked_list(given["stages"], "stages"), 1):
                with placed(f"stage {number}"):
                    stage = checked_fields(Stage, entry, f"stage {number}")
                    check_width(stage["width"])
                    blocks = checked_list(stage["blocks"], "blocks", empty=True)
                    stage["blocks"] = tuple(block_from_entry(block, stage["width"]) for block in blocks)
                    stages.append(Stage(**stage))
            given["stages"] = tuple(stages)
            return cls(**given)


class placed:
    """Prefix the InputErrors of a block of code with the file, or the part of it, that they are about."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError) and self.where not in str(error):
            raise InputError(f"{self.where}: {error}") from error


def check_width(width: object) -> None:
    if type(width) is not int or width < WIDTH_STEP or width % WIDTH_STEP:
        raise InputError(f"a width must be a positive multiple of {WIDTH_STEP}, but is {width!r}")


def stage_resolutions(image_size: int, strides: Sequence[int]) -> tuple[int, ...]:
    """Return the side of each stage's map: every stride-2 convolution takes n to ceil(n / 2)."""
    sides = []
    for stride in strides:
        image_size = -(-image_size // stride)
        sides.append(image_size)
    return tuple(sides)


def checked_list(value: object, where: str, *, empty: bool = False) -> list[Any]:
    if not isinstance(value, list) or not (value or empty):
        raise InputError(f"{where} must be a list{'' if empty else ' with at least one entry'}, but is {value!r}")
    return value


def block_entry(block: Block) -> str | dict[str, Any]:
    """Return a block as it stands in a YAML file: its kind, with the knobs that are not at their default."""
    knobs = {f.name: getattr(block, f.name) for f in fields(block) if f.name != "dim" and getattr(block, f.name) != f.default}
    return {"kind": block.kind, **knobs} if knobs else block.kind


def block_from_entry(entry: object, dim: int) -> Block:
    """Return the block of width `dim` that a YAML entry stands for: a kind, or a mapping of `kind` and knobs."""
    if isinstance(entry, str):
        entry = {"kind": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        raise InputError(f"a block must be a kind ({', '.join(BLOCKS)}) or a mapping with one, but is {entry!r}")
    if entry["kind"] not in BLOCKS:
        raise unknown("block kind", entry["kind"], BLOCKS)
    if "dim" in entry:
        raise InputError(f"a block's dim is its stage's width: leave it out of {entry!r}")
    knobs = {name: value for name, value in entry.items() if name != "kind"}
    block_type = BLOCKS[entry["kind"]]
    return block_type(**checked_fields(block_type, {"dim": dim, **knobs}, f"block {entry['kind']}"))
