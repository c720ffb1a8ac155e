"""The local loop: one site's training and scoring, on whatever device the site has.

A `Bench` lives as long as the process and is shared by the sites in it (one in a hospital, many in a
simulation): the model is built once, prepared cases are kept. A `Session` is one stage at one site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from client.archive import Archive as Archive
from client.archive import fingerprint
from client.budget import Purpose
from client.deck import hands
from client.policy import Policy
from client.private import PrivateStepper, draws
from client.step import Stepper, ahead, channels_last, chunks, fresh_optimizer, held, precision, repeatable
from conf.schema import Plan
from strategies import build_strategy
from strategies.base import Correct, Strategy, Study, Tensors
from strategies.privacy import metrics
from strategies.privacy.accountant import Entry as Spent
from strategies.privacy.dpsgd import Mechanism
from strategies.privacy.dpsgd import steps as private_steps
from strategies.privacy.preflight import check
from strategies.protocol import Instruction, Refused, Spec, Tree
from tasks.base import Batch, Case, Phase, Prediction
from tasks.data.cache import Entry
from tasks.metrics import Statistics
from tasks.seeds import generator

Example = Mapping[str, Tensor]
Charge = Callable[[Spent, Purpose], None]
"""Reserves a release in the site's ledger, durably, or raises."""

_STUDIES = 8  # each holds a model's first weights, and a trainer may live for many runs


class Bench:
    """Device, model and prepared cases of one process.

    Attributes:
        capacity: bytes of prepared cases kept; beyond it they are prepared again at each use.
        halt: called before each step and each patient scored; raises where the work was called off.
        prefetch: whether a thread makes the next batch during a step.
    """

    def __init__(self, device: str = "auto", capacity: int = 4 * 2**30) -> None:
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(found if device == "auto" else device)
        self.capacity = capacity
        self.halt: Callable[[], None] = lambda: None
        self.prefetch = self.device.type == "cuda"  # on a CPU it would take the core that computes
        # by identity first: a digest costs more than an instruction to a site that has nothing to do
        self._plans: dict[int, tuple[Plan, Study, Strategy]] = {}
        self._studies: dict[str, tuple[Study, Strategy]] = {}
        self._vetted: set[str] = set()
        self._specs: dict[tuple[str, str], Spec] = {}
        self._optimizers: dict[tuple[str, str], torch.optim.Optimizer] = {}
        self._model: tuple[str, nn.Module, list[tuple[Tensor, Tensor]]] | None = None
        self._prepared: dict[tuple[str, str], Example] = {}
        self._held = 0

    def study(self, plan: Plan, given: Callable[[str], object] | None = None) -> tuple[Study, Strategy]:
        """What the plan comes to; built once.

        Args:
            given: as for `Study.of`.

        Raises:
            Refused: (`plan`) it begins with weights that are not here.
            Stop: the plan names something that is not installed here.
        """
        known = self._plans.get(id(plan))
        if known is None:
            if plan.digest not in self._studies:
                if len(self._studies) >= _STUDIES:
                    self._plans, self._studies, self._specs = {}, {}, {}
                if plan.init is not None and given is None:
                    raise Refused("plan", "no first weights")
                strategy, study = build_strategy(plan), Study.of(plan, given)
                strategy.check(study)
                self._studies[plan.digest] = study, strategy
            # the plan is held too, or another could come to have its identity
            known = self._plans[id(plan)] = plan, *self._studies[plan.digest]
        return known[1], known[2]

    def vet(self, plan: Plan, archive: Archive) -> None:
        """Hold a plan with DP against what DP needs, once; a site without training patients cannot.

        Raises:
            Stop: (`CONFIG`) with what does not suit DP.
        """
        patients = archive.patients("train")
        if plan.privacy.mode != "dpsgd" or plan.digest in self._vetted or not patients:
            return
        study, _ = self.study(plan)
        example = study.task.prepare(archive.load(next(iter(patients.values()))[0]))
        batch = study.task.batch([example, example], generator(plan.seed, "", 0, "plan", "preflight"))
        check(plan, study.task, study.fresh(), batch)
        self._vetted.add(plan.digest)

    def spec(self, study: Study, strategy: Strategy, stage: str) -> Spec:
        """`Strategy.spec`, made once.

        Raises:
            Refused: (`stage`).
        """
        key = study.digest, stage
        if key not in self._specs:
            self._specs[key] = strategy.spec(study, stage)
        return self._specs[key]

    def optimizer(
        self, plan: str, phase: str, make: Callable[[], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        """The optimiser of a phase, as good as new: no memory hides at the site.

        Making one anew for every round costs more than a step of a small model.
        """
        key = plan, phase
        if key not in self._optimizers:
            self._optimizers[key] = make()
        made = self._optimizers[key]
        made.state.clear()
        return made

    def model(self, study: Study) -> nn.Module:
        """The plan's model, on the device; its weights are whatever was there last, its counters new."""
        if self._model is None or self._model[0] != study.digest:
            self._optimizers.clear()  # they hold the old model's parameters
            self._prepared, self._held = {}, 0  # for another plan
            model = study.fresh().to(self.device)
            if self.device.type == "cuda":
                channels_last(model)
            floats = _floats(model)
            counters = [(b, b.clone()) for name, b in model.named_buffers() if name not in floats]
            self._model = study.digest, model, counters
        for buffer, new in self._model[2]:
            buffer.copy_(new)
        return self._model[1]

    def seed(self, value: int) -> None:
        """Seed torch's own generators here.

        `torch.manual_seed` takes longer than a step of a small model: it notes the call, with a stack
        trace, for every kind of device that was never used.
        """
        torch.default_generator.manual_seed(value)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(value)

    def example(self, study: Study, archive: Archive, entry: Entry) -> Example:
        """A prepared case, on the device (but for what is read value by value there)."""
        key = study.digest, entry.digest
        if key in self._prepared:
            return self._prepared[key]
        example = {
            n: t if n in study.task.by_value else t.to(self.device)
            for n, t in study.task.prepare(archive.load(entry)).items()
        }
        size = sum(t.nbytes for t in example.values())
        if self._held + size <= self.capacity:
            self._held += size
            self._prepared[key] = example
        return example


class Session:
    """One stage at one site: what a strategy's client half works with (`strategies.base.Local`).

    Args:
        charge: reserves steps in the ledger. rows: whether each patient's own scores may be told.
    """

    def __init__(
        self,
        bench: Bench,
        study: Study,
        archive: Archive,
        policy: Policy,
        asked: Instruction,
        common: Tree,
        state: Tree,
        charge: Charge | None = None,
        *,
        rows: bool = False,
    ) -> None:
        self._charge = charge
        self._rows = rows and study.plan.federation.scores == "raw"
        self._bench = bench
        self._archive = archive
        self._policy = policy
        self.study = study
        self.round = asked.round
        self.site = asked.site
        self.common = common
        self.own = asked.own
        self.state = state
        torch.set_num_threads(study.plan.local.threads)

    @property
    def weight(self) -> int:
        """Training patients, capped so that no site outweighs the plan; 1 where all count the same."""
        federation = self.study.plan.federation
        if federation.weight == "equal":
            return 1
        return min(len(self._archive.patients("train")), federation.max_weight)

    def place(self, tensors: Tensors) -> Tensors:
        """The tensors on the device where training happens."""
        return {name: tensor.to(self._bench.device) for name, tensor in tensors.items()}

    def fit(self, weights: Tensors, *, correct: Correct | None = None, purpose: str = "train") -> Tensors:
        """Train from `weights`: `local.steps` steps, each over `local.batch_size` patients.

        Returns:
            The model's own tensors, not copies: the next `fit` or `score` here overwrites them.

        Raises:
            Refused: (`data`) the site has no training patient; a private run does not tell.
        """
        patients, plan = self._archive.patients("train"), self.study.plan
        if not patients and plan.privacy.mode != "dpsgd":
            raise Refused("data", "no training patient")
        model = held(self._load(weights).train(), self.study.frozen)
        steppers = [self._stepper(phase, model, correct) for phase in self.study.task.phases]
        draw = generator(plan.seed, self.site, self.round, "train", purpose)
        reads = private_steps(plan, self.study.task.phases)
        batches: Iterator[Any] = (
            self._batches(patients, draw)
            if plan.privacy.mode != "dpsgd"
            else self._private(patients, purpose, reads)
        )
        if self._bench.prefetch:
            batches = ahead(islice(batches, reads))
        here = [self._bench.device] if self._bench.device.type == "cuda" else []
        with torch.random.fork_rng(devices=here), repeatable(plan.local.deterministic):
            # layers that draw (dropout) use torch's own generator
            self._bench.seed(int(torch.randint(2**31, (), generator=draw)))
            for step in range(plan.local.steps):
                self._bench.halt()
                progress = (self.round - 1 + step / plan.local.steps) / plan.federation.rounds
                for stepper in steppers:
                    if step % stepper.phase.every == 0:
                        stepper.step(next(batches) if stepper.phase.private else None, progress)
        model.zero_grad(set_to_none=True)
        return {name: tensor.detach() for name, tensor in _floats(model).items()}

    def _stepper(self, phase: Phase, model: nn.Module, correct: Correct | None) -> Stepper:
        plan = self.study.plan
        parameters = {n: p for n, p in model.named_parameters() if phase.parameters(n) and p.requires_grad}
        optimizer = self._bench.optimizer(
            self.study.digest, phase.name, lambda: fresh_optimizer(plan, list(parameters.values()))
        )
        private = phase.private and plan.privacy.mode == "dpsgd"
        made = PrivateStepper if private else Stepper
        return made(phase, model, plan, correct, parameters, optimizer)

    def _private(
        self, patients: Mapping[str, Sequence[Entry]], purpose: str, steps: int
    ) -> Iterator[list[Batch]]:
        """What the private phases read, once so many steps are charged.

        Raises:
            Refused: (`policy`) this site keeps no ledger. Stop: its budget does not allow it.
        """
        mechanism = Mechanism.of(self.study.plan)
        self._charged(Spent(mechanism.sigma, mechanism.rate, steps), "training")
        return draws(
            self.study.plan,
            self.study.task,
            patients,
            lambda entry: self._bench.example(self.study, self._archive, entry),
            site=self.site,
            round=self.round,
            purpose=purpose,
        )

    def _charged(self, entry: Spent, purpose: Purpose) -> None:
        if self._charge is None:
            raise Refused("policy", "no privacy ledger")
        self._charge(entry, purpose)

    def loss(self, weights: Tensors) -> float:
        """Mean of the first private phase's loss over as many batches as hold every training patient.

        Raises:
            Refused: (`policy`, `data`) too few patients, or statistics stay home.
        """
        patients = self._archive.patients("train")
        self._policy.release(len(patients))
        plan = self.study.plan
        if plan.privacy.mode != "none":
            raise Refused("policy", "a training loss is a release that no noise covers")
        model = self._load(weights).eval()
        phase = next(phase for phase in self.study.task.phases if phase.private)
        batches = self._batches(patients, generator(plan.seed, self.site, self.round, "train", "loss"))
        losses = []
        with torch.no_grad():
            for _ in range(-(-len(patients) // (plan.local.batch_size or len(patients)))):
                self._bench.halt()
                for _, part in chunks(next(batches), plan.local.micro_chunk):
                    with precision(plan.local, self._bench.device):
                        losses.append(phase.loss(model, part).double())
        return float(torch.cat(losses).mean())

    def score(self, weights: Tensors, split: str) -> Tensor:
        """Summed statistics of the model on a split: float64.

        Raises:
            Refused: (`policy`, `data`) too few patients, or statistics stay home.
        """
        model = self._load(weights).eval()
        noised = metrics.covers(self.study.plan, str(self.common.get("kind")))
        with torch.no_grad():
            return self._statistics(split, lambda case: self.study.task.predict(model, case), noised=noised)

    def score_sums(self, name: str, known: Tensors, split: str) -> Tensor:
        """Summed statistics of a predictor by sums on a split: float64."""
        predictor = self.study.task.sums()[name]
        return self._statistics(split, lambda case: predictor.predict(known, case))

    def accumulate(self, name: str, known: Tensors) -> Tensors:
        """What an exchange of a predictor by sums adds over its split's cases: float64."""
        predictor = self.study.task.sums()[name]
        patients = self._archive.patients(predictor.split)
        self._policy.release(len(patients), predictor.products)
        total = {name: tensor.clone() for name, tensor in predictor.zero().items()}
        behind = torch.zeros_like(predictor.cells(total))
        for entries in patients.values():
            self._bench.halt()
            inside = torch.zeros_like(behind)
            for entry in entries:
                made = predictor.accumulate(self._archive.load(entry), known)
                inside = inside.maximum(predictor.cells(made))
                for part, tensor in made.items():
                    total[part] += tensor
            behind += inside
        self._release(behind, predictor.products)
        return total

    def _release(self, cells: Tensor, products: int) -> None:
        """Let sums leave over so many patients each; behind one of nobody there is nobody to hide."""
        for behind in cells.tolist():
            if behind:
                self._policy.release(round(behind), products)

    def fingerprint(self) -> Tensor:
        """Histograms of the training cases, cells of fewer patients than the policy's minimum suppressed."""
        made = fingerprint(self.study.task.survey(), self._archive, self._policy, self._bench.halt)
        return made.to_vector()

    def _statistics(
        self, split: str, predict: Callable[[Case], Prediction], *, noised: bool = False
    ) -> Tensor:
        patients, task = self._archive.patients(split), self.study.task

        def scored(entries: Sequence[Entry]) -> Statistics:
            self._bench.halt()
            cases = [self._archive.load(entry) for entry in entries]
            return task.score(cases, [predict(case) for case in cases])

        each = (scored(entries) for entries in patients.values())
        if noised:
            self._policy.release_noised()
            self._charged(metrics.entry(self.study.plan), "metrics")
            return metrics.release(each, task.statistics(), self.study.plan.privacy.metrics_sigma)
        zero = task.statistics()
        self._policy.release(len(patients), zero.products)
        total = sum(each, zero).guarded(self._policy.least(zero.products))
        self._release(total.cells(), zero.products)
        return (total if self._rows else total.alone()).to_vector()

    def _batches(self, patients: Mapping[str, Sequence[Entry]], draw: torch.Generator) -> Iterator[Batch]:
        """Batches of one example each of different patients; every patient once before any twice."""
        for chosen in hands(list(patients), self.study.plan.local.batch_size, draw):
            entries = [patients[k][int(torch.randint(len(patients[k]), (), generator=draw))] for k in chosen]
            examples = [self._bench.example(self.study, self._archive, entry) for entry in entries]
            yield self.study.task.batch(examples, draw)

    def _load(self, weights: Tensors) -> nn.Module:
        model = self._bench.model(self.study)
        here = _floats(model)
        if missing := sorted(here.keys() - weights.keys()):
            # they would be what the model's last user left there: another site, in a simulation
            raise ValueError(f"weights lack {missing[:3]}; a whole model is needed")
        with torch.no_grad():
            for name, tensor in weights.items():
                here[name].copy_(tensor)
        return model


def _floats(model: nn.Module) -> Tensors:
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if t.is_floating_point()}
