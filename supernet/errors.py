"""The one exception for input that cannot be used, and how it says where."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input cannot be used: what was given, what is allowed, what to do, in one line.

    The commands print its message on stderr and end with exit code 2.
    """


def unknown(what: str, given: object, allowed: Iterable[str]) -> InputError:
    """Return an InputError that names the allowed values nearest to `given`."""
    options = sorted(allowed)
    near = difflib.get_close_matches(str(given).lower(), options, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return InputError(f"unknown {what} {given!r}: {hint}allowed: {', '.join(options)}")


def first_line(error: BaseException, longest: int = 160) -> str:
    """Return what another library's exception says, as part of one line: its first line, cut where it is too long."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


class placed:
    """Prefix the InputErrors of a block of code with the file, or the part of it, that they are about."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError) and self.where not in str(error):
            raise InputError(f"{self.where}: {error}") from error
