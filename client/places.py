"""Where a site's commands find what they work on: by `site.yaml`, or by folders given one by one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conf.exits import Exit, Stop

if TYPE_CHECKING:
    from client.sitefile import SiteFile

NAME = "site.yaml"

SiteOption = Annotated[
    Path | None, typer.Option("--site-file", metavar="FILE", help=f"the site's file  [default: ./{NAME}]")
]
CacheOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="where cases are kept, without a site's file"),
]


@dataclass(frozen=True)
class Places:
    """What a site keeps of its patients.

    Attributes:
        key: names patients. state: for reports and the like. audit: the log of decisions.
    """

    cache: Path
    key: Path
    state: Path
    audit: Path

    @property
    def barred(self) -> Path:
        """Patients who are not taken in."""
        return self.key.with_name("barred.json")

    @property
    def released(self) -> Path:
        """Files whose pixels the engineer has looked at."""
        return self.key.with_name("released")

    @property
    def report(self) -> Path:
        """What the names of an ingest report's files begin with."""
        return self.state / "ingest-report"

    @classmethod
    def beside(cls, cache: Path, key: Path | None = None) -> Places:
        """Those of a cache without a site's file."""
        state = cache.parent / "state"
        return cls(cache, key or state / "patient.key", state, cache.parent / "audit.jsonl")


def site_file(given: Path | None) -> SiteFile | None:
    """The site's file: the one given, or the one in this folder, if there is one.

    Raises:
        Stop: (`CONFIG`) it cannot be read.
    """
    path = given or (Path(NAME) if Path(NAME).is_file() else None)
    if path is None:
        return None
    from client.sitefile import SiteFile

    return SiteFile.read(path)


def key_places(site: Path | None, key: Path | None) -> Places:
    """The places of a command that needs the key alone.

    Raises:
        Stop: (`CONFIG`) neither a site's file nor a key, or no key there.
    """
    if key is not None:
        places = Places.beside(key.parent.parent / "cache", key)
    elif (file := site_file(site)) is not None:
        places = file.places
    else:
        text = f"no {NAME} in this folder; go there, or give --site-file FILE or --key-file FILE"
        raise Stop(Exit.CONFIG, text)
    if not places.key.is_file():
        raise Stop(Exit.CONFIG, f"{places.key} does not exist; wardround-site init makes a site's key")
    return places


def known_places(site: Path | None, cache: Path | None) -> Places:
    """The places of a command that needs a cache which is there already.

    Raises:
        Stop: (`CONFIG`) neither a site's file nor a cache.
    """
    if cache is not None and site is None:
        if not cache.is_dir():
            raise Stop(Exit.CONFIG, f"--cache {cache} is not a folder; ingest makes it")
        return Places.beside(cache)
    if (file := site_file(site)) is None:
        raise Stop(
            Exit.CONFIG, f"no {NAME} in this folder; go to the site's folder, or give --site-file FILE"
        )
    return file.places
