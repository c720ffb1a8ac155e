"""NIfTI pairs, read into RAS+ order."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from tasks.data.labels import mapped
from tasks.data.source import Array, Faulty, LabelMap, Raw, Reason, reading, stored

SUFFIXES = (".nii", ".nii.gz")

#: bytes a file may take when unpacked
LIMIT = 4 << 30

#: largest distance, in voxels, between a grid's corners by two headers that rounding of their fields explains
CORNER_TOLERANCE = 0.05

#: the low bits of xyzt_units (NIfTI-1): what they call a unit, and mm in it; 2, and what is not said, is mm
_UNITS = {1: ("metre", 1000.0), 3: ("micrometre", 0.001)}


def read_pair(image: Path, mask: Path | None, label_map: LabelMap) -> Raw:
    """An image (3D, or 4D with channels last) with its mask (3D), both as closest RAS+.

    A mask on another grid over the same extent is brought to the image's by nearest neighbour, and a note
    says so; one that lies elsewhere is refused.

    Raises:
        Faulty: unreadable, mask of other size, mismatched geometry, label outside the map.
    """
    values, affine, notes = _read(image)
    if values.ndim == 5 and values.shape[3] == 1:
        values = values[:, :, :, 0]  # NIfTI-1: a vector's parts stand on the fifth axis
    if values.ndim not in (3, 4):
        raise Faulty(Reason.SHAPE, f"{image.name} has {values.ndim} axes; 3 (or 4, channels last) are read")
    drawn, said = (None, ()) if mask is None else _drawn(mask, affine, values.shape[:3])
    target, unmapped = (None, ()) if drawn is None else mapped(drawn, label_map)
    channels = values[None] if values.ndim == 3 else np.moveaxis(values, 3, 0)
    spacing = spacing_of(affine)
    return Raw(
        stored(channels), target, affine, spacing, unmapped=unmapped, notes=tuple(dict.fromkeys(notes + said))
    )


def _drawn(mask: Path, affine: Array, grid: tuple[int, ...]) -> tuple[Array, tuple[str, ...]]:
    """A mask's values on the image's grid, and how they came there."""
    values, own, notes = _read(mask)
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.shape == grid:
        same_grid(affine, own, grid)
        return values, notes
    if values.ndim != 3 or not same_extent(affine, grid, own, values.shape):
        raise Faulty(Reason.SIZE, f"image {_text(grid)}, mask {_text(values.shape)}, and not the same extent")
    return nearest(values, own, affine, grid), (*notes, "a mask on another grid was brought to the image's")


def spacing_of(affine: Array) -> tuple[float, ...]:
    """Voxel sizes in mm, in array order.

    Raises:
        Faulty: the affine is singular or not finite.
    """
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    # beside the box of its edges: a micrometre is small, and no fault
    if not np.isfinite(affine).all() or not abs(np.linalg.det(affine[:3, :3])) > 1e-6 * sizes.prod():
        raise Faulty(Reason.GEOMETRY, "the image's affine is singular")
    return tuple(float(s) for s in sizes)


def same_grid(affine: Array, other: Array, grid: tuple[int, ...]) -> None:
    """Check that two affines put a grid's corners in the same places.

    Raises:
        Faulty: a corner differs by more than `CORNER_TOLERANCE` voxels.
    """
    corners = np.array([(*c, 1) for c in product(*((0, n - 1) for n in grid))], dtype=float)
    apart = float(np.linalg.norm(corners @ (affine - other).T, axis=1).max())
    if not apart <= CORNER_TOLERANCE * min(spacing_of(affine)):
        raise Faulty(Reason.GEOMETRY, f"image and mask lie {apart:.3g} mm apart")


def same_extent(affine: Array, grid: tuple[int, ...], other: Array, size: tuple[int, ...]) -> bool:
    """Whether two grids cover the same box: outer corners apart by no more than half the coarser voxel."""
    one, two = (_corners(n) @ a.T for a, n in ((affine, grid), (other, size)))
    apart = float(np.linalg.norm(one - two, axis=1).max())
    return apart <= max(*spacing_of(affine), *spacing_of(other)) / 2


def nearest(values: Array, own: Array, affine: Array, grid: tuple[int, ...]) -> Array:
    """What the voxel of `values` (affine `own`) nearest to each voxel centre of another grid holds."""
    step = np.linalg.solve(own, affine)
    out = np.empty(grid, dtype=values.dtype)
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    for k in range(grid[2]):  # slice by slice: coordinates of a whole volume take 24 bytes a voxel
        at = [step[i, 0] * rows + step[i, 1] * columns + step[i, 2] * k + step[i, 3] for i in range(3)]
        inside = (np.clip(np.rint(a), 0, n - 1).astype(int) for a, n in zip(at, values.shape, strict=True))
        out[:, :, k] = values[tuple(inside)]
    return out


def _corners(grid: tuple[int, ...]) -> Array:
    return np.array([(*c, 1) for c in product(*((-0.5, n - 0.5) for n in grid))])


def _read(path: Path) -> tuple[Array, Array, tuple[str, ...]]:
    with reading(path):
        loaded = nib.load(path)
        _check_size(loaded, path)
        notes = _frame(loaded, path)
        image = nib.as_closest_canonical(loaded)  # type: ignore[no-untyped-call]
        values = np.asanyarray(image.dataobj)
        if values.dtype.kind not in "biuf":
            raise Faulty(Reason.SHAPE, f"{path.name} holds {values.dtype}; plain numbers are read")
        affine = np.asarray(image.affine, dtype=np.float64)
        code = int(loaded.header["xyzt_units"]) % 8  # type: ignore[index]
        if code in _UNITS:
            unit, mm = _UNITS[code]
            affine = np.diag([mm, mm, mm, 1.0]) @ affine
            notes = (*notes, f"the header's unit is the {unit}: turned to mm")
        return values, affine, notes


def _check_size(image: Any, path: Path) -> None:
    if math.prod(image.shape) * image.get_data_dtype().itemsize > LIMIT:
        raise Faulty(Reason.LIMIT, f"{path.name} takes more than {LIMIT >> 30} GiB unpacked")


def _frame(image: Any, path: Path) -> tuple[str, ...]:
    """Check that the header's two ways to say where the image lies agree (NIfTI-1, methods 2 and 3).

    The sform is used where it is set, else the qform. They may differ by a small rotation (registration);
    where axes, handedness or voxel sizes differ, left and right may be confused.

    Raises:
        Faulty: they contradict each other.
    """
    header = image.header
    by_q, by_s = int(header["qform_code"]), int(header["sform_code"])
    if not by_q and not by_s:
        return ("no orientation in the header: axes were taken as the format's default says",)
    if not by_q or not by_s:
        return ()
    q, s = header.get_qform(), header.get_sform()
    if nib.aff2axcodes(q) != nib.aff2axcodes(s):  # type: ignore[no-untyped-call]
        axes = " and ".join("".join(nib.aff2axcodes(a)) for a in (q, s))  # type: ignore[no-untyped-call]
        raise Faulty(Reason.GEOMETRY, f"qform and sform of {path.name} turn the axes differently: {axes}")
    if not np.allclose(spacing_of(q), spacing_of(s), rtol=0.01):
        sizes = " and ".join(_text(spacing_of(a), ".4g") for a in (q, s))
        raise Faulty(Reason.GEOMETRY, f"qform and sform of {path.name} have other voxel sizes: {sizes} mm")
    corners = _corners(image.shape[:3])
    apart = float(np.linalg.norm(corners @ (q - s).T, axis=1).max())
    return ("qform and sform differ: the sform was used",) if apart > min(spacing_of(s)) / 2 else ()


def _text(shape: tuple[float, ...], digits: str = "") -> str:
    return "x".join(f"{n:{digits}}" for n in shape)
