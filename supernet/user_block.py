"""A block of a user's own: a frozen dataclass with `dim` and its knobs, and a method `module(resolution)` that returns its
torch module. In YAML its kind is the file and the class: `my_blocks.py:GhostBlock`. No torch.
"""

import sys
from dataclasses import fields, is_dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from supernet.errors import InputError

loaded: dict[str, type[Any]] = {}
"""The users' own blocks whose files were run, by kind."""


def is_foreign(kind: str) -> bool:
    """Whether a kind is of a user's file that has not been run."""
    return ".py:" in kind and kind not in loaded


def user_block(kind: str) -> type[Any]:
    """Return the class of a user's own block: `FILE.py:CLASS`, the file relative to the working folder. The file is run, once.

    Raises:
        InputError: there is no such file or class, or it is not a block.
    """
    if kind in loaded:
        return loaded[kind]
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
    loaded[kind] = found
    return found
