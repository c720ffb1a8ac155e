"""Files whose pixels may show who the patient is: held back until the hospital's engineer has looked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag

from conf.exits import Exit, Stop
from conf.files import write_atomic

#: modalities whose pictures commonly carry text: ultrasound, captured and scanned pages, fluoroscopy,
#: visible light
_MODALITIES = frozenset(
    ("US", "IVUS", "SC", "OT", "XA", "RF", "ES", "GM", "SM", "XC", "OP", "OPT", "IO", "PX", "DOC", "HC")
)
_CLASSES = frozenset(
    {
        uid.SecondaryCaptureImageStorage,
        uid.MultiFrameSingleBitSecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
        uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
        uid.UltrasoundImageStorage,
        uid.UltrasoundMultiFrameImageStorage,
        uid.EnhancedUSVolumeStorage,
        uid.XRayAngiographicImageStorage,
        uid.EnhancedXAImageStorage,
        uid.XRayRadiofluoroscopicImageStorage,
        uid.EnhancedXRFImageStorage,
    }
)
_VISIBLE_LIGHT = "1.2.840.10008.5.1.4.1.1.77."
#: PS3.3 C.8.6.1: (0008,0064) Conversion Type of what was scanned, filmed or drawn
_CONVERTED = frozenset(("DV", "DI", "DF", "WSD", "SD", "SI", "DRW"))
_DIGEST = re.compile(r"[0-9a-f]{64}")

#: what `doubt` reads, for readers of a few attributes
TAGS = ("SOPClassUID", "Modality", "BurnedInAnnotation", "RecognizableVisualFeatures", "ConversionType")


def doubt(dataset: Dataset, *, leaving: bool = False) -> str:
    """Why a person must look at the pixels first; empty where nothing says so.

    A `BurnedInAnnotation` (0028,0301) of NO is believed of a scanner, not of the modalities that draw text.

    Args:
        leaving: the pixels are to leave the hospital, so recognisable faces (0028,0302) count too.
    """
    sop = str(dataset.get("SOPClassUID") or "")
    modality = str(dataset.get("Modality") or "").strip().upper()
    burned = str(dataset.get("BurnedInAnnotation") or "NO").strip().upper()
    if burned != "NO":
        return "BurnedInAnnotation (0028,0301) is not NO"
    if modality in _MODALITIES or sop in _CLASSES or sop.startswith(_VISIBLE_LIGHT):
        return "its kind of image commonly shows text"
    if str(dataset.get("ConversionType") or "").strip().upper() in _CONVERTED:
        return "it was scanned or drawn (0008,0064)"
    if leaving and str(dataset.get("RecognizableVisualFeatures") or "").strip().upper() == "YES":
        return "RecognizableVisualFeatures (0028,0302) is YES"
    if leaving and any(_embedded(tag) and dataset[tag].value for tag in list(dataset.keys())):
        return "an overlay stands in the bits of its pixels (60xx,0102)"
    return ""


def _embedded(tag: BaseTag) -> bool:
    return tag.group >> 8 == 0x60 and tag.element == 0x0102  # PS3.3 C.9.2, retired: bit of PixelData


class Released:
    """The files that the engineer released: SHA-256 of each, a line each, in a file of the site."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: frozenset[str] | None = None

    @property
    def known(self) -> frozenset[str]:
        """The digests.

        Raises:
            Stop: (`CONFIG`) a line is none.
        """
        if self._known is None:
            try:
                lines = self._path.read_text().split()
            except FileNotFoundError:
                lines = []
            if any(not _DIGEST.fullmatch(line) for line in lines):
                raise Stop(Exit.CONFIG, f"{self._path} holds a line that is no SHA-256; remove that line")
            self._known = frozenset(lines)
        return self._known

    def holds(self, path: Path) -> bool:
        """Whether this very file was released."""
        return bool(self.known) and digest(path) in self.known

    def add(self, digests: Iterable[str]) -> int:
        """Release files by their digests; returns how many were not yet."""
        new = set(digests) - self.known
        if new:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(self._path, ("\n".join(sorted(self.known | new)) + "\n").encode())
            self._known = self.known | new
        return len(new)


def digest(path: Path) -> str:
    """SHA-256 of a file, by which it is released: a changed file needs a new look."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
