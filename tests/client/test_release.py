"""The engineer at the command line: doubtful pixels are held back, released, taken; files leave nameless."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from typer.testing import CliRunner

from client.cli import app
from conf.exits import Exit
from tasks.data.cache import Cache
from tasks.data.phantom import make_phantom


def site(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return int(getattr(result.exception, "exit", Exit.INTERNAL)), str(result.exception)
    return result.exit_code, result.output


@pytest.fixture
def home(ram: Path) -> Path:
    """A site with one patient's series, whose scanner says that text is burned in."""
    make_phantom(ram / "data", hospitals=1, patients=2, size=16)
    for path in (ram / "data" / "hospital_a" / "02" / "1").glob("[0-9]*.dcm"):
        ds = pydicom.dcmread(path)
        ds.BurnedInAnnotation = "YES"
        ds.save_as(path)
    assert site("init", ram / "site", "--name", "here", "--data", ram / "data")[0] == Exit.OK
    return ram / "site"


def test_what_is_doubtful_waits_until_it_is_released(home: Path) -> None:
    file = ("--site-file", home / "site.yaml")
    code, said = site("ingest", *file)
    assert code == Exit.PARTLY
    assert "pixels to be reviewed" in said
    assert "BurnedInAnnotation (0028,0301) is not NO" in " ".join(said.split())
    assert len(Cache(home / "cache").entries) == 1
    doubtful = home.parent / "data" / "hospital_a" / "02" / "1"
    code, said = site("release", doubtful, *file)
    assert (code, said.split()[0]) == (Exit.OK, str(len(list(doubtful.iterdir()))))
    assert site("release", doubtful, *file)[1].startswith("0 files released now")
    code, said = site("ingest", *file)
    assert (code, len(Cache(home / "cache").entries)) == (Exit.OK, 2), said
    assert "1 read now" in said
    events = [json.loads(line) for line in (home / "audit.jsonl").read_text().splitlines()]
    assert sum(e["event"] == "release" for e in events) == len(list(doubtful.iterdir()))
    assert site("audit", *file)[0] == Exit.OK
    (home / "state" / "released").unlink()  # somebody thinks better of it
    assert site("ingest", *file)[0] == Exit.PARTLY
    assert len(Cache(home / "cache").entries) == 1
    (home / "state" / "released").write_text("all of them\n")
    code, said = site("ingest", *file)
    assert code == Exit.CONFIG
    assert "no SHA-256" in said


def test_files_leave_without_names_and_are_read_as_the_same_case(home: Path, ram: Path) -> None:
    file = ("--site-file", home / "site.yaml")
    source, out = ram / "data", ram / "out"
    held = len(list((source / "hospital_a" / "02" / "1").glob("[0-9]*.dcm")))
    whole = len(list(source.rglob("*.dcm")))
    code, said = site("export-deid", source, out, *file)
    assert code == Exit.PARTLY
    assert said.count("pixels to be reviewed") == held
    assert said.splitlines()[-1] == f"{whole - held} files in {out}, {held} refused"
    for path in out.rglob("*.dcm"):
        assert b"PHANTOM" not in path.read_bytes()
    site("ingest", *file)
    (before,) = Cache(home / "cache").entries
    code, said = site("ingest", out, "--cache", ram / "again" / "cache")
    (after,) = Cache(ram / "again" / "cache").entries  # the other SEG has lost its series
    one, other = Cache(home / "cache").load(before), Cache(ram / "again" / "cache").load(after)
    assert np.array_equal(one.images["image"], other.images["image"])
    assert np.array_equal(one.masks["mask"], other.masks["mask"])
    assert np.allclose(one.affine, other.affine)
    assert one.groups == other.groups
    code, said = site("export-deid", source, out, *file)
    assert said.count("already there") == whole - held
    assert code == Exit.NO_CASES
    events = [json.loads(line) for line in (home / "audit.jsonl").read_text().splitlines()]
    assert [(e["event"], e.get("files")) for e in events[1:]] == [
        ("export-deid", None), ("exported", whole - held), ("export-deid", None), ("exported", 0),
    ]  # fmt: skip


def test_wrong_folders_and_keys_are_refused(home: Path, ram: Path) -> None:
    file = ("--site-file", home / "site.yaml")
    source = ram / "data"
    for words, wanted, text in (
        (("export-deid", source, source / "out", *file), Exit.CONFIG, "lies in the source"),
        (("export-deid", ram / "none", ram / "out", *file), Exit.NO_DATA_ROOT, "is not a folder"),
        (("export-deid", source, ram / "out", "--key-file", ram / "none"), Exit.CONFIG, "does not exist"),
        (("release", ram / "none", *file), Exit.CONFIG, "nothing was released"),
    ):
        code, said = site(*words)
        assert (code, text in said) == (wanted, True), said
    assert not (ram / "out").exists()


def test_a_forgotten_patient_is_not_exported(home: Path, ram: Path) -> None:
    file = ("--site-file", home / "site.yaml")
    site("ingest", *file)
    (entry,) = Cache(home / "cache").entries
    assert site("forget", entry.patient, *file)[0] == Exit.OK
    code, said = site("export-deid", ram / "data" / "hospital_a" / "01", ram / "out", *file)
    assert (code, "forgotten patient" in said) == (Exit.NO_CASES, True)
