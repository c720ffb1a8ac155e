"""What both ends must agree on: the protocol, the exact sums, the algorithms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conf.table import Table

if TYPE_CHECKING:
    from conf.schema import Plan
    from strategies.base import Strategy

STRATEGIES = Table(
    "strategy",
    {
        "fedavg": "strategies.mean:FedAvg",
        "fedprox": "strategies.mean:FedProx",
        "fedbn": "strategies.mean:FedBN",
        "fedper": "strategies.mean:FedPer",
        "fedadam": "strategies.adaptive:FedAdam",
        "scaffold": "strategies.scaffold:Scaffold",
        "ditto": "strategies.personal:Ditto",
        "cyclic": "strategies.cyclic:Cyclic",
        "median": "strategies.robust:Median",
        "fedbuff": "strategies.buffered:FedBuff",
        "sums": "strategies.sums:BySums",
        "flower_krum": "strategies.flower:Krum",
        "flower_multi_krum": "strategies.flower:MultiKrum",
        "flower_bulyan": "strategies.flower:Bulyan",
        "flower_trimmed_avg": "strategies.flower:FedTrimmedAvg",
        "flower_median": "strategies.flower:FedMedian",
        "flower_qfedavg": "strategies.flower:QFedAvg",
        "flower_fedavgm": "strategies.flower:FedAvgM",
        "flower_fedadagrad": "strategies.flower:FedAdagrad",
        "flower_fedadam": "strategies.flower:FedAdam",
        "flower_fedyogi": "strategies.flower:FedYogi",
    },
)

QUESTIONS = Table("strategy", {"fingerprint": "strategies.fingerprint:Fingerprinting"})
"""Plans that ask and train nothing: no choice for a training run, yet the same to loop, site and exchange."""


def build_strategy(plan: Plan) -> Strategy:
    """The strategy that `plan` names.

    Raises:
        Stop: unknown, a hyper-parameter out of bounds, no room in its sums for the plan's bounds, or a
            privacy mode that does not cover what its sites tell.
    """
    from conf.exits import Exit, Stop
    from strategies.exact import Sum, ring_bits

    table = QUESTIONS if plan.strategy.name in QUESTIONS else STRATEGIES
    built: Strategy = table.build(plan.strategy)
    name, mode = plan.strategy.name, plan.privacy.mode
    if built.tells and mode != "none":
        what = f"strategy {name} sends {built.tells}, which privacy.mode {mode} puts no noise on"
        raise Stop(Exit.CONFIG, f"{what}: choose another strategy, or privacy.mode=none for public data")
    if isinstance(built.fold(), Sum):
        ring_bits(plan.federation.max_weight, plan.federation.max_value)
    if mode == "central" and plan.strategy.name in STRATEGIES:
        from strategies.privacy.central import Central

        return Central.over(built, plan)
    return built
