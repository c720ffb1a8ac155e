"""Folds of a cross-validation, by patient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from conf.exits import Exit, Stop
from tasks.data.splits import keyed


def fold_of(strata: Mapping[str, str], folds: int, seed: int) -> dict[str, int]:
    """The fold, from 0, of each patient.

    Within a stratum (the patients of a site and class) the order of hashes is cut into `folds` stretches
    whose lengths differ by one at most. So a new patient moves at most `folds - 1` others, all of its own
    stratum, and into a neighbouring fold where the stratum has as many patients as there are folds. Where
    the longer stretches begin is drawn for each stratum: many small ones do not all fill the first fold.

    Args:
        strata: the stratum of each patient.
        seed: another one is another repeat.

    Raises:
        Stop: (`CONFIG`) fewer patients than folds.
    """
    if len(strata) < folds:
        raise Stop(Exit.CONFIG, f"data.folds is {folds} for {len(strata)} patients; use fewer folds")
    members: dict[str, list[str]] = defaultdict(list)
    for patient, stratum in strata.items():
        members[stratum].append(patient)
    found: dict[str, int] = {}
    for stratum, patients in members.items():
        ordered = sorted(patients, key=lambda p: (keyed(seed, "fold", p), p))
        first = int(keyed(seed, "stratum", stratum) * folds)
        found |= {p: (rank * folds // len(ordered) + first) % folds for rank, p in enumerate(ordered)}
    return found
