"""Which frames of a series belong together.

A series may hold several volumes (orientations, echoes, times): they are told apart by what the headers say.
What nothing tells apart is refused, never stacked.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from tasks.data.header import KEYS, Header
from tasks.data.source import Faulty, Reason
from tasks.data.volume import SAME_MM, Image, Volume, positions_of, stack

_MOST_GROUPS = 64  # of other size, spacing or orientation: no scanner writes so many, a hostile file may
_PAIRED = 16  # keys of which pairs are tried

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


@dataclass(frozen=True, eq=False)
class Part:
    """What became of some frames of a series: a volume, a flat image, or a refusal.

    Attributes:
        repeats: files that say again what a file of these says, and were left out.
    """

    images: tuple[Image, ...]
    volume: Volume | None = None
    fault: Faulty | None = None
    repeats: tuple[Path, ...] = ()


def assemble(files: Iterable[tuple[Path, Header]], *, alone: bool = False) -> list[Part]:
    """All that the files of one series hold, every frame in exactly one part.

    Files that repeat a SOPInstanceUID are left out where they say the same, and named in `Part.repeats`.

    Args:
        alone: somebody named this one file as a case, so that one slice of a volume is a flat image. A
            series of one slice is none: an interrupted transfer leaves such.
    """
    kept, parts, repeats = _once(files)
    scouts = [f for f in kept if f[1].scout]
    if scouts:
        fault = Faulty(Reason.SCOUT, "ImageType (0008,0008) says LOCALIZER")
        parts.append(Part(tuple(i for f in scouts for i in _images(*f)), fault=fault))
    by_class: dict[str, list[tuple[Path, Header]]] = defaultdict(list)
    for path, header in kept:
        if not header.scout:
            by_class[header.sop_class].append((path, header))
    for same in by_class.values():
        parts += _of_class(same, alone=alone)
    return [replace(p, repeats=tuple(r for f in _paths(p) for r in repeats[f])) for p in parts]


def _once(
    files: Iterable[tuple[Path, Header]],
) -> tuple[list[tuple[Path, Header]], list[Part], Mapping[Path, list[Path]]]:
    """Each SOPInstanceUID once, and who repeats it; one that two different headers bear is refused."""
    kept: dict[Hashable, tuple[Path, Header]] = {}
    parts = []
    repeats: dict[Path, list[Path]] = defaultdict(list)
    for path, header in sorted(files, key=lambda f: f[0]):
        first = kept.setdefault(header.sop_instance or path, (path, header))
        if first[0] == path:
            continue
        if first[1] == header:
            repeats[first[0]].append(path)
            continue
        fault = Faulty(Reason.DUPLICATE, f"{path.name} and {first[0].name} bear one SOPInstanceUID")
        parts.append(Part(_images(path, header), fault=fault))
    return list(kept.values()), parts, repeats


def _paths(part: Part) -> Iterable[Path]:
    return dict.fromkeys(image.path for image in part.images)


def _images(path: Path, header: Header) -> tuple[Image, ...]:
    return tuple(Image(path, i, header, plane) for i, plane in enumerate(header.planes))


def _of_class(files: Sequence[tuple[Path, Header]], *, alone: bool) -> list[Part]:
    """The parts of files of one SOP class."""
    images = [i for f in files for i in _images(*f)]
    header = files[0][1]
    placed = [i.plane.position is not None and i.plane.orientation is not None for i in images]
    name = _NO_IMAGES.get(header.sop_class)
    if name is not None:
        return [Part(tuple(images), fault=Faulty(Reason.SHAPE, f"{name} is not read as an image"))]
    single, volumetric = len(images) == 1, header.sop_class in _VOLUMETRIC
    if (single and alone) or (not volumetric and (single or not all(placed))):
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
        return all(abs(x - y) <= tolerance for x, y in zip(one, other, strict=True))

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
    """Frames that are like the first of their group; with the last of very many groups it ends."""
    groups: list[list[Image]] = []
    for image in images:
        for group in groups:
            if alike(group[0], image):
                group.append(image)
                break
        else:
            groups.append([image])
            if len(groups) > _MOST_GROUPS:
                return groups
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
    choices = [(k,) for k in varying] + list(combinations(varying[:_PAIRED], 2))
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
        and np.abs(positions_of(v.images) - positions_of(first.images)).max() < 2 * SAME_MM
        for v in volumes
    )


def _most_at_one_place(images: Sequence[Image]) -> int:
    """How many frames lie at the position that is taken most often."""
    positions = np.array([i.plane.position for i in images], dtype=float)
    rounded = np.round(np.nan_to_num(positions).clip(-1e9, 1e9) / SAME_MM).astype(np.int64)
    return max(Counter(map(tuple, rounded.tolist())).values())
