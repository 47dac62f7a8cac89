"""Training the supernet: weights and importance by two optimizers, checkpointed each epoch and within long ones.

Sources: EfficientFormer (Li et al., NeurIPS 2022), section 4.2, for mixtures; FairNAS (Chu et al., ICCV 2021), section 3.3, for
fair paths; Universally Slimmable Networks (Yu & Huang, ICCV 2019), sections 3 and 4, for the sandwich rule and in-place
distillation. What one step does is a function for each way; each adds gradients up and leaves the optimizers alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.augmentation import seed_draws
from nas.checkpoints import CHECKPOINT_EVERY_S, load_checkpoint, save_checkpoint
from nas.curves import curves
from nas.data import ImageData, epoch_batches
from nas.parallel import ALONE, Group, connected
from nas.progress import progress, say
from nas.recipe import Recipe
from nas.settings import SupernetSettings
from nas.steps import (
    accelerator,
    check_compiler,
    check_parts,
    cosine,
    mixed_precision,
    own_draws,
    parameter_groups,
    repeated_shapes,
    say_if_hardly_compiled,
    set_layer_scale,
    training_batches,
)
from nas.stopping import stopping
from nas.taylor import Method
from supernet.arch import ArchConfig
from supernet.elastic import ElasticSupernet, widest
from supernet.errors import InputError
from supernet.metapath import Choice, Supernet, sample_path
from supernet.space import SearchSpace
from supernet.weights import AnySupernet

IDENTITY_SHARE = 0.25  # of sampled slots are empty while weights warm up on single paths
MIXTURE_IMAGES = 1024  # an epoch of the mixture sees at least, or all that there are
VARIANTS = 8  # of a layer that may be compiled: as many as PyTorch allows for a function
MIXTURE_COST = 3  # single paths that a mixture takes as long as, for the time left


def training_size(space: SearchSpace, data_size: int, wanted: int = 0) -> int:
    """Return the image size to train a supernet at: the data's, or the next that the space takes (the last map at least
    4x4), and at most the deployed size. `wanted` (not 0) is taken as it is.

    Raises:
        InputError: the space does not take the size that results.
    """
    size = wanted or min(space.smallest_image_size(data_size), space.image_size)
    space.at(size).check_searchable()
    return size


def epoch_size(settings: SupernetSettings, data: ImageData) -> int:
    """Return how many images an epoch sees: those asked for, else all on a GPU, 6,000 at most on a CPU."""
    on_cpu = accelerator(settings.accelerator).type == "cpu"
    return settings.images_per_epoch or (min(6000, len(data.train)) if on_cpu else len(data.train))


def short_recipe(settings: SupernetSettings, data: ImageData, epochs: int, rate: float) -> Recipe:
    """Return how a search trains a network that has its weights: as its supernet, at the share `rate` of the learning rate."""
    return Recipe(
        epochs=epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate * rate,
        layer_scale=settings.layer_scale,  # of no account: the weights have their own
        clip_norm=settings.clip_norm,
        weight_decay=settings.weight_decay,
        label_smoothing=settings.label_smoothing,
        images_per_epoch=epoch_size(settings, data),
        accelerator=settings.accelerator,
        precision=settings.precision,
        accumulate=settings.accumulate,
        compile=settings.compile,
    )


def temperature(done: float, start: float, end: float) -> float:
    """Return the temperature after the share `done` (0 to 1) of the mixture's steps: geometric from start to end."""
    return start * (end / start) ** done


def single_path(space: SearchSpace, generator: torch.Generator) -> list[int]:
    """Return a random single path: a quarter of the slots empty, the other candidates equally often."""
    path = []
    for stage, _ in space.slots:
        kinds = space.stages[stage].kinds
        shares = [IDENTITY_SHARE if k == "identity" else (1 - IDENTITY_SHARE) / (len(kinds) - 1) for k in kinds]
        path.append(int(torch.multinomial(torch.tensor(shares), 1, generator=generator)))
    return path


def fair_paths(space: SearchSpace, step: int, generator: torch.Generator) -> list[list[int]]:
    """Return the single paths of a step, as many as the slot with the most candidates has, in which every candidate of a slot
    stands equally often.

    A slot whose number of candidates n does not divide that of the paths has some of them once more than others; which, turns
    from step to step, so that they are even after n steps. `step` counts from 0.
    """
    number = max(len(stage.candidates) for stage in space.stages)
    columns = []
    for stage, _ in space.slots:
        n = len(space.stages[stage].candidates)
        turns = [(step * number + turn) % n for turn in range(number)]
        columns.append([turns[at] for at in torch.randperm(number, generator=generator)])
    return [list(path) for path in zip(*columns, strict=True)]


def sandwich(space: SearchSpace, generator: torch.Generator) -> list[ArchConfig]:
    """Return the networks of a step by the sandwich rule: a largest, the smallest, two random ones.

    A largest network has every stage at its largest width and no slot empty; where blocks of several kinds are a slot's
    largest, one is drawn, so that all of them are trained as the largest.
    """
    rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
    kinds = [[rng.choice(widest(stage)) for _ in range(stage.depth)] for stage in space.stages]
    largest = space.arch([stage.widths[-1] for stage in space.stages], kinds)
    return [largest, space.smallest, space.sample(rng), space.sample(rng)]


def logits_of(net: AnySupernet, settings: SupernetSettings) -> list[dict[str, float]] | None:
    """Return, for every slot, each candidate's log-odds against identity by the logits; None where importance is to come from
    the drops of single changes: where the settings ask for it, and where no mixture trained the logits."""
    if settings.importance == "drops" or not settings.mixture_epochs or not isinstance(net, Supernet):
        return None
    return net.importance()


def channel_method(settings: SupernetSettings) -> Method:
    """Return how the channels of a narrowed stage are chosen."""
    if settings.channels == "auto":
        return "first" if settings.paths == "elastic" else "taylor"
    return settings.channels


def passes(space: SearchSpace, settings: SupernetSettings) -> int:
    """Return how many networks an image goes through in a step of the weight epochs."""
    fair = max(len(stage.candidates) for stage in space.stages)
    return {"single": 1, "fair": fair, "elastic": 4}[settings.paths]


def single_step(net: Supernet, x: Tensor, y: Tensor, settings: SupernetSettings, generator: torch.Generator) -> Tensor:
    """Add the gradients of one random path to those that the weights have; return its loss."""
    return _backward(net, x, y, single_path(net.space, generator), settings)


def fair_step(net: Supernet, x: Tensor, y: Tensor, settings: SupernetSettings, generator: torch.Generator, step: int) -> Tensor:
    """Add the gradients of the step's fair paths, one after the other; return the mean of their losses."""
    losses = [_backward(net, x, y, path, settings) for path in fair_paths(net.space, step, generator)]
    return torch.stack(losses).mean()


def elastic_step(net: ElasticSupernet, x: Tensor, y: Tensor, settings: SupernetSettings, generator: torch.Generator) -> Tensor:
    """Add the gradients of the networks of `sandwich`, one after the other; return the loss of the first.

    The largest learns from the labels, the others from its probabilities on the same images, as they are.
    """
    largest, *others = sandwich(net.space, generator)
    losses = []
    for part, labels in _parts(x, y, settings):
        with mixed_precision(x.device, settings.precision):
            logits = net(part, largest)
            loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
            taught = logits.detach().float().softmax(1)
        (loss / settings.accumulate).backward()
        losses.append(loss.detach())
        for arch in others:
            with mixed_precision(x.device, settings.precision):
                distilled = F.cross_entropy(net(part, arch), taught)
            (distilled / settings.accumulate).backward()
    return torch.stack(losses).mean()


def weight_step(
    net: AnySupernet, x: Tensor, y: Tensor, settings: SupernetSettings, generator: torch.Generator, step: int
) -> Tensor:
    """Add the gradients of a step of the weight epochs, in the way that the settings say; return its loss."""
    if isinstance(net, ElasticSupernet):
        return elastic_step(net, x, y, settings, generator)
    if settings.paths == "fair":
        return fair_step(net, x, y, settings, generator, step)
    return single_step(net, x, y, settings, generator)


def mixture_step(
    net: AnySupernet, x: Tensor, y: Tensor, settings: SupernetSettings, generator: torch.Generator, tau: float
) -> Tensor:
    """Add the gradients of a mixture of all candidates, of weights and logits; return its loss."""
    assert isinstance(net, Supernet)  # the settings refuse mixtures of an elastic one
    return _backward(net, x, y, sample_path(list(net.logits), tau, generator, settings.noise), settings)


def _backward(net: Supernet, x: Tensor, y: Tensor, path: Sequence[Choice], settings: SupernetSettings) -> Tensor:
    # A mixture's weights are drawn once: the parts add up their gradients, which then reach the logits.
    shared = [choice.detach().requires_grad_() if isinstance(choice, Tensor) else choice for choice in path]
    losses = []
    for part, labels in _parts(x, y, settings):
        with mixed_precision(x.device, settings.precision):
            loss = F.cross_entropy(net(part, shared), labels, label_smoothing=settings.label_smoothing)
        (loss / settings.accumulate).backward()
        losses.append(loss.detach())
    if drawn := [choice for choice in path if isinstance(choice, Tensor)]:
        torch.autograd.backward(drawn, [leaf.grad for leaf in shared if isinstance(leaf, Tensor)])
    return torch.stack(losses).mean()


def _parts(x: Tensor, y: Tensor, settings: SupernetSettings) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the equal parts in which a process's images of a step go through the supernet."""
    return zip(x.chunk(settings.accumulate), y.chunk(settings.accumulate), strict=True)


@dataclass
class _Within:
    """The part of a checkpoint that tells where within an epoch it is of."""

    sizes: list[int]
    """The images of each epoch, which by default follow the accelerator."""
    losses: list[Tensor] = field(default_factory=list)
    """Of the steps of the epoch under way, the mean over the processes."""
    generator: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.uint8))
    """The state of the generator that the next step draws with."""

    def state_dict(self) -> dict[str, Any]:
        within = {"losses": [loss.item() for loss in self.losses], "generator": self.generator} if self.losses else {}
        return {"sizes": self.sizes, **within}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        begun = state_dict["sizes"]
        if begun != self.sizes:
            raise InputError(
                f"this supernet was begun on another accelerator, with epochs of {begun[0]} images, not {self.sizes[0]}: go on "
                "there, or give another --out; images_per_epoch in --config makes them the same everywhere"
            )
        self.losses = [torch.tensor(loss) for loss in state_dict.get("losses", [])]
        self.generator = state_dict.get("generator", self.generator)


def _check_finite(net: nn.Module, within: _Within, step: int, where: str, checkpoint: Path) -> list[float]:
    """Return the losses of the epoch under way; raise FloatingPointError where one of them, or a weight, is not finite."""
    losses = [loss.item() for loss in within.losses]
    wrong = next((at for at, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if wrong is None and all(parameter.isfinite().all() for parameter in net.parameters()):
        return losses
    at = step - len(losses) + 1 + wrong if wrong is not None else step
    raise FloatingPointError(
        f"the supernet's loss is not finite at step {at}, {where}: lower learning_rate in --config, with another --out"
        + (f"; {checkpoint} holds weights of before" if checkpoint.exists() else "")
    )


def _compiling(layers: int) -> contextlib.AbstractContextManager[None]:
    """Return the context in which this many layers may be compiled, each for a few strides, modes and sizes of its input.

    Layers of one class share their code, and of one code PyTorch compiles 8 variants, after which it silently compiles no more.
    """
    if not layers:
        return contextlib.nullcontext()
    from torch._dynamo import config

    most = max(VARIANTS * layers, config.recompile_limit)
    return config.patch(recompile_limit=most, accumulated_recompile_limit=max(most, config.accumulated_recompile_limit))  # type: ignore[no-any-return]


def epoch_sizes(settings: SupernetSettings, data: ImageData) -> list[int]:
    """Return the images of each epoch: those of the weights, then those of mixtures."""
    per_epoch = epoch_size(settings, data)
    in_mixture = min(per_epoch, max(MIXTURE_IMAGES, per_epoch // 4))
    return [per_epoch] * settings.weight_epochs + [in_mixture] * settings.mixture_epochs


def check_trainable(settings: SupernetSettings, data: ImageData, group: Group) -> torch.device:
    """Return the device that a supernet is trained on; refuse settings that it cannot be trained by, before anything is.

    Raises:
        InputError: the accelerator is not there, a step's images make no equal parts, or nothing can be compiled here.
    """
    device = group.device(accelerator(settings.accelerator))
    for size in set(epoch_sizes(settings, data)):
        rows = group.rows(min(settings.batch_size, size))
        check_parts(rows.stop - rows.start, settings.accumulate)
    if settings.compile:
        check_compiler(device)
    return device


def train_supernet(
    space: SearchSpace, data: ImageData, settings: SupernetSettings, seed: int, folder: Path, group: Group = ALONE
) -> AnySupernet:
    """Train the supernet of `space` (at the size of `data`) and return it, in eval mode: an ElasticSupernet for
    `paths: elastic`, else a Supernet.

    A checkpoint is written to `folder/supernet.pt` after each epoch, and every ten minutes in a long one; the next call with
    the same arguments goes on from it, to the same weights as if it had never stopped. On CPUs, on one machine with one number
    of threads, the same seed gives the same weights; on a GPU they are the same up to rounding. The processes of a `group` all
    call this, and each has its rows of every batch; they run the same networks, so they have gradients of the same parameters.

    Raises:
        KeyboardInterrupt: a signal has stopped it, after a step that the checkpoint has.
    """

    group.alike(
        {
            "space": space.to_yaml(),
            "settings": settings.deciding(),
            "seed": seed,
            "data_fingerprint": data.fingerprint,
            "training_images": len(data.train),
        }
    )

    sizes = epoch_sizes(settings, data)

    def untrained() -> AnySupernet:
        device = check_trainable(settings, data, group)
        torch.manual_seed(seed)
        net = ElasticSupernet(space) if settings.paths == "elastic" else Supernet(space)
        net.checkpoint_activations = settings.checkpoint_activations
        set_layer_scale(net, settings.layer_scale)
        return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    net = group.agreed(untrained)
    device = next(net.parameters()).device
    group.synchronised(net)
    compiled = net.compile_layers() if settings.compile and isinstance(net, Supernet) else 0
    if isinstance(net, ElasticSupernet) and group.size > 1:
        net.convert_layers(group.synchronised)  # its layers run in modules that are built as they are needed
    named = [(n, p) for n, p in net.named_parameters() if not n.startswith("logits.")]
    weights = torch.optim.AdamW(parameter_groups(iter(named), settings.weight_decay), lr=settings.learning_rate)
    optimizers: dict[str, torch.optim.Optimizer] = {"weights": weights}
    if isinstance(net, Supernet):
        optimizers["logits"] = torch.optim.Adam(net.logits, lr=settings.logit_learning_rate, betas=(0.5, 0.999))
    epochs = len(sizes)
    steps_of = [max(1, size // settings.batch_size) for size in sizes]
    costs = [passes(space, settings)] * settings.weight_epochs + [MIXTURE_COST] * settings.mixture_epochs
    steps, mixture_steps = sum(steps_of), sum(steps_of[settings.weight_epochs :])
    checkpoint = folder / "supernet.pt"
    within = _Within(sizes)
    parts = {"net": net, **optimizers, "within": within}
    first = load_checkpoint(checkpoint, group, **parts)
    begun = sum(steps_of[:first])
    step = begun + len(within.losses)
    networks = f" through {passes(space, settings)} networks each" if passes(space, settings) > 1 else ""
    if first < epochs:
        say(
            f"training the supernet of {space.name} at {space.image_size} px on {len(data.train):,} images: "
            f"{steps - mixture_steps} steps of {settings.batch_size}{networks}, then {mixture_steps} of mixtures, on "
            f"{device.type}{f', in {group.size} processes' if group.size > 1 else ''}"
        )
        if compiled:
            say_if_hardly_compiled(net)
    indices_of_all = (
        indices
        for epoch in range(first, epochs)
        for indices in epoch_batches(len(data.train), settings.batch_size, seed, epoch, sizes[epoch])
    )
    order = itertools.islice(indices_of_all, len(within.losses), None)
    generator = torch.Generator()
    batches = training_batches(data, order, generator, device, group)
    work = [steps_in * cost for steps_in, cost in zip(steps_of, costs, strict=True)]
    known = sum(work[:first]) + (len(within.losses) * costs[first] if within.losses else 0)
    saved = time.monotonic()
    with (
        progress("supernet", sum(work), known) as tick,
        curves(folder, begun) as draw,
        connected(),
        own_draws(device),
        _compiling(compiled),
        repeated_shapes(device) if isinstance(net, Supernet) else contextlib.nullcontext(),  # not where widths are drawn
    ):
        for epoch in range(first, epochs):
            generator.manual_seed(seed * 1_000_003 + epoch)
            if within.losses:
                generator.set_state(within.generator)
            net.train()
            with stopping(group) as asked:
                for x, y in itertools.islice(batches, steps_of[epoch] - len(within.losses)):
                    seed_draws(seed, epoch, len(within.losses), group)
                    for parameters in weights.param_groups:
                        parameters["lr"] = settings.learning_rate * cosine(step, steps)
                    for optimizer in optimizers.values():
                        optimizer.zero_grad(set_to_none=True)
                    if epoch < settings.weight_epochs:
                        loss = weight_step(net, x, y, settings, generator, step)
                    else:
                        done = (step - (steps - mixture_steps)) / max(1, mixture_steps - 1)
                        tau = temperature(min(1.0, done), settings.tau_start, settings.tau_end)
                        loss = mixture_step(net, x, y, settings, generator, tau)
                    group.average_gradients(net.parameters())
                    group.average_statistics(net)
                    nn.utils.clip_grad_norm_((parameter for _, parameter in named), settings.clip_norm)
                    for optimizer in optimizers.values():
                        optimizer.step()  # what has no gradient stays as it is: the logits but in mixtures
                    within.losses.append(group.mean(loss))
                    step += 1
                    tick(costs[epoch])
                    last, stop = len(within.losses) == steps_of[epoch], asked()
                    if group.first and not last and (stop or time.monotonic() - saved >= CHECKPOINT_EVERY_S):
                        _check_finite(net, within, step, f"in epoch {epoch + 1} of {epochs}", checkpoint)
                        within.generator = generator.get_state()
                        save_checkpoint(checkpoint, epoch, **parts)
                        saved = time.monotonic()
                    if stop and not last:
                        raise KeyboardInterrupt
                of_batches = _check_finite(net, within, step, f"in epoch {epoch + 1} of {epochs}", checkpoint)
                curve = "supernet/loss" if epoch < settings.weight_epochs else "supernet/mixture_loss"
                draw({curve: enumerate(of_batches, step - len(of_batches) + 1)})
                within.losses.clear()
                if group.first:
                    save_checkpoint(checkpoint, epoch + 1, **parts)
                    saved = time.monotonic()
    if group.size > 1 or compiled:
        # Without SyncBatchNorm, which would wait for the others in a search, and with layers that may be copied.
        trained, net = net.state_dict(), untrained()
        net.load_state_dict(trained)
    return net.eval()
