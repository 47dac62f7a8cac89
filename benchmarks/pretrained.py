"""A trained network made faster: slimmed from its own weights, beside what else one might do.

    python benchmarks/pretrained.py --data cifar10 --table latency_tables/my-cpu.csv --out pretrained

Trains a network on the images, tunes it with itself as the teacher, and then, for each share of its measured latency:

- slimmed: `nas-search --init` from its own weights, then tuned with the original as the teacher
- from nothing: the network that was found, trained for as long as the search and the tuning took
- uniform, magnitude: every stage at one share of its width, the channels of largest norm, tuned the same way
- Torch-Pruning: its MagnitudePruner at one ratio, tuned the same way (where `pip install torch-pruning` is there)

Uniform and Torch-Pruning, which leaves the projections of attention alone, as it cannot cut them apart, are as slow as they may
be: the widest whose latency meets the target as a search's network does, by the upper end of its 95 % interval. Prints
milliseconds at the pace that the table was built at, parameters, and top-1 on the validation images before and after tuning,
mean over the seeds, with the range of the ratios and epochs that the seeds have; by n images an accuracy p is known to about
sqrt(p (1 - p) / n). Where the table lacks rows of the network's space, the command that measures them is named. Goes on where
it was killed.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rivals import cpu_of
from safetensors.torch import save as save_safetensors
from studies import content_of, train_model
from torch import nn

from nas.checkpoints import load_weights
from nas.data import ImageData, load_images
from nas.devices import measuring
from nas.evaluation import accuracy_of, recalibrate
from nas.measure import measure_alone, table_reference
from nas.onnx_model import onnx_bytes
from nas.pretrained import space_of
from nas.profilers.timing import Measurement
from nas.progress import say
from nas.recipe import RECIPES
from nas.request import claim
from nas.search import Request, run_search
from nas.table import LatencyTable
from nas.taylor import calibration_batches, unit_scores
from nas.teacher import load_teacher
from nas.training import train_network
from supernet.arch import ArchConfig, place_of
from supernet.blocks.efficientformer import LayerScale
from supernet.deploy import deployed
from supernet.errors import InputError
from supernet.files import write_atomically
from supernet.model import build_model
from supernet.space import SearchSpace
from supernet.units import at_widths, narrowed
from supernet.zoo import load_arch

CALIBRATION_IMAGES = 256
PROBE_IMAGES = (1280, 5120)  # of two short epochs that tell how long one from nothing takes
PRUNING_STEP = 0.025
HEARTBEAT_S = 30.0
SHARES_OF_WIDTH = [1 - number / 16 for number in range(1, 15)]


class Unreachable(InputError):
    """A way of making a network narrower makes none that is as fast as the target."""


@dataclass(frozen=True)
class Outcome:
    """One network of the comparison."""

    name: str
    """With {} for `chosen`, where there is one."""
    ms: float
    params: int
    before: float | None
    """Top-1 (0 to 1) before it was tuned; None for a training from nothing."""
    after: float
    chosen: float | None = None
    """Epochs, a share, a ratio: what another seed may have chosen otherwise."""


def default_network() -> ArchConfig:
    """Return the network of `efficientformer-tiny` at its largest widths, with attention at the end of its last two stages."""
    kinds = [["mb4d"] * 2, ["mb4d"] * 2, ["mb4d"] * 3 + ["mb3d"], ["mb4d", "mb3d", "mb3d"]]
    space = SearchSpace.load("efficientformer-tiny")
    return replace(space.arch([stage.widths[-1] for stage in space.stages], kinds), name="original")


class Seconds:
    """How long parts of the work took, in a file: a part that was killed is added to by what goes on with it.

    The file is written every half a minute, so that a kill of any kind loses no more than that.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def of(self, part: str, work: Callable[[], Any]) -> Any:
        """Do the work and add its seconds to its part."""
        before, began, ended = self.parts.get(part, 0.0), time.monotonic(), threading.Event()

        def write() -> None:
            self.parts[part] = before + time.monotonic() - began
            # Not by write_atomically: it sets the umask, which all threads share, for a moment.
            unfinished = self.path.with_name(f".{self.path.name}")
            unfinished.write_text(json.dumps(self.parts) + "\n")
            unfinished.replace(self.path)

        def beat() -> None:
            while not ended.wait(HEARTBEAT_S):
                write()

        self.path.parent.mkdir(parents=True, exist_ok=True)
        beating = threading.Thread(target=beat, daemon=True)
        beating.start()
        try:
            return work()
        finally:
            ended.set()
            beating.join()
            write()


class Comparison:
    """One seed's networks, each kept in its own folder when it is finished."""

    def __init__(self, arch: ArchConfig, data: ImageData, table: LatencyTable, given: argparse.Namespace, seed: int) -> None:
        self.profiler = cpu_of(table)
        self.data, self.table, self.given, self.seed = data, table, given, seed
        self.folder = given.out / f"seed{seed}"
        self.recipe = replace(RECIPES["quick"], epochs=given.epochs)
        self.tuning = replace(RECIPES["finetune"], epochs=given.tune)
        trained = train_network(arch, data, self.recipe, self.folder / "original", seed)
        self.arch = trained.arch
        self.weights = self.folder / "original" / "model.safetensors"
        self.teacher = load_teacher(self.folder / "original" / "arch.yaml", arch.image_size, data.classes)
        self.original = self.loaded(self.arch, self.weights)
        batches = calibration_batches(data, CALIBRATION_IMAGES)
        self.scores = unit_scores(self.original, self.arch, batches, "magnitude")
        self.images = torch.cat([x for x, _ in batches])

    def loaded(self, arch: ArchConfig, weights: Path) -> nn.Sequential:
        model = build_model(arch)
        load_weights(model, weights)
        return model.eval()

    def timed(self, model: nn.Module, arch: ArchConfig) -> Measurement:
        """Return the time of a call of the deploy form, at the pace that the machine had when the table was built."""
        side = arch.image_size
        graph = onnx_bytes(deployed(model.eval().cpu(), arch), torch.randn(1, 3, side, side))
        return measure_alone(self.profiler, graph, table_reference(self.table))

    def kept(self, name: str, make: Callable[[], Outcome]) -> Outcome:
        """Return an outcome, made now or read from its file."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            write_atomically(file, json.dumps(vars(make())) + "\n")
        return Outcome(**json.loads(file.read_text()))

    def whole(self) -> Outcome:
        accuracy = accuracy_of(self.original, self.data.val)[1]
        return Outcome("as it is", self.timed(self.original, self.arch).ms, parameters(self.original), accuracy, accuracy)

    def whole_tuned(self) -> Outcome:
        """Tune the original as the narrower networks are, so that what tuning alone gains is not put down to slimming."""
        tuned = self.tuned(self.arch, self.weights, self.folder / "whole-tuned")
        before, after = (accuracy_of(model, self.data.val)[1] for model in (self.original, tuned))
        return Outcome("as it is, tuned the same way", self.timed(tuned, self.arch).ms, parameters(tuned), before, after)

    def slimmed(self, target_ms: float, name: str) -> Outcome:
        """Search from the original's weights, tune what is found; `seconds.json` says how long both took."""
        folder = self.folder / name
        took = Seconds(folder / "seconds.json")
        request = Request(
            target_ms,
            table=(self.given.table,) if self.given.table else (),
            data=self.given.data,
            out=folder / "run",
            seed=0,  # as the images were divided
            init=str(self.folder / "original" / "arch.yaml"),
            weights=str(self.weights),
        )
        result = took.of("search", lambda: run_search(request))
        arch = ArchConfig.load(folder / "run" / "searched.yaml")
        weights = folder / "run" / "weights.safetensors"
        tuned = took.of("tuning", lambda: self.tuned(arch, weights, folder / "tuned"))
        return Outcome(
            "slimmed",
            self.timed(tuned, arch.without_identity()).ms,
            parameters(tuned),
            result["accuracy"],
            accuracy_of(tuned, self.data.val)[1],
        )

    def tuned(self, arch: ArchConfig, weights: Path, folder: Path) -> nn.Sequential:
        train_network(arch, self.data, self.tuning, folder, self.seed, weights=weights, teacher=self.teacher)
        return self.loaded(arch.without_identity(), folder / "model.safetensors")

    def from_nothing(self, slimmed: str, name: str) -> Outcome:
        """Train the found network anew, for as long as the search and the tuning took."""
        arch = ArchConfig.load(self.folder / slimmed / "run" / "searched.yaml")
        seconds = Seconds(self.folder / slimmed / "seconds.json").total
        plan = self.folder / name / "epochs.json"
        if not plan.exists():
            probes = [replace(self.recipe, epochs=1, images_per_epoch=images) for images in PROBE_IMAGES]
            times = []
            for probe in probes:  # each has a validation pass and a checkpoint: the difference has none
                began = time.monotonic()
                with tempfile.TemporaryDirectory() as folder:
                    train_network(arch, self.data, probe, Path(folder), self.seed)
                times.append(time.monotonic() - began)
            of_image = (times[1] - times[0]) / (PROBE_IMAGES[1] - PROBE_IMAGES[0])
            epoch = len(self.data.train) * of_image + times[0] - PROBE_IMAGES[0] * of_image
            write_atomically(plan, json.dumps(max(1, round(seconds / epoch))) + "\n")
        recipe = replace(self.recipe, epochs=json.loads(plan.read_text()))
        say(f"{name}: {seconds:.0f} s are {recipe.epochs} epochs")
        train_network(arch, self.data, recipe, self.folder / name / "trained", self.seed)
        model = self.loaded(arch.without_identity(), self.folder / name / "trained" / "model.safetensors")
        ms, accuracy = self.timed(model, arch.without_identity()).ms, accuracy_of(model, self.data.val)[1]
        return Outcome("from nothing ({} epochs)", ms, parameters(model), None, accuracy, recipe.epochs)

    def uniform(self, target_ms: float, name: str) -> Outcome:
        """Narrow all stages by one share, to the widest network whose latency is at or under the target."""
        folder = self.folder / name
        plan, start = folder / "share.json", folder / "start.safetensors"
        if not plan.exists():  # timed once: after a kill another share might meet the target, which is not what was tuned
            share, model = self.widest(target_ms)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(start, save_safetensors({n: t.contiguous() for n, t in model.state_dict().items()}))
            write_atomically(plan, json.dumps(share) + "\n")
        share = json.loads(plan.read_text())
        target = replace(self.at_share(share), name=name)
        before = accuracy_of(self.loaded(target, start), self.data.val)[1]
        tuned = self.tuned(target, start, folder / "tuned")
        ms, after = self.timed(tuned, target).ms, accuracy_of(tuned, self.data.val)[1]
        return Outcome("uniform, magnitude ({} of the width)", ms, parameters(tuned), before, after, share)

    def widest(self, target_ms: float) -> tuple[float, nn.Sequential]:
        """Return the largest share of the widths whose network's latency is at or under the target, and that network."""
        for share in SHARES_OF_WIDTH:
            target = self.at_share(share)
            model = build_model(target)
            model.load_state_dict(narrowed(self.original.state_dict(), self.arch, target, self.scores))
            recalibrate(model, self.images)
            if self.timed(model, target).high_ms <= target_ms:
                return share, model
        raise Unreachable(f"no uniform width is as fast as {target_ms:g} ms")

    def at_share(self, share: float) -> ArchConfig:
        widths = [stage.widths[0] for stage in SearchSpace.around(self.arch, width_shares=(share,)).stages]
        return at_widths(self.arch, widths)

    def torch_pruned(self, target_ms: float) -> Outcome:
        """Prune by Torch-Pruning's magnitude at one ratio, to the slowest network at or under the target, and tune it."""
        import torch_pruning  # type: ignore[import-not-found, import-untyped, unused-ignore]

        side = self.arch.image_size
        steps = int(0.9 / PRUNING_STEP)
        for ratio in (PRUNING_STEP * number for number in range(1, steps)):
            model = self.loaded(self.arch, self.weights)
            attentions = [m for m in model.modules() if hasattr(m, "qkv")]
            pruner = torch_pruning.pruner.MagnitudePruner(
                model,
                torch.randn(1, 3, side, side),
                importance=torch_pruning.importance.MagnitudeImportance(p=2),
                pruning_ratio=ratio,
                round_to=8,
                # A head's queries, keys and values lie interleaved in one projection, which it cannot cut apart.
                ignored_layers=[model.get_submodule("head.fc"), *(p for m in attentions for p in (m.qkv, m.attention_biases))],
                unwrapped_parameters=[(p, 0) for n, p in model.named_parameters() if n.endswith("gamma")],
            )
            pruner.step()
            for scale in (module for module in model.modules() if isinstance(module, LayerScale)):
                scale.shape = (len(scale.gamma), *scale.shape[1:])
            recalibrate(model, self.images)
            arch = at_widths(self.arch, widths_of(model, self.arch))
            if self.timed(model, arch).high_ms <= target_ms:
                break
        else:
            raise Unreachable(f"Torch-Pruning finds no network as fast as {target_ms:g} ms")
        before = accuracy_of(model, self.data.val)[1]
        train_model(model, "Torch-Pruning", self.data, self.tuning, self.seed, None, self.teacher)
        ms, after = self.timed(model, arch).ms, accuracy_of(model, self.data.val)[1]
        return Outcome("Torch-Pruning (ratio {})", ms, parameters(model), before, after, ratio)


def widths_of(model: nn.Module, arch: ArchConfig) -> list[int]:
    """Return the widths that the stages of a pruned network have left; all of a network's blocks have layer scales."""
    scales = {name: len(module.gamma) for name, module in model.named_modules() if isinstance(module, LayerScale)}
    return [
        next((n for name, n in scales.items() if place_of(name.partition(".")[0]).stage == at), stage.width)
        for at, stage in enumerate(arch.stages)
    ]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def label(found: Sequence[Outcome]) -> str:
    """Return what to call the outcomes of one way, one a seed, with the range of what the seeds chose."""
    chosen = [o.chosen for o in found if o.chosen is not None] or [0.0]
    low, high = (f"{end(chosen):g}" for end in (min, max))
    return found[0].name.format(low if low == high else f"{low} to {high}")


def print_table(rows: Sequence[tuple[str, list[Outcome]]]) -> None:
    print("\n| target | network | ms | M parameters | top-1 before tuning, % | top-1, % |\n|---|---|---:|---:|---:|---:|")
    for target, found in rows:
        before = [100 * o.before for o in found if o.before is not None]
        after = [100 * o.after for o in found]
        spread = f" ± {stdev(after):.1f}" if len(after) > 1 else ""
        print(
            f"| {target} | {label(found)} | {mean(o.ms for o in found):.3f} | {mean(o.params for o in found) / 1e6:.2f} | "
            f"{f'{mean(before):.1f}' if before else ''} | {mean(after):.1f}{spread} |"
        )


def require_rows(table: LatencyTable, arch: ArchConfig, data: ImageData, given: argparse.Namespace) -> None:
    """Refuse a table without the rows that the searches need. That is before the claim: with them it is another file."""
    space = space_of(arch).with_classes(len(data.classes))
    if table.missing(space.layers()):
        file = Path(f"{given.out}-space.yaml")
        space.save(file)
        table.require(space.layers(), measuring(table, f"--space {file} --out {given.table.parent}"))
    table.predict_ms(space.smallest)  # refuses one without a calibration for such networks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="an image folder")
    parser.add_argument("--table", type=Path, required=True, help="the latency table (CSV) of this machine's CPU")
    parser.add_argument("--network", help="a YAML file or a network of the zoo (default: a large one of efficientformer-tiny)")
    parser.add_argument("--epochs", type=int, default=15, help="of the original's training")
    parser.add_argument("--tune", type=int, default=5, help="epochs of tuning")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.5], help="of the original's measured latency")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("pretrained"))
    given = parser.parse_args()
    arch = load_arch(given.network) if given.network else default_network()
    data = load_images(given.data, arch.image_size, seed=0, score_images=512)
    table = LatencyTable.load(given.table)
    cpu_of(table)  # refuses another device's
    require_rows(table, arch, data, given)
    claim(
        given.out,
        {
            "command": "benchmarks/pretrained.py",
            "data": data.fingerprint,
            "network": arch.to_yaml(),
            "epochs": given.epochs,
            "tune": given.tune,
            **content_of(given.table, table),
        },
    )
    by_name: dict[tuple[str, str], list[Outcome]] = {}
    for seed in range(given.seeds):
        one = Comparison(arch, data, table, given, seed)
        whole = one.kept("whole", one.whole)
        by_name.setdefault(("", "whole"), []).append(whole)
        by_name.setdefault(("", "whole-tuned"), []).append(one.kept("whole-tuned", one.whole_tuned))
        for share in given.shares:
            target = share * whole.ms
            slimmed, nothing, uniform = (f"{way}-{share:g}" for way in ("slimmed", "nothing", "uniform"))
            ways = {
                slimmed: partial(one.slimmed, target, slimmed),
                nothing: partial(one.from_nothing, slimmed, nothing),
                uniform: partial(one.uniform, target, uniform),
                f"torch-pruning-{share:g}": partial(one.torch_pruned, target),
            }
            for way, make in ways.items():
                try:
                    by_name.setdefault((f"{share:.0%}", way), []).append(one.kept(way, make))
                except Unreachable as error:
                    say(f"{error}: left out")
                except ImportError:
                    say("Torch-Pruning is not installed: left out (pip install torch-pruning)")
    print(f"{arch.name} of {arch.image_size} px, {given.epochs} epochs on {len(data.train):,} images, tuned for {given.tune}")
    print_table([(text, found) for (text, _), found in by_name.items() if found])


if __name__ == "__main__":
    try:
        main()
    except (InputError, FloatingPointError) as error:  # a training that diverged is told in one line, too
        raise SystemExit(str(error)) from None
