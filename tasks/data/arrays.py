"""MedMNIST's `.npz`: arrays `train_images`, `train_labels` and so on, one case per entry.

Layout as in the sets' own description (Yang et al., Scientific Data 10:41, 2023): images `NHW`, `NHWC` with
three colours, or `NDHW`; labels `N1`, or `NK` for several at once. Which of a volume's axes is which in the
patient is not said: they are taken in the order they are stored in, voxels of 1 mm.
"""

from __future__ import annotations

import zipfile
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

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
            shape = _shape(path, images)
            if shape is None:
                continue
            if (_shape(path, labels) or shape)[:1] != shape[:1]:
                raise Faulty(Reason.SHAPE, f"{labels} has another length than {images}, {shape[0]}")
            for i in range(shape[0]):
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
    with reading(path):
        image = _array(path, f"{part}_images")[index]
        labels: Array = np.zeros(0)
        if _shape(path, f"{part}_labels") is not None:
            labels = np.atleast_1d(_array(path, f"{part}_labels")[index]).ravel()
    if image.dtype.kind not in "biuf" or labels.dtype.kind not in "biuf":
        raise Faulty(Reason.SHAPE, f"{path.name} holds {image.dtype} and {labels.dtype}; numbers are read")
    if image.ndim == 3 and image.shape[2] == 3:
        channels, axes = np.moveaxis(image, 2, 0), 2
    elif image.ndim in (2, 3):
        channels, axes = image[None], image.ndim
    else:
        raise Faulty(Reason.SHAPE, f"{part}_images has {image.ndim} axes per image; 2 or 3 are read")
    single = len(labels) == 1
    named = {"label" if single else f"label_{i}": float(v) for i, v in enumerate(labels)}
    return Raw(stored(channels), None, np.eye(4), (1.0,) * axes, labels=named)


def _version(path: Path) -> tuple[int, int]:
    """What tells a file from one that was there before under its name."""
    with reading(path):
        state = path.stat()
        return state.st_mtime_ns, state.st_size


def _shape(path: Path, name: str) -> tuple[int, ...] | None:
    return _shape_of(path, name, _version(path))


def _array(path: Path, name: str) -> Array:
    return _array_of(path, name, _version(path))


@lru_cache(maxsize=8)
def _shape_of(path: Path, name: str, version: tuple[int, int]) -> tuple[int, ...] | None:  # noqa: ARG001
    """An array's shape from its header alone; None where the file has no such array."""
    with reading(path), zipfile.ZipFile(path) as file:
        if f"{name}.npy" not in file.namelist():
            return None
        with file.open(f"{name}.npy") as member:
            old = np.lib.format.read_magic(member) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(member)
    if int(np.prod(shape)) * dtype.itemsize > LIMIT:
        raise Faulty(
            Reason.LIMIT, f"{name} takes more than {LIMIT >> 30} GiB unpacked; use a smaller variant"
        )
    return tuple(int(n) for n in shape)


@lru_cache(maxsize=2)  # images and labels of the part being read
def _array_of(path: Path, name: str, version: tuple[int, int]) -> Array:  # noqa: ARG001
    with np.load(path, allow_pickle=False) as file:
        array: Array = file[name]
    return array
