"""Fixed features: their number, what they see and what they do not."""

from itertools import product

import pytest
import torch
from torch import Tensor

from conf.exits import Stop
from conf.schema import Section
from tasks.features import FEATURES, Extractor
from tasks.features.scattering import _wavelets

FLAT = {"hog", "scattering"}
ENTRIES = [(n, d) for n, d in product(FEATURES, (2, 3)) if d == 2 or n not in FLAT]


def built(name: str, dimensions: int, channels: int = 1, **more: int) -> Extractor:
    made: Extractor = FEATURES.build(Section(name=name, **more), channels=channels, dimensions=dimensions)
    return made


def image(dimensions: int, channels: int = 1) -> Tensor:
    return torch.randn(channels, *[24] * dimensions, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "dimensions"), ENTRIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_entry_makes_as_many_numbers_as_it_says(name: str, dimensions: int, channels: int) -> None:
    made = built(name, dimensions, channels)
    found = made(image(dimensions, channels))
    assert found.shape == (made.size,)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert torch.equal(found, made(image(dimensions, channels)))


@pytest.mark.parametrize(("name", "dimensions"), ENTRIES)
def test_a_constant_image_has_finite_features(name: str, dimensions: int) -> None:
    assert built(name, dimensions)(torch.zeros(1, *[24] * dimensions)).isfinite().all()


@pytest.mark.parametrize("name", sorted(FLAT))
def test_flat_ones_refuse_volumes(name: str) -> None:
    with pytest.raises(Stop, match="dimensions"):
        built(name, 3)


def test_a_hog_needs_two_cells() -> None:
    with pytest.raises(Stop, match=r"features\.cell is 32; a side of 32"):
        built("hog", 2, side=32, cell=32)


def test_wavelets_ignore_a_shift_in_brightness_and_cover_the_plane() -> None:
    waves = _wavelets(32, 3, 6)
    assert waves[:, :, 0, 0].abs().max() < 1e-6
    rows = torch.arange(32) * torch.ones(32, 1)
    stripes = torch.sin(2 * torch.pi * 12 / 32 * rows)  # 3π/4: the finest scale, along x
    power = torch.stack(
        [(waves * torch.fft.fft2(s)).abs().square().sum((2, 3)) for s in (stripes, stripes.T)]
    )
    assert divmod(int(power[0].argmax()), 6) == (0, 0)
    assert divmod(int(power[1].argmax()), 6) == (0, 3)  # a quarter turn is three of six directions


def test_intensities_are_numpy_s() -> None:
    import numpy as np
    from scipy import stats  # type: ignore[import-untyped]

    x = image(3)
    found = built("intensities", 3)(x).double().numpy()
    values = x.flatten().double().numpy()
    assert found[:5] == pytest.approx(
        [
            values.mean(),
            values.std(),
            stats.skew(values),
            stats.kurtosis(values, fisher=False),
            (values**2).mean(),
        ],
        rel=1e-5,
    )
    assert found[5:] == pytest.approx(np.percentile(values, [1, 5, 10, 25, 50, 75, 90, 95, 99]), rel=1e-5)


def test_roots_of_a_hog_have_nothing_in_common() -> None:
    plain, root = built("hog", 2)(image(2)), built("hog", 2, root=True)(image(2))
    assert float(root.mean()) == pytest.approx(0, abs=1e-6)
    spread = plain.clamp_min(0).sqrt()
    assert torch.allclose(root, spread - spread.mean())
