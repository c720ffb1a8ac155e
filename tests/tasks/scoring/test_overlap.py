from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.meandice import compute_dice
from monai.metrics.meaniou import compute_iou
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

from tasks.scoring.overlap import SegmentationStatistics

CLASSES = 3  # foreground
MM = (1.0, 2.0, 2.5)


def pair(seed: int, present: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Truth and a prediction that agrees on most voxels; classes above `present` are in neither."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.randint(present + 1, (6, 5, 4), generator=draw, dtype=torch.uint8)
    wrong = torch.randint(present + 1, (6, 5, 4), generator=draw, dtype=torch.uint8)
    return truth, torch.where(torch.rand(truth.shape, generator=draw) < 0.6, truth, wrong)


def patient(*pairs: tuple[Tensor, Tensor]) -> SegmentationStatistics:
    return SegmentationStatistics.of_patient("p", [(t, p, MM) for t, p in pairs], CLASSES)


def total(parts: list[SegmentationStatistics]) -> SegmentationStatistics:
    return reduce(lambda a, b: a + b, parts, SegmentationStatistics.zero(CLASSES, 3))


def one_hot(mask: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(mask.long(), CLASSES + 1).movedim(-1, 0)[None].float()


def test_values_equal_monai() -> None:
    pairs = [pair(seed) for seed in range(8)]
    found = total([patient(p) for p in pairs]).value()
    for name, oracle in (("dice", compute_dice), ("iou", compute_iou)):
        rows = torch.cat([oracle(one_hot(p), one_hot(t), include_background=False) for t, p in pairs])
        for k in range(CLASSES):
            assert found[f"{name}_{k + 1}"] == pytest.approx(rows[:, k].mean().item(), rel=1e-6)
        assert found[f"{name}_mean"] == pytest.approx(rows.mean().item(), rel=1e-6)


def test_intervals_equal_the_standard_error() -> None:
    pairs = [pair(seed) for seed in range(9)]
    found = total([patient(p) for p in pairs]).value()
    rows = torch.cat(
        [compute_dice(one_hot(p), one_hot(t), include_background=False) for t, p in pairs]
    ).numpy()
    for name, values in (("dice_2", rows[:, 1]), ("dice_mean", rows.mean(1))):
        half = stats.norm.ppf(0.975) * stats.sem(values)
        assert found[f"{name}_hi"] - found[name] == pytest.approx(half, rel=1e-5)
        assert found[name] - found[f"{name}_lo"] == pytest.approx(half, rel=1e-5)


def test_volume_error_in_ml() -> None:
    truth, said = torch.zeros(4, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, 4, dtype=torch.uint8)
    truth[0, 0, :2], said[0, 0, :] = 1, 1  # 2 voxels too many, 5 mm3 each
    missed = total([patient((truth, said)), patient((said, truth))]).value()
    assert missed["volume_error_ml_1"] == pytest.approx(0)
    assert missed["volume_error_abs_ml_1"] == pytest.approx(0.010)


def test_a_class_in_neither_is_left_out_and_counted() -> None:
    full, without = pair(0), pair(1, present=2)
    found = total([patient(full), patient(without)]).value()
    assert found["empty_3"] == 1
    assert found["empty_1"] == 0
    assert found["dice_3"] == patient(full).value()["dice_3"]
    nothing = torch.zeros(3, 3, 3, dtype=torch.uint8)
    alone = patient((nothing, nothing))
    assert alone.patients == 1
    assert alone.value() == {"empty_1": 1.0, "empty_2": 1.0, "empty_3": 1.0}


def test_a_class_only_one_side_has_scores_zero() -> None:
    truth, said = torch.zeros(3, 3, 3, dtype=torch.uint8), torch.zeros(3, 3, 3, dtype=torch.uint8)
    said[0] = 1
    for found in (patient((truth, said)).value(), patient((said, truth)).value()):
        assert found["dice_1"] == found["iou_1"] == 0
        assert found["empty_1"] == 0


def test_a_patient_counts_once_whatever_its_cases() -> None:
    a, b = pair(0), pair(1)
    both = patient(a, b)
    assert both.patients == 1
    for key in ("dice_1", "iou_2", "volume_error_ml_3", "dice_mean"):
        assert both.value()[key] == pytest.approx((patient(a).value()[key] + patient(b).value()[key]) / 2)
    # a case without the class does not pull the patient's mean down
    assert patient(a, pair(2, present=2)).value()["dice_3"] == patient(a).value()["dice_3"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=6), st.data())
def test_sums_over_any_split_equal_pooled(seeds: list[int], data: st.DataObject) -> None:
    parts = [patient(pair(seed, present=1 + seed % CLASSES)) for seed in seeds]
    pooled = total(parts)
    cut = data.draw(st.integers(0, len(parts)))
    order = data.draw(st.permutations(parts))
    split = total(order[cut:]) + total(order[:cut])
    assert split.value() == pytest.approx(pooled.value(), rel=1e-12)
    vectors = torch.stack([part.alone().to_vector() for part in order]).sum(0)
    torch.testing.assert_close(vectors, pooled.alone().to_vector())
    assert pooled.from_vector(pooled.to_vector()).value() == pooled.value()
    assert pooled.patients == len(seeds)


def test_two_dimensions_have_no_volume() -> None:
    square = torch.ones(4, 4, dtype=torch.uint8)
    found = SegmentationStatistics.of_patient("p", [(square, square, (1.0, 1.0))], 1)
    assert found.value()["dice_1"] == 1
    assert not any("volume" in key for key in found.value())
    assert found.alone().to_vector().shape == SegmentationStatistics.zero(1, 2).to_vector().shape


def test_noise_on_sums_cannot_break_the_value() -> None:
    pooled = total([patient(pair(seed)) for seed in range(3)])
    draw = np.random.default_rng(0)
    for _ in range(20):
        noisy = pooled.from_vector(
            pooled.to_vector() + torch.from_numpy(draw.normal(0, 3, len(pooled.to_vector())))
        )
        assert all(np.isfinite(v) for v in noisy.value().values())


def test_wrong_shapes_and_classes_are_refused() -> None:
    truth, said = pair(0)
    with pytest.raises(ValueError, match=r"prediction has shape \(5, 5, 4\); the truth has \(6, 5, 4\)"):
        patient((truth, said[1:]))
    with pytest.raises(ValueError, match="a mask holds class 9; classes are 0 to 3"):
        patient((truth, torch.full_like(said, 9)))
    with pytest.raises(ValueError, match=r"statistics vector has shape \(3,\); need"):
        SegmentationStatistics.zero(2, 3).from_vector(torch.zeros(3))
