"""MedMNIST's `.npz`: arrays `train_images`, `train_labels` and so on, one case per entry.

Layout as in the sets' own description (Yang et al., Scientific Data 10:41, 2023): images `NHW`, `NHWC` with
three colours, or `NDHW`; labels `N1`, or `NK` for several at once. Which of a volume's axes is which in the
patient is not said: they are taken in the order they are stored in, voxels of 1 mm.

A guarded worker unpacks the file and hands over one array at a time; the cases are cut from it here.
"""

from __future__ import annotations

import math
import threading
import zipfile
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from tasks.data.guard import Answer, shared
from tasks.data.source import Array, Faulty, Found, LabelMap, Raw, Reason, reading, stored

SUFFIX = ".npz"
PARTS = ("train", "val", "test")

#: bytes one array may take when unpacked
LIMIT = 1 << 30


def from_arrays(root: Path, path: Path) -> list[Found]:
    """One case per image, in the split whose array holds it; one refusal where the file is of another kind.

    Labels are numbers as they are.
    """
    source = path.relative_to(root).as_posix()
    found: list[Found] = []
    try:
        for part in PARTS:
            images, labels = f"{part}_images", f"{part}_labels"
            known = _shapes(path)
            if images not in known:
                continue
            count = _length(known[images])
            if labels in known and _length(known[labels]) != count:
                raise Faulty(Reason.SHAPE, f"{labels} has another length than {images}, {count}")
            for i in range(count):
                name = f"{source}:{part}/{i:07}"
                found.append(Found(name, name, (path,), partial(read_entry, path, part, i), split=part))
        if not found:
            raise Faulty(
                Reason.UNREADABLE, f"{path.name} has no array train_images, val_images or test_images"
            )
    except Faulty as fault:
        return [Found(source, source, (path,), fault=fault)]
    return found


def read_entry(path: Path, part: str, index: int, label_map: LabelMap) -> Raw:  # noqa: ARG001  numbers as they are
    """One image (`CHW`, `1DHW`) with its label, or with `label_0`, `label_1`, … where it has several.

    Raises:
        Faulty: unreadable, of other shape, or larger than `LIMIT`.
    """
    images, said = f"{part}_images", f"{part}_labels"
    held = [_array(path, name) for name in (images, said) if name in _shapes(path)]
    with reading(path):
        image, *more = (array[index] for array in held)
    labels = np.atleast_1d(more[0]).ravel() if more else np.zeros(0)
    if image.ndim == 3 and image.shape[2] == 3:
        channels, axes = np.moveaxis(image, 2, 0), 2
    elif image.ndim in (2, 3):
        channels, axes = image[None], image.ndim
    else:
        raise Faulty(Reason.SHAPE, f"{part}_images has {image.ndim} axes per image; 2 or 3 are read")
    single = len(labels) == 1
    named = {"label" if single else f"label_{i}": float(v) for i, v in enumerate(labels)}
    return Raw(stored(channels), None, np.eye(4), (1.0,) * axes, labels=named)


def shapes(path: Path) -> Iterator[Answer]:
    """Job: the shapes of those arrays of the format that the file has, from their headers."""
    wanted = [f"{part}_{what}" for part in PARTS for what in ("images", "labels")]
    with reading(path), zipfile.ZipFile(path) as file:
        held = set(file.namelist())
        found = {name: _heading(file, name) for name in wanted if f"{name}.npy" in held}
    yield {"shapes": found}, None


def _length(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 0


def _heading(file: zipfile.ZipFile, name: str) -> list[int]:
    with file.open(f"{name}.npy") as member:
        old = np.lib.format.read_magic(member) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    if math.prod(shape) * dtype.itemsize > LIMIT:
        raise Faulty(
            Reason.LIMIT, f"{name} takes more than {LIMIT >> 30} GiB unpacked; use a smaller variant"
        )
    return [int(n) for n in shape]


def values(path: Path, name: str) -> Iterator[Answer]:
    """Job: one array."""
    with reading(path), np.load(path, allow_pickle=False) as file:
        array: Array = file[name]
    if array.dtype.kind not in "biuf":
        raise Faulty(Reason.SHAPE, f"{path.name} holds {array.dtype}; numbers are read")
    yield {}, array.astype(np.float32) if array.dtype == np.float16 else array


def _version(path: Path) -> tuple[int, int]:
    """What tells a file from one that was there before under its name."""
    with reading(path):
        state = path.stat()
        return state.st_mtime_ns, state.st_size


def _shapes(path: Path) -> Mapping[str, tuple[int, ...]]:
    return _shapes_of(path, _version(path))


def _array(path: Path, name: str) -> Array:
    with _ONE:
        return _array_of(path, name, _version(path))


_ONE = threading.Lock()  # a part is unpacked once, by whoever comes first


@lru_cache(maxsize=8)
def _shapes_of(path: Path, version: tuple[int, int]) -> Mapping[str, tuple[int, ...]]:  # noqa: ARG001
    said, _ = shared().call(shapes, path)
    try:
        return {str(name): tuple(int(n) for n in shape) for name, shape in said["shapes"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Faulty(Reason.UNREADABLE, f"{path.name}: its parser gave an answer of another form") from None


@lru_cache(maxsize=2)  # images and labels of the part being read
def _array_of(path: Path, name: str, version: tuple[int, int]) -> Array:  # noqa: ARG001
    _, array = shared().call(values, path, room=2 * LIMIT, name=name)
    if array is None or array.shape != _shapes(path).get(name):
        raise Faulty(Reason.UNREADABLE, f"{path.name}: its parser gave an answer of another form")
    return array
