"""Runs made up on disk: what is grouped, what is refused, what is printed."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]
from typer.testing import CliRunner

from conf.exits import Exit, Stop
from conf.load import compose
from server.cli import app
from server.compare.summary import Gap, Summary, compare
from server.runfolder import RunFolder

PATIENTS = 90
TRUTH = np.random.default_rng(7).integers(0, 2, PATIENTS)
SITE = np.arange(PATIENTS) % 2
SKILL = {"federated": 1.0, "pooled": 1.0, "local:a": 0.4, "local:b": 0.4, "constant": 0.0}


def scores(model: str, repeat: int) -> np.ndarray:
    random = np.random.default_rng([repeat, sum(map(ord, model))])
    return np.clip(0.5 + SKILL[model] * (TRUTH - 0.5) / 2 + random.normal(0, 0.2, PATIENTS), 0, 1)


def run(
    folder: Path, fold: int, *overrides: str, repeat: int = 0, rows: bool = True, models: Sequence[str] = ()
) -> Path:
    """A run whose patients of this fold were scored by each model."""
    path = folder / f"{len(list(folder.iterdir()))}"
    given = ["data.root=r", "data.folds=3", f"data.fold={fold}", f"data.split_seed={repeat}", *overrides]
    RunFolder.create(path, compose([*given, f"run.dir={path}"]))
    mine = np.random.default_rng(repeat).permutation(PATIENTS) % 3 == fold
    lines = []
    for model in models or SKILL:
        p = scores(model, repeat)[mine]
        auroc = roc_auc_score(TRUTH[mine], p)
        for site in ("a", "b", "all"):
            lines.append(
                {"round": 2, "split": "test", "model": model, "site": site, "patients": int(mine.sum())}
            )
            lines[-1] |= {"auroc": auroc, "ece": 0.1 * fold}
        if rows:
            held = np.column_stack([np.flatnonzero(mine), TRUTH[mine], 1 - p, p])
            about = {"model": model, "split": "test", "round": 2, "sites": ["a", "b"]}
            about["columns"] = ["patient", "truth", "p_0", "p_1"]
            (path / "scores").mkdir(exist_ok=True)
            file = path / "scores" / f"{model.replace(':', '-')}-test.safetensors"
            save_file({"rows": held, "site": SITE[mine]}, file, {"wardround": json.dumps(about)})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def gap(made: Summary, other: str, where: str = "", one: str = "federated") -> Gap:
    (found,) = [g for g in made.gaps if (g.one, g.other, g.where) == (one, other, where)]
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three folds, twice."""
    folder = tmp_path_factory.mktemp("runs")
    return [run(folder, k, repeat=r) for r in (0, 1) for k in range(3)]


def test_out_of_fold_patients_are_taken_together_and_repeats_averaged(runs: list[Path]) -> None:
    made = compare(runs)
    assert made.metric == "auroc"
    assert [row.name for row in made.rows] == ["federated", "pooled", "local:a", "local:b", "constant"]
    for row in made.rows:
        wanted = np.mean([roc_auc_score(TRUTH, scores(row.name, r)) for r in (0, 1)])
        assert row.whole is not None
        assert row.whole.value == pytest.approx(wanted)
        assert len(row.folds) == 6
        assert row.patients == PATIENTS
    trivial = gap(made, "constant").interval
    assert trivial.low is not None
    assert trivial.low > 0
    same = gap(made, "pooled").interval
    assert same.low is not None
    assert same.high is not None
    assert same.low < 0 < same.high


def test_a_sites_model_on_the_others_patients(runs: list[Path]) -> None:
    found = gap(compare(runs), "local:a", "not of a").interval
    others = SITE == 1
    wanted = np.mean(
        [
            roc_auc_score(TRUTH[others], scores("federated", r)[others])
            - roc_auc_score(TRUTH[others], scores("local:a", r)[others])
            for r in (0, 1)
        ]
    )
    assert found.value == pytest.approx(wanted)
    assert found.low is not None
    assert found.low > 0


def test_one_sites_patients(runs: list[Path]) -> None:
    made = compare(runs, site="b")
    federated = made.rows[0]
    assert federated.whole is not None
    wanted = np.mean([roc_auc_score(TRUTH[SITE == 1], scores("federated", r)[SITE == 1]) for r in (0, 1)])
    assert federated.whole.value == pytest.approx(wanted)
    assert federated.patients == PATIENTS / 2
    assert made.split == "test at b"
    with pytest.raises(Stop, match="site is 'c'; these runs have: a, b"):
        compare(runs, site="c")


def test_the_test_part_of_a_specimen_is_no_sites_own(tmp_path: Path) -> None:
    given = ["data.partition=contiguous", "data.sites=2", "data.blocks=2"]
    made = compare([run(tmp_path, k, *given, models=["federated", "local:a"]) for k in range(3)])
    assert [(g.other, g.where) for g in made.gaps] == [("local:a", "")]


def test_without_rows_the_folds_are_paired(tmp_path: Path) -> None:
    made = compare([run(tmp_path, k, rows=False) for k in range(3)])
    found = gap(made, "constant").interval
    assert found.method == "folds"
    assert found.low is not None
    assert any("Nadeau" in note for note in made.notes)
    assert all(row.whole is None for row in made.rows)


def test_a_metric_that_rows_do_not_tell_is_compared_by_folds(runs: list[Path]) -> None:
    made = compare(runs, "ece")
    assert {g.interval.method for g in made.gaps} == {"folds"}
    assert gap(made, "pooled").interval.value == 0


def test_methods_are_told_apart_by_what_differs(runs: list[Path], tmp_path: Path) -> None:
    other = [run(tmp_path, k, "strategy=fedprox", models=["federated"]) for k in range(3)]
    made = compare([*runs[:3], *other])
    names = {row.name for row in made.rows if row.name.startswith("federated")}
    assert names == {"federated (strategy=fedavg)", "federated (strategy=fedprox)"}
    (between,) = [g for g in made.gaps if g.one in names and g.other in names]
    assert between.interval.value == pytest.approx(0)  # made of the same scores


def test_a_missing_fold_is_said(runs: list[Path]) -> None:
    assert any("folds 1 of 3 are missing" in note for note in compare([runs[0], runs[2]]).notes)


def test_runs_that_do_not_belong_together(runs: list[Path], tmp_path: Path) -> None:
    for overrides, message in (
        (["data.root=other"], "data.root is 'r' and 'other'"),
        (["data.folds=5"], "data.folds is 3 and 5"),
        (["data.label_map=nonzero"], "data.label_map is None and 'nonzero'"),
        (["data.columns.label=grade"], r"data.columns.label is 'label' and 'grade'"),
    ):
        with pytest.raises(Stop, match=f"do not belong together: {message}") as caught:
            compare([runs[0], run(tmp_path, 0, *overrides)])
        assert caught.value.exit is Exit.CONFIG
    with pytest.raises(Stop, match="are the same fold 0 of the same seeds"):
        compare([runs[0], runs[0]])
    with pytest.raises(Stop, match="metric is 'dice'; these runs have: auroc, ece"):
        compare(runs, "dice")
    dice = run(tmp_path, 1, "local.steps=7", models=["federated"])
    text = (dice / "metrics.jsonl").read_text()
    (dice / "metrics.jsonl").write_text(text.replace("auroc", "dice_mean"))
    with pytest.raises(Stop, match=r"has no auroc; these runs do not belong together"):
        compare([runs[0], dice], "auroc")
    with pytest.raises(Stop, match="is not a run") as none:
        compare([tmp_path])
    assert none.value.exit is Exit.NO_RUN


def test_damaged_rows_are_said(tmp_path: Path) -> None:
    path = run(tmp_path, 0)
    (path / "scores" / "federated-test.safetensors").write_bytes(b"no")
    with pytest.raises(Stop, match=r"federated-test\.safetensors is damaged"):
        compare([path])


def test_the_command_prints_a_table_and_json(runs: list[Path]) -> None:
    shown = CliRunner().invoke(app, ["compare", *map(str, runs), "--metric", "auroc"], catch_exceptions=False)
    assert "not of a" in shown.output
    assert "excludes 0" in shown.output
    told = CliRunner().invoke(app, ["compare", *map(str, runs), "--json"], catch_exceptions=False)
    data = json.loads(told.output)
    assert data["metric"] == "auroc"
    assert {"model", "minus", "patients", "value", "lo", "hi", "method"} == data["differences"][0].keys()
