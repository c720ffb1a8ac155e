"""What Flower has lost or ended behind the coordinator's back, set right.

A task is lost with its token: the coordinator died before the token was on disk, or was away longer than
the task's lease. Then the same run directory gets a new task, and goes on where it was: what sites have
answered they answer again. A run that was stopped at SuperLink is not lost, but its sites still work.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from conf.exits import Exit, Stop
from server.control import Control, Entry, bundle
from server.runfolder import RunFolder

CANCEL = "cancel"
"""Setting of a Flower run that only tells sites to end the work of the run it names."""

log = logging.getLogger(__name__)


def settle(superlink: Control, runs: Path) -> None:
    """Set right every run that has a directory. To be called by a coordinator that holds no task."""
    by: dict[str, list[Entry]] = {}
    for entry in superlink.runs():
        if not entry.cancels:
            by.setdefault(entry.name, []).append(entry)
    for name, entries in by.items():
        try:
            folder = RunFolder.named(runs, name)
        except Stop:
            continue
        _settle(superlink, folder, entries)


def _settle(superlink: Control, folder: RunFolder, entries: Sequence[Entry]) -> None:
    name, last = folder.path.name, entries[-1]
    active = [entry for entry in entries if entry.status != "finished"]
    # nobody holds the tasks of these: there is one coordinator, and it has no token
    claimed = [entry for entry in active if entry.status != "pending"]
    if not folder.said and len(active) == len(claimed):
        if active or (last.sub_status == "failed" and last.details not in Exit.__members__):
            log.warning("run %s lost its task; it goes on with another", name)
            superlink.start(bundle(), {"run": name})
        elif last.sub_status == "stopped":
            log.info("run %s was stopped; its sites are told", name)
            superlink.start(bundle(), {"run": name, CANCEL: "yes"})
            folder.end("stopped")
        else:
            folder.end(last.details or last.sub_status)
    for entry in claimed:
        superlink.stop(entry.id)
