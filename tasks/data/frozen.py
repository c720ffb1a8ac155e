"""What a run sees of a cache, and which objects nobody needs any more.

A run's cases are written down at its first look (`runs/<run>.json`) and stay the same until it ends,
however often the trainer is started again and whatever is ingested meanwhile. Only a patient who is
forgotten leaves it.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from conf.exits import Exit, Stop
from conf.files import no_space, sync_folder, write_atomic
from tasks.data.cache import Cache, Entry, Index, entry_of, plain_entry
from tasks.data.journal import Journal

_IDLE_DAYS = 30  # a run that asked for nothing so long is over


def freeze(cache: Cache, run: str) -> tuple[Entry, ...]:
    """The cases of a run, written down where it is new. They carry no source.

    Args:
        run: its id, which becomes a file's name: the caller has checked its letters.

    Raises:
        Stop: (`CACHE_DAMAGED`) the manifest cannot be read.
    """
    path = manifest(cache, run)
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        now = Cache(cache.folder).held()  # no sweep between reading the index and writing the manifest
        try:
            written = None
            while written != (state := _index(now)):  # a patient may be forgotten between the two
                now.forget_read()
                _write(path, now.entries)
                written = state
        finally:
            now.release()
    os.utime(path)
    return _read(path)


def manifest(cache: Cache, run: str) -> Path:
    """Where a run's cases are written down."""
    return cache.folder / "runs" / f"{run}.json"


def patients(cache: Cache) -> set[str]:
    """Everybody whom index, journal or a run names, refused cases included."""
    records = [*cache.index.records.values(), *Journal(cache.folder).read().values()]
    return {r.patient for r in records} | set(_named(cache))


def objects_of(cache: Cache, patient: str) -> list[Path]:
    """The objects of a patient that no other patient's case equals."""
    named = _named(cache)
    theirs = named.pop(patient, set())
    return [cache.path(d) for d in sorted(theirs.difference(*named.values())) if cache.path(d).exists()]


def drop_patient(cache: Cache, patient: str) -> None:
    """Take a patient out of index, journal and all runs. Their objects go first: as long as one is left,
    something names it.
    """
    Journal(cache.folder).drop(patient)
    records = {s: r for s, r in cache.index.records.items() if r.patient != patient}
    cache.commit(Index("", records))  # before the runs are looked through: `freeze` counts on it
    for path in sorted((cache.folder / "runs").glob("*.json")):
        entries = _read(path)
        left = tuple(e for e in entries if e.patient != patient)
        if len(left) < len(entries):
            _write(path, left)


def sweep(cache: Cache) -> int | None:
    """Remove objects that neither the index nor a run names, manifests of runs long over, and whatever else
    killed processes left half written.

    Call it inside `cache.changing()`. A process that holds the cache (`Cache.held`) keeps everything.

    Returns:
        How many were removed; None: somebody holds the cache, nothing was.
    """
    handle = os.open(cache.folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or a file system that cannot say
            return None
        for path in (cache.folder / "runs").glob("*.json"):
            if time.time() - path.stat().st_mtime > _IDLE_DAYS * 86400:
                path.unlink()
        needed = set().union(*_named(cache).values())
        gone = [p for p in _objects(cache) if p.name.partition(".")[0] not in needed]
        remove([*gone, *cache.folder.glob(".*.part"), *cache.folder.glob("runs/.*.part")])
        return len(gone)
    finally:
        os.close(handle)


def remove(objects: list[Path]) -> None:
    """Remove objects, durably."""
    for path in objects:
        path.unlink(missing_ok=True)
    for folder in {path.parent for path in objects if path.parent.is_dir()}:
        sync_folder(folder)


def _index(cache: Cache) -> tuple[int, int]:
    """Which index is in force: each is another file, put in place by a rename."""
    try:
        state = (cache.folder / "index.json").stat()
        return state.st_ino, state.st_mtime_ns
    except FileNotFoundError:
        return 0, 0


def _named(cache: Cache) -> dict[str, set[str]]:
    """By patient, the digests that index, journal and runs name."""
    named: dict[str, set[str]] = defaultdict(set)
    records = [*cache.index.records.values(), *Journal(cache.folder).read().values()]
    entries = [e for r in records for e in (r.entry, r.twin) if e is not None]
    for path in (cache.folder / "runs").glob("*.json"):
        entries += _read(path)
    for entry in entries:
        named[entry.patient].add(entry.digest)
    return named


def _objects(cache: Cache) -> Iterator[Path]:
    """Everything in the object store, parts of killed writers too."""
    yield from (p for p in (cache.folder / "objects").rglob("*") if p.is_file())


def _read(path: Path) -> tuple[Entry, ...]:
    try:
        return tuple(entry_of("", e) for e in json.loads(path.read_bytes())["entries"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"{path} is not a run's list of cases ({type(error).__name__}): end the run and remove it"
        raise Stop(Exit.CACHE_DAMAGED, text) from None


def _write(path: Path, entries: tuple[Entry, ...]) -> None:
    with no_space(path, "repeat"):
        write_atomic(path, json.dumps({"entries": [plain_entry(e) for e in entries]}).encode())
