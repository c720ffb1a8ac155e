import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.audit import Audit
from client.cli import app
from client.places import Places
from client.shelf import Shelf
from conf.console import code
from conf.exits import Exit, Stop
from tasks.data import frozen
from tasks.data.cache import Cache, Entry
from tasks.data.patients import Barred, patient_key, pseudonym

PROJECT = Path(__file__).parents[2]


def grow(root: Path, patients: str) -> None:
    for number, patient in enumerate(patients):
        path = root / "image" / f"{patient}{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(list(f"{patient}{number}".encode())).integers(0, 256, (4, 5))
        Image.fromarray(values.astype(np.uint8)).save(path)
    names = sorted(p.name for p in (root / "image").iterdir())
    rows = [f"image/{n},image/{n},{n[0]}" for n in names]
    (root / "manifest.csv").write_text("\n".join(["image,label,patient", *rows]))


@pytest.fixture
def site(ram: Path, capsys: pytest.CaptureFixture[str]) -> Places:
    """A site with patients a (two cases), b, c."""
    assert code(app, ["init", str(ram), "--name", "north"]) == Exit.OK
    grow(ram / "data", "aabc")
    text = (ram / "site.yaml").read_text()
    columns = "  manifest: manifest.csv\n  columns: {patient: patient}\n  label_map: nonzero\n  workers: 1\n"
    (ram / "site.yaml").write_text(text.replace("cache: cache ", columns + "\ncache: cache "))
    assert take(ram) == Exit.OK
    capsys.readouterr()
    return Places(ram / "cache", ram / "state" / "patient.key", ram / "state", ram / "audit.jsonl")


def take(folder: Path) -> int:
    return code(app, ["ingest", "--site-file", str(folder / "site.yaml")])


def forget(places: Places, *arguments: str) -> int:
    return code(app, ["forget", *arguments, "--site-file", str(places.audit.with_name("site.yaml"))])


def named(places: Places) -> dict[str, str]:
    key = patient_key(places.key)
    return {letter: pseudonym(key, letter) for letter in "abcx"}


def left(places: Places) -> tuple[list[str], int]:
    names = {v: k for k, v in named(places).items()}
    cache = Cache(places.cache)
    return sorted(names[e.patient] for e in cache.entries), len(list(places.cache.glob("objects/*/*")))


def test_a_forgotten_patient_stays_away(site: Places, capsys: pytest.CaptureFixture[str]) -> None:
    a = named(site)["a"]
    assert left(site) == (["a", "a", "b", "c"], 4)
    assert forget(site, a) == Exit.OK
    assert f"{a}: 2 cached objects removed" in capsys.readouterr().out
    assert left(site) == (["b", "c"], 2)
    assert a not in (site.cache / "index.json").read_text()
    assert take(site.audit.parent) == Exit.PARTLY
    assert left(site) == (["b", "c"], 2)
    shutil.rmtree(site.cache)  # what errors advise
    assert take(site.audit.parent) == Exit.PARTLY
    assert left(site) == (["b", "c"], 2)
    said = [(e["event"], e.get("patient")) for e in Audit(site.audit).events()]
    assert said == [("init", None), ("forget", a), ("forgotten", a)]
    assert forget(site, a) == Exit.OK  # again: nothing is left to do


def test_by_the_hospitals_id_which_is_in_no_argument(
    site: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(" b \n"))
    assert forget(site, "--id") == Exit.OK
    assert left(site)[0] == ["a", "a", "c"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))  # before they were ever taken in
    assert forget(site, "--id") == Exit.OK
    grow(site.audit.parent / "data", "x")
    take(site.audit.parent)
    assert left(site)[0] == ["a", "a", "c"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert forget(site, "--id") == Exit.USAGE
    assert "no patient id was given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "exit", "message"),
    [
        (["0123456789abcdef"], Exit.NO_CASES, "no patient 0123456789abcdef"),
        (["Doe^John"], Exit.USAGE, "PATIENT is not 16 hex digits; for the hospital's own id use --id"),
        ([], Exit.USAGE, "or --id"),
        (["0123456789abcdef", "--id"], Exit.USAGE, "or --id"),
    ],
)
def test_what_is_refused_changes_nothing(
    site: Places, capsys: pytest.CaptureFixture[str], arguments: list[str], exit: Exit, message: str
) -> None:
    assert forget(site, *arguments) == exit
    said = capsys.readouterr().err
    assert message in said
    assert "Doe" not in said
    assert left(site) == (["a", "a", "b", "c"], 4)
    assert not site.barred.exists()


def test_another_key_cannot_bring_them_back(site: Places, capsys: pytest.CaptureFixture[str]) -> None:
    forget(site, named(site)["a"])
    site.key.unlink()
    assert take(site.audit.parent) == Exit.CONFIG
    assert "restore patient.key" in capsys.readouterr().err
    site.barred.write_text("{")
    with pytest.raises(Stop, match="restore it from a backup"):
        Barred.read(site.barred)


def test_equal_images_of_two_patients_stay_with_the_other(site: Places) -> None:
    folder = site.audit.parent / "data" / "image"
    shutil.copy(folder / "a0.png", folder / "z0.png")
    grow(folder.parent, "")
    assert take(folder.parents[1]) == Exit.PARTLY
    assert left(site) == (["a", "a", "b", "c"], 4)
    forget(site, named(site)["a"])
    take(folder.parents[1])
    assert {e.patient for e in Cache(site.cache).entries} >= {pseudonym(patient_key(site.key), "z")}


def test_they_leave_runs_under_way_and_new_patients_join_at_the_next(site: Places) -> None:
    shelf = Shelf(Cache(site.cache), lambda entries: {"train": entries})
    assert [len(e) for e in shelf.of("one").patients("train").values()] in ([2, 1, 1], [1, 2, 1], [1, 1, 2])
    grow(site.audit.parent / "data", "x")
    take(site.audit.parent)
    again = Shelf(Cache(site.cache), lambda entries: {"train": entries})  # the trainer was started again
    for reader in (shelf, again):
        assert named(site)["x"] not in reader.of("one").patients("train")
        assert named(site)["x"] in reader.of("two").patients("train")
    forget(site, named(site)["a"])
    for reader in (shelf, again):
        assert sorted(reader.of("one").patients("train")) == sorted(named(site)[p] for p in "bc")
    assert forget(site, named(site)["x"]) == Exit.OK
    assert not any(named(site)["x"] in path.read_text() for path in site.cache.rglob("*.json"))


def test_objects_of_a_run_are_not_swept(site: Places) -> None:
    shelf = Shelf(Cache(site.cache), lambda entries: {"train": entries})
    (before,) = shelf.of("one").patients("train")[named(site)["b"]]
    path = site.audit.parent / "data" / "image" / "b2.png"
    Image.fromarray(np.ones((4, 5), np.uint8)).save(path)
    take(site.audit.parent)
    assert before.digest not in {e.digest for e in Cache(site.cache).entries}
    assert shelf.of("one").load(before).key == before.key
    assert left(site)[1] == 5
    (site.cache / "runs" / "one.json").unlink()
    grow(site.audit.parent / "data", "x")
    with_reader = Cache(site.cache).held()
    take(site.audit.parent)
    assert left(site)[1] == 6  # a simulation holds the cache
    with_reader.release()
    os.utime(path)
    take(site.audit.parent)
    assert left(site)[1] == 5


def test_forgotten_while_a_run_begins(site: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    real, a = frozen._write, named(site)["a"]

    def late(path: Path, entries: tuple[Entry, ...]) -> None:
        monkeypatch.undo()
        assert forget(site, a) == Exit.PARTLY  # the beginning run holds the cache for a moment
        real(path, entries)

    monkeypatch.setattr(frozen, "_write", late)
    begun = Shelf(Cache(site.cache), lambda entries: {"train": entries}).of("one")
    assert sorted(begun.patients("train")) == sorted(named(site)[p] for p in "bc")


def test_somebody_whom_only_a_run_still_names(site: Places) -> None:
    Shelf(Cache(site.cache), lambda entries: {"train": entries}).of("one")
    for path in (site.audit.parent / "data" / "image").glob("a*"):
        path.unlink()
    grow(site.audit.parent / "data", "")
    take(site.audit.parent)
    a = named(site)["a"]
    assert left(site) == (["b", "c"], 4)
    assert forget(site, a) == Exit.OK
    assert left(site) == (["b", "c"], 2)
    assert a not in (site.cache / "runs" / "one.json").read_text()


def test_what_killed_processes_left_half_written_goes_too(site: Places) -> None:
    Shelf(Cache(site.cache), lambda entries: {"train": entries}).of("one")
    torn = [site.cache / ".index.json.1.2.part", site.cache / "runs" / ".one.json.1.2.part"]
    torn.append(site.report.parent / f".{site.report.name}.html.1.2.part")
    for path in torn:
        path.write_text(named(site)["a"])
    assert forget(site, named(site)["a"]) == Exit.OK
    assert [path for path in torn if path.exists()] == []


def test_a_report_does_not_bring_them_back(site: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    a = named(site)["a"]

    def between(_: object) -> None:  # after the index, before the report
        monkeypatch.undo()
        assert forget(site, a) == Exit.OK

    monkeypatch.setattr("client.commands.ingest._show", between)
    grow(site.audit.parent / "data", "x")
    take(site.audit.parent)
    assert a not in site.report.with_suffix(".html").read_text()
    lock = Cache(site.cache).changing()
    monkeypatch.setattr("client.commands.ingest._show", lambda _: lock.__enter__())
    site.report.with_suffix(".html").unlink()
    grow(site.audit.parent / "data", "y")
    take(site.audit.parent)
    assert not site.report.with_suffix(".html").exists()
    lock.__exit__(None, None, None)


#: where a crash may strike: the calls that change something
STEPS = (
    "client.audit.Audit.add",
    "tasks.data.patients.Barred.write",
    "tasks.data.frozen.remove",
    "tasks.data.frozen.drop_patient",
    "tasks.data.cache.Cache.commit",
    "tasks.data.journal.Journal.drop",
    "tasks.data.frozen.sweep",
)


@pytest.mark.federation
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_crash_in_the_middle_is_completed_by_repeating(site: Places, step: str, after: bool) -> None:
    Shelf(Cache(site.cache), lambda entries: {"train": entries}).of("one")
    a = named(site)["a"]
    script = (
        "import importlib, os, signal, sys\n"
        "parts = sys.argv[1].split('.')\n"
        "owner = importlib.import_module('.'.join(parts[:3] if parts[0] == 'tasks' else parts[:2]))\n"
        "for name in parts[3 if parts[0] == 'tasks' else 2:-1]: owner = getattr(owner, name)\n"
        "real = getattr(owner, parts[-1])\n"
        "def dies(*a, **k):\n"
        "    if sys.argv[2] == 'True': real(*a, **k)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "setattr(owner, parts[-1], dies)\n"
        "from conf.console import code\nfrom client.cli import app\n"
        "code(app, ['forget', sys.argv[3], '--site-file', sys.argv[4]])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, step, str(after), a, str(site.audit.with_name("site.yaml"))],
        cwd=PROJECT,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    if Barred.read(site.barred).names:  # from here on no ingest takes them in
        take(site.audit.parent)
        assert left(site)[0] == ["b", "c"]
    assert forget(site, a) == Exit.OK
    assert left(site) == (["b", "c"], 2)
    assert not any(a in p.read_text() for p in site.cache.rglob("*.json*"))
    Audit(site.audit).verify()


def test_forgetting_waits_for_no_ingest(site: Places, capsys: pytest.CaptureFixture[str]) -> None:
    with Cache(site.cache).changing():
        assert forget(site, named(site)["a"]) == Exit.SITE_BUSY
        grow(site.audit.parent / "data", "x")
        assert take(site.audit.parent) == Exit.SITE_BUSY
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(f"(process {os.getpid()}); let it end, then repeat this" in line for line in said)


def test_the_report_that_shows_them_goes_too(site: Places) -> None:
    for suffix in (".html", ".json", ".txt"):
        site.report.with_suffix(suffix).write_text("a")
    forget(site, named(site)["a"])
    assert not list(site.report.parent.glob("ingest-report*"))


def test_the_audit_command(site: Places, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(site.audit.with_name("site.yaml"))
    assert code(app, ["audit", "--site-file", file]) == Exit.OK
    assert "1 entries, unchanged; head " in capsys.readouterr().out
    log = Audit(site.audit)
    for _ in log.events():  # somebody reads, and the site goes on
        log.add("request", stage="\x1b[2J")
    assert code(app, ["audit", "--site-file", file]) == Exit.OK
    assert "\x1b" not in (said := capsys.readouterr().out)
    assert "stage=\ufffd[2J" in said
    site.audit.write_bytes(site.audit.read_bytes().splitlines(keepends=True)[0])
    event = json.loads(site.audit.read_text())
    site.audit.write_text(json.dumps({**event, "site": "south"}))
    assert code(app, ["audit", "--site-file", file]) == Exit.AUDIT_BROKEN
