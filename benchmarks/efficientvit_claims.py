"""Is EfficientViT as much faster than others on this CPU as its paper says? Ratios within one run, ONNX Runtime, fp32.

    python benchmarks/efficientvit_claims.py --rounds 60

Liu et al. (CVPR 2023), abstract: M5 has 45.2 % more throughput than MobileNetV3-Large on an Intel Xeon; M2 has 3.7 times
that of MobileViT-XXS there, and 7.4 times in ONNX form. They timed PyTorch's traced models at batch 16; how the ONNX figure
was taken was never published. Here all run in ONNX Runtime, at batch 1 and at batch 16, one thread, in shuffled rounds, opened
anew every 4 rounds. MobileViT takes 256 px images, as published.

EfficientViT is ours, in both forms that nas-export writes: the plain one computes layer by layer what is published, the deploy
form is rewritten to run faster (docs/export.md). The other two networks are timm's (`pip install timm`), exported as they are,
so the plain form is the like comparison. Weights are ordinary random values.
"""

import argparse
import datetime
import itertools
import os
import warnings
from functools import partial

import onnxruntime
import torch
from latency_analysis import Opener, side_by_side

from nas.measure import build_module, with_ordinary_values
from nas.onnx_model import onnx_bytes
from nas.profilers.ort_session import OrtModel, cpu_name
from nas.profilers.timing import median_reference, summarise
from supernet.zoo import zoo

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import timm

OURS = ("efficientvit_m5", "efficientvit_m2")
FORMS = ("plain", "deploy")
TIMM = ("mobilenetv3_large_100", "mobilevit_xxs")
CLAIMS = (  # faster, slower, how many times by the paper, in what
    ("efficientvit_m5", "mobilenetv3_large_100", "1.45 (Intel CPU, PyTorch, batch 16)"),
    ("efficientvit_m2", "mobilevit_xxs", "3.7 (Intel CPU, PyTorch, batch 16), 7.4 (ONNX)"),
)


def openers(batch: int) -> dict[str, Opener]:
    """Return what opens each network, ours once for each form."""
    models = {}
    for name, form in itertools.product(OURS, FORMS):
        models[f"{name}, {form}"] = build_module(tuple(zoo(name).layers()), batch, deploy=form == "deploy")
    for name in TIMM:
        module = with_ordinary_values(timm.create_model(name).eval(), seed=0)
        image = torch.randn(batch, *module.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
        models[name] = module, image
    return {name: partial(OrtModel, onnx_bytes(*model)) for name, model in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    given = parser.parse_args()
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    print(
        f"{cpu_name()}, load average {load} at the start; ONNX Runtime {onnxruntime.__version__}, one thread, fp32; "
        f"{datetime.date.today()}; {given.rounds} rounds"
    )
    for batch in given.batches:
        visits = side_by_side(f"batch {batch}", openers(batch), given.rounds)
        reference = median_reference([visit for made in visits.values() for visit in made])
        found = {name: summarise(made, reference) for name, made in visits.items()}
        print(f"\nbatch {batch}\n\n| network | ms (95 %) | images a second |\n|---|---|---|")
        for name, m in found.items():
            print(f"| {name} | {m.ms:.3f} ({m.low_ms:.3f} to {m.high_ms:.3f}) | {1000 * batch / m.ms:.0f} |")
        for fast, slow, claimed in CLAIMS:
            times = " and ".join(f"{found[slow].ms / found[f'{fast}, {form}'].ms:.2f} ({form})" for form in FORMS)
            print(f"{fast} has {times} times the throughput of {slow}; the paper says {claimed}")


if __name__ == "__main__":
    main()
