"""Do drops add up? The sum of single changes against networks with several, with and without pairs within a stage.

    python benchmarks/additivity.py --run runs/mine --networks 100 --pairs 60
    python benchmarks/additivity.py --data ~/cifar10 --space efficientformer-tiny --config settings.yaml --out runs/additivity

With --run, the supernet, the settings and the drops are those of a search that ended, or was stopped once its supernet was
trained; else a supernet is trained first. Intervals are of 95 %, over resamples of the networks. Killed, it goes on with the
same command.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from studies import Run, claim_supernet, images_of

from nas.alone import alone
from nas.judging import evaluator_of
from nas.kept import Remembered
from nas.progress import progress
from nas.recovery import Recovered
from nas.scores import Drops, additivity, measure_drops, measure_pairs, pairs_to_measure, single_changes
from nas.settings import SupernetSettings
from nas.slimming import start_network
from nas.statistics import bootstrap, kendall_tau, line, r_squared
from nas.supernet_training import logits_of, train_supernet
from supernet.errors import InputError
from supernet.space import SearchSpace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the folder of a nas-search")
    parser.add_argument("--data", type=Path, help="an image folder (default: the digits)")
    parser.add_argument("--space", default="efficientformer-tiny")
    parser.add_argument("--config", type=Path, help="settings, as of nas-search")
    parser.add_argument("--out", type=Path, default=Path("runs/additivity"), help="of the supernet, without --run")
    parser.add_argument("--networks", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=40, help="of changes within a stage that are measured, the cheapest first")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    run = Run.read(given.run) if given.run is not None else None
    with alone(run.folder if run is not None else given.out):
        compare(given, run)


def compare(given: argparse.Namespace, run: Run | None) -> None:
    """Evaluate what is not known yet, and print how far the predictions are from it."""
    if run is not None:
        space, settings, seed, folder = run.space, run.settings, run.seed, run.folder
        supernet, data = run.supernet()
    else:
        space, settings, seed, folder = (
            SearchSpace.load(given.space),
            SupernetSettings.load(given.config),
            given.seed,
            given.out,
        )
        data = images_of(space, given.data, seed, settings)
        space = space.with_classes(len(data.classes))
        claim_supernet(folder, "benchmarks/additivity.py", space, settings, seed, data)
        supernet = train_supernet(space.at(data.image_size), data, settings, seed, folder)
    logits = logits_of(supernet, settings)
    base = space.largest if logits is None else start_network(space, logits)
    evaluator = evaluator_of(supernet, base, data, settings, folder)
    scored = Recovered(evaluator, data, settings, seed) if settings.recovery_steps else evaluator
    evaluate = Remembered(scored, folder / "additivity-evaluations.csv")

    if (folder / "drops.csv").exists():
        drops = replace(Drops.load(folder / "drops.csv", space), pairs={})  # which are measured here
    else:
        with progress("drops of single changes", len(single_changes(space, base)) + 1) as tick:
            drops = measure_drops(space, base, evaluate, tick)
        drops.save(folder / "drops.csv")
    with progress("pairs", len(pairs_to_measure(drops, given.pairs))) as tick:
        with_pairs = measure_pairs(drops, evaluate, given.pairs, tick)

    print(f"{space.name} at {data.image_size} px, {data.source}, seed {seed}: base loss {drops.evaluation.loss:.4f}")
    rises = [drop.drop_loss for drop in drops.singles.values()]
    print(f"{len(rises)} drops of single changes: median {np.median(rises):.4f}, largest {max(rises):.4f}")
    print(f"| prediction, on {given.networks} networks with several changes | R2 | Kendall's tau | slope |")
    print("|---|---|---|---|")
    for name, chosen in (("single changes", drops), (f"with {len(with_pairs.pairs)} pairs", with_pairs)):
        with progress(name, given.networks) as tick:
            found = additivity(space, chosen, evaluate, given.networks, given.seed, tick)
        x, y = ([record[column] for record in found.records] for column in ("predicted_loss", "loss"))
        cells = []
        for value, statistic in (
            (found.r_squared, r_squared),
            (found.tau, kendall_tau),
            (found.slope, lambda a, b: line(a, b)[0]),
        ):
            low, high = bootstrap(x, y, statistic=statistic, seed=given.seed)
            cells.append(f"{value:.2f} ({low:.2f} to {high:.2f})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
