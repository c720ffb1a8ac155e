"""The agent, where SuperLink is away, or not the one it should be."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from flwr.proto.node_pb2 import Node

from client.fleet import Fleet, Gone, read_key
from conf.exits import Exit, Stop
from deploy.keys import authority, node
from deploy.loopback import free_port

PROJECT = Path(__file__).parents[2]


@pytest.mark.federation
def test_it_ends_when_told_though_superlink_is_away(tmp_path: Path) -> None:
    authority(tmp_path)
    node(tmp_path / "key")
    (tmp_path / "bundles").touch()
    places = {name: str(tmp_path / name) for name in ("key", "bundles", "socket", "lease")}
    options = [word for name, path in places.items() for word in (f"--{name}", path)]
    command = [sys.executable, "-m", "client.agent", "--superlink", f"127.0.0.1:{free_port()}", *options]
    with subprocess.Popen(
        [*command, "--certificates", str(tmp_path / "ca.crt")],
        cwd=PROJECT,
        stderr=subprocess.PIPE,
        text=True,
    ) as agent:
        assert agent.stderr is not None
        assert "SuperLink is away" in agent.stderr.readline()
        began = time.monotonic()
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(20) == 0
        assert time.monotonic() - began < 5
        assert "Traceback" not in agent.stderr.read()


class Deaf:
    """Answers every call with an error."""

    def __init__(self, error: httpx.HTTPError) -> None:
        self.error = error

    def PullMessages(self, _: object) -> object:
        raise self.error


def status(code: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError(
        "", request=httpx.Request("POST", "https://x"), response=httpx.Response(code)
    )


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    authority(tmp_path)
    node(tmp_path / "key")
    fleet = Fleet(
        "127.0.0.1:1", (tmp_path / "ca.crt").read_bytes(), read_key(tmp_path / "key"), tmp_path / "l"
    )
    fleet._client.close()
    fleet._node = Node(node_id=1)
    return fleet


@pytest.mark.parametrize("code", [401, 403, 404, 500])
def test_a_superlink_that_says_no_has_ended_the_lease(code: int, fleet: Fleet) -> None:
    fleet._client = Deaf(status(code))  # type: ignore[assignment]
    with pytest.raises(Gone, match=r"^$"):
        fleet.receive()


def test_a_certificate_of_another_authority_is_one_line(fleet: Fleet) -> None:
    fleet._client = Deaf(httpx.ConnectError("[SSL] certificate verify failed"))  # type: ignore[assignment]
    with pytest.raises(Stop, match=r"^SuperLink's certificate is not of the authority[^\n]*$") as stop:
        fleet.receive()
    assert stop.value.exit is Exit.LINK
