"""`wardround-site doctor`: whether this site would work, and what to do where it would not."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from client.places import NAME, SiteOption, site_file
from conf.exits import Exit, Stop

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor(
    site: SiteOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object a line")] = False,
) -> None:
    """Check machine, network and stores of a site. A line each: ok, warning or problem, and what to do."""
    from client.doctor.checks import examine
    from client.doctor.finding import Level

    file = site_file(site)
    if file is None:
        raise Stop(
            Exit.CONFIG, f"no {NAME} in this folder; go to the site's folder, or give --site-file FILE"
        )
    levels = set()
    for name, found in examine(file):
        levels.add(found.level)
        if as_json:
            line = {"check": name, "level": found.level, "seen": found.seen, "remedy": found.remedy}
            typer.echo(json.dumps(line))
            continue
        remedy = f"\n{'':24}-> {found.remedy}" if found.remedy else ""
        level = typer.style(f"{found.level:<8}", fg=_COLOURS[found.level])
        typer.echo(f"{name:<14}{level}  {found.seen}{remedy}")
    bad = Exit.PROBLEM if Level.PROBLEM in levels else Exit.WARNING if Level.WARNING in levels else Exit.OK
    raise typer.Exit(bad.value)
