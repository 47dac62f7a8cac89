"""From what a person names to a model that can be timed: a YAML file, a published network, an ONNX file, a timm model."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.from_timm import TIMM, import_timm
from nas.measure import with_ordinary_values
from nas.onnx_model import onnx_bytes
from supernet.arch import ArchConfig
from supernet.deploy import deployed
from supernet.errors import InputError, first_line
from supernet.files import YAML, is_path
from supernet.model import build_model
from supernet.zoo import load_arch, zoo_names


@dataclass(frozen=True)
class NamedModel:
    """A model in ONNX form (a path for a file, which may have weights beside it), and its architecture if it is ours."""

    onnx: bytes | Path
    arch: ArchConfig | None = None

    @property
    def layers(self) -> list[str] | None:
        """The names of the network's layers, which are the first scopes of its nodes; None for a foreign model."""
        return None if self.arch is None else [name for name, _ in self.arch.named_layers()]


def find_arch(network: str) -> ArchConfig | None:
    """Return the network of a YAML file or of the zoo; None for an ONNX file, or a name that is not in the zoo.

    Raises:
        InputError: the YAML file is missing or cannot be used.
    """
    if network.endswith(YAML) or network in zoo_names() or Path(network).is_dir():
        return load_arch(network)
    if not network.endswith(".onnx") and Path(network).exists():
        raise InputError(
            f"{network} is neither an ONNX file nor a network's YAML: give one of these, as nas-export and nas-search write"
        )
    if network.endswith(".onnx") or ":" in network or not is_path(network):
        return None
    return load_arch(network)


def load_model(network: str, arch: ArchConfig | None) -> NamedModel:
    """Return the model of `network`, whose architecture is `arch` (None: a foreign model), in its deploy form. Weights are
    ordinary values.

    Raises:
        InputError: there is no such file, or no zoo network or timm model of this name.
    """
    if arch is not None:
        model = deployed(with_ordinary_values(build_model(arch), seed=0), arch)
        return NamedModel(onnx_bytes(model, _image((3, arch.image_size, arch.image_size))), arch)
    if network.endswith(".onnx"):
        path = Path(network)
        if not path.is_file():
            raise InputError(f"the model {path} does not exist: give an ONNX file")
        return NamedModel(path)
    return _timm_model(network)


def _image(shape: tuple[int, ...], batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


def timm_module(network: str, batch: int) -> tuple[nn.Module, torch.Tensor]:
    """Return a timm model, `timm:NAME` or a bare name, in eval mode, and `batch` images of its own input size. Its weights are
    ordinary values: nothing is downloaded.

    Raises:
        InputError: timm is missing, has no such model, or cannot make it.
    """
    timm, name = _known_to_timm(network)
    try:
        return _made_by_timm(timm, name, batch)
    except Exception as error:  # each model fails in its own way
        raise InputError(f"timm cannot make its model {name} ({first_line(error)}): choose another one") from error


def _timm_model(network: str) -> NamedModel:
    """Export a timm model, `timm:NAME` or a bare name, at its own input size."""
    timm, name = _known_to_timm(network)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return NamedModel(onnx_bytes(*_made_by_timm(timm, name)))
    except Exception as error:  # each model fails in its own way
        raise InputError(
            f"the timm model {name} cannot be exported to ONNX ({first_line(error.__cause__ or error)}): export it yourself "
            "and give the file"
        ) from error


def _known_to_timm(network: str) -> tuple[Any, str]:
    """Return timm, and what it calls this model."""
    name = network.removeprefix(TIMM)
    timm, why_not = import_timm()
    if timm is None:
        near = "" if network.startswith(TIMM) else f"{_nearest(name, zoo_names())}the zoo has {', '.join(zoo_names())}; "
        raise InputError(
            f"unknown network {network!r}: {near}timm models need timm, which is not usable here ({why_not}): pip install timm"
        )
    if ":" in name or not timm.is_model(name):
        names = [*zoo_names(), *timm.list_models()]
        raise InputError(
            f"unknown network {network!r}: {_nearest(name, names)}give a YAML file, an ONNX file, {', '.join(zoo_names())}, "
            "or a model that timm.list_models() names"
        )
    return timm, name


def _made_by_timm(timm: Any, name: str, batch: int = 1) -> tuple[nn.Module, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name, pretrained=False).eval()
    return with_ordinary_values(model, seed=0), _image(tuple(model.pretrained_cfg["input_size"]), batch)


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}? " if near else ""
