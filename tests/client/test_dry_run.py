"""`wardround-site ingest --dry-run`, as a user types it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.cli import app
from conf.exits import Stop

RUN = CliRunner()


def test_every_line_is_an_object_and_nothing_is_kept(real: Callable[[str], Path]) -> None:
    root = real("dicom_zoo") / "seg_with_series"
    before = sorted(root.iterdir())
    done = RUN.invoke(app, ["ingest", "--dry-run", "--json", str(root)])
    assert done.exit_code == 0
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["path"]: line["outcome"] for line in lines if "path" in line} == {
        **dict.fromkeys(("01.dcm", "02.dcm", "03.dcm", "liver.dcm", "partial_overlaps.dcm"), "image"),
        "liver_seg.nrrd": "unreadable",
    }
    (volume,) = (line for line in lines if "series" in line)
    assert (volume["shape"], volume["orientation"], volume["units"]) == ([512, 512, 3], "RAS", "HU")
    assert sorted(root.iterdir()) == before


def test_for_people(real: Callable[[str], Path]) -> None:
    done = RUN.invoke(app, ["ingest", "--dry-run", str(real("dicom_series") / "ct_ge_hispeed_tilt")])
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == "01.dcm: image, 512x512"
    assert done.stdout.splitlines()[-1].startswith("01.dcm volume 1: volume, gantry tilt: slices drift by")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json", "."], "give --dry-run with it"),
        (["--dry-run", "nowhere"], "data root nowhere is not a folder"),
    ],
)
def test_wrong_use_is_named(words: list[str], message: str) -> None:
    done = RUN.invoke(app, ["ingest", *words])
    assert isinstance(done.exception, Stop)
    assert message in str(done.exception)
