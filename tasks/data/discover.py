"""Which files belong together: rows of a manifest, or image and label folders."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from conf.exits import Exit, Stop
from conf.schema import Columns
from tasks.data import arrays, images, nifti, tables
from tasks.data.aside import read_aside
from tasks.data.source import Faulty, Found, LabelMap, Naming, Raw, Reason

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
SUFFIXES = (*nifti.SUFFIXES, *images.SUFFIXES)
_IMAGE_WORDS = {"image", "images", "img", "imgs"}
_MASK_WORDS = {"label", "labels", "mask", "masks", "seg", "segmentation", "segmentations"}


def kind(path: PurePosixPath | Path) -> str | None:
    """`nifti`, `image`, `arrays`, or None for a file of no such kind."""
    name = path.name.lower()
    if name.endswith(nifti.SUFFIXES):
        return "nifti"
    if name.endswith(arrays.SUFFIX):
        return "arrays"
    return "image" if name.endswith(images.SUFFIXES) else None


def from_manifest(
    root: Path,
    name: str,
    columns: Columns,
    label_map: LabelMap = None,
    series: Callable[[list[Path], Collection[Path]], list[Found]] = lambda *_: [],
) -> list[Found]:
    """One case per row; paths are relative to the root and stay below it.

    An image may be a DICOM file (one slice of a volume too: a flat image), or a folder with one series.

    The label column holds mask files where every cell that is not empty ends in a known suffix; otherwise
    it holds classes, as the columns of `columns.labels` do.

    Args:
        series: finds the cases of DICOM files, of which some stand for themselves.

    Raises:
        Stop: (`CONFIG`) no such manifest, a column is missing (the message lists them), a class name is not
            mapped, or `site_names`.
    """
    rows = tables.read_rows(root / name)
    tables.check_header(rows, columns)
    classes = dict(zip(columns.labels, columns.labels, strict=True))
    masks = columns.label if tables.holds_files(rows, columns.label, SUFFIXES) else None
    if columns.label and not masks:
        classes[columns.label] = "label"
    names = Naming.of(label_map)
    tables.check_names(rows, list(classes), names)
    volumes = _volumes(root, rows, columns, series)
    found: dict[str, Found] = {}
    for line, row in enumerate(rows, 2):
        case = Found(_named(row, columns, masks) or f"{name}:{line}", "", ())
        try:
            case = replace(case, patient=row[columns.patient] if columns.patient else case.source)
            cells = tables.read_cells(row, classes, columns, names)
            case = _placed(replace(case, cells=cells.texts), row, columns)
            if columns.image and row[columns.image] in volumes:
                case = _stacked(case, volumes[row[columns.image]], columns, masks, cells)
            else:
                case = _filed(case, root, row, columns, masks, cells)
        except Faulty as fault:
            case = replace(case, fault=fault)
        if case.source in found:
            again = Faulty(Reason.DUPLICATE, f"line {line} of the manifest repeats an image")
            case = replace(case, source=f"{case.source} (line {line})", fault=case.fault or again)
        found[case.source] = case
    sites = site_names(case.site for case in found.values() if case.site)
    return [replace(case, site=sites[case.site]) if case.site else case for case in found.values()]


def from_folders(
    root: Path, files: Iterable[Path], *, with_masks: bool, columns: Columns | None = None
) -> list[Found]:
    """Cases of the NIfTI and picture files among `files`, image and mask paired by name, and of `.npz`.

    `a/image/x` goes with `a/label/x` (or images, labels, mask, masks). A file in no such folder is an
    image, unless its name says otherwise: `label_x`, `x_seg` go with `image_x`, `x` beside them.
    """
    columns = columns or Columns()
    groups: dict[tuple[str, str], tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    found: list[Found] = []
    for path in files:
        if kind(path) == "arrays":
            found += arrays.from_arrays(root, path)
        elif kind(path) is not None:
            place, stem, is_mask = _role(path.relative_to(root))
            groups[place, stem][is_mask].append(path)
    for (_, _), (pictures, masks) in sorted(groups.items()):
        if with_masks:
            found += _paired(root, pictures, masks, columns)
        else:
            found += [_case(root, p, None, columns) for p in pictures]
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


def _named(row: tables.Row, columns: Columns, masks: str | None) -> str:
    """What a case is called: by its image; empty for a row of a table alone."""
    if columns.image is None:
        return ""
    return row[columns.image] or (row[masks] if masks else "") or "(empty row)"


def _placed(case: Found, row: tables.Row, columns: Columns) -> Found:
    """Whose case it is, where it belongs, and what the manifest wants it for."""
    if columns.patient and not case.patient:
        raise Faulty(Reason.NO_PATIENT, f"column {columns.patient} is empty")
    suggested = row[columns.split].lower() if columns.split else ""
    if suggested not in _SPLITS:
        raise Faulty(Reason.SPLIT, f"column {columns.split} has {suggested!r}; accepted train, val, test")
    site = row[columns.site] if columns.site else ""
    return replace(case, site=site or None, split=_SPLITS[suggested])


def _filed(
    case: Found, root: Path, row: tables.Row, columns: Columns, masks: str | None, cells: tables.Cells
) -> Found:
    """The case with its files and what reads them."""
    if columns.image is None:
        return replace(case, read=cells.alone)
    source, mask_source = row[columns.image], row[masks] if masks else ""
    image, mask = _below(root, source), _below(root, mask_source)
    if image is None and mask is None:
        raise Faulty(Reason.UNREADABLE, "no such file")
    if image is None:
        raise Faulty(Reason.NO_IMAGE, f"image {source or '(empty)'} does not exist")
    if mask is None and masks:
        raise Faulty(Reason.NO_MASK, f"mask {mask_source or '(empty)'} does not exist")
    read = partial(_with_cells, _reader(image, mask, columns), cells)
    return replace(case, files=(image,) if mask is None else (image, mask), read=read)


def _volumes(
    root: Path,
    rows: Sequence[tables.Row],
    columns: Columns,
    series: Callable[[list[Path], Collection[Path]], list[Found]],
) -> dict[str, list[Found]]:
    """What DICOM holds under each image cell that names a folder, or a file of no other kind."""
    files: dict[str, list[Path]] = {}
    for cell in {row[columns.image] for row in rows} if columns.image else ():
        with suppress(Faulty, OSError):  # its own row says so
            if (path := _inside(root, cell)) and kind(path) is None:
                inside = sorted(path.rglob("*")) if path.is_dir() else [path]
                files[cell] = [p for p in inside if p.is_file()]
    alone = {paths[0] for cell, paths in files.items() if paths == [root / cell]}
    found = series(sorted({p for paths in files.values() for p in paths}), alone) if files else []
    owner = {path: f for f in found for path in f.files}
    held = {cell: {owner[p].source: owner[p] for p in paths if p in owner} for cell, paths in files.items()}
    return {cell: list(cases.values()) for cell, cases in held.items() if cases}


def _stacked(
    case: Found, volumes: Sequence[Found], columns: Columns, masks: str | None, cells: tables.Cells
) -> Found:
    """The case of a DICOM series, with its cells."""
    if len(volumes) > 1:
        raise Faulty(Reason.SEVERAL_FILES, f"{len(volumes)} volumes or images; a row names one")
    volume = volumes[0]
    if masks:
        raise Faulty(Reason.MASK_KIND, f"column {masks}: masks of DICOM are found by what they refer to")
    if volume.fault is not None or volume.read is None:
        raise volume.fault or Faulty(Reason.UNREADABLE, "nothing reads it")
    patient = case.patient if columns.patient else volume.patient
    return replace(case, patient=patient, files=volume.files, read=partial(_with_cells, volume.read, cells))


def _with_cells(read: Callable[[LabelMap], Raw], cells: tables.Cells, label_map: LabelMap) -> Raw:
    return cells.onto(read(label_map))


def _below(root: Path, name: str) -> Path | None:
    """The file `name` below the root, or None where there is none."""
    path = _inside(root, name)
    return path if path is not None and path.is_file() else None


def _inside(root: Path, name: str) -> Path | None:
    """What `name` is below the root, or None where nothing is."""
    if not name or "\0" in name:
        return None
    path = root / name
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            raise Faulty(Reason.UNREADABLE, f"{name} leaves the data root")
        return path if path.exists() else None
    except OSError as error:  # no right to look, or a text longer than names can be
        raise Faulty(Reason.UNREADABLE, f"{name[:80]}: {error.strerror}") from None


def _paired(root: Path, pictures: list[Path], masks: list[Path], columns: Columns) -> list[Found]:
    if not pictures:
        return [_refused(root, m, Reason.NO_IMAGE, "no image of that name") for m in masks]
    if not masks:
        return [_refused(root, p, Reason.NO_MASK, "no mask of that name") for p in pictures]
    if len(pictures) > 1 or len(masks) > 1:
        names = ", ".join(p.name for p in (*pictures, *masks))
        return [_refused(root, p, Reason.SEVERAL_FILES, names) for p in pictures]
    return [_case(root, pictures[0], masks[0], columns)]


def _case(root: Path, image: Path, mask: Path | None, columns: Columns) -> Found:
    source = image.relative_to(root).as_posix()
    return Found(source, source, (image,) if mask is None else (image, mask), _reader(image, mask, columns))


def _refused(root: Path, path: Path, reason: Reason, detail: str) -> Found:
    source = path.relative_to(root).as_posix()
    return Found(source, source, (path,), fault=Faulty(reason, detail))


def _reader(image: Path, mask: Path | None, columns: Columns) -> Callable[[LabelMap], Raw]:
    if kind(image) == "nifti":
        return partial(read_aside, "nifti", image, mask, columns)
    if kind(image) == "image":
        return partial(read_aside, "image", image, mask, columns)
    raise Faulty(Reason.UNREADABLE, f"{image.name} has no known suffix; accepted {', '.join(SUFFIXES)}")


def _role(path: Path) -> tuple[str, str, bool]:
    """Where a pair stands, its common name, and whether this file is the mask."""
    stem = path.name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
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
