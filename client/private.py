"""The local loop under differential privacy: who takes part in a step, and what a step's gradient is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from client.budget import Purpose
from client.ledger import Ledger, Reservation
from client.step import Stepper, precision
from conf.schema import Plan
from strategies.privacy import accountant
from strategies.privacy.dpsgd import Clipper, Mechanism
from strategies.privacy.preflight import gradients
from tasks.base import Batch, Task
from tasks.data.cache import Entry
from tasks.seeds import generator

Prepare = Callable[[Entry], Mapping[str, torch.Tensor]]


class PrivateStepper(Stepper):
    """A phase that reads patients: its gradient is the noised sum of clipped ones.

    What an algorithm adds, what clips the step's whole gradient and what remembers earlier steps comes after
    the noise, and so costs nothing.
    """

    @cached_property
    def _mechanism(self) -> Mechanism:
        return Mechanism.of(self._plan)

    @cached_property
    def _clipper(self) -> Clipper:
        """One for a training: its clip norm moves from step to step where the plan lets it."""
        return Clipper(
            self.phase,
            self._model,
            clip=self._plan.privacy.clip,
            chunk=self._plan.local.micro_chunk,
            mapped=gradients(self._plan) == "vmap",
        )

    def _backward(self, batch: Sequence[Batch]) -> None:
        """Gradients of the patients drawn; of none it is the noise alone."""
        with precision(self._plan.local, next(iter(self._parameters.values())).device):
            total = self._clipper.total(batch)
        mechanism, clipper = self._mechanism, self._clipper
        for name, gradient in mechanism.privatise(total, clipper.clip).items():
            parameter = self._parameters[name]
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        clipper.clip = mechanism.follow(clipper.clip, clipper.inside, len(batch))


def draws(
    plan: Plan,
    task: Task,
    patients: Mapping[str, Sequence[Entry]],
    prepare: Prepare,
    *,
    site: str,
    round: int,
    purpose: str,
) -> Iterator[list[Batch]]:
    """For each step the patients who take part, each with a batch of examples of its own.

    Who takes part comes from the operating system. Which examples, and how they are changed, comes from a
    generator for each patient and step: were they drawn in turn from one generator, a patient less would
    change the draws of all who come later, and the sum by more than the clip norm.
    """
    mechanism, keys, step = Mechanism.of(plan), list(patients), 0
    while True:
        chosen = []
        for key in mechanism.sample(keys):
            draw = generator(plan.seed, site, round, "train", f"{purpose}\x1f{step}\x1f{key}")
            entries = patients[key]
            picked = torch.randint(len(entries), (plan.privacy.examples,), generator=draw).tolist()
            chosen.append(task.batch([prepare(entries[i]) for i in picked], draw))
        yield chosen
        step += 1


@dataclass
class Charges:
    """What one instruction reserves in the site's ledger.

    Attributes:
        rounds: how many the run has left, this one included: near the limit they are priced once.
    """

    ledger: Ledger
    run: str
    rounds: int
    made: list[Reservation] = field(default_factory=list)

    def __call__(self, entry: accountant.Entry, purpose: Purpose) -> None:
        """Reserve a release, durably, before its first step.

        Raises:
            Stop: (`BUDGET`) the hospital's limits do not allow it.
        """
        whole = entry.steps * self.rounds
        self.made.append(self.ledger.reserve(entry, run=self.run, purpose=purpose, whole=whole))

    def settle(self) -> None:
        """The release was made."""
        for reservation in self.made:
            reservation.settle()
