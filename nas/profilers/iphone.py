"""iPhones: Xcode builds a small app, `devicectl` installs it, gives it a job folder and fetches what it measured.

The app (`harness/`, Swift as text) does all timing by itself; this file only carries. Needs a Mac, Xcode 16 or later, a phone
with iOS 17 or later, and an Apple developer team (a free one does).
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.profilers.bench import JOB_SCHEMA, Disturbed
from nas.progress import duration
from supernet.errors import InputError, unknown
from supernet.files import write_atomically

Say = Callable[[str], object]

COMPUTE_UNITS = {"npu": "CPU_AND_NE", "cpu": "CPU_ONLY"}  # of the devices whose ids end so
HARNESS = Path(__file__).parent / "harness"
OLDEST_IOS = 17
OLDEST_XCODE = 16  # for the model runner of coremltools' that --check builds; our app needs 15.3, which has MLComputePlan
POLL_S = 20.0  # asking a phone how far it is wakes it: seldom
STILL_S = 40.0  # the app that measures says something new within so long, unless it loads a model that takes longer
STALLED_S = 600.0  # so long without a new word, and the app is started again,
RESTARTS = 3  # so often
MOST_SAID = 600  # letters of a tool's errors that are shown
ENDS = ("done", "failed")  # states in which the app measures nothing any more
UNLOCK_S = 600.0  # a locked phone is waited for: it locks itself when the app that kept its screen on dies
TEAM_HELP = (  # Xcode shows it nowhere, and the letters in the name of a free account's certificate are another id
    "it is the OU, ten letters and digits, that this prints: "
    "security find-certificate -c 'Apple Development' -p | openssl x509 -noout -subject"
)

UNLOCK = "unlock the phone and keep it unlocked"
UPDATE_XCODE = f"update Xcode to {OLDEST_XCODE} or later: coremltools' model runner is in its project format"
FIXES = (  # what a tool's message speaks of -> what to do
    (r"install the platform", "Xcode has no iOS platform yet: run xcodebuild -downloadPlatform iOS"),
    (r"maximum number of installed apps", "a free account has three apps on a phone at a time: delete another one there"),
    (
        r"errSecInternalComponent",
        "unlock the login keychain (security unlock-keychain), sitting at the Mac: signing does not work over SSH",
    ),
    (r"license", "run: sudo xcodebuild -license accept"),
    (
        r"unable to find utility|requires Xcode|xcode-select",
        "install Xcode, then: sudo xcode-select -s /Applications/Xcode.app",
    ),
    (r"developer mode", "on the phone, switch on Settings > Privacy & Security > Developer Mode"),
    (r"\block(ed)?\b|unlock", UNLOCK),
    (r"explicitly trusted|inadequate entitlements|not trust", "trust it: Settings > General > VPN & Device Management"),
    (r"no account|provision|signing|development team|team id", f"sign in to Xcode and check --team-id: {TEAM_HELP}"),
    (
        r"no devices?|not connected|device.* not found|find a de(vice|stination)|disconnected|timed out|tunnel",
        "connect the phone by cable, unlock it and trust this Mac",
    ),
)


class PhoneLocked(InputError):
    """The phone is locked, and starts no app."""


def run(command: Sequence[str], timeout_s: float = 120.0) -> str:
    """Run one of Xcode's tools and return what it printed.

    Raises:
        InputError: it is not there, failed, or took longer than `timeout_s`; with its errors and what to do.
    """
    name = " ".join(command[:3] if command[0] == "xcrun" else command[:1])
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)  # noqa: S603
    except FileNotFoundError as error:
        raise InputError(
            f"{command[0]} is not there: install Xcode {OLDEST_XCODE} or later from the App Store and open it once"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"{name} took longer than {timeout_s:g} s: unlock the phone, check its cable, then try again"
        ) from error
    if found.returncode:
        text = found.stderr + "\n" + found.stdout
        lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
        said = "; ".join([line for line in lines if re.search(r"error", line, re.IGNORECASE)] or lines)
        fix = next((fix for pattern, fix in FIXES if re.search(pattern, text, re.IGNORECASE)), "see what it says")
        raise (PhoneLocked if fix == UNLOCK else InputError)(f"{name} failed ({said[:MOST_SAID]}): {fix}")
    return found.stdout


def devicectl(*arguments: str, timeout_s: float = 120.0) -> dict[str, Any]:
    """Run `devicectl` and return the result that it writes as JSON, which is the form that stays from release to release.

    Raises:
        InputError: as `run`.
    """
    first = next((place for place, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        # The first of the options: behind an app's identifier it would be an argument of the app.
        asked = [*arguments[:first], "--json-output", str(answer), *arguments[first:]]
        run(["xcrun", "devicectl", *asked], timeout_s)
        try:
            return dict(json.loads(answer.read_text())["result"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}


@dataclass(frozen=True)
class Phone:
    """A paired iPhone, as `devicectl` describes it."""

    udid: str
    name: str
    marketing_name: str  # "iPhone 15 Pro"
    ios: tuple[int, ...]
    developer_mode: bool
    reachable: bool

    def id(self, unit: str) -> str:
        """The device id of one of its units: `iphone15pro-npu`."""
        return f"{re.sub(r'[^a-z0-9]', '', self.marketing_name.lower())}-{unit}"


def phones() -> list[Phone]:
    """Return the paired iPhones, reachable or not. Phones with iOS 16 or earlier are not among them: devicectl knows none."""
    found = []
    for device in devicectl("list", "devices", "--timeout", "20").get("devices", []):
        hardware, state = device.get("hardwareProperties", {}), device.get("deviceProperties", {})
        connection = device.get("connectionProperties", {})
        if hardware.get("deviceType") != "iPhone" or hardware.get("reality", "physical") != "physical":
            continue
        version = re.findall(r"\d+", str(state.get("osVersionNumber", "")))
        found.append(
            Phone(
                udid=str(hardware.get("udid", "")),
                name=str(state.get("name", "iPhone")),
                marketing_name=str(hardware.get("marketingName", "iPhone")),
                ios=tuple(int(part) for part in version),
                developer_mode=state.get("developerModeStatus") == "enabled",
                reachable=connection.get("tunnelState") != "unavailable"
                and connection.get("pairingState", "paired") == "paired",
            )
        )
    return found


def find_phone(udid: str | None) -> Phone:
    """Return the connected iPhone with this UDID, or the only one.

    Raises:
        InputError: none is connected, several are and no UDID was given, or none has it.
    """
    there = [phone for phone in phones() if phone.reachable]
    if not there:
        raise InputError(
            f"no iPhone with iOS {OLDEST_IOS} or later is connected: connect it by cable, unlock it and trust this Mac"
        )
    if udid is None and len(there) > 1:
        known = ", ".join(f"{phone.udid} ({phone.marketing_name})" for phone in there)
        raise InputError(f"several iPhones are connected: say which with --udid: {known}")
    if udid is None:
        return there[0]
    for phone in there:
        if phone.udid == udid:
            return phone
    raise unknown("--udid", udid, [phone.udid for phone in there])


def iphone_id(udid: str | None, unit: str) -> str:
    """Return the device id of the connected iPhone's unit (npu or cpu), such as `iphone15pro-npu`.

    Raises:
        InputError: this is not a Mac, or there is no such phone.
    """
    _need_mac()
    return find_phone(udid).id(unit)


def measure_on_iphone(job_folder: Path, *, unit: str, team_id: str, udid: str | None, say: Say) -> Path:
    """Have a connected iPhone carry out the job in `job_folder`; return the path of the `results.json` written there.

    The phone goes on by itself when this process is killed; the same command waits for it, finds its results, or starts the
    app again, which goes on where it was. `unit` is npu or cpu; `say` takes one line for people.

    Raises:
        InputError: something that is needed is missing (`coreml_check` lists it all), or the job is for another phone or unit.
        Disturbed: the app on the phone ended, or stopped answering.
    """
    manifest, job = _read_job(Path(job_folder), unit)
    results = Path(job_folder) / "results.json"
    if _result_of(results, job) is not None:
        say(f"{results} is there already")
        return results
    _need_mac()
    check_team(team_id)
    phone = find_phone(udid)
    device = phone.id(unit)
    if manifest["device"] != device:
        raise InputError(f"the job is for {manifest['device']}, and the connected phone is {device}: connect that phone")
    if not phone.developer_mode:
        raise InputError("developer mode is off: on the phone, switch on Settings > Privacy & Security > Developer Mode")
    bundle = bundle_id(team_id)
    before, measures = _last_word(phone, bundle, job, say)
    if before.get("state") != "done":
        if not measures:
            say(f"building the measuring app for {phone.marketing_name}, iOS {'.'.join(map(str, phone.ios))}")
            with tempfile.TemporaryDirectory() as folder:
                app = build_app(Path(folder), phone, team_id)
                _once_unlocked(say, "device", "install", "app", "--device", phone.udid, str(app), timeout_s=300)
        if not before or before.get("state") == "failed":  # it may have failed because something did not arrive
            size = sum(file.stat().st_size for file in Path(job_folder).rglob("*") if file.is_file())
            say(f"copying {len(manifest['models'])} models to the phone, {size / 1e6:.0f} MB")
            copy = copy_to(phone, bundle, Path(job_folder), f"Documents/job-{job[:12]}")
            _once_unlocked(say, *copy, timeout_s=600 + size / 1e6)
        _wait(phone, bundle, job, before, measures, say)
    found = _fetch(phone, bundle, job, "results.json", timeout_s=300)
    if found is None or found.get("job_sha256") != job or not isinstance(found.get("environment"), dict):
        raise Disturbed("the app on the phone ended without results: give the same command again")
    warnings = warnings_about(found)
    place = {"marketing_name": phone.marketing_name, "device_id": device, "warnings": warnings}
    found["environment"] = {**found["environment"], **place}
    for line in warnings:
        say(line)
    write_atomically(results, json.dumps(found, indent=1, sort_keys=True) + "\n")
    return results


def warnings_about(results: Mapping[str, Any]) -> list[str]:
    """Return what speaks against trusting a phone's results, a sentence each."""
    place, flags = results["environment"], results.get("flags", {})
    found = []
    if place.get("low_power_mode"):
        found.append("low power mode was on, where clocks are lower: switch it off and measure anew")
    if place.get("battery_state") == "charging":
        found.append("the phone was charging, which warms it: charge it fully first")
    if place.get("dropped_visits"):
        found.append(f"{place['dropped_visits']} visits were dropped and repeated: the phone was hot, or the app not in front")
    for flag, what, then in (
        ("off-npu", "with operations off the Neural Engine", "rows are flagged"),
        ("timeout", "that did not load in time", "rows are missing"),
        ("load-error", "that did not load or run", "rows are missing"),
    ):
        if count := sum(value == flag for value in flags.values()):
            found.append(f"models {what}: {count}; their {then}")
    return found


def bundle_id(team_id: str) -> str:
    """Return the app's identifier, one a team, because Apple gives each to one team only."""
    return f"org.metapath.harness.{team_id.lower()}"


def check_team(team_id: str | None) -> None:
    """Raise InputError if this cannot be a developer team's id."""
    if not re.fullmatch(r"[A-Z0-9]{10}", team_id or ""):
        given = (
            f"{team_id!r} is not a developer team's id" if team_id else "an app for a phone must be signed by a developer team"
        )
        raise InputError(f"{given}: give --team-id; {TEAM_HELP}")


def xcode_version() -> tuple[str, bool]:
    """Return what Xcode says of its version, and whether it is new enough.

    Raises:
        InputError: it is not there.
    """
    said = run(["xcodebuild", "-version"]).split("\n")[0].strip()
    version = re.search(r"\d+", said)
    return said, version is not None and int(version.group()) >= OLDEST_XCODE


def build_command(project: Path, products: Path, phone: Phone, team_id: str) -> list[str]:
    """Return the command that builds and signs the app; Xcode makes the certificate and profile itself where they lack."""
    return [
        *("xcodebuild", "-project", str(project), "-scheme", "Harness", "-configuration", "Release"),
        *("-destination", f"platform=iOS,id={phone.udid}", "-derivedDataPath", str(products), "-quiet"),
        *("-allowProvisioningUpdates", "-allowProvisioningDeviceRegistration"),
        *("CODE_SIGN_STYLE=Automatic", f"DEVELOPMENT_TEAM={team_id}", f"PRODUCT_BUNDLE_IDENTIFIER={bundle_id(team_id)}"),
        "build",
    ]


def build_app(folder: Path, phone: Phone, team_id: str) -> Path:
    """Build the app in `folder` and return its path.

    Raises:
        InputError: Xcode did not build it, or is too old.
    """
    said, is_new_enough = xcode_version()
    if not is_new_enough:
        raise InputError(f"this is {said}: {UPDATE_XCODE}")
    source = folder / "harness"
    shutil.copytree(HARNESS, source)  # Xcode writes beside a project, and ours may be where nobody may write
    products = folder / "products"
    run(build_command(source / "Harness.xcodeproj", products, phone, team_id), timeout_s=900)
    app = products / "Build" / "Products" / "Release-iphoneos" / "Harness.app"
    if not app.exists():
        raise InputError("xcodebuild made no app: open the project in nas/profilers/harness with Xcode and see what it says")
    return app


def copy_to(phone: Phone, bundle: str, source: Path, destination: str) -> list[str]:
    """Return the arguments that copy a folder into the app's container.

    Never with --remove-existing-content, which is said to empty the whole container.
    """
    return ["device", "copy", "to", *_container(phone, bundle), "--source", str(source), "--destination", destination]


def copy_from(phone: Phone, bundle: str, source: str, destination: Path) -> list[str]:
    """Return the arguments that copy a file out of the app's container."""
    return ["device", "copy", "from", *_container(phone, bundle), "--source", source, "--destination", str(destination)]


def launch(phone: Phone, bundle: str, job: str, *, anew: bool) -> list[str]:
    """Return the arguments that start the app, again if it runs, on the job with this SHA-256.

    `anew`: it may have been killed by us, so models that were loading when it ended are not to be blamed.
    """
    asked = [bundle, job, *(["anew"] if anew else [])]
    return ["device", "process", "launch", "--device", phone.udid, "--terminate-existing", *asked]


def _container(phone: Phone, bundle: str) -> list[str]:
    """Return the arguments that name the app's container, and the user that apps run as, who must be able to read it."""
    domain = ["--domain-type", "appDataContainer", "--domain-identifier", bundle]
    return ["--device", phone.udid, *domain, "--user", "mobile"]


def _fetch(phone: Phone, bundle: str, job: str, name: str, timeout_s: float = 60) -> dict[str, Any] | None:
    """Return one of the app's JSON files about this job, None where it is not there (or half written)."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / name
        try:
            devicectl(*copy_from(phone, bundle, f"Documents/out-{job[:12]}/{name}", target), timeout_s=timeout_s)
            found = json.loads((target / name if target.is_dir() else target).read_text())
        except (InputError, OSError, ValueError):
            return None
    return found if isinstance(found, dict) else None


def _last_word(phone: Phone, bundle: str, job: str, say: Say) -> tuple[dict[str, Any], bool]:
    """Return the app's last word about the job, which it writes once it has found the job, empty where there is none; and
    whether it measures now."""
    # Asked twice: a phone that is slow to answer has not lost what it measured.
    found = _fetch(phone, bundle, job, "progress.json") or _fetch(phone, bundle, job, "progress.json") or {}
    if not found or found.get("state") in ENDS:
        return found, False
    say(f"the phone has begun this job: waiting {STILL_S:g} s to see whether it goes on")
    time.sleep(STILL_S)
    later = _fetch(phone, bundle, job, "progress.json") or found
    return later, later != found and later.get("state") not in ENDS


def _once_unlocked(say: Say, *arguments: str, timeout_s: float = 120.0) -> None:
    """Run `devicectl`; where the phone is locked, say so and try again for a while.

    Raises:
        PhoneLocked: nobody unlocked it.
    """
    start, asked = time.monotonic(), False
    while True:
        try:
            devicectl(*arguments, timeout_s=timeout_s)
            return
        except PhoneLocked:
            if time.monotonic() - start >= UNLOCK_S:
                raise
        if not asked:
            say(f"{UNLOCK} (Settings > Display & Brightness > Auto-Lock > Never): trying again for {UNLOCK_S / 60:g} min")
            asked = True
        time.sleep(POLL_S)


def _wait(phone: Phone, bundle: str, job: str, before: dict[str, Any], measures: bool, say: Say) -> None:
    """Start the app unless it measures, and return when it has measured everything; start it again when it does not answer
    any more. `before` is its last word so far."""
    for attempt in range(1 + RESTARTS):
        if attempt or not measures:
            _once_unlocked(say, *launch(phone, bundle, job, anew=not attempt))
        say("the app stopped answering: started again" if attempt else "measuring; leave the phone alone")
        start, first, last = time.monotonic(), None, before
        changed = start
        while time.monotonic() - changed < STALLED_S:
            time.sleep(POLL_S)
            found = _fetch(phone, bundle, job, "progress.json")
            if found is None or found == last:
                continue
            changed = time.monotonic()
            if found["state"] == "done":
                return
            if found["state"] == "failed":
                raise Disturbed(f"the app on the phone ended: {found.get('about')}")
            done, total = found["done"], found["total"]
            first = done if first is None else first
            left = (time.monotonic() - start) / (done - first) * (total - done) if done > first else None
            more = f", about {duration(left)} left" if left is not None else ""
            say(f"{found['state']}: {done} of {total} visits{more}")
            last = found
        before = last
    raise Disturbed(
        "the app on the phone does not answer: unlock the phone, see what it shows, and give the same command again"
    )


def _read_job(folder: Path, unit: str) -> tuple[dict[str, Any], str]:
    """Return a job's manifest and its SHA-256."""
    try:
        data = (folder / "manifest.json").read_bytes()
        manifest = json.loads(data)
        units = manifest["settings"]["compute_units"]
        missing = [name for name, entry in manifest["models"].items() if not (folder / entry["file"]).exists()]
    except OSError as error:
        raise InputError(f"{folder} is not a job folder: nas-build-lut --export-job DIR writes one") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}/manifest.json is not the manifest of a Core ML job: write the job folder anew") from error
    if manifest.get("schema") != JOB_SCHEMA or manifest.get("format") != "coreml":
        raise InputError(
            f"{folder} is a job of schema {manifest.get('schema')}, format {manifest.get('format')}; this version runs schema "
            f"{JOB_SCHEMA}, coreml: export the job anew"
        )
    if unit not in COMPUTE_UNITS:
        raise unknown("unit of an iPhone", unit, COMPUTE_UNITS)
    if units != COMPUTE_UNITS[unit]:
        raise InputError(
            f"the job in {folder} is for {units}, and --device iphone-{unit} wants {COMPUTE_UNITS[unit]}: write another job"
        )
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} of its models, such as {missing[0]}: copy the whole folder")
    return manifest, hashlib.sha256(data).hexdigest()


def _result_of(path: Path, job: str) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("job_sha256") == job else None


def _need_mac() -> None:
    if platform.system() != "Darwin":
        raise InputError(
            f"an iPhone is measured from a Mac with Xcode, and this is {platform.system()}: write a job folder here "
            "(nas-build-lut --device iphone15pro-npu --export-job DIR --format coreml) and give it to somebody who has one"
        )
