"""Cases on disk: content-addressed, memory-mapped, in native geometry.

```
index.json                             which source gave which case or refusal; replaced by rename
objects/ab/ab12….safetensors           arrays and one key of canonical JSON; the name is the SHA-256
journal.jsonl                          what the ingest under way has done so far (`journal.py`)
runs/<run>.json                        the cases a run sees, whatever is ingested meanwhile (`frozen.py`)
```
An object is durable before the index names it, so a crash at any point leaves the old index usable.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.exits import Exit, Stop
from conf.files import no_space, sync_file, sync_folder, write_atomic
from tasks.data.source import Raw

if TYPE_CHECKING:
    from tasks.base import Case

VERSION = 3
IMAGE, MASK = "image", "mask"  # the names under which a case carries its picture and its annotation


@dataclass(frozen=True)
class Entry:
    """A cached case, known without opening it.

    Attributes:
        key: first 16 hex digits of the digest. patient: pseudonymous key.
        split: train, val or test as the manifest says. digest: SHA-256 of the object.
        shape: the image's `CHW[D]`. groups: coded columns. source: path below the root, local only.
        annotates: the classes somebody looked for; None: all.
    """

    key: str
    patient: str
    site: str | None
    split: str | None
    digest: str
    shape: tuple[int, ...]
    groups: Mapping[str, str]
    source: str
    annotates: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Record:
    """What became of one source: an entry, or the reason for its refusal.

    Attributes:
        stamp: digest of all that the outcome depends on; equal stamps need no second look.
        unmapped: labels in its files that are no class here. notes: what was decided while reading.
        patient: pseudonymous key, of refused cases too. twin: what a duplicate would have been.
        facts: what the ingest report says of the case (`summary.facts`).
    """

    stamp: str
    entry: Entry | None = None
    reason: str = ""
    detail: str = ""
    unmapped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    patient: str = ""
    twin: Entry | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Index:
    """Every source of the last ingest. `tree` stamps the whole tree."""

    tree: str = ""
    records: Mapping[str, Record] = field(default_factory=dict)


class Cache:
    """The cases of one data root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def index(self) -> Index:
        """What the last completed ingest wrote; empty where there was none.

        Raises:
            Stop: (`CACHE_DAMAGED`) the index cannot be read.
        """
        path = self.folder / "index.json"
        try:
            data = json.loads(path.read_bytes())
            if data["version"] != VERSION:
                raise Stop(
                    Exit.CACHE_DAMAGED, f"{path} has version {data['version']}; need {VERSION}: {_REMEDY}"
                )
            return Index(data["tree"], {s: record_of(s, r) for s, r in data["records"].items()})
        except FileNotFoundError:
            return Index()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, Stop):
                raise
            raise Stop(Exit.CACHE_DAMAGED, f"{path} is not an index of cases ({error}): {_REMEDY}") from None

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """All cases, sorted by patient, then key."""
        kept = (r.entry for r in self.index.records.values() if r.entry is not None)
        return tuple(sorted(kept, key=lambda e: (e.patient, e.key)))

    def load(self, entry: Entry) -> Case:
        """The case itself. A float32 image is mapped from disk, not read; its content is not checked here.

        Raises:
            Stop: (`CACHE_DAMAGED`) the object is missing or cut off.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        from tasks.base import Case

        try:
            with safe_open(self.path(entry.digest), framework="pt") as file:
                facts = json.loads(file.metadata()["case"])
                names = set(file.keys())
                images = {IMAGE: file.get_tensor(IMAGE).to(torch.float32)} if IMAGE in names else {}
                masks = {MASK: file.get_tensor(MASK)} if MASK in names else {}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(entry, str(error)) from None
        return Case(
            key=entry.key,
            patient=entry.patient,
            images=images,
            masks=masks,
            affine=torch.tensor(facts["affine"], dtype=torch.float64),
            spacing=tuple(facts["spacing"]),
            labels=facts["labels"],
            table=facts["table"],
            groups=dict(entry.groups),
            units=facts["units"],
            annotates=entry.annotates,
        )

    def labels(self, entry: Entry) -> Mapping[str, float]:
        """The classes and values of a case by name; its arrays are not read."""
        return self._values(entry, "labels")

    def columns(self, entry: Entry) -> frozenset[str]:
        """Names of the clinical columns and of the groups that a case has; its arrays are not read."""
        return frozenset(self._values(entry, "table")) | frozenset(entry.groups)

    def _values(self, entry: Entry, name: str) -> dict[str, float]:
        """One of the mappings that stand beside a case's arrays.

        Raises:
            Stop: (`CACHE_DAMAGED`) the object is missing or cut off.
        """
        try:
            with self.path(entry.digest).open("rb") as file:
                head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            found: dict[str, float] = json.loads(head["__metadata__"]["case"])[name]
        except (OSError, OverflowError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(entry, str(error)) from None
        return found

    def verify(self) -> None:
        """Compare every object with its digest.

        Raises:
            Stop: (`CACHE_DAMAGED`) one is missing or differs.
        """
        for entry in self.entries:
            try:
                with self.path(entry.digest).open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise self._damaged(entry, error.strerror or str(error)) from None
            if found != entry.digest:
                raise self._damaged(entry, "its content does not match its digest")

    def put(self, raw: Raw) -> str:
        """Keep a case's arrays durably; nothing refers to them yet. Returns the digest."""
        import numpy as np
        import safetensors.numpy
        from safetensors import SafetensorError

        facts = {
            "affine": raw.affine.tolist(),
            "spacing": list(raw.spacing),
            "labels": dict(raw.labels),
            "table": dict(raw.table),
            "units": raw.units,
        }
        given = ((IMAGE, raw.image), (MASK, raw.mask))
        # the library writes memory as it lies, whatever the strides say
        arrays = {n: np.ascontiguousarray(a) for n, a in given if a is not None}
        with no_space(self.folder, "ingest again"):
            self.make()
            # straight from the arrays to the file: a copy of a large study would not fit into memory
            part = self.folder / "objects" / f".{os.getpid()}.{threading.get_ident():x}.part"
            try:
                safetensors.numpy.save_file(arrays, part, {"case": _canonical(facts)})
                with part.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                path = self.path(digest)
                if not path.exists() or path.stat().st_size != part.stat().st_size:
                    sync_file(part)
                    if not path.parent.is_dir():
                        path.parent.mkdir(mode=0o700, exist_ok=True)
                        sync_folder(path.parent.parent)
                    part.replace(path)
                    sync_folder(path.parent)
            except SafetensorError as error:
                raise _as_os_error(error) from None
            finally:
                part.unlink(missing_ok=True)
        return digest

    def commit(self, index: Index) -> None:
        """Replace the index in one rename."""
        records = {s: plain(r) for s, r in sorted(index.records.items())}
        data = {"version": VERSION, "tree": index.tree, "records": records}
        with no_space(self.folder, "ingest again"):
            self.make()
            write_atomic(self.folder / "index.json", _canonical(data).encode())
        self.forget_read()
        self.__dict__["index"] = index

    def forget_read(self) -> None:
        """Let the next look at the index read the file again."""
        self.__dict__.pop("entries", None)
        self.__dict__.pop("index", None)

    def make(self) -> None:
        """Make the folders, for their owner only: patients are in them."""
        (self.folder / "objects").mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)

    @contextmanager
    def changing(self, *, wait: bool = False) -> Iterator[None]:
        """Be the only one who changes the cache: ingest and forget.

        Raises:
            Stop: (`SITE_BUSY`) another process does, and `wait` is false.
        """
        self.make()
        with (self.folder / "ingest.lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                file.seek(0)
                who = file.read(20).strip() or "unknown"
                text = f"another ingest works on {self.folder} (process {who}); let it end, then repeat this"
                raise Stop(Exit.SITE_BUSY, text) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            self.forget_read()  # it may have been changed before this process' turn came
            yield

    def held(self) -> Cache:
        """This cache, with no object swept away as long as it is held: for a run without a manifest.

        A lock ends with its process, so a killed run holds nothing.
        """
        if "_hold" not in self.__dict__ and self.folder.is_dir():
            handle = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_SH)
            self.__dict__["_hold"] = _Lock(handle)
            self.forget_read()
        return self

    def release(self) -> None:
        """End `held`."""
        if (hold := self.__dict__.pop("_hold", None)) is not None:
            hold.close()

    def __getstate__(self) -> dict[str, Any]:
        # a lock stays with the process that took it
        return {k: v for k, v in self.__dict__.items() if k != "_hold"}

    def path(self, digest: str) -> Path:
        """Where the object of that digest stands."""
        return self.folder / "objects" / digest[:2] / f"{digest}.safetensors"

    def _damaged(self, entry: Entry, why: str) -> Stop:
        return Stop(
            Exit.CACHE_DAMAGED, f"cached case {entry.key} in {self.folder} is damaged ({why}): {_REMEDY}"
        )


_REMEDY = "remove the cache folder and ingest again"


def default_cache(root: Path) -> Path:
    """Where the cases of a data root are cached when nobody says otherwise: never below the root."""
    root = root.resolve()
    name = f"{root.name or 'root'}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
    return Path.home() / ".cache" / "wardround" / name / "cache"


def _canonical(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


class _Lock:
    """A handle that is closed with its owner, and the lock with it."""

    def __init__(self, handle: int) -> None:
        self.close = weakref.finalize(self, os.close, handle)


def plain(record: Record) -> dict[str, Any]:
    """A record as JSON holds it; `record_of` is its inverse."""
    out: dict[str, Any] = {"stamp": record.stamp, "patient": record.patient, "facts": dict(record.facts)}
    out |= {"unmapped": list(record.unmapped), "notes": list(record.notes)}
    if record.entry is not None:
        return {**out, "entry": plain_entry(record.entry)}
    twin = {} if record.twin is None else {"twin": plain_entry(record.twin)}
    return {**out, "reason": record.reason, "detail": record.detail, **twin}


def record_of(source: str, data: Mapping[str, Any]) -> Record:
    """A record from JSON.

    Raises:
        KeyError, TypeError: it is none.
    """
    return Record(
        stamp=data["stamp"],
        entry=entry_of(source, data["entry"]) if "entry" in data else None,
        reason="" if "entry" in data else data["reason"],
        detail="" if "entry" in data else data["detail"],
        unmapped=tuple(data["unmapped"]),
        notes=tuple(data["notes"]),
        patient=data["patient"],
        twin=entry_of(source, data["twin"]) if "twin" in data else None,
        facts=data["facts"],
    )


def plain_entry(entry: Entry) -> dict[str, Any]:
    """An entry as JSON holds it, without its source; `entry_of` is its inverse."""
    return {k: v for k, v in asdict(entry).items() if k not in ("source", "key")}


def entry_of(source: str, e: Mapping[str, Any]) -> Entry:
    """An entry from JSON.

    Raises:
        KeyError, TypeError: it is none.
    """
    return Entry(
        key=e["digest"][:16],
        patient=e["patient"],
        site=e["site"],
        split=e["split"],
        digest=e["digest"],
        shape=tuple(e["shape"]),
        groups=e["groups"],
        source=source,
        annotates=None if e.get("annotates") is None else tuple(e["annotates"]),
    )


def _as_os_error(error: Exception) -> OSError:
    """What the operating system said, which the library hands on as text."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]) if found else errno.EIO, str(error))
