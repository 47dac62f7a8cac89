"""What passes between layers: its form and shape, and how images share it. No torch."""

from __future__ import annotations

from math import isqrt
from typing import Any, Literal, NamedTuple

from supernet.errors import InputError, unknown

LARGEST = 2**20  # of any size or number of a network: more is a slip, and would be computed with for hours

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


def group_knobs(given: Any) -> dict[str, Any]:
    """Return how images are grouped, of a Group, a MultiplexSpec or a spec, as keyword arguments of a spec."""
    return {name: getattr(given, name) for name in GROUP_KNOBS}
