"""A disk that is full while a checkpoint is written: a number, nothing lost, a resume to the same bytes."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from conf.exits import Exit, Stop
from tests.toys import Toys, toy_cases, toy_plan

pytestmark = pytest.mark.federation


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        if os.environ.get("CI") == "true":
            pytest.fail("cannot mount a tmpfs; run the tests as root")
        pytest.skip("needs root to mount a small disk: sudo make federation")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def filling(disk: Path, event: str, round: int) -> Callable[[str, int], None]:
    """A watcher that leaves no free byte once `event` of `round` has happened."""

    def watch(happened: str, r: int) -> None:
        if (happened, r) == (event, round) and not (disk / "ballast").exists():
            with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"0" * 4096)

    return watch


@pytest.mark.parametrize("event", ["ask", "fold"])
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "median"])
def test_full_disk(strategy: str, event: str, small_disk: Path, ram: Path) -> None:
    undisturbed = Toys(ram, toy_plan(strategy), toy_cases())
    undisturbed.train()
    made = replace(undisturbed, folder=small_disk / "run")
    with pytest.raises(Stop, match=r"disk full|abandoned 3 times: .*disk: site_0, site_1, site_2") as stop:
        made.train(filling(small_disk, event, 2))
    assert stop.value.exit in (Exit.DISK_FULL, Exit.TOO_FEW_REPLIES)
    assert sorted(path.name for path in (made.folder / "checkpoints").iterdir()) == [
        "round-0000",
        "round-0001",
    ]
    (small_disk / "ballast").unlink()
    made.train()
    assert made.ending() == undisturbed.ending()
