import hashlib
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from conf.exits import Exit, Stop
from tasks.data.cache import Cache, Entry, Index, Record, default_cache
from tasks.data.source import Raw, stored

AFFINE = np.array([[0.7, 0.01, 0, -3], [-0.01, 0.7, 0, 1e-9], [0, 0, 1 / 3, 7], [0, 0, 0, 1]])


def raw(fill: float = 1.5) -> Raw:
    image = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4) + np.float32(fill)
    return Raw(image, np.arange(24, dtype=np.uint8).reshape(2, 3, 4), AFFINE, (0.7, 0.7, 1 / 3), {"sex": "F"})


def keep(cache: Cache, *cases: Raw) -> list[Entry]:
    entries = []
    for i, case in enumerate(cases):
        digest = cache.put(case)
        assert case.image is not None
        entries.append(Entry(digest[:16], f"p{i}", "a", None, digest, case.image.shape, case.groups, f"f{i}"))
    cache.commit(Index("t", {e.source: Record("s", e) for e in entries}))
    return entries


def test_a_case_comes_back_as_it_was_put(tmp_path: Path) -> None:
    case = raw()
    keep(Cache(tmp_path), case)
    cache = Cache(tmp_path)
    (entry,) = cache.entries
    loaded = cache.load(entry)
    assert torch.equal(loaded.images["image"], torch.from_numpy(case.image))
    assert torch.equal(loaded.masks["mask"], torch.from_numpy(case.mask))
    assert loaded.affine.dtype == torch.float64
    assert np.array_equal(loaded.affine.numpy(), AFFINE)
    assert loaded.spacing == case.spacing
    assert loaded.groups == {"sex": "F"}
    assert (loaded.patient, loaded.key) == (entry.patient, entry.digest[:16])


def test_labels_come_without_the_arrays(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    (entry,) = keep(cache, replace(raw(), labels={"label": 1.0, "age": 40.5}))
    assert cache.labels(entry) == {"label": 1.0, "age": 40.5}
    path = cache.path(entry.digest)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(Stop, match="is damaged"):
        cache.labels(entry)


def test_turned_arrays_are_kept_as_they_are_read(tmp_path: Path) -> None:
    image = np.arange(24, dtype=np.float32).reshape(1, 4, 3, 2).transpose(0, 3, 2, 1)
    mask = np.arange(24, dtype=np.uint8).reshape(4, 3, 2).T[:, ::-1]
    keep(Cache(tmp_path), replace(raw(), image=image, mask=mask))
    loaded = Cache(tmp_path).load(Cache(tmp_path).entries[0])
    assert np.array_equal(loaded.images["image"], image)
    assert np.array_equal(loaded.masks["mask"], mask)


def test_every_folder_above_an_object_is_durable_before_it_is_named(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with mock.patch("tasks.data.cache.sync_folder") as synced:
        digest = cache.put(raw())
        cache.put(raw())
    objects = tmp_path / "objects"
    assert [c.args[0] for c in synced.call_args_list] == [objects, objects / digest[:2]]


def test_an_object_is_named_by_its_sha256_and_holds_one_metadata_key(tmp_path: Path) -> None:
    (entry,) = keep(Cache(tmp_path), raw())
    path = tmp_path / "objects" / entry.digest[:2] / f"{entry.digest}.safetensors"
    blob = path.read_bytes()
    assert hashlib.sha256(blob).hexdigest() == entry.digest
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    assert list(header["__metadata__"]) == ["case"]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted([path.name, "index.json"])


def test_a_float_image_is_mapped_not_read(tmp_path: Path) -> None:
    image = np.zeros((1, 256, 256, 64), np.float32)  # 16 MiB
    (entry,) = keep(Cache(tmp_path), Raw(image, None, np.eye(4), (1.0, 1.0, 1.0)))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    cache = Cache(tmp_path)
    cache.load(entry)
    before = resident()
    case = cache.load(entry)
    assert resident() - before < 4 * 2**20
    assert case.masks == {}
    assert float(case.images["image"].sum()) == 0


@settings(deadline=None, max_examples=80)
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.int8, np.uint16, np.int16, np.int32, np.float32, np.float64, np.bool_]),
        hnp.array_shapes(min_dims=3, max_dims=4, max_side=4),
    ).filter(lambda a: bool((np.abs(a.astype(np.float64)) < 3e38).all()))
)
def test_storage_loses_nothing_that_float32_holds(image: np.ndarray) -> None:
    kept = stored(image)
    assert kept.dtype in (np.uint8, np.int16, np.float32)
    assert np.array_equal(kept.astype(np.float32), image.astype(np.float32))


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_cut_object_is_called_damaged(tmp_path: Path, length: int) -> None:
    (entry,) = keep(Cache(tmp_path), raw())
    (path,) = tmp_path.glob("objects/*/*")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(Stop, match=f"cached case {entry.key} .* is damaged .*remove the cache") as caught:
        Cache(tmp_path).load(entry)
    assert caught.value.exit is Exit.CACHE_DAMAGED
    with pytest.raises(Stop, match="does not match its digest"):
        Cache(tmp_path).verify()
    keep(Cache(tmp_path), raw())  # putting the same content again mends it
    Cache(tmp_path).verify()


def test_a_missing_or_changed_object_is_called_damaged(tmp_path: Path) -> None:
    entry, _ = keep(Cache(tmp_path), raw(), raw(2.5))
    Cache(tmp_path).verify()
    path = tmp_path / "objects" / entry.digest[:2] / f"{entry.digest}.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    with pytest.raises(Stop, match="does not match its digest"):
        Cache(tmp_path).verify()
    path.unlink()
    with pytest.raises(Stop, match="is damaged"):
        Cache(tmp_path).load(entry)
    with pytest.raises(Stop, match="No such file"):
        Cache(tmp_path).verify()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"version":1}', b'{"version":9,"tree":"","records":{}}']
)
def test_a_damaged_index_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(Stop, match=r"index\.json .*remove the cache") as caught:
        _ = Cache(tmp_path).entries
    assert caught.value.exit is Exit.CACHE_DAMAGED


def test_a_crash_before_the_rename_leaves_the_old_index(tmp_path: Path) -> None:
    (entry,) = keep(Cache(tmp_path), raw())
    cache = Cache(tmp_path)
    cache.put(raw(9.0))  # the object is there, nothing names it
    with (
        mock.patch.object(Path, "replace", side_effect=OSError("killed")),
        pytest.raises(OSError, match="killed"),
    ):
        cache.commit(Index("u", {}))
    assert Cache(tmp_path).entries == (entry,)
    Cache(tmp_path).verify()
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    full = mock.patch("os.fsync", side_effect=OSError(28, "No space left on device"))
    with full, pytest.raises(Stop, match=r"disk full .*ingest again") as caught:
        Cache(tmp_path).put(raw())
    assert caught.value.exit is Exit.DISK_FULL
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_entries_are_sorted_by_patient_and_key(tmp_path: Path) -> None:
    entries = keep(Cache(tmp_path), *(raw(f) for f in (1.0, 2.0, 3.0)))
    moved = [replace(e, patient=p) for e, p in zip(entries, "bab", strict=True)]
    Cache(tmp_path).commit(Index("", {e.source: Record("s", e) for e in moved}))
    assert [e.patient for e in Cache(tmp_path).entries] == ["a", "b", "b"]
    keys = [e.key for e in Cache(tmp_path).entries[1:]]
    assert keys == sorted(keys)


def test_equal_content_is_stored_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.put(raw()) == cache.put(raw())
    assert len(list(tmp_path.glob("objects/*/*"))) == 1
    blob = next(tmp_path.glob("objects/*/*")).read_bytes()
    assert np.array_equal(safetensors.numpy.load(blob)["image"], np.asarray(raw().image))


def test_the_default_cache_is_never_below_the_root(tmp_path: Path) -> None:
    one, other = default_cache(tmp_path / "a"), default_cache(tmp_path / "b" / "a")
    assert one != other
    assert not one.is_relative_to(tmp_path)
    assert one.is_relative_to(Path.home() / ".cache" / "wardround")
