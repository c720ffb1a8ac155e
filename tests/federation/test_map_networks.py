"""Every network for maps learns segmentation in a federation of two sites."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from conf.schema import Plan
from tasks.base import Case, build_task
from tests.small_networks import ENTRIES, section, sides
from tests.toys import Toys

ROUNDS = 5


def cases(size: tuple[int, ...], site: int) -> list[Case]:
    """Bright blocks in noise."""
    draw = torch.Generator().manual_seed(site)
    made = []
    for n in range(2):
        mask = torch.zeros(size, dtype=torch.uint8)
        mask[tuple(slice(side // 4, side // 4 * 3) for side in size)] = 1
        image = mask[None] + 0.3 * torch.randn(1, *size, generator=draw)
        key, spacing = f"{site}{n}", (1.0,) * len(size)
        made.append(Case(key, key, {"image": image}, torch.eye(4).double(), spacing, {"mask": mask}))
    return made


@pytest.mark.parametrize(("name", "dimensions"), ENTRIES)
def test_it_takes_a_round_and_improves_over_five(name: str, dimensions: int, tmp_path: Path) -> None:
    size = sides(name, dimensions)
    held = {f"site_{s}": {"train": cases(size, s), "val": [], "test": []} for s in range(2)}
    plan = Plan.model_validate(
        {
            "task": {"name": "segmentation", "classes": ["background", "block"], "patch": list(size)},
            "model": section(name).model_dump(),
            "loss": {"name": "dice_ce"},
            "strategy": {"name": "fedavg"},
            "local": {"optimizer": "adam", "lr": 0.01, "steps": 2, "batch_size": 2},
            "federation": {"rounds": ROUNDS, "evaluate_every": 0},
        }
    )
    task = build_task(plan)
    (phase,) = task.phases
    batch = task.batch([task.prepare(c) for c in held["site_0"]["train"]], torch.Generator().manual_seed(0))
    losses: list[float] = []

    def loss(weights: dict[str, Tensor]) -> float:
        model = task.build_model()
        model.load_state_dict(weights, strict=False)  # integer buffers stay home
        with torch.no_grad():
            return float(phase.loss(model, batch).mean())

    federation = Toys(tmp_path, plan, held)
    with federation.opened() as run:
        losses.append(loss(dict(run.study.initial)))
        losses.append(loss(dict(run.train().model)))
    assert losses[1] < losses[0]
