"""The table of views: what a network sees of an image, as it is or as a bag of instances.

A view maps an image `CHW[D]` to `N C *size`, the same N for every case: slices of a volume, its three middle
planes, tiles of a slide, the same middle at several scales. One network reads each, `tasks.networks.pooling`
brings the N together. `whole` is no bag: `C *size`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from tasks.data.resample import resample

Cut = Callable[[Tensor, Sequence[int], int], Tensor]


@dataclass(frozen=True)
class View:
    """One entry.

    Attributes:
        cut: `cut(image, size, instances)`.
        bag: whether it makes instances. axes: of the image, beyond those of `size`.
        sides: how many `size` may have.
        count: the instances it makes where so many are asked for.
    """

    cut: Cut
    bag: bool = True
    axes: int = 0
    sides: tuple[int, ...] = (2, 3)
    count: Callable[[int], int] = int


def _whole(image: Tensor, size: Sequence[int], instances: int) -> Tensor:  # noqa: ARG001
    return resample(image, size)


def _slices(image: Tensor, size: Sequence[int], instances: int) -> Tensor:
    """`instances` slices along the last axis, evenly, each the mean over its share of the volume."""
    return resample(image, (*size, instances)).movedim(-1, 0).contiguous()


def _planes(image: Tensor, size: Sequence[int], instances: int) -> Tensor:  # noqa: ARG001
    """The middle plane across each axis: 2.5D (Roth et al., MICCAI 2014)."""
    middle = [image.select(axis, image.shape[axis] // 2) for axis in (1, 2, 3)]
    return torch.stack([resample(plane, size) for plane in middle])


def _scales(image: Tensor, size: Sequence[int], instances: int) -> Tensor:
    """The middle at 1, 1/2, 1/4, … of the sides: streams of several scales."""
    made = []
    for k in range(instances):
        part = image
        for axis in range(1, image.ndim):
            side = image.shape[axis]
            kept = max(1, side >> k)
            part = part.narrow(axis, (side - kept) // 2, kept)
        made.append(resample(part, size))
    return torch.stack(made)


def _tiles(image: Tensor, size: Sequence[int], instances: int) -> Tensor:
    """A square grid of tiles; `instances` is a square number."""
    n = isqrt(instances)
    whole = resample(image, [side * n for side in size])
    rows = whole.view(len(image), n, size[0], n, size[1])
    return rows.movedim((1, 3), (0, 1)).flatten(0, 1).contiguous()


VIEWS: Mapping[str, View] = {
    "whole": View(_whole, bag=False),
    "slices": View(_slices, axes=1, sides=(2,)),
    "planes": View(_planes, axes=1, sides=(2,), count=lambda _: 3),
    "scales": View(_scales),
    "tiles": View(_tiles, sides=(2,), count=lambda n: isqrt(n) ** 2),
}
