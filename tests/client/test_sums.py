"""What sums over training patients tell of one of them, and that a hospital does not let it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from client.policy import Policy
from client.train import Bench, Session
from conf.schema import Plan
from strategies.base import Study
from strategies.protocol import Instruction, Refused
from tasks.base import Case
from tasks.synthesis import SynthesisStatistics
from tests.toys import toy_archive

LENET = {"name": "lenet", "channels": [3, 4], "hidden": [8, 6], "cells": 2}
DEFAULT = Policy()


def case(k: int, **labels: float) -> Case:
    draw = torch.Generator().manual_seed(k)
    image, mask = torch.rand(1, 16, 16, generator=draw), (torch.rand(16, 16, generator=draw) > 0.5).byte()
    named = labels or {"label": float(k % 2)}
    return Case(
        f"c{k}",
        f"p{k}",
        {"image": image},
        torch.eye(4).double(),
        (1.0, 1.0),
        masks={"mask": mask},
        labels=named,
    )


def session(policy: Policy, cases: list[Case], **sections: Any) -> Session:
    given: Mapping[str, Any] = {
        "task": {"name": "classification", "size": [16, 16], "columns": {}},
        "model": LENET,
        "loss": {"name": "class_cross_entropy"},
        "strategy": {"name": "fedavg"},
        **sections,
    }
    plan = Plan.model_validate(given)
    asked = Instruction("run", 1, 0, "trivial/x/0", "site_0", None, plan.digest, "code", "")
    archive = toy_archive({"train": cases, "val": cases})
    return Session(Bench("cpu"), Study.of(plan), archive, policy, asked, {}, {})


FINDINGS = {
    "task": {"name": "classification", "size": [16, 16], "target": "multilabel", "labels": ["a", "b"]},
    "loss": {"name": "multilabel_bce"},
}
MAPS = {
    "task": {"name": "segmentation", "patch": [16, 16], "classes": ["background", "it"]},
    "model": {"name": "unet", "channels": [4, 8], "residual_units": 0},
    "loss": {"name": "dice_ce"},
}
IMAGES = {
    "task": {
        "name": "gan",
        "size": [16, 16],
        "classes": ["a", "b"],
        "window": [0.0, 1.0],
        "discriminator": {"name": "dcgan_discriminator", "width": 4, "levels": 2},
    },
    "model": {"name": "dcgan", "width": 4, "levels": 2},
    "loss": {"name": "hinge"},
}
PLAIN = {
    "task": {"name": "classification", "size": [16, 16], "features": {"name": "thumbnail"}},
    "model": {"name": "linear"},
}


@pytest.mark.parametrize("known", [0, 1, 9, 10])
def test_a_mean_of_a_label_that_few_have_stays_home(known: int) -> None:
    cases = [case(k, a=1.0, **({"b": 1.0} if k < known else {})) for k in range(12)]
    here = session(DEFAULT, cases, **FINDINGS)
    if known in (0, 10):
        assert here.accumulate("constant", {})["known"].tolist() == [12, known]
        return
    with pytest.raises(Refused, match="policy"):
        here.accumulate("constant", {})


@pytest.mark.parametrize("name", ["constant", "atlas", "threshold", "otsu"])
def test_a_mask_that_one_patient_has_does_not_leave_as_a_mean(name: str) -> None:
    """Ten patients are enough for a mean; of these ten one alone is annotated."""
    cases = [case(k) if k == 3 else replace(case(k), masks={}) for k in range(10)]
    with pytest.raises(Refused, match="policy: 1 patients, minimum cell 10"):
        session(DEFAULT, cases, **MAPS).accumulate(name, {})
    session(DEFAULT, [case(k) for k in range(10)], **MAPS).accumulate(name, {})


@pytest.mark.parametrize("name", ["constant", "atlas"])
def test_a_lesion_that_few_have_is_no_mean_though_all_were_looked_at(name: str) -> None:
    none = torch.zeros(16, 16, dtype=torch.uint8)
    for having, allowed in ((0, True), (9, False), (10, True)):
        cases = [case(k) if k < having else replace(case(k), masks={"mask": none}) for k in range(12)]
        here = session(DEFAULT, cases, **MAPS)
        if allowed:
            here.accumulate(name, {})
            continue
        with pytest.raises(Refused, match="policy: 9 patients, minimum cell 10"):
            here.accumulate(name, {})


def test_the_mean_image_of_a_class_of_one_is_that_patient_and_stays_home() -> None:
    cases = [case(k, label=float(k == 0)) for k in range(12)]
    with pytest.raises(Refused, match="policy: 1 patients, minimum cell 10"):
        session(DEFAULT, cases, **IMAGES).accumulate("class_mean", {})
    # two images of one patient are one patient
    twice = [replace(case(k, label=float(k < 6)), patient=f"p{k % 3}") for k in range(12)]
    with pytest.raises(Refused, match="policy: 3 patients, minimum cell 10"):
        session(DEFAULT, twice, **IMAGES).accumulate("class_mean", {})


def test_products_of_more_features_than_patients_tell_who_is_among_them() -> None:
    """The attack that the rule is about: whose features lie in the span of the products was there."""
    few, stranger = [case(k) for k in range(12)], case(99)
    here = session(Policy(patients_per_feature=0), few, **PLAIN)
    head = here.study.task.sums()["linear"]
    (gram,) = here.accumulate("linear", {})["gram"]
    assert len(few) < head.products

    def outside(one: Case) -> float:
        x = head.accumulate(one, {})["gram"][0, -1]  # its features, and a one
        values, vectors = torch.linalg.eigh(gram)
        inside = vectors[:, values > 1e-9 * values[-1]]
        return float((x - inside @ (inside.T @ x)).norm() / x.norm())

    assert max(map(outside, few)) < 1e-5 < 0.01 < outside(stranger)


@pytest.mark.parametrize("name", ["linear", "logistic"])
def test_products_of_features_leave_when_a_hospital_says_so_and_has_the_patients(name: str) -> None:
    def told(policy: Policy, patients: int) -> None:
        here = session(policy, [case(k) for k in range(patients)], **PLAIN)
        predictor = here.study.task.sums()[name]
        assert predictor.products == max(t.shape[-1] for t in here.study.initial.values())
        here.accumulate(name, dict(predictor.start()))

    features = session(DEFAULT, [], **PLAIN).study.task.sums()[name].products
    with pytest.raises(Refused, match="products of features stay home"):
        told(DEFAULT, 4 * features)
    with pytest.raises(Refused, match=f"minimum cell {2 * (features + 1)}"):
        told(Policy(patients_per_feature=2), 2 * features + 1)
    told(Policy(patients_per_feature=2), 2 * (features + 1))


def test_a_generators_scores_are_products_of_features_too() -> None:
    zero = SynthesisStatistics.zero(2, 1, 2)
    assert zero.real_square.shape[-1] == zero.products > 10
    here = session(DEFAULT, [case(k) for k in range(40)], **IMAGES)
    with pytest.raises(Refused, match="products of features stay home"):
        here.score(here.study.initial, "val")
