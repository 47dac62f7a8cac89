"""Make efficientformer_l{1,3,7}.npz with timm: its state dict's names and shapes, and its float64 logits of two images.

    pip install --no-deps timm==1.0.31 torchvision==0.28.0 && pip install huggingface_hub safetensors
    python tests/golden/make_efficientformer.py

Each file holds `names` (text), `shapes` (text such as `24x3x3x3`; empty for a scalar) and `logits` (2, 1000), the mean
of timm's two classifiers in eval mode at 224 px. Weights and images are those of recipe.py, not pretrained.
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

FOLDER = Path(__file__).parent


def make(name: str) -> None:
    """Write the golden file of one timm model."""
    model = timm.create_model(name, pretrained=False)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    own = {key: tensor for key, tensor in model.state_dict().items() if key.endswith("attention_bias_idxs")}
    state = {key: torch.from_numpy(weight(key, shape)) for key, shape in shapes.items()}
    model.load_state_dict(state | own)
    with torch.no_grad():
        logits = model.double().eval()(torch.from_numpy(images(2, 224)).double())
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        names=np.array(list(shapes)),
        shapes=np.array(["x".join(map(str, shape)) for shape in shapes.values()]),
        logits=logits.numpy(),
    )
    print(f"{name}: {len(shapes)} tensors, logits of standard deviation {logits.std():.2f}")


if __name__ == "__main__":
    if timm.__version__ != "1.0.31":
        raise SystemExit(f"the golden files are of timm 1.0.31, but this is timm {timm.__version__}")
    for size in ("l1", "l3", "l7"):
        make(f"efficientformer_{size}")
