"""Values of pixels against the formulas of PS3.3, and SUV against the mapping that a hospital stored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    UltrasoundImageStorage,
    generate_uid,
)

from tasks.data.header import facts_of
from tasks.data.pixels import frames, suv_factor
from tasks.data.source import Faulty

DRAW = np.random.default_rng(5)


def image(pixels: np.ndarray, sop: str = CTImageStorage, bits: int | None = None, **more: object) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = sop, generate_uid(), generate_uid()
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    ds.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = 8 * pixels.dtype.itemsize
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.TransferSyntaxUID = UID(sop), ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    for name, value in more.items():
        setattr(ds, name, value)
    return ds


def values(tmp_path: Path, ds: Dataset) -> np.ndarray:
    path = tmp_path / "one.dcm"
    ds.save_as(path, enforce_file_format=True)
    ((_, array),) = frames(path, [0])
    assert array is not None
    return array


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [(None, None, np.int16), (1, -1024, np.int16), (3, 7, np.float32), (0.25, -1.5, np.float32)],
)
def test_rescale(tmp_path: Path, slope: float | None, intercept: float | None, dtype: type) -> None:
    pixels = DRAW.integers(0, 30000, (5, 4), dtype=np.uint16)
    given: dict[str, Any] = (
        {} if slope is None else {"RescaleSlope": str(slope), "RescaleIntercept": str(intercept)}
    )
    found = values(tmp_path, image(pixels, **given))
    assert found.dtype == dtype
    assert np.array_equal(found[0], pixels.astype(int) * (slope or 1) + (intercept or 0))


@pytest.mark.parametrize("signed", [False, True])
def test_bits_that_are_not_stored_do_not_count(tmp_path: Path, signed: bool) -> None:
    low, high = (-2048, 2048) if signed else (0, 4096)
    wanted = DRAW.integers(low, high, (4, 4), dtype=np.int16)
    junk = DRAW.integers(0, 16, (4, 4), dtype=np.uint16) << 12
    held = ((wanted.astype(np.uint16) & 0x0FFF) | junk).view(np.int16 if signed else np.uint16)
    assert np.array_equal(values(tmp_path, image(held, bits=12))[0], wanted)


@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (2, 10), (-1, 4095)])
def test_monochrome1_is_turned_so_that_more_is_brighter(tmp_path: Path, slope: int, intercept: int) -> None:
    pixels = DRAW.integers(0, 4096, (3, 3), dtype=np.uint16)
    ds = image(pixels, ComputedRadiographyImageStorage, 12, PhotometricInterpretation="MONOCHROME1")
    ds.RescaleSlope, ds.RescaleIntercept = str(slope), str(intercept)
    assert np.array_equal(values(tmp_path, ds)[0], (4095 - pixels.astype(int)) * slope + intercept)


def test_monochrome1_does_not_turn_hounsfield_units(tmp_path: Path) -> None:
    pixels = DRAW.integers(0, 4096, (3, 3), dtype=np.uint16)
    ds = image(pixels, bits=12, PhotometricInterpretation="MONOCHROME1", RescaleIntercept="-1024")
    assert np.array_equal(values(tmp_path, ds)[0], pixels.astype(int) - 1024)


def test_a_palette_becomes_its_colours(tmp_path: Path) -> None:
    pixels = DRAW.integers(0, 16, (6, 5), dtype=np.uint8)
    ds = image(pixels, UltrasoundImageStorage, PhotometricInterpretation="PALETTE COLOR")
    table = DRAW.integers(0, 256, (3, 16), dtype=np.uint8)
    for name, colours in zip(("Red", "Green", "Blue"), table, strict=True):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [16, 0, 8])
        setattr(ds, f"{name}PaletteColorLookupTableData", colours.tobytes())
    assert np.array_equal(values(tmp_path, ds), table[:, pixels])


def test_ybr_becomes_rgb(tmp_path: Path) -> None:
    ybr = DRAW.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    ds = image(ybr, UltrasoundImageStorage, PhotometricInterpretation="YBR_FULL")
    y, b, r = (ybr[..., i].astype(float) - (0, 128, 128)[i] for i in range(3))  # C.7.6.3.1.2
    wanted = np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b])
    assert np.abs(values(tmp_path, ds) - np.clip(wanted, 0, 255)).max() <= 1


def test_a_modality_table_is_looked_up(tmp_path: Path) -> None:
    pixels = DRAW.integers(0, 8, (4, 4), dtype=np.uint8)
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [8, 0, 16], "US"
    held = DRAW.integers(0, 5000, 8, dtype=np.uint16)
    table.add_new(0x00283006, "US", held.tolist())
    ds = image(pixels, ComputedRadiographyImageStorage, ModalityLUTSequence=[table])
    assert np.array_equal(values(tmp_path, ds)[0], held[pixels])


@pytest.mark.parametrize(
    ("pixels", "dtype"),
    [
        (np.array([[0, 255]], np.uint16), np.uint8),
        (np.array([[0, 256]], np.uint16), np.int16),
        (np.array([[0, 65535]], np.uint16), np.float32),
    ],
)
def test_the_smallest_type_that_holds_a_frame(tmp_path: Path, pixels: np.ndarray, dtype: type) -> None:
    found = values(tmp_path, image(pixels))
    assert found.dtype == dtype
    assert np.array_equal(found[0], pixels)


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    ds = image(np.ones((2, 2), np.uint16), RescaleSlope="1e300", RescaleIntercept="0")
    with pytest.raises(Faulty, match="not finite"):
        values(tmp_path, ds)


PET = {
    "Units": "BQML",
    "DecayCorrection": "START",
    "CorrectedImage": ["ATTN", "DECY"],
    "PatientWeight": "70",
    "SeriesDate": "20200101",
    "SeriesTime": "120000",
    "AcquisitionTime": "120500",
}
TRACER = {
    "RadionuclideTotalDose": "400e6",
    "RadionuclideHalfLife": "6588",
    "RadiopharmaceuticalStartTime": "110000",
}


def pet(**changes: object) -> Dataset:
    ds, tracer = Dataset(), Dataset()
    for name, value in {**PET, **TRACER, **changes}.items():
        if value is not None:
            setattr(tracer if name in TRACER else ds, name, value)
    ds.RadiopharmaceuticalInformationSequence = [tracer]
    return ds


def test_suv_is_what_the_hospitals_own_mapping_says(real: Callable[[str], Path]) -> None:
    """The set holds a Real World Value Mapping object for its slices: another program's factor."""
    factors, mapped = [], []
    for path in (real("dicom_series") / "pt_ge_petctac").iterdir():
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        if "ReferencedImageRealWorldValueMappingSequence" not in ds:
            factors.append(suv_factor(ds))
            continue
        for item in ds.ReferencedImageRealWorldValueMappingSequence:
            mapping = item.RealWorldValueMappingSequence[0]
            if "SUVbw" in mapping.LUTLabel:
                mapped.append(float(mapping.RealWorldValueSlope))
    assert factors == [pytest.approx(mapped[0], rel=1e-5)] * 10


@given(st.floats(1, 300), st.floats(1e6, 1e9), st.floats(6e3, 1e6), st.integers(0, 11))
def test_suv_is_linear_in_weight_and_decays(weight: float, dose: float, half: float, hour: int) -> None:
    found = suv_factor(
        pet(
            PatientWeight=f"{weight:.8g}",
            RadionuclideTotalDose=f"{dose:.8g}",
            RadionuclideHalfLife=f"{half:.8g}",
            RadiopharmaceuticalStartTime=f"{hour:02}0000",
        )
    )
    wanted = 1000 * weight / dose * 2 ** ((12 - hour) * 3600 / half)
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: None} for name in (*PET, *TRACER) if name != "SeriesDate"),
        {"Units": "CNTS"},
        {"DecayCorrection": "NONE"},
        {"CorrectedImage": ["ATTN"]},
        {"CorrectedImage": ["DECY"]},
        {"PatientWeight": "0"},
        {"RadionuclideTotalDose": "0"},
        {"RadionuclideTotalDose": "400"},  # MBq
        {"RadionuclideHalfLife": "-5"},
        {"RadionuclideHalfLife": "60"},
        {"RadiopharmaceuticalStartTime": "130000"},
        {"AcquisitionTime": "115959"},
        {"Units": "GML", "SUVType": "LBM"},
    ],
    ids=str,
)
def test_suv_needs_attributes_that_agree(changes: dict[str, object]) -> None:
    assert suv_factor(pet(**changes)) is None


@pytest.mark.parametrize(
    ("zone", "own", "sound"),
    [
        ("", "", True),
        ("", "+0100", True),
        ("+0100", "+0100", True),
        ("+0000", "+0100", False),
        ("+0000", "", False),
    ],
)
def test_an_injection_in_another_time_zone_gives_no_suv(zone: str, own: str, sound: bool) -> None:
    ds = pet(RadiopharmaceuticalStartTime=None, TimezoneOffsetFromUTC=own or None)
    ds.RadiopharmaceuticalInformationSequence[0].RadiopharmaceuticalStartDateTime = f"20200101110000.5{zone}"
    wanted = 70_000 / 400e6 * 2 ** (3599.5 / 6588)
    assert suv_factor(ds) == (pytest.approx(wanted, rel=1e-9) if sound else None)


@pytest.mark.parametrize(
    ("value", "wanted"), [("0.000551", 0.000551), ("0", None), ("-1", None), (None, None)]
)
def test_suv_of_counts_needs_the_makers_factor(value: str | None, wanted: float | None) -> None:
    ds = pet(Units="CNTS")
    block = ds.private_block(0x7053, "Philips PET Private Group", create=True)
    if value is not None:
        block.add_new(0x00, "DS", value)
    assert suv_factor(ds) == wanted


def test_suv_decayed_to_the_injection_needs_no_time() -> None:
    ds = pet(DecayCorrection="ADMIN", SeriesTime=None, AcquisitionTime=None)
    assert suv_factor(ds) == pytest.approx(70_000 / 400e6)


@pytest.mark.parametrize(
    ("sop", "more", "units"),
    [
        (CTImageStorage, {"RescaleIntercept": "-1024"}, "HU"),
        (CTImageStorage, {"RescaleIntercept": "0", "RescaleType": "HU"}, "HU"),
        (CTImageStorage, {"RescaleIntercept": "0", "RescaleType": "US"}, ""),
        (CTImageStorage, {}, ""),  # stored values, of whatever unit
        (ComputedRadiographyImageStorage, {"RescaleType": "HU"}, ""),
        ("1.2.840.10008.5.1.4.1.1.128", {"Units": "GML"}, "SUVbw"),
        ("1.2.840.10008.5.1.4.1.1.128", {"Units": "BQML"}, ""),
    ],
)
def test_units(sop: str, more: dict[str, object], units: str) -> None:
    assert facts_of(image(np.zeros((2, 2), np.uint16), sop, **more))["units"] == units  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "held"),
    [
        ({}, False),
        ({"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"]}, False),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, True),
        ({"ImageType": ["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 PROT"]}, True),
        ({"PhotometricInterpretation": "RGB"}, True),
        ({"PhotometricInterpretation": "MONOCHROME1"}, False),
    ],
)
def test_pages_among_a_scanners_images_are_held_back(more: dict[str, object], held: bool) -> None:
    assert bool(facts_of(image(np.zeros((2, 2), np.uint16), **more))["doubt"]) is held  # type: ignore[arg-type]
