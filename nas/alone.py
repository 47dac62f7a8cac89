"""One process at a time in a folder.

The lock is the operating system's, on a file in the folder, and is held by a process: one that is killed loses it, so that
nothing is left behind that would have to be cleared away. POSIX record locks, which NFS knows too, and which the worker
processes that a killed one leaves behind do not have; on Windows the lock of a byte.
"""

from __future__ import annotations

import getpass
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nas.progress import say
from supernet.errors import FULL, InputError
from supernet.files import PART

MEASURING = "measuring"  # whose turn it is to time something on this machine
_FAR = 1 << 20  # the byte that is locked on Windows, where what is locked cannot be read
_held: set[Path] = set()
_POLL_S = 0.2


class InUse(InputError):
    """Another process holds the folder."""


@contextmanager
def turn(name: str) -> Iterator[None]:
    """Wait until no other process of this user and machine is in a block of this name, and keep others out while the block
    runs. Where there is no place for a lock, nobody waits."""
    user = os.getuid() if sys.platform != "win32" else getpass.getuser()  # who may write to what others made?
    folder = Path(tempfile.gettempdir()) / f"metapath-nas-{user}"
    waiting = False
    with ExitStack() as held:
        while True:
            try:
                folder.mkdir(exist_ok=True)  # it stays: `alone` removes what it made, which another may be about to use
                held.enter_context(alone(folder, name))
            except InUse:
                if not waiting:
                    say(f"waiting for another process of this machine ({name})")
                waiting = True
                time.sleep(_POLL_S)
                continue
            except (InputError, OSError):
                pass
            break
        yield


@contextmanager
def alone(folder: str | Path, name: str = "", *, shared: bool = False) -> Iterator[None]:
    """Hold `folder` for this process, or the files in it that begin with `name`, while the block runs.

    What an earlier process had half written when it was killed is removed, but for what belongs to others: files of a name, and
    of folders in this one, that another process may hold. Within the block, the same process may ask again.
    Of the processes of torchrun the first one holds the folder for all. Where the file system knows no locks, a line says so,
    and nothing is held.

    Args:
        shared: others may be here too, if they also share: the processes of an Optuna study.

    Raises:
        InUse: another process holds it.
        InputError: the folder cannot be written.
        OSError: the disk is full or fails.
    """
    folder = Path(folder)
    path = folder.resolve() / f".{name + '.' if name else ''}lock"
    if path in _held or os.environ.get("RANK", "0") != "0":
        yield
        return
    new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    handle = _opened(path, folder, shared)
    _held.add(path)
    try:
        if not shared:
            _sweep(folder, name)
        yield
    finally:
        _held.discard(path)
        if sys.platform == "win32":
            os.close(handle)
        # Removed while it is locked: whoever has opened it meanwhile finds that the folder has another one, or none.
        with suppress(OSError):
            if not shared or _lock(handle, shared=False):
                path.unlink()
        if sys.platform != "win32":
            os.close(handle)
        for made in new:
            with suppress(OSError):  # what was refused leaves no folder; what was done has files in it
                made.rmdir()


def _sweep(folder: Path, name: str) -> None:
    """Remove what killed processes left half written in a folder that is held, and in folders below that nobody holds."""
    held = () if name else tuple(lock.name.removesuffix("lock") for lock in folder.glob(".?*.lock"))
    for left_over in list(folder.glob(f".{name}.*{PART}" if name else f".*{PART}")):
        if not left_over.name.startswith(held):
            with suppress(OSError):
                left_over.unlink()
    if not name:
        below = [*folder.glob(f"*/.*{PART}"), *folder.glob(f"*/*/.*{PART}")]
        for inner in {path.relative_to(folder).parts[0] for path in below}:
            with suppress(InputError, OSError), alone(folder / inner):
                pass


def _opened(path: Path, folder: Path, shared: bool) -> int:
    """Return the handle of the lock file, which is locked and is the one in the folder."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            if error.errno in FULL:
                raise
            raise InputError(f"the folder {folder} cannot be written ({error.strerror}): give another --out") from error
        try:
            if not _lock(handle, shared):
                holder = os.read(handle, 200).decode(errors="replace")
                raise InUse(
                    f"{folder} is in use by another process ({holder or 'it has just begun'}): wait until it ends, stop it, "
                    "or give another --out"
                )
        except InputError:
            os.close(handle)
            raise
        except OSError as error:
            say(f"warning: {folder} cannot be locked ({error.strerror}): let no second command work there meanwhile")
        with suppress(OSError):
            there, here = os.stat(path), os.fstat(handle)
            if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                with suppress(OSError):
                    os.ftruncate(handle, 0)
                    os.write(handle, f"{os.getpid()} on {platform.node()}".encode())
                return handle
        os.close(handle)  # its holder has just removed it


def _lock(handle: int, shared: bool) -> bool:
    """Lock the file; return False where another process has it, and raise OSError where the file system knows no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            if not shared:
                os.lseek(handle, _FAR, os.SEEK_SET)
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
                os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.lockf(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: POSIX allows both
        os.lseek(handle, 0, os.SEEK_SET)
        return False
    return True
