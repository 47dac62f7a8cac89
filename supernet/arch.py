"""What a network is: Stage, ArchConfig, and their YAML form. No torch.

The specs of its layers are in supernet.specs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from supernet.entries import block_entry, block_from_entry, entry_entry, entry_from_entry, placed_entry, unplaced
from supernet.errors import InputError, placed
from supernet.files import checked_fields, checked_list, read_yaml, write_atomically
from supernet.ports import check_group, check_positive, group_knobs
from supernet.specs import (
    MB3D,
    Block,
    Entry,
    Flat,
    Head,
    Identity,
    Join,
    Layer,
    PatchStem,
    Unflat,
    ViT,
    check_width,
    in_group,
    knobs_of,
)

MOST_STAGES = 16
MOST_SIDE = 4096  # pixels of an image's side


@dataclass(frozen=True)
class Stage:
    """Blocks of one width. `stride` is the reduction on entering, by `entry`: a stem for the first stage, an embedding for
    the others (None: `Stem`, `Embedding`). Its widths and its stride follow from where it stands: what it says of them is not
    kept."""

    width: int
    stride: int
    blocks: tuple[Block, ...]
    entry: Entry | None = None

    def __post_init__(self) -> None:
        check_width(self.width)
        object.__setattr__(self, "blocks", tuple(self.blocks))  # lists, as YAML has them, have no hash
        object.__setattr__(self, "entry", unplaced(self.entry))
        begun = False
        for block in self.blocks:
            if block.dim != self.width:
                raise InputError(f"a block of dim {block.dim} stands in a stage of width {self.width}")
            if begun and not block.tokens and not isinstance(block, Identity):
                raise InputError(f"token blocks must be the last of their stage, but {block.kind} follows one")
            begun = begun or block.tokens
            if isinstance(block, ViT) != isinstance(self.entry, PatchStem) and not isinstance(block, Identity):
                raise InputError(
                    f"vit blocks stand in a stage that patch_stem enters, and no others do, but this stage has {block.kind} "
                    f"after {self.entry.kind if self.entry else 'the default entry'}: change the stage's entry or its blocks"
                )


@dataclass(frozen=True)
class MultiplexSpec:
    """`n` images in one pass of the last stage's token blocks (ConcatPlexer, arXiv 2308.11199; supernet.blocks.concatplexer).

    - `n`: images in a group, a power of two; 1 is the network without multiplexing
    - `reducer`: what leaves a n-th of each image's tokens, so that a group has about as many as one image had: a convolution,
      an average, or nothing
    - `start`: how many of the token blocks run for each image by itself, before the group is formed
    - `mixing`: whether images of a group attend to each other (`full`, the source's) or not (`block`, by a mask); `none` is the
      control: the same network with each image a sequence of its own, which gives the logits of `block`
    - `readout`: what an image's logits are read from: its own tokens (`slot`), or what all of the group share (`shared`: one
      class token, as the source draws it, or the mean of all tokens)
    """

    n: int
    reducer: str = "conv"
    start: int = 0
    mixing: str = "full"
    readout: str = "slot"

    def __post_init__(self) -> None:
        check_group(self)
        if type(self.start) is not int or self.start < 0:
            raise InputError(f"mux: start must be a whole number of at least 0, but is {self.start!r}")


def mux_from_entry(entry: object) -> MultiplexSpec:
    """Return what a YAML entry stands for: the number of images, or a mapping of `n` and the rest."""
    return MultiplexSpec(**checked_fields(MultiplexSpec, {"n": entry} if type(entry) is int else entry, "mux"))


@dataclass(frozen=True)
class ArchConfig:
    """A network: image size, classes, stages. Everything else (resolutions, Flat, Unflat, embeddings) is derived.

    `mux`: how many images share a pass of its token blocks, and how; None: each has its own."""

    name: str
    image_size: int
    num_classes: int
    stages: tuple[Stage, ...]
    head: str = "layer_norm"
    mux: MultiplexSpec | None = None

    def __post_init__(self) -> None:
        check_positive(self, "image_size", "num_classes")
        if self.image_size > MOST_SIDE:
            raise InputError(f"image_size must be at most {MOST_SIDE}, but is {self.image_size}")
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise InputError(f"network {self.name!r} has no stages")
        if len(self.stages) > MOST_STAGES:
            raise InputError(f"a network has {MOST_STAGES} stages at most, but {self.name!r} has {len(self.stages)}")
        for number, stage in enumerate(self.stages):
            placed_entry(stage.entry, stage.width, self.stages[number - 1].width if number else None, stage.stride)
        Head(self.stages[-1].width, self.num_classes, form=self.head)
        in_class_tokens = isinstance(self.stages[0].entry, PatchStem)
        if in_class_tokens and len(self.stages) > 1:
            raise InputError(
                f"a network that begins with patch_stem has one stage, as its tokens make no map, but {self.name} has "
                f"{len(self.stages)}: put all of its vit blocks into the first"
            )
        if in_class_tokens != (self.head == "class_token"):
            raise InputError(
                f"the head class_token goes with the entry patch_stem, but {self.name} has the head {self.head} after "
                f"{self.stages[0].entry.kind if self.stages[0].entry else 'stem'}: change one of them"
            )
        self._check_mux()

    def _check_mux(self) -> None:
        if not self.multiplexes:
            return
        assert self.mux is not None
        blocks = [block for block in self.stages[-1].blocks if block.tokens]
        for block in blocks:
            if not isinstance(block, MB3D | ViT):
                raise InputError(f"mux groups images in mb3d and vit blocks, but {self.name} has {block.kind}")
        if self.mux.start >= len(blocks):
            raise InputError(
                f"mux needs a token block (mb3d, vit) after its start, but the last stage of {self.name} has {len(blocks)} and "
                f"start is {self.mux.start}"
            )
        if self.head not in ("layer_norm", "class_token"):
            raise InputError(f"mux reads out by the heads layer_norm and class_token, but {self.name} has the head {self.head}")

    @property
    def multiplexes(self) -> bool:
        """Whether several images share a pass: such a network has no latency of one image, only a throughput."""
        return self.group_size > 1

    @property
    def group_size(self) -> int:
        """How many images share a pass."""
        return self.mux.n if self.mux is not None else 1

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
        for at, (stage, resolution) in enumerate(zip(self.stages, self.resolutions, strict=True)):
            if in_tokens:
                layers.append((layer_name(at - 1, "unflat"), Layer(Unflat(width), entering)))
            entry = placed_entry(stage.entry, stage.width, width or None, stage.stride)
            layers.append((layer_name(at, "embedding"), Layer(entry, entering)))
            in_tokens = isinstance(entry, PatchStem)
            for slot, block in enumerate(stage.blocks):
                if isinstance(block, Identity):
                    continue
                if block.tokens and not in_tokens:
                    layers.append((layer_name(at, "flat"), Layer(Flat(stage.width), resolution)))
                    in_tokens = True
                layers.append((layer_name(at, "block", slot), Layer(block, resolution)))
            entering, width = resolution, stage.width
        layers.append(("head", Layer(Head(width, self.num_classes, in_tokens, self.head), entering)))
        return self._grouped(layers) if self.multiplexes else layers

    def _grouped(self, layers: list[tuple[str, Layer]]) -> list[tuple[str, Layer]]:
        """Return the layers with the last stage's token blocks from `mux.start` on, and the head, on groups of images."""
        assert self.mux is not None
        last = len(self.stages) - 1
        blocks = [at for at, (name, _) in enumerate(layers) if place_of(name)[:2] == (last, "block")]
        tokens = [at for at in blocks if layers[at][1].spec.tokens]  # type: ignore[union-attr]
        begin, (width, side) = tokens[self.mux.start], (self.stages[-1].width, self.resolutions[-1])
        join = Join(width, self.head == "class_token", **group_knobs(self.mux))
        grouped = [(name, Layer(in_group(layer.spec, self.mux), layer.resolution)) for name, layer in layers[begin:]]
        return [*layers[:begin], (layer_name(last, "join"), Layer(join, side)), *grouped]

    def layers(self) -> list[Layer]:
        """Return the network's layers in order; empty slots have none."""
        return [layer for _, layer in self.named_layers()]

    def without_mux(self) -> ArchConfig:
        """Return the same network with each image by itself."""
        return replace(self, mux=None)

    def to_yaml(self) -> str:
        document = {
            "name": self.name,
            "image_size": self.image_size,
            "num_classes": self.num_classes,
            **({"head": self.head} if self.head != "layer_norm" else {}),
            **({"mux": knobs_of(self.mux)} if self.mux is not None else {}),
            "stages": [
                {
                    "width": s.width,
                    "stride": s.stride,
                    **({"entry": entry_entry(s.entry)} if s.entry else {}),
                    "blocks": [block_entry(b) for b in s.blocks],
                }
                for s in self.stages
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
        content = read_yaml(path, "the network file", "give the path of a network's YAML file")
        return cls.from_dict(content, f"the network file {path}")

    @classmethod
    def from_dict(cls, document: dict[str, Any], where: str) -> ArchConfig:
        """Return the network of a file's content, fields by name; `where` names the place in errors.

        Raises:
            InputError: a field is unknown, missing or not allowed.
        """
        given = checked_fields(cls, document, where)
        with placed(where):
            stages = []
            for number, entry in enumerate(checked_list(given["stages"], "stages"), 1):
                with placed(f"stage {number}"):
                    stage = checked_fields(Stage, entry, f"stage {number}")
                    check_width(stage["width"])
                    if "entry" in stage:
                        stage["entry"] = entry_from_entry(stage["entry"], first=number == 1)
                    blocks = checked_list(stage["blocks"], "blocks", empty=True)
                    stage["blocks"] = tuple(block_from_entry(block, stage["width"]) for block in blocks)
                    stages.append(Stage(**stage))
            given["stages"] = tuple(stages)
            if given.get("mux") is not None:
                given["mux"] = mux_from_entry(given["mux"])
            return cls(**given)


class Place(NamedTuple):
    """Where a layer stands: its stage (None: the head's), its part of it, and the slot of a block; counted from 0."""

    stage: int | None
    part: str
    slot: int | None = None


def layer_name(stage: int, part: str, slot: int | None = None) -> str:
    """Return the name of a stage's `embedding` (the first one's is the stem), `flat`, `block` of a slot, `join` or `unflat`."""
    if not stage and part == "embedding":
        return "stem"
    return f"stage{stage + 1}_{part}{'' if slot is None else slot + 1}"


def place_of(name: str) -> Place:
    """Return what a layer's name says, the inverse of `layer_name`; the head, and what is no layer's name, has no stage."""
    if name == "stem":
        return Place(0, name)
    found = re.fullmatch(r"stage(\d+)_(embedding|flat|block|join|unflat)(\d*)", name)
    return Place(int(found[1]) - 1, found[2], int(found[3]) - 1 if found[3] else None) if found else Place(None, name)


def stage_resolutions(image_size: int, strides: Sequence[int]) -> tuple[int, ...]:
    """Return the side of each stage's map: every stride-2 convolution takes n to ceil(n / 2)."""
    sides = []
    for stride in strides:
        image_size = -(-image_size // stride)
        sides.append(image_size)
    return tuple(sides)
