"""The house as a whole: who imports whom, what an import costs, how much there is to read."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from conf.exits import HELP, Exit

PROJECT = Path(__file__).parents[1]
PACKAGES = ("conf", "tasks", "strategies", "client", "server")
SOURCES = sorted(path for package in PACKAGES for path in (PROJECT / package).rglob("*.py"))
#: to be read in an evening: protocol, exact sums, round loop, site gate, local training, base types
CORE = (
    "conf/schema.py",
    "conf/dictionary.py",
    "conf/section.py",
    "conf/table.py",
    "conf/exits.py",
    "tasks/base.py",
    "tasks/metrics.py",
    "strategies/failures.py",
    "strategies/protocol.py",
    "strategies/exact.py",
    "strategies/base.py",
    "conf/files.py",
    "server/rounds.py",
    "server/cohort.py",
    "server/checkpoint.py",
    "server/journal.py",
    "client/site.py",
    "client/archive.py",
    "client/train.py",
    "client/deck.py",
    "client/step.py",
    "client/state.py",
    "client/policy.py",
    "client/errors.py",
)
LIGHT = (
    "conf",
    "conf.schema",
    "conf.exits",
    "conf.table",
    "conf.console",
    "conf.load",
    "tasks",
    "tasks.data",
    "tasks.models",
    "tasks.losses",
    "strategies",
    "client",
    "client.cli",
    "server",
    "server.report",
    "server.cli",
)


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def name(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def test_import_contracts_hold() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_light_modules_load_nothing_heavy(tmp_path: Path) -> None:
    script = "\n".join(
        ["import sys", "heavy = {'torch', 'monai', 'scipy', 'matplotlib', 'highdicom'}"]
        + [f"import {module}; assert heavy.isdisjoint(sys.modules), '{module}'" for module in LIGHT]
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_file_is_long(path: Path) -> None:
    assert lines(path) <= 400


def test_the_core_can_be_read_in_an_evening() -> None:
    assert sum(lines(PROJECT / part) for part in CORE) <= 4000


def test_nothing_is_called_helper() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert [
        name(path) for path in SOURCES if vague & {path.stem, *path.relative_to(PROJECT).parts[:-1]}
    ] == []


def test_every_package_says_what_it_is() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert not text.strip() or ast.get_docstring(ast.parse(text)), name(path)


def test_every_exit_code_has_its_help_and_number() -> None:
    assert set(HELP) == set(Exit)
    assert len({exit.value for exit in Exit}) == len(Exit.__members__)
    assert all(0 <= exit.value < 256 for exit in Exit)
    assert all(text == text.strip() and "\n" not in text for text in HELP.values())
