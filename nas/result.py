"""What a search prints when it has ended."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.guarantee import SLACK
from nas.progress import per_image
from nas.strategies import exact_for, nothing_taken_away
from nas.throughput import mega, table_of
from supernet.space import SearchSpace


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
        candidate = folder / Path(result["candidate"]).name  # a folder may have been moved
        print(f"  over 3 % is left: a slower network might fit ({candidate}); --verify again measures it")
    mes = "" if result["mes"] is None else f", MES {result['mes']:.4g}"
    print(f"  {result['params'] / 1e6:.3g} M parameters, {mega(result['macs'])} M MACs at {result['image_size']} px{mes}")
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
    words = ["nas-train", str(folder / "searched.yaml")]
    words += ["--weights", str(folder / "weights.safetensors")]
    if init is not None:
        words += ["--teacher", str(folder / Path(init["teacher"]).name), "--recipe", "finetune"]
    if not result["demonstration"]:
        words += ["--data", source]
    print(f"  next: {shlex.join(words)} --out {'trained' if init is None else 'tuned'}")


def _on_device(device: Mapping[str, Any], folder: Path) -> str:
    missed = False
    if device["measured_ms"] is None:
        how = f"nas-search --from {shlex.quote(str(folder))} --verify measures it there, or says how"
        measured = f"not measured: {device['device']} is elsewhere ({how})"
    else:
        clock = f"; {raw_ms:.4g} ms by the clock" if (raw_ms := device.get("measured_raw_ms")) else ""
        measured = (
            f"measured {device['measured_ms']:.4g} ms (95 %: {device['measured_low_ms']:.4g} to "
            f"{device['measured_high_ms']:.4g}{clock}){per_image(device['measured_ms'], device['batch'])}"
        )
        missed = device["measured_high_ms"] > device["target_ms"]
    predicted = f"predicted {device['predicted_ms']:.4g} ms{per_image(device['predicted_ms'], device['batch'])}"
    line = f"  target {device['target_ms']:g} ms on {device['device']}: {predicted}, {measured}"
    return line + ("; THE TARGET IS MISSED" if missed else "")


def _left(result: Mapping[str, Any]) -> float:
    """Return the share of the target that is left on the device where least is, as far as was measured; 0 where it was not."""
    devices = result.get("targets", [result])
    shares = [1 - device["measured_high_ms"] / device["target_ms"] for device in devices if device["measured_high_ms"]]
    return min(shares, default=0.0)
