import hashlib
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
import torch
from pydicom.uid import CTImageStorage, JPEG2000Lossless, JPEGLSLossless, RLELossless

from conf.exits import Exit, Stop
from conf.schema import Columns
from tasks.base import Case
from tasks.data.cache import Cache
from tasks.data.ingest import ingest
from tasks.data.phantom import make_phantom
from tasks.data.phantom_files import MIXED, PLAIN, Form
from tasks.data.splits import by_site


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    make_phantom(folder, patients=3, size=32)
    return folder


@pytest.fixture(scope="module")
def cache(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("cache")
    report = ingest(made, Cache(folder), manifest=None, columns=Columns(), label_map=None, key=b"k")
    assert report.refused == ()
    assert report.kept == 3 * 4  # a hospital: two patients with one series, one with two
    return Cache(folder)


def contents(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_equal_arguments_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_phantom(tmp_path / name, hospitals=1, patients=1, seed=5, size=32)
    make_phantom(tmp_path / "c", hospitals=1, patients=1, seed=6, size=32)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    other = contents(tmp_path / "c")
    assert not set(other.values()) & set(contents(tmp_path / "a").values())


def test_every_file_is_a_valid_image_of_nobody(made: Path) -> None:
    uids = set()
    for path in made.rglob("[0-9]*.dcm"):
        ds = pydicom.dcmread(path)
        assert ds.SOPClassUID == CTImageStorage == ds.file_meta.MediaStorageSOPClassUID
        assert str(ds.PatientName).startswith("PHANTOM^")
        assert ds.PatientBirthDate == ""
        uids.add(ds.SOPInstanceUID)
    assert len(uids) == len(list(made.rglob("[0-9]*.dcm")))


def test_masks_are_those_that_highdicom_reads(made: Path, cache: Cache) -> None:
    for entry in cache.entries[::4]:
        case = cache.load(entry)
        folder = made / entry.source
        seg = hd.seg.segread(folder / "seg.dcm")
        slices = sorted(
            (pydicom.dcmread(p) for p in folder.glob("[0-9]*.dcm")), key=lambda d: d.ImagePositionPatient[2]
        )
        uids = [d.SOPInstanceUID for d in slices]
        stack = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
        truth = np.where(stack[..., 1] > 0, 2, stack[..., 0])
        hu = np.stack([d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept) for d in slices])
        # LPS axial slices from feet to head: RAS+ flips rows and columns
        assert np.array_equal(case.masks["mask"].numpy(), truth.transpose(2, 1, 0)[::-1, ::-1])
        assert np.array_equal(case.images["image"][0].numpy(), hu.transpose(2, 1, 0)[::-1, ::-1])
        assert not (stack[..., 1] > stack[..., 0]).any()  # a lesion lies in its liver


def test_hospitals_differ_and_patients_vary(cache: Cache) -> None:
    sites = by_site(cache.entries)
    assert list(sites) == ["hospital_a", "hospital_b", "hospital_c"]
    assert all(len({e.patient for e in own}) == 3 for own in sites.values())
    makers = {s: {e.groups["manufacturer"] for e in own} for s, own in sites.items()}
    assert makers == {"hospital_a": {"siemens"}, "hospital_b": {"ge"}, "hospital_c": {"philips"}}
    loaded = {s: [cache.load(e) for e in own] for s, own in sites.items()}
    spacings = {case.spacing for own in loaded.values() for case in own}
    assert len({tuple(round(v, 3) for v in s) for s in spacings}) == 3
    liver = [
        float(np.mean([case.images["image"][0][case.masks["mask"] == 1].mean() for case in own]))
        for own in loaded.values()
    ]
    assert max(liver) - min(liver) > 40  # HU
    for own in loaded.values():
        for case in own:
            assert (case.masks["mask"] == 1).sum() > 50
            assert (case.masks["mask"] == 2).any()
        volumes = [float((c.masks["mask"] > 0).sum()) for c in own]
        assert max(volumes) > 1.05 * min(volumes)


VARIANTS = (
    *(Form(s) for s in (JPEGLSLossless, JPEG2000Lossless, RLELossless)),
    Form(frames=True),
    Form(RLELossless, frames=True),
    Form(labels="rtstruct"),
    Form(JPEG2000Lossless, frames=True, labels="rtstruct"),
)


def cases(folder: Path, form: Form, patients: int = 2) -> list[Case]:
    """Patients of each hospital, all written in one form and ingested."""
    make_phantom(folder / "data", patients=patients, size=32, forms=[form])
    shelf = Cache(folder / "cache")
    report = ingest(folder / "data", shelf, manifest=None, columns=Columns(), label_map=None, key=b"k" * 32)
    assert report.refused == ()
    by_source = sorted(shelf.entries, key=lambda e: e.source)
    return [shelf.load(entry) for entry in by_source]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    return cases(tmp_path_factory.mktemp("plain"), PLAIN[0])


@pytest.mark.parametrize("form", VARIANTS, ids=str)
def test_the_same_patients_are_read_from_every_form(form: Form, plain: list[Case], tmp_path: Path) -> None:
    got = cases(tmp_path, form)
    assert len(got) == len(plain) == 6
    for one, other in zip(got, plain, strict=True):
        assert torch.equal(one.images["image"], other.images["image"])
        assert torch.equal(one.masks["mask"], other.masks["mask"])
        assert torch.allclose(one.affine, other.affine, atol=1e-9)
        assert one.patient == other.patient
        assert one.groups == other.groups
        assert one.units == other.units == "HU"


def test_hospitals_write_in_ways_of_their_own(tmp_path: Path) -> None:
    make_phantom(tmp_path, patients=1, size=32, forms=MIXED)
    seen = {}
    for hospital in sorted(tmp_path.iterdir()):
        ds = pydicom.dcmread(next(hospital.rglob("001.dcm")))
        shared = ds.get("SharedFunctionalGroupsSequence", [ds])[0]
        rescale = shared.get("PixelValueTransformationSequence", [ds])[0]
        kernel = shared.get("CTReconstructionSequence", [ds])[0].ConvolutionKernel
        rescale = (float(rescale.RescaleSlope), float(rescale.RescaleIntercept))
        labels = {p.stem for p in hospital.rglob("*.dcm")} & {"seg", "rtstruct"}
        seen[hospital.name] = (ds.file_meta.TransferSyntaxUID, kernel, rescale, *labels, ds.Modality)
    assert len({s[0] for s in seen.values()}) == len({s[1] for s in seen.values()}) == 3
    assert len({s[2] for s in seen.values()}) == 3
    assert {s[3] for s in seen.values()} == {"seg", "rtstruct"}


@pytest.mark.parametrize("wrong", [{"hospitals": 0}, {"patients": 100}, {"size": 8}])
def test_a_number_out_of_range_stops(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(Stop, match=f"phantom {name} is {wrong[name]}; accepted") as caught:
        make_phantom(tmp_path, **wrong)
    assert caught.value.exit is Exit.CONFIG
    assert not list(tmp_path.iterdir())
