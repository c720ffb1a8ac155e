"""Which frames make a volume: series built so that the answer is known before they are shuffled."""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    UltrasoundMultiFrameImageStorage,
    generate_uid,
)

from tasks.data.dicom import _owner, read_flat, read_volume
from tasks.data.dryrun import dry_run
from tasks.data.guard import Guard
from tasks.data.header import Header, Plane, header
from tasks.data.series import Part, assemble
from tasks.data.source import Faulty, Reason
from tasks.data.volume import Volume

AXIAL = (1.0, 0, 0, 0, 1, 0)
SAGITTAL = (0.0, 1, 0, 0, 0, -1)
CORONAL = (1.0, 0, 0, 0, 0, -1)
MR = str(MRImageStorage)


def one(
    position: Sequence[float] | None,
    orientation: Sequence[float] | None = AXIAL,
    *,
    keys: dict[str, str] | None = None,
    spacing: tuple[float, float] = (1.0, 1.0),
    **more: Any,
) -> Header:
    place = {"position": position, "orientation": orientation, "spacing": spacing, "keys": keys or {}}
    plane = Plane.model_validate(place)
    facts: dict[str, Any] = {
        "sop_class": MR,
        "sop_instance": generate_uid(),
        "series": "1.2",
        "patient": "P",
        "modality": "MR",
        "frame_of_reference": "1.2.3",
        "rows": 4,
        "columns": 5,
        "frames": 1,
        "samples": 1,
        "units": "",
        "has_pixels": True,
        "scout": False,
        "instance": 0,
        "planes": [plane],
        "refers_to": [],
        "refers_to_frames": [],
        "refers_to_instances": [],
        "groups": {},
        "doubt": "",
    }
    return Header(**{**facts, **more})


def column(
    count: int, gap: float = 3.0, start: float = 0.0, orientation: Sequence[float] = AXIAL, **more: Any
) -> list[Header]:
    """Slices on a line along their normal."""
    normal = np.cross(orientation[:3], orientation[3:])
    return [one((normal * (start + gap * k)).tolist(), orientation, **more) for k in range(count)]


def put(headers: Sequence[Header], seed: int = 0) -> list[Part]:
    """Assembled from files in any order."""
    order = np.random.default_rng(seed).permutation(len(headers))
    return assemble([(Path(f"{n:04}"), headers[i]) for n, i in enumerate(order)])


def sizes(parts: Sequence[Part]) -> list[int]:
    return [len(p.volume.images) for p in parts if p.volume is not None]


def reasons(parts: Sequence[Part]) -> list[Reason]:
    return [p.fault.reason for p in parts if p.fault is not None]


def numbered(headers: Sequence[Header]) -> list[Header]:
    return [h.model_copy(update={"instance": n}) for n, h in enumerate(headers, 1)]


SPLIT: dict[str, tuple[list[Header], list[int]]] = {
    "one volume": (column(6), [6]),
    "three orientations": (
        [h for o in (AXIAL, SAGITTAL, CORONAL) for h in column(4, orientation=o)],
        [4, 4, 4],
    ),
    "two sizes": (column(3) + column(4, rows=8), [3, 4]),
    "two spacings": (column(3) + column(4, spacing=(2.0, 2.0)), [3, 4]),
    "two frames of reference": (column(3) + column(4, frame_of_reference="9"), [3, 4]),
    "two stacks apart": (
        column(4, keys={"stack": "1"}) + column(5, start=100, keys={"stack": "2"}),
        [4, 5],
    ),
    "two acquisitions apart": (
        column(4, keys={"acquisition": "1"}) + column(5, start=101, keys={"acquisition": "2"}),
        [4, 5],
    ),
    "two acquisitions that overlap": (
        column(4, keys={"acquisition": "1"}) + column(5, start=2, keys={"acquisition": "2"}),
        [4, 5],
    ),
    "acquisitions of one volume": (
        [one((0, 0, 3.0 * k), keys={"acquisition": str(k // 2)}) for k in range(6)],
        [6],
    ),
    **{
        f"repeated by {key}": ([h for v in ("1", "2", "10") for h in column(4, keys={key: v})], [4, 4, 4])
        for key in ("temporal", "echo", "echo_time", "acquisition", "b_value", "image_type", "content_time")
    },
    "repeated by two": (
        [h for a, b in product("12", "ab") for h in column(3, keys={"echo": a, "image_type": b})],
        [3, 3, 3, 3],
    ),
    "by number, volume by volume": (numbered(column(4) + column(4)), [4, 4]),
    "by number, slice by slice": (
        numbered([h for pair in zip(column(4), column(4), strict=True) for h in pair]),
        [4, 4],
    ),
    "a time that differs within a volume": (
        [one((0, 0, 3.0 * (k % 4)), keys={"echo": str(k // 4), "content_time": str(k)}) for k in range(8)],
        [4, 4],
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SPLIT)
def test_volumes_of_one_series_are_told_apart(name: str, seed: int) -> None:
    headers, wanted = SPLIT[name]
    if seed and "slice by slice" in name:
        seed = 0
    parts = put(headers, seed)
    assert reasons(parts) == []
    assert sorted(sizes(parts)) == sorted(wanted)
    for part in parts:
        assert part.volume is not None
        keys = [{k: v for k, v in i.plane.keys.items() if k != "content_time"} for i in part.volume.images]
        if name.startswith("repeated"):
            assert all(k == keys[0] for k in keys)


def test_times_come_in_their_order() -> None:
    parts = put([h for v in ("10", "2", "1") for h in column(3, keys={"temporal": v})])
    assert [p.images[0].plane.keys["temporal"] for p in parts] == ["1", "2", "10"]


def test_one_damaged_time_does_not_take_the_others() -> None:
    headers = [h for v in "123" for h in column(5, keys={"temporal": v})]
    parts = put([h for n, h in enumerate(headers) if n != 7])
    assert sizes(parts) == [5, 5]
    assert reasons(parts) == [Reason.UNEVEN]


def copies(path: str, source: Header) -> list[tuple[Path, Header]]:
    return [(Path(path), source)]


REFUSED: dict[str, tuple[list[Header], list[Reason]]] = {
    "missing slice": ([h for n, h in enumerate(column(6)) if n != 3], [Reason.UNEVEN]),
    "two missing slices": ([h for n, h in enumerate(column(9)) if n not in (3, 4)], [Reason.UNEVEN]),
    "growing gaps": ([one((0, 0, k**2)) for k in range(5)], [Reason.UNEVEN]),
    "tilt": ([one((0, 0.4 * k, 3.0 * k)) for k in range(5)], [Reason.TILT]),
    "one slice": (column(1), [Reason.SLICES]),
    "no position": ([*column(3), one(None)], [Reason.NO_POSITION]),
    "no orientation": ([*column(3), one((0, 0, 9), None)], [Reason.NO_POSITION]),
    "a stray orientation": (column(4) + column(1, orientation=SAGITTAL), [Reason.ORIENTATION]),
    "a stray size": (column(4) + column(1, rows=9), [Reason.MIXED]),
    "two patients": (column(4) + column(4, start=100, patient="Q"), [Reason.MIXED]),
    "two units": (column(4, units="SUVbw") + column(4, start=12), [Reason.MIXED]),
    "not orthonormal": (column(3, orientation=(1, 0, 0, 0.5, 1, 0)), [Reason.GEOMETRY]),
    "not finite": ([one((0, 0, float("nan"))), *column(2)], [Reason.GEOMETRY]),
    "far away": ([one((0, 0, 1e300)), *column(2)], [Reason.GEOMETRY]),
    "no pixel size": (column(3, spacing=(0.0, 1.0)), [Reason.GEOMETRY]),
    "pixels of light years": (column(3, spacing=(1.0, 1e300)), [Reason.GEOMETRY]),
    "pixels without end": (column(3, spacing=(1.0, float("inf"))), [Reason.MIXED]),
    "no two alike": (  # a comparison of each with each would take minutes
        [one((0, 0, k), (1.0, k, 0, 0, 1, 0)) for k in range(3000)],
        [Reason.ORIENTATION],
    ),
    "repeated without a key": (column(4) + column(4), [Reason.REPEATED]),
    "repeated in part": (numbered(column(5) + column(3)), [Reason.REPEATED]),
    "scouts": (column(2, scout=True) + column(3), [Reason.SCOUT]),
    "dose grid": (column(3, sop_class="1.2.840.10008.5.1.4.1.1.481.2"), [Reason.SHAPE]),
    "whole slide": (column(3, sop_class="1.2.840.10008.5.1.4.1.1.77.1.6"), [Reason.SHAPE]),
    "frames beyond their planes": (column(3, frames=2), [Reason.SHAPE]),
    "frames without number": (
        [one(None, None, sop_class=str(UltrasoundMultiFrameImageStorage), frames=2**31)],
        [Reason.LIMIT],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_volume_is_refused_by_name(name: str) -> None:
    headers, wanted = REFUSED[name]
    parts = put(headers)
    assert reasons(parts) == wanted
    assert sizes(parts) == ([3] if name == "scouts" else [])


def test_a_repeated_file_counts_once_and_a_contradicting_one_is_refused() -> None:
    headers = column(4)
    files = [(Path(f"{n}"), h) for n, h in enumerate(headers)]
    (part,) = assemble([*files, (Path("copy"), headers[2])])
    assert part.volume is not None
    assert (len(part.volume.images), part.repeats) == (4, (Path("copy"),))
    other = headers[2].model_copy(update={"planes": headers[1].planes})
    parts = assemble([*files, (Path("other"), other)])
    assert sizes(parts) == [4]
    assert reasons(parts) == [Reason.DUPLICATE]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 12),
    st.floats(0.3, 12),
    st.floats(0.2, 3),
    st.floats(0.2, 3),
    st.integers(0, 10_000),
    st.integers(0, 2**32 - 1),
)
def test_every_voxel_lies_where_its_slice_says(
    count: int, gap: float, row_mm: float, column_mm: float, seed: int, order: int
) -> None:
    """PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1, for any rotation and order of files."""
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    turn *= np.linalg.det(turn)
    orientation = [float(v) for v in (*turn[:, 0], *turn[:, 1])]
    start = np.array([-50.0, 20, 300])
    headers = [
        one((start + turn[:, 2] * gap * k).tolist(), orientation, spacing=(row_mm, column_mm))
        for k in range(count)
    ]
    (part,) = put(headers, order)
    volume = part.volume
    assert isinstance(volume, Volume)
    assert volume.shape == (5, 4, count)
    for k, image in enumerate(volume.images):
        assert image.plane.position is not None
        for c, r in ((0, 0), (4, 0), (0, 3), (4, 3)):
            lps = np.array(image.plane.position) + turn[:, 0] * column_mm * c + turn[:, 1] * row_mm * r
            assert (volume.affine @ [c, r, k, 1])[:3] == pytest.approx(lps, abs=1e-6)
    stored = np.arange(5 * 4 * count).reshape(volume.shape)
    ras = volume.turned(stored)
    assert ras.shape == volume.ras_shape
    assert np.array_equal(volume.as_stored(ras[None])[0], stored)
    assert (np.diag(volume.ras)[:3] != 0).all()
    corner = tuple(int(n) - 1 for n in ras.shape)
    place = np.linalg.solve(volume.affine, np.diag([-1, -1, 1, 1]) @ volume.ras @ [*corner, 1])[:3]
    assert ras[corner] == stored[tuple(np.rint(place).astype(int))]


def multi_frame(path: Path, shuffle: int = 0) -> np.ndarray:
    """Enhanced MR: two stacks of three slices at two times, frames in any order."""
    frames = list(product((1, 2), (1, 2), range(3)))
    np.random.default_rng(shuffle).shuffle(frames)
    pixels = np.random.default_rng(1).integers(0, 4000, (len(frames), 4, 5), dtype=np.uint16)
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = EnhancedMRImageStorage, generate_uid(), "1.2.3"
    ds.PatientID, ds.Modality, ds.FrameOfReferenceUID = "P", "MR", "1.2.4"
    ds.Rows, ds.Columns, ds.NumberOfFrames, ds.SamplesPerPixel = 4, 5, str(len(frames)), 1
    ds.PhotometricInterpretation, ds.BitsAllocated, ds.BitsStored, ds.HighBit = "MONOCHROME2", 16, 16, 15
    ds.PixelRepresentation, ds.PixelData = 0, pixels.tobytes()
    measures = Dataset()
    measures.PixelSpacing = ["0.5", "0.25"]
    shared = Dataset()
    shared.PixelMeasuresSequence = [measures]
    ds.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for stack, time, k in frames:
        item, content, place, turned, scale = (Dataset() for _ in range(5))
        content.StackID, content.TemporalPositionIndex = str(stack), time
        content.DimensionIndexValues = [stack, k + 1, time]
        place.ImagePositionPatient = [0, 0, 4 * k] if stack == 1 else [4 * k, 0, 0]
        turned.ImageOrientationPatient = list(AXIAL if stack == 1 else (0, 1, 0, 0, 0, 1))
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = str(time), str(k), "US"
        item.FrameContentSequence, item.PlanePositionSequence = [content], [place]
        item.PlaneOrientationSequence, item.PixelValueTransformationSequence = [turned], [scale]
        groups.append(item)
    ds.PerFrameFunctionalGroupsSequence = groups
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.save_as(path, enforce_file_format=True)
    values = np.zeros((2, 2, 3, 4, 5))
    for (stack, time, k), plane in zip(frames, pixels, strict=True):
        values[stack - 1, time - 1, k] = plane * float(time) + k
    return values


@pytest.mark.parametrize("shuffle", [0, 1, 2])
def test_a_multi_frame_file_gives_its_stacks_and_times(tmp_path: Path, shuffle: int) -> None:
    wanted = multi_frame(tmp_path / "one.dcm", shuffle)
    ((facts, _),) = header(tmp_path / "one.dcm")
    parts = assemble([(tmp_path / "one.dcm", Header(**facts))])
    assert sizes(parts) == [3, 3, 3, 3]
    with Guard() as guard:
        for part in parts:
            assert part.volume is not None
            keys = part.images[0].plane.keys
            raw = read_volume(part.volume, [], None, guard=guard)
            truth = wanted[int(keys["stack"]) - 1, int(keys["temporal"]) - 1]
            assert raw.image is not None
            assert np.array_equal(part.volume.as_stored(raw.image)[0], truth.transpose(2, 1, 0))
        lines = list(dry_run(tmp_path, guard))
    assert lines[0]["shape"] == [12, 4, 5]
    spacings = [tuple(line["spacing"]) for line in lines[1:]]
    assert sorted(spacings) == [(0.25, 0.5, 4.0)] * 2 + [(4.0, 0.25, 0.5)] * 2
    assert [line["series"] for line in lines[1:]] == ["one.dcm"] * 4


def test_flat_images_are_cases_of_their_own(real: Callable[[str], Path]) -> None:
    lines = list(dry_run(real("dicom_zoo") / "dicomdir_tree" / "77654033"))
    flat = [line for line in lines if "series" in line and line["orientation"] == ""]
    assert [line["series"] for line in flat] == ["CR1", "CR2", "CR3"]
    assert all(tuple(line["shape"]) == (16, 16) and line["reason"] is None for line in flat)


def test_ct_without_a_place_is_damaged_not_flat() -> None:
    assert reasons(put([one(None, None, sop_class=str(CTImageStorage))])) == [Reason.NO_POSITION]


def test_one_slice_is_a_case_only_where_it_was_named() -> None:
    (header,) = column(1)
    assert reasons(assemble([(Path("a"), header)])) == [Reason.SLICES]
    (part,) = assemble([(Path("a"), header)], alone=True)
    assert (part.fault, part.volume, len(part.images)) == (None, None, 1)


def test_a_volume_far_larger_than_its_files_is_not_begun(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(1000))
    slices = [(tmp_path / "small", h) for h in column(2, rows=20_000, columns=20_000)]
    (part,) = assemble(slices)
    assert part.volume is not None
    with pytest.raises(Faulty, match="small: 1525 MiB of image in files of 0 MiB") as caught:
        read_volume(part.volume, [], None)
    assert caught.value.reason is Reason.LIMIT
    film = one(
        None, None, sop_class=str(UltrasoundMultiFrameImageStorage), frames=9000, rows=999, columns=999
    )
    (first, *_) = assemble([(tmp_path / "small", film)])
    with pytest.raises(Faulty, match="small: 8565 MiB"):
        read_flat(first.images[0], None)


ECHOES = [column(4, keys={"echo": "1"}), column(4, keys={"echo": "2"})]


@pytest.mark.parametrize(
    ("mask", "owner"),
    [
        ({"refers_to": ["1.2"]}, Reason.NO_IMAGE),  # the series has two volumes
        ({"refers_to_instances": [ECHOES[1][0].sop_instance], "refers_to": ["1.2"]}, 1),
        ({"refers_to_instances": [e[0].sop_instance for e in ECHOES]}, Reason.NO_IMAGE),
        ({"refers_to_instances": [ECHOES[0][3].sop_instance], "patient": "Q"}, Reason.MIXED),
        ({"refers_to_instances": [ECHOES[0][3].sop_instance], "patient": ""}, 0),
        ({"refers_to": ["9"], "frame_of_reference": "9"}, Reason.NO_IMAGE),
    ],
)
def test_a_mask_belongs_to_one_volume_of_its_patient(mask: dict[str, Any], owner: int | Reason) -> None:
    parts = put([h for echo in ECHOES for h in echo])
    found = _owner(one(None, None, **{"frame_of_reference": "", **mask}), parts)
    if isinstance(owner, Reason):
        assert isinstance(found, Faulty)
        assert found.reason is owner
    else:
        assert isinstance(found, Part)
        assert found.images[0].plane.keys["echo"] == str(owner + 1)
