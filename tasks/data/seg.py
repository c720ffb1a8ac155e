"""DICOM Segmentation and Label Map Segmentation objects (PS3.3 A.51, A.86, C.8.20) on an image's slices."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.utils import iter_pixels

from tasks.data.labels import Canvas
from tasks.data.source import Array, Faulty, Reason

_OFF = 0.05  # voxels by which a frame may miss its slice: rounding of header fields


def draw_seg(seg: Dataset, name: str, canvas: Canvas) -> None:
    """Draw the segments of one object; frames may be sparse.

    A segment is known by its label, its code, then its number. Of a FRACTIONAL one (C.8.20.2.3) those
    voxels belong that reach `Naming.threshold` of MaximumFractionalValue.

    Raises:
        Faulty: of another kind, size or frame of reference; not on the image's slices.
    """
    kind = str(seg.get("SegmentationType", ""))
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise Faulty(Reason.MASK_KIND, f"{name} is a {kind or 'nameless'} segmentation")
    columns, rows, _ = canvas.grid.shape
    if (seg.Columns, seg.Rows) != (columns, rows):
        size = f"image {columns}x{rows}, mask {seg.Columns}x{seg.Rows} (columns x rows)"
        raise Faulty(Reason.SIZE, size)
    frame = str(seg.get("FrameOfReferenceUID", ""))
    if frame and canvas.grid.frame and frame != canvas.grid.frame:
        raise Faulty(Reason.FRAME, f"{name} lies in another frame of reference (0020,0052) than the image")
    known = {int(s.SegmentNumber): canvas.class_of(name, _shown(s), *_names(s)) for s in _segments(seg, kind)}
    shared = (seg.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    to_index = np.linalg.inv(canvas.grid.affine)
    for values, own in zip(_frames(seg), seg.PerFrameFunctionalGroupsSequence, strict=True):
        at = _slice_of(own, shared, to_index, canvas.grid.shape)
        if kind == "LABELMAP":
            _draw_numbers(values, at, known, _backgrounds(seg), canvas, name)
            continue
        number = int(_item(own, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
        if number not in known:
            raise Faulty(Reason.UNREADABLE, f"{name} has frames of segment {number}, which it does not list")
        value = known[number]
        if value is not None:
            canvas.paint(at, _belongs(values, seg, kind, canvas), value)


def _frames(seg: Dataset) -> Iterable[Array]:
    """The frames one at a time: unpacked, a segmentation of many organs is larger than memory."""
    if seg.BitsAllocated == 1 and seg.Rows * seg.Columns % 8:  # pydicom cuts frames at whole bytes only
        whole: Array = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
        return whole
    return iter_pixels(seg)


def _belongs(values: Array, seg: Dataset, kind: str, canvas: Canvas) -> Array:
    least = 1.0
    if kind == "FRACTIONAL":
        least = canvas.names.threshold * float(seg.MaximumFractionalValue)
        canvas.note(f"a fractional segmentation was cut at {canvas.names.threshold:g} of its maximum")
    belongs: Array = values >= least
    return belongs


def _draw_numbers(
    values: Array, at: int, known: dict[int, int | None], backgrounds: set[int], canvas: Canvas, name: str
) -> None:
    for number in np.unique(values).tolist():
        if number in backgrounds:
            continue
        if number not in known:
            raise Faulty(Reason.UNREADABLE, f"{name} has voxels of segment {number}, which it does not list")
        value = known[number]
        if value is not None:
            canvas.paint(at, values == number, value)


def _backgrounds(seg: Dataset) -> set[int]:
    return {0, int(seg.get("PixelPaddingValue") or 0)}


def _segments(seg: Dataset, kind: str) -> list[Dataset]:
    background = _backgrounds(seg) if kind == "LABELMAP" else set()
    return [s for s in seg.SegmentSequence if int(s.SegmentNumber) not in background]


def _shown(segment: Dataset) -> str:
    label = str(segment.get("SegmentLabel") or "").strip()
    return label or f"segment {segment.SegmentNumber}"


def _names(segment: Dataset) -> list[int | str]:
    """What a segment may be known by: (0062,0005) its label, (0062,000F) its type's code, its number."""
    label = str(segment.get("SegmentLabel") or "").strip()
    return [
        *([label] if label else []),
        *coded(segment, "SegmentedPropertyTypeCodeSequence"),
        int(segment.SegmentNumber),
    ]


def coded(item: Dataset, sequence: str) -> list[str]:
    """`scheme:value` of a code sequence (PS3.3 8.8)."""
    return [
        f"{c.get('CodingSchemeDesignator', '')}:{c.get('CodeValue', '')}" for c in item.get(sequence) or ()
    ]


def _slice_of(own: Dataset, shared: Dataset, to_index: Array, shape: tuple[int, ...]) -> int:
    """Which slice of the image a frame covers, pixel by pixel."""
    origin = np.array(_item(own, shared, "PlanePositionSequence").ImagePositionPatient, dtype=float)
    turned = np.array(_item(own, shared, "PlaneOrientationSequence").ImageOrientationPatient, dtype=float)
    row_mm, column_mm = (float(s) for s in _item(own, shared, "PixelMeasuresSequence").PixelSpacing)
    right = origin + turned[:3] * column_mm * (shape[0] - 1)
    down = origin + turned[3:] * row_mm * (shape[1] - 1)
    corners = np.array([[*p, 1.0] for p in (origin, right, down)]) @ to_index.T
    at = round(float(corners[0, 2]))
    wanted = np.array([[0, 0, at], [shape[0] - 1, 0, at], [0, shape[1] - 1, at]])
    off = float(np.abs(corners[:, :3] - wanted).max())
    if not off <= _OFF:
        raise Faulty(Reason.GEOMETRY, f"a frame of the SEG misses the image's slices by {off:.3g} voxels")
    if not 0 <= at < shape[2]:
        raise Faulty(Reason.GEOMETRY, "a frame of the SEG lies beyond the image's slices")
    return at


def _item(own: Dataset, shared: Dataset, name: str) -> Dataset:
    """A functional group of one frame, or the one all frames share (PS3.3 C.7.6.16.1)."""
    items = own.get(name) or shared.get(name)
    if not items:
        raise Faulty(Reason.UNREADABLE, f"a frame of the SEG has no {name}")
    found: Dataset = items[0]
    return found
