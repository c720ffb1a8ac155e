"""A site's cases, and what a fingerprint tells of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from client.policy import Policy
from tasks.base import Case
from tasks.data.cache import Entry
from tasks.data.fingerprint import Fingerprint, Survey


@dataclass(frozen=True)
class Archive:
    """A site's cases: entries by split (`train`, `val`, `test`), and how one is loaded."""

    splits: Mapping[str, Sequence[Entry]]
    load: Callable[[Entry], Case]
    _sorted: dict[str, dict[str, list[Entry]]] = field(default_factory=dict, init=False, compare=False)

    def of(self, run: str) -> Archive:
        """Every run sees the same cases: a simulation's do not change while it runs."""
        return self

    def patients(self, split: str) -> Mapping[str, Sequence[Entry]]:
        """The entries of a split, by patient, in the order of their keys."""
        if split not in self._sorted:
            by: dict[str, list[Entry]] = {}
            for entry in sorted(self.splits.get(split, ()), key=lambda e: (e.patient, e.key)):
                by.setdefault(entry.patient, []).append(entry)
            self._sorted[split] = by
        return self._sorted[split]


def fingerprint(survey: Survey, archive: Archive, policy: Policy, halt: Callable[[], None]) -> Fingerprint:
    """What would leave this site about its training cases.

    Raises:
        Refused: (`policy`, `data`) too few patients, or statistics stay home.
    """
    patients = archive.patients("train")
    policy.release(len(patients))

    def loaded() -> Iterator[list[Case]]:
        for entries in patients.values():
            halt()
            yield [archive.load(entry) for entry in entries]

    return survey.of_site(loaded(), policy.minimum_cell)
