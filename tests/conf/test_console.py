"""How commands end: one line, a numbered code, a traceback only on request."""

from __future__ import annotations

import pytest
import typer

from conf.console import code, exit_codes, leave
from conf.exits import HELP, Exit, Stop


def app_that(error: BaseException | None) -> typer.Typer:
    app = typer.Typer(add_completion=False)

    @app.command()
    def work(count: int = 1) -> None:
        if error is not None:
            raise error

    return app


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (None, Exit.OK),
        (Stop(Exit.TOO_FEW_REPLIES, "two\nlines"), Exit.TOO_FEW_REPLIES),
        (Stop(Exit.CONFIG, "x is 1"), Exit.CONFIG),
        (ValueError("deep"), Exit.INTERNAL),
        (OSError("no"), Exit.INTERNAL),
        (KeyboardInterrupt(), Exit.INTERRUPTED),
        (typer.Exit(0), Exit.OK),
        (typer.Abort(), Exit.INTERRUPTED),
    ],
)
def test_every_end_has_its_code_and_one_line(
    error: BaseException | None, wanted: Exit, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(app_that(error), ["--count", "2"]) == wanted
    shown = capsys.readouterr().err
    assert shown.count("\n") == (0 if wanted == Exit.OK else 1)
    assert "Traceback" not in shown
    if wanted != Exit.OK:
        assert shown.startswith("error: ")


@pytest.mark.parametrize("where", ["before", "after", "environment"])
def test_a_traceback_on_request(
    where: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = {
        "before": ["--debug", "--count", "2"],
        "after": ["--count", "2", "--debug"],
        "environment": ["--count", "2"],
    }
    if where == "environment":
        monkeypatch.setenv("WARDROUND_DEBUG", "1")
    assert code(app_that(ValueError("deep")), argv[where]) == Exit.INTERNAL
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--nonsense"], ["--count", "many"], ["extra"]])
def test_a_command_line_that_is_not_understood(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert code(app_that(None), argv) == Exit.USAGE
    assert capsys.readouterr().err.count("\n") == 1


def test_no_argument_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert code(app_that(ValueError("not run")), []) == Exit.USAGE
    assert "--count" in capsys.readouterr().out


def test_leave_exits_with_the_code() -> None:
    with pytest.raises(SystemExit, match="12"):
        leave(app_that(Stop(Exit.NO_ROUNDS, "x")), ["--count", "2"])


def test_every_code_is_listed_with_its_help() -> None:
    assert [int(line.split()[0]) for line in exit_codes().splitlines()] == [exit.value for exit in Exit]
    assert all(text in exit_codes() for text in HELP.values())
