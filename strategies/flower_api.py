"""Flower's server strategies as objects: how they are reached, told, asked and silenced."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from strategies.base import Abandon, Tensors
from strategies.protocol import Tree

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message

WEIGHT, LOSS = "num-examples", "train_loss"  # Flower's names


def library() -> Any:
    """Flower's strategies, loaded at the coordinator alone, and only when a round is added up."""
    from flwr.serverapp import strategy

    return strategy


@contextmanager
def quiet() -> Iterator[None]:
    """Flower reports every round on the console, numpy every overflow; what comes of it is checked.

    Some of Flower's strategies collect garbage once per answer, 0.1 s with torch loaded: what is there
    already is kept out of that.
    """
    library()  # loading it sets the level
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    gc.freeze()
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        gc.unfreeze()
        logger.setLevel(before)


def reply(tensors: Tensors, weight: int, said: Mapping[str, float]) -> Message:
    """An answer as Flower knows it."""
    from flwr.app import Message, Metadata, MetricRecord, RecordDict

    metrics: dict[str, int | float] = {WEIGHT: weight, **said}
    content = RecordDict({"arrays": _record(tensors), "metrics": MetricRecord({**metrics})})
    # without metadata a message asks which run of Flower's it belongs to; a simulation is none
    nowhere = Metadata(0, "", 0, 0, "", "", 0.0, 0.0, "train")
    made: Message = Message(content=content, metadata=nowhere)  # type: ignore[call-overload]
    return made


def aggregated(flower: Any, r: int, replies: list[Message]) -> Tensors:
    """What Flower makes of the answers, flat."""
    arrays, _ = flower.aggregate_train(r, replies)
    if arrays is None:
        raise Abandon(f"Flower makes no model of {len(replies)} answers")
    return {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()}


def _record(tensors: Tensors) -> ArrayRecord:
    """Flattened: some of Flower's strategies fail on arrays without axes."""
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(tensor.reshape(-1).numpy()) for name, tensor in tensors.items()})


def recall(flower: Any, before: Tensors, state: Tree) -> None:
    """Give Flower's object the round's model and its memory, as earlier calls of it would."""
    if hasattr(flower, "current_arrays"):
        by_name = hasattr(flower, "m_t")
        record = _record(before)
        flower.current_arrays = {n: a.numpy() for n, a in record.items()} if by_name else record
    for attribute, tensors in state.items():
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        setattr(flower, attribute, list(arrays.values()) if attribute == "momentum_vector" else arrays)


def kept(flower: Any, memory: tuple[str, ...], names: tuple[str, ...]) -> Tree:
    """What Flower's object is to remember, by tensor name."""
    state: Tree = {}
    for attribute in memory:
        held = getattr(flower, attribute)
        if held is not None:
            arrays = held if isinstance(held, dict) else dict(zip(names, held, strict=True))
            state[attribute] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return state
