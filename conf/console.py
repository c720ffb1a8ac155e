"""How a command ends: one line on stderr and a numbered code. A traceback only with `--debug`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import typer

from conf.exits import HELP, Exit, Stop, printable

#: set to 1, it is `--debug` for whatever runs without a command line of its own
DEBUG = "WARDROUND_DEBUG"


def leave(app: typer.Typer, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit with its code.

    Args:
        app: the commands.
        argv: arguments without the program's name; none: those of this process.
    """
    sys.exit(code(app, sys.argv[1:] if argv is None else argv))


def code(app: typer.Typer, argv: Sequence[str]) -> int:
    """Run a command line; what goes wrong becomes one line on stderr.

    Args:
        app: the commands. `--debug`, wherever it stands, is taken out before it sees the rest.
        argv: arguments without the program's name.

    Returns:
        The numbered exit code.
    """
    debug = "--debug" in argv or os.environ.get(DEBUG) == "1"
    arguments = [argument for argument in argv if argument != "--debug"]
    try:
        ended = int(app(args=arguments or ["--help"], standalone_mode=False) or 0)
        if ended == Exit.INTERRUPTED:  # what typer makes of Ctrl-C
            return _say(Exit.INTERRUPTED, HELP[Exit.INTERRUPTED])
        return ended if arguments else Exit.USAGE.value
    except Stop as stop:
        if debug:
            traceback.print_exc()
        return _say(stop.exit, str(stop))
    except (KeyboardInterrupt, typer.Abort):
        return _say(Exit.INTERRUPTED, HELP[Exit.INTERRUPTED])
    except Exception as error:  # noqa: BLE001  the last boundary: a user sees a line, never a stack
        # typer's errors about the command line; their class is not the same in all its versions
        if hasattr(error, "format_message"):
            return _say(Exit.USAGE, str(error.format_message()))
        if debug:
            traceback.print_exc()
        return _say(Exit.INTERNAL, f"{type(error).__name__}: {error} ({HELP[Exit.INTERNAL]})")


def ended(main: Callable[[], object]) -> NoReturn:
    """Run a process that has its own arguments, and exit with its code; a `Stop` becomes one line."""
    try:
        main()
    except Stop as stop:
        if os.environ.get(DEBUG) == "1":
            traceback.print_exc()
        sys.exit(_say(stop.exit, str(stop)))
    sys.exit(0)


def exit_codes() -> str:
    """Every code with its line of help."""
    return "\n".join(f"{exit.value:>4}  {text}" for exit, text in HELP.items())


def _say(exit: Exit, message: str) -> int:
    sys.stderr.write(f"error: {printable(' '.join(message.split()))}\n")
    return exit.value
