import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.data.arrays import from_arrays, read_entry
from tasks.data.cache import Cache
from tasks.data.ingest import Report
from tasks.data.source import Faulty, Reason

DRAW = np.random.default_rng(0)


def write(path: Path, shape: tuple[int, ...], labels: int = 1, **more: Any) -> dict[str, np.ndarray]:
    """A file like MedMNIST's with three, two and one images."""
    arrays: dict[str, np.ndarray] = {}
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        arrays[f"{part}_images"] = DRAW.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{part}_labels"] = DRAW.integers(0, 9, (count, labels), dtype=np.uint8)
    np.savez_compressed(path, **{**arrays, **more})
    return arrays


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (8, 8, 8)])
def test_each_entry_is_a_case(
    tmp_path: Path, run: Callable[..., tuple[Report, Cache]], shape: tuple[int, ...]
) -> None:
    (tmp_path / "data").mkdir()
    arrays = write(tmp_path / "data" / "mnist.npz", shape)
    report, cache = run(tmp_path / "data")
    assert (report.kept, report.refused) == (6, ())
    for entry in cache.entries:
        part, _, number = entry.source.removeprefix("mnist.npz:").partition("/")
        assert entry.split == part
        case = cache.load(entry)
        wanted = arrays[f"{part}_images"][int(number)]
        wanted = wanted.transpose(2, 0, 1) if shape[2:] == (3,) else wanted[None]
        assert np.array_equal(case.images["image"], wanted)
        assert case.labels == {"label": float(arrays[f"{part}_labels"][int(number), 0])}
    assert run(tmp_path / "data")[0].read == 0


def test_several_labels_are_numbered_and_none_are_none(tmp_path: Path) -> None:
    arrays = write(tmp_path / "a.npz", (8, 8), labels=3)
    raw = read_entry(tmp_path / "a.npz", "val", 1, None)
    assert raw.labels == {f"label_{i}": float(v) for i, v in enumerate(arrays["val_labels"][1])}
    np.savez(tmp_path / "b.npz", train_images=arrays["train_images"])
    assert read_entry(tmp_path / "b.npz", "train", 0, None).labels == {}


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    write(tmp_path / "a.npz", (8, 8))
    first = read_entry(tmp_path / "a.npz", "test", 0, None).image
    second = write(tmp_path / "a.npz", (9, 9))["test_images"]
    again = read_entry(tmp_path / "a.npz", "test", 0, None).image
    assert first is not None
    assert again is not None
    assert np.array_equal(again, second)


@pytest.mark.parametrize(
    ("more", "reason", "detail"),
    [
        (
            {"train_labels": np.zeros((9, 1))},
            Reason.SHAPE,
            "train_labels has another length than train_images, 3",
        ),
        ({"train_images": np.array([{}] * 3)}, Reason.UNREADABLE, "ValueError"),
        ({"train_images": np.array(["a"] * 3)}, Reason.SHAPE, "holds <U1"),
        ({"train_images": np.zeros((3, 2, 2, 2, 2))}, Reason.SHAPE, "4 axes per image"),
    ],
)
def test_what_is_refused(tmp_path: Path, more: dict[str, Any], reason: Reason, detail: str) -> None:
    write(tmp_path / "a.npz", (8, 8), **more)

    def first() -> None:
        found = from_arrays(tmp_path, tmp_path / "a.npz")[0]
        if found.fault is not None:
            raise found.fault
        assert found.read is not None
        found.read(None)

    with pytest.raises(Faulty, match=detail) as caught:
        first()
    assert caught.value.reason is reason


def test_files_of_another_kind_have_one_reason(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    (tmp_path / "b.npz").write_bytes(b"not a zip")
    faults = [from_arrays(tmp_path, tmp_path / n)[0].fault for n in ("a.npz", "b.npz")]
    assert [f and f.reason for f in faults] == [Reason.UNREADABLE] * 2
    assert "no array train_images" in str(faults[0])


@pytest.mark.parametrize("shape", [(1 << 31, 28), (1 << 33, 1 << 31)])  # the second is 0 modulo 2^64
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, shape: tuple[int, ...]) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train_images.npy", head.getvalue())
    fault = from_arrays(tmp_path, tmp_path / "a.npz")[0].fault
    assert fault is not None
    assert "more than 1 GiB unpacked" in fault.detail


@pytest.mark.parametrize("kind", [">u2", "<i2", "<f2", ">f4", "?"])
def test_values_come_through_the_worker_as_they_are(tmp_path: Path, kind: str) -> None:
    images = DRAW.integers(0, 2 if kind == "?" else 300, (2, 4, 5)).astype(kind)
    np.savez(tmp_path / "a.npz", train_images=images)
    raw = read_entry(tmp_path / "a.npz", "train", 1, None)
    assert raw.image is not None
    assert np.array_equal(raw.image[0].astype(np.float64), images[1].astype(np.float64))


def test_this_process_unpacks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = write(tmp_path / "a.npz", (8, 8))
    monkeypatch.setattr(zipfile, "ZipFile", None)
    monkeypatch.setattr(np, "load", None)
    (*_, last) = from_arrays(tmp_path, tmp_path / "a.npz")
    assert last.read is not None
    image = last.read(None).image
    assert image is not None
    assert np.array_equal(image[0], arrays["test_images"][0])
