"""One figure: printed with the limit it is held against, and noted for the table of `python -m bench`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal


def row(
    name: str,
    value: float,
    unit: str = "",
    limit: float | None = None,
    kind: Literal["most", "least"] = "most",
    note: str = "",
) -> bool:
    """Whether the limit is met; a figure without one is only told."""
    met = limit is None or (value <= limit if kind == "most" else value >= limit)
    held = "" if limit is None else f"{'≤' if kind == 'most' else '≥'} {limit:g}"
    mark = "" if limit is None else "met" if met else "NOT MET"
    print(f"{name:52} {value:10.4g} {unit:9} {held:>9}  {mark:7} {note}".rstrip(), flush=True)
    if table := os.environ.get("BENCH_ROWS"):
        entry = {"name": name, "value": value, "unit": unit, "limit": held, "met": mark, "note": note}
        with Path(table).open("a") as file:
            file.write(json.dumps(entry) + "\n")
    return met
