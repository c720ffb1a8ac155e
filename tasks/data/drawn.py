"""Masks that DICOM objects draw on an assembled volume: which reader, and how several become one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pydicom

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
