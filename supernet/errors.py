"""The one exception for input that cannot be used, and how it says where."""

import difflib
import errno
from collections.abc import Iterable

LONGEST = 1200  # characters of a refusal: what a file holds may be quoted in it
FULL = {errno.ENOSPC, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""What a file system says of itself when a file cannot be written to its end, whoever asked for it and wherever."""


class InputError(ValueError):
    """The user's input cannot be used: what was given, what is allowed, what to do, in one line.

    The commands print its message on stderr and end with exit code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """Return a text as one line for a terminal: what cannot be printed (line ends, escape sequences, halves of characters) as
    its code, and the middle left out of one that is too long."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def unknown(what: str, given: object, allowed: Iterable[str]) -> InputError:
    """Return an InputError that names the allowed values nearest to `given`."""
    options = sorted(allowed)
    near = difflib.get_close_matches(str(given)[:80].lower(), options, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return InputError(f"unknown {what} {given!r}: {hint}allowed: {', '.join(options)}")


def first_line(error: BaseException, longest: int = 160) -> str:
    """Return what another library's exception says, as part of one line: its first line, cut where it is too long.

    Of a KeyError that is the key alone, which is no sentence: what was read lacks it.
    """
    text = f"it lacks {error.args[0]}" if isinstance(error, KeyError) and error.args else str(error)
    line = (text.strip().splitlines() or [type(error).__name__])[0]
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
