"""One page about a finished search, made from the files of its folder: `report.html`. No torch.

The page needs nothing beside itself: styles and drawings are in it. What a run does not have (an earlier version's run, a table
that has been moved) is left out, with a sentence in its place. The same files give the same page.
"""

from __future__ import annotations

import re
from html import escape
from importlib.resources import files
from pathlib import Path

from nas.kept import REPORT
from nas.report.choices import choices_section
from nas.report.device import device_section
from nas.report.headline import headline
from nas.report.made import made_section
from nas.report.network import network_section
from nas.report.run import Run, read_run
from nas.report.trajectory import throughput_section, trajectory_section
from nas.report.trust import accuracy_section, table_section
from supernet.files import reading, write_atomically


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` about the search that ended in `folder`, and return its path.

    Raises:
        InputError: the folder holds no finished search.
    """
    folder = Path(folder)
    with reading(f"what {folder} holds", "it was changed, or is another version's: search anew"):  # every figure of it is shown
        page = report(read_run(folder))
    path = folder / REPORT
    write_atomically(path, page)
    return path


def report(run: Run) -> str:
    """Return the page about a run."""
    parts = [
        ("network", "The network", network_section(run)),
        ("choices", "What each choice is worth", choices_section(run)),
        ("way", "The way to the target", trajectory_section(run)),
        ("images", "Images that share a pass", throughput_section(run)),
        ("device", "Other networks on this device", device_section(run)),
        ("trust", "Predicted and measured", accuracy_section(run)),
        ("table", "Where the milliseconds come from", table_section(run)),
        ("made", "How it was made", made_section(run)),
    ]
    parts = [part for part in parts if part[2]]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in parts)
    bodies = ((name, title, _unbroken(body)) for name, title, body in parts)
    sections = "".join(f'<section id="{name}"><h2>{title}</h2>{body}</section>\n' for name, title, body in bodies)
    style = files("nas.report").joinpath("report.css").read_text(encoding="utf-8")
    title = f"{escape(run.arch.name)}: search report"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<header>{_unbroken(headline(run))}</header>\n"
        f"<nav><ul>{links}</ul></nav>\n<main>\n{sections}</main>\n</body>\n</html>\n"
    )


def _unbroken(page: str) -> str:
    """Return the page with numbers and their units kept on one line."""
    return re.sub(r"(?<=\d) (?=(?:ms|px)\b|%)", "\N{NO-BREAK SPACE}", page)
