import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tasks.data.augment import Augmentation, cut, start

NOWHERE = torch.zeros((0, 3), dtype=torch.int32)


def drawer(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene(*sides: int) -> tuple[Tensor, Tensor]:
    draw = drawer(3)
    return torch.randn(2, *sides, generator=draw), torch.randint(4, sides, generator=draw, dtype=torch.uint8)


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def unit(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


@pytest.mark.parametrize(
    ("sides", "patch", "first"), [((9, 11), (4, 6), (2, 5)), ((9, 8, 11), (4, 5, 6), (5, 0, 3))]
)
def test_without_change_it_is_a_slice(
    sides: tuple[int, ...], patch: tuple[int, ...], first: tuple[int, ...]
) -> None:
    image, mask = scene(*sides)
    where = tuple(slice(f, f + p) for f, p in zip(first, patch, strict=True))
    got, labels = cut(image, mask, first, patch, unit(len(sides)), eye(len(sides)))
    torch.testing.assert_close(got, image[(slice(None), *where)], atol=1e-4, rtol=0)
    assert torch.equal(labels, mask[where].long())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flip(axis: int) -> None:
    image, mask = scene(6, 7, 8)
    mirror = eye(3)
    mirror[axis, axis] = -1
    got, labels = cut(image, mask, (0, 0, 0), (6, 7, 8), torch.tensor([1.0, 2.0, 0.5]), mirror)
    torch.testing.assert_close(got, image.flip(axis + 1), atol=1e-4, rtol=0)
    assert torch.equal(labels, mask.long().flip(axis))


def test_quarter_turn() -> None:
    image, mask = scene(8, 8)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    got, labels = cut(image, mask, (0, 0), (8, 8), unit(2), turn)
    index = torch.arange(8)
    # patch (a, b) reads image at turn @ (a, b), about the middle
    wanted = image[:, 7 - index[None, :], index[:, None]]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    assert torch.equal(labels, mask.long()[7 - index[None, :], index[:, None]])


def test_a_turn_is_in_mm() -> None:
    """On a grid of 1 x 2 mm a quarter turn of a 12 x 6 image (12 mm square) still fills it."""
    image = torch.zeros(1, 12, 6)
    image[0, :, 3:] = 1  # one half, cut across the second axis
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    _, labels = cut(image, image[0].to(torch.uint8), (0, 0), (12, 6), torch.tensor([1.0, 2.0]), turn)
    assert labels.sum() == 36
    assert labels.float().mean(1).sort().values.tolist() == [0] * 6 + [1] * 6


def test_beyond_the_image_the_border_repeats_and_the_mask_is_background() -> None:
    image, mask = torch.full((1, 3, 3), 5.0), torch.ones(3, 3, dtype=torch.uint8)
    got, labels = cut(image, mask, (-2, -3), (7, 8), unit(2), eye(2))
    torch.testing.assert_close(got, torch.full((1, 7, 8), 5.0))
    wanted = torch.zeros(7, 8, dtype=torch.int64)
    wanted[2:5, 3:6] = 1
    assert torch.equal(labels, wanted)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=3, max_size=3),
    st.integers(0, 10_000),
    st.booleans(),
)
def test_a_patch_lies_in_the_image_or_around_it(
    sides: list[tuple[int, int]], seed: int, centred: bool
) -> None:
    shape, patch = [n for n, _ in sides], [p for _, p in sides]
    voxel = torch.tensor([[seed % n for n in shape]], dtype=torch.int32)
    first = start(shape, patch, voxel if centred else NOWHERE, 1.0, drawer(seed))
    for f, n, p, v in zip(first, shape, patch, voxel[0].tolist(), strict=True):
        if n <= p:
            assert -f == (p - n) // 2
        else:
            assert 0 <= f <= n - p
            if centred:
                assert f <= v < f + p


def test_share_of_centred_patches() -> None:
    draw, voxel = drawer(), torch.tensor([[0, 0, 0]])
    hits = sum(start((90, 90, 90), (9, 9, 9), voxel, 0.3, draw) == [0, 0, 0] for _ in range(2000))
    assert hits / 2000 == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 2000))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_matrices_are_turns_within_the_limits(dimensions: int) -> None:
    draw, change = drawer(), Augmentation(rotation=20, scaling=0.25)
    for _ in range(50):
        made = change.matrix(dimensions, draw)
        scale = made.det().item() ** (1 / dimensions)
        assert 1 / 1.25 <= scale <= 1.25
        torch.testing.assert_close(made @ made.T, scale**2 * eye(dimensions))
        if dimensions == 2:
            assert abs(math.degrees(math.atan2(made[1, 0].item(), made[0, 0].item()))) <= 20


def test_flips_happen_half_of_the_time_on_their_axes_only() -> None:
    draw, change = drawer(), Augmentation(flips=(1,))
    signs = torch.stack([change.matrix(3, draw).diagonal() for _ in range(400)])
    assert (signs[:, [0, 2]] == 1).all()
    assert (signs[:, 1] < 0).double().mean().item() == pytest.approx(0.5, abs=0.1)


def test_no_change_asked_no_change_made() -> None:
    image = torch.randn(2, 1, 5, 5)
    assert Augmentation().intensities(image, drawer()) is image
    assert torch.equal(Augmentation().matrix(3, drawer()), eye(3))


@pytest.mark.parametrize(
    ("change", "limit"),
    [(Augmentation(brightness=0.3), 0.3), (Augmentation(contrast=0.5), 0.5), (Augmentation(gamma=0.5), 0.25)],
)
def test_intensity_changes_are_bounded_and_monotone(change: Augmentation, limit: float) -> None:
    ramp = torch.linspace(0, 1, 65).view(1, 1, 65, 1).repeat(4, 1, 1, 1)
    got = change.intensities(ramp, drawer())
    assert (got - ramp).abs().max() <= limit + 1e-6
    assert (got.diff(dim=2) >= 0).all()
    assert not torch.equal(got[0], got[1]), "each example has its own draw"


def test_noise_is_bounded_in_strength() -> None:
    flat = torch.zeros(50, 1, 40, 40)
    spread = Augmentation(noise=0.2).intensities(flat, drawer()).flatten(1).std(1)
    assert spread.max() < 0.21
    assert spread.max() > 0.1


def test_only_the_given_generator_is_read() -> None:
    change = Augmentation((0,), 10, 0.1, 0.1, 0.1, 0.1, 0.1)
    image = torch.randn(2, 1, 5, 5, generator=drawer(5))
    state = torch.get_rng_state()
    first = change.intensities(image, drawer(1)), change.matrix(3, drawer(2))
    again = change.intensities(image, drawer(1)), change.matrix(3, drawer(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
