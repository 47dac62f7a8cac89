"""Files that are whole or absent: atomic writing, and YAML read with every field's type checked."""

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import yaml

from supernet.errors import InputError, unknown

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # numbers such as 1e-3, which YAML 1.1 takes for text


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write `content` to `path` through a temporary file beside it: a kill leaves the old file or the new one."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): choose another folder") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written ({error.strerror}): choose another place") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_yaml(path: str | Path, what: str) -> dict[str, Any]:
    """Return the mapping that the YAML file holds; `what` names it in errors."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # PyYAML raises ValueError for a date such as 2024-13-45
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise InputError(f"{what} {path} is not valid YAML{line}") from error
    if not isinstance(content, dict):
        raise InputError(f"{what} {path} must hold a mapping of fields, but holds {type(content).__name__}")
    return content


def checked_fields(cls: type, given: object, where: str) -> dict[str, Any]:
    """Return `given` as keyword arguments for the dataclass `cls`.

    Unknown fields, missing fields and values of another type than the field's (int, float, bool, str) are refused;
    fields of other types are passed on as they are. `where` names the place in errors.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"{where} must be a mapping of fields, but is {given!r}")
    known = {field.name: field for field in fields(cls)}
    for name in given:
        if name not in known:
            raise InputError(f"{where}: {unknown('field', name, known)}")
    types = get_type_hints(cls)
    checked: dict[str, Any] = {}
    for name, field in known.items():
        if name in given:
            checked[name] = _checked(given[name], types[name], f"{where}: {name}")
        elif _required(field):
            raise InputError(f"{where}: the field {name!r} is missing")
    return checked


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
    if get_origin(kind) is Literal:
        kind = str  # which texts are allowed is the dataclass's to say
    if kind in (int, float, bool, str) and type(value) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise InputError(f"{where} must be {names[kind]}, but is {value!r}")
    return value
