"""The source papers' latency analysis on this machine's CPU: which design choices cost time here?

    python benchmarks/latency_analysis.py > analysis.md

Prints Markdown tables. In each table all variants are timed side by side in shuffled rounds, their sessions opened anew every
4 rounds; a ratio is the median over rounds of the ratio of two visits of the same round, each divided by the references timed
around it, with the 95 % interval of that median. Shares of operators come from traces; their spread is the range over repeated
traces. timm networks are left out where timm is not installed. A few minutes; leave the machine alone meanwhile.
"""

import argparse
import datetime
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import onnxruntime
import torch
from torch import Tensor, nn

from nas.measure import SESSION_VISITS, with_ordinary_values
from nas.networks import find_arch, load_model
from nas.onnx_model import onnx_bytes
from nas.operators import Breakdown, bound_model, profile_operators
from nas.profilers.ort_cpu import OrtCpu
from nas.profilers.ort_session import OrtModel, cpu_name
from nas.profilers.timing import Visit, median_interval, summarise, visit_in_rounds
from nas.progress import progress, say
from supernet.blocks import build_layer
from supernet.blocks.efficientformer import ConvMlp, Mlp
from supernet.errors import InputError
from supernet.specs import MB3D, MB4D, Flat, Layer, Stem, Unflat

STAGES = ((48, 56), (96, 28), (224, 14), (448, 7))  # width and side of EfficientFormer-L1's stages at 224 px
CHAIN = 4  # blocks in a session, so that its ends weigh little
RESHAPES = ("Reshape", "Transpose", "Split", "Concat", "Slice", "Squeeze", "Unsqueeze", "Flatten", "Gather", "Pad")
REORDERS = ("ReorderInput", "ReorderOutput")
NETWORKS = (
    "efficientformer_l1",
    "timm:deit_tiny_patch16_224",
    "timm:poolformer_s12",
    "timm:levit_256",
    "timm:mobilevit_xs",
    "timm:efficientvit_m4",
)

Opener = Callable[[], OrtModel]
"""Opens a session of a model anew."""


class LinearMlpBlock(nn.Module):
    """Layer norm over channels, linear, GELU, linear, on tokens: (N, L, C) to the same, with a shortcut."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(dim), Mlp(dim, 4 * dim, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class ConvMlpBlock(nn.Module):
    """1x1 convolutions with batch norm, or (`group_norm`) a group norm over all channels before plain ones: (N, C, H, W)."""

    def __init__(self, dim: int, *, group_norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, dim) if group_norm else nn.Identity()
        self.mlp = ConvMlp(dim, 4 * dim, "gelu")
        if group_norm:
            self.mlp.norm1 = self.mlp.norm2 = nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def conv_stem(*widths: int) -> nn.Module:
    """3x3 stride-2 convolutions with batch norm and ReLU, from the image through these widths."""
    parts: list[nn.Module] = []
    for entering, width in zip((3, *widths[:-1]), widths, strict=True):
        parts += [nn.Conv2d(entering, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*parts)


def layers(*chain: Layer) -> nn.Module:
    return nn.Sequential(*(build_layer(layer) for layer in chain))


def opener(module: nn.Module, *shape: int) -> Opener:
    """Return what opens a module with ordinary weights, for one input of this shape."""
    example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    return partial(bound_model, onnx_bytes(with_ordinary_values(module, seed=0), example), type(module).__name__)


def side_by_side(what: str, entries: Mapping[str, Opener], rounds: int) -> dict[str, list[Visit]]:
    """Visit every entry once a round, in shuffled order.

    All are opened anew every 4 rounds, in another order: where a session's memory happens to lie moves its times by some
    percent.
    """
    visits: dict[str, list[Visit]] = {name: [] for name in entries}
    cpu, rng = OrtCpu(), random.Random(0)
    with cpu.exclusive(), progress(what, rounds * len(entries)) as tick:
        watch = cpu.stopwatch()

        def record(name: str, visit: Visit) -> None:
            visits[name].append(visit)
            tick(1)

        def short_of(number: int) -> list[str]:
            return [name for name, made in visits.items() if len(made) < number]

        for done in range(0, rounds, SESSION_VISITS):
            runs = {name: entries[name]() for name in rng.sample(list(entries), len(entries))}
            visit_in_rounds(runs, watch, partial(short_of, min(rounds, done + SESSION_VISITS)), record, rng)
    return visits


def ratio(visits: Sequence[Visit], base: Sequence[Visit]) -> tuple[float, float, float]:
    """Return the median over rounds of visits / base, and its 95 % interval."""

    def normalised(visit: Visit) -> float:
        return visit.raw_ms / (visit.reference.cached_ms * visit.reference.streaming_ms) ** 0.5

    ratios = sorted(normalised(a) / normalised(b) for a, b in zip(visits, base, strict=True))
    return (median(ratios), *median_interval(ratios))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def compared(visits: Mapping[str, Sequence[Visit]], name: str, base: str, parts: int = 1) -> list[str]:
    """Return the cells `ms`, `ratio to base (95 % interval)`."""
    found = summarise(visits[name])
    if name == base:
        return [f"{found.ms / parts:.3f}", "1"]
    middle, low, high = ratio(visits[name], visits[base])
    return [f"{found.ms / parts:.3f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]


def patch_embedding(rounds: int) -> None:
    print("\n## Patch embedding: one large kernel against 3x3 convolutions (224 px image)")
    groups: dict[str, dict[str, tuple[nn.Module, float]]] = {
        "48 channels at 56 px": {
            "two 3x3 stride 2, batch norm, ReLU": (layers(Layer(Stem(48), 224)), 112**2 * 27 * 24 + 56**2 * 9 * 24 * 48),
            "4x4 stride 4": (nn.Conv2d(3, 48, 4, 4), 56**2 * 48 * 48),
            "7x7 stride 4": (nn.Conv2d(3, 48, 7, 4, 3), 56**2 * 147 * 48),
        },
        "192 channels at 14 px": {
            "four 3x3 stride 2, batch norm, ReLU": (
                conv_stem(24, 48, 96, 192),
                112**2 * 27 * 24 + 56**2 * 9 * 24 * 48 + 28**2 * 9 * 48 * 96 + 14**2 * 9 * 96 * 192,
            ),
            "16x16 stride 16": (nn.Conv2d(3, 192, 16, 16), 14**2 * 768 * 192),
        },
    }
    entries = {f"{out} / {how}": opener(m, 3, 224, 224) for out, ways in groups.items() for how, (m, _) in ways.items()}
    visits = side_by_side("patch embeddings", entries, rounds)
    rows = []
    for out, ways in groups.items():
        base = f"{out} / {next(iter(ways))}"
        for how, (_, macs) in ways.items():
            name = f"{out} / {how}"
            cells = compared(visits, name, base)
            rows.append([out, how, *cells, f"{macs / 1e6:.1f}", f"{macs / 1e6 / summarise(visits[name]).ms:.1f}"])
    print_table(("gives", "by", "ms", "ratio", "million MACs", "MACs per ns"), rows)


def by_stage(
    title: str, variants: Mapping[str, tuple[Callable[[int], nn.Module], bool]], rounds: int, columns: tuple[str, ...]
) -> None:
    """Time chains of blocks at every stage's width; a variant is a block of a width, and whether it takes tokens."""
    print(f"\n## {title}")
    entries = {}
    for dim, side in STAGES:
        for how, (block, tokens) in variants.items():
            chain = nn.Sequential(*(block(dim) for _ in range(CHAIN)))
            shape = (side * side, dim) if tokens else (dim, side, side)
            entries[f"{side} {how}"] = opener(chain, *shape)
    visits = side_by_side(title, entries, rounds)
    rows = []
    for dim, side in STAGES:
        base = f"{side} {next(iter(variants))}"
        rows += [[f"{dim} at {side} px", how, *compared(visits, f"{side} {how}", base, CHAIN)] for how in variants]
    print_table(("width", *columns, "ms a block", "ratio"), rows)


def dimensions(rounds: int) -> None:
    print("\n## Feature dimension: maps (4D) and tokens (3D) in turn, or each once")
    entries: dict[str, Opener] = {}
    for dim, side in STAGES[2:]:
        pool, attention = Layer(MB4D(dim), side), Layer(MB3D(dim), side)
        flat, unflat = Layer(Flat(dim), side), Layer(Unflat(dim), side)
        entries[f"{side} once"] = opener(layers(pool, pool, pool, flat, *[attention] * 3, unflat), dim, side, side)
        entries[f"{side} turn"] = opener(layers(*[pool, flat, attention, unflat] * 3), dim, side, side)
    visits = side_by_side("feature dimensions", entries, rounds)
    rows = []
    for dim, side in STAGES[2:]:
        for key, how in (("once", "3 MB4D, then 3 MB3D"), ("turn", "MB4D and MB3D in turn, 3 times")):
            rows.append([f"{dim} at {side} px", how, *compared(visits, f"{side} {key}", f"{side} once")])
    print_table(("width", "order", "ms", "ratio"), rows)


def share(breakdown: Breakdown, kinds: Sequence[str]) -> float:
    return 100 * sum(kind.share for kind in breakdown.operators if kind.operator in kinds)


def spread(values: Sequence[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def whole_networks(rounds: int, repeats: int) -> None:
    print("\n## Whole networks: memory-bound operators, reshapes, changes of layout")
    models = {}
    for network in NETWORKS:
        try:
            models[network.removeprefix("timm:")] = load_model(network, find_arch(network))
        except InputError as refusal:
            say(f"left out: {refusal}")
    visits = side_by_side("networks", {name: partial(bound_model, model.onnx, name) for name, model in models.items()}, rounds)
    base = next(iter(models))
    traces: dict[str, list[Breakdown]] = {name: [] for name in models}
    with progress("tracing", repeats * len(models)) as tick:
        for _ in range(repeats):
            for name, model in models.items():
                ms = summarise(visits[name]).ms
                traces[name].append(profile_operators(model.onnx, name, ms, model.layers))
                tick(1)
    rows = []
    for name, found in traces.items():
        rows.append(
            [
                name,
                *compared(visits, name, base),
                spread([100 * b.memory_bound_share for b in found]),
                spread([100 * b.without_macs_share for b in found]),
                spread([share(b, RESHAPES) for b in found]),
                spread([share(b, REORDERS) for b in found]),
            ]
        )
    print_table(
        ("network", "ms", "ratio", "memory-bound %", "without multiply-adds %", "reshapes %", "changes of layout %"), rows
    )

    print("\nKinds of operator, % of each network's time (median trace):")
    total: Counter[str] = Counter()
    table = {
        name: {k.operator: median(share(b, [k.operator]) for b in found) for k in found[0].operators}
        for name, found in traces.items()
    }
    for kinds in table.values():
        for kind, percent in kinds.items():
            total[kind] = max(total[kind], round(1000 * percent))
    names = [kind for kind, most in total.most_common() if most >= 2000]
    print_table(
        ("network", *names),
        [[name, *(f"{kinds[k]:.1f}" if k in kinds else "" for k in names)] for name, kinds in table.items()],
    )

    print("\nEfficientFormer-L1's one attention block, % of its time:")
    blocks = [layer for b in traces[base] for layer in b.layers if layer.name == "stage4_block4"]
    groups = {
        "linear layers (Gemm; in the deploy form also Conv)": ("Gemm", "Conv"),
        "products of attention (MatMul)": ("MatMul", "FusedMatMul"),
        "reshapes": RESHAPES,
        "softmax, norms, GELU, sums, scales": (),
    }
    named = [kind for kinds in groups.values() for kind in kinds]
    rows = []
    for what, kinds in groups.items():
        parts = [sum(ms for k, ms in block.operators.items() if (k in kinds if kinds else k not in named)) for block in blocks]
        rows.append([what, spread([100 * part / block.ms for part, block in zip(parts, blocks, strict=True)])])
    print_table(("what", "%"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--traces", type=int, default=5, help="of each network")
    given = parser.parse_args()

    load = ", ".join(f"{value:.2f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    print(
        f"{cpu_name()}, {os.cpu_count()} cores, load average {load} at the start; ONNX Runtime {onnxruntime.__version__}, "
        f"one thread, batch 1, fp32; {datetime.date.today()}; {given.rounds} rounds, {given.traces} traces"
    )
    patch_embedding(given.rounds)
    by_stage(
        "Norm: convolution and batch norm, or layer norm and linear",
        {
            "1x1 conv, batch norm": (ConvMlpBlock, False),
            "layer norm, linear (tokens)": (LinearMlpBlock, True),
            "group norm, 1x1 conv": (lambda dim: ConvMlpBlock(dim, group_norm=True), False),
        },
        given.rounds,
        ("MLP block",),
    )
    by_stage(
        "Activation of a pool block (MB4D)",
        {
            "ReLU": (lambda dim: build_layer(Layer(MB4D(dim, act="relu"), 1)), False),
            "GELU": (lambda dim: build_layer(Layer(MB4D(dim, act="gelu"), 1)), False),
            "HardSwish": (lambda dim: build_layer(Layer(MB4D(dim, act="hardswish"), 1)), False),
        },
        given.rounds,
        ("activation",),
    )
    dimensions(given.rounds)
    whole_networks(given.rounds, given.traces)


if __name__ == "__main__":
    main()
