"""A run begins with another's weights: what is taken, what the user is told, what travels, how often."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from client.site import Bench
from conf.exits import Exit, Stop
from conf.load import compose
from conf.schema import Data, Plan, Settings
from server.checkpoint import Progress, save
from server.transfer import begin, initial, named, tensors
from strategies.base import Study
from strategies.protocol import Instruction, Refused, Reply, Tree, digest, pack, unpack
from tests.client.desk import Desk, code
from tests.toys import Recorder, Toys, toy_cases, toy_plan

NAMES = ["layers.0.bias", "layers.0.weight"]


def net(**local: object) -> Plan:
    return toy_plan(task="tiny_net", federation={"rounds": 2}, local=local)


def given(plan: Plan) -> dict[str, Tensor]:
    """Other weights for the same model."""
    draw = torch.Generator().manual_seed(1)
    return {n: torch.randn(t.shape, generator=draw).abs() for n, t in Study.of(plan).initial.items()}


def started(plan: Plan, path: Path) -> tuple[Plan, bytes]:
    settings, blob = begin(Settings(plan=plan, data=Data(root="."), init=str(path)))
    return settings.plan, blob


def wrote(path: Path, tree: Mapping[str, Tensor]) -> Path:
    safetensors.torch.save_file(dict(tree), path)
    return path


def test_a_file_and_a_run_give_the_same_weights(tmp_path: Path) -> None:
    plan = net()
    weights = given(plan)
    plain = wrote(tmp_path / "w.safetensors", {**weights, "counter": torch.ones(1, dtype=torch.int64)})
    ours = tmp_path / "ours.safetensors"
    ours.write_bytes(pack({"model": weights}))
    save(tmp_path / "run" / "checkpoints", Progress(1, weights, {}), 2)
    made = {started(plan, path)[0].init for path in (plain, ours, tmp_path / "run")}
    assert made == {digest(pack(weights))}


def test_what_does_not_fit_begins_anew_and_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, weights = net(freeze=["layers.3.*"]), given(net())
    fresh = Study.of(plan).initial
    some: dict[str, Tensor] = {n: weights[n].double() for n in NAMES}
    path = wrote(
        tmp_path / "w.safetensors", {**some, "layers.3.weight": torch.ones(5, 4), "head": torch.ones(2)}
    )
    _, blob = started(plan, path)
    made = unpack(blob)
    for name, tensor in fresh.items():
        assert made[name].equal(weights[name] if name in NAMES else tensor), name
        assert made[name].dtype == torch.float32
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "model.init: 2 of 8 tensors taken"
    assert "layers.3.weight [3, 4] (there [5, 4])" in said[1]
    assert "layers.1.running_mean [4]" in said[1]
    assert said[2] == "there, but not of this model: head [2]"
    assert said[3].startswith("frozen, though they begin anew: layers.3.weight")


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_network_is_found_again_within_another(wrapped: bool) -> None:
    inner = {"body.0.weight": torch.ones(3, 3), "head.weight": torch.ones(2, 3)}
    outer = {f"trunk.{name}": tensor * 2 for name, tensor in inner.items()}
    # an own head of the same shape does not win over all the rest
    own, given = ({**outer, "head.weight": torch.zeros(2, 3)}, inner) if wrapped else (inner, outer)
    made = named(own, given)
    assert {n: t.data_ptr() for n, t in made.items()} == {
        (f"trunk.{n}" if wrapped else n.removeprefix("trunk.")): t.data_ptr() for n, t in given.items()
    }
    assert named(given, given) is given
    assert named({"x": torch.ones(1)}, given) is given


def pickled(folder: Path) -> Path:
    torch.save({"a": torch.ones(1)}, folder / "model.pt")
    return folder / "model.pt"


WRONG: dict[str, tuple[Callable[[Path], Path], Exit, str]] = {
    "absent": (lambda f: f / "no.safetensors", Exit.CONFIG, "cannot be read"),
    "a pickle": (pickled, Exit.CONFIG, "a pickled file can run code"),
    "no run": (lambda f: f, Exit.NO_RUN, "has no checkpoint"),
    "no safetensors": (lambda f: pickled(f).rename(f / "x.safetensors"), Exit.CONFIG, "cannot be read"),
    "another model": (
        lambda f: wrote(f / "o.safetensors", {"net.conv": torch.ones(2)}),
        Exit.CONFIG,
        r"no tensor fits: it has net\.conv; the model layers\.0\.weight",
    ),
    "not finite": (
        lambda f: wrote(f / "n.safetensors", {"layers.0.bias": torch.full((4,), torch.nan)}),
        Exit.CONFIG,
        r"layers\.0\.bias holds a value that is not finite",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_no_run_can_begin_with_is_refused(case: str, tmp_path: Path) -> None:
    make, exit, why = WRONG[case]
    with pytest.raises(Stop, match=why) as stop:
        started(net(), make(tmp_path))
    assert stop.value.exit is exit


def test_it_is_no_parameter_of_the_network() -> None:
    settings = compose(["data.root=.", "model.init=runs/a"])
    assert settings.init == "runs/a"
    assert "init" not in settings.plan.model.parameters
    assert compose(["data.root=."]).init is None


def test_frozen_weights_travel_once_with_the_plan_and_training_begins_there(ram: Path) -> None:
    plan, said = net(freeze=["layers.0.*"]), list[tuple[Instruction, Tree, Reply]]()
    weights = given(plan)
    asked: list[tuple[str, set[str]]] = []

    class Watched(Recorder):
        def handle(self, instruction: Instruction, common: Tree) -> Reply:
            asked.append((instruction.stage, set(common.get("initial") or common.get("model") or ())))
            return super().handle(instruction, common)

    plan = plan.model_copy(update={"init": digest(pack(weights))})
    toys = Toys(ram, plan, toy_cases(2, 3), wrap=lambda s, _: Watched(s, said), given=lambda _: weights)
    model = toys.train()
    assert [names for stage, names in asked if stage == "plan"] == [set(weights)] * 2
    assert {frozenset(names) for stage, names in asked if stage == "train"} == {
        frozenset(weights.keys() - set(NAMES))
    }
    assert all(model[name].equal(weights[name]) for name in NAMES)
    first = next(common["model"] for i, common, _ in said if i.stage == "train" and i.round == 1)
    assert all(first[name].equal(weights[name]) for name in first)
    # the same run from the model's own weights ends elsewhere, and an interrupted one ends alike
    again = Toys(ram / "again", plan, toy_cases(2, 3), given=lambda _: weights)

    def die(event: str, r: int) -> None:
        if event == "checkpoint" and r == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again.train(die)
    again.train()
    assert again.ending() == toys.ending()


def test_a_site_without_the_weights_or_with_others_refuses_by_a_code(ram: Path) -> None:
    plan = net()
    weights = given(plan)
    plan = plan.model_copy(update={"init": digest(pack(weights))})
    site = Toys(ram, plan, toy_cases(1, 3), durable=True).site("site_0")
    ask = Desk(ram, plan=net()).asked(stage="plan", plan=plan.digest)

    def propose(**more: object) -> Reply:
        return site.handle(ask, {"plan": plan.canonical(), **more})

    less = {n: t for n, t in weights.items() if n != "layers.0.bias"}
    assert code(propose()) == "form"
    assert code(propose(initial=less)) == "names"
    assert code(propose(initial={**weights, "layers.0.bias": torch.ones(5)})) == "shape"
    assert code(propose(initial={**weights, "layers.0.bias": torch.ones(4)})) == "plan"
    train = Desk(ram, plan=net()).asked(plan=plan.digest)
    assert code(site.handle(train, {"model": weights})) == "plan"
    assert not list((ram / "sites" / "plans").glob("*.safetensors"))
    assert propose(initial=weights).body.tensors == {}  # type: ignore[union-attr]
    # a process that starts later finds them beside the plan
    later = Toys(ram, plan, toy_cases(1, 3), durable=True).site("site_0", Bench("cpu"))
    assert len(later.handle(train, {"model": weights}).body.tensors) == 8  # type: ignore[union-attr]
    (held,) = (ram / "sites" / "plans").glob("*.safetensors")
    assert held.stem == digest(held.read_bytes()) == plan.init
    with pytest.raises(Refused, match="no first weights"):
        Bench("cpu").study(plan)


def test_a_run_whose_first_weights_are_gone_does_not_begin_from_others(tmp_path: Path) -> None:
    (tmp_path / "initial.safetensors").write_bytes(b"")
    with pytest.raises(Stop, match="damaged or missing") as stop:
        initial(tmp_path)("0" * 64)
    assert stop.value.exit is Exit.CHECKPOINT_DAMAGED


def test_the_documented_line_converts_a_pickled_file(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "researcher.md").read_text()
    line = next(line.strip() for line in text.splitlines() if "weights_only=True" in line)
    script = line.partition('-c "')[2].rpartition('" ')[0]
    torch.save({"state_dict": {"a": torch.ones(2, 3).T, "b": torch.ones(1)}}, tmp_path / "model.pt")
    command = [sys.executable, "-c", script, "model.pt", "model.safetensors"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert tensors(tmp_path / "model.safetensors")["a"].shape == (3, 2)
