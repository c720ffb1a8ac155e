import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.cli import app
from client.commands.ingest import parse_label_map, parse_table
from conf.console import code
from conf.exits import Exit, Stop
from tasks.data.cache import Cache

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    lines = ["image,mask,patient,site,suggested_split"]
    for i in range(4):
        for name, values in (
            ("image", draw.integers(0, 256, (4, 4))),
            ("mask", draw.integers(0, 2, (4, 4)) * 255),
        ):
            path = tmp_path / "data" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(path)
        lines.append(f"image/{i}.png,mask/{i}.png,p{i // 2},s{i % 2},{'test' if i > 1 else 'train'}")
    (tmp_path / "data" / "manifest.csv").write_text("\n".join(lines))
    return tmp_path / "data"


COLUMNS = (
    "--manifest manifest.csv --image image --label mask --patient patient --site site --split suggested_split"
)


def go(root: Path, *more: str) -> int:
    return code(app, ["ingest", str(root), "--cache", str(root.parent / "cache"), *more])


def test_the_documented_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go(root, *COLUMNS.split(), "--label-map", "0:0,255:1") == Exit.OK
    assert "4 cases in" in capsys.readouterr().out
    entries = Cache(root.parent / "cache").entries
    assert sorted((e.source, e.site, e.split) for e in entries) == [
        ("image/0.png", "s0", "train"),
        ("image/1.png", "s1", "train"),
        ("image/2.png", "s0", "test"),
        ("image/3.png", "s1", "test"),
    ]
    assert len({e.patient for e in entries}) == 2
    key = root.parent / "state" / "patient.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert go(root, *COLUMNS.replace("--label ", "--mask ").split(), "--label-map", "0:0,255:1") == Exit.OK
    assert "(0 read now), 0 refused" in capsys.readouterr().out


def test_partly_is_an_exit_code_and_a_table(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "mask" / "3.png").unlink()
    assert go(root, "--label-map", "nonzero") == Exit.PARTLY
    said = capsys.readouterr().out
    assert "image/3.png  image without mask" in said
    assert "3 cases in" in said


@pytest.mark.parametrize(
    ("arguments", "exit", "message"),
    [
        (["--label-map", "0:0,1"], Exit.CONFIG, "error: --label-map has '1'; accepted is nonzero, or pairs"),
        (["--label-map", "0:0,0:1"], Exit.CONFIG, "error: --label-map has '0:1'"),
        (["--label-map", "7:1"], Exit.NO_CASES, "4 label outside the map"),
        (["--manifest", "none.csv"], Exit.CONFIG, "none.csv cannot be read"),
        (
            ["--manifest", "manifest.csv"],
            Exit.CONFIG,
            "error: manifest has no column label; it has image, mask",
        ),
        (["--workers", "-1"], Exit.USAGE, "error: "),
        (["--no-such-option"], Exit.USAGE, "error: "),
    ],
)
def test_an_error_is_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], exit: Exit, message: str
) -> None:
    assert go(root, *arguments) == exit
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("making the key")]
    assert len(said) == 1
    assert message in said[0]


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go(tmp_path / "nowhere") == Exit.NO_DATA_ROOT
    assert "is not a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_label_maps() -> None:
    assert parse_label_map(None) is None
    assert parse_label_map("nonzero") == "nonzero"
    assert parse_label_map("0:1,255:0, -3:2") == {0: 1, 255: 0, -3: 2}
    assert parse_label_map("0:0,Left lung:1") == {0: 0, "Left lung": 1}
    for wrong in ("a:b", "1:0,1:1", ":1", "a"):
        with pytest.raises(Stop, match="--label-map has"):
            parse_label_map(wrong)


def test_table_types() -> None:
    assert parse_table("") == {}
    assert parse_table("age=number,sex=male|female") == {"age": "number", "sex": ("male", "female")}
    with pytest.raises(Stop, match="--table has 'age'"):
        parse_table("age")


def test_a_table_alone(real: Callable[[str], Path], ram: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--manifest", "heart_4sites.csv", "--no-image", "--label", "target", "--labels", "num"]
    options += ["--site", "site", "--table", "age=number,sex=0|1", "--cache", str(ram / "cache")]
    assert code(app, ["ingest", str(real("fed_heart_uci")), *options]) == Exit.OK
    assert "920 cases" in capsys.readouterr().out


def test_labels_that_are_no_class_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        for name, high in (("image", 256), ("label", 2 + (i == 2))):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            values = np.random.default_rng(i).integers(0, high, (4, 4), dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "site.yaml").write_text(
        "name: a\ndata:\n  root: data\n  labels:\n    dictionary: [{name: liver, value: 4}]\n"
        "    names: {1: liver}\n    unmapped: ignore\n    annotates: [liver]\n"
    )
    assert code(app, ["ingest", "--site-file", str(tmp_path / "site.yaml")]) == Exit.OK
    assert "label not mapped: 2 in 1 cases" in capsys.readouterr().out
    cache = Cache(tmp_path / "cache")
    assert [e.annotates for e in cache.entries] == [(4,)] * 3
    assert {v for e in cache.entries for v in cache.load(e).masks["mask"].ravel().tolist()} == {0, 4}


def test_help_loads_neither_torch_nor_readers() -> None:
    script = (
        "import sys\nfrom conf.console import code\nfrom client.cli import app\n"
        "assert code(app, ['ingest', '--help']) == 0\n"
        "heavy = {'torch', 'pydicom', 'nibabel', 'monai'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "--label, --mask" in ended.stdout
