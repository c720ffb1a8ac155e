import shutil
from collections.abc import Callable
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from conf.schema import Columns
from tasks.data.cache import Cache
from tasks.data.dicom import read_volume
from tasks.data.guard import shared
from tasks.data.header import read_header
from tasks.data.ingest import NothingKept, Report
from tasks.data.series import assemble
from tasks.data.source import Faulty, LabelMap, Raw, Reason

Run = Callable[..., tuple[Report, Cache]]
ROWS, COLUMNS, SLICES = 6, 5, 4
DRAW = np.random.default_rng(0)
STORED = DRAW.integers(0, 3000, (SLICES, ROWS, COLUMNS), dtype=np.uint16)
TRUTH = np.stack([DRAW.random(STORED.shape) < 0.3, DRAW.random(STORED.shape) < 0.2], axis=-1)
TRUTH[1] = False  # an empty slice: its frames are left out

AXIAL = np.eye(3)
TURN = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
OBLIQUE = TURN * np.linalg.det(TURN)
SAGITTAL = np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]])  # columns: along a row, along a column, normal


def write(
    folder: Path,
    axes: np.ndarray = AXIAL,
    gaps: tuple[float, ...] = (2.5, 2.5, 2.5),
    change: Callable[[int, FileDataset], None] = lambda i, ds: None,
    truth: np.ndarray | None = TRUTH,
    patient: str = "P1",
) -> list[Path]:
    """A series whose file names are out of order, and its SEG by highdicom."""
    folder.mkdir(parents=True, exist_ok=True)
    datasets, paths = [], []
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    for i in range(SLICES):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)  # type: ignore[arg-type]
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = series, study, frame
        ds.PatientID, ds.PatientName, ds.PatientBirthDate = patient, "CANARY^NAME", "19010101"
        ds.PatientSex, ds.PatientAge, ds.Manufacturer = "F", "093Y", "SIEMENS Healthineers"
        ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.StudyID = ds.ReferringPhysicianName = ""
        ds.Modality, ds.SeriesNumber, ds.InstanceNumber = "CT", 1, i + 1
        ds.PositionReferenceIndicator, ds.InstitutionName = "", "CANARY HOSPITAL"
        ds.ImageOrientationPatient = [round(float(v), 9) for v in axes[:, :2].T.ravel()]
        position = np.array([-11.0, 7.0, 30.0]) + axes[:, 2] * sum(gaps[:i])
        ds.ImagePositionPatient = [round(float(v), 6) for v in position]
        ds.PixelSpacing, ds.SliceThickness = ["1.5", "0.75"], "2.5"  # between rows, between columns
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = (
            ROWS,
            COLUMNS,
            1,
            "MONOCHROME2",
        )
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = "1", "-1024", "HU"
        ds.PixelData = STORED[i].tobytes()
        change(i, ds)
        datasets.append(ds)
        paths.append(folder / f"{(7 * i) % 5}.dcm")
        ds.save_as(paths[-1], enforce_file_format=True)
    if truth is not None:
        seg_of(datasets, truth).save_as(folder / "seg.dcm", enforce_file_format=True)
    return paths


def seg_of(datasets: list[FileDataset], truth: np.ndarray) -> hd.seg.Segmentation:
    by_hand = hd.seg.SegmentAlgorithmTypeValues.MANUAL
    described = [
        hd.seg.SegmentDescription(i + 1, f"s{i}", codes.SCT.Organ, codes.SCT.Liver, by_hand)
        for i in range(truth.shape[-1])
    ]
    return hd.seg.Segmentation(
        datasets,
        truth.astype(np.uint8),
        hd.seg.SegmentationTypeValues.BINARY,
        described,
        generate_uid(),
        100,
        generate_uid(),
        1,
        "maker",
        "model",
        "1",
        "1",
    )


def read_series(slices: list[Path], seg: Path | None, label_map: LabelMap) -> Raw:
    """Files that are one volume, and nothing else."""
    parts = assemble([(p, read_header(p, shared())) for p in slices])
    for part in parts:
        if part.fault is not None:
            raise part.fault
    (one,) = parts
    assert one.volume is not None
    return read_volume(one.volume, [] if seg is None else [seg], label_map)


def world(axes: np.ndarray, k: int, r: int, c: int, gap: float = 2.5) -> np.ndarray:
    """Where a stored pixel lies, in RAS+ mm, straight from PS3.3 C.7.6.2.1.1."""
    lps = np.array([-11.0, 7.0, 30.0]) + axes[:, 2] * gap * k + axes[:, 0] * 0.75 * c + axes[:, 1] * 1.5 * r
    return lps * [-1, -1, 1]


@pytest.mark.parametrize("axes", [AXIAL, OBLIQUE, SAGITTAL, AXIAL * [1, -1, -1]])
def test_every_pixel_lies_where_the_header_says(tmp_path: Path, axes: np.ndarray) -> None:
    paths = write(tmp_path, axes)
    raw = read_series(paths, tmp_path / "seg.dcm", None)
    assert (np.diag(raw.affine)[:3] > 0).all()
    assert np.allclose(sorted(raw.spacing), [0.75, 1.5, 2.5], atol=1e-5)
    assert raw.mask is not None
    assert raw.image is not None
    assert raw.image.dtype == np.int16
    for k, r, c in np.ndindex(STORED.shape):
        index = np.linalg.solve(raw.affine, [*world(axes, k, r, c), 1])[:3]
        at = tuple(np.rint(index).astype(int))
        assert np.allclose(index, at, atol=1e-3)
        assert raw.image[0][at] == int(STORED[k, r, c]) - 1024
        assert raw.mask[at] == (2 if TRUTH[k, r, c, 1] else int(TRUTH[k, r, c, 0]))


def test_fractional_slopes_are_applied_slice_by_slice(tmp_path: Path) -> None:
    def slope(i: int, ds: FileDataset) -> None:
        ds.RescaleSlope = str(0.5 + i)

    raw = read_series(write(tmp_path, change=slope, truth=None), None, None)
    wanted = STORED * (0.5 + np.arange(SLICES))[:, None, None] - 1024
    assert raw.image is not None
    assert np.array_equal(raw.image[0], wanted.transpose(2, 1, 0)[::-1, ::-1].astype(np.float32))


def test_only_coded_groups_are_kept(tmp_path: Path, run: Run) -> None:
    write(tmp_path / "data" / "s")
    report, cache = run(tmp_path / "data")
    assert report.kept == 1
    groups = cache.entries[0].groups
    assert [groups[name] for name in ("manufacturer", "sex", "age", "modality")] == [
        "siemens",
        "F",
        "90+",
        "CT",
    ]
    everything = b"".join(p.read_bytes() for p in (tmp_path / "cache").rglob("*") if p.is_file())
    for canary in (b"CANARY", b"19010101", b"P1"):
        assert canary not in everything


def rows(i: int, ds: FileDataset) -> None:
    if i == 2:
        ds.Rows, ds.PixelData = ROWS - 1, STORED[i, :-1].tobytes()


def tilt(i: int, ds: FileDataset) -> None:
    ds.ImagePositionPatient = [-11, 7 + 0.8 * i, 30 + 2.5 * i]


def turned(i: int, ds: FileDataset) -> None:
    if i == 1:
        ds.ImageOrientationPatient = [0, 1, 0, -1, 0, 0]


def same_place(i: int, ds: FileDataset) -> None:
    if i == 1:
        ds.ImagePositionPatient = [-11, 7, 30]


def nowhere(i: int, ds: FileDataset) -> None:
    if i == 3:
        del ds.ImagePositionPatient


def two_frames(i: int, ds: FileDataset) -> None:
    ds.NumberOfFrames = 2


def short(i: int, ds: FileDataset) -> None:
    if i == 3:
        ds.PixelData = ds.PixelData[:10]


@pytest.mark.parametrize(
    ("gaps", "change", "reason", "detail"),
    [
        ((2.5, 5.0, 2.5), lambda i, ds: None, Reason.UNEVEN, "from 2.5 to 5 mm"),
        ((2.5, 2.5, 2.5), tilt, Reason.TILT, r"drift by 2\.4 mm"),
        ((2.5, 2.5, 2.5), turned, Reason.ORIENTATION, "0020,0037"),
        ((2.5, 2.5, 2.5), rows, Reason.MIXED, "Rows, Columns or SamplesPerPixel changes"),
        ((2.5, 2.5, 2.5), same_place, Reason.REPEATED, "4 slices at 3 positions"),
        ((2.5, 2.5, 2.5), nowhere, Reason.NO_POSITION, "no ImagePositionPatient"),
        ((2.5, 2.5, 2.5), two_frames, Reason.SHAPE, "NumberOfFrames"),
        ((2.5, 2.5, 2.5), short, Reason.UNREADABLE, "ValueError"),
    ],
)
def test_a_series_that_cannot_be_stacked_is_refused(
    tmp_path: Path,
    gaps: tuple[float, ...],
    change: Callable[[int, FileDataset], None],
    reason: Reason,
    detail: str,
) -> None:
    paths = write(tmp_path, gaps=gaps, change=change, truth=None)
    with pytest.raises(Faulty, match=detail) as caught:
        read_series(paths, None, None)
    assert caught.value.reason is reason


def moved(seg: pydicom.Dataset) -> None:
    for item in seg.PerFrameFunctionalGroupsSequence:
        position = item.PlanePositionSequence[0].ImagePositionPatient
        item.PlanePositionSequence[0].ImagePositionPatient = [position[0] + 0.2, position[1], position[2]]


def between(seg: pydicom.Dataset) -> None:
    position = seg.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient
    position[2] += 1.25


def beyond(seg: pydicom.Dataset) -> None:
    position = seg.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient
    position[2] = 1000


def coarser(seg: pydicom.Dataset) -> None:
    seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [1.5, 1.5]


def nameless(seg: pydicom.Dataset) -> None:
    del seg.SegmentationType


def fewer(seg: pydicom.Dataset) -> None:
    seg.Rows = ROWS - 1


def missing(seg: pydicom.Dataset) -> None:
    del seg.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        (moved, Reason.GEOMETRY, r"by 0\.267 voxels"),
        (between, Reason.GEOMETRY, r"by 0\.5 voxels"),
        (beyond, Reason.GEOMETRY, "lies beyond the image's slices"),
        (coarser, Reason.GEOMETRY, "misses the image's slices"),
        (nameless, Reason.MASK_KIND, "is a nameless segmentation"),
        (fewer, Reason.SIZE, "image 5x6, mask 5x5"),
        (missing, Reason.UNREADABLE, "PlanePositionSequence"),
    ],
)
def test_a_seg_that_does_not_belong_is_refused(
    tmp_path: Path, change: Callable[[pydicom.Dataset], None], reason: Reason, detail: str
) -> None:
    paths = write(tmp_path)
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    change(seg)
    seg.save_as(tmp_path / "seg.dcm")
    with pytest.raises(Faulty, match=detail) as caught:
        read_series(paths, tmp_path / "seg.dcm", None)
    assert caught.value.reason is reason


def test_segment_numbers_go_through_the_label_map(tmp_path: Path) -> None:
    paths = write(tmp_path)
    plain = read_series(paths, tmp_path / "seg.dcm", None).mask
    mapped = read_series(paths, tmp_path / "seg.dcm", {0: 0, 1: 5, 2: 7}).mask
    turned = read_series(paths, tmp_path / "seg.dcm", {1: 7, 2: 5}).mask
    assert plain is not None
    assert mapped is not None
    assert turned is not None
    assert np.array_equal(mapped, np.array([0, 5, 7])[plain])
    # the higher class wins, whatever its segment's number
    assert (turned == 7).sum() == TRUTH[..., 0].sum() > (plain == 1).sum()
    with pytest.raises(Faulty, match=r"not mapped: s1; accepted 0, 1"):
        read_series(paths, tmp_path / "seg.dcm", {0: 0, 1: 1})


def test_a_tree_of_hospitals(tmp_path: Path, run: Run) -> None:
    root = tmp_path / "data"
    write(root / "north" / "a", patient="P1")
    write(root / "north" / "b", OBLIQUE, patient="P1")
    write(root / "south hospital" / "c", SAGITTAL, patient="P2")
    write(root / "south hospital" / "bare", truth=None)
    write(root / "south hospital" / "nobody", patient="")
    write(root / "south hospital" / "twice")
    shutil.copy(
        root / "south hospital" / "twice" / "seg.dcm", root / "south hospital" / "twice" / "again.dcm"
    )
    (root / "orphan").mkdir()
    (root / "notes.txt").write_text("not an image")
    (root / "broken.dcm").write_bytes(b"nothing of the kind")
    write(tmp_path / "elsewhere")
    shutil.copy(tmp_path / "elsewhere" / "seg.dcm", root / "orphan" / "seg.dcm")
    report, cache = run(root)
    assert {(r.source, r.reason) for r in report.refused} == {
        ("south hospital/bare", Reason.NO_MASK),
        ("south hospital/nobody", Reason.NO_PATIENT),
        ("south hospital/twice", Reason.SEVERAL_MASKS),
        ("orphan/seg.dcm", Reason.NO_IMAGE),
        ("broken.dcm", Reason.UNREADABLE),
    }
    assert {(e.source, e.site) for e in cache.entries} == {
        ("north/a", "north"),
        ("north/b", "north"),
        ("south hospital/c", "south_hospital"),
    }
    by_source = {e.source: e.patient for e in cache.entries}
    assert by_source["north/a"] == by_source["north/b"] != by_source["south hospital/c"]


def test_real_series(real: Callable[[str], Path], run: Run) -> None:
    report, cache = run(real("dicom_series"), columns=Columns(label=None), workers=2)
    refused = {r.source: r.reason for r in report.refused}
    assert refused == {"ct_ge_hispeed_tilt": Reason.TILT}
    shapes = {e.source: e.shape for e in cache.entries}  # columns, rows, slices of the set's manifest
    assert shapes == {
        "mr_siemens_espree_t1post": (1, 280, 320, 22),
        "pt_ge_petctac": (1, 128, 128, 10),
        "ct_ge_petct_lowdose": (1, 512, 512, 10),
        **{f"mr_ge_mr750_epi_multivolume#{i}": (1, 64, 64, 15) for i in (1, 2, 3)},
        **{f"mr_philips_achieva_epi#{i}": (1, 64, 64, 9) for i in (1, 2, 3)},
    }
    patients = {e.source: e.patient for e in cache.entries}
    assert patients["pt_ge_petctac"] == patients["ct_ge_petct_lowdose"]
    entry = next(e for e in cache.entries if e.source == "mr_siemens_espree_t1post")
    case = cache.load(entry)
    files = [pydicom.dcmread(p) for p in (real("dicom_series") / entry.source).iterdir()]
    lowest = min(files, key=lambda d: d.ImagePositionPatient[2])
    # this grid is stored from right to left and from front to back: RAS+ flips rows and columns
    assert np.array_equal(case.images["image"][0].flip(0, 1)[..., 0].numpy().T, lowest.pixel_array)


def test_real_uneven_series_is_refused_once_its_tilt_is_taken_away(
    real: Callable[[str], Path], tmp_path: Path
) -> None:
    for path in (real("dicom_series") / "ct_ge_hispeed_tilt").iterdir():
        ds = pydicom.dcmread(path)
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.save_as(tmp_path / path.name)
    with pytest.raises(Faulty, match=r"from 1\..* to 7\..* mm") as caught:
        read_series(sorted(tmp_path.iterdir()), None, None)
    assert caught.value.reason is Reason.UNEVEN


@pytest.mark.parametrize("name", ["liver", "partial_overlaps"])
def test_a_real_seg_is_what_highdicom_reads(real: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = real("dicom_zoo") / "seg_with_series"
    images = [folder / f"{i:02}.dcm" for i in (1, 2, 3)]
    raw = read_series(images, folder / f"{name}.dcm", None)
    seg = hd.seg.segread(folder / f"{name}.dcm")
    uids = [pydicom.dcmread(p).SOPInstanceUID for p in images]
    stack = seg.get_pixels_by_source_instance(
        uids, assert_missing_frames_are_empty=True, ignore_spatial_locations=True
    )
    numbers = np.arange(1, stack.shape[-1] + 1)
    wanted = (stack * numbers).max(axis=-1)  # slice, row, column; slices run from head to feet
    assert raw.mask is not None
    assert raw.mask.any()
    assert np.array_equal(raw.mask, wanted[::-1, ::-1, ::-1].transpose(2, 1, 0))


def test_the_zoo_ends_in_reasons(real: Callable[[str], Path], run: Run) -> None:
    with pytest.raises(NothingKept, match="no usable case") as caught:
        run(real("dicom_zoo"), columns=Columns(label="none of these has one"))
    assert {r.reason for r in caught.value.report.refused} >= {Reason.UNREADABLE, Reason.NO_MASK}


def test_a_row_may_name_a_slice(tmp_path: Path, run: Run) -> None:
    root = tmp_path / "data"
    first, *_, last = write(root / "s", truth=None)
    rows = [f"s/{first.name},0", f"s/{last.name},1"]
    (root / "manifest.csv").write_text("\n".join(["image,label", *rows]))
    _, cache = run(root, "manifest.csv", Columns())
    found = {e.source: cache.load(e) for e in cache.entries}
    assert {s: c.labels["label"] for s, c in found.items()} == {f"s/{first.name}": 0, f"s/{last.name}": 1}
    case = found[f"s/{last.name}"]
    assert np.array_equal(case.images["image"][0], STORED[-1].astype(int) - 1024)
    assert (case.spacing, case.units) == ((1.5, 0.75), "HU")  # rows, columns


def test_a_copy_of_a_slice_is_left_out_and_told(tmp_path: Path, run: Run) -> None:
    first, *_ = write(tmp_path / "data" / "s")
    shutil.copy(first, first.with_name("copy.dcm"))
    report, cache = run(tmp_path / "data")
    assert [e.shape for e in cache.entries] == [(1, COLUMNS, ROWS, SLICES)]
    assert report.notes["files that repeat a SOPInstanceUID were left out"] == 1
