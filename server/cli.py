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
_HYDRA = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}
Folder = Annotated[Path, typer.Argument(help="the coordinator's: keys/, sites.json, runs/")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Federated training for hospitals: shared models, local patients."""


@app.command(add_help_option=False, context_settings=_HYDRA)
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
    from server.runfolder import deployed

    if deployed(run):
        from server.house import of_run

        house, opened = of_run(run)
        typer.echo(f"{run} {house.resume(opened)}")
        return
    from server.report.table import show
    from server.simulate import resume as again

    show(again(run))


@app.command()
def predict(
    run: RunFolder,
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="a NIfTI file, picture, or folder")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="a new folder")],
) -> None:
    """Apply a run's model to images: masks as NIfTI or PNG, scores as CSV."""
    from server.predict import predict as apply

    typer.echo(f"{apply(run, source, out)} predicted, in {out}")


@app.command()
def export(
    run: RunFolder,
    kind: Annotated[str, typer.Option("--format", help="pt2 (a program of torch.export) or safetensors")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="a new file, with the format's suffix")],
) -> None:
    """Write a run's model for use elsewhere, and print how it is to be fed."""
    from server.export import export as write

    typer.echo(write(run, kind, out), nl=False)


@app.command()
def evaluate(
    run: RunFolder,
    data: Annotated[
        list[str] | None, typer.Argument(help="another set: data.root=FOLDER, and what else differs")
    ] = None,
    images: Annotated[
        int, typer.Option(min=50, max=100_000, help="of a generator: how many are made")
    ] = 1000,
) -> None:
    """Score a run on another set of cases; without one, judge a generator by what its images are for."""
    if data:
        from server.external import evaluate as score
        from server.external import show as show_scored

        show_scored(score(run, data))
        return
    from server.synthesis import evaluate as judge
    from server.synthesis import show as show_judged

    show_judged(judge(run, images))


@app.command()
def calibrate(run: RunFolder) -> None:
    """Fit the temperature of a simulated run's probabilities on the sites' validation patients."""
    from server.calibrate import calibrate as fit
    from server.calibrate import show as show_temperature

    show_temperature(*fit(run))


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
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="folds, repeats, other methods")],
    metric: Annotated[str | None, typer.Option(help="what is compared, such as auroc or dice_1")] = None,
    site: Annotated[str | None, typer.Option(help="count this one's patients only")] = None,
    plain: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Summarise runs over the same patients: means over folds, paired intervals of differences."""
    from server.compare.summary import compare as summarise
    from server.compare.summary import show

    made = summarise(runs, metric, site)
    if plain:
        import json

        typer.echo(json.dumps(made.plain(), allow_nan=False))
        return
    show(made)


@app.command()
def audit(
    run: RunFolder,
    canaries: Annotated[
        int, typer.Option(min=10, max=100_000, help="m, each there with probability 1/2")
    ] = 1000,
    references: Annotated[
        int, typer.Option(min=0, max=64, help="models to train for membership, an even number")
    ] = 2,
    rounds: Annotated[int, typer.Option(min=0, help="replay so many alone; 0 = all of the run")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="of what is drawn but for the noise")] = 0,
) -> None:
    """Attack a simulated run: what canaries prove of its epsilon, and who can be told to be a member."""
    from conf.exits import Exit, Stop
    from server.audit.command import audit as attacked
    from server.audit.page import save, show

    found = attacked(run, canaries=canaries, references=references, seed=seed, rounds=rounds)
    save(found, run)
    show(found, run)
    if found["canaries"] and found["canaries"]["refuted"]:
        raise Stop(Exit.CLAIM_REFUTED, f"{run}: {found['canaries']['verdict']}")


@app.command()
def serve(
    folder: Folder,
    port: Annotated[int, typer.Option(min=1, max=65535, help="of SuperLink, on 127.0.0.1")] = 9000,
) -> None:
    """Run SuperLink and the coordinator from a folder of keys, until told to stop."""
    from server.house import House

    House(folder.absolute(), port).serve(typer.echo)


@app.command(add_help_option=False, context_settings=_HYDRA)
def submit(context: typer.Context) -> None:
    """Freeze a plan and run it at the sites: FOLDER as it is served, then as `simulate`."""
    from conf.exits import Exit, Stop

    folder, *overrides = context.args or [""]
    if not folder or folder.startswith("-") or "=" in folder:
        raise Stop(
            Exit.USAGE, "submit needs the coordinator's folder first: wardround submit FOLDER [overrides]"
        )
    from conf.load import main as compose_and_run
    from server.house import House

    house = House.served(Path(folder).absolute())
    # whatever the sites have: their data are set in their own site.yaml
    compose_and_run(["data.root=.", *overrides], lambda settings: typer.echo(house.submit(settings).path))


@app.command()
def status(folder: Folder) -> None:
    """Show a served folder: sites that are online, runs and how far they are."""
    from server.house import House

    typer.echo("\n".join(House.served(folder.absolute()).status()))


@app.command()
def logs(
    run: RunFolder, lines: Annotated[int, typer.Option(min=1, help="of the end that are shown")] = 50
) -> None:
    """Print the end of a deployed run's log."""
    from server.runfolder import RunFolder as Folder

    path = Folder.open(run).path / "log.txt"
    text = path.read_text() if path.exists() else "no log: the run was not begun by a coordinator yet"
    typer.echo("\n".join(text.splitlines()[-lines:]))


@app.command()
def stop(run: RunFolder) -> None:
    """Stop a deployed run, here and at its sites; `resume` goes on with it."""
    from server.house import of_run

    house, opened = of_run(run)
    typer.echo(house.stop(opened))


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
