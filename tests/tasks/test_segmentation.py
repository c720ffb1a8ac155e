import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import entropy  # type: ignore[import-untyped]
from torch import Tensor, nn

from conf.exits import Exit, Stop
from conf.schema import Plan, Section
from tasks.base import Case, Prediction, Summed, Task, build_task
from tasks.metrics import Statistics
from tasks.predict import sliding_window
from tasks.segmentation import Segmentation

SMALL = {"name": "unet", "channels": [4, 8], "residual_units": 0}


def built(task: Mapping[str, Any] | None = None, **sections: Mapping[str, Any]) -> Segmentation:
    given = {
        "name": "segmentation",
        "classes": ["background", "dark", "bright"],
        "patch": [8, 8, 8],
        **(task or {}),
    }
    plan = {"model": SMALL, "loss": {"name": "dice_ce"}, "strategy": {"name": "fedavg"}, **sections}
    made = build_task(Plan.model_validate({"task": given, **plan}))
    assert isinstance(made, Segmentation)
    return made


def case(
    sides: tuple[int, ...] = (12, 10, 9), spacing: tuple[float, ...] = (1.0, 1.0, 1.0), seed: int = 0
) -> Case:
    """Boxes of class 1 (intensity -1) and class 2 (+1) in a background of 0."""
    mask = torch.zeros(sides, dtype=torch.uint8)
    a, b = sides[0] // 4, sides[0] // 2
    inner = tuple(slice(n // 4, n - n // 4) for n in sides[1:])
    mask[(slice(a, b), *inner)] = 1
    mask[(slice(b, sides[0] - a), *inner)] = 2
    image = torch.tensor([0.0, -1.0, 1.0])[mask.long()][None]
    return Case(
        f"case{seed}", f"patient{seed}", {"image": image}, torch.eye(4).double(), spacing, {"mask": mask}
    )


class Threshold(nn.Module):
    """Knows the intensities of `case`: the oracle that a prediction on any grid is held to."""

    def __init__(self) -> None:
        super().__init__()
        self.sharp = nn.Parameter(torch.tensor(20.0))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = -self.sharp * torch.cat([(x - level).square() for level in (0.0, -1.0, 1.0)], 1)
        return logits


AS_IT_IS = {"normalise": "window", "window": [-1.0, 1.0]}


# ---- batches


@pytest.mark.parametrize("patch", [[8, 8], [16, 20], [8, 8, 8], [16, 4, 12]])
def test_batch_has_the_patch_s_shape_even_beyond_the_image(patch: list[int]) -> None:
    task = built({"patch": patch, "flips": [0], "rotation": 20.0, "scaling": 0.2, "noise": 0.1})
    sides = (12, 10, 9)[: len(patch)]
    examples = [task.prepare(case(sides, (1.0,) * len(sides), seed)) for seed in range(3)]
    batch = task.batch(examples, torch.Generator().manual_seed(0))
    assert batch["image"].shape == (3, 1, *patch)
    assert batch["image"].dtype == torch.float32
    assert batch["mask"].shape == (3, *patch)
    assert batch["mask"].dtype == torch.int64
    assert set(batch["mask"].flatten().tolist()) <= {0, 1, 2}


def test_batch_depends_on_the_generator_alone() -> None:
    task = built({"flips": [0, 1], "rotation": 20.0, "noise": 0.1, "gamma": 0.2})
    example = task.prepare(case())
    state = torch.get_rng_state()
    a, b, c = (task.batch([example] * 2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a["image"], b["image"])
    assert torch.equal(a["mask"], b["mask"])
    assert not torch.equal(a["image"], c["image"])
    assert torch.equal(torch.get_rng_state(), state)


def test_every_patch_on_foreground_holds_some() -> None:
    whole = case((40, 40, 40))
    mask = torch.zeros_like(whole.masks["mask"])
    mask[37, 2, 20], mask[5, 30, 1] = 1, 2
    lone = Case("c", "p", whole.images, whole.affine, whole.spacing, {"mask": mask})
    task = built({"foreground": 1.0})
    example = task.prepare(lone)
    draw = torch.Generator().manual_seed(0)
    found = [sorted(set(task.batch([example], draw)["mask"].flatten().tolist())) for _ in range(60)]
    assert all(classes in ([0, 1], [0, 2]) for classes in found)
    assert 15 <= found.count([0, 1]) <= 45, "classes take turns, however small"


def test_image_and_mask_move_together() -> None:
    task = built({**AS_IT_IS, "patch": [24, 24, 24], "flips": [0, 1, 2], "rotation": 30.0, "scaling": 0.2})
    example = task.prepare(case((24, 24, 24)))
    batch = task.batch([example] * 4, torch.Generator().manual_seed(0))
    level = torch.tensor([0.0, -1.0, 1.0])[batch["mask"]]
    # linear against nearest: they differ on surfaces only
    assert ((batch["image"][:, 0] - level).abs() < 0.5).float().mean() > 0.97


def test_phase_gives_one_loss_per_example_and_learns() -> None:
    task = built({**AS_IT_IS, "patch": [12, 12, 12]})
    torch.manual_seed(0)
    model = task.build_model()
    (phase,) = task.phases
    examples = [task.prepare(case((12, 12, 12))) for _ in range(2)]
    draw = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = phase.loss(model, task.batch(examples, draw))
        assert loss.shape == (2,)
        optimiser.zero_grad()
        loss.mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.mean().item())
    assert losses[-1] < 0.5 * losses[0]
    assert phase.private
    with pytest.raises(ValueError, match="needs a batch of patients"):
        phase.loss(model, None)


# ---- preparing and predicting


def test_prepare_resamples_to_the_plan_s_spacing() -> None:
    task = built({**AS_IT_IS, "spacing": [2.0, 1.0, 1.0]})
    prepared = task.prepare(case((12, 10, 9), (1.0, 1.0, 2.0)))
    assert prepared["image"].shape == (1, 6, 10, 18)
    assert prepared["mask"].shape == (6, 10, 18)
    assert prepared["spacing"].tolist() == [2.0, 1.0, 1.0]
    assert all(prepared["mask"][tuple(v)] > 0 for v in prepared["centres"].tolist())


@pytest.mark.parametrize("spacing", [None, [0.5, 0.5, 0.5], [1.5, 1.0, 1.2]])
def test_prediction_is_on_the_native_grid(spacing: list[float] | None) -> None:
    whole = case((32, 28, 24), (1.0, 1.0, 0.8))
    task = built({**AS_IT_IS, "spacing": spacing})
    predicted = task.predict(Threshold(), whole)
    assert predicted.masks["mask"].shape == (32, 28, 24)
    assert predicted.masks["mask"].dtype == torch.uint8
    dice = task.score([whole], [predicted]).value()["dice_mean"]
    assert dice == 1 if spacing is None else dice > 0.93


def test_prediction_follows_a_flip() -> None:
    whole = case((16, 14, 12), (1.0, 1.0, 1.0))
    flipped = Case(
        "f",
        "p",
        {"image": whole.images["image"].flip(1)},
        whole.affine,
        whole.spacing,
        {"mask": whole.masks["mask"].flip(0)},
    )
    task = built({**AS_IT_IS, "spacing": [1.3, 1.3, 1.3]})
    one, other = (task.predict(Threshold(), c).masks["mask"] for c in (whole, flipped))
    assert (one.flip(0) == other).float().mean() > 0.999


def test_score_of_a_patient_with_an_unannotated_case() -> None:
    task, whole = built(AS_IT_IS), case()
    bare = Case("b", whole.patient, whole.images, whole.affine, whole.spacing)
    predicted = task.predict(Threshold(), whole)
    assert task.score([whole, bare], [predicted, predicted]).value()["dice_mean"] == 1
    assert task.score([bare], [predicted]).patients == 0
    assert torch.equal(task.statistics().to_vector(), task.score([bare], [predicted]).to_vector())


# ---- trivial rows


def sums(trivial: Summed, cases: list[Case]) -> dict[str, Tensor]:
    total = dict(trivial.zero())
    for one in cases:
        for key, value in trivial.accumulate(one, {}).items():
            assert value.dtype == torch.float64
            assert value.shape == total[key].shape
            total[key] = total[key] + value
    return total


def test_atlas_of_one_shape_is_that_shape() -> None:
    task, cases = built(), [case((48, 48, 48), seed=seed) for seed in range(3)]
    atlas = task.trivial()["atlas"]
    total = sums(atlas, cases)
    assert torch.equal(atlas.predict(total, cases[0]).masks["mask"], cases[0].masks["mask"])
    # stretched with the image: positions are proportional
    other = case((24, 36, 12))
    assert task.score([other], [atlas.predict(total, other)]).value()["dice_mean"] > 0.95


def test_constant_is_the_most_frequent_foreground_class() -> None:
    constant, whole = built().trivial()["constant"], case()
    fewer = Case("c", "p", whole.images, whole.affine, whole.spacing, {"mask": whole.masks["mask"].clone()})
    fewer.masks["mask"][whole.masks["mask"] == 1] = 0
    predicted = constant.predict(sums(constant, [whole, fewer]), whole).masks["mask"]
    assert predicted.shape == whole.masks["mask"].shape
    assert (predicted == 2).all()


ONE = {"classes": ["background", "sought"], "patch": [8, 8]}


def two_classes(sides: tuple[int, ...] = (12, 10), level: float = 2.0, seed: int = 0) -> Case:
    """A box of class 1 at `level` in noise around 0."""
    mask = torch.zeros(sides, dtype=torch.uint8)
    mask[2 : sides[0] // 2, 3:6] = 1
    noise = torch.randn(1, *sides, generator=torch.Generator().manual_seed(seed))
    image = noise * 0.5 + level * mask
    return Case(f"c{seed}", f"p{seed}", {"image": image}, torch.eye(4).double(), (1.0, 1.0), {"mask": mask})


@pytest.mark.parametrize("level", [-1.5, 1.5])
def test_threshold_is_the_best_of_all(level: float) -> None:
    """Held to a search over every threshold, both ways, scored by the task itself."""
    task = built({**ONE, "normalise": "window", "window": [-1.0, 1.0]})
    cases = [two_classes(level=level, seed=seed) for seed in range(4)]

    def mean(predictions: list[Prediction]) -> float:
        scores = task.statistics()
        for one, given in zip(cases, predictions, strict=True):
            scores = scores + task.score([one], [given])
        return scores.value()["dice_mean"]

    threshold = task.trivial()["threshold"]
    found = mean([threshold.predict(sums(threshold, cases), one) for one in cases])
    greys = [task.normalised(one.images["image"])[0] for one in cases]
    tried = [
        mean([Prediction(masks={"mask": ((grey >= at) ^ dark).to(torch.uint8)}) for grey in greys])
        for at in np.linspace(-1, 1, 129)  # the cells' borders
        for dark in (False, True)
    ]
    assert found == pytest.approx(max(tried), abs=1e-9)
    assert found > 0.8


@pytest.mark.parametrize("levels", [(9.0, 9.0), (-9.0, -9.0), (9.0, -9.0)])
def test_otsu_learns_which_side_is_meant(levels: tuple[float, ...]) -> None:
    task = built(ONE)
    cases = [two_classes(level=level, seed=seed) for seed, level in enumerate(levels)]
    otsu = task.trivial()["otsu"]
    for one in cases:
        given = otsu.predict(sums(otsu, cases), one)
        assert task.score([one], [given]).value()["dice_mean"] > 0.9


def test_thresholds_stand_where_there_is_one_foreground_class() -> None:
    assert set(built().trivial()) == {"constant", "atlas"}
    assert set(built(ONE).trivial()) == {"constant", "atlas", "threshold", "otsu"}


def test_a_case_of_one_intensity_and_without_the_class_is_no_obstacle() -> None:
    task, empty = built(ONE), two_classes(level=0.0)
    empty.masks["mask"].zero_()
    empty.images["image"].zero_()
    for predictor in task.trivial().values():
        found = sums(predictor, [empty])
        assert all(value.isfinite().all() for value in found.values())
        assert predictor.predict(found, empty).masks["mask"].shape == (12, 10)


@pytest.mark.parametrize("name", ["constant", "atlas", "threshold", "otsu"])
def test_trivial_sums_skip_unannotated_cases(name: str) -> None:
    trivial, whole = built(ONE).trivial()[name], two_classes()
    bare = Case("b", "p", whole.images, whole.affine, whole.spacing)
    with_bare, without = sums(trivial, [whole, bare]), sums(trivial, [whole])
    assert all(torch.equal(with_bare[key], without[key]) for key in without)


@pytest.mark.parametrize(("site", "dice"), [("montgomery_us", 0.742), ("shenzhen_cn", 0.790)])
def test_atlas_of_real_lungs(site: str, dice: float, real: Callable[[str], Path]) -> None:
    """The figures known for this set (issue 3), from the training split of both hospitals."""
    root = real("lung_cxr_2site")
    task = built({"classes": ["background", "lung"], "patch": [8, 8]})
    with (root / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))

    def load(row: Mapping[str, str]) -> Case:
        mask = torch.from_numpy((np.asarray(Image.open(root / row["mask"])) > 0).astype(np.uint8))
        images = {"image": torch.zeros(1, *mask.shape)}
        return Case(row["mask"], row["patient"], images, torch.eye(4).double(), (1.0, 1.0), {"mask": mask})

    atlas = task.trivial()["atlas"]
    total = sums(atlas, [load(row) for row in rows if row["suggested_split"] == "train"])
    scores: Statistics = task.statistics()
    for row in rows:
        if row["suggested_split"] == "test" and row["site"] == site:
            scores = scores + task.score([load(row)], [atlas.predict(total, load(row))])
    assert scores.value()["dice_mean"] == pytest.approx(dice, abs=0.005)


# ---- refusals


def test_faulty_cases_are_named() -> None:
    task, whole = built(), case()
    parts = (whole.affine, whole.spacing)
    with pytest.raises(ValueError, match="case k has no image 'image'"):
        task.prepare(Case("k", "p", {}, *parts, whole.masks))
    with pytest.raises(ValueError, match="case k has no mask 'mask'; training needs one"):
        task.prepare(Case("k", "p", whole.images, *parts))
    with pytest.raises(ValueError, match=r"image of 2 channels; need task\.channels=1"):
        task.prepare(Case("k", "p", {"image": torch.zeros(2, 12, 10, 9)}, *parts, whole.masks))
    with pytest.raises(ValueError, match=r"class 7 in its mask; task\.classes has 0 to 2"):
        task.prepare(Case("k", "p", whole.images, *parts, {"mask": whole.masks["mask"] + 5}))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"pach": [8, 8]}, r"task\.pach is not a setting"),
        ({"patch": [8]}, r"task\.patch is \[8\]; tuple should have at least 2 items"),
        ({"patch": [9, 9]}, r"task\.patch is \[9, 9\]; model 'unet' cannot take it"),
        ({"spacing": [1.0, 1.0]}, r"task\.spacing has 2 axes, task\.patch has 3"),
        ({"flips": [2], "patch": [8, 8]}, r"task\.flips is \[2\]; axes of its input are 0 to 1"),
        ({"window": [5.0, 5.0]}, r"task\.window is \[5\.0, 5\.0\]; the first must be the smaller"),
        ({"classes": ["background"]}, r"task\.classes is \['background'\]; tuple should have at least 2"),
        ({"foreground": 1.5}, r"task\.foreground is 1\.5; input should be less than or equal to 1"),
    ],
)
def test_bad_settings_are_named(task: dict[str, Any], message: str) -> None:
    with pytest.raises(Stop, match=message) as caught:
        built(task)
    assert caught.value.exit is Exit.CONFIG


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            {"name": "huber"},
            r"loss is 'huber', which does not compare map; use one of: balanced_cross_entropy, boundary",
        ),
        ({"name": "focal", "weights": [1.0, 2.0]}, r"loss\.weights has 2 numbers; there are 3 classes"),
    ],
)
def test_losses_that_do_not_fit_are_refused_before_anything_runs(loss: dict[str, Any], message: str) -> None:
    with pytest.raises(Stop, match=message):
        built(loss=loss)


def test_unknown_names_keep_their_exit_code() -> None:
    for sections in ({"model": {"name": "nothing"}}, {"loss": {"name": "nothing"}}):
        with pytest.raises(Stop, match="is 'nothing'; known: ") as caught:
            built(**sections)
        assert caught.value.exit is Exit.UNKNOWN_NAME


def test_building_a_task_draws_nothing() -> None:
    state = torch.get_rng_state()
    task = built()
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(task, Task)
    assert task.model == Section.model_validate(SMALL)


def test_uncertainty_is_the_entropy_of_what_dropout_says() -> None:
    small = {"name": "basic_unet", "channels": [4, 4, 4, 4, 4, 4], "dropout": 0.5}
    given = {"patch": [32, 32], "dropout_samples": 5, "largest": True}
    task = built(given, model=small)
    torch.manual_seed(0)
    model, one = task.build_model(), case((32, 32), (1.0, 1.0))
    with torch.no_grad():
        said = task.predict(model, one)
        again = task.predict(model, one)
        scores = sliding_window(model, task.prepare(one)["image"], [32, 32], 0.5, draws=5)
    wanted = entropy(scores.numpy(), axis=0) / np.log(3)
    np.testing.assert_allclose(said.maps["uncertainty"].numpy(), wanted, atol=1e-5)
    assert torch.equal(said.maps["uncertainty"], again.maps["uncertainty"])
    assert 0 < wanted.min() < wanted.max() <= 1
    assert task.score([one], [said]).value().keys() == built().score([one], [said]).value().keys()
    with pytest.raises(Stop, match="model 'unet' has no dropout as it is used here"):
        built({"dropout_samples": 5})
