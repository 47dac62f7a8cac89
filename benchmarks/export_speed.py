"""Print how fast exported networks are beside timm's exports of the same networks, in ONNX Runtime on this CPU, one thread.

    pip install 'timm==1.0.31' onnxscript
    python benchmarks/export_speed.py

timm's network is exported in both of PyTorch's ways, the newer (dynamo) and the older; ours, with the same weights, in its
deploy form. The weights are random, and batch norm's statistics are those of random images, so that activations have ordinary
sizes. In each round all sessions are opened anew, in another order, because where their memory happens to lie moves their times
by some percent, and then called in turn; the figure is the median over rounds of ours divided by the faster of timm's, with the
lowest and the highest round. A whole run takes a few minutes. int8 is the same network with activations and weights quantised.
"""

from __future__ import annotations

import argparse
import copy
import platform
import random
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from nas.forms import measured_forms, one_round
from nas.from_timm import import_timm
from nas.measure import with_ordinary_values
from nas.onnx_model import onnx_bytes
from nas.profilers.ort_cpu import OrtCpu
from nas.profilers.ort_session import OrtModel, cpu_name, environment, pinned, warnings_about
from nas.progress import say
from supernet.arch import ArchConfig
from supernet.deploy import deployed
from supernet.model import build_model
from supernet.weights import load_timm_weights
from supernet.zoo import load_arch

NETWORKS = ("efficientformer_l1", "efficientformer_l3", "efficientformerv2_s0", "efficientformerv2_s1", "efficientvit_m4")
OURS, NEWER, OLDER = "ours", "timm, dynamo", "timm, older"


class Result(NamedTuple):
    """Medians over rounds: milliseconds of each export, and ours over the faster of timm's with its lowest and highest; the
    largest difference of logits from eager timm's, of the largest logit or absolute below 1; int8 over fp32."""

    ms: dict[str, float]
    ratio: float
    low: float
    high: float
    difference: float
    int8: float | None


def timm_network(timm: Any, name: str) -> nn.Module:
    """Return a timm network with random weights and fitting batch-norm statistics, in eval mode."""
    model: nn.Module = with_ordinary_values(timm.create_model(name, pretrained=False), seed=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def dynamo_bytes(model: nn.Module, image: Tensor) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(copy.deepcopy(model), (image,), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def difference(exports: dict[str, bytes], model: nn.Module, image: Tensor) -> float:
    """Return by how much our exported network's logits differ from timm's in PyTorch."""
    with torch.inference_mode():
        expected = model(image).numpy()
    session = onnxruntime.InferenceSession(exports[OURS], providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


def raced(
    make: dict[str, Callable[[], OrtModel]], rounds: int, seconds: float, clock: Callable[[], float]
) -> list[dict[str, float]]:
    """Return every round's seconds of a call of each. What is opened, and called, after what is drawn anew each round."""
    found, rng = [], random.Random(0)
    for _ in range(rounds):
        runs = {name: make[name]() for name in rng.sample(list(make), len(make))}
        for run in runs.values():
            run()
        found.append(one_round(runs, seconds, clock))
    return found


def compared(timm: Any, name: str, given: argparse.Namespace) -> Result:
    clock = time.thread_time if given.cpu_time else time.perf_counter
    theirs, arch = timm_network(timm, name), load_arch(name)
    ours = build_model(arch)
    load_timm_weights(ours, theirs.state_dict())
    image = torch.randn(1, 3, arch.image_size, arch.image_size, generator=torch.Generator().manual_seed(2))
    forms = measured_forms(arch) if given.measure else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exports = {
            OURS: onnx_bytes(deployed(ours, arch, forms), image),
            NEWER: dynamo_bytes(theirs, image),
            OLDER: onnx_bytes(theirs, image),
        }
    rounds = raced({kind: partial(OrtModel, data) for kind, data in exports.items()}, given.rounds, given.seconds, clock)
    ms = {kind: 1000 * median(times[kind] for times in rounds) for kind in exports}
    faster = min((NEWER, OLDER), key=lambda kind: ms[kind])
    ratios = [times[OURS] / times[faster] for times in rounds]
    int8 = int8_ratio(arch, given, clock) if given.int8 else None
    return Result(ms, median(ratios), min(ratios), max(ratios), difference(exports, theirs, image), int8)


def int8_ratio(arch: ArchConfig, given: argparse.Namespace, clock: Callable[[], float]) -> float:
    layers = tuple(arch.layers())
    models = {precision: OrtCpu(precision=precision).onnx(layers) for precision in ("fp32", "int8")}
    rounds = raced({name: partial(OrtModel, data) for name, data in models.items()}, given.rounds, given.seconds, clock)
    return median(times["int8"] / times["fp32"] for times in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "networks", nargs="*", default=NETWORKS, help=f"names that the zoo and timm share (default: {NETWORKS})"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a round")
    parser.add_argument("--int8", action="store_true", help="also time int8 beside fp32")
    parser.add_argument("--measure", action="store_true", help="choose each layer's form by measuring it, not by its shape")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count only the time that the process had the core, not waiting"
    )
    given = parser.parse_args()
    timm, why_not = import_timm()
    if timm is None:
        parser.exit(2, f"timm cannot be imported: {why_not}\n")
    torch.set_num_threads(1)
    place = environment(threads=1)
    for warning in warnings_about(place):
        say(f"warning: {warning}")
    print(
        f"{cpu_name()}, {platform.platform()}; ONNX Runtime {onnxruntime.__version__}, torch {torch.__version__}, timm "
        f"{timm.__version__}; one thread, {given.rounds} rounds of {given.seconds:g} s\n"
    )
    print(
        "| network | timm, dynamo, ms | timm, older, ms | ours, ms | ours / faster of timm's | logits differ by | int8 / fp32 |"
    )
    print("|---|---|---|---|---|---|---|")
    found = []
    with pinned():
        for name in given.networks:
            result = compared(timm, name, given)
            found.append(result.ratio)
            times = " | ".join(f"{result.ms[kind]:.2f}" for kind in (NEWER, OLDER, OURS))
            int8 = "" if result.int8 is None else f"{result.int8:.2f}"
            ratio = f"{result.ratio:.3f} ({result.low:.3f} to {result.high:.3f})"
            print(f"| {name} | {times} | {ratio} | {result.difference:.1e} | {int8} |", flush=True)
    mean = sum(found) / len(found)
    print(f"\nmean of the ratios {mean:.3f} (goal 0.92), largest {max(found):.3f} (goal 1.00); goal for logits 1e-4")


if __name__ == "__main__":
    main()
