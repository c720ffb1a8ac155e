"""What crosses between coordinator and site, and the one encoding of it for disk, socket and wire.

A `Tree` is nested dicts and lists of scalars and tensors. `pack` writes it as safetensors with a
single metadata key of canonical JSON, so that equal trees have equal bytes, whose SHA-256 is their
identity. (safetensors with several metadata keys is not deterministic.)
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

# what a process without torch knows of it
from strategies.failures import CODES as CODES
from strategies.failures import Failure as Failure
from strategies.failures import Refused as Refused

Tree = dict[str, Any]
Epoch = tuple[int, int]
"""(round, attempt): the time of a federation."""

_TENSOR = "$tensor"
_INCIDENT = re.compile(r"[0-9a-f]{0,8}")  # no room for words
DIGEST = re.compile(r"[0-9a-f]{64}")
_META = "wardround"
_MAX_DEPTH = 32


@dataclass(frozen=True)
class Instruction:
    """What one site is asked in one stage of one round.

    Attributes:
        settled: the site's last epoch whose reply was counted; the site promotes or discards by it.
        plan: digest of the plan. code: digest of the code both ends must run.
        common: digest of the payload that all sites of this ask share ("" where it never left the process).
        own: payload for this site alone.
    """

    run: str
    round: int
    attempt: int
    stage: str
    site: str
    settled: Epoch | None
    plan: str
    code: str
    common: str
    own: Tree = field(default_factory=dict)

    @property
    def epoch(self) -> Epoch:
        return self.round, self.attempt

    def to_tree(self) -> Tree:
        tree = dict(vars(self))
        tree["settled"] = None if self.settled is None else list(self.settled)
        return tree

    @classmethod
    def from_tree(cls, tree: Tree) -> Instruction:
        """Read an instruction from outside, whatever it is.

        Raises:
            Refused: (`payload`).
        """
        words = ("run", "stage", "site", "plan", "code", "common")
        match tree:
            case {
                "round": int(r),
                "attempt": int(a),
                "settled": None | [int(), int()] as settled,
                "own": dict(own),
            }:
                texts = {name: tree.get(name) for name in words}
                if len(tree) == 10 and min(r, a) >= 0 and all(type(t) is str for t in texts.values()):
                    epoch = None if settled is None else (settled[0], settled[1])
                    return cls(round=r, attempt=a, settled=epoch, own=own, **texts)  # type: ignore[arg-type]
        raise Refused("payload", "no instruction")

    @property
    def digest(self) -> str:
        """Identity: equal instructions, and only they, have equal digests."""
        return hashlib.sha256(pack(self.to_tree())).hexdigest()


@dataclass(frozen=True)
class Update:
    """A site's answer that is to be summed.

    Attributes:
        tensors: "group/parameter" to tensor; which, and of what shape, `Spec` fixes.
        weight: how much the site counts, a whole number.
        form: `plain` values, or a `ring` share lifted at the site for a secure sum.
    """

    tensors: dict[str, Tensor]
    weight: int = 1
    form: Literal["plain", "ring"] = "plain"

    def to_tree(self) -> Tree:
        return {"tensors": self.tensors, "weight": self.weight, "form": self.form}

    @classmethod
    def from_tree(cls, tree: object) -> Update:
        """The update that `tree` holds; `Spec.check` judges its content.

        Raises:
            Refused: (`form`).
        """
        match tree:
            case {"tensors": dict(tensors), "weight": weight, "form": "plain" | "ring" as form, **rest}:
                if not rest and all(isinstance(t, Tensor) for t in tensors.values()):
                    return cls(tensors, weight, form)
        raise Refused("form", "no update")


@dataclass(frozen=True)
class Reply:
    """What comes back from a site; of a private run with the head of its ledger (hexadecimal)."""

    site: str
    body: Update | Failure
    head: str = ""

    def to_tree(self) -> Tree:
        if isinstance(self.body, Failure):
            return {"site": self.site, "failure": [self.body.code, self.body.incident]}
        head = {"head": self.head} if self.head else {}
        return {"site": self.site, "update": self.body.to_tree(), **head}

    @classmethod
    def from_tree(cls, tree: object) -> Reply:
        """Read a reply from outside, whatever it is.

        Raises:
            Refused: (`form`).
        """
        match tree:
            case {"site": str(site), "failure": [str(code), str(incident)], **rest}:
                if not rest and code in CODES and _INCIDENT.fullmatch(incident):
                    return cls(site, Failure(code, incident))
            case {"site": str(site), "update": update, **rest} if rest.keys() <= {"head"}:
                if not rest or DIGEST.fullmatch(str(rest["head"])):
                    return cls(site, Update.from_tree(update), str(rest.get("head", "")))
        raise Refused("form", "neither update nor failure")


@dataclass(frozen=True)
class Spec:
    """The form of a stage's answer, derived from the plan at both ends; site and coordinator check it.

    Attributes:
        tensors: "group/parameter" to (shape, dtype), in the order of the flat buffer.
        max_weight: largest weight. max_value: largest absolute value (0 = unbounded: not for a sum).
        tail: how many values the last tensor, a vector, may hold beyond its shape: each patient's own scores
            (simulation only; not for a sum). 0 everywhere else.
        norms: group to the largest L2 norm that its tensors may have together.
    """

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    max_weight: int
    max_value: float
    tail: int = 0
    norms: dict[str, float] = field(default_factory=dict)

    @cached_property
    def size(self) -> int:
        """How many values an answer holds."""
        return sum(math.prod(shape) for shape, _ in self.tensors.values())

    def check(self, update: Update) -> None:
        """Accept `update`, or say why not.

        Raises:
            Refused: (`names`, `shape`, `weight`, `finite`, `range`).
        """
        if update.__dict__.get("_passed") == self:
            return  # site and coordinator in one process: once is enough
        if update.tensors.keys() != self.tensors.keys():
            raise Refused("names", str(sorted(update.tensors.keys() ^ self.tensors.keys())[:3]))
        # type() and not isinstance(): True is an int, and a weight of True passed once
        if type(update.weight) is not int or not 1 <= update.weight <= self.max_weight:
            raise Refused("weight", str(update.weight))
        for name, (_, dtype) in self.tensors.items():
            tensor = update.tensors[name]
            if not self._fits(name, tuple(tensor.shape)) or tensor.dtype != dtype:
                raise Refused("shape", f"{name}: {tuple(tensor.shape)} {tensor.dtype}")
            if tensor.numel() == 0:
                continue
            # aminmax carries NaN through, and runs at 40 times the speed of isfinite().all()
            low, high = (float(t) for t in torch.aminmax(tensor))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise Refused("finite", name)
            if self.max_value and max(-low, high) > self.max_value:
                raise Refused("range", f"{name}: {max(-low, high):.3g} > {self.max_value:g}")
        self._hold(update)
        object.__setattr__(update, "_passed", self)

    def _hold(self, update: Update) -> None:
        for group, most in self.norms.items():
            inside = [t for name, t in update.tensors.items() if name.partition("/")[0] == group]
            norm = math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in inside))
            if norm > most * (1 + 1e-6):  # the sender's rounding to float32
                raise Refused("range", f"{group} has norm {norm:.6g} > {most:g}")

    def _fits(self, name: str, shape: tuple[int, ...]) -> bool:
        wanted, _ = self.tensors[name]
        if not self.tail or name != next(reversed(self.tensors)):
            return shape == wanted
        return len(shape) == len(wanted) == 1 and 0 <= shape[0] - wanted[0] <= self.tail


def pack(tree: Tree) -> bytes:
    """One canonical encoding: equal trees give equal bytes.

    Raises:
        ValueError: a leaf that is neither scalar nor tensor, NaN outside a tensor, a reserved key.
    """
    text, tensors = strip(tree)
    return safetensors.torch.save(apart(tensors), metadata={_META: text})


def pack_file(tree: Tree, path: Path) -> str:
    """Write what `pack` gives to a new file, durably and without holding it in memory; returns its SHA-256.

    Raises:
        ValueError: as `pack`.
        OSError: the disk is full, or another error of the system's.
    """
    text, tensors = strip(tree)
    try:
        safetensors.torch.save_file(apart(tensors), path, metadata={_META: text})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from None
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def strip(tree: Tree) -> tuple[str, dict[str, Tensor]]:
    """A tree as canonical JSON, and the tensors it refers to by number. `fill` is the way back.

    Raises:
        ValueError: as `pack`.
    """
    tensors: dict[str, Tensor] = {}
    return _json(_strip(tree, tensors, 0)), tensors


def _json(node: Any) -> str:
    """Canonical: sorted keys, no spaces, no NaN."""
    return json.dumps(node, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _strip(node: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    """`node` as JSON, its tensors moved to `tensors` under running numbers."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"tree is deeper than {_MAX_DEPTH}")
    if isinstance(node, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = node.detach()
        return {_TENSOR: name}
    if isinstance(node, dict):
        if _TENSOR in node or not all(isinstance(key, str) for key in node):
            raise ValueError(f"tree keys must be strings other than {_TENSOR!r}; got {list(node)[:5]}")
        return {key: _strip(node[key], tensors, depth + 1) for key in sorted(node)}
    if isinstance(node, list | tuple):
        return [_strip(item, tensors, depth + 1) for item in node]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise ValueError(f"a tree holds scalars and tensors; got {type(node).__name__}")


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none sharing memory with another: safetensors refuses anything else."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        whole = tensor.is_cpu and tensor.is_contiguous()
        storage = tensor.untyped_storage()
        if not whole or storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.cpu().clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor
    return apart


def unpack(blob: bytes) -> Tree:
    """The tree that `pack` wrote. Runs no code, whatever the bytes.

    Raises:
        Refused: (`payload`) when `blob` is nothing that `pack` writes.
    """
    try:
        tensors = safetensors.torch.load(blob)
        size = int.from_bytes(blob[:8], "little")
        return fill(json.loads(blob[8 : 8 + size])["__metadata__"][_META], tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise Refused("payload", type(error).__name__) from None


def fill(text: str, tensors: dict[str, Tensor]) -> Tree:
    """The tree that `strip` took apart; every tensor is used exactly once.

    Raises:
        ValueError, KeyError, TypeError: text and tensors do not belong together, or never came from `strip`.
    """
    left = dict(tensors)
    node = json.loads(text)
    tree = _fill(node, left, 0)
    if left or not isinstance(tree, dict) or _json(node) != text:
        raise ValueError("not a tree of these tensors")
    return tree


def _fill(node: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    """`node` with its tensors back in place; each is used exactly once."""
    if depth > _MAX_DEPTH:
        raise ValueError("too deep")
    if isinstance(node, dict):
        if _TENSOR in node:
            (name,) = node.values()
            return tensors.pop(name)
        return {key: _fill(value, tensors, depth + 1) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(item, tensors, depth + 1) for item in node]
    return node


def digest(blob: bytes) -> str:
    """The identity of a packed tree."""
    return hashlib.sha256(blob).hexdigest()
