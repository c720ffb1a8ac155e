"""Flower's private parts stand behind one module a side, made for one version."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
ADAPTERS = {"client/fleet.py", "server/control.py", "server/link.py"}
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}


def imported(path: Path) -> set[str]:
    """Modules that a file imports from flwr, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.partition(".")[0] == "flwr"}


def test_only_the_adapters_import_private_parts() -> None:
    private = {
        path.relative_to(PROJECT).as_posix()
        for package in ("conf", "tasks", "strategies", "client", "server", "deploy")
        for path in (PROJECT / package).rglob("*.py")
        if imported(path) - PUBLIC
    }
    assert private == ADAPTERS


@pytest.mark.parametrize("module", ["client.fleet", "server.control", "server.link"])
def test_another_version_is_refused(module: str) -> None:
    script = f"""
import importlib.metadata as metadata
true = metadata.version
metadata.version = lambda name: "1.42.0" if name == "flwr" else true(name)
try:
    import {module}
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    wanted = importlib.metadata.version("flwr")
    assert done.stdout.strip() == (f"flwr is 1.42.0; this adapter was read for {wanted}: install that one")
