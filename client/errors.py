"""Every error has two readers: a code for the coordinator, the detail for the site's own log."""

from __future__ import annotations

import errno
import json
import secrets
import traceback
from datetime import UTC, datetime
from pathlib import Path

import torch

from conf.exits import Exit, Stop
from strategies.protocol import CODES, Failure, Refused


def code_of(error: BaseException) -> str:
    """The code that leaves the site for `error`. Never its text: that may hold a path or a name."""
    match error:
        case Refused(code=code) if code in CODES:
            return code
        case MemoryError() | torch.OutOfMemoryError():
            return "memory"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return "disk"
        case Stop(exit=Exit.DISK_FULL):
            return "disk"
        case Stop(exit=Exit.CACHE_DAMAGED):
            return "data"
        case Stop(exit=Exit.BUDGET):
            return "budget"
        case Stop(exit=Exit.LEDGER_BROKEN):
            return "ledger"
        case Stop(exit=Exit.AUDIT_BROKEN):
            return "internal"
        case Stop():
            return "plan"
    return "internal"


def report(error: BaseException, log: Path | None) -> Failure:
    """Write the detail to the site's log, and make the failure that may leave."""
    incident = secrets.token_hex(4)
    if log is not None:
        entry = {
            "incident": incident,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "code": code_of(error),
            "detail": "".join(traceback.format_exception(error)),
        }
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError:
            # a full disk must not turn a typed failure into an untyped one
            return Failure(code_of(error), incident)
    return Failure(code_of(error), incident)
