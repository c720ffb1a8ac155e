"""What a site's bytes can do at the coordinator: nothing but be refused, or be late."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.exits import Stop
from server import link
from server.link import Post
from strategies.letter import Answer


class SuperLink:
    """Holds messages, and those of their objects that have come."""

    def __init__(self) -> None:
        self.named: list[tuple[Any, Any]] = []
        self.objects: dict[str, bytes] = {}
        self.missing: set[str] = set()
        self.confirmed: list[str] = []

    def post(self, content: RecordDict, letter: str) -> list[str]:
        """An answer to a letter; the names of its objects."""
        from flwr.app import Metadata

        metadata = Metadata(7, "", 3, 1, letter, "", 0.0, 60.0, "train")
        message = Message(content=content, metadata=metadata)  # type: ignore[call-overload]
        metadata.__dict__["_message_id"] = message.object_id
        objects = get_all_nested_objects(message)
        self.objects |= {name: part.deflate() for name, part in objects.items()}
        head = message_to_proto(remove_content_from_message(message))
        self.named.append((head, get_object_tree(message)))
        return list(objects)

    def PullMessages(self, _: object) -> PullAppMessagesResponse:
        named, self.named = self.named, []
        heads, trees = [head for head, _ in named], [tree for _, tree in named]
        return PullAppMessagesResponse(messages_list=heads, message_object_trees=trees)

    def PullObject(self, asked: Any) -> PullObjectResponse:
        here = asked.object_id not in self.missing
        content = self.objects[asked.object_id] if here else b""
        return PullObjectResponse(object_found=True, object_available=here, object_content=content)

    def ConfirmMessageReceived(self, asked: Any) -> None:
        self.confirmed.append(asked.message_object_id)


@pytest.fixture
def superlink() -> SuperLink:
    return SuperLink()


@pytest.fixture
def post(superlink: SuperLink, monkeypatch: pytest.MonkeyPatch) -> Post:
    grid = HttpGrid("127.0.0.1:1", token="t")
    grid._client = superlink  # type: ignore[assignment]
    grid.set_run(Run.create_empty(7))
    monkeypatch.setattr(link, "_TRIES", 2)
    return Post(grid, {})


def heard(post: Post, ids: Iterable[str] = ("a", "b")) -> dict[str, Answer | None]:
    return dict(post.ready(ids))


def test_an_answer_comes_when_all_of_it_is_there_and_holds_up_no_other(
    post: Post, superlink: SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick = Answer("pending", "1"), Answer("pending", "2")
    superlink.missing = {superlink.post(slow.to_content(), "a")[-1]}
    superlink.post(quick.to_content(), "b")
    assert heard(post) == {"b": quick}
    assert heard(post) == {}
    superlink.missing.clear()
    assert heard(post) == {"a": slow}
    assert len(superlink.confirmed) == 2

    monkeypatch.setattr(link, "_COMING_S", 0.0)
    superlink.missing = {superlink.post(slow.to_content(), "a")[0]}
    assert heard(post) == {"a": None}
    assert heard(post) == {}


@settings(deadline=None, max_examples=60)
@given(
    st.binary(max_size=80), st.sampled_from(["", "Message", "RecordDict", "Array", "ArrayChunk", "NoSuch"])
)
def test_whatever_bytes_an_answer_is_made_of_it_is_refused(body: bytes, kind: str) -> None:
    content = f"{kind} {len(body)}\0".encode() + body if kind else body
    assert link._answer("x", {"x": content}) == Answer("payload", "")
    assert link._answer("x", {}) == Answer("payload", "")


def test_a_certificate_of_another_authority_is_said_so() -> None:
    link._away(httpx.ConnectError("refused"))
    with pytest.raises(Stop, match="certificate is not of the authority"):
        link._away(httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"))
