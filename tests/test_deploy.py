"""The deploy form is the same function, borders included, in fewer operators."""

import random
from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nas.measure import build_module, input_shape, with_ordinary_values
from nas.onnx_model import onnx_bytes
from supernet.arch import ArchConfig, MultiplexSpec, Stage
from supernet.blocks import build_layer
from supernet.deploy import FORMS, Form, default_form, deployed, deployed_layer, has_forms
from supernet.model import build_model
from supernet.specs import (
    FFN,
    MB3D,
    MB4D,
    AttnEmbedding,
    AttnFFN,
    ConvStem,
    Embedding,
    Flat,
    GroupedMB3D,
    GroupedViT,
    GroupHead,
    Head,
    Identity,
    Join,
    Layer,
    PatchStem,
    Sandwich,
    Stem,
    Subsample,
    Unflat,
    ViT,
)

HEADS: dict[str, int] = {"num_heads": 2, "key_dim": 8, "attn_ratio": 2}
LAYERS = {
    "mb4d": Layer(MB4D(16), 7),
    "mb4d of pool 5": Layer(MB4D(8, pool_size=5, act="relu"), 6),
    "mb4d smaller than its pool": Layer(MB4D(8, pool_size=5), 2),
    "mb3d": Layer(MB3D(16, **HEADS), 5),
    "ffn": Layer(FFN(16), 6),
    "attn_ffn": Layer(AttnFFN(16, **HEADS), 5),
    "attn_ffn of stride 2": Layer(AttnFFN(16, stride=2, **HEADS), 8),
    "sandwich": Layer(Sandwich(32, num_heads=2, key_dim=8, q_kernels=(5, 3)), 7),
    "sandwich of a small map": Layer(Sandwich(32, num_heads=2, key_dim=16, q_kernels=(7, 3), act="hardswish"), 4),
    "sandwich in padded windows": Layer(Sandwich(16, num_heads=2, q_kernels=(5, 3), window=4), 6),
    "vit": Layer(ViT(24, num_heads=3), 4),
    "identity": Layer(Identity(8), 4),
    "stem": Layer(Stem(16, act="gelu"), 16),
    "conv_stem": Layer(ConvStem(16), 32),
    "patch_stem": Layer(PatchStem(16, stride=8), 32),
    "embedding": Layer(Embedding(24, 16), 7),
    "attn_embedding": Layer(AttnEmbedding(24, 16, **HEADS), 7),
    "attn_embedding of an even map": Layer(AttnEmbedding(24, 16, **HEADS), 8),
    "subsample": Layer(Subsample(24, 16), 7),
    "flat": Layer(Flat(8), 4),
    "unflat": Layer(Unflat(8), 4),
    "join": Layer(Join(16, n=2), 5),
    "grouped_mb3d": Layer(GroupedMB3D(16, **HEADS, n=2), 5),
    "grouped_mb3d, apart": Layer(GroupedMB3D(16, **HEADS, n=2, mixing="block"), 5),
    "grouped_mb3d, alone": Layer(GroupedMB3D(16, **HEADS, n=2, mixing="none"), 5),
    "grouped_vit": Layer(GroupedViT(24, num_heads=3, n=2), 4),
    "grouped_vit, apart": Layer(GroupedViT(24, num_heads=3, n=4, mixing="block"), 4),
    "group_head": Layer(GroupHead(16, 5, tokens=True, n=2), 4),
    "head of tokens": Layer(Head(16, 5, tokens=True), 4),
    "head of a map": Layer(Head(16, 5), 4),
    "head of v2": Layer(Head(16, 5, form="batch_norm"), 4),
    "head of efficientvit": Layer(Head(16, 5, form="mean_batch_norm"), 4),
    "head of a class token": Layer(Head(16, 5, tokens=True, form="class_token"), 4),
}
NETWORKS = {
    "efficientformer": ArchConfig("v1", 32, 5, (Stage(16, 4, (MB4D(16),)), Stage(32, 2, (MB4D(32), MB3D(32, **HEADS))))),
    "back to maps": ArchConfig("back", 45, 5, (Stage(16, 4, (MB4D(16), MB3D(16, **HEADS))), Stage(32, 2, (MB4D(32),)))),
    "v2": ArchConfig(
        "v2",
        32,
        5,
        (
            Stage(16, 2, (FFN(16), AttnFFN(16, stride=2, **HEADS))),
            Stage(32, 2, (AttnFFN(32, **HEADS),), AttnEmbedding(8, 8, **HEADS)),
        ),
        head="batch_norm",
    ),
    "efficientvit": ArchConfig(
        "evit",
        64,
        5,
        (
            Stage(32, 8, (Sandwich(32, num_heads=2, window=4),), ConvStem(8)),
            Stage(48, 2, (Sandwich(48, num_heads=2),), Subsample(8, 8)),
        ),
        head="mean_batch_norm",
    ),
    "vit": ArchConfig("vit", 32, 5, (Stage(24, 8, (ViT(24, num_heads=3),) * 2, PatchStem(8)),), head="class_token"),
    "groups": ArchConfig(
        "groups", 32, 5, (Stage(16, 4, (MB4D(16), MB3D(16, **HEADS), MB3D(16, **HEADS))),), mux=MultiplexSpec(2, start=1)
    ),
    "groups of vit": ArchConfig(
        "vit groups",
        32,
        5,
        (Stage(24, 8, (ViT(24, num_heads=3),) * 2, PatchStem(8)),),
        head="class_token",
        mux=MultiplexSpec(2, start=1, readout="shared"),
    ),
}


def forms_of(layer: Layer) -> tuple[Form, ...]:
    return FORMS if has_forms(layer) else (default_form(layer),)


def ordinary(module: nn.Module, seed: int = 1) -> nn.Module:
    """Give every weight a value, and every batch norm statistics, that would show if it were left out."""
    return with_ordinary_values(module.double().eval(), seed)


def noise(layer: Layer, images: int = 4) -> Tensor:
    return torch.randn(layer.entering.shape(images), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def kinds(module: nn.Module, shape: tuple[int, ...], *, optimised: bool = False, tmp: str = "") -> Counter[str]:
    """Return how many operators of each kind a module's ONNX form has, or what ONNX Runtime makes of it."""
    data = onnx_bytes(with_ordinary_values(module, seed=0), torch.zeros(shape))
    if not optimised:
        found = Counter(node.op_type for node in onnx.load_from_string(data).graph.node)
        del found["Constant"]
        return found
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = tmp
    options.log_severity_level = 4
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp).graph.node)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_s_deploy_form_is_the_same_function_in_every_form(name: str) -> None:
    layer = LAYERS[name]
    module, x = ordinary(build_layer(layer)), noise(layer)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    expected = module(x)
    for form in forms_of(layer):
        made = deployed_layer(module, layer, form)
        assert (made(x) - expected).abs().max() <= 1e-9 * max(1, expected.abs().max()), form
        assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in made.modules())
        assert not made.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items()), "the given one is as it was"


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_network_s_deploy_form_gives_the_same_logits(name: str) -> None:
    arch = NETWORKS[name]
    model = ordinary(build_model(arch))
    images = torch.randn(4, 3, arch.image_size, arch.image_size, generator=torch.Generator().manual_seed(3)).double()
    expected = model(images)
    assert expected.std() > 0.01, "else equality would say nothing"
    rng = random.Random(0)
    mixed = {layer: rng.choice(forms_of(layer)) for layer in arch.layers()}
    for forms in (None, mixed, *(dict.fromkeys(arch.layers(), form) for form in FORMS)):
        made = deployed(model, arch, forms)
        assert (made(images) - expected).abs().max() <= 1e-9 * max(1, expected.abs().max())
    assert [name for name, _ in made.named_children()] == [name for name, _ in model.named_children()]


@pytest.mark.parametrize("name", NETWORKS)
def test_its_onnx_form_gives_the_same_logits(name: str) -> None:
    arch = NETWORKS[name]
    model = with_ordinary_values(build_model(arch).eval(), 1)
    images = torch.randn(arch.group_size, 3, arch.image_size, arch.image_size, generator=torch.Generator().manual_seed(3))
    data = onnx_bytes(deployed(model, arch), images)
    found = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"image": images.numpy()})[0]
    with torch.inference_mode():
        assert torch.allclose(torch.from_numpy(found), model(images), rtol=1e-4, atol=1e-4)


def test_a_change_of_the_weights_does_not_reach_a_deploy_form_and_making_one_draws_no_random_number() -> None:
    layer = LAYERS["mb3d"]
    module, x = ordinary(build_layer(layer)), noise(layer)
    state = torch.get_rng_state()
    made = deployed_layer(module, layer)
    assert torch.equal(torch.get_rng_state(), state)
    before = made(x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(made(x), before)


def test_a_network_of_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="not a network of back"):
        deployed(build_model(NETWORKS["efficientformer"]), NETWORKS["back to maps"])


class Pair(nn.Module):
    """Two classifiers, which say the mean of their weights."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = first, second

    @property
    def weight(self) -> Tensor:
        return (self.first.weight + self.second.weight) / 2

    @property
    def bias(self) -> Tensor:
        return (self.first.bias + self.second.bias) / 2

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) + self.second(x)) / 2


@pytest.mark.parametrize("name", ["head of tokens", "head of a class token"])
@torch.no_grad()
def test_two_classifiers_become_one_linear_layer(name: str) -> None:
    layer = LAYERS[name]
    head, x = ordinary(build_layer(layer)), noise(layer)
    head.fc = Pair(head.fc, ordinary(nn.Linear(16, 5), seed=7))  # type: ignore[arg-type]
    made = deployed_layer(head, layer)
    assert torch.allclose(made(x), head(x), atol=1e-12)
    assert sum(isinstance(part, nn.Linear) for part in made.modules()) == 1


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("mb4d", {"AveragePool", "Conv", "Gelu", "Add"}),
        ("ffn", {"Conv", "Gelu", "Add"}),
        ("stem", {"Conv", "Gelu"}),
        ("embedding", {"Conv"}),
        ("head of v2", {"GlobalAveragePool", "Flatten", "Gemm"}),
    ],
)
def test_a_deploy_form_has_only_these_operators(name: str, allowed: set[str]) -> None:
    layer = LAYERS[name]
    assert kinds(deployed_layer(build_layer(layer).eval(), layer), layer.entering.shape(1)).keys() <= allowed


@pytest.mark.parametrize("name", ["mb3d", "attn_ffn of stride 2", "sandwich", "vit", "grouped_mb3d"])
def test_attention_looks_nothing_up_and_scales_nothing(name: str) -> None:
    layer = LAYERS[name]
    for form in forms_of(layer):
        images = layer.spec.n if hasattr(layer.spec, "n") else 1
        found = kinds(deployed_layer(build_layer(layer).eval(), layer, form), layer.entering.shape(images))
        assert not found.keys() & {"Gather", "GatherND", "Mul", "Div", "Where", "BatchNormalization", "Pad", "Shape"}


def test_maps_enter_the_runtime_s_blocked_layout_once_and_leave_it_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = (Layer(MB4D(32), 8),) * 3
    plain, deploy = (
        kinds(
            build_module(model, deploy=deploy)[0],
            input_shape(model),
            optimised=True,
            tmp=str(tmp_path_factory.mktemp("o") / "o.onnx"),
        )
        for deploy in (False, True)
    )
    if not plain["ReorderInput"]:
        pytest.skip("this processor has no blocked layout")
    assert (deploy["ReorderInput"], deploy["ReorderOutput"]) == (1, 1)
    assert plain["ReorderOutput"] > 3
    assert deploy.total() < plain.total()


def test_a_form_is_chosen_by_measuring_only_where_it_is_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    from nas import forms

    arch = NETWORKS["efficientformer"]
    monkeypatch.setattr(forms, "chain", lambda layer, form, batch: b"")
    monkeypatch.setattr(forms, "OrtModel", lambda model: lambda: None)
    for ratio, expected in ((0.5, "matmul"), (0.99, "conv"), (2.0, "conv")):
        monkeypatch.setattr(forms, "one_round", lambda runs, seconds, ratio=ratio: {"conv": 1.0, "matmul": ratio})
        found = forms.measured_forms(arch, rounds=3)
        assert found == {layer: expected for layer in arch.layers() if has_forms(layer)}


def test_a_form_is_measured_in_sessions_that_are_opened_anew_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the memory of one session happens to lie decides no form."""
    from nas import forms

    opened = []
    real = forms.OrtModel
    monkeypatch.setattr(forms, "OrtModel", lambda model: opened.append(model) or real(model))  # type: ignore[func-returns-value]
    assert forms.measured_form(Layer(MB4D(16), 4), rounds=3, seconds=0.001) in FORMS
    assert len(opened) == 6 and len(set(opened)) == 2
