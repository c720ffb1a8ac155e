"""From a hospital's files to cached cases: a faulty case is refused by itself, with its reason.

Patients are named by HMAC-SHA-256 under the site's own key. What could still identify a person, the paths
of files and the details of refusals, stands in the index alone and never leaves the site.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from conf.exits import Exit, Stop
from conf.schema import Columns
from tasks.data.cache import VERSION, Cache, Entry, Index, Record
from tasks.data.frozen import sweep
from tasks.data.journal import Journal
from tasks.data.patients import Barred, fingerprint, pseudonym
from tasks.data.released import Released
from tasks.data.room import Room
from tasks.data.source import Faulty, Found, LabelMap, Naming, Reason, quietly

_NOBODY = Barred()

Progress = Callable[[int, int], None]
#: of a file: its path below the root, bytes, time of its last change in ns
State = tuple[str, int, int]


@dataclass(frozen=True)
class Refused:
    """One case that was left out. `source` and `detail` stay at the site."""

    source: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Report:
    """What an ingest ended with: how many cases are kept, how many were read anew, which were refused.

    Attributes:
        unmapped: labels that are no class here, and in how many cases. notes: what was decided while
            reading, likewise. records: all that is known, by source; changed: since the last ingest.
            These stay at the site.
    """

    kept: int
    read: int
    refused: tuple[Refused, ...]
    unmapped: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    records: Mapping[str, Record] = field(default_factory=dict, repr=False, compare=False)
    changed: bool = True

    @property
    def exit(self) -> Exit:
        """`OK`, or `PARTLY` where a case was refused."""
        return Exit.PARTLY if self.refused else Exit.OK


class NothingKept(Stop):
    """No usable case: `report` says why each was refused."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(Exit.NO_CASES, message)
        self.report = report


def ingest(
    root: Path,
    cache: Cache,
    *,
    manifest: str | None,
    columns: Columns,
    label_map: LabelMap,
    key: bytes,
    workers: int = 1,
    progress: Progress | None = None,
    barred: Barred = _NOBODY,
    wait: bool = False,
    released: Released | None = None,
    one_site: bool = False,
) -> Report:
    """Bring `cache` up to date with the files below `root`.

    A case is read again only when one of its files (size, time), its manifest row, the label map or the
    key changed. The index is replaced at the end, in one step; until then nobody sees what is new. A
    killed ingest is continued by the next: what it had done stands in the journal.

    Args:
        manifest: CSV below the root; None: image/label folders and DICOM series with SEG.
        columns: the manifest's columns; `label=None` keeps images without masks.
        key: names patients; equal keys give equal names.
        workers: cases read at a time, each with a guarded process of its own for DICOM.
        progress: called with (done, total).
        barred: patients who are not taken in. wait: for another ingest of this cache to end.
        released: files whose pixels were reviewed. one_site: the folders of the root are no sites.

    Raises:
        Stop: (`NO_DATA_ROOT`, `CONFIG`, `DISK_FULL`, `CACHE_DAMAGED`, `SITE_BUSY`),
            `NothingKept` (`NO_CASES`).
    """
    _check_root(root, cache)
    barred.check(key)
    settings = [VERSION, manifest, columns.model_dump(), Naming.of(label_map).plain(), fingerprint(key)]
    files, closed = _walk(root)
    states = {path: _state(root, path) for path in files}  # before anything is read: later changes are seen
    others = [sorted(barred.names), sorted(released.known if released else ()), one_site]
    others.append([[case.source, str(case.fault)] for case in closed])
    tree = _stamp(states.values(), [*settings, *others]) if files else ""
    if tree and tree == cache.index.tree:
        return replace(_report(cache.index.records, read=0), changed=False)
    # readers cost more to import than a run without work
    from tasks.data.discover import site_folders
    from tasks.data.labels import check_label_map

    check_label_map(label_map)
    with quietly():
        if manifest is not None:
            found = _by_manifest(root, manifest, columns, label_map, released, workers)
        else:
            found = _by_folders(root, files, columns, released, workers)
            found = (found if one_site else site_folders(found)) + closed
        found.sort(key=lambda case: case.source)
        if not {path for case in found for path in case.files} <= set(files):
            tree = ""  # a manifest may name what the walk passes over: its changes would not be seen
        with cache.changing(wait=wait):
            job = _Job(root, cache, states, settings, label_map, key, barred.names)
            records, read = job.run(found, workers, progress)
            report = _report(records, read)
            if not report.kept:
                raise NothingKept(_nothing(root, report), report)
            cache.commit(Index(tree, records))
            job.journal.end()
            sweep(cache)
    return report


def _check_root(root: Path, cache: Cache) -> None:
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        raise Stop(Exit.NO_DATA_ROOT, f"data.root {root} is not a readable folder")
    if cache.folder.resolve().is_relative_to(root.resolve()):
        raise Stop(Exit.CONFIG, f"cache {cache.folder} lies below data.root {root}; choose a folder outside")


def _walk(root: Path) -> tuple[list[Path], list[Found]]:
    """The files below the root, sorted, and the folders that were not looked into: passed over in silence,
    their cases would be gone.
    """
    files: list[Path] = []
    closed: list[Found] = []

    def refuse(path: str | Path, why: str) -> None:
        name = Path(path).relative_to(root).as_posix()
        closed.append(Found(name, "", (), fault=Faulty(Reason.UNREADABLE, why)))

    for folder, folders, names in os.walk(
        root, onerror=lambda e: refuse(e.filename, f"folder: {e.strerror}")
    ):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for linked in (Path(folder, f) for f in folders if Path(folder, f).is_symlink()):
            refuse(
                linked, "a link to a folder is not followed; name that folder as data.root, or mount it here"
            )
        files += (Path(folder, n) for n in names if not n.startswith("."))
    return sorted(files), closed


def _by_manifest(
    root: Path,
    manifest: str,
    columns: Columns,
    label_map: LabelMap,
    released: Released | None,
    workers: int,
) -> list[Found]:
    from tasks.data.dicom import from_series
    from tasks.data.discover import from_manifest

    def series_of(paths: list[Path], alone: Collection[Path]) -> list[Found]:
        return from_series(root, paths, alone=alone, with_masks=False, released=released, workers=workers)

    return from_manifest(root, manifest, columns, label_map, series_of)


def _by_folders(
    root: Path, files: Sequence[Path], columns: Columns, released: Released | None, workers: int
) -> list[Found]:
    from tasks.data.dicom import from_series
    from tasks.data.discover import from_folders

    with_masks = columns.label is not None
    found = from_folders(root, files, with_masks=with_masks, columns=columns)
    series = from_series(root, files, with_masks=with_masks, released=released, workers=workers)
    if columns.attribute:
        from tasks.data.attribute import with_class

        series = with_class(series, columns.attribute)
    return found + series


class _Job:
    """One ingest under way."""

    def __init__(
        self,
        root: Path,
        cache: Cache,
        states: Mapping[Path, State],
        settings: Sequence[object],
        label_map: LabelMap,
        key: bytes,
        barred: frozenset[str],
    ) -> None:
        self.root, self.cache, self.states, self.settings = root, cache, states, settings
        self.label_map, self.key, self.barred = label_map, key, barred
        self.journal, self.room = Journal(cache.folder), Room()
        self.before = {**cache.index.records, **self.journal.read()}

    def run(
        self, found: Sequence[Found], workers: int, progress: Progress | None
    ) -> tuple[dict[str, Record], int]:
        """The new records by source, and how many cases were read."""
        read = 0
        records: dict[str, Record] = {}
        holder: dict[str, str] = {}
        with self.journal.writing(), ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
            try:
                done = zip(found, pool.map(self.one, found), strict=True)
                for number, (case, (record, fresh)) in enumerate(done, 1):
                    read += fresh
                    records[case.source] = _unless_duplicate(case.source, record, holder)
                    if progress is not None:
                        progress(number, len(found))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # Ctrl-C waits for what is in flight, no more
                raise
        return records, read

    def one(self, case: Found) -> tuple[Record, bool]:
        """What became of a case, and whether it was read."""
        patient = pseudonym(self.key, case.patient)
        if patient in self.barred:
            return Record("", None, Reason.BARRED, patient=patient), False
        given = [*self.settings, patient, case.site, case.split, case.fault and str(case.fault), case.cells]
        files = (self.states.get(path) or _state(self.root, path) for path in case.files)
        stamp = _stamp(files, given)
        known = self.before.get(case.source)
        if known is not None and known.stamp == stamp and self._holds(known):
            return replace(known, entry=known.entry or known.twin), False
        with self.room.of(case.files):
            record = self._read(case, patient, stamp)
        self.journal.add(case.source, record)
        return record, True

    def _holds(self, record: Record) -> bool:
        entry = record.entry or record.twin
        return entry is None or self.cache.path(entry.digest).exists()

    def _read(self, case: Found, patient: str, stamp: str) -> Record:
        from tasks.data.summary import facts

        try:
            if case.fault is not None or case.read is None:
                raise case.fault or Faulty(Reason.UNREADABLE, "nothing reads it")
            raw = case.read(self.label_map)
        except Faulty as fault:
            return Record(stamp, None, fault.reason, fault.detail, fault.unmapped, patient=patient)
        except MemoryError:
            return Record(stamp, None, Reason.LIMIT, "it does not fit into memory", patient=patient)
        digest = self.cache.put(raw)
        entry = Entry(
            key=digest[:16],
            patient=patient,
            site=case.site,
            split=case.split,
            digest=digest,
            shape=() if raw.image is None else raw.image.shape,
            groups=dict(raw.groups),
            source=case.source,
            annotates=Naming.of(self.label_map).annotates,
        )
        return Record(stamp, entry, unmapped=raw.unmapped, notes=raw.notes, patient=patient, facts=facts(raw))


def _unless_duplicate(source: str, record: Record, holder: dict[str, str]) -> Record:
    """A case whose content another source already gave is refused: it would count twice, or leak.

    Not so rows of a table alone: two patients may well have the same few numbers.
    """
    entry = record.entry
    if entry is None or not entry.shape:
        return record
    first = holder.setdefault(entry.digest, source)
    if first == source:
        return replace(record, twin=None, reason="", detail="")
    return replace(record, entry=None, twin=entry, reason=Reason.DUPLICATE, detail=f"equals {first}")


def _state(root: Path, path: Path) -> State:
    name = path.relative_to(root).as_posix()
    try:
        state = path.stat()
    except OSError:  # gone since it was listed, or a dangling link: reading it says so
        return name, -1, -1
    return name, state.st_size, state.st_mtime_ns


def _stamp(files: Iterable[State], facts: Sequence[object]) -> str:
    """Digest of files as they were, and of what else an outcome depends on."""
    return hashlib.sha256(json.dumps([list(files), facts], sort_keys=True).encode()).hexdigest()


def _report(records: Mapping[str, Record], read: int) -> Report:
    refused = tuple(
        Refused(source, Reason(r.reason), r.detail)
        for source, r in sorted(records.items())
        if r.entry is None
    )
    unmapped = Counter(name for r in records.values() for name in r.unmapped)
    notes = Counter(note for r in records.values() for note in r.notes)
    return Report(len(records) - len(refused), read, refused, dict(unmapped), dict(notes), records)


def _nothing(root: Path, report: Report) -> str:
    if not report.refused:
        return f"no case below {root}; need a manifest, image and label folders, or DICOM series with SEG"
    reasons = [r.reason for r in report.refused]
    counts = ", ".join(f"{reasons.count(r)} {r}" for r in Reason if r in reasons)
    return f"no usable case below {root}: {counts}"
