"""Two processes train what one trains; killed ones go on as if nothing had been; what is refused ends all of them."""

import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_together import ARCH, RECIPE, SEARCHES, SETTINGS, SPACE, exactly, in_double, killed, main, pictures

from nas import supernet_training, training
from nas.checkpoints import save_checkpoint
from nas.data import augment
from nas.parallel import ALONE, Group, own_device
from nas.supernet_training import train_supernet
from nas.training import train_network
from supernet.arch import MultiplexSpec
from supernet.errors import InputError

TESTS = Path(__file__).parent
SUPERNETS = ["supernet", "fair", "elastic", "accumulated supernet", "accumulated elastic"]

pytestmark = pytest.mark.skipif(
    sys.platform in ("win32", "darwin"), reason="processes are forked here, which is safe on Linux alone"
)


def child(rank: int, number: int, port: int, folder: Path, what: str) -> None:
    os.environ.update(
        WORLD_SIZE=str(number), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    said = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    warnings.simplefilter("default")
    main(folder, what)


def ended(folder: Path, what: str, number: int = 2) -> list[int]:
    """Run processes as torchrun does; return their exit codes. What each says is in `said-<rank>`."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forking = multiprocessing.get_context("fork")  # torch is imported already
    processes = [forking.Process(target=child, args=(rank, number, port, folder, what)) for rank in range(number)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, of which this process has none that hold locks
        for process in processes:
            process.start()
    try:
        for process in processes:
            process.join(120)
        return [process.exitcode if process.exitcode is not None else 99 for process in processes]
    finally:
        for process in processes:
            process.kill()


def said(folder: Path, rank: int) -> list[str]:
    return [line for line in (folder / f"said-{rank}").read_text().splitlines() if "gloo" not in line.lower()]


# -- The same numbers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one process and what two have found."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    assert ended(two, "exactly") == [0, 0], said(two, 0) + said(two, 1)
    assert said(two, 1) == []
    exactly(one)
    return torch.load(one / "found.pt"), torch.load(two / "found.pt")


@pytest.mark.parametrize("training", [*SUPERNETS, "network", "accumulated"])
def test_two_processes_take_the_steps_that_one_takes(training: str, both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = (found[training] for found in both)
    assert len(one["gradients"]) == len(two["gradients"]) > 1
    for step, (alone, together) in enumerate(zip(one["gradients"], two["gradients"], strict=True)):
        assert alone.keys() == together.keys(), "the same parts of the network ran"
        for name, gradient in alone.items():
            assert gradient.dtype == torch.float64
            assert torch.allclose(gradient, together[name], rtol=0, atol=1e-9), (step, name)
        assert max(gradient.abs().max() for gradient in alone.values()) > 1e-3
    for name, weight in one["weights"].items():
        assert torch.allclose(weight, two["weights"][name], rtol=0, atol=1e-9), name
    if "outputs" in one:
        assert torch.allclose(one["outputs"], two["outputs"], rtol=0, atol=1e-9)


def test_two_processes_distil_blocks_as_one_does(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = (found["distilled"]["weights"] for found in both)
    assert {".".join(name.split(".")[:5]) for name in one} == {f"stages.1.{slot}.candidates.0" for slot in (0, 1)}
    assert one.keys() == two.keys() and any("running_var" in name for name in one)
    for name, weight in one.items():
        assert torch.allclose(weight, two[name], rtol=0, atol=1e-9), name


def test_both_optimizers_of_a_supernet_have_taken_steps(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    weights = both[1]["supernet"]["weights"]
    assert all(weight.any() for name, weight in weights.items() if name.startswith("logits."))
    assert any(name.startswith("logits.") for name in weights)


@pytest.mark.parametrize("what", SEARCHES)
def test_a_search_trains_its_supernet_in_all_processes(what: str, tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    assert ended(two, what) == [0, 0], said(two, 0)
    assert said(two, 0) and said(two, 1) == []
    one.mkdir()
    with in_double([]):
        SEARCHES[what](one)
    alone, together = (torch.load(folder / "net.pt") for folder in (one, two))
    assert alone.keys() == together.keys()
    for name in (name for name, tensor in alone.items() if tensor.is_floating_point()):  # the double counts no batches
        assert torch.allclose(alone[name], together[name], rtol=0, atol=1e-9), name


def test_rows_divide_a_batch_and_keep_pairs_together() -> None:
    parts = [Group(rank, 3).rows(12) for rank in range(3)]
    assert [list(range(12))[part] for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert ALONE.rows(7) == slice(0, 7)
    for batch in (4, 9, 10, 15):
        with pytest.raises(
            InputError, match=rf"batch of {batch} .* 3 processes in pairs: give a batch_size that is a multiple of 6"
        ):
            Group(0, 3).rows(batch)


def test_a_part_of_a_batch_is_augmented_as_in_the_whole() -> None:
    x = torch.rand(8, 3, 16, 16)
    whole = augment(x, torch.Generator().manual_seed(0))
    for part in (slice(0, 4), slice(4, 8)):
        found = augment(x[part], torch.Generator().manual_seed(0), part=(part, 8))
        assert torch.equal(found, whole[part])


@pytest.mark.parametrize("accumulate", [4, 6])
def test_parts_of_a_batch_are_equal_and_more_than_one_image(tmp_path: Path, accumulate: int) -> None:
    with pytest.raises(InputError, match=rf"accumulate {accumulate} does not divide the 6 images"):
        train_network(ARCH, pictures(16), replace(RECIPE, batch_size=6, accumulate=accumulate), tmp_path, 0)
    with pytest.raises(InputError, match=rf"accumulate {accumulate} does not divide the 6 images"):
        train_supernet(SPACE, pictures(8), replace(SETTINGS, batch_size=6, accumulate=accumulate), 0, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_images_of_a_group_stay_together(tmp_path: Path) -> None:
    arch = replace(ARCH, head="layer_norm", mux=MultiplexSpec(4))
    with pytest.raises(InputError, match=r"takes 4 images at once, .* 8 .* parts of 2: .* a multiple of 16$"):
        train_network(arch, pictures(16), replace(RECIPE, accumulate=4), tmp_path, 0)
    with pytest.raises(InputError, match=r"takes 4 images at once, which mixup and cutmix would mix with each other: give a"):
        train_network(arch, pictures(16), replace(RECIPE, cutmix=1.0), tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def test_processes_do_not_train_together_on_apple_s_gpu() -> None:
    mps = torch.device("mps")
    assert Group(0, 1).device(mps) == mps
    with pytest.raises(InputError, match=r"^PyTorch exchanges nothing between processes on Apple's GPU: start one process, or"):
        Group(0, 2).device(mps)


@pytest.mark.parametrize(("here", "refused"), [("2", False), ("3", True)])
def test_every_process_of_a_machine_has_a_gpu_of_its_own(here: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    if not refused:
        assert own_device("cuda") == torch.device("cuda", 1)
        return
    with pytest.raises(InputError, match=r"^3 processes on this machine, but 2 GPUs: give torchrun --nproc-per-node 2$"):
        own_device("cuda")


def test_a_mixture_that_cannot_be_divided_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def rows(group: Group, batch: int) -> slice:
        asked.append(batch)
        if batch == 9:
            raise InputError("9 cannot be divided")
        return slice(0, batch)

    monkeypatch.setattr(Group, "rows", rows)
    monkeypatch.setattr(supernet_training, "MIXTURE_IMAGES", 9)
    with pytest.raises(InputError, match=r"^9 cannot"):
        train_supernet(SPACE, pictures(8), replace(SETTINGS, batch_size=12, images_per_epoch=32), 0, tmp_path)
    assert set(asked) <= {9, 12} and not (tmp_path / "supernet.pt").exists()


def test_one_process_averages_the_statistics_of_whatever_it_is_given() -> None:
    ALONE.average_statistics(torch.nn.AvgPool2d(3))  # without parameters, by which to tell its device


def test_where_nothing_can_be_compiled_the_recipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object) -> None:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(InputError, match=r"^torch.compile does not work here \(no C\+\+ compiler\): set compile to false$"):
        train_network(ARCH, pictures(16), replace(RECIPE, compile=True), tmp_path, 0)
    with pytest.raises(InputError, match=r"^torch.compile does not work here \(no C\+\+ compiler\): set compile to false$"):
        train_supernet(SPACE, pictures(8), replace(SETTINGS, compile=True), 0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_network_is_compiled_where_the_recipe_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda it: seen.append(it) or it)
    train_network(ARCH, pictures(16), replace(RECIPE, epochs=1, images_per_epoch=8, compile=True), tmp_path, 0)
    assert isinstance(seen[-1], torch.nn.Module)


def test_where_compilation_does_next_to_nothing_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On several GPUs, as their batch norm is over all of them; here that of one process is replaced by the same."""
    monkeypatch.setattr(torch, "compile", lambda it, **how: it)

    def said(folder: Path) -> list[bool]:
        train_network(ARCH, pictures(16), replace(RECIPE, epochs=1, images_per_epoch=8, compile=True), folder / "network", 0)
        train_supernet(SPACE, pictures(8), replace(SETTINGS, compile=True), 0, folder / "supernet")
        lines = capsys.readouterr().err.splitlines()
        return [line.endswith("set compile to false, or train on one GPU") for line in lines if line.startswith("compile ")]

    assert said(tmp_path / "one") == []
    convert = torch.nn.SyncBatchNorm.convert_sync_batchnorm
    monkeypatch.setattr(Group, "synchronised", lambda group, model: convert(model))
    assert said(tmp_path / "several") == [True, True]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch hides its own, but not from a filter that raises
def test_a_compiled_training_learns_what_a_plain_one_does_and_goes_on_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    recipe = replace(RECIPE, epochs=2, ema=0.9, drop_path=0.2, accumulate=2, precision="fp32", images_per_epoch=16)
    results = {
        compiled: train_network(ARCH, pictures(16), replace(recipe, compile=compiled), tmp_path / str(compiled), 0)
        for compiled in (False, True)
    }
    plain, compiled = ((tmp_path / name / "metrics.csv").read_text().splitlines()[1].split(",") for name in ("False", "True"))
    assert float(compiled[2]) == pytest.approx(float(plain[2]), rel=1e-5)
    state, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("True", "False"))
    assert state.keys() == expected.keys()
    assert results[True].loss == pytest.approx(results[False].loss, rel=0.01)

    class Killed(BaseException):
        pass

    def save_and_die(path: Path, epoch: int, **parts: Any) -> None:
        save_checkpoint(path, epoch, **parts)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            train_network(ARCH, pictures(16), replace(recipe, compile=True), tmp_path / "killed", 0)
    torch._dynamo.reset()
    train_network(ARCH, pictures(16), replace(recipe, compile=True), tmp_path / "killed", 0)
    resumed = load_file(tmp_path / "killed" / "model.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in state.items())


# -- Kills ---------------------------------------------------------------------------------------------------------------


def kills(number: int, seed: int) -> str:
    """Draw moments to die at, none of them so late that the training of twelve steps would end before the last kill."""
    rng = random.Random(seed)
    moments = [("step", 1, 3), ("file", 1, 4), ("validation", 1, 1)]
    drawn = []
    for _ in range(number):
        name, first, last = rng.choice(moments)
        drawn.append(f"{name} {rng.randint(first, last)}")
    return "\n".join(drawn)


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "run" / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def starts(folder: Path, number: int) -> int:
    """Start processes until they end by themselves; return how often that was."""
    for start in range(1, 20):
        codes = ended(folder, "killed", number)
        if codes == [0] * number:
            return start
        assert -signal.SIGKILL in codes and set(codes) <= {-signal.SIGKILL, 1}, said(folder, 0)
    raise AssertionError("it never ends")


def test_a_training_that_is_killed_five_times_equals_one_that_is_not(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    broken.mkdir()
    (broken / "kills-0").write_text(kills(5, seed=0))
    assert starts(broken, 1) == 6, "it was killed five times"
    whole.mkdir()
    killed(whole)
    assert same_weights(whole, broken)
    columns = [line.rsplit(",", 1)[0] for line in (whole / "run" / "metrics.csv").read_text().splitlines()]  # not the seconds
    assert columns == [line.rsplit(",", 1)[0] for line in (broken / "run" / "metrics.csv").read_text().splitlines()]
    assert {path.name for path in (broken / "run").iterdir() if path.is_file() and not path.name.startswith(".")} == {
        "request.json", "checkpoint.pt", "metrics.csv", "arch.yaml", "model.safetensors"
    }  # fmt: skip


def test_two_processes_of_which_one_is_killed_again_and_again_equal_two_that_are_not(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert ended(whole, "killed") == [0, 0], said(whole, 0) + said(whole, 1)
    broken.mkdir()
    (broken / "kills-1").write_text("step 3\nvalidation 1\nstep 1")
    (broken / "kills-0").write_text("file 4\nstep 2")
    assert starts(broken, 2) > 3
    assert same_weights(whole, broken)


def test_two_processes_that_are_stopped_end_their_step_and_go_on(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert ended(whole, "killed") == [0, 0]
    broken.mkdir()
    for rank in (0, 1):
        (broken / f"kills-{rank}").write_text("step 6 SIGTERM")
    assert ended(broken, "killed") == [1, 1]
    assert said(broken, 0)[-1] == "train: stopped"
    held = torch.load(broken / "run" / "checkpoint.pt", weights_only=True)
    assert (held["epoch"], len(held["history"]["losses"])) == (1, 2), "the sixth step, of four an epoch, is in it"
    assert ended(broken, "killed") == [0, 0]
    assert same_weights(whole, broken)


def test_the_one_that_is_left_says_what_has_happened(tmp_path: Path) -> None:
    tmp_path.joinpath("kills-1").write_text("step 2")
    assert ended(tmp_path, "killed") == [1, -signal.SIGKILL]
    assert said(tmp_path, 0)[-1] == "train: another process of this command has ended: the same command goes on from here"


def test_torchrun_starts_them_again_and_they_go_on(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    (broken / "kills-1").write_text("step 6")
    paths = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [*torchrun, str(TESTS / "train_together.py"), str(broken), "killed"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert ended(whole, "killed") == [0, 0]
    assert same_weights(whole, broken)


# -- Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("refused", "train: a batch of 6 images cannot be divided among 2 processes in pairs: give a batch_size that is a "
         "multiple of 4, and epochs that are no smaller"),
        ("one is refused", "train: only here: give something else"),
        ("other images", "train: process 1 of 2 has another training_images than the first one: give all machines the same "
         "command, files and images"),
        ("other seed", "train: process 1 of 2 has another seed than the first one: give all machines the same command, files "
         "and images"),
        ("in use", "nas-train: free is in use by another process"),
    ],
)  # fmt: skip
def test_what_is_refused_ends_all_with_code_2_and_one_line(tmp_path: Path, what: str, line: str) -> None:
    assert ended(tmp_path, what) == [2, 2]
    assert said(tmp_path, 0) == [line] and said(tmp_path, 1) == []
    assert not (tmp_path / "request.json").exists(), "the folder is free for the corrected request"
