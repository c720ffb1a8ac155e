"""A site's connection to SuperLink: all that this side uses of Flower's private parts.

They were read and tested for one version, and change often: another version is refused at import. The
loopback tests (`tests/federation/test_flower*.py`) show whether they still hold.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from conf.exits import Exit, Stop
from conf.files import write_atomic

FLOWER = "1.41.0"
if version("flwr") != FLOWER:
    raise ImportError(f"flwr is {version('flwr')}; this adapter was read for {FLOWER}: install that one")

_FIRST_S, _LAST_S = 0.1, 3.0  # between tries while SuperLink is away; Flower's own goes up to 20 s
_AWAY = frozenset({502, 503, 504})
_BEAT_S = HEARTBEAT_DEFAULT_INTERVAL / 2

log = logging.getLogger(__name__)
Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


class Gone(Exception):
    """SuperLink no longer knows this node's lease; a new connection is needed."""


@dataclass(frozen=True)
class Letter:
    """A message that SuperLink holds for this node: who sent it, and of which objects it consists."""

    head: Message
    tree: ObjectTree

    @property
    def run(self) -> int:
        """Flower's number of the run."""
        return self.head.metadata.run_id


class Fleet:
    """One node's lease at SuperLink, held as long as the context is open.

    Args:
        address: host:port. certificates: of the authority that signed SuperLink's, PEM.
        key: the node's own, registered there. lease: where the node's number is kept, so that a restarted
            agent can give its predecessor's lease back instead of waiting for its end.
    """

    def __init__(self, address: str, certificates: bytes, key: EllipticCurvePrivateKey, lease: Path) -> None:
        self._lease = lease
        self._key = public_key_to_bytes(key.public_key())
        self._client = FleetHttpClient.from_server_address(
            address,
            False,
            certificates,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )
        self._bundles: dict[int, str] = {}
        self._closed = threading.Event()
        self._lost = threading.Event()

    def __enter__(self) -> Fleet:
        with suppress(OSError, ValueError):
            old = int(self._lease.read_text())
            with suppress(httpx.HTTPStatusError):
                self._patiently(self._client.DeactivateNode, DeactivateNodeRequest(node_id=old))
        request = ActivateNodeRequest(public_key=self._key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        while True:
            try:
                answer = self._patiently(self._client.ActivateNode, request)
                break
            except httpx.HTTPStatusError as error:
                if error.response.status_code != httpx.codes.PRECONDITION_FAILED:
                    raise Stop(Exit.LINK, _refusal(error)) from None
                log.info("an older lease of this node has not ended yet")
                time.sleep(_LAST_S)
        self._node = Node(node_id=answer.node_id)
        self._lease.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._lease, str(answer.node_id).encode())
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        with suppress(httpx.HTTPError):
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        self._client.close()

    def receive(self) -> Letter | None:
        """The next letter, if there is one.

        Raises:
            Gone: the lease is over.
        """
        if self._lost.is_set():
            raise Gone
        try:
            answer = self._patiently(self._client.PullMessages, PullMessagesRequest(node=self._node))
        except httpx.HTTPStatusError:
            raise Gone from None
        if not answer.messages_list:
            return None
        return Letter(message_from_proto(answer.messages_list[0]), answer.message_object_trees[0])

    def bundle(self, letter: Letter) -> str:
        """SHA-256 of the bundle that the letter's run was started with."""
        if letter.run not in self._bundles:
            request = GetRunRequest(node=self._node, run_id=letter.run)
            self._bundles[letter.run] = str(self._patiently(self._client.GetRun, request).run.fab_hash)
        return self._bundles[letter.run]

    def open(self, letter: Letter) -> Message:
        """Fetch a letter's objects, and tell SuperLink that they are here."""
        pull = functools.partial(self._patiently, self._client.PullObject)
        fetch = make_pull_object_fn_protobuf(pull, self._node, letter.run)
        ids = [tree.object_id for tree in iterate_object_tree(letter.tree)]
        contents = pull_objects(ids, fetch, initial_backoff=0.05, backoff_cap=0.5)
        message = inflate_object_from_contents(letter.tree.object_id, contents)
        if not isinstance(message, Message):
            raise TypeError("no message")
        message.metadata.__dict__["_message_id"] = letter.tree.object_id
        request = ConfirmMessageReceivedRequest(
            node=self._node, run_id=letter.run, message_object_id=letter.tree.object_id
        )
        self._patiently(self._client.ConfirmMessageReceived, request)
        return message

    def answer(self, letter: Letter, content: RecordDict, seconds: float) -> int:
        """Send the answer to a letter; returns its size in bytes."""
        reply = Message(content, reply_to=letter.head)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree = get_object_tree(reply)
            objects = get_all_nested_objects(reply)
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
            asked = self._patiently(self._client.PushMessages, request)
            sent = 0

            def put(object_id: str, blob: bytes) -> None:
                nonlocal sent
                sent += len(blob)
                store(object_id, blob)

            push = functools.partial(self._patiently, self._client.PushObject)
            store = make_push_object_fn_protobuf(push, self._node, letter.run, asked.session_id)
            push_objects(objects, put, object_ids_to_push=set(asked.objects_to_push))
        return sent

    def _beat(self) -> None:
        """Renew the lease until closed; a SuperLink that says no has given it to somebody else."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        while not self._closed.wait(_BEAT_S):
            try:
                if not self._patiently(self._client.SendNodeHeartbeat, request).success:
                    self._lost.set()
            except (httpx.HTTPError, RuntimeError, Stop):
                if not self._closed.is_set():
                    self._lost.set()
            if self._lost.is_set():
                return

    def _patiently(self, method: Callable[[Asked], Answered], request: Asked) -> Answered:
        """Call SuperLink; while it is away, again."""
        pause = _FIRST_S
        while True:
            try:
                return method(request)
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in _AWAY:
                    raise
            except httpx.TransportError as error:
                if "certificate" in str(error).lower():
                    raise Stop(
                        Exit.LINK, "SuperLink's certificate is not of the authority in --certificates"
                    ) from None
                if self._closed.is_set():
                    raise
            if pause == _FIRST_S:
                log.info("SuperLink is away")
            time.sleep(pause)
            pause = min(2 * pause, _LAST_S)


def _refusal(error: httpx.HTTPStatusError) -> str:
    return (
        f"SuperLink refused this node (HTTP {error.response.status_code}); is its public key registered "
        "there, and do the two clocks agree?"
    )


def read_key(path: Path) -> EllipticCurvePrivateKey:
    """A node's private key: OpenSSH, elliptic curve.

    Raises:
        Stop: (`LINK`).
    """
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise Stop(Exit.LINK, f"key {path} cannot be read ({type(error).__name__}); need OpenSSH") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise Stop(Exit.LINK, f"key {path} is a {type(key).__name__}; need an elliptic curve key (P-384)")
    return key
