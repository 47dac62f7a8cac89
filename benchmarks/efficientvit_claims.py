"""Is EfficientViT as much faster than others on this CPU as its paper says? Ratios within one run, ONNX Runtime, fp32.

    python benchmarks/efficientvit_claims.py --rounds 60

Liu et al. (CVPR 2023), abstract: M5 has 45.2 % more throughput than MobileNetV3-Large on an Intel Xeon; M2 has 3.7 times
that of MobileViT-XXS there, and 7.4 times in ONNX form. They timed PyTorch's traced models at batch 16; how the ONNX figure
was taken was never published. Here all run in ONNX Runtime, at batch 1 and at batch 16, one thread. MobileViT takes 256 px
images, as published.

The other two networks are timm's (`pip install timm`); weights are ordinary random values.
"""

import argparse
import datetime
import os
import random
import warnings

import onnxruntime
import torch

from nas.export import onnx_bytes, with_ordinary_values
from nas.measure import build_module
from nas.profilers.ort_cpu import OrtCpu
from nas.profilers.ort_session import OrtModel, cpu_name
from nas.profilers.timing import Visit, median_reference, summarise, visit_in_rounds
from nas.progress import progress
from supernet.zoo import zoo

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import timm

OURS = ("efficientvit_m5", "efficientvit_m2")
TIMM = ("mobilenetv3_large_100", "mobilevit_xxs")
CLAIMS = (  # faster, slower, how many times by the paper, in what
    ("efficientvit_m5", "mobilenetv3_large_100", "1.45 (Intel CPU, PyTorch, batch 16)"),
    ("efficientvit_m2", "mobilevit_xxs", "3.7 (Intel CPU, PyTorch, batch 16), 7.4 (ONNX)"),
)


def workload(name: str, batch: int) -> OrtModel:
    if name in OURS:
        module, example = build_module(tuple(zoo(name).layers()), batch, deploy=True)
    else:
        module = with_ordinary_values(timm.create_model(name).eval(), seed=0)
        example = torch.randn(batch, *module.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    return OrtModel(onnx_bytes(module, example), 1)


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
    profiler = OrtCpu()
    for batch in given.batches:
        visits: dict[str, list[Visit]] = {name: [] for name in (*OURS, *TIMM)}
        with profiler.exclusive(), progress(f"batch {batch}", given.rounds * len(visits)) as tick:

            def record(name: str, visit: Visit, visits: dict[str, list[Visit]] = visits) -> None:
                visits[name].append(visit)
                tick(1)

            visit_in_rounds(
                {name: workload(name, batch) for name in visits},
                profiler.stopwatch(),
                lambda visits=visits: [name for name, made in visits.items() if len(made) < given.rounds],
                record,
                random.Random(0),
            )
        reference = median_reference([visit for made in visits.values() for visit in made])
        found = {name: summarise(made, reference) for name, made in visits.items()}
        print(f"\nbatch {batch}\n\n| network | ms (95 %) | images a second |\n|---|---|---|")
        for name, m in found.items():
            print(f"| {name} | {m.ms:.3f} ({m.low_ms:.3f} to {m.high_ms:.3f}) | {1000 * batch / m.ms:.0f} |")
        for fast, slow, claimed in CLAIMS:
            print(f"{fast} has {found[slow].ms / found[fast].ms:.2f} times the throughput of {slow}; the paper says {claimed}")


if __name__ == "__main__":
    main()
