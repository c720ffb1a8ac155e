"""Case, task, phase: what a site holds and what it is asked to learn.

Shapes: `C` channels, `H W` rows and columns of a 2D image, `H W D` the axes x, y, z of a volume in
RAS+ order, `B` examples. Spacing is in mm, in the order of the array's axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from conf.schema import Plan
    from tasks.data.fingerprint import Survey
    from tasks.metrics import Statistics

Batch = Mapping[str, Tensor]
Sums = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One examination of one patient, as it came: native grid, raw intensities.

    Attributes:
        key: names the case in reports that stay at the site (a content digest).
        patient: pseudonymous patient key. The patient is the unit of splits, sampling, privacy, scores.
        images: name to `CHW[D]` float32; absent inputs are absent keys.
        masks: name to `HW[D]` uint8 of class indices; absent where nobody annotated.
        affine: 4x4 float64, array index to RAS+ mm (2D: rows and columns, identity scale if unknown).
        spacing: mm, one per spatial axis.
        labels: name to number. table: clinical columns. groups: coded columns for subgroup scores.
        units: of the image's values: `HU`, `SUVbw`, or empty.
        annotates: the classes somebody looked for; None: all. In the mask of a site that annotates fewer,
            0 may hide the others.
    """

    key: str
    patient: str
    images: Mapping[str, Tensor]
    affine: Tensor
    spacing: tuple[float, ...]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Mapping[str, float] = field(default_factory=dict)
    table: Mapping[str, float] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    units: str = ""
    annotates: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Prediction:
    """What a model says of one case, on the case's own grid.

    Attributes:
        masks: name to `HW[D]` uint8. images: name to `CHW[D]`, in raw units. scores: name to numbers.
        maps: name to `HW[D]`, 0 and more: where in the image something is.
    """

    masks: Mapping[str, Tensor] = field(default_factory=dict)
    images: Mapping[str, Tensor] = field(default_factory=dict)
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)


def everything(_: str) -> bool:
    """Every parameter: what a phase with one model trains."""
    return True


@dataclass(frozen=True)
class Phase:
    """One kind of step of the local loop.

    Attributes:
        name: names the phase in statistics.
        parameters: which parameters (by name) it moves.
        loss: `loss(model, batch) -> Tensor[B]`, one value per example: no example's loss may depend
            on another example, so that a patient's gradient can be clipped.
        private: whether it reads patients. One that does not gets `batch=None`.
        every: it runs at every `every`-th step.
    """

    name: str
    loss: Callable[[nn.Module, Batch | None], Tensor]
    parameters: Callable[[str], bool] = everything
    private: bool = True
    every: int = 1


class Summed(ABC):
    """The shape *sums*: a predictor learned without gradient steps, by one or a few exact exchanges.

    An exchange sends out what is `known`, adds what each training case makes of it, over cases and sites,
    and `solve`s: that is known next. Sums are exact, so it is the predictor of the pooled cases.

    Attributes:
        exchanges: how many it takes. split: of the cases that it sums over.
        largest: of a site's sums, in size; the smaller, the finer the grid they are added on.
        products: how many features a site's sums hold the products of, with each other; 0: none. Of fewer
            patients than features such products tell who is among them.
    """

    exchanges: int = 1
    split: str = "train"
    largest: float = 2.0**31

    @property
    def products(self) -> int:
        return 0

    def cells(self, part: Sums) -> Tensor:
        """Which of its means a case's `part` counts in, 1 or 0: by default in all, if it adds anything."""
        return torch.tensor([any(bool(tensor.any()) for tensor in part.values())], dtype=torch.float64)

    def start(self) -> Sums:
        """What is known before the first exchange: float64."""
        return {}

    @abstractmethod
    def zero(self) -> Sums:
        """Sums over no case: float64, and the shapes that may come back from a site."""

    @abstractmethod
    def accumulate(self, case: Case, known: Sums) -> Sums:
        """This case's contribution; contributions add over cases and over sites."""

    def solve(self, sums: Sums, known: Sums) -> Sums:
        """What the sums over all training cases come to."""
        return sums

    @abstractmethod
    def predict(self, known: Sums, case: Case) -> Prediction:
        """The prediction for `case`."""


class Task(ABC):
    """One shape of learning: what a case becomes, what is minimised, what is predicted and scored.

    A task is built from the plan at both ends (`build_task`), so coordinator and site derive the same
    names, shapes and statistics from it. It holds no data and no memory.
    """

    by_value: ClassVar[frozenset[str]] = frozenset()
    """Prepared tensors whose values `batch` reads: they stay on the CPU, or each read waits for the GPU."""

    @property
    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """The kinds of step of the local loop."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A new model; weights from torch's generator (the caller seeds it)."""

    @abstractmethod
    def prepare(self, case: Case) -> dict[str, Tensor]:
        """All that does not depend on chance (resampling, normalisation): done once, then kept.

        Raises:
            ValueError: the case lacks what this task needs; the message names it.
        """

    @abstractmethod
    def batch(self, examples: Sequence[Mapping[str, Tensor]], draw: torch.Generator) -> Batch:
        """Random patches and augmentation of prepared cases, one per entry, stacked: `B...`."""

    @abstractmethod
    def predict(self, model: nn.Module, case: Case) -> Prediction:
        """The model's prediction on the case's own grid."""

    @abstractmethod
    def score(self, cases: Sequence[Case], predictions: Sequence[Prediction]) -> Statistics:
        """Additive statistics of one patient: `cases` are all of that patient's."""

    @abstractmethod
    def statistics(self) -> Statistics:
        """The zero of `score`'s monoid: fixes what may come back from a site."""

    @abstractmethod
    def trivial(self) -> Mapping[str, Summed]:
        """Predictors every quality figure stands beside, by name (constant, linear, atlas, …)."""

    def sums(self) -> Mapping[str, Summed]:
        """All predictors of the shape *sums* that this task has, by name: the trivial ones and others."""
        return self.trivial()

    def reads(self) -> Mapping[str, Collection[str]]:
        """By setting, columns of a case's table or groups that it names: some case should have each."""
        return {}

    def survey(self) -> Survey:
        """What a fingerprint counts: by default the image alone."""
        from tasks.data.fingerprint import Survey

        return Survey()


def build_task(plan: Plan) -> Task:
    """The task that `plan` names.

    Raises:
        Stop: unknown task, model or loss, or a parameter of theirs out of bounds.
    """
    from tasks import TASKS

    built = TASKS.build(plan.task, model=plan.model, loss=plan.loss)
    if not isinstance(built, Task):
        raise TypeError(f"task table entry {plan.task.name!r} is not a Task")
    return built
