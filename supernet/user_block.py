"""A block of a user's own: a frozen dataclass with `dim` and its knobs, and a method `module(resolution)` that returns its
torch module. In YAML its kind is the file and the class: `my_blocks.py:GhostBlock`. No torch.
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from supernet.errors import InputError, first_line

loaded: dict[str, type[Any]] = {}
"""The users' own blocks whose files were run, by kind."""

_digests: dict[str, str] = {}
"""Of what each file held when it was run, by the name of its module: the beginning of its SHA-256."""


def is_foreign(kind: str) -> bool:
    """Whether a kind is of a user's file that has not been run."""
    return ".py:" in kind and kind not in loaded


def user_block(kind: str) -> type[Any]:
    """Return the class of a user's own block: `FILE.py:CLASS`, the file relative to the working folder. A file is run once.

    Raises:
        InputError: there is no such file or class, the file fails, or the class is not a block.
    """
    if kind in loaded:
        return loaded[kind]
    path, _, name = kind.rpartition(":")
    found: Any = getattr(_module(path, kind), name, None)
    is_block = isinstance(found, type) and is_dataclass(found) and callable(getattr(found, "module", None))
    if not is_block or not found.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise InputError(
            f"{name} of {path} is not a block: it must be a frozen dataclass with `dim`, and a method `module(resolution)`"
        )
    if "dim" not in {f.name for f in fields(found)}:
        raise InputError(f"the block {kind!r} lacks the field `dim`, its width")
    if not isinstance(getattr(found, "tokens", False), bool):
        raise InputError(f"the block {kind!r} must say `tokens` as True or False, but says {found.tokens!r}")
    if found not in loaded.values():  # a file that is named in two ways
        found.kind = kind
        found.tokens = getattr(found, "tokens", False)
    loaded[kind] = found
    return loaded[kind]


def file_digests(kinds: Iterable[str]) -> dict[str, str]:
    """Return, for each users' file among these kinds of block, a digest of what it held when it was run."""
    files = {kind.rpartition(":")[0]: kind for kind in kinds if ".py:" in kind}
    return {path: _digests[_module(path, kind).__name__] for path, kind in sorted(files.items())}


@contextmanager
def users_code(kind: str, what: str) -> Iterator[None]:
    """Refuse a block whose own code fails: whatever it raises names the block, and what was asked of it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the block {kind!r} fails with {type(error).__name__} ({first_line(error)}) {what}: mend its file"
        ) from error


def _module(path: str, kind: str) -> ModuleType:
    try:
        there = Path(path).is_file()
    except OSError:  # such as a name that is too long
        there = False
    if not there:
        raise InputError(f"the block {kind!r} is to come from {path}, which is not there: give FILE.py:CLASS, from this folder")
    # Without dots: they would name packages, where objects of its classes are pickled (processes send each other some).
    module_name = f"metapath_user_{str(Path(path).resolve()).encode().hex()}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    module_spec = spec_from_file_location(module_name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses look their own module up by name
    try:
        _digests[module_name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        del sys.modules[module_name]
        raise InputError(
            f"{path} fails with {type(error).__name__} ({first_line(error)}): mend it, for the block {kind!r}"
        ) from error
    return module
