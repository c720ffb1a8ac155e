"""What a run needs to go on: written whole or not at all, read back only if every byte is right."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from conf.exits import Exit, Stop
from conf.files import no_space, sync_folder, write_synced
from strategies.base import Tensors
from strategies.protocol import Epoch, Refused, Tree, pack_file, unpack

RESULT = "model.safetensors"
"""In a run's directory: the model that the run came to, as any reader of safetensors has it."""


@dataclass(frozen=True)
class Progress:
    """A run between two rounds.

    Attributes:
        round: rounds done. state: the strategy's. settled: each site's last epoch that counted.
        exchange: the exchange's clock and outstanding jobs. average: the model's moving one, where asked for.
    """

    round: int
    model: Tensors
    state: Tree
    settled: dict[str, Epoch] = field(default_factory=dict)
    exchange: Tree = field(default_factory=dict)
    average: Tensors = field(default_factory=dict)

    @property
    def result(self) -> Tensors:
        """The model to be scored and kept."""
        return self.average or self.model

    @property
    def trees(self) -> dict[str, Tree]:
        """What a checkpoint holds in files of its own."""
        always: dict[str, Tree] = {"model": self.model, "strategy": self.state}
        return {**always, **({"average": self.average} if self.average else {})}


def save(folder: Path, progress: Progress, keep: int, best: int = 0) -> None:
    """Write `round-NNNN` below `folder` and drop all but the newest `keep` and that of round `best`.

    Raises:
        Stop: (`DISK_FULL`) the older checkpoints are untouched.
    """
    final = folder / f"round-{progress.round:04d}"
    temporary = folder / f".{final.name}.{os.getpid()}.part"
    with no_space(final, "wardround resume"):
        try:
            temporary.mkdir(parents=True)
            named = {f"{name}.safetensors": tree for name, tree in progress.trees.items()}
            digests = {name: pack_file(tree, temporary / name) for name, tree in named.items()}
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
    half = folder.glob(".round-*.part")  # of killed processes
    for old in (*_all(folder)[:-keep], *half):
        if not best or old != folder / f"round-{best:04d}":
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
    trees = {}
    for name, sha256 in state["sha256"].items():
        blob = (path / name).read_bytes()
        if hashlib.sha256(blob).hexdigest() != sha256:
            raise ValueError(f"{name} does not match its digest")
        trees[name.partition(".")[0]] = unpack(blob)
    settled = {site: (epoch[0], epoch[1]) for site, epoch in state["settled"].items()}
    average = trees.get("average", {})
    return Progress(state["round"], trees["model"], trees["strategy"], settled, state["exchange"], average)


def result(run: Path) -> Tensors:
    """The model of a run's directory: that of its end, else of its newest checkpoint.

    Raises:
        Stop: (`NO_RUN`, `CHECKPOINT_DAMAGED`) there is none.
    """
    if (run / RESULT).exists():
        try:
            return safetensors.torch.load((run / RESULT).read_bytes())
        except SafetensorError as error:
            raise Stop(Exit.CHECKPOINT_DAMAGED, f"{run / RESULT} is damaged: {error}") from None
    progress, _ = latest(run / "checkpoints")
    if progress is None:
        raise Stop(Exit.NO_RUN, f"{run} has no checkpoint; give a run's directory")
    return progress.result


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
