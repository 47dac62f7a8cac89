"""Make efficientvit_m{0..5}.npz with timm: its state dict's names and shapes, and its float64 logits of two images.

    pip install --no-deps timm==1.0.31 torchvision==0.28.0 && pip install huggingface_hub safetensors
    python tests/golden/make_efficientvit.py

Each file holds `names` (text), `shapes` (text such as `16x3x3x3`; empty for a scalar), `logits` (2, 1000) at 224 px and
`logits_256` at 256 px, where two stages' maps are padded to windows. Weights and images are those of recipe.py, not
pretrained.
"""

from pathlib import Path
from unittest import mock

import numpy as np
import torch
from recipe import efficientvit_weight, images

# Beside a CPU build of torch, torchvision finds no compiled operators and fails to describe them on import. timm's
# classification models need none, so the descriptions are left out.
with mock.patch.object(torch.library, "register_fake", lambda *_, **__: lambda function: function):
    import timm

FOLDER = Path(__file__).parent
SIZES = {"logits": 224, "logits_256": 256}


def make(name: str) -> None:
    """Write the golden file of one timm model."""
    shapes: dict[str, tuple[int, ...]] = {}
    logits = {}
    for part, size in SIZES.items():
        model = timm.create_model(name, pretrained=False, img_size=size)
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        model.load_state_dict({key: torch.from_numpy(efficientvit_weight(key, shape)) for key, shape in shapes.items()})
        with torch.no_grad():
            logits[part] = model.double().eval()(torch.from_numpy(images(2, size)).double()).numpy()
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        names=np.array(list(shapes)),
        shapes=np.array(["x".join(map(str, shape)) for shape in shapes.values()]),
        **logits,
    )
    deviations = ", ".join(f"{values.std():.2f}" for values in logits.values())
    print(f"{name}: {len(shapes)} tensors, logits of standard deviation {deviations}")


if __name__ == "__main__":
    if timm.__version__ != "1.0.31":
        raise SystemExit(f"the golden files are of timm 1.0.31, but this is timm {timm.__version__}")
    for size in range(6):
        make(f"efficientvit_m{size}")
