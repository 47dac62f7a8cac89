"""Other machines than this one, as far as the code asks."""

import platform

import pytest

from nas.profilers import coreml, iphone


def be_mac(monkeypatch: pytest.MonkeyPatch, version: str = "15.1", machine: str = "arm64") -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: (version, ("", "", ""), machine))
    for module in (coreml, iphone):
        assert module.platform is platform
    monkeypatch.setattr(coreml, "cpu_name", lambda: "Apple M2 Pro")
    monkeypatch.setattr(coreml, "cpu_id", lambda: "apple-m2-pro-cpu")
    monkeypatch.setattr(coreml, "thermal_state", lambda: "nominal")


def be_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
