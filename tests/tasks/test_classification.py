"""Case to vector: targets, views, tables, chance, and what stands beside a network."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conf.exits import Exit, Stop
from conf.schema import Plan
from tasks.base import Case, build_task
from tasks.classification import Classification
from tasks.models import POOLS
from tasks.targets import TARGETS
from tasks.views import VIEWS

LENET = {"name": "lenet", "channels": [3, 4], "hidden": [8, 6], "cells": 2}
LOSS = {
    "classes": "class_cross_entropy",
    "multilabel": "multilabel_bce",
    "ordinal": "ordinal",
    "continuous": "squared_error",
}


def built(
    model: Mapping[str, Any] | None = None,
    loss: str | None = None,
    weights: list[float] | None = None,
    **task: Any,
) -> Classification:
    given = {"name": "classification", "size": [32, 32], **task}
    chosen = loss or LOSS[str(given.get("target", "classes"))]
    more = {} if weights is None else {"weights": weights}
    plan = {"model": model or LENET, "loss": {"name": chosen, **more}, "strategy": {"name": "fedavg"}}
    made = build_task(Plan.model_validate({"task": given, **plan}))
    assert isinstance(made, Classification)
    return made


def case(value: float = 1.0, axes: int = 2, seed: int = 0, **labels: float) -> Case:
    draw = torch.Generator().manual_seed(seed)
    image = torch.randn(1, *[20, 24, 18][:axes], generator=draw) + value
    table = {"age": 60.0, "sex": 1.0}
    named = {"label": value, **labels}
    return Case(
        f"c{seed}",
        f"p{seed}",
        {"image": image},
        torch.eye(4).double(),
        (1.0,) * axes,
        labels=named,
        table=table,
    )


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("kind", TARGETS)
def test_every_target_trains_predicts_and_scores(kind: str) -> None:
    labels = {"multilabel": ["label", "other"], "continuous": ["label", "other"]}.get(kind, ["label"])
    task = built(target=kind, labels=labels, classes=["a", "b", "c"])
    cases = [case(float(k % 2), seed=k) for k in range(4)]
    batch = task.batch([task.prepare(c) for c in cases], draw())
    model = task.build_model()
    loss = task.phases[0].loss(model, batch)
    assert loss.shape == (4,)
    assert loss.isfinite().all()
    found = [task.predict(model, c) for c in cases]
    total = task.statistics()
    for one, prediction in zip(cases, found, strict=True):
        total = total + task.score([one], [prediction])
    assert total.patients == 4
    assert total.value()
    for trivial in task.trivial().values():
        known = trivial.solve(trivial.accumulate(cases[0], trivial.start()), trivial.start())
        assert trivial.predict(known, cases[0]).scores["given"].shape == found[0].scores["given"].shape


@pytest.mark.parametrize("kind", ["classes", "ordinal"])
def test_probabilities_add_to_one(kind: str) -> None:
    target = TARGETS[kind](("label",), ("a", "b", "c", "d"))
    given = target.decode(torch.randn(5, target.outputs, generator=draw()))
    assert given.shape == (5, 4)
    assert (given >= 0).all()
    assert given.sum(1).tolist() == pytest.approx([1.0] * 5)


@pytest.mark.parametrize(
    ("view", "pool"), [*((view, "attention") for view in VIEWS), *(("tiles", pool) for pool in POOLS)]
)
@pytest.mark.parametrize("columns", [{}, {"age": [60, 10], "sex": 2}])
def test_every_view_pool_and_table_reads(view: str, pool: str, columns: dict[str, Any]) -> None:
    task = built(view=view, instances=4, pool={"name": pool}, columns=columns, rotation=10.0, shift=0.1)
    one = case(axes=2 + VIEWS[view].axes)
    batch = task.batch([task.prepare(one)] * 2, draw())
    bag = (VIEWS[view].count(4),)
    assert batch["image"].shape == (2, *(bag if VIEWS[view].bag else ()), 1, 32, 32)
    model = task.build_model()
    assert task.phases[0].loss(model, batch).shape == (2,)
    assert task.predict(model, one).scores["given"].sum() == pytest.approx(1)


def test_tiles_are_the_image_cut_up() -> None:
    image = torch.arange(64.0).view(1, 8, 8)
    tiles = VIEWS["tiles"].cut(image, (4, 4), 4)
    assert torch.equal(torch.cat([torch.cat([*tiles[:2]], 2), torch.cat([*tiles[2:]], 2)], 1), image)


def test_scales_look_at_less_and_less() -> None:
    image = torch.arange(64.0).view(1, 8, 8)
    made = VIEWS["scales"].cut(image, (4, 4), 2)
    assert torch.equal(made[1], image[:, 2:6, 2:6])


def test_slices_keep_their_order() -> None:
    image = torch.arange(6.0).view(1, 1, 1, 6).expand(1, 4, 4, 6)
    assert VIEWS["slices"].cut(image, (4, 4), 6)[:, 0, 0, 0].tolist() == list(range(6))


def test_a_table_alone_needs_no_image() -> None:
    task = built({"name": "linear"}, features={"name": "none"}, columns={"age": [50, 10], "sex": 2})
    bare = replace(case(), images={})
    assert task.prepare(bare)["vector"].tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]
    missing = replace(bare, table={})
    assert task.prepare(missing)["vector"].tolist() == [0.0, 1.0, 0.0, 0.0, 1.0]
    assert set(task.trivial()) == {"constant", "linear"}


def test_a_category_that_was_not_declared_is_named() -> None:
    task = built({"name": "linear"}, features={"name": "none"}, columns={"sex": 2})
    with pytest.raises(ValueError, match=r"has 2 as 'sex'; task\.columns\.sex is 2: 0 to 1"):
        task.prepare(replace(case(), table={"sex": 2.0}))
    assert task.reads() == {"task.columns": ("sex",), "task.subgroups": ()}


def test_without_chance_a_batch_is_the_prepared_image() -> None:
    task = built()
    ready = task.prepare(case())
    assert torch.equal(task.batch([ready], draw())["image"][0], ready["image"])


def test_a_flip_is_a_flip_and_a_shift_a_shift() -> None:
    flipped = built(flips=[1])
    ready = flipped.prepare(case())
    seen = {
        bool(
            torch.equal(flipped.batch([ready], torch.Generator().manual_seed(s))["image"][0], ready["image"])
        )
        for s in range(8)
    }
    assert seen == {True, False}
    mirrored = next(
        made
        for s in range(8)
        if not torch.equal(
            made := flipped.batch([ready], torch.Generator().manual_seed(s))["image"][0], ready["image"]
        )
    )
    assert torch.allclose(mirrored, ready["image"].flip(2), atol=1e-5)


def test_mixup_mixes_images_as_it_mixes_targets() -> None:
    task = built(mixup=1.0)
    ready = [{"image": torch.full((1, 32, 32), float(k)), "target": torch.tensor(k)} for k in (0, 1)]
    batch = task.batch(ready * 4, draw())
    assert batch["target"].sum(1).tolist() == pytest.approx([1.0] * 8)
    assert batch["target"][:, 1].tolist() == pytest.approx(batch["image"][:, 0, 0, 0].tolist())
    assert len({round(v, 6) for v in batch["target"][:, 1].tolist()}) > 2


def test_dropout_is_averaged_the_same_way_each_time() -> None:
    task = built(
        {"name": "mlp", "channels": [8, 8], "dropout": 0.5},
        features={"name": "thumbnail"},
        dropout_samples=20,
    )
    model = task.build_model().eval()
    nn.init.normal_(next(model.parameters()), generator=draw())
    once, again = (task.predict(model, case()).scores["given"] for _ in range(2))
    assert torch.equal(once, again)
    model.train()
    x = task.prepare(case())["vector"][None]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        rows = np.stack([model(x)[0].softmax(0).numpy() for _ in range(20)])
    np.testing.assert_allclose(once, rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(task.predict(model, case()).scores["spread"], rows.std(0), atol=1e-6)
    model.eval()
    plain = replace(task, dropout_samples=0).predict(model, case()).scores["given"]
    assert not torch.equal(once, plain)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("task", "code", "line"),
    [
        (
            {"loss": "dice"},
            Exit.CONFIG,
            "loss is 'dice', which does not compare classes; use one of: .*class_focal",
        ),
        (
            {"model": {"name": "unet", "channels": [4, 8]}},
            Exit.CONFIG,
            "'unet' is no network of vectors for 2D images; those are resnet, ",
        ),
        ({"model": {"name": "linear"}}, Exit.CONFIG, "'linear' is no network of vectors for 2D images"),
        ({"scale": {"label": [1.0, 2.0]}}, Exit.CONFIG, r"task.scale has label; .* \(it is classes\)"),
        (
            {"target": "continuous", "scale": {"age": [1.0, 2.0]}},
            Exit.CONFIG,
            r"task.scale has age; it is of the labels \(label\)",
        ),
        ({"target": "continuous", "mixup": 0.2}, Exit.CONFIG, "task.mixup is 0.2; it mixes classes"),
        ({"labels": ["a", "b"]}, Exit.CONFIG, r"task.labels is \['a', 'b'\]; this target is one label"),
        ({"features": {"name": "hog"}}, Exit.CONFIG, "for features or tables; those are linear, mlp"),
        ({"features": {"name": "magic"}}, Exit.UNKNOWN_NAME, "features is 'magic'; known: .*hog"),
        ({"flips": [2]}, Exit.CONFIG, r"task.flips is \[2\]"),
        (
            {"view": "strips"},
            Exit.CONFIG,
            "task.view is 'strips'; known: planes, scales, slices, tiles, whole",
        ),
        ({"target": "yes", "loss": "huber"}, Exit.CONFIG, "task.target is 'yes'; known: classes, continuous"),
        ({"view": "slices", "size": [32] * 3}, Exit.CONFIG, "view slices takes 2 sides"),
        ({"view": "tiles", "size": [32] * 3}, Exit.CONFIG, "view tiles takes 2 sides"),
        ({"columns": {"age": [50, 0]}}, Exit.CONFIG, r"task.columns.age.* greater than 0"),
        (
            {"model": {"name": "linear"}, "features": {"name": "hog"}, "flips": [1], "rotation": 9.0},
            Exit.CONFIG,
            r"task.flips is \(1,\), task.rotation is 9.0; task.features are of the images as they are",
        ),
        (
            {"model": {"name": "linear"}, "features": {"name": "hog"}, "view": "tiles"},
            Exit.CONFIG,
            "task.features are of the whole image",
        ),
        ({"dropout_samples": 3}, Exit.CONFIG, "model 'lenet' has no dropout as it is used here"),
        ({"view": "tiles", "pool": {"name": "sum"}}, Exit.UNKNOWN_NAME, "pool is 'sum'; known: .*attention"),
    ],
)
def test_bad_settings_are_named(task: dict[str, Any], code: Exit, line: str) -> None:
    with pytest.raises(Stop, match=line) as stop:
        built(**task)
    assert stop.value.exit == code


@pytest.mark.parametrize(
    ("labels", "line"),
    [({}, "has no label 'label'"), ({"label": 2.0}, "has 2 as 'label'; task.classes has 0 to 1")],
)
def test_bad_labels_are_named(labels: dict[str, float], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        built().prepare(replace(case(), labels=labels))


def test_a_finding_is_yes_or_no() -> None:
    task = built(target="multilabel", labels=["label", "other"])
    with pytest.raises(ValueError, match="findings are 0 or 1"):
        task.prepare(case(0.5))


def test_values_are_learned_in_units_of_their_deviation_and_predicted_in_their_own() -> None:
    labels, scale = ["age", "label"], {"age": [60.0, 12.0]}
    plain, scaled = (built(target="continuous", labels=labels, scale=s) for s in (None, scale))
    one = case(2.0, age=66.0)
    assert scaled.prepare(one)["target"].tolist() == [0.5, 2.0]
    gone = scaled.prepare(replace(one, labels={"label": 2.0}))["target"]
    assert gone.isnan().tolist() == [True, False]
    torch.manual_seed(0)
    model = plain.build_model()
    raw, own = (t.predict(model, one).scores["given"].numpy() for t in (plain, scaled))
    np.testing.assert_allclose(own, raw * [12.0, 1.0] + [60.0, 0.0], rtol=1e-6)
    error = scaled.score([one], [scaled.predict(model, one)]).value()
    assert error["mae_0"] == pytest.approx(abs(own[0] - 66.0))
    # a probability of an age there is none
    assert set(scaled.sums()) == {"constant", "linear", "pca"}


def test_a_plan_read_from_its_canonical_form_reads_the_same_table() -> None:
    """Columns are inputs of the network, subgroups places in a sum: their order must not be the author's."""
    given = {
        "columns": {"weight": [70, 10], "sex": 2, "age": [60, 12]},
        "subgroups": {"sex": ["F"], "age": ["x"]},
    }
    task = {"name": "classification", "size": [32, 32], "features": {"name": "none"}, **given}
    rest = {"model": {"name": "linear"}, "loss": {"name": "class_cross_entropy"}}
    plan = Plan.model_validate({"task": task, **rest, "strategy": {"name": "fedavg"}})
    again = Plan.model_validate_json(plan.canonical())
    assert again.digest == plan.digest
    here, there = build_task(plan), build_task(again)
    one = replace(case(), table={"age": 66.0, "sex": 1.0, "weight": 80.0}, groups={"sex": "F"})
    assert here.prepare(one)["vector"].tolist() == [0.5, 0, 0, 1, 0, 1, 0]
    assert torch.equal(here.prepare(one)["vector"], there.prepare(one)["vector"])
    model = here.build_model()
    sums = [t.score([one], [t.predict(model, one)]) for t in (here, there)]
    assert sums[0].value() == sums[1].from_vector(sums[0].to_vector()).value()
