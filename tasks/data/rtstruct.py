"""RT Structure Sets (PS3.3 A.19, C.8.8.5, C.8.8.6): contours on the slices of an image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from pydicom.dataset import Dataset

from tasks.data.labels import Canvas
from tasks.data.seg import coded
from tasks.data.source import Array, Faulty, Reason

#: slice distances by which a contour may lie off a slice, and bend out of its plane: rounding
OFF_PLANE = 0.05

_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


class DrawnOn(NamedTuple):
    """The series and images (UIDs) that a structure set names, and the frames of reference it lives in."""

    series: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    frames: tuple[str, ...] = ()


def drawn_on(structures: Dataset) -> DrawnOn:
    """What a structure set says it was drawn on."""
    frames = list(structures.get("ReferencedFrameOfReferenceSequence") or ())
    studies = [s for f in frames for s in f.get("RTReferencedStudySequence") or ()]
    series = [s for study in studies for s in study.get("RTReferencedSeriesSequence") or ()]
    images = [i for s in series for i in s.get("ContourImageSequence") or ()]
    used = {str(f.get("FrameOfReferenceUID", "")) for f in frames}
    used |= {str(r.get("ReferencedFrameOfReferenceUID", "")) for r in structures.StructureSetROISequence}
    return DrawnOn(
        tuple(dict.fromkeys(str(s.SeriesInstanceUID) for s in series)),
        tuple(str(i.get("ReferencedSOPInstanceUID", "")) for i in images),
        tuple(sorted(used - {""})),
    )


def draw_structures(structures: Dataset, name: str, canvas: Canvas) -> None:
    """Draw the regions of a structure set, placed by their coordinates, not by the images they name.

    A region is known by its name, its observation's code, then its number. A voxel belongs to it where
    its centre lies within an odd number of the plane's contours, so an inner contour is a hole. A region
    that is mapped and lies off the image's slices refuses the case: nothing is moved to a slice.

    Raises:
        Faulty: another frame of reference, contours off the slices or beyond them, open contours.
    """
    contours = {int(r.ReferencedROINumber): r for r in structures.get("ROIContourSequence") or ()}
    codes: dict[int, list[str]] = defaultdict(list)
    for seen in structures.get("RTROIObservationsSequence") or ():
        codes[int(seen.ReferencedROINumber)] += coded(seen, "RTROIIdentificationCodeSequence")
    to_index = np.linalg.inv(canvas.grid.affine)
    for region in structures.StructureSetROISequence:
        number, roi = int(region.ROINumber), str(region.get("ROIName") or "").strip()
        shown = roi or f"ROI {number}"
        drawn = (contours[number].get("ContourSequence") if number in contours else None) or []
        if drawn and all(c.get("ContourGeometricType") == "POINT" for c in drawn):
            continue  # a marker, such as an isocentre, is no region
        value = canvas.class_of(name, shown, *([roi] if roi else []), *codes[number], number)
        if value is None or not drawn:
            continue
        if str(region.get("ReferencedFrameOfReferenceUID", "")) != canvas.grid.frame:
            raise Faulty(
                Reason.FRAME, f"{shown} lies in another frame of reference (3006,0024) than the image"
            )
        _draw(drawn, shown, value, to_index, canvas)


def _draw(contours: Iterable[Dataset], shown: str, value: int, to_index: Array, canvas: Canvas) -> None:
    columns, rows, slices = canvas.grid.shape
    planes: dict[int, list[Array]] = defaultdict(list)
    for contour in contours:
        kind = str(contour.get("ContourGeometricType", ""))
        if kind not in _CLOSED:
            raise Faulty(
                Reason.MASK_KIND, f"{shown} has a {kind or 'nameless'} contour; closed ones are read"
            )
        at, points = _placed(contour, shown, to_index)
        if not 0 <= at < slices:
            raise Faulty(Reason.GEOMETRY, f"{shown} has a contour beyond the image's slices")
        if kind == "CLOSED_PLANAR" and any(np.array_equal(points, one) for one in planes[at]):
            canvas.note("a contour that stands twice was drawn once")  # as a hole it would undo itself
            continue
        planes[at].append(points)
    for at, loops in planes.items():
        if _outside(loops, rows, columns):
            raise Faulty(Reason.GEOMETRY, f"{shown} has a contour beyond the image's edge")
        canvas.paint(at, even_odd(loops, rows, columns), value)
    if max(planes) - min(planes) + 1 > len(planes):
        canvas.note("a region has no contour on some slices between its ends: nothing was filled in")


def _placed(contour: Dataset, shown: str, to_index: Array) -> tuple[int, Array]:
    """The slice a contour lies on, and its points there: column and row, whole numbers at pixel centres."""
    world = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
    index = np.column_stack([world, np.ones(len(world))]) @ to_index.T
    if not np.isfinite(index).all():
        raise Faulty(Reason.UNREADABLE, f"{shown} has a contour point that is not finite")
    at = round(float(index[:, 2].mean()))
    off = float(np.abs(index[:, 2] - at).max())
    if not off <= OFF_PLANE:
        raise Faulty(
            Reason.GEOMETRY, f"{shown} has a contour off the image's slices by {off:.3g} slice distances"
        )
    return at, index[:, :2]


def _outside(loops: list[Array], rows: int, columns: int) -> bool:
    low = np.min([p.min(axis=0) for p in loops], axis=0)
    high = np.max([p.max(axis=0) for p in loops], axis=0)
    return bool((low < -1).any() or high[0] > columns or high[1] > rows)


def even_odd(loops: list[Array], rows: int, columns: int) -> Array:
    """Pixels (boolean, rows and columns) whose centre lies within an odd number of the closed `loops`.

    Args:
        loops: points N2 as column and row. A centre on an edge belongs to the side of lower row or column.
    """
    toggles = np.zeros((rows, columns + 1), dtype=np.int64)
    for points in loops:
        (x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
        for row in range(max(0, int(np.ceil(points[:, 1].min()))), min(rows, int(points[:, 1].max()) + 1)):
            crosses = (y0 <= row) != (y1 <= row)
            x = x0[crosses] + (row - y0[crosses]) * (x1 - x0)[crosses] / (y1 - y0)[crosses]
            # every centre right of a crossing changes sides
            np.add.at(toggles[row], np.clip(np.ceil(x), 0, columns).astype(int), 1)
    inside: Array = np.cumsum(toggles[:, :columns], axis=1) % 2 == 1
    return inside
