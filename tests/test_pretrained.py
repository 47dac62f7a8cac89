"""A search that begins with a network: its weights are read and told apart, its path gives its logits, and what may replace
its blocks learns to give what they give. Networks of width 16 on digits, and the published ones at small sizes."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from elsewhere import Traffic
from refusals import refusal
from safetensors.torch import load_file, save_file
from small_spaces import Dropping
from test_weights import L1, distance, timm_state
from torch import Tensor, nn

from nas import from_timm, pretrained
from nas.about import note, read_note
from nas.checkpoints import save_checkpoint
from nas.data import ImageData, load_images, normalise
from nas.evaluation import recalibrate
from nas.measure import with_ordinary_values
from nas.parallel import ALONE
from nas.pretrained import (
    Pretrained,
    as_given,
    layers_kept,
    load_pretrained,
    on_data,
    pretrained_supernet,
    relative_error,
    replacements,
    requested,
    space_of,
)
from nas.settings import SupernetSettings
from supernet.arch import ArchConfig, Stage
from supernet.metapath import Supernet
from supernet.model import build_model
from supernet.space import SearchSpace, StageSpace
from supernet.specs import FFN, MB3D, MB4D, AttnFFN, Identity
from supernet.weights import fill, load_timm_weights, subnetwork
from supernet.zoo import zoo, zoo_names

MB3D_16 = MB3D(16, num_heads=2, key_dim=4, attn_ratio=2)
ARCH = ArchConfig("mine", 16, 10, (Stage(16, 2, (MB4D(16), MB4D(16))), Stage(16, 2, (MB4D(16), MB3D_16, MB3D_16))))
SETTINGS = SupernetSettings(
    init_epochs=1, distillation_steps=30, images_per_epoch=128, batch_size=32, score_images=128, accelerator="cpu"
)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_images(None, 16, seed=0, score_images=128)


def network(arch: ArchConfig = ARCH, seed: int = 0) -> nn.Sequential:
    model: Any = with_ordinary_values(build_model(arch), seed)
    return model.eval()


def given(arch: ArchConfig = ARCH) -> Pretrained:
    return Pretrained(arch, network(arch).state_dict(), "somewhere")


def saved(model: nn.Module, path: Path) -> str:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return str(path)


def images(number: int, size: int) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))


# -- The supernet has the network --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in zoo_names() if zoo(name).mux is None])
def test_the_path_of_a_published_network_gives_its_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for slow in ("trunc_normal_", "kaiming_uniform_"):  # what they draw is overwritten, or not used
        monkeypatch.setattr(nn.init, slow, lambda tensor, **knobs: tensor)
    in_full = name in (L1, "efficientformerv2_s0", "efficientvit_m0")
    arch = zoo(name) if in_full else zoo(name).at(128)
    model, net = network(arch), Supernet(space_of(arch)).eval()
    fill(net, model, arch)
    x = images(2, arch.image_size)
    with torch.no_grad():
        expected = model(x)
        found = net(x, net.space.path(arch))
    assert expected.std() > 0.01
    assert distance(found, expected) <= 1e-5 * max(1.0, expected.abs().max().item())


def test_timm_s_weights_give_timm_s_logits_through_the_supernet(tmp_path: Path) -> None:
    state = timm_state(L1)
    torch.save(state, tmp_path / "l1.pth")
    read = load_pretrained(L1, str(tmp_path / "l1.pth"), zoo(L1))
    expected, found = build_model(zoo(L1)).eval(), Supernet(space_of(zoo(L1))).eval()
    load_timm_weights(expected, state)
    model = build_model(read.arch)
    model.load_state_dict(read.state)
    fill(found, model, read.arch)
    x = images(1, 224)
    with torch.no_grad():
        assert distance(found(x, found.space.path(read.arch)), expected(x)) < 1e-5


# -- Whose weights a file has ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model.safetensors", "checkpoint.pt", "bare.pt"])
def test_our_own_weights_are_read_in_every_form(form: str, tmp_path: Path) -> None:
    model = network()
    if form == "model.safetensors":
        saved(model, tmp_path / form)
    elif form == "checkpoint.pt":
        save_checkpoint(tmp_path / form, 3, net=model)
    else:
        torch.save(model.state_dict(), tmp_path / form)
    read = load_pretrained("mine.yaml", str(tmp_path / form), ARCH)
    assert all(torch.equal(tensor, read.state[name]) for name, tensor in model.state_dict().items())
    assert read.source == str((tmp_path / form).resolve())
    assert read.digest == given().digest, "the same weights, however they are kept"
    assert read.digest != Pretrained(ARCH, network(seed=1).state_dict(), "").digest


def test_the_classes_are_those_of_the_weights(tmp_path: Path) -> None:
    weights = saved(network(ARCH.with_classes(7)), tmp_path / "w.safetensors")
    assert load_pretrained("mine.yaml", weights, ARCH).arch.num_classes == 7
    state = timm_state(L1)
    for name in ("head", "head_dist"):
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.zeros(5, 448), torch.zeros(5)
    save_file(state, tmp_path / "timm.safetensors")
    assert load_pretrained(L1, str(tmp_path / "timm.safetensors"), zoo(L1)).arch.num_classes == 5


def test_weights_by_timm_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def create(name: str, pretrained: bool) -> Any:
        asked.append((name, pretrained))
        if "none" in name:
            raise RuntimeError("no pretrained weights\nfor it")
        return SimpleNamespace(state_dict=lambda: timm_state(L1), pretrained_cfg={})

    monkeypatch.setattr(from_timm, "import_timm", lambda: (SimpleNamespace(create_model=create), ""))
    read = load_pretrained(L1, "timm:efficientformer_l1.snap_dist_in1k", zoo(L1))
    assert asked == [("efficientformer_l1.snap_dist_in1k", True)]
    assert (read.source, read.arch.num_classes) == ("timm:efficientformer_l1.snap_dist_in1k", 1000)
    line = refusal(lambda: load_pretrained(L1, "timm:none", zoo(L1)))
    assert "no pretrained weights" in line and "list_pretrained" in line
    monkeypatch.setattr(from_timm, "import_timm", lambda: (None, "No module named 'timm'"))
    assert "pip install timm" in refusal(lambda: load_pretrained(L1, "timm:a", zoo(L1)))


def test_files_that_are_nobody_s_are_refused_with_what_they_hold(tmp_path: Path) -> None:
    def line(content: object, name: str = "w.pt") -> str:
        torch.save(content, tmp_path / name)
        return refusal(lambda: load_pretrained("mine.yaml", str(tmp_path / name), ARCH))

    assert "does not exist" in refusal(lambda: load_pretrained("mine.yaml", "none.pt", ARCH))
    resnet = line({"conv1.weight": torch.zeros(2), "layer1.0.bn1.bias": torch.zeros(2)})
    assert "neither timm's, its authors' nor this package's" in resnet and "conv1.weight, layer1.0.bn1.bias" in resnet
    assert "neither" in line({"model": {"patch.0": torch.zeros(2)}}), "looked for inside a checkpoint"
    assert "no state dict, but epoch" in line({"epoch": 3})
    assert "no state dict, but list" in line([1])
    assert "lacks" in line(dict(list(network().state_dict().items())[:-1])), "ours, of another network"
    assert "not the state dict of a timm EfficientFormer" in line({"stages.0.blocks.0.x": torch.zeros(2)})
    (tmp_path / "w.safetensors").write_bytes(b"no weights")
    assert "cannot be read" in refusal(lambda: load_pretrained("mine.yaml", str(tmp_path / "w.safetensors"), ARCH))


def test_an_unsafe_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"stage1_block1": network()}, tmp_path / "w.pt")  # a pickled module
    assert "cannot be read" in refusal(lambda: load_pretrained("mine.yaml", str(tmp_path / "w.pt"), ARCH))


# -- The space ---------------------------------------------------------------------------------------------------------


def test_a_network_is_the_largest_of_its_space_and_its_attention_may_go() -> None:
    space = space_of(ARCH)
    assert ARCH in space
    assert [stage.widths for stage in space.stages] == [(8, 16), (8, 16)]
    smaller = {
        MB4D(16, mlp_ratio=2),
        *(replace(MB3D_16, mlp_ratio=ratio, key_dim=key) for ratio, key in ((4, 2), (2, 4), (2, 2))),
    }
    assert space.stages[1].candidates[:2] == (MB4D(16), MB3D_16)
    assert set(space.stages[1].candidates[2:-1]) == smaller
    assert space.stages[1].candidates[-1] == Identity(16)
    only = replace(ARCH, stages=(ARCH.stages[0], Stage(16, 2, (replace(MB3D_16, mlp_ratio=2),))))
    assert MB4D(16, mlp_ratio=2) in space_of(only).stages[1].candidates, "a block on maps where the stage has none"
    v2 = ArchConfig("v2", 16, 10, (Stage(16, 2, (AttnFFN(16, 3, num_heads=2),)),), "batch_norm")
    assert FFN(16, 3) in space_of(v2).stages[0].candidates, "the same block without its attention"


@pytest.mark.parametrize("name", zoo_names())
def test_every_width_of_a_published_network_s_space_can_be(name: str) -> None:
    if zoo(name).multiplexes:
        assert "mux" in refusal(lambda: space_of(zoo(name)))
        return
    space = space_of(zoo(name))
    assert zoo(name) in space
    for stage, own in zip(space.stages, zoo(name).stages, strict=True):
        assert stage.widths[-1] == own.width
        assert all(2 * width > own.width - 16 for width in stage.widths), "a half, or the nearest that can be"
    _ = space.layers(), space.smallest


def test_a_given_space_says_what_else_there_is() -> None:
    larger = StageSpace((8, 16, 24), 2, 3, (MB4D(24), MB4D(24, act="relu"), Identity(24)))
    tokens = StageSpace((16, 32), 2, 4, (MB4D(32), MB3D(32, num_heads=2, key_dim=4, attn_ratio=2), Identity(32)))
    space = space_of(ARCH, SearchSpace("wide", 32, 3, (larger, tokens)))
    assert (space.name, space.image_size, space.num_classes) == ("mine", 16, 10)
    assert [stage.widths for stage in space.stages] == [(8, 16), (16,)], "the network is its largest"
    assert [stage.depth for stage in space.stages] == [2, 3]
    assert MB4D(16, act="relu") in space.stages[0].candidates
    line = refusal(lambda: space_of(ARCH.at(16), SearchSpace("wide", 32, 3, (larger, replace(tokens, widths=(32,))))))
    assert "stage 2 of mine has width 16" in line and "leave --space out" in line


def test_what_does_not_go_together_is_refused() -> None:
    settings = replace(SETTINGS, objective="throughput")
    assert "objective" in refusal(lambda: requested(L1, "none.pt", None, settings))
    assert "mux" in refusal(lambda: requested("vit_b16_mux2", "none.pt", None, SETTINGS))
    assert "did you mean" in refusal(lambda: requested("efficientformer_l9", "none.pt", None, SETTINGS))
    assert "leave --space out" in refusal(lambda: requested(L1, "none.pt", "efficientvit", SETTINGS))


def test_whatever_may_take_the_place_of_a_block_learns_to() -> None:
    space = space_of(ARCH)
    kinds = space.stages[1].kinds
    found = [(slot, kinds[index]) for slot, index in replacements(space, space.path(ARCH)) if slot >= 2]
    assert {kind for slot, kind in found if slot == 2} == set(kinds) - {"identity", "mb4d"}
    assert {kind for slot, kind in found if slot == 3} == set(kinds) - {"identity", space.stages[1].kind_of(MB3D_16)}


# -- Block-wise distillation -------------------------------------------------------------------------------------------


def test_the_error_is_a_share_of_the_variance() -> None:
    wanted = images(64, 8)
    mean = wanted.mean((0, 2, 3), keepdim=True).expand_as(wanted)
    assert relative_error(wanted, wanted) == 0
    assert relative_error(mean, wanted).item() == pytest.approx(1, abs=1e-3)
    assert relative_error(10 * mean, 10 * wanted).item() == pytest.approx(1, abs=1e-3), "whatever the scale"
    tokens = wanted.flatten(2).transpose(1, 2)
    assert relative_error(tokens + 0.5, tokens).item() == pytest.approx(relative_error(wanted + 0.5, wanted).item())


def supernet(digits: ImageData, folder: Path, model: nn.Sequential | None = None, **changes: Any) -> Supernet:
    settings = replace(SETTINGS, **changes)
    return pretrained_supernet(model or network(), ARCH, space_of(ARCH), digits, settings, 0, folder)


def errors(net: Supernet, model: nn.Sequential, digits: ImageData) -> dict[str, float]:
    """Of what may replace the attention blocks, on images that do not train."""
    found = {}
    kinds = net.space.stages[1].kinds
    own = kinds.index(net.space.stages[1].kind_of(MB3D_16))
    x = normalise(digits.val.batch(torch.arange(64))[0])
    with torch.no_grad():
        for name, module in model.named_children():
            if name in ("stage2_block2", "stage2_block3"):
                slot: Any = net.get_submodule(f"stages.1.{int(name[-1]) - 1}")
                at = x.transpose(1, 2).unflatten(2, (4, 4))
                wanted = slot(at, own)
                for index, kind in enumerate(kinds):
                    if kind != "identity" and index != own:
                        found[f"{name} {kind}"] = relative_error(slot(at, index), wanted).item()
            x = module(x)
    return found


def test_replacements_learn_and_the_network_stays_as_it_is(digits: ImageData, tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        for block in ("stage2_block2", "stage2_block3"):  # random attention is more than a pool block can learn
            model.get_parameter(f"{block}.ls1.gamma").zero_()
    cold = supernet(digits, tmp_path / "cold", model, distillation_steps=0)
    net = supernet(digits, tmp_path / "warm", model, distillation_steps=100)
    before, after = errors(cold, model, digits), errors(net, model, digits)
    assert all(after[name] < before[name] for name in before if "mb4d" in name)
    narrow = [name for name in before if "mb3d(mlp_ratio=2" in name]
    assert narrow and all(before[name] < 0.05 for name in narrow), "cut out of the block that they may replace"
    assert all(after[name] < 0.2 * before[name] for name in narrow)
    inherited = subnetwork(net, ARCH).state_dict()
    for name, tensor in model.state_dict().items():  # batch-norm statistics among them
        assert torch.equal(inherited[name], tensor), name
    assert not net.training and all(module.training is False for module in net.modules())


def test_a_step_of_distillation_waits_for_no_error(digits: ImageData) -> None:
    """On a GPU each would be a pause."""
    space = space_of(ARCH)
    net, path = Supernet(space), space.path(ARCH)
    by_slot: dict[int, list[int]] = {}
    for slot, index in replacements(space, path):
        by_slot.setdefault(slot, []).append(index)
    x = normalise(digits.train.batch(torch.arange(8))[0])
    with Traffic() as traffic:
        found = pretrained._errors(net, pretrained._slots(net), path, by_slot, x, "fp32", ALONE)
    assert len(found) == len(replacements(space, path)) and all(error > 0 for error in found)
    assert traffic.waits == 0


@dataclass(frozen=True)
class Pooled:
    kind: ClassVar[str] = "pooled"
    tokens: ClassVar[bool] = False
    dim: int

    def module(self, resolution: int) -> nn.Module:
        return nn.AvgPool2d(3, 1, 1)


def test_a_block_without_parameters_has_nothing_to_learn(
    digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last = space_of(ARCH).stages
    pooled = replace(first, candidates=(MB4D(16), MB4D(16, act="relu"), Pooled(16), Identity(16)))
    space = replace(space_of(ARCH), stages=(pooled, replace(last, candidates=(*last.candidates[:2], Identity(16)))))
    settings = replace(SETTINGS, distillation_steps=2)
    net = pretrained_supernet(network(), ARCH, space, digits, settings, 0, tmp_path)
    learning = [found for found in replacements(space, space.path(ARCH)) if found not in ((0, 2), (1, 2))]
    assert f"{len(learning)} blocks that may replace others learn" in capsys.readouterr().err
    with torch.no_grad():
        assert net(images(2, 16), (2, 2, *space.path(ARCH)[2:])).isfinite().all()


@pytest.mark.parametrize("drawing", [False, True])
def test_killed_distillation_goes_on_to_the_same_weights(
    drawing: bool, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = space_of(ARCH)
    if drawing:
        space = replace(
            space, stages=(replace(space.stages[0], candidates=(MB4D(16), Dropping(16), Identity(16))), space.stages[1])
        )

    def distilled(folder: str) -> dict[str, Tensor]:
        return pretrained_supernet(network(), ARCH, space, digits, SETTINGS, 0, tmp_path / folder).state_dict()

    whole = distilled("whole")
    steps = 0
    original = pretrained._errors

    def killed(*args: Any) -> list[Tensor]:
        nonlocal steps
        steps += 1
        if steps == 28:  # in the second round
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrained, "_errors", killed)
        distilled("killed")
    resumed = distilled("killed")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    monkeypatch.setattr(pretrained, "_errors", lambda *args: pytest.fail("a finished distillation takes no step"))
    distilled("killed")


# -- On the data -------------------------------------------------------------------------------------------------------


def test_a_network_that_knows_the_data_is_left_alone(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "accuracy_of", lambda *args: (0.5, 0.8))
    model = on_data(given(), digits, SETTINGS, 0, tmp_path)
    assert all(torch.equal(tensor, given().state[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "init" / "checkpoint.pt").exists()
    assert ArchConfig.load(tmp_path / "teacher.yaml") == ARCH
    teacher = load_file(tmp_path / "teacher.safetensors")
    assert all(torch.equal(tensor, given().state[name]) for name, tensor in teacher.items())


def test_a_new_classifier_is_trained_first(digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = on_data(given(ARCH.with_classes(3)), digits, SETTINGS, 0, tmp_path)
    assert "mine knows 3 classes, the data have 10" in capsys.readouterr().err
    assert model(images(1, 16)).shape == (1, 10)
    trained = load_file(tmp_path / "init" / "model.safetensors")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    assert ArchConfig.load(tmp_path / "teacher.yaml") == ARCH, "the data's classes"
    on_data(given(ARCH.with_classes(3)), digits, SETTINGS, 0, tmp_path)
    assert "has finished before" in capsys.readouterr().err


def test_chance_is_always_to_say_the_commonest_class(
    digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network of other classes that says one of them, which four images in five here happen to have."""
    labels = torch.zeros_like(digits.score.labels)
    labels[::5] = torch.arange(len(labels[::5])) % 9 + 1
    data = replace(digits, score=replace(digits.score, labels=labels))
    state = network().state_dict()
    (bias,) = [name for name, tensor in state.items() if tensor.shape == (10,)]
    state[bias] = 1e3 * torch.eye(10)[0]
    on_data(Pretrained(ARCH, state, "somewhere"), data, SETTINGS, 0, tmp_path)
    assert "is chance, so its classes are not the data's" in capsys.readouterr().err


def test_a_classifier_of_other_classes_is_trained_too(
    digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_data(given(), digits, SETTINGS, 0, tmp_path)
    assert "is chance, so its classes are not the data's" in capsys.readouterr().err


def test_a_classifier_whose_names_are_others_is_trained_too_however_well_it_does(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names in another order: many images may still be right, by classes that the data do not have there."""
    monkeypatch.setattr(pretrained, "accuracy_of", lambda *args: (0.5, 0.8))
    names = [*digits.classes[:8], digits.classes[9], digits.classes[8]]
    save_file(network().state_dict(), tmp_path / "given.safetensors", note(names))
    read = load_pretrained("mine", str(tmp_path / "given.safetensors"), ARCH)
    assert read.classes == tuple(names)
    on_data(read, digits, SETTINGS, 0, tmp_path)
    assert "mine knows other classes than the data" in (said := capsys.readouterr().err)
    assert "(number 9 of 10 is '9', not '8')" in said
    start = str(tmp_path / "init" / "given.safetensors")
    assert load_pretrained("mine", start, ARCH).classes == tuple(names), "as --verify begins again"
    assert read_note(tmp_path / "teacher.safetensors")["classes"] == list(digits.classes)


def test_trained_at_another_size_the_teacher_is_of_the_deployed_size(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "accuracy_of", lambda *args: (0.5, 0.8))
    larger = given(ARCH.at(24))
    model = on_data(larger, digits, SETTINGS, 0, tmp_path)
    table = "stage2_block2.token_mixer.attention_biases"
    assert model.state_dict()[table].shape == (2, 16)
    assert ArchConfig.load(tmp_path / "teacher.yaml").image_size == 24
    teacher = load_file(tmp_path / "teacher.safetensors")
    assert teacher[table].shape == (2, 36)
    assert all(torch.equal(tensor, larger.state[name]) for name, tensor in teacher.items()), "what was given, not resized twice"


# -- What a search asks ------------------------------------------------------------------------------------------------


def test_statistics_hold_up_to_the_first_change(digits: ImageData) -> None:
    space = space_of(ARCH)
    whole = space.fit(ARCH)
    mb3d = space.stages[1].kind_of(MB3D_16)
    first_gone = space.arch((16, 16), (("identity", "mb4d"), ("mb4d", mb3d, mb3d)))
    last_gone = space.arch((16, 16), (("mb4d", "mb4d"), ("mb4d", mb3d, "identity")))
    narrowed = space.arch((16, 8), (("mb4d", "mb4d"), ("mb4d", mb3d, mb3d)))
    layers = len(whole.layers())
    assert layers_kept(whole, whole) == layers
    assert layers_kept(whole, first_gone) == 1, "the stem: the block after the gap is another one"
    assert layers_kept(whole, last_gone) == layers - 2
    assert layers_kept(whole, narrowed) == 3, "up to the embedding"

    net = Supernet(space)
    model = subnetwork(net, last_gone)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    recalibrate(model, images(64, 16), unchanged=3)
    changed = {name.split(".")[0] for name, tensor in model.named_buffers() if not torch.equal(tensor, before[name])}
    assert changed == {"stage2_embedding", "stage2_block1"}


def test_what_depends_on_the_image_size_is_the_given_network_s_own() -> None:
    space = space_of(ARCH)
    mb3d = space.stages[1].kind_of(MB3D_16)
    smaller = space.stages[1].kind_of(replace(MB3D_16, key_dim=2))
    tensors = network().state_dict()
    biases = [f"stage2_block{number}.token_mixer.attention_biases" for number in (2, 3)]
    found = space.arch((16, 16), (("identity", "mb4d"), ("identity", smaller, mb3d)))
    kept = as_given(tensors, space.fit(ARCH), found)
    assert list(kept) == [biases[0]], "the second of the blocks that are left"
    assert torch.equal(kept[biases[0]], tensors[biases[1]])
    assert sorted(as_given(tensors, space.fit(ARCH), space.fit(ARCH))) == biases
    assert not as_given(tensors, space.fit(ARCH), space.arch((16, 8), (("mb4d", "mb4d"), ("mb4d", mb3d, mb3d))))
