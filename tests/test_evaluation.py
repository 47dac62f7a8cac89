"""A sub-network's loss is that of its inherited weights with fresh batch-norm statistics, however it is computed."""

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_spaces import stage_space
from torch import Tensor, nn

from nas.data import ImageData, Images, normalise
from nas.evaluation import Evaluator, accuracy_of, machine_memory, memory_for_activations, recalibrate, recalibrated
from nas.trajectory import Evaluation
from supernet.arch import ArchConfig
from supernet.metapath import Supernet
from supernet.model import build_model, set_drop_path
from supernet.space import SearchSpace
from supernet.weights import subnetwork

CLOSE = 1e-6  # of losses in float32, where the images go through in other chunks


SPACE = SearchSpace(
    "small",
    8,
    3,
    (
        stage_space((8, 16), 1, 1, "mb4d", "identity"),
        stage_space((8, 16), 2, 2, "mb4d", "mb3d", "identity"),
        stage_space((8, 16), 1, 2, "mb4d", "mb3d", "identity"),
    ),
)
LARGEST = SPACE.arch((16, 16, 16), (("mb4d",), ("mb4d", "mb3d"), ("mb4d", "mb3d")))


def pictures(number: int, seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (number, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(number), torch.randint(0, 3, (number,), generator=generator))


def pixels_of(images: Images) -> Tensor:
    return images.batch(torch.arange(len(images)))[0]


@pytest.fixture(scope="module")
def data() -> ImageData:
    # More scoring images than a chunk (128), and not a multiple of it.
    return ImageData(pictures(40, 0), pictures(150, 1), pictures(30, 2), ("a", "b", "c"), 8, False, False, (), "", "")


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    net = Supernet(SPACE)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return net.eval()


def members(number: int) -> list[ArchConfig]:
    rng = random.Random(0)
    return [LARGEST, SPACE.smallest, *(SPACE.sample(rng) for _ in range(number))]


@torch.no_grad()
def from_scratch(supernet: Supernet, data: ImageData, arch: ArchConfig) -> Evaluation:
    """The whole network at once: statistics of all training images in one forward, then the scoring images."""
    model = subnetwork(supernet, arch)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(normalise(pixels_of(data.train)))
    logits = model.eval()(normalise(pixels_of(data.score)))
    right = (logits.argmax(1) == data.score.labels).sum().item()
    return Evaluation(F.cross_entropy(logits.double(), data.score.labels).item(), right / len(data.score))


def test_it_equals_the_network_built_and_recalibrated_from_scratch(supernet: Supernet, data: ImageData) -> None:
    evaluate = Evaluator(supernet, data)
    losses = []
    for arch in members(10):
        found, expected = evaluate(arch), from_scratch(supernet, data, arch)
        assert found.loss == pytest.approx(expected.loss, rel=CLOSE), arch
        assert found.accuracy == pytest.approx(expected.accuracy), arch
        losses.append(found.loss)
    assert max(losses) - min(losses) > 0.1  # they are different networks


def test_recalibration_sees_as_many_training_images_as_are_asked_for(supernet: Supernet, data: ImageData) -> None:
    evaluators = [Evaluator(supernet, data, recalibration_images=number) for number in (16, 40, 1000)]
    assert [len(evaluate.recalibration) for evaluate in evaluators] == [16, 40, 40]
    assert evaluators[0](LARGEST) != evaluators[1](LARGEST) == evaluators[2](LARGEST)
    # A sample of the training images, and not of the first ones alone.
    train = normalise(pixels_of(data.train))
    chosen = [int((train == image).flatten(1).all(1).nonzero()) for image in evaluators[0].recalibration]
    assert len(set(chosen)) == 16 and max(chosen) >= 16


def test_neither_order_nor_memory_changes_a_result(supernet: Supernet, data: ImageData) -> None:
    networks = members(8)
    alone = {arch: Evaluator(supernet, data)(arch) for arch in networks}
    for memory_bytes in (0, 300_000, 1 << 30):
        for seed in range(2):
            evaluate = Evaluator(supernet, data, memory_bytes=memory_bytes)
            for arch in random.Random(seed).sample(networks * 2, 2 * len(networks)):
                assert evaluate(arch) == alone[arch]  # exactly: the same operations on the same numbers


def test_what_is_kept_stays_within_the_memory(supernet: Supernet, data: ImageData) -> None:
    for memory_bytes in (0, 300_000, 1 << 30):
        evaluate = Evaluator(supernet, data, memory_bytes=memory_bytes)
        for arch in members(4):
            evaluate(arch)
        kept = [tensor for pair in evaluate._cache.values() for tensor in pair]
        assert sum(tensor.numel() * tensor.element_size() for tensor in kept) <= memory_bytes
        assert bool(kept) == (memory_bytes > 0)


def test_only_the_layers_behind_a_change_run_again(supernet: Supernet, data: ImageData) -> None:
    evaluate = Evaluator(supernet, data)

    def layers_run(arch: ArchConfig) -> int:
        before = evaluate.layers_run
        evaluate(arch)
        return evaluate.layers_run - before

    # stem, block | embedding, block, block | embedding, block, block | head; flat and unflat compute nothing
    assert layers_run(LARGEST) == len(LARGEST.layers()) - 3 == 9
    assert layers_run(LARGEST) == 1  # only the head is not kept from itself
    assert layers_run(SPACE.arch((16, 16, 16), (("mb4d",), ("mb4d", "mb3d"), ("mb4d", "mb4d")))) == 2  # block, head
    assert layers_run(SPACE.arch((16, 16, 8), (("mb4d",), ("mb4d", "mb3d"), ("mb4d", "mb3d")))) == 4  # embedding on
    assert (
        layers_run(SPACE.arch((16, 16, 16), (("mb4d",), ("mb4d", "mb4d"), ("mb4d", "mb3d")))) == 5
    )  # from the second block on
    assert layers_run(SPACE.arch((8, 16, 16), (("mb4d",), ("mb4d", "mb3d"), ("mb4d", "mb3d")))) == 9
    # The second slot has weights of its own: what the first one computed does not stand in.
    assert (
        layers_run(SPACE.arch((16, 16, 16), (("mb4d",), ("identity", "mb4d"), ("identity", "identity")))) == 3
    )  # block, embedding, head

    without = Evaluator(supernet, data, memory_bytes=0)
    without(LARGEST)
    without(LARGEST)
    assert without.layers_run == 18


def test_a_network_of_another_image_size_is_evaluated_at_the_supernet_s(supernet: Supernet, data: ImageData) -> None:
    assert Evaluator(supernet, data)(LARGEST.at(224)) == Evaluator(supernet, data)(LARGEST)


def test_evaluating_changes_nothing_in_the_supernet(supernet: Supernet, data: ImageData) -> None:
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    evaluate = Evaluator(supernet, data)
    for arch in members(3):
        evaluate(arch)
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())
    assert all(parameter.grad is None for parameter in supernet.parameters())


# -- Statistics --------------------------------------------------------------------------------------------------------


def batch(number: int = 12, channels: int = 6) -> Tensor:
    return torch.randn(number, channels, 5, 5, generator=torch.Generator().manual_seed(3)) * 3 + 2


def test_recalibrated_statistics_are_the_batch_s() -> None:
    layer = nn.Sequential(nn.BatchNorm2d(6, momentum=0.3), nn.ReLU(), nn.BatchNorm2d(6, momentum=None))
    first, second = layer[0], layer[2]
    for norm in (first, second):
        assert isinstance(norm, nn.BatchNorm2d)
        norm(batch() * 100)  # statistics of something else
    layer.eval()
    x = batch()
    y = recalibrated(layer, x)

    assert isinstance(first, nn.BatchNorm2d) and isinstance(second, nn.BatchNorm2d)
    assert first.running_mean is not None and first.running_var is not None
    assert torch.allclose(first.running_mean, x.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(first.running_var, x.var((0, 2, 3), correction=1), atol=1e-4)
    # The second norm has seen what the first one gives with its batch's (biased) variance.
    entering = F.batch_norm(x, None, None, training=True).relu()
    assert second.running_mean is not None
    assert torch.allclose(second.running_mean, entering.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(y, F.batch_norm(entering, None, None, training=True), atol=1e-5)
    assert (first.momentum, second.momentum) == (0.3, None)
    assert not any(module.training for module in layer.modules())
    assert not y.requires_grad


def test_nothing_is_drawn_while_statistics_are_computed() -> None:
    space = SearchSpace("drawing", 8, 3, (stage_space((8,), 1, 2, "dropping", "mb4d", "identity"),))
    arch = space.arch((8,), (("dropping", "mb4d"),))
    model, images = build_model(arch), pixels_of(pictures(40, 0)).float()
    set_drop_path(model, 0.5)
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        recalibrate(model, images)
        states.append({name: buffer.clone() for name, buffer in model.named_buffers() if "num_batches" not in name})
    assert all(torch.equal(buffer, states[1][name]) for name, buffer in states[0].items())
    block = model.get_submodule("stage1_block1")
    with torch.no_grad():
        entering = block.get_submodule("0")(recalibrated(model.get_submodule("stem"), images))
    assert torch.allclose(block.get_buffer("2.running_var"), entering.var((0, 2, 3)), rtol=1e-3)
    assert not any(module.training for module in model.modules())


def test_a_layer_without_batch_norm_is_run_in_eval_mode_and_left_in_it() -> None:
    layer = nn.Sequential(nn.Dropout(0.5), nn.LayerNorm(5)).train()
    x = batch(300)  # more than one chunk
    assert torch.allclose(recalibrated(layer, x), F.layer_norm(x, (5,)), atol=1e-5)
    assert not any(module.training for module in layer.modules())


def test_a_recalibrated_network_scores_what_the_evaluator_says(supernet: Supernet, data: ImageData) -> None:
    evaluate = Evaluator(supernet, data)
    for arch in members(3):
        model = subnetwork(supernet, arch)
        before, _ = accuracy_of(model, data.score)
        recalibrate(model.train(), evaluate.recalibration)
        assert not any(module.training for module in model.modules())
        loss, accuracy = accuracy_of(model, data.score)
        assert loss == pytest.approx(evaluate(arch).loss, rel=CLOSE)
        assert accuracy == pytest.approx(evaluate(arch).accuracy)
        assert abs(before - loss) > 1e-3  # the statistics of the supernet's construction do not fit


def test_accuracy_of_a_whole_network_does_not_depend_on_batches(data: ImageData) -> None:
    torch.manual_seed(0)
    model = build_model(LARGEST).train()
    found = accuracy_of(model, data.val)
    assert not model.training
    assert accuracy_of(model, data.val, batch_size=7) == pytest.approx(found)
    with torch.no_grad():
        logits = model(normalise(pixels_of(data.val)))
    assert found[0] == pytest.approx(F.cross_entropy(logits, data.val.labels).item(), rel=1e-5)
    assert found[1] == pytest.approx((logits.argmax(1) == data.val.labels).double().mean().item())


# -- Many networks -----------------------------------------------------------------------------------------------------


def test_many_networks_at_once_give_what_each_gives_alone(supernet: Supernet, data: ImageData) -> None:
    networks = members(8)
    for memory_bytes in (0, 300_000, None):
        evaluate = Evaluator(supernet, data, memory_bytes=memory_bytes)
        found = dict(evaluate.each(networks))
        assert [found[at] for at in range(len(networks))] == [Evaluator(supernet, data)(arch) for arch in networks]
    nothing_kept = Evaluator(supernet, data, memory_bytes=0)
    for arch in networks:
        nothing_kept(arch)
    assert evaluate.layers_run < nothing_kept.layers_run
    evaluate.forget()
    before = evaluate.layers_run
    evaluate(LARGEST)
    assert evaluate.layers_run - before == 9


def test_an_evaluator_has_a_share_of_the_memory_that_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("nas.evaluation.CONTROL_GROUPS", (str(limit),))
    machine = machine_memory()
    assert machine > 1 << 28
    cpu = torch.device("cpu")
    assert memory_for_activations(cpu) == machine // 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory_for_activations(cpu) == machine // 8
    limit.write_text("max\n")
    assert machine_memory() == machine
    limit.write_text("100000000\n")  # of a container
    assert machine_memory() == 100_000_000

    monkeypatch.delattr("os.sysconf")  # as on Windows
    assert machine_memory() == 100_000_000
    limit.unlink()
    assert machine_memory() == 4 << 30
