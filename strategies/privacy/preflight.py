"""What a plan must fulfil before a patient is touched by DP-SGD, found by trying and not by names.

Patients' gradients are taken one patient at a time, so nothing here is what keeps ε true; it finds the
plans whose training would not be what their author means, and what would carry patients past the clip:
running statistics, memories of earlier batches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from conf.exits import Exit, Stop
from conf.schema import Plan
from strategies.privacy.dpsgd import Clipper
from tasks.base import Batch, Phase, Task
from tasks.models import GRADIENTS

#: what libraries give a target that is not to count
_IGNORED = (255, -100, -1)


def check(plan: Plan, task: Task, model: nn.Module, batch: Batch) -> None:
    """Refuse what DP-SGD cannot train.

    Args:
        model: on the CPU; left as it was.
        batch: two examples, for their shapes and types alone: other values, no patient's, are put in.

    Raises:
        Stop: (`CONFIG`) with what is wrong, in which phase, and what to change.
    """
    if plan.privacy.metrics == "noised":
        try:
            task.statistics().bounds()
        except ValueError as error:
            raise Stop(Exit.CONFIG, f"privacy.metrics is 'noised', but {error}; use home") from None
    if gradients(plan) == "no DP":
        raise Stop(
            Exit.CONFIG,
            f"model.name is {plan.model.name!r}, which DP cannot train; use another, or privacy=none",
        )
    mapped = gradients(plan) == "vmap"
    for phase in task.phases:
        if phase.private and (
            reason := fault(phase, model, batch) or (mapped and strays(phase, model, batch))
        ):
            raise Stop(
                Exit.CONFIG, f"privacy.mode is {plan.privacy.mode!r}, but phase {phase.name!r} {reason}"
            )


def gradients(plan: Plan) -> str:
    """How the plan's model gives patients' gradients; a task's own model is not in the table, and looped."""
    return GRADIENTS.get(plan.model.name, "loop")


def fault(phase: Phase, model: nn.Module, batch: Batch) -> str:
    """Why DP-SGD cannot have this phase; empty where it can. In float64, on values made up here."""
    model = copy.deepcopy(model).double().train()
    draw = torch.Generator().manual_seed(0)
    here, other = _made_up(batch, draw), _made_up(batch, draw)
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        losses = phase.loss(model, here)
        count = len(next(iter(here.values())))
        if losses.shape != (count,):
            return f"has a loss of shape {tuple(losses.shape)} for {count} patients; it needs one value each"
        if not torch.equal(torch.get_rng_state(), before):
            return (
                "draws random numbers as it computes (dropout), shared by all patients; set model.dropout=0"
            )
        if changed := [name for name, b in model.named_buffers() if not torch.equal(b, buffers[name])]:
            return (
                f"keeps statistics of its batches in {changed[0]} (BatchNorm, frozen or not); "
                "use privacy.swap_norms=true, or model.norm=instance or group"
            )
        return _coupling(phase, model, here, other, losses[0])


def _coupling(phase: Phase, model: nn.Module, here: Batch, other: Batch, first: Tensor) -> str:
    """Whether the first example's loss, `first`, depends on more than the first example."""
    alone, gradient = first.detach(), _gradient(phase, model, first)
    beside = {name: torch.cat((t[:1], other[name][1:])) for name, t in here.items()}
    moved = _differs(gradient, _gradient(phase, model, phase.loss(model, beside)[0]))
    if moved or any(_differs([alone], _first_loss(phase, model, batch)) for batch in _ignoring(beside)):
        return (
            "couples the patients of a batch: another one's values move this one's gradient "
            "(BatchNorm, a loss or weight over the whole batch); use losses by example"
        )
    if _differs([alone], _first_loss(phase, model, here)):
        return "remembers earlier batches (an image pool, a queue); that memory passes the clip"
    return ""


def strays(phase: Phase, model: nn.Module, batch: Batch) -> str:
    """Why patients' gradients cannot be taken in one pass; empty where they are those taken one by one."""
    model = copy.deepcopy(model).double().train()
    made = _made_up(batch, torch.Generator().manual_seed(0))
    patients = [
        {name: t[i : i + 1] for name, t in made.items()} for i in range(len(next(iter(made.values()))))
    ]
    looped = Clipper(phase, model, clip=math.inf, mapped=False).total(patients)
    try:
        mapped = Clipper(phase, model, clip=math.inf, mapped=True).total(patients)
    except RuntimeError as error:
        return f"cannot be mapped over patients: {str(error).splitlines()[0]}"
    if _differs(list(looped.values()), list(mapped.values())):
        return "has other gradients when mapped over patients than one by one; tell us: it is a defect"
    return ""


def _made_up(batch: Batch, draw: torch.Generator) -> dict[str, Tensor]:
    """Other values in the same form: normal numbers; 0 and 1, which every set of classes has."""
    made = {}
    for name, tensor in batch.items():
        if tensor.is_floating_point():
            made[name] = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        else:
            made[name] = torch.randint(2, tensor.shape, generator=draw).to(tensor.dtype)
    return made


def _ignoring(batch: Batch) -> Iterator[Batch]:
    """The same first example beside one whose targets do not count, as libraries mark them."""
    whole = {n: t for n, t in batch.items() if not t.is_floating_point() and t.dtype != torch.bool}
    for value in _IGNORED if whole else ():
        yield {**batch, **{n: torch.cat((t[:1], torch.full_like(t[1:], value))) for n, t in whole.items()}}


def _first_loss(phase: Phase, model: nn.Module, batch: Batch) -> list[Tensor]:
    try:
        with torch.no_grad():
            return [phase.loss(model, batch)[0]]
    except (IndexError, RuntimeError):
        return []  # a class that this loss does not know


def _gradient(phase: Phase, model: nn.Module, loss: Tensor) -> list[Tensor]:
    moved = [p for n, p in model.named_parameters() if phase.parameters(n) and p.requires_grad]
    found = torch.autograd.grad(loss, moved, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(moved, found, strict=True)]


def _differs(a: list[Tensor], b: list[Tensor]) -> bool:
    """By more than rounding in float64; what could not be computed does not."""
    scale = max((float(t.abs().max()) for t in a), default=0.0)
    return any(float((x - y).abs().max()) > 1e-9 * scale for x, y in zip(a, b, strict=False))
