"""An ArchConfig is the file it is read from; what cannot be a network is refused in one line."""

import ast
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import refusal

from supernet.arch import ArchConfig, Stage
from supernet.errors import InputError
from supernet.files import parse_yaml
from supernet.space import SearchSpace, space_names
from supernet.specs import MB3D, MB4D, Embedding, Flat, Head, Identity, Layer, Sandwich, Stem, Unflat

ROOT = Path(__file__).parent.parent
ZOO = sorted((ROOT / "supernet" / "zoo").glob("*.yaml"))


def zoo(name: str) -> ArchConfig:
    return ArchConfig.load(ROOT / "supernet" / "zoo" / f"efficientformer_{name}.yaml")


def network(*stages: tuple[int, list[str]]) -> ArchConfig:
    """A network for 64 px from the widths of its stages and the kinds of their blocks; strides 4, 2, 2, ..."""
    document = {
        "name": "small",
        "image_size": 64,
        "num_classes": 10,
        "stages": [{"width": w, "stride": 2 if i else 4, "blocks": kinds} for i, (w, kinds) in enumerate(stages)],
    }
    return ArchConfig.from_dict(document, "a test")


# -- The published networks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "widths", "depths", "attention"),
    [
        ("l1", (48, 96, 224, 448), (3, 2, 6, 4), 1),
        ("l3", (64, 128, 320, 512), (4, 4, 12, 6), 4),
        ("l7", (96, 192, 384, 768), (6, 6, 18, 8), 8),
    ],
)
def test_the_zoo_holds_the_published_layouts(
    name: str, widths: tuple[int, ...], depths: tuple[int, ...], attention: int
) -> None:
    arch = zoo(name)
    assert arch.name == f"efficientformer_{name}"
    assert (arch.image_size, arch.num_classes) == (224, 1000)
    assert (arch.widths, arch.strides) == (widths, (4, 2, 2, 2))
    assert tuple(len(stage.blocks) for stage in arch.stages) == depths
    blocks = [block for stage in arch.stages for block in stage.blocks]
    assert [block.kind for block in blocks] == ["mb4d"] * (len(blocks) - attention) + ["mb3d"] * attention


@pytest.mark.parametrize(
    ("image_size", "sides"),
    [(224, (56, 28, 14, 7)), (225, (57, 29, 15, 8)), (192, (48, 24, 12, 6)), (256, (64, 32, 16, 8)), (1, (1, 1, 1, 1))],
)
def test_every_stride_2_convolution_takes_n_to_half_of_n_rounded_up(image_size: int, sides: tuple[int, ...]) -> None:
    arch = zoo("l1").at(image_size)
    assert arch.resolutions == sides
    assert arch.at(224) == zoo("l1")


def test_layers_are_the_network_in_order_with_the_resolution_that_enters() -> None:
    layers = dict(network((16, ["mb4d"]), (24, ["identity", "mb4d", "mb3d", "mb3d"]), (32, ["mb4d"])).named_layers())
    assert list(layers.items()) == [
        ("stem", Layer(Stem(16, 4), 64)),
        ("stage1_block1", Layer(MB4D(16), 16)),
        ("stage2_embedding", Layer(Embedding(24, 16, 2), 16)),
        ("stage2_block2", Layer(MB4D(24), 8)),
        ("stage2_flat", Layer(Flat(24), 8)),
        ("stage2_block3", Layer(MB3D(24), 8)),
        ("stage2_block4", Layer(MB3D(24), 8)),
        ("stage2_unflat", Layer(Unflat(24), 8)),
        ("stage3_embedding", Layer(Embedding(32, 24, 2), 8)),
        ("stage3_block1", Layer(MB4D(32), 4)),
        ("head", Layer(Head(32, 10, tokens=False), 4)),
    ]


def test_tokens_enter_the_head_only_after_a_token_block() -> None:
    assert zoo("l7").layers()[-1] == Layer(Head(768, 1000, tokens=True), 7)
    assert network((16, ["mb3d"]), (24, ["mb4d"])).layers()[-1] == Layer(Head(24, 10, tokens=False), 8)
    assert network((16, ["mb3d"]), (24, [])).layers()[-1] == Layer(Head(24, 10, tokens=False), 8)


def test_empty_slots_have_no_layers() -> None:
    padded = network((16, ["identity", "mb4d", "identity"]), (24, ["mb4d", "identity", "mb3d"]))
    assert padded.without_identity() == network((16, ["mb4d"]), (24, ["mb4d", "mb3d"]))
    assert padded.layers() == padded.without_identity().layers()


def test_a_layer_reads_as_its_knobs_and_resolution() -> None:
    assert str(Layer(MB4D(48), 56)) == "mb4d(dim=48) at 56 px"
    assert str(Layer(MB3D(448, num_heads=4), 7)) == "mb3d(dim=448, num_heads=4) at 7 px"


# -- Round trip --------------------------------------------------------------------------------------------------------


def _round_trip(arch: ArchConfig, folder: Path) -> ArchConfig:
    arch.save(folder / "arch.yaml")
    return ArchConfig.load(folder / "arch.yaml")


@pytest.mark.parametrize("path", ZOO, ids=lambda path: path.stem)
def test_a_published_network_is_its_file(path: Path, tmp_path: Path) -> None:
    arch = ArchConfig.load(path)
    assert arch.name == path.stem
    assert _round_trip(arch, tmp_path) == arch
    assert _round_trip(arch.at(192).with_classes(10), tmp_path) == arch.at(192).with_classes(10)


@pytest.mark.parametrize("name", space_names())
def test_a_sampled_network_is_its_file(name: str, tmp_path: Path) -> None:
    rng, space = random.Random(0), SearchSpace.load(name)
    for arch in [space.sample(rng) for _ in range(50)]:
        assert _round_trip(arch, tmp_path) == arch


def test_knobs_and_awkward_names_survive_the_file(tmp_path: Path) -> None:
    blocks = (MB4D(16, mlp_ratio=3, pool_size=5), Identity(16), MB3D(16, num_heads=4, key_dim=16, attn_ratio=2))
    for name in ("no", "224", "a: b # c", "Größe\n2", ""):
        arch = ArchConfig(name, 64, 10, (Stage(16, 1, blocks), Stage(24, 1, ())))
        assert _round_trip(arch, tmp_path) == arch


def test_a_file_holds_only_the_knobs_that_differ_from_their_default() -> None:
    arch = ArchConfig("small", 64, 10, (Stage(16, 4, (MB4D(16), MB4D(16, mlp_ratio=3))),))
    assert yaml.safe_load(arch.to_yaml())["stages"][0]["blocks"] == ["mb4d", {"kind": "mb4d", "mlp_ratio": 3}]


# -- What is refused ---------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def put(*keys: str | int, value: object) -> Change:
    """A change of an L1 document: `value` at the end of `keys`."""

    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


STAGE2 = ("stages", 1)
BLOCK = (*STAGE2, "blocks", 0)

BAD: dict[str, tuple[Change, str]] = {
    "image size as text": (put("image_size", value="224"), "image_size must be a whole number, but is '224'"),
    "image size 0": (put("image_size", value=0), "image_size must be a whole number of at least 1, but is 0"),
    "image size as a fraction": (put("image_size", value=224.0), "image_size must be a whole number, but is 224.0"),
    "classes -1": (put("num_classes", value=-1), "num_classes must be a whole number of at least 1, but is -1"),
    "name as a number": (put("name", value=1), "name must be text, but is 1"),
    "an image of 100,000 px": (lambda d: d.update(image_size=100_000), "image_size must be at most 4096, but is 100000"),
    "image size missing": (lambda d: d.pop("image_size"), "the field 'image_size' is missing"),
    "stages missing": (lambda d: d.pop("stages"), "the field 'stages' is missing"),
    "width missing": (lambda d: d["stages"][1].pop("width"), "stage 2: the field 'width' is missing"),
    "blocks missing": (lambda d: d["stages"][1].pop("blocks"), "stage 2: the field 'blocks' is missing"),
    "unknown field": (put("image_sise", value=224), "unknown field 'image_sise': did you mean image_size"),
    "unknown field of a stage": (put(*STAGE2, "widht", value=8), "stage 2: unknown field 'widht': did you mean width"),
    "no stages": (put("stages", value=[]), "stages must be a list with at least one entry, but is []"),
    "stages not a list": (put("stages", value="l1"), "stages must be a list with at least one entry, but is 'l1'"),
    "stage not a mapping": (put(*STAGE2, value=48), "stage 2 must be a mapping of fields, but is 48"),
    "width 0": (put(*STAGE2, "width", value=0), "stage 2: a width must be a positive multiple of 8, but is 0"),
    "width -16": (put(*STAGE2, "width", value=-16), "stage 2: a width must be a positive multiple of 8, but is -16"),
    "width 47": (put(*STAGE2, "width", value=47), "stage 2: a width must be a positive multiple of 8, but is 47"),
    "width as text": (put(*STAGE2, "width", value="48"), "stage 2: width must be a whole number, but is '48'"),
    "width 48.5": (put(*STAGE2, "width", value=48.5), "stage 2: width must be a whole number, but is 48.5"),
    "width true": (put(*STAGE2, "width", value=True), "stage 2: width must be a whole number, but is True"),
    "stride 3": (put("stages", 0, "stride", value=3), "the first stage's stride must be 1, 2 or 4, but is 3"),
    "later stride 4": (
        put(*STAGE2, "stride", value=4),
        "the stride of a stage after the first must be 1 or 2, but is 4",
    ),
    "blocks not a list": (put(*STAGE2, "blocks", value="mb4d"), "stage 2: blocks must be a list, but is 'mb4d'"),
    "unknown kind": (
        put(*BLOCK, value="mb4"),
        "stage 2: unknown block kind 'mb4': did you mean mb4d or mb3d? allowed:",
    ),
    "kind of another spec": (put(*BLOCK, value="head"), "unknown block kind 'head'"),
    "block as a number": (put(*BLOCK, value=4), "stage 2: a block must be a kind"),
    "block without kind": (put(*BLOCK, value={"mlp_ratio": 4}), "stage 2: a block must be a kind"),
    "unknown knob": (
        put(*BLOCK, value={"kind": "mb4d", "mlp": 4}),
        "stage 2: block mb4d: unknown field 'mlp': did you mean mlp_ratio",
    ),
    "knob of another kind": (put(*BLOCK, value={"kind": "mb4d", "key_dim": 32}), "unknown field 'key_dim'"),
    "knob as text": (put(*BLOCK, value={"kind": "mb4d", "mlp_ratio": "4"}), "mlp_ratio must be a whole number"),
    "knob 0": (put(*BLOCK, value={"kind": "mb3d", "num_heads": 0}), "num_heads must be a whole number of at least 1"),
    "even pool": (put(*BLOCK, value={"kind": "mb4d", "pool_size": 2}), "pool_size must be odd, but is 2"),
    "dim of a block": (put(*BLOCK, value={"kind": "mb4d", "dim": 96}), "a block's dim is its stage's width"),
    "mb4d after mb3d": (
        put(*STAGE2, "blocks", value=["mb3d", "identity", "mb4d"]),
        "stage 2: token blocks must be the last of their stage, but mb4d follows one",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_file_that_is_no_network_is_refused_by_its_field(change: Change, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    document = yaml.safe_load(zoo("l1").to_yaml())
    change(document)
    path.write_text(yaml.safe_dump(document))
    text = refusal(lambda: ArchConfig.load(path))
    assert text.startswith(f"the network file {path}: ")
    assert message in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": the fields 'name', 'image_size', 'num_classes', 'stages' are missing"),
        (b"- name: l1\n- image_size: 224\n", "must hold a mapping of fields, but holds list"),
        (b"name: l1\nstages: [{width: 48, stri", "is not valid YAML (line 2): expected ',' or '}', but got '<stream end>'"),
        (
            b"name: l1\n\timage_size: 224\n",
            r"is not valid YAML (line 2): found character '\t' that cannot start any token: indent with blanks",
        ),
        (
            b"name: !!python/object/apply:os.getcwd []\n",
            "is not valid YAML (line 1): could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.getcwd'",
        ),
        (
            b"name: l1\nimage_size: 32\nstages: []\nimage_size: 64\n",
            "has 'image_size' twice in one mapping (line 4): leave one out",
        ),
        (b"stages: [{width: 64, stride: 2, width: 48}]\n", "has 'width' twice in one mapping (line 1): leave one out"),
        (b"\xff\xfe\xfa", "is no text in UTF-8: save it as such, or give another file"),
    ],
    ids=["empty", "list", "truncated", "tab", "code", "a field twice", "a field twice within", "binary"],
)
def test_a_file_that_is_no_mapping_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert refusal(lambda: ArchConfig.load(path)) == f"the network file {path}{' ' * (message[0] != ':')}{message}"


def test_a_file_cut_off_anywhere_is_refused_or_a_shorter_network(tmp_path: Path) -> None:
    path, text = tmp_path / "cut.yaml", zoo("l1").to_yaml()
    for length in range(0, len(text) - 1, 7):
        path.write_text(text[:length])
        try:
            arch = ArchConfig.load(path)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert len(arch.layers()) < len(zoo("l1").layers()) or arch.layers() == zoo("l1").layers()


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    text = refusal(lambda: ArchConfig.load(missing))
    assert text == (
        f"the network file {missing} cannot be read (No such file or directory): give the path of a network's YAML file"
    )
    assert refusal(lambda: ArchConfig.load(tmp_path)).startswith(f"the network file {tmp_path} cannot be read")


def test_specs_made_in_code_are_checked_too() -> None:
    assert "dim 24 stands in a stage of width 16" in refusal(lambda: Stage(16, 4, (MB4D(24),)))
    assert "mb4d follows" in refusal(lambda: Stage(16, 4, (MB3D(16), MB4D(16))))
    assert "dim must be" in refusal(lambda: MB4D(0))
    assert "key_dim must be" in refusal(lambda: MB3D(16, key_dim=True))
    assert "has no stages" in refusal(lambda: ArchConfig("none", 64, 10, ()))
    assert "image_size must be" in refusal(lambda: zoo("l1").at(0))
    assert "num_classes must be" in refusal(lambda: zoo("l1").with_classes(0))


# -- The order of the house --------------------------------------------------------------------------------------------


def test_supernet_never_imports_nas() -> None:
    for path in (ROOT / "supernet").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            assert not [name for name in names if name.split(".")[0] == "nas"], f"{path}, line {node.lineno}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", ["supernet.arch", "supernet.space"])
def test_networks_and_spaces_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'numpy', 'pandas'}} & set(sys.modules)))"
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_lists_are_as_good_as_tuples() -> None:
    """What is made in Python from lists hashes, and equals what a file says."""
    sandwich = Sandwich(16, num_heads=2, q_kernels=[5, 3])  # type: ignore[arg-type]
    of_lists = ArchConfig("small", 32, 5, [Stage(16, 4, [MB4D(16), sandwich])])  # type: ignore[arg-type]
    of_tuples = ArchConfig("small", 32, 5, (Stage(16, 4, (MB4D(16), Sandwich(16, num_heads=2, q_kernels=(5, 3)))),))
    assert of_lists == of_tuples and hash(of_lists) == hash(of_tuples)
    assert ArchConfig.from_dict(yaml.safe_load(of_lists.to_yaml()), "it") == of_lists


def test_what_replaces_a_merged_field_is_no_repetition() -> None:
    found = parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: {<<: *a, x: 4}\n", "a file")
    assert (found["b"], found["c"]) == ({"x": 3, "y": 2}, {"x": 4, "y": 2})
