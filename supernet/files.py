"""Files that are whole or absent: atomic writing; YAML, JSON and CSV read so that whatever they hold is used or refused."""

import csv
import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import yaml

from supernet.errors import FULL, InputError, first_line, one_line, unknown

PART = ".metapath-part"  # ends the names of files that are being written
MOST_VALUES = 100_000  # of a YAML file: a few lines of aliases can stand for more than a memory holds
DEEPEST = 40  # lists and mappings in each other
YAML = (".yaml", ".yml")
LARGEST = 2**63  # of a whole number

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # numbers such as 1e-3, which YAML 1.1 takes for text


def is_path(text: str, *endings: str) -> bool:
    """Whether a text that may be a name or the path of a file is a path: it has a slash, or ends as such files do."""
    return "/" in text or text.endswith(endings or YAML)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write `content` to `path` through a temporary file beside it: a kill leaves the old file or the new one.

    The content is on the disk before it takes the file's name. After a power cut the old file may be there again.

    Raises:
        InputError: the place is none for a file, or may not be written to.
        OSError: the disk is full or fails. The old file is then as it was.
    """
    write_together({Path(path): content})


def write_together(contents: Mapping[Path, str | bytes]) -> None:
    """Write files that belong together, each as `write_atomically` does: all contents are on the disk before the first takes
    its name, so that a full disk leaves all old files as they were. A kill between the names leaves the first files new."""
    temporary: dict[Path, str] = {}
    path = Path()
    try:
        for path, content in contents.items():
            if path.exists() and not path.is_file():  # a folder; or a device, which would be replaced
                raise InputError(f"{path} cannot be written, as something that is no file has that name: choose another name")
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                to_disk(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary[path], 0o666 & ~umask)  # mkstemp makes private files
        for path in list(temporary):
            os.replace(temporary[path], path)
            del temporary[path]
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        for left_over in temporary.values():
            _remove(left_over)


def to_disk(handle: int) -> None:
    """Wait until what was written to a file is on the disk. A Mac's fsync leaves it in the drive's own cache."""
    if sys.platform == "darwin":
        import fcntl

        with suppress(OSError):  # a file system that knows no other way
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)


def unwritten(path: str | Path, error: OSError) -> InputError | OSError:
    """Return what to raise where `path` could not be written: an OSError if the disk is full or fails, else an InputError."""
    if error.errno in FULL:
        return OSError(
            error.errno, f"{path} cannot be written ({error.strerror}): make room; what was there before is as it was"
        )
    return InputError(f"{path} cannot be written ({error.strerror or error}): choose another place")


def _remove(temporary: str) -> None:
    with suppress(OSError):
        os.unlink(temporary)


def refuse_folder(path: str | Path, *names: str) -> None:
    """Refuse a folder where a file is meant, naming the one in it that may be: the first of `names` that is there.

    Raises:
        InputError: it is a folder.
    """
    folder = Path(path)
    if folder.is_dir():
        there = [str(folder / name) for name in names if (folder / name).is_file()]
        raise InputError(f"{path} is a folder: give " + (there[0] if there else "a file in it"))


def read_text(path: str | Path, what: str, do: str = "give another file") -> str:
    """Return the text of a file, without a mark at its beginning; `what` names it in errors, `do` is what helps."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read ({error.strerror}): {do}") from error
    except ValueError as error:  # a UnicodeDecodeError is one
        raise InputError(f"{what} {path} is no text in UTF-8: save it as such, or give another file") from error


def read_yaml(path: str | Path, what: str, do: str = "give another file") -> dict[str, Any]:
    """Return the mapping that the YAML file holds; `what` names it in errors, `do` helps where it cannot be read."""
    return parse_yaml(read_text(path, what, do), f"{what} {path}")


def parse_yaml(text: object, where: str) -> dict[str, Any]:
    """Return the mapping that a YAML text holds; `where` names it in errors.

    Raises:
        InputError: it is no text, no YAML or no mapping, or holds what no file of ours can mean.
    """
    if not isinstance(text, str):
        raise InputError(f"{where} must be a YAML text, but is {type(text).__name__}")
    try:
        loader = _Loader(text)
        try:
            content = loader.get_single_data()
        finally:
            loader.dispose()
        _check_values(content, where, MOST_VALUES)
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        # PyYAML raises ValueError for a date such as 2024-13-45, and others for its own tags where they do not fit
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        if isinstance(error, _Repeated):
            raise InputError(f"{where} has {error.problem} twice in one mapping{line}: leave one out") from error
        problem = f": {one_line(error.problem)}" if isinstance(error, yaml.MarkedYAMLError) and error.problem else ""
        raise InputError(
            f"{where} is not valid YAML{line}{problem}" + (": indent with blanks" if "'\\t'" in problem else "")
        ) from error
    if content is None:  # an empty file, or comments alone
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{where} must hold a mapping of fields, but holds {type(content).__name__}")
    return content


class _Repeated(yaml.MarkedYAMLError):
    """A mapping has the same field twice, of which PyYAML would take the last without a word."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a field that stands twice in one mapping, as YAML's specification does."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _Repeated(problem=repr(key.value), problem_mark=key.start_mark)
                seen.add(key.value)
        return node


def read_json(path: str | Path, what: str, do: str = "give another file") -> dict[str, Any]:
    """Return the mapping that the JSON file holds; `what` names it in errors, `do` is what helps.

    Raises:
        InputError: the file cannot be read, is cut, or holds something else.
    """
    try:
        content = json.loads(read_text(path, what, do))
        _check_values(content, f"{what} {path}")
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what} {path} is not whole JSON: {do}") from error
    if not isinstance(content, dict):
        raise InputError(f"{what} {path} must hold a mapping, but holds {type(content).__name__}: {do}")
    return content


def _check_values(content: object, where: str, most: float = math.inf) -> None:
    """Refuse content that is nested too deeply, has too many values, or has a text or a number that is none."""
    left: list[tuple[object, int]] = [(content, 0)]
    seen = 0
    while left:
        value, depth = left.pop()
        seen += 1
        if seen > most or depth > DEEPEST:
            raise InputError(
                f"{where} holds too much: at most {DEEPEST} lists and mappings in each other, and {MOST_VALUES} values"
            )
        if isinstance(value, dict):
            left += ((each, depth + 1) for pair in value.items() for each in pair)
        elif isinstance(value, list | tuple | set):
            left += ((each, depth + 1) for each in value)
        elif isinstance(value, int) and not -LARGEST < value < LARGEST:
            raise InputError(f"{where} holds a whole number of more than 63 bits: give a smaller one")
        elif isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise InputError(f"{where} holds the half of a character in {value!r}: leave it out")


def read_csv(path: str | Path, columns: Sequence[str], what: str, do: str = "give another file") -> list[dict[str, str]]:
    """Return the lines of a CSV file that has at least these columns, each line a cell in every one of them.

    Raises:
        InputError: the file cannot be read, lacks a column, or has a line that is cut or too long; `what` names it, `do` helps.
    """
    text = read_text(path, what, do)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        lines = list(reader)
    except csv.Error as error:
        raise InputError(f"{what} {path} is no CSV file ({error}): {do}") from error
    found = list(reader.fieldnames or ())
    if missing := [name for name in columns if name not in found]:
        raise InputError(f"{what} {path} must have the columns {', '.join(columns)}, but lacks {', '.join(missing)}: {do}")
    for number, line in enumerate(lines, 2):
        if None in line or None in line.values():
            raise InputError(f"{what} {path} has {len(found)} columns, but line {number} has not as many cells: {do}")
    return lines


@contextmanager
def reading(where: str, do: str) -> Iterator[None]:
    """Refuse a file whose values are not what the block of code takes them for: a number, a field that is there, a list."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        raise InputError(f"{where} cannot be used ({type(error).__name__}: {first_line(error)}): {do}") from error


def checked_fields(cls: type, given: object, where: str, do: str = "") -> dict[str, Any]:
    """Return `given` as keyword arguments for the dataclass `cls`.

    Unknown fields, missing fields and values of another type than the field's (int, float, bool, str) are refused;
    fields of other types are passed on as they are. `where` names the place in errors, `do` helps where fields are missing.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"{where} must be a mapping of fields, but is {given!r}")
    known = {field.name: field for field in fields(cls)}
    for name in given:
        if name not in known:
            raise InputError(f"{where}: {unknown('field', name, known)}")
    types = _types_of(cls)
    if missing := [repr(name) for name, field in known.items() if name not in given and _required(field)]:
        several = f"fields {', '.join(missing)} are" if len(missing) > 1 else f"field {missing[0]} is"
        raise InputError(f"{where}: the {several} missing" + (f"; {do}" if do else ""))
    return {name: _checked(given[name], types[name], f"{where}: {name}") for name in known if name in given}


@cache
def _types_of(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)  # it compiles every annotation anew, which takes longer than all checks of a network's blocks


def checked_list(value: object, where: str, *, empty: bool = False) -> list[Any]:
    if not isinstance(value, list) or not (value or empty):
        raise InputError(f"{where} must be a list{'' if empty else ' with at least one entry'}, but is {value!r}")
    return value


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _checked(value: object, kind: Any, where: str) -> object:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    if kind is int and isinstance(value, str) and _EXPONENT.fullmatch(value) and float(value).is_integer():
        return int(float(value))
    if get_origin(kind) is Literal:
        kind = str  # which texts are allowed is the dataclass's to say
    if kind in (int, float, bool, str) and type(value) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise InputError(f"{where} must be {names[kind]}, but is {value!r}")
    return value
