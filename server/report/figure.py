"""One picture of a run: an example slice of each hospital with contours, and the validation curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from server.report.table import METRICS, Record, records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from tasks.base import Case, Prediction

#: Okabe and Ito's colours, told apart by colour-blind readers; classes and sites take them in order
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
#: pictures in a row
WIDE = 4


def figure(run: Path, examples: Sequence[tuple[str, Case, Prediction]], out: Path) -> None:
    """Draw a PNG of example slices, truth against prediction, and of the metric over the rounds.

    Masks are contours; a made image is shown in the place of the case's; scores stand in the title, after the
    truth. A volume is shown by the axial slice with most foreground (else the middle one), in radiological
    view (the patient's right on the left, front above).

    Args:
        run: its directory, with `plan.json` and `metrics.jsonl`.
        examples: site, case and the final model's prediction of it.
        out: the PNG to write.
    """
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    found = records(run)
    rows = -(-len(examples) // WIDE)
    columns = max(1, min(WIDE, len(examples)))
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        page = Figure(figsize=(max(7.0, 2.9 * columns), 3.3 * rows + 2.9), layout="constrained")
        FigureCanvasAgg(page)
        grid = page.add_gridspec(rows + 1, columns)
        for position, (site, case, prediction) in enumerate(examples):
            _example(page.add_subplot(grid[divmod(position, columns)]), site, case, prediction, plan["task"])
        _curves(page.add_subplot(grid[rows, :]), found)
        if any(prediction.masks for _, _, prediction in examples):
            _legend(page, plan["task"].get("classes", []))
        page.savefig(out, dpi=150)


def _example(axes: Axes, site: str, case: Case, prediction: Prediction, task: dict[str, Any]) -> None:
    made = next(iter(prediction.images.values()), None)
    image = (case.images[task.get("image", "image")] if made is None else made)[0].numpy()
    both = {"solid": case.masks, "dashed": prediction.masks} if made is None else {}
    name = task.get("mask", "mask")
    outlines = {style: masks[name].numpy() for style, masks in both.items() if name in masks}
    aspect = case.spacing[0] / case.spacing[1]
    if image.ndim == 3:
        truth = outlines.get("solid", np.zeros(image.shape))
        z = int((truth > 0).sum(axis=(0, 1)).argmax()) if truth.any() else image.shape[2] // 2
        # x grows to the patient's right and y to the front: right goes left, front goes up
        image, *flat = (np.flip(array[:, :, z].T, (0, 1)) for array in (image, *outlines.values()))
        outlines = dict(zip(outlines, flat, strict=True))
        aspect = case.spacing[1] / case.spacing[0]
    low, high = task["window"] if task.get("normalise") == "window" else np.percentile(image, (1, 99))
    if made is not None:
        low, high = np.percentile(image, (0, 100))
    axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
    for style, mask in outlines.items():
        for k in range(1, int(mask.max()) + 1):
            _contour(axes, mask == k, COLOURS[(k - 1) % len(COLOURS)], style)
    axes.set_title("\n".join([site, *_words(case, prediction)]), fontsize=9)
    axes.set_axis_off()


def _words(case: Case, prediction: Prediction) -> list[str]:
    """What is true of a case and what is said of it, in numbers."""
    if "given" not in prediction.scores:
        return []
    truth = " ".join(f"{value:g}" for value in case.labels.values())
    return [f"{truth or 'unknown'} → {' '.join(f'{v:.2f}' for v in prediction.scores['given'].tolist())}"]


def _contour(axes: Axes, region: NDArray[np.bool_], colour: str, style: str) -> None:
    if region.any():
        # a border of nothing closes contours at the picture's edge
        rows, columns = (np.arange(-1, n + 1) for n in region.shape)
        axes.contour(
            columns,
            rows,
            np.pad(region, 1).astype(float),
            [0.5],
            colors=[colour],
            linestyles=[style],
            linewidths=1.3,
        )


def _legend(page: Figure, classes: Sequence[str]) -> None:
    lines = [
        Line2D([], [], color=COLOURS[k % len(COLOURS)], label=name) for k, name in enumerate(classes[1:])
    ]
    lines += [
        Line2D([], [], color="black", linestyle="solid", label="truth"),
        Line2D([], [], color="black", linestyle="dashed", label="federated model"),
    ]
    page.legend(handles=lines, loc="outside upper center", ncols=len(lines), frameon=False)


def _curves(axes: Axes, found: Sequence[Record]) -> None:
    """The federated model on validation patients after each evaluated round, a line per site."""
    have = {key for record in found for key in record}
    metric = next((name for name in METRICS if name in have), "loss")
    shown = [r for r in found if r["model"] == "federated" and r["split"] == "val" and metric in r]
    axes.set_xlabel("round")
    axes.set_ylabel(f"{metric} (validation)")
    if not shown:
        axes.text(0.5, 0.5, "no validation patients", ha="center", va="center", transform=axes.transAxes)
        return
    sites = sorted({record["site"] for record in shown} - {"all"})
    for position, site in enumerate([*sites, "all"]):
        points = sorted((r["round"], r[metric]) for r in shown if r["site"] == site)
        colour = "black" if site == "all" else COLOURS[-1 - position % len(COLOURS)]
        axes.plot(
            *zip(*points, strict=True), color=colour, marker=".", lw=2 if site == "all" else 1.2, label=site
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
