"""State dicts of the networks' authors, in timm's names.

EfficientFormer and EfficientFormerV2 are of snap-research/EfficientFormer (models/efficientformer.py, efficientformer_v2.py),
EfficientViT of microsoft/Cream (EfficientViT/classification/model/efficientvit.py). ViT and DeiT have timm's names already.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

_Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""What is replaced by what in a tensor's name, one after the other."""


def _alternating(found: re.Match[str]) -> str:
    """One list of the authors' has the stages and, between them, what leads from one to the next."""
    number = int(found[1])
    return f"stages.{(number + 1) // 2}.{'downsample' if number % 2 else 'blocks'}."


_EFFICIENTFORMER: _Rules = (
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.1\.", "stem.norm1."),
    (r"^patch_embed\.3\.", "stem.conv2."),
    (r"^patch_embed\.4\.", "stem.norm2."),
    (r"^network\.(\d+)\.", _alternating),
    (r"\.downsample\.proj\.", ".downsample.conv."),
    (r"\.layer_scale_(\d)$", r".ls\1.gamma"),
    (r"^dist_head\.", "head_dist."),
)
# timm has a convolution and its norm in one module; where the authors have them in a Sequential, an activation may come first.
_EFFICIENTFORMER_V2: _Rules = (
    *_EFFICIENTFORMER,
    (r"^stem\.conv(\d)\.", r"stem.conv\1.conv."),
    (r"^stem\.norm(\d)\.", r"stem.conv\1.bn."),
    (r"\.downsample\.conv\.", ".downsample.conv.conv."),
    (r"\.downsample\.(norm|bn)\.", ".downsample.conv.bn."),
    (r"\.(q|k|v|v_local|stride_conv|q\.proj)\.0\.", r".\1.conv."),
    (r"\.(q|k|v|v_local|stride_conv|q\.proj)\.1\.", r".\1.bn."),
    (r"\.(token_mixer|attn)\.proj\.1\.", r".\1.proj.conv."),
    (r"\.(token_mixer|attn)\.proj\.2\.", r".\1.proj.bn."),
    (r"\.q\.local\.0\.", ".q.local."),
    (r"\.mlp\.(fc1|mid|fc2)\.", r".mlp.\1.conv."),
    (r"\.mlp\.norm1\.", ".mlp.fc1.bn."),
    (r"\.mlp\.mid_norm\.", ".mlp.mid.bn."),
    (r"\.mlp\.norm2\.", ".mlp.fc2.bn."),
)
_EFFICIENTVIT: _Rules = (
    (r"^patch_embed\.(\d+)\.", lambda found: f"patch_embed.conv{int(found[1]) // 2 + 1}."),
    (r"^blocks1\.", "stages.0.blocks."),
    # What leads to a stage is the first three of its list.
    (r"^blocks([23])\.0\.", r"blocks\1.downsample.res1."),
    (r"^blocks([23])\.1\.", r"blocks\1.downsample.patchmerge."),
    (r"^blocks([23])\.2\.", r"blocks\1.downsample.res2."),
    (r"^blocks([23])\.(\d+)\.", lambda found: f"blocks{found[1]}.blocks.{int(found[2]) - 3}."),
    (r"^blocks([23])\.", lambda found: f"stages.{int(found[1]) - 1}."),
    (r"\.c\.", ".conv."),
    (r"\.l\.", ".linear."),
)


def in_timm_names(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a state dict of the authors' with timm's names and shapes, any other as it is."""
    names = [name for name in state if isinstance(name, str)]

    def has(beginning: str) -> bool:
        return any(name.startswith(beginning) for name in names)

    if has("stages."):
        return state
    if has("network."):
        rules = _EFFICIENTFORMER_V2 if any(".mlp.mid." in name for name in names) else _EFFICIENTFORMER
    elif has("blocks1."):
        rules = _EFFICIENTVIT
    else:
        return state
    renamed = ((_renamed(str(name), rules), tensor) for name, tensor in state.items())
    return {name: _reshaped(name, tensor) if isinstance(tensor, Tensor) else tensor for name, tensor in renamed}


def _renamed(name: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _reshaped(name: str, tensor: Tensor) -> Tensor:
    if name.endswith(".gamma") and tensor.shape[1:] == (1, 1):  # EfficientFormerV2's layer scales are of maps
        return tensor.flatten()
    if re.search(r"\.(conv|se\.fc\d)\.weight$", name) and tensor.ndim == 2:  # EfficientViT's released files have matrices
        return tensor[..., None, None]
    return tensor
