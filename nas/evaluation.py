"""Loss and accuracy of a sub-network with weights inherited from the supernet: what a slimming action costs.

Batch-norm statistics are recomputed for every network on a few hundred training images. What the network shares with
those evaluated before it, from the image up to the first changed layer, is not computed again (nas.prefixes).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nas.data import ImageData, Images, normalise
from nas.parallel import ALONE, Group
from nas.pixels import loaded
from nas.prefixes import PrefixCache, Tree, cheapest_order, shares
from nas.trajectory import Evaluation
from supernet.arch import ArchConfig
from supernet.specs import Layer
from supernet.units import UnitScores
from supernet.weights import AnySupernet, subnetwork

CHUNK = 128  # images that go through a layer at once, at most ...
CHUNK_BYTES = 2 << 20  # ... on a CPU as many as this holds of what enters the layer: what it computes then stays in the caches
SHARE = 4  # a fourth of the machine's memory is for activations ...
UNKNOWN_MEMORY = 4 << 30  # ... which is taken to be this where the system does not say
CONTROL_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # what a container may have

Named = list[tuple[str, Layer]]


class Evaluator:
    """Calling it with a network of the supernet's space returns its loss and accuracy on the scoring images.

    The network may be given at any image size: it is evaluated at the supernet's. The same network gives the same
    result whatever was evaluated before. `kept` decides which channels a narrowed stage inherits, as in `subnetwork`: as they
    depend on the stage's width alone, and never on later layers, what was computed for a prefix stays true. `memory_bytes`: of
    activations that are kept, at most (None: `memory_for_activations`).
    """

    def __init__(
        self,
        supernet: AnySupernet,
        data: ImageData,
        recalibration_images: int = 256,
        memory_bytes: int | None = None,
        kept: UnitScores | None = None,
    ) -> None:
        self.supernet = supernet.eval()
        self.kept = kept
        self.device = next(supernet.parameters()).device
        count = min(recalibration_images, len(data.train))
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
        self.recalibration, _ = self._images(data.train, order[:count])
        self.images, self.labels = self._images(data.score, torch.arange(len(data.score)))
        self.memory_bytes = memory_for_activations(self.device) if memory_bytes is None else memory_bytes
        self.forget()
        self.layers_run = 0  # how many layers were computed, for judging what keeping activations saves

    def _images(self, images: Images, indices: Tensor) -> tuple[Tensor, Tensor]:
        pixels, labels = images.batch(indices)
        x = normalise(pixels.to(self.device)).contiguous(memory_format=torch.channels_last)
        return x, labels

    def inherited(self, arch: ArchConfig, begin: int = 0) -> nn.Sequential:
        """Return a network, without its first `begin` layers, with its own copy of the inherited weights, whose batch-norm
        statistics do not fit it yet."""
        model = subnetwork(self.supernet, arch.at(self.supernet.space.image_size), self.kept, begin)
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def on(self, device: torch.device) -> Evaluator:
        """Return the same evaluator on another device, with its own copy of the weights and nothing kept."""
        other = copy.copy(self)
        other.supernet = copy.deepcopy(self.supernet).to(device)
        other.device = device
        other.recalibration, other.images = self.recalibration.to(device), self.images.to(device)
        other.forget()
        return other

    def forget(self) -> None:
        """Let go of all activations."""
        self._tree = Tree()
        self._cache: PrefixCache[tuple[Tensor, Tensor]] = PrefixCache(self._tree, self.memory_bytes)

    def __call__(self, arch: ArchConfig) -> Evaluation:
        ((_, evaluation),) = self.each([arch])
        return evaluation

    def each(self, archs: Sequence[ArchConfig]) -> Iterator[tuple[int, Evaluation]]:
        """Yield the evaluation of each network with its place in `archs`, in the order in which least is to be kept at once."""
        layers = [self._layers(arch) for arch in archs]
        nodes = [self._tree.nodes(named) for named in layers]
        order = cheapest_order(nodes)
        self._cache.begin([nodes[at] for at in order])
        for place, at in enumerate(order):
            yield at, self._evaluate(archs[at], layers[at], nodes[at], place)

    def shares(self, archs: Sequence[ArchConfig], number: int) -> list[list[int]]:
        """Divide networks among `number` processes; return which of `archs` each gets."""
        return shares([self._tree.nodes(self._layers(arch)) for arch in archs], number)

    def _layers(self, arch: ArchConfig) -> Named:
        return self.supernet.space.fit(arch.at(self.supernet.space.image_size)).named_layers()

    @torch.no_grad()
    def _evaluate(self, arch: ArchConfig, named: Named, nodes: list[int], place: int) -> Evaluation:
        start, kept = self._cache.longest(nodes, place)
        fit, score = (self.recalibration, self.images) if kept is None else kept
        del kept  # or it would stay in memory as long as the network is run
        for node, module in zip(nodes[start:], self.inherited(arch, start), strict=True):
            fit = recalibrated(module, fit)
            score = through(module, score)
            self.layers_run += not self._tree.is_free(node)
            if node != nodes[-1]:
                self._cache.keep(node, (fit, score), _bytes(fit, score))
        return self._judged(score)

    @torch.no_grad()
    def judge(self, model: nn.Sequential) -> Evaluation:
        """Return how any network does, its batch-norm statistics recomputed first."""
        recalibrate(model, self.recalibration)
        score = self.images
        for module in model:
            score = through(module, score)
        return self._judged(score)

    def _judged(self, logits: Tensor) -> Evaluation:
        logits = logits.cpu().double()  # Apple's GPU has no float64
        loss = F.cross_entropy(logits, self.labels).item()
        accuracy = (logits.argmax(1) == self.labels).double().mean().item()
        return Evaluation(loss, accuracy)


def through(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer in eval mode makes of the images `x` (N, ...), a chunk at a time."""
    of_cpu = max(1, CHUNK_BYTES // (x[0].numel() * x.element_size())) if x.device.type == "cpu" else CHUNK
    return torch.cat([layer(chunk) for chunk in x.split(min(of_cpu, CHUNK))])


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def memory_for_activations(device: torch.device) -> int:
    """Return how many bytes of activations an evaluator keeps where nothing else is said: half of what is free on a GPU, a
    fourth of the machine's memory elsewhere, less where torchrun has several processes share it."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what a training has let go of, PyTorch keeps; it is free, and not counted as such
        return int(torch.cuda.mem_get_info(device)[0] // 2 // -(-processes // torch.cuda.device_count()))
    return machine_memory() // SHARE // processes


def machine_memory() -> int:
    """Return the bytes of memory that this machine has, or this container may have."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, and not every system knows the names
        found = UNKNOWN_MEMORY
    for path in CONTROL_GROUPS:
        try:
            found = min(found, int(Path(path).read_text()))
        except (OSError, ValueError):  # another system, or no limit ("max")
            continue
    return found


@torch.no_grad()
def recalibrated(module: nn.Module, x: Tensor) -> Tensor:
    """Set a layer's batch-norm statistics to those of the batch `x`, leave it in eval mode, return its output.

    Only its batch norms are in training mode meanwhile: what else behaves otherwise in it, as dropout, would draw.
    """
    module.eval()
    norms = list(_batch_norms(module))
    if not norms:
        return through(module, x)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # the statistics become this batch's
    y: Tensor = module(x)
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
        x = recalibrated(module, x) if at >= unchanged else through(module, x)


def _batch_norms(module: nn.Module) -> Iterator[_BatchNorm]:
    return (m for m in module.modules() if isinstance(m, _BatchNorm))


@torch.no_grad()
def accuracy_of(model: nn.Module, images: Images, group: Group = ALONE, batch_size: int = 256) -> tuple[float, float]:
    """Return the mean cross-entropy and the accuracy (0 to 1) of a network on labelled images, whose batches are divided among
    the processes of a group."""
    model.eval()
    device = next(model.parameters()).device
    found = torch.zeros(2, dtype=torch.double)  # summed loss, images that are right
    batches = torch.arange(len(images)).split(batch_size)[group.rank :: group.size]
    for pixels, labels in loaded(images, batches, device):
        x = normalise(pixels).contiguous(memory_format=torch.channels_last)
        logits, labels = model(x).cpu().double(), labels.cpu()
        found[0] += F.cross_entropy(logits, labels, reduction="sum")
        found[1] += (logits.argmax(1) == labels).sum()
    loss, right = group.sum(found).tolist()
    return loss / len(images), right / len(images)
