"""Every set of real data comes in with one line of settings, and its manifest says what must come out."""

import csv
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from conf.exits import Stop
from conf.load import compose
from tasks.data.cache import Cache
from tasks.data.ingest import NothingKept, Report, ingest
from tasks.data.source import Reason

HEART = (
    "{age:number,sex:['0','1'],cp:['1','2','3','4'],trestbps:number,chol:number,fbs:['0','1'],"
    "restecg:['0','1','2'],thalach:number,exang:['0','1'],oldpeak:number,slope:['1','2','3'],ca:number,"
    "thal:['3','6','7']}"
)
SPLIT = "data.columns.split=suggested_split"
SITE = "data.columns.site=suggested_site"
CELLS = "data.label_map={eosinophil:0,lymphocyte:1,monocyte:2,neutrophil:3}"
SETS: dict[str, list[str]] = {
    "cxr_pneumonia": [SPLIT, "data.columns.patient=patient"],
    "lung_cxr_2site": [
        SPLIT, "data.columns.site=site", "data.columns.patient=patient", "data.columns.label=mask",
        "data.columns.labels=[tuberculosis]", "data.label_map=nonzero",
    ],
    "isbi2012_em": [SPLIT, SITE, "data.label_map={0:1,255:0}"],
    "bbbc038_nuclei": [SPLIT, "data.columns.site=site", "data.label_map=nonzero"],
    "blood_cells_rgb": ["data.columns.split=split", "data.columns.label=class_name", CELLS],
    "fed_heart_uci": [
        "data.manifest=heart_4sites.csv", "data.columns.image=null", "data.columns.site=site",
        "data.columns.label=target", "data.columns.labels=[num]", f"data.columns.table={HEART}",
    ],
    "msd_hippocampus": [SPLIT, SITE],
}  # fmt: skip
#: pictures that are byte for byte another's in the set
TWINS = {"cxr_pneumonia": 5}


def bring(root: Path, cache: Path, *overrides: str) -> tuple[Report, Cache]:
    data = compose([f"data.root={root}", *overrides]).data
    report = ingest(
        Path(data.root),
        Cache(cache),
        manifest=data.manifest,
        columns=data.columns,
        label_map=data.label_map,
        key=b"k" * 32,
        workers=2,
    )
    return report, Cache(cache)


def sampled(root: Path, folder: Path, every: int) -> Path:
    """The set with every so many of its rows."""
    lines = (root / "manifest.csv").read_text().splitlines(keepends=True)
    folder.mkdir()
    (folder / "manifest.csv").write_text("".join(lines[:1] + lines[1::every]))
    with (folder / "manifest.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name in (n for n in (row["image"], row["label"]) if (root / n).is_file()):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / name, folder / name)
    return folder


@pytest.mark.parametrize("name", SETS)
def test_a_set_comes_in_as_its_manifest_says(real: Callable[[str], Path], ram: Path, name: str) -> None:
    settings = SETS[name]
    given = dict(s.split("=", 1) for s in settings)
    manifest = given.get("data.manifest", "manifest.csv")
    root = real(name)
    if every := {"cxr_pneumonia": 5, "msd_hippocampus": 5, "blood_cells_rgb": 5}.get(name):
        root = sampled(root, ram / "data", every)
    report, cache = bring(root, ram / "cache", "data=manifest", *settings)
    with (root / manifest).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r.reason for r in report.refused} <= {Reason.DUPLICATE}
    assert len(rows) - TWINS.get(name, 0) <= report.kept == len(rows) - len(report.refused)
    refused = {r.source for r in report.refused}
    rows = [r for r in rows if r.get("image") not in refused]
    for key, kept in (("site", lambda e: e.site), ("split", lambda e: e.split)):
        column = given.get(f"data.columns.{key}")
        assert Counter(map(kept, cache.entries)) == Counter(
            r[column] or None if column else None for r in rows
        )
    if "data.columns.patient" in given:
        assert len({e.patient for e in cache.entries}) == len({r["patient"] for r in rows})


def test_classes_and_values_are_the_manifest_s(real: Callable[[str], Path], ram: Path) -> None:
    root = sampled(real("blood_cells_rgb"), ram / "data", 20)
    _, cache = bring(root, ram / "cache", "data=manifest", *SETS["blood_cells_rgb"])
    with (root / "manifest.csv").open(newline="") as file:
        wanted = {r["image"]: {"label": float(r["label"])} for r in csv.DictReader(file)}
    assert {e.source: dict(cache.load(e).labels) for e in cache.entries} == wanted


def test_hearts_keep_what_is_missing_missing(real: Callable[[str], Path], ram: Path) -> None:
    root = real("fed_heart_uci")
    _, cache = bring(root, ram / "cache", "data=manifest", *SETS["fed_heart_uci"])
    with (root / "heart_4sites.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases = {e.source: cache.load(e) for e in cache.entries}
    assert not any(case.images or case.masks for case in cases.values())
    for line, row in enumerate(rows, 2):
        case = cases[f"heart_4sites.csv:{line}"]
        assert set(case.table) == {c for c in row if row[c] != "?"} - {"site", "num", "target"}
        assert case.labels == {"label": float(row["target"]), "num": float(row["num"])}
        assert case.table["age"] == float(row["age"])
        assert case.table["cp"] == float(row["cp"]) - 1  # place in the list of categories
    missing = Counter(c for case in cases.values() for c in ("ca", "thal") if c not in case.table)
    assert missing == {c: sum(r[c] == "?" for r in rows) for c in ("ca", "thal")}


def test_what_is_dirty_is_named(real: Callable[[str], Path], ram: Path) -> None:
    with pytest.raises(NothingKept, match="1 image without mask, 2 mask without image") as caught:
        bring(real("msd_hippocampus") / "dirty", ram / "cache")
    assert len(caught.value.report.refused) == 3
    (ram / "data").mkdir()
    dirty = real("msd_hippocampus") / "dirty"
    shutil.copy(dirty / "image_without_label_hippocampus_118.nii.gz", ram / "data" / "image_a.nii.gz")
    shutil.copy(dirty / "label_without_image_hippocampus_281.nii.gz", ram / "data" / "label_a.nii.gz")
    with pytest.raises(NothingKept, match="1 mask of other size"):
        bring(ram / "data", ram / "cache")


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("blood_cells_rgb", ["data.columns.label=class_name"],
         "names eosinophil, lymphocyte, monocyte, neutrophil; not mapped: eosinophil, .* data.label_map"),
        ("blood_cells_rgb", ["data.columns.label=class_name", "data.label_map={eosinophil:0,monocyte:1}"],
         "not mapped: lymphocyte, neutrophil;"),
        ("fed_heart_uci", ["data.manifest=heart_4sites.csv"], "no column image, label; it has site, age"),
        ("fed_heart_uci", ["data.manifest=nowhere.csv"], "cannot be read"),
        ("lung_cxr_2site", [], "no column label; it has image, mask, site"),
        ("lung_cxr_2site", ["data.columns.label=mask", "data.columns.labels=[tb]"], "no column tb"),
    ],
)  # fmt: skip
def test_wrong_settings_stop_with_one_line(
    real: Callable[[str], Path], ram: Path, name: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(Stop, match=message):
        bring(real(name), ram / "cache", "data=manifest", *overrides)
    assert not (ram / "cache").exists()


def test_structure_sets_come_in_with_their_series(real: Callable[[str], Path], ram: Path) -> None:
    root = real("sts_rtstruct")
    with (root / "manifest.csv").open(newline="") as file:
        rows = {r["series"]: r for r in csv.DictReader(file)}
    names = ",".join(f"{roi}:1" for roi in {r["roi"] for r in rows.values()})
    report, cache = bring(root, ram / "cache", f"data.label_map={{{names}}}")
    # the truths are NIfTI masks without an image of their name
    assert {r.reason for r in report.refused} == {Reason.NO_IMAGE}
    assert {e.source for e in cache.entries} == set(rows)
    for entry in cache.entries:
        row = rows[entry.source]
        assert entry.shape == (1, int(row["columns"]), int(row["rows"]), int(row["slices"]))
        assert int(cache.load(entry).masks["mask"].sum()) == int(row["truth_voxels"])
