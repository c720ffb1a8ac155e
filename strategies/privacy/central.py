"""Central DP: sites send clipped updates, the coordinator adds the noise (arXiv:1710.06963).

The unit is a *site*: whoever sees the models learns little of whether a site took part at all. The
coordinator itself sees every update and is trusted. It serves large simulated cohorts: with ten hospitals and
ten thousand parameters the noise is forty times the clip norm. Every site is taken to be in every round
(q = 1), for the coordinator sees who takes part.

Middleware: wraps an algorithm that asks once a round and adds its answers up. Needs equal weights. Adds the
clip norm to what goes down and, where that follows a quantile, to the state. Breaks algorithms whose sites
remember what they sent, those that weigh by age, and everything that is no sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from conf.exits import Exit, Stop
from conf.schema import Plan, Privacy
from strategies.base import Ask, Local, Round, Strategy, Study, Tensors
from strategies.exact import Fold, Folded, Sum, Total, ring_bits
from strategies.privacy import noise
from strategies.privacy.accountant import Entry
from strategies.privacy.dpsgd import factors
from strategies.privacy.quantile import Quantile
from strategies.protocol import Refused, Spec, Tree, Update

_INSIDE = "inside/clip"
_BLOCK = 2**20  # values noised at a time


def entry(plan: Plan) -> Entry:
    """What a run's rounds release together, the unit being a site."""
    return Entry(plan.privacy.sigma, 1.0, plan.federation.rounds)


def noise_to_signal(plan: Plan, size: int, sites: int) -> float:
    """Expected norm of the mean's noise over the clip norm, which no mean can exceed."""
    return plan.privacy.sigma * math.sqrt(size) / (plan.federation.cohort or sites)


@dataclass(frozen=True)
class Central(Strategy):
    """An algorithm under central DP.

    Attributes:
        inner: the algorithm. privacy: the plan's.
    """

    inner: Strategy
    privacy: Privacy

    @classmethod
    def over(cls, inner: Strategy, plan: Plan) -> Central:
        """Raises:
        Stop: (`CONFIG`) the algorithm cannot be wrapped, or the ring has no room for the noise.
        """
        fold, kind = inner.fold(), type(inner)
        why = ""
        if not isinstance(fold, Sum):
            why = "does not add its answers up"
        elif kind.round is not Strategy.round or kind.train is not Strategy.train or fold.age_power:
            why = "does not ask all sites once a round"
        elif fold.counted:
            why = "has sites remember what they sent, before it was clipped"
        if why:
            text = f"strategy {plan.strategy.name} {why}; privacy.mode central covers one sum a round"
            raise Stop(Exit.CONFIG, f"{text}: choose another, such as fedavg, fedprox or fedadam")
        privacy = plan.privacy
        highest = 1e6 if privacy.adapt.quantile else privacy.clip
        if 10 * privacy.sigma * highest * 2.0 ** ring_bits(1, plan.federation.max_value) > 2.0**60:
            text = f"privacy.sigma {privacy.sigma:g} times clip {highest:g} has no room in a sum"
            raise Stop(Exit.CONFIG, f"{text}; raise federation.max_value or lower clip")
        return cls(inner, privacy)

    def check(self, study: Study) -> None:
        self.inner.check(study)
        if stray := sorted(study.initial.keys() - study.trainable):
            text = f"privacy.mode is 'central', but the model keeps statistics of its batches in {stray[0]}"
            raise Stop(Exit.CONFIG, f"{text} (BatchNorm); use privacy.swap_norms=true")

    def __post_init__(self) -> None:
        for name in ("stateful", "whole", "personalises", "fits", "tells", "scored"):
            object.__setattr__(self, name, getattr(self.inner, name))

    # ---- both ends

    def shared(self, study: Study) -> tuple[str, ...]:
        return self.inner.shared(study)

    def groups(self, study: Study) -> dict[str, tuple[str, ...]]:
        return self.inner.groups(study)

    def spec(self, study: Study, stage: str) -> Spec:
        made = self.inner.spec(study, stage)
        if stage.partition("/")[0] != "train":
            return made
        made = replace(made, max_weight=1)
        if not self.privacy.adapt.quantile:
            return replace(made, norms=dict.fromkeys(self.groups(study), self.privacy.clip))
        # the norm then is the round's: the coordinator, who knows it, holds answers against it
        return replace(made, tensors={**made.tensors, _INSIDE: ((), torch.float32)}, norms={"inside": 0.5})

    def stages(self, study: Study) -> dict[str, int]:
        return self.inner.stages(study)

    # ---- the coordinator's half

    def start(self, study: Study, sites: tuple[str, ...]) -> Tree:
        return {"inner": self.inner.start(study, sites), "clip": self.privacy.clip}

    def fold(self) -> Fold:
        return self.inner.fold()

    def down(self, state: Tree, model: Tensors, study: Study) -> Tree:
        return self.inner.down(state["inner"], model, study)

    def round(self, r: int, state: Tree, model: Tensors, study: Study, sites: tuple[str, ...]) -> Round:
        """The inner round, its one sum noised and divided by the sites asked, whoever answered."""
        clip: float = state["clip"]
        quantile = Quantile.of(self.privacy.adapt)
        steps = self.inner.round(r, state["inner"], model, study, sites)
        ask: Ask = next(steps)
        spec = self.spec(study, ask.stage)
        spec = replace(spec, norms=spec.norms | dict.fromkeys(self.groups(study), clip))
        folded = yield replace(ask, down={**ask.down, "clip": clip}, spec=spec)
        total = self._noised(folded, clip, len(sites))
        if quantile is not None:
            clip = quantile.stepped(clip, float(total.sum("inside")["clip"]), float(len(sites)))
        try:
            steps.send(total)
        except StopIteration as end:
            model, inner = end.value
            return model, {"inner": inner, "clip": clip}
        raise TypeError("central DP covers one sum a round")

    def _noised(self, folded: Folded, clip: float, expected: int) -> Total:
        if not isinstance(folded, Total):
            raise TypeError("central DP needs a Sum")
        spec, quantile, sigma = folded.spec, Quantile.of(self.privacy.adapt), self.privacy.sigma
        scale = 2.0 ** ring_bits(spec.max_weight, spec.max_value)
        of_sum = (quantile.of_sum(sigma) if quantile else sigma) * clip
        ring, at = folded.ring, 0
        for name, (shape, _) in spec.tensors.items():
            wide = quantile.count_noise * sigma if quantile and name == _INSIDE else of_sum
            for part in torch.split(ring[at : at + math.prod(shape)], _BLOCK):
                part += (noise.normal(len(part)) * (wide * scale)).round_().long()
            at += math.prod(shape)
        return replace(folded, weight=float(expected))

    # ---- the site's half

    def answer(self, stage: str, local: Local) -> tuple[Update, Tree | None]:
        update, after = self.inner.answer(stage, local)
        if stage.partition("/")[0] != "train":
            return update, after
        clip: Any = local.common.get("clip")
        if type(clip) is not float or not 0 < clip <= 1e6:
            raise Refused("payload", "clip")
        share, whole = factors([t.reshape(1, -1) for t in update.tensors.values()], clip)
        sent = {
            name: (t.double() * share.view(())).float() if bool(whole) else torch.zeros_like(t)
            for name, t in update.tensors.items()
        }
        if self.privacy.adapt.quantile:
            sent[_INSIDE] = torch.tensor(0.5 if float(share) == 1 else -0.5)
        return Update(sent, 1), after
