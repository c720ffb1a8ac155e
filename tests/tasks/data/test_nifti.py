from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.nifti import nearest, read_pair
from tasks.data.source import Faulty, Reason

OBLIQUE = np.array([[-0.8, 0.05, 0.1, 40], [0.06, 0.9, -0.2, -10], [-0.1, 0.3, 2.5, 5], [0, 0, 0, 1.0]])


def write(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(values, affine), path)  # type: ignore[no-untyped-call]
    return path


def is_ras(affine: np.ndarray) -> bool:
    """Each axis of the array runs most along its own world axis, upwards."""
    turn = affine[:3, :3]
    return bool((np.abs(turn).argmax(axis=0) == range(3)).all() and (np.diag(turn) > 0).all())


def pair(
    folder: Path, image: np.ndarray, mask: np.ndarray, affine: np.ndarray, other: np.ndarray
) -> tuple[Path, Path]:
    return write(folder / "image.nii.gz", image, affine), write(folder / "mask.nii", mask, other)


def at(array: np.ndarray, affine: np.ndarray, world: np.ndarray) -> float:
    index = np.rint(np.linalg.solve(affine, [*world, 1.0])[:3]).astype(int)
    return float(array[tuple(index)])


@settings(deadline=None, max_examples=25)
@given(st.permutations([0, 1, 2]), st.tuples(*[st.sampled_from([-1, 1])] * 3), st.integers(0, 2**31))
def test_every_voxel_stays_where_it_was_in_the_patient(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], signs: tuple[int, ...], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    image = draw.normal(size=(3, 4, 5)).astype(np.float32)
    mask = draw.integers(0, 3, image.shape).astype(np.uint8)
    affine = np.eye(4)
    affine[:3, :3] = np.diag(draw.uniform(0.5, 3, 3))[:, order] * signs
    affine[:3, 3] = draw.uniform(-50, 50, 3)
    raw = read_pair(*pair(tmp_path_factory.mktemp("n"), image, mask, affine, affine), None)
    assert is_ras(raw.affine)
    assert raw.image is not None
    assert np.allclose(raw.spacing, np.diag(raw.affine)[:3], rtol=1e-6)
    for index in np.ndindex(image.shape):
        world = affine @ [*index, 1.0]
        assert at(raw.image[0], raw.affine, world[:3]) == image[index]
        assert raw.mask is not None
        assert at(raw.mask, raw.affine, world[:3]) == mask[index]


def test_an_oblique_grid_is_turned_not_resampled(tmp_path: Path) -> None:
    image = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    raw = read_pair(write(tmp_path / "a.nii.gz", image, OBLIQUE), None, None)
    assert raw.image is not None
    assert sorted(raw.image.ravel()) == list(range(60))
    assert raw.image.dtype == np.uint8
    assert np.allclose(sorted(raw.spacing), sorted(np.linalg.norm(OBLIQUE[:3, :3], axis=0)))
    assert raw.mask is None


def test_scaled_values_are_those_nibabel_scales(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image = nib.Nifti1Image(values, np.eye(4))  # type: ignore[no-untyped-call]
    image.header.set_slope_inter(0.5, -3)  # type: ignore[no-untyped-call]
    nib.save(image, tmp_path / "a.nii")
    raw = read_pair(tmp_path / "a.nii", None, None)
    assert raw.image is not None
    assert np.array_equal(raw.image[0], values * np.float32(0.5) - 3)


def test_a_mask_stored_in_another_order_is_the_same_mask(tmp_path: Path) -> None:
    image = np.zeros((3, 4, 5), np.float32)
    mask = np.arange(60, dtype=np.uint8).reshape(image.shape)
    flipped = np.diag([-1.0, 1, 1, 1])
    flipped[0, 3] = 2
    raw = read_pair(*pair(tmp_path, image, mask[::-1], np.eye(4), flipped), None)
    assert raw.mask is not None
    assert np.array_equal(raw.mask, mask)


def test_channels_come_first(tmp_path: Path) -> None:
    image = np.arange(48, dtype=np.float32).reshape(2, 3, 4, 2) + 0.5
    raw = read_pair(*pair(tmp_path, image, np.zeros((2, 3, 4, 1), np.uint8), np.eye(4), np.eye(4)), None)
    assert raw.image is not None
    assert np.array_equal(raw.image, np.moveaxis(image, 3, 0))
    assert raw.mask is not None
    assert raw.mask.shape == (2, 3, 4)


def shifted(mm: float) -> np.ndarray:
    affine = np.eye(4)
    affine[1, 3] = mm
    return affine


@pytest.mark.parametrize(
    ("image", "mask", "other", "reason", "detail"),
    [
        (np.zeros((3, 4, 5)), np.zeros((3, 5, 4)), np.eye(4), Reason.SIZE, "image 3x4x5, mask 3x5x4"),
        (np.zeros((3, 4, 5)), np.zeros((3, 4, 5)), shifted(0.2), Reason.GEOMETRY, "lie 0.2 mm apart"),
        (np.zeros((3, 4, 5)), np.zeros((3, 4, 5)), np.diag([1, 1, 1.1, 1]), Reason.GEOMETRY, "mm apart"),
        (np.full((3, 4, 5), np.nan), np.zeros((3, 4, 5)), np.eye(4), Reason.NOT_FINITE, "60 of 60"),
        (np.zeros((3, 4)), np.zeros((3, 4)), np.eye(4), Reason.SHAPE, "2 axes"),
        (
            np.zeros((3, 4, 5)),
            np.full((3, 4, 5), 1.5),
            np.eye(4),
            Reason.LABEL,
            "mask has 1.5; accepted 0 to 255",
        ),
    ],
)
def test_what_is_refused(
    tmp_path: Path, image: np.ndarray, mask: np.ndarray, other: np.ndarray, reason: Reason, detail: str
) -> None:
    files = pair(tmp_path, image.astype(np.float32), mask.astype(np.float32), np.eye(4), other)
    with pytest.raises(Faulty, match=detail) as caught:
        read_pair(*files, None)
    assert caught.value.reason is reason


def test_rounded_headers_are_no_other_geometry(tmp_path: Path) -> None:
    files = pair(
        tmp_path, np.zeros((9, 9, 9), np.float32), np.zeros((9, 9, 9), np.uint8), np.eye(4), shifted(0.001)
    )
    assert read_pair(*files, None).mask is not None


@pytest.mark.parametrize("keep", [0, 1, 60, 300, -20])
def test_a_cut_file_is_unreadable(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "a.nii.gz", np.random.default_rng(0).normal(size=(8, 8, 8)), np.eye(4))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Faulty, match=r"a\.nii\.gz") as caught:
        read_pair(path, None, None)
    assert caught.value.reason is Reason.UNREADABLE


def box(shape: tuple[int, ...], extent: float, turn: np.ndarray) -> np.ndarray:
    """The affine of a grid of `shape` over a cube of `extent` mm around a turned origin."""
    step = np.diag([extent / n for n in shape])
    affine = np.eye(4)
    affine[:3, :3] = turn @ step
    affine[:3, 3] = turn @ (np.diag(step) / 2)
    return affine


@settings(deadline=None, max_examples=25)
@given(st.tuples(*[st.integers(2, 7)] * 3), st.tuples(*[st.integers(2, 7)] * 3), st.integers(0, 2**31))
def test_a_mask_on_another_grid_of_the_same_box_is_the_nearest_voxel(
    tmp_path_factory: pytest.TempPathFactory, one: tuple[int, ...], other: tuple[int, ...], seed: int
) -> None:
    if one == other:
        return
    draw = np.random.default_rng(seed)
    angle = draw.uniform(-0.5, 0.5)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    mask = draw.integers(0, 4, other).astype(np.uint8)
    paths = pair(
        tmp_path_factory.mktemp("n"),
        np.zeros(one, np.float32),
        mask,
        box(one, 60, turn),
        box(other, 60, turn),
    )
    raw = read_pair(*paths, None)
    assert raw.notes == ("a mask on another grid was brought to the image's",)
    assert raw.mask is not None
    for index in np.ndindex(one):
        place = [(i + 0.5) / n * m - 0.5 for i, n, m in zip(index, one, other, strict=True)]
        near = [{int(np.floor(p + 0.499)), int(np.floor(p + 0.501))} for p in place]  # halves go either way
        assert raw.mask[index] in {mask[i, j, k] for i in near[0] for j in near[1] for k in near[2]}


def test_nearest_reads_through_flips_and_swaps() -> None:
    values = np.arange(24).reshape(2, 3, 4)
    swap = np.array([[0, 0, -1, 3], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    # axis 2 of the stored array runs against the image's first
    assert np.array_equal(nearest(values, swap, np.eye(4), (4, 2, 3)), values.transpose(2, 0, 1)[::-1])


def test_a_mask_elsewhere_is_never_brought_over(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 8), np.float32)
    for step, shift, belongs in ((2.0, 0.0, True), (2.0, 1.1, False), (2.7, 0.0, False)):
        affine = np.diag([step, 2, 2, 1])
        affine[:3, 3] = [0.5 + shift, 0.5, 0.5]
        files = pair(tmp_path, image, np.zeros((4, 4, 4), np.uint8), np.eye(4), affine)
        if belongs:
            assert read_pair(*files, None).mask is not None
            continue
        with pytest.raises(Faulty, match="image 8x8x8, mask 4x4x4, and not the same extent") as caught:
            read_pair(*files, None)
        assert caught.value.reason is Reason.SIZE


def framed(path: Path, q: np.ndarray | None, s: np.ndarray | None) -> Path:
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), None)  # type: ignore[no-untyped-call]
    image.set_qform(q, code=0 if q is None else 1)  # type: ignore[no-untyped-call]
    image.set_sform(s, code=0 if s is None else 1)  # type: ignore[no-untyped-call]
    nib.save(image, path)
    return path


def test_the_sform_speaks_where_it_is_set_and_contradictions_are_refused(tmp_path: Path) -> None:
    plain, far = np.diag([1.0, 2, 3, 1]), np.diag([1.0, 2, 3, 1])
    far[0, 3] = 50
    for q, s, wanted, notes in (
        (plain, None, plain, 0),
        (None, far, far, 0),
        (plain, far, far, 1),
        (plain, plain, plain, 0),
    ):
        raw = read_pair(framed(tmp_path / "a.nii", q, s), None, None)
        assert np.allclose(raw.affine, wanted)
        assert len(raw.notes) == notes
    assert "no orientation" in read_pair(framed(tmp_path / "a.nii", None, None), None, None).notes[0]
    with pytest.raises(Faulty, match="turn the axes differently: RAS and LAS") as caught:
        read_pair(framed(tmp_path / "a.nii", plain, np.diag([-1.0, 2, 3, 1])), None, None)
    assert caught.value.reason is Reason.GEOMETRY
    with pytest.raises(Faulty, match="other voxel sizes: 1x2x3 and 1x2x4 mm"):
        read_pair(framed(tmp_path / "a.nii", plain, np.diag([1.0, 2, 4, 1])), None, None)


def test_channels_may_stand_on_the_fifth_axis(tmp_path: Path) -> None:
    image = np.arange(48, dtype=np.float32).reshape(2, 3, 4, 1, 2)
    raw = read_pair(write(tmp_path / "a.nii", image, np.eye(4)), None, None)
    assert raw.image is not None
    assert np.array_equal(raw.image, np.moveaxis(image[:, :, :, 0], 3, 0))


def test_a_header_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", np.zeros((2, 2, 2), np.float32), np.eye(4))
    blob = bytearray(path.read_bytes())
    blob[42:48] = np.array([20_000, 20_000, 20_000], "<i2").tobytes()  # dim[1] to dim[3] of NIfTI-1
    path.write_bytes(blob)
    with pytest.raises(Faulty, match="more than 4 GiB unpacked") as caught:
        read_pair(path, None, None)
    assert caught.value.reason is Reason.LIMIT


@pytest.mark.parametrize(
    ("unit", "mm"), [("meter", 1000.0), ("micron", 0.001), ("mm", 1.0), ("unknown", 1.0)]
)
def test_spacing_is_in_mm_whatever_the_headers_unit(tmp_path: Path, unit: str, mm: float) -> None:
    affine = np.diag([0.7, 0.8, 5.0, 1.0])
    affine[:3, 3] = 10, 20, 30
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), affine)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units(unit)  # type: ignore[no-untyped-call]
    nib.save(image, tmp_path / "a.nii")
    raw = read_pair(tmp_path / "a.nii", None, None)
    assert raw.spacing == pytest.approx((0.7 * mm, 0.8 * mm, 5.0 * mm))
    assert raw.affine[:3, 3] == pytest.approx([10 * mm, 20 * mm, 30 * mm])
    assert bool(raw.notes) == (mm != 1)
