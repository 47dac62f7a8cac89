"""Does a search find better networks than what one would pick instead, at equal measured latency?

    python benchmarks/search_quality.py --data cifar10 --table latency_tables/my-cpu.csv --targets 0.35 0.5 0.8 --out quality
    python benchmarks/search_quality.py ... --choose     # find and measure the networks, train none: for a quiet hour
    python benchmarks/search_quality.py ... --part 1/2   # and 2/2 beside it
    python benchmarks/search_quality.py ... --report     # print what is finished

At each target, by one recipe, top-1 on images that no search saw, of:

- every strategy of the search, for each seed with a supernet of its own, which serves all targets and strategies
- random networks that take as long, each trained once: their median, and the best of them
- random search: random networks that take as long, as many as the search evaluated, the best by the same supernet's word
- EfficientFormer-L1 scaled uniformly, and MobileNetV2 at a smaller width, as large as the target allows

Every network is timed whole on this CPU, at the pace that the table was built at, and counts as meeting a target where the
upper end of its 95 % interval is at most the target. docs/search-quality.md has the protocol. Everything is kept under --out:
the same command goes on after a kill, and --part divides the work among processes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from mobilenet_v2 import SMALL_IMAGE_STRIDES, MobileNetV2
from quality_report import L1, MOBILENET, RANDOM, RANDOM_SEARCH, Chosen, Trained, report, rows_of
from rivals import (
    Measured,
    Network,
    Time,
    best_scored,
    complexity,
    cpu_of,
    digest,
    draw_at_target,
    largest_l1,
    largest_mobilenet,
    network_name,
    random_at_target,
    random_networks,
)
from studies import hold_out, last_row, new_model, train_alone, train_model

from nas.data import ImageData, load_images, natural_size
from nas.evaluation import accuracy_of
from nas.judging import evaluator_of
from nas.kept import Remembered, described, read_evaluations, write_csv
from nas.measure import measure_alone, table_reference
from nas.progress import duration, progress, say
from nas.recipe import RECIPES
from nas.recovery import Recovered
from nas.request import claim, finished
from nas.scores import Drops, completed
from nas.search import Request, borrow, run_search, search_from
from nas.settings import SupernetSettings
from nas.slimming import start_network
from nas.steps import accelerator, training_batches
from nas.strategies import STRATEGIES
from nas.supernet_training import epoch_size, logits_of, mixture_step, train_supernet, training_size, weight_step
from nas.table import LatencyTable
from nas.training import train_step
from supernet.arch import ArchConfig
from supernet.elastic import ElasticSupernet
from supernet.errors import InputError, unknown
from supernet.files import write_atomically
from supernet.metapath import Supernet
from supernet.model import build_model
from supernet.space import SearchSpace

# What the estimate of the work takes for granted.
EVALUATIONS = 200  # of a search
CHECKS = {"search": 4, RANDOM: 1.5, "scaled": 10}  # networks that are measured, for each one that is kept
PROBE_STEPS = 4  # that are timed, after one that is not


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
    """Return the supernet's settings; its weights, or its mixtures where there is nothing else, see `images` in all."""
    settings = SupernetSettings.load(config)
    epochs = settings.weight_epochs or settings.mixture_epochs / 4  # an epoch of mixtures sees a quarter
    return replace(settings, images_per_epoch=round(images / epochs)) if images else settings


@dataclass(frozen=True)
class Group:
    """Networks that are chosen together. `work` is what they cost, in trainings of a network of 1 ms, as far as is known before
    anything is timed: every part of the work must divide the groups in the same way."""

    name: str
    choose: Callable[[Study, Path], list[Chosen]]
    work: float

    def chosen(self, study: Study) -> list[Chosen]:
        """Return the group's networks, chosen now or before."""
        folder = study.out / self.name
        if not self.is_chosen(study.out):
            say(f"choosing: {self.name}")
            found = self.choose(study, folder)
            write_atomically(folder / "chosen.json", json.dumps([asdict(one) for one in found], indent=1) + "\n")
        return self.known(study.out)

    def known(self, out: Path) -> list[Chosen]:
        return [Chosen(**one) for one in json.loads((out / self.name / "chosen.json").read_text())]

    def is_chosen(self, out: Path) -> bool:
        return (out / self.name / "chosen.json").exists()


def groups_of(given: argparse.Namespace) -> list[Group]:
    """Return the pieces that the work is made of."""
    total_ms = sum(given.targets)
    crossed = given.seeds if given.crossed else 1
    found = [
        Group(
            f"seed{seed}",
            partial(choose_by_search, seed),
            (len(given.strategies) + 1) * crossed * total_ms + len(given.targets),
        )
        for seed in range(given.seeds)
    ]
    for target_ms in given.targets:
        found.append(Group(f"random-{target_ms:g}ms", partial(choose_at_random, target_ms), given.random * target_ms))
        found.append(Group(f"l1-{target_ms:g}ms", partial(choose_l1, target_ms), given.seeds * target_ms))
        found.append(Group(f"mobilenet-{target_ms:g}ms", partial(choose_mobilenet, target_ms), given.seeds * target_ms))
    return found


def shared_out(work: Sequence[float], parts: int) -> list[list[int]]:
    """Return which pieces each of `parts` does, of about as much work: the largest piece first, to whom has least."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [0.0] * parts
    for at in sorted(range(len(work)), key=lambda at: (-work[at], at)):
        part = loads.index(min(loads))
        shares[part].append(at)
        loads[part] += work[at]
    return [sorted(share) for share in shares]


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


def search_at_random(study: Study, seed: int, target_ms: float, evaluations: int, folder: Path, run: Path) -> list[Chosen]:
    """Return the best of so many random networks, as the supernet of `run` scores them; nothing where none meets the target."""
    borrow(run, folder)
    settings, space = study.settings, study.space
    # Images and supernet are those of the search.
    data = load_images(study.images, study.search_size, seed, score_images=settings.score_images)
    supernet = train_supernet(space.at(study.search_size), data, settings, seed, folder)
    logits = logits_of(supernet, settings)
    base = space.largest if logits is None else start_network(space, logits)
    evaluator = evaluator_of(supernet, base, data, settings, folder)
    scored = Recovered(evaluator, data, settings, seed) if settings.recovery_steps else evaluator
    evaluate = Remembered(scored, folder / "evaluations.csv")
    check = Measured(folder / "measured.json", study.table)
    rng = random.Random(f"random search, seed {seed}, {target_ms:g} ms")
    draws = random_at_target(space, study.own_table, check, target_ms, rng)
    with progress(f"random search at {target_ms:g} ms", evaluations) as tick:

        def loss_of(arch: ArchConfig) -> float:
            loss = evaluate(arch).loss
            tick(1)
            return loss

        arch = best_scored(draws, loss_of, check, target_ms, evaluations)
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


def training_seeds(chosen: Chosen, given: argparse.Namespace) -> list[int]:
    """Return the seeds with which a network is trained: a searched one with its search's (--crossed: all), a random one with
    the first, a scaled one with all."""
    if chosen.method == RANDOM:
        return [0]
    if chosen.seed is None or given.crossed:
        return list(range(given.seeds))
    return [chosen.seed]


def train(study: Study, network: Network, seed: int, folder: Path) -> None:
    """Train a network, unless that is done. What only serves to go on is removed at the end."""
    if isinstance(network, ArchConfig):
        train_alone(replace(network, name=folder.name), seed, study.data, study.recipe, folder)
    elif last_row(folder / "metrics.csv", study.recipe.epochs) is None:
        model = new_model(network.module, study.recipe, seed)
        train_model(model, folder.name, study.data, study.recipe, seed, folder)
    (folder / "checkpoint.pt").unlink(missing_ok=True)


def trainings(group: Group, found: Sequence[Chosen], given: argparse.Namespace) -> list[tuple[Chosen, int, Path]]:
    """Return the trainings of a group's networks: which network, with which seed, kept where. Strategies that find the same
    network share it."""
    folder = given.out / group.name / "trained"
    return [(one, seed, folder / f"{one.digest}-seed{seed}") for one in found for seed in training_seeds(one, given)]


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


def say_estimate(study: Study, groups: Sequence[Group]) -> None:
    """Say how long what is left takes, by arithmetic from a few steps that are timed when the study begins."""
    given, file = study.given, study.out / "facts.json"
    if not file.exists():
        say("timing a few steps, to say how long all of it takes")
        meta = study.table.meta
        facts = {
            "pace": asdict(probe(study)),
            "train_images": len(study.data.train),
            "val_images": len(study.data.val),
            "machine": f"{meta['cpu']}, {meta['cores']} cores, {meta['os']}",
            "software": f"{meta['runtime']} {meta['runtime_version']}, torch {torch.__version__}",
        }
        write_atomically(file, json.dumps(facts, indent=1) + "\n")
    pace = Pace(**json.loads(file.read_text())["pace"])
    known = [group for group in groups if group.is_chosen(study.out)]
    finished = [one.chosen.target_ms for one in results(groups, given)]
    left = hours_left(pace, given, [group.name for group in known], [finished.count(ms) for ms in given.targets])
    each = ", ".join(f"{kind} {duration(3600 * hours)}" for kind, hours in left.items())
    say(
        f"about {sum(left.values()):.1f} CPU hours are left ({each}), going by {PROBE_STEPS} steps of each kind and "
        f"{EVALUATIONS} evaluations a search; a training takes {duration(min(pace.training))} to {duration(max(pace.training))}"
    )


def results(groups: Sequence[Group], given: argparse.Namespace) -> list[Trained]:
    """Return the trainings that are finished."""
    found = []
    for group in groups:
        if group.is_chosen(given.out):
            for chosen, seed, folder in trainings(group, group.known(given.out), given):
                row = last_row(folder / "metrics.csv", given.epochs)
                if row is not None:
                    found.append(Trained(chosen, seed, 100 * float(row["val_accuracy"])))
    return found


def print_report(groups: Sequence[Group], given: argparse.Namespace) -> None:
    trained = results(groups, given)
    if not trained:
        raise InputError(f"no training in {given.out} is finished: run it without --report first")
    facts = json.loads((given.out / "facts.json").read_text())
    text = report(trained, given, trainings_at_a_target(given) * len(given.targets), facts, date.today())
    rows = rows_of(trained)
    write_csv(given.out / "results.csv", rows, list(rows[0]))
    write_atomically(given.out / "report.md", text)
    print(text, end="")


def part_of(text: str) -> tuple[int, int]:
    """Return K and N of `K/N`."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"--part must be K/N, K from 1 to N, such as 1/2, but is {text!r}")
    return int(found[1]), int(found[2])


def content_of(file: Path, table: LatencyTable) -> dict[str, Any]:
    """Return what identifies a table, and the pace that measurements are brought to: what is kept was measured for both."""
    reference = table_reference(table)._asdict()
    return {"table_sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "reference_ms": reference}


ASKED = ("space", "targets", "strategies", "seeds", "crossed", "epochs", "images_per_epoch", "random", "val_images")
"""Settings that decide what is done; a report takes them from the study's folder."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the images, one folder for each class")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="the latency table (CSV) of this machine's CPU; all is measured at its pace"
    )
    parser.add_argument("--space", default="efficientformer-tiny", help="what is searched in (%(default)s)")
    parser.add_argument(
        "--targets", type=float, nargs="+", default=[0.35, 0.5, 0.8], metavar="MS", help="of one image (0.35 0.5 0.8)"
    )
    parser.add_argument(
        "--strategies", nargs="+", default=list(STRATEGIES), metavar="NAME", help=f"of the search ({' '.join(STRATEGIES)})"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of supernets and of trainings (%(default)s)")
    parser.add_argument(
        "--crossed", action="store_true", help="train each seed's network with every seed, not with its own alone"
    )
    parser.add_argument("--random", type=int, default=20, metavar="N", help="random networks at each target (%(default)s)")
    parser.add_argument("--epochs", type=int, default=2, metavar="N", help="of each training of a network (%(default)s)")
    parser.add_argument("--images-per-epoch", type=int, default=0, metavar="N", help="of them (0: all training images)")
    parser.add_argument(
        "--val-images",
        type=int,
        default=10_000,
        metavar="N",
        help="that are held out, where the data have no val/ (%(default)s)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="of the supernet, as for nas-search")
    parser.add_argument(
        "--supernet-images", type=int, default=0, metavar="N", help="that a supernet sees in all (0: what --config says)"
    )
    parser.add_argument("--choose", action="store_true", help="find and measure the networks, and train none")
    parser.add_argument("--report", action="store_true", help="print what is finished in --out, and end")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="do only the K-th of N shares of the work")
    parser.add_argument(
        "--out", type=Path, default=Path("search-quality"), metavar="FOLDER", help="where everything is kept (%(default)s)"
    )
    given = parser.parse_args()
    for strategy in given.strategies:
        if strategy not in STRATEGIES:
            raise unknown("strategy", strategy, STRATEGIES)
    part, parts = part_of(given.part)
    if given.report:
        file = given.out / "request.json"
        if not file.exists():
            raise InputError(f"{given.out} holds no study: give the --out of one")
        vars(given).update({name: value for name, value in json.loads(file.read_text()).items() if name in ASKED})
        print_report(groups_of(given), given)
        return
    if given.data is None or given.table is None:
        raise InputError("give --data, an image folder, and --table, the latency table of this CPU")

    study = Study(given)
    cpu_of(study.table)
    claim(
        given.out,
        {
            "command": "benchmarks/search_quality.py",
            "data": study.data.fingerprint,
            **{name: value for name, value in vars(given).items() if name in ASKED},
            "settings": asdict(study.settings),
            **content_of(given.table, study.own_table),  # refuses one without the space's layers, before anything is claimed
        },
    )
    groups = groups_of(given)
    say_estimate(study, groups)
    mine = [groups[at] for at in shared_out([group.work for group in groups], parts)[part - 1]]
    for number, group in enumerate(mine, 1):
        say(f"piece {number} of {len(mine)}: {group.name}")
        found = group.chosen(study)
        for chosen, seed, folder in [] if given.choose else trainings(group, found, given):
            train(study, study.network(chosen), seed, folder)
    if parts == 1 and not given.choose:
        print_report(groups, given)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
