"""A search shared among the processes that torchrun started: the first one searches, the others evaluate what it asks for, and
train the supernet with it.

    torchrun --no-python --nproc-per-node 4 nas-search ...

The first process (rank 0) runs the whole search and is the only one that writes files or says anything. It sends its evaluator
to the others once, and then every list of networks; each process evaluates its own share, and what is found is exchanged every
few seconds. A network gives the same numbers in whatever process and after whatever others it is evaluated, so the search
decides as one process does, however fast each of them is. How the supernet is trained together is told in `nas.parallel`.

All processes end with the first one's exit code. Where one dies, the others lose their connection to it and end too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from nas.parallel import connected, joined, own_device, processes
from nas.profilers.bench import Failed
from nas.trajectory import Evaluation, evaluations
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.user_block import loaded, user_block

if TYPE_CHECKING:
    from nas.evaluation import Evaluator
    from nas.recovery import Recovered

T = TypeVar("T")

SLICE_S = 5.0  # of evaluating between two exchanges of what was found: a kill loses no more than that, and one evaluation


def together(work: Callable[[], None]) -> None:
    """Do the work of a command in the first process; in the others, evaluate what it shares until it ends, and end with the
    same exit code. Alone, just do the work."""
    if processes() == 1:
        work()
        return
    if not joined().first:
        raise SystemExit(_served())
    code: Any = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code
        raise
    finally:
        # In the middle of common work the others do not listen: they end as the connection does, with this process.
        if not Shared.busy:
            with suppress(Failed):  # one of them is gone; why this process ends is said already
                _tell("end", code)
                joined().leave()


def shared(evaluate: Evaluator | Recovered) -> Evaluator | Recovered | Shared:
    """Return `evaluate`, or where other processes wait, one that divides many networks among them."""
    if processes() == 1:
        return evaluate
    import torch

    _tell("evaluator", evaluate.on(torch.device("cpu")), evaluate.device.type)
    return Shared(evaluate)


def in_all(work: Callable[..., T], *arguments: Any) -> T:
    """Call a function of a module, in the first process and in all others that wait: each with its `group` beside the
    arguments, which are sent to them."""
    if processes() == 1:
        return work(*arguments)
    _tell("work", work, arguments)
    Shared.busy = True
    done = work(*arguments, group=joined())
    Shared.busy = False
    return done


class Shared:
    """An evaluator whose lists of networks are divided among all processes. A single network is evaluated here."""

    busy = False  # whether all processes are at common work

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
        Shared.busy = True
        for found in _exchanged(self.evaluate, archs, shares[0]):
            yield from found
        Shared.busy = False


def _served() -> int:
    """Evaluate what the first process asks for until it ends; return its exit code, or 1 where it is gone."""
    import torch.distributed as dist

    evaluate: Any = None
    try:
        while True:
            what, *rest = _told()
            if what == "end":
                joined().leave()
                return int(rest[0] or 0)
            if what == "evaluator":
                evaluate = rest[0].on(own_device(rest[1]))
            elif what == "work":
                work, arguments = rest
                work(*arguments, group=joined())
            else:
                archs, shares = rest
                for _ in _exchanged(evaluate, archs, shares[dist.get_rank()]):
                    pass
    except (Failed, FloatingPointError, KeyboardInterrupt):  # the first process says why it ends
        return 1
    except InputError as error:  # what happens in all of them alike, the first one says; this has happened here alone
        print(f"process {dist.get_rank()}: {error}", file=sys.stderr)
        return 2


def _tell(*message: Any) -> None:
    """Send a message from the first process to the others, and before it which users' blocks they need to understand it."""
    import torch.distributed as dist

    with connected():
        dist.broadcast_object_list([tuple(loaded)], 0)
        dist.broadcast_object_list([message], 0)


def _told() -> tuple[Any, ...]:
    """Wait for the first process's next message."""
    import torch.distributed as dist

    kinds: list[Any] = [None]
    message: list[Any] = [None]
    with connected():
        dist.broadcast_object_list(kinds, 0)
    for kind in kinds[0]:
        user_block(kind)
    with connected():
        dist.broadcast_object_list(message, 0)
    return tuple(message[0])


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
        with connected():
            dist.all_gather_object(of_all, mine)
        found = [pair for of_one in of_all for pair in of_one]
        known += len(found)
        yield found
