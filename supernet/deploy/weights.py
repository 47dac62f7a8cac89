"""Weights of deploy forms: what is folded into them, and layers that are made of them. Computed in float64, kept in the dtype
and on the device of the weights that they come from."""

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def folded(parts: Iterable[Any], scale: Tensor | float = 1.0, *, shortcut: bool = False) -> nn.Conv2d:
    """Return a convolution, or one and the batch norm after it, as one convolution, with factors of its outputs in its weights;
    with `shortcut` (a depthwise one) it adds its input."""
    conv, norm = (*parts, None)[:2]
    weight = conv.weight.double()
    bias = conv.bias.double() if conv.bias is not None else weight.new_zeros(len(weight))
    if norm is not None:
        factor, offset = affine(norm)
        weight, bias = weight * rows(factor, weight), bias * factor + offset
    weight, bias = weight * rows(scale, weight), bias * rows(scale, bias)
    if shortcut:
        weight[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] += 1
    return convolution(weight, bias, conv.weight, conv.stride, conv.padding, conv.groups)


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Return the factor and the offset of every channel that a batch norm is in eval mode."""
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return factor, norm.bias.double() - norm.running_mean.double() * factor


def convolution(
    weight: Tensor, bias: Tensor | None, like: Tensor, stride: Any = 1, padding: Any = 0, groups: int = 1
) -> nn.Conv2d:
    """Return a convolution with these weights, in the dtype and on the device of `like`."""
    size = (weight.shape[2], weight.shape[3])
    shape = (weight.shape[1] * groups, len(weight), size, stride, padding, 1, groups, bias is not None)
    return _made(nn.Conv2d, shape, weight, bias, like)


def linear(weight: Tensor, bias: Tensor, like: Tensor) -> nn.Linear:
    """Return a linear layer with these weights, in the dtype and on the device of `like`."""
    return _made(nn.Linear, (weight.shape[1], len(weight)), weight, bias, like)


def _made(kind: Any, shape: tuple[Any, ...], weight: Tensor, bias: Tensor | None, like: Tensor) -> Any:
    # without initial values: they would draw from the generator that all share
    made = nn.utils.skip_init(kind, *shape, dtype=like.dtype, device=like.device)
    made.weight.copy_(weight)
    if bias is not None:
        made.bias.copy_(bias)
    return made


def rows(factor: Tensor | float, weight: Tensor) -> Tensor | float:
    """Return factors of a weight's rows (outputs), shaped to multiply it."""
    return factor.to(weight).reshape(-1, *[1] * (weight.ndim - 1)) if isinstance(factor, Tensor) else factor


def copied(module: Module) -> Module:
    """Return a part that stays as it is: a copy, so that the deploy form shares nothing with the network."""
    return copy.deepcopy(module)


def identity(channels: int, like: Tensor) -> nn.Conv2d:
    """Return a depthwise convolution that changes nothing. A runtime with blocks of channels enters them at a convolution and
    at no sum: with it, what attention gives is inside before the activation, not after."""
    return convolution(like.new_ones(channels, 1, 1, 1), None, like, groups=channels)


def positions(function: nn.Module, side: int, like: Tensor) -> Tensor:
    """Return a linear function of every channel of a map, the same for all, as a matrix: (L, L of the output), to multiply
    from the right."""
    maps = torch.eye(side**2, dtype=torch.float64, device=like.device).view(-1, 1, side, side)
    found: Tensor = function(maps)
    return found.flatten(1).to(like)


def of_one_axis(conv: nn.Conv2d) -> nn.Conv1d:
    """Return a 1x1 convolution for (N, C, L): ONNX Runtime computes it as one product, outside the blocked layout."""
    shape = (conv.in_channels, conv.out_channels, 1, 1, 0, 1, 1, conv.bias is not None)
    return _made(nn.Conv1d, shape, conv.weight.flatten(2), conv.bias, conv.weight)


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)
