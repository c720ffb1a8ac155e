"""Generated scans as DICOM files: slices or one multi-frame object, compressed or not, SEG or RTSTRUCT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import contourpy
import highdicom as hd
import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.valuerep import DA, DT, TM

from tasks.data.source import Array

SEGMENTS = ("liver", "lesion")  # segment and region numbers 1, 2
_DATE, _TIME = "20200101", "120000"


@dataclass(frozen=True)
class Form:
    """How a series is written.

    Attributes:
        syntax: transfer syntax of the image, lossless. frames: one Enhanced CT object, not a file a slice.
    """

    syntax: str = uid.ExplicitVRLittleEndian
    frames: bool = False
    labels: Literal["seg", "rtstruct"] = "seg"


PLAIN = (Form(),)
#: one form a hospital
MIXED = (
    Form(uid.JPEGLSLossless),
    Form(uid.RLELossless, labels="rtstruct"),
    Form(uid.JPEG2000Lossless, frames=True),
)


@dataclass(frozen=True)
class Scanner:
    """What a scanner writes of itself. `slope`, `intercept`: HU of stored values."""

    manufacturer: str
    kernel: str
    slope: float
    intercept: float

    @property
    def signed(self) -> bool:
        return self.intercept == 0

    def stored(self, hu: Array) -> Array:
        """Stored values (16 bit) of whole HU, exactly."""
        kind = np.int16 if self.signed else np.uint16
        return np.rint((hu - self.intercept) / self.slope).astype(kind)


@dataclass(frozen=True)
class Scan:
    """One CT series and its labels, in DICOM's order: slice, row, column.

    Attributes:
        name: fixes every UID. number: of the series. hu: whole HU, `DHW`. truth: segment numbers, `DHW`.
        first: mm, LPS, of the first voxel. pixel, slice_mm: mm.
    """

    name: str
    hospital: str
    patient: int
    number: int
    sex: str
    age: int
    scanner: Scanner
    hu: Array
    truth: Array
    first: Array
    pixel: float
    slice_mm: float

    def write(self, folder: Path, form: Form) -> None:
        """Write the files of the series into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        images = [self._frames()] if form.frames else [self._slice(i) for i in range(len(self.hu))]
        labels = self._rtstruct(images) if form.labels == "rtstruct" else self._seg(images)
        labels.save_as(folder / f"{form.labels}.dcm", enforce_file_format=True)
        for i, image in enumerate(images):
            if form.syntax != uid.ExplicitVRLittleEndian:
                image.compress(form.syntax, generate_instance_uid=False)
            image.save_as(folder / f"{i + 1:03}.dcm", enforce_file_format=True)

    def _uid(self, what: object) -> uid.UID:
        return uid.generate_uid(entropy_srcs=["wardround phantom", self.name, str(what)])

    def _position(self, index: int) -> list[str]:
        return [f"{v:.4f}" for v in self.first + np.array([0, 0, index * self.slice_mm])]

    def _object(self, kind: uid.UID, what: object, modality: str, series: str) -> FileDataset:
        """An object of this patient and study."""
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, self._uid(what)
        meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)  # type: ignore[arg-type]
        ds.SOPClassUID, ds.SOPInstanceUID = kind, self._uid(what)
        ds.StudyInstanceUID, ds.SeriesInstanceUID = self._uid("study"), self._uid(series)
        ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = self._uid("frame"), ""
        ds.PatientName = f"PHANTOM^{self.hospital.upper()}^{self.patient:02}"
        ds.PatientID = f"PHANTOM-{self.hospital.upper()}-{self.patient:02}"
        ds.PatientBirthDate, ds.PatientSex, ds.PatientAge = "", self.sex, f"{self.age:03}Y"
        ds.StudyDate = ds.SeriesDate = _DATE
        ds.StudyTime = ds.SeriesTime = _TIME
        ds.StudyID, ds.SeriesNumber, ds.InstanceNumber = "1", self.number, 1
        ds.AccessionNumber, ds.ReferringPhysicianName = "", ""
        ds.Modality, ds.Manufacturer = modality, self.scanner.manufacturer
        return ds

    def _image(self, ds: FileDataset, hu: Array) -> None:
        """The pixels of one or several frames."""
        ds.AcquisitionDate = ds.ContentDate = _DATE
        ds.AcquisitionTime = ds.ContentTime = _TIME
        ds.AcquisitionNumber, ds.PatientPosition = 1, "HFS"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.Rows, ds.Columns = hu.shape[-2:]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.PixelRepresentation = int(self.scanner.signed)
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
        ds.PixelData = self.scanner.stored(hu).astype("<i2" if self.scanner.signed else "<u2").tobytes()

    def _geometry(self, plane: Dataset, measures: Dataset, rescale: Dataset) -> None:
        plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        measures.PixelSpacing, measures.SliceThickness = [f"{self.pixel:.6f}"] * 2, self.slice_mm
        rescale.RescaleIntercept = f"{self.scanner.intercept:g}"
        rescale.RescaleSlope, rescale.RescaleType = f"{self.scanner.slope:g}", "HU"

    def _slice(self, index: int) -> FileDataset:
        ds = self._object(uid.CTImageStorage, index, "CT", "series")
        self._image(ds, self.hu[index])
        self._geometry(ds, ds, ds)
        ds.InstanceNumber, ds.ImagePositionPatient = index + 1, self._position(index)
        ds.KVP, ds.ConvolutionKernel = "120", self.scanner.kernel
        return ds

    def _frames(self) -> FileDataset:
        """One Enhanced CT object (PS3.3 A.38)."""
        ds = self._object(uid.EnhancedCTImageStorage, "frames", "CT", "series")
        self._image(ds, self.hu)
        ds.NumberOfFrames, ds.ImageType = len(self.hu), ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        ds.AcquisitionDateTime, ds.ContentQualification = _DATE + _TIME, "RESEARCH"
        ds.ManufacturerModelName, ds.DeviceSerialNumber, ds.SoftwareVersions = "phantom", "1", "1"
        organization, index = Dataset(), Dataset()
        organization.DimensionOrganizationUID = index.DimensionOrganizationUID = self._uid("dimensions")
        index.DimensionIndexPointer, index.FunctionalGroupPointer = 0x00209057, 0x00209111  # in the stack
        ds.DimensionOrganizationSequence, ds.DimensionIndexSequence = [organization], [index]
        shared, plane, measures, rescale = (Dataset() for _ in range(4))
        self._geometry(plane, measures, rescale)
        rays, made, kind = Dataset(), Dataset(), Dataset()
        rays.KVP, made.ConvolutionKernel = 120.0, self.scanner.kernel
        kind.FrameType, kind.PixelPresentation = list(ds.ImageType), "MONOCHROME"
        kind.VolumetricProperties, kind.VolumeBasedCalculationTechnique = "VOLUME", "NONE"
        shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [plane], [measures]
        shared.PixelValueTransformationSequence, shared.CTXRayDetailsSequence = [rescale], [rays]
        shared.CTReconstructionSequence, shared.CTImageFrameTypeSequence = [made], [kind]
        ds.SharedFunctionalGroupsSequence = [shared]
        ds.PerFrameFunctionalGroupsSequence = [self._place(i) for i in range(len(self.hu))]
        return ds

    def _place(self, index: int) -> Dataset:
        frame, position, content = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = self._position(index)
        content.StackID, content.InStackPositionNumber = "1", index + 1
        content.DimensionIndexValues = [index + 1]
        frame.PlanePositionSequence, frame.FrameContentSequence = [position], [content]
        return frame

    def _rtstruct(self, images: Sequence[FileDataset]) -> FileDataset:
        """The outlines of liver and lesions (PS3.3 A.19), half-way between the pixels within and without."""
        ds = self._object(uid.RTStructureSetStorage, "rtstruct", "RTSTRUCT", "rtstruct series")
        ds.StructureSetLabel, ds.StructureSetDate, ds.StructureSetTime = "PHANTOM", _DATE, _TIME
        study, series, frame = Dataset(), Dataset(), Dataset()
        series.SeriesInstanceUID = self._uid("series")
        series.ContourImageSequence = [_refers(image) for image in images]
        study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"  # Detached Study Management, retired
        study.ReferencedSOPInstanceUID = self._uid("study")
        study.RTReferencedSeriesSequence = [series]
        frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = self._uid("frame"), [study]
        ds.ReferencedFrameOfReferenceSequence = [frame]
        regions, outlines, seen = [], [], []
        for number, name in enumerate(SEGMENTS, 1):
            region, outline, about = Dataset(), Dataset(), Dataset()
            region.ROINumber, region.ROIName, region.ROIGenerationAlgorithm = number, name, "AUTOMATIC"
            region.ReferencedFrameOfReferenceUID = self._uid("frame")
            outline.ReferencedROINumber, outline.ROIDisplayColor = number, [255, 0, 0]
            outline.ContourSequence = self._contours(self.truth >= number)
            about.ObservationNumber = about.ReferencedROINumber = number
            about.RTROIInterpretedType, about.ROIInterpreter = "ORGAN", ""
            regions.append(region)
            outlines.append(outline)
            seen.append(about)
        ds.StructureSetROISequence, ds.ROIContourSequence = regions, outlines
        ds.RTROIObservationsSequence = seen
        return ds

    def _contours(self, mask: Array) -> list[Dataset]:
        contours = []
        for index, plane in enumerate(mask):
            around = contourpy.contour_generator(z=np.pad(plane.astype(float), 1)).lines(0.5)
            for loop in around:
                points = np.asarray(loop)[:-1] - 1  # the last is the first; one pixel of padding
                contour = Dataset()
                contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(points)
                x, y = (self.first[axis] + points[:, axis] * self.pixel for axis in (0, 1))
                z = self._position(index)[2]
                contour.ContourData = [
                    t for a, b in zip(x, y, strict=True) for t in (f"{a:.4f}", f"{b:.4f}", z)
                ]
                contours.append(contour)
        return contours

    def _seg(self, images: Sequence[FileDataset]) -> hd.seg.Segmentation:
        maker = hd.AlgorithmIdentificationSequence(
            name="phantom", version="1", family=codes.cid7162.ArtificialIntelligence
        )
        described = [
            hd.seg.SegmentDescription(
                segment_number=i + 1,
                segment_label=label,
                segmented_property_category=category,
                segmented_property_type=kind,
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=maker,
            )
            for i, (label, category, kind) in enumerate(
                (
                    (SEGMENTS[0], codes.SCT.Organ, codes.SCT.Liver),
                    (SEGMENTS[1], codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion),
                )
            )
        ]
        seg = hd.seg.Segmentation(
            source_images=list(images),
            pixel_array=np.stack([self.truth > 0, self.truth == 2], axis=-1).astype(np.uint8),
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=described,
            series_instance_uid=self._uid("seg series"),
            series_number=100 + self.number,
            sop_instance_uid=self._uid("seg"),
            instance_number=1,
            manufacturer="wardround",
            manufacturer_model_name="phantom",
            software_versions="1",
            device_serial_number="1",
            omit_empty_frames=True,
        )
        # highdicom draws these anew each time; equal arguments must give equal files
        seg.ContentDate = seg.InstanceCreationDate = seg.SeriesDate = DA(_DATE)
        seg.ContentTime = seg.InstanceCreationTime = seg.SeriesTime = TM(_TIME)
        for item in seg.ContributingEquipmentSequence:
            item.ContributionDateTime = DT(_DATE + _TIME)
        organization = self._uid("dimensions")
        for item in (*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence):
            item.DimensionOrganizationUID = organization
        return seg


def _refers(image: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    return item
