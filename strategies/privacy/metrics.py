"""Metrics under differential privacy: what an evaluation releases, how often a run does, and its noise.

An evaluation is one Gaussian release about all patients of a split: each patient's statistics are clipped,
field by field, to the largest norm that one patient's can have (`Statistics.bounds`), brought to one scale,
summed, and noised once. Everything made of them afterwards is free: means, choosing a round, stopping.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from conf.schema import Plan
from strategies.privacy import noise
from strategies.privacy.accountant import Entry
from tasks.metrics import Statistics

if TYPE_CHECKING:
    from strategies.base import Strategy

MODELS = ("federated", "personal")
"""What is scored under noise; trivial predictors and baselines are exact, and so stay in simulation."""


def covers(plan: Plan, kind: str) -> bool:
    """Whether scores of this kind of model leave a site noised, and charged."""
    return plan.privacy.metrics == "noised" and kind in MODELS


def entry(plan: Plan, times: int = 1) -> Entry:
    """So many evaluations, as a ledger has them."""
    return Entry(plan.privacy.metrics_sigma, 1.0, times)


def planned(plan: Plan, strategy: Strategy) -> int:
    """How often a run asks a site for its scores: validation as it goes, and test at the end."""
    if plan.privacy.metrics != "noised" or not strategy.scored:
        return 0
    rounds, every = plan.federation.rounds, plan.federation.evaluate_every
    often = rounds // every + bool(rounds % every) if every else 1
    return (often + 1) * (2 if strategy.personalises else 1)


def release(patients: Iterable[Statistics], zero: Statistics, sigma: float) -> Tensor:
    """The noised sum of patients' statistics: float64, in the order of `Statistics.to_vector`.

    Args:
        sigma: in units of what one patient can move.

    Raises:
        ValueError: `zero` knows no bound of a patient's part.
    """
    bounds, wide = _wide(zero)
    total = torch.zeros_like(wide)
    for one in patients:
        total += torch.cat([_clipped(part, bounds[name]) for name, part in one.sums().items()])
    # each of the fields that leave moves by 1 at most, in units of its bound
    reach = math.sqrt(sum(bound > 0 for bound in bounds.values()))
    return total + noise.normal(len(wide)) * wide * (sigma * reach)


def told(noised: Statistics) -> Statistics:
    """The same, NaN in the fields that stayed home: what is made of them is no metric."""
    _, wide = _wide(noised)
    return noised.from_vector(torch.where(wide > 0, noised.alone().to_vector(), torch.nan))


def _wide(zero: Statistics) -> tuple[dict[str, float], Tensor]:
    """The bounds in the order of the fields, and each value's."""
    bounds, sums = zero.bounds(), zero.sums()
    each = torch.tensor([bounds[name] for name in sums], dtype=torch.float64)
    return bounds, each.repeat_interleave(torch.tensor([part.numel() for part in sums.values()]))


def _clipped(values: Tensor, bound: float) -> Tensor:
    """Of norm `bound` at most; what is not finite counts nothing."""
    flat = values.double().reshape(-1)
    norm = float(flat.norm())
    if not math.isfinite(norm) or not bound:
        return torch.zeros_like(flat)
    return flat * min(1.0, bound / norm) if norm else flat
