"""DICOM files without the person: one file in, one file out, each by itself.

Names in the output are made of the site's own pseudonyms, for the names of folders and files identify too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pydicom
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from conf.exits import Exit, Stop
from conf.files import no_space, write_new
from tasks.data.deident import Pseudonyms, deidentify, identity
from tasks.data.guard import shared
from tasks.data.header import opened, whole
from tasks.data.quarantine import doubt
from tasks.data.released import REMEDY, Released
from tasks.data.source import Faulty, Reason, quietly, reading

_LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"  # Label Map Segmentation
#: PS3.4 B.5: the objects whose content the allow-list covers; those with pixels, and two kinds of labels
_CLASSES = frozenset(
    {
        uid.CTImageStorage,
        uid.EnhancedCTImageStorage,
        uid.LegacyConvertedEnhancedCTImageStorage,
        uid.MRImageStorage,
        uid.EnhancedMRImageStorage,
        uid.LegacyConvertedEnhancedMRImageStorage,
        uid.PositronEmissionTomographyImageStorage,
        uid.EnhancedPETImageStorage,
        uid.LegacyConvertedEnhancedPETImageStorage,
        uid.NuclearMedicineImageStorage,
        uid.ComputedRadiographyImageStorage,
        uid.DigitalXRayImageStorageForPresentation,
        uid.DigitalXRayImageStorageForProcessing,
        uid.DigitalMammographyXRayImageStorageForPresentation,
        uid.DigitalMammographyXRayImageStorageForProcessing,
        uid.BreastTomosynthesisImageStorage,
        uid.UltrasoundImageStorage,
        uid.UltrasoundMultiFrameImageStorage,
        uid.SecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
        uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
        uid.XRayAngiographicImageStorage,
        uid.XRayRadiofluoroscopicImageStorage,
        uid.VLEndoscopicImageStorage,
        uid.VLPhotographicImageStorage,
        uid.OphthalmicPhotography8BitImageStorage,
        uid.SegmentationStorage,
        _LABEL_MAP,
        uid.RTStructureSetStorage,
    }
)
_LABELS = frozenset({uid.SegmentationStorage, _LABEL_MAP, uid.RTStructureSetStorage})
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")


@dataclass(frozen=True)
class Outcome:
    """What became of one file. `source` and `detail` stay at the site.

    Attributes:
        written: its path below the destination; None: refused.
    """

    source: str
    written: str | None
    reason: Reason | None = None
    detail: str = ""


def export(
    source: Path,
    destination: Path,
    pseudonyms: Pseudonyms,
    released: Released,
    *,
    names: frozenset[str] = frozenset(),
    barred: frozenset[str] = frozenset(),
) -> Iterator[Outcome]:
    """Write every file below `source` without the person, one after the other; several may run at once.

    Pixel data stay as they are, encapsulated ones too. Nothing is overwritten.

    Args:
        names: labels of structures that may stay as they are. barred: patients who asked to be forgotten.

    Raises:
        Stop: (`NO_DATA_ROOT`, `CONFIG`) the folders will not do; (`DISK_FULL`).
    """
    check_folders(source, destination)
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        name = path.relative_to(source).as_posix()
        try:
            with quietly(), no_space(destination, "export again"):
                written = export_file(path, destination, pseudonyms, released, names, barred)
        except Faulty as fault:
            yield Outcome(name, None, fault.reason, fault.detail)
        except OSError as error:
            text = f"{destination} cannot be written ({error.strerror}); choose another folder"
            raise Stop(Exit.CONFIG, text) from None
        else:
            yield Outcome(name, written.relative_to(destination).as_posix())


def check_folders(source: Path, destination: Path) -> None:
    """Refuse a source that is none, and a destination within it.

    Raises:
        Stop: (`NO_DATA_ROOT`, `CONFIG`).
    """
    if not source.is_dir():
        raise Stop(Exit.NO_DATA_ROOT, f"{source} is not a folder; name the folder of DICOM files")
    if destination.resolve().is_relative_to(source.resolve()):
        raise Stop(Exit.CONFIG, f"{destination} lies in the source {source}; choose a folder outside")


def export_file(
    path: Path,
    destination: Path,
    pseudonyms: Pseudonyms,
    released: Released,
    names: frozenset[str] = frozenset(),
    barred: frozenset[str] = frozenset(),
) -> Path:
    """Write one file without the person: `patient/series/instance.dcm` below `destination`, all pseudonyms.

    Raises:
        Faulty: why it is not written.
    """
    with reading(path):
        _guarded(path)
        dataset = opened(path, pixels=True)
        _check(dataset)
        patient, why = pseudonyms.patient(identity(dataset)), doubt(dataset, leaving=True)
    if patient in barred:
        raise Faulty(Reason.BARRED, "forgotten on request")
    if why and not released.holds(path):
        raise Faulty(Reason.BURNED_IN, why + REMEDY)
    with reading(path):
        out = deidentify(dataset, pseudonyms, names)
        if why or str(dataset.get("BurnedInAnnotation") or "") == "NO":
            out.BurnedInAnnotation = "NO"
        target = destination / patient / str(out.SeriesInstanceUID) / f"{out.SOPInstanceUID}.dcm"
        blob = _encoded(out, dataset.file_meta.TransferSyntaxUID)
    _write_new(target, blob)
    return target


def _guarded(path: Path) -> None:
    """Let a limited process parse the file first: what bursts there is not opened here.

    Raises:
        Faulty: it is no DICOM file, too large inside, too deep, or broken.
    """
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":  # PS3.10 7.1
            raise Faulty(Reason.OBJECT, "not a DICOM file (PS3.10)")
    shared().call(whole, path)


def _check(dataset: Dataset) -> None:
    kind = str(dataset.get("SOPClassUID") or "")
    missing = [name for name in _NEEDED if not dataset.get(name)]
    if missing:
        raise Faulty(Reason.UNREADABLE, f"no {missing[0]}")
    if kind not in _CLASSES:
        raise Faulty(Reason.OBJECT, f"{uid.UID(kind).name}; images, SEG and RTSTRUCT are exported")
    if not identity(dataset):
        raise Faulty(Reason.NO_PATIENT, "no PatientID (0010,0020)")
    if kind not in _LABELS and not any(name in dataset for name in _PIXELS):
        raise Faulty(Reason.OBJECT, "an image without pixels")
    syntax = uid.UID(str(dataset.file_meta.get("TransferSyntaxUID") or ""))
    if syntax.is_private or not syntax.is_transfer_syntax:
        raise Faulty(Reason.UNREADABLE, f"{syntax or 'no'} transfer syntax; need one of PS3.5")


def _encoded(out: Dataset, syntax: str) -> bytes:
    """The bytes of a file: preamble of zeros, file meta anew (PS3.10 7.1)."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = out.SOPClassUID
    meta.MediaStorageSOPInstanceUID = out.SOPInstanceUID
    meta.TransferSyntaxUID = uid.UID(syntax)
    out.file_meta = meta
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, out, enforce_file_format=True)
    return buffer.getvalue()


def _write_new(target: Path, blob: bytes) -> None:
    """Write a file whole or not at all, never over another.

    Raises:
        Faulty: (`EXISTS`) it is there.
    """
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        write_new(target, blob)
    except FileExistsError:
        raise Faulty(
            Reason.EXISTS, f"{target.name} was written before, or the instance stands here twice"
        ) from None
