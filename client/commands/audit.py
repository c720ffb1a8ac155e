"""`wardround-site audit`: what was asked of this site, and what it did."""

from __future__ import annotations

import typer

from client.places import CacheOption, SiteOption, known_places
from conf.exits import printable


def audit(site: SiteOption = None, cache: CacheOption = None) -> None:
    """Show the log of requests, decisions and releases, and check that nobody changed it."""
    from client.audit import Audit

    log = Audit(known_places(site, cache).audit)
    for event in log.events():
        facts = " ".join(f"{k}={v}" for k, v in event.items() if k not in ("n", "time", "event", "before"))
        # a coordinator's words are among them
        typer.echo(printable(f"{event['n']:>6}  {event['time']}  {event['event']:<12} {facts}"))
    head = log.verify()
    typer.echo(f"{head.lines} entries, unchanged; head {head.digest}")
