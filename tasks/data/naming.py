"""A site's own names for the federation's classes. Imports no array library: a second ingest needs none."""

from __future__ import annotations

from conf.schema import Labels
from tasks.data.source import Naming, all_folded, folded


def naming(labels: Labels) -> Naming:
    """A site's names as readers use them: its own lines first, then the dictionary's names and codes.

    Without dictionary and lines, numbers in files are classes.
    """
    values = {label.name: label.value for label in labels.dictionary}
    wanted = values if labels.annotates is None else {n: values[n] for n in labels.annotates}
    known: dict[int | str, int] = {}
    for label in labels.dictionary:
        if label.name in wanted:
            known[folded(label.name)] = label.value
            if label.code is not None:
                known[folded(f"{label.code[0]}:{label.code[1]}")] = label.value
    known |= {own: wanted[name] for own, name in all_folded(labels.names).items() if name in wanted}
    if known:
        known.setdefault(0, 0)  # where a mask file holds nothing
    return Naming(
        known=known or None,
        ignore=labels.unmapped == "ignore",
        threshold=labels.threshold,
        annotates=None if labels.annotates is None else tuple(sorted(wanted.values())),
    )
