"""An ingest that is killed at any moment, and two at once: real processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.exits import Exit
from tasks.data.cache import Cache

pytestmark = pytest.mark.federation

CASES, WORKERS = 60, 2
COMMAND = Path(sys.executable).with_name("wardround-site")


@pytest.fixture
def root(ram: Path) -> Path:
    for i in range(CASES):
        values = np.random.default_rng(i).integers(0, 256, (300, 300)).astype(np.uint8)
        for name, drawn in (("image", values), ("label", (values > 99).astype(np.uint8))):
            (ram / "data" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn).save(ram / "data" / name / f"{i:02}.png")
    (ram / "state").mkdir()
    (ram / "state" / "patient.key").write_bytes(b"k" * 32)
    return ram / "data"


def start(root: Path, cache: str) -> subprocess.Popen[bytes]:
    key = root.parent / "state" / "patient.key"
    words: list[str | Path] = [
        COMMAND,
        "ingest",
        root,
        "--cache",
        root.parent / cache / "c",
        "--key-file",
        key,
    ]
    return subprocess.Popen(
        [*words, "--workers", str(WORKERS)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def end(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    out, err = process.communicate()
    return process.returncode, out.decode(), err.decode()


def journal(cache: Path) -> list[str]:
    path = cache / "journal.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [json.loads(line)["source"] for line in lines if line.endswith(b"}")]


def test_killed_again_and_again_it_repeats_only_what_was_in_flight(root: Path) -> None:
    assert end(start(root, "whole"))[0] == Exit.OK
    cache, draw, kills = root.parent / "cut" / "c", random.Random(0), 0
    for _ in range(40):
        process, before = start(root, "cut"), len(journal(cache))
        wanted = min(before + draw.randrange(1, 25), CASES - 1)
        while process.poll() is None and len(journal(cache)) < wanted:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += end(process)[0] == -signal.SIGKILL
        if len(journal(cache)) >= CASES - 1:
            break
    done = journal(cache)
    assert kills >= 2
    assert len(done) == len(set(done))  # no case was read twice that had been written down
    ended, said, _ = end(start(root, "cut"))
    assert ended == Exit.OK
    read = int(said.split(" read now")[0].rpartition("(")[2])
    assert read <= CASES - len(set(done))
    undisturbed = root.parent / "whole" / "c"
    assert (cache / "index.json").read_bytes() == (undisturbed / "index.json").read_bytes()
    kept = [sorted(p.name for p in c.glob("objects/**/*") if p.is_file()) for c in (cache, undisturbed)]
    assert kept[0] == kept[1]
    Cache(cache).verify()


def test_the_second_of_two_is_refused_in_one_line(root: Path) -> None:
    first = start(root, "cache")
    while not journal(root.parent / "cache" / "c"):
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)  # it holds its lock
    ended, _, said = end(start(root, "cache"))
    assert ended == Exit.SITE_BUSY
    assert said.splitlines()[-1].startswith("error: another ingest works on")
    assert f"(process {first.pid})" in said
    os.kill(first.pid, signal.SIGCONT)
    assert end(first)[0] == Exit.OK
    assert "60 cases in" in end(start(root, "cache"))[1]
