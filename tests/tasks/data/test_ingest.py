import csv
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from conf.exits import Exit, Stop
from conf.schema import Columns
from tasks.data import ingest as ingest_module
from tasks.data.cache import Cache
from tasks.data.ingest import NothingKept, Refused, Report, ingest
from tasks.data.patients import patient_key
from tasks.data.source import Found, Reason
from tasks.data.splits import split

Run = Callable[..., tuple[Report, Cache]]
PROJECT = Path(__file__).parents[3]


def picture(path: Path, seed: int, size: tuple[int, int] = (4, 5)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)).save(path)


def drawing(path: Path, high: int = 2, size: tuple[int, int] = (4, 5)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(1).integers(0, high, size, dtype=np.uint8)).save(path)


def pairs(root: Path, count: int = 3, first: int = 0) -> Path:
    for i in range(first, first + count):
        picture(root / "image" / f"{i}.png", i)
        drawing(root / "label" / f"{i}.png")
    return root


def manifest(root: Path, rows: list[dict[str, str]]) -> None:
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def reasons(report: Report) -> dict[str, Reason]:
    return {r.source: r.reason for r in report.refused}


def test_a_faulty_case_is_refused_by_itself(tmp_path: Path, run: Run) -> None:
    root = pairs(tmp_path / "data", 2)
    picture(root / "image" / "bare.png", 10)
    drawing(root / "label" / "lost.png")
    picture(root / "image" / "size.png", 11)
    drawing(root / "label" / "size.png", size=(5, 4))
    picture(root / "image" / "label.png", 12)
    drawing(root / "label" / "label.png", high=9)
    picture(root / "image" / "cut.png", 13, (64, 64))
    drawing(root / "label" / "cut.png", size=(64, 64))
    (root / "image" / "cut.png").write_bytes((root / "image" / "cut.png").read_bytes()[:50])
    shutil.copy(root / "image" / "0.png", root / "image" / "copy.png")
    shutil.copy(root / "label" / "0.png", root / "label" / "copy.png")
    picture(root / "image" / "two.png", 14)
    picture(root / "image" / "two.bmp", 15)
    drawing(root / "label" / "two.png")
    report, cache = run(root, label_map={0: 0, 1: 1})
    assert reasons(report) == {
        "image/bare.png": Reason.NO_MASK,
        "label/lost.png": Reason.NO_IMAGE,
        "image/size.png": Reason.SIZE,
        "image/label.png": Reason.LABEL,
        "image/cut.png": Reason.UNREADABLE,
        "image/copy.png": Reason.DUPLICATE,
        "image/two.png": Reason.SEVERAL_FILES,
        "image/two.bmp": Reason.SEVERAL_FILES,
    }
    assert [e.source for e in sorted(cache.entries, key=lambda e: e.source)] == ["image/0.png", "image/1.png"]
    assert report.exit is Exit.PARTLY
    cache.verify()


def test_a_clean_folder_ends_well(tmp_path: Path, run: Run) -> None:
    report, cache = run(pairs(tmp_path / "data"), workers=3)
    assert (report.kept, report.read, report.refused, report.exit) == (3, 3, (), Exit.OK)
    assert len({e.patient for e in cache.entries}) == 3
    assert all(len(e.patient) == 16 and int(e.patient, 16) >= 0 for e in cache.entries)


def test_a_second_run_reads_only_what_changed(tmp_path: Path, run: Run) -> None:
    root = pairs(tmp_path / "data")
    picture(root / "image" / "bare.png", 10)
    first, cache = run(root)
    before = {e.digest for e in cache.entries}
    again, _ = run(root)
    assert (again.kept, again.read, again.refused) == (3, 0, first.refused)
    pairs(root, 1, first=7)
    more, _ = run(root)
    assert (more.kept, more.read) == (4, 1)
    picture(root / "image" / "0.png", 99, (4, 5))
    os.utime(root / "image" / "0.png", ns=(1, 1))
    changed, now = run(root)
    assert (changed.kept, changed.read) == (4, 1)
    assert len({e.digest for e in now.entries} - before) == 2
    (root / "image" / "1.png").unlink()
    (root / "label" / "1.png").unlink()
    assert run(root)[0].kept == 3


def test_what_a_manifest_names_outside_the_walk_is_seen(tmp_path: Path, run: Run) -> None:
    root = pairs(tmp_path / "data", 2)
    drawing(root / ".hidden" / "mask.png")
    rows = [{"image": f"image/{i}.png", "label": f"label/{i}.png"} for i in range(2)]
    manifest(root, rows)
    assert run(root, "manifest.csv")[0].changed
    assert not run(root, "manifest.csv")[0].changed
    rows[1]["label"] = ".hidden/mask.png"
    manifest(root, rows)
    assert run(root, "manifest.csv")[0].kept == 2
    drawing(root / ".hidden" / "mask.png", high=9)
    assert run(root, "manifest.csv")[0].read == 1


def test_changed_settings_are_seen(tmp_path: Path, run: Run) -> None:
    root = pairs(tmp_path / "data")
    rows = [
        {"image": f"image/{i}.png", "label": f"label/{i}.png", "who": f"w{i // 2}", "part": "train"}
        for i in range(3)
    ]
    manifest(root, rows)
    assert run(root)[0].read == 3
    assert run(root, label_map="nonzero")[0].read == 3
    assert run(root, label_map="nonzero", key=b"o" * 32)[0].read == 3
    report, cache = run(root, "manifest.csv", Columns(patient="who"))
    assert report.read == 3
    assert len({e.patient for e in cache.entries}) == 2
    assert run(root, "manifest.csv", Columns(patient="who"))[0].read == 0
    assert {e.split for e in run(root, "manifest.csv", Columns(split="part"))[1].entries} == {"train"}
    rows[0]["part"] = "test"
    manifest(root, rows)
    report, cache = run(root, "manifest.csv", Columns(split="part"))
    assert report.read == 1
    assert sorted(str(e.split) for e in cache.entries) == ["test", "train", "train"]


def test_a_manifest_says_what_belongs_together(tmp_path: Path, run: Run) -> None:
    root = pairs(tmp_path / "data")
    drawing(tmp_path / "outside.png")
    row = {
        "image": "image/0.png",
        "mask": "label/0.png",
        "patient": "Ann",
        "site": "St. Mary's",
        "part": "Training",
    }
    manifest(
        root,
        [
            row,
            {**row, "image": "image/1.png", "site": "", "part": ""},
            {**row, "image": "image/9.png"},
            {**row, "image": "image/2.png", "mask": "label/9.png"},
            {**row, "image": "", "mask": ""},
            {**row, "image": "../outside.png"},
            {**row, "image": "manifest.csv"},
            row,
            {**row, "image": "label/1.png", "patient": ""},
            {**row, "image": "label/2.png", "part": "maybe"},
        ],
    )
    columns = Columns(label="mask", patient="patient", site="site", split="part")
    report, cache = run(root, "manifest.csv", columns)
    assert reasons(report) == {
        "image/9.png": Reason.NO_IMAGE,
        "image/2.png": Reason.NO_MASK,
        "(empty row)": Reason.UNREADABLE,
        "../outside.png": Reason.UNREADABLE,
        "manifest.csv": Reason.UNREADABLE,
        "image/0.png (line 9)": Reason.DUPLICATE,
        "label/1.png": Reason.NO_PATIENT,
        "label/2.png": Reason.SPLIT,
    }
    assert {(e.source, e.site, e.split) for e in cache.entries} == {
        ("image/0.png", "St._Mary_s", "train"),
        ("image/1.png", None, None),
    }
    assert len({e.patient for e in cache.entries}) == 1


@pytest.mark.parametrize(
    ("text", "columns", "exit", "message"),
    [
        (None, Columns(), Exit.CONFIG, r"manifest\.csv cannot be read"),
        ("", Columns(), Exit.NO_CASES, "has no rows"),
        ("image,mask\na,b\n", Columns(), Exit.CONFIG, "no column label; it has image, mask"),
        ("image,label\na,b\n", Columns(site="site"), Exit.CONFIG, "no column site"),
        ("image,label\na,b.png\n", Columns(), Exit.NO_CASES, "no usable case below .*: 1 unreadable"),
        (
            f"image,label\n{'a' * 300},\n\0,\n",
            Columns(),
            Exit.NO_CASES,
            "no usable case below .*: 2 unreadable",
        ),
        ("image,label, image\na,b,c\n", Columns(), Exit.CONFIG, "has two columns image; rename one"),
        ("image,label\n\udce4,\n", Columns(), Exit.CONFIG, r"manifest\.csv is not UTF-8"),
    ],
)
def test_a_useless_manifest_stops(
    tmp_path: Path, run: Run, text: str | None, columns: Columns, exit: Exit, message: str
) -> None:
    (tmp_path / "data").mkdir()
    if text is not None:
        (tmp_path / "data" / "manifest.csv").write_text(text, errors="surrogateescape")
    with pytest.raises(Stop, match=message) as caught:
        run(tmp_path / "data", "manifest.csv", columns)
    assert caught.value.exit is exit
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert Cache(tmp_path / "cache").entries == ()


def test_sites_are_first_folders_where_there_are_several(tmp_path: Path, run: Run) -> None:
    root = tmp_path / "data"
    pairs(root / "north")
    assert {e.site for e in run(root)[1].entries} == {None}
    pairs(root / "south wing" / "deep", first=5)
    picture(root / "stray" / "image" / "x.png", 50)
    report, cache = run(root)
    assert {e.source.split("/")[0]: e.site for e in cache.entries} == {
        "north": "north",
        "south wing": "south_wing",
    }
    assert reasons(report) == {"stray/image/x.png": Reason.NO_MASK}
    pairs(root / "south_wing", first=20)
    with pytest.raises(Stop, match="two sites would be called south_wing"):
        run(root)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/a.png", "labels/a.png"),
        ("x/Images/y/a.png", "x/masks/y/a.png"),
        ("image/a.jpg", "mask/a.png"),
        ("a.png", "a_seg.png"),
        ("image_a.png", "mask_a.png"),
        ("deep/a-image.png", "deep/a-label.png"),
    ],
)
def test_ways_to_name_a_pair(tmp_path: Path, run: Run, image: str, mask: str) -> None:
    picture(tmp_path / "data" / image, 0)
    drawing(tmp_path / "data" / mask)
    report, cache = run(tmp_path / "data")
    assert (report.kept, report.refused) == (1, ())
    assert cache.load(cache.entries[0]).masks["mask"].max() == 1


def test_what_concerns_the_whole_stops(tmp_path: Path, run: Run) -> None:
    with pytest.raises(Stop, match="is not a readable folder") as caught:
        run(tmp_path / "nowhere")
    assert caught.value.exit is Exit.NO_DATA_ROOT
    (tmp_path / "empty").mkdir()
    with pytest.raises(NothingKept, match="no case below") as nothing:
        run(tmp_path / "empty")
    assert nothing.value.exit is Exit.NO_CASES
    with pytest.raises(Stop, match=r"cache .* lies below data\.root"):
        run(tmp_path)


def test_nothing_kept_leaves_the_cache_as_it_was(tmp_path: Path, run: Run) -> None:
    root = pairs(tmp_path / "data")
    _, before = run(root)
    with pytest.raises(NothingKept, match="3 label outside the map"):
        run(root, label_map={5: 0})
    assert Cache(tmp_path / "cache").entries == before.entries


def test_a_killed_ingest_leaves_the_old_index(tmp_path: Path, run: Run) -> None:
    root = pairs(tmp_path / "data", 2)
    _, before = run(root)
    pairs(root, 2, first=5)
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom conf.schema import Columns\n"
        "from tasks.data.cache import Cache\nfrom tasks.data.ingest import ingest\n"
        "Cache.commit = lambda self, index: os.kill(os.getpid(), signal.SIGKILL)\n"
        "ingest(Path(sys.argv[1]), Cache(Path(sys.argv[2])), manifest=None, columns=Columns(),"
        " label_map=None, key=b'k' * 32)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(root), str(tmp_path / "cache")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        check=False,
    )
    assert ended.returncode == -9
    assert len(list((tmp_path / "cache" / "objects").glob("*/*.safetensors"))) == 4
    after = Cache(tmp_path / "cache")
    assert after.entries == before.entries
    after.verify()
    with (tmp_path / "cache" / "journal.jsonl").open("ab") as file:
        file.write(b'{"version":')  # and a torn line
    (tmp_path / "cache" / "objects" / ".1.part").write_bytes(b"an object half written")
    report, now = run(root)
    assert (report.kept, report.read) == (4, 0)
    now.verify()
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["index.json", "ingest.lock", "objects"]
    assert len([p for p in (tmp_path / "cache" / "objects").rglob("*") if p.is_file()]) == 4


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    ingest(
        pairs(tmp_path / "data"),
        Cache(tmp_path / "cache"),
        manifest=None,
        columns=Columns(),
        label_map=None,
        key=b"k",
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_refusal_of_the_disk_passes_through(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Stop, match="disk full") as caught:
        run(pairs(tmp_path / "data"))
    assert caught.value.exit is Exit.DISK_FULL
    assert Cache(tmp_path / "cache").entries == ()


def test_a_key_is_made_once_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "patient.key"
    key = patient_key(path)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert patient_key(path) == key
    assert patient_key(tmp_path / "other") != key
    path.write_bytes(b"short")
    with pytest.raises(Stop, match="has 5 bytes; need 32"):
        patient_key(path)


def test_names_of_patients_are_hmac_sha256(tmp_path: Path, run: Run) -> None:
    root = pairs(tmp_path / "data", 1)
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    said = subprocess.run(
        [openssl, "dgst", "-sha256", "-hmac", "k" * 32], input=b"image/0.png", capture_output=True, check=True
    )
    assert run(root)[1].entries[0].patient == said.stdout.split()[-1][:16].decode()


def test_hippocampus_with_its_dirty_files(real: Callable[[str], Path], run: Run) -> None:
    root = real("msd_hippocampus")
    report, cache = run(root, workers=2)
    assert reasons(report) == {
        "dirty/image_without_label_hippocampus_118.nii.gz": Reason.NO_MASK,
        "dirty/label_without_image_hippocampus_010.nii.gz": Reason.NO_IMAGE,
        "dirty/label_without_image_hippocampus_281.nii.gz": Reason.NO_IMAGE,
    }
    assert (report.kept, report.exit) == (260, Exit.PARTLY)
    with (root / "manifest.csv").open() as file:
        facts = {row["image"]: row for row in csv.DictReader(file)}
    for entry in cache.entries[::20]:
        case, row = cache.load(entry), facts[entry.source]
        stored = nib.load(root / entry.source)
        assert isinstance(stored, nib.Nifti1Image)
        assert "x".join(map(str, entry.shape[1:])) == row["shape"]
        assert int((case.masks["mask"] == 1).sum()) == int(row["anterior_voxels"])
        assert int((case.masks["mask"] == 2).sum()) == int(row["posterior_voxels"])
        assert float(case.images["image"].max()) == pytest.approx(float(row["max_intensity"]), abs=0.06)
        assert np.array_equal(case.images["image"][0].numpy(), np.asarray(stored.dataobj, dtype=np.float32))
    with pytest.raises(NothingKept, match="1 image without mask, 2 mask without image"):
        run(root / "dirty")


def test_lungs_of_two_hospitals(real: Callable[[str], Path], run: Run) -> None:
    root = real("lung_cxr_2site")
    columns = Columns(label="mask", patient="patient", site="site", split="suggested_split")
    report, cache = run(root, "manifest.csv", columns, {0: 0, 255: 1})
    assert (report.kept, report.exit) == (238, Exit.OK)
    sites = [e.site for e in cache.entries]
    assert (sites.count("montgomery_us"), len(sites)) == (138, 238)
    parts = split(cache.entries, val_fraction=0.1, test_fraction=0.2, seed=0)
    assert {e.key for e in parts["test"]} == {e.key for e in cache.entries if e.split == "test"}
    entry = cache.entries[0]
    case = cache.load(entry)
    assert np.array_equal(case.images["image"][0].numpy(), np.asarray(Image.open(root / entry.source)))
    drawn = np.asarray(Image.open(root / entry.source.replace("image", "mask", 1)))
    assert np.array_equal(case.masks["mask"].numpy(), drawn == 255)


def test_the_index_keeps_no_raw_patient(tmp_path: Path, run: Run) -> None:
    root = pairs(tmp_path / "data", 1)
    manifest(root, [{"image": "image/0.png", "label": "label/0.png", "patient": "CANARY"}])
    run(root, "manifest.csv", Columns(patient="patient"))
    text = (tmp_path / "cache" / "index.json").read_text()
    assert "CANARY" not in text
    assert json.loads(text)["records"].keys() == {"image/0.png"}


def test_refused_cases_are_told_apart(tmp_path: Path, run: Run) -> None:
    root = pairs(tmp_path / "data", 1)
    drawing(root / "label" / "lost.png")
    assert run(root)[0].refused == (Refused("label/lost.png", Reason.NO_IMAGE, "no image of that name"),)


def test_a_folder_that_is_not_looked_into_is_said(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = pairs(tmp_path / "data", 2)
    pairs(root / "locked", 1, first=5)
    pairs(tmp_path / "elsewhere", 1, first=9)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    assert run(root)[0].kept == 3
    true = os.scandir

    def denied(path: str | Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return true(path)

    monkeypatch.setattr(os, "scandir", denied)
    report, _ = run(root)
    monkeypatch.undo()
    assert (report.kept, reasons(report)) == (2, dict.fromkeys(("linked", "locked"), Reason.UNREADABLE))
    assert {r.source: r.detail.split(";")[0] for r in report.refused} == {
        "linked": "a link to a folder is not followed",
        "locked": "folder: Permission denied",
    }
    assert run(root)[0].kept == 3


def test_what_changes_after_it_was_listed_is_read_again(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = pairs(tmp_path / "data")
    true = ingest_module._by_folders

    def late(*given: Any) -> list[Found]:
        found = true(*given)
        picture(root / "image" / "0.png", 77, (4, 5))
        os.utime(root / "image" / "0.png", ns=(1, 1))
        return found

    monkeypatch.setattr(ingest_module, "_by_folders", late)
    run(root)
    monkeypatch.undo()
    assert run(root)[0].read == 1
    assert run(root)[0].read == 0


def test_known_files_are_not_opened_again(tmp_path: Path, run: Run) -> None:
    root = pairs(tmp_path / "data", 5)
    run(root)
    for path in root.rglob("*.png"):
        state = path.stat()
        path.write_bytes(b"\0" * state.st_size)  # unreadable now, were it read
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    report, cache = run(root)
    assert (report.kept, report.read) == (5, 0)
    cache.verify()
