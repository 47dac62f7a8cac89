"""How long the study of search_quality.py takes, by a few steps of each kind of work."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from quality_choices import Study
from quality_report import RANDOM
from rivals import cpu_of, random_networks

from nas.data import load_images
from nas.evaluation import accuracy_of
from nas.measure import measure_alone, table_reference
from nas.steps import accelerator, training_batches
from nas.supernet_training import epoch_size, mixture_step, weight_step
from nas.training import train_step
from supernet.elastic import ElasticSupernet
from supernet.errors import InputError
from supernet.metapath import Supernet
from supernet.model import build_model

# What the estimate of the work takes for granted.
EVALUATIONS = 200  # of a search
CHECKS = {"search": 4, RANDOM: 1.5, "scaled": 10}  # networks that are measured, for each one that is kept
PROBE_STEPS = 4  # that are timed, after one that is not


@dataclass(frozen=True)
class Pace:
    """CPU seconds of the parts of the work on this machine."""

    training: list[float]
    """Of a training, for each target."""
    supernet: float
    evaluation: float
    """Of a network with inherited weights, without what is kept of others."""
    measurement: float


def timed(step: Callable[[], object]) -> float:
    """Return the CPU seconds of a step, after one that is not counted."""
    step()
    began = time.process_time()
    for _ in range(PROBE_STEPS):
        step()
    return (time.process_time() - began) / PROBE_STEPS


def probe(study: Study) -> Pace:
    """Time a few steps of everything."""
    data, space, settings, recipe = study.data, study.space, study.settings, study.recipe
    generator = torch.Generator().manual_seed(0)
    device = accelerator(recipe.accelerator)

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return next(training_batches(data, [torch.arange(min(size, len(data.train)))], generator, device))

    x, y = batch(recipe.batch_size)
    training = []
    for target_ms in study.given.targets:
        draw = next(random_networks(space, study.own_table, target_ms, random.Random(0)), None)
        if draw is None:
            raise InputError(f"{space.name} has no networks of about {target_ms:g} ms, by the table: give other --targets")
        arch = draw
        model = build_model(arch).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters())
        of_image = timed(partial(train_step, model, optimizer, x, y, recipe)) / len(x)
        images = recipe.images_per_epoch or len(data.train)
        training.append(recipe.epochs * of_image * (images + len(data.val) / 3))  # a pass back takes two forward

    at_size = space.at(study.search_size)
    if study.search_size != space.image_size:
        data = load_images(study.images, study.search_size, seed=0, score_images=1)
    net = ElasticSupernet(at_size) if settings.paths == "elastic" else Supernet(at_size)
    net = net.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    x, y = batch(settings.batch_size)
    weights = timed(lambda: weight_step(net, x, y, settings, generator, 0)) / len(x)
    seen = epoch_size(settings, data)
    supernet = settings.weight_epochs * seen * weights
    if settings.mixture_epochs:
        mixture = timed(lambda: mixture_step(net, x, y, settings, generator, settings.tau_start)) / len(x)
        supernet += settings.mixture_epochs * seen / 4 * mixture
    # Most networks that a search evaluates are near its target; those of the drops are larger, but kept for all targets.
    typical = build_model(replace(arch, image_size=study.search_size))
    typical = typical.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    some = data.train.shuffled(0)
    some = replace(some, rows=some.rows[:256], labels=some.labels[:256])
    forward = timed(lambda: accuracy_of(typical, some)) / len(some)
    evaluation = (settings.score_images + settings.recalibration_images) * forward
    evaluation += settings.recovery_steps * settings.batch_size * weights
    began = time.process_time()
    measure_alone(cpu_of(study.table), arch, table_reference(study.table))
    return Pace(training, supernet, evaluation, time.process_time() - began)


def hours_left(pace: Pace, given: argparse.Namespace, chosen: Sequence[str], trained: Sequence[int]) -> dict[str, float]:
    """Return the CPU hours that are left of each kind of work.

    `chosen`: the groups whose networks are known. `trained`: for each target, how many trainings are finished.
    """
    searches = len(given.targets) * (len(given.strategies) + 1)
    seeds = [seed for seed in range(given.seeds) if f"seed{seed}" not in chosen]
    measurements = CHECKS["search"] * searches * len(seeds)
    for target_ms in given.targets:
        measurements += CHECKS[RANDOM] * given.random * (f"random-{target_ms:g}ms" not in chosen)
        measurements += CHECKS["scaled"] * sum(f"{name}-{target_ms:g}ms" not in chosen for name in ("l1", "mobilenet"))
    seconds = {
        "supernets": len(seeds) * pace.supernet,
        "evaluations": len(seeds) * searches * EVALUATIONS * pace.evaluation,
        "measurements": measurements * pace.measurement,
        "trainings": sum(
            max(0, trainings_at_a_target(given) - done) * one for done, one in zip(trained, pace.training, strict=True)
        ),
    }
    return {kind: value / 3600 for kind, value in seconds.items()}


def trainings_at_a_target(given: argparse.Namespace) -> int:
    found = (len(given.strategies) + 1) * given.seeds * (given.seeds if given.crossed else 1)
    return found + given.random + 2 * given.seeds
