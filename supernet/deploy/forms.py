"""Which layers can be computed in two ways, and which way is taken. No torch."""

from typing import Literal

from supernet import specs
from supernet.specs import Layer

Form = Literal["conv", "matmul"]
"""How a layer that can be computed in two ways is computed.

- `conv`: convolutions on maps. The pool mixer is an average pool between two depthwise 1x1 convolutions, tokens' linear layers
  are 1x1 convolutions of a map of one row, and upsampling is the runtime's own operator.
- `matmul`: matrix products. The pool mixer and upsampling are products with a constant matrix of positions, linear layers and
  a sandwich block's 1x1 convolutions are products over positions.
"""

FORMS: tuple[Form, ...] = ("conv", "matmul")
BLOCK = 16  # floats of a vector: ONNX Runtime keeps maps in blocks of so many channels on AVX-512


def is_built_in(spec: specs.Spec) -> bool:
    """Whether a layer is one of the package's. A user's block may be a subclass of one, and compute something else."""
    return type(spec) in specs.SPECS.values()


def has_forms(layer: Layer) -> bool:
    """Whether the form of a layer is a choice."""
    if not is_built_in(layer.spec):
        return False
    match layer.spec:
        case specs.AttnFFN(stride=stride):
            return stride == 2
        case specs.MB4D() | specs.MB3D() | specs.ViT() | specs.Sandwich():
            return True
    return False


def default_form(layer: Layer) -> Form:
    """Return the form of a layer, by its shape: what ONNX Runtime was found to be faster with on a CPU with AVX-512."""
    if not is_built_in(layer.spec):
        return "conv"
    match layer.spec:
        case specs.MB3D() | specs.ViT():
            # other widths do not enter the blocked layout, and would only pay for the way there
            return "conv" if layer.spec.dim % BLOCK == 0 else "matmul"
        case specs.Sandwich():
            return "matmul" if layer.resolution**2 <= BLOCK else "conv"
    return "conv"
