"""A run's model for use outside of wardround: one file, in which also stands how it is to be fed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic_core import to_json
from torch import Tensor
from torch.export import Dim, ExportedProgram

from conf.exits import Exit, Stop
from conf.files import no_space, write_new
from conf.table import Table
from server.checkpoint import RESULT, result
from server.predict import TEMPERATURE, check_whole
from server.runfolder import RunFolder
from strategies.base import Study
from strategies.protocol import apart, digest
from tasks.serving import Servable, Served

SHEET = "wardround.json"
"""What tells how to feed the network: a file within a program, without its suffix a key of safetensors."""

#: of `privacy.json`, what is about no site
_PROMISED = (
    "unit",
    "mechanism",
    "accountant",
    "clip",
    "delta",
    "epsilon",
    "epsilon_replace_one",
    "not_covered",
)


def weights(served: Served, sheet: str) -> bytes:
    """The tensors by the model's own names, as `model.init` takes them."""
    floats = {n: t for n, t in served.network.state_dict().items() if t.is_floating_point()}
    return safetensors.torch.save(apart(floats), {SHEET.removesuffix(".json"): sheet})


def program(served: Served, sheet: str) -> bytes:
    """What `torch.export.load` reads: no code of wardround is needed to run it."""
    file = BytesIO()
    torch.export.save(captured(served), file, extra_files={SHEET: sheet})
    return file.getvalue()


def captured(served: Served) -> ExportedProgram:
    """The network's operations, for any number of examples at once.

    Raises:
        Stop: (`CONFIG`) what the network does depends on values, or on how many examples there are.
    """
    given = tuple(served.inputs.values())
    free = tuple({0: Dim("batch")} for _ in given)
    try:
        with warnings.catch_warnings():
            # side outputs that a network keeps for training, and writes anew each time
            warnings.filterwarnings("ignore", message="The tensor attributes? ", category=UserWarning)
            made = torch.export.export(served.network, given, dynamic_shapes=free)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Stop(
            Exit.CONFIG, f"the network cannot be made a program ({reason}); use --format safetensors"
        ) from None
    for module in made.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)  # it has this machine's paths
    return made


FORMATS = Table("format", {"pt2": "server.export:program", "safetensors": "server.export:weights"})
"""By their suffix."""


def export(run: Path, kind: str, out: Path) -> str:
    """Write a finished run's model to a new file, in evaluation mode, without what training alone needs.

    Args:
        kind: a name of `FORMATS`.

    Returns:
        How to feed it, the JSON that stands in the file.

    Raises:
        Stop: (`UNKNOWN_NAME`, `CONFIG`, `RUN_EXISTS`, `NO_RUN`, …) with what is wrong.
    """
    write: Callable[[Served, str], bytes] = FORMATS[kind]
    if out.suffix != f".{kind}":
        raise Stop(Exit.CONFIG, f"--out is {out}; a file of --format {kind} ends in .{kind}")
    if out.exists():
        raise Stop(Exit.RUN_EXISTS, f"{out} exists; give a new file: --out FILE")
    folder = RunFolder.open(run)
    if not (run / RESULT).exists():
        raise Stop(Exit.NO_RUN, f"{run} has no {RESULT} yet; end it with: wardround resume {run}")
    study = Study.of(folder.settings.plan)
    served = _trained(run, study)
    sheet = to_json(_sheet(folder, study, served), indent=1).decode() + "\n"
    blob = write(served, sheet)
    with no_space(out, "wardround export again"):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_new(out, blob)
        except FileExistsError:
            raise Stop(Exit.RUN_EXISTS, f"{out} exists; give a new file: --out FILE") from None
    return sheet


def _trained(run: Path, study: Study) -> Served:
    """The network that the run came to.

    Raises:
        Stop: (`CONFIG`) it has none, or not the whole of it.
    """
    found, model = result(run), study.fresh().eval()
    task, name = study.task, study.plan.task.name
    if not isinstance(task, Servable):
        raise Stop(Exit.CONFIG, f"{run}: task {name} has no network of use outside of it")
    served = task.served(model)
    needed = served.network.state_dict().keys() & study.initial.keys()
    if lacking := sorted(n for n in needed if n not in found or found[n].shape != study.initial[n].shape):
        what = f"{run} trained no network by gradients: its {RESULT} has {', '.join(sorted(found))}"
        raise Stop(Exit.CONFIG, f"{what}, no {lacking[0]}; use wardround predict")
    check_whole(run, study)
    model.load_state_dict(found, strict=False)  # integer buffers never travel
    return served


def _sheet(folder: RunFolder, study: Study, served: Served) -> dict[str, Any]:
    """All that whoever feeds the network must know; nothing of sites, patients and paths."""
    plan, columns = study.plan, folder.settings.data.columns.table or {}
    named = served.settings.get("columns") or {}
    more: dict[str, Any] = {}
    if categories := {n: kind for n, kind in columns.items() if n in named and not isinstance(kind, str)}:
        more["categories"] = categories
    if (folder.path / TEMPERATURE).exists():
        more.update(json.loads((folder.path / TEMPERATURE).read_bytes()))
    return {
        "task": plan.task.name,
        "model": plan.model,
        "inputs": {name: _form(tensor) for name, tensor in served.inputs.items()},
        "output": {"name": served.gives[0], "means": served.gives[1]},
        **served.settings,
        **more,
        "privacy": _privacy(folder.path) if plan.privacy.mode != "none" else None,
        "plan": plan.digest,
        "weights": digest((folder.path / RESULT).read_bytes()),
        "torch": torch.__version__.partition("+")[0],
    }


def _form(tensor: Tensor) -> dict[str, Any]:
    return {"shape": ["B", *tensor.shape[1:]], "dtype": str(tensor.dtype).removeprefix("torch.")}


def _privacy(run: Path) -> dict[str, Any]:
    try:
        promised = json.loads((run / "privacy.json").read_bytes())
    except (OSError, ValueError):
        raise Stop(
            Exit.NO_RUN, f"{run} has no readable privacy.json; finish it with wardround resume"
        ) from None
    return {name: promised[name] for name in _PROMISED if name in promised}
