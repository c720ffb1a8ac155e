import csv
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian
from skimage.measure import points_in_poly

from tasks.data.drawn import RTSTRUCT, read_masks
from tasks.data.labels import Drawn
from tasks.data.rtstruct import drawn_on, even_odd
from tasks.data.source import Faulty, Grid, LabelMap, Naming, Reason

COLUMNS, ROWS, SLICES = 8, 7, 5
FRAME = "1.2.3"
#: an oblique grid: contours are given in patient coordinates
TURN = np.array([[0.8, 0.6, 0], [-0.6, 0.8, 0], [0, 0, 1]])
AFFINE = np.eye(4)
AFFINE[:3, :3], AFFINE[:3, 3] = TURN @ np.diag([0.75, 1.5, 2.5]), [-11, 7, 30]
GRID = Grid(AFFINE, (COLUMNS, ROWS, SLICES), FRAME)
Loop = list[tuple[float, float]]
HALF: Loop = [(0.5, 0.5), (4.5, 0.5), (4.5, 3.5), (0.5, 3.5)]  # columns 1 to 4, rows 1 to 3
HOLE: Loop = [(1.5, 1.5), (2.5, 1.5), (2.5, 2.5), (1.5, 2.5)]  # column 2, row 2


def write(
    path: Path,
    regions: dict[str, list[tuple[float, Loop]]],
    frame: str = FRAME,
    kind: str = "CLOSED_PLANAR",
) -> Path:
    """A structure set: per region, slices (may be between two) with loops of column and row."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = UID(RTSTRUCT)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = UID("1.2.4")
    ds.StructureSetROISequence, ds.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(regions.items(), 1):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, frame
        drawn.ReferencedROINumber, drawn.ContourSequence = number, []
        for at, loop in contours:
            contour = Dataset()
            world = np.array([[c, r, at, 1.0] for c, r in loop]) @ AFFINE.T
            contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(loop)
            contour.ContourData = [f"{v:.9g}" for v in world[:, :3].ravel()]
            drawn.ContourSequence.append(contour)
        ds.StructureSetROISequence.append(roi)
        ds.ROIContourSequence.append(drawn)
    ds.save_as(path, enforce_file_format=True)
    return path


def drawn(path: Path, label_map: LabelMap, grid: Grid = GRID) -> Drawn:
    return read_masks([path], grid, label_map)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(3, 9))
def test_a_centre_belongs_where_an_odd_number_of_contours_holds_it(
    seed: int, count: int, corners: int
) -> None:
    draw = np.random.default_rng(seed)  # real coordinates: no centre lies on an edge
    loops = [draw.uniform(-2, 10, (corners, 2)) for _ in range(count)]
    centres = np.array([(c, r) for r in range(ROWS) for c in range(COLUMNS)], dtype=float)
    held = np.array([points_in_poly(centres, loop) for loop in loops])  # type: ignore[no-untyped-call]
    assert np.array_equal(even_odd(loops, ROWS, COLUMNS), held.sum(axis=0).reshape(ROWS, COLUMNS) % 2 == 1)


def test_points_are_in_the_convention_of_pixel_centres(tmp_path: Path) -> None:
    out = drawn(write(tmp_path / "a.dcm", {"Liver": [(2, HALF)]}), {"liver": 3})
    wanted = np.zeros((COLUMNS, ROWS, SLICES), np.uint8)
    wanted[1:5, 1:4, 2] = 3
    assert np.array_equal(out.mask, wanted)
    assert out.notes == ()


def test_an_inner_contour_is_a_hole_and_a_region_may_have_two_parts(tmp_path: Path) -> None:
    far: Loop = [(5.5, 4.5), (6.5, 4.5), (6.5, 5.5), (5.5, 5.5)]
    out = drawn(write(tmp_path / "a.dcm", {"x": [(1, HOLE), (1, HALF), (1, far), (3, HALF)]}), {"x": 1})
    assert out.mask[..., 1].sum() == 12 - 1 + 1
    assert not out.mask[2, 2, 1]
    assert out.mask[6, 5, 1]
    assert not out.mask[..., 2].any()
    assert out.notes == ("a region has no contour on some slices between its ends: nothing was filled in",)


def test_a_contour_that_stands_twice_does_not_undo_itself(tmp_path: Path) -> None:
    twice = {"x": [(1.0, HALF), (1.0, HALF)]}
    out = drawn(write(tmp_path / "a.dcm", twice), {"x": 1})
    assert (int(out.mask.sum()), out.notes) == (12, ("a contour that stands twice was drawn once",))
    exclusive = write(tmp_path / "b.dcm", twice, kind="CLOSEDPLANAR_XOR")  # there it says so
    assert not drawn(exclusive, {"x": 1}).mask.any()


def test_regions_overlap_by_class_and_markers_are_no_regions(tmp_path: Path) -> None:
    regions = {"tumour": [(1.0, HOLE)], "liver": [(1.0, HALF)]}
    out = drawn(write(tmp_path / "a.dcm", regions), {"tumour": 2, "liver": 1})
    assert (out.mask[2, 2, 1], (out.mask == 1).sum()) == (2, 11)
    with pytest.raises(Faulty, match=r"not mapped: liver; accepted tumour"):
        drawn(tmp_path / "a.dcm", {"tumour": 2})
    assert drawn(tmp_path / "a.dcm", Naming({"tumour": 2}, ignore=True)).unmapped == ("liver",)
    empty = drawn(tmp_path / "a.dcm", Naming({"kidney": 2}, ignore=True))
    assert empty.notes == ("no label of the case is mapped: its mask is empty",)
    marker = write(tmp_path / "b.dcm", {"isocentre": [(1.3, [(0.0, 0.0)])]}, kind="POINT")
    assert not drawn(marker, {"liver": 1}).mask.any()


@pytest.mark.parametrize(
    ("contour", "frame", "kind", "reason", "detail"),
    [
        ((1.5, HALF), FRAME, "CLOSED_PLANAR", Reason.GEOMETRY, r"off the image's slices by 0\.5 slice"),
        ((1.1, HALF), FRAME, "CLOSED_PLANAR", Reason.GEOMETRY, r"by 0\.1 slice"),
        ((5, HALF), FRAME, "CLOSED_PLANAR", Reason.GEOMETRY, "beyond the image's slices"),
        (
            (1, [(20, 1), (22, 1), (22, 3)]),
            FRAME,
            "CLOSED_PLANAR",
            Reason.GEOMETRY,
            "beyond the image's edge",
        ),
        ((1, HALF), "9.9", "CLOSED_PLANAR", Reason.FRAME, "another frame of reference"),
        ((1, HALF), FRAME, "OPEN_PLANAR", Reason.MASK_KIND, "OPEN_PLANAR contour; closed ones are read"),
    ],
)
def test_contours_that_do_not_belong_are_refused(
    tmp_path: Path, contour: tuple[float, Loop], frame: str, kind: str, reason: Reason, detail: str
) -> None:
    path = write(tmp_path / "a.dcm", {"x": [contour]}, frame, kind)
    with pytest.raises(Faulty, match=detail) as caught:
        drawn(path, {"x": 1})
    assert caught.value.reason is reason
    # what is not mapped need not belong
    assert not drawn(path, Naming({"y": 1}, ignore=True)).mask.any()


def test_rounded_positions_are_on_the_slice(tmp_path: Path) -> None:
    assert drawn(write(tmp_path / "a.dcm", {"x": [(1.01, HALF)]}), {"x": 1}).mask[..., 1].sum() == 12


def grid_of(folder: Path) -> Grid:
    """A series' grid straight from PS3.3 C.7.6.2.1.1."""
    read = (pydicom.dcmread(p, stop_before_pixels=True) for p in folder.iterdir())
    turned = {}
    for ds in read:
        axes = np.array(ds.ImageOrientationPatient, dtype=float).reshape(2, 3)
        turned[float(np.cross(*axes) @ np.array(ds.ImagePositionPatient, dtype=float))] = ds
    found = [turned[k] for k in sorted(turned)]
    first, last = (np.array(d.ImagePositionPatient, dtype=float) for d in (found[0], found[-1]))
    row_mm, column_mm = map(float, found[0].PixelSpacing)
    axes = np.array(found[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    affine = np.eye(4)
    affine[:3] = np.column_stack(
        [axes[0] * column_mm, axes[1] * row_mm, (last - first) / (len(found) - 1), first]
    )
    return Grid(
        affine, (int(found[0].Columns), int(found[0].Rows), len(found)), str(found[0].FrameOfReferenceUID)
    )


def test_every_real_structure_set_equals_its_voxel_truth(real: Callable[[str], Path]) -> None:
    root = real("sts_rtstruct")
    with (root / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        out = read_masks([root / row["rtstruct"]], grid_of(root / row["series"]), {row["roi"]: 1})
        truth = np.asarray(nib.load(root / row["truth_mask"]).dataobj) != 0  # type: ignore[attr-defined]
        assert truth.sum() == int(row["truth_voxels"])
        assert np.array_equal(out.mask != 0, truth), row["series"]


def test_real_structure_sets_name_their_series(real: Callable[[str], Path]) -> None:
    root = real("sts_rtstruct")
    image = pydicom.dcmread(next((root / "STS_003/MR_T1/image").iterdir()), stop_before_pixels=True)
    named = drawn_on(pydicom.dcmread(root / "STS_003/MR_T1/RS.dcm"))
    assert named.series == (image.SeriesInstanceUID,)
    assert named.frames == (image.FrameOfReferenceUID,)


@pytest.mark.parametrize("name", ["invalid_reference_rt", "non_existent_reference_rt", "rtstruct"])
def test_structure_sets_of_the_zoo_end_in_reasons(
    real: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    ds = pydicom.dcmread(real("dicom_zoo") / "objects" / f"{name}.dcm", force=True)
    assert len(drawn_on(ds).frames) == 1
    path = real("dicom_zoo") / "objects" / f"{name}.dcm"
    with pytest.raises(Faulty, match=r"frame of reference|unreadable") as caught:
        drawn(path, "nonzero")
    assert caught.value.reason in (Reason.FRAME, Reason.UNREADABLE)
