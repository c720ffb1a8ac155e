"""Frames that lie evenly along their normal, and where their voxels are.

Positions follow PS3.3 C.7.6.2.1.1 (Image Plane Module): index (column, row, slice) to LPS+ mm. What cannot be
stacked truthfully (gantry tilt, uneven or repeated positions) is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np

from tasks.data.header import Header, Plane
from tasks.data.source import Array, Faulty, Grid, Reason

#: share of a slice's distance (and of a pixel) that rounding of header fields explains
TOLERANCE = 0.05

#: planes closer than this (mm) along the normal are at one position
SAME_MM = 0.01

_MM = (1e-4, 1e4)  # sides that a pixel may have: a microscope's, and beyond all bodies
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
        """What a mask must lie on."""
        return Grid(self.affine, self.shape, self.images[0].header.frame_of_reference)

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


def stack(images: Sequence[Image]) -> Volume:
    """The frames as one volume.

    Raises:
        Faulty: they do not lie evenly on one line along their common normal.
    """
    if len(images) < 2:
        raise Faulty(Reason.SLICES, "one slice; a manifest that names its file makes it a flat image")
    first = images[0].plane
    if first.orientation is None or first.spacing is None:
        raise Faulty(Reason.NO_POSITION, "a slice has no ImageOrientationPatient or PixelSpacing")
    along_row, along_column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    normal = np.cross(along_row, along_column)
    if not np.allclose([along_row @ along_row, along_column @ along_column, normal @ normal], 1, atol=1e-3):
        raise Faulty(Reason.GEOMETRY, "ImageOrientationPatient (0020,0037) is not orthonormal")
    positions = positions_of(images)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    row_mm, column_mm = first.spacing
    if not (_MM[0] <= row_mm <= _MM[1] and _MM[0] <= column_mm <= _MM[1]):
        raise Faulty(Reason.GEOMETRY, f"PixelSpacing (0028,0030) is {row_mm:g}, {column_mm:g} mm")
    _check_gaps(positions, normal, min(row_mm, column_mm))
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_mm
    affine[:3, 1] = along_column * row_mm
    affine[:3, 2] = (positions[-1] - positions[0]) / (len(positions) - 1)
    affine[:3, 3] = positions[0]
    return Volume(tuple(images[i] for i in order), affine)


def positions_of(images: Sequence[Image]) -> Array:
    """Nx3 mm, LPS+.

    Raises:
        Faulty: a number that is no place.
    """
    positions = np.array([i.plane.position for i in images], dtype=float)
    if not np.isfinite(positions).all() or np.abs(positions).max() > 1e6:
        raise Faulty(Reason.GEOMETRY, "ImagePositionPatient (0020,0032) is not a place")
    return positions


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
