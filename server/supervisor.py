"""A few processes that are started again when they end, after a pause that grows."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

_FIRST_S, _LAST_S = 0.2, 5.0  # pauses before a process is started again
_STEADY_S = 10.0  # a process that ran so long is started again at once
_END_S = 3.0  # between SIGTERM and SIGKILL
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass
class _Kept:
    command: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = _FIRST_S
    due: float = 0.0


@dataclass
class Supervisor:
    """Keeps processes going as long as the context is open, and ends them with it: none outlives this one.

    Attributes:
        folder: where they run. logs: holds a log of each. environment: theirs, nothing is inherited.
    """

    folder: Path
    logs: Path
    environment: Mapping[str, str]
    _kept: dict[str, _Kept] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self.logs.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end([name for name in self._kept if name != "superlink"])
        # SuperLink last: it waits half a minute for a connection that is still open
        self.end(list(self._kept))
        # and the thread after them: what it has started would be killed with it
        self._ended.set()
        self._thread.join()

    def end(self, names: Sequence[str]) -> None:
        """SIGTERM, and SIGKILL for what does not mind it; they are not started again."""
        with self._lock:
            ending = [self._kept.pop(name) for name in names]
        running = [kept.process for kept in ending if kept.process is not None]
        for process in running:
            process.terminate()
        end = time.monotonic() + _END_S
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            process.kill()
            process.wait()

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a process, and start it again whenever it ends."""
        with self._lock:
            kept = self._kept[name] = _Kept(command)
            self._launch(name, kept)

    def pid(self, name: str) -> int:
        """The number of a running process."""
        process = self._kept[name].process
        if process is None:
            raise KeyError(name)
        return process.pid

    def kill(self, name: str) -> None:
        """SIGKILL; it will be started again."""
        os.kill(self.pid(name), signal.SIGKILL)

    def _launch(self, name: str, kept: _Kept) -> None:
        with (self.logs / f"{name}.log").open("ab") as log:
            kept.process = subprocess.Popen(  # noqa: S603  its own commands
                list(kept.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=dict(self.environment),
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        kept.started = time.monotonic()

    def _keep(self) -> None:
        while not self._ended.wait(0.05):
            with self._lock:
                for name, kept in self._kept.items():
                    now = time.monotonic()
                    if kept.process is None:
                        if now >= kept.due:
                            with suppress(OSError):  # no memory just now, say
                                kept.due = now + _LAST_S
                                self._launch(name, kept)
                    elif kept.process.poll() is not None:
                        kept.process = None
                        steady = now - kept.started > _STEADY_S
                        kept.pause = _FIRST_S if steady else min(2 * kept.pause, _LAST_S)
                        kept.due = now + kept.pause


def die_with_parent() -> None:
    """Ask the system to kill this process when the thread that made it is gone."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
