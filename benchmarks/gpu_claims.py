"""Are EfficientFormer's networks as much faster than others on a GPU as its paper says for an A100? Ratios within one run.

    python benchmarks/gpu_claims.py --visits 40

timm's networks with ordinary random weights go the way of `nas-build-lut` and `nas-profile`: fp16, channels-last, batch 64,
compiled, captured as CUDA graphs, visited in shuffled rounds beside the references. The paper timed TensorRT on an A100; here
it is torch.compile, so a ratio that differs may be the runtime's as well as the GPU's.

It needs an NVIDIA GPU and timm (`pip install timm`). No figure of it is in the docs until somebody has run it.
"""

import argparse
import random

import timm
import torch
from timm.data import resolve_model_data_config

from nas.export import with_ordinary_values
from nas.profilers.cuda import open_gpu
from nas.profilers.timing import Visit, median_reference, summarise, visit_in_rounds

CLAIMS = (  # faster, slower, how many times by the paper (A100, TensorRT, batch 64)
    ("efficientformer_l3", "poolformer_s36", 3.0),
    ("efficientformer_l1", "mobilevit_xs", 1.9),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="fp16", help="fp16, bf16 or fp32")
    parser.add_argument("--visits", type=int, default=40, help="of each network")
    given = parser.parse_args()

    gpu = open_gpu("cuda", precision=given.precision, batch=given.batch)
    place = gpu.environment()
    for warning in place["warnings"]:
        print(f"warning: {warning}")
    visits: dict[str, list[Visit]] = {name: [] for pair in CLAIMS for name in pair[:2]}
    with gpu.exclusive():
        networks = {}
        for name in visits:
            module = with_ordinary_values(timm.create_model(name).eval(), seed=0)
            size = resolve_model_data_config(module)["input_size"]
            example = torch.randn(given.batch, *size, generator=torch.Generator().manual_seed(0))
            networks[name], _ = gpu.open_module(module, example)
        visit_in_rounds(
            networks,
            gpu.stopwatch(),
            lambda: [name for name, made in visits.items() if len(made) < given.visits],
            lambda name, visit: visits[name].append(visit),
            random.Random(0),
        )
    reference = median_reference([visit for made in visits.values() for visit in made])
    found = {name: summarise(made, reference) for name, made in visits.items()}
    bursts = gpu.environment()["gpu"]["bursts"]
    print(
        f"{gpu.gpu.name} ({gpu.id}), {place['runtime']} {place['runtime_version']}, driver {place['driver']}, "
        f"{place['measured_at'][:10]}; {bursts['kept']} bursts kept, {bursts['dropped']} dropped"
    )
    print(f"| network | ms a batch of {given.batch} (95 %) | ms an image |\n|---|---|---|")
    for name, m in found.items():
        print(f"| {name} | {m.ms:.3f} ({m.low_ms:.3f} to {m.high_ms:.3f}) | {m.ms / given.batch:.4f} |")
    for fast, slow, claimed in CLAIMS:
        ratio = found[slow].ms / found[fast].ms
        print(f"{fast} is {ratio:.2f} times as fast as {slow}; the paper says {claimed:g} times for an A100")


if __name__ == "__main__":
    main()
