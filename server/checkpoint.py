"""What a run needs to go on: written whole or not at all, read back only if every byte is right."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from conf.exits import Exit, Stop
from conf.files import no_space, sync_folder, write_synced
from strategies.base import Tensors
from strategies.protocol import Epoch, Refused, Tree, pack_file, unpack

_FILES = ("model.safetensors", "strategy.safetensors")


@dataclass(frozen=True)
class Progress:
    """A run between two rounds.

    Attributes:
        round: rounds done. state: the strategy's. settled: each site's last epoch that counted.
        exchange: the exchange's clock and outstanding jobs.
    """

    round: int
    model: Tensors
    state: Tree
    settled: dict[str, Epoch] = field(default_factory=dict)
    exchange: Tree = field(default_factory=dict)


def save(folder: Path, progress: Progress, keep: int) -> None:
    """Write `round-NNNN` below `folder` and drop all but the newest `keep`.

    Raises:
        Stop: (`DISK_FULL`) the older checkpoints are untouched.
    """
    final = folder / f"round-{progress.round:04d}"
    temporary = folder / f".{final.name}.{os.getpid()}.part"
    with no_space(final, "wardround resume"):
        try:
            temporary.mkdir(parents=True)
            trees = zip(_FILES, (progress.model, progress.state), strict=True)
            digests = {name: pack_file(tree, temporary / name) for name, tree in trees}
            seal = {
                "round": progress.round,
                "settled": {site: list(epoch) for site, epoch in sorted(progress.settled.items())},
                "exchange": progress.exchange,
                "sha256": digests,
            }
            write_synced(temporary / "state.json", _sealed(seal))
            sync_folder(temporary)
            if final.exists():  # damaged: `latest` passed it over
                shutil.rmtree(final)
            temporary.rename(final)
            sync_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    for old in (
        *_all(folder)[:-keep],
        *folder.glob(".round-*.part"),
    ):  # half-written ones of killed processes
        shutil.rmtree(old)


def latest(folder: Path) -> tuple[Progress | None, list[str]]:
    """The newest intact checkpoint (None: there is no checkpoint at all), and the damaged ones passed over.

    Raises:
        Stop: (`CHECKPOINT_DAMAGED`) there are checkpoints, none of them intact.
    """
    damaged: list[str] = []
    for path in reversed(_all(folder)):
        try:
            return load(path), damaged
        except (OSError, ValueError, KeyError, TypeError, Refused) as error:
            damaged.append(f"{path.name} ({error})")
    if damaged:
        raise Stop(
            Exit.CHECKPOINT_DAMAGED,
            f"no intact checkpoint in {folder}: {'; '.join(damaged)}; restore one or start a new run",
        )
    return None, []


def load(path: Path) -> Progress:
    """Read one checkpoint.

    Raises:
        ValueError: it is damaged; the message says which file.
    """
    state = _unsealed((path / "state.json").read_bytes())
    trees = []
    for name in _FILES:
        blob = (path / name).read_bytes()
        if hashlib.sha256(blob).hexdigest() != state["sha256"][name]:
            raise ValueError(f"{name} does not match its digest")
        trees.append(unpack(blob))
    settled = {site: (epoch[0], epoch[1]) for site, epoch in state["settled"].items()}
    return Progress(state["round"], trees[0], trees[1], settled, state["exchange"])


def kept(folder: Path) -> list[Tree]:
    """The exchange snapshots of the checkpoints still there."""
    return [_unsealed((path / "state.json").read_bytes())["exchange"] for path in _all(folder)]


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*"), key=lambda path: int(path.name.partition("-")[2]))


def _sealed(state: Tree) -> bytes:
    text = json.dumps(state, sort_keys=True, separators=(",", ":"))
    return json.dumps({"state": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


def _unsealed(blob: bytes) -> Tree:
    try:
        sealed = json.loads(blob)
        text = sealed["state"]
        if hashlib.sha256(text.encode()).hexdigest() == sealed["sha256"]:
            state: Tree = json.loads(text)
            return state
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError("state.json is damaged")
