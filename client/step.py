"""One step of the local loop: gradients of a batch, what an algorithm adds to them, the optimiser."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from conf.schema import Local, Plan
from strategies.base import Correct
from tasks.base import Batch, Phase

Drawn = TypeVar("Drawn")


class Stepper:
    """One phase of one training."""

    def __init__(
        self,
        phase: Phase,
        model: nn.Module,
        plan: Plan,
        correct: Correct | None,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.phase = phase
        self._model = model
        self._plan = plan
        self._correct = correct
        self._parameters = parameters
        self._optimizer = optimizer

    def step(self, batch: Any, progress: float) -> None:
        """One step; `progress` in [0, 1) is the way through all rounds, for the schedule.

        Args:
            batch: what `_backward` reads.
        """
        local = self._plan.local
        for group in self._optimizer.param_groups:
            group["lr"] = rate(self._plan, progress)
        self._optimizer.zero_grad(set_to_none=True)
        self._backward(batch)
        if local.clip_norm:
            nn.utils.clip_grad_norm_(list(self._parameters.values()), local.clip_norm)
        if self._correct is not None:
            self._correct(self._parameters)
        self._optimizer.step()

    def _backward(self, batch: Any) -> None:
        """Gradients of the mean loss over the batch (`Batch | None`), in chunks."""
        device = next(iter(self._parameters.values())).device
        for share, part in chunks(batch, self._plan.local.micro_chunk):
            with precision(self._plan.local, device):
                loss = self.phase.loss(self._model, part).mean() * share
            loss.backward()  # type: ignore[no-untyped-call]


SCHEDULES: dict[str, Callable[[float, Local], float]] = {
    "constant": lambda *_: 1.0,
    "cosine": lambda t, _: 0.5 * (1 + math.cos(math.pi * t)),
    "step": lambda t, local: local.decay ** int(t * (local.drops + 1)),
    "polynomial": lambda t, local: (1 - t) ** local.power,
}
"""What the learning rate is multiplied by, `t` in [0, 1) being the way through the rounds after warm-up."""


def rate(plan: Plan, progress: float) -> float:
    """The learning rate of a step, `progress` in [0, 1) being the way through all rounds."""
    local, rounds = plan.local, plan.federation.rounds
    if warm := min(local.warmup_rounds, rounds):
        done = progress * rounds
        if done < warm:
            return local.lr * (done + 1 / local.steps) / warm  # the first step moves, too
        progress = (done - warm) / (rounds - warm)
    return local.lr * SCHEDULES[local.schedule](progress, local)


@contextmanager
def repeatable(on: bool) -> Iterator[None]:
    """Torch's deterministic mode for a while; an operation that has none then raises `RuntimeError`."""
    if not on:
        yield
        return
    # memory that is not written yet is never read: to fill it would cost on a CPU, too
    flags = ((torch.backends.cudnn, "benchmark"), (torch.utils.deterministic, "fill_uninitialized_memory"))
    before = [getattr(where, name) for where, name in flags]
    mode = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or matrix products on a GPU raise
    try:
        for where, name in flags:
            setattr(where, name, False)
        torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        for (where, name), value in zip(flags, before, strict=True):
            setattr(where, name, value)


def precision(local: Local, device: torch.device) -> torch.autocast:
    """bfloat16 where the plan says so, or leaves it open and a GPU computes."""
    half = local.precision == "bfloat16" or (local.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half)


def ahead(batches: Iterator[Drawn]) -> Iterator[Drawn]:
    """The same batches, each made on a thread while the one before is at work on the device.

    One thread makes them all, so their draws keep their order, and with it their values.
    """
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def chunks(batch: Batch | None, size: int) -> Iterator[tuple[float, Batch | None]]:
    """Parts of a batch, each with its share of the whole."""
    count = 0 if batch is None else len(next(iter(batch.values())))
    if batch is None or not size or size >= count:
        yield 1.0, batch
        return
    for start in range(0, count, size):
        part = {name: tensor[start : start + size] for name, tensor in batch.items()}
        yield len(next(iter(part.values()))) / count, part


def fresh_optimizer(plan: Plan, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The plan's, in its fused form: one kernel for all parameters."""
    local = plan.local
    if local.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=local.lr, momentum=local.momentum, weight_decay=local.weight_decay, fused=True
        )
    kind = torch.optim.AdamW if local.optimizer == "adamw" else torch.optim.Adam
    betas = (local.beta1, 0.999)
    return kind(parameters, lr=local.lr, betas=betas, weight_decay=local.weight_decay, fused=True)


def channels_last(model: nn.Module) -> None:
    """Lay convolutions' weights out with their channels last: what a GPU's matrix units want.

    `Module.to(memory_format=…)` takes one format for all, and fails on weights of the other rank.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in model.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])


def held(model: nn.Module, frozen: Set[str]) -> nn.Module:
    """The model in training, but for layers whose running statistics are frozen: they use those."""
    for path, layer in model.named_modules() if frozen else ():
        if any(f"{path}.{name}" in frozen for name, _ in layer.named_buffers(recurse=False)):
            layer.training = False
    return model
