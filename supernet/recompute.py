"""Activation checkpointing: a module's activations are not kept for the backward pass but computed again in it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


def recomputed(module: nn.Module, tensors: Mapping[str, Tensor], *args: Any) -> Tensor:
    """Return `module(*args)`, run with `tensors` in the place of its parameters and buffers of these names.

    Of what is computed inside, only `args` and `tensors` are kept; the rest is computed a second time when gradients are. A
    buffer that training changes (batch-norm statistics) is changed by the first time alone, if it is among `tensors`.
    """
    again = False

    def run(*args: Any) -> Tensor:
        nonlocal again
        # Copies take what the second time would change. What has a gradient is no buffer.
        used = {name: t if t.requires_grad or not again else t.clone() for name, t in tensors.items()}
        again = True
        y: Tensor = functional_call(module, used, args, tie_weights=False)
        return y

    y: Tensor = checkpoint(run, *args, use_reentrant=False)
    return y
