"""A fold needs little more than its ring, however many sites answer: measured in a process of its own."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.exchange import Order
from server.exchange.local import LocalExchange
from strategies.base import Ask
from strategies.exact import Collect, Fold, Folded, Sum, Total
from strategies.protocol import Instruction, Reply, Spec, Tree, Update
from strategies.robust import median

SHAPES = {"a": (1024, 1024), "b": (3, 64, 64, 256), "c": (64,)}  # 4.2 million parameters, 16.8 MB
SPEC = Spec({f"delta/{n}": (shape, torch.float32) for n, shape in SHAPES.items()}, 4096, 64.0)


@pytest.mark.federation
@pytest.mark.parametrize("kind", ["sum", "median", "workers"])
def test_a_fold_stays_under_four_models(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__, kind],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    few, many = map(float, done.stdout.split())
    assert 1 < few <= many < 4, f"{few:.2f} models for 4 sites, {many:.2f} for 24"


# ---- what runs in a process of its own


def site(path: str, pipe: Connection) -> None:
    """Another process: writes one answer after the other where the coordinator can map it."""
    place = torch.from_file(path, shared=True, size=SPEC.size)
    for index in iter(pipe.recv, None):
        place.copy_(torch.full((SPEC.size,), 0.5).mul_(index % 7 - 3))
        pipe.send(index)


@contextmanager
def answers() -> Iterator[tuple[str, Connection]]:
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as file:
        file.truncate(4 * SPEC.size)
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=site, args=(file.name, theirs))
        process.start()
        yield file.name, ours
        ours.send(None)
        process.join()


def arrived(path: str) -> Update:
    whole = torch.from_file(path, shared=True, size=SPEC.size)
    parts = torch.split(whole, [math.prod(s) for s in SHAPES.values()])
    return Update({f"delta/{n}": p.view(s) for (n, s), p in zip(SHAPES.items(), parts, strict=True)}, 3)


def fold_all(fold: Fold, path: str, pipe: Connection, sites: int) -> Folded:
    partial = fold.start(SPEC)
    for index in range(sites):
        pipe.send(index)
        update = arrived(path) if pipe.recv() == index else None
        assert update is not None
        SPEC.check(update)
        fold.add(partial, SPEC, f"s{index}", (1, 0), update)
    return fold.finish(partial, SPEC)


class Far:
    """A site in a worker: the coordinator sees only what it folded to."""

    def __init__(self, name: str) -> None:
        self.name = name

    def handle(self, instruction: Instruction, common: Tree) -> Reply:
        value = 0.5 * (int(self.name[1:]) % 7 - 3)
        tensors = {name: torch.full(shape, value) for name, (shape, _) in SPEC.tensors.items()}
        return Reply(self.name, Update(tensors, 3))


def exchanged(sites: int, folder: str) -> Folded:
    names = tuple(f"s{index}" for index in range(sites))
    ask = Ask(names, "train", {}, SPEC)
    asked = {name: Instruction("run", 1, 0, "train", name, None, "", "", "") for name in names}
    with LocalExchange(Far, blobs=Path(folder), seed=0, workers=3) as exchange:
        return exchange(Order(ask, 1, asked), lambda *_: None)


def applied(folded: Folded) -> dict[str, Tensor]:
    """The mean or the median, as the next model would be made of it."""
    if isinstance(folded, Total):
        mean = folded.mean("delta")
        return {name: mean[name] for name in mean}
    with folded:
        return folded.reduce("delta", median)


def resident(key: str) -> float:
    """Bytes of this process in memory (VmRSS) or the most there ever were (VmHWM); at least its PSS."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * float(found[1])


def main(kind: str) -> None:
    torch.set_num_threads(1)
    fold: Fold = Collect() if kind == "median" else Sum()
    warm = Spec({"delta/a": ((100,), torch.float32)}, 1, 1.0)  # code that is paged in at its first use
    partial = fold.start(warm)
    update = Update({"delta/a": torch.zeros(100)})
    warm.check(update)
    fold.add(partial, warm, "s", (1, 0), update)
    applied(fold.finish(partial, warm))
    gc.collect()
    before = resident("VmRSS")
    for sites in (4, 24):
        if kind == "workers":
            with tempfile.TemporaryDirectory() as folder:
                model = applied(exchanged(sites, folder))
        else:
            with answers() as (path, pipe):
                model = applied(fold_all(fold, path, pipe, sites))
        print((resident("VmHWM") - before) / (4 * SPEC.size))
        values = sorted(0.5 * (i % 7 - 3) for i in range(sites))
        middle = (values[(sites - 1) // 2] + values[sites // 2]) / 2
        expected = middle if kind == "median" else sum(values) / sites
        assert all(abs(float(x) - expected) < 1e-6 for t in model.values() for x in torch.aminmax(t))
        del model


if __name__ == "__main__":
    main(sys.argv[1])
