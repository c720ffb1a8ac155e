"""The site's privacy account: what was released about its patients, over all runs.

Append-only and hash-chained (`client/chain.py`). A release is reserved, durably, before its first step; then
it is made; then it is settled. A crash between leaves it reserved, and reserved counts as spent. Lines hold
(mechanism, σ, q, steps, unit), never ε: that is computed over all of them together.

The head (32 bytes) proves every line before it. Kept elsewhere, by the coordinator or the engineer, it is an
*anchor*: a ledger that was rolled back together with its own head does not hold it, and `check` refuses it
until `wardround-site ledger restore` has brought it forward.

Nothing here brings torch, but for PRV where the fast bound is not enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import RLock

from client.budget import Budget, Purpose
from client.chain import Chain, Grip, Head, Record
from conf.exits import Exit, Stop
from strategies.privacy.accountant import Entry, Vector, curve, nothing, prv, rdp_epsilon

_REMEDY = "nothing private is trained before: wardround-site ledger restore BACKUP --anchor HEAD"
#: every release of one kind, by (σ, q): steps
Spent = dict[tuple[float, float], int]


def chain(path: Path) -> Chain:
    """The ledger's file."""
    return Chain(path, "privacy ledger", Exit.LEDGER_BROKEN, _REMEDY)


@dataclass
class _Account:
    """What was released of one kind: kept composed, so that a reservation does not read the past."""

    spent: Spent = field(default_factory=dict)
    divergences: Vector = field(default_factory=nothing)
    #: what PRV has found to be within the budget already: less of it is, too
    cleared: Spent = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        kind = entry.sigma, entry.q
        self.spent[kind] = self.spent.get(kind, 0) + entry.steps
        self.divergences = self.divergences + entry.steps * curve(*kind)

    @property
    def entries(self) -> list[Entry]:
        return [Entry(sigma, q, steps) for (sigma, q), steps in self.spent.items()]

    def allows(self, entry: Entry, whole: int, limit: float, delta: float) -> bool:
        """Whether it may grow by `entry`, of a run that will ask for `whole` such steps."""
        kind = entry.sigma, entry.q
        after = self.spent | {kind: self.spent.get(kind, 0) + entry.steps}
        if all(steps <= self.cleared.get(kind, 0) for kind, steps in after.items()):
            return True
        if rdp_epsilon(self.divergences + entry.steps * curve(*kind), delta) <= limit:
            return True
        for steps in sorted({max(whole, entry.steps), entry.steps}, reverse=True):
            if prv([*self.entries, replace(entry, steps=steps)], delta) <= limit:
                self.cleared = self.spent | {kind: self.spent.get(kind, 0) + steps}
                return True
        return False


@dataclass(frozen=True)
class Line:
    """A reservation as the ledger holds it."""

    n: int
    time: str
    run: str
    population: str
    purpose: str
    entry: Entry

    @classmethod
    def of(cls, record: Record) -> Line:
        """Raises KeyError, TypeError, ValueError: `record` reserves nothing."""
        entry = Entry(**{name: record[name] for name in ("sigma", "q", "steps", "mechanism", "unit")})
        return cls(record["n"], record["time"], record["run"], record["population"], record["purpose"], entry)


@dataclass(frozen=True)
class Reservation:
    """What may be released now. It counts from here on, settled or not."""

    ledger: Ledger
    n: int

    def settle(self) -> None:
        """Say that the release was made.

        Raises:
            Stop: (`LEDGER_BROKEN`); (`DISK_FULL`).
        """
        self.ledger.settle(self.n)


class Ledger:
    """One site's ledger. Threads and processes may share it.

    Args:
        path: its file. budgets: by population of patients; None records without limits (simulation).
    """

    def __init__(self, path: Path, budgets: Mapping[str, Budget] | None) -> None:
        self._chain = chain(path)
        self._budgets = budgets
        self._lock = RLock()
        self._head = Head()
        self._digests = {self._head.digest}
        self._accounts: dict[tuple[str, str], _Account] = {}
        self._lines: list[Line] = []
        self._open: set[int] = set()

    @property
    def head(self) -> bytes:
        """32 bytes that prove every line so far: the anchor to be kept elsewhere.

        Raises:
            Stop: (`LEDGER_BROKEN`).
        """
        with self._lock, self._chain.open() as grip:
            self._read(grip)
        return bytes.fromhex(self._head.digest)

    def check(self, anchor: bytes) -> None:
        """Hold the ledger against the head that another keeps of it.

        Raises:
            Stop: (`LEDGER_BROKEN`) it never had that head: it was deleted or rolled back.
        """
        with self._lock, self._chain.open() as grip:
            self._read(grip)
        if anchor.hex() not in self._digests:
            raise self._chain.changed(
                f"it has {self._head.lines} lines, and never ended with the anchor {anchor.hex()}"
            )

    def reserve(
        self,
        entry: Entry,
        *,
        run: str,
        population: str = "patients",
        purpose: Purpose = "training",
        whole: int = 0,
    ) -> Reservation:
        """Charge a release, durably, before its first step.

        Args:
            whole: steps this run will still ask for, these included: near the limit they are priced once.

        Raises:
            Stop: (`BUDGET`) the hospital's limits do not allow it, nothing was charged; (`LEDGER_BROKEN`);
                (`DISK_FULL`).
        """
        with self._lock, self._chain.open() as grip:
            self._read(grip)
            self._allow(entry, population, purpose, whole)
            n = self._write(grip, entry, run, population, purpose)
        return Reservation(self, n)

    def settle(self, n: int) -> None:
        """Say that the release reserved in line `n` was made. Twice is as once.

        Raises:
            ValueError: line `n` reserves nothing. Stop: (`LEDGER_BROKEN`); (`DISK_FULL`).
        """
        with self._lock, self._chain.open() as grip:
            self._read(grip)
            if not any(line.n == n for line in reversed(self._lines)):
                raise ValueError(f"line {n} of the ledger reserves nothing")
            if n in self._open:
                grip.add(kind="settle", of=n)
                self._read(grip)

    def entries(self, population: str = "patients", purpose: str = "") -> list[Entry]:
        """All releases about a population (for one purpose), equal ones as one entry."""
        with self._lock, self._chain.open() as grip:
            self._read(grip)
            return self._account(population, purpose).entries

    def lines(self) -> tuple[list[Line], set[int]]:
        """Every reservation, and the numbers of those that were not settled.

        Raises:
            Stop: (`LEDGER_BROKEN`).
        """
        with self._lock, self._chain.open() as grip:
            self._read(grip)
            return list(self._lines), set(self._open)

    def bring_forward(self, missing: Iterable[tuple[Entry, str, str, str]], anchors: Iterable[bytes]) -> None:
        """Charge releases that the ledger has lost, and take the anchors as known: what a restore ends with.

        Args:
            missing: (entry, run, population, purpose) of each.
        """
        with self._lock, self._chain.open() as grip:
            self._read(grip)
            for entry, run, population, purpose in missing:
                self._write(grip, entry, run, population, purpose)
            for anchor in anchors:
                grip.add(kind="restore", anchor=anchor.hex())
            self._read(grip)

    def _allow(self, entry: Entry, population: str, purpose: Purpose, whole: int) -> None:
        if self._budgets is None:
            return
        budget = self._budgets.get(population)
        if budget is None:
            known = ", ".join(self._budgets) or "none"
            raise Stop(Exit.BUDGET, f"population {population!r} has no budget; site.yaml privacy has {known}")
        place = f"site.yaml privacy.{population}"
        if entry.sigma < budget.min_sigma:
            raise Stop(Exit.BUDGET, f"sigma is {entry.sigma:g}; {place}.min_sigma is {budget.min_sigma:g}")
        if purpose == "training" and entry.q > budget.max_q:
            raise Stop(Exit.BUDGET, f"q is {entry.q:g}; {place}.max_q is {budget.max_q:g}")
        limits = {"": (budget.epsilon, "epsilon")}
        if (part := budget.purposes.get(purpose)) is not None:
            limits[purpose] = part, f"purposes.{purpose}"
        for kind, (limit, name) in limits.items():
            if not self._account(population, kind).allows(entry, whole, limit, budget.delta):
                raise Stop(
                    Exit.BUDGET,
                    f"{entry.steps} steps at sigma={entry.sigma:g}, q={entry.q:g} go beyond {place}.{name} ="
                    f" {limit:g}; wardround-site ledger shows what is left",
                )

    def _write(self, grip: Grip, entry: Entry, run: str, population: str, purpose: str) -> int:
        grip.add(kind="reserve", run=run, population=population, purpose=purpose, **vars(entry))
        self._read(grip)
        return self._head.lines

    def _read(self, grip: Grip) -> None:
        """Take in what this and other processes wrote since the last time."""
        if grip.head.lines < self._head.lines:
            raise self._chain.changed(f"it has {grip.head.lines} lines, and had {self._head.lines}")
        if grip.head == self._head:
            return
        for record, head in grip.since(self._head):
            try:
                self._take(record)
            except (KeyError, TypeError, ValueError) as error:
                why = f"line {head.lines} is no entry ({type(error).__name__}: {error})"
                raise self._chain.changed(why) from None
            self._head = head
            self._digests.add(head.digest)

    def _take(self, record: Record) -> None:
        kind, n = record["kind"], record["n"]
        if kind == "reserve":
            line = Line.of(record)
            for part in ("", line.purpose):
                self._account(line.population, part).add(line.entry)
            self._lines.append(line)
            self._open.add(n)
        elif kind == "settle":
            self._open.discard(record["of"])
        elif kind == "restore":
            self._digests.add(record["anchor"])
        else:
            raise ValueError(f"kind {kind!r}")

    def _account(self, population: str, purpose: str) -> _Account:
        return self._accounts.setdefault((population, purpose), _Account())
