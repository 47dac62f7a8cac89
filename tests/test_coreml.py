"""Core ML: what is converted, and timing on a Mac, with a fake of the Mac alone."""

import errno
import gc
import itertools
import re
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hosts import be_linux, be_mac
from torch import Tensor, nn

from nas import coreml_package
from nas.alone import MEASURING
from nas.coreml_package import convert, operations, package_bytes, save_package
from nas.measure import CACHED, EMPTY, Model, build_module, name_of
from nas.profilers import coreml
from nas.profilers.bench import Disturbed
from nas.profilers.coreml import CoolStopwatch, CoreMlModel, LoadGuard, counted_calls, open_mac
from nas.profilers.iphone import iphone_id
from nas.profilers.timing import Stopwatch
from supernet.arch import ArchConfig, Stage
from supernet.errors import InputError
from supernet.files import PART
from supernet.specs import FFN, MB3D, MB4D, AttnEmbedding, AttnFFN, Embedding, Flat, Head, Layer, Stem, Unflat

pytestmark = pytest.mark.coreml
SMALL = MB3D(32, num_heads=2, key_dim=8, attn_ratio=2)
NETWORK = ArchConfig(
    "small", 32, 5, (Stage(16, 4, (MB4D(16),)), Stage(32, 2, (MB4D(32), SMALL)), Stage(32, 1, (MB4D(32), SMALL)))
)
SMALL_V2 = AttnFFN(16, num_heads=2, key_dim=8)
FEED_FORWARD = ["conv", "gelu", "conv", "gelu", "conv", "add"]
POOL_BLOCK = ["avg_pool", "sub", "mul", "add", "conv", "gelu", "conv", "add"]


# --- conversion -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_real_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pretended here need not wait for what is measured beside it."""
    monkeypatch.setattr("nas.profilers.coreml.turn", nullcontext)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (EMPTY, ["identity"]),
        ((Layer(MB4D(48, mlp_ratio=3), 5),) * 2, POOL_BLOCK * 2),
        ((Layer(Stem(24), 32), Layer(MB4D(24), 8)), ["conv", "relu", "conv", "relu", *POOL_BLOCK]),
        ((Layer(MB4D(16), 8), Layer(Embedding(24, 16), 8), Layer(MB4D(24), 4)), [*POOL_BLOCK, "conv", *POOL_BLOCK]),
        ((Layer(MB4D(16), 4), Layer(Head(16, 10, tokens=False), 4)), None),
        (tuple(NETWORK.layers()), None),
        ((Layer(FFN(24, mlp_ratio=3), 5),) * 2, FEED_FORWARD * 2),
        ((Layer(SMALL_V2, 4),), None),
        ((Layer(replace(SMALL_V2, stride=2), 8),), None),
        ((Layer(FFN(16), 7), Layer(AttnEmbedding(24, 16, num_heads=2), 7), Layer(FFN(24), 4)), None),
        (
            (Layer(FFN(16), 4), Layer(Head(16, 10, form="batch_norm"), 4)),
            [*FEED_FORWARD, "reduce_mean", "linear"],
        ),
    ],
    ids=lambda value: name_of(value)[:40] if isinstance(value, tuple) else "",
)
def test_blocks_convert_to_fp16_without_casts_or_norms(model: Model, expected: list[str] | None) -> None:
    module, example = build_module(model, deploy=False)
    converted = convert(module, example)
    ports = [*converted.get_spec().description.input, *converted.get_spec().description.output]
    half = coreml_package.coremltools().proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT16
    assert [(port.name, port.type.multiArrayType.dataType) for port in ports] == [("x", half), ("y", half)]
    assert tuple(ports[0].type.multiArrayType.shape) == tuple(example.shape)
    found = operations(converted)
    assert not {"cast", "batch_norm"} & set(found)
    assert expected is None or found == expected


def test_the_network_that_is_converted_has_every_kind_of_layer() -> None:
    kinds = {type(layer.spec) for layer in NETWORK.layers()}
    assert kinds == {Stem, MB4D, Embedding, Flat, Unflat, MB3D, Head}


class Casting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.int32).to(torch.float32) * 2.0


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class SingularValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.BatchNorm2d(4), "batch_norm"),
        (Casting(), "cast"),
        (SingularValues(), "cannot convert"),
        (Branching(), r"torch\.export cannot trace this module \(.*\): write its forward without values of tensors"),
    ],
)
@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")  # coremltools leaves a folder to the collector
def test_forms_that_no_network_has_are_refused(module: nn.Module, said: str) -> None:
    with pytest.raises(InputError, match=said):
        convert(module, torch.randn(1, 4, 6, 6))
    gc.collect()


@pytest.mark.parametrize(
    "layer",
    [
        Layer(MB3D(20, num_heads=2, key_dim=8), 4),  # no multiple of 16: products in place of convolutions
        Layer(AttnFFN(16, num_heads=2, key_dim=8, stride=2), 8),
        Layer(Head(16, 10, tokens=True), 4),
    ],
    ids=str,
)
def test_deploy_forms_convert_to_fp16_without_casts_or_norms(layer: Layer) -> None:
    """What nas-export and the tables' packages hold; a layer of each kind is in test_blocks."""
    assert not {"cast", "batch_norm"} & set(operations(convert(*build_module((layer,), deploy=True))))


def test_a_chain_keeps_every_blocks_weights(tmp_path: Path) -> None:
    def weight_bytes(module: nn.Module, name: str) -> int:
        save_package(module, example, tmp_path / f"{name}.mlpackage")
        return next((tmp_path / f"{name}.mlpackage").rglob("weight.bin")).stat().st_size

    chain, example = build_module((Layer(MB4D(32), 4),) * 3, deploy=True)
    assert isinstance(chain, nn.Sequential)
    alone = 2 * sum(weight.numel() for weight in chain[0].parameters() if weight.ndim == 4)
    assert weight_bytes(chain, "three") > 3 * alone
    assert weight_bytes(nn.Sequential(*[chain[0]] * 3), "same") < 1.5 * alone, "equal constants are merged"


def test_a_package_is_reproducible_and_says_what_it_is(tmp_path: Path) -> None:
    module, example = build_module(CACHED, deploy=True)
    paths = [tmp_path / "a.mlpackage", tmp_path / "b" / "b.mlpackage"]
    hashes = [save_package(module, example, path, name_of(CACHED)) for path in paths]
    assert hashes[0] == hashes[1] == coreml_package.package_sha256(paths[1])
    assert package_bytes(paths[0]) > 2 * sum(parameter.numel() for parameter in module.parameters())
    metadata = coreml_package.coremltools().models.MLModel(str(paths[0]), skip_model_load=True).user_defined_metadata
    assert metadata["metapath.key"] == "2 x mb4d(dim=64) at 16 px"
    assert metadata["metapath.weights_sha256"] == coreml_package.weights_sha256(module)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mlpackage", "b"], "nothing temporary is left"
    modes = {path.stat().st_mode & 0o777 for path in paths[0].rglob("*") if path.is_dir()}
    assert modes == {0o755}, "an app on a phone is another user"
    with torch.no_grad():
        next(module.parameters()).add_(1.0)
    assert save_package(module, example, paths[0]) != hashes[0], "a package is replaced, and other weights are seen"


# --- a Mac ----------------------------------------------------------------------------------------------------------------


class Packages:
    """Conversions that write a package of a number, which counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        monkeypatch.setattr(coreml_package, "convert", lambda *_: SimpleNamespace(user_defined_metadata={}, save=self._write))
        monkeypatch.setattr(coreml_package, "_make_reproducible", lambda package: None)

    def _write(self, path: str) -> None:
        self.number += 1
        Path(path).mkdir()
        Path(path, "Manifest.json").write_text(str(self.number))

    def save(self, path: Path) -> str:
        save_package(nn.Identity(), torch.zeros(1), path)
        return (path / "Manifest.json").read_text()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 2])  # of the two renames of a replacement
def test_a_package_that_is_being_replaced_outlives_a_kill(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages, path = Packages(monkeypatch), tmp_path / "[net] 1.mlpackage"
    assert packages.save(path) == "1"
    real, seen = Path.rename, 0

    def rename(old: Path, new: Path) -> Path:
        nonlocal seen
        if seen == after:
            raise Killed  # and whatever would put things right
        seen += 1
        return real(old, new)

    def removed(*args: object, **more: object) -> None:
        if seen == after:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", rename)
        patch.setattr(coreml_package.shutil, "rmtree", removed if after == 2 else coreml_package.shutil.rmtree)
        patch.setattr(coreml_package.tempfile, "TemporaryDirectory", lambda **how: nullcontext(mkdtemp(**how)))
        packages.save(path)
    held = [folder for folder in (path, coreml_package._aside(path)) if folder.exists()]
    assert (held[0] / "Manifest.json").read_text() == ("2" if after == 2 else "1")
    # The next one begins with the old package at its place, and leaves nothing beside its own.
    with monkeypatch.context() as patch, pytest.raises(InputError):
        patch.setattr(coreml_package, "convert", refusing)
        packages.save(path)
    assert (path / "Manifest.json").read_text() == ("2" if after == 2 else "1")
    assert packages.save(path) == "3"
    assert list(tmp_path.iterdir()) == [path]


def refusing(*args: object) -> None:
    raise InputError("it cannot be converted")


def test_a_package_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages, path = Packages(monkeypatch), tmp_path / "net.mlpackage"
    packages.save(path)
    real = Path.rename

    def rename(old: Path, new: Path) -> Path:
        if old.parent.name.endswith(PART):
            raise OSError(errno.EIO, "the disk fails")
        return real(old, new)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot be written"):
        patch.setattr(Path, "rename", rename)
        packages.save(path)
    assert (path / "Manifest.json").read_text() == "1"
    assert list(tmp_path.iterdir()) == [path]


def test_off_a_mac_one_line_names_the_job_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    be_linux(monkeypatch)
    for question in (
        lambda: open_mac("mac-npu"),
        lambda: coreml.off_npu(tmp_path),
        lambda: iphone_id(None, "npu"),
    ):
        with pytest.raises(InputError, match=r"Mac.*Linux.*--export-job DIR --format coreml") as refusal:
            question()
        assert "\n" not in str(refusal.value)


def test_a_macs_units_are_devices_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    be_mac(monkeypatch)
    npu, cpu = open_mac("mac-npu"), open_mac("mac-cpu", 1, "fp16", 8)
    assert (npu.id, cpu.id) == ("apple-m2-pro-npu", "apple-m2-pro-coreml-cpu-b8"), "apple-m2-pro-cpu is ONNX Runtime's"
    place = cpu.environment()
    assert place.keys() >= {"runtime", "runtime_version", "precision", "batch", "threads", "export", "warnings", "measured_at"}
    assert (place["runtime"], place["precision"], place["compute_units"], place["batch"]) == ("coreml", "fp16", "CPU_ONLY", 8)
    assert re.fullmatch(r"coremltools \S+, macOS 15.1", place["runtime_version"])
    assert npu.between(1 << 20) is None
    assert cpu.between(1 << 20) is not None


@pytest.mark.parametrize(
    ("version", "machine", "settings", "said"),
    [
        ("12.6", "arm64", (None, None, None), "macOS 13.0 or later"),
        ("15.1", "x86_64", (None, None, None), "has no Neural Engine"),
        ("15.1", "arm64", (4, None, None), "no --threads"),
        ("15.1", "arm64", (None, "int8", None), "fp16 only"),
    ],
)
def test_what_a_mac_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str, machine: str, settings: tuple[Any, Any, Any], said: str
) -> None:
    be_mac(monkeypatch, version, machine)
    with pytest.raises(InputError, match=said):
        open_mac("mac-npu", *settings)


class FakeModel:
    """Predicts on a clock that the test reads; the counter says less than the clock, as some of a call is outside it."""

    __proxy__ = object()

    def __init__(self, nanoseconds: list[int]) -> None:
        self.nanoseconds = nanoseconds
        self.calls = 0
        self.clock = 0

    def predict(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs
        self.last_predict_duration_in_nano_seconds = self.nanoseconds[self.calls % len(self.nanoseconds)]
        self.calls += 1
        self.clock += 3 * self.last_predict_duration_in_nano_seconds


def test_a_mac_waits_for_its_turn_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(coreml, "turn", lambda name: nullcontext(asked.append(name)))
    be_mac(monkeypatch)
    with open_mac("mac-cpu").exclusive():
        assert asked == [MEASURING]


def test_predictions_are_timed_by_the_frameworks_counter() -> None:
    fake = FakeModel([900_000] * 5 + [200_000, 100_000, 800_000])
    assert counted_calls(CoreMlModel(fake, (1, 4))) == pytest.approx(0.2), "in ms; the first five are discarded"
    assert fake.inputs["x"].dtype == "float32", "coremltools would convert any other at every call"


def test_an_input_outlives_its_model() -> None:
    first = CoreMlModel(FakeModel([1]), (1, 4)).inputs["x"]
    assert CoreMlModel(FakeModel([1]), (1, 4)).inputs["x"] is first, "Core ML may hold it longer than the model is there"


def test_a_slow_models_caches_are_warm_sooner() -> None:
    fake = FakeModel([4_000_000])
    counted_calls(CoreMlModel(fake, (1,)))
    assert fake.calls == 2 + 3


def test_a_model_is_warmed_up_for_fifty_calls_and_300_ms() -> None:
    for each, calls in ((100_000, 1000), (10_000_000, 50)):  # on the clock thrice as long
        fake, reference = FakeModel([each]), FakeModel([1000])
        watch = Stopwatch(
            CoreMlModel(reference, (1,)),
            CoreMlModel(FakeModel([1000]), (1,)),
            clock=lambda fake=fake, reference=reference: fake.clock + reference.clock,  # type: ignore[misc]
            burst=lambda run, between=None: 1.0,
            warm_up_ms=coreml.WARM_UP_MS,
            warm_up_calls=coreml.WARM_UP_CALLS,
        )
        watch._warm.update(watch.references)
        watch.visit(CoreMlModel(fake, (1,)))
        assert fake.calls == calls


def test_a_mac_is_timed_as_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, guarded = [], []

    def load(package: str, compute_units: str) -> FakeModel:
        assert Path(package).exists()
        opened.append(compute_units)
        return FakeModel([250_000])

    be_mac(monkeypatch)
    monkeypatch.setattr(coreml, "coremltools", fake_coremltools(load))
    monkeypatch.setattr(coreml, "save_package", lambda module, example, path, key: path.mkdir())
    monkeypatch.setattr(coreml, "off_npu", lambda package: ["softmax"] if len(opened) == 2 else [])
    guard = SimpleNamespace(check=lambda package, units, name: guarded.append((units, name)))
    mac = replace(open_mac("mac-npu"), guard=guard)  # type: ignore[arg-type]
    watch = mac.stopwatch()
    run, size = mac.open((Layer(SMALL, 4),))
    visit = watch.visit(run)
    assert (visit.raw_ms, *visit.reference) == (0.25, 0.25, 0.25)
    assert size == 0
    assert opened == ["both"] * 3
    assert guarded[0] == ("CPU_AND_NE", "2 x mb4d(dim=64) at 16 px"), "every load is tried in another process first"
    assert mac.flags == {name_of((Layer(SMALL, 4),)): "off-npu"}


@pytest.mark.parametrize(("number", "state"), [(0, "nominal"), (1, "fair"), (2, "serious"), (3, "critical"), (4, None)])
def test_a_macs_thermal_state_has_a_name(number: int, state: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml, "_thermal_question", lambda: lambda: number)
    assert coreml.thermal_state() == state


def test_a_thermal_state_that_cannot_be_asked_for_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> None:
        raise OSError(f"{path} is not there")

    monkeypatch.setattr(coreml.ctypes, "CDLL", missing)
    monkeypatch.setattr(coreml, "_thermal_question", coreml._thermal_question.__wrapped__)
    assert coreml.thermal_state() is None


def hot_mac(
    monkeypatch: pytest.MonkeyPatch, states: list[str | None], slept: list[float]
) -> tuple[Any, CoolStopwatch, FakeModel]:
    """A Mac that is in these states, one after the other, and in the last one from then on; and what its references are."""
    be_mac(monkeypatch)
    monkeypatch.setattr(coreml, "thermal_state", lambda: states.pop(0) if len(states) > 1 else states[0])
    reference = FakeModel([10_000_000])
    mac = open_mac("mac-npu")
    watch = CoolStopwatch(CoreMlModel(reference, (1,)), CoreMlModel(reference, (1,)), mac.heat, slept.append)
    ticks = itertools.count(step=int(0.4e9))  # no warm-up takes more than its fifty calls
    watch.clock = lambda: next(ticks)
    return mac, watch, reference


def test_visits_of_a_hot_mac_are_dropped_and_repeated_after_a_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    states: list[str | None] = ["nominal", "serious", "critical", "fair", "fair", "nominal"]
    mac, watch, reference = hot_mac(monkeypatch, states, slept)
    run = CoreMlModel(FakeModel([300_000]), (1,))
    assert watch.visit(run).raw_ms == 0.3
    assert slept == [coreml.COOL_DOWN_S] * 2, "hot after the first visit, and before the second"
    assert reference.calls >= 3 * 2 * coreml.WARM_UP_CALLS, "clocks fall while it rests: all is warmed up anew"
    calls = reference.calls
    watch.visit(run)
    assert reference.calls - calls < coreml.WARM_UP_CALLS and len(slept) == 2
    place = mac.environment()
    assert (place["thermal_state"], place["dropped_visits"]) == ("nominal", 2)
    assert place["thermal_states"] == {"nominal": 4, "serious": 1, "critical": 1, "fair": 2}
    assert place["warnings"] == ["2 visits were dropped and repeated: this Mac was hot"]
    assert capsys.readouterr().err.count("this Mac is hot (thermal state nominal to serious)") == 1, "said once"


def test_a_mac_that_stays_hot_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    mac, watch, _ = hot_mac(monkeypatch, ["serious"], slept)
    assert any("hot (thermal state serious)" in line for line in mac.environment()["warnings"])
    with pytest.raises(Disturbed, match=r"hot \(thermal state serious to serious\) in 20 visits in a row"):
        watch.visit(CoreMlModel(FakeModel([300_000]), (1,)))
    assert len(slept) == 19


def test_a_mac_that_does_not_tell_its_thermal_state_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    mac, watch, _ = hot_mac(monkeypatch, [None], slept)
    watch.visit(CoreMlModel(FakeModel([300_000]), (1,)))
    place = mac.environment()
    assert (place["thermal_state"], place["thermal_states"], place["dropped_visits"], slept) == (None, {"unknown": 2}, 0, [])
    assert any("does not tell its thermal state" in line for line in place["warnings"])


class RefusedModel:
    """What coremltools makes of a package that Core ML does not load: it warns, and there is nothing to predict with."""

    __proxy__ = None
    _framework_error = RuntimeError("Error in declaring network\nor so")

    def __init__(self, package: str, compute_units: str) -> None:
        warnings.warn("You will not be able to run predict()", RuntimeWarning, stacklevel=1)


def fake_coremltools(model: Any) -> Any:
    units = {"CPU_AND_NE": "both", "CPU_ONLY": "cpu"}
    return lambda: SimpleNamespace(models=SimpleNamespace(MLModel=model), ComputeUnit=units)


def test_a_package_that_core_ml_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    be_mac(monkeypatch)
    monkeypatch.setattr(coreml, "coremltools", fake_coremltools(RefusedModel))
    monkeypatch.setattr(coreml, "save_package", lambda module, example, path, key: path.mkdir())
    with pytest.raises(RuntimeError, match="Error in declaring network"):
        coreml.load_once("m.mlpackage", "CPU_ONLY")
    guard = SimpleNamespace(check=lambda package, units, name: None)
    mac = replace(open_mac("mac-cpu"), guard=guard)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"does not load with CPU_ONLY \(Error in declaring network or so\)"):
        mac.open((Layer(SMALL, 4),))


def test_what_is_tried_first_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeModel([1])
    port = SimpleNamespace(name="image", type=SimpleNamespace(multiArrayType=SimpleNamespace(shape=[1, 3, 8, 8])))
    fake.get_spec = lambda: SimpleNamespace(description=SimpleNamespace(input=[port]))  # type: ignore[attr-defined]
    monkeypatch.setattr(coreml, "coremltools", fake_coremltools(lambda package, compute_units: fake))
    coreml.load_once("m.mlpackage", "CPU_AND_NE")
    assert fake.calls == 1, "some models load, and end the process when they run"
    assert {name: image.shape for name, image in fake.inputs.items()} == {"image": (1, 3, 8, 8)}


def test_a_package_that_does_not_load_leaves_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hangs(package: Path, units: str, name: str) -> None:
        assert package.exists()
        raise InputError(f"{name} did not load")

    be_mac(monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(coreml, "coremltools", lambda: None)
    monkeypatch.setattr(coreml, "save_package", lambda module, example, path, key: path.mkdir())
    mac = replace(open_mac("mac-npu"), guard=SimpleNamespace(check=hangs))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="did not load"):
        mac.open((Layer(SMALL, 4),))
    assert not list(tmp_path.iterdir())


def hang_or_fail(package: str, units: str) -> None:
    if "hangs" in package:
        time.sleep(60)
    if "broken" in package:
        raise RuntimeError("Error in declaring network\nor so")


def test_a_load_that_hangs_ends_with_its_process() -> None:
    guard = LoadGuard(seconds=60.0, load=hang_or_fail)  # a new process imports this file first
    guard.check(Path("good.mlpackage"), "CPU_AND_NE", "mb4d")
    with pytest.raises(InputError, match=r"mb3d does not load with CPU_AND_NE \(Error in declaring network or so\)"):
        guard.check(Path("broken.mlpackage"), "CPU_AND_NE", "mb3d")
    guard.seconds = 0.05
    with pytest.raises(InputError, match=r"mb3d did not load and run within 0.05 s"):
        guard.check(Path("hangs.mlpackage"), "CPU_AND_NE", "mb3d")
    assert guard._pool is None, "the next load gets a new process"


class MLNeuralEngineComputeDevice:
    pass


class MLCPUComputeDevice:
    pass


def fake_plan(*placed: tuple[str, type | None]) -> Any:
    """A compute plan whose operations prefer these devices; the last one is inside the first."""
    made = [SimpleNamespace(operator_name=kind, blocks=[], device=device) for kind, device in placed]
    if len(made) > 1:
        made[0].blocks = [SimpleNamespace(operations=[made.pop()])]
    block = SimpleNamespace(operations=made)
    return SimpleNamespace(
        model_structure=SimpleNamespace(program=SimpleNamespace(functions={"main": SimpleNamespace(block=block)})),
        get_compute_device_usage_for_mlprogram_operation=lambda operation: (
            operation.device and SimpleNamespace(preferred_compute_device=operation.device())
        ),
    )


def test_operations_off_the_neural_engine_are_named() -> None:
    npu, cpu = MLNeuralEngineComputeDevice, MLCPUComputeDevice
    assert coreml.operations_off_npu(fake_plan(("ios16.conv", npu), ("const", None), ("ios16.gelu", npu))) == []
    plan = fake_plan(("ios16.conv", npu), ("const", cpu), ("softmax", cpu), ("ios16.gather", cpu))
    assert coreml.operations_off_npu(plan) == ["softmax", "gather"]
    assert coreml.operations_off_npu(fake_plan(("identity", cpu))) == [], "there is nothing in an empty session to put anywhere"
