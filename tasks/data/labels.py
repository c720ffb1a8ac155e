"""From what a mask file holds to classes."""

from __future__ import annotations

import numpy as np

from conf.exits import Exit, Stop
from tasks.data.source import Array, Faulty, LabelMap, Reason

_LISTED = 8  # values quoted in a refusal


def check_label_map(label_map: LabelMap) -> None:
    """Refuse a map that names a class outside 0..255.

    Raises:
        Stop: (`CONFIG`).
    """
    if label_map is None or label_map == "nonzero":
        return
    if not label_map:
        raise Stop(Exit.CONFIG, "data.label_map is empty; give file value to class, nonzero, or leave it out")
    wrong = sorted({c for c in label_map.values() if not 0 <= c <= 255})
    if wrong:
        raise Stop(Exit.CONFIG, f"data.label_map has classes {wrong}; accepted are 0 to 255")


def classes(values: Array, label_map: LabelMap) -> Array:
    """Classes (uint8, same shape) of a mask's file values.

    Args:
        values: integers, or floats that hold integers.
        label_map: file value to class; "nonzero": 0 stays 0 and all else is 1; None: values are classes.

    Raises:
        Faulty: a value that the map does not name, or without a map one that is no integer in 0..255.
    """
    if label_map == "nonzero":
        return np.ascontiguousarray(values != 0, dtype=np.uint8)
    known = {c: c for c in range(256)} if label_map is None else label_map
    present, where = np.unique(values, return_inverse=True)
    outside = [
        v for v in present.tolist() if v not in known
    ]  # 2.0 == 2 and hashes alike; 0.5, NaN are outside
    if outside:
        text = ", ".join(f"{v:g}" for v in outside[:_LISTED]) + (", …" if len(outside) > _LISTED else "")
        accepted = "0 to 255" if label_map is None else ", ".join(str(v) for v in sorted(known)[:_LISTED])
        raise Faulty(Reason.LABEL, f"mask has {text}; accepted {accepted} (setting: data.label_map)")
    table = np.array([known[int(v)] for v in present.tolist()], dtype=np.uint8)
    return np.ascontiguousarray(table[where].reshape(values.shape))
