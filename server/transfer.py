"""Where a run's first weights come from: another run, or a file of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from conf.exits import Exit, Stop
from conf.schema import Settings
from server.checkpoint import result
from server.progress import note
from strategies.base import Study, Tensors
from strategies.protocol import Refused, digest, pack, unpack
from strategies.transfer import Match, match

FILE = "initial.safetensors"
_SHOWN = 12


def begin(settings: Settings) -> tuple[Settings, bytes]:
    """The settings with the digest of the first weights in their plan, and those weights, packed.

    Raises:
        Stop: (`CONFIG`, `NO_RUN`, `CHECKPOINT_DAMAGED`) nothing there fits the model.
    """
    if settings.init is None:
        return settings, b""
    study, path = Study.of(settings.plan), Path(settings.init)
    made = match(study.initial, named(study.initial, tensors(path)))
    if not made.taken:
        there, here = (", ".join(list(names)[:3]) for names in (made.unused, study.initial))
        raise Stop(
            Exit.CONFIG, f"model.init is {path}, where no tensor fits: it has {there}; the model {here}"
        )
    for line in told(made, study):
        note(line)
    blob = pack(made.tensors)
    plan = settings.plan.model_copy(update={"init": digest(blob)})
    return settings.model_copy(update={"plan": plan}), blob


def named(own: Mapping[str, Tensor], given: Tensors) -> Tensors:
    """Given tensors by the model's names: as they are, or with a prefix more or less, as most of them fit.

    A network within another (a bag's reader, a translator) has one more, a file of `DataParallel` too.
    """
    more = {n.removesuffix(g) for n in own for g in given if n.endswith(f".{g}")}
    less = {g.removesuffix(n) for n in own for g in given if g.endswith(f".{n}")}
    ways = [given]
    ways += [{prefix + n: t for n, t in given.items()} for prefix in sorted(more)]
    ways += [{n.removeprefix(prefix): t for n, t in given.items()} for prefix in sorted(less)]
    return max(ways, key=lambda way: sum(n in own and own[n].shape == t.shape for n, t in way.items()))


def told(made: Match, study: Study) -> list[str]:
    """What was taken and what was not, in lines for the user."""
    lines = [f"model.init: {len(made.taken)} of {len(study.initial)} tensors taken"]
    lists: dict[str, Mapping[str, str]] = {
        "not there, so they begin anew": made.fresh,
        "there, but not of this model": {n: s for n, s in made.unused.items() if n not in made.fresh},
        "frozen, though they begin anew": {n: s for n, s in made.fresh.items() if n in study.frozen},
    }
    for what, names in lists.items():
        if names:
            some = [f"{name} {shape}" for name, shape in list(names.items())[:_SHOWN]]
            more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
            lines.append(f"{what}: {'; '.join(some + more)}")
    return lines


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a run's model, or of a safetensors file, by name.

    Raises:
        Stop: (`CONFIG`, `NO_RUN`, `CHECKPOINT_DAMAGED`) there are none.
    """
    if path.is_dir():
        return result(path)
    if path.suffix != ".safetensors":
        what = "this is neither" if path.exists() else "there is none"
        raise Stop(
            Exit.CONFIG,
            f"model.init is {path}; need a run's directory or a .safetensors file; {what} "
            "(a pickled file can run code: docs/researcher.md has the line that converts it)",
        )
    try:
        blob = path.read_bytes()
        try:
            tree = unpack(blob)
            tree = tree.get("model", tree)
        except Refused:
            tree = safetensors.torch.load(blob)
    except (OSError, SafetensorError) as error:
        raise Stop(Exit.CONFIG, f"model.init is {path}, which cannot be read: {error}") from None
    return {str(name): tensor for name, tensor in tree.items() if isinstance(tensor, Tensor)}


def initial(folder: Path) -> Callable[[str], Tensors]:
    """Reads the first weights of the run in `folder`, by their digest."""

    def read(sha256: str) -> Tensors:
        path = folder / FILE
        blob = path.read_bytes() if path.exists() else b""
        if digest(blob) != sha256:
            raise Stop(
                Exit.CHECKPOINT_DAMAGED, f"{path} is damaged or missing; restore it or start a new run"
            )
        return unpack(blob)

    return read
