"""What `preview` shows is what the gate lets out, byte for byte: the oracle is the site itself."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.cli import app
from client.preview import Stage, preview
from client.site import Bench
from client.sitefile import SiteFile
from client.train import Archive
from conf.console import code
from conf.exits import Exit
from conf.schema import Plan, Section
from strategies.code import code_digest
from strategies.protocol import Failure, Instruction, Reply, Tree, Update, pack
from tasks.data.cache import Cache

PATIENTS = 8


def plan(strategy: str) -> Plan:
    return Plan(
        task=Section(name="segmentation", classes=["background", "square"], patch=[16, 16]),
        model=Section(name="unet", channels=[4, 8]),
        loss=Section(name="dice_ce"),
        strategy=Section(name=strategy),
        local={"steps": 1},
        federation={"rounds": 4, "evaluate_every": 2},
    )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site's folder, its cache filled by the site's own command."""
    draw = np.random.default_rng(0)
    for i in range(PATIENTS):
        mask = np.zeros((20, 18), np.uint8)
        mask[4:12, 5 : 9 + i] = 1
        for name, values in (("image", draw.integers(0, 200, mask.shape) + 50 * mask), ("label", mask)):
            path = tmp_path / "data" / name / f"p{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(path)
    (tmp_path / "site.yaml").write_text("name: ward7\npolicy: {minimum_cell: 2}\ntest_fraction: 0.3\n")
    key = tmp_path / "state" / "patient.key"  # names decide the splits: two patients or more in each
    key.parent.mkdir(mode=0o700)
    key.write_bytes(bytes(range(2, 34)))
    key.chmod(0o600)
    monkeypatch.chdir(tmp_path)
    assert code(app, ["ingest", "data", "--cache", "cache"]) == Exit.OK
    return tmp_path


def looked(folder: Path, given: Plan) -> dict[str, Stage]:
    file = SiteFile.read(folder / "site.yaml")
    cache = Cache(file.cache)
    made = preview(file.name, given, Archive(file.parts(cache.entries), cache.load), file.policy)
    assert made.refused == ""
    return {stage.name: stage for stage in made.stages}


def asked(folder: Path, given: Plan, stage: str, common: Tree) -> Reply:
    """What the site answers, in truth."""
    there = SiteFile.read(folder / "site.yaml").site(Bench("cpu"))

    def instruction(stage: str) -> Instruction:
        return Instruction("run", 1, 0, stage, "ward7", None, given.digest, code_digest(), "")

    assert isinstance(there.handle(instruction("plan"), {"plan": given.canonical()}).body, Update)
    return there.handle(instruction(stage), common)


def test_a_fingerprints_bytes_are_those_that_leave(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = plan("fingerprint")
    (site / "plan.json").write_text(given.canonical())
    assert code(app, ["preview", "plan.json", "--out", "reply.bin"]) == Exit.OK
    said = capsys.readouterr().out
    sent = pack(asked(site, given, "fingerprint", {}).to_tree())
    assert (site / "reply.bin").read_bytes() == sent
    assert f"{len(sent):,} bytes each" in said
    # each count that is shown has the minimum of patients behind it
    for name in ("shape 0", "spacing 1", "level", "volume"):
        (line,) = re.findall(rf"^  {name}: (.*)$", said, re.MULTILINE)
        assert all(int(count) >= 2 for count in re.findall(r": (\d+)", line)), line
    assert str(site) not in said.replace("reply.bin", "")


def test_the_form_of_training_and_scoring_is_the_one_that_leaves(site: Path) -> None:
    given = plan("fedavg")
    shown = looked(site, given)
    assert shown["train"].times == 4
    assert shown["evaluate/federated/val"].times == 3
    model = {"model": dict(Bench("cpu").study(given)[0].initial)}
    for stage, common in (
        ("train", model),
        ("evaluate/federated/test", {"kind": "federated", "split": "test", **model}),
        ("trivial/atlas", {}),
    ):
        reply = asked(site, given, stage, common)
        assert isinstance(reply.body, Update)
        assert len(pack(reply.to_tree())) == shown[stage].size
        assert [t[0] for t in shown[stage].tensors] == list(reply.body.tensors)
        assert shown[stage].words["update"]["weight"] == reply.body.weight
        assert shown[stage].refused == ""


def test_what_the_site_would_refuse_is_said(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "site.yaml").write_text("name: ward7\npolicy: {minimum_cell: 50, tasks: [classification]}\n")
    given = plan("fedavg")
    (site / "plan.json").write_text(given.canonical())
    assert code(app, ["preview", str(site)]) == Exit.OK
    said = capsys.readouterr().out
    assert "would refuse the plan (policy: task segmentation)" in said
    assert said.count("minimum cell 50: a code leaves instead") == 14
    (site / "site.yaml").write_text("name: ward7\npolicy: {minimum_cell: 50}\n")
    body = asked(site, plan("fingerprint"), "fingerprint", {}).body
    assert isinstance(body, Failure)
    assert body.code == "policy"


@pytest.mark.parametrize(
    ("argv", "exit", "part"),
    [
        (["preview", "nowhere.json"], Exit.NO_RUN, "nowhere.json"),
        (["preview", "site.yaml"], Exit.CONFIG, "not a plan"),
        (["preview", "plan.json", "--out", "x"], Exit.CONFIG, "only a fingerprint"),
        (["preview", "plan.json", "--site-file", "data"], Exit.CONFIG, "data"),
    ],
)
def test_a_mistake_ends_with_its_code(
    argv: list[str], exit: Exit, part: str, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (site / "plan.json").write_text(plan("fedavg").canonical())
    assert code(app, argv) == exit
    assert part in capsys.readouterr().err
    assert not (site / "x").exists()
