import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg  # type: ignore[import-untyped]
from scipy.stats import norm  # type: ignore[import-untyped]
from skimage.metrics import structural_similarity
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis  # type: ignore[import-untyped]

from tasks.synthesis import SynthesisStatistics, features, ssim

ZERO = SynthesisStatistics.zero(2, 1, 2)


def patients(count: int, shift: float = 0.0, seed: int = 0) -> list[SynthesisStatistics]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        base = torch.linspace(-0.5, 0.5, 16) * (1 if i % 2 else -1)
        real, first, second = base + torch.randn(3, 1, 16, 16, generator=draw) * 0.3
        made.append(SynthesisStatistics.of_patient([(i % 2, real, first + shift, second + shift)], ZERO))
    return made


PARTS = patients(12)


def pooled(parts: list[SynthesisStatistics]) -> SynthesisStatistics:
    total = ZERO
    for part in parts:
        total = total + part
    return total


@settings(max_examples=5, deadline=None)
@given(st.permutations(range(12)), st.integers(0, 12))
def test_sites_add_to_the_pooled_value(order: list[int], cut: int) -> None:
    parts = PARTS
    a, b = pooled([parts[i] for i in order[:cut]]), pooled([parts[i] for i in order[cut:]])
    merged = ZERO.from_vector(a.to_vector() + b.to_vector())
    wanted = pooled(parts).value()
    assert merged.patients == 12
    for name, value in merged.value().items():
        assert abs(value - wanted[name]) < 1e-6


def test_the_distance_is_scipys() -> None:
    draw = torch.Generator().manual_seed(3)
    real, made = torch.rand(2, 200, 1, 16, 16, generator=draw).unbind(0)
    made = made * 0.5
    zero = SynthesisStatistics.zero(1, 1, 2)
    total = zero
    for a, b in zip(real, made, strict=True):
        total = total + SynthesisStatistics.of_patient([(0, a, b, b)], zero)
    x, y = (np.stack([features(i).numpy() for i in images]) for images in (real, made))
    cov_x, cov_y = (np.cov(z.T, bias=True) for z in (x, y))
    cross = np.trace(linalg.sqrtm(cov_x @ cov_y).real)
    far = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross
    assert (
        total.value()["frechet"] == float(far / np.trace(cov_x))
        or abs(total.value()["frechet"] / (far / np.trace(cov_x)) - 1) < 1e-5
    )


def test_the_area_is_that_of_a_discriminant_between_normal_classes() -> None:
    draw = np.random.default_rng(0)
    parts, x, y = [], [], []
    for i in range(200):
        image = torch.tensor(draw.normal(0.02 * (i % 2), 0.3, (3, 1, 16, 16)))
        parts.append(SynthesisStatistics.of_patient([(i % 2, *image)], ZERO))
        x.append([features(image[0]).numpy(), features(image[1]).numpy()])
        y.append(i % 2)
    real, made = np.array(x).transpose(1, 0, 2)
    scores = (
        LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1 / 1.1).fit(made, y).decision_function(real)
    )
    apart = scores[1::2].mean() - scores[::2].mean()
    wanted = norm.cdf(apart / np.sqrt(scores[1::2].var() + scores[::2].var()))
    assert abs(pooled(parts).value()["tstr"] - wanted) < 0.02


def test_worse_images_score_worse() -> None:
    good, bad = pooled(patients(40)).value(), pooled(patients(40, shift=0.5)).value()
    assert good["frechet"] < bad["frechet"]
    assert good["tstr"] > 0.95


def test_a_patient_counts_once_per_class_however_many_images() -> None:
    image = torch.rand(3, 1, 16, 16)
    one = SynthesisStatistics.of_patient([(0, *image)], ZERO)
    many = SynthesisStatistics.of_patient([(0, *image)] * 5, ZERO)
    torch.testing.assert_close(one.to_vector(), many.to_vector())
    assert SynthesisStatistics.of_patient([], ZERO).patients == 1


def test_similarity_is_scikit_images() -> None:
    draw = np.random.default_rng(0)
    a = draw.uniform(-1, 1, (24, 24)).astype(np.float32)
    b = (0.7 * a + 0.3 * draw.uniform(-1, 1, (24, 24))).astype(np.float32)
    whole = structural_similarity(  # type: ignore[no-untyped-call]
        a, b, data_range=2.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )[1]
    found = ssim(torch.tensor(a)[None, None], torch.tensor(b)[None, None])
    # MONAI leaves out the border, where the window would stand over nothing
    assert abs(float(found) - whole[5:-5, 5:-5].mean()) < 1e-4


def test_a_class_of_too_few_patients_is_left_out() -> None:
    lone = pooled([*PARTS[:8:2], PARTS[1]])
    assert lone.cells().tolist() == [5.0, 4.0, 1.0]
    assert lone.guarded(2).cells().tolist() == [5.0, 4.0, 0.0]
    assert not lone.guarded(2).real[1].any()
