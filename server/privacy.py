"""What a run with differential privacy promises a patient, in its own record."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.exits import Exit, Stop
from conf.files import no_space, write_atomic
from conf.schema import Plan
from strategies import build_strategy
from strategies.base import GROUPS, Study, fresh_model
from strategies.privacy import central, metrics
from strategies.privacy.accountant import Entry, across, calibrate, merged, prv, replace_one
from strategies.privacy.dpsgd import steps
from tasks.base import build_task
from tasks.networks.norms import swap_norms

#: what stands beside the noised updates, in a simulation and in a deployed run
_EXACT = (
    "metrics, and the sums behind trivial rows, are exact: they are not accounted for (simulation only)",
    "choosing a round or a setting by those metrics is not accounted for",
)
_NOISED = (
    "metrics are noised and accounted for; trivial rows and baselines are exact and not (simulation only)",
)
_SIMULATED = (
    "baselines are trained for comparison and are no part of this promise",
    "what data.plan=auto counted before the run is exact and not accounted for",
)
_DEPLOYED = (
    "counted from what the sites were asked to do: each one's ledger has the last word, over all runs",
)


def calibrated(plan: Plan) -> Plan:
    """The plan with the least noise whose ε, over every round and evaluation it has, is what it asks for.

    A round that has to be tried again costs more than planned: the ledgers know, and so does `statement`.

    Raises:
        Stop: (`CONFIG`) no noise is enough.
    """
    privacy = plan.privacy
    if privacy.mode == "none" or privacy.sigma:
        return plan
    whole, rate, scores = plan.federation.rounds, 1.0, list[Entry]()
    if privacy.mode == "dpsgd":
        study, strategy = Study.of(plan), build_strategy(plan)
        whole *= strategy.fits * steps(plan, study.task.phases)
        rate = plan.local.batch_size / privacy.nominal_patients
        scores = [metrics.entry(plan, times)] if (times := metrics.planned(plan, strategy)) else []
    try:
        sigma = calibrate(privacy.epsilon, privacy.delta, whole, rate, scores)
    except ValueError as error:
        raise Stop(Exit.CONFIG, f"privacy.epsilon is {privacy.epsilon:g}: {error}") from None
    found = privacy.model_copy(update={"sigma": sigma, "epsilon": 0.0})
    return plan.model_copy(update={"privacy": found})


def charges(plan: Plan, journal: Path) -> dict[str, list[Entry]]:
    """What each site was asked to release in a run, as the coordinator saw it; a failure may have released.

    Args:
        journal: the run's `journal.jsonl`.
    """
    study, strategy = Study.of(plan), build_strategy(plan)
    rate = plan.local.batch_size / plan.privacy.nominal_patients
    training = Entry(plan.privacy.sigma, rate, strategy.fits * steps(plan, study.task.phases))

    def price(stage: str) -> Entry | None:
        kind, _, detail = stage.partition("/")
        if kind == "train":
            return training
        scored = kind == "evaluate" and metrics.covers(plan, detail.partition("/")[0])
        return metrics.entry(plan) if scored else None

    seen = {
        (site, line["round"], line["attempt"], line["stage"])
        for line in map(json.loads, journal.read_text().splitlines())
        for site in line.get("answered", [line.get("site")])
        if "stage" in line
    }
    made = defaultdict[str, list[Entry]](list)
    for site, _, _, stage in sorted(seen):
        if (entry := price(stage)) is not None:
            made[site].append(entry)
    return dict(made)


def statement(
    plan: Plan, entries: Mapping[str, Sequence[Entry]], *, deployed: bool = False
) -> dict[str, Any]:
    """ε at the plan's δ, over all that was charged to each site's ledger; hospitals share no patient.

    Args:
        entries: of this run, by site.
    """
    delta = plan.privacy.delta
    # sites that were asked equally often have equal entries, and PRV takes a second for each
    kinds = {merged(found) for found in entries.values()}
    add_remove = {kind: prv(kind, delta) for kind in kinds}
    replaced = {kind: replace_one(kind, delta) for kind in kinds}
    exact = _NOISED if plan.privacy.metrics == "noised" else _EXACT
    by_site = {name: add_remove[merged(found)] for name, found in entries.items()}
    return {
        "unit": "patient, at one hospital",
        "mechanism": "DP-SGD: Poisson sampling, Gaussian noise",
        "accountant": "PRV (Opacus), all steps composed at once",
        "clip": plan.privacy.clip,
        "delta": delta,
        "epsilon": _finite(across(by_site)),
        "epsilon_replace_one": _finite(max(replaced.values(), default=0.0)),
        "charged": {
            name: [{"sigma": e.sigma, "q": e.q, "steps": e.steps} for e in merged(found)]
            for name, found in sorted(entries.items())
        },
        **_swapped(plan),
        "not_covered": list(_DEPLOYED) if deployed else [*exact, *_SIMULATED],
    }


def central_statement(plan: Plan, sites: int) -> dict[str, Any]:
    """The same where the coordinator adds the noise, over the rounds of a finished run."""
    spent, delta = [central.entry(plan)], plan.privacy.delta
    return {
        "unit": "site, in all rounds",
        "mechanism": "clipped updates of sites, Gaussian noise at the coordinator; no sampling (q = 1)",
        "accountant": "PRV (Opacus), all rounds composed at once",
        "clip": plan.privacy.clip,
        "delta": delta,
        "epsilon": _finite(prv(spent, delta)),
        "epsilon_replace_one": _finite(replace_one(spent, delta)),
        "charged": {"coordinator": [{"sigma": e.sigma, "q": e.q, "steps": e.steps} for e in spent]},
        "noise_to_signal": noise_to_signal(plan, sites),
        **_swapped(plan),
        "not_covered": [
            *_EXACT,
            "the coordinator sees every site's update, and is trusted; a patient is not the unit",
            *_SIMULATED,
        ],
    }


def _swapped(plan: Plan) -> dict[str, list[str]]:
    """Where the model has a GroupNorm in the place of a BatchNorm."""
    if not plan.privacy.swap_norms:
        return {}
    before = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"swap_norms": False})})
    return {"swapped_norms": swap_norms(fresh_model(before, build_task(plan)), GROUPS)}


def noise_to_signal(plan: Plan, sites: int) -> float:
    """Norm of a round's noise over the largest that the mean of the updates can have."""
    study = Study.of(plan)
    size = sum(study.initial[name].numel() for name in build_strategy(plan).shared(study))
    return central.noise_to_signal(plan, size, sites)


def useless(plan: Plan, sites: int) -> str:
    """A plain word where central DP leaves nothing to learn from; empty elsewhere."""
    if plan.privacy.mode != "central" or (ratio := noise_to_signal(plan, sites)) <= 1:
        return ""
    asked = plan.federation.cohort or sites
    return (
        f"privacy.mode central with {asked} sites: a round's noise is {ratio:.1f} times the largest update it"
        " can carry, so little or nothing is learned; use many more sites, a smaller model, or privacy=dpsgd"
    )


def keep(made: Mapping[str, Any], folder: Path) -> None:
    """Write `privacy.json` into a run's folder."""
    with no_space(folder, "wardround resume"):
        write_atomic(folder / "privacy.json", (json.dumps(made, indent=1, sort_keys=True) + "\n").encode())


def _finite(epsilon: float) -> float | None:
    """JSON has no infinity; none says that there is no bound."""
    return epsilon if math.isfinite(epsilon) else None
