"""Does a search find better networks than what one would pick instead, at equal measured latency?

    python benchmarks/search_quality.py --data cifar10 --table latency_tables/my-cpu.csv --targets 0.35 0.5 0.8 --out quality
    python benchmarks/search_quality.py ... --choose     # first: find and measure the networks, train none, in a quiet hour
    python benchmarks/search_quality.py ... --part 1/2   # then, with 2/2 beside it: train them
    python benchmarks/search_quality.py ... --report     # print what is finished
    python benchmarks/search_quality.py ... --ranking    # at last: how well the supernets rank the random networks

At each target, by one recipe, top-1 on images that no search saw, of:

- every strategy of the search, for each seed with a supernet of its own, which serves all targets and strategies
- random networks that take as long, each trained once: their median, and the best of them
- random search: random networks that take as long, as many as the search evaluated, the best by the same supernet's word
- EfficientFormer-L1 scaled uniformly, and MobileNetV2 at a smaller width, as large as the target allows

Every network is timed whole on this CPU, at the pace that the table was built at, and counts as meeting a target where the
upper end of its 95 % interval is at most the target. docs/search-quality.md has the protocol. Everything is kept under --out:
the same command goes on after a kill, and --part divides the trainings among processes. Networks are chosen by one process
alone: several would time theirs on the same core at once.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

import torch
from quality_choices import Study, choose_at_random, choose_by_search, choose_l1, choose_mobilenet
from quality_estimate import EVALUATIONS, PROBE_STEPS, Pace, hours_left, probe, trainings_at_a_target
from quality_report import RANDOM, Chosen, Trained, report, rows_of
from quality_supernets import ranking
from rivals import Network, cpu_of
from studies import content_of, last_row, new_model, part_of, take_claimed, train_alone, train_model

from nas.kept import write_csv
from nas.progress import duration, say
from nas.request import claim
from nas.strategies import STRATEGIES
from supernet.arch import ArchConfig
from supernet.errors import InputError, unknown
from supernet.files import write_atomically


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
    text = report(trained, given, trainings_at_a_target(given), facts, date.today())
    rows = rows_of(trained)
    write_csv(given.out / "results.csv", rows, list(rows[0]))
    write_atomically(given.out / "report.md", text)
    print(text, end="")


def check_chosen(groups: Sequence[Group], out: Path) -> None:
    """Refuse a part of the work in which networks are still to be chosen."""
    if missing := [group.name for group in groups if not group.is_chosen(out)]:
        raise InputError(
            f"networks are not chosen yet ({', '.join(missing)}), and processes beside each other would disturb what is timed: "
            "choose first, with --choose and without --part"
        )


def begin(study: Study) -> None:
    """Claim the study's folder."""
    given, images = study.given, study.out / "images"
    held_out_before = images.is_dir()
    try:
        claim(
            given.out,
            {
                "command": "benchmarks/search_quality.py",
                "data": study.data.fingerprint,
                **{name: value for name, value in vars(given).items() if name in ASKED},
                "settings": asdict(study.settings),
                **content_of(given.table, study.own_table),  # refuses one without the space's layers, before the claim
            },
        )
    except InputError:
        if not held_out_before:  # else the corrected command would find what this one held out
            shutil.rmtree(images, ignore_errors=True)
        raise


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
    parser.add_argument(
        "--ranking", action="store_true", help="print how well the supernets rank the random networks that are trained, and end"
    )
    parser.add_argument(
        "--recovery-steps",
        type=int,
        default=0,
        metavar="N",
        help="of each network before it is scored for --ranking, whatever the searches did (0: as they did)",
    )
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
        take_claimed(given, ASKED)
        print_report(groups_of(given), given)
        return
    if given.data is None or given.table is None:
        raise InputError("give --data, an image folder, and --table, the latency table of this CPU")

    groups = groups_of(given)
    mine = [groups[at] for at in shared_out([group.work for group in groups], parts)[part - 1]]
    if parts > 1:
        check_chosen(mine, given.out)
    study = Study(given)
    cpu_of(study.table)
    begin(study)
    if given.ranking:
        check_chosen(groups, given.out)
        print(ranking(study, results(groups, given)), end="")
        return
    say_estimate(study, groups)
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
    except (InputError, FloatingPointError) as error:  # a training that diverged is told in one line, too
        raise SystemExit(str(error)) from None
