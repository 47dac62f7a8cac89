"""What is known of this machine's CPU, and on which of its cores sessions run."""

import os
from pathlib import Path

import pytest

from nas.profilers import ort_session
from nas.profilers.ort_session import cpu_id, environment, pinned, throttle_state, warnings_about

INTEL_HYBRID = {"/sys/devices/cpu_core/cpus": "0-3,6", "/sys/devices/cpu_atom/cpus": "4-5,7"}
PHONE = {f"/sys/devices/system/cpu/cpu{core}/cpu_capacity": str(c) for core, c in enumerate([250] * 4 + [750] * 3 + [1024])}
TWO_THREADS_A_CORE = {
    f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list": f"{core // 2 * 2}-{core // 2 * 2 + 1}"
    for core in range(8)
}
GOVERNOR = "/sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"


@pytest.mark.parametrize(
    ("files", "one", "three", "kinds"),
    [
        (INTEL_HYBRID, {6}, {2, 3, 6}, "5 of capacity 1 and 3 of capacity 0"),
        (PHONE, {7}, {5, 6, 7}, "1 of capacity 1024 and 3 of capacity 750 and 4 of capacity 250"),
        ({}, {7}, {5, 6, 7}, None),
        (TWO_THREADS_A_CORE, {7}, {3, 5, 7}, None),
        (TWO_THREADS_A_CORE | {"/sys/devices/cpu_core/cpus": "0-3"}, {3}, {1, 3, 7}, "4 of capacity 1 and 4 of capacity 0"),
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
    assert len(unlike) == (len({ort_session._capacity(core) for core in three}) > 1)


def test_threads_that_share_a_core_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_session, "CAN_PIN", True)
    monkeypatch.setattr(ort_session, "_read", TWO_THREADS_A_CORE.get)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    shared = {threads: [w for w in warnings_about(environment(threads)) if "share a core" in w] for threads in (4, 5)}
    assert not shared[4]
    assert shared[5] == ["some of the 5 threads share a core: give as many as there are cores"]


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz", "xeon-platinum-8259cl-cpu"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "xeon-f6m79-cpu"),
        ("Intel(R) Xeon(R) Processor @ 2.50GHz", "xeon-f6m79-cpu"),
        ("AMD EPYC", "epyc-f6m79-cpu"),
        ("AMD EPYC 7B13", "epyc-7b13-cpu"),
    ],
)
def test_a_model_that_is_hidden_is_told_by_its_family(
    name: str, id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\ncpu family\t: 6\nmodel\t\t: 79\nmodel name\t: {name}\n\n")
    monkeypatch.setattr(ort_session, "_read", lambda path: None)
    monkeypatch.setattr(ort_session, "Path", lambda path: cpuinfo)
    assert cpu_id() == id


@pytest.mark.parametrize(
    ("model", "id"),
    [
        ("Raspberry Pi 4 Model B Rev 1.4\0", "raspberry-pi-4-model-b-rev-1-4-cpu"),
        ("linux,dummy-virt\0", "aarch64-0x41-0xd08-cpu"),  # a virtual machine, of whatever processor
        (None, "raspberry-pi-4-model-b-rev-1-4-cpu"),  # in a container
    ],
)
def test_a_board_is_told_by_its_name(model: str | None, id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    processors = "".join(f"processor\t: {n}\nCPU implementer\t: 0x41\nCPU part\t: 0xd08\n\n" for n in range(4))
    board = "Revision\t: c03114\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n"
    cpuinfo.write_text(processors + (board if model is None else ""))
    monkeypatch.setattr(ort_session, "_read", lambda path: model)
    monkeypatch.setattr(ort_session, "Path", lambda path: cpuinfo)
    monkeypatch.setattr(ort_session.platform, "machine", lambda: "aarch64")
    assert cpu_id() == id


def test_a_clock_that_is_held_down_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_session, "throttle_bits", lambda: None)
    for number, (kind, state) in enumerate([("Processor", 0), ("cpufreq-cpu0", 3), ("pwm-fan", 4), ("intel_powerclamp", -1)]):
        device = tmp_path / f"cooling_device{number}"
        device.mkdir()
        (device / "type").write_text(f"{kind}\n")
        (device / "cur_state").write_text(f"{state}\n")
    assert throttle_state(tmp_path) == "cpufreq-cpu0 cools at step 3"
    (tmp_path / "cooling_device1" / "cur_state").write_text("0\n")
    assert throttle_state(tmp_path) is None


def test_a_mac_that_limits_its_speed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Note: No thermal warning level has been recorded\nCPU_Speed_Limit \t= 75\n"
    monkeypatch.setattr(ort_session.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(ort_session, "_output", lambda *command: said if command[0] == "pmset" else None)
    assert throttle_state(tmp_path) == "speed limit 75 %"
    said = said.replace("75", "100")
    assert throttle_state(tmp_path) is None
