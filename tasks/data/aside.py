"""NIfTI files and pictures, read in a guarded worker: a small file may unpack to more than memory holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.data import images, nifti
from tasks.data.guard import Answer, shared
from tasks.data.source import Faulty, LabelMap, Naming, Raw, Reason

if TYPE_CHECKING:
    from conf.schema import Columns

_PACKED = 40  # bytes that a byte of a gzipped volume may become, its copies and scaling included
_PICTURE = 512 << 20  # a packed picture does not say what it becomes: 60 megapixels and their copies


def read_aside(kind: str, image: Path, mask: Path | None, columns: Columns, label_map: LabelMap) -> Raw:
    """`nifti.read_pair` or `images.read_pair`, elsewhere.

    Args:
        kind: `nifti` or `image`. columns: of them `pages` and `colour`, as `images.read_pair`.

    Raises:
        Faulty: as they do; (`LIMIT`) the files want more memory or time than they may.
    """
    sizes = [_size(path) for path in (image, mask) if path is not None]
    given = {
        "kind": kind,
        "mask": mask and str(mask.absolute()),
        "pages": columns.pages,
        "colour": columns.colour,
    }
    names = Naming.of(label_map).to_json()
    room = _PACKED * sum(sizes) if kind == "nifti" else _PICTURE
    answers = list(shared().stream(_pair, image, most=2, room=room, names=names, **given))
    try:
        (said, values), *more = answers
        drawn = more[0][1] if more else None
        if values is None or (mask is None) != (drawn is None):
            raise ValueError
        if drawn is not None and (drawn.dtype != np.uint8 or drawn.shape != values.shape[1:]):
            raise ValueError
        raw = Raw(
            values, drawn, np.array(said["affine"], dtype=np.float64), tuple(map(float, said["spacing"]))
        )
        return replace(raw, unmapped=tuple(map(str, said["unmapped"])), notes=tuple(map(str, said["notes"])))
    except (ValueError, KeyError, TypeError):
        raise Faulty(Reason.UNREADABLE, f"{image.name}: its parser gave an answer of another form") from None


def _pair(
    path: Path, kind: str, mask: str | None, pages: str, colour: str, names: dict[str, Any]
) -> Iterator[Answer]:
    """Job: the image with what is known of it, then the mask where there is one."""
    other, naming = None if mask is None else Path(mask), Naming.from_json(names)
    if kind == "nifti":
        raw = nifti.read_pair(path, other, naming)
    else:
        raw = images.read_pair(path, other, naming, pages=pages, colour=colour)
    said = {"affine": raw.affine.tolist(), "spacing": list(raw.spacing)}
    yield {**said, "unmapped": list(raw.unmapped), "notes": list(raw.notes)}, raw.image
    if raw.mask is not None:
        yield {}, raw.mask


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # the guard says so
        return 0
