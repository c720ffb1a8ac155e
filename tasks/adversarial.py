"""What two networks play for: the entries of `ADVERSARIAL`, and the changes under which both are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call, grad

Weight = Annotated[float, Field(ge=0, le=1000)]
Scores = Callable[[Tensor], Tensor]
Critic = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Game:
    """One game. Scores are a discriminator's, of any shape `B …`; what is minimised is `B`.

    Attributes:
        real, fake: the discriminator's loss on an image of a patient, and on a made one.
        fool: the generator's on the score of what it made.
        penalty: of slopes that are not 1, between real and made (Gulrajani et al., 2017, arXiv:1704.00028).
        r1: of slopes at real images (Mescheder et al., 2018, arXiv:1801.04406, equation 9).
    """

    real: Scores
    fake: Scores
    fool: Scores
    penalty: float = 0.0
    r1: float = 0.0

    def judge(self, critic: Critic, real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
        """The discriminator's loss by example: `B`.

        Args:
            critic: `B C …` to scores, each example by itself.
            share: `B` in 0 to 1, where between the two the slope is looked at.
        """
        loss = each(self.real(critic(real))) + each(self.fake(critic(fake)))
        if self.penalty:
            part = share.view(-1, *[1] * (real.ndim - 1))
            slope = slopes(critic, real * part + fake * (1 - part)).clamp_min(1e-12).sqrt()
            loss = loss + self.penalty * (slope - 1) ** 2
        if self.r1:
            loss = loss + self.r1 / 2 * slopes(critic, real)
        return loss

    def fooled(self, critic: Critic, fake: Tensor) -> Tensor:
        """The generator's loss by example: `B`."""
        return each(self.fool(critic(fake)))


def each(scores: Tensor) -> Tensor:
    """The mean over an example's scores: `B`."""
    return scores.flatten(1).mean(1)


def slopes(critic: Critic, image: Tensor) -> Tensor:
    """Squared length of the gradient of each example's mean score by its image: `B`."""
    found: Tensor = grad(lambda x: each(critic(x)).sum())(image)
    return (found**2).flatten(1).sum(1)


def frozen(module: nn.Module) -> Callable[..., Tensor]:
    """`module`, its parameters no part of the gradient."""
    fixed = {name: p.detach() for name, p in module.named_parameters()}

    def call(*inputs: Tensor) -> Tensor:
        made: Tensor = functional_call(module, fixed, inputs)
        return made

    return call


def hinge(*, penalty: Weight = 0.0, r1: Weight = 0.0) -> Game:
    """Lim and Ye, 2017 (arXiv:1705.02894)."""
    return Game(lambda s: F.relu(1 - s), lambda s: F.relu(1 + s), lambda s: -s, penalty, r1)


def non_saturating(*, penalty: Weight = 0.0, r1: Weight = 0.0) -> Game:
    """Goodfellow et al., 2014 (arXiv:1406.2661, section 3)."""
    return Game(lambda s: F.softplus(-s), F.softplus, lambda s: F.softplus(-s), penalty, r1)


def wasserstein(*, penalty: Weight = 10.0, r1: Weight = 0.0) -> Game:
    """Wasserstein with gradient penalty (Gulrajani et al., 2017, arXiv:1704.00028)."""
    return Game(lambda s: -s, lambda s: s, lambda s: -s, penalty, r1)


def least_squares(*, penalty: Weight = 0.0, r1: Weight = 0.0) -> Game:
    """Mao et al., 2017 (arXiv:1611.04076), with 1 for real and 0 for made."""
    return Game(lambda s: (s - 1) ** 2, lambda s: s**2, lambda s: (s - 1) ** 2, penalty, r1)


#: numbers drawn for each image that is disguised: three, and two for each axis
DRAWS = 9


@dataclass(frozen=True)
class Disguise:
    """Changes of whatever the discriminator sees, real or made, that the generator's gradient passes.

    With few images a discriminator learns them by heart; changed anew each time, it cannot (Zhao et al.,
    2020, arXiv:2006.10738). Being changes of both, they do not show in what is made.

    Attributes:
        flips: axes mirrored half of the time. shift: largest shift, as a share of a side. zoom: largest
            relative change of size. brightness, contrast: largest shift and relative change of intensity.
    """

    flips: tuple[int, ...] = ()
    shift: float = 0.0
    zoom: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0

    def __call__(self, image: Tensor, draws: Tensor) -> Tensor:
        """`image` `B C H W[D]`, changed by `draws` (`B DRAWS`, each between 0 and 1)."""
        signed = 2 * draws.to(image.dtype) - 1
        flat, axes = [1] * (image.ndim - 1), image.ndim - 2
        if self.brightness or self.contrast:
            image = image * (1 + self.contrast * signed[:, 0]).view(-1, *flat)
            image = image + (self.brightness * signed[:, 1]).view(-1, *flat)
        if not (self.shift or self.zoom or self.flips):
            return image
        size = 1 + self.zoom * signed[:, 2]
        lines = []
        for axis, sides in enumerate(image.shape[2:]):
            # middles of pixels, in half sides from the middle of the image
            line = (torch.arange(sides, device=image.device, dtype=image.dtype) * 2 + 1) / sides - 1
            scale = size * signed[:, 3 + axis].sign() if axis in self.flips else size
            moved = scale[:, None] * line + 2 * self.shift * signed[:, 6 + axis, None]
            at = [-1 if a == axis else 1 for a in range(axes)]
            lines.append(moved.view(len(image), *at).expand(-1, *image.shape[2:]))
        # grid_sample counts the last axis first
        return F.grid_sample(image, torch.stack(lines[::-1], -1), padding_mode="border", align_corners=False)
