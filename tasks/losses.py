"""The table of losses: snake name to builder. Importing it imports no torch.

A builder takes keyword-only plain arguments and returns `loss(logits, target) -> Tensor[B]`, with
logits `B K H W[D]` and target `B H W[D]` int64. One value per example, and no value depends on
another example; `torch.func.vmap` maps over every entry.
"""

from conf.table import Table

LOSSES = Table(
    "loss",
    {
        "cross_entropy": "tasks.criteria:cross_entropy",
        "dice": "tasks.criteria:dice",
        "dice_ce": "tasks.criteria:dice_ce",
    },
)
