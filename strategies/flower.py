"""Flower's own server strategies, behind our checks: one ask, and Flower adds up what it brings.

Sites answer as for FedAvg. Each answer is validated (and quarantined) before Flower sees it; whole
models are rebuilt from the round's model and the changes, in float64: Flower's Krum takes squared
distances as |x|² + |y|² - 2xy, which in float32 leaves rounding noise of large weights and small
changes. Answers come in the order of the sites' names, so theirs does not matter, and what a server
optimiser remembers lies in the checkpoint, not in Flower's object. Needs memory for every answer at once.

Left out: FedAvg (ours adds exactly) and FedProx (its server half is FedAvg, its client half ours); the
four DP wrappers (noise from numpy's generator, no ledger); the two for boosted trees.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt

from conf.exits import Exit, Stop
from conf.table import STRICT
from strategies.base import Abandon, Local, Round, Strategy, Study, Tensors
from strategies.exact import Collect, Collected
from strategies.protocol import Spec, Tree, Update

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message
    from flwr.serverapp.strategy import FedAvg

Count = Annotated[int, Ge(0)]
Rate = Annotated[float, Gt(0)]
Decay = Annotated[float, Ge(0), Lt(1)]

_WEIGHT, _LOSS = "num-examples", "train_loss"  # Flower's names


class _Flower(Strategy):
    """One strategy of Flower's. Imports flwr at the coordinator alone, and only when a round is added up."""

    __pydantic_config__ = STRICT

    memory: ClassVar[tuple[str, ...]] = ()
    """Flower's attributes that live from round to round."""

    @property
    def needed(self) -> int:
        """Fewest answers that it can work with."""
        return 1

    def made(self, answers: int, study: Study) -> FedAvg:
        """Flower's object, for so many answers."""
        raise NotImplementedError

    def given(self, study: Study) -> tuple[str, ...]:
        """Names of the tensors that Flower adds up; the others take the plain weighted mean."""
        return self.shared(study)

    def fold(self) -> Collect:
        return Collect()

    def start(self, study: Study, sites: tuple[str, ...]) -> Tree:
        asked = study.plan.federation.cohort or len(sites)
        if asked < self.needed:
            # names the setting that asks for more than there is
            settings = ", ".join(f"strategy.{name} {value}" for name, value in vars(self).items())
            raise Stop(
                Exit.CONFIG,
                f"strategy {study.plan.strategy.name} with {settings} needs {self.needed} sites in a round; "
                f"there are {asked}: lower the setting, or ask more sites (federation.cohort)",
            )
        return {}

    def round(self, r: int, state: Tree, model: Tensors, study: Study, sites: tuple[str, ...]) -> Round:
        least = max(self.needed, study.plan.federation.min_replies)
        folded = yield replace(self.train(state, model, study, sites), least=least)
        if not isinstance(folded, Collected):
            raise TypeError("Flower's strategies need a Collect")
        names = self.given(study)
        before = {name: model[name].double() for name in self.shared(study)}
        with _quiet():
            flower = self.made(folded.count, study)
            _recall(flower, {name: before[name] for name in names}, state)
            replies = [self._reply(folded, site, before, names) for site in folded.rows]
            arrays, _ = flower.aggregate_train(r, replies)
        if arrays is None:
            raise Abandon(f"Flower makes no model of {folded.count} answers")
        after = {name: torch.from_numpy(arrays[name].numpy()) for name in names}
        after |= _means(folded, before, [name for name in before if name not in after])
        if not all(bool(tensor.isfinite().all()) for tensor in after.values()):
            raise Abandon("Flower's model holds NaN or infinity")
        moved = {n: after[n].reshape(t.shape).to(t.dtype) if n in after else t for n, t in model.items()}
        return moved, _kept(flower, self.memory, names)

    def _reply(self, folded: Collected, site: str, before: Tensors, names: tuple[str, ...]) -> Message:
        """One answer as Flower knows it: the whole model, and the site's capped weight."""
        from flwr.app import Message, Metadata, MetricRecord, RecordDict

        answer = folded.answer(site)
        after = {name: before[name] + answer[f"delta/{name}"].double() for name in names}
        metrics: dict[str, int | float] = {_WEIGHT: folded.weights[site], **self.said(answer)}
        content = RecordDict({"arrays": _record(after), "metrics": MetricRecord({**metrics})})
        # without metadata a message asks which run of Flower's it belongs to; a simulation is none
        nowhere = Metadata(0, "", 0, 0, "", "", 0.0, 0.0, "train")
        reply: Message = Message(content=content, metadata=nowhere)  # type: ignore[call-overload]
        return reply

    def said(self, answer: Tensors) -> Mapping[str, float]:
        """What Flower's strategy needs to hear of a site beside its model."""
        return {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Flower reports every round on the console, numpy every overflow; what comes of it is checked.

    Some of Flower's strategies collect garbage once per answer, 0.1 s with torch loaded: what is there
    already is kept out of that.
    """
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


def _record(tensors: Tensors) -> ArrayRecord:
    """Flattened: some of Flower's strategies fail on arrays without axes."""
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(tensor.reshape(-1).numpy()) for name, tensor in tensors.items()})


def _recall(flower: Any, before: Tensors, state: Tree) -> None:
    """Give Flower's object the round's model and its memory, as earlier calls of it would."""
    if hasattr(flower, "current_arrays"):
        by_name = hasattr(flower, "m_t")
        record = _record(before)
        flower.current_arrays = {n: a.numpy() for n, a in record.items()} if by_name else record
    for attribute, tensors in state.items():
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        setattr(flower, attribute, list(arrays.values()) if attribute == "momentum_vector" else arrays)


def _kept(flower: Any, memory: tuple[str, ...], names: tuple[str, ...]) -> Tree:
    """What Flower's object is to remember, by tensor name."""
    state: Tree = {}
    for attribute in memory:
        held = getattr(flower, attribute)
        if held is not None:
            arrays = held if isinstance(held, dict) else dict(zip(names, held, strict=True))
            state[attribute] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return state


def _means(folded: Collected, before: Tensors, names: list[str]) -> Tensors:
    """The weighted means of the tensors that are no parameters (running statistics)."""
    moved = {name: before[name].clone() for name in names}
    total = sum(folded.weights.values())
    for site, weight in folded.weights.items() if names else ():
        answer = folded.answer(site)
        for name in names:
            moved[name] += answer[f"delta/{name}"].double() * (weight / total)
    return moved


# ---- robust: what a minority of hostile sites cannot drag away


@dataclass(frozen=True)
class Krum(_Flower):
    """The one model nearest to its neighbours (Blanchard et al., 2017, arXiv:1703.02757).

    Attributes:
        hostile: sites that it must stand, the paper's f: needs 2 f + 3 answers. 0: stands none, needs one.
    """

    hostile: Count = 0

    @property
    def needed(self) -> int:
        return 2 * self.hostile + 3 if self.hostile else 1

    def made(self, answers: int, study: Study) -> FedAvg:
        from flwr.serverapp.strategy import Krum

        return Krum(num_malicious_nodes=self.hostile)


@dataclass(frozen=True)
class MultiKrum(_Flower):
    """The weighted mean of the `select` models nearest to their neighbours (the same paper, section 4).

    Attributes:
        hostile: as for Krum. select: how many; none: all but the `hostile` furthest.
    """

    hostile: Count = 0
    select: Annotated[int, Ge(1)] | None = None

    @property
    def needed(self) -> int:
        return max(2 * self.hostile + 3 if self.hostile else 1, self.hostile + (self.select or 1))

    def made(self, answers: int, study: Study) -> FedAvg:
        from flwr.serverapp.strategy import MultiKrum

        chosen = self.select or answers - self.hostile
        return MultiKrum(num_malicious_nodes=self.hostile, num_nodes_to_select=chosen)


@dataclass(frozen=True)
class Bulyan(_Flower):
    """Krum's choice of n - 2 f models, then per value the mean of the n - 4 f nearest to their median.

    El Mhamdi et al., 2018, arXiv:1802.07927. Flower takes the n - 2 f best of one Krum; the paper's
    Algorithm 2 repeats Krum, each time without the one it chose.

    Attributes:
        hostile: sites that it must stand, the paper's f: needs 4 f + 3 answers. 0: the plain mean.
    """

    hostile: Count = 0

    @property
    def needed(self) -> int:
        return 4 * self.hostile + 3 if self.hostile else 1

    def made(self, answers: int, study: Study) -> FedAvg:
        from flwr.serverapp.strategy import Bulyan, FedTrimmedAvg

        # for f = 0, where both are the plain mean, Flower's Bulyan wants three answers still
        return Bulyan(num_malicious_nodes=self.hostile) if self.hostile else FedTrimmedAvg(beta=0.0)


@dataclass(frozen=True)
class TrimmedAvg(_Flower):
    """Per value the mean without the `hostile` largest and smallest (Yin et al., 2018, arXiv:1803.01498).

    Attributes:
        hostile: sites that it must stand: needs 2 f + 1 answers. 0: the plain mean.
    """

    hostile: Count = 0

    @property
    def needed(self) -> int:
        return 2 * self.hostile + 1

    def made(self, answers: int, study: Study) -> FedAvg:
        from flwr.serverapp.strategy import FedTrimmedAvg

        # Flower cuts int(beta * answers) at either end: the quarter keeps rounding away from the edge
        return FedTrimmedAvg(beta=(self.hostile + 0.25) / answers if self.hostile else 0.0)


@dataclass(frozen=True)
class Median(_Flower):
    """Per value the median (Yin et al., 2018); ours, `median`, needs less memory."""

    def made(self, answers: int, study: Study) -> FedAvg:
        from flwr.serverapp.strategy import FedMedian

        return FedMedian()


# ---- on parameters alone: a step of an optimiser would make negative variances of running statistics


class _Stepping(_Flower):
    def given(self, study: Study) -> tuple[str, ...]:
        return tuple(name for name in self.shared(study) if name in study.trainable)


@dataclass(frozen=True)
class FedAvgM(_Stepping):
    """Momentum on the mean change (Hsu et al., 2019, arXiv:1909.06335)."""

    memory: ClassVar[tuple[str, ...]] = ("momentum_vector",)
    lr: Rate = 1.0
    momentum: Decay = 0.9

    def made(self, answers: int, study: Study) -> FedAvg:
        from flwr.serverapp.strategy import FedAvgM

        return FedAvgM(server_learning_rate=self.lr, server_momentum=self.momentum)


@dataclass(frozen=True)
class FedAdagrad(_Stepping):
    """Adagrad on the mean change (Reddi et al., 2021, arXiv:2003.00295, Algorithm 2)."""

    memory: ClassVar[tuple[str, ...]] = ("m_t", "v_t")
    lr: Rate = 0.1
    tau: Rate = 1e-3

    def made(self, answers: int, study: Study) -> FedAvg:
        from flwr.serverapp.strategy import FedAdagrad

        return FedAdagrad(eta=self.lr, tau=self.tau)


@dataclass(frozen=True)
class FedAdam(_Stepping):
    """Adam on the mean change (the same paper); with bias correction, which `fedadam` of ours leaves out."""

    memory: ClassVar[tuple[str, ...]] = ("m_t", "v_t")
    lr: Rate = 0.1
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: Rate = 1e-3

    def made(self, answers: int, study: Study) -> FedAvg:
        from flwr.serverapp.strategy import FedAdam

        return FedAdam(eta=self.lr, beta_1=self.beta1, beta_2=self.beta2, tau=self.tau)


@dataclass(frozen=True)
class FedYogi(_Stepping):
    """Yogi on the mean change (the same paper)."""

    memory: ClassVar[tuple[str, ...]] = ("m_t", "v_t")
    lr: Rate = 0.01
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: Rate = 1e-3

    def made(self, answers: int, study: Study) -> FedAvg:
        from flwr.serverapp.strategy import FedYogi

        return FedYogi(eta=self.lr, beta_1=self.beta1, beta_2=self.beta2, tau=self.tau)


@dataclass(frozen=True)
class QFedAvg(_Stepping):
    """Sites with a higher loss count more (Li et al., 2020, arXiv:1905.10497, Algorithm 2).

    A site's mean training loss under the round's model leaves with its answer, where its policy lets a
    statistic of its training patients leave. Not robust: a site that reports a wrong loss steers the step.

    Attributes:
        q: 0 = every site counts the same. lr: the paper's 1 / L; none: `local.lr`.
    """

    q: Annotated[float, Ge(0)] = 0.1
    lr: Rate | None = None

    def spec(self, study: Study, stage: str) -> Spec:
        spec = super().spec(study, stage)
        if stage.partition("/")[0] != "train":
            return spec
        return replace(spec, tensors={**spec.tensors, "loss/train": ((), torch.float32)})

    def report(self, local: Local, start: Tensors, trained: Tensors) -> Update:
        update = super().report(local, start, trained)  # first: `loss` loads other weights into the model
        loss = torch.tensor(local.loss(start), dtype=torch.float32)
        return replace(update, tensors={**update.tensors, "loss/train": loss})

    def said(self, answer: Tensors) -> Mapping[str, float]:
        # a negative loss has no power
        return {_LOSS: max(0.0, float(answer["loss/train"]))}

    def made(self, answers: int, study: Study) -> FedAvg:
        from flwr.serverapp.strategy import QFedAvg

        return QFedAvg(client_learning_rate=self.lr or study.plan.local.lr, q=self.q, train_loss_key=_LOSS)
