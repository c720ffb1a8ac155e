"""How often the audit is right: a correct mechanism, one without noise, one of four times the sensitivity.

    python bench/audit.py [--seeds 60] [--canaries 1000]

A small 2D U-Net under patient-level DP-SGD with ε = 2 over 40 steps (q = 0.1), replayed through the sites'
own loop. A claim is found false where the lower bound exceeds it; that the noise is too small is told beside
it, and counts for the correct mechanism alone. Defects are put into the product's own functions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from row import row

from client.canaries import replay
from conf.load import compose
from conf.schema import Plan
from server.audit.command import verdict
from server.privacy import calibrated
from strategies.privacy import dpsgd, noise

CLAIM = 2.0
SETTINGS = (
    "data.root=.",
    "task.patch=[16,16]",
    "model.channels=[4,8,16]",
    "federation.rounds=4",
    "local.steps=10",
    "local.batch_size=50",
    "privacy=dpsgd",
    f"privacy.epsilon={CLAIM}",
    "privacy.nominal_patients=500",
)


@contextmanager
def replaced(where: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    true = getattr(where, name)
    setattr(where, name, make(true))
    try:
        yield
    finally:
        setattr(where, name, true)


VARIANTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "correct": (noise, "normal", lambda true: true),
    "noise removed": (noise, "normal", lambda _: lambda n: torch.zeros(n, dtype=torch.float64)),
    "sensitivity x4": (dpsgd, "factors", lambda true: lambda gradients, clip: true(gradients, 4 * clip)),
    "half the noise": (noise, "normal", lambda true: lambda n: true(n) / 2),
}


def one(plan: Plan, canaries: int, seed: int) -> dict[str, Any]:
    fits = plan.federation.rounds
    seen = replay(plan, canaries=canaries, fits=fits, seed=seed, device="cpu", watch=lambda *_: None)
    return verdict(plan, seen, CLAIM, seed)


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--seeds", type=int, default=60)
    asked.add_argument("--canaries", type=int, default=1000)
    options = asked.parse_args()
    torch.set_num_threads(1)
    plan = calibrated(compose(list(SETTINGS)).plan)
    met, taken = [], []
    for name, defect in VARIANTS.items():
        bounds, noises, refuted = [], 0, 0
        with replaced(*defect):
            for seed in range(options.seeds):
                began = time.monotonic()
                found = one(plan, options.canaries, seed)
                taken.append(time.monotonic() - began)
                bounds.append(found["epsilon_at_least"])
                noises += found["noise"]["high"] < 1
                refuted += found["refuted"] if name == "correct" else bounds[-1] > CLAIM
        share = 100 * refuted / len(bounds)
        limit, kind = {"correct": (5, "most"), "half the noise": (None, "most")}.get(name, (95, "least"))
        spread = f"bound {min(bounds):.2f} to {max(bounds):.2f}, median {statistics.median(bounds):.2f}"
        note = f"{spread}; noise too small: {noises} of {len(bounds)}"
        met.append(row(f"audit, {name}: claim refuted", share, "%", limit, kind, note))
    met.append(row("audit of one run", max(taken), "s", 20, note=f"longest of {len(taken)}"))
    raise SystemExit(not all(met))


if __name__ == "__main__":
    main()
