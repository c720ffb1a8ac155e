"""A ledger under SIGKILL, cut at every byte, written by two, and in the order that a crash cannot undo."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from client.budget import Budget
from client.ledger import Ledger
from conf.exits import Exit, Stop
from strategies.privacy.accountant import Entry

PROJECT = Path(__file__).parents[2]
CHAOS = bool(os.environ.get("WARDROUND_CHAOS"))
STEP = Entry(1000.0, 0.001, 1)


def book(folder: Path) -> Ledger:
    return Ledger(folder / "ledger.jsonl", {"patients": Budget()})


def steps(folder: Path) -> int:
    return sum(e.steps for e in book(folder).entries())


@pytest.mark.federation
def test_no_kill_makes_it_forget_a_release(ram: Path) -> None:
    kills = 500 if CHAOS else 40
    done = subprocess.run(
        [
            sys.executable,
            str(PROJECT / "tests/client/chaos_ledger.py"),
            str(ram / "ledger.jsonl"),
            str(kills),
            "7",
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    said = json.loads(done.stdout)
    assert said["under"] == 0
    assert not said["torch"]
    # a kill loses at most the one reservation that was under way, and it stays marked as unsettled
    assert said["most_by_a_kill"] <= 1
    assert 0 < said["over"] <= said["unsettled"] <= kills
    assert said["released"] > kills


def test_cut_at_every_byte_it_refuses_or_forgets_nothing(ram: Path) -> None:
    log, head = ram / "ledger.jsonl", ram / "ledger.head"
    heads = []
    for n in range(4):
        held = book(ram).reserve(STEP, run="a")
        heads.append((n + 1, head.read_bytes()))
        if n % 2:
            held.settle()
            heads.append((n + 1, head.read_bytes()))
    whole, now = log.read_bytes(), head.read_bytes()
    for cut in range(len(whole)):
        log.write_bytes(whole[:cut])
        with pytest.raises(
            Stop, match=r"privacy ledger .* bytes; nothing private is trained before"
        ) as caught:
            book(ram).reserve(STEP, run="b")
        assert caught.value.exit is Exit.LEDGER_BROKEN
        assert log.read_bytes() == whole[:cut]
    log.write_bytes(whole)
    for cut in range(len(now)):
        head.write_bytes(now[:cut])
        with pytest.raises(Stop, match=r"ledger\.head is unreadable"):
            book(ram).reserve(STEP, run="b")
    # a crash inside the last line: what was acknowledged before it counts, and so does a whole line
    known, before = heads[-2]
    start = json.loads(before)["size"]
    for cut in range(start, len(whole) + 1):
        log.write_bytes(whole[:cut])
        head.write_bytes(before)
        assert steps(ram) >= known
        book(ram).reserve(STEP, run="b")
        assert steps(ram) >= known + 1


def test_an_edited_entry_is_seen(ram: Path) -> None:
    for _ in range(3):
        book(ram).reserve(STEP, run="a")
    log = ram / "ledger.jsonl"
    whole = log.read_bytes()
    for old, new in (
        (b'"sigma":1000.0', b'"sigma":9000.0'),
        (b'"steps":1', b'"steps":0'),
        (b"reserve", b"settled"),
    ):
        log.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(Stop, match=r"line 2 or the one before it is not|line 1 is no entry"):
            book(ram).entries()
    log.write_bytes(whole)
    wrong: list[object] = [
        {},
        {"lines": 3, "digest": "00", "size": 1},
        {"lines": -1, "digest": "0" * 64, "size": -1},
        [],
    ]
    for bad in wrong:
        (ram / "ledger.head").write_text(json.dumps(bad))
        with pytest.raises(Stop, match="ledger"):
            book(ram).entries()


def _reserve(folder: Path, times: int) -> None:
    ledger = book(folder)
    for _ in range(times):
        ledger.reserve(STEP, run=str(os.getpid())).settle()


@pytest.mark.federation
def test_two_processes_at_once_lose_nothing(ram: Path) -> None:
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_reserve, args=(ram, 40)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    lines, waiting = book(ram).lines()
    assert len(lines) == 80
    assert waiting == set()
    assert len({line.run for line in lines}) == 2


@pytest.fixture
def disk(ram: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Every fsync and rename below the folder: what, of which file, how many bytes it had then."""
    seen: list[tuple[str, str, int]] = []
    fsync: Callable[[int], None] = os.fsync
    move = Path.replace

    def note_fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        size = 0 if path.is_dir() else path.stat().st_size
        fsync(handle)
        seen.append(("fsync", "folder" if path == ram else path.name, size))

    def note_move(self: Path, target: Path) -> Path:
        seen.append(("move", target.name, self.stat().st_size))
        return move(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_move)
    return seen


def test_file_and_folder_are_on_disk_before_the_first_byte_leaves(
    ram: Path, disk: list[tuple[str, str, int]]
) -> None:
    for n in range(3):
        disk.clear()
        held = book(ram).reserve(STEP, run="a")
        disk.append(("release", "", 0))
        log, head = (ram / "ledger.jsonl").stat().st_size, (ram / "ledger.head").stat().st_size
        line = disk.index(("fsync", "ledger.jsonl", log))
        if n == 0:  # the name of a new file is durable before its content is relied on
            assert disk.index(("fsync", "folder", 0)) < line
        moved = disk.index(("move", "ledger.head", head))
        temporary = next(
            i for i, (what, name, _) in enumerate(disk) if what == "fsync" and name.endswith(".part")
        )
        assert disk[temporary][2] == head
        assert line < temporary < moved < disk.index(("fsync", "folder", 0), moved) < len(disk) - 1
        assert disk[-1][0] == "release"
        held.settle()


def test_what_cannot_be_written_is_not_released(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = book(ram)
    ledger.reserve(STEP, run="a")

    def broken(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(Stop, match="disk full") as caught:
            ledger.reserve(STEP, run="a")
    assert caught.value.exit is Exit.DISK_FULL
    # it may count, it may not be missing
    assert 1 <= steps(ram) <= 2
    ledger.reserve(STEP, run="a")
    assert steps(ram) >= 2
