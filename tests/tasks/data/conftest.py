from collections.abc import Callable
from pathlib import Path

import pytest

from conf.schema import Columns
from tasks.data.cache import Cache
from tasks.data.ingest import Report, ingest
from tasks.data.source import LabelMap


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[Report, Cache]]:
    """Ingest a folder into this test's cache; a fresh `Cache` is opened each time."""

    def go(
        root: Path,
        manifest: str | None = None,
        columns: Columns = Columns(),  # noqa: B008  frozen
        label_map: LabelMap = None,
        key: bytes = b"k" * 32,
        workers: int = 1,
    ) -> tuple[Report, Cache]:
        folder = tmp_path / "cache"
        report = ingest(
            root,
            Cache(folder),
            manifest=manifest,
            columns=columns,
            label_map=label_map,
            key=key,
            workers=workers,
        )
        return report, Cache(folder)

    return go
