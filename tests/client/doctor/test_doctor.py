"""Every check is turned red by a thing that is really broken; a check without such a test fails here."""

from __future__ import annotations

import datetime
import email.utils
import http.server
import json
import os
import re
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from PIL import Image

from client.cli import app
from client.doctor.checks import CHECKS
from client.doctor.finding import Finding, Level, ok
from client.ledger import Ledger
from client.sitefile import SiteFile
from conf.console import code
from conf.exits import Exit
from deploy.keys import authority
from strategies.privacy.accountant import Entry

pytestmark = pytest.mark.federation

PROJECT = Path(__file__).parents[3]


@dataclass
class World:
    """A whole site that works, and what it reaches."""

    folder: Path
    port: int
    patch: pytest.MonkeyPatch
    undo: ExitStack
    date: float | None = None  # what the coordinator's clock shows; none: the time

    @property
    def file(self) -> Path:
        return self.folder / "site.yaml"

    @property
    def site(self) -> SiteFile:
        return SiteFile.read(self.file)

    def write(self, **changes: Any) -> None:
        about = yaml.safe_load(self.file.read_text())
        self.file.write_text(json.dumps({**about, **changes}))

    def check(self, name: str) -> Finding:
        return CHECKS[name](self.site)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def world(ram: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    site = ram / "s"
    assert code(app, ["init", str(site), "--name", "A"]) == Exit.OK
    for i in range(2):
        for kind, values in (("image", np.arange(16).reshape(4, 4) + i), ("mask", np.eye(4) * 255)):
            path = site / "data" / kind / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(path)
    with ExitStack() as undo:
        made = World(site, 0, monkeypatch, undo)
        made.port = undo.enter_context(coordinator(made))
        made.write(
            data={"root": "data", "label_map": {0: 0, 255: 1}, "workers": 1},
            coordinator={"address": f"127.0.0.1:{made.port}", "authority": "ca.crt"},
            pacs={"source": f"ORTHANC@127.0.0.1:{made.port}", "query": ["Modality=CT"]},
        )
        assert code(app, ["ingest", "--site-file", str(made.file)]) == Exit.OK
        door = undo.enter_context(socket.socket(socket.AF_UNIX))
        door.bind(str(made.site.socket))
        door.listen()
        yield made


def coordinator(world: World) -> Any:
    """A TLS server that tells the time."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(404)
            self.send_header("Date", email.utils.formatdate(world.date or time.time(), usegmt=True))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # a check knocks and goes

        def __enter__(self) -> Any:
            self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
            self.thread.start()
            return self.server_address[1]

        def __exit__(self, *_: object) -> None:
            self.shutdown()
            self.thread.join()
            self.server_close()

    authority(world.folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(world.folder / "server.crt", world.folder / "server.key")
    server = Server(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    return server


def other_flower(world: World) -> None:
    broken = world.folder / "packages"
    (broken / "flwr-0.1.dist-info").mkdir(parents=True)
    (broken / "flwr-0.1.dist-info" / "METADATA").write_text("Name: flwr\nVersion: 0.1\n")
    world.patch.syspath_prepend(broken)


def hidden_gpu(world: World) -> None:
    world.patch.setenv("CUDA_VISIBLE_DEVICES", "")
    world.write(device="cuda")


def full_disk(world: World) -> None:
    small = world.folder / "small"
    small.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if done.returncode:
        if os.environ.get("CI") == "true":
            pytest.fail("cannot mount a tmpfs; run the tests as root")
        pytest.skip("needs root to mount a small disk: sudo make test")
    world.undo.callback(subprocess.run, ["umount", str(small)], check=True)
    world.write(state="small/state")


def little_memory(world: World) -> Finding:
    script = (
        "import json, sys; from pathlib import Path; from client.sitefile import SiteFile\n"
        "from client.doctor.checks import CHECKS\n"
        "found = CHECKS['memory'](SiteFile.read(Path(sys.argv[1])))\n"
        "print(json.dumps([found.level, found.seen, found.remedy]))"
    )
    done = subprocess.run(
        ["sh", "-c", 'ulimit -v 1900000; exec "$@"', "sh", sys.executable, "-c", script, str(world.file)],
        cwd=PROJECT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    level, seen, remedy = json.loads(done.stdout)
    return Finding(Level(level), seen, remedy)


def few_files(world: World) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    world.undo.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)


def wrong_clock(world: World) -> None:
    world.date = time.time() - 3600


def ended_certificate(world: World) -> None:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "old")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=9))
        .not_valid_after(now - datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    with (world.folder / "ca.crt").open("ab") as file:
        file.write(made.public_bytes(Encoding.PEM))


def nobody_coordinates(world: World) -> None:
    world.write(coordinator={"address": f"127.0.0.1:{closed_port()}", "authority": "ca.crt"})


def no_archive(world: World) -> None:
    world.write(pacs={"source": f"ORTHANC@127.0.0.1:{closed_port()}"})


def dead_trainer(world: World) -> None:
    world.write(socket="run/old.sock")
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(world.site.socket))


def dangling_file(world: World) -> None:
    (world.folder / "data" / "image" / "gone.dcm").symlink_to("/nowhere/gone.dcm")


def other_classes(world: World) -> None:
    world.write(data={"root": "data", "label_map": {0: 0, 255: 5}})


def cut_object(world: World) -> None:
    path = next((world.folder / "cache" / "objects").rglob("*.safetensors"))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def rewritten_log(world: World) -> None:
    log = world.folder / "audit.jsonl"
    log.write_text(log.read_text().replace('"init"', '"none"'))


def rolled_back_ledger(world: World) -> None:
    path = world.folder / "ledger.jsonl"
    Ledger(path, None).reserve(Entry(1.0, 0.1, 1), run="a")
    path.unlink()


def open_key(world: World) -> None:
    (world.folder / "state" / "patient.key").chmod(0o644)


RED: dict[str, tuple[Callable[[World], Finding | None], str]] = {
    "python": (other_flower, "flwr 0.1; need 1.41.0"),
    "gpu": (hidden_gpu, "device cuda in site.yaml, but 0 GPUs"),
    "disk": (full_disk, "0.0 GiB free for .*small"),
    "memory": (little_memory, "GiB of memory available"),
    "files": (few_files, "200 files may be open"),
    "clock": (wrong_clock, "3[56][0-9][0-9] s from the coordinator's"),
    "certificates": (ended_certificate, "ca.crt ended on "),
    "coordinator": (nobody_coordinates, "Connection refused"),
    "pacs": (no_archive, "Connection refused"),
    "trainer": (dead_trainer, "nobody answers at its socket"),
    "data": (dangling_file, "1 of 5 files cannot be read: .*gone.dcm"),
    "labels": (other_classes, "cached masks have 1, which site.yaml does not declare"),
    "cache": (cut_object, "does not match its digest"),
    "audit": (rewritten_log, "audit.jsonl"),
    "ledger": (rolled_back_ledger, "ledger.jsonl: it has 0 of "),
    "permissions": (open_key, r"patient.key is open to others \(mode 644\)"),
}


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_is_quiet_where_all_is_well_and_red_where_it_is_not(name: str, world: World) -> None:
    breaks, said = RED[name]
    healthy = world.check(name)
    assert healthy.level != Level.PROBLEM, healthy
    # a loopback certificate lasts a week, and a test machine may be small
    assert healthy.level == Level.OK or name in ("gpu", "disk", "memory", "certificates"), healthy
    found = breaks(world) or world.check(name)
    assert (found.level, bool(found.remedy)) == (Level.PROBLEM, True), found
    assert len(f"{found.seen}{found.remedy}".splitlines()) == 1
    assert re.search(said, found.seen), found


def test_a_certificate_that_is_not_trusted(world: World) -> None:
    (world.folder / "other").mkdir()
    authority(world.folder / "other")
    world.write(coordinator={"address": f"127.0.0.1:{world.port}", "authority": "other/ca.crt"})
    found = world.check("coordinator")
    assert found.level == Level.PROBLEM
    assert "certificate" in found.seen
    assert world.check("clock").level == Level.WARNING


def test_the_command_says_each_line_and_its_code_tells(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    monkeypatch.chdir(world.folder)
    monkeypatch.setitem(CHECKS, "gpu", lambda site: ok("not asked here: torch takes seconds"))
    assert code(app, ["doctor", "--json"]) in (Exit.OK, Exit.WARNING)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["check"] for line in lines] == list(CHECKS)
    assert all(line["remedy"] for line in lines if line["level"] != "ok")
    open_key(world)
    assert code(app, ["doctor"]) == Exit.PROBLEM
    said = capsys.readouterr().out
    assert "permissions   problem" in said
    assert "-> chmod go= " in said


def test_without_a_site(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert code(app, ["doctor"]) == Exit.CONFIG
    assert "no site.yaml in this folder" in capsys.readouterr().err
    (tmp_path / "site.yaml").write_text("name: [")
    assert code(app, ["doctor"]) == Exit.CONFIG
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_check_that_fails_is_a_problem_and_the_others_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client.doctor.checks import examine

    (world.folder / "cache" / "index.json").write_text("{")
    monkeypatch.setitem(CHECKS, "gpu", lambda site: 1 / 0)
    found = dict(examine(world.site))
    assert list(found) == list(CHECKS)
    assert found["gpu"].seen.startswith("could not be checked (ZeroDivisionError")
    assert found["cache"].level == Level.PROBLEM
