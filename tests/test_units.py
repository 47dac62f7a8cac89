"""Coupled parts are complete, and cutting units that do nothing changes nothing."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from refusals import refusal
from small_spaces import stage_space
from torch import Tensor, nn

from supernet.blocks import build_layer
from supernet.metapath import Supernet
from supernet.model import build_model
from supernet.ports import Port
from supernet.space import SearchSpace, StageSpace
from supernet.specs import (
    FFN,
    MB3D,
    MB4D,
    SPECS,
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
    Spec,
    Stem,
    Subsample,
    Unflat,
    ViT,
)
from supernet.units import UnitScores, at_widths, axes, best, cut, kept_channels, key, narrowed, sections, take
from supernet.weights import subnetwork

State = dict[str, Tensor]
KEYS: dict[str, Any] = {"num_heads": 2, "key_dim": 8, "attn_ratio": 2}

LAYERS: list[tuple[Layer, list[dict[str, int]]]] = [
    # a layer, and the knobs of narrower ones; a layer norm sees how many channels there are, so that none may go before it
    (Layer(MB4D(16), 4), [{"mlp_ratio": 1}, {"dim": 8}, {"dim": 8, "mlp_ratio": 2}]),
    (Layer(MB3D(16, **KEYS), 4), [{"mlp_ratio": 1}, {"key_dim": 4}, {"attn_ratio": 1}, {"key_dim": 2, "mlp_ratio": 3}]),
    (Layer(FFN(16), 4), [{"mlp_ratio": 3}, {"dim": 8}]),
    (Layer(AttnFFN(16, **KEYS), 4), [{"key_dim": 4}, {"attn_ratio": 1}, {"mlp_ratio": 2, "dim": 8}]),
    (Layer(AttnFFN(16, stride=2, **KEYS), 4), [{"key_dim": 4, "dim": 8}]),
    (Layer(Sandwich(32, key_dim=8), 4), [{"key_dim": 4}, {"ffn_ratio": 1}, {"dim": 16}, {"dim": 24, "key_dim": 2}]),
    (Layer(Sandwich(24, num_heads=3, window=4), 6), [{"dim": 12}]),  # windows, padded
    (Layer(Sandwich(8, num_heads=1, q_kernels=(3,)), 4), [{"dim": 4}]),
    (Layer(ViT(16, num_heads=2), 4), [{"mlp_ratio": 2}]),
    (Layer(Identity(16), 4), [{"dim": 8}]),
    (Layer(Stem(16, act="gelu"), 16), [{"dim": 8}]),
    (Layer(ConvStem(32, stride=8), 16), [{"dim": 16}]),
    (Layer(PatchStem(16, stride=4), 16), [{"dim": 8}]),
    (Layer(Embedding(24, 16), 8), [{"dim": 8}, {"dim_in": 8}, {"dim": 16, "dim_in": 8}]),
    (Layer(AttnEmbedding(24, 16, **KEYS), 5), [{"dim": 16, "dim_in": 8}, {"key_dim": 4}]),
    (Layer(Subsample(24, 16), 8), [{"dim": 16}, {"dim_in": 8}, {"dim": 8, "dim_in": 8}]),
    (Layer(Flat(16), 4), [{"dim": 8}]),
    (Layer(Unflat(16), 4), [{"dim": 8}]),
    (Layer(Head(16, 5), 4), []),
    (Layer(Head(16, 5, form="batch_norm"), 4), [{"dim": 8}]),
    (Layer(Head(16, 5, form="mean_batch_norm"), 4), [{"dim": 8}]),
    (Layer(Head(16, 5, True, "class_token"), 4), []),
    (Layer(Join(n=2, dim=16), 4), [{"dim": 8}]),
    (Layer(Join(n=2, dim=16, class_token=True, readout="shared"), 4), [{"dim": 8}]),
    (Layer(GroupedMB3D(16, n=2, **KEYS), 4), [{"key_dim": 4, "mlp_ratio": 2}]),
    (Layer(GroupedViT(16, num_heads=2, n=2), 4), [{"mlp_ratio": 2}]),
    (Layer(GroupHead(16, 5, True, n=2), 4), []),
]
CUTS = [(layer, knobs) for layer, ways in LAYERS for knobs in ways]


def spec_with(spec: Spec, knobs: Mapping[str, int]) -> Any:
    return replace(spec, **knobs)  # type: ignore[type-var, arg-type]


def trained(layer: Layer, seed: int = 0) -> nn.Module:
    """A layer whose every tensor has values of its own."""
    torch.manual_seed(seed)
    module = build_layer(layer).double().eval()
    randomise(module)
    return module


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape) * 0.4)


def entering(layer: Layer) -> Tensor:
    return torch.randn(layer.entering.shape(4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def channel_axis(port: Port) -> int:
    return 1 if port.form in ("map", "image") else 2


def subset(x: Tensor, port: Port, units: Tensor | None) -> Tensor:
    return x if units is None or port.form in ("image", "logits") else x.index_select(channel_axis(port), units)


def entering_role(layer: Layer) -> str:
    return "dim_in" if hasattr(layer.spec, "dim_in") else "dim"


def output(layer: Layer, state: State, x: Tensor) -> Tensor:
    module = build_layer(layer).double().eval()
    module.load_state_dict(state)
    with torch.no_grad():
        y: Tensor = module(x)
    return y


def others(units: Tensor, number: int) -> Tensor:
    return torch.tensor(sorted(set(range(number)) - set(units.tolist())), dtype=torch.long)


def zeroed(state: State, layer: Layer, gone: Mapping[str, Tensor]) -> State:
    """The state with every part of these units zero, but for statistics."""
    found = {}
    for name, tensor in state.items():
        tensor = tensor.clone()
        for axis, runs in enumerate(axes(layer)[name]):
            begin = 0
            for run in runs:
                for unit in gone.get(run.role, torch.tensor([], dtype=torch.long)).tolist():
                    if run.start <= unit < run.start + run.size and "running" not in name:
                        tensor.select(axis, begin + unit - run.start).zero_()
                begin += run.size
        found[name] = tensor
    return found


def names(value: object) -> str:
    return str(value).replace(" ", "")


def test_every_kind_of_layer_is_covered() -> None:
    assert {type(layer.spec) for layer, _ in LAYERS} == set(SPECS.values())


@pytest.mark.parametrize("layer", [layer for layer, _ in LAYERS], ids=names)
def test_runs_fill_their_axes_and_every_tensor_is_known(layer: Layer) -> None:
    state = build_layer(layer).state_dict()
    assert axes(layer).keys() == state.keys()
    for name, along in axes(layer).items():
        assert len(along) == state[name].ndim
        for size, runs in zip(state[name].shape, along, strict=True):
            assert not runs or sum(run.size for run in runs) == size
        if state[name].ndim and "bias" not in name.rpartition(".")[2] and "talking_head" not in name and "pair" not in name:
            assert any(along), name  # only biases of attention, classes and talking heads have no units


@pytest.mark.parametrize("layer", [layer for layer, _ in LAYERS], ids=names)
def test_units_in_another_order_give_the_same_layer(layer: Layer) -> None:
    """Each role alone: a part that was forgotten, or of another unit, would change what comes out."""
    state = trained(layer).state_dict()
    x = entering(layer)
    before = output(layer, state, x)
    for role, bounds in sections(layer).items():
        generator = torch.Generator().manual_seed(2)
        order = torch.cat([torch.randperm(b - a, generator=generator) + a for a, b in pairwise(bounds)])
        assert not torch.equal(order, torch.arange(bounds[-1]))
        into = order if role == entering_role(layer) else None
        out_of = order if role == "dim" else None
        after = output(layer, take(state, layer, {role: order}), subset(x, layer.entering, into))
        torch.testing.assert_close(after, subset(before, layer.leaving, out_of), msg=lambda m, role=role: f"{role}: {m}")


@pytest.mark.parametrize(("layer", "knobs"), CUTS, ids=names)
def test_cutting_the_units_that_are_zero_changes_nothing(layer: Layer, knobs: dict[str, int]) -> None:
    target = Layer(spec_with(layer.spec, knobs), layer.resolution)
    generator = torch.Generator().manual_seed(3)
    scores = {role: torch.rand(bounds[-1], generator=generator) for role, bounds in sections(layer).items()}

    def kept_by(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {role: best(scores[role], bounds, sections(target)[role]) for role, bounds in sections(layer).items()}

    kept = kept_by(scores)
    gone = {role: others(units, sections(layer)[role][-1]) for role, units in kept.items()}
    state = zeroed(trained(layer).state_dict(), layer, gone)
    x, into = entering(layer), kept.get(entering_role(layer))
    if into is not None and layer.entering.form != "image":
        x.index_fill_(channel_axis(layer.entering), gone[entering_role(layer)], 0.0)
    before = output(layer, state, x)
    after = output(target, cut(state, layer, target, scores), subset(x, layer.entering, into))
    if sections(layer):  # else it passes on what enters
        torch.testing.assert_close(after, subset(before, layer.leaving, kept.get("dim")))
        worst = {role: -values for role, values in scores.items()}
        spoiled = cut(state, layer, target, worst)
        y = output(target, spoiled, subset(x, layer.entering, kept_by(worst).get(entering_role(layer))))
        assert (y - after).abs().max() > 1e-4  # the units matter


@pytest.mark.parametrize("layer", [layer for layer, _ in LAYERS], ids=names)
def test_the_same_spec_is_cut_to_itself(layer: Layer) -> None:
    state = build_layer(layer).state_dict()
    scores = {role: torch.rand(bounds[-1]) for role, bounds in sections(layer).items()}
    found = cut(state, layer, layer, scores)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_what_is_no_narrower_layer_is_refused() -> None:
    layer = Layer(MB3D(16, **KEYS), 4)
    state = build_layer(layer).state_dict()
    for target, words in (
        (Layer(MB4D(16), 4), "the same kind of layer"),
        (Layer(MB3D(16, **KEYS), 8), "the same resolution"),
        (Layer(MB3D(16, num_heads=1, key_dim=8), 4), "as many heads"),
        (Layer(MB3D(24, **KEYS), 4), "cannot be cut to"),
        (Layer(MB3D(16, **KEYS, mlp_ratio=5), 4), "cannot be cut to"),
    ):
        assert words in refusal(lambda target=target: cut(state, layer, target, {}))  # type: ignore[misc]
    wide = Layer(Sandwich(32, q_kernels=(5, 5, 5, 5)), 4)
    other = Layer(Sandwich(32, q_kernels=(3, 5, 5, 5)), 4)
    assert "dws.0.conv.weight" in refusal(lambda: cut(build_layer(other).state_dict(), other, wide, {}))
    assert "scores of 3 units" in refusal(lambda: best(torch.ones(3), (0, 4), (0, 2)))


def test_the_first_of_equals_is_kept_and_order_ascends() -> None:
    assert best(torch.tensor([1.0, 3, 3, 3, 0, 9]), (0, 6), (0, 3)).tolist() == [1, 2, 5]
    assert best(None, (0, 6), (0, 3)).tolist() == [0, 1, 2]
    assert best(torch.tensor([1.0, 3, 0, 9]), (0, 2, 4), (0, 1, 2)).tolist() == [1, 3]


def test_a_stage_keeps_one_pattern_that_serves_all_divisions_into_heads() -> None:
    scores = torch.arange(48.0)
    assert kept_channels(scores, [MB4D(48)], 4, 48, 24).tolist() == list(range(24, 48))
    four, two = Sandwich(48, num_heads=4), Sandwich(48, num_heads=2)
    quarters = [*range(6, 12), *range(18, 24), *range(30, 36), *range(42, 48)]
    assert kept_channels(scores, [MB4D(48), four, two, Identity(48)], 4, 48, 24).tolist() == quarters
    mixed = kept_channels(scores, [Sandwich(48, num_heads=3), two], 4, 48, 24).tolist()
    for heads in (3, 2):
        chunk = 48 // heads
        assert [sum(unit // chunk == head for unit in mixed) for head in range(heads)] == [24 // heads] * heads
    assert kept_channels(scores, [four], 4, 48, 48).tolist() == list(range(48))


# -- Networks ----------------------------------------------------------------------------------------------------------

MIXED = SearchSpace(
    "mixed-small",
    16,
    5,
    (
        StageSpace((16, 32), 1, 2, (MB4D(32, mlp_ratio=2), FFN(32), Identity(32)), Stem(8)),
        StageSpace((16, 32), 2, 2, (Sandwich(32, window=8), MB4D(32), Identity(32)), Subsample(8, 8)),
        StageSpace((24, 32), 2, 2, (AttnFFN(32, **KEYS), FFN(32), Identity(32)), AttnEmbedding(8, 8, **KEYS)),
    ),
    head="batch_norm",
)


def random_scores(space: SearchSpace, seed: int = 0) -> UnitScores:
    generator = torch.Generator().manual_seed(seed)
    inside: dict[str, dict[str, Tensor]] = {}
    for kinds in ([0, 0, 0], [1, 1, 1]):
        wide = space.arch(
            [s.widths[-1] for s in space.stages], [[s.kinds[k]] * s.depth for k, s in zip(kinds, space.stages, strict=True)]
        )
        for name, layer in wide.named_layers():
            inside[key(name, layer.spec)] = {
                role: torch.rand(bounds[-1], generator=generator) for role, bounds in sections(layer).items()
            }
    return UnitScores(tuple(torch.rand(s.widths[-1], generator=generator) for s in space.stages), inside)


def test_a_sub_network_keeps_the_best_channels_in_every_layer() -> None:
    """Where the other channels are zero in all that reads and writes them, the narrow network is the wide one."""
    net = Supernet(MIXED).double().eval()
    torch.manual_seed(0)
    randomise(net)
    scores = random_scores(MIXED)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for kinds in ([0, 0, 0], [1, 1, 1]):
        names_of = [[s.kinds[k], s.kinds[1 - k]] for k, s in zip(kinds, MIXED.stages, strict=True)]
        arch = MIXED.arch((16, 16, 24), names_of)
        narrow = subnetwork(net, arch, scores).double().eval()
        wide_arch = at_widths(arch, (32, 32, 32))
        wide = subnetwork(net, wide_arch).double().eval()
        state = wide.state_dict()
        for name, layer in wide_arch.named_layers():
            narrow_layer = dict(arch.named_layers())[name]
            at = 0 if name == "stem" else 2 if name == "head" else int(name[5]) - 1
            gone = {}
            for role, bounds in sections(layer).items():
                if role in ("dim", "dim_in"):
                    stage = at - (role == "dim_in")
                    choices = MIXED.stages[stage]
                    kept = kept_channels(
                        scores.stages[stage], choices.candidates, MIXED.resolutions[stage], 32, arch.widths[stage]
                    )
                else:
                    kept = best(scores.inside[key(name, layer.spec)][role], bounds, sections(narrow_layer)[role])
                gone[role] = others(kept, bounds[-1])
            own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            state |= {f"{name}.{k}": v for k, v in zeroed(own, layer, gone).items()}
        wide.load_state_dict(state)
        with torch.no_grad():
            torch.testing.assert_close(narrow(x), wide(x))
            assert not torch.allclose(subnetwork(net, arch).double().eval()(x), wide(x))


def test_a_sub_network_keeps_the_first_channels_where_those_score_highest() -> None:
    space = SearchSpace("first", 16, 5, (stage_space((8, 16), 2, 2, "mb4d", "mb3d", "identity"),) * 2)
    net = Supernet(space)
    falling = UnitScores(tuple(-torch.arange(16.0) for _ in range(2)), {})
    for widths in ((8, 16), (16, 8), (8, 8)):
        arch = space.arch(widths, (("mb4d", "mb3d"), ("mb4d", "identity")))
        first, kept = subnetwork(net, arch).state_dict(), subnetwork(net, arch, falling).state_dict()
        assert all(torch.equal(first[name], kept[name]) for name in first)


def test_a_network_is_cut_out_of_another_without_some_of_its_blocks() -> None:
    arch = MIXED.largest
    model = build_model(arch)
    blocks = arch.stages[1].blocks
    smaller = replace(arch.stages[1], blocks=(Identity(32), replace(blocks[1], ffn_ratio=1, key_dim=8)))
    target = at_widths(replace(arch, stages=(arch.stages[0], smaller, arch.stages[2])), (16, 32, 24))
    found = narrowed(model.state_dict(), arch, target)
    build_model(target).load_state_dict(found)
    assert "stage2_block1.dw0.m.conv.weight" not in found
    torch.testing.assert_close(found["stage2_block2.dw0.m.conv.weight"], model.state_dict()["stage2_block2.dw0.m.conv.weight"])
    assert "stage 1" in refusal(lambda: narrowed(found, target, arch))
    assert "stage2_block1" in refusal(lambda: narrowed(found, target, at_widths(arch, target.widths)))


# -- Spaces around a network -------------------------------------------------------------------------------------------


def test_the_space_around_a_network_has_its_smaller_blocks_and_widths() -> None:
    arch = SearchSpace.load("efficientformer-tiny").arch(
        (32, 64, 128, 192), (["mb4d"] * 2, ["mb4d"] * 2, ["mb4d"] * 4, ["mb3d"] * 3)
    )
    space = SearchSpace.around(arch, ffn_ratios=(3, 2, 4), key_dims=(16, 32), width_shares=(0.5, 0.74))
    assert space.stages[0].kinds == ("mb4d", "mb4d(mlp_ratio=3)", "mb4d(mlp_ratio=2)", "identity")
    assert space.stages[0].widths == (16, 24, 32) and space.stages[3].widths == (96, 144, 192)
    assert space.stages[3].kinds == (
        "mb3d",
        "mb3d(key_dim=16)",
        "mb3d(mlp_ratio=3)",
        "mb3d(mlp_ratio=3, key_dim=16)",
        "mb3d(mlp_ratio=2)",
        "mb3d(mlp_ratio=2, key_dim=16)",
        "identity",
    )
    assert space.largest.stages == arch.stages and arch in space
    assert SearchSpace.around(arch) == SearchSpace.around(arch, (4,), (32,))


def test_widths_around_a_network_are_those_that_its_blocks_and_entries_can_have() -> None:
    arch = SearchSpace.load("efficientvit-tiny").largest
    widths = [stage.widths for stage in SearchSpace.around(replace(arch, stages=arch.stages[:1]), width_shares=(0.8,)).stages]
    assert widths == [(24, 32)]
    token = SearchSpace.load("concatplexer-tiny").largest
    assert [stage.widths for stage in SearchSpace.around(token, width_shares=(0.5,)).stages] == [(96,)]
    for bad in ({"ffn_ratios": (0,)}, {"key_dims": (2.5,)}, {"width_shares": (1.0,)}):
        assert next(iter(bad)) in refusal(lambda bad=bad: SearchSpace.around(arch, **bad))  # type: ignore[misc, arg-type]
