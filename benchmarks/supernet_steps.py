"""What does a step of a supernet cost beside the networks that it is made of? Ratios within one run.

    python benchmarks/supernet_steps.py --space efficientformer-tiny --batch 64 --image-size 32

A step is forward and backward of one batch in train mode, as `nas-search` trains (channels last; bf16 autocast on a GPU).
Compared are: a mixture with all of its layers and candidates, run one by one (goal: at most 1.15 times as long); a sampled path
of the MetaPath supernet with the same network of `build_model` (goal: at most 1.1); networks of the elastic supernet with the
same of `build_model`; and steps with activation checkpointing with those without. The two of a comparison run one after the
other, in either order; comparisons take turns in shuffled rounds. A ratio is the median of the rounds' ratios, with quartiles.
The optimizer's step is timed apart.

Peak memory is that of each step in a process of its own, above what the process took before: on a CPU by its highest resident
set size (Unix only), on a GPU by `torch.cuda.max_memory_allocated`.
"""

import argparse
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.steps import accelerator, mixed_precision, parameter_groups, set_layer_scale
from supernet.arch import ArchConfig
from supernet.blocks import build_layer
from supernet.elastic import ElasticSupernet
from supernet.metapath import Supernet, sample_path
from supernet.model import build_model
from supernet.space import SearchSpace
from supernet.specs import Identity, Layer

MIXTURE, ONE_BY_ONE = "mixture", "its candidates one by one"
PATH, ALONE = "sampled path", "the same network alone"
ELASTIC, LARGEST, LARGEST_ALONE = "the same, elastic", "largest, elastic", "largest alone"
CHECKPOINTED = ", activations checkpointed"
RATIOS = (  # what, beside what, goal
    (MIXTURE, ONE_BY_ONE, 1.15),
    (PATH, ALONE, 1.1),
    (ELASTIC, ALONE, None),
    (LARGEST, LARGEST_ALONE, None),
    (MIXTURE + CHECKPOINTED, MIXTURE, None),
    (LARGEST + CHECKPOINTED, LARGEST, None),
)
NAMES = tuple(dict.fromkeys(name for what, beside, _ in RATIOS for name in (what, beside)))

Times = dict[str, list[float]]
"""Milliseconds of every run, by what ran."""


@dataclass(frozen=True)
class Setup:
    """What is measured on: a space at an image size, images a batch, a device."""

    space: SearchSpace
    batch: int
    device: torch.device
    seed: int
    clock: str = "wall"

    def images(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.batch, 3, self.space.image_size, self.space.image_size, generator=generator)
        y = torch.randint(0, self.space.num_classes, (self.batch,), generator=generator)
        return x.contiguous(memory_format=torch.channels_last).to(self.device), y.to(self.device)

    def sampled(self) -> ArchConfig:
        """A random network of the largest widths, the same for all that run one."""
        arch = self.space.sample(random.Random(self.seed))
        kinds = [[s.kind_of(b) for b in stage.blocks] for s, stage in zip(self.space.stages, arch.stages, strict=True)]
        return self.space.arch([stage.widths[-1] for stage in self.space.stages], kinds)

    def ready(self, module: nn.Module) -> nn.Module:
        set_layer_scale(module, 0.5)
        return module.to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]


def step_of(what: str, setup: Setup) -> tuple[nn.Module, Callable[[], None]]:
    """Return what a step trains, and the step: forward and backward."""
    torch.manual_seed(setup.seed)
    space = setup.space
    name = what.removesuffix(CHECKPOINTED)
    if name == ONE_BY_ONE:
        return _one_by_one(setup)
    if name in (ALONE, LARGEST_ALONE):
        arch = setup.sampled() if name == ALONE else space.largest
        alone = setup.ready(build_model(arch))
        return alone, _trained(setup, alone)
    if name in (ELASTIC, LARGEST):
        elastic = setup.ready(ElasticSupernet(space))
        elastic.checkpoint_activations = name != what
        return elastic, _trained(setup, partial(elastic, arch=setup.sampled() if name == ELASTIC else space.largest))
    supernet = setup.ready(Supernet(space))
    assert isinstance(supernet, Supernet)
    supernet.checkpoint_activations = name != what
    if name == PATH:
        return supernet, _trained(setup, partial(supernet, path=space.path(setup.sampled())))
    generator = torch.Generator().manual_seed(setup.seed)
    return supernet, _trained(setup, lambda x: supernet(x, sample_path(list(supernet.logits), 1.0, generator)))


def _trained(setup: Setup, forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    x, y = setup.images()

    def step() -> None:
        with mixed_precision(setup.device):
            loss = F.cross_entropy(forward(x), y)
        loss.backward()

    return step


def _one_by_one(setup: Setup) -> tuple[nn.Module, Callable[[], None]]:
    """Every layer and candidate of the supernet, each on an input of its own as it is in a built network."""
    space = setup.space
    layers = [layer for name, layer in space.largest.named_layers() if name in ("stem", "head") or "embedding" in name]
    for stage, _ in space.slots:
        candidates = [c for c in space.stages[stage].candidates if not isinstance(c, Identity)]
        layers += [Layer(candidate, space.resolutions[stage]) for candidate in candidates]
    modules = setup.ready(nn.ModuleList(build_layer(layer) for layer in layers))
    inputs = []
    for layer in layers:
        x = torch.randn(layer.entering.shape(setup.batch), device=setup.device)
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        inputs.append(x.requires_grad_(layer.entering.form != "image"))

    def step() -> None:
        for module, x in zip(modules.children(), inputs, strict=True):
            x.grad = None
            with mixed_precision(setup.device):
                y = module(x)
            y.backward(torch.ones_like(y))

    return modules, step


def finish(device: torch.device) -> None:
    """Wait until an accelerator has done what it was told: it goes on while the host does."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(setup: Setup, run: Callable[[], object]) -> float:
    """Return the milliseconds that a call takes."""
    now = time.perf_counter if setup.clock == "wall" else time.process_time
    finish(setup.device)
    began = now()
    run()
    finish(setup.device)
    return 1000 * (now() - began)


def visit(setup: Setup, rounds: int) -> tuple[Times, Times, dict[tuple[str, str], list[float]]]:
    """Return the milliseconds of all steps, and of the optimizer's steps after them, and the ratios of each comparison."""
    parts = {}
    for name in NAMES:
        trained, step = step_of(name, setup)
        parts[name] = (step, torch.optim.AdamW(parameter_groups(trained.named_parameters(), 0.025), lr=1e-6))
    steps, optimizers = {name: [] for name in NAMES}, {name: [] for name in NAMES}
    pairs = [(what, beside) for what, beside, _ in RATIOS]
    ratios: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    rng = random.Random(setup.seed)
    for number in range(rounds + 1):
        for pair in rng.sample(pairs, len(pairs)):
            taken = {}
            for name in rng.sample(pair, 2):
                step, optimizer = parts[name]
                optimizer.zero_grad(set_to_none=True)
                taken[name] = timed(setup, step), timed(setup, optimizer.step)
            if number:  # the first round warms up
                ratios[pair].append(taken[pair[0]][0] / taken[pair[1]][0])
                for name, (step_ms, optimizer_ms) in taken.items():
                    steps[name].append(step_ms)
                    optimizers[name].append(optimizer_ms)
    return steps, optimizers, ratios


def peak_bytes(name: str, setup: Setup) -> int:
    """Return how much memory two steps take at most, above what was taken before."""
    trained, step = step_of(name, setup)
    if setup.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = _resident()
    for _ in range(2):
        trained.zero_grad(set_to_none=True)
        step()
    return (torch.cuda.max_memory_allocated() if setup.device.type == "cuda" else _resident()) - before


def _resident() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def spread(values: Sequence[float], digits: int) -> str:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="efficientformer-tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--accelerator", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, beside others")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error("--rounds must be at least 2")
    if given.clock == "cpu" and accelerator(given.accelerator).type != "cpu":
        parser.error("--clock cpu counts no accelerator's time: give --accelerator cpu, or leave the clock out")
    space = SearchSpace.load(given.space).at(given.image_size)
    space.check_searchable()
    setup = Setup(space, given.batch, accelerator(given.accelerator), given.seed, given.clock)

    # First, while this process is small: some systems count a parent's memory as its child's.
    memory: dict[str, str] = {}
    if sys.platform != "win32" and setup.device.type != "mps":
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            memory = {name: f"{pool.apply(peak_bytes, (name, setup)) / 2**20:.0f}" for name in NAMES}
    steps, optimizers, ratios = visit(setup, given.rounds)

    on_gpu = setup.device.type == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"{setup.device.type}, {torch.get_num_threads()} threads"
    measure = "torch.cuda.max_memory_allocated" if on_gpu else "highest resident set size"
    with mixed_precision(setup.device):
        precision = "bf16" if torch.is_autocast_enabled(setup.device.type) else "fp32"
    size = f"batches of {setup.batch} at {space.image_size} px"
    print(f"{space.name}, {size}, {where}, {precision}, torch {torch.__version__}")
    print(f"medians of {given.rounds} rounds (quartiles) in {given.clock} time; peak memory above the start: {measure}")
    print("\n| step | ms, forward and backward | ms, optimizer | peak MiB |\n|---|---|---|---|")
    for name in NAMES:
        print(f"| {name} | {spread(steps[name], 1)} | {spread(optimizers[name], 1)} | {memory.get(name, '')} |")
    print("\n| step | beside | ratio | goal |\n|---|---|---|---|")
    for what, beside, goal in RATIOS:
        found = ratios[what, beside]
        verdict = "" if goal is None else f"{goal:g}: {'met' if statistics.median(found) <= goal else 'MISSED'}"
        print(f"| {what} | {beside} | {spread(found, 3)} | {verdict} |")


if __name__ == "__main__":
    main()
