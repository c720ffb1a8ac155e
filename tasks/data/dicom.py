"""DICOM files as cases: every volume of a series with its DICOM SEG, every flat image; RAS+ and in mm.

Files are parsed in guarded workers only: this module sees their headers as checked facts and their pixels as
arrays.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from tasks.data.discover import kind
from tasks.data.drawn import SOP_CLASSES, guarded_masks
from tasks.data.guard import Guard, shared
from tasks.data.header import Header, begins_dicom, read_header
from tasks.data.labels import Drawn
from tasks.data.nifti import spacing_of
from tasks.data.pixels import frames
from tasks.data.released import REMEDY, Released
from tasks.data.series import Part, assemble
from tasks.data.source import Array, Faulty, Found, LabelMap, Raw, Reason, reading
from tasks.data.volume import Image, Volume

_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")

_RUN = 16  # slices
#: bytes a volume, or all flat images of a file, may take, beside so many times their files: compressors reach
#: 20 on volumes and 100 on dark films; on nothing at all there is no end
_UNPACKED, _TIMES, _TIMES_FLAT = 1 << 30, 32, 256

File = tuple[Path, Header]
_Key = tuple[str, Path | None]  # SeriesInstanceUID, and the file where it stands alone


@dataclass(frozen=True)
class Series:
    """One SeriesInstanceUID: what it is called, and what it holds."""

    name: str
    uid: str
    parts: tuple[Part, ...]


def from_series(
    root: Path,
    files: Iterable[Path],
    *,
    with_masks: bool,
    alone: Collection[Path] = (),
    released: Released | None = None,
    guard: Guard | None = None,
    workers: int = 1,
) -> list[Found]:
    """One case for each volume and flat image; objects without pixels (reports, plans) are passed over.

    Args:
        with_masks: SEG and RTSTRUCT belong to what they refer to. alone: files each of which is a case of
            its own, whatever its series. released: files whose pixels were reviewed. workers: files whose
            headers are read at one time.
    """
    guard = guard or shared()
    found: list[Found] = []
    headers: list[File] = []
    paths = [p for p in files if _is_dicom(p)]

    def look(path: Path) -> Header | Faulty:
        try:
            return read_header(path, guard)
        except Faulty as fault:
            return fault

    with ThreadPoolExecutor(max_workers=workers) as pool:
        for path, header in zip(paths, pool.map(look, paths), strict=True):
            if isinstance(header, Faulty):
                found.append(Found(_relative(root, path), "", (path,), fault=header))
            else:
                headers.append((path, header))
    series = all_series(root, headers, alone)
    parts = [part for one in series for part in one.parts]
    attached: dict[int, list[Path]] = defaultdict(list)
    for path, header in headers if with_masks else ():
        if header.sop_class in SOP_CLASSES:
            owner = _owner(header, parts)
            if isinstance(owner, Faulty):
                found.append(Found(_relative(root, path), "", (path,), fault=owner))
            else:
                attached[id(owner)].append(path)
    held = cache(released.holds if released is not None else lambda _: False)  # a file of many frames, once
    for one in series:
        for number, part in enumerate(one.parts, 1):
            name = one.name if len(one.parts) == 1 else f"{one.name}#{number}"
            case = _case(name, part, attached[id(part)], with_masks=with_masks, guard=guard)
            found.append(case if case.fault is not None else _reviewed(case, part, held))
    return found


def all_series(root: Path, headers: Iterable[File], alone: Collection[Path] = ()) -> list[Series]:
    """The image series of some files, each with its parts; a file of `alone` counts as one."""
    by_uid: dict[_Key, list[File]] = defaultdict(list)
    for path, header in headers:
        if header.has_pixels and header.sop_class not in SOP_CLASSES:
            by_uid[header.series, path if path in alone else None].append((path, header))
    names = _names(root, by_uid)
    return [
        Series(names[key], key[0], tuple(_parts(files, alone=key[1] is not None)))
        for key, files in by_uid.items()
    ]


def read_volume(
    volume: Volume, masks: Sequence[Path], label_map: LabelMap, *, guard: Guard | None = None
) -> Raw:
    """A volume in RAS+ order with its units, and the classes that SEG and RTSTRUCT files draw on it.

    Raises:
        Faulty: a file cannot be decoded, or a mask does not belong to it.
    """
    guard = guard or shared()
    ras = volume.ras
    spacing = spacing_of(ras)
    header = volume.images[0].header
    _check_room({i.path for i in volume.images}, 2 * math.prod(volume.shape) * header.samples, _TIMES)
    drawn = _drawn(volume, masks, label_map, guard) if masks else None
    image = _filled(volume, guard)
    return Raw(
        image,
        None if drawn is None else drawn.mask,
        ras,
        spacing,
        header.groups,
        units=header.units,
        unmapped=() if drawn is None else drawn.unmapped,
        notes=() if drawn is None else drawn.notes,
    )


def read_flat(image: Image, _label_map: LabelMap, *, guard: Guard | None = None) -> Raw:
    """One frame as a flat case `CHW`; spacing is that of its pixels, or of its detector, or 1 mm."""
    header = image.header
    _check_room([image.path], header.frames * header.rows * header.columns * header.samples, _TIMES_FLAT)
    _, values = (guard or shared()).call(frames, image.path, indices=[image.index])
    if values is None or values.shape[1:] != (header.rows, header.columns):
        raise Faulty(Reason.SIZE, f"{image.path.name} holds a frame of another size than it says")
    spacing = image.plane.spacing or (1.0, 1.0)
    if not min(spacing) > 0 or not np.isfinite(spacing).all():
        raise Faulty(Reason.GEOMETRY, f"PixelSpacing (0028,0030) is {spacing[0]:g}, {spacing[1]:g} mm")
    affine = np.diag([*spacing, 1.0, 1.0])
    return Raw(values, None, affine, spacing, header.groups, units=header.units)


def _parts(files: Sequence[File], *, alone: bool = False) -> list[Part]:
    parts = assemble(files, alone=alone)
    if all(f[1].series for f in files):
        return parts
    fault = Faulty(Reason.UNREADABLE, "no SeriesInstanceUID (0020,000E)")
    return [Part(p.images, fault=fault) for p in parts]


def _check_room(paths: Collection[Path], size: int, times: int) -> None:
    """Refuse what is far larger than its files explain: each frame may keep the limits, and all not.

    Args:
        size: bytes that all frames take, at least.
    """
    first = min(paths)
    with reading(first):
        files = sum(path.stat().st_size for path in paths)
    if size > _UNPACKED + times * files:
        what = f"{size >> 20} MiB of image in files of {files >> 20} MiB"
        raise Faulty(Reason.LIMIT, f"{first.name}: {what}")


def _drawn(volume: Volume, masks: Sequence[Path], label_map: LabelMap, guard: Guard) -> Drawn:
    """The mask in RAS+ order. As it was drawn it is as large again: it goes before the image comes."""
    drawn = guarded_masks(masks, volume.grid, label_map, guard)
    return replace(drawn, mask=np.ascontiguousarray(volume.turned(drawn.mask)))


def _filled(volume: Volume, guard: Guard) -> Array:
    """`CHWD` of a volume, written into its place as slices come: nothing else is as large."""
    image: Array | None = None
    run: list[Array] = []  # neighbours are written together: one by one, each would touch all of the memory
    first = 0
    for k, values in _slices(volume, guard):
        if image is None:
            image = np.empty((len(values), *volume.ras_shape), dtype=values.dtype)
        if run and (k != first + len(run) or len(run) == _RUN):
            image = _written(volume, image, first, run)
            run = []
        first = first if run else k
        run.append(values)
    if image is None:
        raise Faulty(Reason.SLICES, "no frames")
    return _written(volume, image, first, run)


def _slices(volume: Volume, guard: Guard) -> Iterator[tuple[int, Array]]:
    """Slice number and values `CHW`, file by file."""
    columns, rows, _ = volume.shape
    wanted: dict[Path, dict[int, int]] = defaultdict(dict)
    for k, one in enumerate(volume.images):
        wanted[one.path][one.index] = k
    for path, places in wanted.items():
        indices = sorted(places)
        count = 0
        answers = guard.stream(frames, path, most=len(indices), indices=indices)
        for count, (_, values) in enumerate(answers, 1):
            shape = (volume.images[0].header.samples, rows, columns)
            if values is None or values.shape != shape:
                raise Faulty(Reason.SIZE, f"{path.name} holds a frame of another size than it says")
            yield places[indices[count - 1]], values
        if count != len(indices):
            raise Faulty(Reason.UNREADABLE, f"{path.name}: {count} of {len(indices)} frames were read")


def _written(volume: Volume, image: Array, first: int, run: Sequence[Array]) -> Array:
    """The image, in a type that holds both, with `run` at the slices from `first` on."""
    block = np.stack(run, axis=-1)
    image = image.astype(_wider(image.dtype, block.dtype), copy=False)
    volume.as_stored(image)[..., first : first + len(run)] = block.swapaxes(1, 2)
    return image


def _wider(one: np.dtype[Any], other: np.dtype[Any]) -> np.dtype[Any]:
    """The one of uint8, int16 and float32 that holds both."""
    return max(one, other, key=lambda d: (d.kind == "f", d.itemsize))


def _is_dicom(path: Path) -> bool:
    if kind(path) is not None:
        return False
    if path.suffix.lower() in _DICOM_SUFFIXES:
        return True
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return False
        with path.open("rb") as file:
            return begins_dicom(file.read(132))
    except OSError:
        return False


def _relative(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _names(root: Path, by_uid: Mapping[_Key, Sequence[File]]) -> dict[_Key, str]:
    """What each series is called: its folder where that holds no other, else its first file."""
    in_folder: dict[Path, set[_Key]] = defaultdict(set)
    for uid, files in by_uid.items():
        for path, _ in files:
            in_folder[path.parent].add(uid)
    names = {}
    for uid, files in by_uid.items():
        first = min(path for path, _ in files)
        alone = {path.parent for path, _ in files} == {first.parent} and len(in_folder[first.parent]) == 1
        names[uid] = _relative(root, first.parent if alone and first.parent != root else first)
    return names


def _owner(mask: Header, parts: Sequence[Part]) -> Part | Faulty:
    """What a mask was drawn on: by the slices it names, else by its series, else by its frame of reference.

    Each tells only where it leaves one volume. A frame of reference is for registered copies of a study,
    which name series that were left behind.
    """
    parts = [p for p in parts if p.volume is not None or p.fault is not None]
    slices, series = {*mask.refers_to_instances} - {""}, {*mask.refers_to} - {""}
    frames = {*mask.refers_to_frames, mask.frame_of_reference} - {""}
    for found in (
        [p for p in parts if any(i.header.sop_instance in slices for i in p.images)],
        [p for p in parts if p.images[0].header.series in series],
        [p for p in parts if p.images[0].header.frame_of_reference in frames],
    ):
        owners = [p for p in found if p.volume is not None] or found[:1]
        if len(owners) > 1:
            return Faulty(Reason.NO_IMAGE, f"it refers to {len(owners)} volumes: nothing says to which one")
        for one in owners:
            if mask.patient not in ("", one.images[0].header.patient):
                return Faulty(Reason.MIXED, "its PatientID (0010,0020) is not that of the image it refers to")
            return one
    return Faulty(Reason.NO_IMAGE, "the series it refers to is not here")


def _case(name: str, part: Part, masks: Sequence[Path], *, with_masks: bool, guard: Guard) -> Found:
    paths = tuple(sorted({*(i.path for i in part.images), *part.repeats}))
    patients = {i.header.patient for i in part.images}
    fault = part.fault
    if len(patients) > 1:
        fault = Faulty(Reason.MIXED, "slices of several patients")
    elif patients == {""}:
        fault = Faulty(Reason.NO_PATIENT, "no PatientID (0010,0020)")
    elif with_masks and not masks and fault is None:
        fault = Faulty(Reason.NO_MASK, "no SEG or RTSTRUCT refers to it")
    elif masks and part.volume is None and fault is None:
        fault = Faulty(Reason.MASK_KIND, "a DICOM mask of a flat image is not read")
    read: Callable[[LabelMap], Raw] = partial(read_flat, part.images[0], guard=guard)
    if part.volume is not None:
        read = partial(_masked, part.volume, tuple(sorted(masks)), guard)
    if part.repeats:
        read = partial(_noted, read)
    return Found(name, min(patients), (*paths, *sorted(masks)), read, fault=fault)


def _masked(volume: Volume, masks: Sequence[Path], guard: Guard, label_map: LabelMap) -> Raw:
    return read_volume(volume, masks, label_map, guard=guard)


def _noted(read: Callable[[LabelMap], Raw], label_map: LabelMap) -> Raw:
    raw = read(label_map)
    return replace(raw, notes=(*raw.notes, "files that repeat a SOPInstanceUID were left out"))


def _reviewed(case: Found, part: Part, released: Callable[[Path], bool]) -> Found:
    """The case, refused where somebody must look at its pixels first."""
    for image in part.images:
        if image.header.doubt and not released(image.path):
            fault = Faulty(Reason.BURNED_IN, f"{image.path.name}: {image.header.doubt}{REMEDY}")
            return replace(case, fault=fault)
    return case
