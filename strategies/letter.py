"""What travels between coordinator and trainer, and how it lies in a Flower message.

The coordinator sends a `Call`, the site sends an `Answer`: packed trees with a few plain words about
them. Whoever only carries them never opens a tree, so this module, and with it the network side of a
site, needs no torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.app import RecordDict

#: `train` starts the work or joins it and waits; `collect` waits; `cancel` ends it.
OPERATIONS = ("train", "collect", "cancel")

#: How a call may end. Nothing else is said outside of a packed reply.
STATUSES = {
    "reply": "the packed reply is in the answer",
    "pending": "the work outlasts the wait; collect it later",
    "unknown": "there is no such work here; send it again",
    "busy": "as many jobs wait already as there is room for; send it again later",
    "away": "the trainer is not there; send it again later",
    "payload": "the call could not be read",
    "policy": "the site's agent does not carry for this run",
    "internal": "something else went wrong between agent and trainer",
}

SMALL = 4 * 2**20
"""Blobs up to this size ride in the record of their call: three Flower objects in place of five."""

_CALL, _COMMON, _ANSWER, _BLOB = "call", "common", "answer", "blob"
_FORMAT = "wardround"


def run_key(run: str) -> str:
    """What `cancel` names to end all work of a run."""
    return hashlib.sha256(f"run {run}".encode()).hexdigest()


class Unreadable(ValueError):
    """A message holds no call or no answer."""


@dataclass(frozen=True)
class Call:
    """What the coordinator wants of a site.

    Attributes:
        key: SHA-256 of `instruction`; to cancel, also `run_key` of a run.
        wait_s: how long the site may take before it answers `pending`.
        instruction, common: packed; empty but for `train`.
    """

    operation: str
    key: str
    wait_s: float = 0.0
    instruction: bytes = b""
    common: bytes = b""

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS or len(self.key) != 64 or not 0 <= self.wait_s <= 3600:
            raise Unreadable("no call")

    def to_content(self) -> RecordDict:
        """As a Flower message's content. A large `common` is one object, shared by the calls of an ask."""
        words: dict[str, str | float | bytes] = {
            "operation": self.operation,
            "key": self.key,
            "wait_s": self.wait_s,
            "instruction": self.instruction,
        }
        return _to_content(_CALL, words, _COMMON, self.common)

    @classmethod
    def from_content(cls, content: RecordDict) -> Call:
        """The call in a Flower message.

        Raises:
            Unreadable: there is none.
        """
        words, common = _from_content(content, _CALL, _COMMON)
        match words:
            case {
                "operation": str(operation),
                "key": str(key),
                "wait_s": float(wait_s),
                "instruction": bytes(instruction),
            }:
                return cls(operation, key, wait_s, instruction, common)
        raise Unreadable("no call")


@dataclass(frozen=True)
class Answer:
    """How a call ended; `reply` is a packed `strategies.protocol.Reply` where the status is `reply`."""

    status: str
    key: str
    reply: bytes = b""

    def __post_init__(self) -> None:
        if self.status not in STATUSES or len(self.key) > 64:
            raise Unreadable("no answer")

    def to_content(self) -> RecordDict:
        """As a Flower message's content."""
        return _to_content(_ANSWER, {"status": self.status, "key": self.key}, _BLOB, self.reply)

    @classmethod
    def from_content(cls, content: RecordDict) -> Answer:
        """The answer in a Flower message.

        Raises:
            Unreadable: there is none.
        """
        words, reply = _from_content(content, _ANSWER, _BLOB)
        match words:
            case {"status": str(status), "key": str(key)}:
                return cls(status, key, reply)
        raise Unreadable("no answer")


def _to_content(record: str, words: dict[str, str | float | bytes], name: str, blob: bytes) -> RecordDict:
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    if len(blob) <= SMALL:
        return RecordDict({record: ConfigRecord({**words, name: blob})})
    # its own format name: Flower neither copies nor reads the bytes
    array = Array(dtype="uint8", shape=(len(blob),), stype=_FORMAT, data=blob)
    return RecordDict({record: ConfigRecord({**words}), name: ArrayRecord({name: array})})


def _from_content(content: RecordDict, record: str, name: str) -> tuple[dict[str, object], bytes]:
    if set(content) - {record, name} or record not in content.config_records:
        raise Unreadable("other records than expected")
    words: dict[str, object] = dict(content.config_records[record])
    blob = words.pop(name, None)
    if blob is None and name in content.array_records:
        arrays = content.array_records[name]
        array = arrays.get(name)
        if array is not None and array.stype == _FORMAT:
            blob = array.data
    if not isinstance(blob, bytes):
        raise Unreadable("no blob")
    return words, blob
