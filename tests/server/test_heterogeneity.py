"""What is wrong with a site is named, and nothing else is. Distances against scipy's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon  # type: ignore[import-untyped]
from scipy.stats import wasserstein_distance  # type: ignore[import-untyped]

from server.heterogeneity import compare, jensen_shannon, wasserstein
from tasks.base import Case
from tasks.data.fingerprint import Fingerprint, Survey

SURVEY = Survey(classes=3)


def person(site: int, i: int) -> Case:
    """A body of 30 x 40 x 20 mm; class 1 lies in front and to the left, class 2 behind."""
    draw = torch.Generator().manual_seed(100 * site + i)
    shift = int(torch.randint(3, (), generator=draw))
    mask = torch.zeros((30, 40, 20), dtype=torch.uint8)
    mask[3:9, 28 + shift : 36, 4:9] = 1
    mask[10:20, 4 : 12 + shift, 4:9] = 2
    image = 40 + 15 * torch.randn((1, 30, 40, 20), generator=draw) + 10 * (mask > 0)
    return Case(
        f"{site}{i}", f"{site}{i}", {"image": image}, torch.eye(4).double(), (1.0,) * 3, {"mask": mask}
    )


def same(case: Case) -> Case:
    return case


def scaled(case: Case) -> Case:
    return replace(case, images={"image": 1000 * case.images["image"] + 1024})


def shifted(case: Case) -> Case:
    return replace(case, images={"image": case.images["image"] + 1024})


def finer(case: Case) -> Case:
    return replace(case, spacing=tuple(s / 10 for s in case.spacing))


def coarser(case: Case) -> Case:
    return replace(case, spacing=tuple(s * 1000 for s in case.spacing))


def mirrored(case: Case) -> Case:
    return replace(
        case, images={"image": case.images["image"].flip(2)}, masks={"mask": case.masks["mask"].flip(1)}
    )


def swapped(case: Case) -> Case:
    return replace(
        case,
        images={"image": case.images["image"].transpose(1, 2)},
        masks={"mask": case.masks["mask"].transpose(0, 1)},
    )


def merged(case: Case) -> Case:
    return replace(case, masks={"mask": (case.masks["mask"] > 0).to(torch.uint8)})


def swollen(case: Case) -> Case:
    mask = case.masks["mask"].clone()
    mask[1:29, 22:39, 1:19] = 1
    return replace(case, masks={"mask": mask})


def unit(case: Case) -> Case:
    return replace(case, units="HU")


def doubled(case: Case) -> Case:
    return replace(case, images={"image": torch.cat([case.images["image"]] * 2)})


def like(case: Case) -> Case:
    """Another scanner, nothing wrong: twice the contrast, voxels of 0.8 mm."""
    return replace(case, images={"image": 2 * case.images["image"]}, spacing=(0.8, 0.8, 0.8))


def sites(
    change: Mapping[int, Callable[[Case], Case]], count: int = 3, minimum: int = 1
) -> dict[str, Fingerprint]:
    made = {}
    for s in range(count):
        people = [[change.get(s, same)(person(s, i))] for i in range(8)]
        made[f"site_{s}"] = SURVEY.of_site(people, minimum)
    return made


@pytest.mark.parametrize("minimum", [1, 5])
@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (scaled, "intensity", "0 times as far"),
        (shifted, "intensity", "intercept"),
        (finer, "spacing", "cm for mm"),
        (coarser, "spacing", "90 times"),
        (mirrored, "orientation", "mirrored along y"),
        (swapped, "orientation", "another order"),
        (merged, "labels", "lack class 2"),
        (swollen, "labels", "class 1 is"),
        (unit, "units", "HU"),
        (doubled, "image", "2 channels"),
    ],
)
def test_one_wrong_site_of_three_is_named_alone_with_the_reason(
    change: Callable[[Case], Case], kind: str, words: str, minimum: int
) -> None:
    found = compare(sites({1: change}, minimum=minimum)).findings
    assert {one.site for one in found} == {"site_1"}
    assert kind in {one.kind for one in found}
    assert any(words in one.what + one.advice for one in found)
    assert all(one.advice.endswith(".") for one in found)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("change", [{}, {0: like}])
def test_sites_that_are_only_different_give_no_alarm(
    count: int, change: dict[int, Callable[[Case], Case]]
) -> None:
    made = compare(sites(change, count))
    assert made.findings == ()
    assert len(made.distances) == count * (count - 1) // 2


def test_of_two_sites_both_are_named_and_that_is_said() -> None:
    found = compare(sites({1: finer}, 2)).findings
    assert [one.site for one in found] == ["site_0", "site_1"]
    assert all("nobody can tell" in one.advice for one in found)


def test_distances_are_scipys() -> None:
    draw = np.random.default_rng(3)
    a, b = draw.integers(0, 9, 40).astype(float), draw.integers(0, 9, 40).astype(float)
    at = np.arange(39) / 16
    got = wasserstein(torch.tensor(a), torch.tensor(b), 16)
    assert got == pytest.approx(wasserstein_distance(at, at, a[1:], b[1:]))
    assert jensen_shannon(torch.tensor(a), torch.tensor(b)) == pytest.approx(jensenshannon(a, b, 2) ** 2)
    assert jensen_shannon(torch.tensor([1.0, 0]), torch.tensor([0, 1.0])) == 1
    assert wasserstein(torch.zeros(4), torch.ones(4), 1) is None
