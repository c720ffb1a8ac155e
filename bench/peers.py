"""Engine rows: the comparison's harness, its two-process loop beside ours, and what each ratio may be.

    python bench/peers.py --harness FOLDER [--works w1,w2,w3,w4] [--runtimes local,ray] [--repeats 3]

Runs the harness' own `run.sh`, which installs what it lacks, and reads the results it leaves. Medians over
the repeats. Trust them only where the last row, other work on the machine, is near 0. `BENCH_PSS=1` in the
environment measures memory too, at the cost of time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

from row import row

ENOUGH = {"w1": 1.15, "w2": 1.05, "w3": 1.9}
FIXED_S = {"local": 4.5, "ray": 8.0}
EACH_MS, COHORT = 0.20, 50
Results = list[dict[str, Any]]


def middle(results: Results, engine: str, work: str, key: str) -> float:
    found = [r[key] for r in results if (r["engine"], r["workload"]) == (engine, work) and key in r]
    return statistics.median(found) if found else float("nan")


def judge(results: Results, runtime: str, works: list[str]) -> bool:
    """A row for each limit."""
    rows = [row(f"{runtime}: runs that failed", sum("error" in r for r in results), "", 0)]
    for r in results:
        if "error" not in r:
            r["fixed_s"] = r["total_s"] - len(r["round_s"]) * r["steady_s"]
    for work in works:
        cpu, wall = (
            [middle(results, engine, work, key) for engine in ("ours", "floor2")]
            for key in ("cpu_round_s", "steady_s")
        )
        if work == "w4":
            rows.append(row(f"{runtime}: w4, CPU for each site", 1e3 * cpu[0] / COHORT, "ms", EACH_MS))
            rows.append(row(f"{runtime}: w4, wall for each site", 1e3 * wall[0] / COHORT, "ms", EACH_MS))
            continue
        limit = ENOUGH[work]
        rows.append(row(f"{runtime}: {work}, CPU of a round over the loop's", cpu[0] / cpu[1], "x", limit))
        rows.append(
            row(f"{runtime}: {work}, wall of a round over the loop's", wall[0] / wall[1], "x", limit + 0.1)
        )
    if "w1" in works:
        rows.append(
            row(f"{runtime}: w1, fixed cost", middle(results, "ours", "w1", "fixed_s"), "s", FIXED_S[runtime])
        )
    if (peak := middle(results, "ours", "w3", "pss_mb") / 1e3) > 0:
        rows.append(row(f"{runtime}: w3, peak memory (PSS)", peak, "GB", 2.8))
    others = [r["other_cpu"] for r in results if "other_cpu" in r]
    row(f"{runtime}: other work meanwhile", max(others, default=float("nan")), "cores")
    return all(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--harness", required=True, type=Path)
    parser.add_argument("--works", default="w1,w2,w3,w4")
    parser.add_argument("--runtimes", default="local,ray")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    home = Path(os.environ.get("BENCH_HOME") or Path.home() / ".cache" / "fl-bench")
    met = True
    for runtime in asked.runtimes.split(","):
        given = {
            "PROJECT": str(Path.cwd()),
            "ENGINES": "floor2,ours",
            "WORKS": asked.works,
            "REPS": str(asked.repeats),
            "BENCH_RUNTIME": runtime,
        }
        subprocess.run(["bash", asked.harness / "run.sh"], env={**os.environ, **given}, check=True)
        results = [json.loads(line) for line in (home / "results.jsonl").read_text().splitlines()]
        met &= judge(results, runtime, asked.works.split(","))
    raise SystemExit(not met)


if __name__ == "__main__":
    main()
