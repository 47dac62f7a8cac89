"""Weights and the state of a run, on disk: written whole or not at all, read without running code."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn

from nas.about import other_class, read_note
from nas.parallel import ALONE, Group
from nas.progress import say
from supernet.arch import ArchConfig
from supernet.blocks.concatplexer import is_group_part
from supernet.distillation import one_classifier
from supernet.errors import InputError, placed
from supernet.files import refuse_folder, write_atomically
from supernet.weights import at_size

CHECKPOINT_EVERY_S = 600.0  # within an epoch; there is one after each epoch too

WEIGHTS = (
    "give a model.safetensors or a checkpoint.pt of nas-train, or a state dict as .safetensors, or as .pt of tensors alone"
)

CLASSIFIER = ("head.fc.weight", "head.fc.bias")


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A network with its weights, as a person gave them."""

    arch: ArchConfig
    """At its own image size, with the classes that its weights know, without empty slots."""
    state: Mapping[str, Tensor]
    """Under the names of `build_model(arch)`."""
    source: str
    """Where the weights are from: a resolved path, or timm:NAME."""
    classes: tuple[str, ...] = ()
    """The names of its classes, where the weights say them."""

    @property
    def digest(self) -> str:
        """What tells these weights from others."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state.items()}
        return f"sha256 {hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()[:16]}"


def load_weights(model: nn.Module, path: str | Path, *, adapt: bool = False, classes: Sequence[str] = ()) -> None:
    """Load the weights of a file (see `read_weights`) into a network of `build_model`.

    Names and shapes must be the network's own. With `adapt`, as a start for training, a classifier for another number
    of classes is left out (the network keeps its own), and so is one whose file names others than `classes`, or in another
    order; attention biases for a map of another size are resized, and a network that groups its images keeps its own parts for
    that; a line on stderr says so.

    Raises:
        InputError: the file cannot be read or does not fit. The network is then as it was.
    """
    known = read_note(path).get("classes", ())
    other = other_class(known, classes) if len(known) == len(classes) else ""
    load_state(model, read_weights(Path(path)), Path(path), adapt=adapt, other=other)


def load_state(
    model: nn.Module, given: Mapping[str, Tensor], path: str | Path, *, adapt: bool = False, other: str = ""
) -> None:
    """Load weights that were read from `path` (which messages name), as `load_weights` does. `other`: how their classes differ,
    of the same number (see `nas.about.other_class`)."""
    own = model.state_dict()
    for name, tensor in given.items():
        if name in own and tensor.is_floating_point() != own[name].is_floating_point():
            raise InputError(f"the weights file {path} has {name} as {tensor.dtype}, not {own[name].dtype}: give another file")
    if adapt:
        with placed(f"the weights file {path}"):
            given = _adapted(given, own, path, other)
    faults = [f"lacks {name}" for name in own if name not in given]
    faults += [f"has an unexpected {name}" for name in given if name not in own]
    faults += [
        f"has {name} of shape {tuple(given[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if faults:
        more = f" and {len(faults) - 1} more such faults" if len(faults) > 1 else ""
        raise InputError(
            f"the weights file {path} does not fit the network: it {faults[0]}{more}: give the network that it was "
            "written for, whose YAML file lies beside it"
        )
    model.load_state_dict(given)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file: `.safetensors`; or of torch.save: as it is, the network of a `checkpoint.pt`
    of nas-train, or what another training's checkpoint has under `state_dict` or `model`.

    Raises:
        InputError: it cannot be read, or holds none.
    """
    refuse_folder(path, "weights.safetensors", "model.safetensors")
    if not path.is_file():
        raise InputError(f"the weights file {path} does not exist: {WEIGHTS}")
    try:
        if path.suffix == ".safetensors":
            return plain(safetensors.torch.load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments of a training beside its weights
            found: Any = torch.load(path, weights_only=True, map_location="cpu")
        if isinstance(found, dict) and isinstance(found.get("net"), dict):
            if "within" in found:
                raise InputError(f"{path} is a search's supernet, many networks in one: give the weights.safetensors beside it")
            found = kept_state(found)
    except (MemoryError, InputError):
        raise
    except Exception as error:  # neither library has one base for what damaged files raise
        raise InputError(f"the weights file {path} cannot be read: {WEIGHTS}") from error
    for part in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(part), dict):
            found = found[part]
    try:
        return plain(found)
    except (TypeError, AttributeError) as error:
        held = ", ".join(map(str, list(found)[:3])) if isinstance(found, dict) else type(found).__name__
        raise InputError(
            f"the weights file {path} holds no state dict, but {held}: give one of timm or of nas-train"
        ) from error


def kept_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights that the training of a `checkpoint.pt` would end with, as it stands: the average where there is one,
    with one classifier."""
    return one_classifier(checkpoint["ema"]["network"] if "ema" in checkpoint else checkpoint["net"])


def plain(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return a state dict whose values are ordinary tensors with names; short floating-point numbers in float32.

    Raises:
        TypeError: it holds something else: no tensor, a sparse, quantised or complex one, one without memory.
    """
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"no state dict: it has {name!r}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
            raise TypeError(f"{name} is no ordinary tensor")
    return {name: t.float() if t.is_floating_point() and t.itemsize < 4 else t for name, t in state.items()}


def _adapted(given: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | Path, other: str) -> dict[str, Tensor]:
    """Return the weights with the network's own classifier, resized attention biases and its own parts for groups of images,
    where that makes them fit."""
    adapted = dict(given)
    if parts := [name for name in own if name not in given and is_group_part(name)]:
        say(f"{path} knows no groups of images: the {len(parts)} tensors that groups need are learned anew")
        adapted.update({name: own[name] for name in parts})
    if all(n in given and n in own and given[n].ndim and given[n].shape[1:] == own[n].shape[1:] for n in CLASSIFIER):
        were, are = (len(tensors[CLASSIFIER[1]]) for tensors in (given, own))
        if were != are or other:
            theirs = f"{were} classes, not {are}" if were != are else f"other classes, or in another order ({other})"
            say(f"the classifier of {path} is for {theirs}: it is left out and learned anew")
            adapted.update({name: own[name] for name in CLASSIFIER})
    resized = [name for name in own if name in given and at_size(name, given[name], own[name]) is not given[name]]
    if resized:
        say(f"{len(resized)} tensors of {path} are for another image size (attention biases, positions): they are resized")
        adapted.update({name: at_size(name, given[name], own[name]) for name in resized})
    return adapted


def digest(path: Path) -> str:
    """Return what tells this file's bytes from others.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise InputError(f"the weights file {path} cannot be read ({error.strerror}): {WEIGHTS}") from error


class Stateful(Protocol):
    """A part of a checkpoint: a network, an optimizer, a History."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def save_checkpoint(path: Path, epoch: int, **parts: Stateful) -> None:
    """Write the state of a run after `epoch` epochs, whole or not at all."""
    file = io.BytesIO()
    torch.save({"epoch": epoch, **{name: part.state_dict() for name, part in parts.items()}}, file)
    write_atomically(path, file.getvalue())


def load_checkpoint(path: Path, group: Group = ALONE, **parts: Stateful) -> int:
    """Load the state that `save_checkpoint` wrote into the parts, if there is one; return how many epochs are done.

    The first process of a group reads the file, and all load it.
    """

    def read() -> bytes | None:
        try:
            return path.read_bytes() if path.exists() else None
        except OSError as error:  # of the disk, not of what is in the file, which is not to be removed for that
            raise InputError(f"the checkpoint {path} cannot be read: {error.strerror}") from error

    held = group.from_first(read)
    if held is None:
        return 0

    def loaded() -> int:
        try:
            state = torch.load(io.BytesIO(held), weights_only=True, map_location="cpu")
            for name, part in parts.items():
                part.load_state_dict(state[name])
            epoch = int(state["epoch"])
            if epoch < 0:
                raise ValueError("no number of epochs")
            return epoch
        except (MemoryError, InputError):
            raise
        except Exception as error:  # torch.load has no common base for what damaged files raise
            raise InputError(f"the checkpoint {path} does not belong to this run or is damaged: remove it") from error

    epoch = group.agreed(loaded)
    say(f"going on from {path} after epoch {epoch}")
    return epoch


@dataclass
class History:
    """The rows of `metrics.csv`, one an epoch; a part of the checkpoint, so that the file never has one too many."""

    rows: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Of the steps of the epoch under way."""
    seconds: float = 0.0
    """That the epoch under way has taken."""

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "losses": self.losses, "seconds": self.seconds}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
        self.losses = list(state_dict["losses"])
        self.seconds = float(state_dict["seconds"])

    def write(self, path: Path) -> None:
        """Write the rows as CSV, whole or not at all."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(path, text.getvalue())
