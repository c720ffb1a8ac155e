"""The picture: which slice, which way up, and that it is a picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from server.report.figure import figure
from tasks.base import Case, Prediction


def case(image: np.ndarray, mask: np.ndarray, spacing: tuple[float, ...]) -> Case:
    return Case(
        key="k",
        patient="p",
        images={"image": torch.tensor(image, dtype=torch.float32)[None]},
        masks={"mask": torch.tensor(mask, dtype=torch.uint8)},
        affine=torch.eye(4, dtype=torch.float64),
        spacing=spacing,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "plan.json").write_text(
        json.dumps({"task": {"name": "segmentation", "classes": ["none", "organ"]}})
    )
    lines = [
        {"round": r, "split": "val", "model": "federated", "site": s, "patients": 1, "dice_mean": r / 10}
        for r in (1, 2)
        for s in ("a", "all")
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, float]]:
    """What is drawn, and with which aspect."""
    seen: list[tuple[np.ndarray, float]] = []
    draw = Axes.imshow

    def spy(self: Axes, image: np.ndarray, *, aspect: float, **rest: Any) -> object:
        seen.append((image, aspect))
        return draw(self, image, aspect=aspect, **rest)

    monkeypatch.setattr(Axes, "imshow", spy)
    return seen


def test_a_volume_is_seen_from_the_feet_at_its_fullest_slice(
    run: Path, shown: list[tuple[np.ndarray, float]]
) -> None:
    volume = np.zeros((6, 8, 5))
    mask = np.zeros((6, 8, 5))
    mask[1:3, 2:5, 3] = 1
    mask[1, 2, 1] = 1
    volume[5, 7, 3] = 9.0  # the patient's right, front
    figure(
        run,
        [("a", case(volume, mask, (2.0, 3.0, 4.0)), Prediction(masks={"mask": torch.zeros(6, 8, 5)}))],
        run / "x.png",
    )
    image, aspect = shown[0]
    assert image.shape == (8, 6)
    assert image[0, 0] == 9.0
    assert image.sum() == 9.0
    assert aspect == 1.5


def test_a_picture_is_seen_as_it_came(run: Path, shown: list[tuple[np.ndarray, float]]) -> None:
    flat = np.arange(48.0).reshape(6, 8)
    figure(
        run,
        [("a", case(flat, flat > 40, (3.0, 2.0)), Prediction(masks={"mask": torch.ones(6, 8)}))],
        run / "x.png",
    )
    image, aspect = shown[0]
    np.testing.assert_array_equal(image, flat)
    assert aspect == 1.5


@pytest.mark.parametrize("count", [0, 1, 5])
def test_any_number_of_examples_gives_a_png(run: Path, count: int) -> None:
    flat = np.random.default_rng(0).normal(size=(16, 16))
    examples = [
        (
            f"site_{i}",
            case(flat, np.zeros((16, 16)), (1.0, 1.0)),
            Prediction(masks={"mask": torch.zeros(16, 16)}),
        )
        for i in range(count)
    ]
    figure(run, examples, run / "x.png")
    with Image.open(run / "x.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300


def test_no_validation_patients_is_said_not_drawn(run: Path) -> None:
    (run / "metrics.jsonl").write_text("")
    figure(run, [], run / "x.png")
    assert (run / "x.png").stat().st_size > 1000


def test_a_made_image_is_shown_and_scores_are_said(
    run: Path, shown: list[tuple[np.ndarray, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **_: titles.append(text))
    flat, own = np.zeros((6, 8)), np.full((6, 8), 7.0)
    made = Prediction(images={"target": torch.tensor(own)[None]})
    said = Prediction(scores={"given": torch.tensor([0.25, 0.75])})
    known = case(flat, flat, (1.0, 1.0))
    figure(run, [("a", known, made), ("b", replace(known, labels={"label": 1.0}), said)], run / "x.png")
    np.testing.assert_array_equal(shown[0][0], own)
    np.testing.assert_array_equal(shown[1][0], flat)
    assert titles == ["a", "b\n1 \u2192 0.25 0.75"]
