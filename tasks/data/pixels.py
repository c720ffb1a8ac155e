"""From stored pixels to values: runs in a guarded worker, one frame at a time.

Modality LUT and rescale: PS3.3 C.11.1. Photometric interpretations: C.7.6.3.1.2. SUVbw: C.8.9.1.1.3, with
decay as the QIBA profile computes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.valuerep import DA, TM

from tasks.data.guard import Answer
from tasks.data.source import Array, Faulty, Reason, stored

_LEAST_BQ = 1e4  # of a dose: less is one in MBq
_DT = re.compile(r"(\d{8})(\d{6}(?:\.\d{1,6})?)([+-]\d{4})?")  # PS3.5 6.2, to the second at least
_CT = (
    "1.2.840.10008.5.1.4.1.1.2",  # CT, Enhanced CT, Legacy Converted Enhanced CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.2.2",
)


def frames(path: Path, indices: list[int]) -> Iterator[Answer]:
    """Job: values (`CHW`: uint8, int16 or float32) of the frames asked for, in that order."""
    from tasks.data.header import opened

    ds = opened(path, pixels=True)
    factor = suv_factor(ds)
    units = units_of(ds, factor)
    for index, (pixels, facts) in zip(indices, decoded(ds, indices), strict=True):
        yield (
            {},
            stored(
                _values(
                    pixels, ds, _frame(ds, index), str(facts["photometric_interpretation"]), units, factor
                )
            ),
        )


def decoded(ds: Dataset, indices: list[int] | None = None) -> Iterator[tuple[Array, dict[str, Any]]]:
    """Stored pixels, frame by frame, as pydicom's `pixel_array` has them.

    Raises:
        Faulty: the syntax has no decoder here, or the header asks for more than the file can hold.
    """
    syntax = getattr(ds.file_meta, "TransferSyntaxUID", None) if hasattr(ds, "file_meta") else None
    if syntax is None:
        raise Faulty(Reason.UNREADABLE, "no TransferSyntaxUID (0002,0010): its pixels cannot be decoded")
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise Faulty(
            Reason.UNREADABLE, f"transfer syntax {syntax} ({syntax.name}) has no decoder here"
        ) from None
    if indices is None:
        yield from decoder.iter_array(ds)
    else:
        yield from decoder.iter_array(ds, indices=indices)


def units_of(ds: Dataset, factor: float | None) -> str:
    """`HU`, `SUVbw`, or empty where the values' unit is not known."""
    kind = str(ds.get("SOPClassUID", ""))
    if kind in _CT:
        transform = _frame(ds, 0)
        declared = str(transform.get("RescaleType") or ds.get("RescaleType") or "HU").strip()
        known = "RescaleIntercept" in transform or "ModalityLUTSequence" in transform
        return "HU" if known and declared == "HU" else ""
    return "SUVbw" if factor is not None else ""


def suv_factor(ds: Dataset) -> float | None:
    """What turns rescaled PET values into SUVbw (g/ml); None where attributes are missing or contradict."""
    try:
        return _suv_factor(ds)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
        return None


def _suv_factor(ds: Dataset) -> float | None:
    units = str(ds.get("Units") or "").strip()  # (0054,1001)
    if units == "GML":
        return 1.0 if str(ds.get("SUVType") or "BW").strip() == "BW" else None  # (0054,1006)
    if units == "CNTS":  # Philips keeps the factor in a private element (7053,xx00)
        factor = float(ds.private_block(0x7053, "Philips PET Private Group")[0x00].value)
        return factor if 0 < factor < np.inf else None
    corrected = ds.get("CorrectedImage") or ()  # (0028,0051)
    if units != "BQML" or "DECY" not in corrected or "ATTN" not in corrected:
        return None
    tracer = ds.RadiopharmaceuticalInformationSequence[0]
    dose, half_life_s = float(tracer.RadionuclideTotalDose), float(tracer.RadionuclideHalfLife)  # Bq, s
    weight_g = 1000.0 * float(ds.PatientWeight)
    if str(ds.DecayCorrection) == "ADMIN":
        waited_s = 0.0
    elif str(ds.DecayCorrection) == "START":
        waited_s = _waited_s(ds, tracer)
    else:
        return None
    factor = weight_g / (dose * 2.0 ** (-waited_s / half_life_s))
    sound = dose > _LEAST_BQ and half_life_s > 0 and weight_g > 0 and 0 <= waited_s < 20 * half_life_s
    return factor if sound and np.isfinite(factor) else None


def _waited_s(ds: Dataset, tracer: Dataset) -> float:
    """Seconds from injection to the start of the series, to which START corrects decay.

    Raises:
        ValueError: the series says it began after its own acquisition (times rewritten by a workstation),
            or nobody knows how its time of day relates to that of the injection.
    """
    start = _moment(str(ds.SeriesDate), str(ds.SeriesTime))
    if start > _moment(str(ds.get("AcquisitionDate") or ds.SeriesDate), str(ds.AcquisitionTime)):
        raise ValueError("the series began after its acquisition")
    given = _DT.fullmatch(str(tracer.get("RadiopharmaceuticalStartDateTime") or ""))
    if given is not None:
        if given[3] and given[3] != str(ds.get("TimezoneOffsetFromUTC") or ""):  # (0008,0201)
            raise ValueError("the injection is told in another zone than the series")
        injected = _moment(given[1], given[2])
    else:
        injected = _moment(str(ds.SeriesDate), str(tracer.RadiopharmaceuticalStartTime))
    return (start - injected).total_seconds()


def _moment(date: str, time: str) -> datetime:
    day, hour = DA(date), TM(time)
    if day is None or hour is None:
        raise ValueError("no date or time")
    return datetime.combine(day, hour)


def _frame(ds: Dataset, index: int) -> Dataset:
    """The value transformation of one frame (PS3.3 C.7.6.16.2.9), or the file's own."""
    own = ds.get("PerFrameFunctionalGroupsSequence") or ()
    shared = ds.get("SharedFunctionalGroupsSequence") or ()
    for groups in (*own[index : index + 1], *shared[:1]):
        items = groups.get("PixelValueTransformationSequence")
        if items:
            found: Dataset = items[0]
            return found
    return ds


def _values(
    pixels: Array, ds: Dataset, transform: Dataset, photometric: str, units: str, factor: float | None
) -> Array:
    """`CHW` of one frame."""
    if photometric == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, ds)[..., :3]
    if pixels.ndim == 3:
        return np.moveaxis(pixels, -1, 0)
    if transform.get("ModalityLUTSequence"):
        values: Array = apply_modality_lut(pixels, transform)
        low, high = float(values.min()), float(values.max())
    else:
        slope = 1.0 if (given := transform.get("RescaleSlope")) is None else float(given)
        intercept = float(transform.get("RescaleIntercept") or 0.0)
        values = _scaled(pixels, slope * (factor or 1.0), intercept * (factor or 1.0))
        low, high = (slope * end + intercept for end in _range(pixels, ds))
    if photometric == "MONOCHROME1" and not units:  # the least value is shown white
        values = low + high - values.astype(np.float64)
        values = whole if np.array_equal(values, whole := values.astype(np.int64)) else values
    return values[None]


def _scaled(pixels: Array, slope: float, intercept: float) -> Array:
    if (slope, intercept) == (1.0, 0.0):
        return pixels
    if pixels.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer() and abs(slope) < 2**20:
        return pixels.astype(np.int64) * int(slope) + int(intercept)
    return pixels * np.float64(slope) + intercept


def _range(pixels: Array, ds: Dataset) -> tuple[float, float]:
    """The least and the largest value that pixels could have as stored."""
    if pixels.dtype.kind not in "iu":
        return float(pixels.min()), float(pixels.max())
    bits = int(ds.get("BitsStored") or pixels.dtype.itemsize * 8)
    return (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if pixels.dtype.kind == "i" else (0.0, 2.0**bits - 1)
