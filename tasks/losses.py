"""The table of losses: snake name to builder. Importing it imports no torch.

A builder takes keyword-only plain arguments and returns `loss(output, target) -> Tensor[B]`. One value per
example, and no value depends on another example; `torch.func.vmap` maps over every entry. What it is told
depends on the targets of its entry:

- `map`: logits `B K H W[D]`, target `B H W[D]` int64.
- `classes`: logits `B K`, target `B` int64, or `B K` shares of the classes (mixup).
- `multilabel`: logits `B K`, target `B K` of 0, 1 and NaN where nobody looked.
- `ordinal`: logits `B K-1`, one for each threshold between levels, target `B` int64.
- `continuous`: values `B K`, target `B K`, NaN where nobody measured.
- `game`: what two networks play for; the builder returns a `tasks.adversarial.Game` of such losses on scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from conf.exits import Exit, Stop
from conf.schema import Section
from conf.table import Table

Targets = Literal["map", "classes", "multilabel", "ordinal", "continuous", "game"]


@dataclass(frozen=True)
class Loss:
    """One entry.

    Attributes:
        builder: where its code stands.
        targets: what it compares with.
    """

    builder: str
    targets: Targets


LOSS_TABLE: Mapping[str, Loss] = {
    "cross_entropy": Loss("tasks.criteria:cross_entropy", "map"),
    "dice": Loss("tasks.criteria:dice", "map"),
    "dice_ce": Loss("tasks.criteria:dice_ce", "map"),
    "balanced_cross_entropy": Loss("tasks.criteria:balanced_cross_entropy", "map"),
    "focal": Loss("tasks.criteria:focal", "map"),
    "dice_focal": Loss("tasks.criteria:dice_focal", "map"),
    "generalised_dice": Loss("tasks.criteria:generalised_dice", "map"),
    "tversky": Loss("tasks.criteria:tversky", "map"),
    "focal_tversky": Loss("tasks.criteria:focal_tversky", "map"),
    "boundary": Loss("tasks.criteria:boundary", "map"),
    "lovasz": Loss("tasks.criteria:lovasz", "map"),
    "class_cross_entropy": Loss("tasks.vector_criteria:class_cross_entropy", "classes"),
    "class_focal": Loss("tasks.vector_criteria:class_focal", "classes"),
    "logit_adjusted": Loss("tasks.vector_criteria:logit_adjusted", "classes"),
    "multilabel_bce": Loss("tasks.vector_criteria:multilabel_bce", "multilabel"),
    "multilabel_focal": Loss("tasks.vector_criteria:multilabel_focal", "multilabel"),
    "ordinal": Loss("tasks.vector_criteria:ordinal", "ordinal"),
    "squared_error": Loss("tasks.vector_criteria:squared_error", "continuous"),
    "absolute_error": Loss("tasks.vector_criteria:absolute_error", "continuous"),
    "huber": Loss("tasks.vector_criteria:huber", "continuous"),
    "hinge": Loss("tasks.adversarial:hinge", "game"),
    "least_squares": Loss("tasks.adversarial:least_squares", "game"),
    "non_saturating": Loss("tasks.adversarial:non_saturating", "game"),
    "wasserstein": Loss("tasks.adversarial:wasserstein", "game"),
}

LOSSES = Table("loss", {name: entry.builder for name, entry in LOSS_TABLE.items()})


def comparing(section: Section, targets: str) -> Any:
    """What a plan's loss builds, which compares with these targets.

    Raises:
        Stop: (`CONFIG`, `UNKNOWN_NAME`) it compares with others, or there is none of that name.
    """
    made = LOSSES.build(section)
    if LOSS_TABLE[section.name].targets != targets:
        known = ", ".join(sorted(name for name, entry in LOSS_TABLE.items() if entry.targets == targets))
        raise Stop(
            Exit.CONFIG,
            f"loss is {section.name!r}, which does not compare {targets}; use one of: {known}",
        )
    return made
