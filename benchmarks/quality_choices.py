"""The networks that search_quality.py compares: those of searches, and those that one would pick instead."""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml
from mobilenet_v2 import SMALL_IMAGE_STRIDES, MobileNetV2
from quality_report import L1, MOBILENET, RANDOM, RANDOM_SEARCH, Chosen
from rivals import (
    Measured,
    Network,
    Time,
    best_scored,
    complexity,
    digest,
    draw_at_target,
    largest_l1,
    largest_mobilenet,
    network_name,
    random_at_target,
)
from studies import hold_out

from nas.data import ImageData, load_images, natural_size
from nas.judging import evaluator_of
from nas.kept import Remembered, described, read_evaluations, write_csv
from nas.progress import progress, say
from nas.recipe import RECIPES
from nas.recovery import Recovered
from nas.request import finished
from nas.scores import Drops, completed
from nas.search import Request, borrow, run_search, search_from
from nas.settings import SupernetSettings
from nas.slimming import start_network
from nas.supernet_training import logits_of, train_supernet, training_size
from nas.table import LatencyTable
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.space import SearchSpace


class Study:
    """What was asked, and what all of the work needs."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.out: Path = given.out
        self.table = LatencyTable.load(given.table)
        self.recipe = replace(RECIPES["quick"], epochs=given.epochs, images_per_epoch=given.images_per_epoch)
        self.settings = settings_of(given.config, given.supernet_images)

    @cached_property
    def images(self) -> Path:
        return hold_out(self.given.data, self.out / "images", self.given.val_images)

    @cached_property
    def data(self) -> ImageData:
        """All images that are not held out train a network that was found, but one: loading sets it apart to score."""
        return load_images(self.images, SearchSpace.load(self.given.space).image_size, seed=0, score_images=1)

    @cached_property
    def search_size(self) -> int:
        """The image size, in pixels, that a search trains its supernet at and scores at."""
        return training_size(SearchSpace.load(self.given.space), natural_size(self.images), self.settings.image_size)

    @cached_property
    def space(self) -> SearchSpace:
        return SearchSpace.load(self.given.space).with_classes(len(self.data.classes))

    @cached_property
    def own_table(self) -> LatencyTable:
        """The table with its calibration for the space."""
        self.table.require(self.space.layers(), f"nas-build-lut --missing --space {self.given.space}")
        return self.table.calibrated_for(self.space)

    def chosen(
        self,
        method: str,
        target_ms: float,
        network: Network,
        took: Time,
        seed: int | None = None,
        evaluations: int | None = None,
    ) -> Chosen:
        """Return a network with what is to be kept of it."""
        predicted_ms, arch, width = None, None, None
        if isinstance(network, MobileNetV2):
            width = network.width
        else:
            arch = network.without_identity().to_yaml()
            if not self.table.missing(network.layers()):
                predicted_ms = self.own_table.predict_ms(network)
        figures = (took.ms, took.high_ms, predicted_ms, *complexity(network))
        return Chosen(method, target_ms, seed, network_name(network), digest(network), *figures, evaluations, arch, width)

    def network(self, chosen: Chosen) -> Network:
        if chosen.arch is None:
            assert chosen.width is not None
            return MobileNetV2(chosen.width, self.space.image_size, self.space.num_classes, SMALL_IMAGE_STRIDES)
        return ArchConfig.from_dict(yaml.safe_load(chosen.arch), f"the network {chosen.name}")


def settings_of(config: Path | None, images: int) -> SupernetSettings:
    """Return the supernet's settings; its weights, or its mixtures where there is nothing else, see `images` in all.

    Raises:
        InputError: they ask for more than a latency, which no rival of the searches is held to.
    """
    settings = SupernetSettings.load(config)
    if settings.objective != "latency" or settings.max_params or settings.max_macs:
        raise InputError(
            f"{config} sets objective, max_params or max_macs, but networks are compared at equal latency alone: leave them out"
        )
    epochs = settings.weight_epochs or settings.mixture_epochs / 4  # an epoch of mixtures sees a quarter
    return replace(settings, images_per_epoch=round(images / epochs)) if images else settings


def choose_by_search(seed: int, study: Study, folder: Path) -> list[Chosen]:
    """Search for every target by every strategy with one supernet, then search at random with it."""
    found: list[Chosen] = []
    earlier: Path | None = None
    for target_ms in study.given.targets:
        evaluations = 0
        for strategy in study.given.strategies:
            run = folder / f"{target_ms:g}ms-{strategy}"
            result = searched(study, seed, target_ms, strategy, run, earlier)
            earlier = run
            needed = networks_evaluated(run)
            evaluations = max(evaluations, needed)
            arch = ArchConfig.load(run / "searched.yaml")
            took = Time(result["measured_ms"], result["measured_low_ms"], result["measured_high_ms"])
            found.append(study.chosen(strategy, target_ms, arch, took, seed, needed))
        assert earlier is not None
        found += search_at_random(study, seed, target_ms, evaluations, folder / f"{target_ms:g}ms-random", earlier)
    return found


def searched(study: Study, seed: int, target_ms: float, strategy: str, run: Path, earlier: Path | None) -> dict[str, Any]:
    """Return the result of one search; an earlier one's supernet and drops of single changes are used."""
    given = study.given
    if earlier is not None:
        keep_drops(earlier, run)
        return search_from(earlier, Request(target_ms, table=(given.table,), strategy=strategy, out=run))
    request = Request(
        target_ms, table=(given.table,), data=study.images, space=given.space, strategy=strategy, out=run, seed=seed
    )
    return run_search(request, settings=study.settings)


EVALUATED = ("network", "loss", "accuracy")
"""Columns of `evaluations.csv`."""


def keep_drops(earlier: Path, run: Path) -> None:
    """Begin the evaluations of `run`, a search that has none yet, with those of an earlier one's drops alone.

    It would borrow all that the earlier search evaluated. What a strategy goes on to evaluate for one target, another one may
    need too: it evaluates that again, so that each run's file says how many networks the run took.
    """
    file = run / "evaluations.csv"
    if not file.exists():
        drops = networks_of_drops(earlier)
        known = read_evaluations(earlier / "evaluations.csv")
        rows = ((name, repr(found.loss), repr(found.accuracy)) for name, found in known.items() if name in drops)
        write_csv(file, (dict(zip(EVALUATED, row, strict=True)) for row in rows), EVALUATED)


def networks_of_drops(run: Path) -> set[str]:
    """Return the networks that a run's drops were measured in, the base among them."""
    space = finished(run).space
    drops = Drops.load(run / "drops.csv", space)
    changed = (completed(space, drops.base, [change]) for change in drops.singles)
    return {described(drops.base), *(described(arch) for arch in changed if arch is not None)}


def networks_evaluated(run: Path) -> int:
    """Return how many different networks a search evaluated to choose one: all but those on which it only checked how far drops
    add up. They are counted in its files, so that a kill changes nothing."""
    checked: set[str] = set()
    if (run / "additivity.csv").exists():
        checked = {line["network"] for line in csv.DictReader((run / "additivity.csv").read_text().splitlines())}
    return len(read_evaluations(run / "evaluations.csv").keys() - (checked - networks_of_drops(run)))


def scorer_of(study: Study, seed: int, folder: Path, run: Path, recovery_steps: int = 0) -> Remembered:
    """Return what scores networks as the search `run` scored them: by its supernet, on its images; or after so many steps of
    recovery each. What is evaluated is kept in `folder`."""
    borrow(run, folder)
    settings, space = study.settings, study.space
    if recovery_steps:
        settings = replace(settings, recovery_steps=recovery_steps)
    data = load_images(study.images, study.search_size, seed, score_images=settings.score_images)
    supernet = train_supernet(space.at(study.search_size), data, settings, seed, folder)
    logits = logits_of(supernet, settings)
    base = space.largest if logits is None else start_network(space, logits)
    evaluator = evaluator_of(supernet, base, data, settings, folder)
    scored = Recovered(evaluator, data, settings, seed) if settings.recovery_steps else evaluator
    # What was borrowed beside the supernet was evaluated as the search did, and not after these steps.
    return Remembered(scored, folder / (f"after-{recovery_steps}-steps.csv" if recovery_steps else "evaluations.csv"))


def search_at_random(study: Study, seed: int, target_ms: float, evaluations: int, folder: Path, run: Path) -> list[Chosen]:
    """Return the best of so many random networks, as the supernet of `run` scores them; nothing where none meets the target."""
    evaluate = scorer_of(study, seed, folder, run)
    check = Measured(folder / "measured.json", study.table)
    rng = random.Random(f"random search, seed {seed}, {target_ms:g} ms")
    draws = random_at_target(study.space, study.own_table, check, target_ms, rng)
    with progress(f"random search at {target_ms:g} ms", evaluations) as tick:

        def charge_of(arch: ArchConfig) -> float:
            charge = evaluate(arch).charge(study.settings.score)  # what the searches rank by
            tick(1)
            return charge

        arch = best_scored(draws, charge_of, check, target_ms, evaluations)
    if arch is None:
        say(f"warning: no random network that meets {target_ms:g} ms was found: random search has no part in that comparison")
        return []
    return [study.chosen(RANDOM_SEARCH, target_ms, replace(arch, name="random-search"), check(arch), seed, evaluations)]


def choose_at_random(target_ms: float, study: Study, folder: Path) -> list[Chosen]:
    check = Measured(folder / "measured.json", study.table)
    rng = random.Random(f"random networks, {target_ms:g} ms")
    draws = random_at_target(study.space, study.own_table, check, target_ms, rng)
    archs = draw_at_target(draws, check, target_ms, study.given.random)
    named = [replace(arch, name=f"random{number:02d}") for number, arch in enumerate(archs)]
    return [study.chosen(RANDOM, target_ms, arch, check(arch)) for arch in named]


def choose_l1(target_ms: float, study: Study, folder: Path) -> list[Chosen]:
    return _largest(L1, target_ms, partial(largest_l1, study.space), study, folder)


def choose_mobilenet(target_ms: float, study: Study, folder: Path) -> list[Chosen]:
    largest = partial(largest_mobilenet, study.space.image_size, study.space.num_classes)
    return _largest(MOBILENET, target_ms, largest, study, folder)


def _largest(
    method: str,
    target_ms: float,
    largest: Callable[[Callable[[Network], bool]], Network | None],
    study: Study,
    folder: Path,
) -> list[Chosen]:
    check = Measured(folder / "measured.json", study.table)

    def fits(network: Network) -> bool:
        return check(network).high_ms <= target_ms

    network = largest(fits)
    if network is None:
        say(f"{method}: even the smallest takes more than {target_ms:g} ms, so it has no part in that comparison")
        return []
    return [study.chosen(method, target_ms, network, check(network))]
