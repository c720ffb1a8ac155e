"""What may be learned of a hospital's patients. The coordinator may ask for less, never for more."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from conf.schema import Frozen

Purpose = Literal["training", "statistics", "metrics", "calibration"]


class Budget(Frozen):
    """The limits of one population of patients, over all runs together.

    Attributes:
        epsilon, delta: (ε, δ) of everything ever released, one patient more or less. min_sigma: least noise,
            in units of what one patient can move. max_q: most of the patients in a training step, as a share.
        purposes: ε of what serves one purpose, where that is to be less than all.
    """

    epsilon: float = Field(8.0, gt=0, le=100)
    delta: float = Field(1e-5, ge=1e-10, le=0.01)
    min_sigma: float = Field(0.3, ge=0.05)
    max_q: float = Field(1.0, gt=0, le=1)
    purposes: dict[Purpose, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _parts(self) -> Budget:
        for purpose, part in self.purposes.items():
            if not 0 < part <= self.epsilon:
                raise ValueError(f"purposes.{purpose} is {part}; need more than 0, at most {self.epsilon:g}")
        return self
