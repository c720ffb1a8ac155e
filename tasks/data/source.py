"""What every reader of files agrees on: what it hands over, and why a case can be refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LabelMap = Mapping[int, int] | Literal["nonzero"] | None


class Reason(StrEnum):
    """Why a case is refused: the fixed vocabulary of ingest."""

    UNREADABLE = "unreadable"
    NO_MASK = "image without mask"
    NO_IMAGE = "mask without image"
    SIZE = "mask of other size"
    GEOMETRY = "mismatched geometry"
    LABEL = "label outside the map"
    SHAPE = "unsupported shape"
    NOT_FINITE = "value that is not finite"
    SEVERAL_MASKS = "several masks"
    SEVERAL_FILES = "several files of one name"
    DUPLICATE = "same content as another case"
    NO_PATIENT = "no patient"
    SPLIT = "unknown split"
    NO_POSITION = "no slice position"
    SLICES = "too few slices"
    UNEVEN = "uneven slices"
    TILT = "gantry tilt"
    ORIENTATION = "mixed orientation"
    MIXED = "mixed slices"
    REPEATED = "repeated slice positions"
    MASK_KIND = "unsupported mask"
    BURNED_IN = "pixels to be reviewed"
    OBJECT = "unsupported kind of object"
    EXISTS = "already there"


class Faulty(ValueError):
    """One case cannot be used. `detail` may quote the file: it stays at the site."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = " ".join(detail.split())


@dataclass(frozen=True)
class Raw:
    """One case as its files hold it.

    Attributes:
        image: `CHW[D]`; None where a case is a row of a table alone. mask: `HW[D]` uint8 classes.
        affine: 4x4, array index to RAS+ mm. spacing: mm, in array order. groups: coded columns.
        labels: class or value by name. table: clinical columns by name; what is missing is absent.
        units: `HU`, `SUVbw`, or empty: values as stored.
    """

    image: Array | None
    mask: Array | None
    affine: Array
    spacing: tuple[float, ...]
    groups: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, float] = field(default_factory=dict)
    table: Mapping[str, float] = field(default_factory=dict)
    units: str = ""


@dataclass(frozen=True)
class Found:
    """A case that discovery found: what is known before pixels are read.

    Attributes:
        source: path below the root, local only. patient: as the file or manifest names the person.
        files: all that is read, so that a change is seen. read: opens them; raises `Faulty`.
        fault: why it is refused already.
    """

    source: str
    patient: str
    files: tuple[Path, ...]
    read: Callable[[LabelMap], Raw] | None = None
    site: str | None = None
    split: str | None = None
    fault: Faulty | None = None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a file makes its reader raise into `Faulty`."""
    try:
        yield
    except Faulty:
        raise
    except Exception as error:  # a broken file makes format readers raise nearly anything
        raise Faulty(Reason.UNREADABLE, f"{path.name}: {type(error).__name__}: {error}") from error


def finite_float32(image: Array) -> Array:
    """`image` as float32.

    Raises:
        Faulty: NaN, infinity, or a value beyond float32.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        out = np.ascontiguousarray(image, dtype=np.float32)
    if not np.isfinite(out).all():
        bad = int(out.size - np.isfinite(out).sum())
        raise Faulty(Reason.NOT_FINITE, f"{bad} of {out.size} image values are NaN or infinite")
    return out


def stored(image: Array) -> Array:
    """`image` in the smallest of uint8, int16 and float32 that a case's float32 can be got from.

    Raises:
        Faulty: NaN, infinity, or a value beyond float32.
    """
    if image.dtype.kind in "iub":
        low, high = (int(image.min()), int(image.max())) if image.size else (0, 0)
        for small in (np.uint8, np.int16):
            if np.iinfo(small).min <= low and high <= np.iinfo(small).max:
                return np.ascontiguousarray(image, dtype=small)
    return finite_float32(image)
