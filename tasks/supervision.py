"""What logits of shape `map` are held to: side outputs count too, and classes nobody looked for do not."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.criteria import Criterion

#: stands for minus infinity: no probability is left, and no product with it is NaN
NEVER = -1e4


def deep(criterion: Criterion, logits: Tensor | tuple[Tensor, ...], target: Tensor) -> Tensor:
    """The mean loss of all outputs, each weighing half of the one before (Isensee et al., 2021): `B`.

    Args:
        logits: `B K H W[D]`, or several of them, the main ones first.
        target: `B H W[D]` int64.
    """
    if isinstance(logits, Tensor):
        return criterion(logits, target)
    shares = [2.0**-n for n in range(len(logits))]
    losses = [share * criterion(each, target) for share, each in zip(shares, logits, strict=True)]
    return torch.stack(losses).sum(0) / sum(shares)


def marginal(logits: Tensor, looked: Tensor) -> Tensor:
    """Logits in which the probability of classes that nobody looked for is the background's.

    Where the mask of a site says background, such a class may hide behind it: what is annotated is their
    union (marginal loss; Shi et al., 2021, arXiv:2007.03868). Every loss can then be taken as it is.

    Args:
        logits: `B K H W[D]`. looked: `B K` bool, true where somebody looked for the class; the background's
            entry does not matter.
    """
    here = looked.view(*looked.shape, *[1] * (logits.ndim - 2))
    others = logits[:, 1:].masked_fill(here[:, 1:], NEVER)
    joined = torch.cat((logits[:, :1], others), 1).logsumexp(1, keepdim=True)
    return torch.cat((joined, logits[:, 1:].masked_fill(~here[:, 1:], NEVER)), 1)
