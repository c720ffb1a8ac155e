"""`site.yaml`: what a hospital says about itself. Never sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from client.pacs.settings import Pacs
from client.policy import Policy
from client.site import Plans, Site
from client.train import Archive, Bench
from conf.exits import Exit, Stop
from conf.schema import Frozen, SiteName, complaint
from strategies.code import code_digest
from tasks.data.cache import Cache
from tasks.data.splits import split


class SiteFile(Frozen):
    """A site's name, data, rules and places. Relative paths count from the file's own folder.

    Attributes:
        cache: what `wardround-site ingest` made. state: plans, replies, private states, incidents.
        socket: where the trainer listens. pacs: the archive that `ingest --pacs` asks.
    """

    name: SiteName
    cache: Path
    state: Path = Path("state")
    socket: Path = Path("run/trainer.sock")
    device: str = "auto"
    policy: Policy = Policy()
    pacs: Pacs | None = None
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
        except (OSError, yaml.YAMLError) as error:
            raise Stop(Exit.CONFIG, f"{path} cannot be read ({type(error).__name__}: {error})") from None
        here = path.absolute().parent
        places: dict[str, Any] = {n: here / getattr(read, n) for n in ("cache", "state", "socket")}
        if read.pacs is not None:
            places["pacs"] = read.pacs.placed(here)
        return read.model_copy(update=places)

    def site(self, bench: Bench) -> Site:
        """The site, its replies kept before they leave.

        Raises:
            Stop: the cache holds no usable split.
        """
        cache = Cache(self.cache)
        parts = split(
            cache.entries,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            seed=self.split_seed,
        )
        return Site(
            name=self.name,
            archive=Archive(parts, cache.load),
            policy=self.policy,
            bench=bench,
            plans=Plans(self.state / "plans"),
            folder=self.state,
            code=code_digest(),
            durable=True,
        )
