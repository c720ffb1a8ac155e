"""De-identification: coded facts for the cache, and whole data sets for export.

Both are allow-lists. Names come from HMAC-SHA-256 under the site's key, so they are the same in every file
of a site and mean nothing without the key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from functools import lru_cache
from typing import Any

from pydicom._uid_dict import UID_dictionary
from pydicom.datadict import dictionary_VM, dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from tasks.data.allowed import ALLOWED, EDITION, OPTIONS, Instead, Keep, Words
from tasks.data.codestream import blanked
from tasks.data.patients import pseudonym

#: days by which a patient's dates move into the past: at least, and how many different shifts there are
SHIFT_FROM, SHIFTS = 365, 3286
_OLDEST = 89  # years; HIPAA 164.514(b)(2)(i)(C) wants all above in one class

_DS = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")  # PS3.5 6.2
_IS = re.compile(r"[+-]?\d{1,12}")
_TM = re.compile(r"(\d{2}(\d{2}(\d{2})?)?)(\.\d{1,6})?")
_DT = re.compile(r"(\d{8})((\d{2}){0,3})(\.\d{1,6})?([+-]\d{4})?")
_AGE = re.compile(r"(\d{3})([DWMY])")
_KNOWN_LATE = frozenset({"1.2.840.10008.5.1.4.1.1.66.7"})  # Label Map Segmentation: newer than pydicom's list
_LETTERS = {"US": 1 << 13, "UL": 1 << 24}  # in a list of these, two or four letters would be more
_NEVER_EMPTY = ("RadiopharmaceuticalCodeSequence",)  # PS3.3 C.8.9.2: an item, or none of it
_DEEPEST = 16  # levels of sequences; PS3.3 needs five

#: substring of (0008,0070) Manufacturer, lower case, to the coded column
_MANUFACTURERS = {
    "ge medical": "ge",
    "ge healthcare": "ge",
    "siemens": "siemens",
    "philips": "philips",
    "canon": "canon",
    "toshiba": "canon",
    "fujifilm": "fujifilm",
    "hitachi": "fujifilm",
    "united imaging": "united_imaging",
}
_MAKERS = {
    "ge": "GE MEDICAL SYSTEMS",
    "siemens": "SIEMENS",
    "philips": "Philips",
    "canon": "CANON",
    "fujifilm": "FUJIFILM",
    "united_imaging": "UNITED IMAGING",
}
_MODALITIES = ALLOWED[0x00080060]


def facts(dataset: Dataset) -> dict[str, str]:
    """The coded columns of a header: all that a cache keeps of it beside pixels and geometry.

    `manufacturer`, `modality`, `sex`, `age` (decade), `kvp` (nearest 10 kV), `field_strength` (T),
    `slice_thickness` (mm, a class), `contrast` (whether an agent is named). Empty where unknown.
    """
    sex = _text(dataset, "PatientSex").upper()
    modality = _text(dataset, "Modality").upper()
    known = isinstance(_MODALITIES, Words) and modality in _MODALITIES.words
    return {
        "manufacturer": maker(_text(dataset, "Manufacturer")),
        "modality": modality if known else "other" if modality else "",
        "sex": sex if sex in ("M", "F", "O") else "",
        "age": _decade(_text(dataset, "PatientAge").upper()),
        "kvp": _nearest(_number(dataset, "KVP"), range(20, 160, 10)),
        "field_strength": _nearest(_tesla(dataset), (0.2, 0.35, 0.5, 1, 1.5, 3, 7)),
        "slice_thickness": _thickness(_number(dataset, "SliceThickness")),
        "contrast": "yes" if _text(dataset, "ContrastBolusAgent") else "",
    }


def maker(text: str) -> str:
    """The code of a manufacturer's name; `other` where it is not listed."""
    text = text.lower()
    return next((code for part, code in _MANUFACTURERS.items() if part in text), "other")


def _text(dataset: Dataset, keyword: str) -> str:
    try:
        if keyword not in dataset:  # of all frames of a multi-frame object (PS3.3 C.7.6.16)
            for groups in (dataset.get("SharedFunctionalGroupsSequence") or ())[:1]:
                inner = [g.value[0] for g in groups if g.VR == "SQ" and g.value]
                dataset = next((item for item in inner if keyword in item), dataset)
        return str(dataset.get(keyword) or "").strip()
    except Exception:  # noqa: BLE001  a broken element makes pydicom raise nearly anything
        return ""


def _number(dataset: Dataset, keyword: str) -> float | None:
    text = _text(dataset, keyword)
    return float(text) if _DS.fullmatch(text) else None


def _tesla(dataset: Dataset) -> float | None:
    field = _number(dataset, "MagneticFieldStrength")
    return field / 10_000 if field is not None and field > 100 else field  # some write gauss


def _nearest(value: float | None, classes: Sequence[float]) -> str:
    if value is None or value <= 0:
        return ""
    best = min(classes, key=lambda c: abs(c - value))
    return f"{best:g}" if abs(best - value) <= 0.15 * best else "other"


def _thickness(value: float | None) -> str:
    if value is None or value <= 0:
        return ""
    edges = (1.0, 2.0, 3.0, 5.0)
    above = [e for e in edges if value <= e]
    return f"up to {above[0]:g}" if above else "over 5"


def _decade(age: str) -> str:
    found = _AGE.fullmatch(age)  # PS3.5 6.2: AS, as in 041Y
    if found is None:
        return ""
    years = int(found[1]) if found[2] == "Y" else 0
    return "90+" if years > _OLDEST else f"{years // 10 * 10}-{years // 10 * 10 + 9}"


class Pseudonyms:
    """Names and shifts under a site's key: equal keys give equal ones."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def patient(self, identity: str) -> str:
        """The patient's key: 16 hex digits, the same as in the cache."""
        return pseudonym(self._key, identity)

    def uid(self, uid: str) -> str:
        """The UID instead of `uid`, of the kind of PS3.5 B.2; what PS3.6 defines stays."""
        if uid in UID_dictionary or uid in _KNOWN_LATE:
            return uid
        digest = self._digest("uid\0" + uid)
        return f"2.25.{uuid.UUID(bytes=digest[:16], version=4).int}"

    def days(self, identity: str) -> int:
        """How many days a patient's dates move: -365 to -3650, the same for all dates of a patient."""
        drawn = int.from_bytes(self._digest("days\0" + identity)[:8], "big") % SHIFTS
        return -(SHIFT_FROM + drawn)

    def _digest(self, text: str) -> bytes:
        return hmac.new(self._key, text.encode(errors="surrogateescape"), hashlib.sha256).digest()


def identity(dataset: Dataset) -> str:
    """What names the person in a file; empty where nothing does."""
    return _text(dataset, "PatientID")


def deidentify(dataset: Dataset, pseudonyms: Pseudonyms, names: frozenset[str] = frozenset()) -> Dataset:
    """A new data set with what may stay, and the marks of PS3.15 E.1.1 and E.3; file meta is not carried.

    Args:
        names: labels of structures that may stay as they are.

    Returns:
        Pixel data that decode as they did; bytes beyond the image's own end are cut, and comments within
        compressed frames are zeros.
    """
    person = identity(dataset)
    out = _Copy(pseudonyms, pseudonyms.patient(person), pseudonyms.days(person), names).of(dataset)
    out.PatientName = out.PatientID = pseudonyms.patient(person)
    out.PatientBirthDate = ""
    out.SpecificCharacterSet = "ISO_IR 192"
    out.PatientIdentityRemoved = "YES"
    out.DeidentificationMethod = f"wardround allow-list, PS3.15 {EDITION} Table E.1-1"
    out.DeidentificationMethodCodeSequence = [_code(value, "DCM", meaning) for value, meaning in OPTIONS]
    out.LongitudinalTemporalInformationModified = "MODIFIED"
    _tidy(out)
    _trim(out)
    return out


class _Copy:
    """One data set's copy, with what is constant in it."""

    def __init__(self, pseudonyms: Pseudonyms, patient: str, days: int, names: frozenset[str]) -> None:
        self._pseudonyms = pseudonyms
        self._patient = patient
        self._days = days
        self._names = names

    def of(self, source: Dataset, depth: int = 0) -> Dataset:
        """What may stay of a data set or item."""
        out = Dataset()
        for tag in source.keys():  # noqa: SIM118  iteration would decode what goes anyway
            rule = ALLOWED.get(tag)
            if rule is None:
                continue
            try:
                element = source[tag]
                value = self._value(rule, element, source, depth)
            except Exception:  # noqa: BLE001, S112  a broken value makes pydicom raise nearly anything
                continue
            if value is not None:
                new = DataElement(tag, element.VR, value)
                new.is_undefined_length = element.is_undefined_length  # encapsulated pixels
                out.add(new)
        return out

    def _value(self, rule: Keep | Words | Instead, element: DataElement, item: Dataset, depth: int) -> Any:
        """The value that stays; None: the element goes."""
        if element.VR not in dictionary_VR(element.tag).split(" or "):
            return None
        if element.VR != "SQ" and (_most(element) or element.VM) < element.VM:
            return None
        if isinstance(rule, Instead):
            return rule.value
        if isinstance(rule, Words):
            kept = _each(element, lambda word: word if word in rule.words else None)
            return "" if kept is None else kept
        if rule is Keep.CODES:
            codes = [code for code in map(_known, element.value) if code is not None]
            return codes if codes or element.keyword not in _NEVER_EMPTY else None
        if rule is Keep.ITEMS:
            return None if depth >= _DEEPEST else [self.of(inner, depth + 1) for inner in element.value]
        if rule in (Keep.NUMBER, Keep.BYTES):
            return element.value if rule is Keep.BYTES else _numbers(element)
        return self._text(rule, element, item)

    def _text(self, rule: Keep, element: DataElement, item: Dataset) -> Any:
        match rule:
            case Keep.UID:
                return _each(element, self._pseudonyms.uid)
            case Keep.DATE:
                return _each(element, self._date)
            case Keep.TIME:
                return _each(element, _time)
            case Keep.DATETIME:
                return _each(element, self._datetime)
            case Keep.PATIENT:
                return self._patient
            case Keep.NAME:
                number = item.get("ROINumber") or item.get("SegmentNumber") or 0
                return _each(element, lambda name: name if name in self._names else f"LABEL {int(number)}")
            case Keep.AGE:
                return _each(element, _age)
            case Keep.MAKER:
                return _MAKERS.get(maker(str(element.value)), "UNNAMED")
        return [] if element.VR == "SQ" else ""

    def _date(self, text: str) -> str | None:
        if len(text) != 8 or not text.isdecimal():
            return None
        try:
            day = date(int(text[:4]), int(text[4:6]), int(text[6:])) + timedelta(self._days)
        except (ValueError, OverflowError):
            return None
        return f"{day.year:04}{day:%m%d}"

    def _datetime(self, text: str) -> str | None:
        parts = _DT.fullmatch(text)
        day = self._date(parts[1]) if parts else None
        return None if parts is None or day is None else day + parts[2]


def _most(element: DataElement) -> int | None:
    """How many values PS3.6 allows, so that no text hides in a list of numbers; None: any number."""
    most = dictionary_VM(element.tag).rpartition("-")[2]
    return int(most) if most.isdecimal() else None


def _each(element: DataElement, change: Any) -> Any:
    """Every value of an element, changed; empty values stay, and what changes to None goes."""
    value = element.value
    if value is None or value == "":
        return ""
    values = value if isinstance(value, MultiValue | list) else [value]
    kept = [new for new in (change(str(v).strip()) for v in values) if new is not None]
    return kept or None if len(values) > 1 else (kept[0] if kept else None)


def _numbers(element: DataElement) -> Any:
    """The numbers of an element, where no text hides among them."""
    value = element.value
    if value is None or value == "":
        return ""
    if isinstance(value, bytes):
        return None
    values = value if isinstance(value, MultiValue | list) else [value]
    form = {"DS": _DS, "IS": _IS}.get(element.VR)
    if form is not None:
        texts = [str(getattr(v, "original_string", v)).strip() for v in values]
        return value if all(form.fullmatch(text) for text in texts) else None
    if element.VR in _LETTERS and _most(element) is None and max(values) >= _LETTERS[element.VR]:
        return None
    return value


def _time(text: str) -> str | None:
    """A time of day to the second: fractions would find the study in a hospital's log."""
    found = _TM.fullmatch(text)
    return None if found is None else found[1]


def _age(text: str) -> str | None:
    found = _AGE.fullmatch(text)
    if found is None:
        return None
    years = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}[found[2]] * int(found[1])
    return text if years < _OLDEST + 1 else "090Y"


def _known(item: Dataset) -> Dataset | None:
    value, scheme = _text(item, "CodeValue"), _text(item, "CodingSchemeDesignator")
    meaning = _meanings().get((scheme, value))
    return None if meaning is None else _code(value, scheme, meaning)


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning[:64]
    return code


@lru_cache(maxsize=1)
def _meanings() -> Mapping[tuple[str, str], str]:
    """(scheme, value) to meaning of all codes of PS3.16 that pydicom lists."""
    from pydicom.sr._concepts_dict import concepts
    from pydicom.sr._snomed_dict import mapping

    known: dict[tuple[str, str], str] = {}
    tables: dict[str, dict[str, dict[str, Any]]] = concepts  # type: ignore[assignment]
    for scheme, names in tables.items():
        for codes in names.values():
            known.update({(scheme, value): about[0] for value, about in codes.items()})
    for old, new in dict(mapping["SRT"]).items():
        if ("SCT", new) in known:
            known.update({(scheme, old): known["SCT", new] for scheme in ("SRT", "SNM3", "99SDM")})
    return known


def _tidy(dataset: Dataset) -> None:
    """Drop tables and pixels of kinds that this image does not use: nobody would notice what they hold."""
    colours = "PaletteColorLookupTable"
    unused = ["LUTData"]
    if dataset.get("PhotometricInterpretation") != "PALETTE COLOR":
        unused += [str(name) for name in dataset.dir(colours)]
    if "PixelData" in dataset:
        unused += ["FloatPixelData", "DoubleFloatPixelData"]
    frames = int(dataset.get("NumberOfFrames") or 1)
    for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):  # PS3.3 C.7.6.3: 8 bytes a frame
        if len(dataset.get(name, b"")) != 8 * frames:
            unused.append(name)
    for name in unused:
        if name in dataset:
            delattr(dataset, name)


def _trim(dataset: Dataset) -> None:
    """Drop what stands behind native pixels or beside coded ones: it is no part of the image."""
    from pydicom.pixels.utils import get_expected_length

    data = dataset.get("PixelData")
    if data is None:
        return
    if dataset["PixelData"].is_undefined_length:
        dataset.PixelData = blanked(data)
        return
    try:
        end = get_expected_length(dataset)
    except Exception:  # noqa: BLE001  an attribute is missing: nobody can read these pixels anyway
        return
    dataset.PixelData = data[: end + end % 2]
