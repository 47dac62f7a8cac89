"""A network that is timed by itself: how often it is opened, and what is said of the machine's pace."""

import pytest
from test_lut import Device

from nas.measure import CACHED, SESSION_VISITS, Reopened, measure_alone
from nas.profilers.timing import References, Workload


def test_a_network_of_any_kind_is_opened_anew_as_often_as_one_of_ours() -> None:
    device = Device(noise=0.5)
    opened = []

    def open_one() -> Workload:
        opened.append(device.open(CACHED)[0])
        return opened[-1]

    found = measure_alone(device, Reopened(open_one), None)
    assert len(opened) == -(-found.visits // SESSION_VISITS) > 1


def test_a_measurement_at_another_pace_than_the_table_s_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """How much a network slows down beside busy neighbours is not what the references do: accuracy.md has figures."""
    device = Device()
    paces = [1.3, 1.2, 0.5]
    now = device.stopwatch().visit(device.open(CACHED)[0]).reference
    for slower in paces:
        at_the_table = References(now.cached_ms / slower, now.streaming_ms)
        measure_alone(device, Reopened(lambda: device.open(CACHED)[0]), at_the_table)
    busier, quieter = capsys.readouterr().err.splitlines()
    assert busier.startswith("warning: a reference workload takes 1.30 times as long as when the table was built")
    assert busier.endswith("measure again in a quieter hour")
    assert "takes 0.50 times as long" in quieter and quieter.endswith("build the table anew in a quiet hour")
