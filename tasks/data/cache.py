"""Cases on disk: content-addressed, memory-mapped, in native geometry.

```
index.json                             which source gave which case or refusal; replaced by rename
objects/ab/ab12….safetensors           arrays and one key of canonical JSON; the name is the SHA-256
```
An object is durable before the index names it, so a crash at any point leaves the old index usable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.numpy
from safetensors import SafetensorError, safe_open

from conf.exits import Exit, Stop
from conf.files import no_space, write_atomic
from tasks.data.source import Raw

if TYPE_CHECKING:
    from tasks.base import Case

VERSION = 2
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
    """

    stamp: str
    entry: Entry | None = None
    reason: str = ""
    detail: str = ""
    unmapped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


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
            return Index(data["tree"], {s: _record(s, r) for s, r in data["records"].items()})
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

        from tasks.base import Case

        try:
            with safe_open(self._path(entry.digest), framework="pt") as file:
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

    def verify(self) -> None:
        """Compare every object with its digest.

        Raises:
            Stop: (`CACHE_DAMAGED`) one is missing or differs.
        """
        for entry in self.entries:
            try:
                with self._path(entry.digest).open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise self._damaged(entry, error.strerror or str(error)) from None
            if found != entry.digest:
                raise self._damaged(entry, "its content does not match its digest")

    def put(self, raw: Raw) -> str:
        """Keep a case's arrays durably; nothing refers to them yet. Returns the digest."""
        facts = {
            "affine": raw.affine.tolist(),
            "spacing": list(raw.spacing),
            "labels": dict(raw.labels),
            "table": dict(raw.table),
            "units": raw.units,
        }
        arrays = {n: a for n, a in ((IMAGE, raw.image), (MASK, raw.mask)) if a is not None}
        blob = safetensors.numpy.save(arrays, {"case": _canonical(facts)})
        digest = hashlib.sha256(blob).hexdigest()
        path = self._path(digest)
        if not path.exists() or path.stat().st_size != len(blob):
            with no_space(path.parent, "ingest again"):
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # patients: for their owner only
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, blob)
        return digest

    def commit(self, index: Index) -> None:
        """Replace the index in one rename."""
        records = {s: _plain(r) for s, r in sorted(index.records.items())}
        data = {"version": VERSION, "tree": index.tree, "records": records}
        with no_space(self.folder, "ingest again"):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(self.folder / "index.json", _canonical(data).encode())
        self.__dict__.pop("entries", None)
        self.__dict__["index"] = index

    def _path(self, digest: str) -> Path:
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


def _plain(record: Record) -> dict[str, Any]:
    said = {"stamp": record.stamp, "unmapped": list(record.unmapped), "notes": list(record.notes)}
    if record.entry is None:
        return {**said, "reason": record.reason, "detail": record.detail}
    return {**said, "entry": {k: v for k, v in asdict(record.entry).items() if k not in ("source", "key")}}


def _record(source: str, data: Mapping[str, Any]) -> Record:
    unmapped, notes = tuple(data.get("unmapped", ())), tuple(data.get("notes", ()))
    if "entry" not in data:
        return Record(data["stamp"], None, data["reason"], data["detail"], unmapped, notes)
    e = data["entry"]
    entry = Entry(
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
    return Record(data["stamp"], entry, unmapped=unmapped, notes=notes)
