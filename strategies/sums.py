"""A predictor by exact sums as the model of a run: a round is an exchange, no gradient step is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from annotated_types import MinLen
from torch import Tensor

from conf.exits import Exit, Stop
from conf.table import STRICT
from strategies.base import Ask, Local, Round, Strategy, Study, Tensors
from strategies.exact import Total
from strategies.protocol import Spec, Tree, Update
from tasks.base import Case, Prediction, Task


@dataclass(frozen=True)
class BySums(Strategy):
    """What the sites' cases sum to, solved at the coordinator; the run's model is what is known by then.

    Rounds beyond the predictor's exchanges ask nobody and change nothing.

    Attributes:
        predictor: of the task's, such as `logistic`, `linear`, `pca`.
    """

    __pydantic_config__ = STRICT
    predictor: Annotated[str, MinLen(1)] = "constant"
    tells = "exact sums over its training patients"

    def check(self, study: Study) -> None:
        known = {name: found for name, found in study.task.sums().items() if found.split == "train"}
        if self.predictor not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise Stop(Exit.CONFIG, f"strategy.predictor is {self.predictor!r}; this task's are {listed}")
        rounds, needed = study.plan.federation.rounds, known[self.predictor].exchanges
        if rounds < needed:
            what = f"{self.predictor} takes {needed} exchanges, one a round"
            raise Stop(Exit.CONFIG, f"federation.rounds is {rounds}; {what}: set it to {needed}")

    def spec(self, study: Study, stage: str) -> Spec:
        return super().spec(study, f"trivial/{self.predictor}" if stage == "train" else stage)

    def round(self, r: int, state: Tree, model: Tensors, study: Study, sites: tuple[str, ...]) -> Round:
        found = study.task.sums()[self.predictor]
        if r > found.exchanges:
            return model, state
        known = model if r > 1 else dict(found.start())
        folded = yield Ask(sites, "train", {"known": known}, self.spec(study, "train"))
        if not isinstance(folded, Total):
            raise TypeError("needs a Sum")
        return dict(found.solve(folded.sum("sums"), known)), state

    def down(self, state: Tree, model: Tensors, study: Study) -> Tree:
        return {"known": model}

    def learn(self, local: Local) -> tuple[Update, Tree | None]:
        sums = local.accumulate(self.predictor, local.common.get("known", {}))
        return Update({f"sums/{name}": tensor for name, tensor in sums.items()}), None

    def judge(self, local: Local) -> Tensor:
        if local.common["kind"] == "federated":
            return local.score_sums(self.predictor, local.common["known"], local.common["split"])
        return super().judge(local)

    def says(self, task: Task, weights: Tensors) -> Callable[[Case], Prediction]:
        found = task.sums()[self.predictor]
        return lambda case: found.predict(weights, case)
