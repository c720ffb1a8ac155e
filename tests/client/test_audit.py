import json
import random
import stat
from pathlib import Path

import pytest

from client.audit import Audit
from conf.exits import Exit, Stop


@pytest.fixture
def log(ram: Path) -> Audit:
    audit = Audit(ram / "audit.jsonl")
    for i in range(8):
        audit.add("request", stage="train", round=i, allowed=i % 2 == 0)
    return audit


def test_what_is_written_comes_back_in_order(log: Audit) -> None:
    assert [e["round"] for e in log.events()] == list(range(8))
    head = log.verify()
    assert head.lines == 8
    assert head.size == log.path.stat().st_size
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    assert log.add("release").lines == 9


def test_every_way_to_touch_it_is_seen(log: Audit) -> None:
    whole = log.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    draw = random.Random(0)
    for _ in range(120):
        at, other = draw.sample(range(8), 2)
        moved = list(lines)
        moved[at], moved[other] = moved[other], moved[at]
        byte = draw.randrange(len(whole))
        changed = bytearray(whole)
        changed[byte] ^= 1 << draw.randrange(8)
        for damaged in (
            b"".join(moved),
            bytes(changed),
            b"".join(lines[:at] + lines[at + 1 :]),
            b"".join([*lines[:at], lines[other], *lines[at:]]),
            whole[:byte],
        ):
            log.path.write_bytes(damaged)
            with pytest.raises(Stop, match=r"audit log .*(line|bytes)") as caught:
                log.verify()
            assert caught.value.exit is Exit.AUDIT_BROKEN
            assert log.path.read_bytes() == damaged
    log.path.unlink()
    with pytest.raises(Stop, match="it has 0 of"):
        log.add("request")


def test_a_rewritten_chain_is_seen_by_its_head(log: Audit) -> None:
    kept = (log.path.parent / "audit.head").read_bytes()
    events = [json.loads(line) for line in log.path.read_text().splitlines()]
    log.path.unlink()
    (log.path.parent / "audit.head").unlink()
    for event in events:
        log.add("request", stage="other", round=event["round"])
    log.verify()
    (log.path.parent / "audit.head").write_bytes(kept)
    with pytest.raises(Stop, match="audit log"):
        log.verify()


def test_a_crash_at_every_byte_of_an_entry_is_mended(log: Audit) -> None:
    head, before = (log.path.parent / "audit.head").read_bytes(), log.path.read_bytes()
    log.add("release", bytes=7)
    after = log.path.read_bytes()
    for cut in range(len(before), len(after) + 1):
        log.path.write_bytes(after[:cut])
        (log.path.parent / "audit.head").write_bytes(head)
        said = log.add("next")
        assert said.lines == (10 if cut == len(after) else 9)
        assert log.verify() == said


def test_an_empty_log_is_well(ram: Path) -> None:
    assert Audit(ram / "new" / "audit.jsonl").verify().lines == 0
