"""`wardround-site ingest`: from the hospital's files to cached cases."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from client.places import Places, SiteOption
from client.places import site_file as find_site
from conf.exits import Exit, Stop, printable

if TYPE_CHECKING:
    from client.pacs.settings import Pacs
    from client.sitefile import SiteData
    from tasks.data.ingest import Progress as Told
    from tasks.data.ingest import Refused, Report

_SHOWN = 20  # refused cases listed; the counts cover all


def ingest(
    folder: Annotated[
        Path | None, typer.Argument(help="data root: DICOM series with SEG, or images with masks")
    ] = None,
    site_file: SiteOption = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="where cases are kept  [default: under ~/.cache/wardround]"),
    ] = None,
    manifest: Annotated[str | None, typer.Option(help="CSV below the data root with a case per row")] = None,
    image: Annotated[str, typer.Option(help="column: path of the image")] = "image",
    label: Annotated[
        str, typer.Option("--label", "--mask", help="column: path of the mask, or the class")
    ] = "label",
    patient: Annotated[str | None, typer.Option(help="column: patient; none: one file, one patient")] = None,
    site: Annotated[str | None, typer.Option(help="column: hospital")] = None,
    split: Annotated[str | None, typer.Option(help="column: train, val or test")] = None,
    no_image: Annotated[bool, typer.Option("--no-image", help="a case is a row and nothing else")] = False,
    labels: Annotated[str, typer.Option(help="columns: further classes or values to predict, a,b")] = "",
    table: Annotated[str, typer.Option(help="clinical columns, age=number,sex=male|female")] = "",
    label_map: Annotated[
        str | None, typer.Option(help="file values and names to classes, 0:0,255:1,lung:2, or nonzero")
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="32 bytes that name patients  [default: state/patient.key beside the cache, made once]"
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="cases read at a time; 0: one per core")] = 0,
    pacs: Annotated[bool, typer.Option("--pacs", help="pull from site.yaml's archive first")] = False,
    pacs_from: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="pull from this one: https://… or TITLE@host:port")
    ] = None,
    query: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="what to pull, as Modality=CT; repeated")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list what each DICOM file and volume would give; keep nothing")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="with --dry-run: a JSON object a line")] = False,
) -> None:
    """Bring the cache up to date with the files: what is new is read, what is faulty refused and listed.

    In a site's folder, or with --site-file, everything comes from site.yaml.
    """
    from conf.schema import Columns

    if as_json and not dry_run:
        raise Stop(Exit.USAGE, "--json lists a dry run; give --dry-run with it")
    own = {"--cache": cache, "--manifest": manifest, "--label-map": label_map, "--key-file": key_file}
    chosen = None if folder is not None and site_file is None else find_site(site_file)
    if chosen is not None:
        given = [name for name, value in own.items() if value is not None]
        if given:
            raise Stop(Exit.USAGE, f"{', '.join(given)}: with a site's file this stands in its section data")
        root = folder or chosen.data.root or (chosen.pacs.folder if chosen.pacs else None)
        if root is None:
            raise Stop(Exit.CONFIG, f"{site_file or 'site.yaml'} has no data.root; write the data root there")
        pulled = _pull(chosen.pacs, root, pacs_from, query) if pacs or pacs_from else Exit.OK
        if dry_run:
            _rehearse(root, as_json)
            return
        _run(root, chosen.places, chosen.data, pulled, one_site=True)
        return
    if pacs:
        text = "--pacs needs a site's file with a section pacs (wardround-site init), or --pacs-from"
        raise Stop(Exit.USAGE, text)
    from client.sitefile import SiteData

    root = folder or Path()
    if not root.is_dir():  # before a key is made for it
        raise Stop(Exit.NO_DATA_ROOT, f"data root {root} is not a folder")
    pulled = _pull(None, root, pacs_from, query) if pacs_from else Exit.OK
    if dry_run:
        _rehearse(root, as_json)
        return
    from tasks.data.cache import default_cache

    columns = Columns(
        image=None if no_image else image,
        label=label,
        patient=patient,
        site=site,
        split=split,
        labels=tuple(filter(None, labels.split(","))),
        table=parse_table(table),
    )
    data = SiteData(manifest=manifest, columns=columns, label_map=parse_label_map(label_map), workers=workers)
    _run(root, Places.beside(cache or default_cache(root), key_file), data, pulled)


def _rehearse(root: Path, as_json: bool) -> None:
    """Print the lines of a dry run: paths are shown here, at the site, and nowhere else."""
    import json

    from tasks.data.dryrun import dry_run, in_words

    if not root.is_dir():
        raise Stop(Exit.NO_DATA_ROOT, f"data root {root} is not a folder")
    for line in dry_run(root):
        typer.echo(json.dumps(line) if as_json else in_words(line))


def _run(
    root: Path, places: Places, data: SiteData, pulled: Exit = Exit.OK, *, one_site: bool = False
) -> None:
    from tasks.data.cache import Cache
    from tasks.data.ingest import NothingKept
    from tasks.data.ingest import ingest as bring_up
    from tasks.data.patients import Barred, patient_key
    from tasks.data.released import Released

    if not root.is_dir():
        raise Stop(Exit.NO_DATA_ROOT, f"data root {root} is not a folder")
    if not places.key.exists():
        note = f"making the key that names patients: {places.key} (keep it: another key gives other names)"
        typer.echo(note, err=True)
    try:
        with _bar() as progress:
            report = bring_up(
                root,
                Cache(places.cache),
                manifest=data.manifest,
                columns=data.columns,
                label_map=data.names,
                key=patient_key(places.key),
                workers=data.hands,
                progress=progress,
                barred=Barred.read(places.barred),
                released=Released(places.released),
                one_site=one_site,
            )
    except NothingKept as stop:
        _show(stop.report.refused)
        _write(stop.report, root, places, data)
        raise
    _show(report.refused)
    if report.changed or not places.report.with_suffix(".html").exists():
        _write(report, root, places, data)
    typer.echo(f"report: {places.report}.txt, .json, and .html with pictures, for this site's eyes only")
    for name, cases in report.unmapped.items():
        typer.echo(printable(f"label not mapped: {name} in {cases} cases"))
    for note, cases in report.notes.items():
        typer.echo(printable(f"{note} ({cases} cases)"))
    count = len(report.refused)
    typer.echo(f"{report.kept} cases in {places.cache} ({report.read} read now), {count} refused")
    raise typer.Exit((pulled or report.exit).value)


def _pull(section: Pacs | None, root: Path, given: str | None, query: list[str] | None) -> Exit:
    """Bring what is new in the archive into the data root.

    Raises:
        Stop: (`CONFIG`) no section pacs, or its folder is not in the data root; and what `pull` raises.
    """
    from client.pacs.pull import pull
    from client.pacs.settings import chosen

    source = chosen(section, given, query, root)
    if not source.folder.resolve().is_relative_to(root.resolve()):
        text = f"pacs.folder {source.folder} is not in data.root {root}, so an ingest would not see it"
        raise Stop(Exit.CONFIG, f"{text}; choose a folder below the data root")
    with _bar("pulling") as progress:
        pulled = pull(source, source.folder, progress)
    counts = f"{pulled.fetched} fetched, {pulled.here} here before, {len(pulled.missing)} not to be had"
    typer.echo(f"{pulled.found} instances found: {counts}")
    return pulled.exit


def _write(report: Report, root: Path, places: Places, data: SiteData) -> None:
    from client.ingest_page import write_report
    from tasks.data.cache import Cache
    from tasks.data.summary import summarise

    cache = Cache(places.cache)
    names = {label.value: label.name for label in data.labels.dictionary}
    try:
        with cache.changing():  # a patient who is forgotten meanwhile must not come back in the report
            records = cache.index.records if report.kept else report.records
            summary = summarise(records, report.read)
            write_report(places.report, root.resolve().name, summary, records, cache, names)
    except Stop as stop:
        if stop.exit is not Exit.SITE_BUSY:  # then the next ingest writes one
            raise


def parse_table(text: str) -> dict[str, Literal["number"] | tuple[str, ...]]:
    """`age=number,sex=male|female` as the types of clinical columns.

    Raises:
        Stop: (`CONFIG`) a part is no such pair.
    """
    kinds: dict[str, Literal["number"] | tuple[str, ...]] = {}
    for part in filter(None, text.split(",")):
        column, found, kind = part.partition("=")
        if not (column and found and kind):
            raise Stop(Exit.CONFIG, f"--table has {part!r}; accepted is column=number or column=one|other")
        kinds[column] = "number" if kind == "number" else tuple(kind.split("|"))
    return kinds


def parse_label_map(text: str | None) -> dict[int | str, int] | Literal["nonzero"] | None:
    """`0:0,255:1,lung:2` as a mapping; `nonzero` and None as they are.

    Raises:
        Stop: (`CONFIG`) neither.
    """
    if text is None:
        return None
    if text == "nonzero":
        return "nonzero"
    values: dict[int | str, int] = {}
    for part in text.split(","):
        name, _, target = (p.strip() for p in part.rpartition(":"))
        value = int(name) if name.lstrip("-").isdecimal() else name
        if value == "" or value in values or not target.isdecimal():
            wanted = "nonzero, or pairs like 0:0,255:1,lung:2 with each file value or name once"
            raise Stop(Exit.CONFIG, f"--label-map has {part!r}; accepted is {wanted}")
        values[value] = int(target)
    return values


@contextmanager
def _bar(what: str = "reading") -> Iterator[Told | None]:
    """A progress bar where somebody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(refused: Sequence[Refused]) -> None:
    """The refused cases with their reasons: paths are shown here, at the site, and nowhere else."""
    if not refused:
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    screen = Console()
    if not screen.is_terminal:
        screen.width = 200  # into a file or pipe, whole paths
    table = Table(box=None, header_style="bold")
    for title in ("refused", "reason", "detail"):
        table.add_column(title, overflow="fold")
    for case in refused[:_SHOWN]:
        table.add_row(*(Text(printable(text)) for text in (case.source, case.reason, case.detail)))
    screen.print(table)
    if len(refused) > _SHOWN:
        screen.print(f"… and {len(refused) - _SHOWN} more")
