"""What a user would pick instead of searching: random networks, and published ones scaled to a target on this CPU.

Every network is timed whole, at the pace that the latency table was built at, and meets a target where the upper end of its
95 % interval is at most the target.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

import torch
from mobilenet_v2 import SMALL_IMAGE_STRIDES, MobileNetV2
from torch.utils.flop_counter import FlopCounterMode

from nas.devices import profiler_of
from nas.guarantee import SLACK
from nas.measure import measure_alone, table_reference, with_ordinary_values
from nas.onnx_model import onnx_bytes
from nas.profilers.ort_cpu import OrtCpu
from nas.progress import say
from nas.table import LatencyTable
from supernet.arch import ArchConfig, Stage, stage_resolutions
from supernet.entries import placed_entry
from supernet.errors import InputError
from supernet.files import write_atomically
from supernet.model import Complexity, count
from supernet.space import SearchSpace
from supernet.specs import MB3D, MB4D, WIDTH_STEP, Block, Layer
from supernet.zoo import load_arch

BAND = 0.05  # of the target: random networks are drawn from so far under it, by the corrected table
TRIES = 2_000_000  # random networks in a row without one in the band
CORRECTING = 5  # random networks that are measured to correct the table
BEST_SCORED = 30  # random networks, by their score, of which one near the target is looked for
MEASURED = 10  # times as many random networks are measured at most as are wanted
NOISY = 0.03  # half an interval, as a share of the milliseconds: more, and networks are not compared at equal latency
BEYOND = 2  # scaled networks that are tried beyond the first that misses: latency does not rise with every step,
BEYOND_WIDTHS = 25  # least of all with a width: runtimes like multiples of 16, which all four widths of L1 seldom are at once
L1_SHARES = [number / 100 for number in range(10, 151)]
MOBILENET_WIDTHS = [number / 100 for number in range(5, 151)]

Network = ArchConfig | MobileNetV2
T = TypeVar("T")


class Time(NamedTuple):
    """Milliseconds of one network, with their 95 % interval."""

    ms: float
    low_ms: float
    high_ms: float


class Measured:
    """Milliseconds of whole networks on this CPU. Each is measured once and kept in a file."""

    def __init__(self, path: Path, table: LatencyTable) -> None:
        self.path, self.table = path, table
        self.profiler = cpu_of(table)
        known = json.loads(path.read_text()) if path.exists() else {}
        self.known = {name: Time(*figures) for name, figures in known.items()}

    def __call__(self, network: Network) -> Time:
        name = digest(network)
        if name not in self.known:
            what = network if isinstance(network, ArchConfig) else onnx_of(network)
            found = measure_alone(self.profiler, what, table_reference(self.table))
            if found.half_width_ms > NOISY * found.ms:
                share = 100 * found.half_width_ms / found.ms
                say(
                    f"warning: the time of {network_name(network)} is known to {share:.0f} % only: something else runs here; "
                    "measure in a quiet hour (--choose), with another --out"
                )
            self.known[name] = Time(found.ms, found.low_ms, found.high_ms)
            write_atomically(self.path, json.dumps(self.known, indent=1) + "\n")
        return self.known[name]


def cpu_of(table: LatencyTable) -> OrtCpu:
    """Return the profiler of a table of this CPU, single images in fp32.

    Raises:
        InputError: the table is another device's.
    """
    profiler = profiler_of(table)
    if not isinstance(profiler, OrtCpu) or (profiler.precision, profiler.batch, profiler.threads) != ("fp32", 1, 1):
        raise InputError(f"the table is of {table.device}: give one of this machine's CPU, with one thread, fp32 and batch 1")
    return profiler


def onnx_of(network: MobileNetV2) -> bytes:
    model = with_ordinary_values(network.module().eval(), seed=0)
    return onnx_bytes(model, torch.randn(1, 3, network.image_size, network.image_size))


def digest(network: Network) -> str:
    """Return a name for what a network is, whatever it is called and whichever slots its blocks stand in."""
    plain = replace(network.without_identity(), name="") if isinstance(network, ArchConfig) else network
    text = plain.to_yaml() if isinstance(plain, ArchConfig) else repr(plain)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def network_name(network: Network) -> str:
    return network.name if isinstance(network, ArchConfig) else f"MobileNetV2 x {network.width:g}"


def complexity(network: Network) -> Complexity:
    if isinstance(network, ArchConfig):
        return count(network)
    with torch.device("meta"):
        model, image = network.module().eval(), torch.empty(1, 3, network.image_size, network.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return Complexity(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


def random_networks(space: SearchSpace, table: LatencyTable, target_ms: float, rng: random.Random) -> Iterator[ArchConfig]:
    """Yield different random networks that by the table take from 5 % less than the target up to the target; end where many
    draws in a row bring no other one."""
    found: set[str] = set()
    tries = 0
    at_least = _at_least(space, table)
    while tries < TRIES:
        tries += 1
        widths, kinds = space.draw(rng)
        if at_least(widths, kinds) > target_ms:
            continue  # most draws where the target is far below the typical network: they are not worth building
        arch = space.arch(widths, kinds)
        if 1 - BAND <= table.predict_ms(arch) / target_ms <= 1 and digest(arch) not in found:
            found.add(digest(arch))
            tries = 0
            yield arch


def _at_least(space: SearchSpace, table: LatencyTable) -> Callable[[Sequence[int], Sequence[Sequence[str]]], float]:
    """Return what says, without building it, the least milliseconds that the table can predict for a network of these widths
    and kinds: those of its stem, embeddings and blocks."""
    (by,) = table.calibrations or (None,)
    entering = (space.image_size, *stage_resolutions(space.image_size, space.strides))

    def of(layer: Layer) -> float:
        return table.layer_ms(layer) * (by.slope_of(layer) if by else 1.0)

    @cache
    def entry(i: int, before: int | None, width: int) -> float:
        stage = space.stages[i]
        return of(Layer(placed_entry(stage.entry, width, before, stage.stride), entering[i]))

    @cache
    def block(i: int, width: int, kind: str) -> float:
        return 0.0 if kind == "identity" else of(Layer(space.stages[i].candidate(kind, width), entering[i + 1]))

    def at_least(widths: Sequence[int], kinds: Sequence[Sequence[str]]) -> float:
        line = sum(entry(i, before, width) for i, (before, width) in enumerate(zip((None, *widths), widths, strict=False)))
        line += sum(block(i, widths[i], kind) for i, slots in enumerate(kinds) for kind in slots)
        return by.offset_ms + line * by.bent(line) if by else line

    return at_least


def random_at_target(
    space: SearchSpace, table: LatencyTable, check: Callable[[ArchConfig], Time], target_ms: float, rng: random.Random
) -> Iterator[ArchConfig]:
    """Yield different random networks whose upper end is likely to lie from 5 % under the target up to the target.

    A search corrects its budget by how far the device disagrees with the table (nas.guarantee). So that random networks are
    as near to the target, the table is corrected here too: by the median, over a few networks that it says are at the target,
    of the measured upper end of the interval over what it predicts.
    """
    first = list(itertools.islice(random_networks(space, table, target_ms, rng), CORRECTING))
    if first:
        ratio = median(check(arch).high_ms / table.predict_ms(arch) for arch in first)
        yield from random_networks(space, table, target_ms / ratio, rng)


def draw_at_target(
    draws: Iterator[ArchConfig], check: Callable[[ArchConfig], Time], target_ms: float, n: int
) -> list[ArchConfig]:
    """Return the first `n` draws whose measured latency meets the target and is at most 3 % under it. Where there are too few
    among 10 n draws, the slowest of the others that meet it fill up; where these are too few as well, fewer are returned."""
    kept: list[ArchConfig] = []
    faster: list[tuple[float, ArchConfig]] = []
    for _, arch in zip(range(MEASURED * n), draws, strict=False):
        if len(kept) == n:
            break
        high_ms = check(arch).high_ms
        if (1 - SLACK) * target_ms <= high_ms <= target_ms:
            kept.append(arch)
        elif high_ms < target_ms:
            faster.append((high_ms, arch))
    faster.sort(key=lambda found: -found[0])
    kept += [arch for _, arch in faster[: n - len(kept)]]
    if len(kept) < n:
        say(f"warning: only {len(kept)} random networks that meet {target_ms:g} ms were found, not {n}")
    return kept


def best_scored(
    draws: Iterator[ArchConfig],
    loss_of: Callable[[ArchConfig], float],
    check: Callable[[ArchConfig], Time],
    target_ms: float,
    n: int,
) -> ArchConfig | None:
    """Return, of `n` draws, the one of least loss whose measured latency meets the target and is at most 3 % under it, as a
    search gives back what it has left. Where there is none among the 30 that score best, the one of least loss of those that
    meet it; None where none of all does."""
    scored = sorted(((loss_of(arch), number, arch) for number, arch in zip(range(n), draws, strict=False)), key=lambda s: s[:2])
    faster = None
    for number, (_, _, arch) in enumerate(scored):
        high_ms = check(arch).high_ms
        if (1 - SLACK) * target_ms <= high_ms <= target_ms:
            return arch
        if high_ms < target_ms:
            faster = faster or arch
        if faster is not None and number >= BEST_SCORED - 1:
            break
    return faster


@cache
def _l1() -> ArchConfig:
    return load_arch("efficientformer_l1")


def scaled_l1(share: float, depth_share: float, strides: Sequence[int], image_size: int, num_classes: int) -> ArchConfig:
    """Return EfficientFormer-L1 with every width multiplied by `share` (to the nearest multiple of 8) and every stage's number
    of blocks by `depth_share` (to the nearest, at least one), with strides for another image size. The last block is the
    one with attention, as in L1."""
    stages = []
    for number, (stage, stride) in enumerate(zip(_l1().stages, strides, strict=True), 1):
        width = max(1, int(share * stage.width / WIDTH_STEP + 0.5)) * WIDTH_STEP
        blocks: list[Block] = [MB4D(width)] * max(1, int(depth_share * len(stage.blocks) + 0.5))
        if number == len(strides):
            blocks[-1] = MB3D(width)
        stages.append(Stage(width, stride, tuple(blocks)))
    return ArchConfig(f"l1 x {share:g}", image_size, num_classes, tuple(stages))


def largest_that_fits(candidates: Sequence[T], fits: Callable[[T], bool], beyond: int = BEYOND) -> T | None:
    """Return the last of the candidates, which grow, that fits; None where none does.

    Found by halving, as if each that is larger than one that misses missed too; then the next larger ones are tried until
    1 + `beyond` in a row miss.
    """
    known, missing = -1, len(candidates)
    while missing - known > 1:
        middle = (known + missing) // 2
        known, missing = (middle, missing) if fits(candidates[middle]) else (known, middle)
    at = missing
    while at < min(missing + beyond, len(candidates) - 1):
        at += 1
        if fits(candidates[at]):
            known = missing = at
    return candidates[known] if known >= 0 else None


def different(archs: Iterable[ArchConfig]) -> list[ArchConfig]:
    """Return the networks without those that rounding has made equal to one before."""
    found: dict[tuple[Stage, ...], ArchConfig] = {}
    for arch in archs:
        found.setdefault(arch.stages, arch)
    return list(found.values())


def largest_l1(space: SearchSpace, fits: Callable[[ArchConfig], bool]) -> ArchConfig | None:
    """Return the largest uniformly scaled EfficientFormer-L1 that fits.

    A step of width or a block more in a stage can be a large step: from the largest network that fits on, the widths go on
    growing alone, and the depths alone, and of what fits the network with the most multiply-adds is taken.
    """

    def scaled(share: float, depth_share: float) -> ArchConfig:
        return scaled_l1(share, depth_share, space.strides, space.image_size, space.num_classes)

    uniform = {share: scaled(share, share) for share in L1_SHARES}
    found = largest_that_fits(different(uniform.values()), fits)
    if found is None:
        return None
    share = max(share for share, arch in uniform.items() if arch.stages == found.stages)
    wider = different(scaled(width, share) for width in L1_SHARES if width >= share)
    deeper = different(scaled(share, depth) for depth in L1_SHARES if depth >= share)
    grown = (largest_that_fits(wider, fits, BEYOND_WIDTHS), largest_that_fits(deeper, fits))
    return max((found, *filter(None, grown)), key=lambda arch: complexity(arch).macs)


def largest_mobilenet(image_size: int, num_classes: int, fits: Callable[[MobileNetV2], bool]) -> MobileNetV2 | None:
    """Return the widest MobileNetV2 that fits."""
    widths = {MobileNetV2(w, image_size, num_classes, SMALL_IMAGE_STRIDES).widths: w for w in reversed(MOBILENET_WIDTHS)}
    growing = sorted(widths.values())
    return largest_that_fits([MobileNetV2(w, image_size, num_classes, SMALL_IMAGE_STRIDES) for w in growing], fits)
