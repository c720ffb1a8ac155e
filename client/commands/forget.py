"""`wardround-site forget`: a patient leaves the cache, and no later ingest brings them back."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from client.places import CacheOption, SiteOption, known_places
from conf.exits import Exit, Stop

if TYPE_CHECKING:
    from client.places import Places

_NAME = re.compile(r"[0-9a-f]{16}")


def forget(
    patient: Annotated[
        str | None, typer.Argument(help="the patient's name at this site: 16 hex digits, as reports show it")
    ] = None,
    id: Annotated[
        bool,
        typer.Option("--id", help="ask for the hospital's own patient id instead (or read it from stdin)"),
    ] = False,
    site: SiteOption = None,
    cache: CacheOption = None,
) -> None:
    """Remove a patient's cases and bar the patient from later ingests. Repeat it if it was interrupted."""
    from tasks.data.patients import patient_key, pseudonym

    if (patient is None) != id:
        raise Stop(Exit.USAGE, "give the patient's 16 hex digits, or --id and the hospital's id when asked")
    if patient is not None and not _NAME.fullmatch(patient):
        # not quoted: it may be a hospital's id
        raise Stop(Exit.USAGE, "PATIENT is not 16 hex digits; for the hospital's own id use --id")
    places = known_places(site, cache)
    if not places.key.is_file():
        raise Stop(Exit.CONFIG, f"{places.key} does not exist: without the key no patient can be named")
    if patient is None:
        patient = pseudonym(patient_key(places.key), _asked())
    swept, removed = bar(places, patient, known=not id)
    gone = f"{removed} cached objects removed" if removed else "nothing of this patient was in the cache"
    typer.echo(f"{patient}: {gone}; no later ingest takes this patient in")
    if not swept:
        text = "a run holds the cache, so remains of interrupted ingests were not looked through"
        typer.echo(f"{text}: repeat this when it has ended", err=True)
        raise typer.Exit(Exit.PARTLY.value)


def bar(places: Places, patient: str, *, known: bool) -> tuple[bool, int]:
    """Bar a patient and remove what is theirs. Each step may be cut short; the next go completes it.

    Args:
        known: refuse a name that neither the cache nor the list of the barred has: it is a typing error.

    Returns:
        Whether unnamed objects could be looked through, and how many objects were removed.

    Raises:
        Stop: (`NO_CASES`) no such patient, (`SITE_BUSY`) an ingest is under way.
    """
    from client.audit import Audit
    from tasks.data.cache import Cache
    from tasks.data.frozen import drop_patient, objects_of, patients, remove, sweep
    from tasks.data.patients import Barred, patient_key

    shelf, audit = Cache(places.cache), Audit(places.audit)
    with shelf.changing():
        barred = Barred.read(places.barred)
        if known and patient not in barred.names | patients(shelf):
            raise Stop(Exit.NO_CASES, f"no patient {patient} in {places.cache}; nothing was changed")
        audit.add("forget", patient=patient)
        barred.write(places.barred, [patient], patient_key(places.key))
        # they show the patient, half-written ones too; the next ingest writes new ones
        for path in places.report.parent.glob(f"*{places.report.name}.*"):
            path.unlink(missing_ok=True)
        theirs = objects_of(shelf, patient)
        remove(theirs)
        drop_patient(shelf, patient)
        swept = sweep(shelf)
        audit.add("forgotten", patient=patient, objects=len(theirs), unnamed=swept)
    return swept is not None, len(theirs)


def _asked() -> str:
    """The hospital's id, never from the command line: that stays in the shell's history."""
    if sys.stdin.isatty():
        given = str(typer.prompt("hospital's patient id", hide_input=True))
    else:
        given = sys.stdin.readline()
    if not given.strip():
        raise Stop(Exit.USAGE, "no patient id was given")
    return given.strip()
