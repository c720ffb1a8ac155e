"""What every task on images has in common: its input, the scale of its intensities, chance in training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from conf.exits import Exit, Stop
from conf.schema import Section
from conf.table import STRICT
from tasks.base import Batch, Case, Prediction, Task
from tasks.data.augment import Augmentation
from tasks.data.fingerprint import Survey
from tasks.data.resample import fixed, window, zscore
from tasks.metrics import Statistics
from tasks.scoring.grouped import by_group
from tasks.serving import Servable

Label = Annotated[str, Field(min_length=1, max_length=64)]
Side = Annotated[int, Field(ge=1, le=4096)]
Sides = Annotated[tuple[Side, ...], Field(min_length=2, max_length=3)]
Classes = Annotated[tuple[Label, ...], Field(min_length=2, max_length=256)]
Millimetres = Annotated[float, Field(gt=0, le=1000)]
Percent = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]
Axis = Annotated[int, Field(ge=0, le=2)]
Change = Annotated[float, Field(ge=0, le=4)]
#: the settings that are each scale of intensities
SCALES = {"zscore": ("percentiles",), "window": ("window",), "fixed": ("clip", "mean", "deviation")}


def one_of(names: Collection[str]) -> AfterValidator:
    """For the annotation of a setting: it is a name of this table."""

    def known(name: str) -> str:
        if name not in names:
            raise ValueError(f"known: {', '.join(sorted(names))}")
        return name

    return AfterValidator(known)


@dataclass(frozen=True, kw_only=True)
class ImageTask(Task, Servable):
    """A task whose cases have one image.

    Attributes:
        model, loss: what to train, and on what.
        channels: of the image. image: its name in a case.
        normalise: `zscore`: cut at `percentiles`, mean 0, deviation 1, each image by itself;
            `window`: from `window` (raw units, HU for CT) onto -1 to 1;
            `fixed`: cut at `clip`, less `mean`, divided by `deviation`, the same numbers (raw units) for
            every image.
        flips, rotation, scaling, noise, contrast, brightness, gamma: see `Augmentation`.
        subgroups: columns of `Case.groups` with the values that are scored apart.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    model: Section
    loss: Section
    channels: Annotated[int, Field(ge=1, le=64)] = 1
    image: Label = "image"
    normalise: Literal["zscore", "window", "fixed"] = "zscore"
    percentiles: tuple[Percent, Percent] = (0.5, 99.5)
    window: tuple[float, float] = (-160.0, 240.0)
    clip: tuple[float, float] = (-1000.0, 1000.0)
    mean: float = 0.0
    deviation: Annotated[float, Field(gt=0)] = 500.0
    flips: tuple[Axis, ...] = ()
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    scaling: Change = 0.0
    noise: Change = 0.0
    contrast: Change = 0.0
    brightness: Change = 0.0
    gamma: Change = 0.0
    subgroups: Mapping[Label, tuple[Label, ...]] | None = None

    @property
    @abstractmethod
    def sides(self) -> tuple[int, ...]:
        """Of what the network sees at once: two for images, three for volumes."""

    def __post_init__(self) -> None:
        if any(axis >= len(self.sides) for axis in self.flips):
            raise ValueError(
                f"task.flips is {list(self.flips)}; axes of its input are 0 to {len(self.sides) - 1}"
            )
        for name in ("percentiles", "window", "clip"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"task.{name} is [{low}, {high}]; the first must be the smaller")

    def unchanged(self, names: Sequence[str], why: str) -> None:
        """Refuse changes by chance that would not happen.

        Raises:
            Stop: (`CONFIG`) one of these settings is not 0.
        """
        if given := [name for name in names if getattr(self, name)]:
            shown = ", ".join(f"task.{name} is {getattr(self, name)}" for name in given)
            raise Stop(Exit.CONFIG, f"{shown}; {why}: leave {'it' if len(given) == 1 else 'them'} at 0 or []")

    def rehearse(
        self, setting: str, run: Callable[[nn.Module], Tensor], wanted: tuple[int, ...], remedy: str
    ) -> None:
        """One example through the network without numbers: it must fit, and come out as `wanted`.

        Args:
            run: makes one example and takes it through. wanted: shape, without the batch's axis.

        Raises:
            Stop: (`CONFIG`) it does not; with `remedy`.
        """
        with torch.device("meta"), torch.no_grad():
            model = self.build_model().eval()
            try:
                got = tuple(run(model).shape[1:])
                reason = "" if got == wanted else f"it makes {got} of it, need {wanted}"
            except (RuntimeError, ValueError) as error:
                reason = str(error)
        if reason:
            raise Stop(
                Exit.CONFIG,
                f"task.{setting} is {list(self.sides)}; model {self.model.name!r} cannot take it "
                f"({reason}); {remedy}",
            )

    def check_dropout(self, samples: int) -> None:
        """Refuse to average over the draws of a dropout that is not there.

        Raises:
            ValueError: the network has none.
        """
        with torch.device("meta"):
            layers = self.build_model().modules()
        if not any(isinstance(one, _DropoutNd) and one.p for one in layers):
            raise ValueError(
                f"task.dropout_samples is {samples}; model {self.model.name!r} has no dropout as it is used "
                "here: 0, or model.dropout above 0"
            )

    @abstractmethod
    def scored(self, cases: Sequence[Case], predictions: Sequence[Prediction]) -> Statistics:
        """Additive statistics of one patient over all groups."""

    @abstractmethod
    def unscored(self) -> Statistics:
        """The zero of `scored`."""

    def score(self, cases: Sequence[Case], predictions: Sequence[Prediction]) -> Statistics:
        """Additive statistics of one patient, in the patient's subgroups too."""
        return by_group(self.scored(cases, predictions), self.subgroups, [case.groups for case in cases])

    def statistics(self) -> Statistics:
        """No patient."""
        return by_group(self.unscored(), self.subgroups)

    def survey(self) -> Survey:
        """The image alone."""
        return Survey(self.image)

    def reads(self) -> Mapping[str, Collection[str]]:
        """Subgroups."""
        return {"task.subgroups": tuple(self.subgroups or ())}

    @property
    def change(self) -> Augmentation:
        """What chance may do to an image in training."""
        return Augmentation(
            self.flips, self.rotation, self.scaling, self.noise, self.contrast, self.brightness, self.gamma
        )

    def settings(self, *names: str) -> dict[str, Any]:
        """What an image must be turned into before the network sees it, and the task's settings `names`."""
        return {
            name: getattr(self, name) for name in ("channels", "normalise", *SCALES[self.normalise], *names)
        }

    @staticmethod
    def patients(batch: Batch | None) -> Batch:
        """The batch of a phase that reads patients.

        Raises:
            ValueError: there is none.
        """
        if batch is None:
            raise ValueError("this phase needs a batch of patients; got none")
        return batch

    def picture(self, case: Case, axes: int = 0) -> Tensor:
        """The case's image as it came: `CHW[D]` float32, with `axes` more than the network's input has.

        Raises:
            ValueError: it has none, or one of other channels or axes.
        """
        if self.image not in case.images:
            raise ValueError(
                f"case {case.key} has no image {self.image!r}; it has {sorted(case.images)} (setting: "
                "data.columns.image)"
            )
        image = case.images[self.image].float()
        if self.channels == 1 and len(image) == 3 and (image[1:] == image[:1]).all():
            image = image[:1]  # grey, stored as RGB
        axes += len(self.sides)
        if image.ndim != 1 + axes:
            raise ValueError(
                f"case {case.key} has an image of shape {tuple(image.shape)}; need channels and {axes} axes "
                "(task.patch or task.size: a side for each)"
            )
        if image.shape[0] != self.channels:
            raise ValueError(
                f"case {case.key} has an image of {image.shape[0]} channels; need task.channels="
                f"{self.channels} (pictures: data.columns.colour=gray or rgb)"
            )
        return image

    def normalised(self, image: Tensor) -> Tensor:
        """Intensities on the scale that the network sees."""
        if self.normalise == "window":
            return window(image, *self.window)
        if self.normalise == "fixed":
            return fixed(image, *self.clip, self.mean, self.deviation)
        return zscore(image, *self.percentiles)
