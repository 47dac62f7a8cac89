"""The way to the target: the steps of slimming; and the ways of sharing a pass that were compared."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape

from nas.report.run import Run, to_number
from nas.report.svg import Axis, Chart, legend
from nas.report.text import joined, missing, ms_of, or_dash, percent_of
from nas.trajectory import COLUMNS

DRAWN_OPTIONS = 600  # options; of more, only the best of each step are drawn


ACTIONS = (  # how an action's text begins or what it has in it, the shape that stands for it, what it is
    ("empty ", "square", "a slot emptied"),
    ("narrow ", "triangle", "a stage narrowed"),
    ("land: ", "cross", "landing: width or blocks given back, near under the target"),
    (" to ", "diamond", "another block in a slot"),
)


def trajectory_section(run: Run) -> str:
    """Loss against milliseconds, step by step."""
    lines = run.rows("trajectory.csv")
    if run.result.get("largest_of_space") and not lines:
        return missing("Nothing was taken away: the network that the search began with meets the target.")
    taken = [line for line in lines if line["taken"] == "True"]
    if not taken:
        return missing("This run has no steps: its strategy chose the network at once, or trajectory.csv is not there.")
    by_accuracy = run.request.get("settings", {}).get("score") == "accuracy"
    what, unit = ("accuracy", "top-1 on the scoring images, %") if by_accuracy else ("loss", "loss on the scoring images, nats")
    factor = 100 if by_accuracy else 1

    def y(line: Mapping[str, str], when: str) -> float:
        return factor * to_number(line[f"{what}_{when}"])

    steps: dict[int, list[dict[str, str]]] = {}
    for line in lines:
        steps.setdefault(int(line["step"]), []).append(line)
    most = max(2, DRAWN_OPTIONS // len(steps))
    shown = [option for options in steps.values() for option in options[:most] if math.isfinite(y(option, "after"))]
    way = [(to_number(taken[0]["ms_before"]), y(taken[0], "before"))] + [
        (to_number(t["ms_after"]), y(t, "after")) for t in taken
    ]
    x_axis = Axis.around(
        f"predicted milliseconds on {run.result['device']}",
        [p[0] for p in way] + [to_number(o["ms_after"]) for o in shown] + [run.target_ms],
    )
    y_axis = Axis.around(unit, [p[1] for p in way] + [y(option, "after") for option in shown])
    chart = Chart(f"{what} against milliseconds, a point for each step of the search", x_axis, y_axis)
    chart.line(way, "way")
    for option in shown:
        if option["taken"] != "True":
            title = f"not taken: {_step_text(option)}"
            chart.point(to_number(option["ms_after"]), y(option, "after"), "circle", "lost", title, 2.6)
    chart.point(*way[0], "circle", "mark", f"start: {ms_of(way[0][0])}, {what} {way[0][1]:.4g}")
    used = {}
    for line, place in zip(taken[:-1], way[1:-1], strict=True):
        shape, meaning = _action(line["action"])
        used[shape] = meaning
        chart.point(*place, shape, "mark", f"step {line['step']}: {_step_text(line)}")
    chart.point(*way[-1], "star", "found", f"found, by step {taken[-1]['step']}: {_step_text(taken[-1])}", 5)
    chart.target(run.target_ms, f"target {run.target_ms:g} ms")
    key = legend(
        [
            ("circle", "mark", "start"),
            *((shape, "mark", text) for shape, text in used.items()),
            ("star", "found", "the network found"),
            ("circle", "lost", "not taken"),
        ]
    )
    measured = int(run.result.get("measured_networks") or 0)
    again = f" {measured} networks were measured on the device before this one was chosen." if measured > 1 else ""
    intro = f"<p>{_told(run, taken, steps, what)} Point at a mark to read what it is.{again}</p>"
    return f'{intro}<figure class="single">{chart.html()}{key}</figure>{_steps_table(taken, steps, len(lines))}'


def _told(run: Run, taken: Sequence[Mapping[str, str]], steps: Mapping[int, Sequence[object]], what: str) -> str:
    """How the network was chosen: from a study, from the best by the drops, step by step; these may follow each other."""
    said = []
    loop = [line for line in taken if _choice(line) == ""]
    for line in taken:
        number = len(steps[int(line["step"])])
        if _choice(line) == "study":
            trials = run.request.get("settings", {}).get("optuna_trials")
            study = "an Optuna study" + (f" of {trials} trials" if trials else "")
            said.append(f"The best {number} of the networks that {study} evaluated; the first of them is the answer.")
        elif _choice(line) == "drops":
            begin = "The loop of single actions did not reach the target. " if _greedy(run) else ""
            gap = to_number(run.result.get("gap"))
            proven = f" Another one may be better by the drops, by at most {gap:.2g} nats." if gap > 0 else ""
            said.append(
                f"{begin}The best {number} by the drops of single changes, judged as whole networks: the best of them was "
                f"taken.{proven}"
            )
    if loop:
        gain = {"mes": "the mobile efficiency score gained"}.get(str(run.result.get("objective")), "the milliseconds saved")
        then = "Then " if said else ""
        said.append(
            f"{then}{_counted(len(loop), 'step')}. Each offers several actions and takes the one that costs least {what} for "
            f"{gain}."
        )
    return " ".join(said)


def _choice(line: Mapping[str, str]) -> str:
    """Return what a step chose from: the networks of a study, the best by the drops, or (nothing) actions of the loop."""
    action = line["action"]
    return "study" if action.startswith("trial ") else "drops" if re.match(r"number \d+ by the drops", action) else ""


def _greedy(run: Run) -> bool:
    return bool(run.result.get("strategy", "greedy") == "greedy")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _action(action: str) -> tuple[str, str]:
    for word, shape, meaning in ACTIONS:
        if action.startswith(word) or (word == " to " and word in action):
            return shape, meaning
    return "circle", "another action"


def _step_text(line: Mapping[str, str]) -> str:
    loss = f"loss {to_number(line['loss_before']):.4g} to {to_number(line['loss_after']):.4g}"
    return f"{line['action']}: {to_number(line['ms_before']):.4g} to {to_number(line['ms_after']):.4g} ms, {loss}"


def _steps_table(taken: Sequence[Mapping[str, str]], steps: Mapping[int, Sequence[object]], offered: int) -> str:
    more = [name for name in taken[0] if name not in COLUMNS and name.endswith("_after")]
    chosen = all(_choice(line) for line in taken)
    head = "".join(
        f"<th>{name}</th>"
        for name in ("step", "action", "ms after", "saved ms", "loss after", "top-1 after", "score", "offered")
    )
    head += "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in more)
    rows = []
    for line in taken:
        cells = [
            line["step"],
            line["action"],
            f"{to_number(line['ms_after']):.4g}",
            f"{to_number(line['saved_ms']):.3g}",
            f"{to_number(line['loss_after']):.4g}",
            percent_of(to_number(line["accuracy_after"])),
            f"{to_number(line['score']):.3g}" if math.isfinite(to_number(line["score"])) else "–",
            str(len(steps[int(line["step"])])),
            *(
                f"{to_number(line[name]):,.4g}" if abs(to_number(line[name])) < 1e4 else joined(to_number(line[name]))
                for name in more
            ),
        ]
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return (
        f"<details><summary>{'The choice' if chosen else _counted(len(taken), 'step')} as a table</summary>"
        '<div class="scroll"><table class="plain-table">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "<p class=small>Score: the rise in loss (or the drop in accuracy) for what the action gains, per millisecond "
        f"unless the columns say otherwise. Offered: {'networks' if chosen else 'actions'} that the step chose from. All "
        f"{offered} are in trajectory.csv.</p>"
        "</details>"
    )


def throughput_section(run: Run) -> str:
    """The ways of sharing a pass that were compared, where throughput was the objective."""
    found = run.result.get("throughput")
    if not found:
        return ""
    rows = []
    for way in found:
        alone = way["images_in_group"] == 1
        name = "each image by itself" if alone else f"groups of {way['images_in_group']}: {way['mixing']}"
        cells = [
            name,
            or_dash(way["ms_per_image"]),
            or_dash(way["response_ms"]),
            f"{100 * way['accuracy']:.1f}",
            f"{100 * way['worst_slot_accuracy']:.1f}",
            f"{100 * way['one_class_accuracy']:.1f}",
            joined(way["params"]),
        ]
        style = ' class="chosen"' if way["chosen"] else ""
        rows.append(f"<tr{style}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(
        f"<th>{name}</th>"
        for name in ("", "ms an image", "response ms", "top-1 %", "worst slot %", "one class %", "parameters")
    )
    return (
        "<p>Several images may share a pass of the network's last blocks. All ways were trained a little and compared; the "
        "chosen one is in bold. “control” is the same reduction of tokens without any sharing: what it is as good at is not "
        'the sharing\'s doing.</p><div class="scroll"><table class="plain-table">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "<p class=small>Response: mean wait until a group is full, and its pass. Worst slot: the position in the group that "
        "does worst. One class: in groups of images of one class.</p>"
    )
