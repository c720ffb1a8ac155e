"""Why a site did not answer: a code from a fixed list, and nothing else. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: Every reason a site may give for not answering. Nothing else leaves in an error.
CODES: Mapping[str, str] = {
    "plan": "the plan is unknown to the site or differs from the approved one",
    "code": "the site runs other code than the coordinator",
    "policy": "the site's own rules forbid what the plan asks",
    "budget": "the site's privacy budget does not allow what the plan asks",
    "ledger": "the site's privacy ledger was deleted, rolled back or changed; the site has to restore it",
    "payload": "the instruction or its payload could not be read",
    "addressee": "the instruction is meant for another site",
    "stage": "the strategy has no such stage",
    "conflict": "another instruction was already answered under this round, attempt and stage",
    "stale": "the instruction belongs to an epoch the site has left behind",
    "lost": "the site does not hold the state that the coordinator counts on",
    "rewound": "the site holds state of rounds that the coordinator does not know",
    "data": "the site has no usable case for this",
    "memory": "the site ran out of memory",
    "disk": "the site could not store its state",
    "egress": "the answer did not have the form that the plan allows",
    "internal": "something else went wrong at the site; its own log has the detail",
    "deadline": "no answer before the deadline",
    "cancelled": "the coordinator called the work off",
    "lost_site": "the site's process ended before it answered",
    # found by whoever checks a reply
    "form": "the reply is not of the promised form",
    "names": "the reply holds other tensors than promised",
    "shape": "a tensor of the reply has another shape or type than promised",
    "finite": "the reply holds NaN or infinity",
    "range": "the reply holds a value beyond federation.max_value",
    "weight": "the reply's weight is no whole number from 1 to federation.max_weight",
}


class Refused(Exception):
    """An instruction or a reply is not accepted; `code` is all that another party learns of why."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(f"{code}: {detail}" if detail else code)
        self.code = code


@dataclass(frozen=True)
class Failure:
    """Why a site did not answer: a code from `CODES`, and a number for the site's own log."""

    code: str
    incident: str = ""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"failure code is {self.code!r}; known: {', '.join(CODES)}")
