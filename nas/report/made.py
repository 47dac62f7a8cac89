"""How the search was made, so that it can be made again."""

from __future__ import annotations

import shlex
from html import escape

import yaml

from nas.report.run import Run
from nas.report.text import facts, to_the_minute
from supernet.space import SearchSpace, space_names


def made_section(run: Run) -> str:
    """The command, versions, seed, date, settings, files."""
    request, result = run.request, run.result
    settings = yaml.safe_dump(dict(request.get("settings", {})), sort_keys=False)
    measured = [line["measured_at"] for line in run.measurements if line.get("measured_at")]
    data = "the embedded handwritten digits: a demonstration" if run.demonstration else request.get("data")
    versions = result.get("versions") or {}
    rows = [
        ("measured", f"last on {to_the_minute(max(measured))}" if measured else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or "not recorded"),
        ("seed", result.get("seed")),
        ("strategy", result.get("strategy")),
        ("images", data),
        ("skipped images", result.get("skipped_images") or None),
        ("supernet", f"trained at {result['supernet_image_size']} px" if result.get("supernet_image_size") else None),
        ("evaluations", result.get("evaluations")),
        ("networks measured", result.get("measured_networks")),
    ]
    names = (
        "searched.yaml",
        "weights.safetensors",
        "result.json",
        "request.json",
        "trajectory.csv",
        "importance.csv",
        "drops.csv",
        "additivity.csv",
        "frontier.csv",
        "evaluations.csv",
        *sorted(run.measurement_files),
        "throughput.csv",
        "study.journal",
        "space.yaml",
    )
    there = [f'<a href="{escape(name)}">{escape(name)}</a>' for name in names if (run.folder / name).exists()]
    files = {"settings.yaml": settings, "space.yaml": request.get("space"), "init.yaml": request.get("init")}
    shown = "".join(
        f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>" for name, text in files.items() if text
    )
    return (
        f"<p>The command, with every setting written out:</p><pre>{escape(command(run))}</pre>{facts(rows)}{shown}"
        "<p class=small>Not recorded are the settings that change nothing in what is found: <code>cache_gb</code>, and "
        "<code>optuna_storage</code>, which may hold a password.</p>"
        f"<p class=small>Files beside this page: {', '.join(there)}.</p>"
    )


def command(run: Run) -> str:
    """Return the command that asks what this run was asked."""
    request, result = run.request, run.result
    words = ["nas-search"]
    if len(run.targets) == 1:
        words += ["--target-ms", _whole(run.target_ms), "--device", result["device"]]
        words += ["--table", str(request.get("table") or result["table"])]
    else:
        words += [word for each in run.targets for word in ("--target", f"{each['device']}={_whole(each['target_ms'])}")]
        words += [word for each in run.targets for word in ("--table", str(each["table"]))]
    if not run.demonstration and request.get("data"):
        words += ["--data", str(request["data"])]
    if "init" in request:
        words += ["--init", "init.yaml", "--weights", str((result.get("init") or {}).get("weights", "given.safetensors"))]
    words += ["--space", "space.yaml" if "init" in request else _space_argument(run)]
    if result.get("strategy", "greedy") != "greedy":
        words += ["--strategy", str(result["strategy"])]
    words += ["--config", "settings.yaml", "--seed", str(result.get("seed", 0)), "--out", str(run.folder)]
    return shlex.join(words)


def _whole(number: float) -> str:
    """Return a number with all its digits, without those that say nothing."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def _space_argument(run: Run) -> str:
    """Return the name of the space where it ships as it is; else the file that its text is to be put into."""
    if run.space is not None and run.space.name in space_names():
        named = SearchSpace.load(run.space.name).with_classes(run.space.num_classes)
        if named.stages == run.space.stages and named.image_size == run.space.image_size:
            return run.space.name
    return "space.yaml"
