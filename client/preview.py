"""What would leave this site under a plan, before it does: stages, the form of each answer, its bytes.

Nothing is trained and nothing is sent. Answers of training and scoring are shown by form, for their numbers
do not exist yet; a fingerprint needs no training, so there it is the very reply.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from client.archive import Archive, fingerprint
from client.policy import Policy
from conf.schema import Plan
from strategies import build_strategy
from strategies.base import Study
from strategies.privacy.metrics import covers
from strategies.protocol import Refused, Reply, Spec, Update, pack
from tasks.data.fingerprint import CELLS, Fingerprint


@dataclass(frozen=True)
class Stage:
    """One kind of answer.

    Attributes:
        name: as the coordinator asks for it. times: how often in the run, at most.
        tensors: names, shapes and types, and how many bytes each takes. words: all else in the reply.
        size: bytes of the whole reply. refused: why this site would answer with a code instead.
        reply: the reply itself, where it can be known. numbers: what it says.
    """

    name: str
    times: int
    tensors: tuple[tuple[str, tuple[int, ...], str, int], ...]
    words: dict[str, Any]
    size: int
    refused: str = ""
    reply: bytes = b""
    numbers: Fingerprint | None = None

    @property
    def sha256(self) -> str:
        """Identity of the reply's bytes; empty where they are not known."""
        return hashlib.sha256(self.reply).hexdigest() if self.reply else ""


@dataclass(frozen=True)
class Preview:
    """All that a plan would make leave.

    Attributes:
        refused: why the site would not take part at all.
        statistics: names of the sums in a scoring answer, and how many numbers each is.
    """

    refused: str
    stages: tuple[Stage, ...]
    statistics: tuple[tuple[str, int], ...]


def preview(site: str, plan: Plan, archive: Archive, policy: Policy) -> Preview:
    """What would leave.

    Args:
        site: its name, which is in each reply.

    Raises:
        Stop: the plan names what is not installed here.
    """
    study, strategy = Study.of(plan), build_strategy(plan)
    statistics = study.task.statistics()
    return Preview(
        _refusal(lambda: policy.check(plan)),
        tuple(
            _stage(site, name, times, strategy.spec(study, name), study, archive, policy.within(plan))
            for name, times in strategy.stages(study).items()
        ),
        tuple((name, tensor.numel()) for name, tensor in statistics.sums().items()),
    )


def _stage(
    site: str, name: str, times: int, spec: Spec, study: Study, archive: Archive, policy: Policy
) -> Stage:
    kind, _, detail = name.partition("/")
    split = detail.rpartition("/")[2] if kind == "evaluate" else "train"
    patients = len(archive.patients(split))
    held = 0  # features whose products it tells
    if kind in ("trivial", "evaluate"):
        held = (study.task.sums()[detail] if kind == "trivial" else study.task.statistics()).products
    refused = "" if kind == "train" and patients else _refusal(lambda: policy.release(patients, held))
    if covers(study.plan, detail.partition("/")[0]):
        refused = _refusal(policy.release_noised)
    if kind == "fingerprint" and not refused:
        found = fingerprint(study.task.survey(), archive, policy, lambda: None)
        (only,) = spec.tensors
        return _shown(name, times, spec, Reply(site, Update({only: found.to_vector()})), found)
    federation = study.plan.federation
    counted = kind == "train" and federation.weight == "patients"
    weight = min(max(1, patients), federation.max_weight) if counted else 1
    zeros = {n: torch.zeros(shape, dtype=dtype) for n, (shape, dtype) in spec.tensors.items()}
    shown = _shown(name, times, spec, Reply(site, Update(zeros, weight)))
    return Stage(name, times, shown.tensors, shown.words, shown.size, refused)


def _shown(name: str, times: int, spec: Spec, reply: Reply, numbers: Fingerprint | None = None) -> Stage:
    """A reply as it lies on the wire."""
    blob = pack(reply.to_tree())
    length = int.from_bytes(blob[:8], "little")
    words = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["wardround"])
    tensors = tuple(
        (n, tuple(shape), str(dtype).removeprefix("torch."), torch.Size(shape).numel() * dtype.itemsize)
        for n, (shape, dtype) in spec.tensors.items()
    )
    words["update"] = {k: v for k, v in words["update"].items() if k != "tensors"}
    return Stage(name, times, tensors, words, len(blob), reply=blob, numbers=numbers)


def _refusal(check: Callable[[], None]) -> str:
    try:
        check()
    except Refused as no:
        return str(no)
    return ""


def lines(found: Fingerprint) -> Sequence[tuple[str, str]]:
    """Every number of a fingerprint in words: histogram, then `value: patients` of its filled cells."""
    made = [("patients", str(found.patients))]
    for name, cells in CELLS.items():
        rows = getattr(found, name).reshape(-1, cells.size)
        for i, row in enumerate(rows):
            filled = row.nonzero().flatten().tolist()
            cell = (f"{cells.value(c):.4g}" if c else "none" for c in filled)
            text = ", ".join(f"{c}: {int(row[f])}" for c, f in zip(cell, filled, strict=True))
            made.append((f"{name} {i}" if len(rows) > 1 else name, text or "suppressed"))
    return made
