"""Networks that others learn from: ours, timm's, or any that `torch.export` has written."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.about import other_class, read_note
from nas.checkpoints import digest, load_weights
from nas.data import IMAGENET_MEAN, IMAGENET_STD
from nas.from_timm import TIMM, timm_with_weights
from supernet.arch import ArchConfig
from supernet.errors import InputError, first_line, placed
from supernet.files import YAML
from supernet.model import build_model
from supernet.weights import at_size


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained network whose outputs another one learns from."""

    network: nn.Module
    """In eval mode, its weights frozen: normalised images (B, 3, S, S) to logits (B, classes), S the student's image size."""
    digest: str
    """Of the architecture and its weights."""


def load_teacher(network: str | Path, image_size: int, classes: Sequence[str], device: torch.device | None = None) -> Teacher:
    """Return a teacher for images of this size and these classes, which are normalised as `nas.data` does it, on a device
    (None: the CPU):

    - the network of a YAML file that has its weights beside it: those of `teacher.yaml` are `teacher.safetensors`, and so on;
      those of nas-train's `arch.yaml` are `model.safetensors`, those of nas-search's `searched.yaml` are `weights.safetensors`.
      What of them depends on the image size is resized.
    - `timm:NAME`, with its published weights, where timm is installed. It sees the images at the size and with the
      normalisation that it was trained with.
    - a `.pt2` file of `torch.export.save`, that takes any number of images, normalised as here. It sees them at the size that
      it was exported for. **Such a file can run code when it is loaded: give only one that you trust.** Its pickled parts are
      held to tensors, but PyTorch also evaluates expressions that stand in it.

    Raises:
        InputError: a file is missing or cannot be used, timm is, or the network has other classes. Of timm's and of a `.pt2`
            file, and of weights that do not name theirs, only the number of classes is known.
    """
    text = str(network)
    with placed(f"the teacher {network}"):  # whose files may be missing or damaged too
        return _loaded(text, image_size, classes, device or torch.device("cpu"))


def _loaded(text: str, image_size: int, classes: Sequence[str], device: torch.device) -> Teacher:
    if text.startswith(TIMM):
        teacher = _timm_teacher(text, len(classes))
    elif text.endswith(".pt2"):
        return _exported_teacher(Path(text), image_size, len(classes), device)
    elif text.endswith(YAML):
        teacher = _own_teacher(Path(text), image_size, classes)
    else:
        raise InputError(
            f"the teacher {text} is no YAML file: give one that has its weights beside it, such as the teacher.yaml of "
            "nas-search --init, or the arch.yaml of nas-train; or timm:NAME, or a .pt2 file of torch.export"
        )
    teacher.network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return teacher


class Adapted(nn.Module):
    """A network that takes images of another size, or normalised otherwise: (B, 3, S, S) to logits."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        size: int,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        exported: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.size = size
        self.exported = exported
        our_mean, our_std, its_mean, its_std = (
            torch.tensor(figures).view(3, 1, 1) for figures in (IMAGENET_MEAN, IMAGENET_STD, mean, std)
        )
        self.register_buffer("scale", our_std / its_std)
        self.register_buffer("shift", (our_mean - its_mean) / its_std)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.shift
        if x.shape[2] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        if not self.exported:
            return self.network(x)
        # Its views are of the layout, its conversions of the precision that it was traced in: it refuses others.
        with torch.autocast(x.device.type, enabled=False):
            return self.network(x.contiguous())


def _own_teacher(path: Path, image_size: int, classes: Sequence[str]) -> Teacher:
    arch = ArchConfig.load(path).without_identity()
    weights = path.with_suffix(".safetensors")
    if not weights.exists():
        weights = path.with_name({"arch": "model", "searched": "weights"}.get(path.stem, path.stem) + ".safetensors")
    if not weights.exists():
        raise InputError(f"the teacher {path} needs its weights beside it, but {weights} does not exist: put them there")
    _check_number(path, arch.num_classes, len(classes))
    own = build_model(arch)
    load_weights(own, weights)
    known = read_note(weights).get("classes", ())
    if len(known) == len(classes) and (other := other_class(known, classes)):
        raise InputError(
            f"the teacher {path} knows other classes than the data have, or in another order ({other}): give one that was "
            "trained on the same classes in the same order"
        )
    model = build_model(arch.at(image_size))
    given = own.state_dict()
    model.load_state_dict({name: at_size(name, given[name], like) for name, like in model.state_dict().items()})
    return Teacher(model, _digest(f"{arch.to_yaml()}{digest(weights)}"))


def _timm_teacher(name: str, num_classes: int) -> Teacher:
    model = timm_with_weights(name)
    _check_number(name, model.num_classes, num_classes)
    given: Mapping[str, Tensor] = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    cfg = model.pretrained_cfg
    teacher = Adapted(model, cfg["input_size"][1], cfg["mean"], cfg["std"])
    return Teacher(teacher, _digest(name.encode() + safetensors.torch.save(dict(given))))


def _exported_teacher(path: Path, image_size: int, num_classes: int, device: torch.device) -> Teacher:
    from torch.export.passes import move_to_device_pass

    try:
        with _no_pickled_code():
            program = torch.export.load(path)
        (images,), (logits,) = (
            [node.meta["val"] for node in program.graph.nodes if node.name in names]
            for names in (program.graph_signature.user_inputs, program.graph_signature.user_outputs)
        )
        batch, channels, size, width = images.shape
        _, classes = logits.shape
        if channels != 3 or size != width or not isinstance(size, int) or isinstance(batch, int):
            raise ValueError(f"its images are {tuple(images.shape)}")
    except Exception as error:  # torch.export has no common base for what damaged or other files raise
        raise InputError(
            f"the teacher {path} cannot be used ({first_line(error)}): give a file of torch.export.save that takes one tensor "
            "of normalised images (N, 3, S, S), with a dynamic N, and returns logits (N, classes)"
        ) from error
    _check_number(path, int(classes), num_classes)
    program = move_to_device_pass(program, device)
    # It was exported in eval mode; its module refuses to be asked for it.
    return Teacher(Adapted(program.module().requires_grad_(False), size, exported=True).to(device), digest(path))


@contextmanager
def _no_pickled_code() -> Iterator[None]:
    """Let torch.load read tensors alone, whatever its caller says; and torch.export log nothing, as it logs tracebacks."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before, logged = os.environ.get(name), logging.root.manager.disable
    os.environ[name] = "1"
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logged)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_number(name: object, known: int, wanted: int) -> None:
    if known != wanted:
        raise InputError(
            f"the teacher {name} knows {known} classes, but the data have {wanted}: give one that was trained on them"
        )


def _digest(content: str | bytes) -> str:
    content = content.encode() if isinstance(content, str) else content
    return f"sha256 {hashlib.sha256(content).hexdigest()[:16]}"
