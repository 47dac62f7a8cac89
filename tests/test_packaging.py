"""What is installed is what is here."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FILES = [
    path.relative_to(ROOT)
    for name in ("nas", "supernet", "latency_tables")
    for path in (ROOT / name).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
]


def test_every_package_is_in_the_wheel() -> None:
    assert {".".join(file.parent.parts) for file in FILES if file.suffix == ".py"} <= set(SETTINGS["packages"])


def test_every_other_file_is_in_the_wheel_too() -> None:
    assert SETTINGS["package-data"].keys() <= set(SETTINGS["packages"])
    shipped = {
        path.relative_to(ROOT)
        for package, patterns in SETTINGS["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    assert [file for file in FILES if file.suffix != ".py" and file not in shipped] == []
