"""Make efficientformerv2_{s0,s1,s2,l}.npz with timm: its state dict's names and shapes, and its float64 logits of two images.

    pip install --no-deps timm==1.0.31 torchvision==0.28.0 && pip install huggingface_hub safetensors
    python tests/golden/make_efficientformer_v2.py

Each file holds `names`, `shapes` and `logits` as those of make_efficientformer.py, at 224 px; and of the network that timm
makes for 256 px, whose bias tables are larger, `shapes_256` and the first 100 logits of each image, `logits_256`.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from recipe import images, weight

# As in make_efficientformer.py: timm's classification models need none of torchvision's operators.
with mock.patch.object(torch.library, "register_fake", lambda *_, **__: lambda function: function):
    import timm

FOLDER = Path(__file__).parent


def run(name: str, size: int) -> tuple[dict[str, tuple[int, ...]], Any]:
    """Names and shapes of timm's model for images of `size` pixels, and its logits with the seeded weights."""
    model = timm.create_model(name, pretrained=False, img_size=size)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    model.load_state_dict({key: torch.from_numpy(weight(key, shape)) for key, shape in shapes.items()})
    model.double().eval()  # not one expression: timm's attention has a train() that returns nothing
    with torch.no_grad():
        return shapes, model(torch.from_numpy(images(2, size)).double()).numpy()


def text(shapes: dict[str, tuple[int, ...]]) -> Any:
    return np.array(["x".join(map(str, shape)) for shape in shapes.values()])


def make(name: str) -> None:
    """Write the golden file of one timm model."""
    (shapes, logits), (shapes_256, logits_256) = run(name, 224), run(name, 256)
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        names=np.array(list(shapes)),
        shapes=text(shapes),
        logits=logits,
        shapes_256=text(shapes_256),
        logits_256=logits_256[:, :100],
    )
    print(f"{name}: {len(shapes)} tensors, logits of standard deviation {logits.std():.2f}, {logits_256.std():.2f} at 256 px")


if __name__ == "__main__":
    if timm.__version__ != "1.0.31":
        raise SystemExit(f"the golden files are of timm 1.0.31, but this is timm {timm.__version__}")
    for size in ("s0", "s1", "s2", "l"):
        make(f"efficientformerv2_{size}")
