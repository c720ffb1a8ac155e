"""What the hospital allows. The coordinator may ask for less, never for more."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from conf.schema import Frozen, Plan
from strategies.failures import Refused


class Policy(Frozen):
    """A site's rules.

    Attributes:
        tasks, models: allowed names; None allows every installed one.
        statistics: what may leave of evaluations; `noised`: only under noise, charged to the ledger.
        minimum_cell: fewest patients behind any exact statistic.
        patients_per_feature: fewest patients behind exact products of features with each other (of the linear
            rows, of a generator's scores), for each feature; none: they stay home. With fewer patients than
            features they tell of anybody whose features are known whether he is among them: 2 is prudent.
        privacy: whether plans without differential privacy of patients are refused.
    """

    tasks: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    statistics: Literal["none", "noised", "exact"] = "exact"
    minimum_cell: int = Field(10, ge=1)
    patients_per_feature: float | None = Field(None, ge=0, le=1000)
    privacy: Literal["optional", "required"] = "optional"

    def check(self, plan: Plan) -> None:
        """Accept the plan.

        Raises:
            Refused: (`policy`).
        """
        if self.tasks is not None and plan.task.name not in self.tasks:
            raise Refused("policy", f"task {plan.task.name}")
        if self.models is not None and plan.model.name not in self.models:
            raise Refused("policy", f"model {plan.model.name}")
        if self.privacy == "required" and plan.privacy.mode != "dpsgd":
            raise Refused("policy", "without differential privacy of patients")

    def within(self, plan: Plan) -> Policy:
        """The rules for one plan: of a private run nothing exact leaves a hospital."""
        if plan.privacy.mode == "none" or self.statistics != "exact":
            return self
        return self.model_copy(update={"statistics": "noised"})

    def least(self, products: int = 0) -> int:
        """How many patients must stand behind an exact statistic with the products of so many features."""
        if not products:
            return self.minimum_cell
        return max(self.minimum_cell, math.ceil((self.patients_per_feature or 0) * (products + 1)))

    def release(self, patients: int, products: int = 0) -> None:
        """Let an exact statistic over so many patients leave.

        Args:
            products: how many features it holds the products of.

        Raises:
            Refused: (`policy`, `data`).
        """
        if self.statistics != "exact":
            raise Refused("policy", "exact statistics stay home")
        if products and self.patients_per_feature is None:
            raise Refused("policy", "products of features stay home: policy.patients_per_feature is not set")
        if patients == 0:
            raise Refused("data", "no patient")
        if patients < (least := self.least(products)):
            raise Refused("policy", f"{patients} patients, minimum cell {least}")

    def release_noised(self) -> None:
        """Let a noised statistic leave, over however many patients: noise hides them, a refusal would not.

        Raises:
            Refused: (`policy`).
        """
        if self.statistics == "none":
            raise Refused("policy", "statistics stay home")
