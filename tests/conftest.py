"""One thread for torch, in the tests and in what they start: its operations here are so small that two threads wait for each
other at every one of them, and the tests already run on several cores (pytest-xdist).

Hypothesis draws the same examples each time; `HYPOTHESIS_PROFILE=thorough pytest tests/test_user_files.py` draws 500 new
ones for each kind of file.
"""

import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # before torch is imported
os.environ["METAPATH_NAS_CACHE"] = ""  # nothing of the tests' images is kept on disk

import torch  # noqa: E402

torch.set_num_threads(1)

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]
ALWAYS: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": SLOW}
settings.register_profile("usual", max_examples=12, derandomize=True, **ALWAYS)
settings.register_profile("thorough", max_examples=500, print_blob=True, **ALWAYS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "usual"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("coremltools") is None:
        for item in items:
            if item.get_closest_marker("coreml"):
                item.add_marker(pytest.mark.skip(reason="coremltools is not installed"))


@pytest.fixture(autouse=True, scope="session")
def known_once() -> Iterator[None]:
    """What is measured for a space is chosen from a thousand networks, and the digits are scaled: once, not for each of a
    hundred builds and searches."""
    from nas import data, lut, plan, remote

    plans: dict[Any, plan.Work] = {}

    def planned(space: Any, layers: Any = None, seed: int = 0, precision: str = "fp32") -> plan.Work:
        key = (space, None if layers is None else tuple(layers), seed, precision)
        if key not in plans:
            plans[key] = plan.work_for(space, layers, seed, precision)
        return plans[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (lut, remote):
            patch.setattr(module, "work_for", planned)
        patch.setattr(data, "_load_digits", cache(data._load_digits))
        yield
