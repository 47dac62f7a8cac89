"""Evaluations shared among the processes that torchrun started: the first one searches, the others evaluate what it asks for.

    torchrun --no-python --nproc-per-node 4 nas-search ...

The first process (rank 0) runs the whole search and is the only one that reads images, writes files or says anything. It sends
its evaluator to the others once, and then every list of networks; each process evaluates its own share, and what is found is
exchanged every few seconds. A network gives the same numbers in whatever process and after whatever others it is evaluated, so
the search decides as one process does, however fast each of them is.

All processes end with the first one's exit code. Where one dies, the others lose their connection to it and end too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from nas.profilers.bench import Failed
from nas.trajectory import Evaluation, evaluations
from supernet.arch import ArchConfig

if TYPE_CHECKING:
    import torch

    from nas.evaluation import Evaluator
    from nas.recovery import Recovered

SLICE_S = 5.0  # of evaluating between two exchanges of what was found: a kill loses no more than that, and one evaluation
PATIENCE = timedelta(days=60)  # the others wait while the first one trains; one that dies is noticed at once all the same


def processes() -> int:
    """Return how many processes torchrun has started for this command."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def together(work: Callable[[], None]) -> None:
    """Do the work of a command in the first process; in the others, evaluate what it shares until it ends, and end with the
    same exit code. Alone, just do the work."""
    if processes() == 1:
        work()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=PATIENCE)
    if dist.get_rank():
        raise SystemExit(_served())
    code: Any = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code
        raise
    finally:
        # In the middle of an exchange the others do not listen: they end as the connection does, with this process.
        if not Shared.exchanging:
            with suppress(Failed):  # one of them is gone; why this process ends is said already
                _tell("end", code)
                dist.destroy_process_group()


def shared(evaluate: Evaluator | Recovered) -> Evaluator | Recovered | Shared:
    """Return `evaluate`, or where other processes wait, one that divides many networks among them."""
    if processes() == 1:
        return evaluate
    import torch

    _tell("evaluator", evaluate.on(torch.device("cpu")), evaluate.device.type)
    return Shared(evaluate)


class Shared:
    """An evaluator whose lists of networks are divided among all processes. A single network is evaluated here."""

    exchanging = False  # whether a list is being worked off

    def __init__(self, evaluate: Evaluator | Recovered) -> None:
        self.evaluate = evaluate

    def __call__(self, arch: ArchConfig) -> Evaluation:
        return self.evaluate(arch)

    def each(self, archs: Sequence[ArchConfig]) -> Iterator[tuple[int, Evaluation]]:
        """Yield the evaluation of each network with its place in `archs`, as they come in."""
        if len(archs) < 2:
            yield from ((at, self.evaluate(arch)) for at, arch in enumerate(archs))
            return
        shares = self.evaluate.shares(archs, processes())
        _tell("networks", archs, shares)
        Shared.exchanging = True
        for found in _exchanged(self.evaluate, archs, shares[0]):
            yield from found
        Shared.exchanging = False


def _served() -> int:
    """Evaluate what the first process asks for until it ends; return its exit code, or 1 where it is gone."""
    import torch.distributed as dist

    evaluate: Any = None
    try:
        while True:
            what, *rest = _told()
            if what == "end":
                dist.destroy_process_group()
                return int(rest[0] or 0)
            if what == "evaluator":
                evaluate = rest[0].on(_own_device(rest[1]))
            else:
                archs, shares = rest
                for _ in _exchanged(evaluate, archs, shares[dist.get_rank()]):
                    pass
    except (Failed, KeyboardInterrupt):  # the first process says why it ends
        return 1


def _tell(*message: Any) -> None:
    """Send a message from the first process to the others."""
    import torch.distributed as dist

    with _connected():
        dist.broadcast_object_list([message], 0)


def _told() -> tuple[Any, ...]:
    """Wait for the first process's next message."""
    import torch.distributed as dist

    message: list[Any] = [None]
    with _connected():
        dist.broadcast_object_list(message, 0)
    return tuple(message[0])


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo knows no other
        raise Failed("another process of this command has ended: the same command goes on from here") from error


def _exchanged(
    evaluate: Callable[[ArchConfig], Evaluation], archs: Sequence[ArchConfig], share: Sequence[int]
) -> Iterator[list[tuple[int, Evaluation]]]:
    """Evaluate a share of the networks; yield what all processes have found, every few seconds, until all are known."""
    import torch.distributed as dist

    own = evaluations(evaluate, [archs[at] for at in share])
    known = 0
    while known < len(archs):
        until, mine = time.monotonic() + SLICE_S, []
        for number, evaluation in own:
            mine.append((share[number], evaluation))
            if time.monotonic() > until:
                break
        of_all: list[Any] = [None] * processes()
        with _connected():
            dist.all_gather_object(of_all, mine)
        found = [pair for of_one in of_all for pair in of_one]
        known += len(found)
        yield found


def _own_device(kind: str) -> torch.device:
    """Return the accelerator of this process: of a machine's GPUs, each has another one."""
    import torch

    if kind == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device(kind)
