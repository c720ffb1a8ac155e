"""Plain axial or oblique DICOM series of single-frame images, with their DICOM SEG, as RAS+ volumes.

Positions follow PS3.3 C.7.6.2.1.1 (Image Plane Module). What cannot be stacked truthfully (gantry tilt,
uneven or repeated positions, mixed slices) is refused by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut

from tasks.data.deident import facts
from tasks.data.discover import kind
from tasks.data.nifti import spacing_of
from tasks.data.seg import read_seg
from tasks.data.source import Array, Faulty, Found, LabelMap, Raw, Reason, reading, stored

_SEG = "1.2.840.10008.5.1.4.1.1.66.4"  # Segmentation Storage
_LABELMAP_SEG = "1.2.840.10008.5.1.4.1.1.66.7"  # Label Map Segmentation Storage
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_TAGS = ["SOPClassUID", "SeriesInstanceUID", "PatientID", "Rows", "ReferencedSeriesSequence"]

#: share of a slice's distance (and of a pixel) that rounding of header fields explains
TOLERANCE = 0.05

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class _Header:
    path: Path
    sop_class: str
    series: str
    patient: str
    is_image: bool
    refers_to: tuple[str, ...]


def from_series(root: Path, files: Iterable[Path], *, with_masks: bool) -> list[Found]:
    """One case per image series; objects without pixels (reports, plans, contours) are passed over."""
    found: list[Found] = []
    images: dict[str, list[_Header]] = defaultdict(list)
    segs: list[_Header] = []
    for path in files:
        if not _is_dicom(path):
            continue
        try:
            header = _header(path)
        except Faulty as fault:
            found.append(Found(_relative(root, path), "", (path,), fault=fault))
            continue
        if header.sop_class in (_SEG, _LABELMAP_SEG):
            segs.append(header)
        elif header.is_image:
            images[header.series].append(header)
    attached: dict[str, list[_Header]] = defaultdict(list)
    for seg in segs if with_masks else ():
        series = next((s for s in seg.refers_to if s in images), None)
        if series is None:
            alone = Faulty(Reason.NO_IMAGE, "the series it refers to is not here")
            found.append(Found(_relative(root, seg.path), "", (seg.path,), fault=alone))
        else:
            attached[series].append(seg)
    names = _names(root, images)
    return found + [
        _case(names[uid], slices, attached[uid], with_masks=with_masks) for uid, slices in images.items()
    ]


def read_series(slices: Sequence[Path], seg: Path | None, label_map: LabelMap) -> Raw:
    """A series as a volume in RAS+ order, in HU where it is CT, with the classes of its SEG.

    Raises:
        Faulty: why it cannot be stacked, or why the SEG does not belong to it.
    """
    datasets = []
    for path in slices:
        with reading(path):
            datasets.append(pydicom.dcmread(path))
    with reading(slices[0]):
        ordered, affine = _stack(datasets)
    planes = []
    for dataset in ordered:
        with reading(slices[0]):
            planes.append(np.asarray(apply_modality_lut(dataset.pixel_array, dataset), dtype=np.float32))
    volume: Array = np.stack(planes).transpose(2, 1, 0)  # slice, row, column -> column, row, slice
    if np.array_equal(volume, whole := volume.astype(np.int32)):
        volume = whole
    mask = None if seg is None else read_seg(seg, affine, volume.shape, label_map)
    turn, ras = _turn(_LPS_TO_RAS @ affine, volume.shape)
    if mask is not None:
        mask = _turned(mask, turn)
    volume = _turned(volume, turn)
    return Raw(stored(volume[None]), mask, ras, spacing_of(ras), facts(datasets[0]))


def _turn(affine: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Which axes to swap and flip for the closest RAS+ order, and the affine after that."""
    # nibabel's orientation functions carry no types
    turn: Array = nib.io_orientation(affine)  # type: ignore[no-untyped-call]
    back: Array = nib.orientations.inv_ornt_aff(turn, shape)  # type: ignore[no-untyped-call]
    return turn, affine @ back


def _turned(array: Array, turn: Array) -> Array:
    return np.ascontiguousarray(nib.apply_orientation(array, turn))  # type: ignore[no-untyped-call]


def _is_dicom(path: Path) -> bool:
    if kind(path) is not None:
        return False
    if path.suffix.lower() in _DICOM_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"  # PS3.10 7.1
    except OSError:
        return False


def _header(path: Path) -> _Header:
    with reading(path):
        ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
        refers = tuple(str(r.SeriesInstanceUID) for r in ds.get("ReferencedSeriesSequence") or ())
        return _Header(
            path=path,
            sop_class=str(ds.get("SOPClassUID", "")),
            series=str(ds.get("SeriesInstanceUID", "")),
            patient=str(ds.get("PatientID") or "").strip(),
            is_image="Rows" in ds,
            refers_to=refers,
        )


def _relative(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _names(root: Path, images: Mapping[str, Sequence[_Header]]) -> dict[str, str]:
    """What each series is called: its folder where that holds no other, else its first file."""
    in_folder: dict[Path, set[str]] = defaultdict(set)
    for uid, slices in images.items():
        for header in slices:
            in_folder[header.path.parent].add(uid)
    names = {}
    for uid, slices in images.items():
        first = min(h.path for h in slices)
        alone = {h.path.parent for h in slices} == {first.parent} and len(in_folder[first.parent]) == 1
        names[uid] = _relative(root, first.parent if alone and first.parent != root else first)
    return names


def _case(name: str, slices: Sequence[_Header], segs: Sequence[_Header], *, with_masks: bool) -> Found:
    paths = tuple(sorted(h.path for h in slices))
    files = (*paths, *sorted(s.path for s in segs))
    patients = {h.patient for h in slices}
    fault = None
    if not slices[0].series:
        fault = Faulty(Reason.UNREADABLE, "no SeriesInstanceUID (0020,000E)")
    elif with_masks and not segs:
        fault = Faulty(Reason.NO_MASK, "no DICOM SEG refers to this series")
    elif len(segs) > 1:
        fault = Faulty(Reason.SEVERAL_MASKS, f"{len(segs)} DICOM SEG refer to this series; keep one")
    elif len(patients) > 1:
        fault = Faulty(Reason.MIXED, "slices of several patients")
    elif patients == {""}:
        fault = Faulty(Reason.NO_PATIENT, "no PatientID (0010,0020)")
    seg = segs[0].path if segs else None
    return Found(name, min(patients), files, partial(read_series, paths, seg), fault=fault)


def _stack(datasets: Sequence[Dataset]) -> tuple[list[Dataset], Array]:
    """The slices in order along their normal, and the affine (column, row, slice) -> LPS+ mm."""
    _check_alike(datasets)
    first = datasets[0]
    orientation = np.array([d.ImageOrientationPatient for d in datasets], dtype=float)
    if np.ptp(orientation, axis=0).max() > 1e-3:
        raise Faulty(Reason.ORIENTATION, "ImageOrientationPatient (0020,0037) changes within the series")
    along_row, along_column = orientation[0, :3], orientation[0, 3:]
    normal = np.cross(along_row, along_column)
    if not np.allclose([along_row @ along_row, along_column @ along_column, normal @ normal], 1, atol=1e-3):
        raise Faulty(Reason.GEOMETRY, "ImageOrientationPatient (0020,0037) is not orthonormal")
    positions = np.array([d.ImagePositionPatient for d in datasets], dtype=float)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    row_mm, column_mm = (float(s) for s in first.PixelSpacing)  # between rows, between columns
    _check_gaps(positions, normal, min(row_mm, column_mm))
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_mm
    affine[:3, 1] = along_column * row_mm
    affine[:3, 2] = (positions[-1] - positions[0]) / (len(positions) - 1)
    affine[:3, 3] = positions[0]
    return [datasets[i] for i in order], affine


def _check_alike(datasets: Sequence[Dataset]) -> None:
    first = datasets[0]
    for name, tag in (("NumberOfFrames", "0028,0008"), ("SamplesPerPixel", "0028,0002")):
        if any(int(d.get(name) or 1) != 1 for d in datasets):
            raise Faulty(Reason.SHAPE, f"{name} ({tag}) is not 1; single-frame gray series are read")
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        if any(not d.get(name) for d in datasets):
            raise Faulty(Reason.NO_POSITION, f"a slice has no {name}")
    if len(datasets) < 2:
        raise Faulty(Reason.SLICES, "one slice; need at least 2")
    for name in ("Rows", "Columns", "PixelSpacing", "RescaleType"):
        if any(d.get(name) != first.get(name) for d in datasets):
            raise Faulty(Reason.MIXED, f"{name} changes within the series")


def _check_gaps(positions: Array, normal: Array, pixel_mm: float) -> None:
    """Refuse positions that do not lie evenly on one line along the normal."""
    depth = positions @ normal
    gaps = np.diff(depth)
    if gaps.min() < 1e-3:
        distinct = 1 + int((gaps >= 1e-3).sum())
        raise Faulty(
            Reason.REPEATED, f"{len(depth)} slices at {distinct} positions: several volumes in one series"
        )
    drift = positions - positions[0] - np.outer(depth - depth[0], normal)
    off = float(np.linalg.norm(drift, axis=1).max())
    if off > max(TOLERANCE * pixel_mm, 1e-2):
        raise Faulty(Reason.TILT, f"slices drift by {off:.3g} mm in their own plane")
    even = np.linspace(depth[0], depth[-1], len(depth))
    middle = float(np.median(gaps))
    if np.abs(gaps - middle).max() > TOLERANCE * middle or np.abs(depth - even).max() > TOLERANCE * middle:
        raise Faulty(Reason.UNEVEN, f"slice distances run from {gaps.min():.4g} to {gaps.max():.4g} mm")
