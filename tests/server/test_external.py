"""A run scored on another set: what scikit-learn makes of the predictions it writes for the same files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

from conf.exits import Exit, Stop
from server.external import evaluate, show
from server.predict import TEMPERATURE, predict
from server.report.examples import examples
from server.report.figure import figure
from tests.server.test_calibrate import run


def test_another_set_is_scored_by_site_and_kept_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
    path = run(tmp_path / "own")
    before = (path / "metrics.jsonl").read_bytes()
    run(tmp_path / "other", "federation.rounds=1", "local.steps=1")  # for its files alone
    lines = {line["site"]: line for line in evaluate(path, [f"data.root={tmp_path / 'other'}"])}
    assert set(lines) == {"a", "b", "all"}
    predict(path, tmp_path / "other", tmp_path / "said")
    with (tmp_path / "other" / "manifest.csv").open() as file:
        truth = {Path(row["image"]).stem: int(row["label"]) for row in csv.DictReader(file)}
    with (tmp_path / "said" / "scores.csv").open() as file:
        said = {Path(r[0]).stem: float(r[3]) for r in csv.reader(file) if r[1] == "given" and r[2] == "1"}
    # pictures of equal content are one case
    own = {(tmp_path / "other" / f"{n}.png").read_bytes(): n for n in sorted(said, key=int, reverse=True)}
    oracle = roc_auc_score([truth[n] for n in own.values()], [said[n] for n in own.values()])
    assert lines["all"]["auroc"] == pytest.approx(oracle, abs=1e-6)
    assert (path / "metrics.jsonl").read_bytes() == before
    capsys.readouterr()
    show(list(lines.values()))
    title = capsys.readouterr().out.splitlines()[0]
    assert title.startswith("auroc on another set")
    kept = next((path / "evaluations").iterdir()).read_text().splitlines()
    assert [json.loads(line)["split"] for line in kept] == ["external"] * 3
    for wrong, code, text in (
        (["data.sites=2"], Exit.CONFIG, "data.root is missing"),
        (["data.root=x", "local.lr=1"], Exit.CONFIG, "'local.lr=1' is no setting of the data"),
        (["data.root=x", "data.sight=1"], Exit.CONFIG, "data.sight is not a setting"),
    ):
        with pytest.raises(Stop, match=text) as stop:
            evaluate(path, wrong)
        assert stop.value.exit == code


def test_the_temperature_counts_there_too_and_half_a_model_is_not_scored(tmp_path: Path) -> None:
    for name in ("own", "other", "bn"):
        (tmp_path / name).mkdir()
    path = run(tmp_path / "own")
    run(tmp_path / "other", "federation.rounds=1", "local.steps=1")
    before = evaluate(path, [f"data.root={tmp_path / 'other'}"])[-1]
    (path / TEMPERATURE).write_text('{"temperature": 1e6}')
    after = evaluate(path, [f"data.root={tmp_path / 'other'}"])[-1]
    # at that temperature every probability is one half
    assert after["brier"] == pytest.approx(0.25, abs=1e-4) != before["brier"]
    assert after["auroc"] == pytest.approx(before["auroc"], abs=1e-3)
    short = ["federation.rounds=1", "local.steps=1", "strategy=fedper", "strategy.keep=[head.bias]"]
    home = run(tmp_path / "bn", *short)
    with pytest.raises(Stop, match="fedper left a part of the model at each site") as stop:
        evaluate(home, [f"data.root={tmp_path / 'other'}"])
    assert stop.value.exit is Exit.CONFIG
    assert examples(home) == []
    # a table's picture: what is true, and what is said
    shown = examples(path)
    assert [site for site, *_ in shown] == ["a", "b"]
    figure(path, shown, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
