"""Files from outside are parsed in a worker process under a memory and a time limit.

A parser that meets hostile bytes may eat memory, hang or crash: then its worker is replaced and the file is
refused. What comes back is JSON and plain arrays, bounded and checked on arrival, never pickle: what a worker
says can be a lie about its file, and does no more. The worker has its parent's rights to files and network: a
decoder that executes a file's bytes is held by the site's own confinement (container, systemd), not by this.

The worker starts once (0.3 s) and is used for thousands of files. A job is a function of `tasks.data` that
takes a path and plain keyword values and yields (facts, array or None) pairs.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import math
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from conf.exits import Exit, Stop
from tasks.data.source import Array, Faulty, Reason

Answer = tuple[dict[str, Any], Array | None]
Job = Callable[..., Iterator[Answer]]

_DTYPES = frozenset(
    ("bool", *(f"{s}int{n}" for s in ("", "u") for n in (8, 16, 32, 64)), "float32", "float64")
)
_HEAD = struct.Struct("<IQ")  # bytes of JSON, bytes of array
_JSON_BYTES = 16 << 20  # beyond those that a large file may give reason to
_PER_FILE_BYTE = 6  # a large file may need its bytes, a frame, and what a decoder holds beside them
_DETAIL = 1000  # characters that a refusal may quote
_CAP = 16 << 30
_SLOWEST = 1 << 20  # bytes of file per second, beyond limit_s
_START_S = 60.0

#: the worker finds this package where its parent did
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tasks.data.inmate import serve; serve(int(sys.argv[2]))"
)


class Guard:
    """Runs jobs in workers, as many as there are callers at one time.

    Args:
        limit_bytes: memory a job may take beyond six times its file's size. limit_s: time, likewise beyond
            one second for each MiB of its file.
    """

    def __init__(self, limit_bytes: int = 256 << 20, limit_s: float = 30.0) -> None:
        self.limit_bytes, self.limit_s = limit_bytes, limit_s
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False

    def call(self, job: Job, path: Path, *, room: int = 0, **given: object) -> Answer:
        """The one answer of a job.

        Raises:
            Faulty: as `stream`; or it gave none.
        """
        answers = list(self.stream(job, path, most=1, room=room, **given))
        if not answers:
            raise Faulty(Reason.UNREADABLE, f"{path.name}: its parser gave no answer")
        return answers[0]

    def stream(self, job: Job, path: Path, *, most: int, room: int = 0, **given: object) -> Iterator[Answer]:
        """The answers of a job, each as soon as it is there. Left early, it costs the worker.

        Args:
            most: answers that it may give. room: bytes that a large answer may need beyond the limit.
            given: what JSON can hold.

        Raises:
            Faulty: what the job raised, or (`LIMIT`) it hit a limit, or (`UNREADABLE`) its worker crashed.
        """
        try:
            status = path.stat()
        except OSError as error:
            raise Faulty(Reason.UNREADABLE, f"{path.name}: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device never ends
            raise Faulty(Reason.UNREADABLE, f"{path.name}: not a regular file")
        size = status.st_size
        budget = min(self.limit_bytes + _PER_FILE_BYTE * size + room, _CAP)
        request = {
            "job": f"{job.__module__}:{job.__qualname__}",
            "path": str(path.absolute()),
            "given": given,
        }
        worker = self._take()
        deadline = time.monotonic() + self.limit_s + size / _SLOWEST
        sound = False
        try:
            worker.ask({**request, "budget": budget, "seconds": math.ceil(deadline - time.monotonic())})
            for left in itertools.count(most, -1):
                facts, array, state = worker.hear(deadline, budget, _JSON_BYTES + _PER_FILE_BYTE * size)
                if state in ("end", "last"):
                    sound = state == "end"
                    return
                if state != "answer":
                    sound = state == "fault"
                    raise _fault(path, facts)
                if left <= 0:
                    raise ValueError("more answers than the job has")
                yield facts, array
        except TimeoutError:
            raise Faulty(Reason.LIMIT, f"{path.name}: parsing takes more than {self.limit_s:g} s") from None
        except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, Faulty):
                raise
            raise Faulty(Reason.UNREADABLE, f"{path.name}: its parser died ({worker.epitaph()})") from None
        finally:
            self._give(worker, sound)

    def close(self) -> None:
        """End all workers."""
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for worker in idle:
            worker.end()

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> _Worker:
        with self._lock:
            self._closed = False
            if self._idle:
                return self._idle.pop()
        try:
            return _Worker()
        except (OSError, EOFError) as error:  # no file's fault
            raise Stop(Exit.INTERNAL, f"the process that parses files does not start: {error!r}") from None

    def _give(self, worker: _Worker, sound: bool) -> None:
        with self._lock:
            if sound and not self._closed:
                self._idle.append(worker)
                return
        worker.end()


@cache
def shared() -> Guard:
    """The guard of this process, with the default limits."""
    guard = Guard()
    atexit.register(guard.close)
    return guard


class _Worker:
    """A process that answers one request at a time."""

    def __init__(self) -> None:
        self._line, theirs = socket.socketpair()
        number = theirs.fileno()
        command = [
            sys.executable,
            "-P",
            "-c",
            _BOOT,
            json.dumps([str(Path(p).absolute()) for p in sys.path]),
            str(number),
        ]
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        # our own variables hold passwords of archives
        others = {k: v for k, v in os.environ.items() if not k.startswith("WARDROUND_")}
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  our own interpreter and module
                command,
                pass_fds=(number,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**others, **single},
                cwd="/",
            )
        try:
            self.hear(time.monotonic() + _START_S, 0, _JSON_BYTES)
        except BaseException:
            self.end()
            raise

    def ask(self, request: dict[str, object]) -> None:
        text = json.dumps(request).encode("utf-8", "surrogatepass")
        self._line.settimeout(_START_S)
        self._line.sendall(_HEAD.pack(len(text), 0) + text)

    def hear(self, deadline: float, budget: int, words: int) -> tuple[dict[str, Any], Array | None, str]:
        """One message: facts, array, and `answer`, `end`, `last` (of this worker), `fault`, `spent` (both).

        Args:
            budget, words: bytes that an array, and all else, may have.

        Raises:
            TimeoutError, EOFError, OSError, ValueError: nothing usable came.
        """
        texts, size = _HEAD.unpack(self._exactly(_HEAD.size, deadline))
        if texts > words or size > budget:
            raise ValueError("a message beyond its bound")
        message = json.loads(bytes(self._exactly(texts, deadline)))
        facts, state = message["facts"], message["state"]
        if not isinstance(facts, dict) or not isinstance(state, str):
            raise ValueError("a message of another form")
        if message["dtype"] is None:
            return facts, None, state
        if message["dtype"] not in _DTYPES:
            raise ValueError("an array of another type")
        kind, shape = np.dtype(message["dtype"]), tuple(int(n) for n in message["shape"])
        if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != size:
            raise ValueError("an array of another size")
        return facts, np.frombuffer(self._exactly(size, deadline), dtype=kind).reshape(shape), state

    def _exactly(self, count: int, deadline: float) -> bytearray:
        buffer = bytearray(count)
        view, done = memoryview(buffer), 0
        while done < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._line.settimeout(left)
            got = self._line.recv_into(view[done:])
            if not got:
                raise EOFError
            done += got
        return buffer

    def epitaph(self) -> str:
        """How it ended, for the refusal."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(0.2)
            return f"signal {-code}" if code < 0 else f"exit {code}"
        return "an answer of another form"

    def end(self) -> None:
        self._line.close()
        self._process.kill()
        self._process.wait()


def _fault(path: Path, facts: dict[str, Any]) -> Faulty:
    reason = facts["reason"]
    detail = str(facts["detail"])[:_DETAIL]
    unmapped = [str(name)[:_DETAIL] for name in facts["unmapped"]]
    return Faulty(Reason(reason), detail if path.name in detail else f"{path.name}: {detail}", unmapped)
