"""Does a round cost the same however many sites there are, and does a long run stay the same size?

    python bench/scaling.py --harness FOLDER [--runtime ray|local] [--sites 10,100,1000,10000] [--rounds 20]
    python bench/scaling.py --harness FOLDER --rounds 200 --sites 10

FOLDER holds the comparison's `common.py`. Sites of its workload w4 train nothing: what is left is the
engine. Prints, for each number of sites (100 asked in a round, at most): milliseconds of a round and of a
site in it, memory (PSS of all processes) above the smallest federation's, and its slope over the rounds.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import psutil
from row import row

from conf.files import scratch_prefix, shared_memory
from conf.schema import Runtime
from server.cluster import cluster

LIMIT_MS, LIMIT_SLOPE_MB = 0.2, 0.1


def pss() -> float:
    """MB of this process and its descendants."""
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{process.pid}/smaps_rollup").read_text(), re.M)
        except OSError:
            continue
        total += int(found[1]) if found else 0
    return total / 1024


def measure(count: int, rounds: int, runtime: Runtime, folder: Path) -> tuple[float, float, float]:
    """Median seconds of a round, MB at the end, MB a round between a quarter of the way and the end."""
    import common
    import harness
    from engine import exchange

    from server.rounds import Run
    from strategies.code import code_digest

    asked = min(100, count)
    common.WORK["w4"].update(clients=count, cohort=asked, rounds=rounds)
    common.cohort = lambda _, r: [(r * asked + i) % count for i in range(asked)]
    sites = harness.Hospitals("w4", folder / "sites", code_digest())
    starts: list[float] = []
    memory: list[tuple[int, float]] = []

    def watch(event: str, round: int) -> None:
        if event == "start":
            if (round - 1) % max(3, rounds // 20) == 0:
                memory.append((round, pss()))
            starts.append(time.perf_counter())

    plan = harness.plan("w4")
    with closing(exchange(runtime, sites, folder, plan.seed)) as carried:
        study, strategy = sites.bench.study(plan)
        names = [harness.name(k) for k in range(count)]
        Run(study, strategy, names, carried, folder, "bench", code_digest(), watch=watch).train(
            evaluate=False
        )
        last = pss()
    late = [point for point in memory if point[0] > rounds / 4]
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope if len(late) > 1 else 0.0
    steady = [b - a for a, b in pairwise(starts[1:])]
    return statistics.median(steady), last, slope


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--harness", required=True)
    parser.add_argument("--runtime", choices=("local", "ray"), default="local")
    parser.add_argument("--sites", default="10,100,1000,10000")
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    sys.path.insert(1, str(Path(asked.harness).absolute()))
    runtime = Runtime(name=asked.runtime, workers=2)
    bad, base = 0, 0.0
    for count in map(int, asked.sites.split(",")):
        folder = Path(tempfile.mkdtemp(prefix=scratch_prefix(), dir=shared_memory()))
        try:
            with cluster(runtime, preload=("torch", "server.rounds", "server.exchange.ray")):
                import torch

                torch.set_num_threads(1)
                seconds, memory, slope = measure(count, asked.rounds, runtime, folder)
        finally:
            shutil.rmtree(folder)
        base = base or memory
        each = 1e3 * seconds / min(100, count)
        name, free = f"{asked.runtime}, {count} sites, {min(100, count)} asked", None
        rows = (
            row(f"{name}: a round", 1e3 * seconds, "ms"),
            row(f"{name}: a site asked", each, "ms", LIMIT_MS if count >= 100 else free),
            row(f"{name}: memory for each site more", 1e3 * (memory - base) / count, "kB"),
            row(f"{name}: memory", slope, "MB/round", LIMIT_SLOPE_MB if asked.rounds >= 100 else free),
        )
        bad += not all(rows)
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
