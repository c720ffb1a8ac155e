"""How fast a command answers: the best of five.

python bench/commands.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from row import row


def answer(*argv: str) -> float:
    """Seconds that a command takes, the best of five."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([Path(sys.executable).with_name("wardround"), *argv], capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    row("wardround --help", answer("--help"), "s", 0.3)
    row("wardround simulate --cfg job", answer("simulate", "--cfg", "job"), "s")
