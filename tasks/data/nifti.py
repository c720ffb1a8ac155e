"""NIfTI pairs, read into RAS+ order."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np

from tasks.data.labels import classes
from tasks.data.source import Array, Faulty, LabelMap, Raw, Reason, reading, stored

SUFFIXES = (".nii", ".nii.gz")

#: largest distance, in voxels, between a grid's corners by two headers that rounding of their fields explains
CORNER_TOLERANCE = 0.05


def read_pair(image: Path, mask: Path | None, label_map: LabelMap) -> Raw:
    """An image (3D, or 4D with channels last) with its mask (3D), both as closest RAS+.

    Raises:
        Faulty: unreadable, mask of other size, mismatched geometry, label outside the map.
    """
    values, affine = _read(image)
    if values.ndim not in (3, 4):
        raise Faulty(Reason.SHAPE, f"{image.name} has {values.ndim} axes; 3 (or 4, channels last) are read")
    grid = values.shape[:3]
    target = None
    if mask is not None:
        target_values, target_affine = _read(mask)
        if target_values.shape == (*grid, 1):
            target_values = target_values[..., 0]
        if target_values.shape != grid:
            raise Faulty(Reason.SIZE, f"image {_text(grid)}, mask {_text(target_values.shape)}")
        same_grid(affine, target_affine, grid)
        target = classes(target_values, label_map)
    channels = values[None] if values.ndim == 3 else np.moveaxis(values, 3, 0)
    return Raw(stored(channels), target, affine, spacing_of(affine))


def spacing_of(affine: Array) -> tuple[float, ...]:
    """Voxel sizes in mm, in array order.

    Raises:
        Faulty: the affine is singular or not finite.
    """
    if not np.isfinite(affine).all() or abs(float(np.linalg.det(affine[:3, :3]))) < 1e-9:
        raise Faulty(Reason.GEOMETRY, "the image's affine is singular")
    return tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))


def same_grid(affine: Array, other: Array, grid: tuple[int, ...]) -> None:
    """Check that two affines put a grid's corners in the same places.

    Raises:
        Faulty: a corner differs by more than `CORNER_TOLERANCE` voxels.
    """
    corners = np.array([(*c, 1) for c in product(*((0, n - 1) for n in grid))], dtype=float)
    apart = float(np.linalg.norm(corners @ (affine - other).T, axis=1).max())
    if not apart <= CORNER_TOLERANCE * min(spacing_of(affine)):
        raise Faulty(Reason.GEOMETRY, f"image and mask lie {apart:.3g} mm apart")


def _read(path: Path) -> tuple[Array, Array]:
    with reading(path):
        image = nib.as_closest_canonical(nib.load(path))  # type: ignore[no-untyped-call]
        values = np.asanyarray(image.dataobj)
        if values.dtype.kind not in "biuf":
            raise Faulty(Reason.SHAPE, f"{path.name} holds {values.dtype}; plain numbers are read")
        return values, np.asarray(image.affine, dtype=np.float64)


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)
