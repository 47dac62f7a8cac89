"""Blocks and stages' entries as they stand in files: a kind, or a mapping of a kind and its knobs. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from supernet.errors import InputError, unknown
from supernet.files import checked_fields
from supernet.specs import (
    BLOCKS,
    EMBEDDINGS,
    STEMS,
    WIDTH_STEP,
    Block,
    Embedding,
    Entry,
    Stem,
    is_embedding,
    is_stem,
    knobs_of,
)
from supernet.user_block import user_block, users_code

_OF_PLACE = ("dim", "dim_in", "stride")  # what follows from where a spec stands


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
    """Return a stage's entry without what follows from its place, so that the same entry is equal anywhere; None for the usual
    one, whether it was written or not."""
    if entry is None:
        return None
    knobs = {name: value for name, value in knobs_of(entry).items() if name not in _OF_PLACE}
    places = {name: WIDTH_STEP for name in ("dim", "dim_in") if hasattr(entry, name)}
    found: Entry = type(entry)(**places, **knobs)  # type: ignore[arg-type]
    return None if found in (Stem(WIDTH_STEP), Embedding(WIDTH_STEP, WIDTH_STEP)) else found


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
