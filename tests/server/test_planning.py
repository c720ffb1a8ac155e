"""Rules: known data, known plans. The oracle is arithmetic by hand and the network's own constructor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import Plan, Section
from server.planning import Decision, fragment, plan_from, topology
from strategies.base import Study
from tasks.base import Case, build_task
from tasks.data.fingerprint import Fingerprint, Survey


def plan(model: str = "unet", **task: Any) -> Plan:
    made = {"classes": ["background", "organ"], "patch": [32, 32, 32], **task}
    return Plan(
        task=Section(name="segmentation", **made),
        model=Section(name=model),
        loss=Section(name="dice_ce"),
        strategy=Section(name="fedavg"),
    )


def data(
    shape: Sequence[int], spacing: Sequence[Sequence[float]], units: str = "", patients: int = 0
) -> Fingerprint:
    """Patients of one shape whose spacings are those listed, in turn; the organ is a slab at 50 +- 10."""
    made = []
    draw = torch.Generator().manual_seed(0)
    for i in range(patients or len(spacing)):
        mask = torch.zeros(tuple(shape), dtype=torch.uint8)
        mask[: shape[0] // 2] = 1
        image = -1000 + 1050 * (mask > 0).float() + 10 * torch.randn(tuple(shape), generator=draw)
        mm = tuple(spacing[i % len(spacing)])
        made.append(
            [
                Case(
                    str(i),
                    str(i),
                    {"image": image[None]},
                    torch.eye(4).double(),
                    mm,
                    {"mask": mask},
                    units=units,
                )
            ]
        )
    return Survey(classes=2).of_site(made, 1)


def rules(found: Sequence[Decision]) -> dict[str, Any]:
    return {one.setting: one.value for one in found}


def test_isotropic_mr() -> None:
    made, found = plan_from(data((35, 50, 36), [(1, 1, 1)], patients=30), plan(), 2)
    got = rules(found)
    assert got["task.spacing"] == [1, 1, 1]
    assert got["task.patch"] == [32, 48, 32]
    assert got["model.pools"] == [3, 3, 3]
    assert got["model.channels"] == [16, 32, 64, 128]
    assert got["task.normalise"] == "zscore"
    assert got["local.batch_size"] == 2
    assert made.task.parameters["patch"] == [32, 48, 32]
    assert made.local.batch_size == 2
    assert all(len(one.reason.split()) > 3 or one.setting == "task.channels" for one in found)
    Study.of(made)


def test_anisotropic_ct_takes_the_finer_slices_fixed_numbers_and_halves_the_coarse_axis_later() -> None:
    spacing = [(0.8, 0.8, z) for z in (2.5, *[5.0] * 8, 7.0)]
    made, found = plan_from(data((96, 96, 12), spacing, units="HU"), plan(), 1)
    got = rules(found)
    assert got["task.spacing"] == [0.8, 0.8, 2.5]
    assert got["task.patch"] == [96, 96, 24]  # 12 slices of 5 mm are 24 of 2.5 mm
    assert got["model.pools"] == [4, 4, 2]
    assert got["task.normalise"] == "fixed"
    low, high = got["task.clip"]
    assert low == pytest.approx(50 - 2.58 * 10, abs=3)
    assert high == pytest.approx(50 + 2.58 * 10, abs=4)
    assert got["task.mean"] == pytest.approx(50, abs=1)
    assert got["task.deviation"] == pytest.approx(10, abs=1)
    model = build_task(made).build_model().eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 96, 96, 24)).shape == (1, 2, 96, 96, 24)


def test_images_make_a_2d_plan() -> None:
    made, found = plan_from(data((256, 192), [(1, 1)], patients=80), plan(patch=[32, 32]), 2)
    got = rules(found)
    assert got["task.patch"] == [256, 192]
    assert got["model.pools"] == [5, 5]
    Study.of(made)


def test_what_the_user_set_stays_and_later_rules_build_on_it() -> None:
    given = plan(patch=[16, 16, 16], spacing=[2.0, 2.0, 2.0])
    pinned = ["task.patch", "task.spacing", "local.batch_size"]
    made, found = plan_from(data((35, 50, 36), [(1, 1, 1)], patients=200), given, 1, pinned=pinned)
    assert made.task.parameters["patch"] == [16, 16, 16]
    assert made.task.parameters["spacing"] == [2.0, 2.0, 2.0]
    assert made.local.batch_size == 2
    assert rules(found)["model.pools"] == [2, 2, 2]
    by = {one.setting: one for one in found}
    assert by["task.patch"].kept
    assert by["task.patch"].rule == [16, 24, 16]  # 18x25x18 at 2 mm, halved twice
    assert "command line" in by["task.patch"].reason
    assert by["local.batch_size"].rule == 10
    Study.of(made)


@pytest.mark.parametrize(
    ("set_by_hand", "patch", "pools", "levels"),
    [
        ({"channels": [8, 16, 32]}, [36, 52, 36], [2, 2, 2], 3),
        ({"channels": [4, 8, 16, 32, 64]}, [32, 48, 32], [4, 4, 4], 5),
        ({"pools": [2, 3, 1]}, [36, 48, 36], [2, 3, 1], 4),
        ({"pools": None}, [32, 48, 32], [3, 3, 3], 4),
    ],
)
def test_a_network_that_the_user_set_gets_a_patch_that_fits(
    set_by_hand: dict[str, Any], patch: list[int], pools: list[int], levels: int
) -> None:
    base = plan()
    given = base.model_copy(update={"model": Section(name="unet", **set_by_hand)})
    shape = data((35, 51, 36), [(1, 1, 1)], patients=3)
    made, found = plan_from(shape, given, 1, pinned=[f"model.{name}" for name in set_by_hand])
    assert rules(found)["task.patch"] == patch
    assert {one.setting: one.rule for one in found}["model.pools"] == pools
    assert len(made.model.parameters["channels"]) == levels
    Study.of(made)


def test_a_patch_that_cannot_be_halved_as_often_gets_a_shallower_network() -> None:
    made, found = plan_from(
        data((35, 50, 36), [(1, 1, 1)], patients=3), plan(patch=[36, 48, 20]), 1, pinned=["task.patch"]
    )
    assert rules(found)["model.pools"] == [2, 3, 2]
    Study.of(made)


def test_spacing_null_means_each_image_on_its_own_grid() -> None:
    made, found = plan_from(data((40, 40, 40), [(0.5, 0.5, 0.5)]), plan(), 1, pinned=["task.spacing"])
    assert made.task.parameters.get("spacing") is None
    assert rules(found)["task.patch"] == [40, 40, 40]


def test_a_foreground_of_one_value_still_makes_a_plan() -> None:
    case = Case(
        "a", "a", {"image": torch.zeros(1, 16, 16, 16)}, torch.eye(4).double(), (1.0,) * 3, units="HU"
    )
    made, _ = plan_from(Survey(classes=2).of_site([[case]], 1), plan(), 1)
    Study.of(made)


@pytest.mark.parametrize("gb", [0.01, 0.05, 0.5, 8.0])
def test_less_memory_gives_a_smaller_patch_of_like_proportions(gb: float) -> None:
    found = rules(plan_from(data((64, 128, 64), [(1, 1, 1)], patients=4), plan(), 1, memory_gb=gb)[1])
    patch = found["task.patch"]
    assert patch[1] >= max(patch[0], patch[2])
    assert abs(patch[0] - patch[2]) <= 8
    assert (patch == [64, 128, 64]) == (gb == 8)


def test_a_network_of_fixed_depth_gets_a_patch_only() -> None:
    made, found = plan_from(data((35, 50, 36), [(1, 1, 1)], patients=9), plan("basic_unet"), 1)
    assert rules(found)["task.patch"] == [32, 48, 32]
    assert "model.channels" not in rules(found)
    Study.of(made)


def test_nothing_to_go_by_changes_nothing() -> None:
    made, found = plan_from(Survey(classes=2).zero(), plan(), 3)
    assert made == plan()
    assert found[0].kept


@pytest.mark.parametrize(
    ("sides", "spacing", "pools"),
    [
        ([128, 128, 128], [1, 1, 1], [5, 5, 5]),
        ([35, 50, 36], [1, 1, 1], [3, 3, 3]),
        ([256, 256, 16], [1, 1, 6], [5, 5, 2]),  # in-plane twice first: 1, 2, then 4 is within 2 of 6
        ([6, 6], [1, 1], [1, 1]),
    ],
)
def test_halvings(sides: list[float], spacing: list[float], pools: list[int]) -> None:
    assert topology(sides, spacing) == pools


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(8, 40), min_size=3, max_size=3),
    st.lists(st.sampled_from([0.5, 1.0, 3.0, 8.0]), min_size=3, max_size=3),
    st.sampled_from(["unet", "dyn_unet"]),
)
def test_every_plan_that_the_rules_make_can_be_built(shape: list[int], mm: list[float], model: str) -> None:
    made, _ = plan_from(data(shape, [mm], patients=3), plan(model), 1, memory_gb=0.2)
    build_task(made)


def test_the_fragment_is_an_experiment_with_reasons() -> None:
    _, found = plan_from(data((35, 50, 36), [(1, 1, 1)], patients=30), plan(), 2)
    text = fragment(found, 30, 2)
    assert text.startswith("# @package _global_\n")
    tree = yaml.safe_load(text)
    assert tree["task"]["patch"] == [32, 48, 32]
    assert tree["local"] == {"batch_size": 2}
    assert text.count("  # ") == len(found)
