"""What a layer is: its spec, and the spec at a resolution. No torch.

A spec is three things at once: an entry of an ArchConfig, the argument (with the resolution) of the module that
realises it, and, with the resolution, the key of its row in a latency table.

Resolutions are the side in pixels of the square map that *enters* a layer.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Protocol, TypeGuard

from supernet.errors import InputError, unknown
from supernet.ports import Form, Group, Port, check_group, check_positive, group_knobs
from supernet.user_block import loaded, users_code

WIDEST = 2**16  # channels
WIDTH_STEP = 8  # the finest grid of the published networks (EfficientFormerV2: 40, 120)
ACTIVATIONS = ("relu", "gelu", "hardswish")


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
        if isinstance(self.q_kernels, list):
            object.__setattr__(self, "q_kernels", tuple(self.q_kernels))
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
    return not (is_entry(spec) or isinstance(spec, Flat | Unflat | Head | Join))


def is_stem(spec: object) -> TypeGuard[StageStem]:
    return type(spec) in STEMS.values()


def is_embedding(spec: object) -> TypeGuard[StageEmbedding]:
    return type(spec) in EMBEDDINGS.values()


def is_entry(spec: object) -> TypeGuard[Entry]:
    return is_stem(spec) or is_embedding(spec)


def knobs_of(spec: Any) -> dict[str, Any]:
    """Return a spec's fields that have no default or are not at it."""
    values = {f.name: (getattr(spec, f.name), f.default) for f in fields(spec)}
    return {name: value for name, (value, default) in values.items() if default is MISSING or value != default}


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
    if block.kind in BLOCKS:
        return replace(block, dim=width)  # type: ignore[type-var]
    with users_code(block.kind, f"at width {width}"):
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
        if is_entry(spec):
            form: Form = "class_tokens" if isinstance(spec, PatchStem) else "map"
            return Port(form, spec.dim, -(-side // spec.stride))
        return self.entering


def check_width(width: object) -> None:
    if type(width) is not int or width < WIDTH_STEP or width % WIDTH_STEP:
        raise InputError(f"a width must be a positive multiple of {WIDTH_STEP}, but is {width!r}")
    if width > WIDEST:
        raise InputError(f"a width must be at most {WIDEST}, but is {width}")


def spec_type_of(kind: str) -> type[Any]:
    """Return the spec type of a kind, the package's or a user's own whose file was run."""
    return SPECS[kind] if kind in SPECS else loaded[kind]
