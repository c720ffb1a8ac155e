"""Surfaces and lesions against MONAI's own figures and closed forms; what is cleaned away."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from monai.metrics.surface_distance import compute_average_surface_distance
from torch import Tensor

from tasks.clean import cleaned
from tasks.predict import mirrored
from tasks.scoring.overlap import SegmentationStatistics
from tasks.scoring.surface import Depth, lesion_f1, surfaces

MM = (1.0, 2.0, 0.5)


def blob(seed: int, shape: tuple[int, ...] = (14, 12, 10)) -> Tensor:
    """A smooth random mask."""
    noise = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed))
    pool = torch.nn.functional.avg_pool3d if len(shape) == 3 else torch.nn.functional.avg_pool2d
    return pool(noise, 5, 1, 2)[0, 0] > 0.05


def cube(corner: int, side: int, size: int = 16) -> Tensor:
    mask = torch.zeros(size, size, size, dtype=torch.bool)
    part = slice(corner, corner + side)
    mask[part, part, part] = True
    return mask


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
@pytest.mark.parametrize("shape", [(14, 12, 10), (20, 18)])
def test_surface_measures_equal_monai(shape: tuple[int, ...]) -> None:
    mm = MM[: len(shape)]
    for seed in range(3):
        truth, said = blob(seed, shape), blob(seed + 50, shape)
        y, p = truth[None, None].float(), said[None, None].float()
        near, hd95, assd = surfaces(truth, said, mm, 1.5)
        own: dict[str, Any] = {"include_background": True, "spacing": mm}
        assert near == pytest.approx(float(compute_surface_dice(p, y, [1.5], **own)), rel=1e-6)
        assert hd95 == pytest.approx(float(compute_hausdorff_distance(p, y, percentile=95, **own)), rel=1e-6)
        wanted = compute_average_surface_distance(p, y, symmetric=True, **own)
        assert assd == pytest.approx(float(wanted), rel=1e-6)


def test_a_cube_moved_by_a_voxel() -> None:
    truth = cube(4, 6)
    moved = truth.roll(1, 0)
    near, hd95, assd = surfaces(truth, moved, (2.0, 1.0, 1.0), 0.5)
    assert hd95 == 2.0  # mm: one voxel along the first axis
    # of 152 edge voxels the 36 of the outer face lie off the other's, and the inner 16 of the face behind
    assert near == pytest.approx(1 - (36 + 16) / 152)
    assert 0 < assd < 2
    assert surfaces(truth, moved, (2.0, 1.0, 1.0), 2.0)[0] == 1
    assert surfaces(truth, truth, (1.0, 1.0, 1.0), 0.1) == (1, 0, 0)


def test_an_empty_mask_has_no_surface() -> None:
    none, some = torch.zeros(4, 4, 4, dtype=torch.bool), cube(1, 2, 4)
    assert surfaces(none, some, MM, 1.0)[0] == surfaces(some, none, MM, 1.0)[0] == 0
    assert all(math.isnan(v) for v in (*surfaces(none, none, MM, 1.0), *surfaces(some, none, MM, 1.0)[1:]))


def test_lesions_are_found_or_not() -> None:
    truth = cube(1, 3) | cube(8, 4)  # two
    said = cube(8, 4) | cube(14, 1)  # one right, one from nowhere
    assert lesion_f1(truth, said, 0.5) == pytest.approx(0.5)
    touching = cube(10, 2)  # 8 of 64 voxels: IoU 1/8
    assert lesion_f1(cube(8, 4), touching, 0.5) == 0
    assert lesion_f1(cube(8, 4), touching, 0.125) == lesion_f1(cube(8, 4), touching, 0) == 1
    assert math.isnan(lesion_f1(~truth & truth, ~truth & truth, 0.5))
    assert lesion_f1(truth, truth & ~truth, 0.5) == 0


def patient(name: str, seed: int, depth: Depth) -> SegmentationStatistics:
    """One case, two classes; the second is missing in every third patient."""
    truth, said = blob(seed).byte(), blob(seed + 1).byte()
    if seed % 3:
        truth[:2], said[:3] = 2, 2
    return SegmentationStatistics.of_patient(name, [(truth, said, MM)], 2, depth)


def test_measures_add_over_patients_with_intervals() -> None:
    depth = Depth(surface=2.0, lesion_iou=0.1)
    parts = [patient(str(s), s, depth) for s in range(6)]
    total = SegmentationStatistics.zero(2, 3, depth.names)
    for part in parts:
        total = total + total.from_vector(part.to_vector())
    found = total.value()
    for name in depth.names:
        assert found[f"{name}_1"] == pytest.approx(sum(p.value()[f"{name}_1"] for p in parts) / 6)
        assert found[f"{name}_empty_2"] == 2
        assert found[f"{name}_2_lo"] <= found[f"{name}_2"] <= found[f"{name}_2_hi"]
    column = total.columns.index("hd95_2")
    assert float(total.rows[:, column].nanmean()) == pytest.approx(found["hd95_2"])
    assert int(total.rows[:, column].isnan().sum()) == 2
    plain = patient("0", 1, Depth())
    assert not any("hd95" in key or "lesion" in key for key in plain.value())


def test_a_class_of_too_few_patients_stays_home() -> None:
    depth = Depth(surface=2.0)
    parts = [patient(str(s), s, depth) for s in range(6)]  # four have class 2
    total = parts[0] + parts[1] + parts[2] + parts[3] + parts[4] + parts[5]
    told = total.guarded(5)
    assert total.guarded(4).value() == total.value()
    assert told.cells()[told.cells() > 0].min() >= 5
    found = told.value()
    assert found["empty_2"] == found["hd95_empty_2"] == 6
    assert not any(key.startswith(("dice_2", "iou_2", "volume_error_ml_2", "hd95_2")) for key in found)
    assert found["dice_1"] == total.value()["dice_1"]
    assert "dice_mean_lo" not in found


def test_small_parts_are_cleaned_away() -> None:
    mask = (cube(1, 3) | cube(8, 4)).byte() + 2 * cube(14, 1).byte()
    kept = cleaned(mask, MM, largest=True, smallest=0)
    assert torch.equal(kept, cube(8, 4).byte() + 2 * cube(14, 1).byte())
    assert torch.equal(cleaned(mask, MM, largest=False, smallest=27), (cube(1, 3) | cube(8, 4)).byte())
    assert torch.equal(cleaned(mask, MM, largest=False, smallest=27.1), cube(8, 4).byte())
    assert cleaned(mask, MM, largest=False, smallest=0) is mask
    empty = torch.zeros(5, 5, dtype=torch.uint8)
    assert torch.equal(cleaned(empty, (1.0, 1.0), largest=True, smallest=3), empty)


def test_flips_average_out_a_bias_to_one_side() -> None:
    ramp = torch.linspace(-1, 1, 6)[:, None].expand(6, 4)
    image = torch.rand(1, 6, 4)

    def biased(seen: Tensor) -> Tensor:
        return seen + ramp

    assert torch.equal(mirrored(biased, image, []), biased(image))
    torch.testing.assert_close(mirrored(biased, image, [0, 1]), image)
