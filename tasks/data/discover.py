"""Which files belong together: rows of a manifest, or image and label folders."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from conf.exits import Exit, Stop
from conf.schema import Columns
from tasks.data import images, nifti
from tasks.data.source import Faulty, Found, LabelMap, Raw, Reason

_SPLITS = {
    "": None,
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_IMAGE_WORDS = {"image", "images", "img", "imgs"}
_MASK_WORDS = {"label", "labels", "mask", "masks", "seg", "segmentation", "segmentations"}


def kind(path: PurePosixPath | Path) -> str | None:
    """`nifti`, `image`, or None for a file of neither kind."""
    name = path.name.lower()
    if name.endswith(nifti.SUFFIXES):
        return "nifti"
    return "image" if name.endswith(images.SUFFIXES) else None


def from_manifest(
    root: Path,
    name: str,
    columns: Columns,
    label_map: LabelMap = None,  # noqa: ARG001
) -> list[Found]:
    """One case per row; paths are relative to the root and stay below it.

    Raises:
        Stop: (`CONFIG`) no such manifest, a column is missing (the message lists them), or `site_names`.
    """
    path = root / name
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
            header = rows[0].keys() if rows else ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Stop(Exit.CONFIG, f"data.manifest {path} cannot be read: {error}") from None
    if not rows:
        raise Stop(Exit.NO_CASES, f"data.manifest {path} has no rows")
    wanted = [c for c in (columns.image, columns.label, columns.patient, columns.site, columns.split) if c]
    missing = [c for c in wanted if c not in header]
    if missing:
        known = ", ".join(str(c) for c in header)
        raise Stop(Exit.CONFIG, f"manifest has no column {', '.join(missing)}; it has {known} (data.columns)")
    found: dict[str, Found] = {}
    for number, row in enumerate(rows, 2):
        case = _row(root, row, columns)
        if case.source in found:
            fault = Faulty(Reason.DUPLICATE, f"line {number} of the manifest repeats an image")
            case = replace(case, source=f"{case.source} (line {number})", fault=case.fault or fault)
        found[case.source] = case
    sites = site_names(case.site for case in found.values() if case.site)
    return [replace(case, site=sites[case.site]) if case.site else case for case in found.values()]


def from_folders(root: Path, files: Iterable[Path], *, with_masks: bool) -> list[Found]:
    """Cases of the NIfTI and picture files among `files`, image and mask paired by name.

    `a/image/x` goes with `a/label/x` (or images, labels, mask, masks). A file in no such folder is an
    image, unless its name says otherwise: `label_x`, `x_seg` go with `image_x`, `x` beside them.
    """
    groups: dict[tuple[str, str], tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    for path in files:
        if kind(path) is not None:
            place, stem, is_mask = _role(path.relative_to(root))
            groups[place, stem][is_mask].append(path)
    found: list[Found] = []
    for (_, _), (pictures, masks) in sorted(groups.items()):
        if with_masks:
            found += _paired(root, pictures, masks)
        else:
            found += [_case(root, p, None) for p in pictures]
    return found


def site_folders(found: Sequence[Found]) -> list[Found]:
    """Name the site of each case by the first folder below the root, where there are several such folders.

    Raises:
        Stop: (`CONFIG`) see `site_names`.
    """
    first = {f.source: _first_folder(f) for f in found}
    names = {n for f in found if f.fault is None and (n := first[f.source]) is not None}
    if len(names) < 2:
        return list(found)
    sites = site_names(names)
    return [replace(f, site=sites.get(first[f.source] or "")) for f in found]


def site_names(texts: Iterable[str]) -> dict[str, str]:
    """Sites' names from cells or folder names: runs of other characters become `_`.

    Raises:
        Stop: (`CONFIG`) nothing usable is left of one, or two become the same.
    """
    names: dict[str, str] = {}
    for text in sorted(set(texts)):
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", text).lstrip("_.-")[:64]
        if not name:
            raise Stop(Exit.CONFIG, f"{text!r} cannot name a site; use letters, digits, _ . -")
        if name in names.values():
            raise Stop(Exit.CONFIG, f"two sites would be called {name}; rename {text!r}")
        names[text] = name
    return names


def _row(root: Path, row: dict[str, str | None], columns: Columns) -> Found:
    def cell(column: str | None) -> str:
        return (row.get(column) or "").strip() if column else ""

    source, mask_source = cell(columns.image), cell(columns.label)
    found = Found(source or mask_source or "(empty row)", cell(columns.patient) or source, ())
    try:
        image, mask = _below(root, source), _below(root, mask_source)
        if image is None and mask is None:
            raise Faulty(Reason.UNREADABLE, "no such file")
        if image is None:
            raise Faulty(Reason.NO_IMAGE, f"image {source or '(empty)'} does not exist")
        if mask is None and columns.label:
            raise Faulty(Reason.NO_MASK, f"mask {mask_source or '(empty)'} does not exist")
        if columns.patient and not cell(columns.patient):
            raise Faulty(Reason.NO_PATIENT, f"column {columns.patient} is empty")
        suggested = cell(columns.split).lower()
        if suggested not in _SPLITS:
            raise Faulty(Reason.SPLIT, f"column {columns.split} has {suggested!r}; accepted train, val, test")
        return replace(
            found,
            files=(image,) if mask is None else (image, mask),
            read=_reader(image, mask),
            site=cell(columns.site) or None,
            split=_SPLITS[suggested],
        )
    except Faulty as fault:
        return replace(found, fault=fault)


def _below(root: Path, name: str) -> Path | None:
    """The file `name` below the root, or None where there is none."""
    if not name:
        return None
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise Faulty(Reason.UNREADABLE, f"{name} leaves the data root")
    return path if path.is_file() else None


def _paired(root: Path, pictures: list[Path], masks: list[Path]) -> list[Found]:
    if not pictures:
        return [_refused(root, m, Reason.NO_IMAGE, "no image of that name") for m in masks]
    if not masks:
        return [_refused(root, p, Reason.NO_MASK, "no mask of that name") for p in pictures]
    if len(pictures) > 1 or len(masks) > 1:
        names = ", ".join(p.name for p in (*pictures, *masks))
        return [_refused(root, p, Reason.SEVERAL_FILES, names) for p in pictures]
    return [_case(root, pictures[0], masks[0])]


def _case(root: Path, image: Path, mask: Path | None) -> Found:
    source = image.relative_to(root).as_posix()
    return Found(source, source, (image,) if mask is None else (image, mask), _reader(image, mask))


def _refused(root: Path, path: Path, reason: Reason, detail: str) -> Found:
    source = path.relative_to(root).as_posix()
    return Found(source, source, (path,), fault=Faulty(reason, detail))


def _reader(image: Path, mask: Path | None) -> Callable[[LabelMap], Raw]:
    known = {"nifti": nifti.read_pair, "image": images.read_pair}.get(kind(image) or "")
    if known is None:
        accepted = ", ".join((*nifti.SUFFIXES, *images.SUFFIXES))
        raise Faulty(Reason.UNREADABLE, f"{image.name} has no known suffix; accepted {accepted}")
    return partial(known, image, mask)


def _role(path: Path) -> tuple[str, str, bool]:
    """Where a pair stands, its common name, and whether this file is the mask."""
    stem = path.name
    for suffix in sorted((*nifti.SUFFIXES, *images.SUFFIXES), key=len, reverse=True):
        if stem.lower().endswith(suffix):
            stem = stem[: -len(suffix)]
            break
    folders = list(path.parts[:-1])
    for i in reversed(range(len(folders))):
        if folders[i].lower() in _IMAGE_WORDS | _MASK_WORDS:
            is_mask = folders.pop(i).lower() in _MASK_WORDS
            return "/".join(folders), stem, is_mask
    words = re.split(r"([_.-])", stem)
    for i, word in enumerate(words):
        if word.lower() in _IMAGE_WORDS | _MASK_WORDS:
            rest = "".join(w for j, w in enumerate(words) if j not in (i, i + 1 if i == 0 else i - 1))
            return "/".join(folders), rest, word.lower() in _MASK_WORDS
    return "/".join(folders), stem, False


def _first_folder(found: Found) -> str | None:
    parts = PurePosixPath(found.source).parts
    if len(parts) < 2 or parts[0].lower() in _IMAGE_WORDS | _MASK_WORDS:
        return None
    return parts[0]
