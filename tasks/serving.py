"""A trained network outside of its task: what runs it, and what it must be fed with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Served:
    """What a task's model is to whoever runs it elsewhere.

    Attributes:
        network: takes `inputs` by position and gives one tensor. Its tensors have the model's own names; what
            serves training alone (a discriminator) is not in it.
        inputs: name to an example, a batch of two; the first axis may have any length.
        gives: the name of what comes out, and what it means.
        settings: of the task, which whoever feeds the network has to keep to.
    """

    network: nn.Module
    inputs: Mapping[str, Tensor]
    gives: tuple[str, str]
    settings: Mapping[str, Any]


class Servable(ABC):
    """A task with a network of use outside of it."""

    @abstractmethod
    def served(self, model: nn.Module) -> Served:
        """Of `model`, which has this task's `build_model`'s form, what is used after training."""
