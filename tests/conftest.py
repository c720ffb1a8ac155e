"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks import TASKS
from tests.toys import TOYS

TASKS._entries.update(TOYS)


def shared_data(name: str) -> Path:
    """A folder of real data; its absence is a loud skip here, a failure in CI."""
    root = Path(os.environ.get("WARDROUND_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / name).is_dir():
        message = f"real data {name} is not in {root}; set WARDROUND_TEST_DATA to the folder that holds it"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return root / name
