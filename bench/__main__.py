"""One table of every measured figure and the limit it is held against: `make bench`.

    python -m bench [fold] [commands] [ingest] [ledger] [scaling] [engine] [deployed] [dp] [gpu]

Without names all of them, which takes about an hour. Each part is a script of its own that prints rows as it
goes; the table comes last. Leaves with 1 where a limit is not met or a part failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
PEERS = HERE.parents[1] / "shared" / "bench" / "peers"
FLAT = ("--harness", str(PEERS), "--runtime", "local")

PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "fold": (("fold.py",),),
    "commands": (("commands.py",),),
    "ingest": (("ingest.py",),),
    "ledger": (("ledger.py",),),
    "scaling": (("scaling.py", *FLAT), ("scaling.py", *FLAT, "--rounds", "200", "--sites", "10")),
    "engine": (("peers.py", "--harness", str(PEERS)),),
    "deployed": (("-m", "bench.deployed"),),
    "dp": (("dp.py",),),
    "audit": (("audit.py",),),
    "gpu": (("gpu.py",),),
}
NEEDS_PEERS = ("scaling", "engine")


def measure(part: str, rows: Path) -> str:
    """Run a part; what went wrong, if anything did."""
    if part in NEEDS_PEERS and not PEERS.is_dir():
        return f"{part}: not measured, {PEERS} is not there"
    wrong = ""
    for script, *options in PARTS[part]:
        where = [script] if script == "-m" else [str(HERE / script)]
        before = rows.stat().st_size
        code = subprocess.run(
            [sys.executable, *where, *options],
            cwd=HERE.parent,
            env={**os.environ, "BENCH_ROWS": str(rows), "OMP_NUM_THREADS": "1"},
        ).returncode
        if code and (code != 1 or rows.stat().st_size == before):  # 1 and rows: a limit is not met
            wrong = f"{part}: ended with {code}"
    return wrong


def main() -> None:
    parts = sys.argv[1:] or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        raise SystemExit(f"no part {unknown[0]!r}; known: {', '.join(PARTS)}")
    table = Table("what", "measured", "limit", "", "note", title="Performance")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.touch()
        wrong = [text for part in parts if (text := measure(part, rows))]
        found = [json.loads(line) for line in rows.read_text().splitlines()]
    for r in found:
        table.add_row(r["name"], f"{r['value']:.4g} {r['unit']}", r["limit"], r["met"], r["note"])
    console = Console()
    console.print(table)
    for text in wrong:
        console.print(text, markup=False)
    held = [r["met"] for r in found if r["met"]]
    console.print(f"{held.count('met')} of {len(held)} limits met")
    raise SystemExit(bool(wrong) or "NOT MET" in held)


if __name__ == "__main__":
    main()
