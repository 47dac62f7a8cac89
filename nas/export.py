"""From a network to a file that a runtime loads, checked against eager before it is written."""

from __future__ import annotations

import io
import json
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nas.about import INPUT, OUTPUT, metadata, other_class, read_note, targets_beside, targets_of_file
from nas.onnx_model import onnx_bytes, onnx_session
from nas.profilers.bench import Failed
from nas.progress import say
from supernet.arch import ArchConfig
from supernet.errors import InputError, first_line, unknown
from supernet.files import write_atomically
from supernet.model import build_model
from supernet.zoo import load_arch

Array = npt.NDArray[Any]

TOLERANCE = 1e-4  # of the largest logit, or absolute where logits are below 1
HALF_TOLERANCE = 5e-2  # the same of a network that computes in fp16 throughout
DYNAMIC = "dynamic"
FORMATS = {"onnx": ".onnx", "coreml": ".mlpackage", "torch": ".pt2"}
FORMS = ("deploy", "fastest", "plain")
USUAL_FORM = {"onnx": "deploy", "coreml": "deploy", "torch": "plain"}  # what tables are of that are measured through the format


def torch_program(model: nn.Module, example: Tensor, *, dynamic: bool = False) -> torch.export.ExportedProgram:
    """Return `model` in eval mode as torch.export's program, for inputs of the example's shape; with `dynamic`, for any number
    of images."""
    shapes = None
    if dynamic:
        example = example.expand(2, -1, -1, -1).contiguous()  # what is traced with one image is for one image
        shapes = ({0: torch.export.Dim("batch", min=1)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model.eval(), (example,), dynamic_shapes=shapes)


def expectations(model: nn.Module, image_size: int, batch: int | str = 1) -> list[tuple[Tensor, Array]]:
    """Return inputs for a file to be checked on, each with eager's logits: one of `batch` images, two for a dynamic batch.

    Raises:
        InputError: the logits are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for count in (1, 3) if batch == DYNAMIC else (int(batch),):
        example = torch.randn(count, 3, image_size, image_size, generator=generator)
        with torch.inference_mode():
            expected = model.eval()(example).numpy()
        if not np.isfinite(expected).all():
            raise InputError("the network's logits are not finite: nothing is written; give the weights of a good training")
        found.append((example, expected))
    return found


def difference(found: Array, expected: Array, tolerance: float = TOLERANCE) -> float:
    """Return the largest difference of a file's logits from eager's.

    Raises:
        Failed: it is more than `tolerance` (of the largest logit, or absolute where logits are below 1).
    """
    largest = float(np.abs(found - expected).max())
    if not largest <= tolerance * max(1.0, float(np.abs(expected).max())):  # not: NaN is refused too
        raise Failed(
            f"the exported network differs from eager by {largest:.2g}, more than {tolerance:g}: nothing is written; please "
            "report it, with the network's YAML file"
        )
    return largest


def checked_onnx(model: nn.Module, expected: list[tuple[Tensor, Array]], *, dynamic: bool = False) -> tuple[bytes, float]:
    """Return `model` as ONNX, and its largest difference from `expected` (see `expectations`) in ONNX Runtime.

    Raises:
        Failed: it differs.
    """
    data = onnx_bytes(model, expected[0][0], dynamic=True) if dynamic else onnx_bytes(model, expected[0][0])
    session = onnx_session(data)
    return data, max(difference(session.run(None, {INPUT: x.numpy()})[0], y) for x, y in expected)


def _with_metadata(model: bytes, about: Mapping[str, str]) -> bytes:
    """Return an ONNX model with its metadata."""
    import onnx

    if not about:
        return model
    proto = onnx.load_from_string(model)
    onnx.helper.set_model_props(proto, dict(about))
    return bytes(proto.SerializeToString())


def export_torch(
    model: nn.Module, expected: list[tuple[Tensor, Array]], path: Path, about: Mapping[str, str], *, dynamic: bool = False
) -> float:
    """Write `model` as torch.export's program, its metadata as `metadata.json` inside; return its largest difference to eager.

    Raises:
        InputError: torch.export cannot trace it; nothing is written.
        Failed: what was read back differs; nothing is written.
    """
    file = io.BytesIO()
    try:
        program = torch_program(model, expected[0][0], dynamic=dynamic)
    except Exception as error:  # torch.export has no one base for what it cannot trace
        raise InputError(
            f"torch.export cannot trace this network ({first_line(error)}): give an --out that ends in .onnx"
        ) from error
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(dict(about), indent=2)})
    data = file.getvalue()
    read = torch.export.load(io.BytesIO(data)).module()
    with torch.inference_mode():
        largest = max(difference(read(x).numpy(), y) for x, y in expected)
    write_atomically(path, data)
    return largest


_given_to_coreml: list[Array] = []
"""Inputs, kept as long as the process lives: Core ML lets one go from a thread of its own, without Python's lock
(coremltools #2827), which must not be the last to hold it."""


def export_coreml(model: nn.Module, expected: list[tuple[Tensor, Array]], path: Path, about: Mapping[str, str]) -> float | None:
    """Write `model` as a Core ML package in the form that Core ML's tables are measured on; return its largest difference from
    eager on a Mac, None elsewhere, where nothing can run it.

    Raises:
        InputError: coremltools is missing or cannot convert it; nothing is written.
        Failed: on a Mac its logits differ by more than fp16 explains; nothing is written.
    """
    from nas.coreml_package import coremltools, save_package

    found: list[float] = []

    def check(package: Path) -> None:
        if platform.system() != "Darwin":
            return
        # The numbers are what is checked. By the Neural Engine's compiler a load may hang, or end the process without a word.
        tools = coremltools()
        loaded = tools.models.MLModel(str(package), compute_units=tools.ComputeUnit.CPU_ONLY)
        for x, y in expected:
            _given_to_coreml.append(x.float().numpy())
            logits = loaded.predict({INPUT: _given_to_coreml[-1]})[OUTPUT].astype(np.float32)
            found.append(difference(logits, y, HALF_TOLERANCE))

    save_package(model, expected[0][0], path, names=(INPUT, OUTPUT), about=about, check=check)
    return max(found, default=None)


def export_network(
    network: str,
    weights: str | Path | None,
    out: Path,
    format: str | None = None,
    form: str | None = None,
    batch: int | str | None = None,
    *,
    int8: bool = False,
    data: Path | None = None,
    seed: int = 0,
) -> None:
    """Write a network to `out` and print what was written; without weights, random ones, and it says so.

    Args:
        network: a YAML file or a zoo name.
        weights: as `nas.pretrained.load_pretrained` takes them.
        format: onnx, coreml or torch; None: as the name of `out` says.
        form: deploy (rewritten to be fast in ONNX Runtime and Core ML, the function unchanged), fastest (deploy, with the form
            of every layer that was measured to be the fastest on this machine), or plain; None: the one that latency tables
            are of, plain for torch and deploy for the others.
        batch: images of a call, or dynamic; None: one, or one full group where the network multiplexes.
        int8: quantise, with ranges from training images of `data`, and print the accuracy on its validation images.
        data: an image folder; None: the embedded digits.
        seed: of the images that are drawn.
    """
    from supernet.deploy import deployed

    format = _format(format, out)
    form = USUAL_FORM[format] if form is None else form
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    if form == "fastest" and format != "onnx":
        raise InputError(
            f"the fastest form is measured in ONNX Runtime, not for --format {format}: give an --out that ends in .onnx, or "
            "--form deploy"
        )
    if int8 and format != "onnx":
        raise InputError(
            f"int8 is for ONNX Runtime, not for --format {format}: give an --out that ends in .onnx, or leave it out"
        )
    if data is not None and not int8:
        raise InputError("--data is what --int8 is calibrated on: add --int8, or leave --data out")
    arch = load_arch(network).without_identity()
    if batch == DYNAMIC and (arch.multiplexes or format == "coreml"):
        why = f"{arch.name} multiplexes" if arch.multiplexes else "Core ML's Neural Engine takes fixed sizes"
        raise InputError(f"--batch dynamic is not possible here, as {why}: give a number")
    batch = arch.group_size if batch is None else batch
    arch, model, said = _weighted(network, weights, arch)
    images = None
    if int8:
        from nas.data import load_data, say_if_demonstration

        images = load_data(data, arch.image_size, seed, score_images=0)
        said["classes"] = _same_classes(said.get("classes"), images.classes, arch, images.source)
    expected = expectations(model, arch.image_size, batch)
    if form == "fastest":
        from nas.forms import measured_forms

        model = deployed(model, arch, measured_forms(arch, 1 if batch == DYNAMIC else int(batch)))
    elif form == "deploy":
        model = deployed(model, arch)
    if "targets" in said:
        said["targets"] = targets_of_file(
            said["targets"], image_size=arch.image_size, batch=batch, format=format, form=form, int8=int8
        )
    about = metadata(arch, form, batch, **said)
    dynamic = batch == DYNAMIC
    lines = []
    if format == "torch":
        within = f"within {export_torch(model, expected, out, about, dynamic=dynamic):.1e} of PyTorch"
    elif format == "coreml":
        largest = export_coreml(model, expected, out, about)
        within = "fp16, NOT CHECKED: only a Mac can run it" if largest is None else f"fp16, within {largest:.1e} of PyTorch"
    else:
        onnx, largest = checked_onnx(model, expected, dynamic=dynamic)
        within = f"within {largest:.1e} of PyTorch"
        if images is not None:
            from nas.int8 import quantise_on

            onnx, figures = quantise_on(onnx, images, 1 if dynamic else int(batch), seed)
            about = metadata(arch, form, batch, **said, int8=figures)
            within = f"int8; before quantisation {within}"
            lines.append(
                f"  top-1 {100 * figures['accuracy']:.2f} % on {figures['validation_images']} validation images, "
                f"{100 * figures['accuracy_fp32']:.2f} % before quantisation; ranges from "
                f"{figures['calibration_images']} training images"
            )
        write_atomically(out, _with_metadata(onnx, about))
    # Of the file, and so only where there is one: a refusal is one line.
    if weights is None:
        say("no --weights: the file holds random weights, good for timing only")
    elif "classes" not in said:
        say(f"{weights} does not name its classes, so the file does not either (nas-train writes them into model.safetensors)")
    if images is not None:
        say_if_demonstration(images)
    n = "N" if dynamic else batch
    print(f"{out}: ({n}, 3, {arch.image_size}, {arch.image_size}) to ({n}, {arch.num_classes}), {within}")
    for line in lines:
        print(line)


def _format(given: str | None, out: Path) -> str:
    """Return the format, as given or as the file's name says; the two must agree."""
    if given is not None and given not in FORMATS:
        raise unknown("format", given, FORMATS)
    by_name = next((name for name, suffix in FORMATS.items() if out.suffix == suffix), None)
    if by_name is None or given not in (None, by_name):
        wanted = FORMATS[given] if given is not None else " or ".join(FORMATS.values())
        raise InputError(f"{out} is no name for {given or 'an exported network'}: give one that ends in {wanted}")
    return by_name


def _weighted(network: str, weights: str | Path | None, arch: ArchConfig) -> tuple[ArchConfig, nn.Module, dict[str, Any]]:
    """Return the network with its weights, and what is known of its classes and targets."""
    said: dict[str, Any] = {}
    if targets := targets_beside(network):
        said["targets"] = targets
    if weights is None:
        torch.manual_seed(0)
        return arch, build_model(arch), said
    if arch.multiplexes:  # nothing of it may be left as it was drawn
        from nas.checkpoints import load_weights

        model = build_model(arch)
        load_weights(model, weights)
    else:
        from nas.pretrained import load_pretrained

        read = load_pretrained(network, str(weights), arch)
        if read.arch.num_classes != arch.num_classes:
            say(f"{network} says {arch.num_classes} classes, but {weights} knows {read.arch.num_classes}: these are exported")
        arch = read.arch
        model = build_model(arch)
        model.load_state_dict(read.state)
    noted = read_note(weights)
    if len(noted.get("classes", [])) != arch.num_classes:
        noted.pop("classes", None)
    return arch, model, {**noted, **said}


def _same_classes(known: Any, found: tuple[str, ...], arch: ArchConfig, source: str) -> list[str]:
    """Return the class names of a network, which must be those of the data that calibrate it (see `nas.about.other_class`); as
    the network writes them, where it knows them."""
    if len(found) != arch.num_classes:
        theirs = f"{len(known)} classes ({', '.join(known[:3])}, ...)" if known else f"{arch.num_classes} classes"
        wrong = f"the network knows {theirs}, but {source} has {len(found)} ({', '.join(found[:3])}, ...)"
    elif known is not None and (other := other_class(found, known)):
        wrong = f"{source} has other classes than the network knows, or in another order ({other})"
    else:
        return list(known or found)
    raise InputError(f"{wrong}: give the images that it was trained on")
