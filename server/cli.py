"""`wardround`: what a researcher and a coordinator type. Whatever is heavy is imported by the command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conf.console import exit_codes, leave

if TYPE_CHECKING:
    from conf.schema import Settings

app = typer.Typer(
    name="wardround",
    help="Federated training for hospitals: shared models, local patients.",
    epilog=f"\b\nExit codes:\n{exit_codes()}",
    add_completion=False,
    context_settings={"max_content_width": 110, "terminal_width": 110},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Federated training for hospitals: shared models, local patients."""


@app.command(
    add_help_option=False,
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "allow_interspersed_args": False,
    },
)
def simulate(context: typer.Context) -> None:
    """Train over simulated sites on this machine: Hydra overrides, --cfg job, -m, --help."""
    from conf.load import main as compose_and_run

    compose_and_run(context.args, _simulate)


def _simulate(settings: Settings) -> None:
    from server.cluster import absolute, cluster

    settings = absolute(settings)
    # Ray's start is mostly waiting: torch is imported meanwhile
    with cluster(settings.runtime, preload=("server.simulate",)):
        from server.simulate import simulate as run

        path = run(settings)
    from server.report.table import show

    show(path)


@app.command(
    add_help_option=False,
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "allow_interspersed_args": False,
    },
)
def fingerprint(context: typer.Context) -> None:
    """Describe the sites' data by histograms, and make a plan of them: overrides as for simulate."""
    from conf.load import main as compose_and_run

    compose_and_run(["run.experiment=fingerprint", *context.args], _fingerprint)


def _fingerprint(settings: Settings) -> None:
    from server.cluster import absolute
    from server.fingerprint import fingerprint as run
    from server.report.sites import show

    show(*run(absolute(settings)))


@app.command()
def resume(run: RunFolder) -> None:
    """Continue an interrupted run; it ends with the same bytes as an undisturbed one."""
    from server.report.table import show
    from server.simulate import resume as again

    show(again(run))


@app.command()
def report(
    run: RunFolder,
    metric: Annotated[str | None, typer.Option(help="what to show, such as dice_1 or loss")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print the table as Markdown")] = False,
    picture: Annotated[
        Path | None, typer.Option("--figure", metavar="PNG", help="also draw example slices and curves")
    ] = None,
) -> None:
    """Print the results of a run again."""
    from server.report.table import show
    from server.runfolder import RunFolder as Folder

    if Folder.asks_only(run):
        from server.fingerprint import reopen
        from server.report.sites import show as show_sites

        show_sites(reopen(run), run)
        return
    show(run, metric=metric, markdown=markdown)
    if picture is not None:
        from server.report.examples import examples
        from server.report.figure import figure

        figure(run, examples(run), picture)


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="a new folder  [default: demo/<UTC time>]")
    ] = None,
) -> None:
    """Generate three hospitals, train, compare and draw: a smoke test of a few minutes."""
    from server.demo import demo as run

    run(out)


def main() -> None:
    """Console script."""
    leave(app)
