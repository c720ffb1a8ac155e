"""What of a model begins with another's weights, what is trained, and what of it travels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from conf.exits import Exit, Stop
from conf.schema import Local

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 6


def matching(patterns: Iterable[str], names: Sequence[str], setting: str) -> frozenset[str]:
    """The names that fit any of the patterns (`*`, `?`, `[seq]`, over the whole name).

    Raises:
        Stop: (`CONFIG`) a pattern fits none: most likely a slip of the pen.
    """
    found: set[str] = set()
    for pattern in patterns:
        fit = [name for name in names if fnmatchcase(name, pattern)]
        if not fit:
            raise Stop(Exit.CONFIG, f"{setting} has {pattern!r}, which fits no tensor; {_some(names)}")
        found.update(fit)
    return frozenset(found)


def frozen(names: Sequence[str], local: Local) -> frozenset[str]:
    """The tensors that stay as they were before round 1, their layers' running statistics included.

    Args:
        names: of the model's float tensors, in its own order.

    Raises:
        Stop: (`CONFIG`) a pattern fits nothing, or there are fewer blocks.
    """
    still = set(matching(local.freeze, names, "local.freeze"))
    if local.freeze_depth:
        parts = [name.split(".") for name in names]
        depth = 0
        while all(len(part) > depth + 1 and part[depth] == parts[0][depth] for part in parts):
            depth += 1  # a shell around the whole model is no block
        blocks = list(dict.fromkeys(part[depth] for part in parts))
        if local.freeze_depth >= len(blocks):
            listed = ", ".join(blocks[:_SHOWN])
            raise Stop(
                Exit.CONFIG,
                f"local.freeze_depth is {local.freeze_depth}; the model has {len(blocks)} blocks, one must "
                f"learn: {listed}{' …' if len(blocks) > _SHOWN else ''}",
            )
        first = set(blocks[: local.freeze_depth])
        still.update(name for name, part in zip(names, parts, strict=True) if part[depth] in first)
    return frozenset(still)


@dataclass(frozen=True)
class Match:
    """A model's first weights, some of them another's.

    Attributes:
        tensors: of the model, by name. taken: the names that come from the other.
        fresh: the others, with their shape (and the other's, where only the shape differs).
        unused: what the other has beside, with its shape.
    """

    tensors: dict[str, Tensor]
    taken: tuple[str, ...]
    fresh: dict[str, str]
    unused: dict[str, str]


def match(initial: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Match:
    """The initial tensors, replaced by given ones of the same name and shape.

    Raises:
        Stop: (`CONFIG`) a given tensor holds a value that is not finite.
    """
    made, fresh = {}, {}
    for name, own in initial.items():
        other = given.get(name)
        if other is not None and other.shape == own.shape and other.is_floating_point():
            if not bool(other.isfinite().all()):
                raise Stop(Exit.CONFIG, f"model.init: {name} holds a value that is not finite")
            made[name] = other.to(own.dtype)
        else:
            there = "" if other is None else f" (there {list(other.shape)})"
            fresh[name] = f"{list(own.shape)}{there}"
    unused = {n: str(list(t.shape)) for n, t in given.items() if n not in made and t.is_floating_point()}
    return Match({**initial, **made}, tuple(made), fresh, unused)


def _some(names: Sequence[str]) -> str:
    """A few of the names, from all over the model."""
    step = max(1, len(names) // _SHOWN)
    return f"the model has {', '.join(names[::step][:_SHOWN])}{' …' if len(names) > _SHOWN else ''}"
