"""The published recipes' parts beside augmentation: moving average, adaptive clipping, two classifiers, stochastic depth; and a
training with everything switched on, killed within an epoch. Networks of width 8 on digits."""

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nas import cli, training
from nas.checkpoints import load_weights
from nas.data import ImageData, Images, load_images
from nas.ema import MovingAverage
from nas.evaluation import accuracy_of
from nas.pixels import Files
from nas.pretrained import load_pretrained
from nas.progress import duration
from nas.recipe import RECIPES, Recipe
from nas.steps import clip_by_weights
from nas.teacher import Teacher, load_teacher
from nas.training import train_network, train_step, training_loss
from supernet.arch import ArchConfig, MultiplexSpec, Stage
from supernet.blocks.layers import DropPath
from supernet.distillation import TwoClassifiers, add_second_classifier, one_classifier
from supernet.errors import InputError
from supernet.model import build_model, set_drop_path
from supernet.specs import FFN, MB3D, MB4D, AttnFFN, ConvStem, Sandwich, Subsample

MB3D_8 = MB3D(8, num_heads=2, key_dim=4, attn_ratio=2)
ARCH = ArchConfig("tiny", 16, 10, (Stage(8, 2, (MB4D(8),)), Stage(8, 2, (MB4D(8), MB3D_8))))
V2 = ArchConfig("tiny_v2", 16, 10, (Stage(8, 2, (FFN(8),)), Stage(8, 2, (FFN(8), AttnFFN(8, num_heads=2, key_dim=4)))))
SANDWICH = Sandwich(8, num_heads=2, key_dim=4, window=4)
VIT = ArchConfig(
    "tiny_vit",
    32,
    10,
    (Stage(8, 4, (SANDWICH,), ConvStem(8, 4)), Stage(8, 2, (SANDWICH,), Subsample(8, 8, 2))),
    head="mean_batch_norm",
)
EVERYTHING = replace(
    RECIPES["efficientformer"],
    epochs=2,
    batch_size=32,
    images_per_epoch=160,
    warm_up_epochs=1.0,
    cooldown_epochs=1,
    color_jitter=0.3,
    drop_path=0.2,
    layer_scale=0.5,
    learning_rate=4e-3,
    learning_rate_batch=32,
    accelerator="cpu",
)
PLAIN = Recipe(epochs=1, batch_size=32, learning_rate=4e-3, layer_scale=0.5, clip_norm=5.0, images_per_epoch=160)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_images(None, 16, seed=0)


@pytest.fixture(scope="module")
def teacher(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tmp_path_factory.mktemp("teacher")
    train_network(ARCH, digits, PLAIN, folder, seed=1)
    return load_teacher(folder / "arch.yaml", 16, digits.classes)


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, size, size, generator=generator), torch.arange(8)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


# -- Everything at once ------------------------------------------------------------------------------------------------


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    original, taken = training.train_step, 0

    def killed(*args: Any) -> float:
        nonlocal taken
        taken += 1
        if taken == step:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_step", killed)
        work()


def test_a_training_with_everything_on_is_the_same_if_it_is_killed_within_epochs(
    digits: ImageData, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: str) -> training.TrainingResult:
        return train_network(ARCH, digits, EVERYTHING, tmp_path / folder, seed=3, teacher=teacher)

    whole = run("whole")
    assert whole.epochs == 3, "two and one of cooldown"
    monkeypatch.setattr(training, "CHECKPOINT_EVERY_S", 0.0)
    for step in (3, 5, 4):  # of its own run
        killed_at(step, monkeypatch, lambda: run("killed"))
    state = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], len(state["history"]["losses"])) == (1, 4), "2 + 4 + 3 steps of 5 an epoch"
    resumed = run("killed")
    assert replace(resumed, folder=whole.folder) == whole
    expected, found = (load_file(r.folder / "model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert rows(resumed.folder) == rows(whole.folder)


def test_a_whole_epoch_of_the_published_recipe_with_a_teacher(
    digits: ImageData, teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(RECIPES["efficientformer"], epochs=1, batch_size=96, warm_up_epochs=0.5, drop_path=0.1)
    result = train_network(ARCH, digits, recipe, tmp_path, seed=0, teacher=teacher)
    said = capsys.readouterr().err
    assert "1,106 images of handwritten digits" in said
    assert ": epochs 1 to 1, 11 steps of 96" in said
    assert "0.001 for 1024 images a step, comes to 9.375e-05 for 96" in said
    row = rows(tmp_path)[0]
    assert (float(row["ema_loss"]), float(row["ema_accuracy"])) == (result.loss, result.accuracy)
    assert row["val_loss"] != row["ema_loss"]
    # What is kept is an ordinary network of one classifier: that of the average, which was judged with two.
    model = build_model(result.arch)
    load_weights(model, tmp_path / "model.safetensors")
    loss, accuracy = accuracy_of(model, digits.val)
    assert (loss, accuracy) == (pytest.approx(result.loss, abs=1e-5), result.accuracy)
    from_checkpoint = build_model(result.arch)
    load_weights(from_checkpoint, tmp_path / "checkpoint.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), from_checkpoint.state_dict().values(), strict=True)
    )
    files = (str(tmp_path / name) for name in ("checkpoint.pt", "model.safetensors"))
    one, other = (load_pretrained("arch.yaml", file, result.arch).digest for file in files)
    assert one == other, "a search that starts from it takes the same"
    held = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["net"]
    assert not torch.equal(held["head.fc.labels.weight"], held["head.fc.teacher.weight"]), "both are there to go on from"


def test_without_a_teacher_there_is_one_classifier_and_it_is_said(
    digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_network(ARCH, digits, replace(EVERYTHING, epochs=1, cooldown_epochs=0), tmp_path, seed=0)
    assert "no teacher is given (--teacher)" in capsys.readouterr().err
    assert "head.fc.weight" in torch.load(tmp_path / "checkpoint.pt", weights_only=True)["net"]


def test_how_long_it_takes_is_said_after_the_first_steps(
    digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_network(ARCH, digits, replace(PLAIN, epochs=3), tmp_path, seed=0)
    said = capsys.readouterr().err
    assert "for the 4 steps left, going by 10 steps" in said
    assert "images_per_epoch" in said and "teacher" in said, "and what changes it"
    assert "for the 2 epochs left, going by this one as a whole, validation included" in said


@pytest.mark.parametrize(("steps", "measured"), [(1000, 36), (100, 10)])
def test_batches_that_were_decoded_ahead_tell_nothing_of_the_time(
    steps: int, measured: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """18 processes, two batches each: 36 batches are there at once, and the others come as fast as they are decoded."""
    monkeypatch.setattr(training, "workers", lambda: 18)
    now = 0.0
    monkeypatch.setattr(training.time, "monotonic", lambda: now)
    pixels = Files((), 8)
    taken = training._estimating(
        lambda amount: None, steps, *training._measured(Images(pixels, torch.arange(0), torch.arange(0)))
    )
    for step in range(steps):
        now += 1.0 if step <= 36 else 3.0
        taken()
    said = capsys.readouterr().err
    left = steps - 1 - (36 if measured == 36 else 0) - measured
    time = duration((3.0 if measured == 36 else 1.0) * left)
    assert said.startswith(f"about {time} for the {left:,} steps left, going by {measured} steps") and said.count("\n") == 1


def test_images_are_made_before_the_step_before_them_is_waited_for(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a GPU computes meanwhile. The first thing after a step was waited for is clipping."""
    done: list[str] = []
    make = training.augmented
    monkeypatch.setattr(training, "augmented", lambda *args: done.append("images") or make(*args))
    monkeypatch.setattr(training, "clip_by_weights", lambda *args: done.append("step"))
    recipe = replace(PLAIN, epochs=2, images_per_epoch=96, clip_norm=0.0, clip_agc=0.01)
    train_network(ARCH, digits, recipe, tmp_path, seed=0)
    assert done == ["images", "images", "step", "images", "step", "step"] * 2, "an epoch's first wait for its validation"


# -- Losses that are not finite ----------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = build_model(ARCH).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.get_parameter("head.fc.weight").register_hook(lambda gradient: gradient * math.inf)
    before = [p.detach().clone() for p in model.parameters()]
    for recipe in (PLAIN, replace(PLAIN, clip_norm=0.0), replace(PLAIN, clip_norm=0.0, clip_agc=0.01)):
        assert math.isnan(train_step(model, optimizer, *batch(), recipe))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_infinite_loss_takes_no_step_where_its_gradient_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(ARCH).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    monkeypatch.setattr(training, "training_loss", lambda outputs, *rest: outputs.sum() + math.inf)
    before = [p.detach().clone() for p in model.parameters()]
    assert math.isnan(train_step(model, optimizer, *batch(), PLAIN))
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
)
def test_out_of_memory_is_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(*args: object) -> float:
        raise error

    ARCH.at(8).save(tmp_path / "arch.yaml")
    monkeypatch.setattr(training, "train_step", step)
    with pytest.raises(SystemExit) as ended:
        cli.train([str(tmp_path / "arch.yaml"), "--out", str(tmp_path / "out")])
    assert ended.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("nas-train: out of memory: give a smaller batch_size or a larger accumulate ")


def test_other_errors_of_pytorch_are_not_taken_for_a_lack_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*args: object) -> float:
        raise RuntimeError("shapes do not fit")

    ARCH.at(8).save(tmp_path / "arch.yaml")
    monkeypatch.setattr(training, "train_step", step)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        cli.train([str(tmp_path / "arch.yaml"), "--out", str(tmp_path / "out")])


def test_a_loss_that_is_not_finite_ends_the_command_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ARCH.at(8).save(tmp_path / "arch.yaml")
    (tmp_path / "recipe.yaml").write_text("{epochs: 1, batch_size: 64, learning_rate: 1e-3, layer_scale: 1, clip_norm: 1}")
    taken = 0

    def step(*args: object) -> float:
        nonlocal taken
        taken += 1
        return 1.0 if taken < 3 else math.nan

    monkeypatch.setattr(training, "train_step", step)
    with pytest.raises(SystemExit) as ended:
        cli.train([str(tmp_path / "arch.yaml"), "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")])
    assert ended.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("nas-train: the loss of tiny is not finite in epoch 1, at step 3: train")
    assert last.endswith("of a lower learning_rate, into another --out"), "no checkpoint is named where there is none"


# -- The command -------------------------------------------------------------------------------------------------------


def test_a_network_is_trained_at_another_size_from_timms_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under timm's names (a Flat counts as a block), with attention biases for maps of 4 x 4 and 5 classes."""
    monkeypatch.chdir(tmp_path)
    arch = ARCH.with_classes(5)
    arch.save(Path("arch.yaml"))
    torch.manual_seed(0)
    model = build_model(arch)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        renamed = name.replace("stage1_block1.", "stages.0.blocks.0.").replace("stage2_embedding.", "stages.1.downsample.")
        renamed = renamed.replace("stage2_block1.", "stages.1.blocks.0.").replace("stage2_block2.", "stages.1.blocks.2.")
        renamed = renamed.replace("head.norm.", "norm.")
        if renamed.startswith("head.fc."):
            state["head" + renamed.removeprefix("head.fc")] = state["head_dist" + renamed.removeprefix("head.fc")] = tensor
        else:
            state[renamed] = tensor
    torch.save(state, "timm.pth")
    Path("recipe.yaml").write_text(
        "{epochs: 1, batch_size: 64, learning_rate: 1e-9, layer_scale: 1, clip_norm: 1, images_per_epoch: 64}"
    )
    arguments = ["arch.yaml", "--recipe", "recipe.yaml", "--out", "out", "--weights", "timm.pth", "--image-size", "24"]
    cli.train(arguments)
    assert "is for 5 classes, not 10" in capsys.readouterr().err
    assert ArchConfig.load("out/arch.yaml").image_size == 24
    found = load_file("out/model.safetensors")
    assert found["stage2_block2.token_mixer.attention_biases"].shape == (2, 36), "maps of 6 x 6"
    own = "stage1_block1.mlp.fc1.weight"
    torch.testing.assert_close(found[own], model.state_dict()[own], rtol=0, atol=1e-6)
    cli.train(arguments)
    assert "has finished before" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        cli.train([*arguments[:-4], "--image-size", "24"])
    assert refused.value.code == 2 and "(weights sha256" in capsys.readouterr().err


# -- Moving average ----------------------------------------------------------------------------------------------------


def test_the_average_is_the_recurrence() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = MovingAverage(model, decay=0.3)
    expected = {name: tensor.double() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 6):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 10)
        average.update(model)
        decay = min(0.3, (1 + step) / (10 + step))  # 2/11, 3/12, then 0.3
        for name, tensor in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor if tensor.is_floating_point() else tensor
    for name, tensor in average.network.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=0, atol=1e-4)
    assert not average.network.training and not any(p.requires_grad for p in average.network.parameters())
    other = MovingAverage(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), decay=0.3)
    other.load_state_dict(average.state_dict())
    assert other.steps == 5


# -- Clipping ----------------------------------------------------------------------------------------------------------


def test_adaptive_clipping_is_by_the_norm_of_each_units_weights() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]))  # of norms 5, 0.5 and 0
    weight.grad = torch.tensor([[30.0, 40.0], [0.003, 0.004], [0.6, 0.8]])
    vector = nn.Parameter(torch.tensor([3.0, 4.0]))
    vector.grad = torch.tensor([0.0, 10.0])
    kernel = nn.Parameter(torch.ones(2, 1, 2, 2))  # each unit of norm 2
    kernel.grad = torch.stack((torch.ones(1, 2, 2), torch.full((1, 2, 2), 0.001)))
    clip_by_weights([weight, vector, kernel, nn.Parameter(torch.ones(3))], 0.1)
    expected = torch.tensor([[0.3, 0.4], [0.003, 0.004], [0.6e-4, 0.8e-4]])  # to 0.5; as it was; to a tenth of 1e-3
    torch.testing.assert_close(weight.grad, expected)
    torch.testing.assert_close(vector.grad, torch.tensor([0.0, 0.5]))  # a vector is one unit
    torch.testing.assert_close(kernel.grad, torch.stack((torch.full((1, 2, 2), 0.1), torch.full((1, 2, 2), 0.001))))


def test_the_classifier_is_not_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(ARCH).train()
    clipped: list[nn.Parameter] = []
    monkeypatch.setattr(training, "clip_by_weights", lambda parameters, factor: clipped.extend(parameters))
    train_step(model, torch.optim.AdamW(model.parameters(), lr=0.0), *batch(), replace(PLAIN, clip_norm=0.0, clip_agc=0.01))
    left_out = {name for name, p in model.named_parameters() if not any(p is other for other in clipped)}
    assert left_out == {"head.fc.weight", "head.fc.bias"}


# -- Two classifiers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [ARCH, V2, VIT], ids=lambda arch: arch.name)
def test_one_classifier_does_what_two_do_together(arch: ArchConfig) -> None:
    torch.manual_seed(0)
    model = build_model(arch)
    x, _ = batch(arch.image_size)
    plain = model.eval()(x)
    add_second_classifier(model)
    torch.testing.assert_close(model.eval()(x), plain)  # they begin alike
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("head"):
                p.add_(torch.randn(p.shape))
    for _ in range(3):  # statistics of batch norms
        labels, taught = model.train()(x)
    assert labels.shape == taught.shape == (8, 10)
    assert not torch.allclose(labels, taught)
    one = build_model(arch).eval()
    one.load_state_dict(one_classifier(model.state_dict()))
    torch.testing.assert_close(one(x), model.eval()(x))
    # Which is the mean of what the two give, each alone.
    head = model.get_submodule("head.fc")
    assert isinstance(head, TwoClassifiers)
    each = []
    for part in (head.labels, head.teacher):
        one.get_submodule("head.fc").load_state_dict(part.state_dict())
        each.append(one(x))
    torch.testing.assert_close(model(x), sum(each) / 2)


def test_each_classifier_has_its_own_part_of_the_loss() -> None:
    labels, student, taught = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    recipe = replace(PLAIN, distillation="hard", teacher_weight=0.25)
    first = nn.functional.cross_entropy(labels, targets, label_smoothing=0.1)
    second = nn.functional.cross_entropy(student, taught.argmax(1))
    torch.testing.assert_close(training_loss((labels, student), targets, recipe, taught), 0.75 * first + 0.25 * second)
    shares = nn.functional.one_hot(targets, 4).float()
    torch.testing.assert_close(training_loss(labels, shares, recipe), first)  # shares of classes, as labels


def test_groups_of_images_have_no_second_classifier() -> None:
    with pytest.raises(InputError, match="distillation_head"):
        add_second_classifier(build_model(replace(ARCH, mux=MultiplexSpec(2))))


# -- Stochastic depth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [ARCH, V2, VIT], ids=lambda arch: arch.name)
def test_the_chance_grows_block_by_block_and_eval_mode_has_none(arch: ArchConfig) -> None:
    model = build_model(arch)
    x, _ = batch(arch.image_size)
    names = set(model.state_dict())
    before = model.eval()(x)
    set_drop_path(model, 0.4)
    assert torch.equal(model.eval()(x), before) and set(model.state_dict()) == names
    blocks = [module for name, module in model.named_children() if "_block" in name]
    rates = [{part.rate for part in block.modules() if isinstance(part, DropPath)} for block in blocks]
    assert rates == [{0.4 * i / (len(blocks) - 1)} for i in range(len(blocks))], "and each block has some"
    others = [m for name, module in model.named_children() if "_block" not in name for m in module.modules()]
    assert not any(part.rate for part in others if isinstance(part, DropPath))


def test_a_branch_is_left_out_for_a_sample_or_made_up_for() -> None:
    drop = DropPath()
    drop.rate = 0.25
    torch.manual_seed(0)
    x = drop(torch.ones(4000, 2, 3))
    kept = x[:, 0, 0] > 0
    assert torch.equal(x, torch.where(kept[:, None, None], torch.tensor(1 / 0.75), 0.0).expand_as(x))
    assert 0.73 < kept.double().mean() < 0.77
    torch.manual_seed(0)
    assert torch.equal(drop(torch.ones(4000, 2, 3)), x), "by the seed"
