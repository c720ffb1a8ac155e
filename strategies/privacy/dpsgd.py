"""Patient-level DP-SGD (Abadi et al., 2016, arXiv:1607.00133), the unit being the patient.

A patient's part in a step is one clipped vector, the *mean* gradient over all of that patient's examples:
however many slices, crops or augmentations there are, taking the patient away moves the sum by at most
the clip norm. Summing clipped examples instead would account for k crops as if they were k patients.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from conf.exits import Exit, Stop
from conf.schema import Plan
from strategies.privacy import noise
from strategies.privacy.quantile import Quantile
from tasks.base import Batch, Phase

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Mechanism:
    """The Gaussian mechanism that one private step is; both ends derive it from the plan.

    Attributes:
        sigma: deviation of the noise, in units of `clip`. clip: largest norm of a patient's gradient.
        rate: q, the probability that a patient takes part in a step.
        expected: patients of a step on average, q times the public number; what the sum is divided by.
        quantile: where the clip norm follows one. A training starts from `clip` and forgets where it came
            to: nothing at the site outlives a round.
    """

    sigma: float
    clip: float
    rate: float
    expected: float
    quantile: Quantile | None = None

    @classmethod
    def of(cls, plan: Plan) -> Mechanism:
        """From public numbers alone: the number of a site's patients is what is to be hidden.

        Raises:
            Stop: (`CONFIG`) nobody has found the noise yet.
        """
        privacy, batch = plan.privacy, plan.local.batch_size
        if not privacy.sigma:
            raise Stop(
                Exit.CONFIG, "privacy.sigma is 0; whoever submits the plan finds it for privacy.epsilon"
            )
        rate, quantile = batch / privacy.nominal_patients, Quantile.of(privacy.adapt)
        return cls(privacy.sigma, privacy.clip, rate, float(batch), quantile)

    def sample(self, keys: Sequence[str]) -> list[str]:
        """The patients of one step; there may be none."""
        picked = noise.chosen(len(keys), self.rate).tolist()
        return [key for key, taken in zip(keys, picked, strict=True) if taken]

    def privatise(self, total: Gradients, clip: float) -> Gradients:
        """A step's gradient from a sum (float64) clipped to `clip`: noise once, then the division.

        Also where nobody was drawn: that a batch was empty must not show.
        """
        sigma = self.quantile.of_sum(self.sigma) if self.quantile else self.sigma
        sizes = [t.numel() for t in total.values()]
        parts = torch.split(noise.normal(sum(sizes)), sizes)
        return {
            name: (t + part.view(t.shape).to(t.device) * (sigma * clip)) / self.expected
            for (name, t), part in zip(total.items(), parts, strict=True)
        }

    def follow(self, clip: float, inside: int, count: int) -> float:
        """The next step's clip norm, where `inside` of `count` patients were within this one's."""
        if self.quantile is None:
            return clip
        return self.quantile.moved(clip, inside, count, self.expected, self.sigma)


def steps(plan: Plan, phases: Iterable[Phase]) -> int:
    """How many steps of one training read patients."""
    return sum(-(-plan.local.steps // phase.every) for phase in phases if phase.private)


class _Mean(nn.Module):
    """A phase's mean loss as a module, so that `functional_call` reaches whatever part the loss calls."""

    def __init__(self, phase: Phase, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._phase = phase

    def forward(self, batch: Batch) -> Tensor:
        return self._phase.loss(self.model, batch).mean()


class Clipper:
    """Sums of patients' clipped gradients, for one phase of one model.

    Args:
        mapped: all patients of a chunk in one pass (`torch.func.vmap`); else one after the other by plain
            autograd, which any network allows and which the mapped form is held against.
        chunk: patients in one pass; 0 = all. It decides the memory, and changes bits.

    Attributes:
        clip: largest norm of a patient's gradient. inside: patients of the last sum who were within it; it
            may leave only with noise.
    """

    def __init__(self, phase: Phase, model: nn.Module, *, clip: float, chunk: int = 0, mapped: bool) -> None:
        self._phase = phase
        self._model = model
        self.clip = clip
        self.inside = 0
        self._chunk = chunk
        self._names = [n for n, p in model.named_parameters() if phase.parameters(n) and p.requires_grad]
        # a copy: on a network with a layer under two names functional_call leaves tensors for parameters
        self._mean = _Mean(phase, copy.deepcopy(model)) if mapped else None

    def total(self, patients: Sequence[Batch]) -> Gradients:
        """The clipped sum over patients, in float64; zeros for none.

        Args:
            patients: for each one the batch of its own examples.
        """
        live = dict(self._model.named_parameters())
        parameters = {name: live[name] for name in self._names}
        total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
        self.inside = 0
        for stacked in self._gradients(parameters, patients):
            share, whole = factors(stacked.values(), self.clip)
            self.inside += int((share == 1).sum())
            for name, g in stacked.items():
                rows = g.reshape(len(g), -1).masked_fill_(~whole[:, None], 0.0)  # 0 times NaN is NaN
                total[name] += (share.to(g.dtype) @ rows).view(g.shape[1:])
        return total

    def _gradients(self, parameters: Mapping[str, Tensor], patients: Sequence[Batch]) -> Iterator[Gradients]:
        """Gradients by name, stacked along a first axis of patients: a chunk at a time."""
        size = self._chunk or len(patients) or 1
        for start in range(0, len(patients), size):
            part = patients[start : start + size]
            if self._mean is not None and all(_shapes(patient) == _shapes(part[0]) for patient in part):
                yield self._mapped(self._mean, parameters, part)
            else:
                yield from (self._looped(parameters, patient) for patient in part)

    def _mapped(self, mean: _Mean, parameters: Mapping[str, Tensor], part: Sequence[Batch]) -> Gradients:
        def loss(moved: Gradients, batch: Batch) -> Tensor:
            value: Tensor = functional_call(mean, moved, (batch,))
            return value

        stacked = {name: torch.stack([patient[name] for patient in part]) for name in part[0]}
        moved = {f"model.{name}": p.detach() for name, p in parameters.items()}
        found: Gradients = vmap(grad(loss), in_dims=(None, 0))(moved, stacked)
        return {name: found[f"model.{name}"] for name in parameters}

    def _looped(self, parameters: Mapping[str, Tensor], patient: Batch) -> Gradients:
        loss = self._phase.loss(self._model, patient).mean()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p)[None] if g is None else g[None]
            for (name, p), g in zip(parameters.items(), found, strict=True)
        }


def _shapes(batch: Batch) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in batch.items()}


def factors(gradients: Iterable[Tensor], clip: float) -> tuple[Tensor, Tensor]:
    """What each patient's gradient is multiplied by (float64), and whether it is finite: `P` each.

    Norms are summed in float64: in float32 the norm of 33 million values comes out 0.19 % too small, and
    more than `clip` would pass.

    Args:
        gradients: `P ...`, one tensor per parameter.
    """
    squares = torch.stack(
        [
            torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1, dtype=torch.float64).square_()
            for g in gradients
        ]
    ).sum(0)
    norms = squares.sqrt()
    whole = norms.isfinite()
    return torch.where(whole, (clip / norms).clamp(max=1.0), 0.0), whole
