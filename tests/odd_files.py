"""Files as they come: right, slightly wrong, or no such file at all; and what a reader may do with them."""

import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from supernet.errors import LONGEST, InputError

ODD_VALUES = st.one_of(
    st.sampled_from(
        [
            *(None, True, False, 0, -1, 1, 7, 2**16 + 8, 2**31, 10**9, 10**18, 2**64, 10**500, -(10**30)),
            *(0.0, -0.5, 1.5, 1e-320, 1e308, math.nan, math.inf, -math.inf),
            *(
                "",
                " ",
                "0",
                "-3",
                "1e999",
                "nan",
                "true",
                "a\nb",
                "\x1b[2J",
                "\x00",
                "\u202e",
                "é",
                "😀",
                "x" * 5000,
                "2024-13-45",
            ),
            *("~", "../../x", "/", "a: b", "- a", "no.py:Block", "mb4d", "identity", "stem", "None", "1_000", "\ud800"),
            *([], {}, [[]], [{}], [None], ["a", "a"], {"": None}, {1: 2}, {"kind": 3}, {"kind": "mb3d", "num_heads": []}),
            {"min": 8, "max": 10**12, "step": 8},
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(-2, 70), max_size=4),
)

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
ODD_TEXTS = [
    *(
        "",
        " ",
        "\n",
        "\ufeff",
        "\t",
        "null",
        "[]",
        "{}",
        "a",
        "- a\n- b",
        "name: [",
        "name: 'x",
        "{{}: 1}",
        "? [a]\n: b",
        "!!python/none",
    ),
    *(
        "!!python/object/apply:os.system [touch marker]",
        "&a [*a]",
        "&a {b: *a}",
        "<<: 3",
        "a: 1\na: 2",
        "--- 1\n--- 2",
        "%YAML 9.9",
    ),
    *(
        "[" * 5000,
        "{a: " * 3000,
        '{"a":' * 3000,
        BOMB,
        "a: " + "9" * 6000,
        "a: 0x" + "f" * 6000,
        "!!timestamp x",
        "!!binary '?'",
        "=: 1",
    ),
    *(
        "!!int x",
        "!!float x",
        "!!bool x",
        "!!set [a]",
        "!!omap 3",
        "!!pairs 3",
        "a: 1:2:3:99999999999",
        "a,b\n1\n",
        '"',
        "a,a\n1,2\n",
    ),
    *("network,ms\n" + '"' * 7 + "\n", "a" * 200_000, "\x00" * 50, "a: 2024-13-45", '{"a": NaN}', '{"a": 1e999}', '"\\ud800"'),
]


def places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document: the keys and numbers that lead there."""
    found = [at] if at else []
    pairs = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    return found + [place for key, value in pairs for place in places(value, (*at, key))]


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """The document with one value, or a few, replaced, removed, added, repeated, renamed or put into a list."""
    found = deepcopy(document)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        every = places(found)
        if not every:
            break
        *way, last = draw(st.sampled_from(every))
        inside = found
        for key in way:
            inside = inside[key]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "repeat", "rename", "wrap", "text"])):
            case "remove":
                del inside[last]
            case "repeat" if isinstance(inside, list):
                inside.insert(0, deepcopy(inside[last]))
            case "add" if isinstance(inside, dict):
                inside[draw(st.sampled_from(["extra", "Name", "", 3, "__class__", "dim", "stride", "kind"]))] = deepcopy(
                    draw(ODD_VALUES)
                )
            case "rename" if isinstance(inside, dict):
                inside[f"{last}_"] = inside.pop(last)
            case "wrap":
                inside[last] = [inside[last]]
            case "text":
                inside[last] = str(inside[last])
            case _:
                inside[last] = deepcopy(draw(ODD_VALUES))  # it may be changed in its turn
    return found


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes as they are, cut, with others between, before or in the place of some; or others altogether."""
    match draw(
        st.sampled_from(
            ["as it is", "cut", "cut", "insert", "overwrite", "mark", "lines", "tabs", "latin", "utf-16", "odd", "raw"]
        )
    ):
        case "cut":
            return whole[: draw(st.integers(0, len(whole)))]
        case "insert":
            at = draw(st.integers(0, len(whole)))
            return (
                whole[:at]
                + draw(st.sampled_from([b"\0", b"\xff", b"\t", b"\r", b'"', b",", b"\n", b"&a ", b"*a", b"\xc3"]))
                + whole[at:]
            )
        case "overwrite":
            at, new = draw(st.integers(0, len(whole))), draw(st.binary(max_size=8))
            return whole[:at] + new + whole[at + len(new) :]
        case "mark":
            return b"\xef\xbb\xbf" + whole
        case "lines":
            return whole.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r", b"\n\n", b""])))
        case "tabs":
            return whole.replace(b"  ", b"\t")
        case "latin":
            return whole.replace(b"a", "é".encode("latin-1"), 1)
        case "utf-16":
            return whole.decode("utf-8", "replace").encode("utf-16")
        case "odd":
            return draw(st.sampled_from(ODD_TEXTS)).encode("utf-8", "surrogatepass")
        case "raw":
            return draw(
                st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
            )
    return whole


def yaml_files(text: str) -> st.SearchStrategy[bytes]:
    """YAML files that are like a right one, more or less."""

    def dumped(document: Any) -> bytes:
        return yaml.dump(document, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")

    document = yaml.safe_load(text)
    return st.one_of(changed(document).map(dumped), changed(document).map(dumped), damaged(text.encode()))


def json_files(text: str) -> st.SearchStrategy[bytes]:
    """JSON files that are like a right one, more or less."""
    document = json.loads(text)
    changes = changed(document).map(lambda found: json.dumps(found, default=str, skipkeys=True).encode())
    return st.one_of(changes, changes, damaged(text.encode()))


def csv_files(text: str) -> st.SearchStrategy[bytes]:
    """CSV files that are like a right one, more or less: other cells, lines and columns."""
    table = [line.split(",") for line in text.splitlines()]

    def joined(lines: Any) -> bytes:
        cells = ([str(c) for c in line] if isinstance(line, list) else [str(line)] for line in lines)
        return "".join(",".join(line) + "\n" for line in cells).encode("utf-8", "surrogatepass")

    return st.one_of(changed(table).map(joined), changed(table).map(joined), damaged(text.encode()))


def used_or_refused(read: Callable[[], object], *names: str) -> bool:
    """Whether a file is used; where it is refused, it is in one line that can be printed and names the file, or its folder."""
    try:
        read()
    except InputError as error:
        message = str(error)
        assert message.isprintable() and "\n" not in message, message
        assert len(message) < LONGEST + 400, len(message)
        assert any(name in message for name in names), message
        return False
    return True


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
