"""What a site remembers: tentative until it counted, settled until two later ones did."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.state import Memory
from strategies.protocol import Epoch, Instruction, Refused, Reply, Update, pack

REPLY = Reply("a", Update({}))


def asked(epoch: Epoch, settled: Epoch | None = None, stage: str = "train") -> Instruction:
    return Instruction("run", *epoch, stage, "a", settled, "plan", "code", "")


def names(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix(".safetensors") for path in folder.iterdir())


def counted(memory: Memory, *epochs: Epoch) -> None:
    """Answer these epochs, each settled by the next."""
    before: Epoch | None = None
    for epoch in epochs:
        memory.settle(before)
        memory.keep(asked(epoch, before), REPLY, {"at": list(epoch)})
        before = epoch


@pytest.mark.parametrize("durable", [False, True])
def test_a_state_is_tentative_until_its_epoch_counted(durable: bool, tmp_path: Path) -> None:
    memory = Memory(tmp_path, durable=durable)
    assert memory.settle(None) == {}
    memory.keep(asked((1, 0)), REPLY, {"at": [1, 0]})
    assert names(tmp_path) == ["state-000001-0.tentative"]
    assert memory.settle((1, 0)) == {"at": [1, 0]}
    assert names(tmp_path) == ["state-000001-0.settled"]
    assert memory.settle((1, 0)) == {"at": [1, 0]}  # said again, nothing changes


def test_what_did_not_count_is_discarded(tmp_path: Path) -> None:
    memory = Memory(tmp_path, durable=False)
    counted(memory, (1, 0), (2, 0))
    memory.keep(asked((2, 1), (1, 0)), REPLY, {"at": [2, 1]})
    # neither attempt of round 2 counted
    assert memory.settle((1, 0)) == {"at": [1, 0]}
    assert names(tmp_path) == ["state-000001-0.settled"]
    with pytest.raises(Refused, match="lost"):
        memory.settle((2, 0))


def test_an_answer_that_counted_in_no_round_is_forgotten_from_the_start(tmp_path: Path) -> None:
    memory = Memory(tmp_path, durable=False)
    memory.keep(asked((1, 0)), REPLY, {"at": [1, 0]})
    assert memory.settle(None) == {}
    assert names(tmp_path) == []


def test_a_coordinator_may_fall_back_by_one_checkpoint_and_no_further(tmp_path: Path) -> None:
    memory = Memory(tmp_path, durable=False)
    counted(memory, (1, 0), (3, 1), (4, 0), (6, 0))
    assert memory.settle((6, 0)) == {"at": [6, 0]}
    assert names(tmp_path) == ["state-000004-0.settled", "state-000006-0.settled"]
    for gone in ((1, 0), (3, 1), (7, 0), (6, 1)):
        with pytest.raises(Refused, match="lost"):
            memory.settle(gone)
    with pytest.raises(Refused, match="rewound"):
        memory.settle(None)
    assert memory.settle((4, 0)) == {"at": [4, 0]}
    assert names(tmp_path) == ["state-000004-0.settled"]


def test_falling_back_before_the_first_round_is_one_checkpoint_too(tmp_path: Path) -> None:
    memory = Memory(tmp_path, durable=False)
    counted(memory, (1, 0))
    memory.settle((1, 0))
    assert memory.settle(None) == {}
    assert names(tmp_path) == []


def test_stages_have_replies_of_their_own(tmp_path: Path) -> None:
    memory = Memory(tmp_path, durable=True)
    for i, stage in enumerate(("train", "evaluate/federated/val", "evaluate/federated/test")):
        memory.keep(asked((1, 0), stage=stage), Reply("a", Update({}, weight=i + 1)), None)
    replies = [
        memory.recall(asked((1, 0), stage=stage))
        for stage in ("train", "evaluate/federated/val", "evaluate/federated/test", "train/0")
    ]
    weights = [r.body.weight if r and isinstance(r.body, Update) else None for r in replies]
    assert weights == [1, 2, 3, None]
    with pytest.raises(Refused, match="conflict"):
        memory.recall(asked((1, 0), settled=(0, 0)))


def test_a_damaged_record_blocks_only_what_needs_it(tmp_path: Path) -> None:
    memory = Memory(tmp_path, durable=True)
    counted(memory, (1, 0), (2, 0))
    memory.settle((2, 0))
    (tmp_path / "state-000001-0.settled.safetensors").write_bytes(b"torn")
    assert memory.settle((2, 0)) == {"at": [2, 0]}
    assert memory.recall(asked((2, 0), (1, 0))) is not None
    assert memory.recall(asked((3, 0), (2, 0))) is None
    with pytest.raises(Refused, match=r"lost: state-000001-0\.settled\.safetensors is damaged"):
        memory.recall(asked((1, 0)))
    with pytest.raises(Refused, match="lost"):
        memory.settle((1, 0))
    assert memory.settle((2, 0)) == {"at": [2, 0]}  # a refusal changes nothing


def test_what_a_crash_left_half_written_is_no_record(tmp_path: Path) -> None:
    memory = Memory(tmp_path, durable=True)
    counted(memory, (1, 0))
    (tmp_path / ".state-000002-0.tentative.safetensors.123.part").write_bytes(b"half")
    assert memory.settle((1, 0)) == {"at": [1, 0]}
    assert memory.recall(asked((2, 0), (1, 0))) is None
    counted(memory, (2, 0))
    assert not list(tmp_path.glob(".*"))  # nor does it stay


Step = tuple[int, int, bool, bool]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),  # attempts abandoned before the one that is kept
            st.integers(0, 2),  # 0: this site is not asked, 1: its answer does not count, 2: it counts
            st.booleans(),  # whether it is asked for an evaluation after the round
            st.booleans(),  # whether the coordinator falls back by a checkpoint afterwards
        ),
        min_size=1,
        max_size=8,
    ),
    st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_the_state_is_always_that_of_the_last_epoch_that_counted(steps: list[Step], durable: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "memory"
        true: dict[Epoch, int] = {}  # what was kept in each epoch
        history: list[Epoch | None] = [None]  # the site's settled epoch, by checkpoint
        fresh = 0

        def at(epoch: Epoch | None) -> None:
            memory = Memory(place, durable=durable)  # its process ended meanwhile
            assert memory.settle(epoch) == ({} if epoch is None else {"n": true[epoch]})

        fell = True
        for abandoned, part, evaluated, falls in steps:
            r = len(history)
            settled = history[-1]
            for attempt in range(abandoned + 1):
                if part:
                    at(settled)
                    fresh += 1
                    true[r, attempt] = fresh
                    Memory(place, durable=durable).keep(asked((r, attempt), settled), REPLY, {"n": fresh})
            history.append((r, abandoned) if part == 2 else settled)
            if evaluated:
                at(history[-1])
            if falls and not fell and len(history) > 1:
                history.pop()
                at(history[-1])
                fell = True
            else:
                fell = False
        at(history[-1])


def test_bytes_of_a_record_hold_reply_and_state_together(tmp_path: Path) -> None:
    memory = Memory(tmp_path, durable=True)
    memory.keep(asked((1, 0)), REPLY, {"n": 1})
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == pack(
        {
            "key": ["run", 1, 0, "train"],
            "digest": asked((1, 0)).digest,
            "reply": REPLY.to_tree(),
            "state": {"n": 1},
        }
    )
