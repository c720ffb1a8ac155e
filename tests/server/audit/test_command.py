"""`wardround audit` on small simulations: what it writes, how it ends, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.console import code
from conf.exits import Exit
from server.audit.membership import halves, patient_losses, relative, trained
from server.cli import app
from server.runfolder import RunFolder
from server.simulate import Federation, simulate
from strategies.privacy import noise
from tasks.base import build_task
from tests.federation.test_simulate import discs, settings

pytestmark = pytest.mark.federation

PRIVATE = ["privacy=dpsgd", "privacy.sigma=2", "privacy.nominal_patients=8", "local.batch_size=2"]
BRIEF = ["federation.rounds=1", "baselines=[]", "runtime.workers=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("audited")
    discs(folder / "data", patients=6)
    return {
        name: simulate(settings(folder, *BRIEF, *more, f"run.dir={folder / name}"))
        for name, more in (("private", PRIVATE), ("plain", []))
    }


def found(run: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((run / "audit.json").read_text())
    return said


def test_a_private_run(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = runs["private"]
    assert code(app, ["audit", str(run), "--canaries", "200", "--seed", "3"]) == 0
    said, page, out = found(run), (run / "audit.html").read_text(), capsys.readouterr().out
    claim, members = said["canaries"], said["membership"]
    promised = json.loads((run / "privacy.json").read_text())
    assert claim["epsilon_claimed"] == pytest.approx(promised["epsilon"])
    assert claim["steps"] == claim["held"] == promised["charged"]["h0"][0]["steps"]
    assert (claim["m"], claim["seed"], claim["confidence"]) == (200, 3, 0.95)
    assert claim["words"].endswith("at 95 %, gradient canaries, one run, m = 200, seed 3")
    for text in (claim["words"], "not refuted", f"{promised['epsilon']:.4f}"):
        assert text in out
        assert text in page
    assert "<script" not in page
    assert "ε =" not in out + page
    sites = Federation.of(RunFolder.open(run).settings.data, RunFolder.open(run).settings.plan).sites
    for key, split in (("members", "train"), ("others", "test")):
        assert members[key] == len({e.patient for parts in sites.values() for e in parts[split]})
    assert members["references"] == 2
    assert set(members["attacks"]) == {"loss", "reference models"}
    assert f"{members['members']} training patients" in page
    assert sum(claim["scores"]["in"]) + sum(claim["scores"]["out"]) == 200


def test_a_refuted_claim_has_a_number_of_its_own(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(noise, "normal", lambda count: torch.zeros(count, dtype=torch.float64))
    run = runs["private"]
    assert code(app, ["audit", str(run), "--references", "0"]) == Exit.CLAIM_REFUTED
    said = capsys.readouterr()
    assert "refuted: the lower bound exceeds the claim" in said.out
    assert said.err.startswith("error: ")
    assert "class=refuted" in (run / "audit.html").read_text()
    assert set(found(run)["membership"]["attacks"]) == {"loss"}


def test_without_privacy_there_is_no_claim_to_audit(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(app, ["audit", str(runs["plain"]), "--references", "0"]) == 0
    assert found(runs["plain"])["canaries"] is None
    assert "no differential privacy: it claims no ε" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "spoil", "options", "exit", "part"),
    [
        ("private", None, ["--references", "3"], Exit.CONFIG, "references is 3; need an even number"),
        ("private", "privacy.json", [], Exit.NO_RUN, "no readable privacy.json"),
        ("plain", "run.json", [], Exit.NO_RUN, "is not a run directory"),
        ("plain", "checkpoints", ["--references", "0"], Exit.NO_RUN, "has no checkpoint yet"),
        ("plain", None, ["--canaries", "3"], Exit.USAGE, "canaries"),
    ],
)
def test_what_cannot_be_audited(
    name: str,
    spoil: str | None,
    options: list[str],
    exit: Exit,
    part: str,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(runs[name], copy, ignore=shutil.ignore_patterns(spoil or "nothing"))
    (copy / "audit.json").unlink(missing_ok=True)
    assert code(app, ["audit", str(copy), *options]) == exit
    assert part in capsys.readouterr().err
    assert not (copy / "audit.json").exists()


def test_a_run_at_real_sites_is_not_here(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = RunFolder.open(runs["plain"])
    runtime = opened.settings.runtime.model_copy(update={"name": "flower"})
    RunFolder.create(tmp_path / "far", opened.settings.model_copy(update={"runtime": runtime}))
    assert code(app, ["audit", str(tmp_path / "far")]) == Exit.NO_RUN
    assert "ran at real sites" in capsys.readouterr().err


def test_halves_of_every_site(runs: dict[str, Path]) -> None:
    opened = RunFolder.open(runs["plain"])
    federation = Federation.of(opened.settings.data, opened.settings.plan)
    made = halves(federation, 4, seed=1)
    everyone = {e.patient for p in federation.sites.values() for k in ("train", "test") for e in p[k]}
    for first, second in (made[:2], made[2:]):
        assert first | second == everyone
        assert not first & second
        assert abs(len(first) - len(second)) <= len(federation.sites)
    assert made == halves(federation, 4, seed=1) != halves(federation, 4, seed=2)


def test_equal_models_have_equal_losses(runs: dict[str, Path]) -> None:
    opened = RunFolder.open(runs["plain"])
    federation = Federation.of(opened.settings.data, opened.settings.plan)
    task, model = build_task(opened.settings.plan), trained(runs["plain"])
    patients = {e.patient: [e] for e in federation.sites["h0"]["train"]}
    one = patient_losses(task, model, patients, federation.cache, 0)
    less = dict(list(patients.items())[1:])
    assert patient_losses(task, model, less, federation.cache, 0).tolist() == one[1:].tolist()


def test_references_that_know_a_patient_say_nothing_of_them() -> None:
    own = np.array([1.0, 2.0])
    theirs = np.array([[9.0, 3.0], [1.5, 5.0], [2.5, 4.0]])
    known = np.array([[True, False], [False, True], [False, False]])
    expected = [
        -1.0 - np.log((np.exp(-1.5) + np.exp(-2.5)) / 2),
        -2.0 - np.log((np.exp(-3.0) + np.exp(-4.0)) / 2),
    ]
    np.testing.assert_allclose(relative(own, theirs, known), expected)
