"""What the commands share: their parser, the types of their arguments, and the exit code for what went wrong.

Exit codes: 0 done; 2 the input cannot be used (one line on stderr); 1 anything else.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from nas.profilers.bench import Failed
from nas.progress import say
from supernet.errors import FULL, InputError, one_line


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit code 2, without the usage block."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        given = sys.argv[1:] if args is None else list(args)
        for argument in given:  # an unset variable of the shell: as a path it would be the working folder
            name, equals, value = argument.partition("=")
            if not argument or (name.startswith("--") and equals and not value):
                self.error(f"{argument or 'an argument'} is empty: give its value, or leave it out")
        return super().parse_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{one_line(f'{self.prog}: {message}; see {self.prog} --help')}\n")


TRAIN = ("nas-search", "nas-train")
LESS = "a smaller batch_size or a larger accumulate (in --config or the recipe), for a search a smaller cache_gb, or "
GO_ON = ("nas-build-lut", *TRAIN)  # where they were stopped


def command_parser(command: str, does: str, example: str) -> Parser:
    return Parser(
        prog=command,
        description=does,
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run_command(command: str, work: Callable[[], None]) -> None:
    """Do the work of a command; turn what went wrong into its exit code."""
    if sys.stdout is None:  # closed, by whoever started this
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # to the end of the process
    if sys.stderr is None:  # what is printed to None goes to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with suppress(AttributeError):  # a name of a file that is no text is printed with its bytes' codes
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        work()
        sys.stdout.flush()  # a full disk is told here, not by the interpreter's end
    except InputError as error:
        print(f"{command}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (FloatingPointError, Failed) as error:  # training diverged; the device could not be measured
        say(f"{command}: {error}")  # which of several processes one does
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        say(f"{command}: stopped" + ("; the same command goes on from here" if command in GO_ON else ""))
        raise SystemExit(1) from None
    except BrokenPipeError:
        _leave_stdout()
        raise SystemExit(1) from None
    except OSError as error:
        _leave_stdout()
        what = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror or str(error)
        print(one_line(f"{command}: {what}"), file=sys.stderr)
        # A place that was named and is no place for this, or a machine that has run out of something.
        raise SystemExit(1 if error.filename is None or error.errno in (*FULL, errno.EMFILE, errno.ENFILE) else 2) from None
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        less = LESS if command in TRAIN else ""
        print(f"{command}: out of memory: give {less}a smaller image size or network", file=sys.stderr)
        raise SystemExit(1) from None


def _out_of_memory(error: Exception) -> bool:
    """Return whether this is Python's or PyTorch's lack of memory: accelerators' has a class, a CPU's and Apple's but words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory"))


def _leave_stdout() -> None:
    """Let what is still to be printed go nowhere: the interpreter would fail with it at its end."""
    with suppress(OSError):
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def positive_ms(text: str) -> float:
    try:
        ms = float(text)
    except ValueError:
        ms = math.nan
    if not 0 < ms < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a target: give a positive number of milliseconds, such as 1.6")
    return ms


def device_target(text: str) -> tuple[str, float]:
    device, equals, ms = text.rpartition("=")
    if not (device and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not a target on a device: give DEVICE=MS, such as iphone15pro-npu=1.2")
    return device, positive_ms(ms)


def seed_number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 10 or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed: give a whole number from 0 to 2147483647")
    return int(text)


def whole_number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 4 or not 0 < int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give a whole number from 1 to 4096")
    return int(text)


def batch_size(text: str) -> int | str:
    return text if text == "dynamic" else whole_number(text)
