"""Where every random draw outside differential privacy comes from. There is no global seed."""

import hashlib

import torch


def seed(plan: int, site: str, round: int, stage: str, purpose: str) -> int:
    """A 63-bit seed from the plan's seed and from who draws, when and what for.

    Attempts do not enter: an abandoned attempt is repeated with the same draws.
    """
    text = "\x1f".join((str(plan), site, str(round), stage, purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(plan: int, site: str, round: int, stage: str, purpose: str) -> torch.Generator:
    """A CPU generator seeded by `seed`. (torch's CPU generator reads 32 bits of it.)"""
    made = torch.Generator()
    # fold to the 32 bits that torch uses, so that no seed differs only in bits it ignores
    made.manual_seed(seed(plan, site, round, stage, purpose) % 2**32)
    return made
