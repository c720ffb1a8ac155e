"""Mutated real files: a typed outcome each, whatever is done to their bytes; no crash, hang or hunger.

A short sample always; five minutes with WARDROUND_CHAOS=1.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.data.dicom import from_series
from tasks.data.dryrun import dry_run
from tasks.data.guard import Guard
from tasks.data.source import Faulty
from tests.conftest import DATA

SECONDS = 300 if os.environ.get("WARDROUND_CHAOS") else 4
LIMIT = 256 << 20
LIMIT_S = 20
ITSELF = 200 << 20  # bytes that Python with NumPy and the decoders takes

FILES = sorted(p for p in (DATA / "dicom_zoo").rglob("*") if p.is_file() and 0 < p.stat().st_size < 120_000)
ODD = [
    b"\0",
    b"\xff" * 2,
    b"\xff" * 4,
    b"\0" * 4,
    b"\xff\xff\xff\x7f",
    b"SQ",
    b"UN",
    b"\xfe\xff\x00\xe0",
    b"\\",
]
#: where (share of the file, skewed to the header), what is done, with what
EDIT = st.tuples(
    st.floats(0, 1).map(lambda x: x**3),
    st.sampled_from(("set", "insert", "delete", "cut", "repeat")),
    st.one_of(st.sampled_from(ODD), st.binary(min_size=1, max_size=8)),
)


def mutated(data: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    for share, what, new in edits:
        at = min(132, len(data)) + int(share * max(len(data) - 132, 0))  # behind the preamble
        if what == "set":
            data = data[:at] + new + data[at + len(new) :]
        elif what == "insert":
            data = data[:at] + new + data[at:]
        elif what == "delete":
            data = data[:at] + data[at + len(new) :]
        elif what == "cut":
            data = data[: max(at, 132)]
        else:
            data = data[:at] + data[at : at + 64] * 3 + data[at + 64 :]
    return data


@pytest.fixture
def guard() -> Iterator[Guard]:
    with Guard(limit_bytes=LIMIT, limit_s=LIMIT_S) as one:
        yield one


@pytest.mark.timeout(SECONDS + 120)
def test_mutated_files_end_in_an_outcome(
    real: Callable[[str], Path], module_ram: Path, guard: Guard, capsys: pytest.CaptureFixture[str]
) -> None:
    real("dicom_zoo")
    path = module_ram / "one.dcm"
    seen: dict[str, int] = {}
    slowest, largest = 0.0, 0

    @settings(
        max_examples=25,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.sampled_from(FILES), st.lists(EDIT, min_size=1, max_size=6))
    def one(source: Path, edits: list[tuple[float, str, bytes]]) -> None:
        nonlocal slowest, largest
        path.write_bytes(mutated(source.read_bytes(), edits))
        began = time.monotonic()
        line, *_ = dry_run(module_ram, guard)
        assert line["outcome"] in ("image", "no_pixels", "undecodable", "unreadable")
        assert line["reason"] or line["outcome"] == "image"
        seen[line["outcome"]] = seen.get(line["outcome"], 0) + 1
        for case in from_series(module_ram, [path], with_masks=False, guard=guard):
            if case.read is not None and case.fault is None:
                try:
                    raw = case.read(None)
                    assert raw.image is not None
                except Faulty:
                    pass
        slowest = max(slowest, time.monotonic() - began)
        for held in guard._idle:
            status = Path(f"/proc/{held._process.pid}/status").read_text()
            largest = max(largest, 1024 * int(status.split("VmHWM:")[1].split()[0]))
            assert largest < LIMIT + ITSELF

    before = psutil.Process().memory_info().rss  # of all tests so far
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        one()
    assert slowest < 3 * (LIMIT_S + 5)
    assert psutil.Process().memory_info().rss < before + (1 << 30)
    with capsys.disabled():
        if os.environ.get("WARDROUND_CHAOS"):
            print(f"\n{sum(seen.values())} files: {seen}; slowest {slowest:.1f} s, {largest >> 20} MiB")
