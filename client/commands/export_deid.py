"""`wardround-site export-deid`: DICOM files without the person."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.places import SiteOption, key_places
from conf.exits import Exit, printable


def export_deid(
    source: Annotated[Path, typer.Argument(help="folder of DICOM files")],
    destination: Annotated[Path, typer.Argument(help="folder to write to, outside the source")],
    site: SiteOption = None,
    key_file: Annotated[Path | None, typer.Option(help="the key that names patients, without a file")] = None,
    keep_label: Annotated[
        list[str] | None, typer.Option(help="name of a structure that may stay as it is (several times)")
    ] = None,
) -> None:
    """Write DICOM files without the person (PS3.15 Basic Profile, by an allow-list); pixels stay as they are.

    A line for each file that is refused, with the reason. Nothing is overwritten.
    """
    from client.audit import Audit
    from tasks.data.deident import Pseudonyms
    from tasks.data.export import check_folders, export
    from tasks.data.patients import Barred, patient_key
    from tasks.data.released import Released

    check_folders(source, destination)
    places = key_places(site, key_file)
    key = patient_key(places.key)
    barred = Barred.read(places.barred)
    barred.check(key)
    log = Audit(places.audit)
    log.add("export-deid")  # before the first file is written: it may be killed at any moment
    written = refused = 0
    outcomes = export(
        source,
        destination,
        Pseudonyms(key),
        Released(places.released),
        names=frozenset(keep_label or ()),
        barred=barred.names,
    )
    for outcome in outcomes:
        if outcome.written is None:
            refused += 1
            typer.echo(printable(f"{outcome.source}: {outcome.reason}: {outcome.detail}"))
        else:
            written += 1
    log.add("exported", files=written, refused=refused)
    typer.echo(f"{written} files in {destination}, {refused} refused")
    if not written:
        raise typer.Exit(Exit.NO_CASES.value)
    raise typer.Exit(Exit.PARTLY.value if refused else Exit.OK.value)
