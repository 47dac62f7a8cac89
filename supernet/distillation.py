"""A second classifier, while a network learns from a teacher (DeiT, Touvron et al., ICML 2021; EfficientFormer).

In training both classify the same features; in eval mode the logits are the mean of the two. As both are linear, that is one
classifier with the mean of their weights: it is what a trained network is kept with. The head's norm is shared. Where it is a
batch norm before the classifier (EfficientViT, whose code has one for each), nothing is lost: the statistics are the same, and
a factor and an offset for each channel are within what a linear layer can learn.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from supernet.blocks.concatplexer import Multiplexed
from supernet.blocks.layers import HeadModule
from supernet.errors import InputError

_ONE = "head.fc."
_LABELS = "head.fc.labels."
_TEACHER = "head.fc.teacher."


class TwoClassifiers(nn.Module):
    """(N, C) to the logits for the labels and for the teacher, each (N, classes); in eval mode to their mean (N, classes)."""

    def __init__(self, labels: nn.Linear) -> None:
        super().__init__()
        self.labels = labels
        self.teacher = nn.Linear(labels.in_features, labels.out_features)
        self.teacher.load_state_dict(labels.state_dict())

    @property
    def weight(self) -> Tensor:
        return (self.labels.weight + self.teacher.weight) / 2

    @property
    def bias(self) -> Tensor:
        return (self.labels.bias + self.teacher.bias) / 2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.training:
            return self.labels(x), self.teacher(x)
        return F.linear(x, self.weight, self.bias)


def add_second_classifier(model: nn.Module) -> None:
    """Give a network of `build_model` a second classifier, which begins as the first. In training it then returns
    the logits for the labels and those for the teacher, as a pair.

    Raises:
        InputError: the network groups its images.
    """
    head = model.get_submodule("head")
    assert isinstance(head, HeadModule)
    if isinstance(model, Multiplexed):
        raise InputError("a network that groups its images (mux) has no second classifier: set distillation_head to false")
    head.fc = TwoClassifiers(head.fc)  # type: ignore[assignment]


def one_classifier(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with two classifiers as that of the network with one, which gives the same in eval mode."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(_LABELS):
            part = name.removeprefix(_LABELS)
            found[_ONE + part] = (tensor + state[_TEACHER + part]) / 2
        elif not name.startswith(_TEACHER):
            found[name] = tensor
    return found
