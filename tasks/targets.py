"""The table of targets: what a case's labels say, and what a network's outputs come to.

An entry is a frozen class with one line in `TARGETS`; a loss says which target it compares with.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tasks.base import Case


@dataclass(frozen=True)
class Target(ABC):
    """What is predicted of a case.

    Attributes:
        labels: their names in `Case.labels`. classes: names of the classes, or of the levels in order.
    """

    labels: tuple[str, ...]
    classes: tuple[str, ...]

    single: ClassVar[bool] = True
    """Whether it is one label, of one of `classes`."""
    shares: ClassVar[bool] = False
    """Whether its losses take shares of the classes, too."""

    probable: ClassVar[bool] = True
    """Whether a prediction is made of probabilities."""

    reading: ClassVar[str] = "of each class; softmax over axis 1"
    """What a network's outputs are, for whoever runs it elsewhere: `decode` in words."""

    def __post_init__(self) -> None:
        if self.single and len(self.labels) != 1:
            raise ValueError(f"task.labels is {list(self.labels)}; this target is one label")

    @property
    def outputs(self) -> int:
        """Numbers that the network gives."""
        return len(self.classes) if self.single else len(self.labels)

    @property
    def columns(self) -> int:
        """Numbers that a prediction has, and probabilities are compared in."""
        return self.outputs

    def encode(self, case: Case) -> Tensor:
        """The truth: a class number (int64 scalar).

        Raises:
            ValueError: the case has no such label, or one that is no class.
        """
        name = self.labels[0]
        if name not in case.labels:
            raise ValueError(
                f"case {case.key} has no label {name!r}; it has {sorted(case.labels)} (settings: "
                "data.columns.label, the column of `label`, data.columns.labels, others by their names)"
            )
        value = case.labels[name]
        if value != int(value) or not 0 <= value < len(self.classes):
            raise ValueError(
                f"case {case.key} has {value:g} as {name!r}; task.classes has 0 to {len(self.classes) - 1} "
                "(data.label_map: values of the files to classes)"
            )
        return torch.tensor(int(value))

    @abstractmethod
    def decode(self, outputs: Tensor) -> Tensor:
        """`… outputs` to what they mean, `… columns`: probabilities, or values."""

    def choices(self, given: Tensor) -> Tensor:
        """A prediction (`columns`) as rows of probabilities, each of a choice between classes: `R x K`."""
        return given[None]

    def chosen(self, rows: Tensor) -> Tensor:
        """The prediction that has these `choices`."""
        return rows[0]

    def evidence(self, outputs: Tensor) -> Tensor:
        """How much `1 outputs` speak for what they predict: here the largest, against all of them.

        A softmax does not see what all logits have in common.
        """
        return (outputs - outputs.mean()).max()

    @property
    def fits(self) -> int:
        """Numbers that a linear head fits: of two classes the second alone."""
        return 1 if self.columns == 2 else self.columns

    def regressors(self, case: Case) -> Tensor:
        """What a linear head fits, float64 `fits`; NaN where unknown."""
        return torch.eye(self.columns, dtype=torch.float64)[int(self.encode(case))][-self.fits :]

    def bounded(self, fitted: Tensor) -> Tensor:
        """A linear head's `fits` numbers as a prediction: here within 0 and 1, of sum 1."""
        inside = fitted.clamp(1e-6, 1 - 1e-6)
        whole = torch.cat([1 - inside, inside], -1) if self.fits == 1 else inside
        return whole / whole.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Classes(Target):
    """One of K classes."""

    shares: ClassVar[bool] = True

    def decode(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(-1)


@dataclass(frozen=True)
class Ordinal(Target):
    """One of K levels in order: K - 1 thresholds, each a yes or no (Frank and Hall, ECML 2001)."""

    reading: ClassVar[str] = "sigmoid, then the running minimum over axis 1: of levels above the k-th"

    @property
    def outputs(self) -> int:
        return len(self.classes) - 1

    def evidence(self, outputs: Tensor) -> Tensor:
        return outputs.sum()

    @property
    def columns(self) -> int:
        return len(self.classes)

    def decode(self, outputs: Tensor) -> Tensor:
        above = outputs.sigmoid().cummin(-1).values
        ends = torch.ones_like(above[..., :1])
        steps = torch.cat([ends, above, 0 * ends], -1)
        return steps[..., :-1] - steps[..., 1:]


class _Several(Target):
    single: ClassVar[bool] = False

    @property
    def fits(self) -> int:
        return self.columns

    def encode(self, case: Case) -> Tensor:
        """The truth of each label, float32, NaN where nobody knows.

        Raises:
            ValueError: not one of the labels is known.
        """
        values = torch.tensor([case.labels.get(name, math.nan) for name in self.labels])
        if bool(values.isnan().all()):
            wanted = ", ".join(self.labels)
            raise ValueError(f"case {case.key} has none of the labels {wanted}; it has {sorted(case.labels)}")
        return values

    def regressors(self, case: Case) -> Tensor:
        return self.encode(case).double()


@dataclass(frozen=True)
class Multilabel(_Several):
    """Several findings, each there or not, or not looked for."""

    reading: ClassVar[str] = "of each label; sigmoid"

    def encode(self, case: Case) -> Tensor:
        values = super().encode(case)
        known = values[~values.isnan()]
        if not bool(((known == 0) | (known == 1)).all()):
            raise ValueError(f"case {case.key} has {known.tolist()} as labels; findings are 0 or 1")
        return values

    def decode(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    def evidence(self, outputs: Tensor) -> Tensor:
        return outputs.max()

    def choices(self, given: Tensor) -> Tensor:
        return torch.stack([1 - given, given], 1)

    def chosen(self, rows: Tensor) -> Tensor:
        return rows[:, 1]

    def bounded(self, fitted: Tensor) -> Tensor:
        return fitted.clamp(0, 1)


@dataclass(frozen=True)
class Continuous(_Several):
    """Values such as an age, an ejection fraction."""

    probable: ClassVar[bool] = False
    reading: ClassVar[str] = "of each label; they are its value"

    def decode(self, outputs: Tensor) -> Tensor:
        return outputs

    def bounded(self, fitted: Tensor) -> Tensor:
        return fitted


TARGETS: Mapping[str, Callable[[Sequence[str], Sequence[str]], Target]] = {
    "classes": lambda labels, classes: Classes(tuple(labels), tuple(classes)),
    "multilabel": lambda labels, classes: Multilabel(tuple(labels), tuple(classes)),
    "ordinal": lambda labels, classes: Ordinal(tuple(labels), tuple(classes)),
    "continuous": lambda labels, classes: Continuous(tuple(labels), tuple(classes)),
}
