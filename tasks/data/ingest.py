"""From a hospital's files to cached cases: a faulty case is refused by itself, with its reason.

Patients are named by HMAC-SHA-256 under the site's own key. What could still identify a person, the paths
of files and the details of refusals, stands in the index alone and never leaves the site.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from conf.exits import Exit, Stop
from conf.schema import Columns
from tasks.data.cache import VERSION, Cache, Entry, Index, Record
from tasks.data.dicom import from_series
from tasks.data.discover import from_folders, from_manifest, site_folders
from tasks.data.labels import check_label_map
from tasks.data.source import Faulty, Found, LabelMap, Naming, Reason

Progress = Callable[[int, int], None]


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
            reading, likewise. Both stay at the site.
    """

    kept: int
    read: int
    refused: tuple[Refused, ...]
    unmapped: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)

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
) -> Report:
    """Bring `cache` up to date with the files below `root`.

    A case is read again only when one of its files (size, time), its manifest row, the label map or the
    key changed. The index is replaced at the end, in one step.

    Args:
        manifest: CSV below the root; None: image/label folders and DICOM series with SEG.
        columns: the manifest's columns; `label=None` keeps images without masks.
        key: names patients; equal keys give equal names.
        workers: threads that read. progress: called with (done, total).

    Raises:
        Stop: (`NO_DATA_ROOT`, `CONFIG`, `DISK_FULL`, `CACHE_DAMAGED`), `NothingKept` (`NO_CASES`).
    """
    check_label_map(label_map)
    _check_root(root, cache)
    settings = [
        VERSION,
        manifest,
        columns.model_dump(),
        Naming.of(label_map).plain(),
        hashlib.sha256(key).hexdigest(),
    ]
    files = sorted(_walk(root)) if manifest is None else []
    tree = _stamp(root, files, settings) if files else ""
    if tree and tree == cache.index.tree:
        return _report(cache.index.records, read=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # readers warn of odd headers, and quote them
        found = _discover(root, files, manifest, columns, label_map)
        records, read = _bring_up(found, cache, settings, root, label_map, key, workers, progress)
    report = _report(records, read)
    if not report.kept:
        raise NothingKept(_nothing(root, report), report)
    cache.commit(Index(tree, records))
    return report


def patient_key(path: Path) -> bytes:
    """The 32-byte key that names patients: read from `path`, or made there (mode 0600) at first use.

    Raises:
        Stop: (`CONFIG`) the file is shorter than 32 bytes.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        key = path.read_bytes()
        if len(key) < 32:
            raise Stop(Exit.CONFIG, f"key file {path} has {len(key)} bytes; need 32") from None
        return key
    with os.fdopen(handle, "wb") as file:
        key = os.urandom(32)
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    return key


def _check_root(root: Path, cache: Cache) -> None:
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        raise Stop(Exit.NO_DATA_ROOT, f"data.root {root} is not a readable folder")
    if cache.folder.resolve().is_relative_to(root.resolve()):
        raise Stop(Exit.CONFIG, f"cache {cache.folder} lies below data.root {root}; choose a folder outside")


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".")]
        yield from (Path(folder, n) for n in names if not n.startswith("."))


def _discover(
    root: Path, files: Sequence[Path], manifest: str | None, columns: Columns, label_map: LabelMap
) -> list[Found]:
    if manifest is not None:
        found = from_manifest(root, manifest, columns, label_map)
    else:
        with_masks = columns.label is not None
        found = from_folders(root, files, with_masks=with_masks)
        found = site_folders(found + from_series(root, files, with_masks=with_masks))
    return sorted(found, key=lambda f: f.source)


def _bring_up(
    found: Sequence[Found],
    cache: Cache,
    settings: Sequence[object],
    root: Path,
    label_map: LabelMap,
    key: bytes,
    workers: int,
    progress: Progress | None,
) -> tuple[dict[str, Record], int]:
    """The new records by source, and how many cases were read."""
    before = cache.index.records
    read = 0

    def one(case: Found) -> tuple[Record, bool]:
        patient = hmac.new(key, case.patient.encode(errors="surrogateescape"), hashlib.sha256).hexdigest()[
            :16
        ]
        facts = [*settings, patient, case.site, case.split, case.fault and str(case.fault), case.cells]
        stamp = _stamp(root, case.files, facts)
        known = before.get(case.source)
        if known is not None and known.stamp == stamp and known.reason != Reason.DUPLICATE:
            return known, False
        return _ingest_one(case, cache, patient, stamp, label_map), True

    records: dict[str, Record] = {}
    holder: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
        for done, (case, (record, fresh)) in enumerate(zip(found, pool.map(one, found), strict=True), 1):
            read += fresh
            records[case.source] = _unless_duplicate(case.source, record, holder)
            if progress is not None:
                progress(done, len(found))
    return records, read


def _ingest_one(case: Found, cache: Cache, patient: str, stamp: str, label_map: LabelMap) -> Record:
    try:
        if case.fault is not None or case.read is None:
            raise case.fault or Faulty(Reason.UNREADABLE, "nothing reads it")
        raw = case.read(label_map)
    except Faulty as fault:
        return Record(stamp, None, fault.reason, fault.detail, fault.unmapped)
    digest = cache.put(raw)
    entry = Entry(
        key=digest[:16],
        patient=patient,
        site=case.site,
        split=case.split,
        digest=digest,
        shape=() if raw.image is None else raw.image.shape,
        groups=dict(raw.groups),
        source=case.source,
        annotates=Naming.of(label_map).annotates,
    )
    return Record(stamp, entry, unmapped=raw.unmapped, notes=raw.notes)


def _unless_duplicate(source: str, record: Record, holder: dict[str, str]) -> Record:
    """A case whose content another source already gave is refused: it would count twice, or leak.

    Not so rows of a table alone: two patients may well have the same few numbers.
    """
    if record.entry is None or not record.entry.shape:
        return record
    first = holder.setdefault(record.entry.digest, source)
    if first == source:
        return record
    return replace(record, entry=None, reason=Reason.DUPLICATE, detail=f"equals {first}")


def _stamp(root: Path, files: Iterable[Path], facts: Sequence[object]) -> str:
    """Digest of names, sizes and times of files, and of what else an outcome depends on."""
    seen: list[tuple[str, int, int]] = []
    for path in files:
        name = path.relative_to(root).as_posix()
        try:
            state = path.stat()
            seen.append((name, state.st_size, state.st_mtime_ns))
        except OSError:  # gone since it was listed, or a dangling link: reading it says so
            seen.append((name, -1, -1))
    return hashlib.sha256(json.dumps([seen, facts], sort_keys=True).encode()).hexdigest()


def _report(records: Mapping[str, Record], read: int) -> Report:
    refused = tuple(
        Refused(source, Reason(r.reason), r.detail)
        for source, r in sorted(records.items())
        if r.entry is None
    )
    unmapped = Counter(name for r in records.values() for name in r.unmapped)
    notes = Counter(note for r in records.values() for note in r.notes)
    return Report(len(records) - len(refused), read, refused, dict(unmapped), dict(notes))


def _nothing(root: Path, report: Report) -> str:
    if not report.refused:
        return f"no case below {root}; need a manifest, image and label folders, or DICOM series with SEG"
    reasons = [r.reason for r in report.refused]
    counts = ", ".join(f"{reasons.count(r)} {r}" for r in Reason if r in reasons)
    return f"no usable case below {root}: {counts}"
