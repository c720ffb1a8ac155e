"""What is read of a DICOM file before its pixels: runs in a guarded worker, answers plain facts.

Planes come from PS3.3 C.7.6.2 (Image Plane) for single-frame files and from the functional groups of
C.7.6.16 for multi-frame ones.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import pydicom
from pydantic import BaseModel, ConfigDict, ValidationError
from pydicom.dataset import Dataset, FileDataset
from pydicom.filereader import read_partial

from tasks.data.deident import facts, identity
from tasks.data.drawn import RTSTRUCT
from tasks.data.guard import Answer, Guard
from tasks.data.pixels import suv_factor, units_of
from tasks.data.quarantine import doubt
from tasks.data.rtstruct import DrawnOn, drawn_on
from tasks.data.source import Faulty, Reason

Three = tuple[float, float, float]
Six = tuple[float, float, float, float, float, float]

#: float, double float and integer pixel data
PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_MAGIC = b"DICM"  # PS3.10 7.1
#: first bytes of a file without preamble: group 2 or 8, element below 0x100, little or big endian
_BARE = re.compile(rb"[\x02\x08]\0.\0|\0[\x02\x08]\0.", re.DOTALL)
_MAX_FRAMES = 100_000
_MAX_DIMENSIONS = 16
_MAX_KEY = 256  # characters: keys are compared, never shown

#: what tells volumes of one series apart: attribute by our name, single-frame or in a functional group
KEYS = {
    "stack": ("StackID",),
    "temporal": ("TemporalPositionIdentifier", "TemporalPositionIndex"),
    "acquisition": ("AcquisitionNumber",),
    "echo": ("EchoNumbers",),
    "echo_time": ("EchoTime", "EffectiveEchoTime"),
    "b_value": ("DiffusionBValue",),
    "gradient": ("DiffusionGradientOrientation",),
    "trigger": ("TriggerTime", "NominalCardiacTriggerDelayTime"),
    "phase": ("NominalPercentageOfCardiacPhase",),
    "image_type": ("ImageType", "FrameType"),
    "inversion": ("InversionTime", "InversionTimes"),
    "flip": ("FlipAngle",),
    "frame_time": ("FrameReferenceTime",),
    "kernel": ("ConvolutionKernel",),
    "energy": ("KVP",),
    "acquired": ("AcquisitionDateTime", "FrameAcquisitionDateTime"),
    "acquisition_time": ("AcquisitionTime",),
    "content_time": ("ContentTime",),
}


class Plane(BaseModel):
    """One frame's place. Positions in mm, LPS+; spacing between rows, between columns."""

    model_config = ConfigDict(frozen=True)

    position: Three | None = None
    orientation: Six | None = None
    spacing: tuple[float, float] | None = None
    keys: dict[str, str] = {}


class Header(BaseModel):
    """One file. `planes` holds one for each frame, or one where frames have no places of their own."""

    model_config = ConfigDict(frozen=True)

    sop_class: str
    sop_instance: str
    series: str
    patient: str
    modality: str
    frame_of_reference: str
    rows: int
    columns: int
    frames: int
    samples: int
    units: str
    has_pixels: bool
    scout: bool
    instance: int
    planes: list[Plane]
    refers_to: list[str]
    refers_to_frames: list[str]
    refers_to_instances: list[str]
    groups: dict[str, str]
    doubt: str


def read_header(path: Path, guard: Guard) -> Header:
    """The header of a file that nobody has looked at yet.

    Raises:
        Faulty: it is no DICOM file, or `Guard.stream`'s reasons.
    """
    facts, _ = guard.call(header, path)
    return checked(path, facts)


def checked(path: Path, facts: Mapping[str, Any]) -> Header:
    """What a worker said of a header, if it has that form.

    Raises:
        Faulty: it has not.
    """
    try:
        return Header.model_validate(facts)
    except ValidationError:
        raise Faulty(Reason.UNREADABLE, f"{path.name}: its parser died (an answer of another form)") from None


def whole(path: Path) -> Iterator[Answer]:
    """Job: nothing, but that all of the file can be parsed."""
    opened(path, pixels=True)
    yield {}, None


def header(path: Path) -> Iterator[Answer]:
    """Job: the facts of a `Header`."""
    yield facts_of(opened(path, pixels=False)), None


def opened(path: Path, *, pixels: bool) -> FileDataset:
    """The data set. Unless they are asked for, its pixels are not read: their element is there, and empty.

    Raises:
        Faulty: not DICOM. A file without preamble is taken where it names its SOP class.
    """
    with path.open("rb") as file:
        head = file.read(132)
        bare = head[128:] != _MAGIC
        if not begins_dicom(head):
            raise Faulty(Reason.UNREADABLE, "not a DICOM file")
        seen: list[int] = []
        # a map, unlike a file, is not asked for the gigabytes that a damaged length names
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            stop = None if pixels else partial(_at_pixels, seen)
            ds = read_partial(cast("BinaryIO", view), stop_when=stop, force=bare)
    if bare and not _text(ds, "SOPClassUID").startswith("1.2.840.10008."):
        raise Faulty(Reason.UNREADABLE, "not a DICOM file")
    for tag in seen:
        ds.add_new(tag, "OW", b"")
    return ds


def begins_dicom(head: bytes) -> bool:
    """Whether a file's first 132 bytes could be those of a DICOM file."""
    return head[128:] == _MAGIC or _BARE.match(head) is not None


def _at_pixels(seen: list[int], tag: int, _vr: str | None, _length: int) -> bool:
    if tag in PIXELS:
        seen.append(tag)
    return bool(seen)


def facts_of(ds: FileDataset) -> dict[str, Any]:
    """The fields of `Header`. What a damaged header does not say is left empty."""
    references = _items(ds, "ReferencedSeriesSequence")
    instances = [i for r in references for i in _items(r, "ReferencedInstanceSequence")]
    structures = _structures(ds)
    return {
        "sop_class": _text(ds, "SOPClassUID"),
        "sop_instance": _text(ds, "SOPInstanceUID"),
        "series": _text(ds, "SeriesInstanceUID"),
        "patient": identity(ds),
        "modality": _text(ds, "Modality"),
        "frame_of_reference": _text(ds, "FrameOfReferenceUID"),
        "rows": _count(ds, "Rows"),
        "columns": _count(ds, "Columns"),
        "frames": _count(ds, "NumberOfFrames") or 1,
        "samples": _count(ds, "SamplesPerPixel") or 1,
        "units": units_of(ds, suv_factor(ds)),
        "has_pixels": any(tag in ds for tag in PIXELS),
        "scout": "LOCALIZER" in _text(ds, "ImageType").upper(),
        "instance": _count(ds, "InstanceNumber"),
        "planes": _planes(ds),
        "refers_to": [*(_text(r, "SeriesInstanceUID") for r in references), *structures.series],
        "refers_to_frames": list(structures.frames),
        "refers_to_instances": [
            *(_text(i, "ReferencedSOPInstanceUID") for i in instances),
            *structures.images,
        ],
        "groups": facts(ds),
        "doubt": doubt(ds),
    }


def _structures(ds: Dataset) -> DrawnOn:
    """What a structure set names; nothing where it is damaged or something else."""
    if _text(ds, "SOPClassUID") != RTSTRUCT:
        return DrawnOn()
    try:
        return drawn_on(ds)
    except (AttributeError, TypeError, ValueError):
        return DrawnOn()


def _planes(ds: Dataset) -> list[dict[str, Any]]:
    own = _items(ds, "PerFrameFunctionalGroupsSequence")
    if not own:
        return [_plane([ds])]
    if len(own) > _MAX_FRAMES:
        raise Faulty(Reason.LIMIT, f"{len(own)} frames; at most {_MAX_FRAMES} are read")
    shared = [_flat(item) for item in _items(ds, "SharedFunctionalGroupsSequence")[:1]]
    planes = [_plane([_flat(item), *shared]) for item in own]
    for plane, item in zip(planes, own, strict=True):
        content = (_items(item, "FrameContentSequence") or [Dataset()])[0]
        indices = _value(content, "DimensionIndexValues")
        for number, index in enumerate(_listed(indices)[:_MAX_DIMENSIONS]):
            plane["keys"][f"dimension_{number}"] = str(index)
    return planes


def _flat(groups: Dataset) -> Dataset:
    """A frame's functional groups (PS3.3 C.7.6.16.2) as one data set of their attributes."""
    flat = Dataset()
    for element in groups:
        if element.VR == "SQ" and element.value:
            flat.update({e.tag: e for e in element.value[0]})
    return flat


def _plane(sources: list[Dataset]) -> dict[str, Any]:
    def numbers(name: str, count: int) -> list[float] | None:
        return next((n for s in sources if (n := _numbers(s, name, count)) is not None), None)

    keys = {}
    for key, names in KEYS.items():
        for name in names:
            text = next((t for s in sources if (t := _text(s, name))), "")
            if text:
                keys[key] = text[:_MAX_KEY]
    return {
        "position": numbers("ImagePositionPatient", 3),
        "orientation": numbers("ImageOrientationPatient", 6),
        "spacing": numbers("PixelSpacing", 2) or numbers("ImagerPixelSpacing", 2),
        "keys": keys,
    }


def _value(ds: Dataset, name: str) -> Any:
    """An attribute, or None where it is missing or not of its type."""
    try:
        return ds.get(name)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # noqa: BLE001  converting a damaged value raises nearly anything
        return None


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple, pydicom.multival.MultiValue)) else [value]


def _text(ds: Dataset, name: str) -> str:
    return "\\".join(str(v) for v in _listed(_value(ds, name)) if v is not None).strip().strip("\0")


def _numbers(ds: Dataset, name: str, count: int) -> list[float] | None:
    values = _listed(_value(ds, name))
    try:
        return [float(v) for v in values] if len(values) == count else None
    except (TypeError, ValueError):
        return None


def _count(ds: Dataset, name: str) -> int:
    """A number of things; 0 where the header has none that makes sense."""
    values = _listed(_value(ds, name))
    try:
        return max(int(values[0]), 0) if values else 0
    except (TypeError, ValueError, OverflowError):
        return 0


def _items(ds: Dataset, name: str) -> list[Dataset]:
    value = _value(ds, name)
    return list(value) if isinstance(value, pydicom.sequence.Sequence) else []
