"""Which planes of a series make a volume, and where its voxels lie.

Positions follow PS3.3 C.7.6.2.1.1 (Image Plane Module): index (column, row, slice) to LPS+ mm. A series may
hold several volumes (orientations, echoes, times): they are told apart by what the headers say. What cannot
be stacked truthfully (gantry tilt, uneven or repeated positions, stray slices) is refused by name.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np

from tasks.data.header import KEYS, Header, Plane
from tasks.data.source import Array, Faulty, Grid, Reason

#: share of a slice's distance (and of a pixel) that rounding of header fields explains
TOLERANCE = 0.05

#: planes closer than this (mm) along the normal are at one position
SAME_MM = 0.01

_STORAGE = "1.2.840.10008.5.1.4.1.1."
#: CT, MR and PET: an image without a place is damaged, not flat
_VOLUMETRIC = frozenset(
    _STORAGE + n for n in ("2", "2.1", "2.2", "4", "4.1", "4.3", "4.4", "128", "128.1", "130")
)
#: keys that also vary within a volume
_TIMES = frozenset(("trigger", "frame_time", "acquired", "acquisition_time", "content_time"))
_NO_IMAGES = {
    _STORAGE + "481.2": "a dose grid",
    _STORAGE + "77.1.6": "a whole-slide image",
}
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Image:
    """One frame of one file."""

    path: Path
    index: int
    header: Header
    plane: Plane


@dataclass(frozen=True, eq=False)
class Volume:
    """Frames in order along their normal.

    Attributes:
        affine: 4x4, (column, row, slice) to LPS+ mm.
    """

    images: tuple[Image, ...]
    affine: Array

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows, slices."""
        header = self.images[0].header
        return header.columns, header.rows, len(self.images)

    @property
    def grid(self) -> Grid:
        """What a mask must lie on; a multi-frame file repeats its SOPInstanceUID for each slice."""
        slices = tuple(image.header.sop_instance for image in self.images)
        return Grid(self.affine, self.shape, self.images[0].header.frame_of_reference, slices)

    @property
    def units(self) -> str:
        return self.images[0].header.units

    @property
    def plane(self) -> str:
        """Axial, coronal or sagittal, where slices lie so to 1 degree; else oblique."""
        normal = np.abs(np.cross(self.affine[:3, 0], self.affine[:3, 1]))
        axis = int(normal.argmax())
        straight = normal[axis] > np.cos(np.deg2rad(1.0)) * np.linalg.norm(normal)
        return ("sagittal", "coronal", "axial")[axis] if straight else "oblique"

    @cached_property
    def turn(self) -> Array:
        """Which axes to swap and flip for the closest RAS+ order (nibabel's orientation array)."""
        turn: Array = nib.io_orientation(_LPS_TO_RAS @ self.affine)  # type: ignore[no-untyped-call]
        return turn

    @property
    def ras(self) -> Array:
        """4x4, index of the turned array to RAS+ mm."""
        # nibabel's orientation functions carry no types
        back: Array = nib.orientations.inv_ornt_aff(self.turn, self.shape)  # type: ignore[no-untyped-call]
        return _LPS_TO_RAS @ self.affine @ back

    @property
    def ras_shape(self) -> tuple[int, ...]:
        shape = [0, 0, 0]
        for stored, (axis, _) in zip(self.shape, self.turn, strict=True):
            shape[int(axis)] = stored
        return tuple(shape)

    def turned(self, array: Array) -> Array:
        """A view in RAS+ order of (column, row, slice)."""
        view: Array = nib.apply_orientation(array, self.turn)  # type: ignore[no-untyped-call]
        return view

    def as_stored(self, array: Array) -> Array:
        """A view `C`(column, row, slice) of `CHWD` in RAS+ order."""
        view = array.transpose(0, *(1 + int(axis) for axis, _ in self.turn))
        return view[:, *(slice(None, None, int(step)) for _, step in self.turn)]


@dataclass(frozen=True, eq=False)
class Part:
    """What became of some frames of a series: a volume, a flat image, or a refusal."""

    images: tuple[Image, ...]
    volume: Volume | None = None
    fault: Faulty | None = None


def assemble(files: Iterable[tuple[Path, Header]]) -> list[Part]:
    """All that the files of one series hold, every frame in exactly one part.

    Files that repeat a SOPInstanceUID are left out where they say the same.
    """
    kept, parts = _once(files)
    scouts = [f for f in kept if f[1].scout]
    if scouts:
        fault = Faulty(Reason.SCOUT, "ImageType (0008,0008) says LOCALIZER")
        parts.append(Part(tuple(i for f in scouts for i in _images(*f)), fault=fault))
    by_class: dict[str, list[tuple[Path, Header]]] = defaultdict(list)
    for path, header in kept:
        if not header.scout:
            by_class[header.sop_class].append((path, header))
    for same in by_class.values():
        parts += _of_class(same)
    return parts


def stack(images: Sequence[Image]) -> Volume:
    """The frames as one volume.

    Raises:
        Faulty: they do not lie evenly on one line along their common normal.
    """
    if len(images) < 2:
        raise Faulty(Reason.SLICES, "one slice; need at least 2")
    first = images[0].plane
    if first.orientation is None or first.spacing is None:
        raise Faulty(Reason.NO_POSITION, "a slice has no ImageOrientationPatient or PixelSpacing")
    along_row, along_column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    normal = np.cross(along_row, along_column)
    if not np.allclose([along_row @ along_row, along_column @ along_column, normal @ normal], 1, atol=1e-3):
        raise Faulty(Reason.GEOMETRY, "ImageOrientationPatient (0020,0037) is not orthonormal")
    positions = _positions(images)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    row_mm, column_mm = first.spacing
    if not min(row_mm, column_mm) > 0:
        raise Faulty(Reason.GEOMETRY, f"PixelSpacing (0028,0030) is {row_mm:g}, {column_mm:g} mm")
    _check_gaps(positions, normal, min(row_mm, column_mm))
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_mm
    affine[:3, 1] = along_column * row_mm
    affine[:3, 2] = (positions[-1] - positions[0]) / (len(positions) - 1)
    affine[:3, 3] = positions[0]
    return Volume(tuple(images[i] for i in order), affine)


def _once(files: Iterable[tuple[Path, Header]]) -> tuple[list[tuple[Path, Header]], list[Part]]:
    """Each SOPInstanceUID once; one that two different headers bear is refused."""
    kept: dict[Hashable, tuple[Path, Header]] = {}
    parts = []
    for path, header in sorted(files, key=lambda f: f[0]):
        first = kept.setdefault(header.sop_instance or path, (path, header))
        if first[0] != path and first[1] != header:
            fault = Faulty(Reason.DUPLICATE, f"{path.name} and {first[0].name} bear one SOPInstanceUID")
            parts.append(Part(_images(path, header), fault=fault))
    return list(kept.values()), parts


def _images(path: Path, header: Header) -> tuple[Image, ...]:
    return tuple(Image(path, i, header, plane) for i, plane in enumerate(header.planes))


def _of_class(files: Sequence[tuple[Path, Header]]) -> list[Part]:
    """The parts of files of one SOP class."""
    images = [i for f in files for i in _images(*f)]
    header = files[0][1]
    placed = [i.plane.position is not None and i.plane.orientation is not None for i in images]
    name = _NO_IMAGES.get(header.sop_class)
    if name is not None:
        return [Part(tuple(images), fault=Faulty(Reason.SHAPE, f"{name} is not read as an image"))]
    if header.sop_class not in _VOLUMETRIC and (len(images) == 1 or not all(placed)):
        return [part for f in files for part in _flat(*f)]
    if not all(placed):
        fault = Faulty(Reason.NO_POSITION, "a slice has no ImagePositionPatient or ImageOrientationPatient")
        return [Part(tuple(images), fault=fault)]
    if any(h.frames != len(h.planes) for _, h in files):
        fault = Faulty(Reason.SHAPE, "NumberOfFrames (0028,0008) is not the number of frames described")
        return [Part(tuple(images), fault=fault)]
    for name, values in (
        ("PatientID (0010,0020)", {h.patient for _, h in files}),
        ("the unit of values", {h.units for _, h in files}),
    ):
        if len(values) > 1:  # a split would hide it
            fault = Faulty(Reason.MIXED, f"{name} changes within the series")
            return [Part(tuple(images), fault=fault)]
    return _stacks(images)


def _flat(path: Path, header: Header) -> list[Part]:
    """Each frame of a file as an image of its own."""
    if header.frames > 10_000:
        images = _images(path, header)
        return [Part(images, fault=Faulty(Reason.LIMIT, f"{header.frames} frames; at most 10000 are read"))]
    plane = header.planes[0]
    return [Part((Image(path, i, header, plane),)) for i in range(header.frames)]


def _stacks(images: Sequence[Image]) -> list[Part]:
    """Frames of one class by geometry, then by what tells volumes apart."""
    for reason, name, alike in _GEOMETRY:
        groups = _clusters(images, alike)
        if len(groups) > 1:
            if min(len(g) for g in groups) < 2:
                fault = Faulty(reason, f"{name} changes within the series, for one slice alone")
                return [Part(tuple(images), fault=fault)]
            return [part for group in groups for part in _stacks(group)]
    return [_stacked(group) for group in _volumes(images)]


def _same_size(a: Image, b: Image) -> bool:
    return (a.header.rows, a.header.columns, a.header.samples) == (
        b.header.rows,
        b.header.columns,
        b.header.samples,
    )


def _close(name: str, tolerance: float) -> Callable[[Image, Image], bool]:
    def close(a: Image, b: Image) -> bool:
        one, other = getattr(a.plane, name), getattr(b.plane, name)
        if one is None or other is None:
            return one is other
        return bool(np.allclose(one, other, rtol=0, atol=tolerance))

    return close


_GEOMETRY: tuple[tuple[Reason, str, Callable[[Image, Image], bool]], ...] = (
    (Reason.MIXED, "Rows, Columns or SamplesPerPixel", _same_size),
    (
        Reason.MIXED,
        "FrameOfReferenceUID",
        lambda a, b: a.header.frame_of_reference == b.header.frame_of_reference,
    ),
    (Reason.MIXED, "PixelSpacing", _close("spacing", 1e-4)),
    (Reason.ORIENTATION, "ImageOrientationPatient (0020,0037)", _close("orientation", 1e-3)),
)


def _clusters(images: Sequence[Image], alike: Callable[[Image, Image], bool]) -> list[list[Image]]:
    groups: list[list[Image]] = []
    for image in images:
        for group in groups:
            if alike(group[0], image):
                group.append(image)
                break
        else:
            groups.append([image])
    return groups


def _stacked(images: Sequence[Image]) -> Part:
    try:
        return Part(tuple(images), volume=stack(images))
    except Faulty as fault:
        return Part(tuple(images), fault=fault)


def _volumes(images: Sequence[Image]) -> list[list[Image]]:
    """Frames of one geometry, by volume; all of them together where nothing tells volumes apart."""
    if _stacked(images).volume is not None:
        return [list(images)]
    times = _most_at_one_place(images)
    varying = [k for k in _key_names(images) if len({i.plane.keys.get(k, "") for i in images}) > 1]
    if times == 1:  # none is repeated: only what names a stack or an acquisition outright may divide them
        splits = (_by(images, (k,)) for k in varying if k in ("stack", "acquisition"))
        sound = (s for s in splits if all(len(g) > 2 and _stacked(g).volume for g in s))
        return next(sound, [list(images)])
    choices = [(k,) for k in varying] + list(combinations(varying, 2))
    loose = None
    for names in choices:
        split = _by(images, names)
        if len(split) > times or any(len(g) < 2 or _most_at_one_place(g) > 1 for g in split):
            continue
        if _alike(split):
            return split
        if names[0] not in _TIMES:  # a volume of several may be damaged: it is refused, the others are not
            loose = loose or split
    return loose or _by_number(images, times)


def _key_names(images: Sequence[Image]) -> list[str]:
    found = {k for i in images for k in i.plane.keys}
    return [k for k in KEYS if k in found] + sorted(found - set(KEYS))


def _by(images: Sequence[Image], names: tuple[str, ...]) -> list[list[Image]]:
    groups: dict[tuple[str, ...], list[Image]] = defaultdict(list)
    for image in images:
        groups[tuple(image.plane.keys.get(n, "") for n in names)].append(image)
    return [groups[k] for k in sorted(groups, key=lambda key: [_natural(v) for v in key])]


def _natural(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return float("inf"), text


def _by_number(images: Sequence[Image], times: int) -> list[list[Image]]:
    """Volumes by InstanceNumber, where it counts slices of volumes or volumes of slices without a slip."""
    count = len(images) // times
    ordered = sorted(images, key=lambda i: (i.header.instance, i.index))
    numbers = {(i.header.instance, i.index) for i in images}
    if count < 2 or count * times != len(images) or len(numbers) < len(images):
        return [list(images)]
    for split in (
        [ordered[t * count : (t + 1) * count] for t in range(times)],
        [ordered[t::times] for t in range(times)],
    ):
        if _alike(split):
            return split
    return [list(images)]


def _alike(split: Sequence[Sequence[Image]]) -> bool:
    """Every group is a volume, and all lie at the same places."""
    volumes = [_stacked(group).volume for group in split]
    first = volumes[0]
    return all(
        v is not None
        and first is not None
        and len(v.images) == len(first.images)
        and np.abs(_positions(v.images) - _positions(first.images)).max() < 2 * SAME_MM
        for v in volumes
    )


def _positions(images: Sequence[Image]) -> Array:
    positions = np.array([i.plane.position for i in images], dtype=float)
    if not np.isfinite(positions).all() or np.abs(positions).max() > 1e6:
        raise Faulty(Reason.GEOMETRY, "ImagePositionPatient (0020,0032) is not a place")
    return positions


def _most_at_one_place(images: Sequence[Image]) -> int:
    """How many frames lie at the position that is taken most often."""
    positions = np.array([i.plane.position for i in images], dtype=float)
    rounded = np.round(np.nan_to_num(positions).clip(-1e9, 1e9) / SAME_MM).astype(np.int64)
    return max(Counter(map(tuple, rounded.tolist())).values())


def _check_gaps(positions: Array, normal: Array, pixel_mm: float) -> None:
    """Refuse positions that do not lie evenly on one line along the normal."""
    depth = positions @ normal
    gaps = np.diff(depth)
    drift = positions - positions[0] - np.outer(depth - depth[0], normal)
    off = float(np.linalg.norm(drift, axis=1).max())
    if gaps.min() < SAME_MM:
        distinct = 1 + int((gaps >= SAME_MM).sum())
        raise Faulty(
            Reason.REPEATED, f"{len(depth)} slices at {distinct} positions: several volumes in one series"
        )
    if off > max(TOLERANCE * pixel_mm, 1e-2):
        raise Faulty(Reason.TILT, f"slices drift by {off:.3g} mm in their own plane")
    even = np.linspace(depth[0], depth[-1], len(depth))
    middle = float(np.median(gaps))
    if np.abs(gaps - middle).max() > TOLERANCE * middle or np.abs(depth - even).max() > TOLERANCE * middle:
        raise Faulty(Reason.UNEVEN, f"slice distances run from {gaps.min():.4g} to {gaps.max():.4g} mm")
