"""`wardround-site preview`: what would leave this site, before it does."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.places import NAME, SiteOption, site_file
from conf.exits import Exit, Stop

if TYPE_CHECKING:
    from collections.abc import Sequence

    from client.preview import Stage
    from conf.schema import Plan

_FEW = 8  # tensors of a group that are listed without being asked for


def preview(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="a plan.json, or a run directory with one")],
    site: SiteOption = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="list every tensor, not only groups")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write a fingerprint's reply there, byte for byte")
    ] = None,
) -> None:
    """Show what a plan would make leave this site: every stage, tensor, size and word. Nothing is sent."""
    file = site_file(site)
    if file is None:
        raise Stop(
            Exit.CONFIG, f"no {NAME} in this folder; go to the site's folder, or give --site-file FILE"
        )
    read = _plan(plan)

    from client.preview import preview as look
    from client.train import Archive
    from tasks.data.cache import Cache

    cache = Cache(file.cache)
    if not cache.entries:
        raise Stop(Exit.NO_CASES, f"{file.cache} holds no case; wardround-site ingest fills it")
    found = look(file.name, read, Archive(file.parts(cache.entries), cache.load), file.policy)

    typer.echo(f"plan {read.digest}: {read.strategy.name}, {read.task.name}, {read.model.name}")
    typer.echo(
        f"privacy: {read.privacy.mode}" + (" (exact values leave)" if read.privacy.mode == "none" else "")
    )
    if found.refused:
        typer.echo(f"this site would refuse the plan ({found.refused}); nothing but that code would leave")
    typer.echo("plan, once, no number: that the site accepts it")
    for stage in found.stages:
        _tell(stage, found.statistics, tensors=tensors)
    typer.echo("\nwhen something fails: a code from a fixed list and 8 hex digits that number the local log")
    known = [stage for stage in found.stages if stage.numbers is not None]
    if out is not None:
        if not known:
            raise Stop(Exit.CONFIG, f"--out {out}: only a fingerprint's bytes are known before the run")
        out.write_bytes(known[0].reply)


def _tell(stage: Stage, statistics: Sequence[tuple[str, int]], *, tensors: bool) -> None:
    """One kind of answer: its words, tensors and, where they are known, numbers."""
    from client.preview import lines

    typer.echo(f"\n{stage.name}, at most {stage.times} times, {stage.size:,} bytes each")
    if stage.refused:
        typer.echo(f"  refused by this site: {stage.refused}: a code leaves instead")
    typer.echo(f"  words: {stage.words}")
    for group, of in groupby(stage.tensors, key=lambda tensor: tensor[0].partition("/")[0]):
        each = list(of)
        if len(each) > _FEW and not tensors:
            typer.echo(f"  {group}/…  {len(each)} tensors  {sum(size for *_, size in each):,} bytes")
            continue
        for name, shape, kind, size in each:
            typer.echo(f"  {name}  {'x'.join(map(str, shape)) or 'one number'}  {kind}  {size:,} bytes")
    if stage.name.startswith("evaluate"):
        typer.echo("  sums over patients: " + ", ".join(f"{name} ({count})" for name, count in statistics))
    if stage.numbers is not None:
        typer.echo(f"  SHA-256 of the reply: {stage.sha256}")
        typer.echo("  value of a cell: patients in it (intensity and foreground: 65536 for each patient)")
        for name, text in lines(stage.numbers):
            typer.echo(f"  {name}: {text}")


def _plan(path: Path) -> Plan:
    """The plan in a file or a run's folder.

    Raises:
        Stop: (`NO_RUN`) there is none; (`CONFIG`) it is not one.
    """
    from pydantic import ValidationError

    from conf.schema import Plan, complaint

    file = path / "plan.json" if path.is_dir() else path
    try:
        return Plan.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise Stop(Exit.CONFIG, f"{file} is not a plan: {complaint(error)}") from None
    except OSError as error:
        raise Stop(
            Exit.NO_RUN, f"{file} cannot be read ({error.strerror}); give a plan.json or a run"
        ) from None
