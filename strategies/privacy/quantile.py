"""A clip norm that follows a quantile of the norms it clips (Andrew et al., 2021, arXiv:1905.03871).

Beside the clipped sum a step releases how many norms were within the clip norm, with noise of its own; the
clip norm moves by what that says. Both are about the same draw, and together they are *one* Gaussian
mechanism of noise z, where z^-2 = z_sum^-2 + (2 z_count)^-2 (theorem 1: counting from -1/2 to 1/2, a
participant moves the count by 1/2). So z is what is charged, and the sum takes a little more noise for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.schema import Adapt
from strategies.privacy import noise

#: where a clip norm stays, whatever the noise of its counts
_LEAST, _MOST = 1e-9, 1e6


@dataclass(frozen=True)
class Quantile:
    """How a clip norm follows.

    Attributes:
        aim: share of the norms that is to lie within it. rate: of the geometric steps towards it.
        count_noise: deviation of the count's noise, in units of z, above 1/2.
    """

    aim: float
    rate: float
    count_noise: float

    @classmethod
    def of(cls, adapt: Adapt) -> Quantile | None:
        """None where the clip norm is fixed."""
        return cls(adapt.quantile, adapt.rate, adapt.count_noise) if adapt.quantile else None

    def of_sum(self, z: float) -> float:
        """z_sum: noise of the sum, in units of the clip norm, where both together are to have z."""
        return z / math.sqrt(1 - 0.25 / self.count_noise**2)

    def moved(self, clip: float, inside: int, count: int, expected: float, z: float) -> float:
        """The next clip norm (algorithm 1): clip * exp(-rate * (noised share within - aim)).

        Args:
            inside: how many of the `count` that took part were within `clip`. expected: how many take part
                on average.
        """
        centred = inside - 0.5 * count + self.count_noise * z * float(noise.normal(1))
        return self.stepped(clip, centred, expected)

    def stepped(self, clip: float, centred: float, expected: float) -> float:
        """The next clip norm for a noised sum of 1/2 for each within and -1/2 for each beyond it."""
        # the share is one, and so is its noised value: a rare draw does not throw the clip norm far
        share = min(1.0, max(0.0, centred / expected + 0.5))
        return min(_MOST, max(_LEAST, clip * math.exp(-self.rate * (share - self.aim))))
