"""A SearchSpace holds the published networks, samples its members evenly and knows every layer that they may have."""

import itertools
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import refusal

from supernet.arch import ArchConfig, Stage
from supernet.space import SearchSpace, StageSpace, space_names
from supernet.specs import MB3D, MB4D, Block, Identity, Layer

ROOT = Path(__file__).parent.parent
SPACES = space_names()


def zoo(name: str) -> ArchConfig:
    return ArchConfig.load(ROOT / "supernet" / "zoo" / f"efficientformer_{name}.yaml")


def samples(space: SearchSpace, number: int) -> list[ArchConfig]:
    rng = random.Random(0)
    return [space.sample(rng) for _ in range(number)]


def stage_space(widths: tuple[int, ...], stride: int, depth: int, *kinds: str) -> StageSpace:
    blocks: dict[str, Block] = {"mb4d": MB4D(widths[-1]), "mb3d": MB3D(widths[-1]), "identity": Identity(widths[-1])}
    return StageSpace(widths, stride, depth, tuple(blocks[kind] for kind in kinds))


SMALL = SearchSpace(
    "small",
    33,
    10,
    (
        stage_space((16, 24), 2, 2, "mb4d", "identity"),
        stage_space((24, 40), 2, 2, "mb4d", "mb3d", "identity"),
        stage_space((32, 48), 2, 2, "identity", "mb3d", "mb4d"),
    ),
)


def members(space: SearchSpace) -> list[ArchConfig]:
    """All members of a small space, by brute force: every width, every kind in every slot."""
    choices = [itertools.product(s.widths, itertools.product(s.kinds, repeat=s.depth)) for s in space.stages]
    return [space.arch([w for w, _ in stages], [k for _, k in stages]) for stages in itertools.product(*choices)]


# -- The spaces that ship ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_a_named_space_is_its_file(name: str, tmp_path: Path) -> None:
    space = SearchSpace.load(name)
    assert space.name == name
    space.save(tmp_path / "space.yaml")
    assert SearchSpace.load(tmp_path / "space.yaml") == space
    space.check_searchable()


@pytest.mark.parametrize(("network", "space"), [("l1", "s"), ("l3", "m"), ("l7", "l")])
def test_a_published_network_is_in_its_space(network: str, space: str) -> None:
    arch, searched = zoo(network), SearchSpace.load(f"efficientformer-{space}")
    assert arch in searched
    assert searched.fit(arch).without_identity() == arch
    assert set(arch.layers()) <= set(searched.layers())
    assert arch.at(192).with_classes(10) in searched


def test_l1_is_not_in_the_tiny_space() -> None:
    tiny = SearchSpace.load("efficientformer-tiny")
    assert zoo("l1") not in tiny
    assert refusal(lambda: tiny.fit(zoo("l1"))) == (
        "efficientformer_l1 has strides (4, 2, 2, 2), space efficientformer-tiny has (1, 2, 2, 2)"
    )


def test_what_is_not_in_a_space_is_named() -> None:
    l1, s = zoo("l1"), SearchSpace.load("efficientformer-s")

    def first_stage(width: int, *blocks: MB4D | MB3D) -> ArchConfig:
        return ArchConfig("mine", 224, 1000, (Stage(width, 4, blocks), *l1.stages[1:]))

    assert "stage 1 of mine has width 40" in refusal(lambda: s.fit(first_stage(40)))
    assert "stage 1 of mine has 4 blocks, not 3 at most" in refusal(lambda: s.fit(first_stage(48, *[MB4D(48)] * 4)))
    assert "stage 1 of mine has MB3D(dim=48" in refusal(lambda: s.fit(first_stage(48, MB3D(48))))
    assert "stage 1 of mine has MB4D(dim=48, mlp_ratio=3" in refusal(lambda: s.fit(first_stage(48, MB4D(48, 3))))
    assert "space efficientformer-s has (4, 2, 2, 2)" in refusal(lambda: s.fit(ArchConfig("mine", 224, 1000, l1.stages[:3])))


@pytest.mark.parametrize(("image_size", "sides"), [(224, (56, 28, 14, 7)), (225, (57, 29, 15, 8)), (192, (48, 24, 12, 6))])
def test_a_space_has_the_resolutions_of_its_members(image_size: int, sides: tuple[int, ...]) -> None:
    space = SearchSpace.load("efficientformer-s").at(image_size)
    assert space.resolutions == sides
    assert all(arch.resolutions == sides and arch.image_size == image_size for arch in samples(space, 5))


@pytest.mark.parametrize(("name", "smallest"), [("efficientformer-s", 97), ("efficientformer-tiny", 25)])
def test_a_last_map_under_4x4_is_refused_for_a_search(name: str, smallest: int) -> None:
    space = SearchSpace.load(name)
    space.at(smallest).check_searchable()
    text = refusal(space.at(smallest - 1).check_searchable)
    assert f"at {smallest - 1} px has a last map of 3x3" in text
    assert f"at least {smallest} px" in text


# -- Sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_token_blocks_are_the_suffix_of_their_stage_in_every_sample(name: str) -> None:
    space, seen = SearchSpace.load(name), set()
    for arch in samples(space, 200):
        for stage in arch.without_identity().stages:
            tokens = [block.tokens for block in stage.blocks]
            assert tokens == sorted(tokens)
            seen.add((any(tokens), all(tokens)))
    sorts = [{c.tokens for c in stage.candidates if not isinstance(c, Identity)} for stage in space.stages]
    assert ((True, False) in seen) == ({True, False} in sorts)  # stages with blocks of both sorts did occur


@pytest.mark.parametrize("name", SPACES)
def test_a_path_names_its_network(name: str) -> None:
    space = SearchSpace.load(name)
    for arch in samples(space, 50):
        path = space.path(arch)
        kinds = [[""] * stage.depth for stage in space.stages]
        for (stage, slot), candidate in zip(space.slots, path, strict=True):
            kinds[stage][slot] = space.stages[stage].kinds[candidate]
        assert space.arch(arch.widths, kinds) == arch
        assert arch in space


def test_widths_and_kinds_are_sampled_evenly() -> None:
    """In 2000 samples a stage's widths are equally frequent, and so are its kinds, within 5 sigma."""
    space, number = SearchSpace.load("efficientformer-s"), 2000
    drawn = samples(space, number)

    def check(counts: Counter[Any], options: tuple[Any, ...], trials: int) -> None:
        share = 1 / len(options)
        for option in options:
            assert abs(counts[option] - trials * share) < 5 * (trials * share * (1 - share)) ** 0.5, option

    for i, stage in enumerate(space.stages):
        check(Counter(arch.widths[i] for arch in drawn), stage.widths, number)
        kinds = Counter(block.kind for arch in drawn for block in arch.stages[i].blocks)
        check(kinds, stage.kinds, number * stage.depth)


def test_the_same_seed_gives_the_same_samples() -> None:
    assert samples(SMALL, 20) == samples(SMALL, 20)
    assert len(set(samples(SMALL, 20))) > 10


def test_largest_and_smallest_are_members_at_the_ends() -> None:
    space = SearchSpace.load("efficientformer-s")
    assert space.largest.widths == (48, 96, 224, 448)
    assert space.smallest.widths == (16, 32, 96, 192)
    assert {block.kind for stage in space.largest.stages for block in stage.blocks} == {"mb4d"}
    assert {block.kind for stage in space.smallest.stages for block in stage.blocks} == {"identity"}
    assert space.largest in space
    assert space.smallest in space


def test_a_network_and_what_is_left_of_it_are_in_the_space_around_it() -> None:
    l1 = zoo("l1")
    space = SearchSpace.around(l1)
    assert l1 in space
    assert space.smallest.widths == l1.widths
    hollow = ArchConfig("hollow", 64, 10, (Stage(16, 4, (Identity(16),)),))
    assert hollow in SearchSpace.around(hollow)


# -- Layers ------------------------------------------------------------------------------------------------------------


def test_layers_are_those_of_all_members_and_no_others() -> None:
    layers = SMALL.layers()
    assert set(layers) == {layer for arch in members(SMALL) for layer in arch.layers()}
    assert len(layers) == len(set(layers))


@pytest.mark.parametrize("name", SPACES)
def test_layers_cover_every_sample_and_none_stands_twice(name: str) -> None:
    space = SearchSpace.load(name)
    layers: list[Layer] = space.layers()
    known = set(layers)
    assert len(layers) == len(known)
    for arch in samples(space, 200):
        assert known.issuperset(arch.layers())


# -- What is refused ---------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def put(key: str, value: object) -> Change:
    return lambda document: document.update({key: value})


def put2(key: str, value: object) -> Change:
    """A change of the second stage."""
    return lambda document: document["stages"][1].update({key: value})


BAD: dict[str, tuple[Change, str]] = {
    "image size as text": (put("image_size", "224"), "image_size must be a whole number, but is '224'"),
    "image size missing": (lambda d: d.pop("image_size"), "the field 'image_size' is missing"),
    "unknown field": (put("num_class", 10), "unknown field 'num_class': did you mean num_classes"),
    "no stages": (put("stages", []), "stages must be a list with at least one entry"),
    "depth missing": (lambda d: d["stages"][1].pop("depth"), "stage 2: the field 'depth' is missing"),
    "depth 0": (put2("depth", 0), "stage 2: depth must be a whole number of at least 1, but is 0"),
    "depth as text": (put2("depth", "2"), "stage 2: depth must be a whole number, but is '2'"),
    "stride 3": (put2("stride", 3), "stride of a stage after the first must be 1 or 2, but is 3"),
    "unknown field of a stage": (put2("width", 8), "stage 2: unknown field 'width': did you mean widths"),
    "widths descend": (put2("widths", [96, 48]), "stage 2: widths must ascend without repeats, but are [96, 48]"),
    "a width twice": (put2("widths", [48, 48]), "stage 2: widths must ascend without repeats, but are [48, 48]"),
    "no widths": (put2("widths", []), "stage 2: widths must be a list with at least one entry, but is []"),
    "one width, bare": (put2("widths", 48), "stage 2: widths must be a list with at least one entry, but is 48"),
    "width 47": (put2("widths", [40, 47]), "stage 2: a width must be a positive multiple of 8, but is 47"),
    "width as text": (put2("widths", [40, "48"]), "stage 2: a width must be a positive multiple of 8, but is '48'"),
    "width true": (put2("widths", [True]), "stage 2: a width must be a positive multiple of 8, but is True"),
    "min over max": (put2("widths", {"min": 64, "max": 32, "step": 16}), "stage 2: widths: min must be at most max"),
    "no step": (put2("widths", {"min": 32, "max": 64}), "stage 2: widths must be a list or whole numbers min, max and"),
    "step 0": (put2("widths", {"min": 32, "max": 64, "step": 0}), "stage 2: widths must be a list or whole numbers"),
    "step 4": (put2("widths", {"min": 32, "max": 64, "step": 4}), "stage 2: a width must be a positive multiple of 8"),
    "a max that no step hits": (
        put2("widths", {"min": 16, "max": 40, "step": 16}),
        "give a max of 32 or 48, or a list",
    ),
    "no identity": (
        put2("candidates", ["mb4d", "mb3d"]),
        "stage 2: candidates must be identity and at least one other",
    ),
    "identity alone": (put2("candidates", ["identity"]), "stage 2: candidates must be identity and at least one other"),
    "a candidate twice": (
        put2("candidates", ["mb4d", {"kind": "mb4d", "mlp_ratio": 4}, "identity"]),
        "stage 2: candidates must be identity and at least one other kind, each once",
    ),
    "no candidates": (put2("candidates", None), "stage 2: candidates must be a list with at least one entry"),
    "unknown kind": (
        put2("candidates", ["mb4", "identity"]),
        "stage 2: unknown block kind 'mb4': did you mean mb4d or mb3d? allowed: ",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_file_that_is_no_space_is_refused_by_its_field(change: Change, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    document = yaml.safe_load(SearchSpace.load("efficientformer-s").to_yaml())
    change(document)
    path.write_text(yaml.safe_dump(document))
    text = refusal(lambda: SearchSpace.load(path))
    assert text.startswith(f"the space file {path}: ")
    assert message in text


@pytest.mark.parametrize(
    ("content", "message"),
    [("# nothing\n", "'stages' are missing"), ("- 1\n", "holds list"), ("name: s\nstages: [{stri", "'<stream end>'")],
    ids=["empty", "list", "truncated"],
)
def test_a_file_that_is_no_mapping_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert refusal(lambda: SearchSpace.load(path)).endswith(message)


def test_an_unknown_name_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    text = refusal(lambda: SearchSpace.load("efficientformer-x"))
    assert text.startswith("unknown space 'efficientformer-x': did you mean ")
    assert all(name in text for name in SPACES)
    assert "cannot be read (No such file" in refusal(lambda: SearchSpace.load(tmp_path / "none.yaml"))


def test_spaces_made_in_code_are_checked_too() -> None:
    assert "at least one width" in refusal(lambda: StageSpace((), 2, 1, (MB4D(16), Identity(16))))
    assert "multiple of 8" in refusal(lambda: stage_space((16, 20), 2, 1, "mb4d", "identity"))
    assert "has no stages" in refusal(lambda: SearchSpace("none", 64, 10, ()))
    assert "image_size must be" in refusal(lambda: SMALL.at(0))
    assert "num_classes must be" in refusal(lambda: SMALL.with_classes(0))


def test_an_entry_that_says_the_usual_one_is_none(tmp_path: Path) -> None:
    text = "{name: a, image_size: 32, num_classes: 10, stages: ["
    stages = ["stride: 2, widths: [16], depth: 1, candidates: [mb4d, identity]"] * 2
    said = [f"{{{stage}, entry: {entry}}}" for stage, entry in zip(stages, ("stem", "embedding"), strict=True)]
    (tmp_path / "said.yaml").write_text(f"{text}{', '.join(said)}]}}")
    (tmp_path / "left-out.yaml").write_text(f"{text}{', '.join('{' + stage + '}' for stage in stages)}]}}")
    said_so, left_out = (SearchSpace.load(tmp_path / f"{name}.yaml") for name in ("said", "left-out"))
    assert said_so == left_out and said_so.to_yaml() == left_out.to_yaml()
    assert said_so.largest in left_out


def test_a_space_made_of_lists_equals_its_own_file(tmp_path: Path) -> None:
    stage = StageSpace([16, 32], 2, 2, [MB4D(32), Identity(32)])  # type: ignore[arg-type]
    space = SearchSpace("lists", 32, 10, [stage, stage])  # type: ignore[arg-type]
    space.save(tmp_path / "lists.yaml")
    assert SearchSpace.load(tmp_path / "lists.yaml") == space
    assert space.sample(random.Random(0)) in space
