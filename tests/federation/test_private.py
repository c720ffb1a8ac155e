"""A whole simulation with differential privacy: what it promises, what it charged, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import dp_event  # type: ignore[import-untyped]
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant  # type: ignore[import-untyped]

from conf.exits import Exit, Stop
from conf.schema import Settings
from server.report.table import show
from server.simulate import resume, simulate
from tests.federation.test_simulate import discs, settings, shared

pytestmark = pytest.mark.federation

PRIVATE = [
    "privacy=dpsgd",
    "privacy.sigma=1.5",
    "privacy.nominal_patients=4",
    "privacy.examples=2",
    "local.batch_size=2",
    "local.micro_chunk=1",
]


def private(folder: Path, *overrides: str) -> Settings:
    return settings(folder, *PRIVATE, "runtime.workers=2", *overrides)


def promise(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "privacy.json").read_text())
    return found


def reserved(run: Path, site: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "sites" / site / "ledger.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "reserve"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private")
    discs(folder / "data")
    return simulate(private(folder, "baselines=[trivial,pooled]"))


def test_the_run_says_what_it_promises(whole: Path) -> None:
    said = promise(whole)
    steps = 3 * 2  # rounds, steps
    assert said["charged"] == {h: [{"sigma": 1.5, "q": 0.5, "steps": steps}] for h in ("h0", "h1")}
    assert said["delta"] == 1e-5
    accountant = PLDAccountant()
    event = dp_event.PoissonSampledDpEvent(0.5, dp_event.GaussianDpEvent(1.5))
    accountant.compose(event, steps)
    assert 0 <= said["epsilon"] - accountant.get_epsilon(1e-5) < 0.012
    assert said["epsilon"] < said["epsilon_replace_one"]
    assert any("metrics" in line and "exact" in line for line in said["not_covered"])


def test_the_report_says_so_too(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(whole)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"privacy: epsilon {promise(whole)['epsilon']:.4f} at delta 1e-05 for a patient")
    assert "metrics" in line


def test_what_was_promised_is_what_the_ledgers_hold(whole: Path) -> None:
    plan = json.loads((whole / "plan.json").read_text())
    q = plan["local"]["batch_size"] / plan["privacy"]["nominal_patients"]
    for site in ("h0", "h1"):
        found = reserved(whole, site)
        assert {(e["sigma"], e["q"], e["steps"], e["unit"]) for e in found} == {
            (plan["privacy"]["sigma"], q, plan["local"]["steps"], "patient")
        }
        assert len(found) == plan["federation"]["rounds"]
    # a pool of two sites' patients draws half as many of each
    (pooled,) = {(e["q"], e["sigma"]) for e in reserved(whole / "baselines" / "pooled", "pooled")}
    assert pooled == (0.25, 1.5)


def test_a_finished_run_is_resumed_to_the_same_promise(whole: Path) -> None:
    before, said = shared(whole), promise(whole)
    resume(whole)
    assert shared(whole) == before
    assert promise(whole) == said


def test_the_same_plan_gives_another_model_and_the_same_promise(whole: Path, tmp_path: Path) -> None:
    discs(tmp_path / "data")
    run = simulate(private(tmp_path, "baselines=[]"))
    name = "checkpoints/round-0003/model.safetensors"
    assert shared(run)["plan.json"] == shared(whole)["plan.json"]
    assert shared(run)[name] != shared(whole)[name]
    assert promise(run) == promise(whole)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["privacy.nominal_patients=1"],
            10,
            "privacy.nominal_patients is 1; need at least local.batch_size = 2",
        ),
        (
            ["federation.weight=patients"],
            10,
            "federation.weight is 'patients'; privacy.mode=dpsgd needs equal",
        ),
        (["local.batch_size=0"], 10, "local.batch_size is 0; privacy.mode=dpsgd needs at least 1"),
        (["privacy.sigma=0"], 10, "privacy.sigma is 0 and privacy.epsilon 0; give one"),
        (["privacy.epsilon=3"], 10, "privacy.sigma is 1.5 and privacy.epsilon 3; give one"),
        (["privacy.sigma=-1"], 10, "privacy.sigma is -1.*greater than or equal to 0"),
        (["privacy.sigma=0", "privacy.epsilon=0.001"], 10, "privacy.epsilon is 0.001: no sigma"),
        (["model.dropout=0.1"], 10, "draws random numbers as it computes"),
        (["privacy=none"], 10, "privacy.sigma is 1.5, but privacy.mode is none and protects nobody"),
    ],
)
def test_a_mistake_has_a_number_and_leaves_nothing(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    discs(tmp_path / "data")
    with pytest.raises(Stop, match=message) as stop:
        simulate(private(tmp_path, *arguments))
    assert stop.value.exit == Exit(code)
    assert not (tmp_path / "run").exists()


def test_the_public_number_is_asked_for(tmp_path: Path) -> None:
    given = [o for o in PRIVATE if not o.startswith("privacy.nominal_patients")]
    with pytest.raises(Stop, match=r"privacy\.nominal_patients is missing"):
        settings(tmp_path, *given)


def test_noise_is_found_for_a_price(tmp_path: Path) -> None:
    """Of a strategy that trains twice in a round."""
    discs(tmp_path / "data")
    price = ["privacy.sigma=0", "privacy.epsilon=3", "strategy=ditto", "baselines=[]"]
    run = simulate(private(tmp_path, *price))
    assert 2.95 < promise(run)["epsilon"] <= 3
    plan = json.loads((run / "plan.json").read_text())
    assert {e["sigma"] for site in ("h0", "h1") for e in reserved(run, site)} == {plan["privacy"]["sigma"]}
