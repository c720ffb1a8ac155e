"""Case to map: every voxel gets a class. 2D and 3D, one image in, one mask out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tasks.base import Batch, Case, Phase, Prediction, Summed
from tasks.clean import cleaned
from tasks.data.augment import cut, start
from tasks.data.fingerprint import Survey
from tasks.data.resample import grid, hardest, resample, resample_mask
from tasks.imaging import Classes, ImageTask, Label, Millimetres, Share, Sides
from tasks.losses import comparing
from tasks.metrics import Statistics
from tasks.models import network
from tasks.predict import mirrored, sliding_window
from tasks.scoring.overlap import SegmentationStatistics
from tasks.scoring.surface import Depth
from tasks.serving import Served
from tasks.supervision import deep, marginal
from tasks.trivial import Atlas, Constant, Otsu, Threshold

#: voxels per class kept as possible centres of patches
CENTRES = 1024
#: side of the atlas grid, by dimensions
ATLAS_SIDE = {2: 128, 3: 48}


@dataclass(frozen=True, kw_only=True)
class Segmentation(ImageTask):
    """Segmentation of one image.

    Attributes:
        classes: names, background first.
        patch: sides of a training patch and of a prediction window, in voxels of the plan's spacing;
            two for images, three for volumes.
        mask: its name in a case.
        spacing: mm per axis that images are resampled to; none: each stays on its own grid.
        stretch: each whole image is resampled onto one patch, whatever its size: position means the same in
            all of them.
        foreground: share of patches centred on a foreground voxel, its class drawn first.
        overlap: of neighbouring prediction windows.
        flips_at_prediction: whether probabilities are averaged over the images mirrored along `flips`.
        dropout_samples: predictions with dropout left on whose probabilities are averaged (Gal and
            Ghahramani, 2016, arXiv:1506.02142), their entropy beside them as map `uncertainty`, 0 to 1;
            0: one without.
        largest, smallest: see `cleaned`. surface, lesion_iou: see `Depth`.
    """

    by_value: ClassVar[frozenset[str]] = frozenset({"centres", "spacing"})

    classes: Classes
    patch: Sides
    mask: Label = "mask"
    spacing: tuple[Millimetres, ...] | None = None
    stretch: bool = False
    foreground: Share = 0.5
    overlap: Annotated[float, Field(ge=0, le=0.9)] = 0.5
    flips_at_prediction: bool = False
    dropout_samples: Annotated[int, Field(ge=0, le=1000)] = 0
    largest: bool = False
    smallest: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    surface: Annotated[float, Field(ge=0, le=1000)] = 0.0
    lesion_iou: Share | None = None

    @property
    def sides(self) -> tuple[int, ...]:
        """A patch's."""
        return self.patch

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stretch and self.spacing is not None:
            raise ValueError(
                f"task.stretch and task.spacing {list(self.spacing)} exclude each other; drop one"
            )
        if self.spacing is not None and len(self.spacing) != len(self.patch):
            raise ValueError(
                f"task.spacing has {len(self.spacing)} axes, task.patch has {len(self.patch)}; give one per "
                "axis"
            )
        # it knows as many classes as there are
        some = torch.zeros(1, len(self.classes), *[2] * len(self.patch))
        comparing(self.loss, "map")(some, torch.zeros(some[:, 0].shape, dtype=torch.int64))
        self.rehearse(
            "patch",
            lambda model: model(torch.empty(1, self.channels, *self.patch)),
            (len(self.classes), *self.patch),
            "its sides must be multiples of the network's total stride, and at least twice it",
        )

        if self.dropout_samples:
            self.check_dropout(self.dropout_samples)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One: the loss between the network's logits (side outputs too) and the mask."""
        criterion = comparing(self.loss, "map")

        def loss(model: nn.Module, batch: Batch | None) -> Tensor:
            here = self.patients(batch)
            logits = model(here["image"])
            if "looked" in here:
                outputs = logits if isinstance(logits, tuple) else (logits,)
                logits = tuple(marginal(each, here["looked"]) for each in outputs)
            return deep(criterion, logits, here["mask"])

        return (Phase("train", loss),)

    def build_model(self) -> nn.Module:
        """The network the plan names, for this task's channels and classes."""
        model: nn.Module = network(
            self.model,
            "map",
            in_channels=self.channels,
            out_channels=len(self.classes),
            dimensions=len(self.patch),
        )
        return model

    def served(self, model: nn.Module) -> Served:
        """The network on windows."""
        window = torch.zeros(2, self.channels, *self.patch)
        names = (
            "classes",
            "spacing",
            "stretch",
            "patch",
            "overlap",
            "largest",
            "smallest",
            "dropout_samples",
        )
        flips = {"flips": self.flips if self.flips_at_prediction else ()}
        means = "of each class; where windows overlap their mean by a Gaussian, then softmax over axis 1"
        return Served(model, {"image": window}, ("logits", means), self.settings(*names) | flips)

    def prepare(self, case: Case) -> dict[str, Tensor]:
        """Resampled and normalised.

        Returns:
            `image` `CHW[D]` float32, `mask` `HW[D]` uint8, `centres` `N x axes` int32 (as many per
            foreground class), `spacing` float64 in mm; `looked` K bool, if the site annotates only some
            classes.

        Raises:
            ValueError: the case has no such image or mask, or they do not suit the plan.
        """
        image = self._input(case)
        if self.mask not in case.masks:
            raise ValueError(
                f"case {case.key} has no mask {self.mask!r}; training needs one (setting: data.columns.label)"
            )
        looked, truth = self._looked(case), case.masks[self.mask]
        if int(truth.max()) >= len(self.classes):
            raise ValueError(
                f"case {case.key} has class {int(truth.max())} in its mask; task.classes has 0 to "
                f"{len(self.classes) - 1}"
            )
        native = truth.shape
        mask = resample_mask(_only(truth, looked), len(self.classes), image.shape[1:])
        extent = torch.tensor(case.spacing, dtype=torch.float64) * torch.tensor(native)
        return {
            "image": image,
            "mask": mask,
            "centres": _centres(mask, len(self.classes)),
            "spacing": extent / torch.tensor(mask.shape),
            **({} if looked.all() else {"looked": looked}),
        }

    def _looked(self, case: Case) -> Tensor:
        """Which classes somebody looked for: K bool, the background always."""
        if case.annotates is None:
            return torch.ones(len(self.classes), dtype=torch.bool)
        return torch.tensor([k == 0 or k in case.annotates for k in range(len(self.classes))])

    def _input(self, case: Case) -> Tensor:
        """The network's input for the whole case: `CHW[D]` float32 at the plan's spacing."""
        image = self.picture(case)
        shape = self.patch if self.stretch else grid(image.shape[1:], case.spacing, self.spacing)
        return self.normalised(resample(image, shape))

    def batch(self, examples: Sequence[Mapping[str, Tensor]], draw: torch.Generator) -> Batch:
        """`image` `B C *patch` float32 and `mask` `B *patch` int64, one patch per example.

        With `looked` `B K` bool where somebody did not look for all classes.
        """
        change, cuts = self.change, []
        for example in examples:
            mask = example["mask"]
            first = start(mask.shape, self.patch, example["centres"], self.foreground, draw)
            matrix = change.matrix(len(self.patch), draw)
            cuts.append(cut(example["image"], mask, first, self.patch, example["spacing"], matrix))
        images, masks = zip(*cuts, strict=True)
        batch = {"image": change.intensities(torch.stack(images), draw), "mask": torch.stack(masks)}
        if any("looked" in example for example in examples):
            everything = torch.ones(len(self.classes), dtype=torch.bool, device=batch["mask"].device)
            batch["looked"] = torch.stack([example.get("looked", everything) for example in examples])
        return batch

    def predict(self, model: nn.Module, case: Case) -> Prediction:
        """Sliding windows at the plan's spacing; probabilities go back to the native grid, then argmax."""
        image, draws = self._input(case), self.dropout_samples
        axes = sorted(set(self.flips)) if self.flips_at_prediction else []
        scores = mirrored(
            lambda seen: sliding_window(model, seen, self.patch, self.overlap, draws=draws), image, axes
        )
        shape = case.images[self.image].shape[1:]
        mask = hardest(scores, shape).cpu()
        mask = cleaned(mask, case.spacing, largest=self.largest, smallest=self.smallest)
        maps = {"uncertainty": resample(_entropy(scores), shape)[0].cpu()} if draws else {}
        return Prediction(masks={self.mask: mask}, maps=maps)

    def scored(self, cases: Sequence[Case], predictions: Sequence[Prediction]) -> Statistics:
        """Overlap in the native geometry, averaged over this patient's annotated cases."""
        pairs = [
            (self._judged(case, case.masks), self._judged(case, prediction.masks), case.spacing)
            for case, prediction in zip(cases, predictions, strict=True)
            if self.mask in case.masks
        ]
        if not pairs:
            return self.unscored()
        return SegmentationStatistics.of_patient(cases[0].patient, pairs, len(self.classes) - 1, self._depth)

    def _judged(self, case: Case, masks: Mapping[str, Tensor]) -> Tensor:
        """Without the classes that nobody looked for in this case: they are neither right nor wrong."""
        return _only(masks[self.mask], self._looked(case))

    @property
    def _depth(self) -> Depth:
        return Depth(self.surface, self.lesion_iou)

    def unscored(self) -> Statistics:
        """No patient."""
        return SegmentationStatistics.zero(len(self.classes) - 1, len(self.patch), self._depth.names)

    def survey(self) -> Survey:
        """Image, mask and the size of each class."""
        return Survey(self.image, self.mask, len(self.classes))

    def trivial(self) -> Mapping[str, Summed]:
        """The most frequent class everywhere, the mean mask; of two classes, what a threshold tells apart."""
        n = len(self.classes)
        made: dict[str, Summed] = {
            "constant": Constant(self.mask, n),
            "atlas": Atlas(self.mask, n, len(self.patch), ATLAS_SIDE[len(self.patch)]),
        }
        if n == 2:
            made["threshold"] = Threshold(self.mask, lambda case: self.normalised(self.picture(case)).mean(0))
            made["otsu"] = Otsu(self.mask, lambda case: self.picture(case).mean(0))
        return made


def _only(mask: Tensor, looked: Tensor) -> Tensor:
    """The mask with background where it has a class that nobody looked for."""
    return mask if looked.all() else torch.where(looked.to(mask.device)[mask.long()], mask, 0)


def _entropy(scores: Tensor) -> Tensor:
    """Of probabilities `K H W[D]`, as a share of the largest there can be: `1 H W[D]`."""
    return -(scores * scores.clamp_min(1e-12).log()).sum(0, keepdim=True) / math.log(len(scores))


def _centres(mask: Tensor, classes: int) -> Tensor:
    """Voxels to centre patches on: `CENTRES` per foreground class that is there, evenly spread."""
    found = []
    for k in range(1, classes):
        voxels = (mask == k).nonzero()
        if len(voxels):
            found.append(voxels[torch.linspace(0, len(voxels) - 1, CENTRES).long()])
    return torch.cat(found).int() if found else torch.zeros((0, mask.ndim), dtype=torch.int32)
