"""The door between agent and trainer: one gRPC method on a Unix socket, bytes in and bytes out.

A frame is a line of JSON (words and the blobs' sizes) and then the blobs, in pieces of 1 MiB. The agent's
end stands here; it imports no torch. The other end is `client.trainer`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from strategies.letter import Answer, Call, Unreadable

SERVICE = "wardround.Trainer"
METHOD = f"/{SERVICE}/Do"
STAGES = ("plan", "train", "evaluate", "trivial", "fingerprint", "other")
GRACE_S = 30.0
"""What a call may take beyond the wait that it asks for."""

_PIECE = 2**20
_MAX_HEAD = 2**16


def frame(words: Mapping[str, Any], *blobs: bytes) -> Iterator[bytes]:
    """The messages of one frame."""
    yield json.dumps({**words, "sizes": [len(blob) for blob in blobs]}).encode()
    for blob in blobs:
        view = memoryview(blob)
        for start in range(0, len(view), _PIECE):
            yield bytes(view[start : start + _PIECE])


def unframe(messages: Iterable[bytes], count: int) -> tuple[dict[str, Any], list[bytes]]:
    """Words and blobs of a frame.

    Raises:
        Unreadable: it is no frame of `count` blobs.
    """
    stream = iter(messages)
    head = next(stream, b"")
    try:
        words: dict[str, Any] = json.loads(head[:_MAX_HEAD])
        sizes = words.pop("sizes")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise Unreadable("no head") from None
    blobs = [bytearray() for _ in range(count)]
    if not (
        isinstance(sizes, list) and len(sizes) == count and all(type(s) is int and s >= 0 for s in sizes)
    ):
        raise Unreadable("sizes")
    for blob, size in zip(blobs, sizes, strict=True):
        while len(blob) < size:
            piece = next(stream, b"")
            if not piece or len(blob) + len(piece) > size:
                raise Unreadable("a frame ends early or late")
            blob += piece
    return words, [bytes(blob) for blob in blobs]


@dataclass(frozen=True)
class Given:
    """An answer, and what may be counted about it: one of `STAGES`, `update` or a failure's code, seconds."""

    answer: Answer
    stage: str = ""
    outcome: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Door:
    """The agent's end: asks the trainer behind a socket. Never raises; nobody at home is `away`."""

    socket: Path
    options: tuple[tuple[str, int], ...] = field(default=(("grpc.enable_retries", 0),), repr=False)

    def ask(self, call: Call) -> Given:
        """Carry a call in, and bring its answer back."""
        words = {"operation": call.operation, "key": call.key, "wait_s": call.wait_s}
        try:
            with grpc.insecure_channel(f"unix:{self.socket}", options=self.options) as channel:
                do: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(METHOD)
                messages = do(frame(words, call.instruction, call.common), timeout=call.wait_s + GRACE_S)
                said, (reply,) = unframe(messages, 1)
            return Given(
                Answer(str(said["status"]), call.key, reply),
                str(said["stage"]),
                str(said["outcome"]),
                float(said["seconds"]),
            )
        except grpc.RpcError:
            return Given(Answer("away", call.key))
        except Exception:  # noqa: BLE001  the boundary: no exception text may leave a hospital
            return Given(Answer("internal", call.key))
