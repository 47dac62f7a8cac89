"""How well the supernets of search_quality.py rank its random networks, whose accuracy is known once they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

import numpy as np
from quality_choices import Study, scorer_of
from quality_report import RANDOM, Trained

from nas.statistics import bootstrap, kendall_tau, regret
from supernet.arch import ArchConfig
from supernet.errors import InputError

FEWEST = 3  # trained networks at a target that say something of their order


def ranking(study: Study, trained: Sequence[Trained]) -> str:
    """Return a table, in Markdown, of how the random networks of each target are ranked by the supernets and by their size."""
    given = study.given
    steps = given.recovery_steps
    scorers = {}
    for seed in range(given.seeds):
        folder = study.out / f"seed{seed}"
        run = folder / f"{given.targets[0]:g}ms-{given.strategies[0]}"
        scorers[seed] = scorer_of(study, seed, folder / (f"ranking-{steps}-steps" if steps else "ranking"), run, steps)
    lines = [
        "| target, ms | networks | top-1, % | by | Kendall's tau (95 %) | below the best, points |",
        "|---:|---:|---:|---|---:|---:|",
    ]
    for target_ms in given.targets:
        those = [one for one in trained if (one.chosen.method, one.chosen.target_ms) == (RANDOM, target_ms)]
        if len(those) < FEWEST:
            continue
        truth = [one.top1 for one in those]
        archs = [arch for one in those if isinstance(arch := study.network(one.chosen), ArchConfig)]  # random ones are
        by_supernet = []
        for scorer in scorers.values():
            charges = {at: evaluation.charge(study.settings.score) for at, evaluation in scorer.each(archs)}
            by_supernet.append([-charges[at] for at in range(len(archs))])
        after = f", after {steps} steps each" if steps else ""
        ways = {
            f"{len(scorers)} supernet{'s' * (len(scorers) > 1)}{after}": by_supernet,
            **({"their mean": [list(map(mean, zip(*by_supernet, strict=True)))]} if len(scorers) > 1 else {}),
            "multiply-adds": [[float(one.chosen.macs) for one in those]],
            "parameters": [[float(one.chosen.params) for one in those]],
        }
        for way, scores in ways.items():
            lines.append(
                f"| {target_ms:g} | {len(those)} | {mean(truth):.2f} ± {stdev(truth):.2f} | {way} | {_tau(scores, truth)} | "
                f"{mean(regret(score, truth) for score in scores):.2f} |"
            )
    if len(lines) == 2:
        raise InputError(f"no target of {study.out} has {FEWEST} random networks that are trained")
    return "\n".join(lines) + "\n"


def _tau(scores: Sequence[Sequence[float]], truth: Sequence[float]) -> str:
    def statistic(truth: np.ndarray, *scores: np.ndarray) -> float:
        return mean(kendall_tau(score, truth) for score in scores)

    low, high = bootstrap(truth, *scores, statistic=statistic)
    return f"{statistic(np.asarray(truth), *map(np.asarray, scores)):.2f} ({low:.2f} to {high:.2f})"
