"""What a Mac or an iPhone needs to be measured: each line ok, or the fix."""

from __future__ import annotations

import platform
import re
import ssl
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from nas.coreml_package import coremltools, save_package
from nas.device_ids import MACS, PHONES
from nas.measure import CACHED, build_module
from nas.profilers import coreml
from nas.profilers.iphone import OLDEST_IOS, UPDATE_XCODE, Phone, check_team, devicectl, find_phone, run, xcode_version
from supernet.errors import InputError, unknown

Line = tuple[str, bool, str]  # what is needed, whether it is there, what to do if not

FIRST = "the lines above come first"
OLDEST_IOS_WITH_PLANS = (17, 4)
TRUST = "unlock the phone; trust the app under Settings > General > VPN & Device Management"
_UNIT_OF_TEN = rb"\x06\x03\x55\x04\x0b[\x0c\x13]\x0a([A-Z0-9]{10})"  # DER of an organizational unit (OID 2.5.4.11)


def check(device_kind: str, team_id: str | None = None, udid: str | None = None) -> list[Line]:
    """Return what `device_kind` (iphone-npu, iphone-cpu, mac-npu or mac-cpu) needs: what, whether it is there, and the fix.

    Works anywhere; a line whose question cannot be asked yet says what comes first. On an iPhone whose other lines are ok, the
    last one builds coremltools' model runner, which takes minutes.
    """
    if device_kind not in (*PHONES, *MACS):
        raise unknown("device for --check", device_kind, (*PHONES, *MACS))
    lines = [_check_macos(), _check_coremltools()]
    if device_kind.startswith("mac-"):
        lines += [_check_chip()] if device_kind == "mac-npu" else []
        phone = None
    else:
        lines += [*_check_xcode_and_phone(udid), _check_signing(team_id)]
        phone = find_phone(udid) if all(ok for _, ok, _ in lines) else None
    if device_kind.endswith("-npu"):
        lines.append(_check_neural_engine(all(ok for _, ok, _ in lines), phone, team_id or ""))
    return lines


def _check_macos() -> Line:
    found = coreml.macos_version()
    oldest = ".".join(map(str, coreml.OLDEST_MACOS))
    if found is None:
        return "a Mac", False, f"this is {platform.system()}: write a job folder with --export-job and use somebody's Mac"
    return f"macOS {found[0]}.{found[1]}", found >= coreml.OLDEST_MACOS, f"update to macOS {oldest} or later"


def _check_coremltools() -> Line:
    try:
        version = coremltools().__version__
    except InputError as error:
        return "coremltools", False, str(error)
    return f"coremltools {version}", True, ""


def _check_chip() -> Line:
    return "Apple silicon", platform.machine() == "arm64", "this processor has no Neural Engine: choose --device mac-cpu"


def _check_xcode_and_phone(udid: str | None) -> list[Line]:
    lines: list[Line] = []
    the_phone = cache(lambda: find_phone(udid))

    def ask(what: str, question: Callable[[], Line]) -> None:
        """Add the answer to a question, unless an earlier one failed."""
        if platform.system() != "Darwin" or (lines and not lines[-1][1]):
            lines.append((what, False, FIRST))
            return
        try:
            lines.append(question())
        except InputError as error:
            lines.append((what, False, str(error)))

    def xcode() -> Line:
        return *xcode_version(), UPDATE_XCODE

    def tool() -> Line:
        run(["xcrun", "--find", "devicectl"])
        return "devicectl", True, ""

    def connected() -> Line:
        phone = the_phone()
        return f"{phone.marketing_name} connected", True, ""

    def system() -> Line:
        ios = the_phone().ios
        text = ".".join(map(str, ios))
        return f"iOS {text}", ios[:1] >= (OLDEST_IOS,), f"update to iOS {OLDEST_IOS} or later: devicectl knows no older phones"

    def developer_mode() -> Line:
        fix = "on the phone, switch on Settings > Privacy & Security > Developer Mode, then restart it"
        return "developer mode", the_phone().developer_mode, fix

    def unlocked() -> Line:
        fix = "unlock the phone, and keep it unlocked: no app starts on a locked one"
        try:
            state = devicectl("device", "info", "lockState", "--device", the_phone().udid)
        except InputError as error:
            return "phone unlocked", False, f"{fix} (it does not say whether it is: {error})"
        is_open = not state.get("passcodeRequired", False) and state.get("unlockedSinceBoot", True)
        return "phone unlocked", bool(is_open), fix

    ask("Xcode", xcode)
    ask("devicectl", tool)
    ask("an iPhone connected", connected)
    ask("iOS", system)
    ask("developer mode", developer_mode)
    ask("phone unlocked", unlocked)
    return lines


def _check_signing(team_id: str | None) -> Line:
    if platform.system() != "Darwin":
        return "signing team", False, FIRST
    try:
        check_team(team_id)
        valid = run(["security", "find-identity", "-v", "-p", "codesigning"])
        if not re.search(r"Apple Development", valid):
            return f"signing team {team_id}", False, "make a certificate: Xcode > Settings > Accounts > Manage Certificates > +"
        teams = teams_of(run(["security", "find-certificate", "-a", "-c", "Apple Development", "-p"]))
    except InputError as error:
        return "signing team", False, str(error)
    fix = f"the certificates on this Mac are of {', '.join(sorted(teams)) or 'no team'}: give one of them, or make another"
    return f"signing team {team_id}", team_id in teams, fix


def teams_of(certificates: str) -> set[str]:
    """Return the ids of the teams that certificates (PEM, one after the other) were made for: their organizational units.

    The ten characters in the name of a free account's certificate are another id.
    """
    found = re.findall(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", certificates, re.DOTALL)
    units = (re.findall(_UNIT_OF_TEN, ssl.PEM_cert_to_DER_cert(pem)) for pem in found)
    return {unit.decode() for of_one in units for unit in of_one}


def _check_neural_engine(possible: bool, phone: Phone | None, team_id: str) -> Line:
    what = "one model on the Neural Engine"
    if not possible:
        return what, False, FIRST
    mac, ios = coreml.macos_version() or (0, 0), OLDEST_IOS_WITH_PLANS if phone is None else phone.ios
    if mac < coreml.OLDEST_MACOS_WITH_PLANS or ios < OLDEST_IOS_WITH_PLANS:
        return f"{what}: only macOS 14.4 and iOS 17.4 or later can tell", True, ""
    try:
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "model.mlpackage"
            save_package(*build_module(CACHED, deploy=True), package)
            off = coreml.off_npu(package) if phone is None else _off_npu_of_phone(package, phone, team_id)
    except Exception as error:  # coremltools' remote interface is experimental and raises what it likes
        fix = "" if phone is None else f": {TRUST}; then again"
        return what, False, f"the compute plan cannot be read ({' '.join(str(error).split())[:200]}){fix}"
    return what, not off, f"{', '.join(sorted(set(off)))} do not run there: the table would not be the Neural Engine's"


def _off_npu_of_phone(package: Path, phone: Phone, team_id: str) -> list[str]:
    device = coreml.phone_with_runner(phone.udid, team_id)
    try:
        return coreml.off_npu(package, device)
    finally:
        device.session.stop()  # else a devicectl process stays
