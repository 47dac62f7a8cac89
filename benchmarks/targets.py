"""Does the search meet its targets? One search for each target, all with the supernet of the first.

    python benchmarks/targets.py --data ~/cifar10 --space efficientformer-tiny 0.15 0.35 0.6 0.9 1.2

The searches have the same seed and settings, so each of them would train the same supernet; its checkpoint is copied from
the first one's folder instead.
"""

import argparse
import shutil
from pathlib import Path

from nas.search import Request, run_search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", type=float, nargs="+", metavar="MS")
    parser.add_argument("--data", type=Path, help="an image folder (default: the digits)")
    parser.add_argument("--space", default="efficientformer-tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/targets"))
    given = parser.parse_args()

    results = []
    checkpoint: Path | None = None
    for target_ms in given.targets:
        folder = given.out / f"{target_ms:g}ms"
        if checkpoint is not None and not folder.exists():
            folder.mkdir(parents=True)
            shutil.copy(checkpoint, folder)
        results.append(run_search(Request(target_ms, data=given.data, space=given.space, out=folder, seed=given.seed)))
        checkpoint = folder / "supernet.pt"
    print("| target ms | predicted ms | measured ms (95 % upper end) | networks measured | top-1 with inherited weights |")
    print("|---|---|---|---|---|")
    for r in results:
        measured = f"{r['measured_ms']:.3f} ({r['measured_high_ms']:.3f})" if r["measured_ms"] is not None else "not here"
        predicted, times = f"{r['predicted_ms']:.3f}", r["measured_networks"]
        print(f"| {r['target_ms']:g} | {predicted} | {measured} | {times} | {100 * r['accuracy']:.1f} % |")


if __name__ == "__main__":
    main()
