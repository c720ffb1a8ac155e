"""What an ingest would make of a folder's DICOM, file by file and volume by volume; nothing is kept.

For the engineer's eyes: lines quote paths and series, and stay at the site.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conf.exits import printable
from tasks.data.dicom import File, Series, all_series
from tasks.data.discover import kind
from tasks.data.guard import Answer, Guard, shared
from tasks.data.header import checked, facts_of, opened
from tasks.data.nifti import spacing_of
from tasks.data.pixels import decoded
from tasks.data.series import Part
from tasks.data.source import Faulty, Reason

Line = dict[str, Any]

_NO_PIXELS = {"outcome": "no_pixels", "reason": "it has no pixel data"}


def dry_run(folder: Path, guard: Guard | None = None) -> Iterator[Line]:
    """One line for every file below `folder`, then one for every volume or flat image.

    Files: `path`, `outcome` (image, no_pixels, undecodable, unreadable), `reason`, `shape` and
    `pixel_sha256_16` of pydicom's `pixel_array` (C order, little-endian, before rescale).
    Volumes: `series`, `series_uid`, `volume` (1, 2, … of its series), `files`, `shape` and `spacing` (mm;
    axes x, y, z, or rows, columns where flat), `orientation` (RAS, or empty where flat), `plane`, `units`,
    `reason` where refused.
    """
    guard = guard or shared()
    headers: list[File] = []
    undecodable: dict[Path, str] = {}
    for path in sorted(_files(folder)):
        line = _file(path, guard, headers)
        if line["outcome"] == "undecodable":
            undecodable[path] = line["reason"]
        yield {"path": path.relative_to(folder).as_posix(), **line}
    for series in all_series(folder, headers):
        for number, part in enumerate(series.parts, 1):
            yield _volume(series, number, part, undecodable)


def in_words(line: Line) -> str:
    """A line for people."""
    name = line["path"] if "path" in line else f"{line['series']} volume {line['volume']}"
    size = "" if line["shape"] is None else "x".join(str(n) for n in line["shape"])
    told = (line.get("outcome", "volume"), size, line.get("orientation"), line.get("units"), line["reason"])
    return printable(f"{name}: {', '.join(text for text in told if text)}")


def inspect(path: Path) -> Iterator[Answer]:
    """Job: a header, then shape and hash of the pixels where there are any."""
    ds = opened(path, pixels=True)
    facts = facts_of(ds)
    yield facts, None
    if not facts["has_pixels"]:
        return
    digest, count, shape = hashlib.sha256(), 0, ()
    for pixels, _ in decoded(ds):
        digest.update(np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder("<"), copy=False)).data)
        count, shape = count + 1, pixels.shape
    yield {"shape": [count, *shape] if count > 1 else shape, "sha": digest.hexdigest()[:16]}, None


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names)


def _file(path: Path, guard: Guard, headers: list[File]) -> Line:
    line: Line = {"outcome": "unreadable", "reason": "", "shape": None, "pixel_sha256_16": None}
    try:
        for number, (facts, _) in enumerate(guard.stream(inspect, path, most=2)):
            if number == 0:
                header = checked(path, facts)
                headers.append((path, header))
                line |= _NO_PIXELS if not header.has_pixels else {"outcome": "undecodable"}
            else:
                shape = [int(n) for n in facts["shape"]]
                line |= {"outcome": "image", "shape": shape, "pixel_sha256_16": str(facts["sha"])}
    except Faulty as fault:
        other = kind(path)
        said = "" if other is None else f" (read as {other}: ingest pairs it by its name)"
        return line | {"reason": f"{fault.reason}: {fault.detail}{said}"}
    except (KeyError, TypeError, ValueError):
        return line | {"reason": "its parser gave an answer of another form"}
    return line


def _volume(series: Series, number: int, part: Part, undecodable: dict[Path, str]) -> Line:
    first = part.images[0]
    paths = sorted({image.path for image in part.images})
    lost = next((undecodable[p] for p in paths if p in undecodable), None)
    line: Line = {
        "series": series.name,
        "series_uid": series.uid,
        "volume": number,
        "files": len(paths),
        "shape": None,
        "spacing": None,
        "orientation": None,
        "plane": None,
        "units": None,
        "reason": lost if part.fault is None else str(part.fault),
    }
    if line["reason"] is not None:
        return line
    if doubt := next((image.header.doubt for image in part.images if image.header.doubt), ""):
        line["reason"] = f"{Reason.BURNED_IN}: {doubt}"  # its shape stands beside it: review may release it
    if part.volume is None:
        shape, spacing = (first.header.rows, first.header.columns), first.plane.spacing or (1.0, 1.0)
        return line | {"shape": shape, "spacing": spacing, "orientation": "", "units": first.header.units}
    try:
        spacing_mm = spacing_of(part.volume.ras)
    except Faulty as fault:
        return line | {"reason": str(fault)}
    return line | {
        "shape": part.volume.ras_shape,
        "spacing": [round(s, 6) for s in spacing_mm],
        "orientation": "RAS",
        "plane": part.volume.plane,
        "units": part.volume.units,
    }
