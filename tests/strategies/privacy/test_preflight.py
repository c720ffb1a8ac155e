"""What DP-SGD refuses before it touches a patient: what couples patients, and its safe kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.losses.contrastive import ContrastiveLoss
from monai.losses.dice import DiceCELoss, DiceLoss, GeneralizedDiceLoss
from monai.losses.focal_loss import FocalLoss
from monai.losses.tversky import TverskyLoss
from torch import Tensor, nn

from conf.exits import Exit, Stop
from conf.schema import Section
from strategies.privacy.preflight import check, fault, strays
from tasks.base import Batch, Phase
from tasks.losses import LOSS_TABLE, LOSSES
from tests.toys import TinyNet, toy_plan

CLASSES = 2
BATCH = {"x": torch.zeros(2, 1, 8, 8), "mask": torch.zeros(2, 8, 8, dtype=torch.long)}

LINE = r"^privacy.mode is 'dpsgd', but phase 'train' keeps statistics of its batches in .*group$"

Criterion = Callable[[Tensor, Tensor], Tensor]


def convolutions(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *middle, nn.Tanh(), nn.Conv2d(4, CLASSES, 1))


def hot(mask: Tensor) -> Tensor:
    return F.one_hot(mask, CLASSES).movedim(-1, 1).double()


def by_example(criterion: Criterion) -> Criterion:
    """A criterion that reduces to one number, on one example at a time."""
    return lambda out, mask: torch.stack(
        [criterion(o[None], m[None]) for o, m in zip(out, mask, strict=True)]
    )


def by_batch(criterion: Criterion) -> Criterion:
    """The same on the whole batch: one number, given to every example."""
    return lambda out, mask: criterion(out, mask).expand(len(out))


def phase(criterion: Criterion) -> Phase:
    def loss(model: nn.Module, batch: Batch | None) -> Tensor:
        if batch is None:
            raise ValueError("needs a batch")
        return criterion(model(batch["x"]), batch["mask"])

    return Phase("train", loss)


def overlap(loss: Any) -> Criterion:
    """A loss of MONAI's, on probabilities and a one-hot truth."""
    return lambda out, mask: loss(out.softmax(1), hot(mask))


cross_entropy: Criterion = lambda out, mask: F.cross_entropy(out, mask, reduction="none").flatten(1).mean(1)  # noqa: E731

#: the others: tests/tasks/test_vector_criteria.py
MAPS = [name for name, entry in LOSS_TABLE.items() if entry.targets == "map"]
SAFE: dict[str, Criterion] = {
    "dice": by_example(overlap(DiceLoss())),
    "dice_ce": by_example(lambda out, mask: DiceCELoss(softmax=True)(out, hot(mask))),
    "generalised_dice": by_example(overlap(GeneralizedDiceLoss())),
    "focal": by_example(lambda out, mask: FocalLoss()(out, hot(mask))),
    "tversky": by_example(overlap(TverskyLoss())),
    "bce_pos_weight": by_example(
        lambda out, mask: F.binary_cross_entropy_with_logits(out, hot(mask), pos_weight=torch.tensor(3.0))
    ),
    "cross_entropy": cross_entropy,
    **{f"ours_{name}": LOSSES.build(Section(name=name)) for name in MAPS},
}
COUPLED: dict[str, Criterion] = {
    "dice": by_batch(overlap(DiceLoss(batch=True))),
    "dice_ce": by_batch(lambda out, mask: DiceCELoss(softmax=True, batch=True)(out, hot(mask))),
    "class_weights": by_batch(
        lambda o, m: F.cross_entropy(o, m, weight=torch.tensor([1.0, 5.0]).to(o.dtype))
    ),
    "ignored_class": by_batch(lambda out, mask: F.cross_entropy(out, mask, ignore_index=0)),
    "ignored_value": lambda out, mask: cross_entropy_but(out, mask, 255),
    "contrastive": by_batch(lambda out, mask: ContrastiveLoss()(out.flatten(1), hot(mask).flatten(1))),
    "batch_weights": lambda out, mask: cross_entropy(out, mask) / mask.double().mean().clamp(min=0.1),
}


def cross_entropy_but(out: Tensor, mask: Tensor, ignored: int) -> Tensor:
    """Divided by how many positions of the whole batch count."""
    found = F.cross_entropy(out, mask, reduction="none", ignore_index=ignored).flatten(1).sum(1)
    return found / (mask != ignored).sum()


@pytest.mark.parametrize("name", SAFE)
def test_losses_by_example_pass(name: str) -> None:
    assert fault(phase(SAFE[name]), convolutions(), BATCH) == ""


@pytest.mark.parametrize("name", COUPLED)
def test_losses_over_the_batch_are_refused(name: str) -> None:
    assert "couples the patients of a batch" in fault(phase(COUPLED[name]), convolutions(), BATCH)


@pytest.mark.parametrize(
    "middle", [nn.InstanceNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4)]
)
def test_norms_by_example_pass(middle: nn.Module) -> None:
    assert fault(phase(cross_entropy), convolutions(middle), BATCH) == ""


def frozen(norm: nn.Module) -> nn.Module:
    for parameter in norm.parameters():
        parameter.requires_grad_(False)
    return norm


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (nn.BatchNorm2d(4), "keeps statistics of its batches in 1.running_mean"),
        (nn.BatchNorm2d(4, affine=False), "keeps statistics of its batches in 1.running_mean"),
        (frozen(nn.BatchNorm2d(4)), "keeps statistics of its batches in 1.running_mean"),
        (nn.BatchNorm2d(4, momentum=0.0), "keeps statistics of its batches in 1.num_batches_tracked"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "keeps statistics of its batches in 1.running_mean"),
        (nn.BatchNorm2d(4, track_running_stats=False), "couples the patients of a batch"),
        (nn.Dropout(0.1), "draws random numbers as it computes (dropout)"),
    ],
)
def test_norms_over_the_batch_and_layers_that_draw_are_refused(middle: nn.Module, reason: str) -> None:
    assert fault(phase(cross_entropy), convolutions(middle), BATCH).startswith(reason)


def test_a_norm_that_stays_in_evaluation_passes() -> None:
    class Fixed(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Fixed:
            return super().train(False) if mode else super().train(mode)

    assert fault(phase(cross_entropy), convolutions(Fixed(4)), BATCH) == ""


def test_a_pool_of_earlier_images_is_refused() -> None:
    pool: list[Tensor] = []

    def remembering(out: Tensor, mask: Tensor) -> Tensor:
        pool.append(out.detach()[:1])
        return cross_entropy(out, mask) * (1 + pool[-1].square().mean() + pool[0].mean() * len(pool))

    reason = fault(phase(remembering), convolutions(), BATCH)
    assert "couples the patients" in reason or "remembers earlier batches" in reason


@pytest.mark.parametrize(("out", "shape"), [(lambda t: t.mean(), "()"), (lambda t: t, "(2, 8, 8)")])
def test_a_loss_that_is_no_number_for_each_patient_is_refused(
    out: Callable[[Tensor], Tensor], shape: str
) -> None:
    wrong = phase(lambda logits, mask: out(F.cross_entropy(logits, mask, reduction="none")))
    assert fault(wrong, convolutions(), BATCH).startswith(f"has a loss of shape {shape} for 2 patients")


def test_it_reads_no_values_and_leaves_model_and_generator_alone() -> None:
    model, other = convolutions(nn.BatchNorm2d(4)), convolutions()
    before = torch.get_rng_state()
    held = {name: t.clone() for name, t in model.state_dict().items()}
    nan = {"x": torch.full((2, 1, 8, 8), float("nan")), "mask": torch.full((2, 8, 8), 77)}
    assert fault(phase(cross_entropy), other, nan) == ""
    fault(phase(cross_entropy), model, BATCH)
    assert torch.get_rng_state().equal(before)
    assert all(t.equal(held[name]) and t.dtype == held[name].dtype for name, t in model.state_dict().items())


def values(model: nn.Module, batch: Batch | None) -> Tensor:
    """Branches on a value, which a pass over all patients at once cannot."""
    if batch is None:
        raise ValueError("needs a batch")
    found = cross_entropy(model(batch["x"]), batch["mask"])
    return found if bool(found.detach().sum() > 0) else 2 * found


def test_patients_in_one_pass_are_held_against_one_by_one() -> None:
    assert strays(phase(cross_entropy), convolutions(nn.GroupNorm(2, 4)), BATCH) == ""
    assert strays(Phase("train", values), convolutions(), BATCH).startswith(
        "cannot be mapped over patients: "
    )


@pytest.mark.parametrize("name", MAPS)
def test_every_map_loss_can_be_mapped(name: str) -> None:
    assert strays(phase(LOSSES.build(Section(name=name))), convolutions(), BATCH) == ""


def test_the_refusal_is_one_line_with_the_phase_and_a_remedy() -> None:
    privacy = {"mode": "dpsgd", "nominal_patients": 10, "sigma": 1.0}
    plan = toy_plan(task="tiny_net", privacy=privacy, federation={"weight": "equal"})
    task = TinyNet(plan.model, plan.loss)
    batch = {"a": torch.zeros(2, 3), "t": torch.zeros(2, 3)}
    with pytest.raises(Stop, match=LINE) as stop:
        check(plan, task, task.build_model(), batch)
    assert stop.value.exit == Exit.CONFIG
    task = TinyNet(plan.model, plan.loss, norm=False)
    check(plan, task, task.build_model(), batch)
