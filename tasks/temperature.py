"""Temperature scaling by exact sums: probabilities that mean what they say, from validation patients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from tasks.base import Case, Prediction, Summed, Sums
from tasks.targets import Target

MODEL = "model."
"""Before the names of the model's tensors in what is known."""

_WIDEST = 4.0  # of |log T|
_LEAST = 1e-30  # probability


@dataclass(frozen=True)
class Temperature(Summed):
    """One number that all logits are divided by (Guo et al., 2017, arXiv:1706.04599, section 4.2).

    log T minimises the negative log-likelihood of validation cases: Newton's method, a step an exchange, kept
    within the bracket that the gradients' signs have shown. Probabilities do as well as logits: they differ
    by a constant of the case. Findings share the temperature.

    Attributes:
        target: what the probabilities are of. build: a model. say: the model's prediction for a case.
    """

    target: Target
    build: Callable[[], nn.Module]
    say: Callable[[nn.Module, Case], Prediction]
    exchanges: int = 8
    largest: float = 2.0**24
    split: str = "val"

    def start(self) -> Sums:
        """A temperature of 1; the model's tensors are put beside it."""
        end = torch.tensor(_WIDEST, dtype=torch.float64)
        return {"log_t": torch.zeros((), dtype=torch.float64), "low": -end, "high": end}

    def zero(self) -> Sums:
        """Negative log-likelihood, and its first two derivatives by log T."""
        none = torch.zeros((), dtype=torch.float64)
        return {"loss": none, "gradient": none, "curvature": none}

    def accumulate(self, case: Case, known: Sums) -> Sums:
        """This case's."""
        if not any(name in case.labels for name in self.target.labels):
            return self.zero()
        truth = self.target.encode(case).double().reshape(-1)
        there = ~truth.isnan()
        rows = self.target.choices(self._said(known, case).scores["given"].detach().double())[there]
        scaled = rows.clamp_min(_LEAST).log() / known["log_t"].exp()
        p = scaled.softmax(1)
        own = scaled.gather(1, truth[there].long()[:, None])[:, 0]
        mean = (p * scaled).sum(1)
        slope, variance = mean - own, (p * scaled.square()).sum(1) - mean.square()
        # by log T the scaled logits change by minus themselves
        return {
            "loss": (scaled.logsumexp(1) - own).sum(),
            "gradient": -slope.sum(),
            "curvature": (variance + slope).sum(),
        }

    def solve(self, sums: Sums, known: Sums) -> Sums:
        """One step of Newton's method, or to the middle of the bracket where that would leave it."""
        at, slope, curvature = known["log_t"], sums["gradient"], sums["curvature"]
        if not bool(slope):
            return known
        low, high = (known["low"], at) if slope > 0 else (at, known["high"])
        step = at - slope / curvature
        if not (curvature > 0 and low <= step <= high):  # at the end it stays where it is
            step = (low + high) / 2
        return {**known, "log_t": step, "low": low, "high": high}

    def predict(self, known: Sums, case: Case) -> Prediction:
        """The model's, at the temperature."""
        return self.scaled(self._said(known, case), known["log_t"].exp())

    def scaled(self, said: Prediction, temperature: Tensor) -> Prediction:
        """A prediction at a temperature."""
        rows = self.target.choices(said.scores["given"].double()).clamp_min(_LEAST).log()
        given = self.target.chosen((rows / temperature).softmax(1))
        return replace(said, scores={**said.scores, "given": given})

    def _said(self, known: Sums, case: Case) -> Prediction:
        if self._held.get("known") is not known:
            weights = {n.removeprefix(MODEL): t for n, t in known.items() if n.startswith(MODEL)}
            self._model.load_state_dict(weights, strict=False)  # integer buffers stay home
            self._held["known"] = known
        return self.say(self._model, case)

    @cached_property
    def _model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            return self.build().eval()

    @cached_property
    def _held(self) -> dict[str, Sums]:
        return {}
