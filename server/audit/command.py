"""`wardround audit RUN`: what an attacker can show about a finished run, beside what the run claims.

This is a composition root like the simulation: the canaries go through the sites' own code.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from client.canaries import Replay, replay
from conf.exits import Exit, Stop
from conf.files import no_space, write_atomic
from conf.schema import Plan
from server.audit.bound import deviation, guess
from server.audit.membership import membership
from server.progress import bar
from server.runfolder import RunFolder
from server.simulate import Federation
from strategies.base import Study
from strategies.privacy.accountant import prv
from strategies.privacy.dpsgd import steps

Found = dict[str, Any]

CONFIDENCE = 0.95
ATTACK = "gradient canaries, one run"


def audit(run: Path, *, canaries: int, references: int, seed: int, rounds: int = 0) -> Found:
    """Audit a simulated run; what was found is also in its `audit.json`.

    Args:
        canaries: m; as many as the model has values at most. references: models to train for membership,
            even. rounds: replay only so many; 0 = what the ledgers hold.

    Raises:
        Stop: (`NO_RUN`) no run, of real sites, or not finished; (`CONFIG`) an odd number of references.
    """
    if references % 2:
        raise Stop(
            Exit.CONFIG, f"references is {references}; need an even number: they come in pairs of halves"
        )
    folder = RunFolder.open(run.absolute())
    if folder.settings.runtime.name == "flower":
        raise Stop(
            Exit.NO_RUN, f"{run} ran at real sites, whose data are not here; audit a simulation of its plan"
        )
    plan = folder.settings.plan
    found: Found = {"run": folder.id, "canaries": None, "membership": None}
    if plan.privacy.mode != "none":
        found["canaries"] = claim(folder, canaries=canaries, seed=seed, rounds=rounds)
    federation = Federation.of(folder.settings.data, plan)
    seen = membership(folder, federation, references, seed)
    found["membership"] = asdict(seen) | {"seed": seed, "fpr": 0.001}
    with no_space(folder.path, "wardround audit again"):
        text = json.dumps(found, indent=1, sort_keys=True, allow_nan=False) + "\n"
        write_atomic(folder.path / "audit.json", text.encode())
    return found


def claim(folder: RunFolder, *, canaries: int, seed: int, rounds: int = 0) -> Found:
    """Replay a run's mechanism on canaries, and hold what they prove against what the run promised.

    Raises:
        Stop: (`NO_RUN`) the run is not finished.
    """
    plan = folder.settings.plan
    try:
        promised = json.loads((folder.path / "privacy.json").read_bytes())
    except (OSError, ValueError):
        raise Stop(
            Exit.NO_RUN, f"{folder.path} has no readable privacy.json; finish it with wardround resume"
        ) from None
    # noised scores stand there too; the rate is that of training steps alone
    step = plan.privacy.sigma, plan.local.batch_size / plan.privacy.nominal_patients
    held = max(
        sum(e["steps"] for e in site if (e["sigma"], e["q"]) == step) for site in promised["charged"].values()
    )
    each = steps(plan, Study.of(plan).task.phases)
    whole = -(-held // each)
    fits = min(rounds, whole) if rounds else whole
    with bar("canaries") as progress:
        seen = replay(
            plan,
            canaries=canaries,
            fits=fits,
            seed=seed,
            device=folder.settings.runtime.device,
            watch=progress,
        )
    epsilon = promised["epsilon"] if fits == whole else None
    return verdict(plan, seen, math.inf if epsilon is None else float(epsilon), seed) | {"held": held}


def verdict(plan: Plan, seen: Replay, promised: float, seed: int) -> Found:
    """What a replay proves, in numbers and in words.

    Args:
        promised: ε that the run claims for at least so many steps; infinite where it claims none.
    """
    delta, m = plan.privacy.delta, len(seen.scores)
    best = guess(seen.scores.numpy(), seen.included.numpy(), delta, CONFIDENCE)
    noise = [
        value / (seen.sigma * math.sqrt(seen.steps)) for value in deviation(seen.sums[~seen.included].numpy())
    ]
    claimed = min(promised, prv(seen.charged, delta))
    if best.epsilon > claimed:
        said = f"refuted: the lower bound exceeds the claim, {best.epsilon:.2f} > {claimed:.2f}"
    elif noise[2] < 1:
        said = f"refuted: the noise's deviation is {noise[0]:.2f} times the plan's"
    elif noise[1] > 1:
        said = (
            f"not refuted; but the noise's deviation is {noise[0]:.2f} times the plan's, more than it needs"
        )
    else:
        said = "not refuted"
    return {
        "words": f"ε ≥ {best.epsilon:.2f} at {CONFIDENCE:.0%}, {ATTACK}, m = {m}, seed {seed}".replace(
            "%", " %"
        ),
        "verdict": said,
        "refuted": said.startswith("refuted"),
        "epsilon_at_least": best.epsilon,
        "epsilon_claimed": claimed if math.isfinite(claimed) else None,
        "confidence": CONFIDENCE,
        "delta": delta,
        "attack": ATTACK,
        "m": m,
        "included": int(seen.included.sum()),
        "seed": seed,
        "guesses": {"in": best.high, "out": best.low, "right": best.right},
        "steps": seen.steps,
        "sigma": seen.sigma,
        "q": plan.local.batch_size / plan.privacy.nominal_patients,
        "noise": dict(zip(("measured", "low", "high"), noise, strict=True)) | {"confidence": 0.999},
        "scores": {
            name: np.histogram(seen.scores.numpy()[where], bins=_edges(seen))[0].tolist()
            for name, where in (("in", seen.included.numpy()), ("out", ~seen.included.numpy()))
        },
    }


def _edges(seen: Replay) -> list[float]:
    """Twenty bins over all scores."""
    low, high = float(seen.scores.min()), float(seen.scores.max())
    return [float(edge) for edge in np.linspace(low, max(high, low + 1e-9), 21)]
