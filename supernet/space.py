"""Which networks a search may choose from: SearchSpace and the named spaces. No torch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from supernet.arch import ArchConfig, MultiplexSpec, Stage, mux_from_entry, stage_resolutions
from supernet.entries import block_entry, block_from_entry, entry_entry, entry_from_entry, placed_entry, unplaced
from supernet.errors import InputError, placed, unknown
from supernet.files import checked_fields, checked_list, is_path, read_yaml, write_atomically
from supernet.specs import (
    EXPANSIONS,
    MB4D,
    WIDTH_STEP,
    AttnFFN,
    Block,
    Entry,
    Identity,
    Layer,
    PatchStem,
    ViT,
    at_width,
    check_width,
    knobs_of,
    label,
)
from supernet.user_block import file_digests, users_code

_FOLDER = Path(__file__).parent / "spaces"
MOST_WIDTHS = 256  # of a stage
DEEPEST = 256  # slots of a stage
MIN_MAP = 4  # below 4x4 a pool mixer is zero and a softmax is over one token: nothing can be chosen


@dataclass(frozen=True)
class StageSpace:
    """The choices of one stage: its widths, ascending, and for each of its `depth` slots the same candidates.

    The candidates are held at the largest width. They differ in kind or knobs; `identity` is among them. `entry` is how the
    stage is entered, as in `Stage`.
    """

    widths: tuple[int, ...]
    stride: int
    depth: int
    candidates: tuple[Block, ...]
    entry: Entry | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # lists, as YAML has them, equal no tuples
        object.__setattr__(self, "candidates", tuple(self.candidates))
        object.__setattr__(self, "entry", unplaced(self.entry))
        if not self.widths:
            raise InputError("a stage must have at least one width")
        if len(self.widths) > MOST_WIDTHS:
            raise InputError(f"a stage has {MOST_WIDTHS} widths at most, but there are {len(self.widths)}")
        for width in self.widths:
            check_width(width)
        if list(self.widths) != sorted(set(self.widths)):
            raise InputError(f"widths must ascend without repeats, but are {list(self.widths)}")
        if type(self.depth) is not int or self.depth < 1:
            raise InputError(f"depth must be a whole number of at least 1, but is {self.depth!r}")
        if self.depth > DEEPEST:
            raise InputError(f"depth must be at most {DEEPEST}, but is {self.depth}")
        kinds = self.kinds
        if len(set(kinds)) != len(kinds) or "identity" not in kinds or len(kinds) < 2:
            raise InputError(f"candidates must be identity and at least one other kind, each once, but are {list(kinds)}")
        if len(self.widths) > 1 and any(isinstance(candidate, ViT) for candidate in self.candidates):
            # the leading rows of its qkv are no narrower block's: they are another division into heads
            raise InputError(f"a stage with vit blocks has one width, but has {len(self.widths)}: give one")
        for width in self.widths:
            for candidate in self.candidates:
                at_width(candidate, width)  # a spec refuses a width that it cannot have

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """What each candidate is called: its kind; where several share it, with the knobs that are not at their default."""
        kinds = [candidate.kind for candidate in self.candidates]
        return tuple(c.kind if kinds.count(c.kind) == 1 else label(c) for c in self.candidates)

    def kind_of(self, block: Block) -> str:
        """Return what the candidate that a block is of is called here."""
        # The label first: a candidate with all its knobs at their defaults is called by its kind alone.
        return label(block) if label(block) in self.kinds else block.kind

    def candidate(self, kind: str, width: int) -> Block:
        """Return the candidate of this kind at this width."""
        return at_width(self.candidates[self.kinds.index(kind)], width)

    def stage(self, width: int, kinds: Sequence[str]) -> Stage:
        """Return the stage with these kinds in its slots, its token blocks moved behind its other blocks."""
        blocks = tuple(self.candidate(kind, width) for kind in self._tokens_last(kinds))
        return Stage(width, self.stride, blocks, self.entry)

    def _tokens_last(self, kinds: Sequence[str]) -> list[str]:
        is_token = {kind: candidate.tokens for kind, candidate in zip(self.kinds, self.candidates, strict=True)}
        filled = iter(sorted((k for k in kinds if k != "identity"), key=lambda kind: is_token[kind]))
        return [kind if kind == "identity" else next(filled) for kind in kinds]


@dataclass(frozen=True)
class SearchSpace:
    """All networks with one of these widths and one of these candidates per slot, for each stage.

    `mux`: the ways in which images may share a pass, beside each by itself; a choice where throughput is what counts.
    """

    name: str
    image_size: int
    num_classes: int
    stages: tuple[StageSpace, ...]
    head: str = "layer_norm"
    mux: tuple[MultiplexSpec, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "mux", tuple(self.mux))
        if not self.stages:
            raise InputError(f"space {self.name!r} has no stages")
        _ = self.largest  # an ArchConfig checks image size, classes and strides
        if len(set(self.mux)) < len(self.mux):
            raise InputError(f"mux: each way of grouping images stands once, but {self.name} repeats one")
        for mux in self.mux:
            if mux.n == 1:
                raise InputError("mux: each image by itself (n = 1) is always a choice: leave it out")
            if mux.mixing == "none":
                raise InputError("mux: the mixing none is the control of every way, and no choice: leave it out")
            if not any(self.multiplexed(arch, mux).multiplexes for arch in self._covering()):
                raise InputError(
                    f"mux groups images in the token blocks (mb3d, vit) of the last stage from the one after start "
                    f"{mux.start} on, but no network of {self.name} has as many: give a smaller start, or leave mux out"
                )

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(stage.stride for stage in self.stages)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The side of each stage's map in pixels."""
        return stage_resolutions(self.image_size, self.strides)

    @property
    def slots(self) -> list[tuple[int, int]]:
        """(stage, slot) of every slot, both counted from 0, in the order of a path."""
        return [(i, j) for i, stage in enumerate(self.stages) for j in range(stage.depth)]

    def at(self, image_size: int) -> SearchSpace:
        """Return the same space for square images of `image_size` pixels."""
        return replace(self, image_size=image_size)

    def with_classes(self, num_classes: int) -> SearchSpace:
        """Return the same space with another number of classes."""
        return replace(self, num_classes=num_classes)

    def check_searchable(self) -> None:
        """Refuse an image size at which the last stage's map is under 4x4, or a candidate cannot stand on its stage's map."""
        last = self.resolutions[-1]
        if last < MIN_MAP:
            raise InputError(
                f"space {self.name} at {self.image_size} px has a last map of {last}x{last}, "
                f"on which blocks cannot be told apart: it takes images of at least {self.smallest_image_size()} px"
            )
        if isinstance(self.stages[0].entry, PatchStem) and self.image_size % self.strides[0]:
            raise InputError(
                f"space {self.name} takes images of a multiple of {self.strides[0]} px, the side of a patch, not of "
                f"{self.image_size} px: the next size that it takes is {self.smallest_image_size(self.image_size)} px"
            )
        if not self._takes(self.image_size):
            raise InputError(
                f"space {self.name} at {self.image_size} px has maps of an odd side where attention has stride 2: the next "
                f"size that it takes is {self.smallest_image_size(self.image_size)} px"
            )

    def smallest_image_size(self, at_least: int = 1) -> int:
        """The least image size in pixels, from `at_least` on, that `check_searchable` does not refuse."""
        return next(size for size in itertools.count(at_least) if self._takes(size))

    def _takes(self, image_size: int) -> bool:
        if isinstance(self.stages[0].entry, PatchStem) and image_size % self.strides[0]:
            return False
        sides = stage_resolutions(image_size, self.strides)
        halving = [
            (c, side) for s, side in zip(self.stages, sides, strict=True) for c in s.candidates if isinstance(c, AttnFFN)
        ]
        return sides[-1] >= MIN_MAP and all(candidate.takes(side) for candidate, side in halving)

    def arch(self, widths: Sequence[int], kinds: Sequence[Sequence[str]], name: str | None = None) -> ArchConfig:
        """Return the network with these widths and, stage by stage, these kinds in its slots."""
        stages = tuple(s.stage(w, k) for s, w, k in zip(self.stages, widths, kinds, strict=True))
        return ArchConfig(name or self.name, self.image_size, self.num_classes, stages, self.head)

    def multiplexed(self, arch: ArchConfig, mux: MultiplexSpec | None) -> ArchConfig:
        """Return the network with its images grouped by `mux`, or by themselves where it has too few token blocks for it."""
        tokens = sum(block.tokens for block in arch.stages[-1].blocks)
        return replace(arch, mux=mux if mux is not None and tokens > mux.start else None)

    @property
    def largest(self) -> ArchConfig:
        """Every stage at its largest width, every slot at its first candidate that is not identity."""
        kinds = [[next(k for k in s.kinds if k != "identity")] * s.depth for s in self.stages]
        return self.arch([s.widths[-1] for s in self.stages], kinds, f"{self.name}-largest")

    @property
    def smallest(self) -> ArchConfig:
        """Every stage at its smallest width, every slot empty."""
        kinds = [["identity"] * s.depth for s in self.stages]
        return self.arch([s.widths[0] for s in self.stages], kinds, f"{self.name}-smallest")

    def block_files(self) -> dict[str, str]:
        """Return the files of users' own blocks among the candidates, with a digest of what each held when it was run."""
        return file_digests(candidate.kind for stage in self.stages for candidate in stage.candidates)

    def sample(self, rng: random.Random) -> ArchConfig:
        """Return a random network: each width uniform, then each slot uniform over its candidates; each image by itself."""
        return self.arch(*self.draw(rng))

    def draw(self, rng: random.Random) -> tuple[list[int], list[list[str]]]:
        """Return the widths and the kinds of what `sample` would return, which take a tenth of the time of a network."""
        widths = [rng.choice(s.widths) for s in self.stages]
        return widths, [[rng.choice(s.kinds) for _ in range(s.depth)] for s in self.stages]

    def fit(self, arch: ArchConfig) -> ArchConfig:
        """Return `arch` as a member of this space, its stages padded with empty slots.

        Image size and number of classes may differ from the space's and are kept.

        Raises:
            InputError: a stage, width, depth or block of `arch` is not in the space.
        """
        if arch.strides != self.strides:
            raise InputError(f"{arch.name} has strides {arch.strides}, space {self.name} has {self.strides}")
        if arch.head != self.head:
            raise InputError(f"{arch.name} has the head {arch.head}, space {self.name} has {self.head}")
        if arch.multiplexes and arch.mux not in self.mux:
            raise InputError(f"{arch.name} groups its images by {arch.mux}, which space {self.name} does not")
        stages = []
        for number, (stage, choices) in enumerate(zip(arch.stages, self.stages, strict=True), 1):
            if stage.entry != choices.entry:
                raise InputError(f"stage {number} of {arch.name} is entered by {stage.entry}, not by {choices.entry}")
            if stage.width not in choices.widths:
                raise InputError(f"stage {number} of {arch.name} has width {stage.width}, not one of {choices.widths}")
            allowed = {choices.candidate(kind, stage.width) for kind in choices.kinds}
            for block in stage.blocks:
                if block not in allowed:
                    raise InputError(f"stage {number} of {arch.name} has {block}, not a candidate of {self.name}")
            blocks = stage.blocks
            if len(blocks) > choices.depth:
                blocks = tuple(b for b in blocks if not isinstance(b, Identity))
            if len(blocks) > choices.depth:
                raise InputError(f"stage {number} of {arch.name} has {len(blocks)} blocks, not {choices.depth} at most")
            padding = (Identity(stage.width),) * (choices.depth - len(blocks))
            stages.append(replace(stage, blocks=blocks + padding))
        return replace(arch, stages=tuple(stages))

    def __contains__(self, arch: ArchConfig) -> bool:
        try:
            self.fit(arch)
        except InputError:
            return False
        return True

    def path(self, arch: ArchConfig) -> tuple[int, ...]:
        """Return, for every slot, the index of the candidate that `arch` has there."""
        member = self.fit(arch)
        return tuple(
            choices.kinds.index(choices.kind_of(block))
            for stage, choices in zip(member.stages, self.stages, strict=True)
            for block in stage.blocks
        )

    def layers(self) -> list[Layer]:
        """Return every layer that some member has, each once: the rows that a latency table of the space holds."""
        found: dict[Layer, None] = {}
        for arch, mux in itertools.product(self._covering(), (None, *self.mux)):
            found.update(dict.fromkeys(self.multiplexed(arch, mux).layers()))
        return list(found)

    def _covering(self) -> list[ArchConfig]:
        """Members that have every layer of the space between them: all pairs of adjacent widths, all candidates."""
        members = []
        for at, stage in enumerate(self.stages):
            before = self.stages[at - 1] if at else stage
            for width_in, width in itertools.product(before.widths, stage.widths):
                if not at and width_in != width:
                    continue
                widths = [s.widths[-1] for s in self.stages]
                widths[at - 1 if at else at] = width_in
                widths[at] = width
                for kind in stage.kinds:
                    kinds = [["identity"] * s.depth for s in self.stages]
                    kinds[at] = [kind] * stage.depth
                    members.append(self.arch(widths, kinds))
        return members

    def to_yaml(self) -> str:
        document = {
            "name": self.name,
            "image_size": self.image_size,
            "num_classes": self.num_classes,
            **({"head": self.head} if self.head != "layer_norm" else {}),
            **({"mux": [knobs_of(mux) for mux in self.mux]} if self.mux else {}),
            "stages": [
                {
                    "stride": s.stride,
                    **({"entry": entry_entry(s.entry)} if s.entry else {}),
                    "widths": list(s.widths),
                    "depth": s.depth,
                    "candidates": [block_entry(candidate) for candidate in s.candidates],
                }
                for s in self.stages
            ],
        }
        return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=120)

    def save(self, path: str | Path) -> None:
        """Write the space as YAML; the file is whole or absent."""
        write_atomically(path, self.to_yaml())

    @classmethod
    def load(cls, name_or_path: str | Path) -> SearchSpace:
        """Return a named space, or read one from a YAML file.

        Raises:
            InputError: no such space or file, or a field is unknown, missing, of another type, or not allowed.
        """
        text = str(name_or_path)
        if text in space_names():
            path = _FOLDER / f"{text}.yaml"
        elif is_path(text):
            path = Path(text)
        else:
            raise unknown("space", text, [*space_names(), "a YAML file"])
        do = f"give the path of a space's YAML file, or one of {', '.join(space_names())}"
        content = read_yaml(path, "the space file", do)
        return cls.from_dict(content, f"the space file {path}")

    @classmethod
    def from_dict(cls, document: dict[str, Any], where: str) -> SearchSpace:
        """Return the space of a file's content, fields by name; `where` names the place in errors.

        Raises:
            InputError: a field is unknown, missing or not allowed.
        """
        given = checked_fields(cls, document, where)
        with placed(where):
            stages = []
            for number, entry in enumerate(checked_list(given["stages"], "stages"), 1):
                with placed(f"stage {number}"):
                    activations = None
                    if isinstance(entry, dict):  # the caller's document stays as it is
                        activations = entry.get("activations")
                        entry = {name: value for name, value in entry.items() if name != "activations"}
                    stage = checked_fields(StageSpace, entry, f"stage {number}")
                    stage["widths"] = _widths(stage["widths"])
                    if "entry" in stage:
                        stage["entry"] = entry_from_entry(stage["entry"], first=number == 1)
                    candidates = checked_list(stage["candidates"], "candidates")
                    blocks = [block_from_entry(c, stage["widths"][-1]) for c in candidates]
                    stage["candidates"] = tuple(_with_activations(blocks, activations))
                    stages.append(StageSpace(**stage))
            given["stages"] = tuple(stages)
            if "mux" in given:
                ways = [mux_from_entry(entry) for entry in checked_list(given["mux"], "mux")]
                given["mux"] = tuple(way for way in ways if way.n > 1)  # 1 is each image by itself: always a choice
            return cls(**given)

    @classmethod
    def around(
        cls,
        arch: ArchConfig,
        ffn_ratios: Sequence[int] = (),
        key_dims: Sequence[int] = (),
        width_shares: Sequence[float] = (),
    ) -> SearchSpace:
        """Return the space of `arch` and what is left of it when any of its blocks are removed, or made smaller.

        A stage without blocks gets one pool block to choose. The network's own blocks come first among the candidates, then
        the smaller ones, identity last. Which weights a smaller block has, and a narrower stage, `supernet.units.cut` says.

        Args:
            ffn_ratios: expansions (`mlp_ratio`, `ffn_ratio`) that a block may have where its own is larger.
            key_dims: key dimensions that a block's heads may have where its own is larger; in mb3d and attn_ffn, whose values
                are a multiple of it, the values shrink too. Every smaller expansion goes with every smaller key dimension.
            width_shares: shares of a stage's width, above 0 and below 1, that it may have too: each becomes the nearest
                narrower width that its blocks and its entry can have. Stages with vit blocks keep theirs.

        Raises:
            InputError: an argument is not of those.
        """
        for what, values in (("ffn_ratios", ffn_ratios), ("key_dims", key_dims)):
            if not all(type(value) is int and value > 0 for value in values):
                raise InputError(f"{what} must be whole numbers of at least 1, but are {list(values)}")
        if not all(0 < share < 1 for share in width_shares):
            raise InputError(f"width_shares must be above 0 and below 1, but are {list(width_shares)}")
        stages = []
        for number, stage in enumerate(arch.without_identity().stages):
            blocks = stage.blocks or (MB4D(stage.width),)
            smaller = (found for block in dict.fromkeys(blocks) for found in _smaller(block, ffn_ratios, key_dims))
            candidates = tuple(dict.fromkeys((*blocks, *smaller, Identity(stage.width))))
            possible = _possible_widths(stage, candidates, first=number == 0)
            near = {min(possible, key=lambda w: abs(w - share * stage.width)) for share in width_shares if possible}
            stages.append(StageSpace((*sorted(near), stage.width), stage.stride, len(blocks), candidates, stage.entry))
        mux = (arch.mux,) if arch.mux is not None and arch.multiplexes else ()
        return cls(arch.name, arch.image_size, arch.num_classes, tuple(stages), arch.head, mux)


def _smaller(block: Block, ffn_ratios: Sequence[int], key_dims: Sequence[int]) -> list[Block]:
    """Return a block with smaller expansions and key dimensions, the nearest to its own first."""
    choices: list[list[dict[str, int]]] = []
    for knobs, values in ((EXPANSIONS, ffn_ratios), (("key_dim",), key_dims)):
        knob = next((name for name in knobs if hasattr(block, name)), None)
        own = getattr(block, knob) if knob else 0
        choices.append([{}, *({knob: value} for value in sorted(set(values), reverse=True) if knob and value < own)])
    with users_code(block.kind, "where it is made smaller"):
        return [replace(block, **ffn, **keys) for ffn, keys in itertools.product(*choices) if ffn or keys]  # type: ignore[type-var]


def _possible_widths(stage: Stage, candidates: Sequence[Block], *, first: bool) -> list[int]:
    """Return the widths below a stage's own that its entry and all of the candidates can have."""
    if any(isinstance(candidate, ViT) for candidate in candidates):
        return []
    found = []
    for width in range(WIDTH_STEP, stage.width, WIDTH_STEP):
        try:
            placed_entry(stage.entry, width, None if first else WIDTH_STEP, stage.stride)
            for candidate in candidates:
                at_width(candidate, width)
        except InputError:
            continue
        found.append(width)
    return found


def space_names() -> list[str]:
    """The spaces that ship."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def _with_activations(candidates: Sequence[Block], activations: object) -> list[Block]:
    """Return the candidates, those that have an activation once for each of `activations` (a YAML list, or None)."""
    if activations is None:
        return list(candidates)
    names = checked_list(activations, "activations")
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise InputError(f"activations must be names, such as gelu, but has {wrong[0]!r}")
    found: dict[Block, None] = {}
    for candidate in candidates:
        if hasattr(candidate, "act"):
            for act in names:
                with users_code(label(candidate), f"with act {act}"):
                    found[replace(candidate, act=act)] = None  # type: ignore[type-var]
        else:
            found[candidate] = None
    return list(found)


def _widths(given: object) -> tuple[int, ...]:
    """A list of widths, or `{min, max, step}`."""
    if isinstance(given, dict):
        if set(given) != {"min", "max", "step"} or not all(type(v) is int and v > 0 for v in given.values()):
            raise InputError(f"widths must be a list or whole numbers min, max and step, but is {given!r}")
        if given["min"] > given["max"]:
            raise InputError(f"widths: min must be at most max, but is {given!r}")
        if (given["max"] - given["min"]) // given["step"] >= MOST_WIDTHS:
            raise InputError(f"widths: a stage has at most {MOST_WIDTHS}, but {given!r} are more")
        widths = range(given["min"], given["max"] + 1, given["step"])
        if widths[-1] != given["max"]:
            raise InputError(
                f"widths: no number of steps leads from min to max in {given!r}: give a max of {widths[-1]} or "
                f"{widths[-1] + given['step']}, or a list"
            )
        given = list(widths)
    found = checked_list(given, "widths")
    for width in found:
        check_width(width)
    return tuple(found)
