"""The coordinator's connection to SuperLink: all that this side uses of Flower's private parts.

They were read and tested for one version, and change often: another version is refused at import. The
loopback tests (`tests/federation/test_flower*.py`) show whether they still hold.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import httpx
from flwr.app import ArrayRecord, Message
from flwr.common.constant import SubStatus
from flwr.common.serde import run_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Message as Head
from flwr.proto.run_pb2 import Run as RunProto
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import http_retry
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from conf.exits import Exit, Stop
from conf.files import write_atomic
from server.control import Control, control
from server.exchange.flower import Courier, Node
from strategies.letter import Answer, Call, run_key

FLOWER = "1.41.0"
if version("flwr") != FLOWER:
    raise ImportError(f"flwr is {version('flwr')}; this adapter was read for {FLOWER}: install that one")

# between tries while SuperLink is away; Flower waits up to 20 s
http_retry.__dict__["MAX_RETRY_DELAY"] = 3

_AWAY = (502, 503, 504)
_TRIES = 12  # for an object that is announced and not there: about four seconds
_COMING_S = 300.0  # then the answer counts as lost, and the site is asked for it again

log = logging.getLogger(__name__)


class Post(Courier):
    """A run's letters, through the grid of its ServerApp.

    Args:
        sites: the name of each site and the public key of its node (PEM), from the federation's own list.
            What a node calls itself plays no part.
    """

    def __init__(self, grid: Grid, sites: Mapping[str, str]) -> None:
        if not isinstance(grid, HttpGrid):
            raise TypeError(f"needs Flower's HttpGrid; got {type(grid).__name__}")
        self._grid = grid
        self._names = {key.strip(): name for name, key in sites.items()}
        self._coming: list[tuple[Head, ObjectTree, float]] = []  # answers and since when they are known

    def nodes(self) -> dict[str, Node]:
        """Sites that are online."""
        found: dict[str, Node] = {}
        for info in self._grid.get_nodes():
            name = self._names.get(info.public_key.decode("ascii", "replace").strip())
            if name is not None:
                found[name] = Node(info.node_id, info.last_activated_at)
        return found

    def send(self, calls: Mapping[int, Call], group: str) -> dict[str, int]:
        """Post one call to each node; returns the number of its letter, where it was taken."""
        nodes, messages = list(calls), []
        shared: dict[int, ArrayRecord] = {}
        for node, call in calls.items():
            content = call.to_content()
            for name, record in content.array_records.items():
                # one object for one payload: Flower cuts each object into pieces, which are copies
                content[name] = shared.setdefault(id(call.common), record)
            messages.append(Message(content, dst_node_id=node, message_type="train", group_id=group))
        ids = self._grid.push_messages(messages)
        return {id: node for id, node in zip(ids, nodes, strict=False) if id}

    def end(self, run: str, wait_s: float = 10.0) -> None:
        """Tell every site that is online to end its work for the run of this id."""
        call = Call("cancel", run_key(run))
        out = set(self.send({node.id: call for node in self.nodes().values()}, "cancel"))
        until = time.monotonic() + wait_s
        while out and time.monotonic() < until:
            out -= {letter for letter, _ in self.ready(out)}
            time.sleep(0.15)

    def ready(self, ids: Iterable[str]) -> Iterator[tuple[str, Answer | None]]:
        """Answers that are there, their objects fetched one answer at a time; None for one that is lost.

        SuperLink names an answer once, and before all of its objects are there: a slow site, or one that was
        cut off, is tried again later, so that the others' answers need not wait for it.
        """
        client, run = self._grid._runtime_client, self._grid.run.run_id
        fetch = make_pull_object_fn_protobuf(client.PullObject, self._grid.node, run)
        named, now = client.PullMessages(PullAppMessagesRequest(message_ids=ids)), time.monotonic()
        heads = zip(named.messages_list, named.message_object_trees, strict=True)
        coming, self._coming = [*self._coming, *((head, tree, now) for head, tree in heads)], []
        for head, tree, since in coming:
            asked = head.metadata.reply_to_message_id
            try:
                names = [part.object_id for part in iterate_object_tree(tree)]
                contents = pull_objects(
                    names, fetch, initial_backoff=0.05, backoff_cap=0.5, max_tries_per_object=_TRIES
                )
            except ObjectPullError as error:
                if "limit reached" in str(error) and time.monotonic() - since < _COMING_S:
                    self._coming.append((head, tree, since))
                else:
                    yield asked, None
                continue
            client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=self._grid.node, run_id=run, message_object_id=head.metadata.message_id
                )
            )
            yield asked, _answer(head.metadata.message_id, contents)
            del contents


def _answer(name: str, contents: dict[str, bytes]) -> Answer | None:
    """The answer in a message's objects, whatever a site has put there."""
    try:
        message = inflate_object_from_contents(name, contents)
        if isinstance(message, Message) and message.has_error():
            return None  # made by SuperLink: the node is gone, or its answer is
        return Answer.from_content(message.content)  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001  Flower's own reader of a site's bytes raises all kinds
        return Answer("payload", "")


@dataclass(frozen=True)
class Link:
    """Where SuperLink is, and what opens it.

    Attributes:
        address: host:port. certificates: of its authority, PEM. secret: the SuperExec secret, for tasks.
    """

    address: str
    certificates: bytes
    secret: bytes = b""

    @contextmanager
    def task(
        self, token: Path, settle: Callable[[Control], None] = lambda _: None, pause_s: float = 0.5
    ) -> Iterator[tuple[Grid, dict[str, object]]]:
        """Take a run's ServerApp task, or go on with the one whose token is kept: its grid and settings.

        The token is a file that only its owner can read. Whoever comes back with it within the task's
        lease (60 s) continues the same run; it is removed when the task is over.

        Args:
            settle: called before another task is taken.
        """
        held = self._held(token)
        while held is None:
            self._settle(settle, pause_s)
            self._acquire(token, pause_s)
            held = self._held(token)
        kept, grid = held
        run = run_from_proto(RunProto.FromString(bytes.fromhex(kept["run"])))
        grid.set_run(run)
        # Flower's Message() asks for these
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run.run_id, 1, int(kept["task"])
        beat = HeartbeatSender(partial(_beat, grid))
        beat.start()
        status, detail = SubStatus.FAILED, "interrupted"
        over = True
        try:
            yield grid, dict(run.override_config)
            status, detail = SubStatus.COMPLETED, ""
        except RunNotRunningException:
            status = ""
        except Stop as stop:
            detail = stop.exit.name
            raise
        except Exception:
            detail = Exit.INTERNAL.name
            raise
        except BaseException:
            over = False  # told to go: whoever comes back continues
            raise
        finally:
            if beat.is_running:
                beat.stop()
            if over:
                if status:
                    request = PushTaskOutputRequest(sub_status=status, details=detail)
                    with suppress(RunNotRunningException):
                        grid._runtime_client.PushTaskOutput(request)
                token.unlink(missing_ok=True)
            grid.close()

    def _acquire(self, token: Path, pause_s: float) -> None:
        """Wait for a task and keep its token, before it counts as running: from then on it can be lost."""
        interceptors: list[ProtobufClientInterceptor] = [
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(
                master_secret=self.secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
            ),
        ]
        client = RuntimeHttpClient.from_server_address(
            self.address, False, self.certificates, interceptors=interceptors
        )
        request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        try:
            while True:
                try:
                    if given := client.AcquireTask(request).token:
                        break
                except httpx.TransportError as error:
                    _away(error)
                except httpx.HTTPStatusError as error:
                    if error.response.status_code in (401, 403):
                        raise Stop(Exit.LINK, "SuperLink refuses the SuperExec secret") from None
                time.sleep(pause_s)
        finally:
            client.close()
        _keep(token, {"token": given})

    def _held(self, token: Path) -> tuple[dict[str, str], HttpGrid] | None:
        """The task whose token is kept, if SuperLink still takes it."""
        kept = _kept(token)
        if kept is None:
            return None
        grid = HttpGrid(self.address, False, self.certificates, token=kept["token"])
        # Flower's own would end this process with a signal when its task is over
        grid._retry_invoker.should_giveup = _is_over
        try:
            if "run" in kept:
                list(grid.get_nodes())
            else:
                task = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
                kept |= {"run": task.run.SerializeToString().hex(), "task": str(task.task_id)}
                _keep(token, kept)
            return kept, grid
        except (httpx.HTTPStatusError, RunNotRunningException):
            log.warning("the kept task is over; waiting for another")
        grid.close()
        token.unlink()
        return None

    def _settle(self, settle: Callable[[Control], None], pause_s: float) -> None:
        with control(self.address, self.certificates) as superlink:
            while True:
                try:
                    return settle(superlink)
                except httpx.TransportError as error:
                    _away(error)
                except httpx.HTTPStatusError as error:
                    status = error.response.status_code
                    if status not in _AWAY:
                        raise Stop(Exit.LINK, f"SuperLink refuses the coordinator (HTTP {status})") from None
                time.sleep(pause_s)


def _away(error: httpx.TransportError) -> None:
    """SuperLink does not answer: it may come back, but not with another certificate.

    Raises:
        Stop: (`LINK`).
    """
    if "certificate" in str(error).lower():
        raise Stop(Exit.LINK, "SuperLink's certificate is not of the authority in --certificates") from None
    log.info("SuperLink is away")


def _is_over(error: Exception) -> bool:
    """Whether to give up after an error; a task that is over raises at once."""
    if isinstance(error, httpx.HTTPStatusError):
        if error.response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise RunNotRunningException
        return error.response.status_code not in _AWAY
    return "certificate" in str(error).lower()


def _beat(grid: HttpGrid) -> bool:
    """Renew the task's lease. That it is over is heard by whoever asks for something next."""
    try:
        grid._runtime_client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    except httpx.TransportError:
        return False
    except (httpx.HTTPStatusError, RunNotRunningException):
        pass
    return True


def _kept(token: Path) -> dict[str, str] | None:
    try:
        kept: dict[str, str] = json.loads(token.read_text())
    except (OSError, ValueError):
        return None
    return kept


def _keep(token: Path, kept: dict[str, str]) -> None:
    token.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(token, json.dumps(kept).encode(), 0o600)
