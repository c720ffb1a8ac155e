"""Every network of the table learns in a federation of two sites, in every family that takes it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conf.schema import Plan
from tasks import TASKS
from tasks.base import Batch, Case, Phase
from tasks.models import NETWORKS
from tests.small_networks import section, sides
from tests.toys import TOYS, Toys

ROUNDS = 5
SIDE = 32  # of what a vector is made
MADE = 8  # by a generator


@dataclass(frozen=True)
class Entry:
    """A pair to be tried, and what of its plan the task does not give."""

    family: str
    network: str
    size: tuple[int, ...]
    task: dict[str, Any]
    loss: str = "hinge"
    dimensions: int = 0

    def __str__(self) -> str:
        judge = self.task.get("discriminator", {}).get("name", "")
        return "-".join(filter(None, (self.family, self.network, judge, str(self.dimensions))))


def names(shape: str) -> list[str]:
    return [name for name, entry in NETWORKS.items() if entry.shape == shape]


def masks(family: str, name: str, dimensions: int) -> Entry:
    size = sides(name, dimensions)
    task = {"classes": ["background", "block"], "patch": size}
    return Entry(family, name, size, task, "dice_ce", dimensions)


def vectors(family: str, name: str, dimensions: int) -> Entry:
    if dimensions:
        size = (SIDE,) * dimensions
        return Entry(family, name, size, {"size": size}, "class_cross_entropy", dimensions)
    task = {"size": (SIDE, SIDE), "features": {"name": "none"}, "columns": {"age": [0.5, 1.0]}}
    return Entry(family, name, (4, 4), task, "class_cross_entropy")


def noise(family: str, name: str, judge: str, dimensions: int) -> Entry:
    size = (MADE,) * dimensions
    task = {"discriminator": section(judge).model_dump(), "size": size, "latent": 4, "draws": 4}
    return Entry(family, name, size, {**task, "classes": ["a", "b"], "window": [-1, 2]}, "hinge", dimensions)


def images(family: str, name: str, dimensions: int) -> Entry:
    size = sides(name, dimensions)
    # what begins as the identity has nothing to win in a cycle but from the discriminator
    task = {"residual": family != "cyclegan", "discriminator": section("patch_gan").model_dump()}
    task |= {"patch": size, "window": [-1, 2]}
    return Entry(family, name, size, task, "least_squares", dimensions)


def every(shape: str) -> list[tuple[str, int]]:
    return [(name, d) for name in names(shape) for d in NETWORKS[name].dimensions]


#: a generator is tried with every discriminator, a network for maps as a generator of images too
ENTRIES = [
    *(masks("segmentation", *entry) for entry in every("map")),
    *(vectors("classification", *entry) for entry in every("vector")),
    *(
        noise("gan", name, judge, d)
        for name, judge, d in product(names("generator"), names("discriminator"), (2, 3))
    ),
    *(
        images(family, name, NETWORKS[name].dimensions[0])
        for family, name in product(("pix2pix", "cyclegan"), names("map"))
    ),
]


def held(size: tuple[int, ...], site: int) -> list[Case]:
    """Half of the patients have a bright block in noise: by mask, label, table, and as another image."""
    draw = torch.Generator().manual_seed(site)
    made = []
    for n in range(2):
        mask = torch.zeros(size, dtype=torch.uint8)
        mask[tuple(slice(side // 4, side // 4 * 3) for side in size)] = 1
        label = float(n % 2)
        image = (1 + label) / 2 * mask[None] + 0.2 * torch.randn(1, *size, generator=draw)
        key, spacing = f"{site}{n}", (1.0,) * len(size)
        made.append(
            Case(
                key,
                key,
                {"image": image, "target": 1 - image},
                torch.eye(4).double(),
                spacing,
                {"mask": mask},
                {"label": label},
                {"age": label},
            )
        )
    return made


def plan(entry: Entry) -> Plan:
    return Plan.model_validate(
        {
            "task": {"name": entry.family, **entry.task},
            "model": section(entry.network).model_dump(),
            "loss": {"name": entry.loss},
            "strategy": {"name": "fedavg"},
            "local": {"optimizer": "adam", "lr": 0.002, "steps": 1, "batch_size": 2},
            "federation": {"rounds": ROUNDS, "evaluate_every": 0},
        }
    )


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_it_builds_takes_a_round_and_improves_over_five(entry: Entry, ram: Path) -> None:
    cases = {f"site_{s}": {"train": held(entry.size, s), "val": [], "test": []} for s in range(2)}
    with Toys(ram, plan(entry), cases).opened() as run:
        task, model = run.study.task, run.study.fresh()
        now = run.study.initial
        last = run.train(evaluate=False).model
        assert run.progress.round == ROUNDS
    examples = [task.prepare(case) for splits in cases.values() for case in splits["train"]]
    batch = task.batch(examples, torch.Generator().manual_seed(0))
    for phase in task.phases:
        # of a game's players one after the other becomes what it has learned
        before, now = now, {n: (last if phase.parameters(n) else now)[n] for n in last}
        was, value = (loss(model, weights, phase, batch) for weights in (before, now))
        assert value < was, phase.name


def loss(model: nn.Module, weights: dict[str, Tensor], phase: Phase, batch: Batch) -> float:
    model.load_state_dict(weights, strict=False)  # integer buffers stay home
    torch.manual_seed(0)
    with torch.no_grad():
        return float(phase.loss(model, batch if phase.private else None).mean())


def test_no_entry_of_the_tables_is_left_out() -> None:
    tried = {(entry.network, entry.dimensions) for entry in ENTRIES}
    tried |= {(entry.task.get("discriminator", {}).get("name"), entry.dimensions) for entry in ENTRIES}
    assert {(name, d) for name, entry in NETWORKS.items() for d in entry.dimensions} <= tried
    assert {entry.family for entry in ENTRIES} == set(TASKS) - set(TOYS)
    assert section("new").model_dump() == {"name": "new"}, "what has no small settings is tried as it comes"
