"""The pixels of image files: packed in a file that later runs map into memory, or where they are too many, decoded batch by
batch.

Shapes: n files, B images in a batch, S = size (pixels).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import platformdirs
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from nas.profilers.bench import usable_cpus
from nas.progress import say
from nas.stopping import outlive
from supernet.errors import InputError
from supernet.files import to_disk

if TYPE_CHECKING:
    from nas.data import Images

MEMORY_LIMIT_BYTES = 4 * 2**30  # larger data sets are decoded batch by batch
CACHE_LIMIT_BYTES = 16 * 2**30  # of all packed data sets together; those that were not used for longest give way
CACHE = "METAPATH_NAS_CACHE"  # environment variable: the folder of packed images; empty: none
MOST_WORKERS = 16  # processes that decode: as many cores feed a GPU with JPEGs
AHEAD = 2  # batches that each of them has ready
SPOT_CHECKS = 8  # images of a packed file that are decoded again before it is trusted
LEFT_OVER_S = 24 * 3600.0  # a temporary file that is older belongs to nobody

_CHUNK = 64  # images a task of the thread pool: fewer would be all overhead where images are tiny

Tick = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Files:
    """Pixels that stay in their files and are decoded when asked for: indexed like an (n, 3, S, S) uint8 tensor."""

    paths: tuple[str, ...]
    image_size: int

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the images at `rows` (B,) as uint8 (B, 3, S, S); InputError for a file that can no longer be read."""
        paths = [self.paths[row] for row in rows.tolist()]
        with quiet():
            if torch.utils.data.get_worker_info() is not None:  # one of many processes that decode
                images = [self._decode(path) for path in paths]
            else:
                with ThreadPoolExecutor() as pool:
                    images = list(pool.map(self._decode, paths))
        return torch.from_numpy(np.stack(images))

    def _decode(self, path: str) -> NDArray[np.uint8]:
        try:
            return decode(path, self.image_size)
        except MemoryError:  # says nothing about the file
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error ...
            raise InputError(f"image {path} can no longer be read ({error}): put it back or start anew") from error


@dataclass(frozen=True, eq=False)
class Packed:
    """Pixels in a file that is mapped into memory: indexed like an (n, 3, S, S) uint8 tensor, and shared by all processes.

    On a machine that has no such file (another one of a training on several), they are decoded from `files`.
    """

    path: Path
    files: Files

    @property
    def image_size(self) -> int:
        return self.files.image_size

    @cached_property
    def _mapped(self) -> NDArray[np.uint8] | None:
        return _mapped(self.path, (len(self.files.paths), 3, self.files.image_size, self.files.image_size))

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the images at `rows` (B,) as uint8 (B, 3, S, S)."""
        if self._mapped is None:
            return self.files[rows]
        return torch.from_numpy(self._mapped[rows.numpy()])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "files": self.files}  # another process maps the file itself


def read_pixels(
    files: tuple[str, ...], size: int, stamps: Iterable[str], progress: Tick | None = None
) -> tuple[Tensor | Files | Packed, NDArray[np.bool_]]:
    """Return the pixels of all files, and which files (n,) can be decoded; those that cannot have no meaningful pixels.

    What was decoded is kept on disk (`cache_folder`), so that the next call on the same files has it at once: pixels that fit
    in memory, of others only which files can be decoded. Those that could not are tried again: permissions change, and
    servers come back. `stamps` say what tells the files from others and from themselves once they are changed. `progress` is
    called with (done, total) files.
    """
    fits = len(files) * 3 * size * size <= MEMORY_LIMIT_BYTES
    folder = cache_folder()
    if folder is None:
        pixels, readable = _decode_all(files, size, fits, progress)
        return (Files(files, size) if pixels is None else torch.from_numpy(pixels)), readable
    told = hashlib.sha256("\n".join(stamps).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    packed = Packed(folder / f"{told}-{size}px.npy", Files(files, size))
    mask = packed.path.with_suffix(".readable.npy")
    known = _mapped(mask, (len(files),), np.bool_)
    if known is not None and (not fits or _trusted(packed, known)) and not _more_readable(files, size, known):
        for path in (packed.path, mask):
            with suppress(OSError):
                os.utime(path)  # used now, so it is not the first to go
        if progress is not None:
            progress(len(files), len(files))
        return (packed if fits else packed.files), np.array(known)
    pixels, readable = _decode_all(files, size, fits, progress)
    kept = _keep(folder, {packed.path: pixels, mask: readable})
    if pixels is None:
        return packed.files, readable
    # A new one: that above may have mapped the file that this one has replaced.
    return (Packed(packed.path, packed.files) if kept else torch.from_numpy(pixels)), readable


def cache_folder() -> Path | None:
    """Return where packed images are kept: what the environment says, else the user's cache; None where that is empty."""
    told = os.environ.get(CACHE)
    if told is None:
        return Path(platformdirs.user_cache_dir("metapath-nas", appauthor=False)) / "packed"
    return Path(told) if told else None


def loaded(images: Images, batches: Iterable[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the uint8 images (B, 3, S, S) and the labels (B,) of each batch of indices, in their order, on the device.

    Images that stay in their files are decoded in other processes, several batches ahead.

    Raises:
        InputError: a file can no longer be read.
    """
    pinned = device.type == "cuda"
    for pixels, labels in _batches(images, batches):
        if pinned:
            pixels, labels = pixels.pin_memory(), labels.pin_memory()
        yield pixels.to(device, non_blocking=pinned), labels.to(device, non_blocking=pinned)


def _batches(images: Images, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    if not isinstance(images.pixels, Files):
        yield from map(images.batch, batches)
        return
    loader = torch.utils.data.DataLoader(
        _Batches(images),
        batch_size=None,
        sampler=batches,
        num_workers=workers(),
        prefetch_factor=AHEAD,
        worker_init_fn=outlive,
    )
    try:
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"a process that decodes images has died ({' '.join(str(error).split())}): most often memory ran out, or in a "
            "container /dev/shm is too small (docker run --ipc=host)"
        ) from error


class _Batches(torch.utils.data.Dataset[tuple[Tensor, Tensor] | InputError]):
    """Batches by their indices; an error is handed on as it is, for one raised in a worker would come with its traceback."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor] | InputError:
        try:
            return self.images.batch(indices)
        except InputError as error:
            return error


def workers() -> int:
    """Return how many processes decode for this one: the cores, divided among the processes that torchrun has here."""
    return max(1, min(MOST_WORKERS, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def decode(path: str, size: int) -> NDArray[np.uint8]:
    """Return the file's (first) image as uint8 RGB (3, S, S); transparency is left out, as if there were none.

    Raises what Pillow's decoders raise: OSError, SyntaxError, ValueError, struct.error and others; for more than 179 million
    pixels, Image.DecompressionBombError.
    """
    with Image.open(path) as image:
        image.draft("RGB", (2 * size, 2 * size))  # a JPEG much larger than that is decoded at 1/2, 1/4 or 1/8
        image.load()
        with suppress(Exception):  # of damaged EXIF data; the pixels are whole, and lie as they lie
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":  # convert() would take values from 0 to 1 for black
            raise ValueError("its values are no levels of a picture, but floating-point numbers")
        if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip at 255
            grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            return square(Image.fromarray(grey), size)
        if "transparency" in image.info:
            return square(image.convert("RGBA"), size)
        return square(image, size)


def square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Return the image's central square, scaled to uint8 RGB (3, S, S)."""
    rgb = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb).transpose(2, 0, 1)


def _decode_all(
    files: Sequence[str], size: int, fits: bool, progress: Tick | None
) -> tuple[NDArray[np.uint8] | None, NDArray[np.bool_]]:
    """Decode every file once; return the pixels (n, 3, S, S) if they fit, and which files (n,) can be decoded."""
    n = len(files)
    readable = np.zeros(n, np.bool_)
    pixels = np.zeros((n if fits else 0, 3, size, size), np.uint8)

    def decode_some(rows: range) -> int:
        for row in rows:
            try:
                image = decode(files[row], size)
            except MemoryError:  # says nothing about the file
                raise
            except Exception:  # noqa: S112 - see decode; load_images names the file
                continue
            readable[row] = True
            if fits:
                pixels[row] = image
        return len(rows)

    done = 0
    with quiet(), ThreadPoolExecutor() as pool:
        try:
            for count in pool.map(decode_some, (range(n)[start : start + _CHUNK] for start in range(0, n, _CHUNK))):
                done += count
                if progress is not None:
                    progress(done, n)
        finally:
            pool.shutdown(cancel_futures=True)  # else Ctrl-C waits until all the rest is decoded
    return (pixels if fits else None), readable


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Pillow has to say of single files: large ones, damaged EXIF data, palettes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _mapped(path: Path, shape: tuple[int, ...], kind: type = np.uint8) -> Any:
    """Return the array of a file that was written by `_keep`, mapped into memory; None where there is no such."""
    try:
        found = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # there is none, it is cut short, or it is something else
        return None
    return found if isinstance(found, np.ndarray) and found.shape == shape and found.dtype == kind else None


def _trusted(packed: Packed, readable: NDArray[np.bool_]) -> bool:
    """Return whether some of the packed images equal what their files give now: another Pillow may scale in another way."""
    if packed._mapped is None:
        return False
    rows = np.flatnonzero(readable)
    if not len(rows):
        return False
    rows = rows[np.linspace(0, len(rows) - 1, min(SPOT_CHECKS, len(rows))).astype(np.int64)]
    try:
        return bool(np.array_equal(packed._mapped[rows], packed.files[torch.from_numpy(rows)].numpy()))
    except InputError:
        return False


def _more_readable(files: Sequence[str], size: int, readable: NDArray[np.bool_]) -> bool:
    """Return whether a file can be decoded now that could not be before."""
    broken = [file for file, fine in zip(files, readable, strict=True) if not fine]
    _, now = _decode_all(broken, size, False, None)
    return bool(now.any())


def _keep(folder: Path, arrays: dict[Path, NDArray[Any] | None]) -> bool:
    """Write arrays to the cache, each whole or not at all; return whether that was possible, and say why if not."""
    needed = sum(array.nbytes for array in arrays.values() if array is not None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(folder, needed)
        if shutil.disk_usage(folder).free < 2 * needed:
            raise OSError("the disk is nearly full")
        for path, array in arrays.items():
            if array is not None:
                _write(path, array)
    except OSError as error:
        say(f"decoded images cannot be kept in {folder} ({error.strerror or error}): the next run decodes them again")
        return False
    return True


def _write(path: Path, array: NDArray[Any]) -> None:
    """Write a large array as `write_atomically` does, without a second copy of it in memory."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".npy")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array)
            file.flush()
            to_disk(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _make_room(folder: Path, needed: int) -> None:
    """Remove what killed runs left over, and of the packed files those not used for longest, until `needed` bytes have room."""
    found = []
    for path in folder.glob("*.npy"):
        with suppress(OSError):  # another process has removed it meanwhile
            there = path.stat()
            found.append((there.st_mtime, there.st_size, path))
    total = needed
    for used, size, path in sorted(found, reverse=True):
        being_written = path.name.startswith(".")
        if not being_written:
            total += size
        if time.time() - used > LEFT_OVER_S if being_written else total > CACHE_LIMIT_BYTES:
            with suppress(OSError):  # Windows keeps what another process has mapped
                path.unlink()
