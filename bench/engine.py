"""A workload of the comparison with other engines (w1 to w4), through the product's own round loop.

    python bench/engine.py WORKLOAD [--runtime ray|local] [--workers N] [--harness FOLDER]

FOLDER holds the comparison's `common.py`; it may stand in PYTHONPATH instead. Ends with the comparison's
own report line, and with 1 where the final weights are not those of the plain loop. The run directory
lies in memory: a synchronous write to disk would time the disk.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from conf.files import scratch_prefix, shared_memory
from conf.schema import Runtime
from server.cluster import cluster

#: Σ|w| of the plain loop's final model, for the number of rounds that the harness runs by itself
FLOOR = {"w1": 1441.984, "w2": 9335.447, "w3": 221577.07, "w4": 2.4975}
HEAVY = ("torch", "monai.networks.nets", "server.rounds", "client.site")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=("w1", "w2", "w3", "w4"))
    parser.add_argument("--runtime", choices=("local", "ray"), default=os.environ.get("BENCH_RUNTIME", "ray"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--harness")
    asked = parser.parse_args()
    if asked.harness:
        sys.path.insert(1, str(Path(asked.harness).absolute()))
    runtime = Runtime(name=asked.runtime, workers=asked.workers)
    heavy = HEAVY if asked.work == "w2" else tuple(name for name in HEAVY if "monai" not in name)
    folder = Path(tempfile.mkdtemp(prefix=scratch_prefix(), dir=shared_memory()))
    try:
        with cluster(runtime, preload=(*heavy, "server.exchange.ray")):
            right = run(asked.work, runtime, folder)
    finally:
        shutil.rmtree(folder)
    raise SystemExit(not right)


def run(work: str, runtime: Runtime, folder: Path) -> bool:
    import torch

    harness, common = importlib.import_module("harness"), importlib.import_module("common")
    from server.exchange.pool import recycle
    from server.rounds import Run
    from strategies.code import code_digest

    torch.set_num_threads(1)
    recycle()
    plan = harness.plan(work)
    sites = harness.Hospitals(work, folder / "sites", code_digest())
    starts: list[float] = []
    ends: list[float] = []
    answers = 0

    def watch(event: str, round: int) -> None:
        nonlocal answers
        if event == "start":
            starts.append(time.time())
        elif event == "checkpoint":
            ends.append(time.time())
        elif event == "answer" and round:
            answers += 1

    with closing(exchange(runtime, sites, folder, plan.seed)) as carried:
        study, strategy = sites.bench.study(plan)
        names = [harness.name(k) for k in range(common.WORK[work]["clients"])]
        loop = Run(study, strategy, names, carried, folder, "bench", code_digest(), watch=watch)
        model = loop.train(evaluate=False).model
    steps = 0 if work == "w4" else answers * plan.local.steps
    common.finish("ours", work, model, starts, ends, steps, runtime=runtime.name)
    return near(work, model)


def near(work: str, model: dict) -> bool:
    found = sum(float(tensor.double().abs().sum()) for tensor in model.values())
    wanted = FLOOR.get(work, found) if "BENCH_ROUNDS" not in os.environ else found
    return abs(found - wanted) <= 5e-5 * wanted


def exchange(runtime: Runtime, sites: object, folder: Path, seed: int) -> object:
    if runtime.name == "ray":
        from server.exchange.ray import RayExchange

        return RayExchange(sites, runtime.workers, blobs=folder / "blobs", seed=seed)
    from server.exchange.local import LocalExchange

    return LocalExchange(sites, blobs=folder / "blobs", seed=seed, workers=runtime.workers)


if __name__ == "__main__":
    main()
