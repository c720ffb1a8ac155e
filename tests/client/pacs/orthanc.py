"""A real Orthanc on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from client.pacs.settings import Pacs

PROGRAM = "/usr/sbin/Orthanc"
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Orthanc:
    """One archive process; it keeps its content when it is killed and started again."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    over_tls: bool = False
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.web_port, self.port, self.listen = free_port(), free_port(), free_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.web_port}"

    def web(self, **more: Any) -> Pacs:
        return Pacs.model_validate({"source": f"{self.url}/dicom-web", "retries": 0, "timeout_s": 10, **more})

    def dimse(self, via: str, **more: Any) -> Pacs:
        source = f"ORTHANC@127.0.0.1:{self.port}"
        given = {"source": source, "via": via, "listen": self.listen, "retries": 0, "timeout_s": 10}
        return Pacs.model_validate({**given, **more})

    def start(self) -> None:
        about = {
            "StorageDirectory": str(self.folder / "db"),
            "IndexDirectory": str(self.folder / "db"),
            "HttpPort": self.web_port,
            "DicomPort": self.port,
            "DicomAet": "ORTHANC",
            "DicomCheckCalledAet": True,
            "DicomModalities": {
                "site": {
                    "AET": "WARDROUND",
                    "Host": "127.0.0.1",
                    "Port": self.listen,
                    "UseDicomTls": self.over_tls,
                }
            },
            "AuthenticationEnabled": False,
            "Plugins": [str(PLUGIN)],
            **self.settings,
        }
        (self.folder / "orthanc.json").write_text(json.dumps(about))
        with (self.folder / "log").open("ab") as log:
            command = [PROGRAM, "--verbose", str(self.folder / "orthanc.json")]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + 20
        while time.monotonic() < until and self.process.poll() is None:
            try:
                # 401 is an answer too
                httpx.get(f"{self.url}/system", trust_env=False)
                return
            except httpx.TransportError:
                time.sleep(0.05)
        pytest.fail((self.folder / "log").read_text())

    def send(self, files: Iterable[Path], auth: tuple[str, str] | None = None) -> None:
        with httpx.Client(trust_env=False, timeout=30, auth=auth) as client:
            for file in files:
                client.post(f"{self.url}/instances", content=file.read_bytes()).raise_for_status()

    def given(self) -> int:
        """Instances it handed out so far, as its own log has it."""
        asked, count = "", 0
        for line in (self.folder / "log").read_text().splitlines():
            if match := re.search(r"Incoming (Find|Get|Move) request", line):
                asked = match[1]
            read = re.search(r'of "DICOM" content type$|content type 1 from cache$', line)
            over_dimse = bool(read) and asked in ("Get", "Move")
            count += over_dimse or "/file (built-in API)" in line
        return count

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@contextmanager
def serving(*, over_tls: bool = False, **settings: Any) -> Iterator[Orthanc]:
    if not Path(PROGRAM).exists() or not PLUGIN.exists():
        message = "no Orthanc here: apt-get install orthanc orthanc-dicomweb"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="wardround-test-", dir=shm if os.access(shm, os.W_OK) else None))
    server = Orthanc(folder, settings, over_tls)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder)
