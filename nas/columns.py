"""Tables of results on stdout: numbers stay whole in a narrow terminal, words fold; a file or a pipe gets whole lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

LEAST = 8  # columns of a terminal for a column of words
WIDE = 200  # columns, where nobody's terminal says


def print_columns(columns: Mapping[str, bool], rows: Iterable[Sequence[str]]) -> None:
    """Print a table. `columns`: their names, and whether they hold numbers."""
    cells = [list(row) for row in rows]
    table = Table(box=box.SIMPLE)
    for at, (name, numbers) in enumerate(columns.items()):
        least = max((len(row[at]) for row in cells), default=0) if numbers else None
        table.add_column(name, justify="right" if numbers else "left", min_width=least or LEAST, overflow="fold")
    for row in cells:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)
    narrowest = Measurement.get(console, console.options.update(max_width=WIDE), table).minimum
    console.print(table, width=max(console.width, narrowest), crop=False)  # broken by the terminal rather than cut
