"""How far do two builds of the same table differ, and is a wrong row found out?

    nas-build-lut --device cpu --space efficientformer-s --out quiet
    python benchmarks/two_builds.py quiet --busy busy --space efficientformer-s

The second build is made here while another process keeps one core busy; one that lies there already, made in whatever way (a
job folder, over ssh), is compared as it is: its rows, and what both tables say of random networks. Then each row of the first
table in turn is made 10 % too large, and too small, and the tool is asked which rows it doubts.
"""

import argparse
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean

import numpy as np

from nas.audit import contradicted_rows, odd_rows
from nas.devices import open_profiler
from nas.lut import rows_off_their_visits
from nas.measure import table_reference
from nas.table import LatencyTable
from supernet.space import SearchSpace

NETWORKS = 200
BUSY = "x = 1\nwhile True:\n    x = (x * 1103515245 + 12345) % 2147483648\n"


def found_out(table: LatencyTable, samples: Path, factor: float) -> tuple[int, int, int]:
    """Return of how many blocks' rows that are made `factor` times as large the tool names the very row: by the table's visits,
    and, without them, by the other widths and the whole networks; and how many there are."""
    by_visits = by_others = 0
    blocks = [layer for layer, row in table.rows.items() if row.method == "slope"]
    for layer in blocks:
        rows = {**table.rows, layer: replace(table.rows[layer], ms=factor * table.rows[layer].ms)}
        changed = replace(table, rows=rows)
        by_visits += layer in {doubt.layer for doubt in rows_off_their_visits(changed, samples)}
        by_others += layer in {doubt.layer for doubt in (*odd_rows(changed), *contradicted_rows(changed))}
    return by_visits, by_others, len(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="the folder of the first build")
    parser.add_argument("--busy", type=Path, help="where the second build is made, or lies")
    parser.add_argument("--space", default="efficientformer-tiny")
    given = parser.parse_args()
    device = open_profiler().id
    first = LatencyTable.load(given.first / f"{device}.csv")
    if given.busy is not None:
        path = given.busy / f"{device}.csv"
        if not path.exists():
            other = subprocess.Popen([sys.executable, "-c", BUSY])
            try:
                from nas import cli

                cli.build_lut(["--device", "cpu", "--space", given.space, "--out", str(given.busy)])
            finally:
                other.kill()
        second = LatencyTable.load(path)
        both = [layer for layer in first.rows if layer in second.rows]
        # A table's milliseconds are those of a machine on which the references take what its sidecar says.
        slowness = geometric_mean(b / a for a, b in zip(table_reference(first), table_reference(second), strict=True))
        print(f"the second build's references took {slowness:.3f} times as long; rows are compared at the first one's pace")
        typical_ms = float(np.median([n.ms for c in second.calibrations for n in c.networks]))
        for what, chosen in (
            ("rows of blocks", [layer for layer in both if first.rows[layer].method == "slope"]),
            ("rows above 1 % of a typical network", [k for k in both if first.rows[k].ms > 0.01 * typical_ms]),
            ("all rows", both),
        ):
            pairs = [(first.rows[k].ms, second.rows[k].ms / slowness) for k in chosen]
            median, p95 = np.percentile([100 * abs(b - a) / abs(a) for a, b in pairs], [50, 95])
            of_network = np.percentile([100 * abs(b - a) / typical_ms for a, b in pairs], 95)
            print(
                f"{what} ({len(chosen)}): the builds differ by a median of {median:.1f} %, a 95th percentile of {p95:.1f} % "
                f"({of_network:.2f} % of a typical network)"
            )
        rng, space = random.Random(0), SearchSpace.load(given.space)
        networks = [space.sample(rng) for _ in range(NETWORKS)]
        said = [100 * abs(second.predict_ms(arch) / slowness / first.predict_ms(arch) - 1) for arch in networks]
        median, p95 = np.percentile(said, [50, 95])
        print(
            f"what they say of {NETWORKS} random networks differs by a median of {median:.1f} %, a 95th percentile of "
            f"{p95:.1f} %"
        )
        for c in second.calibrations:
            print(f"second build, {c.space}: {c.mean_error_percent:.1f} % off on average, {c.max_error_percent:.1f} % at most")
    samples = given.first / f"{device}.samples.csv"
    asis = [*rows_off_their_visits(first, samples), *odd_rows(first), *contradicted_rows(first)]
    print(f"rows that are doubted as they are: {len(asis)}")
    for factor in (1.1, 0.9):
        by_visits, by_others, blocks = found_out(first, samples, factor)
        print(
            f"one block's row made {factor:g} times as large: named by its visits in {by_visits} of {blocks} cases, by other "
            f"widths and whole networks in {by_others}"
        )


if __name__ == "__main__":
    main()
