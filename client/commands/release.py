"""`wardround-site release`: the engineer has looked at pixels that were held back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.places import CacheOption, SiteOption, known_places
from conf.exits import Exit, Stop


def release(
    files: Annotated[list[Path], typer.Argument(help="DICOM files that show no name, or folders of them")],
    site: SiteOption = None,
    cache: CacheOption = None,
) -> None:
    """Release files whose pixels were held back, after a look at each: ingest and export-deid then take them.

    A released file is known by its SHA-256: changed, it needs a new look.
    """
    from client.audit import Audit
    from tasks.data.released import Released, digest

    paths = [inner for path in files for inner in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    absent = [path for path in paths if not path.exists()]
    if absent:
        raise Stop(Exit.CONFIG, f"{absent[0]} does not exist; nothing was released")
    places = known_places(site, cache)
    released = Released(places.released)
    try:
        new = sorted({digest(path) for path in paths if path.is_file()} - released.known)
    except OSError as error:
        text = f"{error.filename} cannot be read ({error.strerror}); nothing was released"
        raise Stop(Exit.CONFIG, text) from None
    for one in new:
        Audit(places.audit).add("release", file=one)  # before it counts
    released.add(new)
    typer.echo(f"{len(new)} files released now, {len(released.known)} in all: {places.released}")
