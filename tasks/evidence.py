"""Where in the image a network of vectors finds what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tasks.networks.trunk import Trunk


def grad_cam(model: nn.Module, inputs: Sequence[Tensor], evidence: Callable[[Tensor], Tensor]) -> Tensor:
    """Grad-CAM (Selvaraju et al., 2017, arXiv:1610.02391, equations 1 and 2): `h w[d]`, 0 and more.

    The last feature maps, each by the mean over positions of the gradient of `evidence` there. With a mean
    over positions and a linear head behind the maps, it is CAM (Zhou et al., 2016, arXiv:1512.04150).

    Args:
        model: a trunk, or one that holds one. inputs: of one example, `1 …`.
        evidence: `1 K` outputs to one number.

    Raises:
        ValueError: the network has no maps.
    """
    trunk = next((part for part in model.modules() if isinstance(part, Trunk)), None)
    if trunk is None:
        raise ValueError("task.cam needs a network of vectors, whose last maps it looks at")
    held: list[Tensor] = []

    def hold(_: nn.Module, __: object, made: Tensor) -> Tensor:
        # a frozen body has no graph of its own
        held.append(made if made.requires_grad else made.detach().requires_grad_())
        return held[-1]

    hook = trunk.body.register_forward_hook(hold)
    try:
        with torch.enable_grad():
            said = evidence(model(*inputs))
            (slope,) = torch.autograd.grad(said, held[-1:])
    finally:
        hook.remove()
    maps, weights = held[-1].detach()[0], slope[0].flatten(1).mean(1)
    return torch.einsum("f,f...->...", weights, maps).relu()
