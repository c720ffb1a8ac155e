"""The round loop: ask, check, fold, checkpoint, evaluate. It knows an exchange, not what carries it.

For each round: cohort → the strategy yields asks, the exchange returns what they folded to → the
strategy returns model and state → checkpoint (atomic) → evaluation → metrics.jsonl (atomic). Killed
anywhere, `run` goes on from the newest intact checkpoint and ends with the bytes of an undisturbed run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch

from conf.exits import Exit, Stop
from conf.files import no_space, write_atomic
from server.checkpoint import RESULT, Progress, kept, latest, load, save
from server.cohort import cohort
from server.evaluate import Line, Metrics
from server.exchange import Exchange, Order
from server.journal import Journal
from server.sums import fitted
from strategies.base import Abandon, Ask, Strategy, Study, Tensors
from strategies.exact import MAX_ADDS, Collected, Folded
from strategies.protocol import Epoch, Failure, Instruction, Refused, Spec, Tree, apart

ATTEMPTS = 3

Watch = Callable[[str, int], None]
"""Told what just happened, and in which round: `start`, `ask`, `answer`, `fold`, `checkpoint`, `evaluate`."""


@dataclass
class Run:
    """One run of a plan over named sites, in a folder.

    Attributes:
        folder: holds checkpoints/, journal.jsonl, metrics.jsonl, timing.jsonl.
        id: random; names the run to its sites, and stands in nothing that two equal runs share.
        keep: checkpoints kept.
    """

    study: Study
    strategy: Strategy
    sites: Sequence[str]
    exchange: Exchange
    folder: Path
    id: str
    code: str
    keep: int = 2
    watch: Watch = lambda *_: None
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        asked = self.study.plan.federation.cohort or len(self.sites)
        if asked > MAX_ADDS:
            room = f"a sum has room for {MAX_ADDS}: set federation.cohort"
            raise Stop(Exit.CONFIG, f"{asked} sites would be asked in a round; {room}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.folder / "journal.jsonl")
        self.metrics = Metrics(self.folder / "metrics.jsonl", self.study.plan)
        found, damaged = latest(self.folder / "checkpoints")
        self.warnings += [f"checkpoint {text} is damaged; going on from the one before" for text in damaged]
        self.progress = found or Progress(
            0, self.study.initial, self.strategy.start(self.study, tuple(sorted(self.sites)))
        )
        if found is None:
            self._save()
        self.metrics.forget(after=self.progress.round)
        self.exchange.restore(self.progress.exchange, self.id)

    @property
    def rounds(self) -> int:
        return self.study.plan.federation.rounds

    def train(self, *, evaluate: bool = True) -> Progress:
        """All rounds that are left.

        Raises:
            Stop: `SITE_REFUSED` no site accepts the plan; `TOO_FEW_REPLIES` a round had too few valid
                replies, three times; `DISK_FULL`.
        """
        self._propose()
        if evaluate:
            self._evaluate()  # a crash may have fallen between a checkpoint and its evaluation
        while self.progress.round < self.rounds and not self._idle():
            began = time.monotonic()
            self.watch("start", self.progress.round + 1)
            self.progress = self._round(self.progress.round + 1)
            trained = time.monotonic()
            self._save()
            self.watch("checkpoint", self.progress.round)
            saved = time.monotonic()
            if evaluate:
                self._evaluate()
            self._time(train=trained - began, checkpoint=saved - trained, evaluate=time.monotonic() - saved)
        if evaluate:
            self._conclude()
        return self.progress

    def _best(self) -> tuple[int, int]:
        """The round that did best on validation, where anyone asks for it, and evaluations since."""
        f = self.study.plan.federation
        return self.metrics.best(f.metric) if f.by_validation else (0, 0)

    def _idle(self) -> bool:
        """Whether validation has not gained for as long as the plan has patience."""
        patience = self.study.plan.federation.patience
        return bool(patience) and self._best()[1] >= patience

    def _propose(self) -> None:
        """Plan and first weights travel once; a site that refuses is not fatal while enough others accept."""
        plan = self.study.plan
        ask = Ask(
            tuple(sorted(self.sites)),
            "plan",
            {"plan": plan.canonical(), **({"initial": self.study.initial} if plan.init else {})},
            Spec({}, 1, 1.0),
            counts=False,
        )
        folded = self.ask(ask, 0, 0)
        least = plan.federation.min_replies
        if len(folded.sites) < least:
            raise Stop(
                Exit.SITE_REFUSED,
                f"{len(folded.sites)} sites accept the plan; need {least}: {_codes(folded)}",
            )

    def _round(self, r: int) -> Progress:
        """One round: the first attempt that is not abandoned."""
        reasons = []
        for attempt in range(ATTEMPTS):
            self.exchange.restore(self.progress.exchange, self.id)
            try:
                return self._attempt(r, attempt)
            except Abandon as reason:
                reasons.append(str(reason))
        self.journal.given_up(r)
        raise Stop(
            Exit.TOO_FEW_REPLIES,
            f"round {r} of {self.rounds} was abandoned {ATTEMPTS} times: {reasons[-1]} "
            "(setting: federation.min_replies; each site's incidents.jsonl has the detail)",
        )

    def _attempt(self, r: int, attempt: int) -> Progress:
        before = self.progress
        settled: dict[str, Epoch] = {}
        chosen = cohort(self.study.plan, r, self.sites)
        steps = self.strategy.round(r, before.state, before.model, self.study, chosen)
        folded: Folded | None = None
        try:
            while True:
                ask = next(steps) if folded is None else steps.send(folded)
                if isinstance(folded, Collected):
                    folded.close()
                folded = self.ask(ask, r, attempt)
                least = self.study.plan.federation.min_replies if ask.least is None else ask.least
                if len(folded.sites) < least:
                    raise Abandon(f"{len(folded.sites)} valid replies, need {least}: {_codes(folded)}")
                if ask.counts:
                    settled |= folded.sites
        except StopIteration as end:
            model, state = end.value
        finally:
            if isinstance(folded, Collected):
                folded.close()
        settled = before.settled | settled
        return Progress(r, model, state, settled, self.exchange.snapshot(), self._average(model))

    def _average(self, model: Tensors) -> Tensors:
        """The exponential moving average over rounds, which begins with the first one's model."""
        beta, before = self.study.plan.federation.ema, self.progress.average
        if not beta:
            return {}
        return {n: torch.lerp(t, before[n], beta) for n, t in model.items()} if before else dict(model)

    def ask(self, ask: Ask, r: int, attempt: int) -> Folded:
        """Send one ask out and return what it folded to; failures are journaled as they happen."""
        known = self.journal.failed(r, attempt, ask.stage)
        busy = self.exchange.busy() if ask.need is not None else frozenset()
        plan = self.study.plan
        instructions = {
            site: Instruction(
                run=self.id,
                round=r,
                attempt=attempt,
                stage=ask.stage,
                site=site,
                settled=self.progress.settled.get(site),
                plan=self.study.digest,
                code=self.code,
                common="",
                own=dict(ask.own.get(site, {})),
            )
            for site in ask.sites
            if site not in busy and (site not in known or ask.need is not None)
        }

        def heard(site: str, failure: Failure | None) -> None:
            if failure is not None:
                self.journal.failure(r, attempt, ask.stage, site, failure)
            self.watch("answer", r)

        self.watch("ask", r)
        order = Order(ask, r, instructions, known, plan.federation.round_timeout_s)
        folded = self.exchange(order, heard)
        self.journal.answered(r, attempt, ask.stage, sorted(folded.sites))
        self.watch("fold", r)
        return folded

    def _evaluate(self) -> None:
        """Score the model on validation, where that is due and not yet done.

        Raises:
            Stop: (`CONFIG`, `SITE_REFUSED`) the plan wants to choose by it, and cannot.
        """
        r, f = self.progress.round, self.study.plan.federation
        due = r == self.rounds or bool(f.evaluate_every and r % f.evaluate_every == 0)
        if r == 0 or not due or not self.strategy.scored or self.metrics.has(r, split="val"):
            return
        self._score_all(self.progress, "val")
        if f.by_validation and not self.metrics.has(r, split="val"):
            raise Stop(
                Exit.SITE_REFUSED,
                "no site tells how the model does on validation, and federation.choose=best and patience go "
                "by it; set choose=last and patience=0",
            )

    def _conclude(self) -> None:
        """Score the model that is the result on test patients, and keep it.

        Raises:
            Stop: (`CHECKPOINT_DAMAGED`, `DISK_FULL`).
        """
        if not self.strategy.scored:
            return
        best, chosen = self.progress.round, self.progress
        if self.study.plan.federation.choose == "best":
            best = self._best()[0] or best
        if best != chosen.round:
            path = self.folder / "checkpoints" / f"round-{best:04d}"
            try:
                chosen = load(path)
            except (OSError, ValueError, KeyError, TypeError, Refused) as error:
                raise Stop(Exit.CHECKPOINT_DAMAGED, f"the best model, {path}, is gone: {error}") from None
        if not self.metrics.has(best, split="test"):
            self._score_all(chosen, "test")
        with no_space(self.folder / RESULT, "wardround resume"):
            write_atomic(self.folder / RESULT, safetensors.torch.save(apart(chosen.result)))

    def _score_all(self, progress: Progress, split: str) -> None:
        """Score a round's model, and the sites' own, as one evaluation."""
        down = self.strategy.down(progress.state, progress.result, self.study)
        lines = self.score("federated", {"kind": "federated", **down}, split, progress.round)
        if self.strategy.personalises:
            lines += self.score("personal", {"kind": "personal", **down}, split, progress.round)
        self.metrics.add(lines)
        self.watch("evaluate", self.progress.round)

    def score(self, model: str, down: Tree, split: str, r: int = 0) -> list[Line]:
        """Ask every site to score a model on a split; a line a site, one over all, of round `r` (0: this)."""
        stage = f"evaluate/{model}/{split}"
        spec = self.strategy.spec(self.study, stage)
        ask = Ask(
            tuple(sorted(self.sites)), stage, {**down, "split": split}, spec, self.metrics.fold, counts=False
        )
        folded = self.ask(ask, self.progress.round, 0)
        if not isinstance(folded, Collected):
            raise TypeError("an evaluation is collected")
        with folded:
            zero = self.study.task.statistics()
            return self.metrics.lines(folded, zero, r or self.progress.round, split, model)

    def trivial(self, name: str, splits: Sequence[str]) -> list[Line]:
        """Fit a trivial predictor by exact sums over the sites, and score it like a model."""
        known = fitted(self, name, {})
        down = {"kind": "trivial", "name": name, "known": known}
        return [line for split in splits if known for line in self.score(name, down, split)]

    def _save(self) -> None:
        folder = self.folder / "checkpoints"
        save(folder, self.progress, self.keep, self._best()[0])
        if not (self.folder / "blobs").is_dir():
            return
        # payloads of outstanding asynchronous jobs live as long as a checkpoint that names them
        needed = {job["common"] for tree in kept(folder) for job in tree.get("jobs", [])}
        for blob in (self.folder / "blobs").glob("*.safetensors"):
            if blob.stem not in needed:
                blob.unlink()

    def _time(self, **seconds: float) -> None:
        entry = {"round": self.progress.round, **{k: round(v, 4) for k, v in seconds.items()}}
        path = self.folder / "timing.jsonl"
        with no_space(path, "wardround resume"), path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _codes(folded: Folded) -> str:
    """Failure codes with the sites that gave them."""
    by: dict[str, list[str]] = {}
    for site, failure in sorted(folded.failures.items()):
        by.setdefault(failure.code, []).append(site)
    named = "; ".join(
        f"{code}: {', '.join(sites[:5])}{' …' if len(sites) > 5 else ''}" for code, sites in by.items()
    )
    return named or "no site was asked"
