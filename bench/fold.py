"""How fast updates are checked and added, what memory a sum takes, how fast a command answers.

    python bench/fold.py

Prints a Markdown table for docs/performance.md. One core; 50 updates of 25 million float32 values.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from strategies.exact import Sum
from strategies.protocol import Spec, Update

VALUES, UPDATES, LAYERS = 25_000_000, 50, 50


def fold() -> tuple[float, float, bool]:
    """GB of update bytes per second, rise of PSS in models, and whether the sum is exact."""
    torch.set_num_threads(1)
    shape = (VALUES // LAYERS,)
    spec = Spec({f"delta/layer_{i:02}": (shape, torch.float32) for i in range(LAYERS)}, 4096, 64.0)
    # quarters add without rounding, so the closed form is exact too
    update = Update(
        {name: ((torch.arange(shape[0]) % 17 - 8) / 4).float() for name in spec.tensors}, weight=100
    )
    before = psutil.Process().memory_full_info().pss
    rule = Sum()
    partial = rule.start(spec)
    times = []
    for n in range(UPDATES):
        began = time.perf_counter()
        spec.check(update)
        rule.add(partial, spec, f"site_{n}", (0, 0), update)
        times.append(time.perf_counter() - began)
    peak = psutil.Process().memory_full_info().pss
    total = rule.finish(partial, spec)
    wanted = update.tensors["delta/layer_00"]
    same = torch.equal(total.mean("delta")["layer_00"], wanted)
    model = VALUES * 4
    return model / statistics.median(times) / 1e9, (peak - before) / model, same


def answer(*argv: str) -> float:
    """Seconds that a command takes, the best of five."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([Path(sys.executable).with_name("wardround"), *argv], capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    speed, memory, exact = fold()
    print("| what | measured |")
    print("| --- | ---: |")
    print(f"| check and add, {UPDATES} updates of 25 M float32, one core | {speed:.1f} GB/s |")
    print(f"| rise of memory (PSS) meanwhile | {memory:.1f} models |")
    print(f"| the mean is exact | {'yes' if exact else 'NO'} |")
    print(f"| `wardround --help` | {answer('--help'):.2f} s |")
    print(f"| `wardround simulate --cfg job` | {answer('simulate', '--cfg', 'job'):.2f} s |")
