import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.exits import Exit, Stop
from conf.schema import Columns
from tasks.data.cache import Cache
from tasks.data.ingest import NothingKept, Report
from tasks.data.source import LabelMap, Naming, Reason

Run = Callable[..., tuple[Report, Cache]]
ALONE = Columns(image=None, label="outcome", table={"age": "number", "sex": ("male", "female")})


def manifest(root: Path, text: str, encoding: str = "utf-8") -> Path:
    root.mkdir(exist_ok=True)
    (root / "manifest.csv").write_text(text, encoding=encoding)
    return root


def pictures(root: Path, count: int) -> None:
    for i in range(count):
        for name in (f"{i}.png", f"m{i}.png"):
            values = np.random.default_rng(i).integers(0, 2, (4, 5), dtype=np.uint8)
            Image.fromarray(values).save(root / name)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_what_is_missing_is_absent(tmp_path: Path, run: Run, delimiter: str) -> None:
    rows = ["outcome, age,sex", "1,41.5,Male", ",?,female", "0,NaN,", "1,,none"]
    root = manifest(tmp_path / "d", "\n".join(rows).replace(",", delimiter), "utf-8-sig")
    report, cache = run(root, "manifest.csv", ALONE)
    assert (report.kept, report.refused) == (4, ())
    cases = {e.source: cache.load(e) for e in cache.entries}
    assert [dict(cases[f"manifest.csv:{i}"].table) for i in range(2, 6)] == [
        {"age": 41.5, "sex": 0.0},
        {"sex": 1.0},
        {},
        {},
    ]
    found = [dict(cases[f"manifest.csv:{i}"].groups) for i in range(2, 6)]
    assert found == [{"sex": "male"}, {"sex": "female"}, {}, {}]  # categories are subgroups too
    assert [dict(cases[f"manifest.csv:{i}"].labels) for i in range(2, 6)] == [
        {"label": 1.0},
        {},
        {"label": 0.0},
        {"label": 1.0},
    ]
    assert len({e.patient for e in cache.entries}) == 4


def test_a_cell_of_another_type_refuses_its_row_alone(tmp_path: Path, run: Run) -> None:
    root = manifest(tmp_path / "d", "outcome,age,sex\n1,old,male\n1,7,m\n0,inf,male\n0,3,male\n")
    report, _ = run(root, "manifest.csv", ALONE)
    assert report.kept == 1
    assert {r.source.partition(":")[2]: r.detail for r in report.refused} == {
        "2": "column age is 'old'; need a number, or an empty cell",
        "3": "column sex is 'm'; accepted male, female, or an empty cell",
        "4": "column age is 'inf'; need a number, or an empty cell",
    }
    assert {r.reason for r in report.refused} == {Reason.CELL}


def test_equal_rows_are_two_patients_yet_equal_pictures_are_one(tmp_path: Path, run: Run) -> None:
    root = manifest(tmp_path / "d", "outcome,age,sex\n1,7,male\n1,7,male\n")
    report, cache = run(root, "manifest.csv", ALONE)
    assert (report.kept, len({e.patient for e in cache.entries})) == (2, 2)


def test_a_column_of_classes_goes_through_the_map(tmp_path: Path, run: Run) -> None:
    root = manifest(tmp_path / "d", "image,label,stage\n0.png,Normal,\n1.png,pneumonia,3\n2.png,,2\n")
    pictures(root, 3)
    names: LabelMap = {"normal": 0, "pneumonia": 1}
    columns = Columns(labels=("stage",))
    _, cache = run(root, "manifest.csv", columns, names)
    assert {e.source: dict(cache.load(e).labels) for e in cache.entries} == {
        "0.png": {"label": 0.0},
        "1.png": {"label": 1.0, "stage": 3.0},
        "2.png": {"stage": 2.0},
    }
    assert not any(cache.load(e).masks for e in cache.entries)
    assert run(root, "manifest.csv", columns, names)[0].read == 0
    manifest(root, "image,label,stage\n0.png,Normal,\n1.png,pneumonia,4\n2.png,,2\n")
    assert run(root, "manifest.csv", columns, names)[0].read == 1
    left = run(root, "manifest.csv", columns, Naming({"normal": 0}, ignore=True))
    assert left[0].unmapped == {"pneumonia": 1}
    assert sorted(len(left[1].load(e).labels) for e in left[1].entries) == [1, 1, 1]


def test_none_is_a_class_where_the_map_says_so(tmp_path: Path, run: Run) -> None:
    root = manifest(tmp_path / "d", "outcome,grade\nnone,none\nmild,NA\n")
    columns = Columns(image=None, label="outcome", table={"grade": ("none", "high")})
    _, cache = run(root, "manifest.csv", columns, {"none": 0, "mild": 1})
    cases = [cache.load(e) for e in sorted(cache.entries, key=lambda e: e.source)]
    assert [(dict(c.labels), dict(c.table)) for c in cases] == [
        ({"label": 0.0}, {"grade": 0.0}),
        ({"label": 1.0}, {}),
    ]


def test_masks_and_classes_side_by_side(tmp_path: Path, run: Run) -> None:
    root = manifest(tmp_path / "d", "image,label,grade\n0.png,m0.png,high\n1.png,M1.PNG,low\n")
    pictures(root, 2)
    (root / "m1.png").rename(root / "M1.PNG")
    own: dict[int | str, int] = {0: 0, 1: 2, "low": 0, "high": 1}
    _, cache = run(root, "manifest.csv", Columns(labels=("grade",)), own)
    case = cache.load(next(e for e in cache.entries if e.source == "0.png"))
    assert dict(case.labels) == {"grade": 1.0}
    assert set(case.masks["mask"].ravel().tolist()) == {0, 2}


@pytest.mark.parametrize(
    ("text", "columns", "label_map", "message"),
    [
        (
            "image,label\n0.png,m0.png\n1.png,none\n",
            Columns(),
            None,
            "1 mask files, and none; a column holds",
        ),
        (
            "image,label\n0.png,a\n1.png,b\n",
            Columns(),
            None,
            "names a, b; not mapped: a, b; .* data.label_map",
        ),
        ("image,label\n0.png,a\n1.png,b\n", Columns(), {"a": 0, 5: 1}, "names a, b; not mapped: b"),
        ("image,label\n0.png,a\n1.png,b\n", Columns(), "nonzero", "not mapped: a, b"),
        (
            "image,label\n0.png,1\n",
            Columns(table={"age": "number"}),
            None,
            "no column age; it has image, label",
        ),
        ("image,label\n0.png,1\n", Columns(labels=("x",)), None, "no column x"),
    ],
)
def test_wrong_columns_stop_with_one_line(
    tmp_path: Path, run: Run, text: str, columns: Columns, label_map: LabelMap, message: str
) -> None:
    with pytest.raises(Stop, match=message) as caught:
        run(manifest(tmp_path / "d", text), "manifest.csv", columns, label_map)
    assert caught.value.exit is Exit.CONFIG
    assert not (tmp_path / "cache").exists()


def test_a_column_of_empty_cells_is_masks_that_are_missing(tmp_path: Path, run: Run) -> None:
    root = manifest(tmp_path / "d", "image,label\n0.png,\n")
    pictures(root, 1)
    with pytest.raises(NothingKept, match="1 image without mask"):
        run(root, "manifest.csv")


def test_a_row_may_name_a_dicom_series(real: Callable[[str], Path], tmp_path: Path, run: Run) -> None:
    root = manifest(
        tmp_path / "d",
        "image,label\nseries,Sick\nseries/a.dcm,well\nboth,well\nnotes,well\nnotes/x.txt,well\n../out,well\n",
    )
    for folder, names in (
        ("series", ("pt_ge_petctac",)),
        ("both", ("mr_philips_achieva_epi", "ct_ge_petct_lowdose")),
    ):
        (root / folder).mkdir()
        for name in names:
            for path in (real("dicom_series") / name).iterdir():
                shutil.copy(path, root / folder / f"{name}{path.name}")
    (root / "notes").mkdir()
    (root / "notes" / "x.txt").write_text("nothing")
    report, cache = run(root, "manifest.csv", label_map={"well": 0, "sick": 1})
    (entry,) = cache.entries
    case = cache.load(entry)
    assert (entry.source, entry.shape, case.units) == ("series", (1, 128, 128, 10), "SUVbw")
    assert dict(case.labels) == {"label": 1.0}
    assert {r.source: r.reason for r in report.refused} == {
        "series/a.dcm": Reason.UNREADABLE,
        "both": Reason.SEVERAL_FILES,
        "notes": Reason.UNREADABLE,
        "notes/x.txt": Reason.UNREADABLE,
        "../out": Reason.UNREADABLE,
    }
    masked = manifest(tmp_path / "d", "image,label\nseries,m.png\n")
    pictures(masked, 1)
    with pytest.raises(NothingKept, match="1 unsupported mask"):
        run(masked, "manifest.csv")
