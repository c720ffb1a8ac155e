"""What an operator does at SuperLink: all that is used of Flower's Control API, which is private.

It asks for no credentials, so SuperLink must listen on loopback only. Imports no torch: command lines use it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab

from conf.exits import Exit, Stop

FLOWER = "1.41.0"
if version("flwr") != FLOWER:
    raise ImportError(f"flwr is {version('flwr')}; this adapter was read for {FLOWER}: install that one")


@contextmanager
def control(address: str, certificates: bytes) -> Iterator[Control]:
    """SuperLink's Control API at host:port; `certificates` are its authority's, PEM.

    Raises:
        Stop: (`LINK`) from within the context: it does not answer, or refuses.
    """
    client = ControlHttpClient.from_server_address(
        address, insecure=False, root_certificates=certificates, interceptors=[]
    )
    try:
        yield Control(client)
    except httpx.TransportError as error:
        raise Stop(Exit.LINK, f"SuperLink does not answer at {address} ({error})") from None
    except httpx.HTTPStatusError as error:
        raise Stop(Exit.LINK, f"SuperLink refuses (HTTP {error.response.status_code})") from None
    finally:
        client.close()  # an idle TLS client would delay SuperLink's end by half a minute


@dataclass(frozen=True)
class Entry:
    """One of Flower's runs: its number, the directory that it is for, and how it stands.

    Attributes:
        status: pending, starting, running or finished. sub_status, details: how it finished.
        cancels: it was only started to end the work of another.
    """

    id: int
    name: str
    status: str
    sub_status: str
    details: str
    cancels: bool


@dataclass(frozen=True)
class Control:
    """What an operator does at SuperLink."""

    client: ControlHttpClient

    def register(self, name: str, key: str) -> None:
        """Let the node with this public key (PEM) in; one that is let in already stays.

        Raises:
            Stop: (`CONFIG`) it is no key.
        """
        try:
            self.client.RegisterNode(RegisterNodeRequest(public_key=key.encode(), name=name))
        except httpx.HTTPStatusError as error:
            said = FlowerError.from_json(error.response.text)
            if said is None or said.code != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                raise Stop(
                    Exit.CONFIG, f"public key of site {name} is not taken; need an elliptic curve key, PEM"
                ) from None

    def online(self) -> int:
        """How many nodes are online."""
        return sum(node.status == "online" for node in self.client.ListNodes(ListNodesRequest()).nodes_info)

    def start(self, bundle: bytes, settings: Mapping[str, str]) -> int:
        """Start a run; returns its number."""
        fab = fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {}))
        request = StartRunRequest(fab=fab, override_config=user_config_to_proto(dict(settings)))
        return int(self.client.StartRun(request).run_id)

    def status(self, run: int) -> tuple[str, str, str]:
        """Status, sub-status and detail of a run."""
        (found,) = self.client.ListRuns(ListRunsRequest(run_id=run)).run_dict.values()
        return found.status.status, found.status.sub_status, found.status.details

    def runs(self) -> list[Entry]:
        """The newest thousand runs, oldest first."""
        found = self.client.ListRuns(ListRunsRequest(limit=1000)).run_dict.values()
        return [
            Entry(
                run.run_id,
                run.override_config["run"].string if "run" in run.override_config else "",
                run.status.status,
                run.status.sub_status,
                run.status.details,
                "cancel" in run.override_config,
            )
            for run in sorted(found, key=lambda run: run.pending_at)
        ]

    def stop(self, run: int) -> None:
        """Stop a run."""
        self.client.StopRun(StopRunRequest(run_id=run))


#: A bundle without code: both ends run what they have installed. It only names the two apps.
_BUNDLE = b"""\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "wardround"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "wardround"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
run = ""
cancel = ""
"""


def bundle() -> bytes:
    """The bundle that every run is started with: the same bytes each time."""
    return build_fab_from_files({"pyproject.toml": _BUNDLE})[0]
