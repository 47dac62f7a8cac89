"""Training divided among the processes that torchrun started: each takes its rows of every batch.

    torchrun --no-python --nproc-per-node 4 nas-train searched.yaml --data ~/flowers --out trained

All processes begin with the same state and take the same steps: gradients are averaged over the whole batch before the
optimizer sees them, so after each step all hold the same weights, the same statistics of batch norm and the same state of the
optimizer. The first process (rank 0) alone writes files and speaks. Which images a step sees, and every random draw about
them, does not depend on how many processes there are.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from nas.profilers.bench import Failed
from supernet.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")

PATIENCE = timedelta(days=60)  # of gloo: some wait while others read images or search; one that dies is noticed all the same,
if sys.platform == "darwin":  # but not over libuv, which gloo has on a Mac
    PATIENCE = timedelta(hours=12)
GPU_PATIENCE = timedelta(minutes=30)  # of NCCL, which may not notice; nobody waits there but for others' part of the same step
TO_MEET = timedelta(minutes=10)  # for all processes to find each other
PARTING_S = 0.2  # gloo's threads outlive its group: one that still lets go of a tensor as Python ends would abort the process
BUCKET_BYTES = 64 * 2**20  # gradients are exchanged in pieces of this size: fewer messages, and no second copy of all


def processes() -> int:
    """Return how many processes torchrun has started for this command."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this process is the one that writes and speaks."""
    return processes() == 1 or os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Group:
    """The processes that train together: this one is number `rank` of `size`. One by itself is `ALONE`."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """Return which rows of a batch of this many images are this process's: equally many in all.

        Raises:
            InputError: the batch cannot be divided so that each process has whole pairs: neighbours may be mixed with each
                other, and batch norm cannot train on one image.
        """
        own, over = divmod(batch, self.size)
        if self.size > 1 and (over or own % 2 or not own):
            raise InputError(
                f"a batch of {batch} images cannot be divided among {self.size} processes in pairs: give a batch_size that is "
                f"a multiple of {2 * self.size}, and epochs that are no smaller"
            )
        return slice(own * self.rank, own * (self.rank + 1))

    def device(self, device: torch.device) -> torch.device:
        """Return the accelerator of this process: of a machine's GPUs, each has another one.

        Raises:
            InputError: it is one on which processes cannot train together.
        """
        if self.size == 1:
            return device
        if device.type == "mps":
            raise InputError(
                "PyTorch exchanges nothing between processes on Apple's GPU: start one process, or set accelerator to cpu"
            )
        if device.type != "cuda":
            return device
        own = own_device("cuda")
        import torch

        torch.cuda.set_device(own)  # NCCL's is the current one
        return own

    def agreed(self, work: Callable[[], T]) -> T:
        """Do, in every process, a work that may be refused; where any of them refuses, all end with exit code 2.

        The first process raises the InputError, which the command prints; the others end without a word. On each machine one
        process works first, and the others when it has ended: what that one keeps on disk, they find.
        """
        if self.size == 1:
            return work()
        found: list[T] = []
        for turn in (True, False):
            refusal = None
            if turn == (os.environ.get("LOCAL_RANK", "0") == "0"):
                try:
                    found.append(work())
                except InputError as error:
                    refusal = str(error)
            refusals = [told for told in self._gathered(refusal) if told is not None]
            if refusals and self.first:
                raise InputError(refusals[0])
            if refusals:
                raise SystemExit(2)
        return found[0]

    def alike(self, given: Mapping[str, Any]) -> None:
        """Refuse, in all processes, what was not given to all of them alike: they would wait for each other without end.

        Raises:
            InputError: in the first process; the others end without a word.
        """
        if self.size == 1:
            return
        of_all = self._gathered(dict(given))
        other = next((rank for rank, held in enumerate(of_all) if held != of_all[0]), None)
        if other is None:
            return
        if not self.first:
            raise SystemExit(2)
        names = [name for name, value in of_all[0].items() if of_all[other].get(name) != value]
        raise InputError(
            f"process {other} of {self.size} has another {', '.join(names)} than the first one: give all machines the same "
            "command, files and images"
        )

    def _gathered(self, mine: Any) -> list[Any]:
        import torch.distributed as dist

        of_all: list[Any] = [None] * self.size
        with connected():
            dist.all_gather_object(of_all, mine)
        return of_all

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns in the first process, in all of them. Like `agreed` where that refuses."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        message: list[Any] = [self.agreed(lambda: make() if self.first else None)]
        with connected():
            dist.broadcast_object_list(message, 0)
        return message[0]  # type: ignore[no-any-return]

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes of a tensor of one shape in all."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.clone()
        with connected():
            dist.all_reduce(total)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over the processes of a tensor of one shape in all."""
        return self.sum(tensor).div_(self.size) if self.size > 1 else tensor

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make the gradients, of the mean loss over this process's rows, those of the mean over the whole batch, in place.

        Parameters without a gradient are left out, so all processes must have run the same parts of the network.
        """
        self._average([parameter.grad for parameter in parameters if parameter.grad is not None])

    def average_statistics(self, model: nn.Module) -> None:
        """Make running statistics of batch norm their mean over the processes, in place; on GPUs they are the same in all of
        them already (`synchronised`)."""
        if self.size == 1 or next(model.parameters()).device.type == "cuda":
            return
        self._average([buffer for buffer in model.buffers() if buffer.is_floating_point()])

    def _average(self, tensors: list[Tensor]) -> None:
        if self.size == 1:
            return
        import torch

        for bucket in _buckets(tensors):
            flat = self.mean(torch.cat([tensor.reshape(-1) for tensor in bucket]))
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def divided(self, model: nn.Module) -> nn.Module:
        """Return the network so that its backward pass averages the gradients over the processes (DistributedDataParallel),
        each layer's while those before it are still computed. All of its parameters must have a part in every pass."""
        if self.size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        device = next(model.parameters()).device
        # It also sends the first process's batch-norm statistics to the others, which have the same ones already.
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    def leave(self) -> None:
        """Part from the others, when all is done."""
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()
            time.sleep(PARTING_S)

    def synchronised(self, model: nn.Module) -> nn.Module:
        """Return the network with batch norm over the whole batch of all processes (SyncBatchNorm), which only GPUs have; on
        others, as it is. The parameters are the same objects."""
        import torch

        first = next(model.parameters(), None)
        if self.size == 1 or first is None or first.device.type != "cuda":
            return model
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)


ALONE = Group()


def joined() -> Group:
    """Join the processes that torchrun started; alone, return `ALONE`."""
    if processes() == 1:
        return ALONE
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if not dist.is_initialized():
        # Messages go over the CPU, tensors between GPUs over NCCL.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        with connected():
            store, rank, size = next(rendezvous("env://"))
            store.set_timeout(TO_MEET)
            if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
                # torchrun's store outlives a restart, with the addresses of processes that are gone (PyTorch issue 135712). On
                # several machines the count of restarts is not the same in all.
                store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=GPU_PATIENCE)
            # What is given above is for all backends; PyTorch has no public way to give each its own.
            dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(PATIENCE)  # type: ignore[union-attr]
    return Group(dist.get_rank(), dist.get_world_size())


def own_device(kind: str) -> torch.device:
    """Return the accelerator of this process: of a machine's GPUs, each has another one.

    Raises:
        InputError: there are more processes on this machine than GPUs.
    """
    import torch

    if kind == "cuda":
        own = int(os.environ.get("LOCAL_RANK", "0"))
        here, gpus = max(own + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), torch.cuda.device_count()
        if here > gpus:
            raise InputError(f"{here} processes on this machine, but {gpus} GPUs: give torchrun --nproc-per-node {gpus}")
        return torch.device("cuda", own)
    return torch.device(kind)


@contextmanager
def connected() -> Iterator[None]:
    """Turn the loss of another process into a Failed; other errors stay what they are."""
    try:
        yield
    except RuntimeError as error:
        if processes() == 1:
            raise
        from torch.distributed import DistError

        # Gloo raises a plain RuntimeError, which names the file of its own that it comes from.
        if isinstance(error, DistError) or "gloo" in str(error):
            raise Failed("another process of this command has ended: the same command goes on from here") from error
        raise


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Divide tensors, in their order, into lists of one type and about `BUCKET_BYTES`."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket
