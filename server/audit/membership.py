"""Membership inference on a run's model: whose data was it trained on, by the loss, and beside other models.

Members are the training patients of all simulated sites, the others their test patients; a patient counts
once. Reference models are trained by the same plan on other patients: a loss that is low for every model
says nothing, one that is low for this model alone does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from conf.exits import Exit, Stop
from conf.files import write_atomic
from server.audit.bound import Attack, Vector, attack
from server.checkpoint import latest
from server.runfolder import RunFolder
from server.simulate import Federation, Simulation
from server.transfer import FILE
from strategies.base import Tensors
from tasks.base import Task, build_task
from tasks.data.cache import Cache, Entry
from tasks.seeds import generator

#: cases of a patient that are looked at, and random patches of each
_CASES, _DRAWS = 8, 2


@dataclass(frozen=True)
class Membership:
    """What the attacks found.

    Attributes:
        members, others: numbers of patients. references: models beside the run's.
        attacks: by name.
    """

    members: int
    others: int
    references: int
    attacks: Mapping[str, Attack]


def membership(folder: RunFolder, federation: Federation, references: int, seed: int) -> Membership:
    """Attack the newest checkpoint's model.

    Args:
        references: how many, even: each patient is unknown to half of them. 0: the loss attack alone.

    Raises:
        Stop: (`ONE_PATIENT`) no test patient to compare with; (`NO_RUN`) no model yet.
    """
    members, others = _of(federation, "train"), _of(federation, "test")
    if not others:
        raise Stop(
            Exit.ONE_PATIENT, "no test patient: membership has nobody to tell members from; use a test split"
        )
    patients, plan = {**members, **others}, folder.settings.plan
    task = build_task(plan)

    def losses(model: Tensors) -> Vector:
        return patient_losses(task, model, patients, federation.cache, seed)

    own = losses(trained(folder.path))
    inside = np.array([key in members for key in patients])
    found = {"loss": attack(-own[inside], -own[~inside])}
    if references:
        known, theirs = [], []
        for number, half in enumerate(halves(federation, references, seed)):
            known.append([key in half for key in patients])
            theirs.append(losses(_reference(folder, federation, half, seed, number)))
        scores = relative(own, np.array(theirs), np.array(known))
        found["reference models"] = attack(scores[inside], scores[~inside])
    return Membership(len(members), len(others), references, found)


def relative(own: Vector, theirs: Vector, known: NDArray[np.bool_]) -> Vector:
    """log of p(x | model) over its mean under the references that do not know x; p is exp(-loss).

    Its order is that of offline RMIA (Zarifzadeh, Liu, Shokri 2024, arXiv:2312.03262, equation 4) for any
    fixed population, and with one reference that of difficulty calibration (arXiv:2111.08440).

    Args:
        own: `P` losses. theirs: `R P`. known: `R P`, whether the reference was trained on the patient.
    """
    fresh = np.where(known, -np.inf, -theirs)
    scores: Vector = -own - (np.logaddexp.reduce(fresh, axis=0) - np.log((~known).sum(axis=0)))
    return scores


def patient_losses(
    task: Task, weights: Tensors, patients: Mapping[str, Sequence[Entry]], cache: Cache, seed: int
) -> Vector:
    """Mean loss of each patient in the first phase that reads patients; every model sees the same patches."""
    model = task.build_model()
    model.load_state_dict(dict(weights), strict=False)  # integer buffers never travel
    model.eval()
    phase, found = next(phase for phase in task.phases if phase.private), []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for patient, entries in patients.items():
            examples = [task.prepare(cache.load(entry)) for entry in entries[:_CASES]]
            draw = generator(seed, "", 0, "audit", patient)
            batches = [task.batch([example], draw) for example in examples for _ in range(_DRAWS)]
            found.append(float(np.mean([phase.loss(model, batch).mean().item() for batch in batches])))
    return np.array(found)


def trained(run: Path) -> Tensors:
    """The newest checkpoint's model.

    Raises:
        Stop: (`NO_RUN`) there is none; (`CHECKPOINT_DAMAGED`).
    """
    progress, _ = latest(run / "checkpoints")
    if progress is None:
        raise Stop(Exit.NO_RUN, f"{run} has no checkpoint yet; continue it with wardround resume")
    return progress.model


def halves(federation: Federation, count: int, seed: int) -> list[frozenset[str]]:
    """Patients of each reference: pairs of random halves of every site's training and test patients."""
    made = []
    for pair in range(count // 2):
        first: set[str] = set()
        everyone: set[str] = set()
        for site, parts in federation.sites.items():
            keys = sorted({e.patient for part in ("train", "test") for e in parts[part]})
            order = torch.randperm(len(keys), generator=generator(seed, site, pair, "audit", "half")).tolist()
            first |= {keys[i] for i in order[: -(-len(keys) // 2)]}
            everyone |= set(keys)
        made += [frozenset(first), frozenset(everyone - first)]
    return made


def _of(federation: Federation, split: str) -> dict[str, list[Entry]]:
    """Entries by patient, over all sites."""
    by: dict[str, list[Entry]] = {}
    for parts in federation.sites.values():
        for entry in sorted(parts[split], key=lambda e: (e.patient, e.key)):
            by.setdefault(entry.patient, []).append(entry)
    return by


def _reference(
    folder: RunFolder, federation: Federation, half: frozenset[str], seed: int, number: int
) -> Tensors:
    """A model by the run's plan on some of the patients; one that an earlier audit trained is taken."""
    own = {
        site: tuple(e for part in ("train", "test") for e in parts[part] if e.patient in half)
        for site, parts in federation.sites.items()
    }
    sites = {name: {"train": entries, "val": (), "test": ()} for name, entries in own.items() if entries}
    rules = folder.settings.plan.federation
    least = {"cohort": min(rules.cohort, len(sites)), "min_replies": min(rules.min_replies, len(sites))}
    plan = folder.settings.plan.model_copy(update={"federation": rules.model_copy(update=least)})
    path = folder.path / "audit" / f"seed-{seed}" / f"reference-{number}"
    if (first := folder.path / FILE).exists():
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / FILE, first.read_bytes())
    runtime = folder.settings.runtime.model_copy(update={"name": "local"})
    settings = folder.settings.model_copy(update={"plan": plan, "runtime": runtime})
    Simulation(replace(folder, path=path, settings=settings), Federation(federation.cache, sites)).ask(plan)
    return trained(path)
