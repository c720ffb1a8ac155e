"""PNG, JPEG, TIFF and BMP pictures with mask pictures: rows and columns, stored values.

A picture whose EXIF tag says that the camera was turned is turned upright, image and mask each by its own
tag: what a viewer shows is what was annotated.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tasks.data.labels import mapped
from tasks.data.source import Array, Faulty, LabelMap, Raw, Reason, reading, stored

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

_ORIENTATION = 0x0112  # EXIF
_BITS_PER_SAMPLE = 258  # TIFF 6.0
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_STORED = ("1", "L", "P", "RGB", "F", "I")


def read_pair(
    image: Path, mask: Path | None, label_map: LabelMap, *, pages: str = "refuse", colour: str = "keep"
) -> Raw:
    """A gray (`1HW`) or colour (`3HW`) picture with its mask (`HW`). Alpha is dropped; spacing is 1.

    Args:
        pages: `volume` stacks a TIFF of several pages to `HWD`, rows, columns, pages. Which way they lie
            in the patient is not said.
        colour: `gray` makes colour one channel, `rgb` makes gray three equal ones, `keep` neither.

    Raises:
        Faulty: unreadable, mask of other size, label outside the map.
    """
    volume = pages == "volume"
    values, turned = _read(image, volume=volume, palette_as_colour=True)
    coloured = values.ndim == 3 + volume
    channels = _coloured(np.moveaxis(values, 2, 0) if coloured else values[None], colour)
    drawn = None if mask is None else _drawn(mask, channels.shape[1:], volume=volume)
    target, unmapped = (None, ()) if drawn is None else mapped(drawn, label_map)
    axes = channels.ndim - 1
    notes = ("a picture was turned upright by its EXIF tag",) if turned else ()
    return Raw(stored(channels), target, np.eye(4), (1.0,) * axes, unmapped=unmapped, notes=notes)


def _coloured(channels: Array, colour: str) -> Array:
    """`CHW[D]` with the channels asked for."""
    if colour == "rgb" and len(channels) == 1:
        return np.repeat(channels, 3, axis=0)
    if colour == "gray" and len(channels) == 3:
        luma = np.tensordot(_LUMA, channels.astype(np.float64), axes=1)
        gray: Array = np.rint(luma)[None].astype(channels.dtype)
        return gray
    return channels


def _drawn(mask: Path, size: tuple[int, ...], *, volume: bool) -> Array:
    values, _ = _read(mask, volume=volume, palette_as_colour=False)
    if values.ndim == 3 + volume:
        if not (values == values[:, :, :1]).all():
            raise Faulty(Reason.MASK_KIND, f"{mask.name} is in colour; a mask is gray or indexed")
        values = values[:, :, 0]
    if values.shape != size:
        one, other = ("x".join(str(n) for n in (s[1], s[0], *s[2:])) for s in (size, values.shape))
        raise Faulty(Reason.SIZE, f"image {one}, mask {other} (width x height)")
    return values


def _read(path: Path, *, volume: bool, palette_as_colour: bool) -> tuple[Array, bool]:
    """`HW`, or `HWC` in colour, and `D` at the end for a volume; and whether the picture was turned."""
    # by handle: Pillow 13 maps a raw TIFF it knows by name, and then reads a turned one in the wrong shape
    with reading(path), path.open("rb") as handle, Image.open(handle) as file:
        frames = getattr(file, "n_frames", 1)
        if frames > 1 and not volume:
            raise Faulty(
                Reason.SHAPE,
                f"{path.name} has {frames} frames; one is read (a stack: data.columns.pages=volume)",
            )
        _check_depth(path, file)
        turned = file.getexif().get(_ORIENTATION, 1) not in (0, 1)
        if not volume:
            return _values(file, palette_as_colour), turned
        planes = []
        for page in range(frames):
            file.seek(page)
            planes.append(_values(file, palette_as_colour))
            if planes[-1].shape != planes[0].shape:
                raise Faulty(
                    Reason.SHAPE, f"page {page + 1} of {path.name} is of another size than the first"
                )
        return np.stack(planes, axis=-1), turned


def _check_depth(path: Path, file: Image.Image) -> None:
    """Refuse colours of 16 bits: the decoder would halve them without a word."""
    raw = " ".join(str(tile[3]) for tile in getattr(file, "tile", ()))
    bits = getattr(file, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,))
    if file.mode in ("RGB", "RGBA") and (";16" in raw or max(bits) > 8):
        raise Faulty(Reason.SHAPE, f"{path.name} has 16 bits per colour; 8 are read (gray: 16)")


def _values(file: Image.Image, palette_as_colour: bool) -> Array:
    picture = ImageOps.exif_transpose(file)
    mode = picture.mode
    if mode == "P" and palette_as_colour:
        picture = picture.convert("RGB")
    elif mode in ("LA", "La", "PA"):
        picture = picture.convert("L" if mode != "PA" else "RGB")
    elif mode not in _STORED and not mode.startswith("I;16"):
        picture = picture.convert("RGB")
    values: Array = np.asarray(picture)
    return values.astype(np.uint8) if values.dtype == np.bool_ else values
