"""CSV manifests and their cells: classes, values to predict, clinical columns."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from conf.exits import Exit, Stop
from conf.schema import Columns
from tasks.data.labels import class_number
from tasks.data.source import Faulty, LabelMap, Naming, Raw, Reason, listed

Row = Mapping[str, str]

#: what a cell says when nobody knows, in any case of letters
MISSING = frozenset({"", "?", "na", "n/a", "nan", "null", "none"})


@dataclass(frozen=True)
class Cells:
    """What a row says beside its files. What is missing is absent.

    Attributes:
        labels: classes and values to predict; the main one is called `label`. table: clinical columns.
        groups: those of them that have categories, in words, for scores by subgroup.
        unmapped: class names that were left out. texts: as they stand in the file.
    """

    labels: Mapping[str, float] = field(default_factory=dict)
    table: Mapping[str, float] = field(default_factory=dict)
    unmapped: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)

    def onto(self, raw: Raw) -> Raw:
        """`raw` with these cells."""
        groups = {**raw.groups, **self.groups}
        unmapped = raw.unmapped + self.unmapped
        return replace(raw, labels=self.labels, table=self.table, groups=groups, unmapped=unmapped)

    def alone(self, label_map: LabelMap) -> Raw:
        """A case that is a row and nothing else."""
        return self.onto(Raw(None, None, np.eye(4), ()))


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV (comma; semicolon or tab where the first line has no comma), cells stripped.

    Raises:
        Stop: (`CONFIG`) it cannot be read; (`NO_CASES`) no rows.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            delimiter = next((d for d in ",;\t" if d in first), ",")
            reader = csv.DictReader(file, delimiter=delimiter, restkey="", restval="")
            rows, header = list(reader), [name.strip() for name in reader.fieldnames or ()]
    except UnicodeDecodeError as error:
        raise Stop(
            Exit.CONFIG, f"data.manifest {path} is not UTF-8 ({error.reason}); save it as such"
        ) from None
    except (OSError, csv.Error) as error:
        raise Stop(Exit.CONFIG, f"data.manifest {path} cannot be read: {error}") from None
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise Stop(Exit.CONFIG, f"data.manifest {path} has two columns {listed(twice)}; rename one")
    if not rows:
        raise Stop(Exit.NO_CASES, f"data.manifest {path} has no rows")
    return [{k.strip(): v.strip() for k, v in row.items() if k and isinstance(v, str)} for row in rows]


def check_header(rows: Sequence[Row], columns: Columns) -> None:
    """Refuse settings that name a column which is not there.

    Raises:
        Stop: (`CONFIG`) the message lists the columns.
    """
    named = [columns.image, columns.label, columns.patient, columns.site, columns.split]
    wanted = [*(c for c in named if c), *columns.labels, *(columns.table or ())]
    if missing := [c for c in wanted if c not in rows[0]]:
        known = ", ".join(rows[0])
        raise Stop(Exit.CONFIG, f"manifest has no column {', '.join(missing)}; it has {known} (data.columns)")


def holds_files(rows: Sequence[Row], column: str | None, suffixes: tuple[str, ...]) -> bool:
    """Whether a label column names mask files: then every cell that is not empty ends in a known suffix.

    Raises:
        Stop: (`CONFIG`) some do and some do not.
    """
    cells = [row[column] for row in rows if row[column]] if column else []
    files = [c for c in cells if c.lower().endswith(suffixes)]
    if files and len(files) < len(cells):
        other = listed(sorted(set(cells) - set(files)))
        raise Stop(
            Exit.CONFIG,
            f"column {column} has {len(files)} mask files, and {other}; a column holds files or classes",
        )
    return len(files) == len(cells)


def check_names(rows: Sequence[Row], columns: Sequence[str], names: Naming) -> None:
    """Refuse class columns with a name that is not mapped, before any case is read.

    Raises:
        Stop: (`CONFIG`) the message lists all names of the column.
    """
    for column in columns if not names.ignore else ():
        found = sorted(
            {row[column] for row in rows if not _missing(row[column]) and not _is_number(row[column])}
        )
        if unknown := [name for name in found if names.nonzero or names.find(name) is None]:
            raise Stop(
                Exit.CONFIG,
                f"column {column} has the names {listed(found)}; not mapped: {listed(unknown)}; give each a "
                "number in data.label_map, or a name in labels.names of site.yaml",
            )


def read_cells(row: Row, classes: Mapping[str, str], columns: Columns, names: Naming) -> Cells:
    """The cells of one row.

    Args:
        classes: column to the name under which its value goes.

    Raises:
        Faulty: (`CELL`) a clinical cell that is no number or no category.
    """
    labels: dict[str, float] = {}
    unmapped = []
    for column, name in classes.items():
        if _missing(row[column]) and (names.nonzero or names.find(row[column]) is None):
            continue  # "none" may well be a class: then the map says so
        value = class_number(row[column], column, names)
        if value is None:
            unmapped.append(row[column])
        else:
            labels[name] = value
    table = {
        column: _clinical(row[column], column, kind)
        for column, kind in (columns.table or {}).items()
        if row[column] in (() if isinstance(kind, str) else kind) or not _missing(row[column])
    }
    groups = {
        column: kind[int(table[column])]
        for column, kind in (columns.table or {}).items()
        if column in table and not isinstance(kind, str)
    }
    texts = tuple(row[c] for c in (*classes, *(columns.table or ())))
    return Cells(labels, table, tuple(unmapped), texts, groups)


def _clinical(text: str, column: str, kind: str | Sequence[str]) -> float:
    if isinstance(kind, str):
        if not _is_number(text):
            raise Faulty(Reason.CELL, f"column {column} is {text!r}; need a number, or an empty cell")
        return float(text)
    place = next((i for i, category in enumerate(kind) if _same(text, category)), None)
    if place is None:
        raise Faulty(
            Reason.CELL, f"column {column} is {text!r}; accepted {', '.join(kind)}, or an empty cell"
        )
    return float(place)


def _same(text: str, category: str) -> bool:
    """Sites write 1 and 1.0, Male and male."""
    if _is_number(text) and _is_number(category):
        return float(text) == float(category)
    return text.casefold() == category.casefold()


def _missing(text: str) -> bool:
    return text.lower() in MISSING


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
