"""A seed decides a supernet, a kill does not change it, and what the images need becomes important."""

import copy
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_spaces import stage_space
from torch import Tensor, nn
from torch._dynamo.utils import counters

from nas import supernet_training
from nas.checkpoints import read_weights, save_checkpoint
from nas.data import ImageData, Images, normalise
from nas.evaluation import Evaluator
from nas.settings import SupernetSettings
from nas.supernet_training import (
    elastic_step,
    fair_paths,
    fair_step,
    logits_of,
    mixture_step,
    passes,
    sandwich,
    single_path,
    single_step,
    temperature,
    train_supernet,
    training_size,
    weight_step,
)
from supernet.elastic import ElasticSupernet
from supernet.errors import InputError
from supernet.metapath import Supernet, sample_path
from supernet.space import SearchSpace, StageSpace
from supernet.specs import MB4D, Identity

State = dict[str, Tensor]


SPACE = SearchSpace(
    "small",
    8,
    3,
    (stage_space((8, 16), 1, 1, "mb4d", "identity"), stage_space((8, 16), 2, 2, "mb4d", "mb3d", "identity")),
)
# Epochs 1 to 3 on single paths, 4 and 5 on mixtures. Not all of the images fit into whole batches.
SETTINGS = SupernetSettings(weight_epochs=3, mixture_epochs=2, batch_size=8, images_per_epoch=20, accelerator="cpu")


def labelled(pixels: Tensor, labels: Tensor, classes: int) -> ImageData:
    parts = Images(pixels, torch.arange(len(pixels)), labels)
    names = tuple(str(label) for label in range(classes))
    return ImageData(parts, parts, parts, names, pixels.shape[-1], True, False, (), "", "")


@pytest.fixture(scope="module")
def noise() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return labelled(pixels, torch.randint(0, 3, (50,), generator=generator), 3)


def trained(
    data: ImageData, folder: Path, seed: int = 0, settings: SupernetSettings = SETTINGS, space: SearchSpace = SPACE
) -> State:
    net = train_supernet(space, data, settings, seed, folder)
    return {name: value.clone() for name, value in net.state_dict().items()}


def differing(one: State, other: State) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


# -- Seeds and kills ---------------------------------------------------------------------------------------------------


def test_a_seed_decides_every_weight(noise: ImageData, tmp_path: Path) -> None:
    first = trained(noise, tmp_path / "first")
    torch.rand(7)  # what else is drawn in the process plays no part
    assert not differing(first, trained(noise, tmp_path / "again"))
    other = differing(first, trained(noise, tmp_path / "other", seed=1))
    assert {"stem.conv1.weight", "head.fc.weight", "stages.1.0.candidates.1.token_mixer.qkv.weight"} <= other
    assert {f"logits.{slot}" for slot in range(3)} <= other


WAYS = {
    "fair": replace(SETTINGS, weight_epochs=2, mixture_epochs=1, paths="fair"),
    "elastic": replace(SETTINGS, mixture_epochs=0, paths="elastic"),
    "mixture": replace(SETTINGS, weight_epochs=0, mixture_epochs=3, noise="uniform"),
    "checkpointed": replace(SETTINGS, weight_epochs=1, checkpoint_activations=True),
}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 3, 4])  # in the midst of single paths, before the mixtures, between them
@pytest.mark.parametrize("saved", [True, False])
def test_a_killed_run_goes_on_to_the_same_weights(
    after: int, saved: bool, noise: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(noise, tmp_path / "whole")
    written: list[int] = []

    def save_until_killed(path: Path, epoch: int, **parts: Any) -> None:
        if epoch < after or saved:
            save_checkpoint(path, epoch, **parts)
            written.append(epoch)
        if epoch == after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(supernet_training, "save_checkpoint", save_until_killed)
        with pytest.raises(Killed):
            trained(noise, tmp_path / "killed")
    assert written == list(range(1, after + saved))

    torch.manual_seed(99)
    steps: list[int] = []
    forward = Supernet.forward
    monkeypatch.setattr(Supernet, "forward", lambda *args: steps.append(0) or forward(*args))  # type: ignore[func-returns-value]
    assert not differing(whole, trained(noise, tmp_path / "killed"))
    assert len(steps) == 2 * (5 - len(written))  # 20 images an epoch are two whole batches of 8

    steps.clear()
    assert not differing(whole, trained(noise, tmp_path / "killed"))  # finished: nothing is trained
    assert not steps


DRAWING = SearchSpace("drawing", 8, 3, (stage_space((8, 16), 1, 2, "dropping", "identity"),))


@pytest.mark.parametrize("way", ["single", "elastic", "checkpointed"])
def test_a_killed_run_of_blocks_that_draw_goes_on_to_the_same_weights(
    way: str, noise: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = WAYS.get(way, SETTINGS)
    whole = trained(noise, tmp_path / "whole", settings=settings, space=DRAWING)

    def save_and_die(path: Path, epoch: int, **parts: Any) -> None:
        save_checkpoint(path, epoch, **parts)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(supernet_training, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            trained(noise, tmp_path / "killed", settings=settings, space=DRAWING)
    assert not differing(whole, trained(noise, tmp_path / "killed", settings=settings, space=DRAWING))


@pytest.mark.parametrize("way", ["single", *WAYS])
def test_a_run_that_is_killed_at_every_step_goes_on_to_the_same_weights(
    way: str, noise: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = WAYS.get(way, SETTINGS)
    whole = trained(noise, tmp_path / "whole", settings=settings)
    within: list[bool] = []

    def save_and_die(path: Path, epoch: int, **parts: Any) -> None:
        save_checkpoint(path, epoch, **parts)
        within.append(bool(parts["within"].losses))
        raise Killed

    epochs = settings.weight_epochs + settings.mixture_epochs
    with monkeypatch.context() as patch:
        patch.setattr(supernet_training, "save_checkpoint", save_and_die)
        patch.setattr(supernet_training, "CHECKPOINT_EVERY_S", 0.0)
        for _ in range(2 * epochs):  # of two steps each
            with pytest.raises(Killed):
                trained(noise, tmp_path / "killed", settings=settings)
    assert within == [True, False] * epochs
    torch.manual_seed(99)
    assert not differing(whole, trained(noise, tmp_path / "killed", settings=settings))
    assert differing(whole, trained(noise, tmp_path / "other", seed=1, settings=settings))


@pytest.mark.parametrize(("step", "epoch", "losses"), [(3, 1, 1), (4, 2, 0), (7, 3, 1), (10, 5, 0)])  # of two an epoch
def test_a_signal_loses_no_step(
    step: int, epoch: int, losses: int, noise: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(noise, tmp_path / "whole")
    forward, taken = Supernet.forward, 0

    def signalled(*args: Any) -> Tensor:
        nonlocal taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args)

    monkeypatch.setattr(Supernet, "forward", signalled)
    with pytest.raises(KeyboardInterrupt):
        trained(noise, tmp_path / "stopped")
    assert taken == step, "the step under way is the last one"
    held = torch.load(tmp_path / "stopped" / "supernet.pt", weights_only=True)
    assert (held["epoch"], len(held["within"].get("losses", ()))) == (epoch, losses)
    torch.manual_seed(99)
    assert not differing(whole, trained(noise, tmp_path / "stopped"))
    assert taken == 10, "none is taken again"


def test_checkpointed_activations_lead_to_the_same_weights(noise: ImageData, tmp_path: Path) -> None:
    for way in ("single", "elastic"):
        settings = WAYS.get(way, SETTINGS)
        kept = trained(noise, tmp_path / way, settings=settings)
        again = trained(noise, tmp_path / f"{way} again", settings=replace(settings, checkpoint_activations=True))
        assert not differing(kept, again)  # batch-norm statistics and all


# -- Compilation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Let `torch.compile` need no compiler; return what it counts."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch hides its own, but not from a filter that raises
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_step_computes_what_a_plain_one_does(
    checkpointing: bool, noise: ImageData, monkeypatch: pytest.MonkeyPatch, graphs: Counter[str]
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # backward passes too
    torch.manual_seed(0)
    plain = Supernet(SPACE).train()
    plain.checkpoint_activations = checkpointing
    compiled = copy.deepcopy(plain)
    assert compiled.compile_layers() == 8  # stem, embedding and head; one candidate of the first slot, two of the others
    pixels, y = noise.train.batch(torch.arange(8))
    x, found = normalise(pixels), []
    settings = replace(SETTINGS, precision="fp32", paths="fair", accumulate=2)
    for net in (plain, compiled):
        drawn = torch.Generator().manual_seed(0)
        losses = [fair_step(net, x, y, settings, drawn, 0), single_step(net, x, y, settings, drawn)]
        losses.append(mixture_step(net, x, y, settings, drawn, 1.0))
        found.append((losses, {name: p.grad for name, p in net.named_parameters()}, net.state_dict()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    # Slots of one stage share what was compiled: stem, embedding, head, mb4d of either size, mb3d; for one size of images.
    assert graphs["unique_graphs"] == 6


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch hides its own, but not from a filter that raises
def test_every_layer_of_a_compiled_supernet_is_compiled_while_it_is_trained(
    noise: ImageData, tmp_path: Path, graphs: Counter[str]
) -> None:
    from torch._dynamo import config

    # More than PyTorch compiles of one function, unless it is told to.
    many = tuple(MB4D(16, mlp_ratio=ratio) for ratio in range(1, config.recompile_limit + 2))
    space = SearchSpace("many", 8, 3, (SPACE.stages[0], StageSpace((16,), 2, 1, (*many, Identity(16)))))
    settings = replace(SETTINGS, weight_epochs=0, mixture_epochs=1, compile=True)
    net = train_supernet(space, noise, settings, 0, tmp_path / "compiled")
    # stem, embedding, head, a candidate of the first slot, those of the other one, and what is compiled to see that it works
    assert graphs["unique_graphs"] == 4 + len(many) + 1
    assert config.recompile_limit == len(many) - 1  # as it was
    before = graphs["unique_graphs"]
    plain = train_supernet(space, noise, replace(settings, compile=False), 0, tmp_path / "plain")
    assert net.state_dict().keys() == plain.state_dict().keys()
    path = space.path(space.largest)
    copied = copy.deepcopy(net)
    assert torch.equal(net(torch.zeros(2, 3, 8, 8), path), copied(torch.zeros(2, 3, 8, 8), path))
    assert graphs["unique_graphs"] == before  # what is returned is not compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch hides its own, but not from a filter that raises
def test_a_compiled_run_that_is_killed_goes_on_to_the_same_weights(
    noise: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: Counter[str]
) -> None:
    settings = replace(SETTINGS, weight_epochs=1, mixture_epochs=1, compile=True)
    whole = trained(noise, tmp_path / "whole", settings=settings)

    def save_and_die(path: Path, epoch: int, **parts: Any) -> None:
        save_checkpoint(path, epoch, **parts)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(supernet_training, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            trained(noise, tmp_path / "killed", settings=settings)
    torch._dynamo.reset()
    assert not differing(whole, trained(noise, tmp_path / "killed", settings=settings))
    assert settings.deciding()["compile"]  # another rounding may decide otherwise, so a run's folder is bound to it


def test_a_supernet_is_not_gone_on_with_in_epochs_of_another_size(noise: ImageData, tmp_path: Path) -> None:
    """By default they are of all images on a GPU, and fewer on a CPU."""
    trained(noise, tmp_path)
    with pytest.raises(
        InputError, match=r"begun on another accelerator, with epochs of 20 images, not 24: go on there, or give"
    ):
        trained(noise, tmp_path, settings=replace(SETTINGS, images_per_epoch=24))


def test_a_checkpoint_of_another_supernet_is_refused(noise: ImageData, tmp_path: Path) -> None:
    trained(noise, tmp_path)
    other = SearchSpace("other", 8, 3, (stage_space((8,), 2, 1, "mb4d", "identity"),))
    with pytest.raises(InputError, match=r"supernet\.pt"):
        train_supernet(other, noise, SETTINGS, 0, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_kept(
    noise: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Supernet.forward
    monkeypatch.setattr(Supernet, "forward", lambda *args: forward(*args) * float("nan"))
    with pytest.raises(FloatingPointError, match="epoch 1"):
        trained(noise, tmp_path)
    assert not (tmp_path / "supernet.pt").exists()


def test_mixtures_alone_train_weights_and_logits(noise: ImageData, tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = Supernet(SPACE).state_dict()  # what training begins with
    after = trained(noise, tmp_path, settings=WAYS["mixture"])
    assert all(after[f"logits.{slot}"].any() for slot in range(3))
    assert not torch.equal(before["stages.1.0.candidates.1.mlp.fc1.weight"], after["stages.1.0.candidates.1.mlp.fc1.weight"])


def test_importance_is_of_logits_only_where_mixtures_trained_them() -> None:
    net = Supernet(SPACE)
    assert logits_of(net, SETTINGS) == net.importance()
    assert logits_of(net, replace(SETTINGS, mixture_epochs=0)) is None
    assert logits_of(net, replace(SETTINGS, importance="drops")) is None
    assert logits_of(ElasticSupernet(SPACE), WAYS["elastic"]) is None


def test_logits_learn_on_mixtures_only(noise: ImageData, tmp_path: Path) -> None:
    single = SupernetSettings(weight_epochs=2, mixture_epochs=0, batch_size=8, images_per_epoch=16, accelerator="cpu")
    found = trained(noise, tmp_path / "single", settings=single)
    assert not any(found[f"logits.{slot}"].any() for slot in range(3))
    found = trained(noise, tmp_path / "mixed")
    assert all(found[f"logits.{slot}"].any() for slot in range(3))


def test_the_network_comes_back_in_eval_mode(noise: ImageData, tmp_path: Path) -> None:
    net = train_supernet(SPACE, noise, SETTINGS, 0, tmp_path)
    assert not any(module.training for module in net.modules())


# -- What is learned ---------------------------------------------------------------------------------------------------

ONE_SLOT = SearchSpace("one slot", 8, 2, (stage_space((8,), 1, 1, "mb4d", "identity"),))


class PointwiseStem(Supernet):
    """A supernet whose stem is fixed, and takes every pixel by itself: channels 0 to 3 are bright, 4 to 7 dark.

    Without blocks, the mean over positions that the head sees depends on which pixels there are, not on where.
    """

    def __init__(self, space: SearchSpace) -> None:
        super().__init__(space)
        convs = [self.stem.get_submodule(name) for name in ("conv1", "conv2")]
        with torch.no_grad():
            for conv in convs:
                assert isinstance(conv, nn.Conv2d) and conv.bias is not None
                conv.weight.zero_()
                conv.bias.zero_()
                half = len(conv.weight) // 2
                conv.weight[:, :, 1, 1] = (
                    torch.eye(2)
                    .repeat_interleave(half, 0)
                    .repeat_interleave(-(-conv.weight.shape[1] // 2), 1)[:, : conv.weight.shape[1]]
                )
            first = convs[0]
            assert isinstance(first, nn.Conv2d)
            first.weight[:, :, 1, 1] = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None]
        for parameter in self.stem.parameters():
            parameter.requires_grad = False


def patterns(where: bool) -> ImageData:
    """Black and white pixels in a chequer of single pixels or of 4 x 4: half of them white, so it takes a neighbour to
    tell. With `where` false, the classes are dark and bright noise, which any network can tell."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % 2
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    fine, coarse = (y + x) % 2, (y // 4 + x // 4) % 2
    flips = torch.randint(0, 2, (128, 1, 1), generator=generator)
    chequers = (torch.where(labels[:, None, None] == 1, fine, coarse) + flips) % 2
    speckles = torch.rand(128, 8, 8, generator=generator) < (0.3 + 0.4 * labels)[:, None, None]
    grey = chequers if where else speckles.long()
    return labelled((grey * 200 + 20).to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous(), labels, 2)


@pytest.mark.parametrize("seed", range(3))
def test_a_block_that_the_images_need_becomes_important(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernet_training, "Supernet", PointwiseStem)
    settings = SupernetSettings(weight_epochs=30, mixture_epochs=20, batch_size=32, learning_rate=0.02, accelerator="cpu")
    importance = {}
    for where in (True, False) if seed == 0 else (True,):
        data = patterns(where)
        net = train_supernet(ONE_SLOT, data, settings, seed, tmp_path / str(where))
        evaluate = Evaluator(net, data)
        assert evaluate(ONE_SLOT.largest).accuracy > 0.95
        without = evaluate(ONE_SLOT.smallest).accuracy
        assert without == 0.5 if where else without > 0.95  # the plant: chance without the block
        importance[where] = net.importance()[0]["mb4d"]
    assert importance[True] > 1  # nearly three times as often as identity
    assert importance[True] > importance.get(False, 0) + 0.3


# -- Paths and temperature ---------------------------------------------------------------------------------------------


def test_single_paths_leave_a_quarter_of_the_slots_empty() -> None:
    generator = torch.Generator().manual_seed(0)
    paths = torch.tensor([single_path(SPACE, generator) for _ in range(4000)])
    shares = [[(paths[:, slot] == choice).double().mean().item() for choice in range(3)] for slot in range(3)]
    assert shares[0] == pytest.approx([0.75, 0.25, 0], abs=0.03)  # mb4d, identity
    assert shares[1] == pytest.approx([0.375, 0.375, 0.25], abs=0.03)  # mb4d, mb3d, identity
    assert shares[2] == pytest.approx([0.375, 0.375, 0.25], abs=0.03)


# Slots of two, three and three candidates.


def test_every_candidate_of_a_slot_runs_equally_often_in_a_fair_step() -> None:
    generator = torch.Generator().manual_seed(0)
    first = Counter[int]()
    for step in range(2 * 3):
        paths = fair_paths(SPACE, step, generator)
        assert len(paths) == passes(SPACE, replace(SETTINGS, paths="fair")) == 3
        assert [sorted(path[slot] for path in paths) for slot in (1, 2)] == [[0, 1, 2]] * 2
        times = Counter(path[0] for path in paths)
        assert sorted(times.values()) == [1, 2]  # as near as two candidates come in three paths ...
        first += times
    assert first == {0: 9, 1: 9}  # ... and even over two steps
    # Which candidates meet in a path is chance.
    met = {tuple(path) for _ in range(100) for path in fair_paths(SPACE, 0, generator)}
    assert met == {(a, b, c) for a in range(2) for b in range(3) for c in range(3)}


def batch(number: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(number, 3, 8, 8, generator=generator, dtype=torch.float64)
    return pixels, torch.randint(0, 3, (number,), generator=generator)


def gradients(net: nn.Module) -> State:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_a_fair_step_adds_up_the_gradients_of_its_paths() -> None:
    torch.manual_seed(0)
    net, (x, y) = Supernet(SPACE).double(), batch()
    paths = fair_paths(SPACE, 5, torch.Generator().manual_seed(2))
    losses = [F.cross_entropy(net(x, path), y, label_smoothing=0.1) for path in paths]
    torch.stack(losses).sum().backward()
    expected = gradients(net)
    net.zero_grad()
    loss = fair_step(net, x, y, SETTINGS, torch.Generator().manual_seed(2), 5)
    assert loss.item() == pytest.approx(sum(each.item() for each in losses) / 3)
    torch.testing.assert_close(gradients(net), expected)
    assert {f"stages.1.1.candidates.{kind}.ls1.gamma" for kind in (0, 1)} <= expected.keys()


def test_an_elastic_step_adds_up_the_gradients_of_its_networks() -> None:
    torch.manual_seed(0)
    net, (x, y) = ElasticSupernet(SPACE).double(), batch()
    archs = sandwich(SPACE, torch.Generator().manual_seed(3))
    assert archs[1] == SPACE.smallest and all(arch in SPACE for arch in archs)
    taught = net(x, archs[0]).detach().softmax(1)
    largest = F.cross_entropy(net(x, archs[0]), y, label_smoothing=0.1)
    distilled = [-(taught * net(x, arch).log_softmax(1)).sum(1).mean() for arch in archs[1:]]
    (largest + sum(distilled)).backward()
    expected = gradients(net)
    net.zero_grad()
    loss = elastic_step(net, x, y, SETTINGS, torch.Generator().manual_seed(3))
    assert loss.item() == pytest.approx(largest.item())
    torch.testing.assert_close(gradients(net), expected)


@pytest.mark.parametrize("way", ["single", "fair", "elastic", "mixture"])
def test_the_parts_of_an_accumulated_step_run_one_path_and_share_its_gradients(way: str) -> None:
    settings = replace(SETTINGS, paths="single" if way == "mixture" else way, mixture_epochs=int(way == "mixture"))  # type: ignore[arg-type]
    torch.manual_seed(0)
    net = ElasticSupernet(SPACE) if way == "elastic" else Supernet(SPACE)
    net, (x, y) = net.double(), batch()

    def step(x: Tensor, y: Tensor, settings: SupernetSettings) -> Tensor:
        generator = torch.Generator().manual_seed(4)
        if way == "mixture":
            return mixture_step(net, x, y, settings, generator, 1.0)
        return weight_step(net, x, y, settings, generator, 3)

    losses = [step(x[part : part + 2], y[part : part + 2], settings) for part in (0, 2, 4)]
    expected = {name: gradient / 3 for name, gradient in gradients(net).items()}
    net.zero_grad()
    loss = step(x, y, replace(settings, accumulate=3))
    assert loss.item() == pytest.approx(sum(each.item() for each in losses) / 3)
    torch.testing.assert_close(gradients(net), expected)
    assert any(name.startswith("logits.") for name in expected) == (way == "mixture")


def test_the_largest_network_of_a_sandwich_is_each_of_the_largest_in_turn() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = Counter[tuple[str, ...]]()
    for _ in range(60):
        largest = sandwich(SPACE, generator)[0]
        assert largest.widths == (16, 16)
        seen[tuple(block.kind for stage in largest.stages for block in stage.blocks)] += 1
    # Tokens come last in their stage, so one of two is the second in either slot.
    assert seen.keys() == {("mb4d", "mb4d", "mb4d"), ("mb4d", "mb4d", "mb3d"), ("mb4d", "mb3d", "mb3d")}


def test_the_temperature_falls_by_equal_factors() -> None:
    assert [temperature(done, 8.0, 0.5) for done in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([8, 4, 2, 1, 0.5])


def test_training_takes_the_temperature_from_start_to_end(
    noise: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[float, str]] = []

    def noted(logits: Any, tau: float, generator: Any, kind: Any) -> list[Tensor]:
        taken.append((tau, kind))
        return sample_path(logits, tau, generator, kind)

    monkeypatch.setattr(supernet_training, "sample_path", noted)
    settings = SupernetSettings(
        weight_epochs=1, mixture_epochs=2, batch_size=8, images_per_epoch=24, noise="uniform", accelerator="cpu"
    )
    trained(noise, tmp_path, settings=settings)
    assert len(taken) == 6
    assert [tau for tau, _ in taken] == pytest.approx([2 * 0.25 ** (step / 5) for step in range(6)])
    assert {kind for _, kind in taken} == {"uniform"}


# -- Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("wieght_epochs: 3", "weight_epochs"),
        ("batch_size: 2.5", "batch_size must be a whole number"),
        ("batch_size: 0", "batch_size must be at least 2"),
        ("recalibration_images: 1", "recalibration_images must be at least 2"),
        ("weight_epochs: -1", "weight_epochs must not be negative"),
        ("{weight_epochs: 0, mixture_epochs: 0}", "both 0"),
        ("paths: fare", "did you mean fair"),
        ("paths: elastic", "give mixture_epochs: 0"),
        ("paths: elastic\nmixture_epochs: 0\ncompile: true", "give compile: false"),
        ("checkpoint_activations: 1", "checkpoint_activations must be true or false"),
        ("mixture_epochs: -1", "mixture_epochs must not be negative"),
        ("learning_rate: fast", "learning_rate must be a number"),
        ("learning_rate: .nan", "learning_rate must be a positive number"),
        ("noise: true", "noise must be text"),
        ("noise: gumbell", "did you mean gumbel"),
        ("score: lose", "did you mean loss"),
        ("accelerator: gpu", "allowed: auto, cpu, cuda, mps"),
        ("tau_start: 0", "tau_start must be a positive number"),
        ("tau_end: 0.0", "tau_end must be a positive number"),
        ("tau_end: .inf", "tau_end must be a positive number"),
        ("clip_norm: 0", "clip_norm must be a positive number"),
        ("learning_rate: 1e300", "learning_rate must be at most 1e+06"),
        ("weight_decay: 1e300", "weight_decay must be at most 1e+06"),
        ("image_size: 100000", "image_size must be at most 4096"),
        ("weight_decay: -0.1", "weight_decay must be"),
        ("weight_decay: .nan", "weight_decay must be"),
        ("label_smoothing: 1.0", "label_smoothing must be"),
        ("[3]", "must hold a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_in_one_line(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text + "\n")
    with pytest.raises(InputError) as refused:
        SupernetSettings.load(path)
    assert named in str(refused.value) and "\n" not in str(refused.value)


def test_settings_that_are_not_given_have_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("noise: uniform\ntau_start: 3\n")
    assert SupernetSettings.load(path) == SupernetSettings(noise="uniform", tau_start=3.0)
    assert SupernetSettings.load(None) == SupernetSettings()
    path.write_text("# all of it as it is\n")
    assert SupernetSettings.load(path) == SupernetSettings()
    path.write_text("max_params: 5e6\n")
    assert SupernetSettings.load(path).max_params == 5_000_000


def test_a_supernet_is_not_taken_for_a_network(tmp_path: Path) -> None:
    torch.save({"net": {"a": torch.ones(1)}, "within": {}}, tmp_path / "supernet.pt")
    with pytest.raises(InputError, match=r"supernet\.pt is a search's supernet.* give the weights\.safetensors beside it"):
        read_weights(tmp_path / "supernet.pt")


# -- Image size --------------------------------------------------------------------------------------------------------


def test_the_training_size_follows_the_data_within_what_the_space_allows() -> None:
    # Strides 4, 2, 2, 2: maps of 4 x 4 from 97 px on, which make ceil(97/4) = 25, 13, 7, 4.
    space = SearchSpace.load("efficientformer-s")
    assert space.smallest_image_size() == 97
    assert training_size(space, 128) == 128
    assert training_size(space, 8) == 97  # enlarged
    assert training_size(space, 500) == 224  # at most the deployed size
    assert training_size(space, 500, 97) == 97
    assert training_size(space, 8, 256) == 256  # a wish is taken as it is
    with pytest.raises(InputError, match="at least 97 px"):
        training_size(space, 128, 96)
    with pytest.raises(InputError, match="at least 97 px"):
        training_size(space.at(64), 128)
