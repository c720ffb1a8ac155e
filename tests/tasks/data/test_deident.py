import datetime
import re
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.dataset import Dataset

from tasks.data.allowed import ALLOWED, Keep, Words
from tasks.data.deident import SHIFT_FROM, SHIFTS, Pseudonyms, deidentify, facts
from tests.canary import annex_e

KEY = b"k" * 32


#: kept though the Basic Profile removes them: the options that say so
OPTIONAL = {
    "Retain Patient Characteristics": {"PatientAge", "PatientSize", "PatientWeight", "PatientSex"},
    "Retain Modified Dates": {
        keyword_for_tag(tag) for tag, r in ALLOWED.items() if r in (Keep.DATE, Keep.TIME, Keep.DATETIME)
    },
}


def test_nothing_that_the_profile_changes_stays_unchanged() -> None:
    by_option = set().union(*OPTIONAL.values())
    harmless = {Keep.UID, Keep.EMPTY, Keep.PATIENT, Keep.NAME, Keep.ITEMS}
    for tag, action in annex_e().items():
        rule = ALLOWED.get(tag)
        if rule is None or keyword_for_tag(tag) in by_option:
            continue
        assert rule in harmless or hasattr(rule, "value"), (keyword_for_tag(tag), action, rule)
        if rule is Keep.ITEMS:  # its UIDs are replaced: the U* of X/Z/U*
            assert "U" in action


def test_no_free_text_is_listed_as_it_is() -> None:
    text = {"AE", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT", "UN"}
    for tag, rule in ALLOWED.items():
        if dictionary_VR(tag) in text:
            assert rule not in (Keep.NUMBER, Keep.BYTES, Keep.DATE, Keep.TIME, Keep.UID), keyword_for_tag(tag)
        if dictionary_VR(tag) == "CS":
            assert isinstance(rule, Words) or hasattr(rule, "value"), keyword_for_tag(tag)


@given(st.text(max_size=20), st.dates(datetime.date(1930, 1, 1)), st.integers(0, 4000))
def test_dates_move_back_and_keep_their_distances(patient: str, day: datetime.date, gap: int) -> None:
    later = min(day + datetime.timedelta(gap), datetime.date(9999, 1, 1))
    ds = Dataset()
    ds.PatientID, ds.StudyDate, ds.SeriesDate = patient, f"{day:%Y%m%d}", f"{later:%Y%m%d}"
    out = deidentify(ds, Pseudonyms(KEY))
    first, second = (
        datetime.datetime.strptime(v, "%Y%m%d").replace(tzinfo=datetime.UTC).date()
        for v in (out.StudyDate, out.SeriesDate)
    )
    assert second - first == later - day
    assert SHIFT_FROM <= (day - first).days < SHIFT_FROM + SHIFTS


def test_names_are_stable_under_one_key_and_strange_under_another() -> None:
    a, b, other = Pseudonyms(KEY), Pseudonyms(KEY), Pseudonyms(b"o" * 32)
    assert a.patient("DOE") == b.patient("DOE") != other.patient("DOE")
    uid = "1.2.840.113619.2.5.1762583153.215519.978957063.78"
    assert a.uid(uid) == b.uid(uid) != other.uid(uid)
    assert re.fullmatch(r"2\.25\.[1-9]\d{30,38}", a.uid(uid))
    assert a.uid("1.2.840.10008.5.1.4.1.1.2") == "1.2.840.10008.5.1.4.1.1.2"
    assert a.uid("1.2.840.10008.5.1.4.1.1.2.4711") != "1.2.840.10008.5.1.4.1.1.2.4711"


@pytest.mark.parametrize(
    ("age", "kept", "decade"),
    [
        ("041Y", "041Y", "40-49"),
        ("089Y", "089Y", "80-89"),
        ("090Y", "090Y", "90+"),
        ("103Y", "090Y", "90+"),
        ("999M", "999M", "0-9"),
        ("006W", "006W", "0-9"),
        ("JANE", None, ""),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_ages_over_89_are_one_class(age: str, kept: str | None, decade: str) -> None:
    ds = Dataset()
    ds.PatientAge = age
    assert deidentify(ds, Pseudonyms(KEY)).get("PatientAge") == kept
    assert facts(ds)["age"] == decade


def test_facts_are_of_finite_vocabularies() -> None:
    ds = Dataset()
    ds.Manufacturer, ds.Modality, ds.PatientSex = "GE MEDICAL SYSTEMS", "CT", "M"
    ds.KVP, ds.SliceThickness, ds.ContrastBolusAgent = "118", "2.5", "Jane's own"
    assert facts(ds) == {
        "manufacturer": "ge",
        "modality": "CT",
        "sex": "M",
        "age": "",
        "kvp": "120",
        "field_strength": "",
        "slice_thickness": "up to 3",
        "contrast": "yes",
    }
    mr = Dataset()
    mr.Modality, mr.MagneticFieldStrength, mr.Manufacturer = "MR", "15000", "Somebody"
    assert (facts(mr)["field_strength"], facts(mr)["manufacturer"]) == ("1.5", "other")
    odd = Dataset()
    odd.Modality, odd.PatientSex = "DOE", "JANE"
    assert set(facts(odd).values()) == {"other", ""}


def test_text_hides_in_no_number_code_or_name() -> None:
    ds = Dataset()
    ds.PatientID = "P"
    ds.Rows = [int.from_bytes(b"JA", "little"), int.from_bytes(b"NE", "little")]
    ds.SliceVector = [int.from_bytes(b"JA", "little"), int.from_bytes(b"NE", "little")]
    ds.DimensionIndexValues = [int.from_bytes(b"JANE", "little")]
    ds.ImageType = ["ORIGINAL", "DOE JANE"]
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "10200004", "SCT", "Jane's liver"
    odd = Dataset()
    odd.CodeValue, odd.CodingSchemeDesignator, odd.CodeMeaning = "DOE", "99JANE", "Jane"
    ds.AnatomicRegionSequence = [code, odd]
    roi = [Dataset(), Dataset()]
    for number, name in enumerate(("Jane's tumour", "liver"), 1):
        roi[number - 1].ROINumber, roi[number - 1].ROIName = number, name
    ds.StructureSetROISequence = roi
    out = deidentify(ds, Pseudonyms(KEY), frozenset({"liver"}))
    assert not {"Rows", "SliceVector", "DimensionIndexValues"} & set(out.dir())
    assert out.ImageType == "ORIGINAL"
    assert [c.CodeMeaning for c in out.AnatomicRegionSequence] == ["Liver structure (body structure)"]
    assert [r.ROIName for r in out.StructureSetROISequence] == ["LABEL 1", "liver"]


def test_marks_of_the_profile_are_set() -> None:
    ds = Dataset()
    ds.PatientID, ds.PatientBirthDate = "4711", "19610402"
    out = deidentify(ds, Pseudonyms(KEY))
    assert out.PatientIdentityRemoved == "YES"
    assert out.PatientID == out.PatientName == Pseudonyms(KEY).patient("4711")
    assert out.PatientBirthDate == ""
    assert [c.CodeValue for c in out.DeidentificationMethodCodeSequence] == [
        "113100",
        "113105",
        "113107",
        "113108",
    ]
    assert out.LongitudinalTemporalInformationModified == "MODIFIED"


def test_pixels_stay_and_what_hides_behind_them_goes(real: Callable[[str], Path]) -> None:
    path = next((real("dicom_series") / "mr_siemens_espree_t1post").glob("*.dcm"))
    ds = pydicom.dcmread(path)
    before = ds.pixel_array.tobytes()
    ds.PixelData += b"JANE DOE"
    out = deidentify(ds, Pseudonyms(KEY))
    assert b"JANE" not in out.PixelData
    assert out.PixelData == before
