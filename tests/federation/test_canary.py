"""A simulation on patients whose headers are full of markers: no byte that it leaves behind holds one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pydicom
import pytest
from pydicom._dicom_dict import DicomDictionary
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset, FileDataset

from tasks.data.phantom import make_phantom
from tasks.data.phantom_files import MIXED
from tasks.data.source import quietly
from tests.canary import Canary, annex_e, dictionary, files

pytestmark = [pytest.mark.federation, pytest.mark.filterwarnings("ignore")]

ANNEX_E = [tag for tag in annex_e() if tag in DicomDictionary and tag >> 16 > 2]
ROOT = Path(__file__).parents[2]
SMALL = [
    *("+experiment=demo", "task.patch=[16,16,8]", "model.channels=[4,8]", "local.steps=1"),
    *("federation.rounds=1", "federation.evaluate_every=1", "baselines=[trivial]"),
]
#: identify, and are there already; other attributes that are there make the image what it is
TEXT = (
    *("PatientName", "PatientBirthDate", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
    *("StudyDate", "SeriesDate", "ContentDate", "StudyTime", "SeriesTime", "SegmentLabel", "ROIName"),
)


def plants(like: FileDataset, canary: Canary, tags: list[int]) -> Dataset:
    """A marker in every one of `tags` that a file does not have already, and in those that identify."""
    out = Dataset()
    pixels = (0x0028, 0x0062, 0x5200, 0x7FE0)  # how they are to be read, and where they are
    canary.plant(out, [t for t in tags if t not in like and t >> 16 not in pixels and keyword_for_tag(t)])
    for name in TEXT:
        if name in like:
            setattr(out, name, canary.value(like[name].VR))
    out.PatientID = canary.text()
    return out


def hide(ds: FileDataset, canary: Canary) -> None:
    """Plant three deep in sequences, in labels, and outside the dictionary."""
    inner = Dataset()
    canary.plant(inner, ANNEX_E)
    for name in ("RequestAttributesSequence", "ReferencedImageEvidenceSequence", "ContentSequence"):
        level = Dataset()
        level.PatientName = canary.text()
        setattr(level, name, [inner])
        inner = level
    ds.RequestAttributesSequence = [inner]
    for item in (*ds.get("SegmentSequence", ()), *ds.get("StructureSetROISequence", ())):
        item.walk(lambda _, e: setattr(e, "value", canary.text()) if e.keyword in TEXT else None)
    canary.around(ds)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """A data root full of markers (in names of folders too), and all of them with every UID."""
    made = tmp_path_factory.mktemp("made")
    make_phantom(made, hospitals=2, patients=3, size=32, forms=(MIXED[1], MIXED[2]))
    root = tmp_path_factory.mktemp("root")
    markers: set[bytes] = set()
    with quietly():
        for number, folder in enumerate(sorted(made.glob("*/*"))):
            canary = Canary(f"CNRY{number:02}")
            paths = sorted(folder.rglob("*.dcm"))
            tags = ANNEX_E if number else sorted({*ANNEX_E, *dictionary()})
            # one patient's files hold equal markers, or a series would fall apart into many
            planted = plants(pydicom.dcmread(paths[0]), canary, tags)
            for path in paths:
                ds = pydicom.dcmread(path)
                uids = (ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID)
                markers.update(uid.encode() for uid in uids)
                for element in planted:
                    if element.tag not in ds or element.keyword in (*TEXT, "PatientID"):
                        ds.add(element)
                if path.stem in ("001", "seg", "rtstruct"):
                    hide(ds, canary)
                target = root / folder.parent.name / f"PATH{number:02}CNRY" / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                ds.save_as(target, enforce_file_format=True)
            markers.update(canary.markers)
    return root, sorted(markers)


def left(path: Path, markers: list[bytes]) -> list[bytes]:
    canary = Canary(markers=markers)
    return canary.found(path.read_bytes()) + canary.found(path.name.encode())


def test_a_run_and_its_cache_hold_no_marker(planted: tuple[Path, list[bytes]], ram: Path) -> None:
    root, markers = planted
    assert len(markers) > 438
    places = [f"data.root={root}", f"data.cache={ram / 'cache'}", f"run.dir={ram / 'run'}"]
    command = [sys.executable, "-c", "from server.cli import main; main()", "simulate", *places, *SMALL]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "HOME": str(ram / "home")}, capture_output=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for said in (done.stdout, done.stderr):
        assert Canary(markers=markers).found(said) == []
        assert b"PATH" not in said
    run = list(files(ram / "run"))
    assert {path.name for path in run} >= {"plan.json", "metrics.jsonl", "model.safetensors"}
    objects = list(files(ram / "cache" / "objects"))
    assert len(objects) == 8
    for path in files(ram):
        assert left(path, markers) == [], path
        if path.name != "index.json":  # names of files, for this site's own eyes
            assert b"PATH" not in path.read_bytes(), path
