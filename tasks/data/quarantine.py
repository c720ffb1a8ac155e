"""Files whose pixels may show who the patient is: held back until the hospital's engineer has looked."""

from __future__ import annotations

import re

from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag

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

#: in (0008,0008) ImageType: pages that scanners and workstations store as CT, MR or PET images
_PAGES = re.compile(r"SCREEN|CAPTURE|REPORT|DOSE.INFO|\bPROT\b")
#: of these PS3.3 knows grey images only (A.3.3, A.4.3, A.21.3): colours come from a screen
_GREY = frozenset({uid.CTImageStorage, uid.MRImageStorage, uid.PositronEmissionTomographyImageStorage})


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
    if _PAGES.search(str(dataset.get("ImageType") or "").upper()):
        return "its ImageType (0008,0008) tells of a page"
    colours = str(dataset.get("PhotometricInterpretation") or "").strip()
    if sop in _GREY and colours not in ("", "MONOCHROME1", "MONOCHROME2"):
        return "a scanner's grey image in colours"
    if leaving and str(dataset.get("RecognizableVisualFeatures") or "").strip().upper() == "YES":
        return "RecognizableVisualFeatures (0028,0302) is YES"
    if leaving and any(_embedded(tag) and dataset[tag].value for tag in list(dataset.keys())):
        return "an overlay stands in the bits of its pixels (60xx,0102)"
    return ""


def _embedded(tag: BaseTag) -> bool:
    return tag.group >> 8 == 0x60 and tag.element == 0x0102  # PS3.3 C.9.2, retired: bit of PixelData
