"""The result table: what is shown for which model at which site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conf.exits import Exit, Stop
from server.report.table import final, records, results, show


def record(
    model: str, site: str, value: float | None, *, round: int = 4, split: str = "test", **more: Any
) -> dict[str, Any]:
    made = {"round": round, "split": split, "model": model, "site": site, "patients": 5, **more}
    return made if value is None else made | {"dice_mean": value}


FOUND = [
    record("federated", "a", 0.1, round=2),
    record("federated", "a", 0.7, dice_mean_lo=0.6, dice_mean_hi=0.8),
    record("federated", "b", 0.5, patients=7),
    record("federated", "all", 0.6, patients=12),
    record("federated", "a", 0.99, split="val", round=9),
    record("constant", "a", 0.01),
    record("atlas", "a", 0.2),
    record("local:b", "a", 0.3),
    record("local:a", "a", 0.4),
    record("personal:a", "a", 0.45),
    record("pooled", "a", None, loss=0.5),
]
BINNED: dict[str, Any] = {"dice_mean_lo": 0.4, "dice_mean_hi": 0.6, "dice_mean_bound": 0.0012}


def write(folder: Path, found: list[dict[str, Any]]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    return folder


def test_rows_columns_and_cells() -> None:
    made = results(FOUND)
    assert made.metric == "dice_mean"
    assert made.split == "test"
    assert made.header == ("model", "a (5)", "b (7)", "all (12)")
    assert made.rows == (
        ("federated", "0.700 [0.600–0.800]", "0.500", "0.600"),
        ("personal:a", "0.450", "–", "–"),
        ("pooled", "–", "–", "–"),
        ("local:a", "0.400", "–", "–"),
        ("local:b", "0.300", "–", "–"),
        ("atlas", "0.200", "–", "–"),
        ("constant", "0.010", "–", "–"),
    )


def test_the_bound_of_a_rank_from_bins_stands_beside_it() -> None:
    assert results([record("federated", "a", 0.5, **BINNED)]).rows[0][1] == "0.500 ±0.0012 [0.400–0.600]"
    assert results([record("federated", "a", 0.5, dice_mean_bound=0.0)]).rows[0][1] == "0.500"


def test_the_last_round_counts_whatever_the_order_of_lines() -> None:
    assert final(FOUND)["federated", "a"]["dice_mean"] == 0.7
    assert final(FOUND[::-1])["federated", "a"]["dice_mean"] == 0.7


def test_validation_stands_in_where_nobody_tests() -> None:
    made = results([line for line in FOUND if line["split"] == "val"])
    assert made.split == "val"
    assert made.rows == (("federated", "0.990", "–"),)


def test_markdown_is_a_table_of_equal_rows() -> None:
    lines = results(FOUND).markdown().splitlines()
    assert lines[0] == "| model | a (5) | b (7) | all (12) |"
    assert {line.count("|") for line in lines} == {5}


def test_another_metric() -> None:
    assert results(FOUND, "loss").rows[2] == ("pooled", "0.500", "–", "–")
    with pytest.raises(Stop, match=r"metric is 'f1'; this run has: .*dice_mean") as caught:
        results(FOUND, "f1")
    assert caught.value.exit == Exit.CONFIG


def test_show_prints_every_number_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(write(tmp_path, FOUND))
    shown = capsys.readouterr().out
    for part in ("federated", "personal:a", "0.700", "[0.600–0.800]", str(tmp_path)):
        assert part in shown
    assert "…" not in shown


def test_show_as_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(write(tmp_path, FOUND), markdown=True)
    assert capsys.readouterr().out.strip() == results(FOUND).markdown()


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(Stop, match="not a run") as caught:
        records(tmp_path)
    assert caught.value.exit == Exit.NO_RUN
    (tmp_path / "metrics.jsonl").write_text("{")
    with pytest.raises(Stop, match="damaged"):
        records(tmp_path)
    with pytest.raises(Stop, match="no evaluation yet"):
        results(records(write(tmp_path, [])))
