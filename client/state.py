"""What a site remembers between instructions: settled and tentative state, and the replies it gave.

A record is one file: the digest of the instruction it answers, the reply (where replies are kept), and
the private state the answer led to. State and reply appear in one rename, so that no crash separates
them. A state is *tentative* until the coordinator says that its epoch counted; then it is *settled*.
The settled one before it stays too, for a coordinator that falls back by one checkpoint.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from conf.files import sync_folder, write_atomic
from strategies.protocol import Epoch, Instruction, Refused, Reply, Tree, pack, unpack

_NAME = re.compile(r"state-(\d+)-(\d+)\.(tentative|settled)\.safetensors")


@dataclass(frozen=True)
class _Generation:
    epoch: Epoch
    settled: bool
    path: Path


class Memory:
    """The records of one site in one run, below `folder`.

    `durable` keeps every reply (a deployed site); otherwise only private states are kept.
    """

    def __init__(self, folder: Path, *, durable: bool) -> None:
        self._folder = folder
        self._durable = durable

    def recall(self, instruction: Instruction) -> Reply | None:
        """The reply already given to this very instruction.

        Raises:
            Refused: (`conflict`) another instruction was answered under its round, attempt and stage;
                (`lost`) the record is damaged; (`stale`) its round is over, and what was answered forgotten.
        """
        if not self._durable:
            return None
        states = (g.path for g in self._generations() if g.epoch == instruction.epoch)
        for path in (self._reply(instruction), *states):
            if not path.exists():
                continue
            record = _read(path)
            if record["key"] != _key(instruction):
                continue
            if record["digest"] != instruction.digest:
                raise Refused("conflict", str(record["key"]))
            return Reply.from_tree(record["reply"])
        if self._floor.exists() and instruction.round < int(self._floor.read_bytes()):
            raise Refused("stale", f"round {instruction.round}")
        return None

    def settle(self, epoch: Epoch | None) -> Tree:
        """Keep what `epoch` left, drop what came after it, and return that state (empty at first).

        Raises:
            Refused: `lost` when the state of `epoch` is not here or damaged, `rewound` when the coordinator
                knows of no epoch though more than one was settled: it fell back further than it may.
        """
        generations = self._generations()
        if epoch is None:
            if sum(g.settled for g in generations) > 1:
                raise Refused("rewound", f"settled: {[g.epoch for g in generations]}")
            self._drop(generations)
            return {}
        found = next((g for g in generations if g.epoch == epoch), None)
        if found is None:
            raise Refused("lost", f"no state of {epoch}")
        state: Tree = _read(found.path)["state"]
        if not found.settled:
            found.path.replace(self._path(epoch, "settled"))
            sync_folder(self._folder)
        older = [g for g in generations if g.epoch < epoch and g.settled]
        self._drop([g for g in generations if g.epoch != epoch and g not in older])
        self._drop(older[:-1])  # one settled generation stays, for a coordinator that falls back
        return state

    def keep(self, instruction: Instruction, reply: Reply, state: Tree | None) -> None:
        """Make the reply and the state durable, before the reply leaves."""
        if state is None and not self._durable:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        record: Tree = {"key": _key(instruction)}
        if self._durable:
            record |= {"digest": instruction.digest, "reply": reply.to_tree()}
        path = self._reply(instruction)
        if state is not None:
            record["state"] = state
            path = self._path(instruction.epoch, "tentative")
        for left in self._folder.glob(".*.part"):  # of a process that was killed as it wrote
            left.unlink()
        write_atomic(path, pack(record))
        first = instruction.settled[0] if instruction.settled else 0
        # what is settled is asked again only by a coordinator that falls back by one checkpoint
        if past := [p for p in self._folder.glob("reply-*") if int(p.name.split("-")[1]) < first]:
            # forgotten, but not to be answered anew: that would be a second release
            write_atomic(self._floor, str(first).encode())
        for old in past:
            old.unlink(missing_ok=True)

    @property
    def _floor(self) -> Path:
        """Holds the first round whose replies are kept."""
        return self._folder / "floor"

    def _generations(self) -> list[_Generation]:
        """States on disk, oldest first."""
        if not self._folder.is_dir():
            return []
        found = [
            _Generation((int(match[1]), int(match[2])), match[3] == "settled", path)
            for path in self._folder.iterdir()
            if (match := _NAME.fullmatch(path.name))
        ]
        return sorted(found, key=lambda g: g.epoch)

    def _path(self, epoch: Epoch, status: str) -> Path:
        return self._folder / f"state-{epoch[0]:06d}-{epoch[1]}.{status}.safetensors"

    def _reply(self, instruction: Instruction) -> Path:
        stage = hashlib.sha256(instruction.stage.encode()).hexdigest()[:16]
        return self._folder / f"reply-{instruction.round:06d}-{instruction.attempt}-{stage}.safetensors"

    @staticmethod
    def _drop(generations: list[_Generation]) -> None:
        for generation in generations:
            generation.path.unlink(missing_ok=True)


def _read(path: Path) -> Tree:
    try:
        return unpack(path.read_bytes())
    except Refused:
        raise Refused("lost", f"{path.name} is damaged") from None


def _key(instruction: Instruction) -> list[str | int]:
    return [instruction.run, instruction.round, instruction.attempt, instruction.stage]
