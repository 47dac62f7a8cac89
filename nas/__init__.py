"""Latency-aware neural architecture search: a network that runs in N milliseconds on your device.

The public names are loaded when they are first used, so that a command's `--help` imports neither torch nor pandas.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nas.feature_maps import features as features
    from nas.slimming import slim as slim
    from nas.solver import Budget as Budget
    from nas.solver import Solution as Solution
    from nas.solver import frontier as frontier
    from nas.solver import solutions as solutions
    from nas.table import LatencyTable as LatencyTable
    from nas.table import Target as Target
    from nas.trajectory import Evaluation as Evaluation
    from nas.trajectory import Trajectory as Trajectory
    from supernet.arch import ArchConfig as ArchConfig
    from supernet.errors import InputError as InputError
    from supernet.model import Complexity as Complexity
    from supernet.model import build_model as build_model
    from supernet.model import count as count
    from supernet.space import SearchSpace as SearchSpace
    from supernet.weights import load_timm_weights as load_timm_weights
    from supernet.zoo import zoo as zoo
    from supernet.zoo import zoo_names as zoo_names

_HOME = {
    "ArchConfig": "supernet.arch",
    "Budget": "nas.solver",
    "Complexity": "supernet.model",
    "Evaluation": "nas.trajectory",
    "InputError": "supernet.errors",
    "LatencyTable": "nas.table",
    "SearchSpace": "supernet.space",
    "Solution": "nas.solver",
    "Target": "nas.table",
    "Trajectory": "nas.trajectory",
    "build_model": "supernet.model",
    "count": "supernet.model",
    "features": "nas.feature_maps",
    "frontier": "nas.solver",
    "load_timm_weights": "supernet.weights",
    "slim": "nas.slimming",
    "solutions": "nas.solver",
    "zoo": "supernet.zoo",
    "zoo_names": "supernet.zoo",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nas' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
