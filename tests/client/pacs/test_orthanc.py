"""A real archive on loopback: what comes is what was sent, once, whatever happens in between."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest

from client.pacs.pull import pull
from client.pacs.settings import Pacs
from conf.exits import Exit, Stop
from tests.client.pacs.orthanc import Orthanc

pytestmark = pytest.mark.federation

ALL = ("Modality=CT,MR,PT,RWV",)
WAYS: dict[str, Callable[..., Pacs]] = {
    "web": lambda archive, **more: archive.web(**more),
    "get": lambda archive, **more: archive.dimse("get", **more),
    "move": lambda archive, **more: archive.dimse("move", **more),
}


def pixels(files: list[Path]) -> dict[str, str]:
    """SHA-256 of stored values by SOP instance."""
    read = (pydicom.dcmread(file) for file in files)
    return {d.SOPInstanceUID: hashlib.sha256(d.get("PixelData", b"")).hexdigest() for d in read}


@pytest.mark.parametrize("way", WAYS)
def test_what_comes_is_what_was_sent_and_comes_once(
    way: str, archive: Orthanc, real: Callable[[str], Path], ram: Path
) -> None:
    source = WAYS[way](archive, query=ALL)
    told: list[tuple[int, int]] = []
    pulled = pull(source, ram / "pacs", lambda done, known: told.append((done, known)))
    files = [
        *real("dicom_series").rglob("*.dcm"),
        *(real("sts_rtstruct") / "STS_003" / "MR_T1" / "image").rglob("*.dcm"),
    ]
    here = sorted((ram / "pacs").rglob("*.dcm"))
    assert pixels(here) == pixels(files)
    assert (pulled.found, pulled.fetched, pulled.here, pulled.missing) == (len(here), len(here), 0, [])
    assert told[-1] == (len(here), len(here))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {
        stat.S_IMODE(p.stat().st_mode) & 0o077 for p in (ram / "pacs").rglob("*") if p.name != ".lock"
    } == {0}
    times = {p: p.stat().st_mtime_ns for p in here}
    again = pull(source, ram / "pacs")
    assert (again.fetched, again.here) == (0, len(here))
    assert times == {p: p.stat().st_mtime_ns for p in here}


@pytest.mark.parametrize("way", WAYS)
def test_only_what_is_asked_for(way: str, archive: Orthanc, ram: Path) -> None:
    pulled = pull(WAYS[way](archive, query=("Modality=PT",)), ram / "pacs")
    assert pulled.found == 10
    assert {pydicom.dcmread(p).Modality for p in (ram / "pacs").rglob("*.dcm")} == {"PT"}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_matches(way: str, archive: Orthanc, ram: Path) -> None:
    with pytest.raises(Stop, match="nothing that matches Modality=XA") as stop:
        pull(WAYS[way](archive, query=("Modality=XA",)), ram / "pacs")
    assert stop.value.exit == Exit.PACS_EMPTY
