"""What a generator's images are worth, by two kinds of classifier, and to a hospital with few images.

    python bench/synthetic.py RUN... [--classifier RUN] [--draws 5] [--few 10] [--classifiers 3]

RUN: of `wardround simulate +experiment=pneumonia_gan`. `--classifier`: a run of a federated classifier on the
same patients, whose AUROC on test patients is put beside. Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from skimage.feature import hog
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

from server.report.table import final, records
from server.synthesis import Trained
from tasks.judging import Pictures, auroc, classifier, copied, likeness
from tasks.seeds import generator

IMAGES = 1000
#: steps of training on few images, and of training on after synthetic ones
FEW_STEPS, TUNING = 200, 40


def plain(seen: Pictures, held_out: Pictures) -> float:
    """AUROC of logistic regression on histograms of oriented gradients."""

    def found(images: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return np.stack([hog(i.mean(0).numpy(), 8, (8, 8), (2, 2)) for i in images])

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    model.fit(found(seen.images), seen.labels.numpy())
    return float(roc_auc_score(held_out.labels.numpy(), model.decision_function(found(held_out.images))))


def made(one: Trained, name: str) -> Pictures:
    """The images of a maker, in equal parts of each class."""
    label = torch.arange(IMAGES) % one.task.kinds
    with torch.no_grad():
        return Pictures(one.makers[name](label, generator(one.seed, "", 0, "evaluate", name)), label)


def row(name: str, seen: Pictures, one: Trained, classifiers: int) -> str:
    """A line of the first table; the CNN is the mean of so many `classifiers`."""
    areas = [auroc(classifier(seen, one.task.kinds, seed), one.held_out) for seed in range(classifiers)]
    alike = [
        likeness(Pictures(seen.of(k), torch.zeros(len(seen.of(k)), dtype=torch.int64)), torch.Generator())
        for k in seen.kinds
    ]
    share = copied(*(p.images.flatten(1) for p in (seen, one.training, one.held_out)))
    near = "" if seen is one.training else f"{share:.3f}"
    cells = [f"{fmean(areas):.3f}", f"{plain(seen, one.held_out):.3f}", *(f"{a:.2f}" for a in alike), near]
    return f"| {name} | " + " | ".join(cells) + " |"


def small(one: Trained, seen: Pictures, draws: int, few: int) -> list[tuple[float, float, float]]:
    """AUROC by draw of `few` labelled images: of them alone, of `seen`, of `seen` and then them."""
    kinds, found = one.task.kinds, []
    begin = classifier(seen, kinds, one.seed)
    start = auroc(begin, one.held_out)
    for draw in range(draws):
        chance = torch.Generator().manual_seed(draw)
        own = [torch.nonzero(one.training.labels == k).flatten() for k in range(kinds)]
        drawn = torch.cat([k[torch.randperm(len(k), generator=chance)[: few // kinds]] for k in own])
        here = Pictures(one.training.images[drawn], one.training.labels[drawn])
        alone = classifier(here, kinds, draw, flips=(1,), steps=FEW_STEPS)
        tuned = classifier(here, kinds, draw, begin=copy.deepcopy(begin), flips=(1,), steps=TUNING)
        found.append((auroc(alone, one.held_out), start, auroc(tuned, one.held_out)))
    return found


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("runs", type=Path, nargs="+")
    asked.add_argument("--classifier", type=Path)
    asked.add_argument("--draws", type=int, default=5)
    asked.add_argument("--few", type=int, default=10)
    asked.add_argument("--classifiers", type=int, default=3)
    given = asked.parse_args()
    many = given.classifiers
    torch.set_num_threads(1)
    print("| trained on | CNN | HOG + LR | alike, class 0 | class 1 | copied |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    few = []
    for i, run in enumerate(given.runs):
        one = Trained.of(run)
        if not i:
            print(row("real images", one.training, one, many))
            print(row("class means with noise", made(one, "class_mean"), one, many))
            print(row("training images drawn again", made(one, "resampled"), one, many))
        seen = made(one, "federated")
        print(row(f"federated generator, seed {one.seed}", seen, one, many), flush=True)
        few.append(small(one, seen, given.draws, given.few))
    print(
        f"\n| {given.few} labelled images | "
        + " | ".join(f"draw {d}" for d in range(given.draws))
        + " | mean |"
    )
    print("| --- |" + " ---: |" * (given.draws + 1))
    for k, name in enumerate(("real only, flips and crops", "synthetic only", "synthetic, then real")):
        by_draw = [fmean(run[d][k] for run in few) for d in range(given.draws)]
        print(f"| {name} | " + " | ".join(f"{a:.3f}" for a in by_draw) + f" | {fmean(by_draw):.3f} |")
    if given.classifier:
        area = final(records(given.classifier))["federated", "all"]["auroc"]
        print(f"| federated classifier |{' |' * given.draws} {float(area):.3f} |")


if __name__ == "__main__":
    main()
