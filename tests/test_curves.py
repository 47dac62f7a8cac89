"""Curves of a training: what is in the event files, also after a kill, and without tensorboard."""

import builtins
from pathlib import Path
from typing import Any

import pytest

from nas import supernet_training, training
from nas.curves import curves
from nas.data import ImageData, load_images
from nas.recipe import Recipe
from nas.settings import SupernetSettings
from nas.supernet_training import train_supernet
from nas.training import train_network
from supernet.arch import ArchConfig, Stage
from supernet.space import SearchSpace
from supernet.specs import MB4D

RECIPE = Recipe(epochs=2, batch_size=32, learning_rate=4e-3, layer_scale=0.5, clip_norm=5.0, images_per_epoch=96)
ARCH = ArchConfig("tiny", 8, 10, (Stage(8, 2, (MB4D(8, mlp_ratio=1),)),))


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_images(None, 8, seed=0)


def drawn(folder: Path) -> dict[str, list[int]]:
    """The steps of each curve, as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [point.step for point in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_training_has_each_step_once_after_a_kill(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    save = training.save_checkpoint

    def killed(path: Path, epoch: int, **parts: Any) -> None:
        if epoch == 2:
            raise KeyboardInterrupt  # after the second epoch was drawn
        save(path, epoch, **parts)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            train_network(ARCH, digits, RECIPE, tmp_path, seed=0)
    assert drawn(tmp_path)["train/loss"] == [1, 2, 3, 4, 5, 6]
    train_network(ARCH, digits, RECIPE, tmp_path, seed=0)
    found = drawn(tmp_path)
    assert found.pop("train/loss") == [1, 2, 3, 4, 5, 6]
    assert found == {name: [3, 6] for name in ("train/learning_rate", "val/loss", "val/accuracy")}


def test_a_supernet_has_a_curve_for_its_weights_and_one_for_its_mixtures(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    space = SearchSpace.around(ARCH)
    settings = SupernetSettings(weight_epochs=1, mixture_epochs=1, images_per_epoch=128, batch_size=64)
    monkeypatch.setattr(supernet_training, "MIXTURE_IMAGES", 64)
    train_supernet(space, digits, settings, 0, tmp_path)
    assert drawn(tmp_path) == {"supernet/loss": [1, 2], "supernet/mixture_loss": [3]}


def test_without_tensorboard_nothing_is_written_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    known = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ModuleNotFoundError(name)
        return known(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with curves(tmp_path, 0) as draw:
        draw({"loss": [(1, 1.0)]})
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
