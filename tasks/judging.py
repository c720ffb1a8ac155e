"""What made images are good for, by classifiers trained on the spot: no weights from elsewhere.

Images are `N C H W[D]` in -1 to 1, classes `N` int64. The classifiers see all images at one place, so this
is for whoever holds them: a researcher's simulation, or a hospital that judges for itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.schema import Section
from tasks.adversarial import DRAWS, Disguise
from tasks.models import MODELS
from tasks.networks.trunk import Trunk
from tasks.scoring.ranked import Ranking
from tasks.synthesis import frechet, ssim

#: what a classifier sees changed in training
CHANGES = Disguise(shift=0.05, zoom=0.1, brightness=0.1, contrast=0.1)
#: of a classifier's training
STEPS = 400
_BATCH, _RATE = 32, 2e-3
_PAIRS = 200
#: share of held-out images that count as too near to the training images; of made ones, twice as many may
_NEAR = 0.05


@dataclass(frozen=True)
class Pictures:
    """Images with their classes, and whose they are.

    Attributes:
        images: `N C H W[D]`. labels: `N`.
    """

    images: Tensor
    labels: Tensor

    def of(self, kind: int) -> Tensor:
        """Those of one class."""
        return self.images[self.labels == kind]

    @property
    def kinds(self) -> list[int]:
        """Classes that occur."""
        return sorted(set(self.labels.tolist()))


def classifier(
    seen: Pictures,
    classes: int,
    seed: int,
    *,
    begin: Trunk | None = None,
    flips: tuple[int, ...] = (),
    steps: int = STEPS,
) -> Trunk:
    """A small network trained on `seen`; the same on any day for the same seed.

    Args:
        begin: trained on from there. flips: axes that may be mirrored.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = begin or MODELS.build(
            Section(name="convnet", activation="relu", channels=[16, 32, 64], cells=4),
            in_channels=seen.images.shape[1],
            out_channels=classes,
            dimensions=seen.images.ndim - 2,
        )
        if not isinstance(made, Trunk):
            raise TypeError("a classifier is a Trunk")
        change = Disguise(flips, CHANGES.shift, CHANGES.zoom, CHANGES.brightness, CHANGES.contrast)
        maker = torch.optim.AdamW(made.parameters(), _RATE, weight_decay=0.01)
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(maker, steps)
        # as many of each class, however many there are
        weights = 1.0 / torch.bincount(seen.labels)[seen.labels]
        with torch.enable_grad():
            for _ in range(steps):
                picked = torch.multinomial(weights, _BATCH, replacement=True)
                shown = change(seen.images[picked], torch.rand(_BATCH, DRAWS))
                maker.zero_grad()
                F.cross_entropy(made(shown), seen.labels[picked]).backward()  # type: ignore[no-untyped-call]
                maker.step()
                slower.step()
    return made.eval()


def auroc(judge: Trunk, test: Pictures) -> float:
    """Mean over the classes of each against the others; NaN where there is one class alone."""
    with torch.no_grad():
        shares = torch.cat([judge(part) for part in torch.split(test.images, 256)]).softmax(1)
    ranked = [Ranking.of_scores(shares[:, k], test.labels == k).value() for k in test.kinds]
    return sum(found.get("auroc", math.nan) for found in ranked) / len(ranked)


def features(judge: Trunk, images: Tensor) -> Tensor:
    """What the classifier makes of images before its head: `N F` float64."""
    with torch.no_grad():
        return torch.cat([judge.pool(judge.maps(part)) for part in torch.split(images, 256)]).double()


def likeness(seen: Pictures, draw: torch.Generator) -> float:
    """Mean similarity (SSIM) of two different images of one class, the mean over classes of two and more."""
    found = []
    for kind in seen.kinds:
        own = seen.of(kind)
        if len(own) < 2:
            continue
        first = torch.randint(len(own), (_PAIRS,), generator=draw)
        other = (first + 1 + torch.randint(len(own) - 1, (_PAIRS,), generator=draw)) % len(own)
        found.append(ssim(own[first], own[other]).mean())
    return float(torch.stack(found).mean()) if found else math.nan


def distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of features `N F` taken as normal (Heusel et al., 2017, arXiv:1706.08500)."""
    return float(frechet(a.mean(0), b.mean(0), torch.cov(a.T, correction=0), torch.cov(b.T, correction=0)))


def mmd(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy, unbiased (Gretton et al., 2012, equation 3), a Gaussian kernel.

    Its width is the median distance in `b`.
    """
    width = torch.pdist(b).median().clamp_min(1e-12)
    inside = [(torch.exp(-((torch.pdist(x) / width) ** 2) / 2)).mean() for x in (a, b)]
    return float(inside[0] + inside[1] - 2 * torch.exp(-((torch.cdist(a, b) / width) ** 2) / 2).mean())


def copied(made: Tensor, training: Tensor, held_out: Tensor) -> float:
    """Share of made images that lie as near to a training image as only few held-out images do.

    Nearness is the distance to the nearest training image over that to the nearest held-out image (another
    one, for a held-out image): a blurred image is near to all, and by this no nearer to one it was made of.
    Near is what 5 % of the held-out images are, so 0.05 is expected of a generator that remembers nobody.

    Args:
        made, training, held_out: `N F` each, features or pixels.
    """
    to_training, to_held = torch.cdist(made, training).amin(1), torch.cdist(made, held_out).amin(1)
    between = torch.cdist(held_out, held_out).fill_diagonal_(torch.inf).amin(1)
    usual = torch.cdist(held_out, training).amin(1) / between.clamp_min(1e-12)
    return float((to_training / to_held.clamp_min(1e-12) < usual.quantile(_NEAR)).double().mean())


def remembers(share: float) -> bool:
    """Whether a share as `copied` gives it is too large."""
    return share > 2 * _NEAR


def judged(
    made: Pictures, training: Pictures, held_out: Pictures, real: Trunk, seed: int, *, steps: int = STEPS
) -> dict[str, float]:
    """All figures of a set of made images.

    `tstr`: trained on made images, tested on held-out ones, AUROC; `trtr`: trained on the training images;
    neither without classes. `alike`, `alike_real`: `likeness`. `fid`, `mmd`: of the features of the
    classifier of the training images, made against held-out; `copied`: in pixels; `remembers`: 0 or 1.

    Args:
        real: `classifier` of the training images.
    """
    draw = torch.Generator().manual_seed(seed)
    ours, theirs = features(real, made.images), features(real, held_out.images)
    share = copied(*(p.images.flatten(1) for p in (made, training, held_out)))
    found = {
        "tstr": auroc(classifier(made, max(training.kinds) + 1, seed, steps=steps), held_out),
        "trtr": auroc(real, held_out),
        "alike": likeness(made, draw),
        "alike_real": likeness(training, draw),
        "fid": distance(ours, theirs),
        "mmd": mmd(ours, theirs),
        "copied": share,
        "remembers": float(remembers(share)),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}
