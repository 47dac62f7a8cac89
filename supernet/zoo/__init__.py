"""Published networks as ArchConfigs, and what is ours of them (its file says so), one YAML file each. No torch."""

from functools import cache
from pathlib import Path

from supernet.arch import ArchConfig
from supernet.errors import unknown
from supernet.files import is_path, refuse_folder

_FOLDER = Path(__file__).parent


def zoo_names() -> list[str]:
    """Return the names of the published networks that ship."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


@cache
def zoo(name: str) -> ArchConfig:
    """Return a published network.

    Raises:
        InputError: no network of this name ships; the message gives the nearest names.
    """
    if name not in zoo_names():
        raise unknown("network", name, zoo_names())
    return ArchConfig.load(_FOLDER / f"{name}.yaml")


def load_arch(name_or_path: str | Path) -> ArchConfig:
    """Return a published network by its name, or read one from a YAML file.

    Raises:
        InputError: there is neither, or the file cannot be used.
    """
    text = str(name_or_path)
    if text not in zoo_names():
        refuse_folder(text, "searched.yaml", "arch.yaml")
    return ArchConfig.load(text) if is_path(text) else zoo(text)
