"""What is installed is what is here."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    files = [file.relative_to(ROOT) for name in ("nas", "supernet", "latency_tables") for file in (ROOT / name).rglob("*.py")]
    assert {".".join(file.parent.parts) for file in files} <= set(listed)
