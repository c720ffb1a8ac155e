"""The fingerprint of a federation: one ask, no training. Sites answer histograms of their cases."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from conf.table import STRICT
from strategies.base import Ask, Local, Round, Strategy, Study, Tensors
from strategies.exact import Collect, Fold, Total
from strategies.protocol import Refused, Spec, Tree, Update

_NAME = "fingerprint/sum"


@dataclass(frozen=True)
class Fingerprinting(Strategy):
    """Additive histograms (`tasks.data.fingerprint`), each small cell suppressed before it leaves a site.

    The model stays as it is; the state holds how many sites `answered`, their `merged` histograms and those
    of each of `sites`, as float64 vectors.

    Attributes:
        per_site: keep what each site answered, for the report on how sites differ; otherwise only the sum
            exists at the coordinator. What a site sends is the same, and so is its suppression.
    """

    __pydantic_config__ = STRICT
    scored = False
    per_site: bool = True

    def spec(self, study: Study, stage: str) -> Spec:
        if stage != "fingerprint":
            raise Refused("stage", stage)
        size = study.task.survey().zero().to_vector().numel()
        # whole numbers below 2^33 (131,072 patients of intensities) leave the ring exactly as they came
        return Spec({_NAME: ((size,), torch.float64)}, 1, 2.0**33)

    def stages(self, study: Study) -> dict[str, int]:
        return {"fingerprint": 1}

    def fold(self) -> Fold:
        return Collect() if self.per_site else super().fold()

    def round(self, r: int, state: Tree, model: Tensors, study: Study, sites: tuple[str, ...]) -> Round:
        folded = yield Ask(
            sites, "fingerprint", {}, self.spec(study, "fingerprint"), self.fold(), counts=False
        )
        if isinstance(folded, Total):
            return model, {"merged": folded.sum("fingerprint")["sum"], "answered": folded.count, "sites": {}}
        answers = {site: folded.answer(site)[_NAME] for site in folded.rows}
        merged = torch.stack(list(answers.values())).sum(0)
        return model, {"merged": merged, "answered": folded.count, "sites": answers}

    def answer(self, stage: str, local: Local) -> tuple[Update, Tree | None]:
        if stage != "fingerprint":
            raise Refused("stage", stage)
        return Update({_NAME: local.fingerprint()}), None
