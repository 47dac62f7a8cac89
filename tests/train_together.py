"""Trainings for tests of many processes: `python train_together.py FOLDER what`, under torchrun or alone."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from small_spaces import stage_space
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

import nas.cli
from nas import augmentation, evaluation, pretrained, steps, taylor, training
from nas.cli import train
from nas.command import run_command
from nas.data import ImageData, Images, normalise
from nas.distributed import in_all, together
from nas.parallel import ALONE, Group, joined
from nas.recipe import Recipe
from nas.settings import SupernetSettings
from nas.supernet_training import train_supernet
from nas.training import train_network, train_step
from supernet import files
from supernet.arch import ArchConfig, Stage
from supernet.errors import InputError
from supernet.metapath import Supernet
from supernet.model import build_model
from supernet.space import SearchSpace
from supernet.specs import MB3D, MB4D

MB3D_8 = MB3D(8, num_heads=2, key_dim=4, attn_ratio=2)
ARCH = ArchConfig("tiny", 16, 3, (Stage(8, 2, (MB4D(8),)), Stage(8, 2, (MB4D(8), MB3D_8))))
RECIPE = Recipe(
    epochs=3, batch_size=8, learning_rate=4e-3, layer_scale=0.5, clip_norm=5.0, images_per_epoch=32, accelerator="cpu"
)
SHORT = replace(RECIPE, epochs=1, images_per_epoch=16)
SPACE = SearchSpace(
    "small",
    8,
    3,
    (stage_space((8, 16), 1, 1, "mb4d", "identity"), stage_space((8, 16), 2, 2, "mb4d", "mb3d", "identity")),
)
SETTINGS = SupernetSettings(
    weight_epochs=1, mixture_epochs=1, batch_size=8, images_per_epoch=16, accelerator="cpu", precision="fp32"
)


def pictures(size: int, number: int = 40) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (number, 3, size, size), generator=generator, dtype=torch.uint8)
    part = Images(pixels, torch.arange(number), torch.randint(0, 3, (number,), generator=generator))
    return ImageData(part, part, part, ("a", "b", "c"), size, True, False, (), "", "")


class WholeBatchNorm(nn.Module):
    """A double of SyncBatchNorm that runs on a CPU: statistics over all processes, with gradients through them."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.momentum = norm.weight, norm.bias, norm.eps, norm.momentum or 0.1
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))

    def forward(self, x: Tensor) -> Tensor:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        mean, var = self.running_mean, self.running_var
        if self.training:
            processes = torch.distributed.get_world_size()
            mean, square = (all_reduce(moment / processes) for moment in (x.mean(axes), x.square().mean(axes)))
            var = square - mean.square()
            count = x.numel() / x.shape[1] * processes
            self.running_mean.lerp_(mean.detach(), self.momentum)  # type: ignore[operator]
            self.running_var.lerp_(var.detach() * count / (count - 1), self.momentum)  # type: ignore[operator]
        shape = [1, -1] + [1] * (x.ndim - 2)
        y = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()  # type: ignore[operator]
        return y * self.weight.view(shape) + self.bias.view(shape)


def whole_batch_norms(group: Group, model: nn.Module) -> nn.Module:
    """Stand in for `Group.synchronised`."""
    if group.size > 1:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                model.set_submodule(name, WholeBatchNorm(module))  # type: ignore[arg-type]
    return model


State = dict[str, Any]


@contextmanager
def in_double(noted: list[dict[str, Tensor]]) -> Iterator[None]:
    """Train in float64, with batch norm over all processes; note the gradients of every step, after they were averaged."""
    clip = nn.utils.clip_grad_norm_

    def noting(parameters: Any, norm: float) -> Tensor:
        held = list(parameters)
        noted.append({str(at): p.grad.clone() for at, p in enumerate(held) if p.grad is not None})
        return clip(held, norm)

    def normal(batch: Tensor) -> Tensor:
        return normalise(batch, torch.float64)

    def doubled(*args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        x, y = augmented(*args, **more)
        return x.double(), y.double() if y.is_floating_point() else y

    augmented = augmentation.augmented
    torch.set_default_dtype(torch.float64)
    try:
        with (
            patch.object(Group, "synchronised", whole_batch_norms),
            patch.object(nn.utils, "clip_grad_norm_", noting),
            patch.object(steps, "normalise", normal),
            patch.object(evaluation, "normalise", normal),
            patch.object(taylor, "normalise", normal),
            patch.object(training, "augmented", doubled),
        ):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def outputs(net: nn.Module, data: ImageData, *path: Any) -> Tensor:
    pixels, _ = data.val.batch(torch.arange(len(data.val)))
    with torch.no_grad():
        return net.eval()(normalise(pixels, torch.float64), *path)


def exactly(folder: Path, group: Group = ALONE) -> None:
    """Train a supernet, on single paths and on mixtures, and networks, in float64; the first process writes what came out."""
    found: dict[str, Any] = {}
    works = {
        "supernet": a_supernet,
        "fair": partial(a_supernet, settings=replace(SETTINGS, paths="fair", mixture_epochs=0)),
        "elastic": partial(a_supernet, settings=replace(SETTINGS, paths="elastic", mixture_epochs=0)),
        "network": a_network,
        "accumulated": accumulated,
        "distilled": distilled,
        "accumulated supernet": partial(accumulated_supernet, settings=SETTINGS),
        "accumulated elastic": partial(accumulated_supernet, settings=replace(SETTINGS, paths="elastic", mixture_epochs=0)),
    }
    for name, work in works.items():
        gradients: list[dict[str, Tensor]] = []
        with in_double(gradients):
            found[name] = {"gradients": gradients, **work(folder / name, group)}
    if group.first:
        torch.save(found, folder / "found.pt")


def a_supernet(folder: Path, group: Group, settings: SupernetSettings = SETTINGS) -> State:
    data = pictures(8)
    net = train_supernet(SPACE, data, settings, 0, folder, group)
    path = SPACE.largest if settings.paths == "elastic" else [1, 0, 1]
    return {"outputs": outputs(net, data, path), "weights": dict(net.named_parameters())}


def a_network(folder: Path, group: Group, recipe: Recipe = SHORT) -> State:
    data, trained = pictures(16), []

    def noted(model: nn.Module, *rest: Any) -> float:
        trained.append(model)
        return train_step(model, *rest)

    with patch.object(training, "train_step", noted):
        train_network(ARCH, data, replace(recipe, precision="fp32"), folder, 0, group=group)
    return {"outputs": outputs(trained[-1], data), "weights": dict(trained[-1].named_parameters())}


def distilled(folder: Path, group: Group) -> State:
    """Let blocks on maps learn what those on tokens give, which they may replace."""
    torch.manual_seed(0)
    net = Supernet(SPACE).eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    settings = replace(SETTINGS, distillation_steps=5)
    pretrained._distil(net, (0, 1, 1), pictures(8), settings, 0, folder / f"{group.rank}.pt", group)
    after = net.state_dict()
    return {"weights": {n: t for n, t in after.items() if t.is_floating_point() and not torch.equal(t, before[n])}}


def accumulated(folder: Path, group: Group) -> State:
    """Train a network on four parts of each batch, batch norm seeing each part by itself."""
    recipe = replace(SHORT, accumulate=4 // group.size, mixup=0.8, cutmix=1.0)
    with patch.object(Group, "synchronised", lambda group, model: model):
        return {"weights": a_network(folder, group, recipe)["weights"]}


def accumulated_supernet(folder: Path, group: Group, settings: SupernetSettings) -> State:
    """Train a supernet on four parts of each batch."""
    with patch.object(Group, "synchronised", lambda group, model: model):
        return {"weights": a_supernet(folder, group, replace(settings, accumulate=4 // group.size))["weights"]}


def killed(folder: Path, group: Group = ALONE) -> None:
    """Train a network, with a checkpoint after every step. The file `kills-<rank>` has a line for each time that the process is
    killed, or stopped by SIGTERM if it says so: at which call of which function since its start."""
    left = folder / f"kills-{group.rank}"
    seen: Counter[str] = Counter()

    def deadly(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **more: Any) -> Any:
            seen[name] += 1
            kills = left.read_text().splitlines() if left.exists() else []
            if kills and kills[0].removesuffix(" SIGTERM") == f"{name} {seen[name]}":
                left.write_text("\n".join(kills[1:]))
                os.kill(os.getpid(), signal.SIGTERM if kills[0].endswith("SIGTERM") else signal.SIGKILL)
            return function(*args, **more)

        return called

    with (
        patch.object(training, "train_step", deadly("step", train_step)),
        patch.object(training, "accuracy_of", deadly("validation", training.accuracy_of)),
        patch.object(files.os, "replace", deadly("file", os.replace)),
        patch.object(training, "CHECKPOINT_EVERY_S", 0.0),
    ):
        recipe = replace(RECIPE, ema=0.9, drop_path=0.2, mixup=0.8)
        train_network(ARCH, pictures(16), recipe, folder / "run", 0, group=group)


def refused(folder: Path, group: Group) -> None:
    train_network(ARCH, pictures(16), replace(RECIPE, batch_size=6), folder, 0, group=group)


def other_images(folder: Path, group: Group) -> None:
    train_network(ARCH, pictures(16, 40 - group.rank), replace(RECIPE, learning_rate=1e-3), folder, 0, group=group)


def other_seed(folder: Path, group: Group) -> None:
    train_supernet(SPACE, pictures(8), SETTINGS, group.rank, folder, group)


def in_use(folder: Path, group: Group) -> None:
    (folder / "arch.yaml").write_text(ARCH.to_yaml())
    (folder / "free").mkdir(exist_ok=True)
    with patch.object(nas.cli, "alone", refusing):
        train([str(folder / "arch.yaml"), "--out", str(folder / "free")])


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    if os.environ["RANK"] == "0":
        raise InputError(f"{folder.name} is in use by another process")
    yield


def one_is_refused(folder: Path, group: Group) -> None:
    def work() -> None:
        if group.rank:
            raise InputError("only here: give something else")

    group.agreed(work)


def searched(folder: Path) -> None:
    """Train a supernet within a search: the first process asks for it."""
    train = in_all(train_supernet, SPACE, pictures(8), SETTINGS, 0, folder)
    torch.save(train.state_dict(), folder / "net.pt")


def begun(folder: Path) -> None:
    """Begin a search with a network: train it whole, and let what may replace its blocks learn from them."""
    torch.manual_seed(0)
    arch = SPACE.arch([16, 16], [["mb4d"], ["mb4d", "mb3d"]]).without_identity()
    given = pretrained.Pretrained(arch, build_model(arch).state_dict(), "made up")
    settings = replace(SETTINGS, init_epochs=1, distillation_steps=3, recalibration_images=8)
    original = pretrained.on_data(given, pictures(8), settings, 0, folder)
    net = pretrained.pretrained_supernet(original, arch, SPACE, pictures(8), settings, 0, folder)
    torch.save(net.state_dict(), folder / "net.pt")


SEARCHES = {"searched": searched, "begun": begun}

WORKS: dict[str, Callable[[Path, Group], None]] = {
    "exactly": exactly,
    "killed": killed,
    "refused": refused,
    "one is refused": one_is_refused,
    "other images": other_images,
    "other seed": other_seed,
    "in use": in_use,
}


def main(folder: Path, what: str) -> None:
    torch.set_num_threads(1)
    if what in SEARCHES:
        with in_double([]):
            together(lambda: run_command("train", lambda: SEARCHES[what](folder)))
        return

    def work() -> None:
        group = joined()
        WORKS[what](folder, group)
        group.leave()

    run_command("train", work)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
