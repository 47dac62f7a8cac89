"""What a search prints when it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from nas.guarantee import SLACK
from nas.profile import per_image
from nas.strategies import exact_for
from nas.throughput import table_of
from supernet.errors import InputError
from supernet.model import count
from supernet.space import SearchSpace, space_names


def print_result(result: Mapping[str, Any], space: SearchSpace, folder: Path, source: str, validation_images: int) -> None:
    """Print the content of `result.json`, and what to do next.

    Args:
        space: that was searched.
        folder: of the run.
        source: where its images come from, as `--data` takes it.
        validation_images: how many the accuracy was measured on.
    """
    print(f"{folder / 'searched.yaml'}")
    for device in result.get("targets", [result]):
        print(_on_device(device, folder))
    if result["candidate"]:
        print(f"  over 3 % is left: a slower network might fit ({result['candidate']}); --verify again measures it")
    mes = "" if result["mes"] is None else f", MES {result['mes']:.4g}"
    print(f"  {result['params'] / 1e6:.3g} M parameters, {result['macs'] / 1e6:.4g} M MACs at {result['image_size']} px{mes}")
    init = result.get("init")
    inherited = "the supernet" if init is None else init["network"]
    print(
        f"  top-1 {100 * result['accuracy']:.1f} % on {validation_images} validation images that the search did not see, with "
        f"weights inherited from {inherited}{' and trained a little' if 'throughput' in result else ''}"
    )
    if init is not None:
        print(f"  {init['network']} itself: predicted {init['predicted_ms']:.4g} ms, top-1 {100 * init['accuracy']:.1f} %")
    if "throughput" in result:
        print(table_of(result["throughput"], result["batch"]))
        print("  control: the same reduction without concatenation; whatever it is as good at is not the sharing's doing")
    if result["largest_of_space"]:
        print(f"  {nothing_taken_away(space, init['network'] if init is not None else None)}")
    elif (left := _left(result)) > SLACK and result["met"] and not result["candidate"]:
        other = "; --strategy exact looks at all networks" if result["strategy"] == "greedy" else ""
        print(f"  {100 * left:.1f} % of the target is left: nothing was found nearer to it that fits and scores better{other}")
    if result["strategy"] == "exact" and not result["largest_of_space"]:
        print(f"  {exact_for(result)}")
    if result["demonstration"]:
        print("  found on the embedded digits: a demonstration; give --data PATH for a network to ship")
    more = ""
    if init is not None:
        more = f" --weights {folder / 'weights.safetensors'} --teacher {init['teacher']} --recipe finetune"
    images = "" if result["demonstration"] else f" --data {source}"
    print(f"  next: nas-train {folder / 'searched.yaml'}{more}{images} --out {'tuned' if more else 'trained'}")


def _on_device(device: Mapping[str, Any], folder: Path) -> str:
    missed = False
    if device["measured_ms"] is None:
        measured = f"not measured: {device['device']} is elsewhere (nas-search --from {folder} --verify measures it there)"
    else:
        measured = (
            f"measured {device['measured_ms']:.4g} ms (95 %: {device['measured_low_ms']:.4g} to "
            f"{device['measured_high_ms']:.4g}){per_image(device['measured_ms'], device['batch'])}"
        )
        missed = device["measured_high_ms"] > device["target_ms"]
    line = f"  target {device['target_ms']:g} ms on {device['device']}: predicted {device['predicted_ms']:.4g} ms, {measured}"
    return line + ("; THE TARGET IS MISSED" if missed else "")


def _left(result: Mapping[str, Any]) -> float:
    """Return the share of the target that is left on the device where least is, as far as was measured; 0 where it was not."""
    devices = result.get("targets", [result])
    shares = [1 - device["measured_high_ms"] / device["target_ms"] for device in devices if device["measured_high_ms"]]
    return min(shares, default=0.0)


def nothing_taken_away(space: SearchSpace, init: str | None) -> str:
    """Return what is said where the search's first network meets the target: the network `init` that it began with, or the
    largest one of the space."""
    if init is not None:
        return f"{init} meets the target as it is: nothing was taken away; give a lower --target-ms for less"
    larger = larger_space(space)
    advice = (
        f"for the rest of the time, try --space {larger}"
        if larger is not None
        else f"no larger space of its blocks ships for {space.image_size} px: for the rest of the time, give widths or depths "
        "more in a copy of its file"
    )
    return f"{space.name} at its largest widths, no slot empty, meets the target: nothing was taken away; {advice}"


def larger_space(space: SearchSpace) -> str | None:
    """Return the name of the next larger space that ships for images of about this size (half to twice) and has all of this
    one's kinds of block; one of the same kinds where there is one. None: there is none."""

    def kinds(of: SearchSpace) -> set[str]:
        return {candidate.kind for stage in of.stages for candidate in stage.candidates}

    found = []
    for name in space_names():
        ships = SearchSpace.load(name)
        other = replace(ships, image_size=space.image_size, num_classes=space.num_classes)
        with suppress(InputError):
            other.check_searchable()
            about = ships.image_size / 2 <= space.image_size <= 2 * ships.image_size
            if about and kinds(space) <= kinds(other) and bool(other.mux) == bool(space.mux):
                found.append((len(kinds(other)), count(other.largest).macs, name))
    return min((each for each in found if each[1] > count(space.largest).macs), default=(0, 0, None))[2]
