"""What a run may ask a hospital: no more than its plan says, and `wardround-site preview` shows.

Exact answers to ever other questions would tell of each patient in the end, whatever the minimum cell. So
rounds, attempts and stages end where the plan's do, and a stage's payload is what its name says.
"""

from __future__ import annotations

from strategies.base import Strategy, Study
from strategies.protocol import Instruction, Refused, Tree

ATTEMPTS = 3
"""How often a round is tried."""


def hold(asked: Instruction, common: Tree, study: Study, strategy: Strategy) -> None:
    """Hold an instruction against the plan.

    Raises:
        Refused: (`stage`) no run of this plan asks for it; (`payload`) it asks for something else beside.
    """
    rounds = study.plan.federation.rounds
    if asked.round > rounds or asked.attempt >= ATTEMPTS:
        raise Refused("stage", f"round {asked.round} of {rounds}, attempt {asked.attempt} of {ATTEMPTS}")
    kind, _, detail = asked.stage.partition("/")
    stages = strategy.stages(study)
    if kind == "trivial":
        name, _, turn = detail.partition("/")
        turns = stages.get(f"trivial/{name}", 0)
        if not turns or turn not in ("", *map(str, range(turns))):
            raise Refused("stage", asked.stage[:64])
    elif asked.stage not in stages and (kind != "train" or "train" not in stages):
        raise Refused("stage", asked.stage[:64])
    if kind == "evaluate":
        model = common.get("name") if common.get("kind") == "trivial" else common.get("kind")
        if detail != f"{model}/{common.get('split')}":
            raise Refused("payload", "scores of something else than the stage names")
