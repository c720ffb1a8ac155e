"""Masks that DICOM objects draw on an assembled volume: which reader, and how several become one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from tasks.data.guard import Answer, Guard
from tasks.data.labels import Canvas, Drawn
from tasks.data.rtstruct import draw_structures
from tasks.data.seg import draw_seg
from tasks.data.source import Faulty, Grid, LabelMap, Naming, Reason, reading

SEG = "1.2.840.10008.5.1.4.1.1.66.4"  # Segmentation Storage
LABELMAP_SEG = "1.2.840.10008.5.1.4.1.1.66.7"  # Label Map Segmentation Storage
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"  # RT Structure Set Storage

_DRAW = {SEG: draw_seg, LABELMAP_SEG: draw_seg, RTSTRUCT: draw_structures}

#: SOP classes that hold masks
SOP_CLASSES = tuple(_DRAW)


def read_masks(paths: Sequence[Path], grid: Grid, label_map: LabelMap) -> Drawn:
    """The classes that all the objects at `paths` together draw on the volume.

    Raises:
        Faulty: unreadable, geometry that is not the image's, a label outside the map, or two objects that
            draw one class.
    """
    canvas = Canvas(grid, Naming.of(label_map))
    for path in sorted(paths):
        with reading(path):
            dataset = pydicom.dcmread(path)
            kind = str(dataset.get("SOPClassUID", ""))
            if kind not in _DRAW:
                raise Faulty(Reason.MASK_KIND, f"{path.name} is no SEG and no RTSTRUCT")
            _DRAW[kind](dataset, path.name, canvas)
    return canvas.done()


def guarded_masks(paths: Sequence[Path], grid: Grid, label_map: LabelMap, guard: Guard) -> Drawn:
    """`read_masks` in a guarded worker.

    Raises:
        Faulty: as `read_masks`, or the guard's.
    """
    first, *others = sorted(paths)
    with reading(first):
        room = 3 * math.prod(grid.shape) + 6 * sum(path.stat().st_size for path in others)
    said, mask = guard.call(
        _drawn,
        first,
        room=room,
        others=[str(path.absolute()) for path in others],
        grid={**asdict(grid), "affine": grid.affine.tolist()},
        names=Naming.of(label_map).to_json(),
    )
    if mask is None or mask.dtype != np.uint8 or mask.shape != grid.shape[::-1]:
        raise Faulty(Reason.UNREADABLE, f"{first.name}: its parser gave a mask of another form")
    return Drawn(mask.T, tuple(map(str, said["unmapped"])), tuple(map(str, said["notes"])))


def _drawn(path: Path, others: list[str], grid: dict[str, Any], names: dict[str, Any]) -> Iterator[Answer]:
    """Job: the mask (slice, row, column: as it lies in memory), with what was unmapped and noted."""
    where = Grid(np.array(grid["affine"]), tuple(grid["shape"]), grid["frame"])
    naming = Naming.from_json(names)
    drawn = read_masks([path, *map(Path, others)], where, naming)
    yield {"unmapped": drawn.unmapped, "notes": drawn.notes}, drawn.mask.T
