"""Image folders and digits: what is accepted, how it is divided, and what becomes of a pixel."""

import os
import pickle
import re
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from nas import pixels
from nas.data import ImageData, Images, augment, epoch_batches, load_data, load_images, natural_size, normalise
from supernet.errors import InputError


def paint(path: Path, value: int = 0, size: tuple[int, int] = (8, 8)) -> None:
    """Write a picture of one grey value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def fill(root: Path, counts: dict[str, int], first: int = 0) -> Path:
    """Write class folders whose images have consecutive grey values from `first` on, so that each can be recognised."""
    value = first
    for name, count in counts.items():
        for _ in range(count):
            paint(root / name / f"{value:03}.png", value)
            value += 1
    return root


def values(part: Images) -> set[int]:
    """Return the grey values of the images of a part."""
    return set(part.batch(torch.arange(len(part)))[0][:, 0, 0, 0].tolist())


def per_class(part: Images) -> Counter[int]:
    return Counter(part.labels.tolist())


def test_parts_are_disjoint_stratified_and_fixed_by_the_seed(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 60, "ant": 30, "bee": 4})
    found = load_images(tmp_path, None, seed=1)
    train, score, val = values(found.train), values(found.score), values(found.val)
    assert train | score | val == set(range(94)), "nothing is lost"
    assert len(train) + len(score) + len(val) == 94, "no image is in two parts"
    assert found.classes == ("ant", "bee", "cat"), "classes are the sorted folder names"
    assert per_class(found.val) == {0: 3, 1: 1, 2: 6}, "a tenth of each class, at least one image"
    assert per_class(found.score) == {0: 9, 1: 1, 2: 18}, "a third of 84 in proportion 27 : 3 : 54"
    again, other = load_images(tmp_path, None, seed=1), load_images(tmp_path, None, seed=2)
    assert (values(again.score), values(again.val)) == (score, val), "the same seed gives the same parts"
    assert values(other.score) != score, "another seed scores with other images"
    assert values(other.val) == val, "and validates with the same ones: none of them has trained the weights of the first seed"


def test_labels_follow_their_images(tmp_path: Path) -> None:
    fill(tmp_path, {"low": 20, "high": 20}, first=100)
    found = load_images(tmp_path, 8, seed=0)
    images, labels = found.train.batch(torch.tensor([3, 0, len(found.train) - 1]))
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    for value, label in zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True):
        assert found.classes[label] == ("low" if value < 120 else "high")


def test_scoring_images_never_come_from_val(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 20, "b": 20})
    fill(tmp_path / "val", {"a": 6, "b": 2}, first=200)
    found = load_images(tmp_path, None, seed=0, score_images=10)
    assert values(found.val) == set(range(200, 208)), "val/ is taken whole, and alone"
    assert len(found.score) == 10 and len(found.train) == 30
    assert not values(found.score) & values(found.train)
    assert max(values(found.score)) < 200


def test_smallest_data_set_keeps_every_class_in_training(tmp_path: Path) -> None:
    found = load_images(fill(tmp_path, {"a": 3, "b": 3, "c": 60}), None, seed=0)
    assert set(per_class(found.train)) == {0, 1, 2}
    assert set(per_class(found.val)) == {0, 1, 2}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert load_images(fill(tmp_path, {"car": 3, "train": 3}), None, seed=0).classes == ("car", "train")


def test_digits_are_a_demonstration_in_three_channels() -> None:
    found = load_images(None, None, seed=0)
    assert found.demonstration and not found.flips, "a mirrored digit is not that digit"
    assert (found.source, found.fingerprint, found.image_size, found.skipped) == ("digits", "digits", 8, ())
    assert found.classes == tuple("0123456789")
    assert len(found.train) + len(found.score) + len(found.val) == 1797
    assert len(found.score) == 512
    images, _ = found.train.batch(torch.arange(len(found.train)))
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    assert (images.min(), images.max()) == (0, 255), "sixteen levels are spread over the range"
    assert load_images(None, 16, seed=0).train.batch(torch.arange(2))[0].shape == (2, 3, 16, 16)


@pytest.mark.parametrize("limit", [pixels.MEMORY_LIMIT_BYTES, 0], ids=["in memory", "in files"])
def test_broken_images_are_named_and_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    fill(tmp_path, {"a": 10, "b": 10})
    for name in ("cut.jpg", "cut.png"):
        noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / "a" / name)
        whole = (tmp_path / "a" / name).read_bytes()
        (tmp_path / "a" / name).write_bytes(whole[: len(whole) - 90])
    (tmp_path / "b" / "empty.jpg").touch()
    (tmp_path / "b" / "text.webp").write_text("no image")
    (tmp_path / "b" / "notes.txt").write_text("not an image file, so no broken one")
    (tmp_path / "b" / "._001.png").write_text("macOS's hidden companion")
    monkeypatch.setattr(pixels, "MEMORY_LIMIT_BYTES", limit)
    seen: list[tuple[int, int]] = []
    found = load_images(tmp_path, None, seed=0, progress=lambda done, total: seen.append((done, total)))
    assert found.skipped == tuple(tmp_path / name for name in ("a/cut.jpg", "a/cut.png", "b/empty.jpg", "b/text.webp"))
    assert values(found.train) | values(found.score) | values(found.val) == set(range(20))
    assert seen[-1] == (24, 24), "progress counts broken files as done"


def test_training_images_may_be_larger_than_those_that_are_judged(tmp_path: Path) -> None:
    for value in range(20):
        paint(tmp_path / "ab"[value % 2] / f"{value:03}.png", value, (40, 24))
    plain, larger = load_images(tmp_path, 16, seed=0), load_images(tmp_path, 16, seed=0, train_size=20)
    assert (larger.image_size, larger.train_size) == (16, 20) and (plain.image_size, plain.train_size) == (16, 16)
    assert larger.train.batch(torch.arange(2))[0].shape == (2, 3, 20, 20)
    for part in ("score", "val"):
        one, other = (getattr(data, part) for data in (plain, larger))
        for a, b in zip(one.batch(torch.arange(len(one))), other.batch(torch.arange(len(other))), strict=True):
            assert torch.equal(a, b), "what judges is the same"
    assert load_images(tmp_path, 16, seed=0, train_size=90).train_size == 24, "no more than the images have"
    assert load_images(tmp_path, 30, seed=0, train_size=40).train_size == 30


def test_images_in_files_equal_images_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"a": 12, "b": 12})
    held = load_images(tmp_path, 6, seed=0)
    monkeypatch.setattr(pixels, "MEMORY_LIMIT_BYTES", 24 * 3 * 6 * 6 - 1)
    lazy = load_images(tmp_path, 6, seed=0)
    assert isinstance(lazy.train.pixels, pixels.Files) and isinstance(held.train.pixels, torch.Tensor)
    indices = torch.tensor([5, 2, 2, 0])
    for got, expected in zip(lazy.train.batch(indices), held.train.batch(indices), strict=True):
        assert torch.equal(got, expected)
    for path in tmp_path.glob("*/*.png"):
        path.unlink()
    with pytest.raises(InputError, match="can no longer be read"):
        lazy.train.batch(indices)


def test_image_is_scaled_by_its_short_side_and_cropped_at_the_centre(tmp_path: Path) -> None:
    columns = np.repeat(np.array([10, 20, 200, 200, 30, 40], np.uint8), 2)  # 12 wide, 4 high
    wide = Image.fromarray(np.tile(columns, (4, 1)))
    for index in range(4):
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            wide.save(tmp_path / name / f"{index}.png")
    images, _ = load_images(tmp_path, 4, seed=0).train.batch(torch.tensor([0]))
    assert (images == 200).all(), "the middle 4 of 12 columns"
    assert load_images(tmp_path, 2, seed=0).train.batch(torch.tensor([0]))[0].shape == (1, 3, 2, 2)


def png(path: Path, size: tuple[int, int], depth: int, rows: bytes) -> None:
    """Write an RGB picture of `depth` bits, which Pillow itself writes at 8 alone."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def of_mode(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (8, 8), colour)  # type: ignore[arg-type]


RED, GREEN = (255, 0, 0), (0, 255, 0)


def palette(transparent: bool) -> tuple[Image.Image, dict[str, object]]:
    """A picture that is red, with green named in its palette; green or nothing is transparent."""
    image = of_mode("P", 1)
    image.putpalette([*GREEN, *RED])
    return image, {"transparency": 0} if transparent else {}


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("grey16.png", lambda: (Image.fromarray(np.full((8, 8), 128 * 256, np.uint16)), {}), (128, 128, 128)),
        ("grey.jpg", lambda: (of_mode("L", 77), {}), (77, 77, 77)),
        ("bits.png", lambda: (of_mode("1", 1), {}), (255, 255, 255)),
        ("grey-alpha.png", lambda: (of_mode("LA", (90, 10)), {}), (90, 90, 90)),
        ("rgba.webp", lambda: (of_mode("RGBA", (*RED, 255)), {"lossless": True}), RED),
        ("palette.png", lambda: palette(False), RED),
        ("palette.gif", lambda: palette(True), RED),
        ("transparent.png", lambda: palette(True), RED),
        ("transparent-rgb.png", lambda: (of_mode("RGB", RED), {"transparency": GREEN}), RED),
        ("cmyk.jpg", lambda: (of_mode("CMYK", (0, 255, 255, 0)), {"quality": 95}), RED),
        ("moving.gif", lambda: (of_mode("RGB", RED), {"save_all": True, "append_images": [of_mode("RGB", GREEN)]}), RED),
        ("pixel.bmp", lambda: (Image.new("RGB", (1, 1), RED), {}), RED),
        ("line.png", lambda: (Image.new("RGB", (1, 500), RED), {}), RED),
        ("packed.tif", lambda: (Image.new("RGB", (9, 6), RED), {"compression": "tiff_lzw"}), RED),
        ("deep.tiff", lambda: (Image.fromarray(np.full((6, 9), 100 << 8 | 255, np.uint16)), {}), (100, 100, 100)),
    ],
)
def test_unusual_pictures_keep_their_colours(tmp_path: Path, name: str, make, expected: tuple[int, int, int]) -> None:
    image, how = make()
    image.save(tmp_path / name, **how)
    found = pixels.decode(str(tmp_path / name), 6)
    assert found.shape == (3, 6, 6) and found.dtype == np.uint8
    assert np.abs(found - np.array(expected)[:, None, None]).max() <= 2, "what JPEG rounds"


def test_16_bits_a_channel_are_scaled_not_cut_off(tmp_path: Path) -> None:
    row = b"\0" + struct.pack(">HHH", 200 << 8, 100 << 8 | 255, 3) * 4
    png(tmp_path / "deep.png", (4, 4), 16, row * 4)
    assert pixels.decode(str(tmp_path / "deep.png"), 4)[:, 0, 0].tolist() == [200, 100, 0]


def test_new_endings_are_images_and_numbers_without_a_range_are_none(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 3})
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "a" / "scan.TIFF")
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "a" / "saved.jfif", format="jpeg")
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "b" / "measured.tif")
    found = load_images(tmp_path, 8, seed=0)
    assert len(found.train) + len(found.score) + len(found.val) == 8
    assert found.skipped == (tmp_path / "b" / "measured.tif",)


def test_a_picture_is_turned_as_its_camera_was(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:4] = 255
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    turned = pixels.decode(str(tmp_path / "turned.png"), 8)
    assert (turned[:, :4] == 0).all() and (turned[:, 4:] == 255).all()
    Image.fromarray(picture).save(tmp_path / "garbled.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff", quality=95)
    with pixels.quiet():
        lies = pixels.decode(str(tmp_path / "garbled.jpg"), 8)
    assert (lies[:, 0] > 250).all() and (lies[:, -1] < 5).all(), "where the camera says nothing legible, as it lies"


def test_large_pictures_are_read_and_those_that_could_be_attacks_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, {"a": 4, "b": 4})
    paint(tmp_path / "a" / "large.png", 100, (8, 8))
    paint(tmp_path / "a" / "bomb.png", 101, (12, 12))
    for path in tmp_path.glob("*/0*.png"):
        paint(path, int(path.stem), (4, 4))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # beyond it Pillow warns, beyond twice as many it refuses
    found = load_images(tmp_path, None, seed=0)
    assert found.skipped == (tmp_path / "a" / "bomb.png",)
    assert values(found.train) | values(found.score) | values(found.val) == {*range(8), 100}


# -- What is kept on disk ------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(pixels.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(tmp_path / "images", {"a": 10, "b": 10})
    (tmp_path / "images" / "a" / "cut.png").write_text("broken")
    return tmp_path / "images"


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list to which the name of every file is added that is decoded from now on."""
    seen: list[str] = []
    original = pixels.decode

    def noted(path: str, size: int) -> NDArray[np.uint8]:
        seen.append(Path(path).name)
        return original(path, size)

    monkeypatch.setattr(pixels, "decode", noted)
    return seen


def same(one: ImageData, other: ImageData) -> bool:
    parts = [(a, b) for a, b in ((one.train, other.train), (one.score, other.score), (one.val, other.val))]
    every = [(a.batch(torch.arange(len(a))), b.batch(torch.arange(len(b)))) for a, b in parts]
    return one.skipped == other.skipped and all(torch.equal(x, y) for a, b in every for x, y in zip(a, b, strict=True))


def test_a_second_run_decodes_nothing_but_a_few_images_to_be_sure(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_images(folder, 6, seed=0)
    assert isinstance(first.train.pixels, pixels.Packed)
    seen = decoded(monkeypatch)
    again = load_images(folder, 6, seed=0)
    assert len(seen) == pixels.SPOT_CHECKS + 1 and "cut.png" in seen, "which may be whole by now"
    assert same(first, again) and first.skipped == (folder / "a" / "cut.png",)
    monkeypatch.setenv(pixels.CACHE, "")
    assert same(first, load_images(folder, 6, seed=0)), "and they are what the files give"
    monkeypatch.setenv(pixels.CACHE, str(cache))
    load_images(folder, 5, seed=0)
    assert len(list(cache.iterdir())) == 4, "another size is kept beside it, and no temporary file"


def spoil_length(cache: Path, folder: Path) -> None:
    packed = next(path for path in cache.glob("*px.npy"))
    packed.write_bytes(packed.read_bytes()[:-10])


def spoil_pixels(cache: Path, folder: Path) -> None:
    packed = next(path for path in cache.glob("*px.npy"))
    content = bytearray(packed.read_bytes())
    content[-20 * 108 :] = bytes(20 * 108)
    packed.write_bytes(content)


def spoil_mask(cache: Path, folder: Path) -> None:
    next(cache.glob("*.readable.npy")).write_text("no array")


def change_a_file(cache: Path, folder: Path) -> None:
    path = folder / "a" / "003.png"
    size = path.stat().st_size
    paint(path, 4)
    assert path.stat().st_size == size
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("spoil", [spoil_length, spoil_pixels, spoil_mask, change_a_file])
def test_what_is_damaged_or_of_other_files_is_decoded_anew(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, spoil
) -> None:
    load_images(folder, 6, seed=0)
    spoil(cache, folder)
    seen = decoded(monkeypatch)
    found = load_images(folder, 6, seed=0)
    assert set(seen) >= {f"{number:03}.png" for number in range(20)}
    seen.clear()
    assert same(found, load_images(folder, 6, seed=0)) and len(seen) <= pixels.SPOT_CHECKS + 1, "and mended"
    monkeypatch.setenv(pixels.CACHE, "")
    assert same(found, load_images(folder, 6, seed=0))


def test_of_images_that_stay_in_files_it_is_known_which_are_broken(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "MEMORY_LIMIT_BYTES", 0)
    first = load_images(folder, 6, seed=0)
    assert isinstance(first.train.pixels, pixels.Files)
    seen = decoded(monkeypatch)
    again = load_images(folder, 6, seed=0)
    assert seen == ["cut.png"] and again.skipped == first.skipped == (folder / "a" / "cut.png",)


@pytest.mark.parametrize("limit", [pixels.MEMORY_LIMIT_BYTES, 0])
@pytest.mark.usefixtures("cache")
def test_a_file_that_could_not_be_read_for_a_while_is_read_again(
    limit: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "MEMORY_LIMIT_BYTES", limit)
    (folder / "a" / "cut.png").unlink()

    def refused(path: str, size: int) -> NDArray[np.uint8]:
        raise PermissionError(path)

    with monkeypatch.context() as patch:
        original = pixels.decode
        patch.setattr(pixels, "decode", lambda path, size: (refused if path.endswith("003.png") else original)(path, size))
        assert load_images(folder, 6, seed=0).skipped == (folder / "a" / "003.png",)
    found = load_images(folder, 6, seed=0)
    assert found.skipped == ()
    seen = decoded(monkeypatch)
    again = load_images(folder, 6, seed=0)
    assert len(seen) <= pixels.SPOT_CHECKS and same(found, again), "and kept"
    monkeypatch.setenv(pixels.CACHE, "")
    assert same(found, load_images(folder, 6, seed=0))


@pytest.mark.usefixtures("cache")
def test_a_folder_of_which_nothing_can_be_read_is_refused_every_time(folder: Path) -> None:
    for path in folder.glob("*/*.png"):
        path.write_text("broken")
    for _ in range(2):
        with pytest.raises(InputError, match=r"class 'a' .* has 0 training images that can be decoded"):
            load_images(folder, 6, seed=0)


def test_the_cache_has_a_limit_and_lets_go_of_what_was_not_used_for_longest(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (4, 5, 6):
        load_images(folder, size, seed=0)
        for path in cache.glob(f"*-{size}px*"):
            os.utime(path, (size, size))
    load_images(folder, 4, seed=0)  # used now
    held = sum(path.stat().st_size for path in cache.iterdir())
    monkeypatch.setattr(pixels, "CACHE_LIMIT_BYTES", held + 100)
    (cache / ".killed.npy").touch()
    os.utime(cache / ".killed.npy", (1, 1))
    (cache / ".being-written.npy").write_bytes(bytes(held + 1000))  # by another process: none of what is kept
    (cache / "gone.npy").symlink_to("nowhere")  # what another process removes between listing and looking
    load_images(folder, 3, seed=0)
    sizes = {re.sub(r".*-(\d+)px.*", r"\1", path.name) for path in cache.glob("*px.npy")}
    assert {"3", "4"} <= sizes and "5" not in sizes
    assert not (cache / ".killed.npy").exists() and (cache / ".being-written.npy").exists()


def test_without_a_place_for_it_the_images_are_in_memory(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.write_text("a file, not a folder")
    found = load_images(folder, 6, seed=0)
    assert isinstance(found.train.pixels, torch.Tensor)
    assert "cannot be kept" in capsys.readouterr().err
    cache.unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    assert same(found, load_images(folder, 6, seed=0))
    assert "the disk is nearly full" in capsys.readouterr().err


def test_another_process_maps_the_packed_file_and_another_machine_reads_the_images(cache: Path, folder: Path) -> None:
    here = load_images(folder, 6, seed=0)
    sent = pickle.dumps(here)
    assert len(sent) < 10_000
    there = pickle.loads(sent)
    assert isinstance(there.train.pixels, pixels.Packed) and same(here, there)
    shutil.rmtree(cache)
    assert same(here, pickle.loads(sent))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than a small machine has cores
def test_batches_are_decoded_ahead_in_other_processes_in_their_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "MEMORY_LIMIT_BYTES", 0)
    monkeypatch.setattr(pixels, "workers", lambda: 2)
    part = load_images(folder, 6, seed=0).train
    seen = decoded(monkeypatch)
    order = list(epoch_batches(len(part), 3, 0, 0)) * 3
    found = list(pixels.loaded(part, order, torch.device("cpu")))
    assert len(found) == len(order) and seen == [], "none of them in this process"
    for indices, (images, labels) in zip(order, found, strict=True):
        expected = part.batch(indices)
        assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])
    for path in folder.glob("*/*.png"):
        path.unlink()
    with pytest.raises(InputError, match=r"^image .* can no longer be read \(.*\): put it back or start anew$"):
        list(pixels.loaded(part, order, torch.device("cpu")))


def test_what_is_not_looked_at_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "train", {"a": 10, "b": 10})
    assert load_images(tmp_path, 8, seed=0).left_out == ()
    for number in range(1200):
        (tmp_path / "train" / "a" / f"{number}.AVIF").touch()
    for name in ("notes.txt", "b.txt", "LICENSE", "one.csv", ".hidden"):
        (tmp_path / "train" / "b" / name).touch()
    paint(tmp_path / "train" / "b" / "more" / "inside.png")
    fill(tmp_path / "valid", {"a": 1, "b": 1})
    fill(tmp_path / "masks", {"a": 1, "b": 1})
    load_data(tmp_path, 8, 0)
    said = capsys.readouterr().err.splitlines()
    assert "left out: 1,204 files of other kinds (.avif, .txt, without an ending, ...), 1 folder inside classes" in said
    assert f"{tmp_path / 'valid'} is not used: name it val to validate on it" in said
    fill(tmp_path / "val", {"a": 1, "b": 1})
    (tmp_path / "val" / "b" / "1.svg").touch()
    assert load_images(tmp_path, 8, seed=0).left_out == (
        "left out: 1,205 files of other kinds (.avif, .txt, without an ending, ...), 1 folder inside classes",
        f"{tmp_path / 'valid'} is not used",
    )


def test_a_class_that_no_image_judges_is_told(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 4, "b": 4, "c": 4})
    fill(tmp_path / "val", {"a": 2, "c": 2})
    (told,) = load_images(tmp_path, 8, seed=0).left_out
    assert told == f"{tmp_path / 'val'} has no images of 'b': the accuracy is of the other classes alone"


def test_classes_may_be_called_like_parts(tmp_path: Path) -> None:
    assert load_images(fill(tmp_path, {"test": 3, "valid": 3}), 8, seed=0).left_out == ()


def test_natural_size_is_the_median_short_side(tmp_path: Path) -> None:
    for index, size in enumerate([(8, 30), (40, 10), (12, 12), (12, 99), (50, 14)]):
        paint(tmp_path / "a" / f"{index}.png", size=size)
        paint(tmp_path / "b" / f"{index}.jpg", size=size)
    (tmp_path / "a" / "broken.png").touch()
    assert natural_size(tmp_path) == 12
    assert natural_size(None) == 8
    assert load_images(tmp_path, None, seed=0).image_size == 12


def test_fingerprint_changes_with_the_files_not_with_the_place(tmp_path: Path) -> None:
    def fingerprint(root: Path) -> str:
        return load_images(root, None, seed=0).fingerprint

    one, two = fill(tmp_path / "one", {"a": 4, "b": 4}), fill(tmp_path / "two", {"a": 4, "b": 4})
    original = fingerprint(one)
    assert fingerprint(two) == original
    (two / "a/000.png").rename(two / "a/renamed.png")
    assert fingerprint(two) != original, "another name is another data set"
    with (one / "b/005.png").open("ab") as file:
        file.write(b"tail")
    assert fingerprint(one) != original, "another size is another data set"


def refuse_missing(root: Path) -> Path:
    return root / "absent"


def refuse_file(root: Path) -> Path:
    (root / "data.zip").touch()
    return root / "data.zip"


def refuse_images_without_classes(root: Path) -> Path:
    paint(root / "picture.png")
    return root


def refuse_small_class(root: Path) -> Path:
    return fill(root, {"a": 5, "b": 2})


def refuse_class_of_other_files(root: Path) -> Path:
    fill(root, {"a": 3, "b": 1})
    (root / "b" / "1.dcm").touch()
    (root / "b" / "2.dcm").touch()
    return root


def refuse_other_files(root: Path) -> Path:
    for name in ("a/1.dcm", "b/1.heic", "b/2.heic"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    return root


def refuse_foreign_class_in_val(root: Path) -> Path:
    fill(root / "val", {"a": 1, "wolf": 1})
    fill(root / "train", {"a": 3, "b": 3})
    return root


def refuse_empty_val(root: Path) -> Path:
    (root / "val" / "a").mkdir(parents=True)
    fill(root / "train", {"a": 3, "b": 3})
    return root


def refuse_class_of_broken_images(root: Path) -> Path:
    fill(root, {"a": 3, "b": 3})
    for path in (root / "b").iterdir():
        path.write_text("broken")
    return root


def refuse_val_class_of_broken_images(root: Path) -> Path:
    fill(root / "train", {"a": 3, "b": 3})
    fill(root / "val", {"a": 1, "b": 1})
    (root / "val" / "b" / "001.png").write_text("broken")
    return root


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (refuse_missing, "absent does not exist"),
        (refuse_file, "data.zip is not a folder"),
        (lambda root: root, "is empty: expected PATH/train/<class>"),
        (refuse_images_without_classes, "has no images .* in class folders"),
        (lambda root: fill(root, {"only": 5}), "has one class only, 'only'"),
        (refuse_small_class, "class 'b' .* has 2 training images, but at least 3 are needed"),
        (
            refuse_class_of_other_files,
            r"class 'b' .* has 1 training images, beside 2 files of other kinds \(\.dcm\), but at least 3",
        ),
        (refuse_other_files, r"has no images .* in class folders, but 3 files of other kinds \(\.heic, \.dcm\): expected"),
        (refuse_foreign_class_in_val, "val has the class 'wolf', which train/ lacks"),
        (refuse_empty_val, "val has no images"),
        (refuse_class_of_broken_images, "class 'b' .* has 0 training images that can be decoded .3 broken"),
        (refuse_val_class_of_broken_images, "class 'b' of .*val has no image that can be decoded"),
    ],
)
def test_unusable_folder_is_refused_in_one_line(tmp_path: Path, prepare, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_images(prepare(tmp_path), 8, seed=0)
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)


def test_without_scoring_images_all_that_do_not_validate_train() -> None:
    with_some, without = (load_images(None, None, seed=0, score_images=n) for n in (100, 0))
    assert (len(without.train), len(without.score)) == (len(with_some.train) + 100, 0)
    assert torch.equal(without.val.rows, with_some.val.rows)


def test_unusable_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="image size 0"):
        load_images(None, 0, seed=0)
    with pytest.raises(InputError, match="-1 is no number of scoring images"):
        load_images(None, None, seed=0, score_images=-1)
    with pytest.raises(InputError, match="batch size 0"):
        list(epoch_batches(10, 0, seed=0, epoch=0))


def test_normalise_gives_imagenet_units() -> None:
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    got = normalise(white)
    assert got.dtype == torch.float32
    assert got[0, :, 0, 0].tolist() == pytest.approx([2.2489083, 2.4285715, 2.64], abs=1e-6)
    assert normalise(white, torch.bfloat16).dtype == torch.bfloat16
    assert white.eq(255).all(), "the batch itself is left alone"


@pytest.mark.parametrize("flip", [True, False])
def test_constant_images_survive_augmentation(flip: bool) -> None:
    x = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 16, 16)
    assert torch.equal(augment(x, torch.Generator().manual_seed(0), flip), x)


def test_augmentation_is_a_crop_of_the_reflected_image() -> None:
    x = torch.arange(64 * 3 * 16 * 16, dtype=torch.float32).view(64, 3, 16, 16)
    got = augment(x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    seen = set()
    for image, source in zip(got, padded, strict=True):
        crops = {(top, left): source[:, top : top + 16, left : left + 16] for top in range(5) for left in range(5)}
        matches = {(*place, False) for place, crop in crops.items() if torch.equal(image, crop)}
        matches |= {(*place, True) for place, crop in crops.items() if torch.equal(image, crop.flip(2))}
        assert len(matches) == 1, "each image is exactly one crop, mirrored or not"
        seen |= matches
    for axis, extent in ((0, 5), (1, 5), (2, 2)):
        assert len({match[axis] for match in seen}) == extent, "every shift and both orientations occur"


def test_augmentation_without_flips_never_mirrors() -> None:
    ramp = torch.arange(32.0).expand(50, 3, 32, 32)
    got = augment(ramp, torch.Generator().manual_seed(0), flip=False)
    assert (got[..., 20] > got[..., 10]).all()
    got = augment(ramp, torch.Generator().manual_seed(0), flip=True)
    assert 10 < (got[:, 0, 0, 20] < got[:, 0, 0, 10]).sum() < 40, "about one half is mirrored"


def test_augmentation_is_fixed_by_its_generator() -> None:
    x = torch.rand(8, 3, 32, 32)
    one, same, other = (augment(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("n", "batch_size", "per_epoch"), [(20, 5, None), (20, 4, 8), (23, 4, None), (23, 4, 10)])
def test_epochs_see_every_image_before_any_is_repeated(n: int, batch_size: int, per_epoch: int | None) -> None:
    batches = [batch for epoch in range(60) for batch in epoch_batches(n, batch_size, 3, epoch, per_epoch)]
    assert {len(batch) for batch in batches} == {batch_size}, "only whole batches"
    order = torch.cat(batches)
    rounds = [order[start : start + n].tolist() for start in range(0, len(order) - n + 1, n)]
    assert all(sorted(turn) == list(range(n)) for turn in rounds)
    assert len(rounds) > 1 and rounds[0] != rounds[1], "each round has its own order"


@pytest.mark.parametrize(("n", "batch_size", "size"), [(7, 3, 7), (7, 3, 20), (7, 20, 45), (5, 16, 9), (4, 4, 8), (30, 4, 8)])
def test_an_epochs_order_is_that_of_one_row_of_shuffles(n: int, batch_size: int, size: int) -> None:
    size -= size % batch_size if size > batch_size else 0
    shuffles = [np.random.default_rng([3, *b"epoch", turn]).permutation(n) for turn in range(5 * size // n + 1)]
    found = [torch.cat(list(epoch_batches(n, batch_size, 3, epoch, size))) for epoch in range(5)]
    assert torch.cat(found).tolist() == np.concatenate(shuffles)[: 5 * size].tolist()


def test_an_endless_epoch_begins_at_once() -> None:
    assert len(next(epoch_batches(10, 4, 0, 1, 10**12))) == 4


def test_epoch_smaller_than_a_batch_is_one_batch() -> None:
    (batch,) = epoch_batches(3, 64, seed=0, epoch=5)
    assert sorted(batch.tolist()) == [0, 1, 2]


def test_epoch_is_a_pure_function_of_seed_and_number() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return torch.cat(list(epoch_batches(100, 10, seed, number))).tolist()

    list(epoch_batches(100, 10, 7, 0))
    torch.manual_seed(99)
    assert epoch(7, 4) == epoch(7, 4)
    assert epoch(7, 4) != epoch(7, 5)
    assert epoch(7, 4) != epoch(8, 4)
    assert sorted(epoch(-1, 0)) == list(range(100)), "a negative seed is a seed"
