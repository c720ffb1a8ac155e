"""The encoding is canonical, round-trips, and reads any bytes without harm."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies.protocol import (
    Instruction,
    Refused,
    Reply,
    Tree,
    digest,
    fill,
    pack,
    pack_file,
    strip,
    unpack,
)

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def bits(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def same(a: object, b: object) -> bool:
    """Equal in type, shape and bits (NaN and -0.0 included); a tuple comes back as a list."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and bits(a).equal(bits(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Whole, transposed, sliced, expanded, empty and 0-dim tensors of any bits."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    raw = draw(st.binary(min_size=8 * math.prod(shape), max_size=8 * math.prod(shape)))
    flat = torch.frombuffer(bytearray(raw + bytes(8)), dtype=torch.uint8)
    flat = flat.bool() if dtype == torch.bool else flat.view(dtype)
    base = flat[: math.prod(shape)].reshape(shape)
    match draw(st.sampled_from(("whole", "transposed", "sliced", "expanded"))):
        case "transposed":
            return base.t() if base.dim() == 2 else base.movedim(0, -1) if base.dim() else base
        case "sliced" if base.dim() and base.shape[0]:
            return base[::2]
        case "expanded" if base.dim() == 0:
            return base.expand(2, 3)
    return base


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
keys = st.text().filter(lambda key: key != "$tensor")
nodes = st.recursive(
    scalars | tensors(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
trees = st.dictionaries(keys, nodes, max_size=4)


def backwards(node: Any) -> Any:
    """The same tree, its dicts filled in the opposite order, its tensors copied."""
    if isinstance(node, dict):
        return {key: backwards(node[key]) for key in reversed(list(node))}
    if isinstance(node, list):
        return [backwards(item) for item in node]
    return node.clone() if isinstance(node, Tensor) else node


@given(trees)
@settings(max_examples=100, deadline=None)
def test_pack_round_trips_and_is_canonical(tree: Tree) -> None:
    blob = pack(tree)
    assert same(tree, unpack(blob))
    assert pack(backwards(tree)) == blob
    assert pack(unpack(blob)) == blob
    assert digest(blob) == hashlib.sha256(blob).hexdigest()


def test_tensors_that_share_memory_and_views_pack_apart() -> None:
    base = torch.arange(12.0)
    views = {"all": base, "again": base, "tail": base[6:], "every": base[::3], "wide": base[:1].expand(4)}
    back = unpack(pack(views))
    assert same(views, back)
    back["all"] += 1
    assert back["again"].equal(torch.arange(12.0))
    assert back["tail"].equal(torch.arange(6.0, 12.0))
    # a view into a large storage carries only itself
    assert len(pack({"x": torch.zeros(2**20)[:4]})) < 1000


def test_parameters_lose_their_graph() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    back = unpack(pack({"w": weight, "y": weight * 2}))
    assert not back["w"].requires_grad
    assert back["y"].equal(torch.full((2,), 2.0))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"x": {1, 2}}, "scalars and tensors; got set"),
        ({"x": b"bytes"}, "scalars and tensors; got bytes"),
        ({"x": math.nan}, "not JSON compliant"),
        ({"x": math.inf}, "not JSON compliant"),
        ({1: 2}, "keys must be strings"),
        ({"x": {"$tensor": "000000"}}, "keys must be strings other than"),
    ],
)
def test_pack_refuses_what_is_no_tree(tree: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(tree)


def test_depth_is_bounded_on_both_ways() -> None:
    deep: Any = 0
    for _ in range(32):
        deep = {"d": deep}
    assert same(deep, unpack(pack(deep)))
    with pytest.raises(ValueError, match="deeper than 32"):
        pack({"d": deep})
    text = '{"a":' * 100_000 + "1" + "}" * 100_000
    with pytest.raises((ValueError, RecursionError), match=r"deep|recursion"):
        fill(text, {})


SAMPLE: Tree = {
    "site": "a",
    "update": {"tensors": {"delta/w": torch.arange(3.0), "n": torch.tensor(2)}, "weight": 3, "form": "plain"},
}


def read(blob: bytes) -> None:
    """Whatever the bytes: a tree or `Refused`; of the tree, a reply or `Refused`."""
    with suppress(Refused):
        tree = unpack(blob)
        assert isinstance(tree, dict)
        Reply.from_tree(tree)


def test_truncated_anywhere_is_refused() -> None:
    blob = pack(SAMPLE)
    for size in range(len(blob)):
        with pytest.raises(Refused, match="payload"):
            unpack(blob[:size])
    with pytest.raises(Refused, match="payload"):
        unpack(blob + b"\0")


def test_any_flipped_bit_gives_a_tree_or_refused() -> None:
    blob = pack(SAMPLE)
    for at in range(len(blob)):
        for bit in range(8):
            read(blob[:at] + bytes([blob[at] ^ (1 << bit)]) + blob[at + 1 :])


@given(st.binary(max_size=200), st.data())
@settings(max_examples=100, deadline=None)
def test_any_bytes_give_a_tree_or_refused(noise: bytes, data: st.DataObject) -> None:
    read(noise)
    blob = pack(SAMPLE)
    start = data.draw(st.integers(0, len(blob)))
    stop = data.draw(st.integers(start, len(blob)))
    read(blob[:start] + noise + blob[stop:])


def crafted(entries: Tree, metadata: Tree | None, payload: bytes = b"") -> bytes:
    header = json.dumps({**({} if metadata is None else {"__metadata__": metadata}), **entries}).encode()
    return struct.pack("<Q", len(header)) + header + payload


def entry(dtype: str, shape: list[int], size: int) -> Tree:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


TWICE = '{"a":{"$tensor":"t"},"b":{"$tensor":"t"}}'


@pytest.mark.parametrize(
    "blob",
    [
        crafted({}, None),
        crafted({}, {"other": "{}"}),
        crafted({}, {"wardround": "[]"}),
        crafted({}, {"wardround": "1"}),
        crafted({}, {"wardround": "not json"}),
        crafted({}, {"wardround": '{"x":{"$tensor":"000000"}}'}),  # no such tensor
        crafted({}, {"wardround": '{"x":{"$tensor":[]}}'}),
        crafted({"t": entry("F32", [1], 4)}, {"wardround": "{}"}, bytes(4)),  # one that nobody refers to
        crafted({"t": entry("F32", [1], 4)}, {"wardround": TWICE}, bytes(4)),
        crafted({"t": entry("F32", [0, 2**62, 8], 0)}, {"wardround": '{"a":{"$tensor":"t"}}'}),
        crafted({"t": entry("F32", [0, 2**64 - 1], 0)}, {"wardround": '{"a":{"$tensor":"t"}}'}),
        crafted({"t": entry("F8_E8M0", [1], 1)}, {"wardround": '{"a":{"$tensor":"t"}}'}, bytes(1)),
        crafted({"t": entry("F4", [2], 1)}, {"wardround": '{"a":{"$tensor":"t"}}'}, bytes(1)),
        crafted({}, {"wardround": '{"a":' * 5000 + "1" + "}" * 5000}),
        crafted({}, {"wardround": '{"a":' + "9" * 5000 + "}"}),
        crafted({}, {"wardround": '{"$tensor":"t","x":1}'}),
        crafted({}, {"wardround": '{"a":NaN}'}),
        crafted({}, {"wardround": '{"a":-Infinity}'}),
        crafted({}, {"wardround": '{"a":1,"a":2}'}),
        b"\xff" * 8,
        b"",
    ],
)
def test_crafted_blobs_are_refused(blob: bytes) -> None:
    with pytest.raises(Refused, match="payload"):
        unpack(blob)


def test_strip_and_fill_are_each_others_inverse() -> None:
    text, held = strip(SAMPLE)
    assert same(SAMPLE, fill(text, held))
    with pytest.raises(ValueError, match="not a tree"):
        fill(text, {**held, "extra": torch.zeros(1)})
    with pytest.raises(KeyError, match="000000"):
        fill(text, {})


BASE = Instruction("run", 3, 0, "train", "a", (2, 0), "plan", "code", "common", {"x": torch.zeros(2)})


@pytest.mark.parametrize(
    "change",
    [
        {"run": "other"},
        {"round": 4},
        {"attempt": 1},
        {"stage": "train/1"},
        {"site": "b"},
        {"settled": None},
        {"settled": (2, 1)},
        {"settled": (1, 0)},
        {"plan": "other"},
        {"code": "other"},
        {"common": "other"},
        {"own": {}},
        {"own": {"x": torch.zeros(2, dtype=torch.float64)}},
        {"own": {"x": torch.tensor([0.0, -0.0])}},
        {"own": {"x": torch.zeros(2, 1)}},
    ],
)
def test_every_field_enters_the_digest(change: dict[str, Any]) -> None:
    assert dataclasses.replace(BASE, **change).digest != BASE.digest
    assert dataclasses.replace(BASE).digest == BASE.digest


def test_every_field_of_an_instruction_has_a_case_above() -> None:
    cases = test_every_field_enters_the_digest.pytestmark[0].args[1]
    assert {name for change in cases for name in change} == {f.name for f in dataclasses.fields(Instruction)}


def test_a_file_holds_what_pack_gives(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tree = {
        "a": [shared, shared.reshape(2, 3).T, torch.tensor(3, dtype=torch.int64)],
        "b": {"c": 1.5, "d": None},
    }
    found = pack_file(tree, tmp_path / "tree")
    assert (tmp_path / "tree").read_bytes() == pack(tree)
    assert found == digest(pack(tree))
    with pytest.raises(OSError, match="No such file"):
        pack_file(tree, tmp_path / "none" / "tree")
