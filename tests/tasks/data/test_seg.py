import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from conf.exits import Stop
from conf.schema import Columns
from tasks.data.cache import Cache
from tasks.data.drawn import read_masks
from tasks.data.ingest import Report
from tasks.data.labels import Drawn
from tasks.data.source import Faulty, Grid, LabelMap, Naming, Reason

COLUMNS, ROWS, SLICES = 6, 5, 4
FRAME = generate_uid()
AFFINE = np.array([[0.75, 0, 0, -11], [0, 1.5, 0, 7], [0, 0, 2.5, 30], [0, 0, 0, 1]])
GRID = Grid(AFFINE, (COLUMNS, ROWS, SLICES), FRAME)
KINDS = hd.seg.SegmentationTypeValues


def slices() -> list[FileDataset]:
    series, study = generate_uid(), generate_uid()
    made = []
    for i in range(SLICES):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, FRAME
        ds.PatientID = ds.PatientName = ds.PatientBirthDate = ds.PatientSex = ""
        ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.StudyID = ds.ReferringPhysicianName = ""
        ds.Modality, ds.SeriesNumber, ds.InstanceNumber, ds.PositionReferenceIndicator = "CT", 1, i + 1, ""
        ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-11, 7, 30 + 2.5 * i]
        ds.PixelSpacing, ds.SliceThickness, ds.Rows, ds.Columns = [1.5, 0.75], 2.5, ROWS, COLUMNS
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
        ds.PixelData = bytes(2 * ROWS * COLUMNS)
        made.append(ds)
    return made


SOURCE = slices()


def write(
    path: Path,
    pixels: np.ndarray,
    kind: KINDS = KINDS.BINARY,
    labels: tuple[str, ...] = ("liver", "tumour"),
    **more: Any,
) -> Path:
    """A SEG of `pixels`: slice, row, column, segment (or segment numbers for a label map)."""
    described = [
        hd.seg.SegmentDescription(
            i + 1, label, codes.SCT.Organ, [codes.SCT.Liver, codes.SCT.Neoplasm][i % 2],
            hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for i, label in enumerate(labels)
    ]  # fmt: skip
    hd.seg.Segmentation(
        SOURCE, pixels, kind, described, generate_uid(), 100, generate_uid(), 1, "m", "m", "1", "1", **more
    ).save_as(path)
    return path


def drawn(label_map: LabelMap, *paths: Path) -> Drawn:
    return read_masks(paths, GRID, label_map)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.floats(0.05, 1.0), st.sampled_from([KINDS.BINARY, KINDS.LABELMAP]))
def test_each_voxel_has_its_highest_class(
    tmp_path_factory: pytest.TempPathFactory, seed: int, density: float, kind: KINDS
) -> None:
    on = np.random.default_rng(seed).random((SLICES, ROWS, COLUMNS, 2)) < density * np.array([0.5, 0.2])
    if kind is KINDS.LABELMAP:
        on[..., 0] &= ~on[..., 1]  # a label map has one segment a voxel
    pixels = on.astype(np.uint8)
    if kind is KINDS.LABELMAP:
        pixels = (pixels * np.array([1, 2], np.uint8)).max(axis=-1)
    path = write(tmp_path_factory.mktemp("s") / "s.dcm", pixels, kind)
    for names, values in (({"Liver ": 7, "tumour": 3}, (7, 3)), ({1: 2, 2: 9}, (2, 9)), (None, (1, 2))):
        wanted = (on * np.array(values)).max(axis=-1).transpose(2, 1, 0)
        out = drawn(names, path)
        assert out.mask.dtype == np.uint8
        assert np.array_equal(out.mask, wanted)
        assert bool(out.notes) == bool(on.all(axis=-1).any())


@pytest.mark.parametrize(
    ("threshold", "wanted"), [(0.5, [0, 0, 1, 1]), (0.3, [0, 1, 1, 1]), (1.0, [0, 0, 0, 1])]
)
def test_a_fraction_belongs_from_the_threshold_on(
    tmp_path: Path, threshold: float, wanted: list[int]
) -> None:
    pixels = np.zeros((SLICES, ROWS, COLUMNS, 1), np.float32)
    pixels[1, 2, :4, 0] = [0.2, 0.3, 0.5, 1.0]
    path = write(
        tmp_path / "s.dcm", pixels, KINDS.FRACTIONAL, ("liver",), max_fractional_value=100,
        fractional_type=hd.seg.SegmentationFractionalTypeValues.OCCUPANCY,
    )  # fmt: skip
    out = drawn(Naming({"liver": 1}, threshold=threshold), path)
    assert out.mask[:4, 2, 1].tolist() == wanted
    assert out.mask.sum() == sum(wanted)
    assert out.notes == (f"a fractional segmentation was cut at {threshold:g} of its maximum",)


def one(value: int = 1, at: tuple[int, int, int] = (0, 0, 0), segments: int = 1) -> np.ndarray:
    pixels = np.zeros((SLICES, ROWS, COLUMNS, segments), np.uint8)
    pixels[at] = value
    return pixels


def test_several_objects_become_one_mask_unless_two_draw_one_class(tmp_path: Path) -> None:
    liver = write(tmp_path / "a.dcm", one(), labels=("liver",))
    tumour = write(tmp_path / "b.dcm", one(at=(3, 4, 5)), labels=("tumour",))
    out = drawn({"liver": 1, "tumour": 2}, liver, tumour)
    assert (out.mask[0, 0, 0], out.mask[5, 4, 3], out.mask.sum()) == (1, 2, 3)
    with pytest.raises(Faulty, match=r"a\.dcm and b\.dcm both draw class 1; keep one") as caught:
        drawn({"liver": 1, "tumour": 1}, liver, tumour)
    assert caught.value.reason is Reason.SEVERAL_MASKS
    assert not drawn({"liver": 0, "tumour": 0}, liver, tumour).mask.any()  # both background
    # two segments of one object may well be one class
    both = write(tmp_path / "c.dcm", one(segments=2))
    assert drawn({"liver": 1, "tumour": 1}, both).mask.sum() == 1


def test_what_is_not_mapped_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "s.dcm", one(segments=2))
    with pytest.raises(Faulty, match=r"not mapped: tumour; accepted liver") as caught:
        drawn({"liver": 1}, path)
    assert (caught.value.reason, caught.value.unmapped) == (Reason.LABEL, ("tumour",))
    out = drawn(Naming({"liver": 1}, ignore=True), path)
    assert (out.mask.max(), out.unmapped) == (1, ("tumour",))
    assert drawn("nonzero", path).mask.max() == 1


def test_a_code_is_a_name_too(tmp_path: Path) -> None:
    path = write(tmp_path / "s.dcm", one(), labels=("something",))
    liver = codes.SCT.Liver
    assert drawn({f"sct:{liver.value}": 5}, path).mask.max() == 5


def elsewhere(seg: pydicom.Dataset) -> None:
    seg.FrameOfReferenceUID = generate_uid()


def unlisted(seg: pydicom.Dataset) -> None:
    seg.SegmentSequence[0].SegmentNumber = 9


def surface(seg: pydicom.Dataset) -> None:
    seg.SegmentationType = "SURFACE"


def other_object(seg: pydicom.Dataset) -> None:
    seg.SOPClassUID = CTImageStorage


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        (elsewhere, Reason.FRAME, "another frame of reference"),
        (unlisted, Reason.UNREADABLE, "frames of segment 1, which it does not list"),
        (surface, Reason.MASK_KIND, "a SURFACE segmentation"),
        (other_object, Reason.MASK_KIND, "no SEG and no RTSTRUCT"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, change: Callable[[pydicom.Dataset], None], reason: Reason, detail: str
) -> None:
    path = write(tmp_path / "s.dcm", one(), labels=("liver",))
    seg = pydicom.dcmread(path)
    change(seg)
    seg.save_as(path)
    with pytest.raises(Faulty, match=detail) as caught:
        drawn(None, path)
    assert caught.value.reason is reason


def zoo_grid(folder: Path) -> Grid:
    found = sorted(
        (pydicom.dcmread(folder / f"{i:02}.dcm", stop_before_pixels=True) for i in (1, 2, 3)),
        key=lambda d: float(d.ImagePositionPatient[2]),
    )
    first, last = (np.array(d.ImagePositionPatient, dtype=float) for d in (found[0], found[-1]))
    affine = np.eye(4)
    row_mm, column_mm = map(float, found[0].PixelSpacing)
    turned = np.array(found[0].ImageOrientationPatient, dtype=float)
    affine[:3] = np.column_stack([turned[:3] * column_mm, turned[3:] * row_mm, (last - first) / 2, first])
    return Grid(affine, (512, 512, 3), str(found[0].FrameOfReferenceUID))


def test_the_zoo_s_liver_is_its_nrrd(real: Callable[[str], Path]) -> None:
    folder = real("dicom_zoo") / "seg_with_series"
    header, _, body = (folder / "liver_seg.nrrd").read_bytes().partition(b"\n\n")
    assert b"encoding: gzip" in header
    assert b"sizes: 512 512 3" in header
    truth = np.frombuffer(gzip.decompress(body), np.int16).reshape((512, 512, 3), order="F")
    out = read_masks([folder / "liver.dcm"], zoo_grid(folder), {"Liver": 1})
    assert out.mask.any()
    assert np.array_equal(out.mask, truth)


def test_the_zoo_s_overlaps(real: Callable[[str], Path]) -> None:
    folder = real("dicom_zoo") / "seg_with_series"
    seg = pydicom.dcmread(folder / "partial_overlaps.dcm")
    names = {str(s.SegmentLabel): i + 1 for i, s in enumerate(seg.SegmentSequence)}
    out = read_masks([folder / "partial_overlaps.dcm"], zoo_grid(folder), names)
    assert out.notes == ("segments overlap: the higher class was kept",)
    assert set(np.unique(out.mask)) <= {0, *names.values()}


def test_a_class_may_stand_in_the_header(tmp_path: Path, run: Callable[..., tuple[Report, Cache]]) -> None:
    for folder, part in (("a", "CHEST"), ("b", "ABDOMEN"), ("c", ""), ("d", "12345")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for i, ds in enumerate(slices()):
            ds.PatientID, ds.BodyPartExamined = folder, part
            ds.PixelData = bytes(np.full(ROWS * COLUMNS, ord(folder), np.uint16))
            ds.save_as(tmp_path / "data" / folder / f"{i}.dcm", enforce_file_format=True)
    columns = Columns(label=None, attribute="BodyPartExamined")
    report, cache = run(tmp_path / "data", None, columns, {"chest": 0, "abdomen": 1})
    assert {e.source: dict(cache.load(e).labels) for e in cache.entries} == {
        "a": {"label": 0.0},
        "b": {"label": 1.0},
        "c": {},
    }
    # a number is no class of its own: it might be an identifier
    assert [(r.source, r.detail) for r in report.refused] == [
        ("d", "BodyPartExamined is '12345'; accepted abdomen, chest (data.label_map)")
    ]
    with pytest.raises(Stop, match="attribute is Nonsense; need a keyword of DICOM"):
        run(tmp_path / "data", None, Columns(label=None, attribute="Nonsense"))
