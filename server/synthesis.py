"""What a simulated run's generator is good for: figures beside those of trivial makers, and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conf.exits import Exit, Stop
from conf.files import write_atomic
from server.checkpoint import result
from server.predict import check_whole
from server.report.table import ABSENT, whole
from server.runfolder import RunFolder
from server.simulate import Federation
from strategies.base import Study
from tasks.base import Sums, build_task
from tasks.gan import Gan
from tasks.judging import STEPS, Pictures, classifier, judged
from tasks.seeds import generator
from tasks.synthesis import ClassMean

#: of classes (`B`) images `B C *size` in -1 to 1
Maker = Callable[[Tensor, torch.Generator], Tensor]
Judged = dict[str, dict[str, float]]
#: what is shown of each maker
COLUMNS = ("tstr", "trtr", "alike", "alike_real", "fid", "mmd", "copied", "remembers")
_WIDE, _ROWS = 12, 3


@dataclass(frozen=True)
class Trained:
    """A run's generator beside the images it is judged by.

    Attributes:
        training, held_out: of all sites; `held_out` are test patients, or validation where there are none.
        makers: by name, what makes images of classes (`B`).
    """

    task: Gan
    seed: int
    training: Pictures
    held_out: Pictures
    makers: Mapping[str, Maker]

    @classmethod
    def of(cls, run: Path) -> Self:
        """The run's result, or the newest checkpoint of one that has not ended.

        Raises:
            Stop: it is no run of a generator, or its data cannot be read.
        """
        folder = RunFolder.open(run)
        plan = folder.settings.plan
        task = build_task(plan)
        if not isinstance(task, Gan):
            raise Stop(
                Exit.CONFIG, f"{run} trained {plan.task.name!r}, which makes no images; use: wardround report"
            )
        model = task.build_model()
        torch.set_num_threads(plan.local.threads)
        model.load_state_dict(result(run), strict=False)  # integer buffers never travel
        study = Study.of(plan)
        check_whole(run, study)
        training, held_out, sums = gathered(Federation.of(folder.settings.data, plan), task)
        return cls(task, plan.seed, training, held_out, makers(task, model.eval(), training, sums))


def evaluate(run: Path, images: int = 1000, steps: int = STEPS) -> Judged:
    """Judge a run's generator; writes `synthetic.json` and `samples.png` into the run.

    Args:
        images: how many are made, in equal parts of each class. steps: of each classifier.

    Raises:
        Stop: it is no run of a generator, or its data cannot be read.
    """
    one = Trained.of(run)
    task, training, held_out = one.task, one.training, one.held_out
    label = torch.arange(images) % max(task.kinds, 1)
    real = classifier(training, max(training.kinds) + 1, one.seed, steps=steps)
    found: Judged = {}
    with torch.no_grad():
        for name, maker in one.makers.items():
            draw = generator(one.seed, "", 0, "evaluate", name)
            pictures = Pictures(maker(label, draw), label)
            found[name] = judged(pictures, training, held_out, real, one.seed, steps=steps)
            if name == "federated":
                write_atomic(run / "samples.png", picture(pictures, training))
    write_atomic(run / "synthetic.json", json.dumps(found, indent=1, sort_keys=True).encode())
    return found


def gathered(federation: Federation, task: Gan) -> tuple[Pictures, Pictures, Sums]:
    """All sites' training and test images (else validation), and the sums of `ClassMean`."""
    trivial = ClassMean(task)
    total = {name: tensor.clone() for name, tensor in trivial.zero().items()}
    parts: dict[str, list[tuple[Tensor, int]]] = {"train": [], "val": [], "test": []}
    for splits in federation.sites.values():
        for split, entries in splits.items():
            for entry in entries:
                case = federation.cache.load(entry)
                parts[split].append((task.scaled(case), task.class_of(case)))
                if split == "train":
                    for name, tensor in trivial.accumulate(case, {}).items():
                        total[name] += tensor
    held_out = parts["test"] or parts["val"]
    if not held_out:
        raise Stop(Exit.CONFIG, "no patient is held out; set data.test_fraction above 0")
    return _pictures(parts["train"]), _pictures(held_out), total


def _pictures(found: list[tuple[Tensor, int]]) -> Pictures:
    images, labels = zip(*found, strict=True)
    return Pictures(torch.stack(images), torch.tensor(labels))


def makers(task: Gan, model: torch.nn.Module, training: Pictures, sums: Sums) -> Mapping[str, Maker]:
    """The generator, the mean image of each class with noise, and the training images drawn again."""

    def again(label: Tensor, draw: torch.Generator) -> Tensor:
        drawn = torch.rand(len(label), generator=draw).tolist()
        own = {kind: training.of(kind) for kind in training.kinds}
        return torch.stack([own[k][int(u * len(own[k]))] for k, u in zip(label.tolist(), drawn, strict=True)])

    return {
        "federated": lambda label, draw: torch.cat(
            [task.sample(model, part, draw) for part in torch.split(label, 100)]
        ),
        "class_mean": lambda label, draw: ClassMean(task).sample(sums, label, draw),
        "resampled": again,
    }


def picture(made: Pictures, real: Pictures) -> bytes:
    """A PNG: for each class rows of made images, then one of real ones; of volumes the middle slice."""
    rows = []
    for kind in real.kinds:
        own = made.of(kind)[: _ROWS * _WIDE]
        rows += [*torch.split(own, _WIDE), real.of(kind)[:_WIDE]]
    sheet = np.concatenate([np.concatenate([_flat(image) for image in _full(row)], 1) for row in rows])
    out = BytesIO()
    Image.fromarray(sheet).save(out, "PNG")
    return out.getvalue()


def _full(row: Tensor) -> Tensor:
    """A row of fewer images, black at its end."""
    return torch.cat([row, row.new_full((_WIDE - len(row), *row.shape[1:]), -1.0)])


def _flat(image: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    flat = image.mean(0)
    while flat.ndim > 2:
        flat = flat[..., flat.shape[-1] // 2]
    made: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = ((flat + 1) * 127.5).clamp(0, 255).byte().numpy()
    return made


def show(found: Judged) -> None:
    """Print the figures as a table, and whether the generator remembers its patients."""
    from rich.table import Table

    table = Table("maker", *COLUMNS, title="tested on held-out patients", title_justify="left")
    for name, figures in found.items():
        table.add_row(name, *(f"{figures[c]:.3f}" if c in figures else ABSENT for c in COLUMNS))
    whole(table)
