"""The trainer: owns data, device, state and ledger; `Site.handle` runs here, behind a Unix socket.

It lives as long as the machine: a connection may break and another agent may come, the work goes on. It
does one job at a time, in the order they came. It needs no network and gives up its own where it may.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from client.door import SERVICE, STAGES, Given, frame, unframe
from client.errors import code_of
from client.train import Bench
from conf.console import ended
from conf.exits import Exit, Stop
from conf.files import only_one
from strategies.letter import Answer, Call, Unreadable, run_key
from strategies.protocol import Failure, Instruction, Refused, Reply, Tree, digest, pack, unpack
from tasks.start import HEAVY, without_plots

_ROOM = 8  # jobs that may wait: each holds its payload in memory
_LONGEST_S = 30.0  # a call waits no longer, whatever it asks for: the agent's thread is freed
_THREADS = 16

log = logging.getLogger(__name__)


class Handler(Protocol):
    """Whatever answers for the site: `client.site.Site`."""

    @property
    def name(self) -> str: ...

    def handle(self, instruction: Instruction, common: Tree) -> Reply: ...


@dataclass
class _Job:
    key: str
    call: Call | None  # until it is started
    run: str = ""
    """`run_key` of the run it belongs to."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    given: Given | None = None

    @property
    def dropped(self) -> bool:
        """It was cancelled, and is over: whoever asks again wants it done after all."""
        return self.cancelled.is_set() and self.ended.is_set()


class Trainer:
    """Jobs by the digest of their instruction.

    Args:
        site: answers instructions, one at a time.
        bench: what `site` trains on; its `halt` is set, so that a job can be cancelled.
        preload: modules that are imported before the first job, while nobody waits.
        broken: called where no job can be done any more: calls would wait for ever.
    """

    def __init__(
        self,
        site: Handler,
        bench: Bench,
        preload: Sequence[str] = (),
        broken: Callable[[], None] = lambda: None,
    ) -> None:
        self._site = site
        self._jobs: dict[str, _Job] = {}
        self._change = threading.Condition()
        self._now: _Job | None = None
        self._open = True
        self._bench = bench
        bench.halt = self._halt
        self._preload = preload
        self._broken = broken
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
        self._thread.start()

    def ask(self, call: Call) -> Given:
        """Start, join or cancel a job, and wait for its end as long as the call does."""
        with self._change:
            job = self._jobs.get(call.key)
            if call.operation == "cancel":
                for other in self._jobs.values():
                    if call.key in (other.key, other.run) and not other.ended.is_set():
                        other.cancelled.set()
            if call.operation == "train" and (job is None or job.dropped):
                if hashlib.sha256(call.instruction).hexdigest() != call.key:
                    return Given(Answer("payload", call.key))
                if sum(not other.ended.is_set() for other in self._jobs.values()) >= _ROOM:
                    return Given(Answer("busy", call.key))
                job = self._jobs[call.key] = _Job(call.key, call, _run_of(call))
                self._change.notify_all()
        if job is None:
            return Given(Answer("unknown", call.key))
        job.ended.wait(min(call.wait_s, _LONGEST_S))
        return job.given or Given(Answer("pending", call.key))

    def close(self) -> None:
        """Take no more jobs."""
        with self._change:
            self._open = False
            self._change.notify_all()

    def _work(self) -> None:
        try:
            for name in self._preload:
                importlib.import_module(name)
            _warm_up(self._bench)
            self._do_jobs()
        except BaseException:
            log.exception("no job can be done any more")
            self._broken()

    def _do_jobs(self) -> None:
        while (job := self._next()) is not None:
            began = time.monotonic()
            blob, stage, outcome = self._packed(job)
            job.given = Given(Answer("reply", job.key, blob), stage, outcome, time.monotonic() - began)
            log.info("%s: %s after %.1f s", stage, outcome, job.given.seconds)
            with self._change:
                # one ended job is kept, so that an agent that was killed can collect it
                for key in [k for k, other in self._jobs.items() if other.ended.is_set()]:
                    del self._jobs[key]
                self._now = None
                job.ended.set()

    def _next(self) -> _Job | None:
        with self._change:
            while True:
                waiting = (job for job in self._jobs.values() if job.call is not None)
                if not self._open or (job := next(waiting, None)) is not None:
                    break
                self._change.wait()
            self._now = job if self._open else None
            return self._now

    def _packed(self, job: _Job) -> tuple[bytes, str, str]:
        """The packed reply, its stage and outcome."""
        stage = ""
        try:
            reply, stage = self._answer(job)
            outcome = reply.body.code if isinstance(reply.body, Failure) else "update"
            return pack(reply.to_tree()), stage, outcome
        except Exception as error:  # noqa: BLE001  no memory to pack in, say: this job's failure alone
            failure = Failure(code_of(error))
            return pack(Reply(self._site.name, failure).to_tree()), stage, failure.code

    def _answer(self, job: _Job) -> tuple[Reply, str]:
        call, job.call = job.call, None
        try:
            if call is None:
                raise Refused("internal")
            instruction = Instruction.from_tree(unpack(call.instruction))
            if digest(call.common) != instruction.common:
                raise Refused("payload", "common")
            common = unpack(call.common)
        except Refused as refusal:
            return Reply(self._site.name, Failure(refusal.code)), ""
        del call  # the packed payload is not needed beside what it held
        if job.cancelled.is_set():
            return Reply(self._site.name, Failure("cancelled")), ""
        stage = instruction.stage.partition("/")[0]
        return self._site.handle(instruction, common), stage if stage in STAGES else "other"

    def _halt(self) -> None:
        if self._now is not None and self._now.cancelled.is_set():
            raise Refused("cancelled")


def _run_of(call: Call) -> str:
    try:
        return run_key(Instruction.from_tree(unpack(call.instruction)).run)
    except Refused:
        return ""  # whoever takes up the job will find the same


def _warm_up(bench: Bench) -> None:
    """Take a step on nothing: torch loads parts of itself at the first one, for seconds."""
    weight = torch.zeros(1, device=bench.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _behaviour(trainer: Trainer) -> grpc.RpcMethodHandler[bytes, bytes]:
    def do(messages: Iterable[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            words, (instruction, common) = unframe(messages, 2)
            call = Call(
                str(words["operation"]), str(words["key"]), float(words["wait_s"]), instruction, common
            )
            del instruction, common
        except (Unreadable, KeyError, ValueError, TypeError):
            given = Given(Answer("payload", ""))
        else:
            given = trainer.ask(call)
        said = {"status": given.answer.status, "stage": given.stage, "outcome": given.outcome}
        yield from frame({**said, "seconds": given.seconds}, given.answer.reply)

    return grpc.stream_stream_rpc_method_handler(do)


@contextlib.contextmanager
def serving(trainer: Trainer, socket: Path) -> Iterator[grpc.Server]:
    """Listen on `socket` (0600, its folder 0700), with the standard health service.

    Raises:
        Stop: (`SITE_BUSY`) another trainer listens there.
    """
    socket.parent.mkdir(parents=True, exist_ok=True)
    socket.parent.chmod(0o700)
    another = Stop(Exit.SITE_BUSY, f"another trainer listens on {socket}; stop it first")
    with only_one(socket.with_suffix(".lock"), another):
        socket.unlink(missing_ok=True)
        server = grpc.server(futures.ThreadPoolExecutor(_THREADS), options=[("grpc.so_reuseport", 0)])
        handlers = {"Do": _behaviour(trainer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        wellness = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(wellness, server)
        before = os.umask(0o177)
        try:
            server.add_insecure_port(f"unix:{socket}")
            server.start()
        finally:
            os.umask(before)
        wellness.set("", health_pb2.HealthCheckResponse.SERVING)
        try:
            yield server
        finally:
            wellness.enter_graceful_shutdown()
            trainer.close()
            server.stop(grace=1.0).wait()


def leave_network() -> bool:
    """Move this process to a network namespace of its own, which has no interface; False where it may not.

    To be called before any thread starts. A service manager does the same from outside (PrivateNetwork).
    """
    new_user, new_network = 0x10000000, 0x40000000
    library = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if library.unshare(new_network) == 0:
        return True
    if library.unshare(new_user | new_network) != 0:
        return False
    # files are still made under the own ids, which a new user namespace does not know by itself
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return True


def serve(site: Handler, bench: Bench, socket: Path, preload: Sequence[str] = ()) -> None:
    """Serve until told to stop (SIGTERM, SIGINT).

    Raises:
        Stop: (`INTERNAL`) no job can be done any more; whoever started this process starts it again.
    """
    stop, broken = threading.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def give_up() -> None:
        broken.set()
        stop.set()

    with serving(Trainer(site, bench, preload, give_up), socket):
        log.info("trainer of %s is ready", site.name)
        stop.wait()
    if broken.is_set():
        raise Stop(Exit.INTERNAL, "no job can be done any more; this process' log has the reason")


def main(arguments: list[str] | None = None) -> None:
    """`python -m client.trainer site.yaml`: serve a site as its file describes it."""
    parser = argparse.ArgumentParser(prog="client.trainer", description="Train behind a Unix socket.")
    parser.add_argument("site", type=Path, help="site.yaml")
    asked = parser.parse_args(arguments)
    os.umask(0o077)  # replies, states and incidents are the hospital's own
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not leave_network():
        log.warning("this process keeps its network: the system does not let it go")
    from client.sitefile import SiteFile

    without_plots()
    file = SiteFile.read(asked.site)
    bench = Bench(file.device)
    serve(file.site(bench), bench, file.socket, HEAVY)


if __name__ == "__main__":
    ended(main)
