"""Loss and accuracy of a sub-network after a short training of its own: what an action costs once the rest has adapted."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nas.augmentation import seed_draws
from nas.data import ImageData, epoch_batches
from nas.evaluation import Evaluator
from nas.settings import SupernetSettings
from nas.steps import cosine, mixed_precision, own_draws, parameter_groups, training_batches
from nas.trajectory import Evaluation
from supernet.arch import ArchConfig


class Recovered:
    """Calling it with a network of the supernet's space returns its loss and accuracy on the scoring images, after
    `recovery_steps` steps of training on its own copy of the inherited weights.

    Every network is trained on the same batches with the same augmentation (by the seed), with AdamW from half the
    supernet's learning rate; statistics of batch norm are recomputed afterwards, as everywhere. The supernet stays as it is,
    and the same network gives the same result whatever was evaluated before. Nothing can be shared between networks: an
    evaluation takes as long as its training.
    """

    def __init__(self, evaluator: Evaluator, data: ImageData, settings: SupernetSettings, seed: int) -> None:
        self.evaluator = evaluator
        self.data = data
        self.settings = settings
        self.seed = seed

    @property
    def device(self) -> torch.device:
        return self.evaluator.device

    def on(self, device: torch.device) -> Recovered:
        """Return the same on another device, with its own copy of the weights."""
        other = copy.copy(self)
        other.evaluator = self.evaluator.on(device)
        return other

    def shares(self, archs: Sequence[ArchConfig], number: int) -> list[list[int]]:
        """Divide networks among `number` processes; return which of `archs` each gets. All of them take about as long."""
        return [list(range(first, len(archs), number)) for first in range(number)]

    def __call__(self, arch: ArchConfig) -> Evaluation:
        model = self.evaluator.inherited(arch)
        with own_draws(self.device):
            self._train(model)
        return self.evaluator.judge(model)

    def _train(self, model: nn.Sequential) -> None:
        settings, steps = self.settings, self.settings.recovery_steps
        optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), settings.weight_decay))
        generator = torch.Generator().manual_seed(self.seed)
        batches = epoch_batches(len(self.data.train), settings.batch_size, self.seed, 0, steps * settings.batch_size)
        model.train()
        for step, (x, y) in enumerate(training_batches(self.data, batches, generator, self.evaluator.device)):
            seed_draws(self.seed, 0, step)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate / 2 * cosine(step, steps)
            with mixed_precision(x.device, settings.precision):
                loss = F.cross_entropy(model(x), y, label_smoothing=settings.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
