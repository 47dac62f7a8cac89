"""What a layer is: its spec, and the spec at a resolution. No torch.

A spec is three things at once: an entry of an ArchConfig, the argument (with the resolution) of the module that
realises it, and, with the resolution, the key of its row in a latency table.

Resolutions are the side in pixels of the square map that *enters* a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from math import isqrt
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeGuard

from supernet.errors import InputError, unknown
from supernet.files import checked_fields
from supernet.user_block import loaded, user_block, users_code

LARGEST = 2**20  # of any size or number of a network: more is a slip, and would be computed with for hours
WIDEST = 2**16  # channels
WIDTH_STEP = 8  # the finest grid of the published networks (EfficientFormerV2: 40, 120)
ACTIVATIONS = ("relu", "gelu", "hardswish")

Form = Literal["image", "map", "tokens", "class_tokens", "groups", "logits"]
"""What passes between layers: images (N, 3, S, S), maps (N, C, S, S), tokens (N, S * S, C), tokens after a class token
(N, 1 + S * S, C), groups of images' tokens (`Port.group`), logits (N, classes)."""


GROUP_KNOBS = ("n", "reducer", "mixing", "readout")
REDUCERS = ("conv", "avg", "none")
MIXINGS = ("full", "block", "none")
READOUTS = ("slot", "shared")


class Group(NamedTuple):
    """How `n` images share a sequence of tokens (ConcatPlexer); see MultiplexSpec."""

    n: int
    reducer: str
    mixing: str
    readout: str
    class_token: bool

    @property
    def images(self) -> int:
        """How many images a sequence has."""
        return 1 if self.mixing == "none" else self.n

    @property
    def window(self) -> tuple[int, int]:
        """Positions (rows, columns) of an image's map that become one token: n of them, or one."""
        if self.reducer == "none":
            return 1, 1
        rows = 1 << (isqrt(self.n).bit_length() - 1)  # 1, 1, 2, 2, 4 for n = 1, 2, 4, 8, 16
        return rows, self.n // rows

    def length(self, side: int) -> int:
        """Return the tokens of a sequence, of maps of this side. Windows that do not fit are filled up."""
        rows, columns = (-(-side // step) for step in self.window)
        own_class_token = self.class_token and self.readout == "slot"
        return self.images * (rows * columns + own_class_token) + (self.class_token and self.readout == "shared")


class Port(NamedTuple):
    """What enters or leaves a layer: its form, its channels, the side of its map, and how images share sequences."""

    form: Form
    dim: int
    side: int
    group: Group | None = None

    def shape(self, images: int) -> tuple[int, ...]:
        """Return the shape of what passes here for a number of images.

        Raises:
            InputError: the images are no whole number of groups.
        """
        match self:
            case Port("map" | "image"):
                return images, self.dim, self.side, self.side
            case Port("logits"):
                return images, self.dim
            case Port("groups", group=Group() as group):
                if images % group.n:
                    raise InputError(
                        f"a call of {images} is no whole number of groups of {group.n} images: take a device, or a table, of a "
                        f"batch of {group.n} or a multiple of it (its id ends in -b{group.n})"
                    )
                return images // group.images, group.length(self.side), self.dim
        return images, self.side**2 + (self.form == "class_tokens"), self.dim


def check_positive(spec: object, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if type(value) is not int or value < 1:
            raise InputError(f"{type(spec).__name__}: {name} must be a whole number of at least 1, but is {value!r}")
        if value > LARGEST:
            raise InputError(f"{type(spec).__name__}: {name} must be at most {LARGEST}, but is {value}")


def check_group(spec: Any) -> None:
    """Refuse a spec whose images cannot be grouped as it says."""
    check_positive(spec, "n")
    if spec.n & (spec.n - 1):
        raise InputError(f"mux: n must be a power of two (1, 2, 4, ...), but is {spec.n}")
    for name, allowed in (("reducer", REDUCERS), ("mixing", MIXINGS), ("readout", READOUTS)):
        if getattr(spec, name) not in allowed:
            raise unknown(f"mux {name}", str(getattr(spec, name)), allowed)
    if spec.readout == "shared" and spec.mixing != "full":
        raise InputError(f"mux: the readout shared needs the mixing full, but the mixing is {spec.mixing}: use slot")


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
        check_positive(self, "dim", "mlp_ratio", "pool_size")
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
        check_positive(self, "dim", "mlp_ratio", "num_heads", "key_dim", "attn_ratio")


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
        check_positive(self, "dim", "mlp_ratio")


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
        check_positive(self, "dim", "mlp_ratio", "num_heads", "key_dim", "attn_ratio")
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
        check_positive(self, "dim", "num_heads", "key_dim", "window", "ffn_ratio")
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
        check_positive(self, "dim", "num_heads", "mlp_ratio")
        if self.dim % self.num_heads:
            raise InputError(f"ViT: dim must be a multiple of num_heads, but {self.dim} is none of {self.num_heads}")


@dataclass(frozen=True)
class Identity:
    """An empty slot: its input is its output; it costs nothing and is left out of a built network."""

    kind: ClassVar[str] = "identity"
    tokens: ClassVar[bool] = False
    dim: int

    def __post_init__(self) -> None:
        check_positive(self, "dim")


@dataclass(frozen=True, kw_only=True)
class _InGroup:
    """The knobs of a layer that has the tokens of several images (ConcatPlexer), as in MultiplexSpec."""

    n: int
    reducer: str = "conv"
    mixing: str = "full"
    readout: str = "slot"

    @property
    def has_class_token(self) -> bool:
        """Whether there are class tokens among the tokens."""
        return False

    @property
    def group(self) -> Group:
        return Group(self.n, self.reducer, self.mixing, self.readout, self.has_class_token)


@dataclass(frozen=True)
class Join(_InGroup):
    """From each image's tokens to sequences of groups: reduction, segments, concatenation (ConcatPlexer)."""

    kind: ClassVar[str] = "join"
    dim: int
    class_token: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "dim")
        check_group(self)

    @property
    def has_class_token(self) -> bool:
        return self.class_token


@dataclass(frozen=True)
class GroupedMB3D(_InGroup, MB3D):
    """MB3D on sequences of groups."""

    kind: ClassVar[str] = "grouped_mb3d"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_group(self)


@dataclass(frozen=True)
class GroupedViT(_InGroup, ViT):
    """ViT's block on sequences of groups."""

    kind: ClassVar[str] = "grouped_vit"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_group(self)

    @property
    def has_class_token(self) -> bool:
        return True


@dataclass(frozen=True)
class Stem:
    """Two 3x3 convolutions from the image to `dim` channels; together they reduce the map by `stride` (1, 2 or 4)."""

    kind: ClassVar[str] = "stem"
    dim: int
    stride: int = 4
    act: str = "relu"

    def __post_init__(self) -> None:
        check_positive(self, "dim")
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
        check_positive(self, "dim")
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
        check_positive(self, "dim", "stride")


@dataclass(frozen=True)
class Embedding:
    """A 3x3 convolution with batch norm between two stages, from `dim_in` to `dim` channels."""

    kind: ClassVar[str] = "embedding"
    dim: int
    dim_in: int
    stride: int = 2

    def __post_init__(self) -> None:
        check_positive(self, "dim", "dim_in")
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
        check_positive(self, "dim", "dim_in", "num_heads", "key_dim", "attn_ratio")
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
        check_positive(self, "dim", "dim_in")
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
        check_positive(self, "dim", "num_classes")
        if self.form not in HEADS:
            raise unknown("head", str(self.form), HEADS)


HEADS = ("layer_norm", "batch_norm", "mean_batch_norm", "class_token")


@dataclass(frozen=True)
class GroupHead(_InGroup, Head):
    """From sequences of groups to the logits of each image: the norm of Head, a demultiplexer for each slot, the classifier."""

    kind: ClassVar[str] = "group_head"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_group(self)

    @property
    def has_class_token(self) -> bool:
        return self.form == "class_token"


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
Spec = Block | Entry | Flat | Unflat | Head | Join

EXPANSIONS = ("mlp_ratio", "ffn_ratio")
"""The knobs that say how many times `dim` the hidden channels of a block's FFN are; a block has one of them at most."""

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
GROUPED: dict[str, type[Any]] = {"join": Join, "grouped_mb3d": GroupedMB3D, "grouped_vit": GroupedViT, "group_head": GroupHead}
"""What a network that multiplexes has in the place of its last token blocks and its head; not in files, where `mux` says it."""
SPECS: dict[str, type[Any]] = {
    **BLOCKS,
    **STEMS,
    **EMBEDDINGS,
    **GROUPED,
    "flat": Flat,
    "unflat": Unflat,
    "head": Head,
}


def is_block(spec: object) -> bool:
    return not (is_stem(spec) or is_embedding(spec) or isinstance(spec, Flat | Unflat | Head | Join))


def is_stem(spec: object) -> TypeGuard[StageStem]:
    return type(spec) in STEMS.values()


def is_embedding(spec: object) -> TypeGuard[StageEmbedding]:
    return type(spec) in EMBEDDINGS.values()


def knobs_of(spec: Any) -> dict[str, Any]:
    """Return a spec's fields that have no default or are not at it."""
    values = {f.name: (getattr(spec, f.name), f.default) for f in fields(spec)}
    return {name: value for name, (value, default) in values.items() if default is MISSING or value != default}


def group_knobs(given: Any) -> dict[str, Any]:
    """Return how images are grouped, of a Group, a MultiplexSpec or a spec, as keyword arguments of a spec."""
    return {name: getattr(given, name) for name in GROUP_KNOBS}


def in_group(spec: Spec, group: Any) -> Spec:
    """Return a token block, or a head, for images that are grouped as a Group or MultiplexSpec says."""
    knobs = group_knobs(group)
    match spec:
        case MB3D():
            return GroupedMB3D(**vars(spec), **knobs)
        case ViT():
            return GroupedViT(**vars(spec), **knobs)
        case Head():
            return GroupHead(**vars(spec), **knobs)
    raise ValueError(f"{spec.kind} does not take groups of images")


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
            case Join():
                return Port("class_tokens" if spec.class_token else "tokens", spec.dim, side)
            case GroupedMB3D() | GroupedViT() | GroupHead():
                return Port("groups", spec.dim, side, spec.group)
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
            case Join():
                return Port("groups", spec.dim, side, spec.group)
            case Head():
                return Port("logits", spec.num_classes, 1)
        if is_stem(spec) or is_embedding(spec):
            form: Form = "class_tokens" if isinstance(spec, PatchStem) else "map"
            return Port(form, spec.dim, -(-side // spec.stride))
        return self.entering


def check_width(width: object) -> None:
    if type(width) is not int or width < WIDTH_STEP or width % WIDTH_STEP:
        raise InputError(f"a width must be a positive multiple of {WIDTH_STEP}, but is {width!r}")
    if width > WIDEST:
        raise InputError(f"a width must be at most {WIDEST}, but is {width}")


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
    given = checked_fields(spec_type, {**at, **knobs}, f"{what} {kind}")
    if kind in kinds:
        return spec_type(**given)
    with users_code(kind, "where it is made"):
        spec = spec_type(**given)
        hash(spec)  # a knob that is no list of values could not be the key of a table's row
        return spec


def spec_type_of(kind: str) -> type[Any]:
    """Return the spec type of a kind, the package's or a user's own whose file was run."""
    return SPECS[kind] if kind in SPECS else loaded[kind]
