"""A trained model at work: masks and scores for images that no run has seen."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conf.exits import Exit, Stop
from conf.schema import Columns
from server.checkpoint import result
from server.progress import note
from server.runfolder import RunFolder
from strategies import build_strategy
from tasks.base import Case, Prediction, Task, build_task
from tasks.data import images, nifti
from tasks.temperature import Temperature

VOLUMES = (".nii", ".nii.gz")
TEMPERATURE = "temperature.json"
"""In a run that was calibrated: what its model's logits are divided by."""


def predict(run: Path, source: Path, out: Path) -> int:
    """Write what a run's model says of an image, or of every image in a folder.

    Masks are written per image: NIfTI for volumes (voxels in RAS+ order, the affine with them), PNG for
    pictures, holding class numbers; `cam` lies red over a picture. Scores go to
    `scores.csv`, a line a number.

    Args:
        source: NIfTI or picture, as the run was trained on.
        out: a new folder.

    Returns:
        How many images were predicted.

    Raises:
        Stop: (`NO_RUN`, `RUN_EXISTS`, `NO_CASES`, `CONFIG`) with what is missing.
    """
    folder = RunFolder.open(run)
    plan, columns = folder.settings.plan, folder.settings.data.columns
    strategy = build_strategy(plan)
    if not strategy.whole and not strategy.personalises:
        raise Stop(Exit.CONFIG, f"{run}: strategy {plan.strategy.name} left a part of the model at each site")
    weights, task = result(run), build_task(plan)
    if out.exists():
        raise Stop(Exit.RUN_EXISTS, f"{out} exists; give a new folder: --out DIR")
    found = dict(_found(source))
    if not found:
        raise Stop(Exit.NO_CASES, f"{source} holds no image ({', '.join((*VOLUMES, *images.SUFFIXES))})")
    says = strategy.says(task, weights)
    tempered = _tempered(run, task)
    out.mkdir(parents=True)
    rows, done = [], 0
    for path, name in found.items():
        try:
            case = read(path, name, columns)
            with torch.no_grad():
                said = says(case)
            said = tempered(said)
        except (ValueError, RuntimeError) as error:  # a file or a grid that does not fit: the others may
            note(f"left out: {path}: {str(error).splitlines()[0]}")
            continue
        _draw(said, case, out / name)
        rows += [(name, n, i, float(v)) for n, t in said.scores.items() for i, v in enumerate(t.flatten())]
        done += 1
    if rows:
        with (out / "scores.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("image", "score", "index", "value"), *rows])
    if not done:
        raise Stop(Exit.NO_CASES, f"no image of {source} could be predicted; the reasons stand above")
    return done


def read(path: Path, name: str, columns: Columns) -> Case:
    """An image as the case that training would have made of it.

    Raises:
        Faulty: it cannot be read.
    """
    if path.name.endswith(VOLUMES):
        raw = nifti.read_pair(path, None, None)
    else:
        raw = images.read_pair(path, None, None, pages=columns.pages, colour=columns.colour)
    if raw.image is None:
        raise ValueError("holds no image")
    image = torch.from_numpy(np.array(raw.image, dtype=np.float32))
    return Case(name, name, {"image": image}, torch.tensor(raw.affine), raw.spacing, units=raw.units)


def _tempered(run: Path, task: Task) -> Callable[[Prediction], Prediction]:
    """What a run's temperature makes of a prediction, where it has one."""
    scaling = task.sums().get("calibrated")
    if not (run / TEMPERATURE).exists() or not isinstance(scaling, Temperature):
        return lambda said: said
    value = torch.tensor(float(json.loads((run / TEMPERATURE).read_bytes())["temperature"]))
    return lambda said: scaling.scaled(said, value)


def _found(source: Path) -> Iterator[tuple[Path, str]]:
    """Images at or below a path, each with the name that its output gets."""
    root = source if source.is_dir() else source.parent
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        suffix = next((s for s in (*VOLUMES[::-1], *images.SUFFIXES) if path.name.lower().endswith(s)), "")
        if suffix and path.is_file() and not path.name.startswith("."):
            yield path, "-".join(path.relative_to(root).parts)[: -len(suffix)]


def _draw(said: Prediction, case: Case, stem: Path) -> None:
    """Write the masks of a prediction, and where it was found."""
    for name, mask in said.masks.items():
        values = mask.cpu().numpy().astype(np.uint8)
        if values.ndim == 3:
            _volume(values, case, f"{stem}_{name}.nii.gz")
        else:
            Image.fromarray(values).save(f"{stem}_{name}.png")
    if (heat := said.images.get("cam")) is not None:
        if heat.ndim == 4:
            _volume(heat[0].numpy(), case, f"{stem}_cam.nii.gz")
        else:
            Image.fromarray(_overlay(next(iter(case.images.values())), heat[0])).save(f"{stem}_cam.png")


def _volume(values: np.ndarray[Any, Any], case: Case, path: str) -> None:
    made = nib.Nifti1Image(values, case.affine.numpy())  # type: ignore[no-untyped-call]
    made.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
    nib.save(made, path)


def _overlay(image: Tensor, heat: Tensor) -> np.ndarray[Any, Any]:
    """The image in grey, red where the map is large: `H W 3` uint8."""
    grey = image.float().mean(0)
    grey = (grey - grey.min()) / (grey.max() - grey.min()).clamp_min(1e-6)
    share = 0.6 * heat / heat.max().clamp_min(1e-12)
    red = torch.tensor([1.0, 0.0, 0.0])
    rgb = grey[..., None] * (1 - share[..., None]) + red * share[..., None]
    made: np.ndarray[Any, Any] = (255 * rgb).round().byte().numpy()
    return made
