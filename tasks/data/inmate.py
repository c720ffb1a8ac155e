"""The worker's side of `guard`: run alone in its process, with limits on all that it may take."""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import signal
import socket
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tasks.data.source import Array, Faulty, Reason

_HEAD = struct.Struct("<IQ")
_GROWTH = 256 << 20  # bytes a worker may keep from earlier files before it asks to be replaced
_PAGE = os.sysconf("SC_PAGE_SIZE")


def serve(number: int) -> None:
    """Answer requests on the socket `number` until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's ^C reaches the parent, which decides
    _confine()
    warnings.simplefilter("ignore")
    logging.disable()  # parsers quote headers
    importlib.import_module("tasks.data.header")
    importlib.import_module("tasks.data.pixels")
    line = socket.socket(fileno=number)
    first = _size()
    _say(line, "answer", {})
    while True:
        head = _exactly(line, _HEAD.size)
        if head is None:
            return
        text = _exactly(line, _HEAD.unpack(head)[0])
        if text is None:
            return
        if not _answer(line, json.loads(text), first):
            return


def _answer(line: socket.socket, request: dict[str, Any], first: int) -> bool:
    """Do one job. False: this process is not to be used again."""
    resource.setrlimit(resource.RLIMIT_AS, (_size() + request["budget"], resource.RLIM_INFINITY))
    signal.alarm(request["seconds"] + 5)  # the parent kills it sooner, unless the parent is gone
    try:
        for facts, array in _job(request):
            _say(line, "answer", facts, array)
        grown = _size() - first > _GROWTH
        _say(line, "last" if grown else "end", {})
        return not grown
    except MemoryError:
        _release()
        _say(line, "spent", _said(Reason.LIMIT, "parsing takes more memory than its limit"))
        return False
    except RecursionError:
        _say(line, "fault", _said(Reason.UNREADABLE, "its sequences are nested too deep"))
    except Faulty as fault:
        _say(line, "fault", _said(fault.reason, fault.detail, fault.unmapped))
    except Exception as error:  # noqa: BLE001  a broken file makes parsers raise nearly anything
        _say(line, "fault", _said(Reason.UNREADABLE, f"{type(error).__name__}: {error}"[:500]))
    finally:
        signal.alarm(0)
        _release()
    return True


def _job(request: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Array | None]]:
    module, name = request["job"].split(":")
    if not module.startswith("tasks.data."):
        raise ValueError(f"{module} has no jobs")
    job = getattr(importlib.import_module(module), name)
    yield from job(Path(request["path"]), **request["given"])


def _said(reason: Reason, detail: str, unmapped: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"reason": reason.value, "detail": detail, "unmapped": unmapped}


def _say(line: socket.socket, state: str, facts: dict[str, Any], array: Array | None = None) -> None:
    message: dict[str, Any] = {"state": state, "facts": facts, "dtype": None}
    data = memoryview(b"")
    if array is not None:
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))  # a name says no order
        message |= {"dtype": array.dtype.name, "shape": array.shape}
        data = memoryview(array.reshape(-1).data).cast("B") if array.size else data
    text = json.dumps(message).encode("ascii")
    line.sendall(_HEAD.pack(len(text), len(data)) + text)
    line.sendall(data)


def _exactly(line: socket.socket, count: int) -> bytes | None:
    """`count` bytes, or None where the parent is gone."""
    parts: list[bytes] = []
    while count:
        part = line.recv(count)
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _confine() -> None:
    """What no parser needs: writing files, dumping cores (they would hold patients), many handles."""
    for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 64)):
        resource.setrlimit(limit, (value, value))


def _release() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _size() -> int:
    """Bytes of address space in use, which `RLIMIT_AS` bounds."""
    with Path("/proc/self/statm").open("rb") as file:
        return int(file.read().split()[0]) * _PAGE
