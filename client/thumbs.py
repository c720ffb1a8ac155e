"""Small pictures of cached cases with their masks, the way a radiographer looks at them.

Volumes are in RAS+ order (x to the patient's right, y to the front, z to the head). Radiological
convention: the patient's right is on the left of the picture, the front above in axial slices, the head
above in coronal and sagittal ones, and the front on the left of a sagittal slice.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open

from tasks.data.cache import IMAGE, MASK

Array = NDArray[Any]

SIDE = 220  # pixels of the longer side
#: by class, the colour-blind-safe palette of Okabe and Ito (2008)
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167))
_FILL, _LINE = 0.25, 1.0
#: name, axis looked along, axes that run across and down, letters left, right, above, below
_VIEWS = (
    ("axial", 2, 0, 1, "RLAP"),
    ("coronal", 1, 0, 2, "RLSI"),
    ("sagittal", 0, 1, 2, "APSI"),
)


@dataclass(frozen=True)
class Thumb:
    """One picture. `letters`: which side of the patient is left, right, above, below; empty in 2D."""

    view: str
    png: bytes
    letters: str
    width: int
    height: int


def colour(number: int) -> tuple[int, int, int]:
    """The colour of a class."""
    return COLOURS[(number - 1) % len(COLOURS)]


def thumbs(path: Path, look: Sequence[int], window: tuple[float, float]) -> Iterator[Thumb]:
    """Pictures of a cached case: three planes of a volume, or the picture itself.

    Args:
        path: the object. look: per spatial axis, the index to show. window: values shown black and white.

    Raises:
        OSError, SafetensorError: the object is missing or cut off.
    """
    with safe_open(path, framework="np") as file:
        names = set(file.keys())
        if IMAGE not in names:
            return
        spacing = json.loads(file.metadata()["case"])["spacing"]
        image = file.get_slice(IMAGE)
        mask = file.get_slice(MASK) if MASK in names else None
        if len(image.get_shape()) == 3:
            values = image[:3] if image.get_shape()[0] >= 3 else image[:1]
            yield _picture(
                "", np.moveaxis(values, 0, -1), None if mask is None else mask[:], spacing, window, ""
            )
            return
        for view, along, across, down, letters in _VIEWS:
            at: list[slice | int] = [slice(None)] * 3
            at[along] = int(look[along])
            cut = image[(slice(0, 1), *at)][0].T[::-1, ::-1]
            drawn = None if mask is None else mask[tuple(at)].T[::-1, ::-1]
            yield _picture(view, cut[..., None], drawn, (spacing[down], spacing[across]), window, letters)


def _picture(
    view: str,
    values: Array,
    mask: Array | None,
    spacing: Sequence[float],
    window: tuple[float, float],
    letters: str,
) -> Thumb:
    """Rows and columns of one or three channels, scaled so that a millimetre is as long down as across."""
    low, high = window
    gray = np.clip((values.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1) * 255
    if gray.shape[-1] == 1:
        gray = np.repeat(gray, 3, axis=-1)
    tall, wide = (n * s for n, s in zip(values.shape[:2], spacing, strict=True))
    scale = SIDE / max(tall, wide)
    size = max(1, round(wide * scale)), max(1, round(tall * scale))
    shown = np.array(Image.fromarray(gray.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR))
    if mask is not None:
        _overlay(shown, np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)))
    out = io.BytesIO()
    Image.fromarray(shown).save(out, "PNG", optimize=True)
    return Thumb(view, out.getvalue(), letters, *size)


def _overlay(shown: Array, mask: Array) -> None:
    for number in np.unique(mask[mask > 0]).tolist():
        inside = mask == number
        edge = inside & ~_eroded(inside)
        for where, share in ((inside, _FILL), (edge, _LINE)):
            shown[where] = (shown[where] * (1 - share) + np.array(colour(number)) * share).astype(np.uint8)


def _eroded(inside: Array) -> Array:
    wide = np.pad(inside, 1)
    out: Array = wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return out
