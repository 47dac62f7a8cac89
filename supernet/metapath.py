"""The MetaPath supernet: every candidate of every slot, mixed by the path that it is given.

Source: EfficientFormer (Li et al., NeurIPS 2022), section 4.2. The path is an argument and never state: noise is drawn
outside, by `sample_path`.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from supernet.arch import layer_name, place_of
from supernet.blocks import build_layer
from supernet.recompute import recomputed
from supernet.space import SearchSpace
from supernet.specs import Flat, Layer, Unflat

Noise = Literal["gumbel", "uniform"]
Choice = int | Tensor
Path = Sequence[Choice]


class MetaPath(nn.Module):
    """One slot: its candidates, each (N, C, H, W) to the same shape; token candidates reshape inside."""

    def __init__(self, candidates: Sequence[Layer]) -> None:
        super().__init__()
        self.candidates = nn.ModuleList(build_layer(layer) for layer in candidates)
        self.on_tokens = [getattr(layer.spec, "tokens", False) for layer in candidates]

    def forward(self, x: Tensor, choice: Choice) -> Tensor:
        """Run the candidate of index `choice`, or mix all of them by the weight vector `choice` (n_candidates,)."""
        if isinstance(choice, int):
            if not 0 <= choice < len(self.candidates):
                raise ValueError(f"the path chooses candidate {choice} of a slot with {len(self.candidates)}")
            return self._run(choice, x)
        if choice.shape != (len(self.candidates),):
            raise ValueError(f"the path has weights {tuple(choice.shape)} for a slot with {len(self.candidates)}")
        first, *others = choice.unbind()
        mixture = first * self._run(0, x)
        for index, weight in enumerate(others, 1):
            y = self._run(index, x)
            if y.device.type != "cpu":  # where autocast widens all that addcmul takes to the widest: to the weights' fp32
                weight = weight.to(torch.promote_types(mixture.dtype, y.dtype))
            mixture = mixture.addcmul(y, weight)
        return mixture

    def _run(self, index: int, x: Tensor) -> Tensor:
        if not self.on_tokens[index] or x.ndim == 3:  # after a patch stem all are tokens
            y: Tensor = self.candidates[index](x)
            return y
        tokens: Tensor = self.candidates[index](x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class Supernet(nn.Module):
    """Every network of a space at its largest widths, with shared weights.

    `logits` holds a vector for each slot, one entry a candidate, in the order of `space.slots`: what Gumbel-Softmax
    learns. It plays no part in `forward`.
    """

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space
        self.checkpoint_activations = False
        """Whether slots are computed again in the backward pass, to save memory. It changes no number."""
        # The largest network says which stem, embeddings and head there are; its blocks are replaced by MetaPaths.
        largest = dict(space.largest.named_layers())
        self.stem = build_layer(largest["stem"])
        self.embeddings = nn.ModuleList(
            build_layer(largest[layer_name(stage, "embedding")]) for stage in range(1, len(space.stages))
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(
                MetaPath([Layer(candidate, resolution) for candidate in stage.candidates]) for _ in range(stage.depth)
            )
            for stage, resolution in zip(space.stages, space.resolutions, strict=True)
        )
        head = largest["head"]
        self.head = build_layer(head)
        self.head_on_tokens = bool(getattr(head.spec, "tokens", False))
        self.logits = nn.ParameterList(Parameter(torch.zeros(len(space.stages[stage].candidates))) for stage, _ in space.slots)

    def forward(self, x: Tensor, path: Path) -> Tensor:
        """Return logits (N, num_classes) of images (N, 3, S, S).

        `path` has one entry for each slot: an int runs that candidate alone, a weight vector (n_candidates,) mixes.
        In eval mode a path of ints equals the built sub-network with the same weights.
        """
        if len(path) != len(self.logits):
            raise ValueError(f"the path has {len(path)} entries for {len(self.logits)} slots")
        choices = iter(path)
        x = self.stem(x)
        for number, slots in enumerate(self.stages):
            if number:
                x = self.embeddings[number - 1](x)
            for slot in slots:  # type: ignore[attr-defined, union-attr]
                if self.checkpoint_activations and torch.is_grad_enabled():
                    x = recomputed(slot, dict(slot.named_buffers()), x, next(choices))
                else:
                    x = slot(x, next(choices))
        if self.head_on_tokens and x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        y: Tensor = self.head(x)
        return y

    def compile_layers(self) -> int:
        """Let every layer, and every candidate by itself, run as `torch.compile` makes it, whatever path it is on; return how
        many they are. The state dict keeps its names. A copy made by `copy.deepcopy` would run on the weights of this one."""
        slots = (slot for stage in self.stages for slot in stage)  # type: ignore[attr-defined, union-attr]
        layers = [self.stem, *self.embeddings, *(candidate for slot in slots for candidate in slot.candidates), self.head]
        layers = [layer for layer in layers if any(True for _ in layer.parameters())]
        for layer in layers:
            # Not `layer.compile()`, which passes over layers whose forward is PyTorch's own, as nn.Sequential's.
            layer.forward = torch.compile(layer.forward, dynamic=False)
        return len(layers)

    def source(self, name: str, layer: Layer) -> nn.Module:
        """Return the module whose leading slices are the weights of a network's layer of this name."""
        if isinstance(layer.spec, Flat | Unflat):
            return nn.Identity()
        if name in ("stem", "head"):
            return self.get_submodule(name)
        stage, part, slot = place_of(name)
        assert stage is not None
        if part == "embedding":
            return self.embeddings[stage - 1]
        choices = self.space.stages[stage]
        candidate = choices.kinds.index(choices.kind_of(layer.spec))  # type: ignore[arg-type]
        return self.get_submodule(f"stages.{stage}.{slot}.candidates.{candidate}")

    def importance(self) -> list[dict[str, float]]:
        """Return, for every slot, each candidate's log-odds against identity: logit minus identity's logit."""
        found = []
        for (stage, _), logit in zip(self.space.slots, self.logits, strict=True):
            values = dict(zip(self.space.stages[stage].kinds, logit.tolist(), strict=True))
            empty = values.pop("identity")
            found.append({kind: value - empty for kind, value in values.items()})
        return found


def sample_path(
    logits: Sequence[Tensor], tau: float, generator: torch.Generator | None = None, noise: Noise = "gumbel"
) -> list[Tensor]:
    """Return one weight vector for each slot: softmax((logits + noise) / tau). Gradients reach the logits.

    `noise` is true Gumbel noise, or `uniform` on (0, 1) as the EfficientFormer paper prints it. The noise is drawn on
    the generator's device (CPU without one), so a seed gives the same path on every accelerator.

    Raises:
        ValueError: tau is not positive, or the noise is neither.
    """
    if not tau > 0:
        raise ValueError(f"tau must be positive, but is {tau}")
    if noise not in get_args(Noise):
        raise ValueError(f"noise must be {' or '.join(get_args(Noise))}, but is {noise!r}")
    path = []
    for logit in logits:
        device = generator.device if generator is not None else torch.device("cpu")
        drawn = torch.rand(logit.shape, generator=generator, device=device)
        if noise == "gumbel":
            drawn = -(-drawn.clamp_min(torch.finfo(drawn.dtype).tiny).log()).clamp_min(1e-20).log()
        path.append(((logit + drawn.to(logit.device)) / tau).softmax(0))
    return path
