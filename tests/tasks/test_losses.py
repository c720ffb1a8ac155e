import pytest
import torch
from monai.losses.dice import DiceLoss
from torch import Tensor

from conf.exits import Stop
from conf.schema import Section
from tasks.losses import LOSS_TABLE, LOSSES

#: the others: test_vector_criteria.py
MAPS = [name for name, entry in LOSS_TABLE.items() if entry.targets == "map"]
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


def test_weights_of_the_sum() -> None:
    logits, target = drawn((6, 6))
    built = {name: LOSSES.build(Section(name=name))(logits, target) for name in ("dice", "cross_entropy")}
    both = LOSSES.build(Section(name="dice_ce", dice_weight=2.0, ce_weight=0.5))
    torch.testing.assert_close(both(logits, target), 2 * built["dice"] + 0.5 * built["cross_entropy"])


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(Stop, match=r"loss\.smooth is 0; input should be greater than 0"):
        LOSSES.build(Section(name="dice", smooth=0))
    with pytest.raises(Stop, match=r"loss is 'hinge'; known: .*cross_entropy, dice"):
        LOSSES.build(Section(name="hinge"))
