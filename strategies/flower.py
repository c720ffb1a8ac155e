"""Flower's own server strategies, behind our checks: one ask, and Flower adds up what it brings.

Sites answer as for FedAvg. Each answer is validated (and quarantined) before Flower sees it. Where a rule
looks at whole models they are rebuilt from the round's model and the changes, in float64: Flower's Krum
takes squared distances as |x|² + |y|² - 2xy, which in float32 leaves rounding noise of large weights and
small changes; that takes seven to nine models of memory for each answer. Answers come in the order of the
sites' names, so theirs does not matter, and what a server optimiser remembers lies in the checkpoint.

Left out: FedAvg (ours adds exactly) and FedProx (its server half is FedAvg, its client half ours); the
four DP wrappers (noise from numpy's generator, no ledger); the two for boosted trees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from conf.exits import Exit, Stop
from conf.table import STRICT
from strategies.base import Abandon, Local, Round, Strategy, Study, Tensors, moved
from strategies.exact import Collect, Collected, Fold, Folded, Sum
from strategies.flower_api import LOSS, aggregated, kept, library, quiet, recall, reply
from strategies.protocol import Spec, Tree, Update

Count = Annotated[int, Ge(0)]
Rate = Annotated[float, Gt(0)]
Decay = Annotated[float, Ge(0), Lt(1)]

#: Flower's names for our settings, where they differ
_THEIRS = {
    "hostile": "num_malicious_nodes",
    "select": "num_nodes_to_select",
    "lr": "eta",
    "beta1": "beta_1",
    "beta2": "beta_2",
}


class _Flower(Strategy):
    """One strategy of Flower's that looks at whole models."""

    __pydantic_config__ = STRICT

    @property
    def needed(self) -> int:
        """Fewest answers that it can work with."""
        return 1

    def settings(self, answers: int, study: Study) -> dict[str, Any]:
        """Arguments of Flower's class, which has the name of this one, for so many answers."""
        return {_THEIRS.get(name, name): value for name, value in vars(self).items()}

    def made(self, answers: int, study: Study) -> Any:
        """Flower's object."""
        return getattr(library(), type(self).__name__)(**self.settings(answers, study))

    def fold(self) -> Fold:
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
        with quiet():
            after, state = self.added(r, folded, state, model, study)
        if not all(bool(tensor.isfinite().all()) for tensor in after.values()):
            raise Abandon("Flower's model holds NaN or infinity")
        return {
            n: after[n].reshape(t.shape).to(t.dtype) if n in after else t for n, t in model.items()
        }, state

    def added(
        self, r: int, folded: Folded, state: Tree, model: Tensors, study: Study
    ) -> tuple[Tensors, Tree]:
        """The tensors that Flower makes of the answers, and what it is to remember.

        Raises:
            Abandon: it makes nothing of them.
        """
        if not isinstance(folded, Collected):
            raise TypeError("needs a Collect")
        names = self.given(study)
        before = {name: model[name].double() for name in self.shared(study)}
        flower = self.made(folded.count, study)
        recall(flower, {name: before[name] for name in names}, {})
        replies = []
        for site in folded.rows:  # in the order of their names
            answer = folded.answer(site)
            after = {name: before[name] + answer[f"delta/{name}"] for name in names}
            replies.append(reply(after, folded.weights[site], self.said(answer)))
        made = aggregated(flower, r, replies)
        return made | _means(folded, before, [name for name in before if name not in made]), {}

    def given(self, study: Study) -> tuple[str, ...]:
        """Names of the tensors that Flower adds up; the others take the plain weighted mean."""
        return self.shared(study)

    def said(self, answer: Tensors) -> Mapping[str, float]:
        """What Flower's strategy needs to hear of a site beside its model."""
        return {}


class _ByValue(_Flower):
    """Rules for each value by itself: block by block, so that memory does not grow with the answers.

    They commute with adding the round's model to every answer, so the changes alone are enough.
    """

    def added(
        self, r: int, folded: Folded, state: Tree, model: Tensors, study: Study
    ) -> tuple[Tensors, Tree]:
        if not isinstance(folded, Collected):
            raise TypeError("needs a Collect")
        flower = self.made(folded.count, study)

        def rule(rows: Tensor) -> Tensor:
            return aggregated(flower, r, [reply({"block": row.double()}, 1, {}) for row in rows])["block"]

        return {name: model[name] + change for name, change in folded.reduce("delta", rule).items()}, {}


class _Stepping(_Flower):
    """A server optimiser: the mean change comes exactly, as for FedAvg, and is Flower's one answer.

    It steps parameters alone: running statistics take the mean, a step could make variances negative.
    """

    memory: ClassVar[tuple[str, ...]] = ("m_t", "v_t")
    """Flower's attributes that live from round to round."""

    def fold(self) -> Fold:
        return Sum()

    def added(
        self, r: int, folded: Folded, state: Tree, model: Tensors, study: Study
    ) -> tuple[Tensors, Tree]:
        after = moved({name: model[name].double() for name in self.shared(study)}, folded)
        names = tuple(name for name in after if name in study.trainable)
        flower = self.made(1, study)
        recall(flower, {name: model[name].double() for name in names}, state)
        after |= aggregated(flower, r, [reply({name: after[name] for name in names}, 1, {})])
        return after, kept(flower, self.memory, names)


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
class _Robust(_Flower):
    """Attributes:
    hostile: sites that it must stand, the paper's f. 0: stands none, and works with one answer.
    """

    enough: ClassVar[tuple[int, int]] = (2, 3)
    """Answers needed for each hostile site, and beside."""
    hostile: Count = 0

    @property
    def needed(self) -> int:
        each, beside = self.enough
        return each * self.hostile + beside if self.hostile else 1


@dataclass(frozen=True)
class Krum(_Robust):
    """The one model nearest to its neighbours (Blanchard et al., 2017, arXiv:1703.02757)."""


@dataclass(frozen=True)
class MultiKrum(_Robust):
    """The weighted mean of the `select` models nearest to their neighbours (the same paper, section 4).

    Attributes:
        select: how many; none: all but the `hostile` furthest.
    """

    select: Annotated[int, Ge(1)] | None = None

    @property
    def needed(self) -> int:
        return max(super().needed, self.hostile + (self.select or 1))

    def settings(self, answers: int, study: Study) -> dict[str, Any]:
        select = self.select or answers - self.hostile
        return {**super().settings(answers, study), "num_nodes_to_select": select}


@dataclass(frozen=True)
class Bulyan(_Robust):
    """Krum's choice of n - 2 f models, then per value the mean of the n - 4 f nearest to their median.

    El Mhamdi et al., 2018, arXiv:1802.07927. Flower takes the n - 2 f best of one Krum; the paper's
    Algorithm 2 repeats Krum, each time without the one it chose.
    """

    enough = (4, 3)

    def made(self, answers: int, study: Study) -> Any:
        # for f = 0, where both are the plain mean, Flower's Bulyan wants three answers still
        return super().made(answers, study) if self.hostile else library().FedTrimmedAvg(beta=0.0)


@dataclass(frozen=True)
class FedTrimmedAvg(_ByValue, _Robust):
    """Per value the mean without the `hostile` largest and smallest (Yin et al., 2018, arXiv:1803.01498)."""

    enough = (2, 1)

    def settings(self, answers: int, study: Study) -> dict[str, Any]:
        # Flower cuts int(beta * answers) at either end: the quarter keeps rounding away from the edge
        return {"beta": (self.hostile + 0.25) / answers if self.hostile else 0.0}


@dataclass(frozen=True)
class FedMedian(_ByValue):
    """Per value the median (Yin et al., 2018); ours, `median`, needs less memory."""


# ---- server optimisers


@dataclass(frozen=True)
class FedAvgM(_Stepping):
    """Momentum on the mean change (Hsu et al., 2019, arXiv:1909.06335)."""

    memory = ("momentum_vector",)
    lr: Rate = 1.0
    momentum: Decay = 0.9

    def settings(self, answers: int, study: Study) -> dict[str, Any]:
        return {"server_learning_rate": self.lr, "server_momentum": self.momentum}


@dataclass(frozen=True)
class FedAdagrad(_Stepping):
    """Adagrad on the mean change (Reddi et al., 2021, arXiv:2003.00295, Algorithm 2)."""

    lr: Rate = 0.1
    tau: Rate = 1e-3


@dataclass(frozen=True)
class FedAdam(_Stepping):
    """Adam on the mean change (the same paper); with bias correction, which `fedadam` of ours leaves out."""

    lr: Rate = 0.1
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: Rate = 1e-3


@dataclass(frozen=True)
class FedYogi(FedAdam):
    """Yogi on the mean change (the same paper)."""

    lr: Rate = 0.01


# ---- fair


@dataclass(frozen=True)
class QFedAvg(_Flower):
    """Sites with a higher loss count more (Li et al., 2020, arXiv:1905.10497, Algorithm 2).

    A site's mean training loss under the round's model leaves with its answer, where its policy lets a
    statistic of its training patients leave. Not robust: a site that reports a wrong loss steers the step.

    Attributes:
        q: 0 = every site counts the same.
        lr: the paper's 1 / L; none: `local.lr`, as there. Adam moves further than that times a gradient: the
            smaller `lr`, the smaller the step, and near 1 suits it better.
    """

    tells = "each site's mean training loss"
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

    def given(self, study: Study) -> tuple[str, ...]:
        return tuple(name for name in self.shared(study) if name in study.trainable)

    def said(self, answer: Tensors) -> Mapping[str, float]:
        # a negative loss has no power
        return {LOSS: max(0.0, float(answer["loss/train"]))}

    def settings(self, answers: int, study: Study) -> dict[str, Any]:
        rate = self.lr or study.plan.local.lr
        return {"client_learning_rate": rate, "q": self.q, "train_loss_key": LOSS}
