"""What stays at a site does stay there, and both ends agree on what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.exchange import Handler
from server.rounds import Run
from strategies import STRATEGIES
from strategies.base import Study
from strategies.protocol import Failure, Instruction, Reply, Tree, Update, pack, unpack
from tests.toys import Recorder, Toys, toy_cases, toy_plan

NORMS = {"layers.1.weight", "layers.1.bias", "layers.1.running_mean", "layers.1.running_var"}
COUNTER = "layers.1.num_batches_tracked"


def network(strategy: str, /, **federation: Any) -> Any:
    return toy_plan(strategy, task="tiny_net", federation={"rounds": 2, **federation})


def states(folder: Path, site: str) -> dict[tuple[int, int], Tree]:
    """A site's private states on disk, by epoch."""
    found = {}
    for path in (folder / "sites" / site / "memory" / "run").glob("state-*.safetensors"):
        r, attempt = path.name.split(".")[0].split("-")[1:]
        found[int(r), int(attempt)] = unpack(path.read_bytes())["state"]
    return found


def leaves(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from leaves(value)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


@pytest.mark.parametrize("name", STRATEGIES)
def test_only_what_the_spec_names_travels_and_no_integer_buffer_ever(name: str, ram: Path) -> None:
    said: list[tuple[Instruction, Tree, Reply]] = []
    plan = network(name)
    toys = Toys(ram, plan, toy_cases(2, 2), wrap=lambda site, name: Recorder(site, said))
    toys.train()
    assert COUNTER in Study.of(plan).task.build_model().state_dict()
    for _, common, reply in said:
        assert isinstance(reply.body, Update)
        for tree in (common, reply.to_tree()):
            assert COUNTER.encode() not in pack(tree)
            assert all(tensor.is_floating_point() for tensor in leaves(tree))


@pytest.mark.parametrize(("name", "group"), [("fedbn", "private"), ("ditto", "personal")])
def test_private_tensors_appear_in_no_byte_that_goes_up(name: str, group: str, ram: Path) -> None:
    said: list[tuple[Instruction, Tree, Reply]] = []
    plan = network(name)
    private: dict[str, list[dict[str, Tensor]]] = {"site_0": [], "site_1": []}

    def watch(event: str, r: int) -> None:
        if event == "checkpoint":  # whatever the sites hold now: settled, tentative, all generations
            for site in private:
                private[site] += [state[group] for state in states(ram, site).values()]

    Toys(ram, plan, toy_cases(2, 2), wrap=lambda site, name: Recorder(site, said)).train(watch)
    initial = Study.of(plan).initial
    kept = NORMS if name == "fedbn" else set(initial)
    up = b"".join(pack(reply.to_tree()) for _, _, reply in said)
    assert b"delta/layers.0.weight" in up
    for held in private.values():
        assert len(held) >= 2
        for tensors in held:
            assert set(tensors) == kept
            for tensor_name, tensor in tensors.items():
                assert not tensor.equal(initial[tensor_name])  # it did learn
                assert raw(tensor) not in up
                assert raw(tensor - initial[tensor_name]) not in up  # nor as a change
                assert raw(initial[tensor_name] - tensor) not in up
    one, other = private["site_0"][-1], private["site_1"][-1]
    assert not any(one[tensor_name].equal(other[tensor_name]) for tensor_name in kept)
    if name == "fedbn":
        names = {
            tensor for _, _, reply in said if isinstance(reply.body, Update) for tensor in reply.body.tensors
        }
        assert not {tensor.partition("/")[2] for tensor in names} & NORMS
        assert not any(norm.encode() in up for norm in NORMS)
        assert not any(NORMS & set(common.get("model", {})) for _, common, _ in said)


# ---- FedBuff: what an interrupted round has seen fail stays failed, and took its time


class Killed(Exception):
    pass


@pytest.mark.parametrize(("sites", "buffer"), [(4, 2), (2, 2)])
def test_an_asynchronous_job_that_failed_is_not_done_again_after_an_interruption(
    sites: int, buffer: int, ram: Path
) -> None:
    plan = toy_plan("fedbuff", strategy={"buffer": buffer}, federation={"rounds": 3}, local={"steps": 1})
    cases = toy_cases(sites, 2)
    said: list[tuple[Instruction, Tree, Reply]] = []
    Toys(ram / "asked", plan, cases, wrap=lambda site, name: Recorder(site, said)).train()
    jobs = [(i.site, i.epoch) for i, _, _ in said if i.stage == "train" and i.round == 1]
    for name, epoch in jobs:
        folder = ram / f"{name}-{epoch[0]}"

        def ill(site: Handler, other: str, name: str = name, epoch: tuple[int, int] = epoch) -> Handler:
            return Faulty(site, set(), {epoch} if other == name else set())

        undisturbed = Toys(folder / "whole", plan, cases, wrap=ill)
        undisturbed.train()
        made = Toys(folder / "killed", plan, cases, wrap=ill)

        def die(event: str, r: int, journal: Path = made.folder / "journal.jsonl") -> None:
            if event == "fold" and '"memory"' in journal.read_text():
                raise Killed("after a failure")

        with pytest.raises(Killed, match="after a failure"):
            made.train(die)
        made.wrap = lambda site, name: site  # it is well again
        made.train()
        assert made.ending() == undisturbed.ending(), (name, epoch)


# ---- SCAFFOLD: c stays the mean of all cᵢ, whatever becomes of an attempt


@dataclass
class Faulty:
    """A site that fails, or whose answer is spoilt on its way, in chosen epochs."""

    site: Handler
    spoil: set[tuple[int, int]]
    fail: set[tuple[int, int]]

    def handle(self, instruction: Instruction, common: Tree) -> Reply:
        if instruction.stage != "train":
            return self.site.handle(instruction, common)
        if instruction.epoch in self.fail:
            return Reply(instruction.site, Failure("memory"))
        reply = self.site.handle(instruction, common)
        if instruction.epoch in self.spoil and isinstance(reply.body, Update):
            bad = {name: tensor * torch.nan for name, tensor in reply.body.tensors.items()}
            return replace(reply, body=replace(reply.body, tensors=bad))
        return reply


Epochs = set[tuple[int, int]]
SPOILT: dict[str, tuple[dict[str, Epochs], dict[str, Epochs], int]] = {
    "nothing happens": ({}, {}, 1),
    "a reply is quarantined": ({"site_1": {(2, 0)}}, {}, 1),
    "a site fails": ({}, {"site_0": {(2, 0)}}, 1),
    "an attempt is abandoned": ({}, {"site_2": {(2, 0)}}, 3),
    "twice, by different sites": ({"site_0": {(2, 0)}}, {"site_1": {(2, 1)}}, 3),
    "the last round is abandoned once": ({"site_1": {(4, 0)}}, {}, 3),
}


def controls(run: Run, folder: Path) -> tuple[Tensor, Tensor]:
    """The server's control, and the mean of the sites' that belong to what the server counts."""
    held = []
    for site in run.sites:
        epoch = run.progress.settled.get(site)
        held.append(states(folder, site)[epoch]["control"]["w"] if epoch else torch.zeros(3))
    return run.progress.state["control"]["w"], torch.stack(held).mean(0)


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.parametrize("durable", [False, True])
def test_scaffolds_control_is_the_mean_of_the_sites_controls(case: str, durable: bool, ram: Path) -> None:
    spoil, fail, least = SPOILT[case]
    plan = toy_plan("scaffold", federation={"rounds": 4, "min_replies": least})
    toys = Toys(ram, plan, toy_cases(3, 2), durable=durable)
    toys.wrap = lambda site, name: Faulty(site, spoil.get(name, set()), fail.get(name, set()))

    def watch(event: str, r: int) -> None:
        if event == "checkpoint":
            ours, theirs = controls(run, ram)
            assert (ours - theirs).abs().max() < 1e-6, r
            assert ours.abs().max() > 0.01

    with toys.opened(watch) as run:
        run.train(evaluate=False)
    attempts = {attempt for _, attempt in run.progress.settled.values()}
    assert attempts <= {0, 1, 2}


def test_a_site_that_always_kept_its_last_answer_would_break_it(ram: Path) -> None:
    """The oracle of the law above: with the quarantined site's tentative state the means differ."""
    plan = toy_plan("scaffold", federation={"rounds": 2})
    toys = Toys(ram, plan, toy_cases(3, 2))
    toys.wrap = lambda site, name: Faulty(site, {(2, 0)} if name == "site_1" else set(), set())
    with toys.opened() as run:
        run.train(evaluate=False)
    wrong = torch.stack([states(ram, site)[2, 0]["control"]["w"] for site in run.sites]).mean(0)
    ours, theirs = controls(run, ram)
    assert (ours - theirs).abs().max() < 1e-6
    assert (ours - wrong).abs().max() > 0.01


@pytest.mark.parametrize("name", ["scaffold", "ditto"])
def test_a_run_that_falls_back_before_its_first_round_ends_alike(name: str, ram: Path) -> None:
    plan, cases = toy_plan(name, federation={"rounds": 2}), toy_cases(2, 2)
    undisturbed = Toys(ram / "whole", plan, cases)
    undisturbed.train()
    made = Toys(ram / "killed", plan, cases)

    def die(event: str, r: int) -> None:
        if event == "evaluate":  # the sites have been told that round 1 counted
            raise Killed("after round 1")

    with pytest.raises(Killed, match="after round 1"):
        made.train(die)
    damaged = made.folder / "checkpoints" / "round-0001" / "state.json"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    made.train()
    assert made.ending() == undisturbed.ending()
