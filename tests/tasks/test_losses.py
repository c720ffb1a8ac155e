from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses.dice import DiceLoss, GeneralizedDiceLoss
from monai.losses.focal_loss import FocalLoss
from monai.losses.tversky import TverskyLoss
from scipy.ndimage import distance_transform_edt as edt  # type: ignore[import-untyped]
from torch import Tensor, nn

from conf.exits import Stop
from conf.schema import Section
from tasks.criteria import signed_distance
from tasks.losses import LOSS_TABLE, LOSSES

#: the others: test_vector_criteria.py
MAPS = [name for name, entry in LOSS_TABLE.items() if entry.targets == "map"]
WEIGHTS = [0.5, 1.0, 2.0, 3.0]
SHAPES = [(7, 5), (4, 5, 3)]


def drawn(sides: tuple[int, ...], examples: int = 3, classes: int = 4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(examples, classes, *sides, generator=draw)
    return logits, torch.randint(classes, (examples, *sides), generator=draw)


@pytest.mark.parametrize("sides", SHAPES)
@pytest.mark.parametrize("name", MAPS)
def test_one_value_per_example_that_ignores_the_others(name: str, sides: tuple[int, ...]) -> None:
    loss = LOSSES.build(Section(name=name))
    logits, target = drawn(sides)
    before = loss(logits, target)
    assert before.shape == (3,)
    logits[1], target[1] = 50 * torch.randn(logits[1].shape), 0
    after = loss(logits, target)
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], rtol=0, atol=0)
    assert before[1] != after[1]


@pytest.mark.parametrize("name", MAPS)
def test_gradient_stays_within_its_example(name: str) -> None:
    logits, target = drawn((6, 6))
    logits.requires_grad_()
    LOSSES.build(Section(name=name))(logits, target)[0].backward()
    assert logits.grad is not None
    assert logits.grad[0].abs().sum() > 0
    assert logits.grad[1:].abs().sum() == 0


@pytest.mark.parametrize("sides", SHAPES)
@pytest.mark.parametrize("name", MAPS)
def test_maps_per_example(name: str, sides: tuple[int, ...]) -> None:
    loss = LOSSES.build(Section(name=name))
    logits, target = drawn(sides)

    def single(x: Tensor, y: Tensor) -> Tensor:
        value: Tensor = loss(x[None], y[None])[0]
        return value

    per_example = torch.func.vmap(torch.func.grad(single))(logits, target)
    logits.requires_grad_()
    loss(logits, target).sum().backward()
    torch.testing.assert_close(per_example, logits.grad)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("sides", SHAPES)
def test_dice_equals_monai(sides: tuple[int, ...], background: bool) -> None:
    logits, target = drawn(sides)
    oracle = DiceLoss(
        softmax=True,
        to_onehot_y=True,
        include_background=background,
        reduction="none",
        smooth_nr=1e-5,
        smooth_dr=1e-5,
    )
    wanted = oracle(logits, target[:, None]).flatten(1).mean(1)
    ours = LOSSES.build(Section(name="dice", background=background))(logits, target)
    torch.testing.assert_close(ours, wanted)


def monai(oracle: nn.Module, logits: Tensor, target: Tensor) -> Tensor:
    """MONAI's loss of one example after the other."""
    return torch.stack([oracle(x[None], y[None, None]) for x, y in zip(logits, target, strict=True)])


DICE: dict[str, Any] = {"softmax": True, "to_onehot_y": True, "smooth_nr": 1e-5, "smooth_dr": 1e-5}


@pytest.mark.parametrize("sides", SHAPES)
@pytest.mark.parametrize(
    ("section", "oracle", "scale"),
    [
        ({"name": "generalised_dice"}, GeneralizedDiceLoss(**DICE), 1),
        (
            {"name": "generalised_dice", "background": False},
            GeneralizedDiceLoss(**DICE, include_background=False),
            1,
        ),
        (
            {"name": "tversky", "background": True},
            TverskyLoss(**DICE, alpha=0.3, beta=0.7),
            1,
        ),
        # MONAI's mean is over the classes too, of which one has a loss
        ({"name": "focal", "gamma": 1.5}, FocalLoss(gamma=1.5, use_softmax=True, to_onehot_y=True), 4),
        (
            {"name": "focal", "weights": WEIGHTS},
            FocalLoss(use_softmax=True, to_onehot_y=True, weight=WEIGHTS),
            4,
        ),
    ],
)
def test_as_monai_one_example_at_a_time(
    section: dict[str, Any], oracle: nn.Module, scale: float, sides: tuple[int, ...]
) -> None:
    logits, target = drawn(sides)
    target[0][target[0] == 2] = 1  # a class that one example lacks
    ours = LOSSES.build(Section(**section))(logits, target)
    torch.testing.assert_close(ours, scale * monai(oracle, logits, target))


def test_class_weights_are_torchs_within_each_example() -> None:
    logits, target = drawn((7, 5))
    ours = LOSSES.build(Section(name="cross_entropy", weights=WEIGHTS))(logits, target)
    for i in range(3):
        wanted = F.cross_entropy(logits[i : i + 1], target[i : i + 1], weight=torch.tensor(WEIGHTS))
        torch.testing.assert_close(ours[i], wanted)
    with pytest.raises(ValueError, match=r"loss\.weights has 4 numbers; there are 3 classes"):
        LOSSES.build(Section(name="focal", weights=WEIGHTS))(logits[:, :3], target % 3)


def test_classes_are_balanced_within_each_example() -> None:
    logits, target = drawn((7, 5))
    target[0] = torch.where(target[0] > 1, 1, target[0])
    ours = LOSSES.build(Section(name="balanced_cross_entropy"))(logits, target)
    each = F.cross_entropy(logits, target, reduction="none")
    for i in range(3):
        means = [each[i][target[i] == k].mean() for k in sorted(set(target[i].flatten().tolist()))]
        torch.testing.assert_close(ours[i], torch.stack(means).mean())


def test_focal_tversky_is_a_power_class_by_class_and_has_a_slope_at_zero() -> None:
    logits, target = drawn((7, 5), classes=2)
    plain, power = (LOSSES.build(Section(name=n))(logits, target) for n in ("tversky", "focal_tversky"))
    torch.testing.assert_close(power, plain**0.75)
    nothing = torch.zeros(1, 4, 4, dtype=torch.int64)
    sure = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4).clone().requires_grad_()
    LOSSES.build(Section(name="focal_tversky"))(sure, nothing).sum().backward()
    assert sure.grad is not None
    assert sure.grad.isfinite().all()


@given(st.integers(0, 10**6), st.sampled_from([(9, 7), (1, 6), (5, 4, 6)]), st.floats(0.01, 0.99))
@settings(max_examples=40, deadline=None)
def test_distances_are_scipys(seed: int, sides: tuple[int, ...], share: float) -> None:
    hard = (torch.rand(2, 2, *sides, generator=torch.Generator().manual_seed(seed)) < share).float()
    found = signed_distance(hard)
    for ours, one in zip(found.flatten(0, 1), hard.flatten(0, 1).numpy(), strict=True):
        there = 0 < one.sum() < one.size
        wanted = (1 - one) * edt(1 - one) - one * (edt(one) - 1) if there else 0 * one
        torch.testing.assert_close(ours, torch.from_numpy(wanted).float())


def test_the_boundary_term_is_probability_times_distance() -> None:
    logits, target = drawn((9, 7))
    without, with_it = (
        LOSSES.build(Section(**s))(logits, target)
        for s in ({"name": "generalised_dice"}, {"name": "boundary", "weight": 0.5})
    )
    hard = F.one_hot(target, 4).movedim(-1, 1)[:, 1:].float()
    term = (logits.softmax(1)[:, 1:] * signed_distance(hard)).mean((1, 2, 3))
    torch.testing.assert_close(with_it, without + 0.5 * term)


def test_lovasz_of_a_hard_prediction_is_one_minus_iou() -> None:
    _, target = drawn((7, 5))
    said = target.roll(1, 2)
    target[0][target[0] == 2] = 1
    logits = 1000 * F.one_hot(said, 4).movedim(-1, 1).float()
    ours = LOSSES.build(Section(name="lovasz"))(logits, target)
    for i in range(3):
        pairs = [(said[i] == k, target[i] == k) for k in sorted(set(target[i].flatten().tolist()))]
        wanted = torch.stack([1 - (a & b).sum() / (a | b).sum() for a, b in pairs]).mean()
        torch.testing.assert_close(ours[i], wanted)


def test_cross_entropy_closed_forms() -> None:
    loss = LOSSES.build(Section(name="cross_entropy"))
    target = torch.randint(4, (2, 5, 5))
    torch.testing.assert_close(loss(torch.zeros(2, 4, 5, 5), target), torch.full((2,), 4.0).log())
    logits, target = drawn((5, 5), examples=1)
    # equal numbers of positions: the mean over examples is torch's own mean over all
    torch.testing.assert_close(loss(logits, target)[0], torch.nn.functional.cross_entropy(logits, target))


def test_dice_of_a_perfect_and_an_absent_class_is_zero() -> None:
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    target[:, 1:3] = 1  # class 2 is in neither
    logits = 1000 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    assert LOSSES.build(Section(name="dice"))(logits, target).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "other", "weight"),
    [("dice_ce", "cross_entropy", "ce_weight"), ("dice_focal", "focal", "focal_weight")],
)
def test_weights_of_the_sum(name: str, other: str, weight: str) -> None:
    logits, target = drawn((6, 6))
    built = {n: LOSSES.build(Section(name=n))(logits, target) for n in ("dice", other)}
    both = LOSSES.build(Section(name=name, **{"dice_weight": 2.0, weight: 0.5}))
    torch.testing.assert_close(both(logits, target), 2 * built["dice"] + 0.5 * built[other])


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(Stop, match=r"loss\.smooth is 0; input should be greater than 0"):
        LOSSES.build(Section(name="dice", smooth=0))
    with pytest.raises(Stop, match=r"loss is 'hinged'; known: .*cross_entropy, dice"):
        LOSSES.build(Section(name="hinged"))
