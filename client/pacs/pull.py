"""The pull: list series by series, ask for what is not here yet, and go on after every interruption."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from client.pacs.query import Level, Query, parse, uid
from client.pacs.settings import Pacs
from client.pacs.shelf import Instance, Shelf
from conf.exits import Exit, Stop
from conf.files import no_space

Progress = Callable[[int, int], None]

_FIRST_S, _LONGEST_S = 0.5, 30.0  # pauses before another attempt
_MOST = 100_000  # answers to one query


class Away(Exception):
    """The archive is silent, gone or overloaded for now: another attempt may succeed."""


class Archive(Protocol):
    """How an archive is spoken to. `at_once`: instances that one request may name."""

    at_once: int

    def find(self, level: Level, keys: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
        """Query one level: an empty value asks for an attribute, another one must match.

        Raises:
            Away: another attempt may succeed.
            Stop: it will not.
        """

    def fetch(self, instances: Sequence[Instance], shelf: Shelf) -> None:
        """Bring instances to the shelf; those that the archive fails to give are left out.

        Raises:
            Away: another attempt may succeed; what came is on the shelf.
            Stop: it will not.
        """


@dataclass
class Pulled:
    """What a pull came to, in instances: found by the query, fetched now, here before, not to be had."""

    folder: Path
    found: int = 0
    fetched: int = 0
    here: int = 0
    missing: list[Instance] = field(default_factory=list)

    @property
    def exit(self) -> Exit:
        """`OK`, or `PACS_PARTLY` where an instance could not be had."""
        return Exit.PACS_PARTLY if self.missing else Exit.OK


def pull(source: Pacs, folder: Path, progress: Progress | None = None) -> Pulled:
    """Bring what the query finds to `folder`, without what is there already.

    Args:
        source: the archive and the query.
        folder: see `Shelf`; one process at a time.
        progress: called with (instances here, instances known so far).

    Raises:
        Stop: (`CONFIG`, `PACS_AWAY`, `PACS_REFUSED`, `PACS_AUTH`, `PACS_EMPTY`, `SITE_BUSY`, `DISK_FULL`).
    """
    query = parse(source.query)
    pulled = Pulled(folder)
    known = 0

    def tell(landed: int = 1) -> None:
        pulled.fetched += landed
        if progress is not None:
            progress(pulled.here + pulled.fetched, known)

    shelf = Shelf(folder, tell)
    with no_space(folder, "pull again: what came is kept"), shelf.open(), _connect(source) as archive:
        patience = _Patience(source, pulled)
        series = list(_series(archive, query, patience))
        known = sum(count for _, _, count in series)
        for study, one, count in series:
            listed = _instances(archive, study, one, patience)
            wanted = [i for i in listed if not shelf.has(i)]
            known += len(listed) - count
            pulled.found += len(listed)
            pulled.here += len(listed) - len(wanted)
            tell(0)
            pulled.missing += _fetch(archive, wanted, shelf, patience)
    if not pulled.found:
        raise Stop(Exit.PACS_EMPTY, f"{source.source} has nothing that matches {' '.join(source.query)}")
    return pulled


def _connect(source: Pacs) -> AbstractContextManager[Archive]:
    if source.node is None:
        from client.pacs.web import Web

        return Web(source)
    from client.pacs.dimse import Dimse

    return Dimse(source)


class _Patience:
    """Counts attempts in a row that brought nothing."""

    def __init__(self, source: Pacs, pulled: Pulled) -> None:
        self._source, self._pulled = source, pulled
        self._failed = 0

    def reset(self) -> None:
        self._failed = 0

    def wait(self, error: Away) -> None:
        """Pause before the next attempt, longer each time.

        Raises:
            Stop: (`PACS_AWAY`) it was the last.
        """
        if self._failed >= self._source.retries:
            here = self._pulled.here + self._pulled.fetched
            text = f"{self._source.source} {error}; {here} instances are here: pull again to go on"
            raise Stop(Exit.PACS_AWAY, text)
        time.sleep(min(_FIRST_S * 2**self._failed, _LONGEST_S))
        self._failed += 1


def _find(
    archive: Archive, level: Level, keys: Mapping[str, str], patience: _Patience
) -> list[Mapping[str, str]]:
    while True:
        try:
            found = list(islice(archive.find(level, keys), _MOST + 1))
        except Away as error:
            patience.wait(error)
            continue
        patience.reset()
        if len(found) > _MOST:
            raise Stop(Exit.PACS_REFUSED, f"more than {_MOST:,} answers to one query: ask for less")
        return found


def _series(archive: Archive, query: Query, patience: _Patience) -> Iterator[tuple[str, str, int]]:
    """Study, series and number of instances (0 where the archive does not say) of all that matches."""
    seen: set[str] = set()
    for study in _studies(archive, query, patience):
        for keys in query.asked("SERIES"):
            asked = {**_RETURNED["SERIES"], **keys, "StudyInstanceUID": study}
            for found in _find(archive, "SERIES", asked, patience):
                name = _uid(found, "SeriesInstanceUID")
                if name not in seen and query.matches("SERIES", found):
                    seen.add(name)
                    count = found.get("NumberOfSeriesRelatedInstances", "")
                    yield study, name, int(count) if count.isdecimal() else 0


def _studies(archive: Archive, query: Query, patience: _Patience) -> Iterator[str]:
    seen: set[str] = set()
    for keys in query.asked("STUDY"):
        for modality in query.series.get("Modality", ("",)):
            asked = {**_RETURNED["STUDY"], **keys, "ModalitiesInStudy": modality}
            for found in _find(archive, "STUDY", asked, patience):
                name = _uid(found, "StudyInstanceUID")
                if name not in seen and query.matches("STUDY", found):
                    seen.add(name)
                    yield name


def _instances(archive: Archive, study: str, series: str, patience: _Patience) -> list[Instance]:
    asked = {**_RETURNED["IMAGE"], "StudyInstanceUID": study, "SeriesInstanceUID": series}
    found = _find(archive, "IMAGE", asked, patience)
    kinds = {_uid(f, "SOPInstanceUID"): f.get("SOPClassUID") and _uid(f, "SOPClassUID") for f in found}
    return [Instance(study, series, name, kind or "") for name, kind in kinds.items()]


#: attributes that a query asks back at each level
_RETURNED: Mapping[Level, Mapping[str, str]] = {
    "STUDY": {"StudyInstanceUID": ""},
    "SERIES": {"SeriesInstanceUID": "", "NumberOfSeriesRelatedInstances": ""},
    "IMAGE": {"SOPInstanceUID": "", "SOPClassUID": ""},
}


def _uid(found: Mapping[str, str], key: str) -> str:
    try:
        return uid(found.get(key, ""))
    except ValueError as error:
        raise Stop(
            Exit.PACS_REFUSED, f"the archive answers a query with a {key} that is none: {error}"
        ) from None


def _fetch(archive: Archive, wanted: Sequence[Instance], shelf: Shelf, patience: _Patience) -> list[Instance]:
    """Fetch in batches; what a batch left out is asked for once more by itself. Returns what never came."""
    missing: list[Instance] = []
    batches = [wanted[i : i + archive.at_once] for i in range(0, len(wanted), archive.at_once)]
    while batches:
        batch = batches.pop(0)
        away = None
        try:
            archive.fetch(batch, shelf)
        except Away as error:
            away = error
        left = [i for i in batch if not shelf.has(i)]
        if away is None or len(left) < len(batch):
            patience.reset()
        if away is not None and left:
            patience.wait(away)
            batches.insert(0, left)
        elif len(batch) > 1:
            batches[:0] = [[i] for i in left]
        else:
            missing += left
    return missing
