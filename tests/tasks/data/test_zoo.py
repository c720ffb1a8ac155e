"""Every row of the real DICOM sets' manifests, through the dry run."""

import csv
import hashlib
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

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
#: of a lossy file whose hash differs: levels (of 256) by which decoders may differ, at worst and on average
GRAY, COLOUR = (1, 0.05), (3, 0.2)


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
            assert (
                (line["shape"] is None) == (line["pixel_sha256_16"] is None) == (line["outcome"] != "image")
            )


ROWS = manifest("dicom_zoo")


@pytest.mark.filterwarnings("ignore::UserWarning")  # odd headers
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
        close_to_pillow(root / row["file"], row["pixel_sha256_16"])


def close_to_pillow(path: Path, sha: str) -> None:
    """The manifest's decoder there was libjpeg-turbo: ours is near it."""
    ds = pydicom.dcmread(path)
    ours = ds.pixel_array
    ds.pixel_array_options(decoding_plugin="pillow")
    theirs = ds.pixel_array
    assert hashlib.sha256(theirs.tobytes()).hexdigest()[:16] == sha
    off = np.abs(ours.astype(float) - theirs)
    worst, mean = COLOUR if ds.SamplesPerPixel == 3 else GRAY
    assert off.max() <= worst
    assert off.mean() <= mean


SERIES = {row["series"]: row for row in manifest("dicom_series")}
#: volumes of each series as its note says, or the reason why it is none; units
NOTED: dict[str, tuple[int | str, str]] = {
    "ct_ge_hispeed_tilt": ("gantry tilt", ""),
    "mr_siemens_espree_t1post": (1, ""),
    "mr_philips_achieva_epi": (3, ""),
    "mr_ge_mr750_epi_multivolume": (3, ""),
    "pt_ge_petctac": (1, "SUVbw"),
    "ct_ge_petct_lowdose": (1, "HU"),
}


@pytest.mark.parametrize("name", SERIES or ["none"])
def test_series(real: Callable[[str], Path], name: str) -> None:
    root = real("dicom_series")
    row, (expected, units) = SERIES[name], NOTED[name]
    in_folder = [line for path, line in files(root).items() if path.startswith(f"{name}/")]
    assert len(in_folder) == int(row["files"])
    found = volumes(root)[name]
    if isinstance(expected, str):
        assert [v["reason"].split(":")[0] for v in found] == [expected]
        assert found[0]["shape"] is None
        return
    assert [v["volume"] for v in found] == list(range(1, expected + 1))
    for volume in found:
        assert volume["reason"] is None
        assert sorted(volume["shape"]) == sorted(
            int(row[n]) for n in ("columns", "rows", "distinct_positions")
        )
        assert (volume["orientation"], volume["units"]) == ("RAS", units)
        slices = [pydicom.dcmread(p, stop_before_pixels=True) for p in sorted((root / name).iterdir())]
        first = next(s for s in slices if "PixelSpacing" in s)
        assert volume["spacing"][:2] == pytest.approx([float(s) for s in first.PixelSpacing], abs=1e-5)


STS = {row["series"]: row for row in manifest("sts_rtstruct")}


@pytest.mark.parametrize("name", STS or ["none"])
def test_sts(real: Callable[[str], Path], name: str) -> None:
    root, row = real("sts_rtstruct"), STS[name]
    assert files(root)[row["rtstruct"]]["outcome"] == "no_pixels"
    assert files(root)[row["truth_mask"]]["outcome"] == "unreadable"
    (volume,) = volumes(root)[name]
    assert volume["reason"] is None
    assert tuple(volume["shape"]) == tuple(int(row[n]) for n in ("columns", "rows", "slices"))
    assert volume["units"] == {"CT": "HU", "PET": "SUVbw", "MR_T1": ""}[row["modality"]]


def test_every_row_of_every_manifest_has_a_test() -> None:
    assert set(SERIES) == set(NOTED) or not SERIES
    assert len(STS) in (0, 7)


def test_one_decoders_lossless_variants_of_an_image_are_equal(real: Callable[[str], Path]) -> None:
    root = real("dicom_zoo")
    same = [
        line["pixel_sha256_16"] for path, line in files(root).items() if path.startswith("transfer_syntax_ct")
    ]
    assert same.count("1bee432808f49770") == 8
