"""What the pages say stays true: their links lead somewhere, and the commands on them are what the programs take."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from nas import cli

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/README.md",
    ROOT / "latency_tables/README.md",
]
COMMANDS = {
    "nas-build-lut": cli.build_lut,
    "nas-search": cli.search,
    "nas-profile": cli.profile,
    "nas-train": cli.train,
    "nas-export": cli.export,
}
FENCE = re.compile(r"^ *```.*?\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE):
        name = slug(heading)
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(CODE.sub("", prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target}: there is no {file}"
        assert not anchor or anchor in anchors(file), f"{target}: {file.name} has no such heading"


def test_the_index_has_every_page() -> None:
    index = LINK.findall((ROOT / "docs/README.md").read_text())
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= set(index)


def given(text: str) -> Iterator[list[str]]:
    """The words of every command of the package in some lines of shell, without what starts it (torchrun, a prompt)."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||;", line):
            if not re.search(r"(^|\s)nas-[a-z]", part):
                continue
            words = shlex.split(part, comments=True)
            start = next((i for i, word in enumerate(words) if word in COMMANDS), None)
            if start is not None:
                yield words[start:]


def commands() -> list[tuple[str, list[str]]]:
    return [(page.name, words) for page in PAGES for block in FENCE.findall(page.read_text()) for words in given(block)]


def test_the_pages_have_commands() -> None:
    assert {words[0] for _, words in commands()} == set(COMMANDS), "the commands are found at all"


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda value: value if isinstance(value, str) else shlex.join(value)
)
def test_every_command_is_one_that_the_program_takes(
    page: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []
    monkeypatch.setattr(cli, "run_command", lambda command, *_: done.append(command))
    try:
        COMMANDS[words[0]](words[1:])
    except SystemExit:
        pytest.fail(f"{page}: {capsys.readouterr().err}")
    assert done == [words[0]]


def test_flags_that_the_prose_names_exist(capsys: pytest.CaptureFixture[str]) -> None:
    helps = {}
    for name, command in COMMANDS.items():
        with pytest.raises(SystemExit):
            command(["--help"])
        helps[name] = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
    for page in PAGES:
        for code in CODE.findall(prose(page)):
            words = code.split()
            name = next((word for word in words if word in COMMANDS), None)
            flags = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
            if name is not None:
                flags = {word.partition("=")[0] for word in words[words.index(name) :] if re.match(r"--[a-z]", word)}
                assert flags <= helps[name], f"{page.name}: `{code}` has {flags - helps[name]}"


def test_the_settings_that_the_page_lists_are_those_that_there_are_with_their_defaults() -> None:
    from nas.settings import SupernetSettings

    section = (ROOT / "docs/search.md").read_text().split("\n## Settings\n")[1]
    listed = yaml.safe_load(re.search(r"```yaml\n(.*?)```", section, re.DOTALL)[1])  # type: ignore[index]
    assert listed == asdict(SupernetSettings())
    (other,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/imagenet.md").read_text(), re.DOTALL)
    assert SupernetSettings(**yaml.safe_load(other)) != SupernetSettings()
