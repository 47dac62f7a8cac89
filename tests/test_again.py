"""A search that ended answers for other targets: at once by its drops, or whole with its supernet."""

import csv
import json
import shlex
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from test_cli import SETTINGS, additive_table, board_table, refused

from nas import cli
from nas.evaluation import Evaluator
from nas.kept import Checks, described
from nas.profilers.timing import Measurement
from nas.scores import Drops
from nas.search import borrow
from nas.slimming import start_network
from nas.solver import best
from nas.table import LatencyTable
from supernet.arch import ArchConfig
from supernet.model import count
from supernet.space import SearchSpace


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LatencyTable:
    found = board_table(tmp_path, monkeypatch)
    additive_table(SearchSpace.load("micro.yaml"), "phone-cpu", 0.5).save(tmp_path / "tables")
    return found


def largest_ms(table: LatencyTable) -> float:
    return table.predict_ms(SearchSpace.load("micro.yaml").largest)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that ended: searched once, for every test to copy."""
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        search_for_the_board(board_table(folder, patch))
    return folder / "run"


@pytest.fixture
def run(board: LatencyTable, searched: Path) -> Path:
    return Path(shutil.copytree(searched, "run"))


def search_for_the_board(board: LatencyTable) -> None:
    where = ["--space", "micro.yaml", "--config", "settings.yaml", "--out", "run", "--strategy", "exact"]
    cli.search(["--target-ms", f"{0.8 * largest_ms(board):.6f}", "--device", "board-cpu", *where])


@pytest.fixture
def nothing_is_evaluated(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a network was evaluated, or a supernet trained")

    monkeypatch.setattr(Evaluator, "_evaluate", refuse)
    monkeypatch.setattr("nas.search_stages.train_supernet", refuse)


def read(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.read_text())
    return found


@pytest.mark.usefixtures("nothing_is_evaluated")
def test_another_target_is_answered_by_the_drops(run: Path, board: LatencyTable, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    ms = 0.6 * largest_ms(board)
    cli.search(["--from", "run", "--target-ms", f"{ms:.6f}", "--out", "next"])
    said = capsys.readouterr().out
    space = SearchSpace.load("micro.yaml")
    expected = best(space, Drops.load(run / "drops.csv", space), board, ms)[0]
    assert ArchConfig.load("next/searched.yaml").stages == expected.arch.without_identity().stages
    result = read(Path("next/result.json"))
    assert result["predicted_loss"] == expected.loss
    assert result["from"] == "run"
    assert (result["params"], result["macs"]) == count(expected.arch.without_identity())
    assert "exact for the drops of changes, not for accuracy" in said
    assert "--verify (evaluates and measures)" in said
    assert "than its table says" not in said, "nothing was measured"
    result = read(run / "result.json")
    predicted = result["predicted_ms"]
    assert isinstance(predicted, float)
    (run / "result.json").write_text(json.dumps(result | {"targets": [result | {"measured_ms": 1.2 * predicted}]}))
    cli.search(["--from", "run", "--target-ms", f"{ms:.6f}", "--out", "next"])
    assert "own network took 20.0 % more on board-cpu than its table says" in capsys.readouterr().out
    with open("next/frontier.csv") as file:
        points = list(csv.DictReader(file))
    assert {point["device"] for point in points} == {"board-cpu"}
    assert [float(p["ms"]) for p in points] == sorted(float(p["ms"]) for p in points)


def test_fifty_networks_say_how_far_the_drops_add_up(
    run: Path, board: LatencyTable, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads((run / "result.json").read_text())["additivity"]
    assert found["networks"] == len((run / "additivity.csv").read_text().splitlines()) - 1 == 50
    cli.search(["--from", "run", "--target-ms", f"{0.6 * largest_ms(board):.6f}"])
    assert f"(R2) is {found['r_squared']:.2f} on 50 random networks" in capsys.readouterr().out


@pytest.mark.usefixtures("nothing_is_evaluated")
def test_that_nothing_is_evaluated_would_be_seen(run: Path, board: LatencyTable) -> None:
    with pytest.raises(AssertionError, match="evaluated, or a supernet trained"):
        cli.search(["--from", "run", "--target-ms", f"{0.6 * largest_ms(board):.6f}", "--verify", "--out", "next"])


def test_the_start_is_the_searchs_own_where_importance_is_from_drops(board: LatencyTable) -> None:
    """A network with the best candidate of each slot, not the first."""
    Path("drops.yaml").write_text(SETTINGS.replace("mixture_epochs: 1", "mixture_epochs: 0"))
    where = ["--space", "micro.yaml", "--config", "drops.yaml", "--device", "board-cpu", "--out", "run"]
    cli.search(["--target-ms", f"{0.8 * largest_ms(board):.6f}", *where])
    space = SearchSpace.load("micro.yaml")
    drops = Drops.load(Path("run/drops.csv"), space)
    start = start_network(space, drops.importance())
    assert start.stages != drops.base.stages, "the case is one where they differ"
    ms = 1.01 * board.predict_ms(start)
    cli.search(["--from", "run", "--target-ms", f"{ms:.6f}"])
    (folder,) = Path("run").glob("at-*")
    assert ArchConfig.load(folder / "searched.yaml").stages == start.without_identity().stages


@pytest.mark.usefixtures("nothing_is_evaluated")
def test_two_devices_are_answered_together_and_the_folder_is_named_by_the_targets(run: Path, board: LatencyTable) -> None:
    ms = largest_ms(board)
    cli.search(["--from", "run", "--target", f"board-cpu={0.9 * ms:.6f}", "--target", f"phone-cpu={0.3 * ms:.6f}"])
    (folder,) = run.glob("at-*")
    found = ArchConfig.load(folder / "searched.yaml")
    assert board.predict_ms(found) <= 0.6 * ms + 1e-6, "the phone's table is half the board's, so its target is the tighter one"
    targets = read(folder / "result.json")["targets"]
    assert isinstance(targets, list)
    assert [target["device"] for target in targets] == ["board-cpu", "phone-cpu"]


@pytest.mark.usefixtures("nothing_is_evaluated")
def test_what_cannot_be_answered_is_refused_in_one_line_and_nothing_is_written(
    run: Path, board: LatencyTable, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path().rglob("*"))
    where = ["--from", "run"]
    assert "is below the fastest network" in refused(cli.search, [*where, "--target-ms", "0.000001"], capsys)
    assert "no latency table of 'bord-cpu' here" in refused(cli.search, [*where, "--target", "bord-cpu=1"], capsys)
    assert "two targets on board-cpu" in refused(cli.search, [*where, "--target-ms", "1", "--target", "board-cpu=1"], capsys)
    other = ["--target-ms", "1", "--table", "tables/phone-cpu.csv"]
    assert "is of phone-cpu, which has no target" in refused(cli.search, [*where, *other], capsys)
    assert "give another --out" in refused(cli.search, [*where, "--target-ms", "1", "--out", "run"], capsys)
    assert "add --verify" in refused(cli.search, [*where, "--target-ms", "1", "--strategy", "optuna"], capsys)
    assert "unknown strategy 'gready'" in refused(cli.search, [*where, "--target-ms", "1", "--strategy", "gready"], capsys)
    assert "has no target" in refused(cli.search, [*where, "--device", "board-cpu", "--target", "phone-cpu=1"], capsys)
    said = refused(cli.search, [*where, "--target-ms", "1", "--verify", "--config", "settings.yaml"], capsys)
    assert "weight_epochs" in said and "which the finished search has decided" in said
    assert sorted(Path().rglob("*")) == before


@pytest.mark.usefixtures("nothing_is_evaluated")
def test_an_answer_for_another_request_is_not_overwritten(
    run: Path, board: LatencyTable, capsys: pytest.CaptureFixture[str]
) -> None:
    ms = largest_ms(board)
    cli.search(["--from", "run", "--target-ms", f"{0.6 * ms:.6f}", "--out", "next"])
    cli.search(["--from", "run", "--target-ms", f"{0.6 * ms:.6f}", "--out", "next"])
    capsys.readouterr()
    asked = ["--from", "run", "--target-ms", f"{0.5 * ms:.6f}", "--out", "next"]
    assert "next holds another request (targets" in refused(cli.search, asked, capsys)
    cli.search(["--from", "run", "--target", f"phone-cpu={0.3 * ms:.6f}"])
    cli.search(["--from", "run", "--target-ms", f"{0.6 * ms:.6f}", "--strategy", "greedy"])
    names = sorted(path.name for path in run.glob("at-*"))
    assert [name.rsplit("-", 1)[-1] == "greedy" for name in names] == [True, False]
    assert names[1].startswith("at-phone-cpu-")


@pytest.mark.usefixtures("nothing_is_evaluated")
def test_a_run_that_was_moved_gives_its_answers_again_and_commands_that_can_be_pasted(
    run: Path, board: LatencyTable, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--target-ms", f"{0.6 * largest_ms(board):.6f}"]
    cli.search(["--from", "run", *asked])
    run.rename("a run")
    capsys.readouterr()
    cli.search(["--from", "a run", *asked])
    assert len(list(Path("a run").glob("at-*"))) == 1
    words = shlex.split(capsys.readouterr().out.split("next: ")[1])
    assert words[:3] == ["nas-search", "--from", "a run"]


@pytest.mark.usefixtures("nothing_is_evaluated")
def test_a_table_that_is_not_true_warns_when_a_run_is_asked_again(
    run: Path, board: LatencyTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned_of: list[str] = []
    monkeypatch.setattr("nas.again.say_if_untrue", lambda table: warned_of.append(table.device))
    ms = largest_ms(board)
    cli.search(["--from", "run", "--target", f"board-cpu={0.9 * ms:.6f}", "--target", f"phone-cpu={0.3 * ms:.6f}"])
    assert warned_of == ["board-cpu", "phone-cpu"]


def test_other_images_than_those_of_the_run_are_refused(
    run: Path, board: LatencyTable, capsys: pytest.CaptureFixture[str]
) -> None:
    request = json.loads((run / "request.json").read_text())
    (run / "request.json").write_text(json.dumps(request | {"data_fingerprint": "of other images"}))
    capsys.readouterr()
    asked = ["--from", "run", "--target-ms", f"{0.6 * largest_ms(board):.6f}", "--verify", "--out", "next"]
    assert "are not those of run: search anew" in refused(cli.search, asked, capsys)
    assert not Path("next").exists()


def test_the_whole_search_for_another_target_trains_nothing_again(
    run: Path, board: LatencyTable, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    ms = 0.6 * largest_ms(board)
    cli.search(["--from", "run", "--target-ms", f"{ms:.6f}", "--verify", "--out", "next"])
    result = read(Path("next/result.json"))
    assert result["strategy"] == "exact"
    assert (Path("next") / "weights.safetensors").exists()
    assert (Path("next") / "drops.csv").read_bytes() == (run / "drops.csv").read_bytes()
    assert "training the supernet" not in capsys.readouterr().err
    assert (Path("next") / "supernet.pt").read_bytes() == (run / "supernet.pt").read_bytes()


def test_a_search_of_a_checkout_that_is_not_installed_ends_too(
    run: Path, board: LatencyTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_installed(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("nas.about.version", none_installed)
    cli.search(["--from", "run", "--target-ms", f"{0.6 * largest_ms(board):.6f}", "--verify", "--out", "next"])
    assert read(Path("next/result.json"))["versions"] == {"metapath-nas": "unknown", "torch": "unknown"}


def test_it_is_the_answer_of_a_search_from_scratch(run: Path, board: LatencyTable) -> None:
    ms = f"{0.6 * largest_ms(board):.6f}"
    where = ["--device", "board-cpu", "--space", "micro.yaml", "--config", "settings.yaml", "--out", "scratch"]
    cli.search(["--target-ms", ms, "--strategy", "exact", *where])
    cli.search(["--from", "run", "--target-ms", ms, "--verify", "--out", "next"])
    cli.search(["--from", "scratch", "--target-ms", ms, "--out", "at-once"])
    stages = [ArchConfig.load(f"{name}/searched.yaml").stages for name in ("scratch", "next", "at-once")]
    assert stages[0] == stages[1] == stages[2]


def test_one_network_for_two_devices(board: LatencyTable, capsys: pytest.CaptureFixture[str]) -> None:
    ms = largest_ms(board)
    targets = ["--target", f"board-cpu={0.9 * ms:.6f}", "--target", f"phone-cpu={0.3 * ms:.6f}"]
    where = ["--space", "micro.yaml", "--config", "settings.yaml", "--out", "both"]
    cli.search([*targets, *where])
    result = read(Path("both/result.json"))
    both = result["targets"]
    assert isinstance(both, list)
    assert [target["device"] for target in both] == ["board-cpu", "phone-cpu"]
    assert all(target["predicted_ms"] <= target["target_ms"] for target in both)
    assert result["device"] == "board-cpu"
    assert "on phone-cpu: predicted" in capsys.readouterr().out
    with open("both/frontier.csv") as file:
        assert {line["device"] for line in csv.DictReader(file)} == {"board-cpu", "phone-cpu"}
    page = Path("both/report.html").read_text()
    assert page.count("<td>phone-cpu</td>") == 1
    assert "--target board-cpu=" in page
    cli.search([*targets, *where])  # the same request goes on, and prints the same
    capsys.readouterr()
    other = ["--target", f"board-cpu={0.9 * ms:.6f}", "--target", f"phone-cpu={0.4 * ms:.6f}"]
    assert "holds another request (targets" in refused(cli.search, [*other, *where], capsys)


def test_each_device_is_verified_by_a_job_of_its_own(board: LatencyTable, capsys: pytest.CaptureFixture[str]) -> None:
    ms = largest_ms(board)
    targets = ["--target", f"board-cpu={0.9 * ms:.6f}", "--target", f"phone-cpu={0.3 * ms:.6f}"]
    cli.search([*targets, "--space", "micro.yaml", "--config", "settings.yaml", "--out", "both"])
    cli.search(["--from", "both", "--verify"])
    manifests = [json.loads(path.read_text()) for path in sorted(Path("both").glob("verify-job-*/manifest.json"))]
    assert [manifest["device"] for manifest in manifests] == ["board-cpu", "phone-cpu"]
    capsys.readouterr()
    said = refused(cli.search, ["--from", "both", "--verify", "--device", "ssh://me@there"], capsys)
    assert "board-cpu and phone-cpu are elsewhere" in said
    arch = ArchConfig.load("both/searched.yaml")
    for target in json.loads(Path("both/result.json").read_text())["targets"]:
        ms = 0.985 * target["target_ms"]
        checks = Checks(Path(f"both/measurements-{target['device']}.csv"), LatencyTable.load(target["table"]))
        checks.add(arch, Measurement(ms, ms, ms, ms, ms, ms, ms, 60))
    cli.search(["--from", "both", "--verify", "--device", "ssh://me@there"])
    known = "is known (measurements-board-cpu.csv and measurements-phone-cpu.csv): nothing is measured at ssh://me@there"
    assert known in capsys.readouterr().err


def test_what_takes_no_job_is_refused_after_the_jobs_of_others(
    board: LatencyTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    additive_table(SearchSpace.load("micro.yaml"), "a-laptop-npu", 0.5).save(tmp_path / "tables")
    ms = largest_ms(board)
    targets = ["--target", f"a-laptop-npu={0.3 * ms:.6f}", "--target", f"board-cpu={0.9 * ms:.6f}"]
    cli.search([*targets, "--space", "micro.yaml", "--config", "settings.yaml", "--out", "both"])
    with pytest.raises(SystemExit):
        cli.search(["--from", "both", "--verify"])
    assert "a-laptop-npu are measured by nas-search on the machine with it" in capsys.readouterr().err
    assert [path.name for path in Path("both").glob("verify-job-*")] == ["verify-job-board-cpu"]


def test_optuna_goes_on_where_the_drops_end(board: LatencyTable) -> None:
    ms = 0.7 * largest_ms(board)
    Path("optuna.yaml").write_text(SETTINGS.replace("}", ", optuna_trials: 8}"))
    where = ["--device", "board-cpu", "--space", "micro.yaml", "--config", "optuna.yaml"]
    cli.search(["--target-ms", f"{ms:.6f}", "--strategy", "optuna", "--out", "studied", *where])
    result = read(Path("studied/result.json"))
    assert result["strategy"] == "optuna"
    assert Path("studied/study.journal").exists()
    with open("studied/trajectory.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["ms_after"]) <= ms for row in rows), "nothing that misses the target is evaluated"
    losses = [float(row["loss_after"]) for row in rows]
    assert losses == sorted(losses)
    space = SearchSpace.load("micro.yaml")
    drops = Drops.load(Path("studied/drops.csv"), space)
    with open("studied/evaluations.csv") as file:
        evaluated = {line["network"]: float(line["loss"]) for line in csv.DictReader(file)}
    best_by_drops = [evaluated[described(each.arch)] for each in best(space, drops, board, ms, 6)]
    assert losses[0] <= min(best_by_drops) + 1e-5, "the best by the drops are the study's first networks"


def test_searches_with_one_supernet_share_what_they_know(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "supernet.pt").write_text("weights")
    (tmp_path / "one" / "evaluations.csv").write_text("of one")
    (tmp_path / "one" / "result.json").write_text("of one")
    (tmp_path / "two" / "evaluations.csv").write_text("of two")
    borrow(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "supernet.pt").read_text() == "weights"
    assert (tmp_path / "two" / "evaluations.csv").read_text() == "of two"
    assert not (tmp_path / "two" / "result.json").exists()
