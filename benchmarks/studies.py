"""What several studies share: what a folder was claimed for, parts of the work, images that are held out, and trainings of
single networks of any kind, which are kept."""

import argparse
import csv
import hashlib
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.augmentation import augmented, draw, step_generator, steps_of, training_indices
from nas.checkpoints import History, load_checkpoint, save_checkpoint
from nas.data import SUFFIXES, ImageData, Images, load_data, natural_size
from nas.evaluation import accuracy_of
from nas.measure import table_reference
from nas.progress import progress, say
from nas.recipe import Recipe
from nas.request import claim
from nas.settings import SupernetSettings
from nas.steps import accelerator, parameter_groups, set_layer_scale
from nas.supernet_training import AnySupernet, train_supernet, training_size
from nas.table import LatencyTable
from nas.teacher import Teacher
from nas.training import train_network, train_step
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.files import parse_yaml, read_json, reading, write_atomically
from supernet.space import SearchSpace

NOTE = "held_out.json"  # of which images a folder of `hold_out` was made


def part_of(text: str) -> tuple[int, int]:
    """Return K and N of `K/N`."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"--part must be K/N, K from 1 to N, such as 1/2, but is {text!r}")
    return int(found[1]), int(found[2])


def table_sha256(file: Path) -> str:
    """Return what identifies a table's rows."""
    if not file.is_file():  # a table is found by its device's id, too
        raise InputError(f"--table must be the CSV file of a latency table, but is {file}")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def content_of(file: Path, table: LatencyTable) -> dict[str, Any]:
    """Return what identifies a table, and the pace that measurements are brought to: what is kept was measured for both."""
    return {"table_sha256": table_sha256(file), "reference_ms": table_reference(table)._asdict()}


def take_claimed(given: argparse.Namespace, names: Collection[str]) -> dict[str, Any]:
    """Take these settings from the study in `given.out`, whose request is returned: a report is of what was done, whatever
    flags it is given."""
    file = given.out / "request.json"
    if not file.exists():
        raise InputError(f"{given.out} holds no study: give the --out of one")
    held = read_json(file, "the request file")
    vars(given).update({name: value for name, value in held.items() if name in names})
    return held


def claim_supernet(
    folder: Path, command: str, space: SearchSpace, settings: SupernetSettings, seed: int, data: ImageData
) -> None:
    """Make `folder` the place of a supernet, unless it is the folder of a nas-search that trains the same one.

    Raises:
        InputError: it holds another supernet.
    """
    request = {
        "space": space.to_yaml(),
        "settings": settings.deciding(),
        "seed": seed,
        "data_fingerprint": data.fingerprint,
    }
    file = folder / "request.json"
    held = read_json(file, "the request file") if file.exists() else {}
    if held.get("command") != "nas-search":
        claim(folder, {"command": command, **request})
        return
    held["settings"] = {**SupernetSettings().deciding(), **held["settings"]}  # an earlier version had fewer
    if differing := [name for name, value in request.items() if held.get(name) != value]:
        raise InputError(f"{folder} is of a search with another {' and '.join(differing)}: give its own, or another folder")


@dataclass(frozen=True)
class Run:
    """The folder of a nas-search that ended, or was stopped: what it was asked for that its supernet depends on."""

    folder: Path
    space: SearchSpace
    settings: SupernetSettings
    seed: int
    source: Path | None
    """What `--data` was."""
    table: Path
    """Of its first target."""

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read its request.

        Raises:
            InputError: the folder is none of a nas-search, or of one that has no supernet to train.
        """
        do = "give the --out folder of a nas-search"
        held = read_json(folder / "request.json", "the request file", do)
        if held.get("command") != "nas-search":
            raise InputError(f"{folder} is of {held.get('command', 'another command')}, not of nas-search: {do}")
        if "init" in held:
            raise InputError(f"{folder} began with a network of its own (--init), which has no supernet to train: leave it")
        with reading(f"the request file {folder / 'request.json'}", do):
            space = SearchSpace.from_dict(parse_yaml(held["space"], f"the space of {folder}"), f"the space of {folder}")
            settings = SupernetSettings.of_run(held["settings"], None)
            source = None if held["data"] == "digits" else Path(held["data"])
            return cls(folder, space, settings, int(held["seed"]), source, Path(held["table"]))

    def supernet(self) -> tuple[AnySupernet, ImageData]:
        """Return its supernet, and the images as the search had them.

        Raises:
            InputError: the search was stopped before the supernet was trained.
        """
        epochs = self.settings.weight_epochs + self.settings.mixture_epochs
        if load_checkpoint(self.folder / "supernet.pt") < epochs:
            raise InputError(f"the supernet of {self.folder} is not trained yet: let its nas-search go on first")
        data = images_of(self.space, self.source, self.seed, self.settings)
        return train_supernet(self.space.at(data.image_size), data, self.settings, self.seed, self.folder), data


def images_of(space: SearchSpace, source: Path | None, seed: int, settings: SupernetSettings) -> ImageData:
    """Return the images that a nas-search trains and judges a supernet by."""
    size = training_size(space, natural_size(source), settings.image_size)
    data = load_data(source, size, seed, settings.score_images)
    return replace(data, flips=data.flips and settings.mirror)


def with_larger_val(data: ImageData, images: int) -> ImageData:
    """Return the data with training images moved to the validation part until it has `images`.

    Raises:
        InputError: that would leave none to train on.
    """
    missing = images - len(data.val)
    if missing <= 0:
        return data
    if missing >= len(data.train):
        total = len(data.train) + len(data.val)
        raise InputError(f"{images} images are to validate, and there are {total} in all: give a larger image folder")
    shuffled = data.train.shuffled(1)
    moved, kept = slice(missing), slice(missing, None)
    val = Images(
        data.val.pixels,
        torch.cat((data.val.rows, shuffled.rows[moved])),
        torch.cat((data.val.labels, shuffled.labels[moved])),
    )
    return replace(data, train=Images(shuffled.pixels, shuffled.rows[kept], shuffled.labels[kept]), val=val)


def hold_out(source: Path, folder: Path, images: int) -> Path:
    """Return a folder with the images of `source` as `train/` and `val/`: about `images` of them, of each class its share,
    are in `val/`, which searches and trainings look at when they are finished. Where `source` has a `val/`, it is `source`.

    Raises:
        InputError: there are not so many images, or the folder was made of other ones, or with another number held out.
    """
    if (source / "val").is_dir():
        return source
    note = folder / NOTE
    if folder.is_dir() and not note.exists():  # an earlier version's
        return folder
    root = source / "train" if (source / "train").is_dir() else source
    if not root.is_dir():
        raise InputError(f"the data folder {source} does not exist: give --data an image folder")
    files = [
        sorted(f for f in kind.iterdir() if f.suffix.lower() in SUFFIXES) for kind in sorted(root.iterdir()) if kind.is_dir()
    ]
    total = sum(map(len, files))
    if not 0 < images < total:
        raise InputError(f"--val-images must be from 1 to {total - 1}, as there are {total} images, but is {images}")
    listing = "".join(f"{f.parent.name}/{f.name}\0{f.stat().st_size}\n" for of_class in files for f in of_class)
    made_of = {"images": hashlib.sha256(os.fsencode(listing)).hexdigest(), "val_images": images}
    if folder.is_dir():
        if read_json(note, "the note") != made_of:
            raise InputError(
                f"{folder} was made of other images than those of {source}, or with another --val-images: give those again, or "
                "another --out"
            )
        return folder
    partial_folder = folder.with_name(f"{folder.name}.{os.getpid()}")  # another part may be doing the same
    rng = random.Random(0)
    with progress("holding images out", total) as tick:
        for of_class in files:
            held = set(rng.sample(of_class, round(images * len(of_class) / total)))
            for file in of_class:
                link(file, partial_folder / ("val" if file in held else "train") / file.parent.name / file.name)
                tick(1)
    write_atomically(partial_folder / NOTE, json.dumps(made_of) + "\n")
    try:
        partial_folder.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial_folder)
    return folder


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where that cannot be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        unfinished = target.with_name(f".{target.name}")
        shutil.copyfile(source, unfinished)
        unfinished.replace(target)


def finished_rows(metrics: Path, epochs: int) -> list[dict[str, str]]:
    """Return the epochs of a training that has finished, none of another."""
    rows = list(csv.DictReader(metrics.read_text().splitlines())) if metrics.exists() else []
    return rows if rows and int(rows[-1]["epoch"]) == epochs else []


def last_row(metrics: Path, epochs: int) -> dict[str, str] | None:
    """Return the last epoch of a training that has finished."""
    rows = finished_rows(metrics, epochs)
    return rows[-1] if rows else None


def train_alone(arch: ArchConfig, seed: int, data: ImageData, recipe: Recipe, folder: Path) -> None:
    """Train one network with one seed, unless that is done."""
    if last_row(folder / "metrics.csv", recipe.epochs) is None:
        train_network(arch, data, recipe, folder, seed)


def train_model(
    model: nn.Module, name: str, data: ImageData, recipe: Recipe, seed: int, folder: Path | None, teacher: Teacher | None = None
) -> None:
    """Train a network that no ArchConfig describes as `nas.training.train_network` would.

    With a `folder`: from its `checkpoint.pt` on where there is one, and `metrics.csv` has a row an epoch.

    Raises:
        FloatingPointError: the loss, or its gradient, is no longer finite. A checkpoint, if there is one yet, is of before.
    """
    device = accelerator(recipe.accelerator)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if teacher is not None:
        teacher.network.to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), recipe.weight_decay), lr=recipe.learning_rate)
    history, first = History(), 0
    if folder is not None:
        first = load_checkpoint(folder / "checkpoint.pt", net=model, optimizer=optimizer, history=history)
        if first:  # a kill may have come between that checkpoint and this file
            history.write(folder / "metrics.csv")
    batch, per_epoch = steps_of(len(data.train), recipe)
    steps, step = per_epoch * recipe.epochs, per_epoch * first
    with progress(name, steps, step) as tick:
        for epoch in range(first, recipe.epochs):
            losses = []
            model.train()
            for at, indices in enumerate(training_indices(len(data.train), recipe, seed, epoch)):
                rate = recipe.rate(step, batch, per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                pixels, labels = data.train.batch(indices)
                draws = draw(len(indices), pixels.shape[2], recipe, data.flips, step_generator(seed, epoch, at))
                x, y = augmented(pixels.to(device), labels.to(device), draws, recipe, len(data.classes))
                x = x.contiguous(memory_format=torch.channels_last)
                losses.append(train_step(model, optimizer, x, y, recipe, teacher))
                step += 1
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(
                        f"the loss of {name} is not finite in epoch {epoch + 1}, at step {step}: train with a recipe of a "
                        "lower learning_rate"
                    )
                tick(1)
            loss, accuracy = accuracy_of(model, data.val)
            history.rows.append(
                {
                    "epoch": epoch + 1,
                    "learning_rate": rate,
                    "train_loss": sum(losses) / len(losses),
                    "val_loss": loss,
                    "val_accuracy": accuracy,
                }
            )
            say(f"{name}, epoch {epoch + 1} of {recipe.epochs}: validation loss {loss:.4f}, top-1 {100 * accuracy:.2f} %")
            if folder is not None:
                save_checkpoint(folder / "checkpoint.pt", epoch + 1, net=model, optimizer=optimizer, history=history)
                history.write(folder / "metrics.csv")


def new_model(build: Callable[[], nn.Module], recipe: Recipe, seed: int) -> nn.Module:
    """Return a network with the weights and the layer scales that a training of `seed` begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    set_layer_scale(model, recipe.layer_scale)
    return model
