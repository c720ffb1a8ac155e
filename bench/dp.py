"""What a private step costs beside a plain one and beside Opacus' two ways of making it; and the noise alone.

    python bench/dp.py [--repeats 9]

Whole steps on one thread: forward, gradients of each patient, clipping, noise, the optimiser's move. All
four kinds take turns, and each ratio is that of the medians of CPU time: other work on the machine meets all
alike. Opacus draws its noise from torch's generator, which a seed fixes and takes off again; ours does not.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets.unet import UNet
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
    GradSampleModuleFastGradientClipping,
)
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer_fast_gradient_clipping import (
    DPOptimizerFastGradientClipping,
)
from opacus.utils.fast_gradient_clipping_utils import (
    DPLossFastGradientClipping,
)
from row import row
from torch import Tensor, nn

from client.private import PrivateStepper
from client.step import Stepper, fresh_optimizer
from conf.schema import Plan
from strategies.privacy import noise
from tasks.base import Batch, Phase

Step = Callable[[], object]

#: sides of an image, patients in a step, levels, and how much a private step may cost
WORKS: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], float]] = {
    "2D U-Net (W2)": ((128, 128), 8, (16, 32, 64, 128), 1.5),
    "3D U-Net (4.8 M)": ((48, 48, 48), 4, (16, 32, 64, 128, 256), 3.2),
}


PRIVATE = {"mode": "dpsgd", "sigma": 1.0, "nominal_patients": 100}


def network(sides: tuple[int, ...], levels: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    return UNet(len(sides), 1, 1, levels, [2] * (len(levels) - 1), num_res_units=2)


def by_patient(out: Tensor, truth: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(out, truth, reduction="none").flatten(1).mean(1)


def loss(model: nn.Module, batch: Batch | None) -> Tensor:
    if batch is None:
        raise ValueError("needs a batch")
    return by_patient(model(batch["x"]), batch["y"])


def plan(batch: int, mode: str) -> Plan:
    return Plan.model_validate(
        {
            "task": {"name": "none"},
            "model": {"name": "unet"},
            "loss": {"name": "none"},
            "strategy": {"name": "fedavg"},
            "local": {"optimizer": "sgd", "lr": 1e-6, "batch_size": batch},
            "federation": {"weight": "equal"},
            "privacy": {"mode": mode} if mode == "none" else PRIVATE,
        }
    )


def ours(model: nn.Module, data: list[Batch], mode: str) -> Step:
    """The product's own step: all patients in one batch, or each in a batch of its own."""
    whole = {name: torch.cat([one[name] for one in data]) for name in data[0]}
    asked = plan(len(data), mode)
    parameters = dict(model.named_parameters())
    optimizer = fresh_optimizer(asked, list(parameters.values()))
    kind = Stepper if mode == "none" else PrivateStepper
    stepper = kind(Phase("train", loss), model, asked, None, parameters, optimizer)
    read = whole if mode == "none" else data
    return lambda: stepper.step(read, 0.0)


class ByPatient(nn.Module):
    """A criterion in the form that Opacus' ghost clipping takes."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, out: Tensor, truth: Tensor) -> Tensor:
        found = by_patient(out, truth)
        return found.mean() if self.reduction == "mean" else found


def opacus(model: nn.Module, data: list[Batch], ghost: bool) -> Step:
    x, y = (torch.cat([one[name] for one in data]) for name in ("x", "y"))
    sgd = torch.optim.SGD(model.parameters(), lr=1e-6)
    given = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": len(data)}
    criterion: Any = ByPatient()
    wrapped: Any
    if ghost:
        wrapped = GradSampleModuleFastGradientClipping(
            model, max_grad_norm=1.0, use_ghost_clipping=True, strict=False
        )
        optimizer = DPOptimizerFastGradientClipping(sgd, **given)
        criterion = DPLossFastGradientClipping(wrapped, optimizer, criterion)
    else:
        wrapped, optimizer = GradSampleModule(model, strict=False), DPOptimizer(sgd, **given)

    def step() -> None:
        optimizer.zero_grad()
        criterion(wrapped(x), y).backward()
        optimizer.step()

    return step


def seconds(step: Step) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--repeats", type=int, default=9)
    repeats = asked.parse_args().repeats
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Opacus' hooks on networks that are fed no gradient
    met = []
    for name, (sides, patients, levels, limit) in WORKS.items():
        draw = torch.Generator().manual_seed(1)
        shape = (1, 1, *sides)
        data: list[Batch] = [
            {"x": torch.randn(shape, generator=draw), "y": torch.rand(shape, generator=draw).round()}
            for _ in range(patients)
        ]
        steps = {
            "plain": ours(network(sides, levels), data, "none"),
            "private": ours(network(sides, levels), data, "dpsgd"),
            "Opacus, hooks": opacus(network(sides, levels), data, ghost=False),
            "Opacus, ghost": opacus(network(sides, levels), data, ghost=True),
        }
        for step in steps.values():
            step()
        taken: dict[str, list[float]] = {kind: [] for kind in steps}
        for _ in range(repeats):
            for kind, step in steps.items():
                taken[kind].append(seconds(step))
        middle = {kind: statistics.median(found) for kind, found in taken.items()}
        row(f"{name}: plain step", 1e3 * middle["plain"], "ms", note=f"{patients} patients of {sides}")
        met.append(row(f"{name}: private", middle["private"] / middle["plain"], "x", limit))
        for kind in ("Opacus, hooks", "Opacus, ghost"):
            row(f"{name}: {kind}", middle[kind] / middle["plain"], "x")
    count = 2**22
    noise.normal(count)
    each = min(seconds(lambda: noise.normal(count)) for _ in range(repeats)) / count
    met.append(row("noise from ChaCha20", 1e9 * each, "ns/value", 20))
    raise SystemExit(not all(met))


if __name__ == "__main__":
    main()
