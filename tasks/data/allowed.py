"""What of a DICOM header may stay, and as what: the allow-list of de-identification.

Whatever is not listed goes: unknown, private, retired, free text. Checked against PS3.15 2026c Table E.1-1
(Basic Application Level Confidentiality Profile): every listed attribute that the table wants changed is
changed here, or stays under one of the options named by `OPTIONS`. Text never stays as it is: strings come
from the vocabularies below, codes from pydicom's dictionaries of PS3.16.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from itertools import permutations
from typing import Final

from pydicom.datadict import tag_for_keyword

EDITION: Final = "2026c"

#: PS3.16 CID 7050: the profile, and the options of it that are used
OPTIONS: Final = (
    ("113100", "Basic Application Confidentiality Profile"),
    ("113105", "Clean Descriptors Option"),
    ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
    ("113108", "Retain Patient Characteristics Option"),
)


class Keep(Enum):
    """What becomes of an attribute that may stay."""

    NUMBER = auto()  # the number, where it is one and of the dictionary's VR and multiplicity
    BYTES = auto()  # pixels and look-up tables
    UID = auto()  # replaced, unless PS3.6 defines it
    DATE = auto()  # shifted
    TIME = auto()  # to the second
    DATETIME = auto()  # shifted
    CODES = auto()  # items whose code PS3.16 knows, with its meaning
    ITEMS = auto()  # a sequence whose items are treated alike
    PATIENT = auto()  # the patient's key
    NAME = auto()  # a label of the federation's dictionary, or a number
    AGE = auto()
    MAKER = auto()
    EMPTY = auto()


@dataclass(frozen=True)
class Words:
    """A finite vocabulary: other values are left out, and none leaves the attribute empty."""

    words: frozenset[str]


@dataclass(frozen=True)
class Instead:
    """A constant where the attribute must have a value."""

    value: str


_RULES: dict[Keep, str] = {
    Keep.NUMBER: """
        SamplesPerPixel PlanarConfiguration NumberOfFrames Rows Columns PixelSpacing PixelAspectRatio
        ImagerPixelSpacing NominalScannedPixelSpacing BitsAllocated BitsStored HighBit PixelRepresentation
        SmallestImagePixelValue LargestImagePixelValue PixelPaddingValue PixelPaddingRangeLimit
        RescaleSlope RescaleIntercept WindowCenter WindowWidth LossyImageCompressionRatio
        RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor
        BluePaletteColorLookupTableDescriptor LUTDescriptor FrameIncrementPointer FrameTime FrameTimeVector
        PixelIntensityRelationshipSign NumberOfEnergyWindows EnergyWindowVector NumberOfDetectors
        DetectorVector RotationVector PhaseVector RRIntervalVector TimeSlotVector SliceVector
        AngularViewVector TimeSliceVector
        ImagePositionPatient ImageOrientationPatient SliceThickness SpacingBetweenSlices SliceLocation
        GantryDetectorTilt DataCollectionDiameter ReconstructionDiameter TableHeight
        SeriesNumber InstanceNumber AcquisitionNumber ImagesInAcquisition
        KVP ExposureTime XRayTubeCurrent Exposure ExposureTimeInuS XRayTubeCurrentInuA ExposureInuAs
        DistanceSourceToDetector DistanceSourceToPatient FocalSpots SpiralPitchFactor SingleCollimationWidth
        TotalCollimationWidth TableSpeed TableFeedPerRotation RevolutionTime CTDIvol
        MagneticFieldStrength EchoTime RepetitionTime InversionTime FlipAngle EchoTrainLength EchoNumbers
        NumberOfAverages ImagingFrequency PixelBandwidth PercentSampling PercentPhaseFieldOfView
        NumberOfPhaseEncodingSteps AcquisitionMatrix DiffusionBValue DiffusionGradientOrientation
        EffectiveEchoTime TemporalPositionIdentifier NumberOfTemporalPositions TemporalResolution TriggerTime
        ActualFrameDuration FrameReferenceTime DecayFactor DoseCalibrationFactor ScatterFractionFactor
        NumberOfSlices NumberOfTimeSlices ImageIndex RadionuclideTotalDose RadionuclideHalfLife
        RadionuclidePositronFraction PatientSize PatientWeight
        DimensionIndexPointer FunctionalGroupPointer DimensionIndexValues InStackPositionNumber
        TemporalPositionIndex FrameAcquisitionNumber FrameAcquisitionDuration
        SegmentNumber ReferencedSegmentNumber ReferencedFrameNumber MaximumFractionalValue
        RecommendedDisplayCIELabValue RecommendedDisplayGrayscaleValue
        ROINumber ReferencedROINumber ROIDisplayColor ContourNumber NumberOfContourPoints ContourData
        ContourSlabThickness ObservationNumber
        """,
    Keep.BYTES: """
        PixelData FloatPixelData DoubleFloatPixelData ExtendedOffsetTable ExtendedOffsetTableLengths LUTData
        RedPaletteColorLookupTableData GreenPaletteColorLookupTableData BluePaletteColorLookupTableData
        SegmentedRedPaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData
        SegmentedBluePaletteColorLookupTableData
        """,
    Keep.UID: """
        SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID
        DimensionOrganizationUID ReferencedSOPClassUID ReferencedSOPInstanceUID ReferencedFrameOfReferenceUID
        """,
    Keep.DATE: """
        StudyDate SeriesDate AcquisitionDate ContentDate StructureSetDate InstanceCreationDate
        """,
    Keep.TIME: """
        StudyTime SeriesTime AcquisitionTime ContentTime StructureSetTime InstanceCreationTime
        RadiopharmaceuticalStartTime RadiopharmaceuticalStopTime
        """,
    Keep.DATETIME: """
        AcquisitionDateTime FrameAcquisitionDateTime FrameReferenceDateTime DecayCorrectionDateTime
        RadiopharmaceuticalStartDateTime RadiopharmaceuticalStopDateTime
        """,
    Keep.CODES: """
        RadionuclideCodeSequence RadiopharmaceuticalCodeSequence AnatomicRegionSequence
        AnatomicRegionModifierSequence ViewCodeSequence SegmentedPropertyCategoryCodeSequence
        SegmentedPropertyTypeCodeSequence SegmentedPropertyTypeModifierCodeSequence
        PurposeOfReferenceCodeSequence DerivationCodeSequence PatientOrientationCodeSequence
        PatientGantryRelationshipCodeSequence
        """,
    Keep.ITEMS: """
        SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence PixelMeasuresSequence
        PlanePositionSequence PlaneOrientationSequence FrameContentSequence FrameVOILUTSequence
        PixelValueTransformationSequence CTImageFrameTypeSequence MRImageFrameTypeSequence
        PETFrameTypeSequence FrameAnatomySequence MRDiffusionSequence
        CTXRayDetailsSequence DiffusionGradientDirectionSequence MREchoSequence
        MRTimingAndRelatedParametersSequence
        DimensionOrganizationSequence DimensionIndexSequence ModalityLUTSequence
        RadiopharmaceuticalInformationSequence SegmentSequence SegmentIdentificationSequence
        DerivationImageSequence SourceImageSequence ReferencedSeriesSequence ReferencedInstanceSequence
        ReferencedImageSequence StructureSetROISequence ROIContourSequence ContourSequence
        ContourImageSequence RTROIObservationsSequence ReferencedFrameOfReferenceSequence
        RTReferencedStudySequence RTReferencedSeriesSequence
        """,
    Keep.PATIENT: "PatientID PatientName",
    Keep.NAME: "ROIName SegmentLabel",
    Keep.AGE: "PatientAge",
    Keep.MAKER: "Manufacturer",
    Keep.EMPTY: """
        PatientBirthDate ReferringPhysicianName AccessionNumber StudyID PositionReferenceIndicator
        ContentDescription ContentCreatorName ROIInterpreter OperatorsName AcquisitionContextSequence
        """,
}

_LETTERS = "CT MR PT NM CR DX MG US IVUS XA RF ES GM SM XC OP OPT OT SC SEG RTSTRUCT"
_WORDS: dict[str, str] = {
    "Modality": _LETTERS,
    "PatientSex": "M F O",
    "PhotometricInterpretation": """
        MONOCHROME1 MONOCHROME2 RGB YBR_FULL YBR_FULL_422 YBR_PARTIAL_420 YBR_PARTIAL_422 YBR_ICT YBR_RCT
        PALETTE|COLOR HSV ARGB CMYK XYB""",
    "ImageType FrameType": """
        ORIGINAL DERIVED MIXED PRIMARY SECONDARY AXIAL LOCALIZER VOLUME NONE OTHER MPR MIP RESAMPLED
        MAXIMUM MEAN M P R I M_FFE M_SE M_IR DIFFUSION ADC FA TRACEW T1 T2 SE FFE IR WHOLE|BODY STATIC
        DYNAMIC GATED TOMO EMISSION TRANSMISSION SUBTRACTION PROJECTION|IMAGE REFORMATTED CT_SOM5|SPI
        RECON|TOMO SINGLEPLANE BIPLANE AXIAL_DIXON WATER FAT IN_PHASE OUT_PHASE NORM DIS2D DIS3D ND""",
    "PatientOrientation": " ".join("".join(way) for n in (1, 2, 3) for way in permutations("APRLFH", n)),
    "ConversionType": "DV DI DF WSD SD SI DRW SYN",
    "PresentationIntentType": "FOR|PRESENTATION FOR|PROCESSING",
    "DetectorType": "DIRECT SCINTILLATOR STORAGE FILM",
    "CollimatorType": "NONE PARA PINH FANB CONE SLNT ASTG DIVG RING UNKN",
    "ScanOptions": "PER RG CG PPG FC PFF PFP SP FS",
    "PatientPosition": "HFS HFP HFDR HFDL FFS FFP FFDR FFDL",
    "Laterality ImageLaterality FrameLaterality": "R L U B",
    "ViewPosition": "AP PA LL RL RLD LLD RLO LLO CC MLO ML LM",
    "BodyPartExamined": """
        ABDOMEN ADRENAL ANKLE AORTA BRAIN BREAST CHEST COLON CSPINE ELBOW EXTREMITY EYE FEMUR FOOT HAND
        HEAD HEART HIP JAW KIDNEY KNEE LIVER LSPINE LUNG NECK ORBIT PANCREAS PELVIS PROSTATE SHOULDER SKULL
        SPINE SPLEEN TSPINE UTERUS WHOLEBODY WRIST""",
    "RescaleType ModalityLUTType": "HU OD US MGML Z_EFF ED EDW HU_MOD PCT SUV",
    "Units": """
        CNTS NONE CM2 PCNT CPS BQML MGMINML UMOLMINML MLMING MLG 1CM UMOLML PROPCNTS PROPCPS GML STDDEV
        CM2ML""",
    "SUVType": "BSA BW LBM LBMJAMES128 LBMJANMA IBW",
    "DecayCorrection": "NONE START ADMIN",
    "CountsSource": "EMISSION TRANSMISSION",
    "SeriesType": "STATIC DYNAMIC GATED WHOLE|BODY IMAGE REPROJECTION",
    "CorrectedImage": "DECY RADL ATTN SCAT DTIM MOTN PMOT CLN RAN RADL DCAL NORM NRGY LIN UNIF COUN",
    "LossyImageCompression": "00 01",
    "LossyImageCompressionMethod": """
        ISO_10918_1 ISO_14495_1 ISO_15444_1 ISO_15444_15 ISO_13818_2 ISO_14496_10""",
    "VOILUTFunction": "LINEAR LINEAR_EXACT SIGMOID",
    "PresentationLUTShape": "IDENTITY INVERSE",
    "PixelIntensityRelationship": "LIN LOG DISP",
    "ScanningSequence": "SE IR GR EP RM",
    "SequenceVariant": "SK MTC SS TRSS SP MP OSP NONE",
    "MRAcquisitionType": "2D 3D",
    "DiffusionDirectionality": "DIRECTIONAL BMATRIX ISOTROPIC NONE",
    "AcquisitionContrast": """
        DIFFUSION FLOW_ENCODED FLUID_ATTENUATED PERFUSION PROTON_DENSITY STIR TAGGING T1 T2 T2_STAR TOF
        UNKNOWN MIXED""",
    "ComplexImageComponent": "MAGNITUDE PHASE REAL IMAGINARY MIXED",
    "PixelPresentation": "COLOR MONOCHROME MIXED TRUE_COLOR",
    "VolumetricProperties": "VOLUME SAMPLED DISTORTED MIXED",
    "VolumeBasedCalculationTechnique": "MAX_IP MIN_IP VOLUME_RENDER SURFACE_RENDER MPR CURVED_MPR NONE MIXED",
    "ContentQualification": "PRODUCT RESEARCH SERVICE",
    "DimensionOrganizationType": "3D 3D_TEMPORAL TILED_FULL TILED_SPARSE",
    "StackID": " ".join(str(n) for n in range(1, 100)),
    "SegmentationType": "BINARY FRACTIONAL LABELMAP",
    "SegmentationFractionalType": "PROBABILITY OCCUPANCY",
    "SegmentsOverlap": "YES NO UNDEFINED",
    "SegmentAlgorithmType": "AUTOMATIC SEMIAUTOMATIC MANUAL",
    "ROIGenerationAlgorithm": "AUTOMATIC SEMIAUTOMATIC MANUAL",
    "ContourGeometricType": "POINT OPEN_PLANAR OPEN_NONPLANAR CLOSED_PLANAR CLOSEDPLANAR_XOR",
    "RTROIInterpretedType": "EXTERNAL PTV CTV GTV BOLUS AVOIDANCE ORGAN CONTROL DOSE_REGION NONE",
}

_INSTEAD = {
    "ContentLabel": "CONTENT",
    "StructureSetLabel": "STRUCTURES",
    "SegmentAlgorithmName": "UNNAMED",
    # of type 1 in multi-frame and derived objects
    "ManufacturerModelName": "UNNAMED",
    "DeviceSerialNumber": "0",
    "SoftwareVersions": "0",
}


def _listed() -> dict[int, Keep | Words | Instead]:
    rules: dict[str, Keep | Words | Instead] = {}
    for keep, keywords in _RULES.items():
        rules.update(dict.fromkeys(keywords.split(), keep))
    for keywords, words in _WORDS.items():
        known = Words(frozenset(word.replace("|", " ") for word in words.split()))
        rules.update(dict.fromkeys(keywords.split(), known))
    rules.update({keyword: Instead(value) for keyword, value in _INSTEAD.items()})
    table = {tag_for_keyword(keyword): rule for keyword, rule in rules.items()}
    if None in table:
        raise ValueError(f"not in PS3.6: {[k for k in rules if tag_for_keyword(k) is None]}")
    return {tag: rule for tag, rule in table.items() if tag is not None}


#: tag to rule; what is not here goes
ALLOWED: Final = _listed()
