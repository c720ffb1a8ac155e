"""`site.yaml`: what a hospital says about itself. Never sent."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from client.budget import Budget
from client.pacs.settings import Pacs
from client.places import Places
from client.policy import Policy
from conf.exits import Exit, Stop
from conf.schema import Columns, Frozen, Labels, Name, Own, SiteName, complaint

if TYPE_CHECKING:  # they bring torch, and an ingest needs none
    from client.site import Site
    from client.train import Bench
    from tasks.data.cache import Entry
    from tasks.data.source import Naming


class SiteData(Frozen):
    """Where the cases come from.

    Attributes:
        root: only read. manifest: CSV below it. workers: processes that read; 0: one per core.
        label_map: file values and names to classes, where the federation has no dictionary. labels: its
            dictionary, this site's names for it, and the classes this site annotates.
    """

    root: Path | None = None
    manifest: str | None = None
    columns: Columns = Columns()
    label_map: dict[Own, int] | Literal["nonzero"] | None = None
    labels: Labels = Labels()
    workers: int = Field(0, ge=0)

    @property
    def hands(self) -> int:
        return self.workers or os.cpu_count() or 1

    @property
    def names(self) -> Naming:
        """How what stands in the files becomes classes."""
        from tasks.data.source import Naming

        if self.labels == Labels():
            return Naming.of(self.label_map)
        from tasks.data.naming import naming

        return naming(self.labels)

    @model_validator(mode="after")
    def _one_way(self) -> SiteData:
        if self.label_map is not None and self.labels != Labels():
            raise ValueError("data.label_map and data.labels are both set; keep labels")
        return self


class Coordinator(Frozen):
    """Who coordinates: `host:port` of SuperLink, the certificates to trust (PEM), this node's private key."""

    address: str = Field(pattern=r"^[A-Za-z0-9.-]+:[0-9]{1,5}$")
    authority: Path
    key: Path | None = None


class SiteFile(Frozen):
    """A site's name, data, rules and places. Relative paths count from the file's own folder.

    Attributes:
        cache: what `wardround-site ingest` made. state: plans, replies, private states, incidents.
        key: names patients. audit: log of decisions. ledger: what was released about the patients, which
            `privacy` limits, by population. socket: where the trainer listens.
        pacs: the archive that `ingest --pacs` asks. coordinator: what `doctor` tries to reach.
    """

    name: SiteName
    data: SiteData = SiteData()
    cache: Path = Path("cache")
    state: Path = Path("state")
    key: Path = Path("state/patient.key")
    audit: Path = Path("audit.jsonl")
    ledger: Path = Path("ledger.jsonl")
    privacy: dict[Name, Budget] = Field(default_factory=lambda: {"patients": Budget()})
    socket: Path = Path("run/trainer.sock")
    device: str = "auto"
    policy: Policy = Policy()
    pacs: Pacs | None = None
    coordinator: Coordinator | None = None
    val_fraction: float = Field(0.1, ge=0, lt=1)
    test_fraction: float = Field(0.2, ge=0, lt=1)
    split_seed: int = Field(0, ge=0)

    @classmethod
    def read(cls, path: Path) -> SiteFile:
        """Read and check the file.

        Raises:
            Stop: (`CONFIG`).
        """
        try:
            read = cls.model_validate(yaml.safe_load(path.read_text()))
        except ValidationError as error:
            raise Stop(Exit.CONFIG, f"{path}: {complaint(error)}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise Stop(Exit.CONFIG, f"{path} cannot be read ({type(error).__name__}: {error})") from None
        here = path.absolute().parent
        names = ("cache", "state", "key", "audit", "ledger", "socket")
        places: dict[str, Any] = {n: here / getattr(read, n) for n in names}
        if read.pacs is not None:
            places["pacs"] = read.pacs.placed(here)
        if (peer := read.coordinator) is not None:
            kept = {"authority": here / peer.authority, "key": peer.key and here / peer.key}
            places["coordinator"] = peer.model_copy(update=kept)
        root = read.data.root and here / read.data.root
        return read.model_copy(update={**places, "data": read.data.model_copy(update={"root": root})})

    @property
    def places(self) -> Places:
        """What the site keeps of its patients."""
        return Places(self.cache, self.key, self.state, self.audit)

    def parts(self, entries: Sequence[Entry]) -> Mapping[str, Sequence[Entry]]:
        """The site's cases by split.

        Raises:
            Stop: no usable split.
        """
        from tasks.data.splits import split

        return split(
            entries,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            seed=self.split_seed,
        )

    def site(self, bench: Bench) -> Site:
        """The site, its replies kept before they leave.

        Raises:
            Stop: the cache holds no usable split.
        """
        from client.audit import Audit
        from client.shelf import Shelf
        from client.site import Ledger, Plans, Site
        from strategies.code import code_digest
        from tasks.data.cache import Cache

        cache = Cache(self.cache)
        self.parts(cache.entries)  # says now what the first instruction would find
        return Site(
            name=self.name,
            archive=Shelf(cache, self.parts),
            policy=self.policy,
            bench=bench,
            plans=Plans(self.state / "plans"),
            folder=self.state,
            code=code_digest(),
            durable=True,
            ledger=Ledger(self.ledger, self.privacy),
            audit=Audit(self.audit),
        )
