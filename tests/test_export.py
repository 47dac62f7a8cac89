"""The exported file computes what eager computes, or there is none."""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from nas.export import export_onnx, onnx_bytes, with_ordinary_values
from supernet.arch import ArchConfig, Stage
from supernet.blocks.efficientformer import LAYER_SCALE, LayerScale
from supernet.errors import InputError
from supernet.model import build_model
from supernet.specs import MB3D, MB4D

MB3D_16 = MB3D(16, num_heads=2, key_dim=8, attn_ratio=2)
MAP_HEAD = ArchConfig("map-head", 32, 5, (Stage(8, 4, (MB4D(8),)), Stage(16, 2, (MB4D(16), MB4D(16)))))
TOKEN_HEAD = ArchConfig("token-head", 32, 5, (Stage(8, 4, (MB4D(8),)), Stage(16, 2, (MB4D(16), MB3D_16))))
UNFLAT = ArchConfig(
    "unflat",
    32,
    5,
    (Stage(8, 2, ()), Stage(8, 1, (MB4D(8),)), Stage(16, 2, (MB4D(16), MB3D_16)), Stage(16, 2, (MB3D_16,))),
)
ODD = UNFLAT.at(45)  # maps of 23, 23, 12 and 6


@pytest.mark.parametrize("arch", [MAP_HEAD, TOKEN_HEAD, UNFLAT, ODD], ids=["map-head", "token-head", "unflat", "odd"])
def test_exported_equals_eager(arch: ArchConfig, tmp_path: Path) -> None:
    model = with_ordinary_values(build_model(arch), seed=1)
    path = tmp_path / "new" / "model.onnx"
    difference = export_onnx(model, arch.image_size, path)
    image = torch.randn(1, 3, arch.image_size, arch.image_size, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        expected = model.eval()(image).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {"image": image.numpy()})[0]
    assert found.shape == (1, 5)
    assert np.ptp(expected) > 0.01, "else equality would say nothing"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert 0 <= difference <= 1e-4


def test_export_is_of_eval_mode() -> None:
    model = build_model(MAP_HEAD).train()
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    onnx_bytes(model, image)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()), "statistics are untouched"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_refused(value: float, tmp_path: Path) -> None:
    model = with_ordinary_values(build_model(TOKEN_HEAD), seed=1)
    with torch.no_grad():
        model.get_parameter("head.fc.weight")[0, 0] = value
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the last good export")
    with pytest.raises(InputError, match="not finite: nothing is written"):
        export_onnx(model, TOKEN_HEAD.image_size, path)
    assert path.read_bytes() == b"the last good export", "an earlier file is left as it was"
    assert list(tmp_path.iterdir()) == [path], "and nothing lies beside it"


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_ordinary_values(build_model(MAP_HEAD), seed=1)
    other = onnx_bytes(with_ordinary_values(build_model(MAP_HEAD), seed=2), torch.zeros(1, 3, 32, 32))
    monkeypatch.setattr("nas.export.onnx_bytes", lambda *_: other)
    with pytest.raises(InputError, match="differs from eager"):
        export_onnx(model, 32, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_ordinary_values_are_ordinary_and_distinct() -> None:
    model = with_ordinary_values(build_model(UNFLAT), seed=0)
    scales = [module.gamma for module in model.modules() if isinstance(module, LayerScale)]
    assert len(scales) == 8, "two for each block"
    assert all(scale.abs().min() > 1000 * LAYER_SCALE for scale in scales), "none is left at its initial value"
    variances = [b for n, b in model.named_buffers() if n.endswith("running_var")]
    assert variances and all(v.min() > 0 for v in variances)
    shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            assert tensor.isfinite().all()
            shapes[tuple(tensor.shape)].append(tensor)
    assert any(len(tensors) > 2 for tensors in shapes.values()), "there are equal shapes to compare"
    for shape, tensors in shapes.items():
        for at, tensor in enumerate(tensors):
            assert not any(torch.equal(tensor, other) for other in tensors[:at]), f"two equal tensors of shape {shape}"


def test_ordinary_values_follow_the_seed() -> None:
    first, again, other = (with_ordinary_values(build_model(MAP_HEAD), seed) for seed in (0, 0, 1))
    pairs = zip(first.parameters(), again.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)
