"""Hostile files: refused by type and reason, under the limits; the next file is read as ever."""

import io
import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from tasks.data.dicom import from_series
from tasks.data.dryrun import dry_run, in_words, inspect
from tasks.data.guard import Answer, Guard, _Worker
from tasks.data.header import header, read_header, whole
from tasks.data.pixels import frames
from tasks.data.source import Faulty, Reason

LIMIT = 256 << 20


@pytest.fixture(scope="module")
def guard() -> Iterator[Guard]:
    with Guard(limit_bytes=LIMIT, limit_s=20) as one:
        yield one


def file(path: Path, syntax: str = ExplicitVRLittleEndian, **changes: object) -> Path:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientID = CTImageStorage, generate_uid(), "P1"
    ds.SeriesInstanceUID, ds.Modality = generate_uid(), "CT"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 4, 4, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.PixelData = np.arange(16, dtype="<u2").tobytes()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.TransferSyntaxUID = CTImageStorage, UID(syntax)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    for name, value in changes.items():
        setattr(ds, name, value)
    if syntax == RLELossless:
        ds["PixelData"].is_undefined_length = True
    ds.save_as(path, enforce_file_format=True)
    return path


def bomb(path: Path, inside: int = 400 << 20) -> Path:
    """A deflated file whose one private element inflates to `inside` zero bytes."""
    plain = file(path, DeflatedExplicitVRLittleEndian).read_bytes()
    start = 128 + 4 + 12 + struct.unpack("<I", plain[140:144])[0]
    deflate = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    body = io.BytesIO()
    body.write(plain[:start])
    body.write(deflate.compress(zlib.decompress(plain[start:], -zlib.MAX_WBITS)))
    body.write(deflate.compress(struct.pack("<HH2sHI", 0x7FE1, 0x1001, b"OB", 0, inside)))
    for _ in range(inside >> 20):
        body.write(deflate.compress(bytes(1 << 20)))
    body.write(deflate.flush())
    path.write_bytes(body.getvalue())
    return path


def nested(path: Path, depth: int) -> Path:
    """Sequences of undefined length within each other."""
    sequence = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    plain = file(path).read_bytes()
    at = plain.index(struct.pack("<HH", 0x0010, 0x0020))
    path.write_bytes(plain[:at] + (sequence + item) * depth + plain[at:])
    return path


def worker(guard: Guard) -> psutil.Process:
    (one,) = guard._idle
    return psutil.Process(one._process.pid)


def most_resident(process: psutil.Process, until: threading.Event) -> Iterator[int]:
    """Bytes: the high-water mark, read until the process is gone."""
    while not until.wait(0.01):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return
        yield from (1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


@pytest.fixture(scope="module")
def armed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bomb(tmp_path_factory.mktemp("armed") / "bomb.dcm")


@pytest.mark.parametrize("job", [header, whole, inspect])  # the first stops before pixels
def test_a_deflated_bomb_is_refused_under_the_limit(
    tmp_path: Path, armed: Path, guard: Guard, job: Callable[..., Iterator[Answer]]
) -> None:
    assert armed.stat().st_size < 1 << 20
    guard.call(header, file(tmp_path / "sound.dcm"))
    done, sizes = threading.Event(), [0]
    watched = worker(guard)
    watch = threading.Thread(target=lambda: sizes.extend(most_resident(watched, done)))
    watch.start()
    with pytest.raises(Faulty, match="more memory than its limit") as caught:
        guard.call(job, armed)
    done.set()
    watch.join()
    assert caught.value.reason is Reason.LIMIT
    assert 0 < max(sizes) < LIMIT + (100 << 20)  # Python with NumPy and pydicom takes 50 MiB itself


@pytest.mark.parametrize("depth", [5_000, 200_000])
@pytest.mark.parametrize("job", [header, whole, inspect])
def test_deep_nesting_is_refused(
    tmp_path: Path, guard: Guard, depth: int, job: Callable[..., Iterator[Answer]]
) -> None:
    with pytest.raises(Faulty, match=r"deep\.dcm") as caught:
        guard.call(job, nested(tmp_path / "deep.dcm", depth))
    assert caught.value.reason in (Reason.UNREADABLE, Reason.LIMIT)


BIG = {"Rows": 65535, "Columns": 65535, "NumberOfFrames": "2147483647"}


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
@pytest.mark.parametrize("names", [("Rows", "Columns"), ("NumberOfFrames",), tuple(BIG)])
def test_absurd_sizes_are_refused(tmp_path: Path, guard: Guard, syntax: str, names: tuple[str, ...]) -> None:
    rle = struct.pack("<16I", 2, 64, 82, *[0] * 13) + (b"\x0f" + bytes(16)) * 2 + b"\0\0"
    data = {} if syntax == ExplicitVRLittleEndian else {"PixelData": pydicom.encaps.encapsulate([rle])}
    path = file(tmp_path / "huge.dcm", syntax, **data, **{n: BIG[n] for n in names})
    began = time.monotonic()
    with pytest.raises(Faulty, match=r"huge\.dcm"):
        list(
            guard.stream(frames, path, most=1, indices=[0])
            if "Rows" in names
            else guard.stream(inspect, path, most=2)
        )
    lines = list(dry_run(tmp_path, guard))
    assert lines[0]["outcome"] == "undecodable"
    assert lines[1]["reason"]
    assert time.monotonic() - began < 15
    assert guard.call(header, file(tmp_path / "next.dcm"))[0]["rows"] == 4


def test_a_worker_is_used_again_and_replaced_after_a_limit(tmp_path: Path, armed: Path) -> None:
    path = file(tmp_path / "a.dcm")
    with Guard() as guard:
        guard.call(header, path)
        first = worker(guard)
        for _ in range(20):
            guard.call(header, path)
        assert worker(guard) == first
        with pytest.raises(Faulty, match="limit"):
            guard.call(header, armed)
        guard.call(header, path)
        assert worker(guard) != first
        last = worker(guard)
    assert not last.is_running()


def test_a_worker_can_write_no_file_and_dump_no_core(tmp_path: Path) -> None:
    with Guard() as guard:
        guard.call(header, file(tmp_path / "a.dcm"))
        for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
            assert resource.prlimit(worker(guard).pid, limit) == (0, 0)


def test_a_worker_knows_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARDROUND_PACS_LOGIN", "user:secret")
    with Guard() as guard:
        guard.call(header, file(tmp_path / "a.dcm"))
        assert "user:secret" not in worker(guard).environ().values()


def test_a_refusal_commands_no_terminal() -> None:
    fault = Faulty(Reason.LABEL, "segments \x1b]0;owned\x07 \u202e\n not mapped")
    assert fault.detail == "segments \ufffd]0;owned\ufffd \ufffd not mapped"
    line = {"path": "a\x1b[2J.dcm", "outcome": "unreadable", "shape": None, "reason": str(fault)}
    assert str(fault).isprintable()
    assert in_words(line).isprintable()


def test_a_hang_ends_at_the_limit_and_the_next_file_is_read(tmp_path: Path) -> None:
    path = file(tmp_path / "a.dcm")
    with Guard(limit_s=1) as guard:
        guard.call(header, path)
        stopped = worker(guard)
        stopped.suspend()
        began = time.monotonic()
        with pytest.raises(Faulty, match=r"a\.dcm: parsing takes more than 1 s") as caught:
            guard.call(header, path)
        assert caught.value.reason is Reason.LIMIT
        assert time.monotonic() - began < 3
        assert not stopped.is_running()
    with Guard() as guard:
        assert read_header(path, guard).rows == 4


def test_a_crash_is_a_refusal(tmp_path: Path) -> None:
    path = file(tmp_path / "a.dcm")
    with Guard() as guard:
        guard.call(header, path)
        victim = worker(guard)
        victim.suspend()
        threading.Timer(0.2, victim.kill).start()
        with pytest.raises(Faulty, match=r"a\.dcm: its parser died \(signal 9\)") as caught:
            guard.call(header, path)
        assert caught.value.reason is Reason.UNREADABLE
        assert read_header(path, guard).rows == 4


def said(message: object, data: bytes = b"", size: int | None = None) -> bytes:
    text = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack("<IQ", len(text), len(data) if size is None else size) + text + data


ANSWER: dict[str, object] = {"state": "answer", "facts": {}, "dtype": None}
LIES = {
    "objects": said({**ANSWER, "dtype": "object", "shape": [1]}, bytes(8)),
    "size": said({**ANSWER, "dtype": "int16", "shape": [2, 2]}, bytes(7)),
    "negative": said({**ANSWER, "dtype": "int16", "shape": [-2, -2]}, bytes(8)),
    "overflow": said({**ANSWER, "dtype": "int16", "shape": [2**63, 2**63, 0]}, bytes(8)),
    "shape": said({**ANSWER, "dtype": "int16", "shape": "ab"}, bytes(8)),
    "facts": said({**ANSWER, "facts": []}),
    "state": said({**ANSWER, "state": "elsewhere"}),
    "reason": said({**ANSWER, "state": "fault", "facts": {"reason": "none", "detail": "", "unmapped": []}}),
    "keys": said({}),
    "list": said([]),
    "pickle": said(b"\x80\x04."),
    "nested": said(b"[" * 100_000),
    "long text": struct.pack("<IQ", 2**32 - 1, 0),
    "more text than its file is worth": struct.pack("<IQ", 17 << 20, 0),
    "more answers": said(ANSWER) + said(ANSWER) + said({**ANSWER, "state": "end"}),
    "long array": said({**ANSWER, "dtype": "uint8", "shape": [2**40]}, size=2**40),
    "cut": said(ANSWER)[:-1],
    "nothing": b"",
    "header": said({**ANSWER, "facts": {"rows": "many"}}) + said({**ANSWER, "state": "end"}),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_whatever_a_taken_over_worker_says_is_a_refusal_at_most(
    tmp_path: Path, lie: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    captive = object.__new__(_Worker)
    captive._line = ours
    captive._process = subprocess.Popen(["sleep", "0"])
    guard = Guard()
    monkeypatch.setattr(guard, "_take", lambda: captive)
    with theirs:
        theirs.sendall(lie)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(Faulty, match=r"a\.dcm: its parser died"):
            read_header(file(tmp_path / "a.dcm"), guard)
    guard.close()


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    path = file(tmp_path / "a.dcm")
    code = (
        "import os, sys, psutil; from pathlib import Path; from tasks.data.guard import Guard;"
        "from tasks.data.header import header;"
        "Guard().call(header, Path(sys.argv[1])); print(psutil.Process().children()[0].pid, flush=True);"
        "os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True, text=True)
    for _ in range(50):
        if not psutil.pid_exists(int(done.stdout)):
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")


def test_jobs_come_from_this_package_only(tmp_path: Path, guard: Guard) -> None:
    with pytest.raises(Faulty, match="shutil has no jobs"):
        guard.call(shutil.rmtree, file(tmp_path / "a.dcm"))  # type: ignore[arg-type]
    assert (tmp_path / "a.dcm").exists()


def test_what_is_no_file_is_not_waited_for(tmp_path: Path, guard: Guard) -> None:
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "device.dcm").symlink_to("/dev/zero")
    (tmp_path / "gone.dcm").symlink_to(tmp_path / "nothing")
    (tmp_path / "empty.dcm").touch()
    (tmp_path / os.fsdecode(b"\xff\xfe.dcm")).write_bytes(b"\x08\0\x05\0CS")
    file(tmp_path / "sound")
    lines = {line["path"]: line for line in dry_run(tmp_path, guard) if "path" in line}
    assert {path: line["outcome"] for path, line in lines.items()} == {
        **dict.fromkeys(
            ("pipe.dcm", "device.dcm", "gone.dcm", "empty.dcm", "\udcff\udcfe.dcm"), "unreadable"
        ),
        "sound": "image",
    }
    for path, why in (("pipe", "not a regular file"), ("device", "not a regular"), ("gone", "No such file")):
        assert why in lines[f"{path}.dcm"]["reason"]
    found = from_series(tmp_path, sorted(tmp_path.iterdir()), with_masks=False, guard=guard)
    assert {f.source for f in found if f.fault is not None and f.fault.reason is Reason.UNREADABLE} == {
        *lines
    } - {"sound"}
