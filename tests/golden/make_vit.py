"""Make deit_tiny.npz and vit_b16.npz with timm: its state dict's names and shapes, and its float64 logits of two images.

    pip install --no-deps timm==1.0.31 torchvision==0.28.0 && pip install huggingface_hub safetensors
    python tests/golden/make_vit.py

Each file holds `names` and `shapes` at 224 px as in make_efficientformer.py, and logits (2, 1000) in eval mode: `logits`
at 224 px; `logits_160` of timm's network for 160 px with the recipe's weights of its own shapes; and `logits_160_resized`
of that network with the 224 px weights, its position embedding resized by timm. The position embedding of 160 px is
(1, 101, dim); all other shapes are those of 224 px.
"""

from pathlib import Path
from unittest import mock

import numpy as np
import torch
from recipe import images, weight

# Beside a CPU build of torch, torchvision finds no compiled operators and fails to describe them on import. timm's
# classification models need none, so the descriptions are left out.
with mock.patch.object(torch.library, "register_fake", lambda *_, **__: lambda function: function):
    import timm
    from timm.layers import resample_abs_pos_embed

FOLDER = Path(__file__).parent
NAMES = {"deit_tiny": "deit_tiny_patch16_224", "vit_b16": "vit_base_patch16_224"}


def make(name: str) -> None:
    """Write the golden file of one timm model."""
    found = {}
    model = timm.create_model(NAMES[name], pretrained=False)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    state = {key: torch.from_numpy(weight(key, shape)) for key, shape in shapes.items()}
    found["logits"] = logits(model, state, 224)

    model = timm.create_model(NAMES[name], pretrained=False, img_size=160)
    own = {key: torch.from_numpy(weight(key, tuple(tensor.shape))) for key, tensor in model.state_dict().items()}
    found["logits_160"] = logits(model, own, 160)
    resized = resample_abs_pos_embed(state["pos_embed"], [10, 10])
    found["logits_160_resized"] = logits(model, state | {"pos_embed": resized}, 160)
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        names=np.array(list(shapes)),
        shapes=np.array(["x".join(map(str, shape)) for shape in shapes.values()]),
        **found,
    )
    print(f"{name}: {len(shapes)} tensors, logits of standard deviation {found['logits'].std():.2f}")


def logits(model: torch.nn.Module, state: dict[str, torch.Tensor], size: int) -> np.ndarray:
    model.load_state_dict(state)
    with torch.no_grad():
        result = model.double().eval()(torch.from_numpy(images(2, size)).double()).numpy()
    model.float()
    return result


if __name__ == "__main__":
    if timm.__version__ != "1.0.31":
        raise SystemExit(f"the golden files are of timm 1.0.31, but this is timm {timm.__version__}")
    for network in NAMES:
        make(network)
