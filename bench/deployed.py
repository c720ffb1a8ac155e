"""What a federation of real processes costs, and what it survives: SuperLink with TLS and node
authentication, coordinator, agents and trainers on loopback, sites that train nothing.

    python -m bench.deployed [--quick] [--folder FOLDER] [--only overhead,memory,faults]

One line a figure, each with its limit; ends with 1 where one is missed. Memory is the kernel's own peak of
resident pages (VmHWM, reset at each round's end), less what the process held at rest before: what grows is
not shared, so it is the growth of PSS too, without a sampler that misses peaks or takes time itself.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench import idle
from bench.row import row
from conf.files import scratch_prefix, shared_memory
from deploy.loopback import Loopback

BLOB_MB = 100
ROUNDS = 8
CUT_S = 4.0  # training of the round in which something is killed


@dataclass
class Table:
    """Figures as they come."""

    bad: int = 0

    def row(self, what: str, measured: float, limit: float | None, unit: str = "s", note: str = "") -> None:
        """Print one; `limit` is the largest value that is right."""
        self.bad += not row(what, measured, unit, limit, note=note)


class Idlers(Loopback):
    """Sites that train nothing, and what they noted."""

    def __init__(self, folder: Path, count: int) -> None:
        command = [sys.executable, "-m", "bench.idle", "site", str(folder)]
        super().__init__(
            folder,
            [f"site-{k}" for k in range(count)],
            lambda site, socket: [*command, site, str(socket)],
            coordinator="bench.idle",
        )

    def orders(self, **rounds: float) -> None:
        """How long the next trainings take: `r2=4.0`."""
        (self.folder / "orders.json").write_text(json.dumps({k[1:]: v for k, v in rounds.items()}))

    def noted(self, site: str, what: str) -> list[list[str]]:
        path = self.folder / f"{site}.{what}"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def forget(self) -> None:
        """Begin the notes anew."""
        for site in self.sites:
            for what in ("begun", "trained"):
                (self.folder / f"{site}.{what}").unlink(missing_ok=True)
        self.orders()

    def longest(self) -> dict[int, float]:
        """The longest training of each round, in seconds."""
        found: dict[int, float] = {}
        for site in self.sites:
            for r, seconds in self.noted(site, "trained"):
                found[int(r)] = max(found.get(int(r), 0.0), float(seconds))
        return found

    def walls(self, name: str) -> dict[int, float]:
        """Seconds of each round that has its checkpoint; the evaluation after it is not the round."""
        path = self.folder / "runs" / name / "timing.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return {line["round"]: line["train"] + line["checkpoint"] for line in lines}

    def overhead(self, name: str) -> list[float]:
        longest = self.longest()
        return [wall - longest[r] for r, wall in sorted(self.walls(name).items())]

    def begun(self, r: int) -> None:
        """Wait until every site trains in round `r`."""
        self.until(
            f"round {r}", lambda: all([str(r)] in self.noted(site, "begun") for site in self.sites), 120
        )

    def ended(self, run: int) -> None:
        if (said := self.finish(run)) != "completed":
            raise RuntimeError(f"the run {said}\n{self.logs()}")

    def twice(self) -> int:
        """Trainings beyond one a round and site."""
        begun = [[tuple(line) for line in self.noted(site, "begun")] for site in self.sites]
        return sum(len(lines) - len(set(lines)) for lines in begun)


@contextmanager
def idlers(count: int, base: Path | None) -> Iterator[Idlers]:
    folder = Path(tempfile.mkdtemp(prefix=scratch_prefix(), dir=base or shared_memory()))
    try:
        with Idlers(folder / "loop", count) as loop:
            yield loop
    finally:
        shutil.rmtree(folder)


def megabytes(pid: int, what: str) -> float:
    found = re.search(rf"^{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(found[1]) * 1024 / 1e6 if found else 0.0


@dataclass
class Memory:
    """Peaks of some processes by round, above rest, in blobs."""

    pids: dict[str, int]
    rest: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, pid in self.pids.items():
            self.rest[name] = megabytes(pid, "VmRSS")
            self.rounds[name] = []
            self._reset(pid)

    def round(self) -> None:
        """Note the peaks since the last call."""
        for name, pid in self.pids.items():
            self.rounds[name].append((megabytes(pid, "VmHWM") - self.rest[name]) / BLOB_MB)
            self._reset(pid)

    @staticmethod
    def _reset(pid: int) -> None:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def overhead(table: Table, loop: Idlers) -> float:
    """The median of a round's wall time less its longest training, at 1 MB."""
    loop.forget()
    loop.ended(loop.submit("small", idle.plan(1, ROUNDS + 1)))
    spent = loop.overhead("small")
    usual = statistics.median(spent)
    note = f"({min(spent):.2f} to {max(spent):.2f})"
    limit = 1.5 if len(loop.sites) == 3 else None  # six sites are twenty processes on two cores
    table.row(f"round overhead, 1 MB, {len(loop.sites)} sites, {len(spent)} rounds", usual, limit, "s", note)
    return usual


def memory(table: Table, loop: Idlers, rounds: int) -> float:
    """Rounds of 100 MB: overhead, memory by round; the coordinator's peak in blobs."""
    loop.forget()
    count = len(loop.sites)
    parts = ["coordinator", "superlink", *(f"agent-{site}" for site in loop.sites)]
    held = Memory({name: loop.pid(name) for name in parts})
    trainers = {loop.pid(f"trainer-{site}"): () for site in loop.sites}
    before = {pid: _family(pid) for pid in (*held.pids.values(), *trainers)}
    run = loop.submit("large", idle.plan(BLOB_MB, rounds + 1))
    for r in range(1, rounds + 1):
        loop.until(f"round {r}", lambda r=r: r in loop.walls("large"), 300, 0.02)
        held.round()
    spent = loop.overhead("large")[:rounds]
    after = {pid: _family(pid) for pid in before}
    stop(loop, run)
    note = f"({min(spent):.1f} to {max(spent):.1f})"
    table.row(
        f"round overhead, {BLOB_MB} MB, {count} sites, {rounds} rounds",
        statistics.median(spent),
        30,
        "s",
        note,
    )
    agents = [max(held.rounds[name]) for name in parts[2:]]
    for name, peaks, limit in (
        ("coordinator", held.rounds["coordinator"], 9.0),
        ("SuperLink", held.rounds["superlink"], count + 10.0),
    ):
        by = " ".join(f"{peak:.1f}" for peak in peaks)
        table.row(f"{name}'s memory, {count} sites", max(peaks), limit, "blobs", f"by round: {by}")
        if rounds >= ROUNDS:  # the first one fills what later ones use again
            slope = statistics.linear_regression(range(1, rounds), peaks[1:]).slope
            table.row(f"{name}'s rise by round", slope, 0.1, "blobs", "from the second on")
    table.row(f"an agent's memory, {count} sites (largest)", max(agents), 9.0, "blobs", "(no limit was set)")
    table.row("processes started between rounds", sum(before[p] != after[p] for p in before), 0, "")
    return max(held.rounds["coordinator"])


def _family(pid: int) -> list[tuple[int, float]]:
    process = psutil.Process(pid)
    return sorted((p.pid, p.create_time()) for p in (process, *process.children(recursive=True)))


def torchless(table: Table, loop: Idlers) -> None:
    """No agent has torch in memory."""
    maps = [Path(f"/proc/{loop.pid(f'agent-{site}')}/maps").read_text() for site in loop.sites]
    table.row("agents with torch in memory", sum("torch" in text for text in maps), 0, "")


def stop(loop: Idlers, run: int) -> None:
    """Stop a run, as an operator does, and wait for its end."""
    with loop.control() as superlink:
        superlink.stop(run)
    loop.finish(run)


def cancel(table: Table, loop: Idlers) -> None:
    """A training of a minute is ended by the round's deadline."""
    deadline = 4.0
    loop.forget()
    loop.orders(r1=60.0)
    logs = [loop.folder / "log" / f"trainer-{site}.log" for site in loop.sites]
    done = [log.read_text().count("train: cancelled") for log in logs]
    run = loop.submit("late", idle.plan(1, 1, round_timeout_s=deadline))
    loop.begun(1)
    began = time.monotonic()

    def ended() -> bool:
        return all(log.read_text().count("train: cancelled") > n for log, n in zip(logs, done, strict=True))

    loop.until("the trainings' end", ended, 60, 0.05)
    # sites begin within the ask's first second, which the deadline counts from
    table.row("cancel of a long training, all sites", time.monotonic() - began - deadline, 5)
    loop.orders()
    loop.ended(run)


def killed(table: Table, loop: Idlers, victim: str, limit: float, usual: float) -> None:
    """SIGKILL while round 2 is trained; what the round lost, and whether anybody trained twice."""
    name = f"kill-{victim}"
    loop.forget()
    loop.orders(r2=CUT_S)
    run = loop.submit(name, idle.plan(1, 3))
    loop.begun(2)
    time.sleep(0.5)
    log = loop.folder / "log" / f"{victim}.log"
    seen = log.read_text().count("round 2 of 3: ask")
    began = time.monotonic()
    loop.kill(victim)
    if victim == "coordinator":
        loop.until("round 2", lambda: log.read_text().count("round 2 of 3: ask") > seen, 60, 0.02)
        table.row("coordinator killed: the same run goes on", time.monotonic() - began, limit)
    loop.until("round 2's checkpoint", lambda: 2 in loop.walls(name), 120, 0.02)
    lost = time.monotonic() - began + 0.5 - CUT_S
    loop.ended(run)
    what = "SuperLink" if victim == "superlink" else victim
    table.row(f"{what} killed: seconds lost in the round", lost - usual, 15)
    journal = (loop.folder / "runs" / name / "journal.jsonl").read_text()
    table.row(
        f"{what} killed: replies lost, trainings repeated", journal.count('"code"') + loop.twice(), 0, ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.deployed")
    parser.add_argument("--quick", action="store_true", help="three sites, 1 MB, one kill of each process")
    parser.add_argument("--folder", type=Path, help="where the federation lives [default: in memory]")
    parser.add_argument("--only", default="overhead,memory,faults")
    asked = parser.parse_args()
    parts = set(asked.only.split(","))
    table = Table()
    with idlers(3, asked.folder) as loop:
        usual = overhead(table, loop)
        torchless(table, loop)
        if "faults" in parts:
            cancel(table, loop)
            for victim, limit in (("agent-site-1", 15.0), ("superlink", 15.0), ("coordinator", 10.0)):
                killed(table, loop, victim, limit, usual)
        if asked.quick or "memory" not in parts:
            raise SystemExit(table.bad > 0)
    peaks = []
    for count, rounds in ((3, ROUNDS), (6, 4)):
        with idlers(count, asked.folder) as loop:
            overhead(table, loop)  # everything is imported once before memory at rest is read
            peaks.append(memory(table, loop, rounds))
    table.row("coordinator's memory, 6 sites less 3", peaks[1] - peaks[0], 0.5, "blobs")
    raise SystemExit(table.bad > 0)


if __name__ == "__main__":
    main()
