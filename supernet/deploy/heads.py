"""Heads in their deploy forms."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from supernet.deploy.weights import affine, copied, linear


class Head(nn.Module):
    """Tokens (N, L, C) or a map (N, C, H, W) to logits; a batch norm is part of the classifier."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.form, self.tokens = module.form, module.tokens
        weight, bias = module.fc.weight.double(), module.fc.bias.double()  # two classifiers say the mean of theirs
        if isinstance(module.norm, nn.LayerNorm):
            self.norm = copied(module.norm)
        else:
            factor, offset = affine(module.norm)
            weight, bias = weight * factor, bias + weight @ offset
        self.fc = linear(weight, bias, module.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "class_token":
            return self.fc(self.norm(x[:, 0]))
        if self.form == "layer_norm":
            x = x if self.tokens else x.flatten(2).transpose(1, 2)
            # the axis more keeps ONNX Runtime from merging the sum before it with the norm, into a slower operator
            return self.fc(self.norm(x.unsqueeze(1)).mean((1, 2)))
        return self.fc(x.mean(1) if self.tokens else F.adaptive_avg_pool2d(x, 1).flatten(1))
