"""`wardround-site ingest`: from the hospital's files to cached cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from conf.exits import Exit, Stop

if TYPE_CHECKING:
    from tasks.data.ingest import Progress as Told
    from tasks.data.ingest import Refused

_SHOWN = 20  # refused cases listed; the counts cover all


def ingest(
    folder: Annotated[
        Path, typer.Argument(help="data root: DICOM series with SEG, or images with masks")
    ] = Path(),
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="where cases are kept  [default: under ~/.cache/wardround]"),
    ] = None,
    manifest: Annotated[str | None, typer.Option(help="CSV below the data root with a case per row")] = None,
    image: Annotated[str, typer.Option(help="column: path of the image")] = "image",
    label: Annotated[str, typer.Option("--label", "--mask", help="column: path of the mask")] = "label",
    patient: Annotated[str | None, typer.Option(help="column: patient; none: one file, one patient")] = None,
    site: Annotated[str | None, typer.Option(help="column: hospital")] = None,
    split: Annotated[str | None, typer.Option(help="column: train, val or test")] = None,
    label_map: Annotated[
        str | None, typer.Option(help="file values to classes, 0:0,255:1, or nonzero")
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="32 bytes that name patients  [default: state/patient.key beside the cache, made once]"
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="threads that read")] = 1,
) -> None:
    """Bring the cache up to date with the files: what is new is read, what is faulty refused and listed."""
    from conf.schema import Columns
    from tasks.data.cache import Cache, default_cache
    from tasks.data.ingest import NothingKept, patient_key
    from tasks.data.ingest import ingest as bring_up

    values = parse_label_map(label_map)
    if not folder.is_dir():  # before a key is made for it
        raise Stop(Exit.NO_DATA_ROOT, f"data root {folder} is not a folder")
    place = cache or default_cache(folder)
    key = key_file or place.parent / "state" / "patient.key"
    screen = Console(stderr=True)
    if not key.exists():
        note = f"making the key that names patients: {key} (keep it: another key gives other names)"
        screen.print(note, highlight=False, markup=False, soft_wrap=True)
    try:
        with _bar(screen) as progress:
            report = bring_up(
                folder,
                Cache(place),
                manifest=manifest,
                columns=Columns(image=image, label=label, patient=patient, site=site, split=split),
                label_map=values,
                key=patient_key(key),
                workers=workers,
                progress=progress,
            )
    except NothingKept as stop:
        _show(stop.report.refused)
        raise
    _show(report.refused)
    count = len(report.refused)
    typer.echo(f"{report.kept} cases in {place} ({report.read} read now), {count} refused")
    raise typer.Exit(report.exit.value)


def parse_label_map(text: str | None) -> dict[int, int] | Literal["nonzero"] | None:
    """`0:0,255:1` as a mapping; `nonzero` and None as they are.

    Raises:
        Stop: (`CONFIG`) neither.
    """
    if text is None:
        return None
    if text == "nonzero":
        return "nonzero"
    values: dict[int, int] = {}
    for part in text.split(","):
        try:
            value, target = (int(number) for number in part.split(":"))
            if value in values:
                raise ValueError
        except ValueError:
            wanted = "nonzero, or pairs like 0:0,255:1 with each file value once"
            raise Stop(Exit.CONFIG, f"--label-map has {part!r}; accepted is {wanted}") from None
        values[value] = target
    return values


@contextmanager
def _bar(screen: Console) -> Iterator[Told | None]:
    """A progress bar where somebody watches."""
    if not screen.is_terminal:
        yield None
        return
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(refused: Sequence[Refused]) -> None:
    """The refused cases with their reasons: paths are shown here, at the site, and nowhere else."""
    if not refused:
        return
    screen = Console()
    if not screen.is_terminal:
        screen.width = 200  # into a file or pipe, whole paths
    table = Table(box=None, header_style="bold")
    for title in ("refused", "reason", "detail"):
        table.add_column(title, overflow="fold")
    for case in refused[:_SHOWN]:
        table.add_row(*(text.replace("[", r"\[") for text in (case.source, case.reason, case.detail)))
    screen.print(table)
    if len(refused) > _SHOWN:
        screen.print(f"… and {len(refused) - _SHOWN} more")
