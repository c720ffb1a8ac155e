"""How often grey levels stand side by side."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from skimage.feature import graycomatrix, graycoprops
from torch import Tensor

from conf.table import STRICT
from tasks.data.resample import resample

_PROPERTIES = ("contrast", "homogeneity", "energy", "correlation")
_ANGLES = (0.0, pi / 4, pi / 2, 3 * pi / 4)


@dataclass(frozen=True, kw_only=True)
class Texture:
    """Haralick, Shanmugam and Dinstein, IEEE SMC 1973: properties of co-occurrence matrices.

    Means over four directions, at distances of 1, 2 and 4 pixels; of a volume, the mean over `side` slices.

    Attributes:
        levels: that normalised values from -2.5 to 2.5 are cut into. side: the image is stretched onto.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    channels: Annotated[int, Field(ge=1, le=64)]
    dimensions: Literal[2, 3]
    levels: Annotated[int, Field(ge=4, le=64)] = 16
    side: Annotated[int, Field(ge=8, le=512)] = 64

    @property
    def size(self) -> int:
        return 3 * len(_PROPERTIES)

    def __call__(self, image: Tensor) -> Tensor:
        small = resample(image, (self.side,) * self.dimensions).mean(0)
        grey = ((small + 2.5) / 5 * self.levels).long().clamp(0, self.levels - 1).numpy().astype(np.uint8)
        slices = [grey] if self.dimensions == 2 else [grey[..., k] for k in range(0, self.side, 4)]
        rows = []
        for plane in slices:
            table = graycomatrix(  # type: ignore[no-untyped-call]
                plane, [1, 2, 4], _ANGLES, levels=self.levels, symmetric=True, normed=True
            )
            properties = [graycoprops(table, name) for name in _PROPERTIES]  # type: ignore[no-untyped-call]
            rows.append(np.concatenate([found.mean(1) for found in properties]))
        return torch.from_numpy(np.mean(rows, 0)).float()
