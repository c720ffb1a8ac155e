"""From the numbers and names in a site's files to the federation's classes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from conf.exits import Exit, Stop
from tasks.data.source import Array, Faulty, Grid, LabelMap, Naming, Reason, listed

_NAMED = 64  # unmapped values reported of one mask: instance numbers may be thousands


def check_label_map(label_map: LabelMap) -> None:
    """Refuse a map that names a class outside 0..255.

    Raises:
        Stop: (`CONFIG`).
    """
    known = Naming.of(label_map).known
    if known is None:
        return
    if not known:
        raise Stop(Exit.CONFIG, "data.label_map is empty; give file value to class, nonzero, or leave it out")
    wrong = sorted({c for c in known.values() if not 0 <= c <= 255})
    if wrong:
        raise Stop(Exit.CONFIG, f"data.label_map has classes {wrong}; accepted are 0 to 255")


def mapped(values: Array, label_map: LabelMap) -> tuple[Array, tuple[str, ...]]:
    """Classes (uint8, same shape) of a mask's file values, and the values left out as class 0.

    Args:
        values: integers, or floats that hold integers.
        label_map: file value to class; "nonzero": 0 stays 0 and all else is 1; None: values are classes.

    Raises:
        Faulty: a value that the map does not name, or without a map one that is no integer in 0..255.
    """
    names = Naming.of(label_map)
    if names.nonzero:
        return np.ascontiguousarray(values != 0, dtype=np.uint8), ()
    small = values.dtype.kind == "u" and values.dtype.itemsize <= 2  # then counting spares sorting all voxels
    if small:
        present, where = np.flatnonzero(np.bincount(values.ravel())), values
    else:
        present, where = np.unique(values, return_inverse=True)
    found = [names.find(int(v)) if float(v).is_integer() else None for v in present.tolist()]
    outside = tuple(f"{v:g}" for v, c in zip(present.tolist(), found, strict=True) if c is None)[:_NAMED]
    if outside and not names.ignore:
        raise Faulty(
            Reason.LABEL,
            f"mask has {listed(outside)}; accepted {names.accepted} (setting: data.label_map)",
            outside,
        )
    table = np.zeros(int(present.max(initial=0)) + 1 if small else len(present), dtype=np.uint8)
    table[present if small else slice(None)] = [c or 0 for c in found]
    # nothing there is 0 whatever the map says of it: it is no label that could be unmapped
    return np.ascontiguousarray(table[where].reshape(values.shape)), tuple(v for v in outside if v != "0")


@dataclass(frozen=True)
class Drawn:
    """A mask on an image's grid.

    Attributes:
        mask: uint8 classes (column, row, slice). unmapped, notes: as in `Raw`.
    """

    mask: Array
    unmapped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Canvas:
    """A volume on which segments and contours are drawn, plane by plane.

    Where two classes overlap the higher one wins, at every site alike: the dictionary lists a lesion after
    its organ. What nothing covers is class 0. A class drawn by two objects refuses the case: nobody says
    whose opinion counts.
    """

    grid: Grid
    names: Naming
    _notes: dict[str, None] = field(default_factory=dict)
    _unmapped: dict[str, None] = field(default_factory=dict)
    _owner: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns, rows, slices = self.grid.shape
        self._mask = np.zeros((slices, rows, columns), dtype=np.uint8)

    def class_of(self, owner: str, shown: str, *names: int | str) -> int | None:
        """The class of a segment or ROI; None where it is not mapped, which is remembered.

        Args:
            owner: which object draws it. shown: how a message calls it. names: to look up, first wins.

        Raises:
            Faulty: another object drew the same class (background may be drawn by all).
        """
        found = self.names.find(*names)
        if found is None:
            self._unmapped[shown] = None
        elif found and self._owner.setdefault(found, owner) != owner:
            raise Faulty(
                Reason.SEVERAL_MASKS, f"{self._owner[found]} and {owner} both draw class {found}; keep one"
            )
        return found

    def paint(self, at: int, plane: Array, value: int) -> None:
        """Draw `plane` (boolean, rows and columns) on slice `at`."""
        here = self._mask[at]
        if value and ((here != 0) & (here != value) & plane).any():
            self.note("segments overlap: the higher class was kept")
        np.maximum(here, plane * np.uint8(value), out=here)

    def note(self, text: str) -> None:
        """Remember a decision for the report."""
        self._notes[text] = None

    def done(self) -> Drawn:
        """What was drawn.

        Raises:
            Faulty: something was not mapped, and that is not to be ignored.
        """
        if self._unmapped and not self.names.ignore:
            raise Faulty(
                Reason.LABEL,
                f"segments not mapped: {listed(self._unmapped)}; accepted {self.names.accepted} "
                "(settings: data.label_map, labels in site.yaml)",
                tuple(self._unmapped),
            )
        if self._unmapped and not self._mask.any():
            self.note("no label of the case is mapped: its mask is empty")
        return Drawn(self._mask.transpose(2, 1, 0), tuple(self._unmapped), tuple(self._notes))


def class_number(text: str, column: str, names: Naming) -> float | None:
    """The value of a class label: a number as it is, a name as the map says; None where it is left out.

    Raises:
        Faulty: a name that is not mapped.
    """
    try:
        number = float(text)
    except ValueError:
        found = None if names.nonzero else names.find(text)
        if found is None and not names.ignore:
            raise Faulty(
                Reason.LABEL, f"{column} is {text!r}; accepted {names.accepted} (data.label_map)", [text]
            ) from None
        return None if found is None else float(found)
    if not np.isfinite(number):
        raise Faulty(Reason.CELL, f"{column} is {text!r}; need a finite number or a name")
    return number
