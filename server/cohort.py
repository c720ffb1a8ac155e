"""Who is asked in a round."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from conf.schema import Plan
from tasks.seeds import generator


def cohort(plan: Plan, round: int, sites: Sequence[str]) -> tuple[str, ...]:
    """`federation.cohort` sites (0 = all), drawn from the seed, in the order of their names.

    Raises:
        ValueError: more sites asked for than there are.
    """
    names = sorted(sites)
    size = plan.federation.cohort or len(names)
    if size > len(names):
        raise ValueError(f"federation.cohort is {size}; there are {len(names)} sites")
    if size == len(names):
        return tuple(names)
    draw = generator(plan.seed, "", round, "cohort", "sites")
    chosen = torch.randperm(len(names), generator=draw)[:size].tolist()
    return tuple(names[i] for i in sorted(chosen))
