"""Case to map: every voxel gets a class. 2D and 3D, one image in, one mask out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from conf.exits import Exit, Stop
from conf.schema import Section
from conf.table import STRICT
from tasks.base import Batch, Case, Phase, Prediction, Task, Trivial
from tasks.data.augment import Augmentation, cut, start
from tasks.data.fingerprint import Survey
from tasks.data.resample import fixed, grid, hardest, resample, resample_mask, window, zscore
from tasks.losses import LOSSES
from tasks.metrics import SegmentationStatistics, Statistics
from tasks.models import MODELS
from tasks.predict import sliding_window
from tasks.trivial import Atlas, Constant

#: voxels per class kept as possible centres of patches
CENTRES = 1024
#: side of the atlas grid, by dimensions
ATLAS_SIDE = {2: 128, 3: 48}

Label = Annotated[str, Field(min_length=1, max_length=64)]
Side = Annotated[int, Field(ge=1, le=4096)]
Millimetres = Annotated[float, Field(gt=0, le=1000)]
Percent = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]
Axis = Annotated[int, Field(ge=0, le=2)]
Change = Annotated[float, Field(ge=0, le=4)]


@dataclass(frozen=True, kw_only=True)
class Segmentation(Task):
    """Segmentation of one image.

    Attributes:
        model, loss: what to train, and on what.
        classes: names, background first.
        patch: sides of a training patch and of a prediction window, in voxels of the plan's spacing;
            two for images, three for volumes.
        channels: of the image. image, mask: their names in a case.
        spacing: mm per axis that images are resampled to; none: each stays on its own grid.
        normalise: `zscore`: cut at `percentiles`, mean 0, deviation 1, each image by itself;
            `window`: from `window` (raw units, HU for CT) onto -1 to 1;
            `fixed`: cut at `clip`, less `mean`, divided by `deviation`, the same numbers (raw units) for
            every image.
        foreground: share of patches centred on a foreground voxel, its class drawn first.
        overlap: of neighbouring prediction windows.
        flips, rotation, scaling, noise, contrast, brightness, gamma: see `Augmentation`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    by_value: ClassVar[frozenset[str]] = frozenset({"centres", "spacing"})

    model: Section
    loss: Section
    classes: Annotated[tuple[Label, ...], Field(min_length=2, max_length=256)]
    patch: Annotated[tuple[Side, ...], Field(min_length=2, max_length=3)]
    channels: Annotated[int, Field(ge=1, le=64)] = 1
    image: Label = "image"
    mask: Label = "mask"
    spacing: tuple[Millimetres, ...] | None = None
    normalise: Literal["zscore", "window", "fixed"] = "zscore"
    percentiles: tuple[Percent, Percent] = (0.5, 99.5)
    window: tuple[float, float] = (-160.0, 240.0)
    clip: tuple[float, float] = (-1000.0, 1000.0)
    mean: float = 0.0
    deviation: Annotated[float, Field(gt=0)] = 500.0
    foreground: Share = 0.5
    overlap: Annotated[float, Field(ge=0, le=0.9)] = 0.5
    flips: tuple[Axis, ...] = ()
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    scaling: Change = 0.0
    noise: Change = 0.0
    contrast: Change = 0.0
    brightness: Change = 0.0
    gamma: Change = 0.0

    def __post_init__(self) -> None:
        dimensions = len(self.patch)
        if self.spacing is not None and len(self.spacing) != dimensions:
            raise ValueError(
                f"task.spacing has {len(self.spacing)} axes, task.patch has {dimensions}; give one per axis"
            )
        if any(axis >= dimensions for axis in self.flips):
            raise ValueError(f"task.flips is {list(self.flips)}; axes of a patch are 0 to {dimensions - 1}")
        for name in ("percentiles", "window", "clip"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"task.{name} is [{low}, {high}]; the first must be the smaller")
        LOSSES.build(self.loss)
        self._check_model()

    def _check_model(self) -> None:
        """One patch through the network without numbers: it must fit, and come out as K channels."""
        wanted = (1, len(self.classes), *self.patch)
        with torch.device("meta"), torch.no_grad():
            model = self.build_model().eval()
            try:
                got = tuple(model(torch.empty(1, self.channels, *self.patch)).shape)
                reason = "" if got == wanted else f"it makes {got} of it, need {wanted}"
            except (RuntimeError, ValueError) as error:
                reason = str(error)
        if reason:
            raise Stop(
                Exit.CONFIG,
                f"task.patch is {list(self.patch)}; model {self.model.name!r} cannot take it ({reason}); "
                "its sides must be multiples of the network's total stride, and at least twice it",
            )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One: the loss between the network's logits and the mask."""
        criterion = LOSSES.build(self.loss)

        def loss(model: nn.Module, batch: Batch | None) -> Tensor:
            if batch is None:
                raise ValueError("segmentation needs a batch of patients; got none")
            value: Tensor = criterion(model(batch["image"]), batch["mask"])
            return value

        return (Phase("train", loss),)

    def build_model(self) -> nn.Module:
        """The network the plan names, for this task's channels and classes."""
        model: nn.Module = MODELS.build(
            self.model,
            in_channels=self.channels,
            out_channels=len(self.classes),
            dimensions=len(self.patch),
        )
        return model

    def prepare(self, case: Case) -> dict[str, Tensor]:
        """Resampled and normalised.

        Returns:
            `image` `CHW[D]` float32, `mask` `HW[D]` uint8, `centres` `N x axes` int32 (as many per
            foreground class), `spacing` float64 in mm.

        Raises:
            ValueError: the case has no such image or mask, or they do not suit the plan.
        """
        image = self._input(case)
        if self.mask not in case.masks:
            raise ValueError(f"case {case.key} has no mask {self.mask!r}; training needs one")
        truth = case.masks[self.mask]
        if int(truth.max()) >= len(self.classes):
            raise ValueError(
                f"case {case.key} has class {int(truth.max())} in its mask; task.classes has 0 to "
                f"{len(self.classes) - 1}"
            )
        native = truth.shape
        mask = resample_mask(truth, len(self.classes), image.shape[1:])
        extent = torch.tensor(case.spacing, dtype=torch.float64) * torch.tensor(native)
        return {
            "image": image,
            "mask": mask,
            "centres": _centres(mask, len(self.classes)),
            "spacing": extent / torch.tensor(mask.shape),
        }

    def _input(self, case: Case) -> Tensor:
        """The network's input for the whole case: `CHW[D]` float32 at the plan's spacing."""
        if self.image not in case.images:
            raise ValueError(f"case {case.key} has no image {self.image!r}; it has {sorted(case.images)}")
        image = case.images[self.image].float()
        wanted = f"{self.channels} channels and {len(self.patch)} axes"
        if image.ndim != 1 + len(self.patch) or image.shape[0] != self.channels:
            raise ValueError(f"case {case.key} has an image of shape {tuple(image.shape)}; need {wanted}")
        image = resample(image, grid(image.shape[1:], case.spacing, self.spacing))
        if self.normalise == "window":
            return window(image, *self.window)
        if self.normalise == "fixed":
            return fixed(image, *self.clip, self.mean, self.deviation)
        return zscore(image, *self.percentiles)

    def batch(self, examples: Sequence[Mapping[str, Tensor]], draw: torch.Generator) -> Batch:
        """`image` `B C *patch` float32 and `mask` `B *patch` int64, one patch per example."""
        change = Augmentation(
            self.flips, self.rotation, self.scaling, self.noise, self.contrast, self.brightness, self.gamma
        )
        cuts = []
        for example in examples:
            mask = example["mask"]
            first = start(mask.shape, self.patch, example["centres"], self.foreground, draw)
            matrix = change.matrix(len(self.patch), draw)
            cuts.append(cut(example["image"], mask, first, self.patch, example["spacing"], matrix))
        images, masks = zip(*cuts, strict=True)
        return {"image": change.intensities(torch.stack(images), draw), "mask": torch.stack(masks)}

    def predict(self, model: nn.Module, case: Case) -> Prediction:
        """Sliding windows at the plan's spacing; probabilities go back to the native grid, then argmax."""
        scores = sliding_window(model, self._input(case), self.patch, self.overlap)
        native = case.images[self.image].shape[1:]
        return Prediction(masks={self.mask: hardest(scores, native).cpu()})

    def score(self, cases: Sequence[Case], predictions: Sequence[Prediction]) -> Statistics:
        """Overlap in the native geometry, averaged over this patient's annotated cases."""
        pairs = [
            (case.masks[self.mask], prediction.masks[self.mask], case.spacing)
            for case, prediction in zip(cases, predictions, strict=True)
            if self.mask in case.masks
        ]
        if not pairs:
            return self.statistics()
        return SegmentationStatistics.of_patient(pairs, len(self.classes) - 1)

    def statistics(self) -> SegmentationStatistics:
        """Zero patients."""
        return SegmentationStatistics.zero(len(self.classes) - 1, len(self.patch))

    def survey(self) -> Survey:
        """Image, mask and the size of each class."""
        return Survey(self.image, self.mask, len(self.classes))

    def trivial(self) -> Mapping[str, Trivial]:
        """The most frequent class everywhere, and the mean mask."""
        n = len(self.classes)
        return {
            "constant": Constant(self.mask, n),
            "atlas": Atlas(self.mask, n, len(self.patch), ATLAS_SIDE[len(self.patch)]),
        }


def _centres(mask: Tensor, classes: int) -> Tensor:
    """Voxels to centre patches on: `CENTRES` per foreground class that is there, evenly spread."""
    found = []
    for k in range(1, classes):
        voxels = (mask == k).nonzero()
        if len(voxels):
            found.append(voxels[torch.linspace(0, len(voxels) - 1, CENTRES).long()])
    return torch.cat(found).int() if found else torch.zeros((0, mask.ndim), dtype=torch.int32)
