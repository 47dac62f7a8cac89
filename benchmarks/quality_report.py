"""What the trainings of search_quality.py say: means, paired differences, whether the aims are met, in Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from statistics import mean, median, stdev
from typing import Any

import numpy as np

from nas.guarantee import SLACK
from nas.statistics import bootstrap

RANDOM, RANDOM_SEARCH, L1, MOBILENET = "random", "random search", "EfficientFormer-L1, scaled", "MobileNetV2, scaled"
MEDIAN, BEST = "random, median", "random, best"
RIVALS = (MEDIAN, BEST, RANDOM_SEARCH, L1, MOBILENET)
AIMS = {BEST: 0.0, RANDOM_SEARCH: 0.5, L1: 1.0}
"""Points by which a strategy should at least be above a rival, at every target."""
HEADLINE = "exact"
"""The strategy whose aims are the headline. Named before there was any result: the best of several would win by selection."""


@dataclass(frozen=True)
class Chosen:
    """A network of the comparison. `seed` is the search's, None where nothing was searched; the network is given by `arch`, a
    YAML text, or, for a MobileNetV2, by its `width`."""

    method: str
    target_ms: float
    seed: int | None
    name: str
    digest: str
    ms: float
    high_ms: float
    predicted_ms: float | None
    params: int
    macs: int
    evaluations: int | None = None
    arch: str | None = None
    width: float | None = None

    @property
    def under(self) -> float:
        """How far the upper end of the interval is under the target, as a share of it; negative where it misses."""
        return 1 - self.high_ms / self.target_ms


@dataclass(frozen=True)
class Trained:
    """A training that is finished."""

    chosen: Chosen
    seed: int
    top1: float
    """Percent of the held-out images."""


Scores = Mapping[int | None, float]
"""Top-1 in percent by seed; None: a figure that stands for many networks."""


def scores_of(trained: Sequence[Trained]) -> dict[tuple[str, float], Scores]:
    """Return, for every method at every target, the top-1 of each seed; of random networks the median and the best.

    The seed is that of a search, or, where nothing was searched, of the training. Trainings of one search's network with other
    seeds too (--crossed) count once, by their mean: they have a supernet in common.
    """
    by_seed: dict[tuple[str, float], dict[int | None, list[float]]] = {}
    for one in trained:
        seed = one.seed if one.chosen.seed is None else one.chosen.seed
        by_seed.setdefault((one.chosen.method, one.chosen.target_ms), {}).setdefault(seed, []).append(one.top1)
    found: dict[tuple[str, float], Scores] = {}
    for (method, target_ms), values in by_seed.items():
        if method == RANDOM:
            found[MEDIAN, target_ms] = {None: median(values[0])}
            found[BEST, target_ms] = {None: max(values[0])}
        else:
            found[method, target_ms] = {seed: mean(of_seed) for seed, of_seed in sorted(values.items())}
    return found


def differences(ours: Scores, rival: Scores) -> Scores:
    """Return ours minus a rival's: seed by seed where both have them, each of ours minus a single figure."""
    if None in rival:
        return {seed: value - rival[None] for seed, value in ours.items()}
    return {seed: value - rival[seed] for seed, value in ours.items() if seed in rival}


def interval(found: Sequence[Scores]) -> str:
    """Return the mean of differences, at one target or several, with its bootstrap interval as text.

    What is resampled are seeds, each with its differences at all targets: they have a supernet in common.
    """
    by_seed: dict[int | None, list[float]] = {}
    for of_target in found:
        for seed, value in of_target.items():
            by_seed.setdefault(seed, []).append(value)
    if not by_seed:
        return ""
    sums, counts = [sum(values) for values in by_seed.values()], [len(values) for values in by_seed.values()]
    text = f"{sum(sums) / sum(counts):+.2f}"
    if len(by_seed) == 1:
        return text
    low, high = bootstrap(sums, counts, statistic=lambda s, n: float(np.sum(s) / np.sum(n)))
    return f"{text} ({low:+.2f} to {high:+.2f})"


def with_sd(values: Sequence[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def report(trained: Sequence[Trained], given: argparse.Namespace, expected: int, facts: Mapping[str, Any], today: date) -> str:
    """Return what the finished trainings say, as Markdown. `expected`: how many there are at each target at most."""
    scores = scores_of(trained)
    begun = [ms for ms in given.targets if any(one.chosen.target_ms == ms for one in trained)]
    untouched = [f"{ms:g}" for ms in given.targets if ms not in begun]
    given = argparse.Namespace(**{**vars(given), "targets": begun})
    ours = [s for s in given.strategies if any((s, ms) in scores for ms in given.targets)]
    val_images = facts["val_images"]
    per_epoch = given.images_per_epoch or facts["train_images"]
    over = "over training seeds (of random networks: over networks)"
    if given.crossed:
        over = (
            "over searches, each the mean of its network's trainings (of scaled networks: over training seeds; of random ones: "
            "over networks)"
        )
    lines = [
        f"{facts['machine']}; {facts['software']}; {today}. Space {given.space}; {given.epochs} epochs of {per_epoch:,} images "
        f"a training, top-1 on {val_images:,} held-out images; ± is the standard deviation {over}, "
        "intervals are 95 % bootstrap over seeds. Under the target is the upper end of the measurement's 95 % interval. "
        "Evaluations are the different networks that a search scored to choose one.",
        "",
    ]
    if untouched:
        lines += [f"Nothing is trained at {', '.join(untouched)} ms.", ""]
    if len(trained) < expected * len(begun):
        most = expected * len(begun)
        lines += [f"{len(trained)} of at most {most} trainings are finished: what is missing is not in the tables.", ""]
    lines += _table_of_networks(trained, scores, given)
    lines += _table_of_differences(scores, ours, given)
    lines += _aims(scores, ours, given)
    p = median(one.top1 for one in trained) / 100
    noise = 100 * (p * (1 - p) / val_images) ** 0.5
    lines.append(
        f"By {val_images:,} images an accuracy of {100 * p:.0f} % is known to ± {noise:.2f} points (one standard error); all "
        "networks see the same images, so of a difference it is less. The best random network was chosen by these very images, "
        "which is in its favour."
    )
    return "\n".join(lines) + "\n"


def _table_of_networks(
    trained: Sequence[Trained], scores: Mapping[tuple[str, float], Scores], given: argparse.Namespace
) -> list[str]:
    lines = [
        "| target, ms | network | trainings | ms | under the target, % | M parameters | M MACs | evaluations | top-1, % |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    off: set[tuple[str, float]] = set()  # random networks stand in two rows, and strategies may find the same one
    for target_ms in given.targets:
        for method in (*given.strategies, MEDIAN, BEST, RANDOM_SEARCH, L1, MOBILENET):
            if (method, target_ms) not in scores:
                continue
            at = (RANDOM if method in (MEDIAN, BEST) else method, target_ms)
            those = [one for one in trained if (one.chosen.method, one.chosen.target_ms) == at]
            top1 = with_sd(list(scores[method, target_ms].values()))
            if method == MEDIAN:
                top1 = f"{median(one.top1 for one in those):.2f}" + (
                    f" ± {stdev(o.top1 for o in those):.2f}" if len(those) > 1 else ""
                )
            elif method == BEST:
                those = [max(those, key=lambda one: one.top1)]
            networks = [one.chosen for one in those]
            under = [100 * network.under for network in networks]
            off |= {(network.digest, target_ms) for network in networks if not 0 <= network.under <= SLACK}
            evaluations = [n.evaluations for n in networks if n.evaluations is not None]
            cells = (
                f"{target_ms:g}",
                method,
                str(len(those)),
                f"{mean(n.ms for n in networks):.3f}",
                f"{min(under):.1f}" if len(set(under)) == 1 else f"{min(under):.1f} to {max(under):.1f}",
                f"{mean(n.params for n in networks) / 1e6:.2f}",
                f"{mean(n.macs for n in networks) / 1e6:.1f}",
                f"{mean(evaluations):.0f}" if evaluations else "",
                top1,
            )
            lines.append(f"| {' | '.join(cells)} |")
    widest = max(one.chosen.high_ms / one.chosen.ms - 1 for one in trained)
    lines += ["", f"The upper end of a measurement's interval is at most {100 * widest:.1f} % above its median."]
    if off:
        lines += [
            "",
            f"{len(off)} of these networks are not within {100 * SLACK:g} % under their target; by how much, the table says.",
        ]
    return [*lines, ""]


def _table_of_differences(
    scores: Mapping[tuple[str, float], Scores], ours: Sequence[str], given: argparse.Namespace
) -> list[str]:
    rivals = [r for r in RIVALS if any((r, ms) in scores for ms in given.targets)]
    lines = [
        f"Points of top-1 above each rival, paired by {'search' if given.crossed else 'training'} seed:",
        "",
        f"| ours | target, ms | {' | '.join(rivals)} |",
        f"|---|---:|{'---:|' * len(rivals)}",
    ]
    for strategy in ours:
        pooled: dict[str, list[Scores]] = {rival: [] for rival in rivals}
        for target_ms in given.targets:
            cells = []
            for rival in rivals:
                pairs = differences(scores.get((strategy, target_ms), {}), scores.get((rival, target_ms), {}))
                pooled[rival].append(pairs)
                cells.append(interval([pairs]))
            lines.append(f"| {strategy} | {target_ms:g} | {' | '.join(cells)} |")
        if len(given.targets) > 1:
            lines.append(f"| {strategy} | all | {' | '.join(interval(pooled[rival]) for rival in rivals)} |")
    return [*lines, ""]


def _aims(scores: Mapping[tuple[str, float], Scores], ours: Sequence[str], given: argparse.Namespace) -> list[str]:
    """Say of every strategy whether it is as far above its rivals as it should be, at every target; the headline's first."""
    lines = []
    for strategy in sorted(ours, key=lambda s: s != HEADLINE):
        which = ", the strategy that was named for the headline before any result" if strategy == HEADLINE else ""
        lines += [f"Aims, {strategy}{which}:", ""]
        for rival, points in AIMS.items():
            said = []
            for ms in given.targets:
                found = differences(scores.get((strategy, ms), {}), scores.get((rival, ms), {}))
                above = mean(found.values()) if found else 0.0
                verdict = f"{above:+.2f}, {'met' if above >= points else 'missed'}" if found else "nothing to compare"
                said.append(f"{ms:g} ms: {verdict}")
            lines.append(f"- at least {points:g} points above {rival}: {'; '.join(said)}")
        lines.append("")
    return lines


def rows_of(trained: Iterable[Trained]) -> list[dict[str, object]]:
    """Return the trainings as rows of `results.csv`."""
    rows: list[dict[str, object]] = []
    for one in trained:
        chosen = {name: value for name, value in asdict(one.chosen).items() if name not in ("arch", "width", "seed")}
        searched = "" if one.chosen.seed is None else one.chosen.seed
        rows.append({**chosen, "under": one.chosen.under, "search_seed": searched, "training_seed": one.seed, "top1": one.top1})
    return rows
