"""Labelled images for training and for scoring: image folders, the embedded digits, normalisation, augmentation, order.

Shapes: n images in a part, B images in a batch, S = image_size (pixels).
"""

import hashlib
import os
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nas.pixels import Files, Packed, quiet, read_pixels, square
from nas.progress import progress as progress_of
from nas.progress import say
from supernet.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VALIDATION = ("dev", "test", "valid", "validation")  # what others call folders beside train/
SHIFT = 1 / 8  # of an image's side, at most, in augmentation
ENDINGS = 3  # of files that were left out, to be named
MIN_IMAGES_PER_CLASS = 3  # one each to train, to score and to validate

_LAYOUT = "expected PATH/train/<class>/* with an optional PATH/val/<class>/*, or PATH/<class>/*"


@dataclass(frozen=True, eq=False)
class Images:
    """One part of a data set; image i is `pixels[rows[i]]`, so that parts share their pixels."""

    pixels: Tensor | Files | Packed  # uint8
    rows: Tensor  # (n,) int64
    labels: Tensor  # (n,) int64: indices into ImageData.classes

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def shuffled(self, seed: int) -> "Images":
        """Return the same images in a random order: parts are in the order of their classes."""
        order = torch.from_numpy(_rng(seed, "order").permutation(len(self)))
        return Images(self.pixels, self.rows[order], self.labels[order])

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the uint8 RGB images (B, 3, S, S) and int64 labels (B,) at `indices` (B,), all on the CPU."""
        return self.pixels[self.rows[indices]], self.labels[indices]


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set in three disjoint parts: `train` trains, `score` judges the search's actions, `val` is reported."""

    train: Images
    score: Images
    val: Images
    classes: tuple[str, ...]
    image_size: int
    flips: bool  # whether a mirrored image keeps its class
    demonstration: bool  # the embedded digits, not the user's data
    skipped: tuple[Path, ...]  # files that cannot be decoded
    source: str  # the resolved folder, or "digits"
    fingerprint: str  # changes with the names and the sizes of the files
    left_out: tuple[str, ...] = ()  # what else the folder has, in lines for people

    @property
    def train_size(self) -> int:
        """Side of the training images in pixels: more than `image_size` where crops are to be taken from them."""
        pixels = self.train.pixels
        return pixels.shape[-1] if isinstance(pixels, Tensor) else pixels.image_size


def load_images(
    path: str | Path | None,
    image_size: int | None,
    seed: int,
    *,
    score_images: int = 512,
    train_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageData:
    """Load an image folder, or scikit-learn's handwritten digits where `path` is None.

    A folder is `path/train/<class>/*` with an optional `path/val/<class>/*`, or `path/<class>/*`. Without `val/`, a
    tenth of each class (at least one image) is set apart, the same whatever the `seed`: weights of one seed are validated
    under another on images that they have not seen. The scoring images are `score_images`, but at most
    a third, of the remaining ones: drawn by `seed`, in proportion to the classes. Images are scaled so that their short
    side is `image_size` pixels (None: `natural_size(path)`) and cropped at the centre; training images to `train_size` where
    that is more, as crops are to be taken from them, but not to more than `natural_size(path)`. `progress` is called with
    (done, total) images. InputError where the folder cannot be used.
    """
    if image_size is not None and image_size < 1:
        raise InputError(f"image size {image_size} is not a size: give a whole number of pixels from 1 on")
    if score_images < 0:
        raise InputError(f"{score_images} is no number of scoring images: give 0 or more")
    if path is None:
        return _load_digits(image_size or 8, seed, score_images)
    folder = _list_folder(Path(path))
    size = image_size or _median_short_side(folder)
    large = max(size, min(train_size, _median_short_side(folder))) if train_size is not None and train_size > size else size
    pixels, readable = read_pixels(folder.files, large, folder.stamps, progress)
    skipped = tuple(Path(file) for file, fine in zip(folder.files, readable, strict=True) if not fine)
    _check_classes(folder, readable)

    train, score, val = _divide(pixels, folder.labels, readable, folder.in_val, score_images, seed)
    if large != size:
        score, val = (_at(size, part, folder) if len(part) else part for part in (score, val))
    return ImageData(
        train=train,
        score=score,
        val=val,
        classes=folder.classes,
        image_size=size,
        flips=True,
        demonstration=False,
        skipped=skipped,
        source=str(folder.root.resolve()),
        fingerprint=folder.fingerprint,
        left_out=folder.left_out,
    )


def refuse_among_images(out: Path, path: Path | None) -> None:
    """Refuse results among the images of a command, where they would be taken for a class or an image the next time.

    Raises:
        InputError: `out` lies there.
    """
    if path is None:
        return
    root, place = path.resolve(), out.resolve()
    among = [root / "train", root / "val"] if _is_parted(root) else [root]
    if place == root or any(place.is_relative_to(part) for part in among):
        raise InputError(f"the results, in {out}, would lie among the images of {path}: give an --out elsewhere")


def _is_parted(root: Path) -> bool:
    """Whether a data folder has the parts train/ and, maybe, val/, instead of classes. A folder named train that holds images
    and no folders is a class: of vehicles, say."""
    return (root / "train").is_dir() and any(entry.is_dir() for entry in _entries(root / "train"))


def load_data(
    path: Path | None, image_size: int, seed: int, score_images: int = 512, train_size: int | None = None
) -> ImageData:
    """Load the images of a command; say what a folder holds, and what of it was skipped or not looked at."""
    if path is None:  # what that means is said where work begins: a refusal that comes before is one line
        return load_images(None, image_size, seed, score_images=score_images)
    with progress_of(f"reading {path}", 1.0) as tick:
        done = 0.0

        def advance(now: int, total: int) -> None:
            nonlocal done
            tick(now / total - done)
            done = now / total

        data = load_images(path, image_size, seed, score_images=score_images, train_size=train_size, progress=advance)
    for file in data.skipped:
        say(f"skipped a broken image: {file}")
    if data.skipped:
        say(f"{len(data.skipped)} broken images were skipped")
    for line in data.left_out:
        say(line)
    say(
        f"{data.source}: {len(data.classes)} classes; {len(data.train):,} images to train, "
        + (f"{len(data.score):,} to score, " if score_images else "")
        + f"{len(data.val):,} to validate"
    )
    return data


def say_if_demonstration(data: ImageData) -> None:
    """Say, once a command's work begins, that the embedded digits are what it works on."""
    if data.demonstration:
        say("no --data: the embedded handwritten digits stand in. This is a demonstration, not a network to ship")


def natural_size(path: str | Path | None) -> int:
    """Return the median short side in pixels of up to 200 training images of the folder; 8 for the digits (None).

    The sample is the same at every call. InputError where the folder cannot be used.
    """
    return 8 if path is None else _median_short_side(_list_folder(Path(path)))


def normalise(batch: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return uint8 images (B, 3, S, S) as (image / 255 - mean) / std with ImageNet's figures, computed in float32."""
    assert batch.dtype == torch.uint8, "images are normalised once"
    mean = torch.tensor(IMAGENET_MEAN, device=batch.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=batch.device).view(3, 1, 1)
    return batch.float().div_(255).sub_(mean).div_(std).to(dtype)


def augment(x: Tensor, generator: torch.Generator, flip: bool = True, part: tuple[slice, int] | None = None) -> Tensor:
    """Return each image of (B, C, S, S) shifted by up to an eighth of its side and, if `flip`, mirrored half of the time.

    The border is filled by reflection. The draws come from `generator` alone, so they are the same on every device. `part`:
    which rows of a batch the images are, and how many images it has; each gets what it would get in the whole batch.
    """
    _, _, height, width = x.shape
    own, n = part or (slice(None), len(x))
    shifts = []
    for side in (height, width):
        reach = min(round(side * SHIFT), side - 1)
        shifts.append(torch.randint(-reach, reach + 1, (n,), generator=generator))
    mirrored = torch.rand(n, generator=generator) < 0.5 if flip else torch.zeros(n, dtype=torch.bool)
    return shifted(x, torch.stack(shifts, 1)[own], mirrored[own])


def shifted(x: Tensor, shift: Tensor, mirrored: Tensor) -> Tensor:
    """Return images (B, C, H, W) shifted by so many rows and columns (B, 2), with the border reflected, and mirrored where
    `mirrored` (B,) says so."""
    positions = []
    for axis, side in enumerate(x.shape[2:]):
        position = (torch.arange(side) + shift[:, axis, None]).abs()
        positions.append((side - 1) - ((side - 1) - position).abs())
    rows, columns = positions
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    # Two gathers instead of padding: reflection_pad2d knows no uint8, and the padded copy is never made.
    x = x.gather(2, rows.to(x.device)[:, None, :, None].expand_as(x))
    return x.gather(3, columns.to(x.device)[:, None, None, :].expand_as(x))


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int, images_per_epoch: int | None = None) -> Iterator[Tensor]:
    """Yield the index tensors (B,), int64, of one epoch (counted from 0) over `n` images.

    Epochs of one size (`images_per_epoch`, default `n`) walk through an endless row of seeded shuffles, each taking up
    where the last one ended: every image is seen before any is repeated. Those of another size begin elsewhere. An epoch
    is cut to whole batches unless it is smaller than one; what is cut begins the next epoch. A pure function of its
    arguments, so that a resumed run sees the same order.
    """
    if min(n, batch_size) < 1 or (images_per_epoch is not None and images_per_epoch < 1):
        raise InputError(f"{n} images, batch size {batch_size} and {images_per_epoch} images per epoch: all must be 1 or more")
    size = images_per_epoch or n
    if size > batch_size:
        size -= size % batch_size
    turn, at = divmod(epoch * size, n)
    order = _rng(seed, "epoch", turn).permutation(n)
    for begin in range(0, size, batch_size):
        parts, wanted = [], min(batch_size, size - begin)
        while wanted:
            if at == n:
                turn, at = turn + 1, 0
                order = _rng(seed, "epoch", turn).permutation(n)
            parts.append(order[at : at + wanted])
            at += len(parts[-1])
            wanted -= len(parts[-1])
        yield torch.from_numpy(np.concatenate(parts))


@dataclass(frozen=True, eq=False)
class _Folder:
    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: NDArray[np.int64]  # (n,)
    in_val: NDArray[np.bool_]  # (n,)
    fingerprint: str
    stamps: tuple[str, ...]  # (n,): name, size and time of each file
    others: tuple[str, ...]  # of each class in train/: what else it has
    left_out: tuple[str, ...]


@dataclass(eq=False)
class _Class:
    """The folder of a class."""

    images: list["os.DirEntry[str]"] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)
    """Of its files of other kinds."""
    folders: int = 0


def _list_folder(root: Path) -> _Folder:
    if not _entries(root):
        raise InputError(f"data folder {root} is empty: {_LAYOUT}")
    parted = _is_parted(root)
    train = _class_files(root / "train" if parted else root)
    val = _class_files(root / "val") if parted and (root / "val").is_dir() else None
    classes = tuple(sorted(train))
    if not any(held.images for held in train.values()):
        others = f", but {found}" if (found := _others(train.values())) else ""
        raise InputError(f"data folder {root} has no images ({', '.join(SUFFIXES)}) in class folders{others}: {_LAYOUT}")
    if len(classes) == 1:
        raise InputError(f"data folder {root} has one class only, {classes[0]!r}, but two are needed: {_LAYOUT}")
    if val is not None and not any(held.images for held in val.values()):
        others = f", but {found}" if (found := _others(val.values())) else ""
        raise InputError(f"{root / 'val'} has no images{others}: add some, or remove it to have a tenth of train/ set apart")
    for name in sorted(val or ()):
        if name not in train:
            raise InputError(f"{root / 'val'} has the class {name!r}, which train/ lacks: rename, add or remove it")

    entries, labels, in_val, lines, stamps = [], [], [], [], []
    for part, held in ((train, False), (val or {}, True)):
        for name in sorted(part):
            for entry in part[name].images:
                entries.append(entry.path)
                labels.append(classes.index(name))
                in_val.append(held)
                # A dangling link is an image that is broken, to be named with the others.
                there = entry.stat() if entry.is_file() else None
                lines.append(f"{Path(entry.path).relative_to(root).as_posix()}\0{there.st_size if there else -1}\n")
                stamps.append(f"{lines[-1]}{there.st_mtime_ns if there else -1}")
    folder = _Folder(
        root=root,
        classes=classes,
        files=tuple(entries),
        labels=np.array(labels, np.int64),
        in_val=np.array(in_val, np.bool_),
        fingerprint=hashlib.sha256(os.fsencode("".join(sorted(lines)))).hexdigest(),
        stamps=tuple(stamps),
        others=tuple(_others([train[name]]) for name in classes),
        left_out=tuple(_left_out(root, parted, train, val)),
    )
    _check_classes(folder, np.ones(len(entries), np.bool_))
    return folder


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    """Return what the folder holds, sorted by name, without hidden things (macOS leaves `._name.jpg` files about)."""
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except FileNotFoundError as error:
        raise InputError(f"data folder {folder} does not exist: {_LAYOUT}") from error
    except NotADirectoryError as error:
        raise InputError(f"data folder {folder} is not a folder (unpack an archive first): {_LAYOUT}") from error
    except OSError as error:
        raise InputError(f"data folder {folder} cannot be read ({error.strerror}): check its permissions") from error


def _class_files(part: Path) -> dict[str, _Class]:
    found = {}
    for folder in _entries(part):
        if not folder.is_dir():
            continue
        found[folder.name] = held = _Class()
        for entry in _entries(Path(folder.path)):
            if entry.is_dir():
                held.folders += 1
            elif entry.name.lower().endswith(SUFFIXES):
                held.images.append(entry)
            else:
                held.endings[Path(entry.name).suffix.lower() or "without an ending"] += 1
    return found


def _others(classes: Iterable[_Class]) -> str:
    """Return what folders of classes have that is no image of theirs, in words."""
    endings, folders = Counter[str](), 0
    for held in classes:
        endings.update(held.endings)
        folders += held.folders
    parts = []
    if number := endings.total():
        named = ", ".join(ending for ending, _ in endings.most_common(ENDINGS)) + (", ..." if len(endings) > ENDINGS else "")
        parts.append(f"{number:,} {'files' if number > 1 else 'file'} of other kinds ({named})")
    if folders:
        parts.append(f"{folders:,} {'folders' if folders > 1 else 'folder'} inside classes")
    return ", ".join(parts)


def _left_out(root: Path, parted: bool, train: Mapping[str, _Class], val: Mapping[str, _Class] | None) -> Iterator[str]:
    """Yield, in lines for people, what of a data set's folder is not looked at, and which classes nothing judges."""
    if others := _others([*train.values(), *(val or {}).values()]):
        yield f"left out: {others}"
    for entry in _entries(root) if parted else ():
        if entry.name.lower() in VALIDATION and entry.is_dir():
            yield f"{entry.path} is not used" + ("" if val is not None else ": name it val to validate on it")
    if val is not None and (without := sorted(name for name in train if name not in val or not val[name].images)):
        named = ", ".join(map(repr, without[:ENDINGS])) + (", ..." if len(without) > ENDINGS else "")
        yield f"{root / 'val'} has no images of {named}: the accuracy is of the other classes alone"


def _check_classes(folder: _Folder, readable: NDArray[np.bool_]) -> None:
    """Raise InputError where a class has too few readable images to train, or none left of those in `val/`."""
    broken = f" that can be decoded ({np.count_nonzero(~readable)} broken files in all)" if not readable.all() else ""
    n = len(folder.classes)
    trained = np.bincount(folder.labels[readable & ~folder.in_val], minlength=n)
    listed = np.bincount(folder.labels[folder.in_val], minlength=n)
    held = np.bincount(folder.labels[readable & folder.in_val], minlength=n)
    for label, name in enumerate(folder.classes):
        if trained[label] < MIN_IMAGES_PER_CLASS:
            others = f", beside {folder.others[label]}" if folder.others[label] else ""
            raise InputError(
                f"class {name!r} of {folder.root} has {trained[label]} training images{broken}{others}, but at least "
                f"{MIN_IMAGES_PER_CLASS} are needed: add images or remove the class; {_LAYOUT}"
            )
        if listed[label] and not held[label]:
            raise InputError(f"class {name!r} of {folder.root / 'val'} has no image{broken}: repair or remove it")


def _median_short_side(folder: _Folder) -> int:
    files = [file for file, held in zip(folder.files, folder.in_val, strict=True) if not held]
    # The seed is not the run's: two runs on the same data must agree on the size.
    sides = []
    for file in random.Random(0).sample(files, min(200, len(files))):
        try:
            with quiet(), Image.open(file) as image:
                sides.append(min(image.size))
        except MemoryError:
            raise
        except Exception:  # noqa: S112 - see nas.pixels.decode; load_images names it
            continue
    if not sides:
        raise InputError(f"none of the images sampled from {folder.root} can be decoded: repair the files")
    return statistics.median_low(sides)


def _load_digits(size: int, seed: int, score_images: int) -> ImageData:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # takes a second, and only this needs it

    digits = load_digits()
    grey = (digits.images * 255 / 16).round().astype(np.uint8)  # (1797, 8, 8), from 0..16
    pixels = torch.from_numpy(np.stack([square(Image.fromarray(image), size) for image in grey]))
    labels = digits.target.astype(np.int64)
    usable, in_val = np.ones(len(labels), np.bool_), np.zeros(len(labels), np.bool_)
    train, score, val = _divide(pixels, labels, usable, in_val, score_images, seed)
    return ImageData(
        train=train,
        score=score,
        val=val,
        classes=tuple(str(name) for name in digits.target_names),
        image_size=size,
        flips=False,
        demonstration=True,
        skipped=(),
        source="digits",
        fingerprint="digits",
    )


def _divide(
    pixels: Tensor | Files | Packed,
    labels: NDArray[np.int64],
    usable: NDArray[np.bool_],
    in_val: NDArray[np.bool_],
    score_images: int,
    seed: int,
) -> tuple[Images, Images, Images]:
    """Return the parts (train, score, val) of the usable rows; all masks are (n,)."""
    train, val = np.flatnonzero(usable & ~in_val), np.flatnonzero(usable & in_val)
    if not len(val):
        train, val = _split_validation(train, labels)
    train, score = _split_scoring(train, labels, score_images, seed)
    parts = [Images(pixels, torch.from_numpy(rows), torch.from_numpy(labels[rows])) for rows in (train, score, val)]
    return parts[0], parts[1], parts[2]


def _at(size: int, part: Images, folder: _Folder) -> Images:
    """Return the same images at another size."""
    rows = part.rows.tolist()
    pixels, _ = read_pixels(tuple(folder.files[row] for row in rows), size, [folder.stamps[row] for row in rows])
    return Images(pixels, torch.arange(len(part)), part.labels)


def _split_validation(rows: NDArray[np.int64], labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows that stay for training and those that validate: a tenth of each class, at least one image."""
    rank, count = _ranks(labels[rows], _rng(0, "val"))
    chosen = rank < np.maximum(1, np.rint(count / 10))
    return rows[~chosen], rows[chosen]


def _split_scoring(
    rows: NDArray[np.int64], labels: NDArray[np.int64], score_images: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows that stay for training and those that score the search, in proportion to the classes."""
    rng = _rng(seed, "score")
    rank, count = _ranks(labels[rows], rng)
    # A third of the rows has a class's share under one half, so no class leaves the training part.
    share = (rank + 0.5) / count
    shuffled = rng.permutation(len(rows))  # else the first classes would win every tie
    order = shuffled[np.argsort(share[shuffled], kind="stable")]
    chosen = np.zeros(len(rows), np.bool_)
    chosen[order[: min(score_images, len(rows) // 3)]] = True
    return rows[~chosen], rows[chosen]


def _ranks(labels: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each image's place in a shuffle of its class, and the number of images of its class: both (n,)."""
    counts = np.bincount(labels)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    rank = np.empty_like(labels)
    rank[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank, counts[labels]


def _rng(seed: int, purpose: str, turn: int = 0) -> np.random.Generator:
    """Return a generator of its own for each purpose, so that one draw more in one place moves nothing elsewhere."""
    return np.random.default_rng([seed % 2**64, *purpose.encode(), turn])
