"""What happens between the CPU and another device, for which PyTorch's meta device stands in."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Notes, while it is entered, what is done with tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        """Values of the largest tensor that was made on the CPU."""
        self.sent = 0
        """Tensors that were sent from the CPU to the other device."""
        self.waits = 0
        """Values that Python asked for, for which it waits until a device has them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.waits += func.name() == "aten::_local_scalar_dense"
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self.largest = max(self.largest, tensor.numel())
            elif isinstance(tensor, Tensor):
                self.sent += any(one.device.type == "cpu" and one.ndim for one in given)
        return made
