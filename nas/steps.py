"""What every training shares: where and in which precision it computes, what decays, the learning rate, a batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from nas.data import ImageData, augment, normalise
from nas.parallel import ALONE, Group
from nas.pixels import loaded
from nas.progress import say
from supernet.blocks.efficientformer import LayerScale
from supernet.errors import InputError, first_line

T = TypeVar("T")

MOST_RATE = 1e6  # of a learning rate, or what else multiplies tensors: far beyond use, and within float32
MOST_IMAGES = 100_000_000  # of an epoch: its losses and, at worst, one step's images are held in memory
PRECISIONS = ("auto", "fp32", "bf16")
TRAINS_ON_MPS = (2, 15)  # batch norm in channels-last: PyTorch's own tests expect it to fail on Apple's GPU before
UNDECAYED = ("attention_biases", "cls_token", "pos_embed", "segments", "pair_biases")  # beside vectors


def accelerator(wanted: str = "auto") -> torch.device:
    """Return the device to train on. auto is CUDA where there is one, else the CPU; Apple's GPU is taken where it is asked for.

    Raises:
        InputError: there is no such device, or this PyTorch does not train on it.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return torch.device("cuda" if available["cuda"] else "cpu")
    if not available[wanted]:
        usable = ", ".join(name for name, there in available.items() if there)
        raise InputError(f"this PyTorch finds no {wanted} device: use one of {usable}")
    if wanted == "mps" and tuple(int(part) for part in torch.__version__.split(".")[:2]) < TRAINS_ON_MPS:
        raise InputError(
            f"PyTorch {torch.__version__} computes batch norm's gradients on Apple's GPU wrongly, or ends (pytorch#188371): "
            f"use cpu, or PyTorch {'.'.join(map(str, TRAINS_ON_MPS))} or later"
        )
    return torch.device(wanted)


def mixed_precision(device: torch.device, precision: str = "auto") -> torch.autocast:
    """Return the context in which a loss is computed: matrix products in bfloat16 by `precision` bf16, in fp32 by fp32.

    auto is bf16 on a GPU that multiplies it (NVIDIA's from Ampere on), and on a CPU with instructions for it (AVX-512 or AMX);
    elsewhere bfloat16 is emulated, so auto is fp32.
    """
    on = precision == "bf16" or (precision == "auto" and _multiplies_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and _cpu_has_bfloat16()


def _cpu_has_bfloat16() -> bool:
    try:
        has = torch.cpu.get_capabilities()
    except AttributeError:  # an older torch cannot say
        return False
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


@contextmanager
def repeated_shapes(device: torch.device) -> Iterator[None]:
    """Let cuDNN try its kernels for every new shape of a convolution and keep to the fastest; afterwards it chooses as before.

    For work of few shapes that come again and again: each costs time when it is new. Elsewhere than on CUDA nothing changes.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def set_layer_scale(model: nn.Module, value: float) -> None:
    """Set every layer scale of a network to one initial value."""
    for module in model.modules():
        if isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, value)


def parameter_groups(named: Iterator[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups: vectors, attention biases and what is added to tokens do not decay, everything else does."""
    decays: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in named:
        (free if parameter.ndim <= 1 or name.endswith(UNDECAYED) else decays).append(parameter)
    return [{"params": decays, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def cosine(step: int, steps: int, warm_up: int | None = None, start: float = 0.0, lowest: float = 0.01) -> float:
    """Return the factor on the learning rate: it rises linearly from `start` to 1 in the first `warm_up` steps (None: a
    twentieth of them), falls as a cosine to `lowest` at `steps`, and stays there."""
    if warm_up is None:
        warm_up = max(1, steps // 20)
    if step >= steps:
        return lowest
    if step < warm_up:
        return start + (1 - start) * (step + 1) / warm_up
    share = (step - warm_up) / (steps - warm_up)
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * share))


def check_parts(images: int, accumulate: int) -> None:
    """Refuse a process's images of a step that cannot go through the network in `accumulate` equal parts of at least 2."""
    if accumulate > 1 and (images % accumulate or images < 2 * accumulate):
        raise InputError(
            f"accumulate {accumulate} does not divide the {images} images that a process has of a step into equal parts of "
            "at least 2: give another accumulate or batch_size"
        )


def check_compiler(device: torch.device) -> None:
    """Refuse compilation where nothing can be compiled."""
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except Exception as error:  # compilers have no common one
        raise InputError(f"torch.compile does not work here ({first_line(error)}): set compile to false") from error


def say_if_hardly_compiled(model: nn.Module) -> None:
    """Say so where `torch.compile` compiles next to nothing of a network, which it does not say itself."""
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        say(
            "compile does next to nothing here: PyTorch's compiler stops at every batch norm over several GPUs (SyncBatchNorm, "
            "PyTorch issue 161302): set compile to false, or train on one GPU"
        )


def clip_by_weights(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Shorten the gradient of every unit to at most `factor` times the norm of its weights, or of 0.001 where that is more.

    A unit is the first axis of a tensor of two axes or more; a vector is one unit. Source: adaptive gradient clipping (Brock et
    al., ICML 2021), with the units of timm.
    """
    for parameter in parameters:
        if parameter.grad is None:
            continue
        axes = tuple(range(1, parameter.ndim)) or None
        weights, gradient = (
            torch.linalg.vector_norm(tensor, dim=axes, keepdim=True) for tensor in (parameter.detach(), parameter.grad)
        )
        most = weights.clamp_min(1e-3) * factor
        parameter.grad.mul_(torch.where(gradient > most, most / gradient.clamp_min(1e-6), 1.0))


def own_draws(device: torch.device) -> AbstractContextManager[None]:
    """Return the context after which PyTorch's own generators, of the CPU and of a GPU, are as before it."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


class Ahead(Generic[T]):
    """An iterator whose next item can be made before it is asked for, while an accelerator is busy with the last one."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)
        self._made: list[T] = []

    def make(self) -> None:
        """Make the next item, if there is one and it is not made yet."""
        if not self._made:
            self._made.extend(itertools.islice(self._items, 1))

    def __iter__(self) -> Ahead[T]:
        return self

    def __next__(self) -> T:
        return self._made.pop() if self._made else next(self._items)


def training_batches(
    data: ImageData, order: Iterable[Tensor], generator: torch.Generator, device: torch.device, group: Group = ALONE
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each batch of indices (B,) into the training images, this process's rows of it: images, augmented and
    normalised (b, 3, S, S), and labels (b,).

    The draws of a batch are those of one process that has all of it. They are made when the batch is asked for; its images are
    read before.
    """
    own = (indices[group.rows(len(indices))] for indices in order)
    for pixels, labels in loaded(data.train, own, device):
        whole = len(labels) * group.size
        x = normalise(augment(pixels, generator, data.flips, part=(group.rows(whole), whole)))
        yield x.contiguous(memory_format=torch.channels_last), labels
