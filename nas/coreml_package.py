"""Core ML packages in the form that is timed and exported: made on any system that coremltools has wheels for."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import logging
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nas.alone import alone
from supernet.errors import InputError, first_line
from supernet.files import PART, unwritten

_CONVERSION_DATE = "com.github.apple.coremltools.conversion_date"
_LEFT_OVER = ("batch_norm", "instance_norm")  # of operations that a deployed network does not have


def coremltools() -> Any:
    """Import coremltools, which takes seconds, without its remarks on other packages' versions.

    Raises:
        InputError: it is not installed.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import coremltools as ct
    except ImportError as error:
        raise InputError(
            "Core ML packages need coremltools, which has wheels for macOS and for Linux on x86-64: pip install coremltools"
        ) from error
    return ct


def convert(module: nn.Module, example: Tensor, input_name: str = "x", output_name: str = "y") -> Any:
    """Return `module` in eval mode as a Core ML program (an unloaded `MLModel`) for inputs of the example's shape: fp16
    throughout, inputs and outputs too, for iOS 16 or macOS 13 and later.

    Raises:
        InputError: torch.export cannot trace it, coremltools cannot convert it, or what it made pays for casts or norms that
            the network does not have.
    """
    ct = coremltools()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(module.eval(), (example,)).run_decompositions({})
        except Exception as error:  # torch.export has no one base for what it cannot trace
            raise InputError(
                f"torch.export cannot trace this module ({first_line(error)}): write its forward without values of "
                "tensors, such as .item() or a branch on one"
            ) from error
        try:
            model = ct.convert(
                exported,
                convert_to="mlprogram",
                skip_model_load=True,
                minimum_deployment_target=ct.target.iOS16,
                compute_precision=ct.precision.FLOAT16,
                inputs=[ct.TensorType(name=input_name, shape=tuple(example.shape), dtype=np.float16)],
                outputs=[ct.TensorType(name=output_name, dtype=np.float16)],
            )
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"coremltools {ct.__version__} cannot convert this module to Core ML: {reason}; write its forward with "
                "operations that coremltools knows"
            ) from error
    refuse_strays(model)
    return model


def operations(model: Any) -> list[str]:
    """Return the types of a program's operations in order, constants left out."""
    return [operation.type for operation in _block(model).operations if operation.type != "const"]


def refuse_strays(model: Any) -> None:
    """Refuse a program with inputs or outputs that are not fp16, a cast at one of its ends, or a batch norm.

    Raises:
        InputError: it has one; timing it would charge a layer for what no deployed network does.
    """
    description = model.get_spec().description
    half = coremltools().proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT16
    ports = [*description.input, *description.output]
    names = {port.name for port in ports}
    found = [f"{port.name} is not fp16" for port in ports if port.type.multiArrayType.dataType != half]
    for operation in _block(model).operations:
        touches = {binding.name for argument in operation.inputs.values() for binding in argument.arguments}
        touches |= {output.name for output in operation.outputs}
        if operation.type.endswith(_LEFT_OVER) or (operation.type == "cast" and touches & names):
            found.append(f"it has a {operation.type}")
    if found:
        raise InputError(f"the Core ML form is not what is deployed ({', '.join(found)}): its time would say nothing")


def _block(model: Any) -> Any:
    (block,) = model.get_spec().mlProgram.functions["main"].block_specializations.values()
    return block


def save_package(
    module: nn.Module,
    example: Tensor,
    path: str | Path,
    key: str = "",
    *,
    names: tuple[str, str] = ("x", "y"),
    about: Mapping[str, str] | None = None,
    check: Callable[[Path], None] | None = None,
) -> str:
    """Convert `module` and write it to `path`, a new or replaced `.mlpackage`; return its SHA-256 (`package_sha256`).

    The same module gives the same bytes in any process with the same versions. The package's metadata hold `key`, the SHA-256
    of the weights, and `about`. A package is a folder: it is written beside `path` and given its name when it is whole and
    `check`, if given, has looked at it. A kill between the two renames that this takes leaves the old one under a hidden name;
    the next call gives it back its own.

    Args:
        names: of the input and of the output.
        check: is called with the package before anything at `path` changes; what it raises is passed on.

    Raises:
        InputError: the module cannot be converted, `path` is something else than a package, or it cannot be written; or
            another process is writing it.
        OSError: the disk is full or fails. What was there before is as it was.
    """
    path = Path(path)
    try:
        with alone(path.parent, path.name):
            _clear(path)
            if path.exists() and not (path / "Manifest.json").is_file():
                raise InputError(f"{path} exists and is no Core ML package: it is left as it is; give another name")
            model = convert(module, example, *names)
            metadata = model.user_defined_metadata
            metadata.pop(_CONVERSION_DATE, None)
            if key or not about:
                metadata["metapath.key"] = key
            metadata["metapath.weights_sha256"] = weights_sha256(module)
            for name, text in (about or {}).items():
                metadata[name] = text
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=PART) as folder:
                package = Path(folder) / path.name
                model.save(str(package))
                _make_reproducible(package)
                if check is not None:
                    check(package)
                _replace(path, package)
    except OSError as error:
        raise unwritten(path, error) from error
    return package_sha256(path)


def _aside(path: Path) -> Path:
    """Return where an old package is while the new one takes its name."""
    return path.with_name(f".{path.name}.replaced")


def _replace(path: Path, package: Path) -> None:
    """Give a package its name. A folder cannot be replaced in one step: the old one steps aside, and comes back if need be."""
    aside = _aside(path)
    if path.exists():
        path.rename(aside)
    try:
        package.rename(path)
    finally:
        if aside.exists() and not path.exists():
            aside.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def _clear(path: Path) -> None:
    """Put right what a killed process left: an old package gets its name back, unless the new one has it; the rest goes."""
    aside = _aside(path)
    if aside.exists() and not path.exists():
        aside.rename(path)
    for left_over in (aside, *path.parent.glob(f".{glob.escape(path.name)}.*{PART}")):
        shutil.rmtree(left_over, ignore_errors=True)


def _make_reproducible(package: Path) -> None:
    """Give a package's manifest and program one spelling: they come with random names and in the order of a hash."""
    (package / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    program = package / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec = coremltools().proto.Model_pb2.Model()
    spec.ParseFromString(program.read_bytes())
    program.unlink()  # it was readable by its owner alone
    program.write_bytes(spec.SerializeToString(deterministic=True))
    manifest = json.loads((package / "Manifest.json").read_text())
    new = {name: str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])) for name, item in manifest["itemInfoEntries"].items()}
    manifest["itemInfoEntries"] = {new[name]: item for name, item in manifest["itemInfoEntries"].items()}
    manifest["rootModelIdentifier"] = new[manifest["rootModelIdentifier"]]
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")
    for folder in (path for path in package.rglob("*") if path.is_dir()):
        folder.chmod(0o755)  # that of the weights was its owner's alone, who is another one on a phone


def weights_sha256(module: nn.Module) -> str:
    """Return the SHA-256 of a module's weights and buffers, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def package_sha256(path: str | Path) -> str:
    """Return the SHA-256 over a package's files, sorted by path: of lines `<path> <SHA-256 of the file>`."""
    root = Path(path)
    files = sorted((file.relative_to(root).as_posix(), file) for file in root.rglob("*") if file.is_file())
    lines = (f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for name, file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def package_bytes(path: str | Path) -> int:
    """Return the size of a package's files."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
