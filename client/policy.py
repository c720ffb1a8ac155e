"""What the hospital allows. The coordinator may ask for less, never for more."""

from __future__ import annotations

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
        privacy: whether plans without differential privacy of patients are refused.
    """

    tasks: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    statistics: Literal["none", "noised", "exact"] = "exact"
    minimum_cell: int = Field(10, ge=1)
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

    def release(self, patients: int) -> None:
        """Let an exact statistic over so many patients leave.

        Raises:
            Refused: (`policy`, `data`).
        """
        if self.statistics != "exact":
            raise Refused("policy", "exact statistics stay home")
        if patients == 0:
            raise Refused("data", "no patient")
        if patients < self.minimum_cell:
            raise Refused("policy", f"{patients} patients, minimum cell {self.minimum_cell}")

    def release_noised(self) -> None:
        """Let a noised statistic leave, over however many patients: noise hides them, a refusal would not.

        Raises:
            Refused: (`policy`).
        """
        if self.statistics == "none":
            raise Refused("policy", "statistics stay home")
