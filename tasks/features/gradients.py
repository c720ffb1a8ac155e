"""Histograms of oriented gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from skimage.feature import hog
from torch import Tensor

from conf.table import STRICT
from tasks.data.resample import resample

Count = Annotated[int, Field(ge=1, le=1024)]


@dataclass(frozen=True, kw_only=True)
class Hog:
    """Dalal and Triggs, CVPR 2005: gradient directions by cell, normalised by block of 2 x 2 cells.

    Channels are averaged first; the image is stretched onto a square.

    Attributes:
        side: of that square, in pixels. cell: side of a cell. directions: of a histogram.
        root: square roots, less their mean (Arandjelović and Zisserman, CVPR 2012): what all images share
            is gone, which else takes up most of a clipped gradient under differential privacy.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    channels: Count
    dimensions: Literal[2]
    side: Annotated[int, Field(ge=16, le=512)] = 128
    cell: Annotated[int, Field(ge=4, le=64)] = 16
    directions: Annotated[int, Field(ge=2, le=36)] = 9
    root: bool = False

    def __post_init__(self) -> None:
        if self.side // self.cell < 2:
            raise ValueError(f"features.cell is {self.cell}; a side of {self.side} needs at least 2 cells")

    @property
    def size(self) -> int:
        """Four cells for each block, and blocks overlap by a cell."""
        return (self.side // self.cell - 1) ** 2 * 4 * self.directions

    def __call__(self, image: Tensor) -> Tensor:
        square = resample(image, (self.side, self.side)).mean(0)
        found = hog(
            square.double().numpy(),
            orientations=self.directions,
            pixels_per_cell=(self.cell, self.cell),
            cells_per_block=(2, 2),
        )
        made = torch.from_numpy(found).float()
        if self.root:
            made = made.clamp_min(0).sqrt()
            made = made - made.mean()
        return made
