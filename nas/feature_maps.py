"""The maps of a network's stages, for heads that detect or segment. Shapes: N images, C_i and H_i = W_i of stage i."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from supernet.arch import ArchConfig, place_of
from supernet.errors import InputError
from supernet.model import build_model
from supernet.specs import PatchStem
from supernet.weights import at_size
from supernet.zoo import load_arch


def features(
    network: ArchConfig | str | Path,
    weights: str | Path | None = None,
    *,
    out_indices: Sequence[int] | None = None,
    image_size: int | None = None,
) -> Features:
    """Return a network as a backbone that gives the maps of its stages.

    Args:
        network: an ArchConfig, a YAML file or a zoo name.
        weights: a file of nas-train, nas-search or timm, or timm:NAME; None: random ones.
        out_indices: which stages, counted from 0, or from the end if negative; None: all.
        image_size: of the images that it will get, if not the network's own; what depends on it is resized.

    Raises:
        InputError: there is no such stage, the network groups its images, or the weights do not fit.
    """
    arch = (network if isinstance(network, ArchConfig) else load_arch(network)).without_identity()
    if image_size is not None:
        arch = arch.at(image_size)  # first: what is resized twice is no longer what was given
    if weights is None:
        return Features(build_model(arch), arch, out_indices)
    from nas.pretrained import load_pretrained

    read = load_pretrained(arch.name, str(weights), arch)
    model = build_model(read.arch)
    model.load_state_dict(read.state)
    return Features(model, read.arch, out_indices)


class Features(nn.Sequential):
    """The layers of a network up to the last stage that is asked for: (N, 3, S, S) to a list of maps (N, C_i, H_i, W_i).

    Layers keep their names, so the state dict of the whole network loads into it, also one for another image size: the rest is
    left out, and bias tables and position embeddings are resized.
    """

    def __init__(self, model: nn.Sequential, arch: ArchConfig, out_indices: Sequence[int] | None = None) -> None:
        """Take the layers of `model`, the network of `arch`; they are shared, not copied."""
        indices = stage_indices(arch, out_indices)
        layers = dict(model.named_children())
        taps = stage_taps(arch)
        names = list(layers)[: list(layers).index(taps[max(indices)]) + 1]
        super().__init__(OrderedDict((name, layers[name]) for name in names))
        self.arch = arch
        self.out_indices = indices
        self.feature_info: Any = stage_info(arch)
        """For each stage of the network: `num_chs`, `reduction` (of the image's side), `module` (its last), `index`. timm's
        FeatureInfo where timm has made it."""
        self.register_load_state_dict_pre_hook(fit_state)

    @property
    def channels(self) -> list[int]:
        """C_i of the maps."""
        return [self.arch.widths[index] for index in self.out_indices]

    @property
    def strides(self) -> list[int]:
        """How many times smaller the maps' sides are than the image's, rounded up."""
        return [stage_info(self.arch)[index]["reduction"] for index in self.out_indices]

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        maps, _ = stage_maps(self.arch, dict(self.named_children()), x)
        return [maps[index] for index in self.out_indices]


def stage_maps(arch: ArchConfig, layers: Mapping[str, nn.Module], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Send images (N, 3, S, S) through a network's layers, from the first on; return the map of every stage reached, and what
    leaves the last layer."""
    taps = stage_taps(arch)
    maps: list[Tensor] = []
    for name, module in layers.items():
        x = module(x)
        if name in taps:
            maps.append(as_map(arch, len(maps), x))
    return maps, x


def as_map(arch: ArchConfig, stage: int, x: Tensor) -> Tensor:
    """Return what leaves a stage as a map (N, C, H, W), also where it is tokens (N, L, C)."""
    if x.ndim == 4:
        return x
    if isinstance(arch.stages[0].entry, PatchStem):
        x = x[:, 1:]  # without the class token
    side = arch.resolutions[stage]
    return x.transpose(1, 2).unflatten(2, (side, side))


def stage_taps(arch: ArchConfig) -> list[str]:
    """Return the name of the last layer of each stage."""
    last: dict[int, str] = {}
    for name, _ in arch.named_layers():
        stage, part, _ = place_of(name)
        if stage is not None and part != "unflat":
            last[stage] = name
    return [last[stage] for stage in sorted(last)]


def stage_info(arch: ArchConfig) -> list[dict[str, Any]]:
    """Return what timm calls feature_info, one entry for each stage."""
    reductions = accumulate(arch.strides, mul)
    rows = zip(arch.widths, reductions, stage_taps(arch), strict=True)
    return [
        {"num_chs": width, "reduction": reduction, "module": name, "index": index}
        for index, (width, reduction, name) in enumerate(rows)
    ]


def stage_indices(arch: ArchConfig, given: Sequence[int] | None) -> tuple[int, ...]:
    """Return stages counted from 0, in ascending order.

    Raises:
        InputError: there is no such stage, or the network groups its images.
    """
    if arch.multiplexes:
        raise InputError(f"{arch.name} groups its images (mux), so a stage has no map of one image: give it without mux")
    n = len(arch.stages)
    indices = range(n) if given is None else given
    wrong = [index for index in indices if type(index) is not int or not -n <= index < n]
    if wrong or not len(indices):
        raise InputError(f"out_indices {list(indices)}: {arch.name} has the stages 0 to {n - 1} (or -{n} to -1 from the end)")
    return tuple(sorted({index % n for index in indices}))


def fit_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Before a state dict is loaded: resize what is for another image size; `Features` leave out layers that they lack."""
    own = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    layers = {name.partition(".")[0] for name in module.state_dict()}
    for name in [name for name in state if name.startswith(prefix)]:
        if name in own:
            state[name] = at_size(name, state[name], own[name])
        elif isinstance(module, Features) and name[len(prefix) :].partition(".")[0] not in layers:
            del state[name]
