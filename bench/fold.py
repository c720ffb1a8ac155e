"""How fast answers are checked and added on one core, whether exactly, and in how much memory.

    python bench/fold.py [--updates 50] [--parameters 25000000]

Other work on the machine shows: a plain copy is timed beside every answer, and the
best of both are set against each other. Leaves with 1 where the sum is not exact.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from row import row

from strategies.exact import Sum, ring_bits
from strategies.protocol import Spec, Update

SAMPLE = 10_000


def site(path: str, size: int, pipe: Connection) -> None:
    """Another process: writes one answer after the other where the coordinator has mapped it."""
    base = torch.randn(size, generator=torch.Generator().manual_seed(1))
    place = torch.from_file(path, shared=True, size=size)
    for index in iter(pipe.recv, None):
        place.copy_(base).mul_(0.5 + index / 50)
        pipe.send(index)


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds of this core's work, and by the clock."""
    wall, work = time.perf_counter(), time.thread_time()
    step()
    return time.thread_time() - work, time.perf_counter() - wall


def pss() -> int:
    """Bytes of memory that are this process' own, shared pages by their share."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--parameters", type=int, default=25_000_000)
    asked = parser.parse_args()
    size, gb = asked.parameters, 4 * asked.parameters / 1e9
    torch.set_num_threads(1)
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as file:
        file.truncate(4 * size)
        pipe, theirs = multiprocessing.Pipe()
        feeder = multiprocessing.get_context("fork").Process(target=site, args=(file.name, size, theirs))
        feeder.start()
        reference = torch.ones(min(size, 2**24)), torch.ones(min(size, 2**24))
        copy_gb = 4 * len(reference[0]) / 1e9

        spec, fold = Spec({"delta/w": ((size,), torch.float32)}, max_weight=4096, max_value=64.0), Sum()
        scale = 2.0 ** ring_bits(spec.max_weight, spec.max_value)
        where = torch.linspace(0, size - 1, SAMPLE, dtype=torch.float64).long()
        expected = np.zeros(SAMPLE, dtype=np.int64)
        before = peak = pss()
        partial = fold.start(spec)
        folds, copies = [], []
        for index in range(asked.updates):
            pipe.send(index)
            pipe.recv()
            update = Update(
                {"delta/w": torch.from_file(file.name, shared=True, size=size)}, weight=1 + 83 * index
            )
            values = update.tensors["delta/w"]
            # float32 times a small whole number is exact in float64; numpy rounds half to even
            expected += np.rint(values[where].double().numpy() * (update.weight * scale)).astype(np.int64)
            torch.aminmax(values)  # maps the pages: an answer that was decoded is in memory

            def check_and_add(update: Update = update, index: int = index) -> None:
                spec.check(update)
                fold.add(partial, spec, f"site-{index}", (1, 0), update)

            folds.append(timed(check_and_add))
            copies.append(timed(lambda: reference[0].copy_(reference[1])))
            peak = max(peak, pss())
        pipe.send(None)
        feeder.join()
    total = fold.finish(partial, spec)
    right = int(((total.ring[where] - total.bias).numpy() == expected).sum())
    cpu, wall = (sum(column) for column in zip(*folds, strict=True))
    what = f"{asked.updates} x {size / 1e6:g} M float32, one core"
    row(f"check and add {what}: best", gb / min(c for c, _ in folds), "GB/s", 3.0, "least")
    row(f"check and add {what}: mean", asked.updates * gb / cpu, "GB/s")
    row(f"check and add {what}: by the clock", asked.updates * gb / wall, "GB/s")
    row("plain copy beside it: best", copy_gb / min(c for c, _ in copies), "GB/s")
    row("rise of PSS while adding", (peak - before) / (4 * size), "models", 4.0)
    exact = row("sampled sums that are not exact", SAMPLE - right, f"of {SAMPLE}", 0)
    raise SystemExit(not exact)


if __name__ == "__main__":
    main()
