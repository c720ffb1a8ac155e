"""What is frozen neither trains nor travels; what is kept trains and stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.exits import Exit, Stop
from conf.schema import Plan
from server.exchange import Handler
from strategies import build_strategy
from strategies.base import Study
from strategies.protocol import Instruction, Reply, Tree, pack, unpack
from tests.toys import Recorder, Toys, toy_cases, toy_plan

Said = list[tuple[Instruction, Tree, Reply]]

#: the toy network: a linear layer, BatchNorm, tanh, a linear layer
FIRST = {"layers.0.weight", "layers.0.bias"}
NORM = {"layers.1.weight", "layers.1.bias", "layers.1.running_mean", "layers.1.running_var"}
LAST = {"layers.3.weight", "layers.3.bias"}


def net(strategy: str = "fedavg", /, **sections: Any) -> Plan:
    return toy_plan(strategy, task="tiny_net", **{"federation": {"rounds": 2}, **sections})


def run(folder: Path, plan: Plan) -> tuple[dict[str, Tensor], Said]:
    said: Said = []

    def wrap(site: Handler, name: str) -> Handler:
        return Recorder(site, said)

    return Toys(folder, plan, toy_cases(2, 3), wrap=wrap).train(), said


FREEZE: dict[str, tuple[dict[str, Any], set[str]]] = {
    "a layer": ({"freeze": ["layers.0.*"]}, FIRST),
    "two patterns": ({"freeze": ["layers.0.*", "layers.3.bias"]}, FIRST | {"layers.3.bias"}),
    "normalisation with its statistics": ({"freeze": ["layers.1.*"]}, NORM),
    "one block": ({"freeze_depth": 1}, FIRST),
    "two blocks": ({"freeze_depth": 2}, FIRST | NORM),
    "both": ({"freeze": ["layers.1.*"], "freeze_depth": 1}, FIRST | NORM),
}


@pytest.mark.parametrize("case", FREEZE)
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "fedadam", "ditto"])
def test_what_is_frozen_does_not_change_and_does_not_travel(case: str, strategy: str, ram: Path) -> None:
    local, still = FREEZE[case]
    plan = net(strategy, local=local)
    model, said = run(ram, plan)
    initial = Study.of(plan).initial
    assert {name for name, tensor in model.items() if tensor.equal(initial[name])} == still
    wire = b"".join(pack(common) + pack(reply.to_tree()) for _, common, reply in said)
    assert not any(name.encode() in wire for name in still)
    assert any(name.encode() in wire for name in initial.keys() - still)


def test_the_bytes_on_the_wire_go_down_by_those_of_the_frozen_tensors(ram: Path) -> None:
    def data(tree: Tree) -> int:
        """Bytes of numbers, less the names that stand beside them."""
        blob = pack(tree)
        return len(blob) - 8 - int.from_bytes(blob[:8], "little")

    def sizes(folder: Path, plan: Plan) -> list[tuple[int, int]]:
        _, said = run(folder, plan)
        return [(data(common), data(reply.to_tree())) for i, common, reply in said if i.stage == "train"]

    frozen = 4 * sum(Study.of(net()).initial[name].numel() for name in FIRST)
    assert frozen == 4 * (3 * 4 + 4)
    whole, part = sizes(ram / "whole", net()), sizes(ram / "part", net(local={"freeze": ["layers.0.*"]}))
    assert len(whole) == len(part) == 4  # two sites, two rounds
    assert [(down - frozen, up - frozen) for down, up in whole] == part


def test_freezing_is_training_the_rest_alone(ram: Path) -> None:
    """Against plain torch: full batch, one site, one step a round, the first layer without gradient."""
    plan = net(toy={"norm": False}, local={"batch_size": 0, "steps": 1, "freeze_depth": 1, "clip_norm": 0.05})
    cases = toy_cases(1, 3)
    got = Toys(ram, plan, cases).train()
    model = Study.of(plan).task.build_model()
    model.load_state_dict(Study.of(plan).initial)
    learns = [p for name, p in model.named_parameters() if name not in FIRST]
    images = torch.stack([case.images["image"] for case in cases["site_0"]["train"]])
    for _ in range(2):
        model.zero_grad()
        model(images[:, 0], images[:, 1]).mean().backward()
        torch.nn.utils.clip_grad_norm_(learns, 0.05)  # the norm of what trains, not of the rest
        with torch.no_grad():
            for p in learns:
                p.sub_(torch.as_tensor(p.grad), alpha=0.1)
    for name, tensor in model.state_dict().items():
        assert (got[name] - tensor).abs().max() < 1e-6, name


WRONG: dict[str, tuple[Plan, str]] = {
    "a slip": (
        net(local={"freeze": ["layer.0.*"]}),
        r"local\.freeze has 'layer\.0\.\*', which fits no .*0\.w",
    ),
    "too deep": (
        net(local={"freeze_depth": 3}),
        r"local\.freeze_depth is 3; the model has 3 blocks.*: 0, 1, 3$",
    ),
    "everything": (net(local={"freeze": ["*"]}), r"local\.freeze leaves nothing that phase 'train' could"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_frozen_is_refused_by_name(case: str) -> None:
    plan, why = WRONG[case]
    with pytest.raises(Stop, match=why) as stop:
        Study.of(plan)
    assert stop.value.exit is Exit.CONFIG


def test_private_training_freezes_too(ram: Path) -> None:
    private = {"mode": "dpsgd", "sigma": 1.0, "nominal_patients": 4}
    plan = net(
        toy={"norm": False},
        local={"freeze_depth": 1, "batch_size": 2},
        privacy=private,
        federation={"rounds": 1, "weight": "equal"},
    )
    model, said = run(ram, plan)
    initial = Study.of(plan).initial
    assert {name for name, tensor in model.items() if tensor.equal(initial[name])} == FIRST
    assert not any(b"layers.0" in pack(reply.to_tree()) for _, _, reply in said)


# ---- layers kept at the site


def private(folder: Path) -> Iterator[Mapping[str, Tensor]]:
    """The sites' private tensors after the last round."""
    for site in sorted(folder.glob("sites/site_*")):
        last = max(site.glob("memory/run/state-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        yield unpack(last.read_bytes())["state"]["private"]


def test_fedbn_is_fedper_that_keeps_normalisation_to_the_bit(ram: Path) -> None:
    one, _ = run(ram / "bn", net("fedbn"))
    other, _ = run(ram / "per", net("fedper", strategy={"keep": ["layers.1.*"]}))
    assert pack(one) == pack(other)


def test_what_is_kept_trains_at_each_site_and_never_travels(ram: Path) -> None:
    plan = net("fedper", strategy={"keep": ["layers.3.*"]})
    model, said = run(ram, plan)
    initial = Study.of(plan).initial
    assert {name for name, tensor in model.items() if tensor.equal(initial[name])} == LAST
    wire = b"".join(pack(common) + pack(reply.to_tree()) for _, common, reply in said)
    assert b"layers.0.weight" in wire
    assert not any(name.encode() in wire for name in LAST)
    states = list(private(ram))
    assert len(states) == 2
    for state in states:
        assert set(state) == LAST
        assert not any(state[name].equal(initial[name]) for name in LAST)
    assert not states[0]["layers.3.weight"].equal(states[1]["layers.3.weight"])


def test_a_pattern_of_nothing_or_of_everything_is_refused() -> None:
    for keep, why in ((["head.*"], r"strategy\.keep has 'head\.\*'"), (["*"], "nothing that travels")):
        plan = net("fedper", strategy={"keep": keep})
        with pytest.raises(Stop, match=why):
            build_strategy(plan).check(Study.of(plan))
