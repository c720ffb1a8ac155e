"""Every row of the real DICOM sets' manifests, through the dry run."""

import csv
import io
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import generate_frames

from tasks.data.dryrun import dry_run
from tests.conftest import DATA

OUTCOMES = {
    "image": ("image",),
    "image (lossy: compare with tolerance)": ("image",),
    "read, no pixels: must not enter an image series": ("no_pixels",),
    "readable header, pixels not decodable here: must fail per file, not crash the import": ("undecodable",),
    "accept or reject, but with a clear reason (damaged or missing file header)": (
        "image",
        "no_pixels",
        "unreadable",
    ),
    "reject: not readable as DICOM": ("unreadable",),
}
#: of lossy files: how far (levels) values may lie from another decoder's, worst pixel and on average.
#: Colour goes through two roundings and the up-sampling of chroma, which PS3.5 leaves to the decoder
GRAY, COLOUR = (2, 0.5), (80, 2.0)


def manifest(name: str) -> list[dict[str, str]]:
    path = DATA / name / "manifest.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@cache
def lines(root: Path) -> tuple[dict[str, Any], ...]:
    return tuple(dry_run(root))


def files(root: Path) -> dict[str, dict[str, Any]]:
    return {line["path"]: line for line in lines(root) if "path" in line}


def volumes(root: Path) -> dict[str, list[dict[str, Any]]]:
    found = defaultdict(list)
    for line in lines(root):
        if "series" in line:
            found[line["series"]].append(line)
    return dict(found)


def test_each_file_has_one_line_and_no_row_is_left_out(real: Callable[[str], Path]) -> None:
    root = real("dicom_zoo")
    listed = [line["path"] for line in lines(root) if "path" in line]
    assert sorted(listed) == sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    assert len(ROWS) == 170
    assert {row["file"] for row in ROWS} <= set(listed)
    for line in lines(root):
        if "path" in line:
            assert (line["reason"] == "") == (line["outcome"] == "image")
            assert (line["shape"] is None) == (line["pixel_sha256_16"] is None) == (line["outcome"] != "image")


ROWS = manifest("dicom_zoo")


@pytest.mark.parametrize("row", ROWS or [{}], ids=lambda row: row.get("file", "none"))
def test_zoo(real: Callable[[str], Path], row: dict[str, str]) -> None:
    root = real("dicom_zoo")
    line = files(root)[row["file"]]
    assert line["outcome"] in OUTCOMES[row["expect"]]
    if line["outcome"] != "image":
        return
    assert "x".join(str(n) for n in line["shape"]) == row["decoded"].split()[0]
    if "lossy" not in row["expect"]:
        assert line["pixel_sha256_16"] == row["pixel_sha256_16"]
    elif line["pixel_sha256_16"] != row["pixel_sha256_16"]:
        close_to_pillow(root / row["file"], row)


def close_to_pillow(path: Path, row: dict[str, str]) -> None:
    """Another decoder, libjpeg-turbo, within the tolerance that stands above."""
    ds = pydicom.dcmread(path)
    ours = ds.pixel_array.astype(float)
    count = int(ds.get("NumberOfFrames") or 1)
    theirs = []
    for frame in generate_frames(ds.PixelData, number_of_frames=count):
        picture = Image.open(io.BytesIO(frame))
        if ds.PhotometricInterpretation == "RGB" and ds.SamplesPerPixel == 3:
            picture.draft("RGB", picture.size)
        theirs.append(np.asarray(picture.convert("RGB") if ds.SamplesPerPixel == 3 else picture, dtype=float))
    other = np.stack(theirs) if count > 1 else theirs[0]
    off = np.abs(ours - other)
    worst, mean = COLOUR if ds.SamplesPerPixel == 3 else GRAY
    assert (off.max(), off.mean()) <= (worst, mean), (off.max(), off.mean())
