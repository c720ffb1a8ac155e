"""From what a mask file holds to classes; DICOM SEG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from conf.exits import Exit, Stop
from tasks.data.source import Array, Faulty, LabelMap, Reason, reading

_LISTED = 8  # values quoted in a refusal
_OFF = 0.05  # voxels by which a frame of a SEG may miss its slice: rounding of header fields


def check_label_map(label_map: LabelMap) -> None:
    """Refuse a map that names a class outside 0..255.

    Raises:
        Stop: (`CONFIG`).
    """
    if label_map is None or label_map == "nonzero":
        return
    if not label_map:
        raise Stop(Exit.CONFIG, "data.label_map is empty; give file value to class, nonzero, or leave it out")
    wrong = sorted({c for c in label_map.values() if not 0 <= c <= 255})
    if wrong:
        raise Stop(Exit.CONFIG, f"data.label_map has classes {wrong}; accepted are 0 to 255")


def classes(values: Array, label_map: LabelMap) -> Array:
    """Classes (uint8, same shape) of a mask's file values.

    Args:
        values: integers, or floats that hold integers.
        label_map: file value to class; "nonzero": 0 stays 0 and all else is 1; None: values are classes.

    Raises:
        Faulty: a value that the map does not name, or without a map one that is no integer in 0..255.
    """
    if label_map == "nonzero":
        return np.ascontiguousarray(values != 0, dtype=np.uint8)
    known = {c: c for c in range(256)} if label_map is None else label_map
    small = values.dtype.kind == "u" and values.dtype.itemsize <= 2  # then counting spares sorting all voxels
    if small:
        present, where = np.flatnonzero(np.bincount(values.ravel())), values
    else:
        present, where = np.unique(values, return_inverse=True)
    outside = [
        v for v in present.tolist() if v not in known
    ]  # 2.0 == 2 and hashes alike; 0.5, NaN are outside
    if outside:
        text = ", ".join(f"{v:g}" for v in outside[:_LISTED]) + (", …" if len(outside) > _LISTED else "")
        accepted = "0 to 255" if label_map is None else ", ".join(str(v) for v in sorted(known)[:_LISTED])
        raise Faulty(Reason.LABEL, f"mask has {text}; accepted {accepted} (setting: data.label_map)")
    table = np.zeros(int(present.max()) + 1 if small else len(present), dtype=np.uint8)
    table[present if small else slice(None)] = [known[int(v)] for v in present.tolist()]
    return np.ascontiguousarray(table[where].reshape(values.shape))


def read_seg(path: Path, affine: Array, shape: tuple[int, ...], label_map: LabelMap) -> Array:
    """Classes on an image's grid from a binary DICOM SEG (PS3.3 A.51, C.8.20); frames may be sparse.

    File values are segment numbers. Where segments overlap the higher number wins, so a lesion that is
    listed after its organ is kept.

    Args:
        affine: (column, row, slice) -> LPS+ mm of the image. shape: its columns, rows, slices.

    Raises:
        Faulty: unreadable, not binary, of other size, not on the image's slices, label outside the map.
    """
    with reading(path):
        seg = pydicom.dcmread(path)
        kind = str(seg.get("SegmentationType", ""))
        if kind != "BINARY":
            raise Faulty(
                Reason.MASK_KIND, f"{path.name} is a {kind or 'nameless'} segmentation; BINARY is read"
            )
        columns, rows, slices = shape
        if (seg.Columns, seg.Rows) != (columns, rows):
            size = f"image {columns}x{rows}, mask {seg.Columns}x{seg.Rows} (columns x rows)"
            raise Faulty(Reason.SIZE, size)
        frames = seg.pixel_array.reshape(-1, rows, columns)
        shared = (seg.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
        to_index = np.linalg.inv(affine)
        numbers = np.zeros((slices, rows, columns), dtype=np.uint16)
        for frame, own in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
            at = _slice_of(own, shared, to_index, shape)
            number = _item(own, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber
            np.maximum(numbers[at], frame.astype(np.uint16) * number, out=numbers[at])
    return classes(numbers.transpose(2, 1, 0), label_map)


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
