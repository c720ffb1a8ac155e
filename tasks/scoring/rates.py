"""What a confusion matrix and a table of confidences say: shares, with intervals that hold at 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tasks.metrics import Z95

CONFIDENCES = 15


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share of n (Wilson 1927)."""
    z2 = Z95**2 / n
    middle, half = share + z2 / 2, math.sqrt(max(0.0, share * (1 - share)) * z2 + z2**2 / 4)
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def mean_of_shares(shares: Sequence[tuple[float, float]], name: str) -> dict[str, float]:
    """The mean of independent shares, each with its n; intervals recovered from Wilson's.

    Zou and Donner, Statistics in Medicine 27:1693 (2008).
    """
    mean = sum(share for share, _ in shares) / len(shares)
    ends = [(share, *wilson(share, n)) for share, n in shares]
    down = math.sqrt(sum((share - low) ** 2 for share, low, _ in ends)) / len(shares)
    up = math.sqrt(sum((high - share) ** 2 for share, _, high in ends)) / len(shares)
    return {name: mean, f"{name}_lo": max(0.0, mean - down), f"{name}_hi": min(1.0, mean + up)}


def of_confusion(table: Tensor) -> dict[str, float]:
    """`accuracy`, `balanced_accuracy`, `f1`, `recall_<k>`, from `K x K` counts (truth by rows).

    Balanced accuracy: mean recall of the classes that are there. `f1`: of class 1 where there are two
    classes, else the mean over the classes in truth or prediction.
    """
    table = table.clamp_min(0)
    true, said, right = table.sum(1), table.sum(0), table.diagonal()
    n = float(table.sum())
    if n < 1:
        return {}
    found = mean_of_shares([(float(right.sum()) / n, n)], "accuracy")
    there = [k for k in range(len(table)) if float(true[k]) >= 1]
    if there:
        recalls = [(float(right[k] / true[k]), float(true[k])) for k in there]
        found |= mean_of_shares(recalls, "balanced_accuracy")
        found |= {f"recall_{k}": recall for k, (recall, _) in zip(there, recalls, strict=True)}
    f1 = {k: float(2 * right[k] / (true[k] + said[k])) for k in range(len(table)) if true[k] + said[k] > 0}
    if len(table) == 2:
        return found | ({"f1": f1[1]} if 1 in f1 else {})
    return found | {"f1": sum(f1.values()) / len(f1)} | {f"f1_{k}": value for k, value in f1.items()}


def quadratic_kappa(table: Tensor) -> dict[str, float]:
    """Cohen's kappa, disagreement weighted by its square (Cohen 1968); absent where chance never errs."""
    table = table.clamp_min(0)
    grade = torch.arange(len(table), dtype=torch.float64)
    cost = (grade[:, None] - grade) ** 2
    chance = torch.outer(table.sum(1), table.sum(0)) / table.sum().clamp_min(1e-300)
    expected = float((cost * chance).sum())
    return {"kappa_quadratic": 1 - float((cost * table).sum()) / expected} if expected > 0 else {}


def calibration(confidence: Tensor, right: Tensor) -> Tensor:
    """Per bin of confidence: how many, the sum of confidences, how many were right; `CONFIDENCES x 3`."""
    where = (confidence * CONFIDENCES).floor().long().clamp(0, CONFIDENCES - 1)
    table = torch.zeros(CONFIDENCES, 3, dtype=torch.float64)
    rows = torch.stack([torch.ones_like(confidence), confidence, right.to(confidence)], 1).double()
    return table.index_add(0, where, rows)


def calibration_error(table: Tensor) -> dict[str, float]:
    """`ece`: mean gap between confidence and accuracy, by bin (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    n = float(table[:, 0].sum())
    return {"ece": float((table[:, 2] - table[:, 1]).abs().sum()) / n} if n >= 1 else {}
