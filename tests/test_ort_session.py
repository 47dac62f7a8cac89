"""What is known of this machine's CPU, and on which of its cores sessions run."""

import os

import pytest

from nas.profilers import ort_session
from nas.profilers.ort_session import environment, pinned, warnings_about

INTEL_HYBRID = {"/sys/devices/cpu_core/cpus": "0-3,6", "/sys/devices/cpu_atom/cpus": "4-5,7"}
PHONE = {f"/sys/devices/system/cpu/cpu{core}/cpu_capacity": str(c) for core, c in enumerate([250] * 4 + [750] * 3 + [1024])}
GOVERNOR = "/sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"


@pytest.mark.parametrize(
    ("files", "one", "three", "kinds"),
    [
        (INTEL_HYBRID, {6}, {2, 3, 6}, "5 of capacity 1 and 3 of capacity 0"),
        (PHONE, {7}, {5, 6, 7}, "1 of capacity 1024 and 3 of capacity 750 and 4 of capacity 250"),
        ({}, {7}, {5, 6, 7}, None),
    ],
)
def test_sessions_run_on_the_last_cores_of_the_fastest_kind(
    files: dict[str, str], one: set[int], three: set[int], kinds: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on: list[set[int]] = []
    governors = {GOVERNOR.format(core): "performance" if {core} == one else "powersave" for core in range(8)}
    monkeypatch.setattr(ort_session, "CAN_PIN", True)
    monkeypatch.setattr(ort_session, "_read", lambda path: {**files, **governors}.get(path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: on.append(set(cores)), raising=False)
    with pinned(1):
        pass
    with pinned(3):
        pass
    assert on == [one, set(range(8)), three, set(range(8))]
    assert environment(1)["core_kinds"] == kinds
    assert environment(1)["governor"] == "performance", "that of the core that is used"
    alike = [w for w in warnings_about(environment(1)) if "unlike" in w]
    unlike = [w for w in warnings_about(environment(3)) if "unlike" in w]
    assert not alike
    assert len(unlike) == (files is PHONE)
