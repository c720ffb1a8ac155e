"""`wardround-site`: what a hospital's engineer types. Each command is a function in `client/commands/`."""

from __future__ import annotations

from typing import Annotated

import typer

from client.commands.audit import audit
from client.commands.doctor import doctor
from client.commands.export_deid import export_deid
from client.commands.forget import forget
from client.commands.ingest import ingest
from client.commands.init import init
from client.commands.ledger import ledger
from client.commands.preview import preview
from client.commands.release import release
from conf.console import exit_codes, leave

app = typer.Typer(
    name="wardround-site",
    help="One hospital's side of a federation.",
    epilog=f"\b\nExit codes:\n{exit_codes()}",
    add_completion=False,
    context_settings={"max_content_width": 110, "terminal_width": 110},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """One hospital's side of a federation."""


# whatever is heavy is imported inside the command, so that help stays fast
app.command()(init)
app.command()(ingest)
app.command()(doctor)
app.command()(forget)
app.command()(audit)
app.add_typer(ledger, name="ledger")
app.command()(release)
app.command()(preview)
app.command("export-deid")(export_deid)


def main() -> None:
    """Console script."""
    leave(app)
