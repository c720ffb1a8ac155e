"""Histograms of a data set: they merge exactly, count patients, and lose their small cells at the site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.base import Case
from tasks.data.fingerprint import CELLS, UNIT, Cells, Fingerprint, Survey, quantile

SURVEY = Survey(classes=3)
SHARED = ("intensity", "foreground")


def case(
    patient: str = "p",
    *,
    shape: Sequence[int] = (5, 6, 4),
    spacing: Sequence[float] = (1.0, 1.0, 2.0),
    seed: int = 0,
    scale: float = 100.0,
    units: str = "",
    annotated: bool = True,
) -> Case:
    """A case of noise; its first class is the first slab along x, its second the next."""
    draw = torch.Generator().manual_seed(seed)
    image = scale * torch.randn((1, *shape), generator=draw)
    mask = torch.zeros(tuple(shape), dtype=torch.uint8)
    mask[0], mask[1] = 1, 2
    masks = {"mask": mask} if annotated else {}
    return Case(
        f"{patient}{seed}",
        patient,
        {"image": image},
        torch.eye(4).double(),
        tuple(spacing),
        masks,
        units=units,
    )


@st.composite
def patients(draw: st.DrawFn) -> list[list[Case]]:
    """Patients of one to three cases each."""
    found = []
    for p in range(draw(st.integers(1, 12))):
        count = draw(st.integers(1, 3))
        axes = draw(st.sampled_from([2, 3]))
        found.append(
            [
                case(
                    f"p{p}",
                    shape=draw(st.lists(st.integers(2, 9), min_size=axes, max_size=axes)),
                    spacing=draw(st.lists(st.floats(0.1, 9), min_size=axes, max_size=axes)),
                    seed=draw(st.integers(0, 99)),
                    scale=draw(st.sampled_from([0.01, 1.0, 1e3, 1e9])),
                    units=draw(st.sampled_from(["", "HU", "else"])),
                    annotated=draw(st.booleans()),
                )
                for _ in range(count)
            ]
        )
    return found


@settings(max_examples=25, deadline=None)
@given(patients(), st.data())
def test_three_sites_merged_equal_the_pooled_data_exactly(
    people: list[list[Case]], data: st.DataObject
) -> None:
    where = data.draw(st.lists(st.integers(0, 2), min_size=len(people), max_size=len(people)))
    sites = [[p for p, s in zip(people, where, strict=True) if s == site] for site in range(3)]
    pooled = SURVEY.of_site(people, minimum=1).to_vector()
    parts = [SURVEY.of_site(site, minimum=1) for site in data.draw(st.permutations(sites))]
    assert torch.equal((parts[0] + parts[1] + parts[2]).to_vector(), pooled)
    assert torch.equal(sum((p.to_vector() for p in parts), torch.zeros_like(pooled)), pooled)


@settings(max_examples=25, deadline=None)
@given(patients(), st.integers(1, 6))
def test_every_cell_that_leaves_has_the_minimum_of_patients_and_totals_tell_nothing(
    people: list[list[Case]], minimum: int
) -> None:
    left = SURVEY.of_site(people, minimum)
    assert (left.to_vector() >= 0).all()
    each = [SURVEY.of_patient(cases) for cases in people]
    if len(people) < minimum:
        assert not left.to_vector().any()
        return
    for name, cells in CELLS.items():
        rows = getattr(left, name).reshape(-1, cells.size)
        behind = torch.stack([getattr(one, name).reshape(-1, cells.size) > 0 for one in each]).sum(0)
        for row, seen in zip(rows, behind, strict=True):
            filled = row > 0
            if name in SHARED:
                assert (seen[filled] >= minimum).all()
                assert float(row.sum()) in (0, UNIT * len(people))
            else:
                assert (row[filled] >= minimum).all()
                assert float(row.sum()) == len(people)


@pytest.mark.parametrize(
    ("counts", "minimum", "left"),
    [
        ({3: 1, 7: 4}, 1, {3: 1, 7: 4}),
        ({3: 1, 7: 4}, 4, {7: 5}),  # the lone patient counts with the next
        ({3: 4, 7: 1}, 4, {3: 5}),  # or with the last, where none follows
        ({1: 2, 2: 1, 3: 2, 9: 5}, 5, {1: 5, 9: 5}),  # a run stands at its fullest cell, the first of equals
        ({1: 2, 2: 1}, 5, {}),
    ],
)
def test_small_cells_join_their_neighbours(
    counts: dict[int, int], minimum: int, left: dict[int, int]
) -> None:
    zero = SURVEY.zero()
    row = torch.zeros(CELLS["level"].size, dtype=torch.float64)
    for cell, n in counts.items():
        row[cell] = n
    made = Fingerprint(**{**vars(zero), "level": row, "count": row.sum()})
    got = made.suppressed(made, minimum).level
    assert {int(c): int(got[c]) for c in got.nonzero().flatten()} == left


@pytest.mark.parametrize("name", CELLS)
def test_a_cells_value_lies_in_it(name: str) -> None:
    cells = CELLS[name]
    values = torch.tensor([cells.value(c) for c in range(1, cells.size)], dtype=torch.float64)
    assert cells.of(values).tolist() == list(range(1, cells.size))
    assert (values.diff() > 0).all()
    rounded = torch.tensor([cells.round_value(c) for c in range(1, cells.size)], dtype=torch.float64)
    assert cells.of(rounded).tolist() == list(range(1, cells.size))


@pytest.mark.parametrize("mm", [0.3, 0.5, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 5.0, 7.0, 10.0])
def test_a_usual_spacing_comes_back_as_itself(mm: float) -> None:
    cells = CELLS["spacing"]
    assert cells.round_value(int(cells.of(torch.tensor(mm)))) == mm


def test_what_lies_beyond_the_scale_counts_in_its_ends() -> None:
    cells = Cells("symlog", -3, 3, 1)
    assert cells.of(torch.tensor([-1e30, 0.0, 1e30])).tolist() == [1, 4, 7]
    assert CELLS["volume"].of(torch.zeros(1)).tolist() == [1]


def test_a_patient_counts_once_with_the_median_of_their_cases() -> None:
    cases = [case(spacing=(1, 1, z), seed=i) for i, z in enumerate((1.0, 2.0, 5.0))]
    found = SURVEY.of_patient(cases)
    assert found.patients == 1
    assert [CELLS["spacing"].value(int(row.argmax())) for row in found.spacing] == [1, 1, 2]
    assert found.spacing.sum() == 3
    none = SURVEY.of_patient([])
    assert none.patients == 1
    assert none.value() == {"patients": 1}


def test_sizes_and_centres_are_those_of_the_mask() -> None:
    one = SURVEY.of_patient([case(shape=(4, 10, 10), spacing=(2.0, 1.0, 1.0))])
    values = one.value()
    assert values["voxels_0"] == pytest.approx(100, rel=0.1)
    assert values["volume_0"] == pytest.approx(0.2, rel=0.05)
    got = [CELLS["position"].value(int(row.argmax())) for row in one.position.reshape(6, -1)]
    # x: an eighth and three eighths, to the nearest twentieth (ties to even)
    assert got == pytest.approx([0.1, 0.5, 0.5, 0.4, 0.5, 0.5])


def test_an_unannotated_patient_is_none_and_an_absent_class_is_not() -> None:
    bare = SURVEY.of_patient([case(annotated=False)])
    assert bare.volume[:, 0].tolist() == [1, 1]
    assert bare.foreground[0, 0] == UNIT
    partly = SURVEY.of_patient([replace(case(), annotates=(1,))])  # 0 may hide the second class
    assert partly.volume[:, 0].tolist() == partly.voxels[:, 0].tolist() == [0, 1]
    assert partly.position[:, 0, 0].tolist() == [0, 1]
    empty = case()
    empty.masks["mask"].fill_(1)
    found = SURVEY.of_patient([empty])
    assert int(found.volume[1].argmax()) == 1
    assert int(found.position[1, 0].argmax()) == 0


def test_shares_that_no_rounding_fits_still_sum_to_the_unit() -> None:
    cells = CELLS["intensity"]
    every = torch.tensor([cells.value(c) for c in range(1, cells.size)])
    flat = case(shape=(33, 33, 1))
    found = SURVEY.of_patient([replace(flat, images={"image": every.view(1, 33, 33, 1).float()})])
    assert int((found.intensity[0] > 0).sum()) == 33 * 33
    assert found.intensity[0].sum() == UNIT


@pytest.mark.parametrize("q", [0.005, 0.1, 0.5, 0.9, 0.995])
def test_percentiles_come_from_histograms(q: float) -> None:
    values = 40 + 100 * torch.randn(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cells = CELLS["foreground"]
    row = torch.bincount(cells.of(values), minlength=cells.size)
    got = quantile(row, q)
    assert got is not None
    true = float(np.quantile(values.numpy(), q))
    assert cells.value(got - 0.5) <= true <= cells.value(got + 0.5)
    assert quantile(torch.zeros(5), q) is None


def test_real_volumes_are_described_as_nibabel_has_them(real: Callable[[str], Path]) -> None:
    root = real("msd_hippocampus")
    names = sorted(path.name for path in (root / "image").glob("*.nii.gz"))[:9]
    people, shapes, volumes = [], [], []
    for name in names:
        image: Any = nib.load(root / "image" / name)
        mask: Any = nib.load(root / "label" / name)
        values, classes = np.asarray(image.dataobj, np.float32), np.asarray(mask.dataobj, np.uint8)
        zooms = tuple(float(z) for z in image.header.get_zooms())
        images, masks = {"image": torch.tensor(values)[None]}, {"mask": torch.tensor(classes)}
        people.append([Case(name, name, images, torch.eye(4).double(), zooms, masks)])
        shapes.append(values.shape)
        volumes.append([(classes == k).sum() * np.prod(zooms) / 1000 for k in (1, 2)])
    found = SURVEY.of_site(people, 1).value()
    assert found["patients"] == 9
    for axis in range(3):
        assert found[f"spacing_{axis}"] == pytest.approx(1.0)
        assert found[f"shape_{axis}"] == pytest.approx(np.median([s[axis] for s in shapes]), rel=0.02)
    for k in range(2):
        assert found[f"volume_{k}"] == pytest.approx(np.median([v[k] for v in volumes]), rel=0.05)
