"""The trainer behind its socket: one job at a time, waited for, collected, cancelled; nothing else leaves."""

from __future__ import annotations

import contextlib
import socket as sockets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from client.door import METHOD, Door, frame, unframe
from client.train import Bench
from client.trainer import Trainer, serving
from conf.exits import Stop
from strategies.letter import Call, Unreadable
from strategies.protocol import Failure, Instruction, Refused, Reply, Tree, Update, digest, pack, unpack

PROJECT = Path(__file__).parents[2]


class Slow:
    """A site whose work lasts until it is let go; it counts its trainings."""

    name = "a"

    def __init__(self) -> None:
        self.bench = Bench("cpu")
        self.go = threading.Event()
        self.begun = threading.Event()
        self.asked: list[Instruction] = []

    def handle(self, instruction: Instruction, common: Tree) -> Reply:
        self.asked.append(instruction)
        self.begun.set()
        try:
            while not self.go.wait(0.01):
                self.bench.halt()
        except Refused as refusal:
            return Reply(self.name, Failure(refusal.code))
        return Reply(self.name, Update({}, weight=common["weight"]))


@pytest.fixture
def site() -> Slow:
    return Slow()


@pytest.fixture
def door(site: Slow, ram: Path) -> Iterator[Door]:
    with serving(Trainer(site, site.bench), ram / "run" / "t.sock"):
        yield Door(ram / "run" / "t.sock")


def call(operation: str = "train", wait_s: float = 5.0, round: int = 1) -> Call:
    common = pack({"weight": 7})
    asked = Instruction("run", round, 0, "train", "a", None, "p", "c", digest(common))
    blob = pack(asked.to_tree())
    if operation != "train":
        return Call(operation, digest(blob), wait_s)
    return Call("train", digest(blob), wait_s, blob, common)


def test_an_answer_is_waited_for(door: Door, site: Slow) -> None:
    site.go.set()
    given = door.ask(call())
    assert (given.answer.status, given.stage, given.outcome) == ("reply", "train", "update")
    assert Reply.from_tree(unpack(given.answer.reply)) == Reply("a", Update({}, weight=7))


def test_long_work_is_pending_then_collected_and_done_once(door: Door, site: Slow) -> None:
    assert door.ask(call(wait_s=0.1)).answer.status == "pending"
    assert door.ask(call(wait_s=0.1)).answer.status == "pending"  # sent again: joined
    assert door.ask(call("collect", 0.1)).answer.status == "pending"
    threading.Timer(0.2, site.go.set).start()
    first, again = door.ask(call("collect")), door.ask(call("collect"))
    assert first.answer.status == "reply"
    assert first == again
    assert door.ask(call()).answer == first.answer
    assert len(site.asked) == 1


def test_cancel_overtakes_the_training_it_ends(door: Door, site: Slow) -> None:
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(door.ask(call(wait_s=20.0))))
    waiting.start()
    assert site.begun.wait(5)
    began = time.monotonic()
    assert door.ask(call("cancel")).outcome == "cancelled"
    waiting.join()
    assert time.monotonic() - began < 2
    assert answers[0].outcome == "cancelled"


def test_a_job_is_cancelled_before_it_began(door: Door, site: Slow) -> None:
    door.ask(call(wait_s=0.0, round=1))
    door.ask(call(wait_s=0.0, round=2))
    assert door.ask(call("cancel", 0.0, round=2)).answer.status == "pending"
    site.go.set()
    assert door.ask(call("collect", round=2)).outcome == "cancelled"
    assert [asked.round for asked in site.asked] == [1]


def test_jobs_wait_in_order_up_to_a_number(door: Door, site: Slow) -> None:
    states = [door.ask(call(wait_s=0.0, round=r)).answer.status for r in range(1, 11)]
    assert states == ["pending"] * 8 + ["busy"] * 2
    site.go.set()
    assert door.ask(call("collect", round=8)).answer.status == "reply"
    assert [asked.round for asked in site.asked] == list(range(1, 9))
    assert (
        door.ask(call("collect", 0.0, round=1)).answer.status == "unknown"
    )  # sent again, the site recalls it


def test_what_is_not_there_is_unknown(door: Door) -> None:
    assert door.ask(call("collect")).answer.status == "unknown"
    assert door.ask(call("cancel")).answer.status == "unknown"


def test_what_does_not_match_its_digest_is_refused(door: Door, site: Slow) -> None:
    site.go.set()
    fine = call()
    assert door.ask(Call("train", "0" * 64, 1.0, fine.instruction, fine.common)).answer.status == "payload"
    assert door.ask(Call("train", fine.key, 1.0, fine.instruction, fine.common[:-1])).outcome == "payload"
    noise = b"no tree"
    assert door.ask(Call("train", digest(noise), 1.0, noise, fine.common)).outcome == "payload"
    assert not site.asked


@settings(deadline=None, max_examples=10)
@given(st.lists(st.binary(max_size=40), max_size=4))
def test_noise_gets_a_fixed_answer(pieces: list[bytes]) -> None:
    import tempfile

    site = Slow()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run" / "t.sock"
        with serving(Trainer(site, site.bench), path), grpc.insecure_channel(f"unix:{path}") as channel:
            do: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(METHOD)
            said, blobs = unframe(do(iter(pieces), timeout=5), 1)
    assert said == {"status": "payload", "stage": "", "outcome": "", "seconds": 0.0}
    assert blobs == [b""]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.binary(max_size=100), max_size=3), st.integers(0, 3))
def test_frames_return(blobs: list[bytes], more: int) -> None:
    messages = list(frame({"a": 1}, *blobs))
    assert unframe(messages, len(blobs)) == ({"a": 1}, blobs)
    with pytest.raises(Unreadable, match="sizes"):
        unframe(messages, len(blobs) + 1 + more)
    if any(blobs):
        with pytest.raises(Unreadable, match="early or late"):
            unframe(messages[:-1], len(blobs))
    with pytest.raises(Unreadable, match="no head"):
        unframe([b"{" * more], 1)


def test_large_frames_travel_in_pieces(door: Door, site: Slow) -> None:
    site.go.set()
    common = pack({"weight": 7, "text": "x" * (5 * 2**20)})
    asked = pack(Instruction("run", 1, 0, "train", "a", None, "p", "c", digest(common)).to_tree())
    assert max(map(len, frame({}, common))) <= 2**20
    assert door.ask(Call("train", digest(asked), 5.0, asked, common)).outcome == "update"


class Unpackable(Slow):
    """Its replies cannot be packed."""

    def handle(self, instruction: Instruction, common: Tree) -> Reply:
        return Reply(self.name, Update({}, weight=cast(int, float("nan"))))


def test_a_reply_that_cannot_be_packed_fails_that_job_alone(ram: Path) -> None:
    site = Unpackable()
    with serving(Trainer(site, site.bench), ram / "run" / "t.sock"):
        door = Door(ram / "run" / "t.sock")
        assert [door.ask(call(round=r)).outcome for r in (1, 2)] == ["internal", "internal"]


def test_a_trainer_that_can_do_no_job_says_so(site: Slow) -> None:
    broken = threading.Event()
    Trainer(site, site.bench, ["no_such_module"], broken.set)
    assert broken.wait(10)


def test_nobody_at_home(ram: Path) -> None:
    assert Door(ram / "t.sock").ask(call()).answer.status == "away"


def test_door_is_private_healthy_and_single(door: Door, site: Slow) -> None:
    assert oct(door.socket.stat().st_mode & 0o777) == "0o600"
    assert oct(door.socket.parent.stat().st_mode & 0o777) == "0o700"
    with grpc.insecure_channel(f"unix:{door.socket}") as channel:
        health = cast(Any, health_pb2_grpc.HealthStub(channel))  # its stub knows no method
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    second = serving(Trainer(site, site.bench), door.socket)
    with pytest.raises(Stop, match="another trainer listens"), second:
        pass
    assert door.socket.exists()


def test_a_process_can_leave_its_network(tmp_path: Path) -> None:
    """In a child: it still makes files under its own name, but reaches nothing."""
    with contextlib.closing(sockets.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        script = f"""
import os, pathlib, socket
from client.trainer import leave_network
left = leave_network()
made = pathlib.Path({str(tmp_path)!r}) / "made"
made.write_text("x")
assert made.stat().st_uid == os.getuid()
try:
    socket.create_connection(("127.0.0.1", {port}), 1).close()
    print("reached" if left else "kept")
except OSError:
    print("left")
"""
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True
        )
    if done.stdout.strip() == "kept":
        pytest.skip("this system gives no network namespaces")
    assert done.stdout.strip() == "left"
