"""A network over an image larger or smaller than what it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations

import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd


def device_of(model: nn.Module) -> torch.device:
    """Where `model` computes."""
    return next(model.parameters()).device


@contextmanager
def evaluated(model: nn.Module, *, dropout: bool = False) -> Iterator[None]:
    """A model in evaluation mode; where asked for with dropout left on, its draws the same each time."""
    training = model.training
    model.eval()
    for layer in model.modules() if dropout else ():
        if isinstance(layer, _DropoutNd):
            layer.train()
    try:
        with torch.random.fork_rng(devices=[], enabled=dropout):
            if dropout:
                torch.manual_seed(0)
            yield
    finally:
        model.train(training)


def sliding_window(
    model: nn.Module, image: Tensor, patch: Sequence[int], overlap: float, *, windows: int = 4, draws: int = 0
) -> Tensor:
    """Class probabilities `K H W[D]` of `image` (`CHW[D]`), on the model's device.

    Windows of the training patch's size, blended by a Gaussian; an image smaller than one is
    padded by repeating its border, as in training. The model is in evaluation mode meanwhile.

    Args:
        overlap: share of a window that its neighbour covers too.
        windows: how many go through the network at once.
        draws: of dropout, whose probabilities are averaged; 0: one without.
    """

    def once() -> Tensor:
        logits = sliding_window_inference(
            image[None].to(device_of(model)),
            tuple(patch),
            windows,
            model,
            overlap=overlap,
            mode="gaussian",
            padding_mode="replicate",
        )
        if not isinstance(logits, Tensor):
            raise TypeError(f"the network returned {type(logits).__name__}; need one tensor of logits")
        return logits[0].softmax(0)

    with torch.no_grad(), evaluated(model, dropout=draws > 0):
        total = once()
        for _ in range(draws - 1):
            total += once()
    return total / max(draws, 1)


def mirrored(predict: Callable[[Tensor], Tensor], image: Tensor, axes: Sequence[int]) -> Tensor:
    """The mean of `predict` (`CHW[D]` to `KHW[D]`) over the image mirrored along every subset of `axes`."""
    ways = [[1 + a for a in way] for n in range(len(axes) + 1) for way in combinations(axes, n)]
    total = predict(image)
    for way in ways[1:]:
        total = total + predict(image.flip(way)).flip(way)
    return total / len(ways)
