"""Which request an output folder belongs to: the same one goes on in it, another one is refused. What a finished one was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from nas.kept import REPORT
from nas.table import Target
from nas.trajectory import Score
from supernet.errors import InputError, first_line
from supernet.files import parse_yaml, read_json, write_atomically
from supernet.space import SearchSpace

SHOWN = 60  # characters of a value in a refusal
BEFORE = 15  # of them, those before the first difference of two long values


def claim(folder: Path, request: Mapping[str, Any], begun: bool = True) -> None:
    """Make `folder` the place of `request`, whose values JSON can hold, by writing `folder/request.json`.

    A folder that has been claimed by an equal request is left as it is. `begun`: whether the folder has anything of a request's
    work; where it has not, as after one that ran out of memory in its first step, another request of the same command takes
    its place.

    Raises:
        InputError: the folder holds another request, or cannot be read or written, or a name in the request is no text.
    """
    for name, value in {"out": str(folder), **request}.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # a path in another encoding, which no file of ours could say
            raise InputError(f"{name}, {value!r}, is no text in UTF-8: rename it, or give a link to it") from error
    path = Path(folder) / "request.json"
    text = json.dumps(request, indent=2)
    if not path.exists():
        write_atomically(path, text + "\n")
        return
    held = read_json(path, "the request file", f"what {folder} holds is unknown: give another --out")
    given = json.loads(text)  # tuples have become lists, as in the file
    names = [*given, *(name for name in held if name not in given)]
    differing = [name for name in names if (name in held) != (name in given) or held.get(name) != given.get(name)]
    if differing and not begun and held.get("command") == given.get("command"):
        write_atomically(path, text + "\n")
    elif differing:
        shown = "; ".join(_difference(name, held, given) for name in differing[:3])
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise InputError(f"{folder} holds another request ({shown}{more}): give another --out")


@dataclass(frozen=True)
class Finished:
    """A search that ended: its folder, its request, its result, and its space."""

    folder: Path
    request: Mapping[str, Any]
    result: Mapping[str, Any]
    space: SearchSpace

    @property
    def targets(self) -> list[dict[str, Any]]:
        """Its targets, the first one first: `device`, `target_ms`, and `table`, a path."""
        names = ("device", "target_ms", "table")
        several: list[dict[str, Any]] = self.request.get("targets", [{name: self.request[name] for name in names}])
        return several

    @property
    def space_file(self) -> Path:
        """The file of its space, for a command."""
        return self.folder / "space.yaml"

    @property
    def data(self) -> Path | None:
        """What `--data` was."""
        return None if self.request["data"] == "digits" else Path(self.request["data"])


def interrupted(run: Path) -> bool:
    """Whether a search was killed while it wrote what it had found: the result or the report, which come last, is missing."""
    return (run / "searched.yaml").exists() and not all((run / name).exists() for name in ("result.json", REPORT))


def finished(run: Path, or_interrupted: bool = False) -> Finished:
    """Read the folder of a search that ended, or also of one that was interrupted, whose result is then empty.

    Raises:
        InputError: it holds none.
    """
    with _finished(run):
        request = read_json(run / "request.json", "the request file", "it is written when a search begins")
        ended = not (or_interrupted and interrupted(run))
        result = read_json(run / "result.json", "the result file", "it is written when a search ends") if ended else {}
        where = f"the space of {run}"
        space = SearchSpace.from_dict(parse_yaml(request["space"], where), where)
        held = Finished(run, request, result, space)
        texts = [
            request["strategy"],
            request["data"],
            *(target[name] for target in held.targets for name in ("device", "table")),
        ]
        if not all(isinstance(text, str) for text in texts) or not held.targets:
            raise TypeError("its strategy, data, devices or tables are no texts")
        settings = request["settings"]
        limits = [request["seed"], settings.get("max_params", 0), settings.get("max_macs", 0)]
        if not all(type(number) is int and number >= 0 for number in limits) or settings["score"] not in get_args(Score):
            raise ValueError("its seed or a limit is no whole number, or its score is none")
        for target in held.targets:
            Target(target["target_ms"])
        for found in result.get("targets", [result]) if ended else ():
            for ms in (found["target_ms"], found["predicted_ms"], found["measured_ms"] or 1.0):
                Target(ms)
    return held


@contextmanager
def _finished(run: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # an InputError is a ValueError
        raise InputError(
            f"{run} holds no finished search ({first_line(error)}): give the --out folder of a nas-search that ended"
        ) from error


def _difference(name: str, held: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    was, now = (_text(values[name]) if name in values else "absent" for values in (held, given))
    same = next((at for at, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
    return f"{name} {_shortened(was, same)}, now {_shortened(now, same)}"


def _text(value: object) -> str:
    """Return a value in one line."""
    return " ".join(value.split()) if isinstance(value, str) else "none" if value is None else json.dumps(value)


def _shortened(text: str, same: int) -> str:
    """Return at most SHOWN characters of a text, with those in view that follow the first `same` ones."""
    if len(text) <= SHOWN:
        return text
    start = max(0, min(same - BEFORE, len(text) - SHOWN))
    part = text[start : start + SHOWN]
    if start:
        part = "..." + part[3:]
    return part if start + SHOWN >= len(text) else part[:-3] + "..."
