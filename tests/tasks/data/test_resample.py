import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.resample import fixed, grid, hardest, resample, resample_mask, window, zscore


def test_growing_equals_trilinear() -> None:
    x = torch.randn(2, 5, 6, 4)
    wanted = F.interpolate(x[None], (9, 6, 11), mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(resample(x, (9, 6, 11)), wanted)


def test_shrinking_equals_the_antialiased_filter() -> None:
    x = torch.randn(3, 17, 20)
    wanted = F.interpolate(x[None], (6, 9), mode="bilinear", align_corners=False, antialias=True)[0]
    torch.testing.assert_close(resample(x, (6, 9)), wanted)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(4, 12), min_size=3, max_size=3), st.sampled_from([0, 1, 2]))
def test_a_ramp_keeps_its_place(shape: list[int], axis: int) -> None:
    """Positions are proportional to the extent: a linear ramp stays one (away from the border)."""
    ramp = (torch.arange(8) + 0.5) / 8
    x = ramp.view([-1 if a == axis else 1 for a in range(3)]).expand(8, 8, 8)[None]
    got = resample(x, shape).movedim(1 + axis, 1)[0, :, 0, 0]
    n = shape[axis]
    wanted = (torch.arange(n) + 0.5) / n
    inner = slice(2, -2) if n > 4 else slice(1, -1)
    torch.testing.assert_close(got[inner], wanted[inner], atol=0.02, rtol=0)


def test_grid_keeps_the_extent() -> None:
    assert grid((256, 200), (1.0, 0.5), (2.0, 1.0)) == (128, 100)
    assert grid((256, 200), (1.0, 0.5), None) == (256, 200)
    assert grid((3, 3), (0.1, 0.1), (5.0, 5.0)) == (1, 1)


def test_hardest_is_argmax() -> None:
    scores = torch.rand(4, 6, 5, 7)
    assert torch.equal(hardest(scores, (6, 5, 7)), scores.argmax(0).to(torch.uint8))
    wanted = F.interpolate(scores[None], (9, 8, 7), mode="trilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(hardest(scores, (9, 8, 7)), wanted.to(torch.uint8))


def test_mask_takes_the_class_that_fills_most() -> None:
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[:, 4:] = 2
    assert torch.equal(resample_mask(mask, 3, (8, 8)), mask)
    half = resample_mask(mask, 3, (4, 4))
    assert half.dtype == torch.uint8
    assert torch.equal(half, mask[::2, ::2])


def test_zscore_ignores_outliers_and_scale() -> None:
    x = torch.randn(2, 40, 40, generator=torch.Generator().manual_seed(0))
    spoiled = x.clone()
    spoiled[0, 0, 0] = 1e6
    got = zscore(spoiled, 0.5, 99.5)
    torch.testing.assert_close(got.flatten(1).mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.flatten(1).std(1, correction=0), torch.ones(2))
    torch.testing.assert_close(zscore(1000 * x + 77, 0.5, 99.5), zscore(x, 0.5, 99.5), atol=1e-3, rtol=0)
    assert zscore(torch.full((1, 4, 4), 5.0), 0.5, 99.5).abs().max() == 0


def test_zscore_takes_large_images() -> None:
    x = torch.rand(64, 600, 500, generator=torch.Generator().manual_seed(0))
    got = zscore(x, 10, 90)
    # cut at its own percentiles: the ends of a uniform distribution, of deviation known in closed form
    assert got.amax().item() == pytest.approx(0.4 / (0.1 * 0.4**2 * 2 + 0.8 * 0.8**2 / 12) ** 0.5, abs=0.03)


def test_window_maps_its_ends() -> None:
    hu = torch.tensor([-1000.0, -160, 40, 240, 3000])
    assert window(hu, -160, 240).tolist() == pytest.approx([-1, -1, 0, 1, 1])


def test_fixed_numbers_are_the_same_for_every_image() -> None:
    hu = torch.tensor([-1000.0, -100, 40, 300, 3000])
    assert fixed(hu, -100, 300, 40, 70).tolist() == pytest.approx([-2, -2, 0, 260 / 70, 260 / 70])
