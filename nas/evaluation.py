"""Loss and accuracy of a sub-network with weights inherited from the supernet: what a slimming action costs.

Batch-norm statistics are recomputed for every network on a few hundred training images. What the network shares with
those evaluated before it, from the image up to the first changed layer, is not computed again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nas.data import ImageData, Images, normalise
from nas.slimming import Evaluation
from supernet.arch import ArchConfig
from supernet.specs import Layer
from supernet.units import UnitScores
from supernet.weights import AnySupernet, subnetwork

MEMORY_BYTES = 1 << 30  # of activations that are kept
CHUNK = 128  # images that go through a layer at once

Prefix = tuple[tuple[str, Layer], ...]


class Evaluator:
    """Calling it with a network of the supernet's space returns its loss and accuracy on the scoring images.

    The network may be given at any image size: it is evaluated at the supernet's. The same network gives the same
    result whatever was evaluated before. `kept` decides which channels a narrowed stage inherits, as in `subnetwork`: as they
    depend on the stage's width alone, and never on later layers, what was computed for a prefix stays true.
    """

    def __init__(
        self,
        supernet: AnySupernet,
        data: ImageData,
        recalibration_images: int = 256,
        memory_bytes: int = MEMORY_BYTES,
        kept: UnitScores | None = None,
    ) -> None:
        self.supernet = supernet.eval()
        self.kept = kept
        self.device = next(supernet.parameters()).device
        count = min(recalibration_images, len(data.train))
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
        self.recalibration, _ = self._images(data.train, order[:count])
        self.images, self.labels = self._images(data.score, torch.arange(len(data.score)))
        self.memory_bytes = memory_bytes
        self._kept: OrderedDict[Prefix, tuple[Tensor, Tensor]] = OrderedDict()
        self.layers_run = 0  # how many layers were computed, for judging what keeping activations saves

    def _images(self, images: Images, indices: Tensor) -> tuple[Tensor, Tensor]:
        pixels, labels = images.batch(indices)
        x = normalise(pixels.to(self.device)).contiguous(memory_format=torch.channels_last)
        return x, labels

    def inherited(self, arch: ArchConfig) -> nn.Sequential:
        """Return a network with its own copy of the inherited weights, whose batch-norm statistics do not fit it yet."""
        model = subnetwork(self.supernet, arch.at(self.supernet.space.image_size), self.kept)
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    @torch.no_grad()
    def __call__(self, arch: ArchConfig) -> Evaluation:
        named = self.supernet.space.fit(arch.at(self.supernet.space.image_size)).named_layers()
        model = self.inherited(arch)
        start, fit, score = self._longest_prefix(named)
        modules = list(model.children())
        for at in range(start, len(named)):
            fit = recalibrated(modules[at], fit)
            score = torch.cat([modules[at](chunk) for chunk in score.split(CHUNK)])
            self.layers_run += 1
            self._keep(tuple(named[: at + 1]), fit, score)
        return self._judged(score)

    @torch.no_grad()
    def judge(self, model: nn.Sequential) -> Evaluation:
        """Return how any network does, its batch-norm statistics recomputed first."""
        recalibrate(model, self.recalibration)
        return self._judged(torch.cat([model(chunk) for chunk in self.images.split(CHUNK)]))

    def _judged(self, logits: Tensor) -> Evaluation:
        logits = logits.cpu().double()  # Apple's GPU has no float64
        loss = F.cross_entropy(logits, self.labels).item()
        accuracy = (logits.argmax(1) == self.labels).double().mean().item()
        return Evaluation(loss, accuracy)

    def _longest_prefix(self, named: list[tuple[str, Layer]]) -> tuple[int, Tensor, Tensor]:
        for length in range(len(named) - 1, 0, -1):
            prefix = tuple(named[:length])
            if prefix in self._kept:
                self._kept.move_to_end(prefix)
                return length, *self._kept[prefix]
        return 0, self.recalibration, self.images

    def _keep(self, prefix: Prefix, fit: Tensor, score: Tensor) -> None:
        self._kept[prefix] = (fit, score)
        while sum(_bytes(pair) for pair in self._kept.values()) > self.memory_bytes:
            self._kept.popitem(last=False)


def _bytes(tensors: tuple[Tensor, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@torch.no_grad()
def recalibrated(module: nn.Module, x: Tensor) -> Tensor:
    """Set a layer's batch-norm statistics to those of the batch `x`, leave it in eval mode, return its output."""
    norms = list(_batch_norms(module))
    if not norms:
        return torch.cat([module.eval()(chunk) for chunk in x.split(CHUNK)])
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the statistics become this batch's
    y: Tensor = module.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.eval()
    return y


@torch.no_grad()
def recalibrate(model: nn.Sequential, x: Tensor, unchanged: int = 0) -> None:
    """Fit a network's batch-norm statistics to the normalised images `x` (N, 3, S, S), those of the first `unchanged` layers
    aside; leave it in eval mode."""
    model.eval()
    for at, module in enumerate(model.children()):
        x = recalibrated(module, x) if at >= unchanged else torch.cat([module(chunk) for chunk in x.split(CHUNK)])


def _batch_norms(module: nn.Module) -> Iterator[_BatchNorm]:
    return (m for m in module.modules() if isinstance(m, _BatchNorm))


@torch.no_grad()
def accuracy_of(model: nn.Module, images: Images, batch_size: int = 256) -> tuple[float, float]:
    """Return the mean cross-entropy and the accuracy (0 to 1) of a network on labelled images."""
    model.eval()
    device = next(model.parameters()).device
    loss, right = 0.0, 0
    for indices in torch.arange(len(images)).split(batch_size):
        pixels, labels = images.batch(indices)
        x = normalise(pixels.to(device)).contiguous(memory_format=torch.channels_last)
        logits = model(x).cpu().double()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
    return loss / len(images), right / len(images)
