"""PNG, JPEG, TIFF and BMP pictures with mask pictures: 2D, rows and columns, stored values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tasks.data.labels import classes
from tasks.data.source import Array, Faulty, LabelMap, Raw, Reason, reading, stored

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


def read_pair(image: Path, mask: Path | None, label_map: LabelMap) -> Raw:
    """A gray (`1HW`) or colour (`3HW`) picture with its mask (`HW`). Alpha is dropped; spacing is 1.

    Raises:
        Faulty: unreadable, mask of other size, label outside the map.
    """
    values = _read(image, palette_as_colour=True)
    channels = values[None] if values.ndim == 2 else np.moveaxis(values, 2, 0)
    target = None
    if mask is not None:
        drawn = _read(mask, palette_as_colour=False)
        if drawn.ndim == 3:
            if not (drawn == drawn[..., :1]).all():
                raise Faulty(Reason.MASK_KIND, f"{mask.name} is in colour; a mask is gray or indexed")
            drawn = drawn[..., 0]
        if drawn.shape != channels.shape[1:]:
            size, other = (f"{s[1]}x{s[0]}" for s in (channels.shape[1:], drawn.shape))
            raise Faulty(Reason.SIZE, f"image {size}, mask {other} (width x height)")
        target = classes(drawn, label_map)
    return Raw(stored(channels), target, np.eye(4), (1.0, 1.0))


def _read(path: Path, *, palette_as_colour: bool) -> Array:
    with reading(path), Image.open(path) as file:
        frames = getattr(file, "n_frames", 1)
        if frames > 1:
            raise Faulty(Reason.SHAPE, f"{path.name} has {frames} frames; one is read")
        picture: Image.Image = file
        mode = file.mode
        if mode == "P" and palette_as_colour:
            picture = picture.convert("RGB")
        elif mode in ("LA", "La"):
            picture = picture.convert("L")
        elif mode not in ("1", "L", "P", "RGB", "F", "I") and not mode.startswith("I;16"):
            picture = picture.convert("RGB")
        values: Array = np.asarray(picture)
        return values.astype(np.uint8) if values.dtype == np.bool_ else values
