"""What the engineer types in a site's folder, before anything is federated."""

import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from client.cli import app
from client.sitefile import SiteFile
from conf.console import code
from conf.exits import Exit, Stop
from tasks.data.cache import Cache


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def pictures(root: Path, count: int = 3, first: int = 0) -> None:
    for i in range(first, first + count):
        for name, high in (("image", 256), ("label", 2)):
            values = np.random.default_rng(i).integers(0, high, (6, 5)).astype(np.uint8)
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / name / f"{i}.png")


@pytest.fixture
def home(ram: Path) -> Path:
    assert code(app, ["init", str(ram / "north"), "--name", "north"]) == Exit.OK
    pictures(ram / "north" / "data")
    return ram / "north"


def test_a_new_site_is_for_its_owner_only(home: Path) -> None:
    assert {p.name: mode(p) for p in home.iterdir()} == {
        "site.yaml": 0o600, "audit.jsonl": 0o600, "audit.head": 0o600,
        **dict.fromkeys(("cache", "state", "run", "data"), 0o700),
    }  # fmt: skip
    assert mode(home) == 0o700
    assert mode(home / "state" / "patient.key") == 0o600
    file = SiteFile.read(home / "site.yaml")
    assert (file.name, file.data.root, file.cache) == ("north", home / "data", home / "cache")


def test_nothing_is_overwritten_and_a_broken_off_init_is_completed(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, text = (home / "state" / "patient.key").read_bytes(), (home / "site.yaml").read_text()
    assert code(app, ["init", str(home), "--name", "other"]) == Exit.CONFIG
    assert "site.yaml exists; nothing was changed" in capsys.readouterr().err
    assert (home / "site.yaml").read_text() == text
    (home / "site.yaml").unlink()  # it is written last
    assert code(app, ["init", str(home), "--name", "north"]) == Exit.OK
    assert (home / "state" / "patient.key").read_bytes() == key


def test_a_place_that_is_no_folder(ram: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (ram / "x").write_text("a file")
    assert code(app, ["init", str(ram / "x"), "--name", "north"]) == Exit.CONFIG
    assert "cannot be made a site's folder: " in capsys.readouterr().err
    assert (ram / "x").read_text() == "a file"


@pytest.mark.parametrize("name", ["", "a b", "a/b", "-x", "x" * 65, "ä"])
def test_names_that_are_none(ram: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert code(app, ["init", str(ram / "x"), f"--name={name}"]) == Exit.CONFIG
    assert "accepted are letters" in capsys.readouterr().err
    assert not (ram / "x").exists()


def test_every_commented_setting_is_one(home: Path) -> None:
    text = (home / "site.yaml").read_text()
    loose = re.sub(r"^( *)# (?=( *[a-z_]+:))", r"\1", text, flags=re.M)
    without = re.sub(r"^ +label_map:.*\n", "", loose, flags=re.M)  # it excludes labels
    (home / "site.yaml").write_text(without)
    assert len(yaml.safe_load(without)) > len(yaml.safe_load(text))
    file = SiteFile.read(home / "site.yaml")
    assert file.pacs is not None
    assert file.policy.minimum_cell == 10
    (home / "site.yaml").write_text(re.sub(r"(?m)^  labels:.*\n(    .*\n)+", "", loose))
    assert SiteFile.read(home / "site.yaml").data.label_map == {0: 0, 255: 1}


@pytest.mark.parametrize("root", ["with space", 'quote"d', "col: on", "#hash", "ünï"])
def test_any_data_root_survives_the_file(ram: Path, root: str) -> None:
    assert code(app, ["init", str(ram / "s"), "--name", "s", "--data", str(ram / root)]) == Exit.OK
    assert SiteFile.read(ram / "s" / "site.yaml").data.root == ram / root


def test_ingest_in_the_sites_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    assert code(app, ["ingest"]) == Exit.OK
    said = capsys.readouterr()
    assert "3 cases in" in said.out
    assert len(Cache(home / "cache").entries) == 3
    assert {p.suffix: mode(p) for p in (home / "state").glob("ingest-report*")} == dict.fromkeys(
        (".txt", ".json", ".html"), 0o600
    )
    assert all(mode(p) == (0o700 if p.is_dir() else mode(p)) for p in (home / "cache").rglob("*"))
    assert code(app, ["ingest"]) == Exit.OK
    assert "(0 read now)" in capsys.readouterr().out


def test_folders_of_a_hospital_are_no_sites(home: Path) -> None:
    for number, name in enumerate(("Müller, Änne", "Müller; Änne", "患者")):
        pictures(home / "data" / name, 1, first=10 + number)
    assert code(app, ["ingest", "--site-file", str(home / "site.yaml")]) == Exit.OK
    assert [e.site for e in Cache(home / "cache").entries] == [None] * 6


def test_names_that_no_terminal_should_see(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.zeros((6, 5), np.uint8)
    Image.fromarray(values).save(home / "data" / "image" / os.fsdecode(b"\xff\x1b[31m[bold].png"))
    assert code(app, ["ingest", "--site-file", str(home / "site.yaml")]) == Exit.PARTLY
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "image/\ufffd\ufffd[31m[bold].png" in said


@pytest.mark.parametrize(
    ("arguments", "exit", "message"),
    [
        (["--cache", "x", "--label-map", "0:1"], Exit.USAGE, "--cache, --label-map: with a site's file"),
        (["--pacs"], Exit.CONFIG, "has no section pacs"),
        (["--json"], Exit.USAGE, "--json lists a dry run"),
        (["--site-file", "none.yaml"], Exit.CONFIG, "none.yaml cannot be read"),
        (["nowhere", "--site-file", "site.yaml"], Exit.NO_DATA_ROOT, "nowhere is not a folder"),
    ],
)
def test_wrong_words_are_one_line(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    exit: Exit,
    message: str,
) -> None:
    monkeypatch.chdir(home)
    assert code(app, ["ingest", *arguments]) == exit
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]


def test_a_key_elsewhere_keeps_the_rest_beside_the_cache(ram: Path) -> None:
    pictures(ram / "data")
    key = ram / "keys" / "deep" / "patient.key"
    assert (
        code(app, ["ingest", str(ram / "data"), "--cache", str(ram / "c"), "--key-file", str(key)]) == Exit.OK
    )
    assert [p.name for p in (ram / "keys").rglob("*")] == ["deep", "patient.key"]
    assert (ram / "state" / "ingest-report.html").is_file()


def test_an_archive_outside_the_data_root_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (home / "site.yaml").open("a") as file:
        file.write("pacs: {source: X@localhost:1, query: [Modality=CT], folder: state/pacs}\n")
    assert code(app, ["ingest", "--pacs", "--site-file", str(home / "site.yaml")]) == Exit.CONFIG
    assert "is not in data.root" in capsys.readouterr().err


def test_commands_that_need_a_site_say_so(
    ram: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ram)
    for command in (["forget", "0" * 16], ["audit"]):
        assert code(app, command) == Exit.CONFIG
        assert "no site.yaml in this folder" in capsys.readouterr().err
    (ram / "site.yaml").write_text("name: a\ncash: x\n")
    with pytest.raises(Stop, match="cash"):
        SiteFile.read(ram / "site.yaml")
