"""Seeded weights and images for golden files: the same numbers on every machine, from numpy's raw PCG64 stream.

Only the raw stream is used, since numpy keeps it the same for ever, which it does not promise of its distributions.
Layer scales are far from their initial 1e-5, at which a wrong block would not show; batch-norm statistics and attention
biases are random for the same reason.
"""

from math import prod, sqrt
from zlib import crc32

import numpy as np
from numpy.typing import NDArray


def weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32] | NDArray[np.int64]:
    """Return the tensor of this name in a timm state dict: float32, or int64 for counters and index buffers."""
    if name.endswith(("num_batches_tracked", "attention_bias_idxs")):
        return np.zeros(shape, np.int64)
    if name.endswith("gamma"):
        return _uniform(name, shape, 0.25, 0.75)
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        return _uniform(name, shape, 0.5, 1.5)
    if name.endswith("attention_biases"):
        return _centred(name, shape, 1.0)
    if name.endswith("talking_head2.bias"):
        return _centred(name, shape, 0.01)  # the sum of the values of all positions is weighted with it
    if name.endswith(("bias", "running_mean")):
        return _centred(name, shape, 0.1)
    return _centred(name, shape, 1 / sqrt(prod(shape[1:])))


def efficientvit_weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32] | NDArray[np.int64]:
    """Return the tensor of this name in timm's state dict of an EfficientViT.

    Its initial batch norms make every residual branch zero, and with scales of 1 the logits grow beyond 1e4. So the last
    scale of every branch is small here and no other is far from 1.
    """
    if name.endswith(("num_batches_tracked", "attention_bias_idxs")):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var"):
        return _uniform(name, shape, 0.8, 1.2)
    if name.endswith("bn.weight"):
        ends_branch = name.endswith((".m.bn.weight", ".pw2.bn.weight", ".proj.1.bn.weight"))
        return _uniform(name, shape, 0.2, 0.4) if ends_branch else _uniform(name, shape, 0.8, 1.2)
    if name.endswith("attention_biases"):
        return _centred(name, shape, 1.0)
    if name.endswith(("bias", "running_mean")):
        return _centred(name, shape, 0.1)
    return _centred(name, shape, sqrt(1.3 / prod(shape[1:])))


def images(count: int, size: int) -> NDArray[np.float32]:
    """Return (count, 3, size, size) pixels of mean 0 and standard deviation 1.1: coarse patches under fine noise.

    Noise alone would be averaged away by the network, and all images would give the same logits.
    """
    patch = -(-size // 8)
    coarse = _centred("coarse", (count, 3, 8, 8), 1.0).repeat(patch, 2).repeat(patch, 3)
    return coarse[:, :, :size, :size] + _centred("fine", (count, 3, size, size), 0.5)


def _centred(name: str, shape: tuple[int, ...], std: float) -> NDArray[np.float32]:
    return _uniform(name, shape, -sqrt(3) * std, sqrt(3) * std)


def _uniform(name: str, shape: tuple[int, ...], low: float, high: float) -> NDArray[np.float32]:
    raw = np.random.PCG64(crc32(name.encode())).random_raw(prod(shape))
    unit = (raw >> np.uint64(40)).astype(np.float32) / np.float32(2**24)  # exact, in [0, 1)
    return (np.float32(low) + np.float32(high - low) * unit).reshape(shape)
