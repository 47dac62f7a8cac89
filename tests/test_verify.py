"""A search for a device that is elsewhere: its network goes there as a job, and what comes back repairs the search."""

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import save_file
from test_cli import INIT_SETTINGS, TINY, additive_table, board_table, refused

from nas import cli
from nas.kept import Checks
from nas.measure import CACHED, STREAMING, name_of
from nas.pretrained import space_of
from nas.profilers.timing import Measurement
from nas.table import LatencyTable
from nas.verify import _export
from supernet.arch import ArchConfig
from supernet.errors import InputError
from supernet.model import build_model
from supernet.space import SearchSpace

REFERENCES = (0.25, 0.3)  # what the made-up table says that they take


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LatencyTable:
    return board_table(tmp_path, monkeypatch)


@dataclass(frozen=True)
class Searched:
    """A search that has ended, for a device that is not here: where it was made, its target, and what it printed."""

    home: Path
    ms: float
    said: str


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """Searched once, for every test to copy."""
    home = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        table = board_table(home, patch)
        ms = 0.8 * table.predict_ms(SearchSpace.load("micro.yaml").largest)
        where = ["--device", "board-cpu", "--space", "micro.yaml", "--config", "settings.yaml", "--out", "run"]
        cli.search(["--target-ms", f"{ms:.6f}", *where])
    return Searched(home, ms, said.getvalue())


@pytest.fixture
def target(table: LatencyTable, searched: Searched, tmp_path: Path) -> float:
    """The target of the search, whose folder is here as if it had been searched here: with this folder's table."""
    shutil.copytree(searched.home / "run", "run")
    there, here = (json.dumps(str(home))[1:-1] for home in (searched.home, tmp_path))  # as the files spell them
    for path in (Path("run/request.json"), Path("run/result.json")):
        path.write_text(path.read_text().replace(there, here))
    return searched.ms


def board_says(ms: float, slowness: float = 1.0) -> Path:
    """What run_job.py would write for the network of the run, on a board that is slower now than for its table."""
    folder = Path("run/verify-job")
    manifest = json.loads((folder / "manifest.json").read_text())
    visit = [slowness * ms, *(slowness * reference for reference in REFERENCES)]
    results = {
        "schema": 4,
        "unit": "ms",
        "job_sha256": hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest(),
        "device": "board-cpu",
        "environment": {"cpu": "Board"},
        "visits": {name: [visit] * 60 for name in manifest["plan"]["networks"]},
        "flags": {},
    }
    path = folder / "results.json"
    path.write_text(json.dumps(results))
    return path


def result() -> dict[str, float]:
    found: dict[str, float] = json.loads(Path("run/result.json").read_text())
    return found


def test_the_job_measures_the_found_network_and_nothing_else(
    capsys: pytest.CaptureFixture[str], target: float, searched: Searched
) -> None:
    assert "nas-search --from run --verify" in searched.said, "an unmeasured result says how to measure it"
    cli.search(["--from", "run", "--verify"])
    said = capsys.readouterr().out
    assert "run_job.py" in said
    manifest = json.loads(Path("run/verify-job/manifest.json").read_text())
    network = name_of(tuple(ArchConfig.load("run/searched.yaml").layers()))
    assert manifest["plan"]["networks"] == [network]
    assert set(manifest["models"]) == {network, name_of(CACHED), name_of(STREAMING), "empty"}
    assert manifest["device"] == "board-cpu"


def test_two_searches_of_one_request_do_not_share_what_a_device_has_kept(target: float) -> None:
    """Its network is the same, and devices keep visits by the job's hash."""
    shutil.copytree("run", "twin")
    for name in ("run", "twin", "run"):
        cli.search(["--from", name, "--verify"])
        manifests = [Path(f"{each}/verify-job/manifest.json") for each in ("run", "twin")]
        if name == "run":
            first = manifests[0].read_bytes()
    assert manifests[0].read_bytes() == first, "the same job until its results were read"
    mine, its = (json.loads(path.read_text()) for path in manifests)
    assert mine["verify"] == its["verify"] and mine["models"] == its["models"]
    assert mine["run"] != its["run"]


def test_a_network_that_meets_its_target_there_is_confirmed(target: float) -> None:
    before = Path("run/searched.yaml").read_text()
    cli.search(["--from", "run", "--verify"])
    cli.search(["--from", "run", "--verify", str(board_says(0.985 * target, slowness=1.5))])
    assert Path("run/searched.yaml").read_text() == before
    assert result()["measured_ms"] == pytest.approx(0.985 * target, rel=1e-3), "normalised by the references"
    assert result()["met"]


def test_a_network_that_misses_there_is_searched_again_until_it_meets(target: float, table: LatencyTable) -> None:
    """The board takes 1.3 times what the table says."""
    rounds = 0
    while result()["measured_ms"] is None:
        cli.search(["--from", "run", "--verify"])
        ms = 1.3 * table.predict_ms(ArchConfig.load("run/searched.yaml"))
        cli.search(["--from", "run", "--verify", str(board_says(ms))])
        rounds += 1
        assert rounds < 6
    assert rounds >= 2
    assert result()["measured_high_ms"] <= target
    assert result()["measured_ms"] == pytest.approx(1.3 * result()["predicted_ms"], rel=1e-3)


def test_a_search_that_began_with_a_network_goes_on_with_it(table: LatencyTable, tmp_path: Path) -> None:
    Path("mine.yaml").write_text(TINY)
    Path("init.yaml").write_text(INIT_SETTINGS)
    whole = ArchConfig.load("mine.yaml")
    save_file(build_model(whole).state_dict(), "w.safetensors")
    own = additive_table(space_of(whole), "board-cpu")
    own.save(tmp_path / "tables")
    target = 0.8 * own.predict_ms(whole)
    where = ["--device", "board-cpu", "--config", "init.yaml", "--out", "run"]
    cli.search(["--target-ms", f"{target:.6f}", "--init", "mine.yaml", "--weights", "w.safetensors", *where])
    teacher = Path("run/teacher.safetensors").read_bytes()
    cli.search(["--from", "run", "--verify"])
    found = 0.985 * target
    cli.search(["--from", "run", "--verify", str(board_says(found))])
    assert result()["measured_ms"] == pytest.approx(found, rel=1e-3)
    assert result()["init"]["network"] == "mine"  # type: ignore[index]
    assert Path("run/teacher.safetensors").read_bytes() == teacher


def test_results_of_another_machine_are_refused(
    capsys: pytest.CaptureFixture[str], target: float, table: LatencyTable, tmp_path: Path
) -> None:
    known = LatencyTable(table.device, table.rows, table.calibrations, "imported", {**table.meta, "cpu": "Board"})
    known.save(tmp_path / "tables")
    cli.search(["--from", "run", "--verify"])
    path = board_says(0.985 * target)
    path.write_text(json.dumps({**json.loads(path.read_text()), "environment": {"cpu": "Laptop"}}))
    capsys.readouterr()
    line = refused(cli.search, ["--from", "run", "--verify", str(path)], capsys)
    assert "measured on Laptop, but the table of board-cpu on Board" in line


def test_results_of_a_device_that_was_too_busy_are_refused(capsys: pytest.CaptureFixture[str], target: float) -> None:
    cli.search(["--from", "run", "--verify"])
    path = board_says(0.985 * target)
    results = json.loads(path.read_text())
    results["visits"] = {
        name: [*made[:30], *([3 * ms for ms in v] for v in made[30:])] for name, made in results["visits"].items()
    }
    path.write_text(json.dumps(results))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.search(["--from", "run", "--verify", str(path)])
    line = capsys.readouterr().err
    assert ended.value.code == 1 and line.count("\n") == 1
    before = hashlib.sha256(Path("run/verify-job/manifest.json").read_bytes()).hexdigest()
    cli.search(["--from", "run", "--verify"])
    after = hashlib.sha256(Path("run/verify-job/manifest.json").read_bytes()).hexdigest()
    assert before != after, "a phone would give the same visits again"
    assert "its reference workload took 0.25 to 0.75 ms" in line
    assert "`nas-search --from run --verify` makes a job anew: run it when the device has nothing else to do" in line
    assert result()["measured_ms"] is None


def test_a_device_that_would_not_be_used_is_refused(
    capsys: pytest.CaptureFixture[str], target: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ["--device", "ssh://me@there"]
    cli.search(["--from", "run", "--verify"])
    capsys.readouterr()
    line = refused(cli.search, ["--from", "run", "--verify", str(board_says(0.985 * target)), *there], capsys)
    assert "--device ssh://me@there would measure anew: leave one of them out" in line
    monkeypatch.setattr("nas.devices.profiler_of", lambda table: "here")
    line = refused(cli.search, ["--from", "run", "--verify", *there], capsys)
    assert "board-cpu is measured on this machine, nothing at ssh://me@there" in line
    assert not Path("run/measurements.csv").exists()


def test_a_mac_measures_its_networks_itself(table: LatencyTable, tmp_path: Path) -> None:
    mac = replace(table, device="apple-m2-npu", meta={**table.meta, "runtime": "coreml"})
    space = SearchSpace.load("micro.yaml")
    with pytest.raises(InputError, match="apple-m2-npu are measured by nas-search on the machine with it"):
        _export(tmp_path / "job", space.largest, mac, space, {"request_sha256": "", "network": ""})
    assert not (tmp_path / "job").exists()


def test_a_device_that_could_not_run_the_network_is_told(capsys: pytest.CaptureFixture[str], target: float) -> None:
    cli.search(["--from", "run", "--verify"])
    path = board_says(target)
    results = json.loads(path.read_text())
    path.write_text(json.dumps({**results, "flags": dict.fromkeys(results["visits"], "load-error")}))
    capsys.readouterr()
    line = refused(cli.search, ["--from", "run", "--verify", str(path)], capsys)
    assert "could not run the network (load-error)" in line


def test_what_a_device_says_against_its_own_results_is_passed_on(capsys: pytest.CaptureFixture[str], target: float) -> None:
    cli.search(["--from", "run", "--verify"])
    path = board_says(0.985 * target)
    results = json.loads(path.read_text())
    results["environment"]["warnings"] = ["it runs on battery", "the processor was throttled meanwhile"]
    path.write_text(json.dumps({**results, "flags": dict.fromkeys(results["visits"], "off-npu")}))
    capsys.readouterr()
    cli.search(["--from", "run", "--verify", str(path)])
    said = capsys.readouterr().err.splitlines()
    assert {"warning: it runs on battery", "warning: the processor was throttled meanwhile"} <= set(said)
    assert any("warning: some operations of the network ran off the Neural Engine" in line for line in said)
    assert result()["met"]


def test_slack_is_given_back_only_to_a_network_that_was_verified(target: float) -> None:
    cli.search(["--from", "run", "--verify"])
    before = ArchConfig.load("run/searched.yaml")
    cli.search(["--from", "run", "--verify", str(board_says(0.8 * target))])
    assert Path("run/candidate.yaml").exists(), "the space has a network between"
    assert ArchConfig.load("run/searched.yaml") == before
    cli.search(["--from", "run", "--verify"])
    cli.search(["--from", "run", "--verify", str(board_says(0.98 * target))])
    assert ArchConfig.load("run/searched.yaml") != before
    assert result()["met"]


def test_settings_that_the_folder_is_bound_to_are_refused_before_anything_is_measured(
    target: float, capsys: pytest.CaptureFixture[str]
) -> None:
    for setting in ("optuna_trials: 9", "optuna_sampler: nsga2", "additivity_networks: 3", "drop_pairs: 3"):
        Path("more.yaml").write_text(f"{{{setting}}}")
        capsys.readouterr()
        said = refused(cli.search, ["--from", "run", "--verify", "--config", "more.yaml"], capsys)
        assert f"{setting.split(':')[0]}, which the finished search has decided: give cache_gb, optuna_storage alone" in said
        assert not Path("run/verify-job").exists()
    Path("more.yaml").write_text("{cache_gb: 0.5, optuna_storage: other.journal}")
    cli.search(["--from", "run", "--verify", "--config", "more.yaml"])
    cli.search(["--from", "run", "--verify", str(board_says(0.985 * target)), "--config", "more.yaml"])
    assert result()["met"]


def measured(ms: float) -> Measurement:
    return Measurement(ms, 0.99 * ms, 1.01 * ms, ms, ms, ms, ms, 20)


def test_a_measurement_is_kept_with_all_its_digits(table: LatencyTable) -> None:
    """The next budget follows from it: rounded, it would be another one after a kill, and a study would begin anew under it."""
    arch = SearchSpace.load("micro.yaml").largest
    checks = Checks(Path("m.csv"), table)
    checks.add(arch, measured(1 / 3))
    assert checks(arch).ms == 1 / 3
    assert Checks(Path("m.csv"), table)(arch) == checks(arch)


def test_what_was_normalised_by_another_table_is_measured_anew(table: LatencyTable) -> None:
    arch = SearchSpace.load("micro.yaml").largest
    Checks(Path("m.csv"), table).add(arch, measured(1.0))
    rebuilt = replace(table, meta={**table.meta, "reference_ms": {"cached_ms": 0.5, "streaming_ms": 2.0}})
    assert Checks(Path("m.csv"), table).knows(arch) and not Checks(Path("m.csv"), rebuilt).knows(arch)


def test_processes_that_share_a_folder_use_each_other_s_measurements(
    table: LatencyTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = SearchSpace.load("micro.yaml")
    monkeypatch.setattr("nas.devices.profiler_of", lambda table: "here")
    one, other = (Checks(Path("m.csv"), table) for _ in range(2))
    asked: list[ArchConfig] = []

    def measure(profiler: object, arch: ArchConfig, *_: object) -> Measurement:
        asked.append(arch)
        if arch == space.arch([8, 16], [["mb4d"] * 2] * 2):
            other.add(arch, measured(3.0))  # it was measured there at the same time
        return measured(float(len(asked)))

    monkeypatch.setattr("nas.measure.measure_alone", measure)
    for checks in (one, other):
        assert checks(space.largest).ms == 1.0
    assert other(space.smallest).ms == one(space.smallest).ms == 2.0
    assert len(asked) == 2, "what one has measured the other one takes"
    assert one(space.arch([8, 16], [["mb4d"] * 2] * 2)).ms == 3.0
    assert len(Checks(Path("m.csv"), table).known) == 3, "and neither overwrites what it did not measure"


def test_results_of_another_network_are_refused_and_nothing_is_lost(target: float, capsys: pytest.CaptureFixture[str]) -> None:
    cli.search(["--from", "run", "--verify"])
    results = board_says(target)
    manifest = Path("run/verify-job/manifest.json")
    content = json.loads(manifest.read_text())
    content["verify"]["network"] = "network 0000"
    manifest.write_text(json.dumps(content))
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    results.write_text(json.dumps({**json.loads(results.read_text()), "job_sha256": digest}))
    before = Path("run/result.json").read_bytes()
    capsys.readouterr()
    said = refused(cli.search, ["--from", "run", "--verify", str(results)], capsys)
    assert "does not measure the network of this search" in said
    assert Path("run/result.json").read_bytes() == before
    assert "measures the network of a search" in refused(cli.build_lut, ["--import-results", str(results)], capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "nowhere", "--verify"], "holds no finished search"),
        (["--from", "run"], "give another --target-ms, or --verify"),
        (["--verify"], "--verify needs the folder of a search"),
        (["--from", "run", "--verify", "--strategy", "exact"], "leave --table, --strategy and --out out"),
        (
            ["--from", "run", "--target-ms", "1", "--data", "photos", "--seed", "3"],
            "has its own data, seed: leave --data, --seed out",
        ),
        (["--from", "run", "--target-ms", "1", "--verify", "results.json"], "leave the targets out"),
        (["--from", "run", "--target-ms", "1"], "run holds no finished search"),
        (["--from", "run", "--target-ms", "1", "--verify"], "run holds no finished search"),
        (["--from", "run", "--target-ms", "1", "--strategy", "optuna"], "optuna evaluates networks: add --verify"),
        (["--target", "cpu"], "'cpu' is not a target on a device: give DEVICE=MS"),
        (["--target", "cpu=fast"], "'fast' is not a target"),
        (["--device", "cpu", "--target", "cpu=3"], "--device cpu has no target: give --target cpu=MS"),
        ([], "--target-ms 1.6"),
    ],
)
def test_nas_search_refuses_in_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(cli.search, arguments, capsys)


@pytest.fixture
def medians(table: LatencyTable) -> Callable[[float, int], Path]:
    """Networks of the space in files, and a CSV file of milliseconds that are a factor of the table's, and 0.1 more."""
    import random

    space = SearchSpace.load("micro.yaml")

    def write(factor: float, count: int) -> Path:
        rng = random.Random(3)
        lines = ["network,ms"]
        for number in range(count):
            arch = space.sample(rng).without_identity()
            arch.save(f"net{number}.yaml")
            lines.append(f"net{number}.yaml,{factor * table.sum_ms(arch) + 0.1}")
        Path("medians.csv").write_text("\n".join(lines) + "\n")
        return Path("medians.csv")

    return write


def test_medians_from_elsewhere_calibrate_a_table(medians: Callable[[float, int], Path], table: LatencyTable) -> None:
    cli.build_lut(["--device", "board-cpu", "--import-results", str(medians(1.2, 6)), "--out", "tables"])
    found = LatencyTable.load("tables/board-cpu.csv")
    (calibration,) = found.calibrations
    assert (calibration.offset_ms, calibration.scale) == pytest.approx((0.1, 1.2), rel=1e-3)
    assert calibration.mean_error_percent < 0.1
    assert found.serves(SearchSpace.load("micro.yaml")), "the space and its rows are what they were"
    assert found.rows.keys() == table.rows.keys()


def test_bad_medians_are_refused_in_one_line(
    medians: Callable[[float, int], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = (tmp_path / "tables" / "board-cpu.csv").read_bytes()
    path = str(medians(1.0, 2))
    assert "at least 3" in refused(cli.build_lut, ["--device", "board-cpu", "--import-results", path], capsys)
    assert "say whose medians" in refused(cli.build_lut, ["--import-results", path], capsys)
    Path("words.csv").write_text("network,ms\nnet0.yaml,fast\n")
    assert "columns network,ms" in refused(cli.build_lut, ["--device", "board-cpu", "--import-results", "words.csv"], capsys)
    assert (tmp_path / "tables" / "board-cpu.csv").read_bytes() == before


def test_a_table_is_shown_with_its_errors_and_drawn(table: LatencyTable, capsys: pytest.CaptureFixture[str]) -> None:
    cli.build_lut(["--show", "board-cpu", "--out", "pictures"])
    said = capsys.readouterr().out
    for words in ("board-cpu: imported", "micro, 16 px", "off by 1.0 % on average", "Kendall tau 1.00", "mb3d"):
        assert words in said
    assert Path("pictures/board-cpu.png").read_bytes().startswith(b"\x89PNG")
