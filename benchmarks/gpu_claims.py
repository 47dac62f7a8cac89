"""Are EfficientFormer's networks as much faster than others on a GPU as its paper says for an A100? And which form is faster?

    python benchmarks/gpu_claims.py --visits 40
    python benchmarks/gpu_claims.py --forms

Ratios within one run. timm's networks with ordinary random weights go the way of `nas-build-lut` and `nas-profile`: fp16,
channels-last, batch 64, compiled, captured as CUDA graphs, visited in shuffled rounds beside the references. The paper timed
TensorRT on an A100; here it is torch.compile, so a ratio that differs may be the runtime's as well as the GPU's.

With `--forms`, L1 and L3 of this package are timed instead, in the plain form, which tables of GPUs are of, and in the deploy
form, which ONNX Runtime is given (docs/export.md): whether the plain one is in fact the faster one for torch.compile.

It needs an NVIDIA GPU and, without `--forms`, timm (`pip install timm`). No figure of it is in the docs until somebody runs it.
"""

import argparse
import itertools
import random

import torch
from torch import Tensor, nn

from nas.measure import build_module, with_ordinary_values
from nas.profilers.cuda import open_gpu
from nas.profilers.timing import Visit, median_reference, summarise, visit_in_rounds
from supernet.zoo import zoo

CLAIMS = (  # faster, slower, how many times by the paper (A100, TensorRT, batch 64)
    ("efficientformer_l3", "poolformer_s36", 3.0),
    ("efficientformer_l1", "mobilevit_xs", 1.9),
)
OURS = ("efficientformer_l1", "efficientformer_l3")
FORMS = ("plain", "deploy")


def published(batch: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return timm's networks and their inputs."""
    import timm
    from timm.data import resolve_model_data_config

    found = {}
    for name in itertools.chain.from_iterable(claim[:2] for claim in CLAIMS):
        module = with_ordinary_values(timm.create_model(name).eval(), seed=0)
        size = resolve_model_data_config(module)["input_size"]
        found[name] = module, torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
    return found


def both_forms(batch: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return our networks in both forms, and their inputs."""
    return {
        f"{name}, {form}": build_module(tuple(zoo(name).layers()), batch, deploy=form == "deploy")
        for name, form in itertools.product(OURS, FORMS)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="fp16", help="fp16, bf16 or fp32")
    parser.add_argument("--visits", type=int, default=40, help="of each network")
    parser.add_argument("--forms", action="store_true", help="our networks in the plain and in the deploy form")
    given = parser.parse_args()

    gpu = open_gpu("cuda", precision=given.precision, batch=given.batch)
    place = gpu.environment()
    for warning in place["warnings"]:
        print(f"warning: {warning}")
    models = both_forms(given.batch) if given.forms else published(given.batch)
    visits: dict[str, list[Visit]] = {name: [] for name in models}
    with gpu.exclusive():
        stopwatch = gpu.stopwatch()
        visit_in_rounds(
            {name: gpu.open_module(*model)[0] for name, model in models.items()},
            stopwatch,
            lambda: [name for name, made in visits.items() if len(made) < given.visits],
            lambda name, visit: visits[name].append(visit),
            random.Random(0),
        )
    reference = median_reference([visit for made in visits.values() for visit in made])
    found = {name: summarise(made, reference) for name, made in visits.items()}
    bursts = gpu.environment()["gpu"]["bursts"]
    print(
        f"{gpu.gpu.name} ({gpu.id}), {place['runtime']} {place['runtime_version']}, driver {place['driver']}, "
        f"{place['measured_at'][:10]}; {bursts['kept']} bursts kept ({bursts['kept_at_power_cap']} at the power cap), "
        f"{bursts['dropped']} dropped"
    )
    print(f"| network | ms a batch of {given.batch} (95 %) | ms an image |\n|---|---|---|")
    for name, m in found.items():
        print(f"| {name} | {m.ms:.3f} ({m.low_ms:.3f} to {m.high_ms:.3f}) | {m.ms / given.batch:.4f} |")
    if given.forms:
        for name in OURS:
            print(f"{name}: plain takes {found[f'{name}, plain'].ms / found[f'{name}, deploy'].ms:.3f} of deploy's time")
        return
    for fast, slow, claimed in CLAIMS:
        ratio = found[slow].ms / found[fast].ms
        print(f"{fast} is {ratio:.2f} times as fast as {slow}; the paper says {claimed:g} times for an A100")


if __name__ == "__main__":
    main()
