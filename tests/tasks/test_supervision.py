"""Side outputs, and classes that nobody looked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conf.schema import Section
from strategies.privacy import preflight
from tasks.base import Case, Prediction
from tasks.losses import LOSS_TABLE, LOSSES
from tasks.segmentation import Segmentation
from tasks.supervision import deep, marginal
from tasks.trivial import Atlas

MAPS = [name for name, entry in LOSS_TABLE.items() if entry.targets == "map"]


def drawn(classes: int = 4, examples: int = 2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(examples, classes, 6, 5, generator=draw)
    return logits, torch.randint(classes, (examples, 6, 5), generator=draw)


def looked(*rows: list[int]) -> Tensor:
    return torch.tensor(rows).bool()


# ---- side outputs


def test_weights_halve_and_add_up_to_one() -> None:
    outputs = tuple(torch.full((2, 1), value) for value in (7.0, 14.0, 28.0))
    found = deep(lambda logits, _: logits[:, 0], outputs, torch.zeros(2))
    torch.testing.assert_close(found, torch.full((2,), (4 * 7 + 2 * 14 + 28) / 7))


@pytest.mark.parametrize("name", MAPS)
def test_equal_outputs_cost_what_one_costs(name: str) -> None:
    logits, target = drawn()
    loss = LOSSES.build(Section(name=name))
    torch.testing.assert_close(deep(loss, (logits,) * 3, target), loss(logits, target))
    assert torch.equal(deep(loss, logits, target), loss(logits, target))


# ---- partial labels


def test_probabilities_of_what_nobody_looked_for_are_the_backgrounds() -> None:
    logits, _ = drawn()
    before = logits.softmax(1)
    after = marginal(logits, looked([1, 0, 1, 0], [1, 1, 1, 1])).softmax(1)
    torch.testing.assert_close(after[0, 0], before[0, [0, 1, 3]].sum(0))
    torch.testing.assert_close(after[0, 2], before[0, 2])
    assert not after[0, [1, 3]].any()
    torch.testing.assert_close(after[1], before[1])


@pytest.mark.parametrize(
    ("name", "share"), [("cross_entropy", 1), ("focal", 1), ("lovasz", 1), ("dice", 1 / 3)]
)
def test_a_loss_is_that_of_fewer_classes(name: str, share: float) -> None:
    """Merged by hand into background and class 2: the same slope in every logit, but for Dice's mean over
    all classes, where an absent one costs nothing."""
    logits, target = drawn()
    target = torch.where(target == 2, 2, 0)
    loss = LOSSES.build(Section(name=name))
    here, there = (logits.clone().requires_grad_() for _ in "ab")
    loss(marginal(here, looked([1, 0, 1, 0], [1, 0, 1, 0])), target).sum().backward()
    merged = torch.cat((there[:, [0, 1, 3]].logsumexp(1, keepdim=True), there[:, 2:3]), 1)
    loss(merged, target // 2).sum().backward()
    assert here.grad is not None
    assert there.grad is not None
    torch.testing.assert_close(here.grad, share * there.grad)


@pytest.mark.parametrize("name", MAPS)
def test_background_may_as_well_be_a_class_nobody_looked_for(name: str) -> None:
    """Whichever of them the network says, the site's mask cannot tell: no loss may."""
    logits, target = drawn()
    target, rows = torch.where(target == 2, 2, 0), looked([1, 0, 1, 0], [1, 0, 1, 0])
    loss = LOSSES.build(Section(name=name))
    said, other = logits.clone().requires_grad_(), logits[:, [3, 0, 2, 1]]
    torch.testing.assert_close(loss(marginal(said, rows), target), loss(marginal(other, rows), target))
    loss(marginal(said, rows), target).sum().backward()
    assert said.grad is not None
    assert said.grad.isfinite().all()
    assert said.grad.any()


def task() -> Segmentation:
    return Segmentation(
        model=Section(name="dyn_unet", channels=[4, 4, 8], deep_supervision=1),
        loss=Section(name="dice_ce"),
        classes=("background", "one", "two"),
        patch=(16, 16),
    )


def case(annotates: tuple[int, ...] | None = None) -> Case:
    mask = torch.zeros(16, 16, dtype=torch.uint8)
    mask[2:6, 2:9], mask[9:14, 3:12] = 1, 2
    image = (mask.float() + 0.1 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[None]
    images, masks = {"image": image}, {"mask": mask}
    return Case("c", "p", images, torch.eye(4).double(), (1.0, 1.0), masks, annotates=annotates)


def test_what_a_site_looks_for_reaches_the_batch() -> None:
    made, draw = task(), torch.Generator().manual_seed(0)
    whole, part = made.prepare(case()), made.prepare(case((1,)))
    assert "looked" not in whole
    assert part["looked"].tolist() == [True, True, False]
    assert part["mask"].unique().tolist() == [0, 1]  # type: ignore[no-untyped-call]
    assert "looked" not in made.batch([whole, whole], draw)
    assert made.batch([whole, part], draw)["looked"].tolist() == [[True] * 3, [True, True, False]]


def test_a_partly_annotated_site_trains_privately_too() -> None:
    made = task()
    batch = made.batch([made.prepare(case((1,)))] * 2, torch.Generator().manual_seed(0))
    (phase,) = made.phases
    torch.manual_seed(0)
    model = made.build_model()
    assert preflight.fault(phase, model, batch) == ""
    assert preflight.strays(phase, model, batch) == ""


def test_two_sites_of_one_class_each_teach_both() -> None:
    """Each site knows one class and has the other's in its images, as background; the network finds both."""
    made, draw = task(), torch.Generator().manual_seed(0)
    sites = [made.prepare(case((k,))) for k in (1, 2)]
    (phase,) = made.phases

    def dice(partial: bool) -> float:
        torch.manual_seed(0)
        model = made.build_model()
        optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(40):
            batch = dict(made.batch(sites, draw))
            if not partial:
                del batch["looked"]
            optimiser.zero_grad()
            phase.loss(model, batch).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        return made.score([case()], [made.predict(model, case())]).value()["dice_mean"]

    assert dice(partial=True) > 0.9
    assert dice(partial=False) < 0.8


def test_classes_nobody_looked_for_are_not_scored() -> None:
    made, whole = task(), case()
    perfect = made.score([whole], [Prediction(masks=whole.masks)]).value()
    part = replace(whole, annotates=(1,), masks={"mask": torch.where(whole.masks["mask"] == 1, 1, 0).byte()})
    scored = made.score([part], [Prediction(masks=whole.masks)]).value()
    assert perfect["dice_2"] == scored["dice_1"] == scored["dice_mean"] == 1
    assert "dice_2" not in scored


def test_an_atlas_averages_a_class_over_those_who_looked_for_it() -> None:
    """A site that looked for one class does not outvote, with its background, one that looked for both."""
    whole = case()
    part = replace(whole, annotates=(1,), masks={"mask": torch.where(whole.masks["mask"] == 1, 1, 0).byte()})
    atlas = Atlas("mask", 3, 2, 16)
    both = [atlas.accumulate(c, {}) for c in (whole, part, part)]
    known = {name: torch.stack([sums[name] for sums in both]).sum(0) for name in both[0]}
    assert known["cases"].tolist() == [3, 3, 1]
    assert torch.equal(atlas.predict(known, part).masks["mask"], whole.masks["mask"])
