"""A torch-free process that kills its children while they reserve and release: `test_ledger_crash` runs it.

Each child works on the ledger until SIGKILL: reserve; one byte into a pipe (the release); settle. What came
through the pipe left the process, so the ledger must hold it.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

from client.budget import Budget
from client.ledger import Ledger
from strategies.privacy.accountant import Entry

STEP = Entry(1000.0, 0.001, 1)


def child(path: Path, pipe: int) -> None:
    book = Ledger(path, {"patients": Budget()})
    book.lines()
    os.write(pipe, b"o")  # open and checked
    while True:
        held = book.reserve(STEP, run="chaos")
        os.write(pipe, b"r")
        held.settle()


def main(path: Path, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    released = over = gained = under = 0
    for kill in range(1, kills + 1):
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(out)
            child(path, into)
        os.close(into)
        select.select([out], [], [], 60)
        time.sleep(draw.uniform(0, 0.006))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        said = b""
        while part := os.read(out, 65536):
            said += part
        os.close(out)
        released += said.count(b"r")
        content = path.read_bytes()
        written = content[: content.rfind(b"\n") + 1].count(b'"kind":"reserve"')
        gained = max(gained, written - released - over)
        over = written - released
        under += over < 0
        if kill % 50 == 0 or kill == kills:  # to read it all is slow
            under += sum(e.steps for e in Ledger(path, None).entries()) != written
    counts = {"released": released, "under": under, "over": over, "most_by_a_kill": gained}
    waiting = Ledger(path, None).lines()[1]
    print(json.dumps(counts | {"unsettled": len(waiting), "torch": "torch" in sys.modules}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
