"""Chance, in training only: where the patch lies, how it is turned, what happens to its intensities.

Every draw comes from the generator that is passed in, on the CPU, in a fixed order; so the same seed
gives the same batch on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, exp, log, radians, sin

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """How far a patch may stray from the image. Zero everywhere: nothing is changed.

    Attributes:
        flips: axes that are mirrored with probability one half (an axis whose direction carries the
            label's meaning must not be among them).
        rotation: largest angle in degrees, about each axis (2D: in the plane).
        scaling: largest relative change of size, 0.1 = from 1/1.1 to 1.1.
        noise: largest standard deviation of Gaussian noise.
        contrast: largest relative change of contrast, as for `scaling`.
        brightness: largest shift. Noise and shift are in units of normalised intensity.
        gamma: largest relative change of the exponent, as for `scaling`.
    """

    flips: tuple[int, ...] = ()
    rotation: float = 0.0
    scaling: float = 0.0
    noise: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0
    gamma: float = 0.0

    def matrix(self, dimensions: int, draw: torch.Generator) -> Tensor:
        """A random turn, stretch and mirror in mm: `dimensions` x `dimensions`, float64."""
        made = torch.eye(dimensions, dtype=torch.float64)
        planes = [(0, 1)] if dimensions == 2 else [(1, 2), (0, 2), (0, 1)]
        for (a, b), u in zip(planes, _uniform(len(planes), draw), strict=True):
            angle = radians(self.rotation) * u
            turn = torch.eye(dimensions, dtype=torch.float64)
            turn[a, a] = turn[b, b] = cos(angle)
            turn[a, b], turn[b, a] = -sin(angle), sin(angle)
            made = made @ turn
        made = made * exp(log(1 + self.scaling) * _uniform(1, draw)[0])
        for axis, u in zip(self.flips, _uniform(len(self.flips), draw), strict=True):
            if u < 0:
                made[:, axis] = -made[:, axis]
        return made

    def intensities(self, image: Tensor, draw: torch.Generator) -> Tensor:
        """`image` (B C ...) with random gamma, contrast, brightness and noise, one draw per example."""

        def each(limit: float, relative: bool) -> Tensor:
            u = torch.rand(len(image), generator=draw) * 2 - 1
            u = torch.exp(u * log(1 + limit)) if relative else u * limit
            return _carried(u, image.device).view(-1, *[1] * (image.ndim - 1))

        if self.gamma:
            axes = tuple(range(1, image.ndim))
            low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
            span = (high - low).clamp_min(1e-6)
            image = ((image - low) / span) ** each(self.gamma, relative=True) * span + low
        if self.contrast:
            image = image * each(self.contrast, relative=True)
        if self.brightness:
            image = image + each(self.brightness, relative=False)
        if self.noise:
            noise = _carried(torch.randn(image.shape, generator=draw), image.device)
            image = image + noise * each(self.noise, relative=False)
        return image


def turned(images: Tensor, matrices: Tensor, shifts: Tensor) -> Tensor:
    """Whole images (B C ...) turned about their centres and shifted: one resampling, borders repeated.

    Args:
        matrices: B x dimensions x dimensions, from the new image to the old, in pixels.
        shifts: B x dimensions, in shares of a side.
    """
    sides = torch.tensor(images.shape[2:], dtype=torch.float64)
    linear = matrices * sides / sides[:, None]
    theta = torch.cat([linear.flip(1, 2), 2 * shifts.flip(1)[..., None]], 2).float()
    where = F.affine_grid(_carried(theta, images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, where, "bilinear", "border", align_corners=False)


def start(
    shape: Sequence[int], patch: Sequence[int], foreground: Tensor, share: float, draw: torch.Generator
) -> list[int]:
    """First voxel of a random patch, per axis; negative where the image is smaller and is centred.

    Args:
        shape: the image's sides. patch: the patch's.
        foreground: `N x dimensions`, voxels a patch may be centred on; N = 0: anywhere.
        share: how often it is.
    """
    chance, which, *anywhere = torch.rand(2 + len(shape), generator=draw, dtype=torch.float64).tolist()
    centred = len(foreground) > 0 and chance < share
    centre = foreground[int(which * len(foreground))].tolist() if centred else []
    first = []
    for axis, (n, p) in enumerate(zip(shape, patch, strict=True)):
        if n <= p:
            # as sliding_window_inference pads: the smaller half first
            first.append(-((p - n) // 2))
        elif centred:
            first.append(min(max(int(centre[axis]) - p // 2, 0), n - p))
        else:
            first.append(int(anywhere[axis] * (n - p + 1)))
    return first


def cut(
    image: Tensor, mask: Tensor, first: Sequence[int], patch: Sequence[int], spacing: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """The patch at `first`, turned about its centre: one resampling, straight to the patch's size.

    Args:
        image: `CHW[D]`. mask: `HW[D]` of class indices.
        spacing: mm per axis, so that a turn is a turn on an anisotropic grid too.
        matrix: from the patch to the image, in mm.

    Returns:
        `C *patch` linear, borders repeated, and `*patch` int64 nearest, background beyond the image.
    """
    sides = torch.tensor(mask.shape, dtype=torch.float64)
    size = torch.tensor(list(patch), dtype=torch.float64)
    mm = spacing.double().cpu()
    turn = matrix * mm / mm[:, None]
    centre = torch.tensor(list(first), dtype=torch.float64) + size / 2
    # grid_sample measures in half sides from the middle, last axis first
    linear = turn * size / sides[:, None]
    shift = 2 * centre / sides - 1
    theta = _carried(torch.cat([linear.flip(0, 1), shift.flip(0)[:, None]], 1).float(), image.device)
    where = F.affine_grid(theta[None], [1, 1, *patch], align_corners=False)
    linear_mode = "bilinear"  # torch's word for trilinear as well
    cropped = F.grid_sample(image[None], where, linear_mode, "border", align_corners=False)
    labels = F.grid_sample(mask[None, None].float(), where, "nearest", "zeros", align_corners=False)
    return cropped[0], labels[0, 0].long()


def _carried(drawn: Tensor, device: torch.device) -> Tensor:
    """What was drawn, on the device; from pinned memory, or the copy would wait for all work queued there."""
    if device.type != "cuda":
        return drawn
    return drawn.pin_memory().to(device, non_blocking=True)


def _uniform(n: int, draw: torch.Generator) -> list[float]:
    """`n` numbers between -1 and 1."""
    drawn: list[float] = (torch.rand(n, generator=draw, dtype=torch.float64) * 2 - 1).tolist()
    return drawn
