import numpy as np
import pytest
import torch
from scipy import linalg  # type: ignore[import-untyped]
from torch import Tensor

from tasks.judging import Pictures, classifier, copied, distance, judged, likeness, mmd, remembers


def patients(count: int, seed: int) -> Pictures:
    """Smooth images, brighter on one side by class."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 4, 4, generator=draw) * 0.8 - 0.6
    label = torch.arange(count) % 2
    coarse[:, 0, :, 3] += 0.4 * label[:, None]
    return Pictures(torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear"), label)


def pixels(seen: Pictures) -> Tensor:
    return seen.images.flatten(1)


TRAINING, HELD_OUT = patients(120, 0), patients(60, 1)


def test_a_generator_that_knows_nobody_passes_and_one_that_copies_fails() -> None:
    honest = copied(pixels(patients(200, 2)), pixels(TRAINING), pixels(HELD_OUT))
    assert not remembers(honest)
    again = TRAINING.images[torch.arange(200) % 120]
    noisy = (again + 0.02 * torch.randn(again.shape, generator=torch.Generator().manual_seed(0))).flatten(1)
    assert copied(noisy, pixels(TRAINING), pixels(HELD_OUT)) > 0.9
    # one in four is enough
    some = torch.cat([pixels(patients(150, 3)), noisy[:50]])
    assert remembers(copied(some, pixels(TRAINING), pixels(HELD_OUT)))


def test_blur_alone_is_no_copy() -> None:
    made = torch.nn.functional.avg_pool2d(patients(200, 4).images, 5, 1, 2)
    assert not remembers(copied(made.flatten(1), pixels(TRAINING), pixels(HELD_OUT)))


def test_the_distances_are_those_of_closed_forms() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(300, 6)), draw.normal(0.3, 2.0, size=(200, 6))
    cov = [np.cov(x.T, bias=True) for x in (a, b)]
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        cov[0] + cov[1] - 2 * linalg.sqrtm(cov[0] @ cov[1]).real
    )
    assert distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(wanted, rel=1e-6)
    x, y = torch.tensor(a), torch.tensor(b)
    width = torch.pdist(y).median()

    def kernel(p: Tensor, q: Tensor) -> Tensor:
        return torch.exp(-((p[:, None] - q[None]) ** 2).sum(2) / (2 * width**2))

    def off(k: Tensor) -> Tensor:
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    assert mmd(x, y) == pytest.approx(float(off(kernel(x, x)) + off(kernel(y, y)) - 2 * kernel(x, y).mean()))
    assert abs(mmd(x[:150], x[150:])) < 0.01


def test_a_collapsed_generator_shows_in_likeness() -> None:
    draw = torch.Generator().manual_seed(0)
    one = Pictures(TRAINING.images[:2].repeat(20, 1, 1, 1), torch.arange(40) % 2)
    assert likeness(one, draw) > 0.999
    assert likeness(TRAINING, draw) < 0.8


def test_all_figures_of_good_and_of_useless_images() -> None:
    real = classifier(TRAINING, 2, 0, steps=40)
    good = judged(patients(100, 5), TRAINING, HELD_OUT, real, 0, steps=40)
    noise = Pictures(
        torch.rand(100, 1, 16, 16, generator=torch.Generator().manual_seed(1)), patients(100, 6).labels
    )
    useless = judged(noise, TRAINING, HELD_OUT, real, 0, steps=40)
    assert good["tstr"] > 0.9
    assert good["trtr"] > 0.9
    assert good["tstr"] > useless["tstr"]
    assert good["fid"] < useless["fid"]
    assert good["mmd"] < useless["mmd"]
    assert good["remembers"] == 0
    assert judged(patients(100, 5), TRAINING, HELD_OUT, real, 0, steps=40) == good


def test_without_classes_there_is_no_classifier_to_speak_of() -> None:
    made, training, held_out = (
        Pictures(p.images, torch.zeros_like(p.labels)) for p in (patients(60, 2), TRAINING, HELD_OUT)
    )
    found = judged(made, training, held_out, classifier(training, 1, 0, steps=2), 0, steps=2)
    assert set(found) == {"alike", "alike_real", "fid", "mmd", "copied", "remembers"}
    assert found["remembers"] == 0
    one = Pictures(TRAINING.images[:3], torch.tensor([0, 0, 1]))
    pair = Pictures(TRAINING.images[:2], torch.zeros(2, dtype=torch.int64))
    assert likeness(one, torch.Generator().manual_seed(0)) == pytest.approx(
        likeness(pair, torch.Generator().manual_seed(0))
    )
