"""What int8 gains and costs: a trained network's time in ONNX Runtime, int8 by fp32, and its accuracy before and after.

    python benchmarks/int8.py trained --data PATH [--form plain] [--rounds 40]

`trained` is a folder of nas-train, PATH the images that it was trained on. Prints a Markdown table: the network as nas-export
writes it, in fp32 and in int8; int8 with the float GELU; and int8 as ONNX Runtime's quantiser does it by default, with every
operator that it knows, per channel, ranges from the smallest to the largest value. All are timed side by side in shuffled
rounds on one thread, opened anew every 4 rounds; a ratio is the median over rounds of the ratio of two visits of a round, each
by the references timed around it, with the 95 % interval of that median. A minute or two; leave the machine alone meanwhile.
"""

import argparse
import contextlib
import io
import math
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from latency_analysis import compared, print_table, side_by_side
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from nas.checkpoints import load_weights
from nas.data import load_data
from nas.export import checked_onnx, expectations
from nas.int8 import CalibrationInputs, onnx_accuracy, quantised, quantised_products
from nas.profilers.ort_session import OrtModel, cpu_name
from supernet.arch import ArchConfig
from supernet.deploy import deployed
from supernet.model import build_model

GOAL = 0.6  # of fp32's time, where the CPU multiplies int8 in one instruction (VNNI)


class Reader(CalibrationDataReader):
    def __init__(self, inputs: CalibrationInputs) -> None:
        self.feeds = ({"image": inputs[at]} for at in range(len(inputs)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def by_default(model: bytes, inputs: CalibrationInputs) -> bytes:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        plain, prepared, result = (Path(folder) / name for name in ("plain.onnx", "prepared.onnx", "result.onnx"))
        plain.write_bytes(model)
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(prepared, result, Reader(inputs), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
        return result.read_bytes()


def has_vnni() -> str:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    return "yes" if "avx512_vnni" in flags or "avx_vnni" in flags else "no"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--form", choices=("deploy", "plain"), default="deploy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    arch = ArchConfig.load(given.trained / "arch.yaml")
    model = build_model(arch)
    load_weights(model, given.trained / "model.safetensors")
    expected = expectations(model, arch.image_size, arch.group_size)
    plain, _ = checked_onnx(deployed(model, arch) if given.form == "deploy" else model, expected)
    data = load_data(given.data, arch.image_size, given.seed, score_images=0)
    inputs = CalibrationInputs(data, arch.group_size, given.seed)
    models = {
        "fp32": plain,
        "int8": quantised(plain, inputs),
        "int8, float GELU": quantised_products(plain, inputs),
        "int8, the quantiser's defaults": by_default(plain, inputs),
    }
    images = data.val.shuffled(given.seed)
    accuracies = dict(zip(models, onnx_accuracy(list(models.values()), images, arch.group_size), strict=True))
    visits = side_by_side("int8", {name: partial(OrtModel, model) for name, model in models.items()}, given.rounds)
    print(f"{arch.name} at {arch.image_size} px, form {given.form}, on {cpu_name()} (VNNI: {has_vnni()}), one thread; ", end="")
    print(f"{len(images):,} validation images, ranges from {inputs.images} training images")
    rows = []
    for name, data_bytes in models.items():
        ms, ratio = compared(visits, name, "fp32")
        change = 100 * (accuracies[name] - accuracies["fp32"])
        rows.append([name, ms, ratio, f"{100 * accuracies[name]:.2f} %", f"{change:+.2f}", f"{len(data_bytes) / 1e6:.2f}"])
    print_table(("graph", "ms", "of fp32's time", "top-1", "points", "MB"), rows)
    share = accuracies["fp32"]
    error = 100 * 1.96 * math.sqrt(share * (1 - share) / len(images))
    print(f"\nA top-1 of so many images is known to ±{error:.1f} points; the same images are asked each time.")
    print(f"The goal is {GOAL:g} of fp32's time where the CPU has VNNI.")


if __name__ == "__main__":
    main()
