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
from strategies.base import Study
from tasks.base import Case, Prediction, Task
from tasks.data import images, nifti
from tasks.gan import Gan
from tasks.serving import Servable
from tasks.temperature import Temperature

VOLUMES = (".nii", ".nii.gz")
TEMPERATURE = "temperature.json"
"""In a run that was calibrated: what its model's logits are divided by."""


def predict(run: Path, source: Path, out: Path) -> int:
    """Write what a run's model says of an image, or of every image in a folder.

    Written per image: NIfTI for volumes (voxels in RAS+ order, the affine with them), PNG for pictures. Masks
    hold class numbers, made images raw values; a map lies red over a picture. Scores go to `scores.csv`, a
    line a number.

    Args:
        source: NIfTI or picture, as the run was trained on.
        out: a new folder.

    Returns:
        How many images were predicted.

    Raises:
        Stop: (`NO_RUN`, `RUN_EXISTS`, `NO_CASES`, `CONFIG`) with what is missing.
    """
    folder = RunFolder.open(run)
    task, says = model_of(folder)
    if isinstance(task, Gan):
        raise Stop(Exit.CONFIG, f"{run} makes images of noise, not of images; use: wardround evaluate {run}")
    if table := task.reads().get("task.columns"):
        raise Stop(
            Exit.CONFIG,
            f"{run} also reads {', '.join(table)}, which no image holds; predict has images alone "
            "(cases of a manifest are scored by: wardround evaluate RUN data.root=FOLDER)",
        )
    if out.exists():
        raise Stop(Exit.RUN_EXISTS, f"{out} exists; give a new folder: --out DIR")
    found = dict(_found(source))
    if not found:
        raise Stop(Exit.NO_CASES, f"{source} holds no image ({', '.join((*VOLUMES, *images.SUFFIXES))})")
    out.mkdir(parents=True)
    rows, done = [], 0
    for path, name in found.items():
        try:
            case = read(path, name, folder.settings.data.columns)
            with torch.no_grad():
                said = says(case)
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


def model_of(folder: RunFolder) -> tuple[Task, Callable[[Case], Prediction]]:
    """A run's task, and what its result says of a case, at the temperature it was calibrated to.

    Raises:
        Stop: (`CONFIG`) no one model is the result; (`NO_RUN`, `CHECKPOINT_DAMAGED`) there is none.
    """
    study = Study.of(folder.settings.plan)
    check_whole(folder.path, study)
    return study.task, says_of(folder.path, study)


def says_of(run: Path, study: Study) -> Callable[[Case], Prediction]:
    """What a whole result says of a case, at the temperature it was calibrated to.

    Raises:
        Stop: (`NO_RUN`, `CHECKPOINT_DAMAGED`) there is none.
    """
    says, tempered = build_strategy(study.plan).says(study.task, result(run)), _tempered(run, study.task)
    return lambda case: tempered(says(case))


def check_whole(run: Path, study: Study) -> None:
    """Refuse a result that sites keep a part of; what only judges images may stay there.

    Raises:
        Stop: (`CONFIG`) the run's strategy leaves some tensors at each site.
    """
    if home := at_home(study):
        what = f"strategy {study.plan.strategy.name} left a part of the model at each site"
        raise Stop(Exit.CONFIG, f"{run}: {what}, {len(home)} tensors such as {home[0]}")


def at_home(study: Study) -> list[str]:
    """What a prediction needs and each site keeps: in a run's result it is as it was before round 1."""
    plan, task, model = study.plan, study.task, study.fresh()
    used = task.served(model).network if isinstance(task, Servable) else model
    # under DP buffers never move, so they are everywhere what they were
    learned = study.trainable if plan.privacy.mode != "none" else study.initial.keys() - study.frozen
    return sorted(learned & used.state_dict().keys() - set(build_strategy(plan).shared(study)))


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
    """Write the masks, images and maps of a prediction."""
    under = next(iter(case.images.values()))
    for name, mask in said.masks.items():
        _write(mask.cpu().numpy().astype(np.uint8), case, f"{stem}_{name}")
    for name, image in said.images.items():
        _write(image.movedim(0, -1).squeeze(-1).cpu().numpy(), case, f"{stem}_{name}")
    for name, heat in said.maps.items():
        _write(heat.cpu().numpy() if heat.ndim == 3 else _overlay(under, heat), case, f"{stem}_{name}")


def _write(values: np.ndarray[Any, Any], case: Case, stem: str) -> None:
    """An array on a case's grid, channels last: NIfTI, or for pictures PNG (16 bits where 8 are too few)."""
    if len(case.spacing) == 3:
        _volume(values, case, f"{stem}.nii.gz")
        return
    whole = values.round().clip(0, 65_535)
    kind = np.uint8 if whole.max(initial=0) <= 255 or whole.ndim == 3 else np.uint16
    Image.fromarray(whole.clip(0, np.iinfo(kind).max).astype(kind)).save(f"{stem}.png")


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
