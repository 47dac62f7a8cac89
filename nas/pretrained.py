"""Start a search from a network that has its weights: its blocks become the supernet's, which is then not trained at all.

Blocks that the network does not have, but might have in the place of its own, are warmed up by block-wise distillation: each is
trained alone to give what the block that it would replace gives on the same input. Source: DNA (Li et al., CVPR 2020) and
DONNA (Moons et al., ICCV 2021), whose error is the squared difference by the variance of the output, channel by channel.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from torch import Tensor, nn

from nas.about import note, other_class, read_note
from nas.augmentation import seed_draws
from nas.checkpoints import CLASSIFIER, Pretrained, load_checkpoint, load_state, load_weights, read_weights, save_checkpoint
from nas.data import IMAGENET_MEAN, IMAGENET_STD, ImageData, epoch_batches
from nas.distributed import in_all
from nas.evaluation import accuracy_of
from nas.from_timm import TIMM, timm_with_weights
from nas.parallel import ALONE, Group, connected, processes
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
    training_batches,
)
from nas.supernet_training import channel_method, epoch_size, short_recipe
from nas.taylor import calibration_batches, unit_scores
from nas.training import train_network
from supernet.arch import ArchConfig, layer_name
from supernet.blocks.vit import PatchStemModule
from supernet.errors import InputError, placed
from supernet.files import write_atomically
from supernet.metapath import MetaPath, Supernet
from supernet.model import build_model
from supernet.space import SearchSpace
from supernet.specs import EXPANSIONS, FFN, MB3D, MB4D, AttnFFN, Block, Identity, Layer, Sandwich, at_width
from supernet.units import UnitScores, cut
from supernet.weights import at_size, fill, load_timm_weights
from supernet.zoo import load_arch

WIDTHS = (1 / 2, 5 / 8, 3 / 4, 7 / 8)  # shares of a stage's width that a search may choose from
DISTILLATION_RATE = 5e-3  # AdamW's highest learning rate
ROUND = 25  # steps of distillation between two checkpoints
LEAST_VARIANCE = 1e-6  # of a channel that is as good as constant

_OURS = re.compile(r"stage\d+_")  # names in our state dicts
_THEIRS = re.compile(r"(stages|blocks|patch_embed)\.")  # in timm's and in those of the networks' authors
_THEIR_CLASSIFIERS = ("head.linear.bias", "head.l.bias", "head.bias")


def load_pretrained(network: str, weights: str, arch: ArchConfig) -> Pretrained:
    """Read the weights of `arch`, which a person calls `network`: a file of timm's, of the network's authors' or of this
    package's (a state dict, a checkpoint), or `timm:NAME` where timm is installed. Whose they are is told by their names.

    Raises:
        InputError: the file cannot be read, is nobody's of these, or does not fit the network; or timm cannot give the weights.
    """
    arch = arch.without_identity()
    cfg: Mapping[str, Sequence[float]] = {}
    if weights.startswith(TIMM):
        theirs = timm_with_weights(weights)
        given, cfg = dict(theirs.state_dict()), theirs.pretrained_cfg
    else:
        given = read_weights(Path(weights))
    source = weights if weights.startswith(TIMM) else str(Path(weights).resolve())
    names: tuple[str, ...] = tuple(read_note(weights).get("classes", ()))
    with placed(weights):
        if any(_OURS.match(name) for name in given):
            classes = given.get(CLASSIFIER[1])
            arch = arch.with_classes(arch.num_classes if classes is None else classes.numel())
            model = build_model(arch)
            load_state(model, given, weights, adapt=True)
        elif any(_THEIRS.match(name) for name in given):
            known = next((given[name] for name in _THEIR_CLASSIFIERS if name in given), None)
            arch = arch.with_classes(arch.num_classes if known is None else known.numel())
            model = build_model(arch)
            load_timm_weights(model, given)
            _renormalise(model, cfg.get("mean", IMAGENET_MEAN), cfg.get("std", IMAGENET_STD))
        else:
            found = ", ".join(list(given)[:3])
            raise InputError(
                f"these are neither timm's, its authors' nor this package's weights of {network}: they have "
                f"{found or 'nothing'}: give timm.create_model(name).state_dict(), or the model.safetensors of nas-train"
            )
    return Pretrained(arch, model.state_dict(), source, names if len(names) == arch.num_classes else ())


def _renormalise(model: nn.Sequential, mean: Sequence[float], std: Sequence[float]) -> None:
    """Make a network whose weights are of images with this mean and deviation one of images as ours are normalised, with the
    same logits. Only a convolution without padding can take the difference up.

    Raises:
        InputError: it begins with another one.
    """
    if (tuple(mean), tuple(std)) == (IMAGENET_MEAN, IMAGENET_STD):
        return
    stem = model.get_submodule("stem")
    if not isinstance(stem, PatchStemModule):
        raise InputError(
            f"these weights are of images with mean {tuple(mean)} and deviation {tuple(std)}, the network's are normalised by "
            f"{IMAGENET_MEAN} and {IMAGENET_STD}: give weights of those"
        )
    conv = stem.patch_embed.get_submodule("proj")
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    values = (IMAGENET_MEAN, IMAGENET_STD, mean, std)
    our_mean, our_std, its_mean, its_std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1) for value in values)
    with torch.no_grad():
        weight = conv.weight.double()
        conv.bias.copy_(conv.bias.double() + (weight * (our_mean - its_mean) / its_std).sum((1, 2, 3)))
        conv.weight.copy_(weight * our_std / its_std)


def starting_weights(network: str, weights: str, arch: ArchConfig) -> Path | Pretrained:
    """Return the weights that a training of `arch` starts from as `train_network` takes them: a file of this package's as its
    path, others read.

    Raises:
        InputError: as `load_pretrained`; a file of this package's is looked into by the training itself.
    """
    path = Path(weights)
    if weights.startswith(TIMM) or any(_THEIRS.match(name) for name in read_weights(path)):
        return load_pretrained(network, weights, arch)
    return path


def requested(network: str, weights: str, space: str | None, settings: SupernetSettings) -> tuple[Pretrained, SearchSpace]:
    """Return the network of `--init` with its weights, and the space that is searched from it.

    Raises:
        InputError: what is asked for does not go together, or one of the files cannot be used.
    """
    if settings.objective == "throughput":
        raise InputError("--init does not go with the objective throughput: leave one of them out")
    if settings.importance == "logits" or settings.paths == "elastic":
        raise InputError("--init trains no supernet, so that importance: logits and paths: elastic say nothing: leave them out")
    arch = load_arch(network)
    around = space_of(arch, SearchSpace.load(space) if space is not None else None)
    return load_pretrained(network, weights, arch), around


def check_init(settings: SupernetSettings, data: ImageData, group: Group) -> None:
    """Refuse settings that a given network cannot be trained by, or its replacements distilled, before anything is.

    Whether it is trained, its accuracy decides, which is not known yet.

    Raises:
        InputError: the accelerator is not there, a step's images make no equal parts, or nothing can be compiled here.
    """
    device = group.device(accelerator(settings.accelerator))
    rows = group.rows(min(settings.batch_size, epoch_size(settings, data)))
    check_parts(rows.stop - rows.start, settings.accumulate)
    if settings.distillation_steps:
        group.rows(min(settings.batch_size, len(data.train)))
    if settings.compile:
        check_compiler(device)


# -- The space ---------------------------------------------------------------------------------------------------------


def space_of(arch: ArchConfig, within: SearchSpace | None = None) -> SearchSpace:
    """Return the networks that may come of `arch`: any of its blocks removed, its attention blocks also replaced by blocks on
    maps, its largest expansions and key dimensions halved, its stages narrowed by eighths down to a half.

    With `within`, a space that the network is a member of, what may replace its blocks is that space's candidates, and how far
    its stages are narrowed that space's widths.

    Raises:
        InputError: the network groups its images, or is no member of `within`.
    """
    if arch.multiplexes:
        raise InputError(f"{arch.name} groups its images (mux), from which no search starts: give the network without mux")
    arch = replace(arch.without_identity(), mux=None)
    if within is not None:
        return _within(arch, within)
    blocks = [block for stage in arch.stages for block in stage.blocks]
    halved = [[_largest(blocks, *knobs) // 2] for knobs in (EXPANSIONS, ("key_dim",))]
    ffn_ratios, key_dims = ([value for value in values if value] for values in halved)
    around = SearchSpace.around(arch, ffn_ratios, key_dims, WIDTHS)
    stages = []
    for stage in around.stages:
        *smaller, identity = stage.candidates
        on_maps = [block for block in map(_on_map, smaller) if block is not None]
        stages.append(replace(stage, candidates=tuple(dict.fromkeys((*smaller, *on_maps, identity)))))
    return replace(around, stages=tuple(stages))


def _largest(blocks: Sequence[Block], *knobs: str) -> int:
    """Return the largest value that any of the blocks has of any of the knobs; 0 where none has one."""
    return max((getattr(block, knob) for block in blocks for knob in knobs if hasattr(block, knob)), default=0)


def _within(arch: ArchConfig, space: SearchSpace) -> SearchSpace:
    try:
        space.fit(arch)
    except InputError as error:
        raise InputError(
            f"with --init, --space must be one that the network is a member of, but {error}: leave --space out"
        ) from error
    stages = []
    for stage, choices in zip(arch.stages, space.stages, strict=True):
        candidates = tuple(at_width(c, stage.width) for c in choices.candidates)
        widths = tuple(w for w in choices.widths if w <= stage.width)
        stages.append(replace(choices, widths=widths, depth=max(1, len(stage.blocks)), candidates=candidates))
    return SearchSpace(arch.name, arch.image_size, arch.num_classes, tuple(stages), arch.head)


def _on_map(block: Block) -> Block | None:
    """Return the block on maps that may stand in the place of an attention block, with the same MLP where it has one."""
    match block:
        case MB3D():
            return MB4D(block.dim, block.mlp_ratio, act=block.act)
        case AttnFFN():
            return FFN(block.dim, block.mlp_ratio, act=block.act)
        case Sandwich():
            return MB4D(block.dim, block.ffn_ratio, act=block.act)
    return None


# -- The network on the data -------------------------------------------------------------------------------------------


def on_data(given: Pretrained, data: ImageData, settings: SupernetSettings, seed: int, folder: Path) -> nn.Sequential:
    """Return the network at the data's image size, with their classes, in eval mode: as it was given, or trained a little.

    It is trained, for `init_epochs` as a whole, where its classifier is new, because its classes are others than the data's, or
    is no better than chance: scores would mean nothing. The training is kept in `folder/init`, where the same call goes on,
    beside `given.safetensors`, the weights as they were given. `folder` then holds `teacher.yaml` and
    `teacher.safetensors`, the network at the size that it is deployed at.
    """
    device = accelerator(settings.accelerator)
    arch = given.arch.at(data.image_size).with_classes(len(data.classes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(arch)
    other = other_class(given.classes, data.classes) if len(given.classes) == len(data.classes) else ""
    load_state(model, given.state, given.source, adapt=True, other=other)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    start = folder / "init" / "given.safetensors"
    if not start.exists():
        known = note(given.classes) if given.classes else None  # as when they were given: --from --verify begins with these
        write_atomically(start, safetensors.torch.save({n: t.contiguous() for n, t in given.state.items()}, known))
    teacher = given.arch.with_classes(len(data.classes))
    deployed = build_model(teacher)
    reason = _why_train(given, model, data, other)
    if reason:
        say(f"{reason}: it is trained for {settings.init_epochs} epochs (init_epochs) before anything is taken away")
        recipe = short_recipe(settings, data, settings.init_epochs, 1 / 4)  # all but the classifier is to be kept
        in_all(_trained_from, start, arch, data, recipe, folder / "init", seed)
        load_weights(model, folder / "init" / "model.safetensors")
        state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        tensors = {name: at_size(name, state[name], like) for name, like in deployed.state_dict().items()}
    else:  # not from the resized model: what is resized twice is no longer what was given
        load_state(deployed, given.state, given.source)
        tensors = deployed.state_dict()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    teacher.save(folder / "teacher.yaml")
    write_atomically(folder / "teacher.safetensors", safetensors.torch.save(tensors, note(data.classes)))
    return model.eval()


def _trained_from(
    weights: Path, arch: ArchConfig, data: ImageData, recipe: Recipe, folder: Path, seed: int, group: Group = ALONE
) -> None:
    train_network(arch, data, recipe, folder, seed, weights=weights, group=group)


def _why_train(given: Pretrained, model: nn.Module, data: ImageData, other: str) -> str:
    classes = len(data.classes)
    if given.arch.num_classes != classes:
        return f"{given.arch.name} knows {given.arch.num_classes} classes, the data have {classes}, so its classifier is new"
    if other:
        return f"{given.arch.name} knows other classes than the data, or in another order ({other}), so its classifier is new"
    _, accuracy = accuracy_of(model, data.score)
    chance = data.score.labels.bincount(minlength=classes).max().item() / len(data.score)  # always saying the commonest class
    if accuracy <= chance + 2 * math.sqrt(chance * (1 - chance) / len(data.score)):
        return (
            f"{given.arch.name} is right on {100 * accuracy:.1f} % of the scoring images, which is chance, so its classes "
            "are not the data's"
        )
    return ""


# -- The supernet ------------------------------------------------------------------------------------------------------


def pretrained_supernet(
    model: nn.Sequential,
    arch: ArchConfig,
    space: SearchSpace,
    data: ImageData,
    settings: SupernetSettings,
    seed: int,
    folder: Path,
) -> Supernet:
    """Return the supernet of `space` with the network's own weights, and what may replace its blocks warmed up, in eval mode.

    `model` is the network `arch`; both, the space and the data have one image size. Its path gives exactly its logits: its
    weights and its batch-norm statistics are left as they are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Supernet(space)
    device = accelerator(settings.accelerator)
    fill(net, model, arch)
    net = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = calibration_batches(data, settings.recalibration_images, device)
    _begin_replacements(net, arch, unit_scores(model, arch, batches, channel_method(settings)))
    if processes() > 1:
        net = net.cpu()  # to be sent
    in_all(_distil, net.eval(), space.path(arch), data, settings, seed, folder / "distillation.pt")
    if processes() > 1:
        trained, net = net.state_dict(), Supernet(space)  # without SyncBatchNorm, which would wait for the others in a search
        net.load_state_dict(trained)
        net = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net.eval()


def replacements(space: SearchSpace, path: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (slot, candidate) of what a search may put in the place of a network's own blocks, identity aside; an empty slot
    stays empty."""
    found = []
    for slot, ((stage, _), own) in enumerate(zip(space.slots, path, strict=True)):
        candidates = space.stages[stage].candidates
        if isinstance(candidates[own], Identity):
            continue
        for index, candidate in enumerate(candidates):
            if index != own and not isinstance(candidate, Identity):
                found.append((slot, index))
    return found


def _distil(
    net: Supernet,
    path: tuple[int, ...],
    data: ImageData,
    settings: SupernetSettings,
    seed: int,
    checkpoint: Path,
    group: Group = ALONE,
) -> None:
    """Train every replacement to give what the path's own block gives on the same input, all in the same pass of the network.

    The network's own blocks are in eval mode and get no gradient. Goes on from `checkpoint`. The processes of a `group` all
    call this; each has its rows of every batch.
    """
    slots = _slots(net)
    wanted = [
        (slot, index)
        for slot, index in replacements(net.space, path)
        if any(parameter.requires_grad for parameter in slots[slot].candidates[index].parameters())  # else nothing can learn
    ]
    steps = settings.distillation_steps
    if not wanted or not steps:
        return
    by_slot: dict[int, list[int]] = {}
    for slot, index in wanted:
        by_slot.setdefault(slot, []).append(index)
    extras = nn.ModuleList(slots[slot].candidates[index] for slot, index in wanted)
    batch = min(settings.batch_size, len(data.train))

    def placed_net() -> torch.device:
        group.rows(batch)  # refused before anything is computed
        return group.device(accelerator(settings.accelerator))

    device = group.agreed(placed_net)
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    group.synchronised(extras)
    groups = parameter_groups(extras.named_parameters(), settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=DISTILLATION_RATE)
    first = load_checkpoint(checkpoint, group, extras=extras, optimizer=optimizer)
    rounds = -(-steps // ROUND)
    if first >= rounds:
        return
    say(
        f"block-wise distillation: {len(wanted)} blocks that may replace others learn for {steps} steps of {batch} images what "
        "those give"
    )
    with (
        progress("distillation", steps, min(steps, ROUND * first)) as tick,
        connected(),
        own_draws(device),
        repeated_shapes(device),
    ):
        for number in range(first, rounds):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            here = min(ROUND, steps - ROUND * number)
            order = epoch_batches(len(data.train), batch, seed, number, batch * here)
            for at, (x, _) in enumerate(training_batches(data, order, generator, device, group)):
                seed_draws(seed, number, at, group)
                for parameters in optimizer.param_groups:
                    parameters["lr"] = DISTILLATION_RATE * cosine(ROUND * number + at, steps)
                optimizer.zero_grad(set_to_none=True)
                errors = _errors(net, slots, path, by_slot, x, settings.precision, group)
                group.average_gradients(extras.parameters())
                group.average_statistics(extras)
                optimizer.step()
                tick(1)
            error = group.mean(torch.stack(errors).mean()).item()  # of the round's last step: none is waited for before
            if not math.isfinite(error):
                raise FloatingPointError("block-wise distillation diverged: a block's output is not finite")
            if group.first:
                save_checkpoint(checkpoint, number + 1, extras=extras, optimizer=optimizer)
    extras.eval()
    say(f"what they give is off by {100 * error:.1f} % of the variance of what those give, on average")


def _errors(
    net: Supernet,
    slots: list[MetaPath],
    path: tuple[int, ...],
    by_slot: Mapping[int, list[int]],
    x: Tensor,
    precision: str,
    group: Group,
) -> list[Tensor]:
    """Send images (B, 3, S, S) through the network; add to the gradients of all replacements and return their errors."""
    errors = []
    with torch.no_grad():
        x = net.stem(x)
    for at, ((stage, slot), module) in enumerate(zip(net.space.slots, slots, strict=True)):
        with torch.no_grad():
            if stage and not slot:
                x = net.embeddings[stage - 1](x)
            y = module(x, path[at])
        for index in by_slot.get(at, ()):
            module.candidates[index].train()
            with mixed_precision(x.device, precision):
                found = module(x, index)
            error = relative_error(found.to(y.dtype), y, group)
            error.backward()
            errors.append(error.detach())
        x = y
    return errors


def relative_error(found: Tensor, wanted: Tensor, group: Group = ALONE) -> Tensor:
    """Return the mean over channels of the squared error divided by the channel's variance: of maps (N, C, H, W), or of tokens
    (N, L, C). The variance is that of all the rows that a group has."""
    positions = (0, 2, 3) if wanted.ndim == 4 else (0, 1)
    error = (found - wanted).square().mean(positions)
    mean = group.mean(wanted.mean(positions, keepdim=True))
    variance = group.mean((wanted - mean).square().mean(positions))
    return (error / variance.clamp_min(LEAST_VARIANCE)).mean()


def _slots(net: Supernet) -> list[MetaPath]:
    return [cast(MetaPath, net.get_submodule(f"stages.{stage}.{slot}")) for stage, slot in net.space.slots]


def _begin_replacements(net: Supernet, arch: ArchConfig, scores: UnitScores) -> None:
    """Give every replacement of a block what it can have of that block: a smaller one of the same type is cut out of it by the
    scores of its units; another one gets its layer scales, and its MLP where it has the same."""
    path = net.space.path(arch)
    layers = dict(arch.named_layers())
    for slot, index in replacements(net.space, path):
        stage, number = net.space.slots[slot]
        name = layer_name(stage, "block", number)
        own = layers[name]
        candidate = Layer(net.space.stages[stage].candidates[index], own.resolution)
        module = _slots(net)[slot].candidates[index]
        given = _slots(net)[slot].candidates[path[slot]].state_dict()
        if type(candidate.spec) is type(own.spec):
            with suppress(InputError):  # it has more of something: it begins with what they share
                given = cut(given, own, candidate, scores.of(name, own.spec))
        _begin_as(module, given)


@torch.no_grad()
def _begin_as(block: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Give a block the leading part of those of the given tensors that have the same name and form: layer scales, which would
    otherwise begin where nothing wakes them, and MLPs of the same kind."""
    for name, tensor in block.state_dict().items():
        source = given.get(name)
        if source is None or not source.is_floating_point():
            continue
        if source.ndim == tensor.ndim and all(a >= b for a, b in zip(source.shape, tensor.shape, strict=True)):
            tensor.copy_(source[tuple(slice(n) for n in tensor.shape)])


# -- What a search asks ------------------------------------------------------------------------------------------------


def layers_kept(arch: ArchConfig, found: ArchConfig) -> int:
    """Return how many leading layers two networks of a space, their empty slots kept, have in common: in `found`, which came of
    `arch`, nothing changed what enters them, so that their batch-norm statistics hold."""
    pairs = zip(arch.named_layers(), found.named_layers(), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def as_given(tensors: Mapping[str, Tensor], arch: ArchConfig, found: ArchConfig) -> dict[str, Tensor]:
    """Return what depends on the image size in the layers that two networks of a space, their empty slots kept, have in common.

    `tensors` are those of `arch` at the size that both are deployed at, returned under the names of `found`: attention biases
    and position embeddings that went through a supernet of another size were resized twice.
    """
    own = {
        name: (layer, written)
        for (name, layer), (written, _) in zip(arch.named_layers(), arch.without_identity().named_layers(), strict=True)
    }
    kept = {}
    for (name, layer), (written, _) in zip(found.named_layers(), found.without_identity().named_layers(), strict=True):
        if name in own and own[name][0] == layer:
            begin = f"{own[name][1]}."
            names = [key for key in tensors if key.startswith(begin) and key.endswith(("attention_biases", "pos_embed"))]
            kept.update({f"{written}.{key.removeprefix(begin)}": tensors[key] for key in names})
    return kept
