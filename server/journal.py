"""Who answered what: one line an event, so that an interrupted round repeats as it happened.

Without it, a site that failed before the crash and has recovered since would answer in the repetition,
and the resumed run would end with other bytes than an undisturbed one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from conf.files import no_space
from strategies.protocol import CODES, Failure

Key = tuple[int, int, str]


class Journal:
    """`journal.jsonl`: failures as they happen, and the end of each ask."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failed: dict[Key, dict[str, Failure]] = {}
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):  # a crash tore the last line
            path.write_text("".join(whole))
        for line in whole:
            entry = json.loads(line)
            if entry.get("given_up"):
                self._forget(entry["round"])
            elif entry.get("code") in CODES:
                self._failures(entry)[entry["site"]] = Failure(entry["code"])

    def _failures(self, entry: dict[str, object]) -> dict[str, Failure]:
        return self._failed.setdefault(
            (int(str(entry["round"])), int(str(entry["attempt"])), str(entry["stage"])), {}
        )

    def failed(self, round: int, attempt: int, stage: str) -> dict[str, Failure]:
        """Failures that an earlier, interrupted go at this ask has seen."""
        return dict(self._failed.get((round, attempt, stage), {}))

    def failure(self, round: int, attempt: int, stage: str, site: str, failure: Failure) -> None:
        """Write a failure down, durably, before the ask goes on."""
        entry = {"round": round, "attempt": attempt, "stage": stage, "site": site, "code": failure.code}
        self._append(entry | {"incident": failure.incident})
        self._failures(entry)[site] = failure

    def answered(self, round: int, attempt: int, stage: str, sites: list[str]) -> None:
        """Write down the end of an ask."""
        self._append({"round": round, "attempt": attempt, "stage": stage, "answered": sites})

    def given_up(self, round: int) -> None:
        """Write down that a round was given up: whoever resumes the run has seen to its sites."""
        self._append({"round": round, "given_up": True})
        self._forget(round)

    def _forget(self, round: int) -> None:
        self._failed = {key: failed for key, failed in self._failed.items() if key[0] != round}

    def _append(self, entry: dict[str, object]) -> None:
        with no_space(self._path, "wardround resume"), self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
