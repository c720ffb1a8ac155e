"""Replies from outside are judged, never trusted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from server.exchange.crew import accepted
from strategies.protocol import CODES, Failure, Refused, Reply, Spec, Tree, Update, pack, unpack

SPEC = Spec(
    {"delta/w": ((2, 3), torch.float32), "sums/n": ((), torch.float64)}, max_weight=100, max_value=8.0
)


def good() -> Tree:
    tensors = {"delta/w": torch.full((2, 3), 8.0), "sums/n": torch.tensor(-8.0, dtype=torch.float64)}
    return Reply("a", Update(tensors, weight=100)).to_tree()


def at(path: str, value: Any) -> Callable[[Tree], Any]:
    """The good reply with one thing changed; a value of `...` removes it."""

    def change(tree: Tree) -> Any:
        *way, last = path.split(".")
        node = tree
        for key in way:
            node = node[key]
        if value is ...:
            del node[last]
        else:
            node[last] = value
        return tree

    return change


def held(name: str, value: Any) -> Callable[[Tree], Any]:
    def change(tree: Tree) -> Any:
        tensors = tree["update"]["tensors"]
        if value is ...:
            del tensors[name]
        else:
            tensors[name] = value
        return tree

    return change


def one(value: float) -> Tensor:
    found = torch.zeros(2, 3)
    found[1, 2] = value
    return found


BAD: dict[str, tuple[str, Callable[[Tree], Any]]] = {
    "not a dict": ("form", lambda tree: [tree]),
    "nothing": ("form", lambda tree: None),
    "a tensor": ("form", lambda tree: torch.zeros(3)),
    "empty": ("form", lambda tree: {}),
    "extra key": ("form", at("extra", 1)),
    "no site": ("form", at("site", ...)),
    "site is a number": ("form", at("site", 1)),
    "site is a tensor": ("form", at("site", torch.zeros(3))),
    "other site": ("addressee", at("site", "b")),
    "update is a list": ("form", at("update", [])),
    "update is a tensor": ("form", at("update", torch.zeros(2))),
    "update has an extra key": ("form", at("update.patients", 3)),
    "update lacks its weight": ("form", at("update.weight", ...)),
    "tensors is a list": ("form", at("update.tensors", [torch.zeros(2, 3)])),
    "tensors holds a number": ("form", at("update.tensors.sums/n", 1.0)),
    "tensors holds a dict": ("form", at("update.tensors.sums/n", {"w": torch.zeros(())})),
    "ring": ("form", at("update.form", "ring")),
    "unknown form": ("form", at("update.form", "sparse")),
    "form is a tensor": ("form", at("update.form", torch.zeros(3))),
    "form is a list": ("form", at("update.form", ["plain"])),
    "weight True": ("weight", at("update.weight", True)),
    "weight -1": ("weight", at("update.weight", -1)),
    "weight 0": ("weight", at("update.weight", 0)),
    "weight 101": ("weight", at("update.weight", 101)),
    "weight 1e9": ("weight", at("update.weight", 10**9)),
    "weight 1e9 as a float": ("weight", at("update.weight", 1e9)),
    "weight 1.5": ("weight", at("update.weight", 1.5)),
    "weight '3'": ("weight", at("update.weight", "3")),
    "weight NaN": ("weight", at("update.weight", math.nan)),
    "weight None": ("weight", at("update.weight", None)),
    "weight a tensor": ("weight", at("update.weight", torch.tensor([3, 4]))),
    "weight a list": ("weight", at("update.weight", [3])),
    "missing name": ("names", held("delta/w", ...)),
    "extra name": ("names", held("private/v", torch.zeros(1))),
    "no tensor": ("names", at("update.tensors", {})),
    "transposed": ("shape", held("delta/w", torch.zeros(3, 2))),
    "flat": ("shape", held("delta/w", torch.zeros(6))),
    "one for all": ("shape", held("delta/w", torch.zeros(()))),
    "one more dimension": ("shape", held("sums/n", torch.zeros(1, dtype=torch.float64))),
    "empty tensor": ("shape", held("delta/w", torch.zeros(0, 3))),
    "float64 for float32": ("shape", held("delta/w", torch.zeros(2, 3, dtype=torch.float64))),
    "int64": ("shape", held("delta/w", torch.zeros(2, 3, dtype=torch.int64))),
    "bool": ("shape", held("delta/w", torch.zeros(2, 3, dtype=torch.bool))),
    "complex": ("shape", held("delta/w", torch.zeros(2, 3, dtype=torch.complex64))),
    "NaN": ("finite", held("delta/w", one(math.nan))),
    "Inf": ("finite", held("delta/w", one(math.inf))),
    "-Inf": ("finite", held("sums/n", torch.tensor(-math.inf, dtype=torch.float64))),
    "just beyond": ("range", held("delta/w", one(math.nextafter(8.0, 9.0) + 1e-6))),
    "just beyond, negative": ("range", held("sums/n", torch.tensor(-8.0 - 1e-12, dtype=torch.float64))),
    "far beyond": ("range", held("delta/w", one(3e38))),
}


def judge(tree: Any) -> Update:
    return accepted(Reply.from_tree(tree), "a", SPEC)


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_reply_is_refused_with_its_code(case: str) -> None:
    code, change = BAD[case]
    assert code in CODES
    with pytest.raises(Refused, match=code) as refusal:
        judge(change(good()))
    assert refusal.value.code == code


def test_a_reply_at_the_limit_is_accepted_and_survives_the_wire() -> None:
    update = judge(unpack(pack(good())))
    assert (update.weight, update.form) == (100, "plain")
    for name, tensor in good()["update"]["tensors"].items():
        assert update.tensors[name].equal(tensor)
        assert update.tensors[name].dtype == tensor.dtype


@pytest.mark.parametrize(
    "failure",
    [
        ["nonsense", "1234"],
        ["data", "x" * 17],
        ["data"],
        ["data", "1", "2"],
        ["data", 7],
        [["data"], "1"],
        "data",
        None,
        {"code": "data"},
        [torch.zeros(2), "1"],
    ],
)
def test_a_malformed_failure_is_refused(failure: Any) -> None:
    with pytest.raises(Refused, match="form"):
        judge({"site": "a", "failure": failure})


def test_a_failure_needs_its_site_and_nothing_else() -> None:
    with pytest.raises(Refused, match="form"):
        judge({"site": torch.zeros(2), "failure": ["data", "1"]})
    with pytest.raises(Refused, match="form"):
        judge({"site": "a", "failure": ["data", "1"], "detail": "/home/x"})


@pytest.mark.parametrize("code", CODES)
def test_every_code_travels_and_comes_back_as_it_is(code: str) -> None:
    tree = unpack(pack(Reply("a", Failure(code, "01234567")).to_tree()))
    with pytest.raises(Refused, match=code) as refusal:
        judge(tree)
    assert refusal.value.code == code


def test_a_failure_is_made_only_of_a_known_code() -> None:
    with pytest.raises(ValueError, match="'oops'; known: plan, code"):
        Failure("oops")


def test_a_body_that_is_neither_is_quarantined() -> None:
    with pytest.raises(Refused, match="form"):
        accepted(Reply("a", {"loss": 1.0}), "a", SPEC)  # type: ignore[arg-type]


def test_unbounded_values_are_accepted_where_nothing_is_summed() -> None:
    spec = Spec({"s/n": ((1,), torch.float64)}, 1, 0.0)
    spec.check(Update({"s/n": torch.tensor([1e300], dtype=torch.float64)}))
