"""The table of fixed features: snake name to class. Importing it imports no image library.

An entry is a frozen dataclass of its settings, built for `channels` and `dimensions`; it has `size`, how many
features it makes, and maps a normalised image `CHW[D]` to `size` float32 numbers, without chance and without
learning. A small head on them learns from few patients, and under differential privacy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from conf.table import Table

if TYPE_CHECKING:
    from torch import Tensor


class Extractor(Protocol):
    """What an entry is once it is built."""

    @property
    def size(self) -> int:
        """How many features it makes."""

    def __call__(self, image: Tensor) -> Tensor:
        """`CHW[D]` to `size` float32."""


FEATURES = Table(
    "features",
    {
        "hog": "tasks.features.gradients:Hog",
        "none": "tasks.features.intensities:Nothing",
        "intensities": "tasks.features.intensities:Intensities",
        "scattering": "tasks.features.scattering:Scattering",
        "texture": "tasks.features.texture:Texture",
        "thumbnail": "tasks.features.intensities:Thumbnail",
    },
)
