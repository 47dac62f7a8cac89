"""Training a found network: resuming, refusing, what decays, weights in and out. Networks of width 8 on digits."""

import csv
import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nas import checkpoints, training
from nas.about import note
from nas.checkpoints import load_weights
from nas.data import ImageData, load_images, normalise
from nas.evaluation import accuracy_of
from nas.pretrained import starting_weights
from nas.recipe import RECIPES, Recipe
from nas.request import claim
from nas.steps import accelerator, cosine, mixed_precision, parameter_groups, repeated_shapes
from nas.teacher import load_teacher
from nas.training import TrainingResult, training_loss
from supernet.arch import ArchConfig, Stage
from supernet.errors import InputError
from supernet.model import build_model
from supernet.specs import MB3D, MB4D, Identity

# Every kind of layer; the empty slot must not be in what is written.
MB3D_8 = MB3D(8, num_heads=2, key_dim=4, attn_ratio=2)
ARCH = ArchConfig("tiny", 16, 3, (Stage(8, 2, (Identity(8), MB4D(8))), Stage(8, 2, (MB4D(8), MB3D_8)), Stage(8, 1, (MB3D_8,))))
RECIPE = Recipe(
    epochs=3, batch_size=32, learning_rate=4e-3, layer_scale=0.5, clip_norm=5.0, images_per_epoch=160, accelerator="cpu"
)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_images(None, 16, seed=0)


@pytest.fixture(scope="module")
def whole(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """A training that was never interrupted."""
    return training.train_network(ARCH, digits, RECIPE, tmp_path_factory.mktemp("whole"), seed=3)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def without_seconds(folder: Path) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows(folder)]


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*args: object) -> float:
        raise AssertionError("a training step was taken")

    monkeypatch.setattr(training, "train_step", step)


def network() -> nn.Sequential:
    """The network that ARCH is trained as."""
    return build_model(ARCH.without_identity().with_classes(10))


# Within epoch 2, in its validation, at its checkpoint, between its checkpoint and its metrics.
KILLS = [
    (training, "train_step", 8, 1),
    (training, "accuracy_of", 2, 1),
    (checkpoints, "write_atomically", 5, 1),  # each epoch has one before its validation, one after and its metrics
    (checkpoints, "write_atomically", 6, 2),
]


@pytest.mark.parametrize(("module", "function", "calls", "epochs"), KILLS)
def test_resumed_training_equals_uninterrupted(
    module: ModuleType,
    function: str,
    calls: int,
    epochs: int,
    digits: ImageData,
    whole: TrainingResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, seen = getattr(module, function), 0

    def killed(*args: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == calls:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, function, killed)
        training.train_network(ARCH, digits, RECIPE, tmp_path, seed=3)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == epochs
    resumed = training.train_network(ARCH, digits, RECIPE, tmp_path, seed=3)
    expected, found = (load_file(r.folder / "model.safetensors") for r in (whole, resumed))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), f"{name} differs after a resume"
    assert replace(resumed, folder=whole.folder) == whole, "and so does the result"
    assert without_seconds(tmp_path) == without_seconds(whole.folder), "no row is lost, doubled or changed"


def test_a_kill_in_a_validation_loses_no_step(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "accuracy_of", killed)
        training.train_network(ARCH, digits, RECIPE, tmp_path, seed=3)
    taken: list[float] = []
    original = training.train_step
    monkeypatch.setattr(training, "train_step", lambda *args: taken.append(original(*args)) or taken[-1])
    training.train_network(ARCH, digits, RECIPE, tmp_path, seed=3)
    assert len(taken) == 10, "those of the second and third epoch"


@pytest.mark.parametrize("step", [7, 10])  # within the second epoch, its last one
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_loses_no_step(
    number: signal.Signals,
    step: int,
    digits: ImageData,
    whole: TrainingResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, taken = training.train_step, 0

    def signalled(*args: Any) -> float:
        nonlocal taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), number)
        return original(*args)

    monkeypatch.setattr(training, "train_step", signalled)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        training.train_network(ARCH, digits, RECIPE, tmp_path, seed=3)
    assert taken == step, "the step under way is the last one"
    assert signal.getsignal(number) == before
    held = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (held["epoch"], len(held["history"]["losses"])) == (1, step - 5)
    training.train_network(ARCH, digits, RECIPE, tmp_path, seed=3)
    assert taken == 15, "none is taken again"
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole.folder, tmp_path))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert without_seconds(tmp_path) == without_seconds(whole.folder)


def test_seed_decides_start_and_order(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def step(model: nn.Module, optimizer: object, x: Tensor, *rest: object) -> float:
        seen.append((model.get_parameter("stem.conv1.weight").detach().clone(), x))
        return 1.0

    monkeypatch.setattr(training, "train_step", step)
    state = torch.random.get_rng_state()
    for run, seed in enumerate((3, 3, 4)):
        recipe = replace(RECIPE, epochs=1, images_per_epoch=32)
        training.train_network(ARCH, digits, recipe, tmp_path / str(run), seed)
    first, again, other = seen
    for part, what in enumerate(("initial weights", "images")):
        assert torch.equal(first[part], again[part]), f"the same seed gives the same {what}"
        assert not torch.equal(first[part], other[part]), f"another seed gives other {what}"
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are left alone"


def test_folder_describes_the_trained_network(digits: ImageData, whole: TrainingResult) -> None:
    arch = ArchConfig.load(whole.folder / "arch.yaml")
    assert arch == whole.arch == ARCH.without_identity().with_classes(10), "the data's classes, no empty slots"
    model = build_model(arch)
    load_weights(model, whole.folder / "model.safetensors")
    assert accuracy_of(model, digits.val) == (whole.loss, whole.accuracy), "the file holds what was scored"


def test_metrics_have_a_row_for_each_epoch(whole: TrainingResult) -> None:
    found = rows(whole.folder)
    columns = ["epoch", "learning_rate", "train_loss", "val_loss", "val_accuracy", "seconds"]
    assert list(found[0]) == columns
    assert [row["epoch"] for row in found] == ["1", "2", "3"]
    rates = [float(row["learning_rate"]) for row in found]
    assert rates == [RECIPE.learning_rate * cosine(step, 15) for step in (4, 9, 14)], "of each epoch's last step"
    assert (float(found[-1]["val_loss"]), float(found[-1]["val_accuracy"])) == (whole.loss, whole.accuracy)
    assert whole.epochs == 3
    losses = [float(row["train_loss"]) for row in found]
    assert losses[-1] < losses[0], "it learns"


def test_learning_is_better_than_chance(digits: ImageData, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=2, images_per_epoch=0)
    assert training.train_network(ARCH, digits, recipe, tmp_path, seed=0).accuracy > 0.3, "chance is 0.1"


def test_other_requests_are_refused(digits: ImageData, whole: TrainingResult, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_training(monkeypatch)
    longer = replace(RECIPE, epochs=40)
    with pytest.raises(InputError, match=r"another request \(epochs 3, now 40; seed 3, now 5\): give another --out$"):
        training.train_network(ARCH, digits, longer, whole.folder, seed=5)
    other_data = replace(digits, fingerprint="other")
    with pytest.raises(InputError, match=r"\(data_fingerprint digits, now other\)"):
        training.train_network(ARCH, other_data, RECIPE, whole.folder, seed=3)
    with pytest.raises(InputError, match=r"\(weights none, now sha256 [0-9a-f]{16}\)"):
        training.train_network(ARCH, digits, RECIPE, whole.folder, seed=3, weights=whole.folder / "model.safetensors")
    wider = replace(ARCH, stages=(*ARCH.stages[:2], Stage(16, 1, ())))
    with pytest.raises(InputError, match=r"\(arch \.\.\..*width: 8.*, now \.\.\..*width: 16.*\)"):
        training.train_network(wider, digits, RECIPE, whole.folder, seed=3)


def test_finished_request_returns_at_once(digits: ImageData, whole: TrainingResult, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_training(monkeypatch)
    (whole.folder / "model.safetensors").unlink()
    assert training.train_network(ARCH, digits, RECIPE, whole.folder, seed=3) == whole
    assert (whole.folder / "model.safetensors").exists(), "what a kill left unwritten is written"


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_finished_training_needs_its_checkpoint_no_more(
    ema: float, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, epochs=2, ema=ema)
    result = training.train_network(ARCH, digits, recipe, tmp_path, seed=3)
    before = (tmp_path / "model.safetensors").stat()
    (tmp_path / "checkpoint.pt").unlink()
    forbid_training(monkeypatch)
    assert training.train_network(ARCH, digits, recipe, tmp_path, seed=3) == result
    assert (tmp_path / "model.safetensors").stat() == before
    with pytest.raises(InputError, match="seed 3, now 4"):
        training.train_network(ARCH, digits, recipe, tmp_path, seed=4)
    metrics = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text(metrics.replace("\n2,", "\ntwo,"))
    with pytest.raises(InputError, match=r"metrics\.csv cannot be used"):
        training.train_network(ARCH, digits, recipe, tmp_path, seed=3)
    (tmp_path / "metrics.csv").write_text("".join(metrics.splitlines(keepends=True)[:-1]))  # of one epoch
    with pytest.raises(AssertionError, match="a training step was taken"):
        training.train_network(ARCH, digits, recipe, tmp_path, seed=3)


def test_data_of_another_size_are_refused(digits: ImageData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="images of 32 px, but the data are loaded at 16 px"):
        training.train_network(ARCH.at(32), digits, RECIPE, tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists(), "a refused request leaves nothing behind"


def test_non_finite_loss_names_the_epoch(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, steps = training.train_step, 0

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, *rest: Any) -> float:
        nonlocal steps
        steps += 1
        return original(model, optimizer, x * math.nan if steps == 7 else x, *rest)

    monkeypatch.setattr(training, "train_step", step)
    with pytest.raises(
        FloatingPointError,
        match=r"not finite in epoch 2, at step 7: .* lower learning_rate, into another --out and --weights \S+checkpoint.pt",
    ):
        training.train_network(ARCH, digits, RECIPE, tmp_path, seed=0)
    assert steps == 7, "no step is taken after it"
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 1, "the last good epoch is kept"


@pytest.mark.parametrize(
    ("device", "precision", "has", "expected"),
    [
        ("cpu", "auto", {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", "auto", {"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ("cpu", "auto", {"avx512_bf16": False}, torch.float32),  # emulated: slower than fp32
        ("cpu", "auto", None, torch.float32),  # an older torch cannot say
        ("cpu", "bf16", {}, torch.bfloat16),
        ("cpu", "fp32", {"avx512_bf16": True}, torch.float32),
    ],
)
def test_matrix_products_have_the_precision_that_suits_the_device(
    device: str, precision: str, has: dict[str, bool] | None, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    with mixed_precision(torch.device(device), precision):
        assert nn.functional.linear(torch.ones(1, 2), torch.ones(3, 2)).dtype == expected


@pytest.mark.parametrize("multiplies", [True, False])
def test_on_a_gpu_bfloat16_is_not_emulated_unless_it_is_asked_for(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch says of a T4 and a V100 that they support it, by emulation."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: multiplies or including_emulation)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    for precision, expected in (("auto", multiplies), ("bf16", True), ("fp32", False)):
        with mixed_precision(torch.device("cuda"), precision):
            assert torch.is_autocast_enabled("cuda") == expected, precision


def test_cudnn_tries_its_kernels_for_as_long_as_shapes_repeat() -> None:
    before = torch.backends.cudnn.benchmark
    with pytest.raises(KeyboardInterrupt), repeated_shapes(torch.device("cuda")):
        assert torch.backends.cudnn.benchmark
        raise KeyboardInterrupt
    assert torch.backends.cudnn.benchmark == before, "what comes after it, such as timing networks, is not to change"
    with repeated_shapes(torch.device("cpu")):
        assert torch.backends.cudnn.benchmark == before


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = network()
    decaying, free = parameter_groups(model.named_parameters(), 0.05)
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    groups = [{id(p) for p in group["params"]} for group in (decaying, free)]
    assert len(decaying["params"]) + len(free["params"]) == len(list(model.parameters()))
    assert groups[0] | groups[1] == {id(p) for p in model.parameters()}
    kernels = (nn.Conv2d, nn.Linear)
    expected = {id(m.weight) for m in model.modules() if isinstance(m, kernels)}
    assert groups[0] == expected, "not biases, norms, layer scales or attention biases"


def test_layer_scale_is_the_recipes(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def step(model: nn.Module, *args: object) -> float:
        seen.extend(p.flatten()[0].item() for n, p in model.named_parameters() if n.endswith("gamma"))
        return 1.0

    monkeypatch.setattr(training, "train_step", step)
    training.train_network(ARCH, digits, replace(RECIPE, epochs=1, images_per_epoch=32, layer_scale=0.25), tmp_path, seed=0)
    assert seen == [0.25] * 8, "two for each of the four blocks"


def test_cosine_warms_up_and_ends_at_a_hundredth() -> None:
    assert [cosine(step, 100) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert cosine(5, 100) == 1.0, "the cosine begins at its top"
    assert cosine(100, 100) == pytest.approx(0.01)
    assert cosine(52, 100) > cosine(53, 100)
    assert cosine(0, 1) == 1.0, "a single step has the whole rate"
    assert [cosine(step, 10, warm_up=10) for step in (9, 10, 11)] == [1.0, 0.01, 0.01], "a warm-up to the end, and a cooldown"


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.pt"])
def test_weights_round_trip(name: str, whole: TrainingResult) -> None:
    model = network()
    load_weights(model, whole.folder / name)
    held = torch.load(whole.folder / "checkpoint.pt", weights_only=True)["net"]
    assert all(torch.equal(tensor, held[key]) for key, tensor in model.state_dict().items())


def test_weights_that_do_not_fit_are_refused(whole: TrainingResult, tmp_path: Path) -> None:
    weights = whole.folder / "model.safetensors"
    model = build_model(ARCH.without_identity())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"head\.fc\.weight of shape \(10, 8\), not \(3, 8\) and 1 more") as caught:
        load_weights(model, weights)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items()), "a refused file changes nothing"

    longer = replace(ARCH, stages=(Stage(8, 2, (MB4D(8), MB4D(8))), *ARCH.stages[1:])).with_classes(10)
    with pytest.raises(InputError, match=r"lacks stage1_block2\.ls1\.gamma"):
        load_weights(build_model(longer), weights)
    shorter = replace(ARCH, stages=(Stage(8, 2, ()), *ARCH.stages[1:])).with_classes(10)
    with pytest.raises(InputError, match=r"has an unexpected stage1_block1"):
        load_weights(build_model(shorter), weights, adapt=True)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_files_that_hold_no_weights_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(InputError, match=f"{name} does not exist: give a model.safetensors"):
        load_weights(network(), path)
    path.write_bytes(b"no weights at all")
    with pytest.raises(InputError, match=f"{name} cannot be read: give a"):
        load_weights(network(), path)


@pytest.mark.parametrize("part", [None, "state_dict", "model"])
def test_a_state_dict_is_read_as_it_is_or_in_a_checkpoint(part: str | None, tmp_path: Path) -> None:
    state, path = {name: torch.full_like(t, 3) for name, t in network().state_dict().items()}, tmp_path / "bare.pt"
    torch.save(state if part is None else {part: state, "epoch": 1}, path)
    load_weights(model := network(), path)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert starting_weights("tiny", str(path), ARCH) == path
    torch.save({"epoch": 1}, path)
    for read in (lambda: load_weights(network(), path), lambda: starting_weights("tiny", str(path), ARCH)):
        with pytest.raises(InputError, match="holds no state dict, but epoch"):
            read()


def test_weights_for_other_classes_and_sizes_are_adapted(whole: TrainingResult, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(whole.folder / "model.safetensors")
    model = build_model(ARCH.without_identity().at(24))
    fresh = model.state_dict()["head.fc.weight"].clone()
    load_weights(model, whole.folder / "model.safetensors", adapt=True)
    said = capsys.readouterr().err
    assert "is for 10 classes, not 3" in said
    assert "2 tensors of" in said and "another image size" in said
    assert torch.equal(model.state_dict()["head.fc.weight"], fresh), "the classifier is the network's own"
    assert torch.equal(model.state_dict()["stem.conv1.weight"], weights["stem.conv1.weight"])
    table = "stage2_block2.token_mixer.attention_biases"
    assert model.state_dict()[table].shape == (2, 36), "a table for maps of 6 x 6"
    assert torch.equal(model.state_dict()[table][:, 0], weights[table][:, 0]), "offset 0 keeps its bias"


def test_a_classifier_of_other_classes_is_learned_anew(
    digits: ImageData, whole: TrainingResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(RECIPE, epochs=1, learning_rate=1e-9)
    start = whole.folder / "model.safetensors"

    def ends(folder: str, classes: tuple[str, ...]) -> dict[str, Tensor]:
        data = replace(digits, classes=classes)
        training.train_network(ARCH, data, recipe, tmp_path / folder, seed=0, weights=start)
        return load_file(tmp_path / folder / "model.safetensors")

    given, head = load_file(start), "head.fc.weight"
    assert torch.allclose(ends("same", digits.classes)[head], given[head], atol=1e-6)
    assert "learned anew" not in capsys.readouterr().err
    found = ends("other", ("0", "2", "1", *digits.classes[3:]))
    assert "(number 2 of 10 is '1', not '2'): it is left out and learned anew" in capsys.readouterr().err
    assert not torch.allclose(found[head], given[head], atol=1e-2)
    assert torch.allclose(found["stem.conv1.weight"], given["stem.conv1.weight"], atol=1e-6), "the rest is as it was given"


def test_training_starts_from_given_weights(digits: ImageData, whole: TrainingResult, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=1, learning_rate=1e-9)
    start = whole.folder / "model.safetensors"
    result = training.train_network(ARCH, digits, recipe, tmp_path / "out", seed=0, weights=start)
    found, given = load_file(tmp_path / "out" / "model.safetensors"), load_file(start)
    for name in (n for n, _ in network().named_parameters()):
        torch.testing.assert_close(found[name], given[name], rtol=0, atol=1e-6)
    misfit = tmp_path / "misfit.safetensors"
    save_file({"head.fc.bias": torch.zeros(10)}, misfit)
    with pytest.raises(InputError, match="does not fit"):
        training.train_network(ARCH, digits, recipe, tmp_path / "none", seed=0, weights=misfit)
    assert not (tmp_path / "none").exists(), "the folder stays free for the corrected command"
    assert result.arch == whole.arch


# -- Teachers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_file(whole: TrainingResult) -> Path:
    return whole.folder / "arch.yaml"


def test_the_loss_has_the_labels_share_and_the_teachers() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, taught = torch.randn(2, 6, 4, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    alone = training_loss(logits, labels, RECIPE)
    assert alone == nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    none, all_soft, all_hard = (
        replace(RECIPE, distillation=kind, teacher_weight=share)  # type: ignore[arg-type]
        for kind, share in (("soft", 0.0), ("soft", 1.0), ("hard", 1.0))
    )
    assert training_loss(logits, labels, none, taught) == alone
    t = RECIPE.teacher_temperature
    p, q = (taught / t).softmax(1), (logits / t).softmax(1)
    divergence = t * t * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(training_loss(logits, labels, all_soft, taught), divergence)
    assert training_loss(taught, labels, all_soft, taught).abs() < 1e-6, "nothing is left to learn"
    decided = nn.functional.cross_entropy(logits, taught.argmax(1))
    torch.testing.assert_close(training_loss(logits, labels, all_hard, taught), decided)
    half = replace(all_soft, teacher_weight=0.5)
    torch.testing.assert_close(training_loss(logits, labels, half, taught), (alone + divergence) / 2)


def test_a_teacher_alone_makes_a_student_agree_with_it(digits: ImageData, teacher_file: Path, tmp_path: Path) -> None:
    """Of a teacher whose answers are all other ones: the labels play no part."""
    state = load_file(teacher_file.with_name("model.safetensors"))
    for name in ("head.fc.weight", "head.fc.bias"):
        state[name] = state[name].roll(1, 0)
    save_file(state, tmp_path / "wrong.safetensors")
    ArchConfig.load(teacher_file).save(tmp_path / "wrong.yaml")
    teacher = load_teacher(tmp_path / "wrong.yaml", 16, digits.classes)
    before = {name: tensor.clone() for name, tensor in teacher.network.state_dict().items()}
    recipe = replace(RECIPE, epochs=2, teacher_weight=1.0, images_per_epoch=0, distillation="hard")
    training.train_network(ARCH, digits, recipe, tmp_path / "out", seed=0, teacher=teacher)
    student = build_model(ArchConfig.load(tmp_path / "out" / "arch.yaml"))
    load_weights(student, tmp_path / "out" / "model.safetensors")
    pixels, labels = digits.val.batch(torch.arange(len(digits.val)))
    with torch.no_grad():
        said, taught = (net.eval()(normalise(pixels)).argmax(1) for net in (student, teacher.network))
    assert (said == taught).double().mean() > 2 * (said == labels).double().mean()
    assert not teacher.network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.network.state_dict().items()), "it is frozen"


def test_resumed_training_with_a_teacher_equals_uninterrupted(
    digits: ImageData, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: str) -> dict[str, Tensor]:
        teacher = load_teacher(teacher_file, 16, digits.classes)
        training.train_network(ARCH, digits, replace(RECIPE, epochs=2), tmp_path / folder, seed=3, teacher=teacher)
        return load_file(tmp_path / folder / "model.safetensors")

    expected, original, steps = run("whole"), training.train_step, 0

    def killed(*args: Any) -> float:
        nonlocal steps
        steps += 1
        if steps == 8:  # in the second epoch
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_step", killed)
        run("killed")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run("killed").items())
    with pytest.raises(InputError, match=r"\(teacher sha256 [0-9a-f]{16}, now none\)"):
        training.train_network(ARCH, digits, replace(RECIPE, epochs=2), tmp_path / "whole", seed=3)


def test_a_teacher_of_other_classes_or_in_another_order_is_refused(
    digits: ImageData, teacher_file: Path, tmp_path: Path
) -> None:
    named = teacher_file.with_name("model.safetensors")
    load_teacher(teacher_file, 16, digits.classes)
    swapped = ("0", "2", "1", *digits.classes[3:])
    for classes, number, theirs in ((swapped, 2, "2"), ((*digits.classes[:9], "zero"), 10, "zero")):
        with pytest.raises(
            InputError, match=rf"arch.yaml knows .*\(number {number} of 10 is '{number - 1}', not '{theirs}'\): give"
        ):
            load_teacher(teacher_file, 16, classes)
    ArchConfig.load(teacher_file).save(tmp_path / "teacher.yaml")
    save_file(load_file(named), tmp_path / "teacher.safetensors")
    load_teacher(tmp_path / "teacher.yaml", 16, swapped)  # its weights do not name them
    accents = "aeio\u00fc", "aeiou\u0308"  # a folder of one name, on two file systems
    save_file(load_file(named), tmp_path / "teacher.safetensors", note((*digits.classes[:9], accents[0])))
    load_teacher(tmp_path / "teacher.yaml", 16, (*digits.classes[:9], accents[1]))


def test_a_teacher_is_a_file_with_its_weights_beside_it(digits: ImageData, teacher_file: Path, tmp_path: Path) -> None:
    arch = ArchConfig.load(teacher_file)
    state = load_file(teacher_file.with_name("model.safetensors"))
    for yaml, weights in (("teacher.yaml", "teacher.safetensors"), ("searched.yaml", "weights.safetensors")):
        arch.save(tmp_path / yaml)
        with pytest.raises(InputError, match=rf"{weights} does not exist"):
            load_teacher(tmp_path / yaml, 16, digits.classes)
        save_file(state, tmp_path / weights)
        found = load_teacher(tmp_path / yaml, 16, digits.classes)
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.network.state_dict().items())
    assert found.digest == load_teacher(tmp_path / "teacher.yaml", 16, digits.classes).digest
    larger = load_teacher(tmp_path / "teacher.yaml", 24, digits.classes).network
    assert larger(torch.zeros(1, 3, 24, 24)).shape == (1, 10), "at the student's size"
    with pytest.raises(InputError, match="knows 10 classes, but the data have 3"):
        load_teacher(tmp_path / "teacher.yaml", 16, "abc")
    with pytest.raises(InputError, match="no YAML file"):
        load_teacher("efficientformer_l1", 16, digits.classes)


def test_given_weights_keep_their_layer_scales(
    digits: ImageData, whole: TrainingResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Tensor]] = []

    def step(model: nn.Module, *args: object) -> float:
        seen.extend((n, p.detach().clone()) for n, p in model.named_parameters() if n.endswith("gamma"))
        return 1.0

    monkeypatch.setattr(training, "train_step", step)
    weights = whole.folder / "model.safetensors"
    recipe = replace(RECIPES["finetune"], epochs=1, images_per_epoch=32, batch_size=32)
    training.train_network(ARCH, digits, recipe, tmp_path, seed=0, weights=weights)
    given = load_file(weights)
    assert len(seen) == 8
    assert all(torch.equal(gamma, given[name]) for name, gamma in seen)


def test_apple_s_gpu_is_taken_only_where_asked_for_and_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert accelerator("auto") == torch.device("cpu")
    with pytest.raises(InputError, match=r"^PyTorch 2\.13\.0 computes batch norm's gradients on Apple's GPU wrongly.*use cpu"):
        accelerator("mps")
    monkeypatch.setattr(torch, "__version__", "2.15.0+cpu")
    assert accelerator("mps") == torch.device("mps")


def test_claim_compares_what_json_holds(tmp_path: Path) -> None:
    request = {"size": (3, 4), "text": "a\nb", "none": None, "rate": 0.1}
    folder = tmp_path / "new" / "folder"
    claim(folder, request)
    before = (folder / "request.json").stat().st_mtime_ns
    claim(folder, dict(reversed(request.items())))
    assert (folder / "request.json").stat().st_mtime_ns == before, "an equal request changes nothing, in whatever order"
    assert json.loads((folder / "request.json").read_text())["size"] == [3, 4]
    with pytest.raises(InputError, match=r"\(more absent, now 1; none none, now absent\)"):
        claim(folder, {"size": [3, 4], "text": "a\nb", "rate": 0.1, "more": 1})
    many = {"size": 1, "text": "c", "none": 2, "rate": 3}
    with pytest.raises(InputError, match=r"\(size \[3, 4\], now 1; text a b, now c; none none, now 2; and 1 more\)"):
        claim(folder, many)


def test_a_request_that_never_began_gives_way_to_another_of_its_command(tmp_path: Path) -> None:
    claim(tmp_path, {"command": "nas-train", "batch_size": 4096})
    claim(tmp_path, {"command": "nas-train", "batch_size": 64}, begun=False)
    assert json.loads((tmp_path / "request.json").read_text())["batch_size"] == 64
    with pytest.raises(InputError, match="batch_size 64, now 32"):
        claim(tmp_path, {"command": "nas-train", "batch_size": 32})
    with pytest.raises(InputError, match="command nas-train, now nas-search"):
        claim(tmp_path, {"command": "nas-search"}, begun=False)


def test_a_training_that_failed_in_its_first_step_leaves_its_folder_free(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*args: object) -> float:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(training, "train_step", step)
        training.train_network(ARCH, digits, replace(RECIPE, batch_size=64), tmp_path, seed=3)
    forbid_training(monkeypatch)
    with pytest.raises(AssertionError, match="a training step was taken"):
        training.train_network(ARCH, digits, RECIPE, tmp_path, seed=3)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(InputError, match="batch_size 32, now 16"):
        training.train_network(ARCH, digits, replace(RECIPE, batch_size=16), tmp_path, seed=3)


def test_claim_shows_where_long_values_differ(tmp_path: Path) -> None:
    claim(tmp_path, {"x": "a" * 100 + "OLD" + "b" * 100})
    with pytest.raises(InputError) as caught:
        claim(tmp_path, {"x": "a" * 100 + "NEW" + "b" * 100})
    match = re.search(r"\(x (.*), now (.*)\)", str(caught.value))
    assert match is not None
    was, now = match.groups()
    assert "OLD" in was and "NEW" in now
    assert (len(was), len(now)) == (60, 60)
    assert was.startswith("...a") and was.endswith("b...")


def test_claim_refuses_names_that_no_file_could_say(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data, 'gr\\udcfcn', is no text in UTF-8: rename it"):
        claim(tmp_path, {"data": os.fsdecode(b"gr\xfcn")})
    with pytest.raises(InputError, match=r"out, .* is no text in UTF-8"):
        claim(tmp_path / os.fsdecode(b"gr\xfcn"), {"data": "d"})
    assert not list(tmp_path.iterdir())


def test_claim_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text("{")
    with pytest.raises(InputError, match=r"not whole JSON: what .* holds is unknown: give another --out"):
        claim(tmp_path, {"x": 1})
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        claim(file, {"x": 1})
