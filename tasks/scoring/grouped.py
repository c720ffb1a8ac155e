"""Scores by subgroup: any statistics over all patients, and over those in each declared group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from tasks.metrics import Statistics

Subgroups = Mapping[str, tuple[str, ...]]
"""Columns of `Case.groups`, each with the values that are scored apart: the same at every site."""


@dataclass(frozen=True)
class Grouped(Statistics):
    """Statistics of all patients, and of each group.

    A patient with another value, or with two, counts in the whole alone. A site leaves a column out where
    fewer patients than its minimum cell stand behind any figure of one of its groups, or of the patients in
    none of them: the whole less the other groups would tell it.

    Attributes:
        kind: the zero of the statistics. subgroups: columns and values.
        whole: V, the sums over all. parts: `G x V`, over each group, in order.
        left_out: per column, patients of sites that left it out.
        rows: of the whole; then, per group, whether the patient is in it.
    """

    kind: Statistics
    subgroups: tuple[tuple[str, tuple[str, ...]], ...]
    whole: Tensor
    parts: Tensor
    left_out: Tensor

    @property
    def groups(self) -> tuple[str, ...]:
        """`<column>_<value>`, in order."""
        return tuple(f"{column}_{value}" for column, values in self.subgroups for value in values)

    @property
    def columns(self) -> tuple[str, ...]:
        """The whole's, then the groups."""
        return (*self.kind.columns, *self.groups) if self.kind.columns else ()

    @property
    def patients(self) -> int:
        """In the whole."""
        return self._of(self.whole).patients

    def _of(self, sums: Tensor, inside: Tensor | None = None) -> Statistics:
        """The statistics of some sums, with the rows of those patients."""
        rows = self.rows[:, : self.kind.rows.shape[1]]
        return replace(self.kind.from_vector(sums), rows=rows if inside is None else rows[inside])

    def _apart(self) -> dict[str, Statistics]:
        """By group."""
        first = self.kind.rows.shape[1]
        return {
            name: self._of(part, self.rows[:, first + i] == 1 if self.kind.columns else None)
            for i, (name, part) in enumerate(zip(self.groups, self.parts, strict=True))
        }

    @property
    def products(self) -> int:
        return self.kind.products

    def bounds(self) -> dict[str, float]:
        """None: every group would need noise of its own, which a small one does not outlive."""
        raise ValueError("task.subgroups are scored without noise only")

    def cells(self) -> Tensor:
        """Those of the whole and of each group."""
        return torch.cat([self._of(sums).cells() for sums in (self.whole, *self.parts)])

    def guarded(self, minimum: int) -> Self:
        """Without the columns that have too small a group, or too few patients in none."""
        parts, left_out, start = self.parts.clone(), self.left_out.clone(), 0
        whole = self._of(self.whole).cells()
        for i, (_, values) in enumerate(self.subgroups):
            own = slice(start, start := start + len(values))
            cells = torch.stack([self._of(part).cells() for part in self.parts[own]])
            behind = torch.cat([cells.flatten(), whole - cells.sum(0)])
            if bool(((behind > 0) & (behind < minimum)).any()):
                parts[own], left_out[i] = 0, self.patients
        return replace(self, parts=parts, left_out=left_out)

    def names(self) -> frozenset[str]:
        """The whole's, and each group's."""
        own = self.kind.names()
        return own | {f"{group}_{name}" for group in self.groups for name in (*own, "patients")}

    def value(self) -> dict[str, float]:
        """The whole's; each group's as `<column>_<value>_<metric>`, and how many `…_patients`;
        `<column>_left_out`: patients of sites where a group was too small to tell.
        """
        found = self._of(self.whole).value()
        for name, part in self._apart().items():
            found[f"{name}_patients"] = float(part.patients)
            found |= {f"{name}_{metric}": value for metric, value in part.value().items()}
        for (column, _), patients in zip(self.subgroups, self.left_out.tolist(), strict=True):
            if patients:
                found[f"{column}_left_out"] = patients
        return found


def by_group(
    whole: Statistics, subgroups: Subgroups | None, groups: Sequence[Mapping[str, str]] = ()
) -> Statistics:
    """A patient's statistics (or a zero), in the patient's groups too.

    Args:
        whole: over all cases of the patient.
        subgroups: nothing: `whole` as it is.
        groups: the columns of each of the patient's cases.
    """
    if not subgroups or not any(subgroups.values()):
        return whole
    seen = {column: {own.get(column) for own in groups} for column in subgroups}
    inside = [seen[column] == {value} for column, values in subgroups.items() for value in values]
    mask = torch.tensor(inside, dtype=torch.float64)
    sums = whole.alone().to_vector()
    kind = whole.from_vector(torch.zeros_like(sums))
    rows = torch.cat([whole.rows, mask.expand(len(whole.rows), -1)], 1) if whole.columns else whole.rows
    return Grouped(
        kind=kind,
        subgroups=tuple((column, tuple(values)) for column, values in subgroups.items()),
        whole=sums,
        parts=mask[:, None] * sums,
        left_out=torch.zeros(len(subgroups), dtype=torch.float64),
        rows=rows,
    )
