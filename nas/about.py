"""What weights and exported files say of themselves: classes, normalisation, where the network was searched for what.

Weights (`.safetensors`) have a note in their header, from nas-train and nas-search; a file of nas-export has all of `metadata`.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nas.data import IMAGENET_MEAN, IMAGENET_STD
from nas.device_ids import is_core_ml
from supernet.arch import ArchConfig
from supernet.errors import InputError

NOTE = "metapath"
"""The one key of ours in a safetensors header, a JSON object: several would come in a random order, and equal weights would
be unequal files."""
INPUT, OUTPUT = "image", "logits"
PREPARATION = (
    "turned upright as EXIF says; 16-bit grey by its high byte; RGB; the short side scaled to image_size (bicubic), the "
    "central square; value / 255, minus mean, by std"
)
_OF_A_TARGET = ("device", "target_ms", "predicted_ms", "measured_ms", "table", "provenance", "batch")


def version_of(package: str) -> str:
    """Return the version of an installed package; of one that is not installed, such as a checkout of ours, unknown."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def note(classes: Sequence[str], targets: Sequence[Mapping[str, Any]] = ()) -> dict[str, str]:
    """Return the header of a weights file: the classes in the order of the logits, and the targets of the network's search."""
    return {NOTE: json.dumps({"classes": list(classes), **({"targets": list(targets)} if targets else {})})}


def read_note(weights: str | Path) -> dict[str, Any]:
    """Return the note of a weights file; nothing where it has none, is no safetensors file, or is none of ours."""
    import safetensors

    found: Any = {}
    if str(weights).endswith(".safetensors"):
        with suppress(Exception), safetensors.safe_open(weights, "np") as file:  # who reads the tensors says what is wrong
            found = json.loads((file.metadata() or {}).get(NOTE, "{}"))
    if not isinstance(found, dict):
        return {}
    classes, targets = found.get("classes"), found.get("targets")
    checked: dict[str, Any] = {}
    if isinstance(classes, list) and all(isinstance(name, str) for name in classes):
        checked["classes"] = classes
    if isinstance(targets, list) and all(isinstance(target, dict) for target in targets):
        checked["targets"] = targets
    return checked


def other_class(known: Sequence[str], wanted: Sequence[str]) -> str:
    """Return where as many class names, in the order of the logits, first are others than those wanted, in words; nothing where
    they are the same.

    Names are the same however their accents are written: it differs between file systems.
    """
    for number, (name, other) in enumerate(zip(known, wanted, strict=True), 1):
        if unicodedata.normalize("NFC", name) != unicodedata.normalize("NFC", other):
            return f"number {number} of {len(wanted)} is {name!r}, not {other!r}"
    return ""


def targets_beside(network: str | Path) -> list[dict[str, Any]]:
    """Return what the search of a network was for: from the `result.json` beside `searched.yaml`, or from the weights beside
    the `arch.yaml` of a training. Nothing where there is neither."""
    path = Path(network)
    if path.name == "arch.yaml":
        of_training: list[dict[str, Any]] = read_note(path.with_name("model.safetensors")).get("targets", [])
        return of_training
    with suppress(OSError, ValueError, TypeError, AttributeError, InputError):
        result = json.loads(path.with_name("result.json").read_text(encoding="utf-8"))
        if path.name == "searched.yaml":
            size = {"image_size": ArchConfig.load(path).image_size}
            found = [
                {name: target[name] for name in _OF_A_TARGET if target.get(name) is not None} | size
                for target in result.get("targets", [result])
            ]
            # Of the table, the name alone: where it lay is nobody's business who gets the file.
            return [{**target, **({"table": Path(target["table"]).name} if "table" in target else {})} for target in found]
    return []


def targets_of_file(
    targets: Sequence[Mapping[str, Any]], *, image_size: int, batch: int | str, format: str, form: str, int8: bool
) -> list[dict[str, Any]]:
    """Return the targets of a network's search as they stand in an exported file: with the predicted and measured milliseconds
    only where the file has the size, the batch, the format, the form and the precision that were timed."""
    kept = []
    for target in targets:
        device = str(target.get("device", ""))
        timed = "coreml" if is_core_ml(device) else "onnx" if "-cpu" in device else "another"
        there = (timed, "deploy", "-int8" in device, target.get("image_size"), target.get("batch", 1))
        same = there == (format, form, int8, image_size, batch)
        kept.append({name: value for name, value in target.items() if same or name not in ("predicted_ms", "measured_ms")})
    return kept


def metadata(
    arch: ArchConfig,
    form: str,
    batch: int | str,
    classes: Sequence[str] = (),
    targets: Sequence[Mapping[str, Any]] = (),
    **more: Any,
) -> dict[str, str]:
    """Return what an exported file says of itself: text under plain names, lists and objects as JSON.

    Args:
        arch: the network, at the size at which it is exported.
        form: deploy, fastest or plain.
        batch: images of a call, or dynamic.
        classes: in the order of the logits; left out where they are not known.
        targets: of its search; left out where there was none.
        more: further entries, such as int8.
    """
    entries: dict[str, Any] = {
        "input": INPUT,
        "output": OUTPUT,
        "layout": "NCHW",
        "image_size": arch.image_size,
        "batch": batch,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "preparation": PREPARATION,
        "form": form,
        **({"classes": list(classes)} if classes else {}),
        **({"targets": list(targets)} if targets else {}),
        **more,
        "arch": arch.to_yaml(),
        "version": f"metapath-nas {version_of('metapath-nas')}",
    }
    return {name: entry if isinstance(entry, str) else json.dumps(entry) for name, entry in entries.items()}
