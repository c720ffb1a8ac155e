"""Fixtures for all tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks import TASKS
from tests.toys import TOYS

TASKS._entries.update(TOYS)

DATA = Path(os.environ.get("WARDROUND_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make federation` opens only files that have such tests: the others bring half of all libraries."""
    if config.option.markexpr != "federation" or not collection_path.name.startswith("test_"):
        return None
    return (collection_path.is_file() and "mark.federation" not in collection_path.read_text()) or None


@pytest.fixture(scope="session")
def real() -> Callable[[str], Path]:
    """A real data set by name; missing, it is a loud skip here and a failure in CI."""

    def find(name: str) -> Path:
        if (DATA / name).is_dir():
            return DATA / name
        message = f"data set {name} is not below {DATA}; set WARDROUND_TEST_DATA"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)

    return find


def _in_memory() -> Iterator[Path]:
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="wardround-test-", dir=shm if os.access(shm, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def ram() -> Iterator[Path]:
    """A folder in memory, where the system has one: SIGKILL does not lose what a disk would have kept."""
    yield from _in_memory()


@pytest.fixture(scope="module")
def module_ram() -> Iterator[Path]:
    """The same for all tests of a file. (Its name is short: a Unix socket's path must be.)"""
    yield from _in_memory()
