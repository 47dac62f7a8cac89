"""The way to an iPhone: the app as text, a fake Xcode, a fake phone."""

import hashlib
import json
import os
import plistlib
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hosts import be_linux, be_mac
from test_lut import cost, device_ms, small_space
from torch import Tensor, nn

from nas import cli, coreml_package
from nas.export_forms import COREML
from nas.job import export_job
from nas.lut import import_results
from nas.measure import CACHED, STREAMING, name_of
from nas.plan import Work, work_for
from nas.profilers import coreml, coreml_check, iphone
from nas.profilers.bench import Disturbed, Plan
from nas.profilers.coreml_check import check
from nas.profilers.iphone import PhoneLocked, iphone_id, measure_on_iphone
from nas.table import LatencyTable
from supernet.errors import InputError

pytestmark = pytest.mark.coreml
UDID = "00008130-000A1B2C3D4E001E"
TEAM = "ABCDE12345"
# The part of a certificate that names its team (OID 2.5.4.11), between others: here the issuer's unit and the owner's name.
NAMES = (b"\x0b\x13\x02G3", b"\x03\x0c\x2aApple Development: Someone (XYZ9876543)", b"\x0b\x0c\x0a" + TEAM.encode())
CERTIFICATE = ssl.DER_cert_to_PEM_cert(b"".join(b"\x30\x11\x06\x03\x55\x04" + name for name in NAMES))


# --- the app, as text -----------------------------------------------------------------------------------------------------


def swift() -> str:
    return "\n".join(path.read_text() for path in sorted(iphone.HARNESS.glob("*.swift")))


def needs(struct: str) -> set[str]:
    """The fields without which the app does not read this part of a manifest."""
    body = re.search(
        rf"struct {struct}: Decodable \{{(.*?)\n *(?:\}}|struct)", (iphone.HARNESS / "Job.swift").read_text(), re.S
    )
    assert body is not None
    return set(re.findall(r"let (\w+):", body.group(1)))


def test_the_app_writes_the_fields_of_results() -> None:
    for name in ("schema", "unit", "job_sha256", "device", "environment", "started_at", "finished_at", "visits", "flags"):
        assert f'"{name}": ' in swift()
    for flag in ("off-npu", "timeout", "load-error"):
        assert f'"flag": "{flag}"' in swift()
    for what in ("isIdleTimerDisabled", "thermalState", "isLowPowerModeEnabled", "options: .atomic", "load_timeout_s"):
        assert what in swift()


def test_the_app_blames_no_model_for_what_is_not_its_fault() -> None:
    bench = (iphone.HARNESS / "Bench.swift").read_text()
    references = re.findall(r"^.*burst\(\$0.*$|^.*warmUp\(\"reference.*$", bench, re.M)
    assert len(references) == 2
    for line in references:
        assert "try ofReferences {" in line, "a reference's failure is the run's"
    for flag in ('"flag": "timeout"', '"flag": "load-error", "why": "\\(error)"'):
        assert flag in bench
        for place in re.finditer(re.escape(flag), bench):
            near = bench[place.start() - 500 : place.end() + 200]
            assert "if isDisturbed {" in near, "what fails while the app is not in front is tried again"
    assert "if Job.isAnew { try log.add(" in bench and 'arguments.dropFirst().contains("anew")' in swift()


def test_the_project_builds_every_file_of_the_app() -> None:
    project = (iphone.HARNESS / "Harness.xcodeproj" / "project.pbxproj").read_text()
    defined = re.findall(r"^\t\t([0-9A-F]{24})\b.* = \{$", project, re.M)
    assert len(defined) == len(set(defined))
    assert set(re.findall(r"[0-9A-F]{24}", project)) == set(defined), "every object is defined once"
    for path in iphone.HARNESS.glob("*.swift"):
        assert f"{path.name} in Sources" in project
    scheme = next(iphone.HARNESS.rglob("*.xcscheme")).read_text()
    assert set(re.findall(r'BlueprintIdentifier = "(\w+)"', scheme)) <= set(defined)
    info = plistlib.loads((iphone.HARNESS / "Info.plist").read_bytes())
    assert info["UIFileSharingEnabled"] is True, "a job can be put there by hand, with Finder"
    for opening, closing in ("{}", "()", "[]"):
        for text in (project, re.sub(r'//.*|"(\\.|[^"\\])*"', "", swift())):
            assert text.count(opening) == text.count(closing)


@pytest.mark.skipif(shutil.which("swiftc") is None, reason="no Swift compiler here: the app is only read as text")
def test_the_app_parses() -> None:
    subprocess.run(["swiftc", "-parse", *sorted(map(str, iphone.HARNESS.glob("*.swift")))], check=True)


# --- a phone --------------------------------------------------------------------------------------------------------------

FAKE = r"""#!{python} -IS
import hashlib, json, os, shutil, sys
from pathlib import Path

home = Path({home!r})
mode = (home / "mode").read_text()
command = [Path(sys.argv[0]).name, *sys.argv[1:]]
with (home / "commands").open("a") as file:
    file.write(json.dumps(command) + "\n")
given = dict(zip(command, command[1:]))


def fail(text):
    print(text, file=sys.stderr)
    raise SystemExit(1)


def answer(result):
    Path(given["--json-output"]).write_text(json.dumps({{"info": {{"outcome": "success"}}, "result": result}}))
    raise SystemExit(0)


def play(job_sha256):
    texts = [path.read_bytes() for path in (home / "phone").rglob("manifest.json")]
    (manifest,) = [json.loads(text) for text in texts if hashlib.sha256(text).hexdigest() == job_sha256]
    out = home / "phone" / "Documents" / f"out-{{job_sha256[:12]}}"
    out.mkdir(exist_ok=True)
    progress = {{"schema": 1, "job_sha256": job_sha256, "done": 4, "total": 8, "about": "mb4d", "beat": 1}}
    progress["state"] = "measuring"
    (out / "progress.json").write_text(json.dumps(progress))
    if mode.startswith("dies"):
        (home / "mode").write_text("well")
        if mode == "dies and locks":  # nothing keeps its screen on any more
            (home / "locked").touch()
        return
    state = "failed" if mode == "fails" else "done"
    after = [{{**progress, "done": 6, "beat": 2}}, {{**progress, "done": 7, "beat": 3}}]
    (home / "next").write_text(json.dumps([*after, {{**progress, "state": state, "done": 8, "beat": 4}}]))
    known = json.loads((home / "ms.json").read_text())
    visits = {{name: [known.get(name, [0.3, 0.5, 0.8])] * 20 for name in manifest["models"]}}
    environment = {{"model": "iPhone16,1", "os": "iOS 18.1", "low_power_mode": True, "thermal_states": {{"nominal": 40}}}}
    results = {{
        "schema": 4, "unit": "ms", "job_sha256": job_sha256, "device": manifest["device"], "environment": environment,
        "started_at": "2026-11-21T05:00:00Z", "finished_at": "2026-11-21T05:10:00Z", "visits": visits,
        "flags": {{"2 x mb3d": "off-npu"}},
    }}
    (out / "results.json").write_text(json.dumps(results))


if command[0] == "xcodebuild":
    if "-version" in command:
        print("Xcode 15.4\nBuild version 15F31d" if mode == "old Xcode" else "Xcode 16.2\nBuild version 16C5032a")
    elif mode == "no account":
        fail("** BUILD FAILED **\nerror: No Account for Team \"ABCDE12345\". Add a new account in Accounts settings.")
    else:
        (Path(given["-derivedDataPath"]) / "Build/Products/Release-iphoneos/Harness.app").mkdir(parents=True)
elif command[0] == "xcode-select":
    print("/Applications/Xcode.app/Contents/Developer")
elif command[:2] == ["security", "find-certificate"]:
    print({certificate!r})
elif command[0] == "security":
    print('  1) 0123456789ABCDEF "Apple Development: Someone (XYZ9876543)"\n     1 valid identities found')
elif command[:2] == ["xcrun", "--find"]:
    print("/Applications/Xcode.app/Contents/Developer/usr/bin/" + command[2])
elif command[1:4] == ["devicectl", "list", "devices"]:
    phones = {{"none": [], "two": ["{udid}", "00008110-000000000000002E"]}}.get(mode, ["{udid}"])
    ios = "16.7" if mode == "old" else "18.1"
    answer({{"devices": [
        {{
            "identifier": "ID", "connectionProperties": {{"pairingState": "paired", "tunnelState": "disconnected"}},
            "deviceProperties": {{"name": "Mine", "osVersionNumber": ios, "developerModeStatus": "enabled"}},
            "hardwareProperties": {{"udid": udid, "deviceType": "iPhone", "marketingName": "iPhone 15 Pro"}},
        }}
        for udid in phones
    ] + [
        {{"hardwareProperties": {{"deviceType": "appleWatch", "udid": "W"}}}},
        {{"hardwareProperties": {{"deviceType": "iPhone", "udid": "S", "reality": "simulated"}}}},
    ]}})
elif command[2:5] == ["device", "info", "lockState"]:
    if mode == "does not say":
        fail("ERROR: The device returned an unexpected response. (com.apple.dt.CoreDeviceError error 3)")
    answer({{"passcodeRequired": (home / "locked").exists(), "unlockedSinceBoot": True}})
elif command[2:5] == ["device", "copy", "to"]:
    shutil.copytree(given["--source"], home / "phone" / given["--destination"], dirs_exist_ok=True)
    answer({{}})
elif command[2:5] == ["device", "copy", "from"]:
    source = home / "phone" / given["--source"]
    if not source.exists():
        fail("ERROR: The file doesn't exist.")
    shutil.copy(source, given["--destination"])
    after = json.loads((home / "next").read_text()) if (home / "next").exists() else []
    if after and source.name == "progress.json":  # time passes between two questions
        source.write_text(json.dumps(after.pop(0)))
        (home / "next").write_text(json.dumps(after))
    answer({{}})
elif command[2:5] == ["device", "process", "launch"]:
    if (home / "locked").exists():
        fail("ERROR: The application failed to launch. (com.apple.dt.CoreDeviceError error 10002)\nReason: Locked")
    play(command[command.index("--terminate-existing") + 2])
    answer({{"process": {{"processIdentifier": 7}}}})
else:
    answer({{}})
"""


class FakeXcode:
    def __init__(self, home: Path) -> None:
        self.home = home
        (home / "phone" / "Documents").mkdir(parents=True)
        self.be("well")
        self.takes({})

    def takes(self, ms: dict[str, list[float]]) -> None:
        """Set what the phone's visits of models say: raw, cached and streaming reference."""
        (self.home / "ms.json").write_text(json.dumps(ms))

    def be(self, mode: str) -> None:
        (self.home / "mode").write_text(mode)
        if mode == "locked":
            (self.home / "locked").touch()

    def unlock(self) -> None:
        (self.home / "locked").unlink()

    @property
    def commands(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.home / "commands").read_text().splitlines()]

    def did(self, *words: str) -> list[list[str]]:
        return [command for command in self.commands if set(words) <= set(command)]


class Clock:
    """Time that passes when somebody sleeps; `at` some seconds, something happens."""

    def __init__(self) -> None:
        self.now = 0.0
        self.at: dict[float, Callable[[], object]] = {}

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for when in [when for when in self.at if when <= self.now]:
            self.at.pop(when)()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(iphone, "time", found)
    return found


@pytest.fixture
def xcode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeXcode:
    be_mac(monkeypatch)
    monkeypatch.setattr(iphone, "STALLED_S", 60.0)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("xcrun", "xcodebuild", "xcode-select", "security"):
        (tools / name).write_text(
            FAKE.format(python=sys.executable, home=str(tmp_path / "fake"), udid=UDID, certificate=CERTIFICATE)
        )
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return FakeXcode(tmp_path / "fake")


def write_job(tmp_path: Path, device: str = "iphone15pro-npu", units: str = "CPU_AND_NE") -> Path:
    folder = tmp_path / "job"
    names = ["empty", "1 x mb4d", "2 x mb3d", "network 1", "cached", "streaming"]
    models = {}
    for number, name in enumerate(names):
        package = folder / "models" / f"m{number:04}.mlpackage"
        package.mkdir(parents=True)
        (package / "Manifest.json").write_text("{}")
        shape = [1, 48, 56, 56]
        models[name] = {
            "file": f"models/{package.name}",
            "sha256": coreml_package.package_sha256(package),
            "input": {"name": "x", "shape": shape, "dtype": "float16"},
        }
    manifest = {
        "schema": 4,
        "device": device,
        "format": "coreml",
        "space": "name: small\n",
        "settings": {
            "runtime": "coreml",
            "precision": "fp16",
            "batch": 1,
            "threads": 1,
            "export": COREML,
            "compute_units": units,
        },
        "timing": {
            "warm_up_ms": 300,
            "warm_up_calls": 50,
            "discarded": 5,
            "min_calls": 3,
            "max_calls": 9,
            "visit_ms": 1.0,
            "load_timeout_s": 60,
            "seed": 0,
        },
        "plan": {
            "pieces": names[:3],
            "networks": names[3:4],
            "rows": [{"1 x mb4d": 1.0}],
            "smallest": "network 1",
            "touched_bytes": {"1 x mb4d": 1 << 20},
            "row_goal": 0.02,
            "floor": 0.002,
            "network_goal": 0.01,
            "min_visits": 12,
            "passes": [6, 12, 32],
            "batch_models": 32,
            "batch_bytes": 1 << 30,
        },
        "references": ["cached", "streaming"],
        "models": models,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return folder


def test_a_job_goes_to_the_phone_and_its_results_come_back(xcode: FakeXcode, tmp_path: Path) -> None:
    folder, said = write_job(tmp_path), []  # type: ignore[var-annotated]
    path = measure_on_iphone(folder, unit="npu", team_id=TEAM, udid=None, say=said.append)
    assert path == folder / "results.json"
    results = json.loads(path.read_text())
    manifest = (folder / "manifest.json").read_bytes()
    assert results["job_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert results["device"] == iphone_id(UDID, "npu") == "iphone15pro-npu"
    assert results["environment"]["marketing_name"] == "iPhone 15 Pro"
    assert any("low power mode" in line for line in results["environment"]["warnings"])
    assert results["visits"]["2 x mb3d"] == [[0.3, 0.5, 0.8]] * 20
    assert results["flags"] == {"2 x mb3d": "off-npu"}
    assert any("low power mode" in line for line in said)
    assert any("models with operations off the Neural Engine: 1;" in line for line in said)
    (build,) = xcode.did("xcodebuild", "build")
    for word in (f"platform=iOS,id={UDID}", "DEVELOPMENT_TEAM=ABCDE12345", "-allowProvisioningUpdates", "build"):
        assert word in build
    assert "PRODUCT_BUNDLE_IDENTIFIER=org.metapath.harness.abcde12345" in build
    assert xcode.did("install", "app", UDID)[0][-1].endswith("Harness.app")
    (copied,) = xcode.did("copy", "to")
    assert copied[copied.index("--domain-type") + 1] == "appDataContainer"
    for command in xcode.did("copy"):
        assert command[command.index("--user") + 1] == "mobile", "whom apps run as, who must read and write it"
    for command in xcode.did("devicectl"):
        assert next(word for word in command if word.startswith("-")) == "--json-output", (
            "what follows an app's id is the app's"
        )
    (launched,) = xcode.did("launch")
    assert launched[-3:] == ["org.metapath.harness.abcde12345", results["job_sha256"], "anew"]
    assert not xcode.did("--remove-existing-content"), "it empties the app's whole container"
    before = len(xcode.commands)
    assert measure_on_iphone(folder, unit="npu", team_id=TEAM, udid=UDID, say=said.append) == path
    assert len(xcode.commands) == before, "results that are there are not measured again"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of this test's, and packages that are not looked at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nas.job._cache", lambda: tmp_path / "cache")

    def stub(module: nn.Module, example: Tensor, path: Path, key: str = "") -> None:
        path.mkdir(parents=True)
        (path / "Manifest.json").write_text(repr(example.shape))

    for module in (coreml_package, coreml_check):
        monkeypatch.setattr(module, "save_package", stub)


def test_the_command_makes_a_table_of_what_the_phone_says(xcode: FakeXcode, here: None, tmp_path: Path) -> None:
    space = small_space()
    work = work_for(space)
    xcode.takes({name: [device_ms(m) for m in (model, CACHED, STREAMING)] for name, model in work.models.items()})
    space.save("space.yaml")
    cli.build_lut(["--device", "iphone-npu", "--team-id", TEAM, "--space", "space.yaml", "--out", "out"])
    table = LatencyTable.load(tmp_path / "out" / "iphone15pro-npu.csv")
    assert (table.device, table.provenance, table.meta["compute_units"]) == ("iphone15pro-npu", "imported", "CPU_AND_NE")
    for layer, row in table.rows.items():
        assert row.ms == pytest.approx(cost(layer), rel=1e-3, abs=1e-6), layer
    manifest = json.loads(next((tmp_path / "cache").rglob("manifest.json")).read_text())
    entry = manifest["models"][manifest["references"][0]]
    groups = {"Settings": manifest["settings"], "Timing": manifest["timing"], "Plan": manifest["plan"], "Entry": entry}
    declared = set(re.findall(r"let (\w+):", (iphone.HARNESS / "Job.swift").read_text()))
    fits_only_python = {
        "space",
        "run",
        "rows",
        "verify",
        "made_with",
        "protocol",
        "smallest",
        "row_goal",
        "floor",
        "network_goal",
        "strict_visits",
        "session_visits",
    }
    told_by_python = {"runtime", "precision", "batch", "threads", "export"}
    for struct, group in {"Manifest": manifest, **groups, "Input": entry["input"]}.items():
        assert needs(struct) <= set(group), "the app reads no field that is not there"
        assert set(group) - declared <= fits_only_python | told_by_python, "nor leaves one out that it should know"


def test_a_job_of_a_search_is_run_too_and_its_results_are_for_the_search(
    xcode: FakeXcode, here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = small_space()
    which = {"request_sha256": "0" * 64, "network": name_of(tuple(space.largest.layers()))}
    plan = Plan(pieces=(), networks=(which["network"],), rows=(), smallest=which["network"], touched_bytes={})
    work = Work({}, [space.largest], space.largest, plan)
    export_job(tmp_path / "job", space, work, device="iphone15pro-npu", form="coreml", verify=which)
    cli.build_lut(["--device", "iphone-npu", "--team-id", TEAM, "--import-results", "job", "--out", "out"])
    assert "nas-search --from RUN --verify job/results.json" in capsys.readouterr().out
    assert json.loads(Path("job/results.json").read_text())["visits"][which["network"]] and not Path("out").exists()


def test_a_phone_that_was_too_hot_is_measured_anew_by_the_same_command(
    xcode: FakeXcode, here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = small_space()
    work = work_for(space)
    cool = {name: [device_ms(m) for m in (model, CACHED, STREAMING)] for name, model in work.models.items()}
    xcode.takes({name: [ms * (1 + 3 * (at % 2)) for ms in times] for at, (name, times) in enumerate(cool.items())})
    space.save("space.yaml")
    command = ["--device", "iphone-npu", "--team-id", TEAM, "--space", "space.yaml", "--out", "out"]
    with pytest.raises(SystemExit) as ended:
        cli.build_lut(command)
    assert ended.value.code == 1
    assert "too busy or too hot to be measured" in capsys.readouterr().err and not Path("out").exists()
    xcode.takes(cool)
    cli.build_lut(command)
    assert LatencyTable.load(tmp_path / "out" / "iphone15pro-npu.csv").serves(space)


def test_results_that_a_person_brings_from_a_phone_are_warned_of_too(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = small_space()
    work = work_for(space, precision="fp16")
    manifest = export_job(tmp_path / "job", space, work, device="iphone15pro-npu", form="coreml").read_bytes()
    results = {
        "schema": 4,
        "unit": "ms",
        "job_sha256": hashlib.sha256(manifest).hexdigest(),
        "device": "iphone15pro-npu",
        "environment": {"model": "iPhone16,1", "low_power_mode": True, "battery_state": "charging", "dropped_visits": 3},
        "visits": {n: [[device_ms(m) for m in (model, CACHED, STREAMING)]] * 12 for n, model in work.models.items()},
    }
    path = tmp_path / "job" / "results.json"
    path.write_text(json.dumps(results))
    table = import_results(path, tmp_path / "out")
    said = [line.removeprefix("warning: ") for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    for warning, words in zip(table.meta["warnings"], ("low power mode", "charging", "3 visits"), strict=True):
        assert words in warning and warning in said


def test_a_killed_command_finds_the_phones_results(xcode: FakeXcode, tmp_path: Path) -> None:
    folder = write_job(tmp_path)
    measure_on_iphone(folder, unit="npu", team_id=TEAM, udid=UDID, say=print).unlink()
    results = json.loads(measure_on_iphone(folder, unit="npu", team_id=TEAM, udid=UDID, say=print).read_text())
    assert results["device"] == "iphone15pro-npu", "as the job says"
    assert results["environment"]["device_id"] == "iphone15pro-npu", "which one did it is recorded"
    assert len(xcode.did("copy", "to")) == len(xcode.did("launch")) == len(xcode.did("xcodebuild", "build")) == 1


class CommandKilled(BaseException):
    pass


def killed_while_measuring(line: str) -> None:
    if "of 8 visits" in line:
        raise CommandKilled


def test_a_phone_that_still_measures_is_waited_for(xcode: FakeXcode, clock: Clock, tmp_path: Path) -> None:
    folder, said = write_job(tmp_path), []  # type: ignore[var-annotated]
    with pytest.raises(CommandKilled):
        measure_on_iphone(folder, unit="npu", team_id=TEAM, udid=UDID, say=killed_while_measuring)
    began = clock.now
    results = json.loads(measure_on_iphone(folder, unit="npu", team_id=TEAM, udid=UDID, say=said.append).read_text())
    assert results["visits"]
    assert len(xcode.did("launch")) == len(xcode.did("install")) == len(xcode.did("xcodebuild", "build")) == 1
    assert clock.now - began >= iphone.STILL_S and said[1] == "measuring; leave the phone alone"


def test_a_phone_that_has_ended_since_is_started_again(xcode: FakeXcode, tmp_path: Path) -> None:
    folder = write_job(tmp_path)
    with pytest.raises(CommandKilled):
        measure_on_iphone(folder, unit="npu", team_id=TEAM, udid=UDID, say=killed_while_measuring)
    (xcode.home / "next").unlink()  # its last word stays the last
    assert measure_on_iphone(folder, unit="npu", team_id=TEAM, udid=UDID, say=print).exists()
    assert [command[-1] for command in xcode.did("launch")] == ["anew", "anew"], "the second may have been ended by us"
    assert len(xcode.did("copy", "to")) == 1


@pytest.mark.parametrize("mode", ["dies once", "dies and locks"])
def test_an_app_that_stops_is_started_again(xcode: FakeXcode, clock: Clock, tmp_path: Path, mode: str) -> None:
    xcode.be(mode)
    said: list[str] = []
    if mode == "dies and locks":
        clock.at[iphone.STALLED_S + 250] = xcode.unlock
    measure_on_iphone(write_job(tmp_path), unit="npu", team_id=TEAM, udid=UDID, say=said.append)
    first, *others = xcode.did("launch")
    assert first[-1] == "anew"
    assert others and all(re.fullmatch(r"[0-9a-f]{64}", again[-1]) for again in others), "the app died by itself"
    assert "measuring: 4 of 8 visits" in said
    asked = [line for line in said if "unlock the phone" in line]
    assert len(asked) == (1 if mode == "dies and locks" else 0) and (len(others) > 1) == (mode == "dies and locks")
    assert all("Auto-Lock > Never" in line for line in asked)


def test_a_phone_that_nobody_unlocks_ends_the_command(xcode: FakeXcode, clock: Clock, tmp_path: Path) -> None:
    xcode.be("dies and locks")
    with pytest.raises(PhoneLocked, match="unlock the phone and keep it unlocked"):
        measure_on_iphone(write_job(tmp_path), unit="npu", team_id=TEAM, udid=UDID, say=print)
    assert iphone.UNLOCK_S <= clock.now - iphone.STALLED_S <= iphone.UNLOCK_S + 100


def test_an_app_that_fails_ends_the_command(xcode: FakeXcode, tmp_path: Path) -> None:
    folder = write_job(tmp_path)
    xcode.be("fails")
    for _ in range(2):
        with pytest.raises(Disturbed, match="the app on the phone ended: mb4d"):
            measure_on_iphone(folder, unit="npu", team_id=TEAM, udid=UDID, say=print)
    assert not (folder / "results.json").exists()
    assert len(xcode.did("copy", "to")) == 2, "what had not arrived may be why"


def test_an_app_that_never_answers_ends_the_command(
    xcode: FakeXcode, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def hangs(command: list[str], timeout_s: float = 120.0) -> str:
        if "from" not in command:
            return real(command, timeout_s)
        asked.append(timeout_s)
        clock.sleep(timeout_s)
        raise InputError(f"it took longer than {timeout_s:g} s")

    real = iphone.run
    monkeypatch.setattr(iphone, "run", hangs)
    monkeypatch.setattr(iphone, "RESTARTS", 1)
    monkeypatch.setattr(iphone, "STALLED_S", 600.0)
    with pytest.raises(Disturbed, match="does not answer"):
        measure_on_iphone(write_job(tmp_path), unit="npu", team_id=TEAM, udid=UDID, say=print)
    assert set(asked) == {60}
    assert 1200 < clock.now < 1500, "ten minutes each time, however long an answer takes"


@pytest.mark.parametrize(
    ("mode", "unit", "team", "udid", "said"),
    [
        ("well", "cpu", TEAM, None, "the job .* is for CPU_AND_NE, and --device iphone-cpu wants CPU_ONLY"),
        ("well", "npu", "me", None, "'me' is not a developer team's id"),
        ("well", "npu", TEAM, "00008130-WRONG", f"unknown --udid .*{UDID}"),
        ("none", "npu", TEAM, None, "no iPhone with iOS 17 or later is connected"),
        ("two", "npu", TEAM, None, f"several iPhones .* --udid: {UDID}"),
        ("no account", "npu", TEAM, None, "No Account for Team .*: sign in to Xcode"),
        ("locked", "npu", TEAM, None, "xcrun devicectl device failed .*: unlock the phone"),
        ("old Xcode", "npu", TEAM, None, "this is Xcode 15.4: update Xcode to 16 or later: coremltools"),
    ],
)
def test_what_stands_in_the_way_is_one_line(
    xcode: FakeXcode, tmp_path: Path, mode: str, unit: str, team: str, udid: str | None, said: str
) -> None:
    xcode.be(mode)
    with pytest.raises(InputError, match=said) as refusal:
        measure_on_iphone(write_job(tmp_path), unit=unit, team_id=team, udid=udid, say=print)
    assert "\n" not in str(refusal.value)


def test_a_job_of_another_phone_is_refused(xcode: FakeXcode, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="for iphone12-npu, and the connected phone is iphone15pro-npu"):
        measure_on_iphone(write_job(tmp_path, device="iphone12-npu"), unit="npu", team_id=TEAM, udid=None, say=print)


def test_what_speaks_against_a_phones_results_is_said() -> None:
    place = {"low_power_mode": False, "battery_state": "full", "dropped_visits": 0}
    assert iphone.warnings_about({"environment": place, "flags": {}}) == []
    place = {"low_power_mode": True, "battery_state": "charging", "dropped_visits": 7}
    flags = {"a": "off-npu", "b": "timeout", "c": "load-error", "d": "off-npu"}
    found = iphone.warnings_about({"environment": place, "flags": flags})
    for line, words in zip(
        found, ("low power", "charging", "7 visits", "Neural Engine: 2", "in time: 1", "run: 1"), strict=True
    ):
        assert words in line


def test_half_a_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a job folder"):
        measure_on_iphone(tmp_path / "none", unit="npu", team_id=TEAM, udid=None, say=print)
    folder = write_job(tmp_path)
    shutil.rmtree(folder / "models" / "m0002.mlpackage")
    with pytest.raises(InputError, match="lacks 1 of its models, such as 2 x mb3d"):
        measure_on_iphone(folder, unit="npu", team_id=TEAM, udid=None, say=print)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(InputError, match="not the manifest of a Core ML job"):
        measure_on_iphone(folder, unit="npu", team_id=TEAM, udid=None, say=print)


@pytest.mark.parametrize(
    ("text", "said", "fix"),
    [
        (
            """xcodebuild: error: Unable to find a destination matching the provided destination specifier:
                { platform:iOS, id:00008130-000A1B2C3D4E001E }
            Ineligible destinations for the "Harness" scheme:
                { platform:iOS, name:Any iOS Device, error:iOS 18.2 is not installed. To use with Xcode, first download and
                  install the platform }""",
            "error:iOS 18.2 is not installed",
            "xcodebuild -downloadPlatform iOS",
        ),
        ("ERROR: The specified device was not found. (com.apple.dt.CoreDeviceError error 1000)", "1000", "connect the phone"),
        (
            """ERROR: Failed to install the app on the device. (com.apple.dt.CoreDeviceError error 3002)
            This device has reached the maximum number of installed apps using a free developer profile""",
            "error 3002",
            "delete another one",
        ),
        ("Harness.app: errSecInternalComponent\nerror: Command CodeSign failed", "CodeSign", "unlock the login keychain"),
        ("error: No Account for Team.\nerror: No profiles were found\nerror: No Account for Team.", "; error: No prof", "team"),
        ("it ended", "(it ended)", "see what it says"),
    ],
)
def test_what_a_tool_says_comes_with_what_to_do(text: str, said: str, fix: str) -> None:
    with pytest.raises(InputError) as refusal:
        iphone.run([sys.executable, "-IS", "-c", f"raise SystemExit({text!r})"])
    told, _, what_to_do = str(refusal.value).rpartition("): ")
    assert said in told + ")" and fix in what_to_do and "\n" not in told
    assert told.count("No Account for Team") <= 1, "what is said twice is shown once"


def test_what_a_tool_says_is_cut() -> None:
    with pytest.raises(InputError) as refusal:
        iphone.run([sys.executable, "-IS", "-c", "raise SystemExit('error: ' + 'x' * 5000)"])
    assert 600 < len(str(refusal.value)) < 800


def test_a_tool_that_takes_too_long_is_left() -> None:
    with pytest.raises(InputError, match=r"took longer than 0.01 s"):
        iphone.run([sys.executable, "-c", "import time; time.sleep(9)"], timeout_s=0.01)


# --- check ----------------------------------------------------------------------------------------------------------------


def test_check_off_a_mac_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    be_linux(monkeypatch)
    lines = check("iphone-npu", None, None)
    what = [line[0] for line in lines]
    assert what[0] == "a Mac"
    assert re.match(r"coremltools \d", what[1])
    assert what[2:] == [
        *("Xcode", "devicectl", "an iPhone connected", "iOS", "developer mode", "phone unlocked", "signing team"),
        "one model on the Neural Engine",
    ]
    assert [ok for _, ok, _ in lines] == [False, True, *[False] * 8]
    assert all(fix for _, ok, fix in lines if not ok)


def test_check_with_everything_there(xcode: FakeXcode, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    runner = SimpleNamespace(session=SimpleNamespace(stop=lambda: asked.append("stopped")))
    monkeypatch.setattr(coreml, "phone_with_runner", lambda udid, team: asked.append((udid, team)) or runner)
    monkeypatch.setattr(coreml, "off_npu", lambda package, device=None: asked.append((package.name, device)) or [])
    lines = check("iphone-npu", TEAM, UDID)
    assert all(ok for _, ok, _ in lines), lines
    assert [line[0] for line in lines][2:6] == ["Xcode 16.2", "devicectl", "iPhone 15 Pro connected", "iOS 18.1"]
    assert asked == [(UDID, TEAM), ("model.mlpackage", runner), "stopped"]


def test_a_runner_that_does_not_start_may_want_the_phones_trust(xcode: FakeXcode, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(udid: str, team: str) -> None:
        raise RuntimeError("the app was not launched\nor so")

    monkeypatch.setattr(coreml_check, "save_package", lambda *_: None)
    monkeypatch.setattr(coreml, "phone_with_runner", refused)
    what, ok, fix = check("iphone-npu", TEAM, UDID)[-1]
    assert (what, ok) == ("one model on the Neural Engine", False)
    assert "(the app was not launched or so): unlock the phone; trust the app under Settings" in fix
    assert fix.endswith("then again")


def test_operations_off_a_macs_neural_engine_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    be_mac(monkeypatch)
    monkeypatch.setattr(coreml_check, "save_package", lambda *_: None)
    monkeypatch.setattr(coreml, "off_npu", lambda package: ["gather", "gather"])
    assert check("mac-npu", None, None)[-1] == (
        "one model on the Neural Engine",
        False,
        "gather do not run there: the table would not be the Neural Engine's",
    )


def test_a_system_that_cannot_tell_where_operations_run_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    be_mac(monkeypatch, "14.3")
    what, ok, _ = check("mac-npu", None, None)[-1]
    assert ok and what == "one model on the Neural Engine: only macOS 14.4 and iOS 17.4 or later can tell"


def test_coremltools_finds_a_phone_whose_tunnel_was_closed(xcode: FakeXcode, monkeypatch: pytest.MonkeyPatch) -> None:
    """coremltools knows a phone only while its tunnel is open, which CoreDevice closes where nothing uses it."""
    from coremltools.models.ml_program.experimental import remote_device

    async def prepare(credentials: Any) -> str:
        return str(credentials.development_team)

    phone = SimpleNamespace(udid=UDID, prepare_for_model_debugging=prepare)
    monkeypatch.setattr(
        remote_device.Device,
        "get_connected_devices",
        lambda kind: [phone] if xcode.did("devicectl", "device", "info", "details", UDID) else [],
    )
    assert coreml.phone_with_runner(UDID, TEAM) == TEAM


@pytest.mark.parametrize(
    ("mode", "team", "bad", "fix"),
    [
        ("none", TEAM, "an iPhone connected", "connect it by cable"),
        ("old", TEAM, "iOS 16.7", "devicectl knows no older phones"),
        ("locked", TEAM, "phone unlocked", "unlock the phone"),
        ("does not say", TEAM, "phone unlocked", "unlock the phone"),
        ("old Xcode", TEAM, "Xcode 15.4", "update Xcode to 16 or later"),
        ("well", None, "signing team", "give --team-id"),
        ("well", "XYZ9876543", "signing team XYZ9876543", f"are of {TEAM}: give one of them"),
    ],
)
def test_check_names_the_fix(xcode: FakeXcode, mode: str, team: str | None, bad: str, fix: str) -> None:
    xcode.be(mode)
    lines = check("iphone-cpu", team, None)
    what, _, how = next(line for line in lines if not line[1])
    assert what == bad
    assert fix in how
