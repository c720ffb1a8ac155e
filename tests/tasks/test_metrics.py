"""The base of all statistics: what a vector holds, and what a code is."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tasks.metrics import MISSING, Statistics, code


@dataclass(frozen=True)
class Toy(Statistics):
    name: str
    total: Tensor

    def value(self) -> dict[str, float]:
        return {}

    @property
    def patients(self) -> int:
        return 3


def test_settings_stay_sums_add_and_rows_follow() -> None:
    a = Toy("kind", torch.ones(2), rows=torch.tensor([[1.0, torch.nan]], dtype=torch.float64))
    both = a + a
    assert both.name == "kind"
    assert both.to_vector().tolist() == [2, 2, 1, MISSING, 1, MISSING]
    back = a.from_vector(both.to_vector())
    assert back.rows.isnan().tolist() == [[False, True]] * 2
    assert a.from_vector(both.alone().to_vector()).rows.shape == (0, 2)
    assert a.cells().tolist() == [3]
    for size in (1, 3, 5):
        with pytest.raises(ValueError, match=r"need \(2,\) and rows of 2"):
            a.from_vector(torch.zeros(size))


def test_a_code_is_52_bits_and_tells_patients_apart() -> None:
    codes = {code(f"patient {i}") for i in range(1000)}
    assert len(codes) == 1000
    assert all(c == int(c) and c < 2**52 for c in codes)
    assert code("a") == 0xCA978112CA1BB  # the first 13 digits of SHA-256 of "a"
