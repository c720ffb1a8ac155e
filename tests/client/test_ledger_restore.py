"""A restore never forgets: whatever either file knows is charged, and what nobody knows is declared."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from client.chain import intact
from client.ledger import Ledger
from client.restore import restore
from conf.exits import Exit, Stop
from strategies.privacy.accountant import Entry

STEP = Entry(10.0, 0.1, 5)


class Place:
    """A ledger with a backup of its first two entries, and its anchor after four."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.backup = folder, folder / "ledger.jsonl", folder / "backup"
        book = Ledger(self.path, None)
        for n in range(4):
            book.reserve(STEP, run=f"run{n}")
            if n == 1:
                shutil.copy(self.path, self.backup)
        self.anchor = book.head

    def lose(self) -> None:
        for name in ("ledger.jsonl", "ledger.head"):
            (self.folder / name).unlink()

    @property
    def runs(self) -> list[str]:
        return [line.run for line in Ledger(self.path, None).lines()[0]]


@pytest.fixture
def place(ram: Path) -> Place:
    return Place(ram)


def test_a_deleted_ledger_comes_back_whole(place: Place) -> None:
    shutil.copy(place.path, place.backup)
    place.lose()
    done = restore(place.path, place.backup, place.anchor, [], "patients")
    assert (done.lines, done.added, done.kept) == (4, 0, None)
    book = Ledger(place.path, None)
    book.check(place.anchor)
    book.reserve(STEP, run="next")
    assert place.runs == ["run0", "run1", "run2", "run3", "next"]
    assert (place.path.stat().st_mode & 0o777) == 0o600


def test_what_nobody_remembers_has_to_be_declared(place: Place) -> None:
    place.lose()
    with pytest.raises(Stop, match="releases are missing; find a newer backup, or declare") as caught:
        restore(place.path, place.backup, place.anchor, [], "patients")
    assert caught.value.exit is Exit.LEDGER_BROKEN
    with pytest.raises(Stop, match="it has 0 lines, and never ended"):
        Ledger(place.path, None).check(place.anchor)
    restore(place.path, place.backup, place.anchor, [Entry(10.0, 0.1, 12)], "patients")
    book = Ledger(place.path, None)
    book.check(place.anchor)
    assert book.entries() == [Entry(10.0, 0.1, 22)]
    assert place.runs == ["run0", "run1", "declared"]
    # once more, with the anchor there, nothing is charged twice
    done = restore(place.path, place.backup, place.anchor, [], "patients")
    assert done.added == 0
    assert place.runs == ["run0", "run1", "declared"]
    with pytest.raises(Stop, match="nothing is missing; leave --lost out"):
        restore(place.path, place.backup, place.anchor, [STEP], "patients")


def test_an_old_anchor_does_not_outweigh_the_head_beside_the_ledger(place: Place) -> None:
    early = intact(place.backup.read_bytes())[-1][1].digest
    place.path.unlink()
    with pytest.raises(Stop, match=f"ever ended with {place.anchor.hex()}: releases are missing"):
        restore(place.path, place.backup, bytes.fromhex(early), [], "patients")
    restore(place.path, place.backup, bytes.fromhex(early), [STEP, STEP], "patients")
    Ledger(place.path, None).check(place.anchor)
    assert place.runs == ["run0", "run1", "declared", "declared"]


@pytest.mark.parametrize("torn", [b"", b"{}", b"[1]"])
def test_without_a_head_the_anchor_decides(place: Place, torn: bytes) -> None:
    (place.folder / "ledger.head").write_bytes(torn)
    restore(place.path, place.backup, place.anchor, [], "patients")
    assert place.runs == ["run0", "run1", "run2", "run3"]


@pytest.mark.parametrize("holds_anchor", [True, False])
def test_where_two_histories_part_both_count(place: Place, holds_anchor: bool) -> None:
    shutil.copy(place.path, place.backup)
    place.lose()
    fresh = Ledger(place.path, None)
    for name in "abcdef":
        fresh.reserve(STEP, run=name)
    anchor = place.anchor if holds_anchor else fresh.head
    done = restore(place.path, place.backup, anchor, [], "patients")
    assert sorted(place.runs) == ["a", "b", "c", "d", "e", "f", "run0", "run1", "run2", "run3"]
    assert done.kept is not None
    assert done.kept.is_file()
    Ledger(place.path, None).check(anchor)


def test_an_edited_line_is_not_believed_to_be_all(place: Place) -> None:
    content = place.path.read_bytes()
    lines = content.splitlines(keepends=True)
    place.path.write_bytes(b"".join([*lines[:3], lines[3].replace(b"run3", b"run9")]))
    with pytest.raises(Stop, match=r"its last line is not the one that ledger\.head knows"):
        Ledger(place.path, None).head  # noqa: B018
    with pytest.raises(Stop, match="releases are missing"):
        restore(place.path, place.backup, place.anchor, [], "patients")
    with pytest.raises(Stop, match="releases are missing"):
        restore(place.path, place.path, place.anchor, [], "patients")
    restore(place.path, place.backup, place.anchor, [STEP], "patients")
    assert place.runs == ["run0", "run1", "run2", "run9", "declared"]


def test_killed_between_its_two_renames_it_is_repeated(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(place.path, place.backup)
    older = (place.folder / "ledger.head").read_bytes()
    restore(place.path, place.backup, place.anchor, [], "patients")
    Ledger(place.path, None).reserve(STEP, run="later")
    (place.folder / "ledger.head").write_bytes(older)
    with pytest.raises(Stop, match="more than one line follows"):
        Ledger(place.path, None).check(place.anchor)
    restore(place.path, place.backup, place.anchor, [], "patients")
    assert place.runs == ["run0", "run1", "run2", "run3", "later"]


def test_what_is_no_backup(place: Place) -> None:
    with pytest.raises(Stop, match="cannot be read"):
        restore(place.path, place.folder / "no", place.anchor, [], "patients")
    place.backup.write_text("ledger\n")
    with pytest.raises(Stop, match="its first line is none"):
        restore(place.path, place.backup, place.anchor, [], "patients")


def test_a_process_that_waits_meanwhile_writes_to_the_restored_one(place: Place) -> None:
    running = Ledger(place.path, None)
    running.reserve(STEP, run="run4")
    shutil.copy(place.path, place.backup)
    restore(place.path, place.backup, running.head, [], "patients")
    running.reserve(STEP, run="run5")
    assert place.runs == [f"run{n}" for n in range(6)]
