"""Networks of this package as a timm model: importing this makes `timm.create_model("metapath", arch="searched.yaml")` work.

Needs timm. What is different from timm's own models: `arch` says what is built, an image size is fixed when it is built
(`img_size`, square), and there is no stochastic depth. Weights have this package's names, so that `checkpoint_path` takes a
`model.safetensors` of nas-train; they are resized to the image size, and with `features_only` what is not needed is left out.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from timm.models import FeatureInfo, build_model_with_cfg, register_model
from torch import Tensor, nn

from nas.data import IMAGENET_MEAN, IMAGENET_STD
from nas.feature_maps import Features, fit_state, stage_indices, stage_info, stage_maps
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.model import build_model
from supernet.specs import PatchStem
from supernet.zoo import load_arch


class MetaPathNet(nn.Sequential):
    """A network with timm's methods: (N, 3, S, S) to (N, num_classes), or without classes to (N, num_features).

    Its layers have the names that they have in `build_model`.
    """

    def __init__(self, arch: ArchConfig, drop_rate: float = 0.0) -> None:
        """Build the network; `drop_rate` is the dropout before the classifier, in training."""
        super().__init__(OrderedDict(build_model(arch).named_children()))
        self.arch = arch
        self.num_classes = arch.num_classes
        self.num_features = self.head_hidden_size = arch.stages[-1].width
        self.in_chans = 3
        self.global_pool = "avg"
        self.drop_rate = drop_rate
        self.feature_info = stage_info(arch)
        self.register_load_state_dict_pre_hook(fit_state)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return what enters the head: a map (N, C, H, W), or tokens (N, L, C)."""
        for name, layer in self.named_children():
            if name != "head":
                x = layer(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (N, num_classes) of what `forward_features` gave; with `pre_logits`, what enters the classifier."""
        head: Any = self.head
        x = head.pooled(x)
        if pre_logits:
            return x
        return head.fc(F.dropout(x, self.drop_rate, self.training))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return what enters the head and the maps of the stages at `indices` (an int: the last so many), or the maps alone.

        There is no norm between the stages, and all layers are computed: `norm` and `stop_early` change nothing.
        """
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt must be NCHW, but is {output_fmt}")
        given = None if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        taken = stage_indices(self.arch, given)
        layers = {name: layer for name, layer in self.named_children() if name != "head"}
        maps, last = stage_maps(self.arch, layers, x)
        found = [maps[index] for index in taken]
        return found if intermediates_only else (last, found)

    def get_classifier(self) -> nn.Module:
        """Return the layer that gives the logits."""
        head: Any = self.head
        return head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the network a new classifier; 0 classes: none, so that it gives (N, num_features)."""
        if global_pool not in (None, "avg"):
            raise InputError(f"global_pool must be avg, but is {global_pool!r}: forward_features gives what is not pooled")
        head: Any = self.head
        like = next(self.parameters())
        fc = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype) if num_classes else nn.Identity()
        head.fc = fc.train(self.training)
        self.num_classes = num_classes

    def no_weight_decay(self) -> set[str]:
        """Return the names of what does not decay, vectors aside."""
        from nas.steps import UNDECAYED

        return {name for name, _ in self.named_parameters() if name.endswith(UNDECAYED)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return which layers learn at one rate, for timm's layer-wise decay: each stage (`coarse`), or each block."""
        stages = [(r"^stage(\d+)_", None)]
        blocks = [(r"^stage(\d+)_block(\d+)", None), (r"^stage(\d+)_", (0,))]
        return {"stem": r"^stem", "blocks": [*(stages if coarse else blocks), (r"^head\.norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Accept that there is none."""
        if enable:
            raise InputError("the metapath model has no gradient checkpointing: leave it out")


def _features(model: MetaPathNet, out_indices: int | tuple[int, ...], **_: Any) -> Features:
    """What `features_only` gives: `Features`, with timm's feature_info."""
    given = range(-out_indices, 0) if isinstance(out_indices, int) else out_indices
    found = Features(model, model.arch, list(given))
    found.feature_info = FeatureInfo(stage_info(model.arch), found.out_indices)
    return found


def default_cfg(arch: ArchConfig) -> dict[str, Any]:
    """Return what timm keeps of how images are prepared for a network, and of its ends."""
    first = next(name for name, module in build_model(arch)[0].named_modules() if isinstance(module, nn.Conv2d))
    return {
        "architecture": "metapath",
        "num_classes": arch.num_classes,
        "input_size": (3, arch.image_size, arch.image_size),
        "fixed_input_size": True,
        "pool_size": None if isinstance(arch.stages[0].entry, PatchStem) else (arch.resolutions[-1],) * 2,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": f"stem.{first}",
        "classifier": "head.fc",
    }


def metapath(
    pretrained: bool = False,
    *,
    arch: ArchConfig | str | Path | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    global_pool: str = "avg",
    drop_path_rate: float = 0.0,
    **kwargs: Any,
) -> nn.Module:
    """Build the network of `arch`: an ArchConfig, a YAML file or a zoo name. `num_classes` and `img_size` default to its own.

    Raises:
        InputError: there is no such network, or it is asked for what it does not have.
    """
    if arch is None:
        raise InputError('say which network: timm.create_model("metapath", arch="searched.yaml"), or a zoo name')
    config = (arch if isinstance(arch, ArchConfig) else load_arch(arch)).without_identity()
    if config.multiplexes:
        raise InputError(f"{config.name} groups its images (mux), which timm's models do not: give it without mux")
    sides = {img_size} if isinstance(img_size, int) else set(img_size or ())
    if len(sides) > 1 or in_chans != 3 or global_pool != "avg" or drop_path_rate:
        raise InputError(
            "the metapath model takes square RGB images, averages at its end and has no drop_path_rate: leave img_size of two "
            "sides, in_chans, global_pool and drop_path_rate out"
        )
    config = config.at(*sides) if sides else config
    if not kwargs.get("pretrained_cfg"):
        kwargs["pretrained_cfg"] = default_cfg(config)
    indices = tuple(range(len(config.stages)))

    def network(num_classes: int, drop_rate: float = 0.0, **_: Any) -> MetaPathNet:
        built = MetaPathNet(config.with_classes(num_classes or 1), drop_rate)
        if not num_classes:
            built.reset_classifier(0)
        return built

    return build_model_with_cfg(
        network, "metapath", pretrained, feature_cfg={"out_indices": indices, "feature_cls": _features}, **kwargs
    )


register_model(metapath)
