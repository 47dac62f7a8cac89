"""The commands: parse, then import, then call one function.

Exit codes: 0 done; 2 the input cannot be used (one line on stderr); 1 anything else. torch and pandas are imported after
the arguments are parsed, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.alone import alone
from nas.command import batch_size, command_parser, device_target, positive_ms, run_command, seed_number, whole_number
from nas.device_ids import PHONES
from supernet.errors import InputError

if TYPE_CHECKING:
    from nas.parallel import Group

ARCH_HELP = "a network: a YAML file, or the name of a published one (efficientformer_l1, efficientvit_m4, deit_tiny, ...)"


ALONE = {"list": (), "show": ("out",), "check": ("device", "team_id", "udid")}  # options of nas-build-lut, what they go by


def build_lut(arguments: Sequence[str] | None = None) -> None:
    """Run `nas-build-lut`."""
    parser = command_parser(
        "nas-build-lut",
        "Measure the latency table of a device: the milliseconds of every layer of a space, each with its spread, and the\n"
        "error of the predictions that the table makes. Leave the machine alone meanwhile. A build that is killed goes on\n"
        "where it was when the same command is given again.",
        "  nas-build-lut --device cpu\n"
        "  nas-build-lut --device cpu --space efficientformer-s --threads 4 --precision int8\n"
        "  nas-build-lut --device cpu --arch searched.yaml --missing\n"
        "  nas-build-lut --device a100 --space efficientformer-s\n"
        "  nas-build-lut --device ssh://pi@raspberrypi --space efficientformer-s\n"
        "  nas-build-lut --device jetson-orin-cpu --export-job job\n"
        "  nas-build-lut --import-results job/results.json\n"
        "  nas-build-lut --device iphone-npu --team-id ABCDE12345 --check\n"
        "  nas-build-lut --show epyc-7b13-cpu",
    )
    parser.add_argument(
        "--device",
        metavar="D",
        help="what to measure: cpu, this machine's processor; cuda or a100, its GPU; mac-npu, mac-cpu, iphone-npu, iphone-cpu "
        "by Core ML; ssh://user@host[:port][/path/to/python], the CPU of another machine; or the id of a device",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--space", metavar="S", help="a space: its name or a YAML file (default: efficientformer-tiny)")
    what.add_argument("--arch", metavar="ARCH", help=f"the rows of one network instead; {ARCH_HELP}")
    parser.add_argument("--missing", action="store_true", help="measure only rows that the table does not have yet")
    parser.add_argument(
        "--recalibrate",
        action="store_true",
        help="time whole networks alone, and calibrate the table that is there on them: minutes, where the machine has changed",
    )
    parser.add_argument("--threads", type=whole_number, metavar="N", help="of a CPU (default: 1)")
    parser.add_argument(
        "--precision", metavar="P", help="fp32 or int8 on a CPU; fp16, bf16 or fp32 on a GPU (default: the first)"
    )
    parser.add_argument("--batch", type=whole_number, metavar="N", help="images in a call (default: 1; 64 on a GPU)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the table goes (default: your data folder)")
    jobs = parser.add_argument_group("a device that runs elsewhere")
    jobs.add_argument("--export-job", type=Path, metavar="DIR", help="write a folder that is run on the device, and end")
    jobs.add_argument("--format", metavar="F", help="of the folder's models: onnx (default) or coreml")
    jobs.add_argument(
        "--import-results",
        type=Path,
        metavar="FILE",
        help="make the table of what the device wrote, and end; a job folder is first run on the iPhone of --device; a CSV "
        "file (network,ms) of medians from elsewhere calibrates the table of --device anew",
    )
    phone = parser.add_argument_group("an iPhone that is connected to this Mac")
    phone.add_argument("--team-id", metavar="T", help="your Apple developer team, which signs the program on the phone")
    phone.add_argument("--udid", metavar="U", help="which phone, where several are connected")
    phone.add_argument("--check", action="store_true", help="print what is needed, each line ok or the fix, and end")
    told = parser.add_argument_group("what there is")
    told.add_argument("--list", action="store_true", help="print the tables that there are, and end")
    told.add_argument("--show", metavar="ID", help="print one table for people, draw it (<id>.png), and end")
    given = parser.parse_args(arguments)

    def work() -> None:
        _refuse_without_use(given)
        if given.list:
            from nas.show import print_tables

            print_tables()
        elif given.show is not None:
            from nas.lookup import resolve_device
            from nas.show import show_table

            show_table(resolve_device(given.show), given.out or Path())
        elif given.import_results is not None:
            from nas.lookup import resolve_device
            from nas.lut import import_medians, import_results
            from nas.table import user_folder

            if given.import_results.suffix == ".csv":
                device = resolve_device(given.device) if given.device is not None else None
                import_medians(given.import_results, given.out, device)
            elif given.import_results.is_dir():
                from nas.remote import run_on_iphone

                if given.device not in PHONES:
                    raise InputError(
                        f"{given.import_results} is a folder: give its results.json, or a phone: --device iphone-npu"
                    )
                run_on_iphone(given.device, given.import_results, given.out or user_folder(), given.team_id, given.udid)
            else:
                import_results(given.import_results, given.out or user_folder(), given.device)
        else:
            if given.device is None:
                given.device = _usual_device(given)
            _measure(given)

    run_command(parser.prog, work)


def _refuse_without_use(given: argparse.Namespace) -> None:
    """Refuse what nas-build-lut would not use: whoever gives it expects something of it."""
    for name, used in ALONE.items():
        if getattr(given, name) not in (None, False):
            others = [other for other in vars(given) if other not in (name, *used)]
            for other in [other for other in others if getattr(given, other) not in (None, False)]:
                raise InputError(f"--{name} measures nothing: leave --{other.replace('_', '-')} out")
    if given.export_job is not None and given.out is not None:
        raise InputError("--out is where a table goes, and a job is none yet: give it with --import-results")
    if given.format is not None and given.export_job is None:
        raise InputError("--format is of a job's models: add --export-job DIR, or leave it out")
    if given.import_results is not None:
        decided = ("space", "arch", "missing", "recalibrate", "threads", "precision", "batch", "export_job", "check")
        for name in [name for name in decided if getattr(given, name)]:
            raise InputError(f"results say themselves what was measured: leave --{name.replace('_', '-')} out")
    for name in ("team_id", "udid"):
        if getattr(given, name) is not None and given.device not in PHONES:
            raise InputError(f"--{name.replace('_', '-')} is of a connected phone: give --device iphone-npu or iphone-cpu too")


def _usual_device(given: argparse.Namespace) -> str:
    """Return the device that is meant where none is given: for a job of ONNX models, the CPU that it will run on."""
    if given.check:
        raise InputError("say what to check: --check --device iphone-npu (or iphone-cpu, mac-npu, mac-cpu)")
    if given.export_job is None:
        raise InputError("say which device to measure: nas-build-lut --device cpu (or --list to see what there is)")
    if given.format == "coreml":
        raise InputError("say which iPhone the job is for: --format coreml --device iphone15pro-npu, say, or iphone15pro-cpu")
    return "cpu"


def _measure(given: argparse.Namespace) -> None:
    from nas import remote
    from nas.devices import open_profiler
    from nas.lut import build_table
    from nas.plan import requested_space
    from nas.table import user_folder

    settings = {"threads": given.threads, "precision": given.precision, "batch": given.batch}
    folder = given.out or user_folder()
    if given.check:
        remote.print_check(given.device, given.team_id, given.udid)
        return
    space = requested_space(given.space, given.arch)
    elsewhere = given.export_job is not None or given.device.startswith("ssh://") or given.device in PHONES
    if elsewhere and given.missing:
        raise InputError("a device that is elsewhere measures all rows of a space at once: leave --missing out")
    if elsewhere and given.recalibrate:
        raise InputError(
            "a device that is elsewhere measures rows and networks at once: leave --recalibrate out, or give what its networks "
            "take as --import-results medians.csv"
        )
    if given.missing and given.recalibrate:
        raise InputError("--missing measures rows, and then networks; --recalibrate networks alone: leave one of them out")
    if given.export_job is not None:
        remote.export(given.export_job, space, given.device, given.format or "onnx", **settings)
    elif given.device.startswith("ssh://"):
        remote.build_over_ssh(given.device, space, folder, **settings)
    elif given.device in PHONES:
        if any(value is not None for value in settings.values()):
            raise InputError(f"{given.device} is measured in fp16 at batch 1: leave --threads, --precision and --batch out")
        remote.build_on_iphone(given.device, space, folder, given.team_id, given.udid)
    else:
        build_table(
            open_profiler(given.device, **settings), space, folder, only_missing=given.missing, only_networks=given.recalibrate
        )


def search(arguments: Sequence[str] | None = None) -> None:
    """Run `nas-search`."""
    parser = command_parser(
        "nas-search",
        "Find a network that runs in a given time on a device: train a supernet on your images, take blocks and width away\n"
        "by accuracy drop per millisecond until the device's latency table says that the target is met, then measure the\n"
        "network that was found. With --init it begins with a network that has its weights, and trains no supernet. Without\n"
        "--data it demonstrates itself on handwritten digits. A search that is killed goes on where it was when the same\n"
        "command is given again.",
        "  nas-search --target-ms 1.6\n"
        "  nas-search --target-ms 8 --data ~/flowers --space efficientformer-s --out flowers-8ms\n"
        "  nas-search --init efficientformer_l3 --weights l3.safetensors --target-ms 8 --data ~/flowers --out run\n"
        "  nas-search --target cpu=8 --target iphone15pro-npu=1.2 --data ~/flowers\n"
        "  nas-search --from flowers-8ms --target-ms 6          (at once, on the scores that it kept)",
    )
    parser.add_argument("--target-ms", type=positive_ms, metavar="T", help="milliseconds a call may take, on --device")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, mac-npu, ..., or the id of a table (nas-build-lut --list)")
    parser.add_argument(
        "--target",
        type=device_target,
        action="append",
        default=[],
        metavar="D=T",
        help="a device and its milliseconds; give it again for each device that the one network is to meet its target on",
    )
    parser.add_argument(
        "--table", type=Path, action="append", default=[], metavar="FILE", help="a device's latency table; again for each"
    )
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="images: PATH/train/<class>/* and perhaps PATH/val, or PATH/<class>/*"
    )
    parser.add_argument(
        "--space", metavar="S", help="a space: its name or a YAML file (default: efficientformer-s; -tiny without --data)"
    )
    parser.add_argument(
        "--strategy",
        metavar="NAME",
        help="greedy: the paper's slimming loop (default); exact: the best network that the drops of single changes admit "
        "(default with --from; where --verify searches, the run's own is); optuna: a study that other processes can share",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="rare settings, a YAML file (docs/search.md lists them): training, where importance comes from, recovery, limits "
        "on parameters and MACs, the objectives mes and throughput",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the results go (default: runs/<space>-<target>ms-seed<seed>; of an answer with --from, RUN/at-<target>ms)",
    )
    parser.add_argument("--seed", type=seed_number, default=0, metavar="N", help="of everything random (default: 0)")
    start = parser.add_argument_group("start from a network that has its weights")
    start.add_argument(
        "--init",
        metavar="NET",
        help="the network, a YAML file or the name of a published one: its blocks are kept, replaced by cheaper ones or taken "
        "away, and --space, if given, is one that it is a member of",
    )
    start.add_argument(
        "--weights",
        metavar="FILE",
        help="its weights: timm's or its authors' state dict (.pth, .pt, .safetensors), a model.safetensors or checkpoint.pt "
        "of nas-train, or timm:NAME where timm is installed",
    )
    later = parser.add_argument_group("go on from a search that ended")
    later.add_argument(
        "--from",
        dest="from_run",
        type=Path,
        metavar="RUN",
        help="its folder. With other targets: the answer at once, by the drops that it measured; nothing is evaluated",
    )
    later.add_argument(
        "--verify",
        nargs="?",
        const="",
        metavar="RESULTS",
        help="with targets: search whole, with the supernet of --from, and measure. Without: measure the network of --from on "
        "its device, at --device ssh://user@host, or by a job folder whose results are given here afterwards; one that misses "
        "the target is searched again",
    )
    given = parser.parse_args(arguments)

    def work() -> None:
        if given.from_run is not None or given.verify is not None:
            _search_from(given)
            return
        from nas.search import Request, run_search

        result = run_search(
            Request(
                target_ms=given.target_ms,
                device=given.device,
                table=tuple(given.table),
                data=given.data,
                space=given.space,
                strategy=given.strategy or "greedy",
                config=given.config,
                out=given.out,
                seed=given.seed,
                init=given.init,
                weights=given.weights,
                targets=tuple(given.target),
            )
        )
        if result["met"] is False:
            raise SystemExit(1)

    from nas.distributed import together  # under torchrun the first process searches and the others help it evaluate

    together(lambda: run_command(parser.prog, work))


def _search_from(given: argparse.Namespace) -> None:
    """Verify the network of a search that ended, or search for other targets with what it kept."""
    run, results = given.from_run, given.verify
    if run is None:
        raise InputError("--verify needs the folder of a search: nas-search --from RUN --verify [results.json]")
    if own := [name for name in ("data", "space", "seed", "init", "weights") if getattr(given, name)]:
        raise InputError(f"--from {run} has its own {', '.join(own)}: leave --{', --'.join(own)} out")
    targets = given.target_ms is not None or given.target
    if not targets and results is None:
        raise InputError(f"say what to do with {run}: give another --target-ms, or --verify to measure its network")
    result: dict[str, Any] | None
    if not targets:
        if given.table or given.strategy or given.out:
            raise InputError("--verify measures the network that was found: leave --table, --strategy and --out out")
        from nas.verify import verify

        result = verify(run, given.device, Path(results) if results else None, given.config)
    elif results:
        raise InputError(f"{results} is of the network of {run}, not of one for another target: leave the targets out")
    else:
        target = {
            "target_ms": given.target_ms,
            "device": given.device,
            "targets": tuple(given.target),
            "table": tuple(given.table),
            "out": given.out,
        }
        if results is None:
            from nas.again import answer

            if given.config is not None:
                raise InputError("--config changes nothing in an answer by the drops: leave it out, or add --verify")
            answer(run, strategy=given.strategy or "exact", **target)
            return
        from nas.request import finished
        from nas.search import Request, search_from

        result = search_from(
            run, Request(strategy=given.strategy or finished(run).request["strategy"], config=given.config, **target)
        )
    if result is not None and result["met"] is False:
        raise SystemExit(1)


def profile(arguments: Sequence[str] | None = None) -> None:
    """Run `nas-profile`."""
    parser = command_parser(
        "nas-profile",
        "Print the predicted and the measured latency of one network on this machine, and with --layers where it goes: the\n"
        "milliseconds of every layer and kind of operator of the network as it runs, and a picture of them. Batch 1, one\n"
        "thread. Weights do not matter: a network given by its name or as YAML is timed with random ones.",
        "  nas-profile efficientformer_l1\n"
        "  nas-profile searched.yaml --layers\n"
        "  nas-profile model.onnx --layers --plot model.png\n"
        "  nas-profile timm:mobilevit_xs --layers     (where timm is installed: pip install timm)\n"
        "  nas-profile model.onnx --json",
    )
    parser.add_argument("network", metavar="ARCH|MODEL.onnx|TIMM", help=f"{ARCH_HELP}; any ONNX model; or a timm model's name")
    parser.add_argument("--device", metavar="D", help="cpu (default), cuda, mac-npu, ..., or the id of a table to predict with")
    parser.add_argument("--layers", action="store_true", help="the milliseconds of every layer and operator, and a picture")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="--layers, with the picture in FILE (default: <network>-layers.png)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)

    def work() -> None:
        from nas.profile import print_profile

        layers = given.layers or given.plot is not None
        print_profile(given.network, given.device, layers=layers, as_json=given.json, plot=given.plot)

    run_command(parser.prog, work)


class _PrintRecipe(argparse.Action):
    """Print a recipe and end, before what a training needs is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from nas.recipe import recipe_text

        run_command(parser.prog, lambda: print(recipe_text(values), end=""))
        parser.exit()


def train(arguments: Sequence[str] | None = None) -> None:
    """Run `nas-train`."""
    parser = command_parser(
        "nas-train",
        "Train a network on your images, from nothing or from given weights. Training that is killed goes on from its last\n"
        "checkpoint, of an epoch's end or at most ten minutes ago, when the same command is given again.",
        "  nas-train runs/efficientformer-tiny-1.6ms-seed0/searched.yaml --data ~/flowers --out trained\n"
        "  nas-train run/searched.yaml --weights run/weights.safetensors --teacher run/teacher.yaml --recipe finetune "
        "--data ~/flowers --out tuned\n"
        "  nas-train efficientformer_l1 --recipe efficientformer --teacher timm:regnety_160.deit_in1k "
        "--data ~/imagenet --out l1\n"
        "  nas-train efficientformer_l1 --weights timm:efficientformer_l1 --recipe finetune --image-size 320 "
        "--data ~/flowers --out l1-320",
    )
    parser.add_argument("arch", metavar="ARCH", help=ARCH_HELP)
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="images, as for nas-search (default: handwritten digits, a demonstration)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where checkpoints, metrics and weights go")
    parser.add_argument(
        "--recipe",
        default="quick",
        metavar="R",
        help="quick (default), finetune (for given weights), efficientformer or efficientvit (as published, for ImageNet), or "
        "a YAML file of settings (docs/training.md lists them)",
    )
    parser.add_argument(
        "--print-recipe", action=_PrintRecipe, metavar="NAME", help="print a named recipe as such a file, to be edited, and end"
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="start from these weights: such as a search's weights.safetensors, timm's or its authors' state dict (.pth, .pt, "
        ".safetensors), or timm:NAME where timm is installed",
    )
    parser.add_argument(
        "--image-size",
        type=whole_number,
        metavar="S",
        help="train the network at this size in pixels (default: its own); what of given weights depends on it is resized",
    )
    parser.add_argument(
        "--teacher",
        metavar="NET",
        help="learn from this network too: a YAML file with its weights beside it (the teacher.yaml of nas-search --init, the "
        "arch.yaml of nas-train), timm:NAME where timm is installed, or a .pt2 file of torch.export (which can run code when "
        "it is loaded: only one that you trust)",
    )
    parser.add_argument("--seed", type=seed_number, default=0, metavar="N", help="of everything random (default: 0)")
    given = parser.parse_args(arguments)

    def work() -> None:
        from nas.data import refuse_among_images
        from nas.parallel import joined

        refuse_among_images(given.out, given.data)
        group = joined()  # under torchrun all processes train together
        with ExitStack() as held:
            group.agreed(lambda: held.enter_context(alone(given.out)))
            work_alone(group)

    def work_alone(group: Group) -> None:
        from nas.about import targets_beside
        from nas.data import load_data
        from nas.pretrained import starting_weights
        from nas.recipe import load_recipe
        from nas.steps import accelerator
        from nas.teacher import load_teacher
        from nas.training import train_network
        from supernet.zoo import load_arch

        def read() -> dict[str, Any]:
            arch = load_arch(given.arch)
            if given.image_size is not None:
                arch = arch.at(given.image_size)
            recipe = load_recipe(given.recipe)
            device = group.device(accelerator(recipe.accelerator))
            weights = starting_weights(given.arch, given.weights, arch) if given.weights is not None else None
            # Nothing is scored: train on all.
            train_size = recipe.cropped_size(arch.image_size)
            data = load_data(given.data, arch.image_size, given.seed, score_images=0, train_size=train_size)
            teacher = None
            if given.teacher is not None:
                teacher = load_teacher(given.teacher, arch.image_size, data.classes, device)
            return {"arch": arch, "data": data, "recipe": recipe, "weights": weights, "teacher": teacher}

        result = train_network(
            **group.agreed(read), folder=given.out, seed=given.seed, targets=targets_beside(given.arch), group=group
        )
        if group.first:
            print(f"top-1 {100 * result.accuracy:.2f} %, loss {result.loss:.4f} after {result.epochs} epochs: {result.folder}")
            weights = ["--weights", str(result.folder / "model.safetensors")]
            words = ["nas-export", str(result.folder / "arch.yaml"), *weights, "--out", f"{result.folder.resolve().name}.onnx"]
            print(f"  next: {shlex.join(words)}")
        group.leave()

    run_command(parser.prog, work)


def export(arguments: Sequence[str] | None = None) -> None:
    """Run `nas-export`."""
    parser = command_parser(
        "nas-export",
        "Write a network as a file that a runtime loads without this package: ONNX, a Core ML package, or a torch.export\n"
        "program. Before it is written its numbers are checked against PyTorch's (to 1e-4; Core ML's, in fp16, on a Mac\n"
        "alone). Inside the file stand its classes, how images are normalised, and which target on which device it was\n"
        "searched for (docs/export.md).",
        "  nas-export trained/arch.yaml --weights trained/model.safetensors --out flowers.onnx\n"
        "  nas-export trained/arch.yaml --weights trained/model.safetensors --int8 --data ~/flowers --out flowers-int8.onnx\n"
        "  nas-export trained/arch.yaml --weights trained/model.safetensors --batch dynamic --out flowers.pt2\n"
        "  nas-export efficientformer_l1 --weights l1.safetensors --out l1.mlpackage",
    )
    parser.add_argument("arch", metavar="ARCH", help=ARCH_HELP)
    parser.add_argument(
        "--weights",
        metavar="W",
        help="its weights: a model.safetensors or checkpoint.pt of nas-train, weights.safetensors of nas-search, timm's or "
        "its authors' state dict of a published network, or timm:NAME where timm is installed (default: random ones, to "
        "time it)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the file to write, which ends in .onnx, .mlpackage or .pt2"
    )
    parser.add_argument("--format", metavar="F", help="onnx, coreml or torch (default: as FILE ends)")
    parser.add_argument(
        "--form",
        metavar="F",
        help="deploy: rewritten to run fast, the function unchanged (default of onnx and coreml); fastest: the same, with each "
        "layer's forms timed on this CPU (onnx); plain: the operators as they were trained (default of torch)",
    )
    parser.add_argument(
        "--batch",
        type=batch_size,
        metavar="N",
        help="images a call, or dynamic: any number (onnx, torch) (default: 1; a full group where the network multiplexes)",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="onnx: products with weights in 8 bits, ranges from training images of --data, and print the accuracy before and "
        "after on its validation images",
    )
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="the images that it was trained on, for --int8 (default: handwritten digits)"
    )
    parser.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        metavar="N",
        help="which images calibrate (default: 0)",
    )
    given = parser.parse_args(arguments)

    def work() -> None:
        from nas.export import export_network

        export_network(
            given.arch,
            given.weights,
            given.out,
            given.format,
            given.form,
            given.batch,
            int8=given.int8,
            data=given.data,
            seed=given.seed,
        )

    run_command(parser.prog, work)
