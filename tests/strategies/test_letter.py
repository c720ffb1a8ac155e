"""Calls and answers come through Flower's own records as they went in; anything else is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import letter
from strategies.letter import Answer, Call, Unreadable
from strategies.protocol import Instruction, Refused, pack, unpack

KEY = "0" * 64


def through(content: RecordDict) -> RecordDict:
    """What the other end gets: every object taken apart and put together by Flower."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    contents = {name: part.deflate() for name, part in get_all_nested_objects(content).items()}
    made = inflate_object_from_contents(content.object_id, contents)
    assert isinstance(made, RecordDict)
    return made


@settings(deadline=None, max_examples=20)
@given(
    operation=st.sampled_from(letter.OPERATIONS),
    wait=st.floats(0, 3600),
    instruction=st.binary(max_size=50),
    common=st.binary(max_size=50),
)
def test_calls_return(operation: str, wait: float, instruction: bytes, common: bytes) -> None:
    call = Call(operation, KEY, wait, instruction, common)
    assert Call.from_content(through(call.to_content())) == call


@pytest.mark.parametrize("size", [0, letter.SMALL, letter.SMALL + 1, 3 * letter.SMALL])
def test_small_and_large_blobs_return(size: int) -> None:
    blob = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    call, answer = Call("train", KEY, 1.0, b"i", blob), Answer("reply", KEY, blob)
    assert Call.from_content(through(call.to_content())) == call
    assert Answer.from_content(through(answer.to_content())) == answer
    # a large payload is an object of its own, and the same one in every site's call
    other = dataclasses.replace(call, instruction=b"another site's").to_content()
    arrays = call.to_content().array_records
    assert len(arrays) == (size > letter.SMALL)
    assert {n: a.object_id for n, a in arrays.items()} == {
        n: a.object_id for n, a in other.array_records.items()
    }


FINE: dict[str, Any] = {
    "operation": "train",
    "key": KEY,
    "wait_s": 1.0,
    "instruction": b"",
    "common": b"",
}


@pytest.mark.parametrize(
    "change",
    [
        {"operation": "execute"},
        {"key": "short"},
        {"key": 5},
        {"wait_s": -1.0},
        {"wait_s": float("nan")},
        {"wait_s": "1"},
        {"instruction": "text"},
        {"common": "text"},
    ],
)
def test_other_words_are_no_call(change: dict[str, Any]) -> None:
    with pytest.raises(Unreadable, match="no "):
        Call.from_content(RecordDict({"call": ConfigRecord(FINE | change)}))


def test_other_records_are_no_call() -> None:
    array = Array(dtype="uint8", shape=(1,), stype="numpy.ndarray", data=b"x")
    words = {key: value for key, value in FINE.items() if key != "common"}
    for content in (
        RecordDict(),
        RecordDict({"call": MetricRecord({"a": 1})}),
        RecordDict({"call": ConfigRecord(FINE), "more": ConfigRecord()}),
        RecordDict({"call": ConfigRecord(words)}),
        RecordDict({"call": ConfigRecord(words), "common": ArrayRecord({"common": array})}),
    ):
        with pytest.raises(Unreadable, match=r"records|blob"):
            Call.from_content(content)
    with pytest.raises(Unreadable, match="no answer"):
        Answer.from_content(RecordDict({"answer": ConfigRecord({"status": "fine", "key": "", "blob": b""})}))


ASKED = Instruction("run", 3, 0, "train", "a", (2, 1), "p", "c", "d", {"x": [1]})


@pytest.mark.parametrize("settled", [None, (2, 1)])
def test_instructions_return(settled: tuple[int, int] | None) -> None:
    asked = dataclasses.replace(ASKED, settled=settled)
    assert Instruction.from_tree(unpack(pack(asked.to_tree()))) == asked


@pytest.mark.parametrize(
    "change",
    [
        {"round": -1},
        {"round": "1"},
        {"settled": [1]},
        {"settled": "ab"},
        {"own": []},
        {"site": 1},
        {"more": 1},
    ],
)
def test_other_trees_are_no_instruction(change: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="no instruction"):
        Instruction.from_tree(ASKED.to_tree() | change)
