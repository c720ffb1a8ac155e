"""DICOM headers full of unique markers: wherever one turns up later, an attribute leaked."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydicom._dicom_dict import DicomDictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import UID

TABLE = Path(__file__).parent / "tasks" / "data" / "annex_e_2026c.txt"
_TEXT = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"}
_MAX = {"AE": 16, "CS": 16, "SH": 16}
_BYTES = {"OB", "OW", "UN", "OB or OW", "OD", "OF", "OL", "OV"}


def annex_e() -> dict[int, str]:
    """Tag to action of PS3.15 2026c Table E.1-1, Basic Profile (wildcards and private tags apart)."""
    lines = (line.split() for line in TABLE.read_text().splitlines() if not line.startswith("#"))
    return {int(tag, 16): action for action, *tags in lines for tag in tags}


def dictionary() -> list[int]:
    """Every plain attribute of PS3.6 outside file meta and commands, but for numbers: they hold no text."""
    no_text = ("DS", "IS", "SQ")
    return [tag for tag, about in DicomDictionary.items() if tag >> 16 > 2 and about[0] not in no_text]


@dataclass
class Canary:
    """Plants markers and knows them all; equal objects plant equal markers."""

    name: str = "CNRY"
    markers: list[bytes] = field(default_factory=list)

    def text(self) -> str:
        """A new marker of at most 16 characters."""
        marker = f"{self.name}{len(self.markers):06}Q"
        self.markers.append(marker.encode())
        return marker

    def date(self) -> str:
        """A new date; 4,000 days from the next, so that no shift turns one into another."""
        number = 1 + len(self.markers)
        day = datetime.date(1000, 1, 1) + datetime.timedelta(4000 * (number % 800) + number // 800)
        text = f"{day.year:04}{day:%m%d}"
        self.markers.append(text.encode())
        return text

    def value(self, vr: str) -> object | None:
        """A marker as a value of a VR; None: the VR has no room for one."""
        if vr in _TEXT:
            return self.text()
        if vr == "DA":
            return self.date()
        if vr == "TM":
            return self._digits("1122{:02}.{:06}")
        if vr == "DT":
            return self._digits("203412051122{:02}.{:06}")
        if vr == "UI":
            return self._digits("1.2.826.0.1.3680043.99{}.1{:06}")
        if vr in ("DS", "IS"):
            return self._digits("97{:02}{:06}")
        if vr in _BYTES:
            return self.text().encode() + b"\0"  # of even length
        return None

    def _digits(self, form: str) -> str:
        number = len(self.markers)
        text = form.format(number % 60, number)
        self.markers.append(text.encode())
        return text

    def plant(self, dataset: Dataset, tags: Iterable[int], *, depth: int = 0) -> int:
        """Set attributes to markers, sequences to an item of markers; returns how many were planted."""
        planted = 0
        for number in tags:
            vr = DicomDictionary[number][0]
            if vr == "SQ":
                item = Dataset()
                item.PatientName, item.CodeMeaning, item.TextValue = (self.text() for _ in range(3))
                item.StudyDate, item.UID = self.date(), self.value("UI")
                dataset.add(DataElement(Tag(number), "SQ", Sequence([item])))
                planted += 5
                continue
            value = self.value(vr)
            if value is not None:
                dataset.add(DataElement(Tag(number), vr.split(" or ")[0], value))
                planted += 1
        return planted

    def around(self, dataset: FileDataset) -> None:
        """Plant outside the dictionary: private, overlays, curves, padding, preamble, file meta."""
        block = dataset.private_block(0x0009, self.text(), create=True)
        block.add_new(0x10, "LO", self.text())
        block.add_new(0x11, "UN", self.text().encode() + b"\0")
        inner = Dataset()
        inner.PatientName = self.text()
        block.add_new(0x12, "SQ", [inner])
        for group in (0x6000, 0x6002, 0x601E):
            for element, vr in ((0x0022, "LO"), (0x1500, "LO"), (0x4000, "LT"), (0x3000, "OW")):
                dataset.add_new((group, element), vr, self.value(vr))
        for element, vr in ((0x0022, "LO"), (0x3000, "OW"), (0x2600, "LO")):
            dataset.add_new((0x5000, element), vr, self.value(vr))
        dataset.add_new((0xFFFC, 0xFFFC), "OB", self.value("OB"))
        dataset.preamble = (self.text().encode() * 10)[:128].ljust(128, b"\0")
        meta = dataset.file_meta
        meta.SourceApplicationEntityTitle = self.text()
        meta.SendingApplicationEntityTitle = self.text()
        meta.ReceivingApplicationEntityTitle = self.text()
        meta.ImplementationVersionName = self.text()
        meta.PrivateInformationCreatorUID = UID(str(self.value("UI")))
        meta.PrivateInformation = self.text().encode() + b"\0"

    def found(self, blob: bytes) -> list[bytes]:
        """The markers that stand in some bytes; digits only as a whole number, lest chance finds them."""
        hits = [marker for marker in self.markers if marker in blob]
        return [m for m in hits if not m.isdigit() or re.search(rb"(?<!\d)" + m + rb"(?!\d)", blob)]


def files(folder: Path) -> Iterator[Path]:
    """All files below a folder."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
