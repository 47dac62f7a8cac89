"""What a network is: specs, Stage, ArchConfig, and their YAML form. No torch.

A spec is three things at once: an entry of an ArchConfig, the argument (with the resolution) of the module that
realises it, and, with the resolution, the key of its row in a latency table.

Resolutions are the side in pixels of the square map that *enters* a layer.

A block of a user's own is a frozen dataclass with `dim` and its knobs, and a method `module(resolution)` that returns its
torch module. In YAML its kind is the file and the class: `my_blocks.py:GhostBlock`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeGuard

import yaml

from supernet.errors import InputError, unknown
from supernet.files import checked_fields, read_yaml, write_atomically

WIDTH_STEP = 8  # the finest grid of the published networks (EfficientFormerV2: 40, 120)
ACTIVATIONS = ("relu", "gelu", "hardswish")

Form = Literal["image", "map", "tokens", "class_tokens", "logits"]
"""What passes between layers: images (N, 3, S, S), maps (N, C, S, S), tokens (N, S * S, C), tokens after a class token
(N, 1 + S * S, C), logits (N, classes)."""


class Port(NamedTuple):
    """What enters or leaves a layer: its form, its channels, and the side of its map."""

    form: Form
    dim: int
    side: int


def _positive(spec: object, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if type(value) is not int or value < 1:
            raise InputError(f"{type(spec).__name__}: {name} must be a whole number of at least 1, but is {value!r}")


def _known_activation(spec: Any) -> None:
    if spec.act not in ACTIVATIONS:
        raise unknown(f"{type(spec).__name__} activation", str(spec.act), ACTIVATIONS)


@dataclass(frozen=True)
class MB4D:
    """Pool block on maps (EfficientFormer, Meta4D): `x + ls1 * (pool(x) - x)`, then a convolutional MLP."""

    kind: ClassVar[str] = "mb4d"
    tokens: ClassVar[bool] = False
    dim: int
    mlp_ratio: int = 4
    pool_size: int = 3
    act: str = "gelu"

    def __post_init__(self) -> None:
        _known_activation(self)
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
    act: str = "gelu"

    def __post_init__(self) -> None:
        _known_activation(self)
        _positive(self, "dim", "mlp_ratio", "num_heads", "key_dim", "attn_ratio")


@dataclass(frozen=True)
class FFN:
    """Feed-forward block on maps (EfficientFormerV2): `x + ls2 * mlp(x)`; the MLP has a 3x3 depthwise convolution inside."""

    kind: ClassVar[str] = "ffn"
    tokens: ClassVar[bool] = False
    dim: int
    mlp_ratio: int = 4
    act: str = "gelu"

    def __post_init__(self) -> None:
        _known_activation(self)
        _positive(self, "dim", "mlp_ratio")


@dataclass(frozen=True)
class AttnFFN:
    """Attention block on maps (EfficientFormerV2): attention with talking heads and local values, then the MLP of FFN.

    With `stride` 2 the attention is computed on a map of half the side, which must be even, and brought back to the whole.
    """

    kind: ClassVar[str] = "attn_ffn"
    tokens: ClassVar[bool] = False
    dim: int
    mlp_ratio: int = 4
    num_heads: int = 8
    key_dim: int = 32
    attn_ratio: int = 4
    stride: int = 1
    act: str = "gelu"

    def __post_init__(self) -> None:
        _known_activation(self)
        _positive(self, "dim", "mlp_ratio", "num_heads", "key_dim", "attn_ratio")
        if self.stride not in (1, 2):
            raise InputError(f"AttnFFN: the attention's stride must be 1 or 2, but is {self.stride!r}")

    def takes(self, side: int) -> bool:
        """Whether the block can stand on a map of this side in pixels."""
        return side % self.stride == 0


@dataclass(frozen=True)
class Sandwich:
    """EfficientViT's block on maps: cascaded group attention in windows, before and after it a depthwise convolution and
    an MLP, each of the five on a residual branch of its own.

    Head i sees the i-th chunk of the channels plus what head i - 1 gave, and q goes through a depthwise convolution of
    `q_kernels[i]`; entries past `num_heads` are unused. Maps larger than `window` are padded to a multiple of it.
    """

    kind: ClassVar[str] = "sandwich"
    tokens: ClassVar[bool] = False
    dim: int
    num_heads: int = 4
    key_dim: int = 16
    q_kernels: tuple[int, ...] = (5, 5, 5, 5)
    window: int = 7
    ffn_ratio: int = 2
    act: str = "relu"

    def __post_init__(self) -> None:
        _known_activation(self)
        _positive(self, "dim", "num_heads", "key_dim", "window", "ffn_ratio")
        if self.dim % self.num_heads:
            raise InputError(f"Sandwich: dim must be a multiple of num_heads, but {self.dim} is none of {self.num_heads}")
        kernels = self.q_kernels
        if not isinstance(kernels, tuple) or not all(type(k) is int and k > 0 and k % 2 for k in kernels):
            raise InputError(f"Sandwich: q_kernels must be a list of odd whole numbers, but is {kernels!r}")
        if len(kernels) < self.num_heads:
            raise InputError(f"Sandwich: q_kernels must have one entry for each of {self.num_heads} heads, but is {kernels!r}")


@dataclass(frozen=True)
class ViT:
    """Transformer block on tokens (ViT, DeiT): pre-norm attention without a bias of its own, then an MLP."""

    kind: ClassVar[str] = "vit"
    tokens: ClassVar[bool] = True
    dim: int
    num_heads: int = 12
    mlp_ratio: int = 4
    act: str = "gelu"

    def __post_init__(self) -> None:
        _known_activation(self)
        _positive(self, "dim", "num_heads", "mlp_ratio")
        if self.dim % self.num_heads:
            raise InputError(f"ViT: dim must be a multiple of num_heads, but {self.dim} is none of {self.num_heads}")


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
    act: str = "relu"

    def __post_init__(self) -> None:
        _positive(self, "dim")
        _known_activation(self)
        if self.stride not in (1, 2, 4):
            raise InputError(f"the first stage's stride must be 1, 2 or 4, but is {self.stride!r}")


@dataclass(frozen=True)
class ConvStem:
    """log2(stride) 3x3 convolutions of stride 2 from the image to `dim` channels, each twice as wide as the one before
    (EfficientViT: four)."""

    kind: ClassVar[str] = "conv_stem"
    dim: int
    stride: int = 16
    act: str = "relu"

    def __post_init__(self) -> None:
        _positive(self, "dim")
        _known_activation(self)
        if self.stride not in (2, 4, 8, 16):
            raise InputError(f"the stride of a conv_stem must be 2, 4, 8 or 16, but is {self.stride!r}")
        if self.dim % (self.stride // 2):
            raise InputError(
                f"the dim of a conv_stem of stride {self.stride} must be a multiple of {self.stride // 2}, but is {self.dim}"
            )


@dataclass(frozen=True)
class PatchStem:
    """The image as tokens: patches of `stride` pixels projected to `dim` channels, after a class token, with a learned
    position each (ViT). Only `vit` blocks and the head `class_token` take what it leaves."""

    kind: ClassVar[str] = "patch_stem"
    dim: int
    stride: int = 16

    def __post_init__(self) -> None:
        _positive(self, "dim", "stride")


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
class AttnEmbedding:
    """Attention that halves the map, plus a 3x3 convolution with batch norm, between two stages (EfficientFormerV2)."""

    kind: ClassVar[str] = "attn_embedding"
    dim: int
    dim_in: int
    stride: int = 2
    num_heads: int = 8
    key_dim: int = 16
    attn_ratio: int = 4
    act: str = "gelu"

    def __post_init__(self) -> None:
        _known_activation(self)
        _positive(self, "dim", "dim_in", "num_heads", "key_dim", "attn_ratio")
        if self.stride != 2:
            raise InputError(f"a stage that attn_embedding enters has stride 2, but its stride is {self.stride!r}")


@dataclass(frozen=True)
class Subsample:
    """EfficientViT's way to the next stage: depthwise convolution and MLP at the old width, an inverted bottleneck with
    squeeze-and-excitation that reduces the map, depthwise convolution and MLP at the new width."""

    kind: ClassVar[str] = "subsample"
    dim: int
    dim_in: int
    stride: int = 2
    act: str = "relu"

    def __post_init__(self) -> None:
        _positive(self, "dim", "dim_in")
        _known_activation(self)
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
    """From what enters (a map, or tokens) to logits, by one linear classifier. `form` says what stands before it:

    - `layer_norm`: layer norm, mean over positions (EfficientFormer)
    - `batch_norm`: batch norm, mean over positions (EfficientFormerV2)
    - `mean_batch_norm`: mean over positions, batch norm (EfficientViT)
    - `class_token`: layer norm, the class token (ViT)
    """

    kind: ClassVar[str] = "head"
    dim: int
    num_classes: int = 1000
    tokens: bool = False
    form: str = "layer_norm"

    def __post_init__(self) -> None:
        _positive(self, "dim", "num_classes")
        if self.form not in HEADS:
            raise unknown("head", str(self.form), HEADS)


HEADS = ("layer_norm", "batch_norm", "mean_batch_norm", "class_token")


class UserBlock(Protocol):
    """A block of a user's own: a frozen dataclass with `dim` and its knobs."""

    kind: ClassVar[str]
    tokens: ClassVar[bool]

    @property
    def dim(self) -> int: ...

    def module(self, resolution: int) -> Any:
        """Return the torch module for maps (N, dim, resolution, resolution), or tokens, to the same shape."""
        ...


Block = MB4D | MB3D | FFN | AttnFFN | Sandwich | ViT | Identity | UserBlock
StageStem = Stem | ConvStem | PatchStem
"""What takes an image to the first stage's map, or to its tokens."""
StageEmbedding = Embedding | AttnEmbedding | Subsample
"""What takes a stage's map to the next stage's."""
Entry = StageStem | StageEmbedding
Spec = Block | Entry | Flat | Unflat | Head

BLOCKS: dict[str, type[Any]] = {
    "mb4d": MB4D,
    "mb3d": MB3D,
    "ffn": FFN,
    "attn_ffn": AttnFFN,
    "sandwich": Sandwich,
    "vit": ViT,
    "identity": Identity,
}
STEMS: dict[str, type[Any]] = {"stem": Stem, "conv_stem": ConvStem, "patch_stem": PatchStem}
EMBEDDINGS: dict[str, type[Any]] = {"embedding": Embedding, "attn_embedding": AttnEmbedding, "subsample": Subsample}
SPECS: dict[str, type[Any]] = {**BLOCKS, **STEMS, **EMBEDDINGS, "flat": Flat, "unflat": Unflat, "head": Head}


def is_block(spec: object) -> bool:
    return not (is_stem(spec) or is_embedding(spec) or isinstance(spec, Flat | Unflat | Head))


def is_stem(spec: object) -> TypeGuard[StageStem]:
    return type(spec) in STEMS.values()


def is_embedding(spec: object) -> TypeGuard[StageEmbedding]:
    return type(spec) in EMBEDDINGS.values()


def knobs_of(spec: Any) -> dict[str, Any]:
    """Return a spec's fields that have no default or are not at it."""
    values = {f.name: (getattr(spec, f.name), f.default) for f in fields(spec)}
    return {name: value for name, (value, default) in values.items() if default is MISSING or value != default}


def at_width(block: Block, width: int) -> Block:
    """Return the same block of another width.

    Raises:
        InputError: it cannot have this width.
    """
    return replace(block, dim=width)  # type: ignore[type-var]


def label(block: Spec) -> str:
    """Return a spec's kind with the knobs that are not at their default, without its width: `mb4d(act=relu)`."""
    knobs = ", ".join(f"{name}={_text(value)}" for name, value in knobs_of(block).items() if name != "dim")
    return f"{block.kind}({knobs})" if knobs else block.kind


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


class Layer(NamedTuple):
    """A spec at a resolution: one module of a network, one row of a latency table."""

    spec: Spec
    resolution: int

    def __str__(self) -> str:
        knobs = ", ".join(f"{name}={_text(value)}" for name, value in knobs_of(self.spec).items())
        return f"{self.spec.kind}({knobs}) at {self.resolution} px"

    @property
    def entering(self) -> Port:
        spec, side = self
        match spec:
            case Unflat():
                return Port("tokens", spec.dim, side)
            case Flat():
                return Port("map", spec.dim, side)
        if is_stem(spec):
            return Port("image", 3, side)
        if is_embedding(spec):
            return Port("map", spec.dim_in, side)
        if isinstance(spec, ViT) or (isinstance(spec, Head) and spec.form == "class_token"):
            return Port("class_tokens", spec.dim, side)
        return Port("tokens" if spec.tokens else "map", spec.dim, side)  # type: ignore[union-attr]

    @property
    def leaving(self) -> Port:
        spec, side = self
        match spec:
            case Unflat():
                return Port("map", spec.dim, side)
            case Flat():
                return Port("tokens", spec.dim, side)
            case Head():
                return Port("logits", spec.num_classes, 1)
        if is_stem(spec) or is_embedding(spec):
            form: Form = "class_tokens" if isinstance(spec, PatchStem) else "map"
            return Port(form, spec.dim, -(-side // spec.stride))
        return self.entering


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


REDUCERS = ("conv", "avg", "none")
MIXINGS = ("full", "block", "none")
READOUTS = ("slot", "shared")


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
        _positive(self, "n")
        if self.n & (self.n - 1):
            raise InputError(f"mux: n must be a power of two (1, 2, 4, ...), but is {self.n}")
        if type(self.start) is not int or self.start < 0:
            raise InputError(f"mux: start must be a whole number of at least 0, but is {self.start!r}")
        for name, allowed in (("reducer", REDUCERS), ("mixing", MIXINGS), ("readout", READOUTS)):
            if getattr(self, name) not in allowed:
                raise unknown(f"mux {name}", str(getattr(self, name)), allowed)
        if self.readout == "shared" and self.mixing != "full":
            raise InputError(f"mux: the readout shared needs the mixing full, but the mixing is {self.mixing}: use slot")


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
        _positive(self, "image_size", "num_classes")
        if not self.stages:
            raise InputError(f"network {self.name!r} has no stages")
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
        return self.mux is not None and self.mux.n > 1

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
            if in_tokens:
                layers.append((f"stage{number - 1}_unflat", Layer(Unflat(width), entering)))
            entry = placed_entry(stage.entry, stage.width, width or None, stage.stride)
            layers.append(("stem" if number == 1 else f"stage{number}_embedding", Layer(entry, entering)))
            in_tokens = isinstance(entry, PatchStem)
            for slot, block in enumerate(stage.blocks, 1):
                if isinstance(block, Identity):
                    continue
                if block.tokens and not in_tokens:
                    layers.append((f"stage{number}_flat", Layer(Flat(stage.width), resolution)))
                    in_tokens = True
                layers.append((f"stage{number}_block{slot}", Layer(block, resolution)))
            entering, width = resolution, stage.width
        layers.append(("head", Layer(Head(width, self.num_classes, in_tokens, self.head), entering)))
        return layers

    def layers(self) -> list[Layer]:
        """Return the network's layers in order; empty slots have none.

        Raises:
            InputError: the network multiplexes, so its layers do not follow each other at one batch size.
        """
        self.refuse_mux("its layers are not timed one by one")
        return [layer for _, layer in self.named_layers()]

    def refuse_mux(self, why: str) -> None:
        """Refuse a network that multiplexes where each image must have its own pass."""
        if self.multiplexes:
            assert self.mux is not None
            raise InputError(
                f"{self.name} takes {self.mux.n} images in one pass (mux), which serves throughput alone: {why}; leave mux out "
                "of the network, or compare throughput as benchmarks/concatplexer.py does"
            )

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
                    if "entry" in stage:
                        stage["entry"] = entry_from_entry(stage["entry"], first=number == 1)
                    blocks = checked_list(stage["blocks"], "blocks", empty=True)
                    stage["blocks"] = tuple(block_from_entry(block, stage["width"]) for block in blocks)
                    stages.append(Stage(**stage))
            given["stages"] = tuple(stages)
            if given.get("mux") is not None:
                given["mux"] = MultiplexSpec(**checked_fields(MultiplexSpec, given["mux"], "mux"))
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


def placed_entry(entry: Entry | None, width: int, width_in: int | None, stride: int) -> Entry:
    """Return a stage's entry with the widths and the stride of where it stands. `width_in`: None for the first stage."""
    if width_in is None:
        if entry is not None and not is_stem(entry):
            raise InputError(f"the first stage is entered by one of {', '.join(STEMS)}, but its entry is {entry.kind}")
        return replace(entry or Stem(width), dim=width, stride=stride)
    if entry is not None and not is_embedding(entry):
        raise InputError(f"a stage after the first is entered by one of {', '.join(EMBEDDINGS)}, but its entry is {entry.kind}")
    return replace(entry or Embedding(width, width_in), dim=width, dim_in=width_in, stride=stride)


def unplaced(entry: Entry | None) -> Entry | None:
    """Return a stage's entry without what follows from its place, so that the same entry is equal anywhere."""
    if entry is None:
        return None
    knobs = {name: value for name, value in knobs_of(entry).items() if name not in _OF_PLACE}
    places = {name: WIDTH_STEP for name in ("dim", "dim_in") if hasattr(entry, name)}
    found: Entry = type(entry)(**places, **knobs)  # type: ignore[arg-type]
    return found


def block_entry(block: Block) -> str | dict[str, Any]:
    """Return a block as it stands in a YAML file: its kind, with the knobs that are not at their default."""
    return _entry(block, ("dim",))


def entry_entry(entry: Entry) -> str | dict[str, Any]:
    """Return a stage's entry as it stands in a YAML file: its kind, with its own knobs that are not at their default."""
    return _entry(entry, _OF_PLACE)


def block_from_entry(entry: object, dim: int) -> Block:
    """Return the block of width `dim` that a YAML entry stands for: a kind, or a mapping of `kind` and knobs."""
    block: Block = _from_entry(entry, {"dim": dim}, BLOCKS, "block")
    return block


def entry_from_entry(entry: object, *, first: bool) -> Entry:
    """Return the stage's entry that a YAML entry stands for; its widths and stride are those of any place."""
    at: dict[str, int] = {"dim": WIDTH_STEP} if first else {"dim": WIDTH_STEP, "dim_in": WIDTH_STEP}
    found: Entry = _from_entry(entry, at, STEMS if first else EMBEDDINGS, "entry")
    return found


_OF_PLACE = ("dim", "dim_in", "stride")  # what follows from where a spec stands


def _entry(spec: Any, left_out: Sequence[str]) -> str | dict[str, Any]:
    knobs = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in knobs_of(spec).items()
        if name not in left_out
    }
    return {"kind": spec.kind, **knobs} if knobs else str(spec.kind)


def _from_entry(entry: object, at: dict[str, int], kinds: dict[str, type[Any]], what: str) -> Any:
    if isinstance(entry, str):
        entry = {"kind": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        raise InputError(f"a {what} must be a kind ({', '.join(kinds)}) or a mapping with one, but is {entry!r}")
    kind = entry["kind"]
    if kind not in kinds and not (what == "block" and ".py:" in kind):
        raise unknown(f"{what} kind", kind, kinds)
    spec_type = kinds[kind] if kind in kinds else user_block(kind)
    for name in _OF_PLACE:
        if name in entry and (name in at or what == "entry"):
            raise InputError(
                f"a {what}'s {name} is its stage's {'width' if name == 'dim' else name}: leave it out of {entry!r}"
            )
    knobs = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items() if name != "kind"}
    return spec_type(**checked_fields(spec_type, {**at, **knobs}, f"{what} {kind}"))


def spec_type_of(kind: str) -> type[Any]:
    """Return the spec type of a kind, the package's or a user's own whose file was run."""
    return SPECS[kind] if kind in SPECS else _users[kind]


_users: dict[str, type[Any]] = {}  # blocks from users' files that were run


def is_foreign(kind: str) -> bool:
    """Whether a kind is of a user's file that has not been run."""
    return ".py:" in kind and kind not in _users


def loaded_blocks() -> list[type[Any]]:
    """Return the users' own blocks whose files were run."""
    return list(_users.values())


def user_block(kind: str) -> type[Any]:
    """Return the class of a user's own block: `FILE.py:CLASS`, the file relative to the working folder. The file is run, once.

    Raises:
        InputError: there is no such file or class, or it is not a block.
    """
    if kind in _users:
        return _users[kind]
    path, _, name = kind.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"the block {kind!r} is to come from {path}, which is not there: give FILE.py:CLASS, from this folder")
    module_spec = spec_from_file_location(f"metapath_user_{Path(path).stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = module_from_spec(module_spec)
    # dataclasses look their own module up by name
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and is_dataclass(found) and callable(getattr(found, "module", None))):
        raise InputError(
            f"{name} of {path} is not a block: it must be a frozen dataclass with `dim`, and a method `module(resolution)`"
        )
    if "dim" not in {f.name for f in fields(found)}:
        raise InputError(f"the block {kind!r} lacks the field `dim`, its width")
    block_type: Any = found
    block_type.kind = kind
    if not hasattr(found, "tokens"):
        block_type.tokens = False
    _users[kind] = found
    return found
