"""The exchange with real sites: letters over SuperLink, answers folded one at a time as they come.

A site answers when it can. Whatever happens to it, its agent, SuperLink or this process, the same call is
sent again, and the site's own store sees to it that nothing is done twice. What counts is decided here:
an answer is checked and folded, or the site has failed for one of the known reasons.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from conf.files import write_atomic
from server.anchors import Anchors
from server.exchange import Heard, Order
from server.exchange.crew import accepted
from server.telemetry import Meter
from strategies.exact import Folded, Partial
from strategies.letter import Answer, Call
from strategies.protocol import Failure, Instruction, Refused, Reply, Tree, digest, pack, unpack

_SHORTEST_S, _LONGEST_S = 0.15, 2.0
_SHARE = 0.05  # a poll waits this share of the time since anything was heard
_LOOK_S = 1.0  # between two looks at which sites are online
_OVERDUE_S = 35.0  # an answer this late, beyond the wait the call asked for, was lost on the way
_AGAIN_S = 0.5  # before a call is sent again to a site whose trainer is not there

_REFUSALS = frozenset({"payload", "policy", "internal"})  # what an agent says is a failure code as it stands

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """A site's node: its number at SuperLink, and since when it holds its lease."""

    id: int
    since: str


class Courier(ABC):
    """What brings calls to nodes, and answers back."""

    @abstractmethod
    def nodes(self) -> dict[str, Node]:
        """Sites that are online."""

    @abstractmethod
    def send(self, calls: Mapping[int, Call], group: str) -> dict[str, int]:
        """Post one call to each node; the node of each letter that was taken."""

    @abstractmethod
    def ready(self, ids: Iterable[str]) -> Iterator[tuple[str, Answer | None]]:
        """Answers that are there, one at a time; None for one that is lost."""


@dataclass
class _Job:
    """One call at one site, until it is answered.

    Attributes:
        key: SHA-256 of `blob`, the packed instruction. common: the packed payload, or where it lies.
        node, letter: where the last call went; None: it waits to be sent. due: not to be sent before.
        trouble: since when the site cannot be reached.
    """

    instruction: Instruction
    blob: bytes
    key: str
    common: Path | bytes
    operation: str = "train"
    node: Node | None = None
    letter: str = ""
    sent: float = 0.0
    due: float = 0.0
    trouble: float | None = None

    @classmethod
    def of(cls, instruction: Instruction, common: Path | bytes) -> _Job:
        blob = pack(instruction.to_tree())
        return cls(instruction, blob, digest(blob), common)

    @property
    def site(self) -> str:
        return self.instruction.site

    def call(self, wait_s: float) -> Call:
        if self.operation != "train":
            return Call(self.operation, self.key, wait_s)
        common = self.common if isinstance(self.common, bytes) else self.common.read_bytes()
        return Call("train", self.key, wait_s, self.blob, common)

    def again(self, operation: str, due: float) -> None:
        """Let it be sent again."""
        self.operation, self.due, self.node, self.letter = operation, due, None, ""


class FlowerExchange:
    """Sites behind a courier.

    Args:
        blobs: where payloads of outstanding asynchronous jobs are kept.
        wait_s: how long a site may hold a call before it answers `pending`.
        lost_after_s: a site that cannot be reached for so long has failed in this ask.
        meter: counts what is carried and heard. anchors: heads of the sites' ledgers.
    """

    def __init__(
        self,
        courier: Courier,
        *,
        blobs: Path,
        wait_s: float = 20.0,
        lost_after_s: float = 300.0,
        meter: Meter | None = None,
        anchors: Anchors | None = None,
    ) -> None:
        self.courier = courier
        self.wait_s = wait_s
        self.lost_after_s = lost_after_s
        self.meter = meter or Meter()
        self.anchors = anchors or Anchors()
        self._blobs = blobs
        self._standing: dict[str, _Job] = {}  # asynchronous jobs outlive their ask
        self._letters: dict[str, _Job] = {}  # of those
        self._strays: set[str] = set()  # letters whose answers nobody needs, but SuperLink would keep

    def __call__(self, order: Order, heard: Heard) -> Folded:
        ask = order.ask
        total = ask.fold.start(ask.spec)
        total.failures |= order.known
        jobs = self._jobs(order)
        letters: dict[str, _Job] = {}
        if ask.need is not None:
            self._standing |= jobs
            for site in order.known:  # failed in this ask before an interruption
                self._standing.pop(site, None)
            jobs, letters = self._standing, self._letters
        asking = _Asking(self, order, heard, total, jobs, letters, self._strays)
        try:
            late = asking.until(ask.need)
            for job in late:
                asking.fail(job, Failure("deadline"))
            asking.cancel(late)
        except BaseException:  # the run was stopped, say: this process goes on with another
            total.close()
            raise
        if ask.need is None:
            self._strays |= letters.keys()
        return ask.fold.finish(total, ask.spec)

    def _jobs(self, order: Order) -> dict[str, _Job]:
        """A job for every site that is asked. The common payload is packed once."""
        if not order.instructions:
            return {}
        blob = pack(order.ask.down)
        name = digest(blob)
        common: Path | bytes = blob
        if order.ask.need is not None:
            common = self._place(name)
            if not common.exists():
                self._blobs.mkdir(parents=True, exist_ok=True)
                write_atomic(common, blob)
        # an asynchronous job stands in checkpoints, which hold nothing of another run
        anchored = self.anchors.own if order.ask.need is None else lambda _: {}
        return {
            site: _Job.of(replace(bare, common=name, own=bare.own | anchored(site)), common)
            for site, bare in order.instructions.items()
            if site not in order.known
        }

    def _place(self, name: str) -> Path:
        return self._blobs / f"{name}.safetensors"

    def busy(self) -> frozenset[str]:
        return frozenset(self._standing)

    def snapshot(self) -> Tree:
        jobs = [
            # the run's id is left out, as in every checkpoint
            {"instruction": {**job.instruction.to_tree(), "run": ""}, "common": job.instruction.common}
            for _, job in sorted(self._standing.items())
        ]
        return {"clock": 0.0, "jobs": jobs}  # as every exchange writes it

    def restore(self, tree: Tree, run: str) -> None:
        before, self._standing = self._standing, {}
        for held in tree.get("jobs", []):
            instruction = replace(Instruction.from_tree(held["instruction"]), run=run)
            job = _Job.of(instruction, self._place(held["common"]))
            known = before.get(job.site)
            self._standing[job.site] = known if known is not None and known.key == job.key else job

    def close(self) -> None:
        """Nothing here outlives a run."""


@dataclass
class _Asking:
    """One ask under way: jobs by site, letters that are out, and what the answers fold to."""

    exchange: FlowerExchange
    order: Order
    heard: Heard
    total: Partial
    jobs: dict[str, _Job]
    letters: dict[str, _Job]
    strays: set[str]
    online: dict[str, Node] = field(default_factory=dict)
    looked: float = -1e9

    def until(self, need: int | None) -> list[_Job]:
        """Go on until enough is folded or nothing is left to wait for; jobs that are late at the deadline."""
        last = time.monotonic()
        limit = last + self.order.deadline_s if self.order.deadline_s else math.inf
        while self.jobs and (need is None or len(self.total.sites) < need):
            now = time.monotonic()
            self._look(now)
            self._send(now)
            if self._hear():
                last = time.monotonic()
                continue
            now = time.monotonic()
            if now >= limit:
                return list(self.jobs.values())
            time.sleep(min(max(_SHORTEST_S, _SHARE * (now - last)), _LONGEST_S, limit - now))
        return []

    def _look(self, now: float) -> None:
        """See who is online: an agent that came back has lost its calls, one that stays away has failed."""
        if now - self.looked < _LOOK_S:
            return
        self.looked = now
        self.online = self.exchange.courier.nodes()
        for job in list(self.jobs.values()):
            node = self.online.get(job.site)
            if node is None:
                self._troubled(job, now)
            elif (
                job.node is not None
                and (node != job.node or now - job.sent > self.exchange.wait_s + _OVERDUE_S)
                and not self._troubled(job, now)
            ):
                log.info("%s is asked again: its agent is another, or long silent", job.site)
                job.again("collect", now)

    def _troubled(self, job: _Job, now: float) -> bool:
        """Note that a site cannot be reached; True where that has lasted too long."""
        job.trouble = now if job.trouble is None else job.trouble
        if now - job.trouble < self.exchange.lost_after_s:
            return False
        self.fail(job, Failure("lost_site"))
        return True

    def _send(self, now: float) -> None:
        """Post the calls that are due to sites that are online."""
        due = [j for j in self.jobs.values() if j.node is None and j.due <= now and j.site in self.online]
        if not due:
            return
        nodes = {self.online[job.site].id: job for job in due}
        calls = {node: job.call(self.exchange.wait_s) for node, job in nodes.items()}
        group = f"{self.order.round}/{self.order.ask.stage}"
        for letter, node in self.exchange.courier.send(calls, group).items():
            job = nodes[node]
            self.exchange.meter.carried(down=len(calls[node].instruction) + len(calls[node].common))
            job.node, job.letter, job.sent = self.online[job.site], letter, now
            self.letters[letter] = job

    def _hear(self) -> bool:
        """Take in the answers that are there, one at a time; whether there was any."""
        found = False
        for letter, answer in self.exchange.courier.ready([*self.letters, *self.strays]):
            found = True
            self.strays.discard(letter)
            job = self.letters.pop(letter, None)
            # a call that was sent again may be answered twice: its last letter is heard, or a whole reply
            last = job is not None and letter == job.letter
            whole = answer is not None and answer.status == "reply"
            if job is not None and self.jobs.get(job.site) is job and (last or whole):
                self._take(job, answer)
            del answer
        return found

    def _take(self, job: _Job, answer: Answer | None) -> None:
        """Judge an answer: fold it, note the failure, or ask again."""
        now = time.monotonic()
        if answer is None:
            # SuperLink gave up on a letter; the node may be back already
            self.looked = -1e9
            if not self._troubled(job, now):
                job.again("collect", now + _AGAIN_S)
        elif answer.status == "reply" and answer.key == job.key:
            self._fold(job, answer)
        elif answer.status == "pending":
            job.trouble = None
            job.again("collect", now + _SHORTEST_S)
        elif answer.status in _REFUSALS:
            self.fail(job, Failure(answer.status))
        elif answer.status == "unknown" and job.operation == "collect":
            job.again("train", now)
        elif not self._troubled(job, now):
            job.again("train", now + _AGAIN_S)

    def _fold(self, job: _Job, answer: Answer) -> None:
        ask, age = self.order.ask, self.order.round - job.instruction.round
        self.exchange.meter.carried(up=len(answer.reply))
        reply: Reply | None = None
        try:
            reply = Reply.from_tree(unpack(answer.reply))
            update = accepted(reply, job.site, replace(ask.spec, tail=0))  # hospitals tell sums alone
        except Refused as refusal:
            own = reply.body if reply is not None and isinstance(reply.body, Failure) else None
            self.fail(job, own or Failure(refusal.code))
            return
        del self.jobs[job.site]
        self.exchange.anchors.note(job.site, reply.head)
        ask.fold.add(self.total, ask.spec, job.site, job.instruction.epoch, update, age)
        self._tell(job, None)

    def fail(self, job: _Job, failure: Failure) -> None:
        """The site's answer does not count, and why."""
        del self.jobs[job.site]
        self.total.failures[job.site] = failure
        self._tell(job, failure)

    def _tell(self, job: _Job, failure: Failure | None) -> None:
        self.exchange.meter.heard(failure)
        self.heard(job.site, failure)

    def cancel(self, jobs: Iterable[_Job]) -> None:
        """Tell sites to end their work. Nobody waits for their word on it."""
        here = {self.online[job.site].id: job for job in jobs if job.site in self.online}
        if here:
            calls = {node: Call("cancel", job.key) for node, job in here.items()}
            self.strays |= set(self.exchange.courier.send(calls, "cancel"))
