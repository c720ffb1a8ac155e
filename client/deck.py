"""Who is in the next mini-batch, where patients are not drawn for privacy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def hands(keys: Sequence[str], size: int, draw: torch.Generator) -> Iterator[list[str]]:
    """Without end, `size` different keys (0, or more than there are: all); each once before any twice."""
    size = min(size or len(keys), len(keys))
    deck: list[str] = []
    while True:
        chosen: list[str] = []
        while len(chosen) < size:
            if not deck:
                # a new deck, those already in this hand at its end, so that none is in it twice
                whole = [keys[i] for i in torch.randperm(len(keys), generator=draw).tolist()]
                deck = [k for k in whole if k not in chosen] + [k for k in whole if k in chosen]
            chosen.append(deck.pop(0))
        yield chosen
