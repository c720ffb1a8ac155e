"""Scores by subgroup: each equals the score of those patients alone, and small groups stay home."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

from tasks.metrics import Statistics
from tasks.scoring.classes import KINDS
from tasks.scoring.grouped import Grouped, by_group

SUBGROUPS = {"sex": ("F", "M"), "age": ("old",)}


def patients(n: int, other: int = 0) -> list[tuple[Statistics, dict[str, str]]]:
    """Two classes; a third F, the others M, the last `other` of unknown sex; every second old."""
    g = torch.Generator().manual_seed(1)
    made: list[tuple[Statistics, dict[str, str]]] = []
    for i in range(n):
        truth = torch.tensor([float(i % 2)])
        p = (torch.randn(1, generator=g) + truth).sigmoid()
        stats = KINDS["classes"].of_patient(str(i), truth, torch.stack([1 - p, p], 1))
        sex = "X" if i >= n - other else "F" if i % 3 == 0 else "M"
        made.append((stats, {"sex": sex, "age": "old" if i % 2 else "young"}))
    return made


def total(parts: list[tuple[Statistics, dict[str, str]]]) -> Statistics:
    zero = by_group(KINDS["classes"].zero(2), SUBGROUPS)
    return reduce(lambda a, b: a + b, (by_group(s, SUBGROUPS, [own]) for s, own in parts), zero)


def test_each_group_equals_its_patients_alone() -> None:
    parts = patients(60, other=2)
    merged = total(parts[20:]) + total(parts[:20])
    found = merged.from_vector(merged.to_vector()).value()
    plain = reduce(lambda a, b: a + b, (s for s, _ in parts))
    assert {k: found[k] for k in plain.value()} == pytest.approx(plain.value())
    for sex, n in (("F", 20), ("M", 38)):
        own = [s for s, groups in parts if groups["sex"] == sex]
        rows = torch.cat([s.rows for s in own]).numpy()
        assert found[f"sex_{sex}_patients"] == n == len(own)
        assert found[f"sex_{sex}_auroc"] == pytest.approx(roc_auc_score(rows[:, 1], rows[:, 3]), abs=1e-9)
        assert found[f"sex_{sex}_auroc_bound"] == 0
    assert "age_old_auroc" not in found  # all of them have the finding
    assert found["age_old_accuracy"] > 0.5
    assert merged.alone().value()["sex_F_auroc_bound"] > 0
    assert merged.columns[-3:] == ("sex_F", "sex_M", "age_old")
    assert merged.rows.shape == (60, len(merged.columns))
    assert not any("left_out" in key for key in found)


@pytest.mark.parametrize(
    ("n", "other", "out"),
    [(60, 0, []), (60, 3, ["sex"]), (60, 20, []), (24, 0, ["sex"]), (12, 0, ["sex"])],
)
def test_a_column_with_a_small_group_is_left_out_whole(n: int, other: int, out: list[str]) -> None:
    """20 F with 10 of each class pass at 5; 3 of unknown sex would follow from the rest by subtraction."""
    merged = total(patients(n, other)).alone()
    told = merged.guarded(5)
    found = told.value()
    assert [c for c in SUBGROUPS if f"{c}_left_out" in found] == out
    for column in out:
        assert found[f"{column}_left_out"] == n
        assert not any(key.startswith(f"{column}_F_a") for key in found)
        assert found[f"{column}_F_patients"] == 0
    cells = told.cells()
    assert float(cells[cells > 0].min()) >= 5
    # beside a site that tells all: the federated value says how many patients it lacks
    both = (told + merged).value()
    assert [both.get(f"{c}_left_out", 0) for c in SUBGROUPS] == [n if c in out else 0 for c in SUBGROUPS]


def test_a_patient_of_two_values_counts_in_the_whole_alone() -> None:
    stats, _ = patients(1)[0]
    made = by_group(stats, SUBGROUPS, [{"sex": "F", "age": "old"}, {"sex": "M", "age": "old"}])
    assert isinstance(made, Grouped)
    assert made.patients == 1
    found = made.value()
    assert [found[f"{g}_patients"] for g in made.groups] == [0, 0, 1]
    assert by_group(stats, {}) is stats
    assert np.isfinite(list(found.values())).all()
