"""What every block, stem and embedding owes to the rest of the house; a new spec is under it as soon as `specs` lists it."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nas.coreml_package import convert, operations
from nas.measure import build_module, input_shape, with_ordinary_values
from nas.onnx_model import onnx_bytes
from nas.plan import terms_of
from nas.profilers.ort_cpu import OrtCpu
from nas.table import LatencyTable, Row
from supernet.arch import ArchConfig, Stage
from supernet.blocks import build_layer
from supernet.entries import block_entry, block_from_entry
from supernet.errors import InputError
from supernet.ports import Port
from supernet.specs import ACTIVATIONS, BLOCKS, EMBEDDINGS, STEMS, Layer, is_stem

DIM = 48  # 12 heads of a ViT block have 4 channels each
SIDE = 8


def _layers() -> dict[str, Layer]:
    """Every spec of the package at its defaults and with every activation, by what it is called."""
    specs: list[Any] = [kind(DIM) for name, kind in BLOCKS.items() if name != "identity"]
    specs += [kind(DIM, 16) for kind in EMBEDDINGS.values()]
    specs += [kind(DIM) for kind in STEMS.values()]
    found = {}
    for spec in specs:
        side = SIDE * spec.stride if is_stem(spec) else SIDE
        for act in ACTIVATIONS if hasattr(spec, "act") else (None,):
            chosen = replace(spec, act=act) if act else spec
            found[f"{spec.kind} {act or ''}".strip()] = Layer(chosen, side)
    return found


LAYERS = _layers()
BRIEFLY = [name for name in LAYERS if name.split()[0] == "ffn" or name.split()[-1] not in ("relu", "hardswish")]
"""Every kind of layer, and every activation in one of them: for what takes seconds."""
BLOCK_NAMES = [name for name in LAYERS if name.split()[0] in BLOCKS]


@cache
def module_of(name: str, seed: int = 0) -> nn.Module:
    """The module in eval mode, no tensor at a neutral value."""
    return with_ordinary_values(build_layer(LAYERS[name]).eval(), seed)


def entering(layer: Layer, batch: int = 3) -> Tensor:
    return torch.randn(input_shape((layer,), batch), generator=torch.Generator().manual_seed(1))


def shape(port: Port, batch: int) -> tuple[int, ...]:
    return {
        "image": (batch, port.dim, port.side, port.side),
        "map": (batch, port.dim, port.side, port.side),
        "tokens": (batch, port.side**2, port.dim),
        "class_tokens": (batch, 1 + port.side**2, port.dim),
    }[port.form]


@torch.no_grad()
def run(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x)
    return y


@pytest.mark.parametrize("name", LAYERS)
def test_what_leaves_is_of_the_shape_that_is_promised(name: str) -> None:
    layer = LAYERS[name]
    x = entering(layer)
    assert x.shape == shape(layer.entering, 3)
    assert run(module_of(name), x).shape == shape(layer.leaving, 3)


@pytest.mark.parametrize("name", LAYERS)
def test_eval_and_train_return_the_module(name: str) -> None:
    module = build_layer(LAYERS[name])
    for part in module.modules():
        assert part.eval() is part
        assert part.train() is part


@pytest.mark.parametrize("name", LAYERS)
def test_images_of_a_batch_do_not_meet_in_eval(name: str) -> None:
    x = entering(LAYERS[name])
    alone = torch.cat([run(module_of(name), image[None]) for image in x])
    torch.testing.assert_close(run(module_of(name), x), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_every_image_and_every_weight_matters(name: str) -> None:
    """So that the other tests of this file have something to find."""
    module, layer = module_of(name), LAYERS[name]
    x = entering(layer).requires_grad_()
    (module(x) * torch.randn(shape(layer.leaving, 3), generator=torch.Generator().manual_seed(2))).sum().backward()
    assert x.grad is not None and bool((x.grad.flatten(1).abs().sum(1) > 0).all())
    for part, parameter in module.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), part
        parameter.grad = None


@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_are_loaded_after_eval_take_effect(name: str) -> None:
    x = entering(LAYERS[name])
    late, wanted = with_ordinary_values(build_layer(LAYERS[name]).eval(), 3), module_of(name)
    assert not torch.equal(run(late, x), run(wanted, x))
    late.load_state_dict(wanted.state_dict())
    assert torch.equal(run(late, x), run(wanted, x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_resolution_works_or_is_refused_in_a_sentence(name: str) -> None:
    worked = 0
    for side in [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 14, 15, 16, 20, 28]:
        step = LAYERS[name].spec.stride if is_stem(LAYERS[name].spec) else 1  # type: ignore[union-attr]
        layer = LAYERS[name]._replace(resolution=side * step)
        try:
            module = build_layer(layer).eval()
        except InputError as error:
            assert str(side * step) in str(error), "the sentence says what was given"
            continue
        assert run(module, entering(layer, 1)).shape == shape(layer.leaving, 1)
        worked += 1
    assert worked >= 5


@pytest.mark.parametrize("name", LAYERS)
def test_onnx_runtime_gives_eager_s_numbers(name: str) -> None:
    x = entering(LAYERS[name], 1)
    session = onnxruntime.InferenceSession(onnx_bytes(module_of(name), x), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": x.numpy()})
    np.testing.assert_allclose(found, run(module_of(name), x).numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.coreml
@pytest.mark.parametrize("name", BRIEFLY)
def test_core_ml_takes_its_deploy_form_in_half_precision(name: str) -> None:
    """What nas-export and the tables' packages hold."""
    found = operations(convert(*build_module((LAYERS[name],), deploy=True)))
    assert not {"cast", "batch_norm"} & set(found)


@pytest.mark.parametrize("name", BLOCK_NAMES)
def test_a_block_goes_through_yaml(name: str) -> None:
    spec: Any = LAYERS[name].spec
    assert block_from_entry(block_entry(spec), DIM) == spec


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in BLOCK_NAMES])
def test_an_entry_goes_through_yaml(name: str, tmp_path: Path) -> None:
    spec: Any = LAYERS[name].spec
    first = is_stem(spec)
    stages = (Stage(DIM, spec.stride, (), spec),) if first else (Stage(16, 1, ()), Stage(DIM, spec.stride, (), spec))
    head = "class_token" if LAYERS[name].leaving.form == "class_tokens" else "layer_norm"
    arch = ArchConfig("entry", 64, 5, stages, head)
    arch.save(tmp_path / "a.yaml")
    back = ArchConfig.load(tmp_path / "a.yaml")
    assert back.layers() == arch.layers()
    assert spec in [layer.spec for layer in back.layers()]


def test_every_layer_goes_through_a_table_s_file(tmp_path: Path) -> None:
    rows = {layer: Row(1.0 + i, 0.5 + i, 1.5 + i, "slope") for i, layer in enumerate(LAYERS.values())}
    path = LatencyTable("toy-cpu", rows).save(tmp_path)
    assert LatencyTable.load(path).rows == rows


@pytest.mark.parametrize("name", BRIEFLY)
def test_the_models_of_its_row_run_on_the_cpu(name: str) -> None:
    profiler = OrtCpu()
    with profiler.exclusive():
        for model in terms_of(LAYERS[name]):
            work, size = profiler.open(model)
            work()
            assert size >= 0
