"""Unique markers in every attribute; none may be left."""

from __future__ import annotations

import hashlib
import resource
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from tasks.data.allowed import ALLOWED, Words
from tasks.data.deident import Pseudonyms
from tasks.data.export import Outcome, export, export_file
from tasks.data.phantom import make_phantom
from tasks.data.released import Released, digest
from tasks.data.source import Reason, quietly
from tests.canary import Canary, annex_e, dictionary, files

pytestmark = pytest.mark.filterwarnings("ignore")  # pydicom warns of the markers


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    with quietly():
        yield


PSEUDONYMS = Pseudonyms(b"k" * 32)
#: what must hold for the file to be an image at all; numbers that an option keeps
SPARED = {"SOPClassUID", "PixelData", "PhotometricInterpretation", "BurnedInAnnotation", "Modality"}
NUMBERS = {"PatientSize", "PatientWeight"}


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("phantom")
    make_phantom(folder, hospitals=1, patients=1, size=16)
    return sorted(folder.rglob("[0-9]*.dcm"))


def plantable(tags: list[int]) -> list[int]:
    """Tags but for those that make the file an image, or whose numbers an option keeps."""
    return [t for t in tags if t >> 16 > 2 and keyword_for_tag(t) not in SPARED | NUMBERS]


def canary_file(path: Path, source: Path, tags: list[int]) -> Canary:
    """A CT slice with a marker in each of `tags`: at the top, three deep in sequences, and all around."""
    canary = Canary()
    ds = pydicom.dcmread(source)
    size = len(ds.PixelData)
    inner = Dataset()
    canary.plant(inner, [t for t in tags if t in annex_e()])
    for outer in ("SourceImageSequence", "DerivationImageSequence", "PerFrameFunctionalGroupsSequence"):
        level = Dataset()
        setattr(level, outer, [inner])
        level.PatientName, level.ImageComments = canary.text(), canary.text()
        inner = level
    canary.plant(ds, [tag for tag in tags if not (tag >> 16 == 0x0028 and numeric(ds, tag))])
    for name in ("PerFrameFunctionalGroupsSequence", "RequestAttributesSequence"):
        setattr(ds, name, [inner])
    canary.around(ds)
    ds.PixelData = ds.PixelData[:size] + canary.text().encode() + b"\0"
    ds.save_as(path, enforce_file_format=True)
    return canary


def numeric(ds: FileDataset, tag: int) -> bool:
    return tag in ds and ds[tag].VR in ("US", "DS", "IS")


@pytest.mark.parametrize("table", [annex_e, dictionary], ids=["annex_e", "dictionary"])
def test_no_marker_is_left_in_an_exported_file(
    table: Callable[[], object], slices: list[Path], tmp_path: Path
) -> None:
    tags = plantable([t for t in table() if t in pydicom._dicom_dict.DicomDictionary])  # type: ignore[attr-defined]
    (tmp_path / "in").mkdir()
    canary = canary_file(tmp_path / "in" / "a.dcm", slices[0], tags)
    assert len(canary.markers) > 438
    before = (tmp_path / "in" / "a.dcm").read_bytes()
    planted = canary.found(before)
    assert len(planted) > 0.98 * len(canary.markers)  # the oracle sees them where they are
    (outcome,) = export(tmp_path / "in", tmp_path / "out", PSEUDONYMS, Released(tmp_path / "none"))
    assert outcome.written is not None, outcome
    assert not canary.found(outcome.written.encode())
    blob = (tmp_path / "out" / outcome.written).read_bytes()
    assert canary.found(blob) == []
    assert blob[:128] == b"\0" * 128
    out = pydicom.dcmread(tmp_path / "out" / outcome.written)
    source = pydicom.dcmread(slices[0])
    assert np.array_equal(out.pixel_array, source.pixel_array)
    assert out.file_meta.TransferSyntaxUID == source.file_meta.TransferSyntaxUID
    assert "SourceApplicationEntityTitle" not in out.file_meta
    assert not any(tag.is_private or tag.group >> 8 in (0x50, 0x60) for tag in out.keys())  # noqa: SIM118
    assert out.StudyInstanceUID.startswith("2.25.")


def texts(dataset: Dataset) -> set[bytes]:
    """What of a real header names or places somebody: text, names, institutions, dates, UIDs."""
    found: set[bytes] = set()

    def collect(_: Dataset, element: pydicom.DataElement) -> None:
        if element.VR in ("PN", "LO", "SH", "ST", "LT", "UT", "DA", "UI", "DT", "AE"):
            values = element.value if element.VM > 1 else [element.value]
            found.update(str(v).strip().encode() for v in values if len(str(v).strip()) >= 6)

    dataset.walk(collect)
    return found


VOCABULARY = {w.encode() for rule in ALLOWED.values() if isinstance(rule, Words) for w in rule.words}
#: words that stand in every export: of the dictionaries, the standard, and makers
PUBLIC = (b"1.2.840.10008.", b"GE MEDICAL SYSTEMS", b"SIEMENS", b"Philips", b"CANON", b"FUJIFILM", b"ISO_IR")


@pytest.mark.parametrize("name", ["dicom_zoo", "dicom_series", "sts_rtstruct"])
def test_no_word_of_a_real_header_is_left(name: str, real: Callable[[str], Path], tmp_path: Path) -> None:
    released = Released(tmp_path / "released")
    count = 0
    for number, path in enumerate(sorted(real(name).rglob("*.dcm"))):
        if name != "dicom_zoo" and number % 5:
            continue  # slices of a series are alike
        try:
            source = pydicom.dcmread(path)
            words = texts(source)
        except Exception:  # noqa: BLE001  the zoo has broken files
            continue
        released.add([digest(path)])
        try:
            written = export_file(path, tmp_path / "out" / str(number), PSEUDONYMS, released)
        except ValueError:
            continue
        count += 1
        out = pydicom.dcmread(written)
        pixels = out.get("PixelData", b"")
        rest = written.read_bytes().replace(pixels, b"") if pixels else written.read_bytes()
        left = [w for w in words if w in rest and not w.startswith(PUBLIC)]
        coded = {str(e.value).encode() for e in out.iterall() if e.keyword.startswith("Code")}  # of PS3.16
        assert [w for w in left if not any(w in code for code in coded | VOCABULARY)] == [], path.name
        assert written.parent.parent.name == out.PatientID
    assert count >= {"dicom_zoo": 60, "dicom_series": 25, "sts_rtstruct": 50}[name]


def test_pixels_of_every_syntax_are_the_same_after_export(
    real: Callable[[str], Path], tmp_path: Path
) -> None:
    released = Released(tmp_path / "released")
    folder = real("dicom_zoo")
    seen = set()
    for path in sorted((folder / "transfer_syntax_ct").glob("*.dcm")) + sorted(
        (folder / "color").glob("*.dcm")
    ):
        try:
            source = pydicom.dcmread(path)
            before = hashlib.sha256(source.pixel_array.tobytes()).hexdigest()
        except Exception:  # noqa: BLE001  no decoder for it
            continue
        released.add([digest(path)])
        try:
            written = export_file(path, tmp_path / path.stem, PSEUDONYMS, released)
        except ValueError:
            continue
        after = pydicom.dcmread(written)
        assert hashlib.sha256(after.pixel_array.tobytes()).hexdigest() == before, path.name
        if after["PixelData"].is_undefined_length:
            assert len(after.PixelData) == len(source.PixelData)  # offset tables hold
        seen.add(after.file_meta.TransferSyntaxUID)
    assert len(seen) >= 10


def test_doubtful_pixels_wait_for_the_engineer(slices: list[Path], tmp_path: Path) -> None:
    def attempt() -> Outcome:
        (outcome,) = export(tmp_path / "in", tmp_path / "out", PSEUDONYMS, Released(tmp_path / "released"))
        return outcome

    ds = pydicom.dcmread(slices[0])
    ds.BurnedInAnnotation = "YES"
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.dcm"
    ds.save_as(path)
    held = attempt()
    assert (held.written, held.reason) == (None, Reason.BURNED_IN)
    released = Released(tmp_path / "released")
    assert [released.add([digest(path)]), released.add([digest(path)])] == [1, 0]
    taken = attempt()
    assert taken.written is not None
    assert pydicom.dcmread(tmp_path / "out" / taken.written).BurnedInAnnotation == "NO"
    assert attempt().reason == Reason.EXISTS
    ds.InstanceNumber = 77  # another file: another look
    ds.save_as(path)
    assert attempt().reason == Reason.BURNED_IN
    assert list(files(tmp_path / "out")) == [tmp_path / "out" / taken.written]


def test_a_bomb_is_not_opened(slices: list[Path], tmp_path: Path) -> None:
    """A few hundred KiB that unfold to 300 MiB (PS3.5 A.5, deflated)."""
    ds = pydicom.dcmread(slices[0])
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    del ds.PixelData
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "bomb.dcm"
    ds.save_as(path)
    whole = path.read_bytes()
    start = 144 + pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength
    pack = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    parts = [pack.compress(zlib.decompress(whole[start:], -zlib.MAX_WBITS))]
    parts.append(pack.compress(b"\x42\0\x10\0OB\0\0" + (300 << 20).to_bytes(4, "little")))  # (0042,0010)
    parts += [pack.compress(bytes(1 << 20)) for _ in range(300)]
    path.write_bytes(whole[:start] + b"".join(parts) + pack.flush())
    assert path.stat().st_size < 4 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    (outcome,) = export(tmp_path / "in", tmp_path / "out", PSEUDONYMS, Released(tmp_path / "none"))
    assert outcome.written is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # it burst elsewhere
