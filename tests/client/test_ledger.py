"""The ledger: what it allows, what survives, what is seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from client.budget import Budget
from client.ledger import Ledger
from conf.exits import Exit, Stop
from strategies.privacy.accountant import Entry, merged, prv, rdp

ROUND = Entry(1.0, 0.02, 10)


def ledger(folder: Path, **limits: object) -> Ledger:
    return Ledger(folder / "ledger.jsonl", {"patients": Budget.model_validate(limits)})


def test_what_is_reserved_counts_settled_or_not(ram: Path) -> None:
    first = ledger(ram)
    first.reserve(ROUND, run="a").settle()
    first.reserve(ROUND, run="a")
    again = ledger(ram)
    assert again.entries() == [Entry(1.0, 0.02, 20)]
    lines, waiting = again.lines()
    assert [(line.n, line.run, line.entry) for line in lines] == [(1, "a", ROUND), (3, "a", ROUND)]
    assert waiting == {3}
    assert first.head == again.head
    again.settle(3)
    again.settle(3)
    assert again.lines()[1] == set()
    with pytest.raises(ValueError, match="line 2 of the ledger reserves nothing"):
        again.settle(2)


def test_two_processes_worth_of_ledgers_see_each_other(ram: Path) -> None:
    one, other = ledger(ram), ledger(ram)
    for _ in range(3):
        one.reserve(ROUND, run="a")
        other.reserve(ROUND, run="b")
    assert one.entries() == other.entries() == [Entry(1.0, 0.02, 60)]


def test_the_limit_is_prv_and_is_never_passed(ram: Path) -> None:
    book = ledger(ram, epsilon=2.0)
    steps = 0

    def all_that_fits() -> None:
        nonlocal steps
        while True:
            book.reserve(ROUND, run="a", whole=260 - steps)
            steps += 10

    with pytest.raises(Stop, match=r"go beyond site.yaml privacy.patients.epsilon = 2") as caught:
        all_that_fits()
    assert caught.value.exit is Exit.BUDGET
    spent = book.entries()
    assert spent == [Entry(1.0, 0.02, steps)]
    assert prv(spent, 1e-5) <= 2 < prv([Entry(1.0, 0.02, steps + 10)], 1e-5)
    assert rdp(spent, 1e-5) > 2
    # a smaller release still fits
    book.reserve(Entry(50.0, 0.02, 1), run="a", purpose="statistics")


def test_a_run_is_priced_once(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(entries: Iterable[Entry], delta: float) -> float:
        asked.append(merged(entries))
        return prv(asked[-1], delta)

    monkeypatch.setattr("client.ledger.prv", counted)
    book = ledger(ram, epsilon=2.0)
    for done in range(0, 230, 10):
        book.reserve(ROUND, run="a", whole=230 - done)
    assert asked == [(Entry(1.0, 0.02, 230),)]


def test_purposes_and_populations_have_their_own_limits(ram: Path) -> None:
    limits = {"patients": Budget(purposes={"statistics": 0.5}), "children": Budget(min_sigma=2, max_q=0.1)}
    book = Ledger(ram / "ledger.jsonl", limits)
    count = Entry(20.0, 1.0, 1)
    for _ in range(3):
        book.reserve(count, run="a", purpose="statistics")
    with pytest.raises(Stop, match=r"privacy.patients.purposes.statistics = 0.5"):
        book.reserve(replace(count, steps=10), run="a", purpose="statistics")
    book.reserve(count, run="a", purpose="metrics")
    book.reserve(Entry(2.0, 0.1, 1), run="a", population="children")
    assert book.entries("children") == [Entry(2.0, 0.1, 1)]
    before = book.head
    for entry, population, why in (
        (Entry(1.9, 0.1, 1), "children", "sigma is 1.9; site.yaml privacy.children.min_sigma is 2"),
        (Entry(2.0, 0.2, 1), "children", "q is 0.2; site.yaml privacy.children.max_q is 0.1"),
        (ROUND, "staff", "population 'staff' has no budget; site.yaml privacy has patients, children"),
        (Entry(0.0, 1.0, 1), "patients", "sigma is 0"),
    ):
        with pytest.raises(Stop, match=why):
            book.reserve(entry, run="a", population=population)
    assert book.head == before


def test_a_deleted_or_rolled_back_ledger_is_known_by_its_anchor(ram: Path) -> None:
    book = ledger(ram)
    book.check(bytes(32))
    book.reserve(ROUND, run="a")
    early = book.head
    kept = {path: path.read_bytes() for path in ram.iterdir()}
    book.reserve(ROUND, run="a")
    anchor = book.head
    book.check(early)
    book.check(anchor)
    for path, content in kept.items():
        path.write_bytes(content)
    ledger(ram).check(early)
    with pytest.raises(Stop, match=r"it has 1 lines, and never ended with .* ledger restore") as caught:
        ledger(ram).check(anchor)
    assert caught.value.exit is Exit.LEDGER_BROKEN
    with pytest.raises(Stop, match="it has 1 lines, and had 2"):
        book.reserve(ROUND, run="a")
    for path in kept:
        path.unlink()
    with pytest.raises(Stop, match="it has 0 lines"):
        ledger(ram).check(anchor)


def test_without_limits_all_is_recorded(ram: Path) -> None:
    book = Ledger(ram / "ledger.jsonl", None)
    book.reserve(Entry(0.0, 1.0, 1), run="a", population="anyone")
    assert prv(book.entries("anyone"), 1e-5) == float("inf")
