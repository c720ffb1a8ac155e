"""Where the noise and the sampling of differential privacy come from: the operating system, never a seed.

Each call takes a new ChaCha20 key from `os.urandom` and forgets it. So processes that were forked from one
another draw different noise, nothing has to be kept secret afterwards, and no generator that a program may
seed (torch's, numpy's, Python's) has a say. torch's own would not do: noise that its seed fixes can be
taken off again, and on the CPU it has 2^32 seeds.
"""

from __future__ import annotations

import math
import os

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

#: values made at a time, at most; they stay in a core's cache
_BLOCK = 2**14


def normal(count: int) -> Tensor:
    """Independent draws from N(0, 1): float64, on the CPU.

    Box and Muller (1958), on 53 bits of uniform radius and 64 bits of angle: tails reach 8.5 deviations,
    where float32 would end at 5.8.
    """
    made = torch.empty(count, dtype=torch.float64)
    half = min(_BLOCK, count + 1) // 2
    stream = _Stream(2 * half)
    for start in range(0, count, _BLOCK):
        bits = stream.block()
        # (0, 1], so that the logarithm is finite
        radius = _unit(bits[:half]).add_(2.0**-53).log_().mul_(-2).sqrt_()
        angle = bits[half:].double().mul_(math.pi / 2**63)
        pair = torch.cat((torch.cos(angle).mul_(radius), torch.sin(angle).mul_(radius)))
        part = made[start : start + _BLOCK]
        part.copy_(pair[: len(part)])
    return made


def chosen(count: int, rate: float) -> Tensor:
    """Which of `count` take part: bool, each by itself with probability `rate` (Poisson sampling)."""
    stream = _Stream(min(_BLOCK, count))
    blocks = [_unit(stream.block()) for _ in range(-(-count // _BLOCK))]
    return torch.cat(blocks)[:count] < rate if blocks else torch.zeros(0, dtype=torch.bool)


def _unit(bits: Tensor) -> Tensor:
    """Uniform on [0, 1): the lower 53 bits of each."""
    return bits.bitwise_and(2**53 - 1).double().mul_(2.0**-53)


class _Stream:
    """Blocks of key stream, each to be read before the next is made.

    The cipher's counter ends after 256 GiB: 3.4e10 values, of which one call makes a model's size.
    """

    def __init__(self, words: int) -> None:
        self._cipher = Cipher(algorithms.ChaCha20(os.urandom(32), os.urandom(16)), mode=None).encryptor()
        self._zeros, self._stream = bytes(8 * words), bytearray(8 * words)

    def block(self) -> Tensor:
        """So many words of 64 random bits, as int64."""
        self._cipher.update_into(self._zeros, self._stream)
        return torch.frombuffer(self._stream, dtype=torch.int64)
