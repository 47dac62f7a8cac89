"""A moving average of a network's weights while it is trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class MovingAverage:
    """The average of a network's weights and batch-norm statistics, the newest counting most.

    After step t (from 1) it keeps the share d = min(decay, (1 + t) / (10 + t)) of itself and takes 1 - d of the network. The
    second bound lets short trainings have a use of a decay for long ones, as their average would otherwise still be mostly the
    random weights that they began with.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of `model`, after a step of its training."""
        self.steps += 1
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        pairs = list(zip(self.network.state_dict().values(), model.state_dict().values(), strict=True))
        values = [pair for pair in pairs if pair[0].is_floating_point()]
        counts = [pair for pair in pairs if not pair[0].is_floating_point()]  # how many batches a batch norm has seen
        # All at once, as torch.optim.swa_utils does it: a GPU needs a few kernels instead of one for each tensor.
        torch._foreach_lerp_([mine for mine, _ in values], [given for _, given in values], share)
        for mine, given in counts:
            mine.copy_(given)

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state_dict["network"])
        self.steps = int(state_dict["steps"])
