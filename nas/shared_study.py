"""An Optuna study that processes share: its storage, its name, and which of its trials have lost their process. No torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import re
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import optuna
from optuna.exceptions import StorageInternalError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalRedisBackend, JournalStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from nas.profilers.bench import Failed
from supernet.errors import FULL, InputError, first_line

BEAT_S = 20.0  # how often a running trial says that its process is alive
GRACE_S = 120.0  # a running trial that has been silent for so long has lost its process
ASKED_S = 30.0  # the same before a trial says whose it is: only the sampler works meanwhile
LINE = b'{"op_code":'  # how every line of Optuna's journal begins
CLIENTS = ("sqlalchemy", "redis", "grpc")  # whose exceptions say that a storage is away, where Optuna passes them on
BOOT = "/proc/sys/kernel/random/boot_id"  # of this start of this machine; clones share name and the namespace's number


def study_name(label: str, request: Mapping[str, Any]) -> str:
    """Return what the study of a request is called: `label` and a hash of all that the request says.

    Different requests in one storage are then different studies. `request`: what JSON can hold, and the same on every machine
    that is to take part: no paths, and nothing of the storage itself.
    """
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    return f"{label}-{digest[:12]}"


def opened(name: str, storage: str | Path | BaseStorage, sampler: BaseSampler, metrics: list[str]) -> Study:
    """Return the study of this name, made if it is not there yet.

    Raises:
        InputError: the storage cannot be used.
        OSError: the disk is full.
    """
    with _usable(storage):
        study = optuna.create_study(
            storage=_storage(storage),
            sampler=sampler,
            study_name=name,
            directions=["minimize"] * len(metrics),
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(metrics)
    return study


def check_storage(storage: str | Path) -> None:
    """Refuse a storage that cannot be used, before there is a study to open in it."""
    with _usable(storage):
        _storage(storage).get_all_studies()


@contextmanager
def _usable(storage: str | Path | BaseStorage) -> Iterator[None]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each database's driver has its own
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise InputError(
            f"the Optuna storage {_shown(storage)} cannot be used ({first_line(error)}): give a file, or a URL such as "
            "postgresql://user@host/database"
        ) from error
    finally:
        optuna.logging.set_verbosity(verbosity)


def _storage(storage: str | Path | BaseStorage) -> BaseStorage:
    if isinstance(storage, BaseStorage):
        return storage
    text = str(storage)
    scheme, has_scheme, _ = text.partition("://")
    if not has_scheme:
        if not text or re.match(r"\w[\w+]+:", text):  # two letters at least: C: is a drive
            raise InputError(
                f"the Optuna storage {text!r} is neither a file nor a URL: give a file such as study.journal, or a URL such as "
                "sqlite:///study.db or postgresql://user@host/database"
            )
        Path(text).parent.mkdir(parents=True, exist_ok=True)
        if Path(text).exists():
            with open(text, "rb") as file:
                if not LINE.startswith(file.read(len(LINE))):  # it may be a torn first line
                    raise ValueError("it is no journal of Optuna")
        # Optuna's usual lock, a link to the journal, leads nowhere from a relative path: a killed process's is never found old.
        return JournalStorage(JournalFileBackend(text, _Lock(text)))
    if scheme == "grpc":
        url = urlsplit(text)
        return optuna.storages.GrpcStorageProxy(host=url.hostname or "localhost", port=url.port or 13000)
    if scheme.startswith("redis"):
        return JournalStorage(JournalRedisBackend(text))
    # SQLite lets one process write at a time: the others wait. A server may have closed a connection during an evaluation.
    from sqlalchemy.exc import DBAPIError  # Optuna's own requirement for databases

    engine = {"connect_args": {"timeout": 60}} if scheme.startswith("sqlite") else {"pool_pre_ping": True}
    for pause_s in (0.3, 1.0, 3.0):
        with suppress(DBAPIError):  # two processes that begin at once both make the tables, and one of them cannot
            return RDBStorage(text, engine_kwargs=engine)
        time.sleep(pause_s)
    return RDBStorage(text, engine_kwargs=engine)


class _Lock(JournalFileOpenLock):
    """A journal's lock. Whoever holds it finds whole lines: what a full disk or a power cut has left of a last one is cut off,
    as the next line would be written behind it and be read with it."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path

    def acquire(self) -> bool:
        acquired = super().acquire()
        try:
            _cut_torn_line(self._path)
        except BaseException:
            self.release()
            raise
        return acquired


def _cut_torn_line(path: str) -> None:
    with open(path, "r+b") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _shown(storage: str | Path | BaseStorage) -> str:
    """Return what a storage is called in a message: without a password."""
    if isinstance(storage, BaseStorage):
        return type(storage).__name__
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", str(storage))


@contextmanager
def within_reach(storage: str | Path | BaseStorage) -> Iterator[None]:
    """Tell of a storage that goes away during a block of code, such as a database that is restarted.

    Raises:
        Failed: it did.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, StorageInternalError) and type(error).__module__.partition(".")[0] not in CLIENTS:
            raise
        raise Failed(
            f"the Optuna storage {_shown(storage)} can no longer be used ({first_line(error.__cause__ or error)}): the same "
            "command goes on from here"
        ) from error


class Others:
    """Which running trials have lost their process. Clocks of different machines are never compared."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[object, float]] = {}  # of each trial: what it last said, and when it was new here

    def lost(self, trial: FrozenTrial) -> bool:
        """Say so of a trial that is none of this process's own at this moment."""
        *place, pid = trial.user_attrs.get("worker", [None])
        *here, own_pid = worker()
        if place == here and (pid == own_pid or not _alive(pid)):
            return True
        heard, now = (trial.user_attrs.get("beat"), len(trial.user_attrs), len(trial.params)), time.monotonic()
        if trial.number not in self._seen or self._seen[trial.number][0] != heard:
            self._seen[trial.number] = heard, now
        return now - self._seen[trial.number][1] > (GRACE_S if place else min(ASKED_S, GRACE_S))


def worker() -> list[Any]:
    """Return what tells processes apart: the machine, the container where there are such, and the process's number."""
    return [*_place(), os.getpid()]


@cache
def _place() -> tuple[str, str, str]:
    """Return the machine's name, what no other machine of that name has, and the container."""
    try:
        boot, container = Path(BOOT).read_text(encoding="ascii").strip(), os.readlink("/proc/self/ns/pid")
    except OSError:  # not on Linux
        boot, container = f"{uuid.getnode():x}", ""
    return platform.node(), boot, container


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # os.kill would end it there; its beats will tell
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@contextmanager
def beating(trial: Trial) -> Iterator[None]:
    """Let other processes see, while a trial runs, that this process is alive."""
    over = threading.Event()

    def beat() -> None:
        for number in itertools.count(1):
            if over.wait(BEAT_S):
                return
            try:
                trial.set_user_attr("beat", number)
            except RuntimeError:  # another process has ended the trial
                return
            except Exception:  # noqa: S112 - the storage is away: it may come back, and the end of the trial tells if not
                continue

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
