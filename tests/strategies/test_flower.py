"""Flower's own strategies behind our checks, against the papers' formulas written out in plain loops."""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client.policy import Policy
from conf.exits import Exit, Stop
from server.exchange import Handler
from strategies import STRATEGIES, build_strategy
from strategies.base import Abandon, Study, Tensors
from strategies.protocol import Failure, Instruction, Reply, Tree, Update, pack
from tests.client.desk import Desk, code
from tests.toys import Recorder, Toys, toy_cases, toy_plan

FLOWER = [name for name in STRATEGIES if name.startswith("flower_")]
#: name to a hostile site's worth of settings, and how many answers that takes
ROBUST: dict[str, tuple[dict[str, Any], int]] = {
    "flower_krum": ({"hostile": 1}, 5),
    "flower_multi_krum": ({"hostile": 1}, 5),
    "flower_bulyan": ({"hostile": 1}, 7),
    "flower_trimmed_avg": ({"hostile": 1}, 3),
    "flower_median": ({}, 1),
}


# ---- one round, without sites


@dataclass
class Server:
    """A strategy's server half, and the answers that it is given."""

    name: str
    settings: dict[str, Any]
    task: str = "tiny_net"

    def __post_init__(self) -> None:
        plan = toy_plan(self.name, task=self.task, strategy=self.settings)
        self.study = Study.of(plan)
        self.strategy = build_strategy(plan)
        self.spec = self.strategy.spec(self.study, "train")

    def updates(self, sites: int, seed: int = 0, scale: float = 0.1) -> dict[str, Update]:
        draw = torch.Generator().manual_seed(seed)
        return {
            f"site_{i:02d}": Update(
                {
                    n: scale * torch.randn(shape, generator=draw).to(dtype)
                    if n.startswith("delta/")
                    else 0.5 + 3 * torch.rand(shape, generator=draw)
                    for n, (shape, dtype) in self.spec.tensors.items()
                },
                weight=i + 1,
            )
            for i in range(sites)
        }

    def step(
        self, r: int, state: Tree, model: Tensors, updates: dict[str, Update], order: Sequence[str] = ()
    ) -> tuple[Tensors, Tree]:
        steps = self.strategy.round(r, state, model, self.study, tuple(updates))
        ask = next(steps)
        partial = ask.fold.start(ask.spec)
        for site in order or updates:
            ask.spec.check(updates[site])
            ask.fold.add(partial, ask.spec, site, (r, 0), updates[site])
        try:
            steps.send(ask.fold.finish(partial, ask.spec))
        except StopIteration as end:
            model, state = end.value
        finally:
            for path, _, _ in partial.rows.values():
                Path(path).unlink()
        return model, state


def rows(server: Server, model: Tensors, updates: dict[str, Update]) -> list[list[float]]:
    """Each site's whole model as a list of Python's own floats."""
    names = list(server.strategy.shared(server.study))
    return [
        [v for n in names for v in (model[n].double() + u.tensors[f"delta/{n}"].double()).flatten().tolist()]
        for _, u in sorted(updates.items())
    ]


def flat(server: Server, model: Tensors) -> list[float]:
    return [v for n in server.strategy.shared(server.study) for v in model[n].double().flatten().tolist()]


def weights(updates: dict[str, Update]) -> list[int]:
    return [u.weight for _, u in sorted(updates.items())]


# ---- the papers


def krum(found: list[list[float]], f: int, keep: int) -> list[int]:
    """Blanchard et al., 2017: the `keep` lowest sums of squared distances to the n - f - 2 nearest others."""
    n = len(found)
    scores = []
    for i in range(n):
        apart = sorted(math.dist(found[i], found[j]) ** 2 for j in range(n) if j != i)
        scores.append(sum(apart[: n - f - 2]))
    return sorted(range(n), key=lambda i: scores[i])[:keep]


def mean(found: list[list[float]], weight: Sequence[float]) -> list[float]:
    return [
        sum(w * v for w, v in zip(weight, column, strict=True)) / sum(weight)
        for column in zip(*found, strict=True)
    ]


def by_krum(found: list[list[float]], weight: list[int], f: int) -> list[float]:
    return found[krum(found, f, 1)[0]]


def by_multi_krum(found: list[list[float]], weight: list[int], f: int) -> list[float]:
    kept = krum(found, f, len(found) - f)
    return mean([found[i] for i in kept], [weight[i] for i in kept])


def by_bulyan(found: list[list[float]], weight: list[int], f: int) -> list[float]:
    """El Mhamdi et al., 2018, section 4; the choice in one go, as Flower makes it."""
    kept = [found[i] for i in krum(found, f, len(found) - 2 * f)]
    values = []
    for column in zip(*kept, strict=True):
        middle = statistics.median(column)
        near = sorted(column, key=lambda v: abs(v - middle))[: len(found) - 4 * f]
        values.append(sum(near) / len(near))
    return values


def by_trimmed_mean(found: list[list[float]], weight: list[int], f: int) -> list[float]:
    """Yin et al., 2018, Definition 2."""
    columns = [sorted(column)[f : len(column) - f] for column in zip(*found, strict=True)]
    return [sum(column) / len(column) for column in columns]


def by_median(found: list[list[float]], weight: list[int], f: int) -> list[float]:
    return [statistics.median(column) for column in zip(*found, strict=True)]


PAPERS: dict[str, Callable[[list[list[float]], list[int], int], list[float]]] = {
    "flower_krum": by_krum,
    "flower_multi_krum": by_multi_krum,
    "flower_bulyan": by_bulyan,
    "flower_trimmed_avg": by_trimmed_mean,
    "flower_median": by_median,
}


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize(("sites", "hostile"), [(7, 1), (11, 2), (8, 1), (3, 0)])
def test_a_robust_rule_is_the_papers(name: str, sites: int, hostile: int) -> None:
    settings = {} if name == "flower_median" else {"hostile": hostile}
    server = Server(name, settings)
    model = server.study.initial
    for seed in range(3):
        updates = server.updates(sites, seed)
        updates["site_01"] = replace(
            updates["site_01"], tensors={n: 60.0 * t for n, t in updates["site_01"].tensors.items()}
        )
        moved, state = server.step(1, {}, model, updates)
        expected = PAPERS[name](rows(server, model, updates), weights(updates), hostile)
        assert flat(server, moved) == pytest.approx(expected, abs=1e-6)
        assert state == {}
        assert all(moved[n].dtype == t.dtype and moved[n].shape == t.shape for n, t in model.items())


def test_multi_krum_averages_as_many_as_it_is_told() -> None:
    server = Server("flower_multi_krum", {"hostile": 1, "select": 2})
    updates = server.updates(6)
    found = rows(server, server.study.initial, updates)
    kept = krum(found, 1, 2)
    moved, _ = server.step(1, {}, server.study.initial, updates)
    expected = mean([found[i] for i in kept], [weights(updates)[i] for i in kept])
    assert flat(server, moved) == pytest.approx(expected, abs=1e-6)


def test_krum_tells_small_changes_of_large_weights_apart() -> None:
    """In float32, |x|² + |y|² - 2xy of weights near 1000 is noise where the changes are near 0.001."""
    server = Server("flower_krum", {"hostile": 1})
    model = {n: torch.full_like(t, 1000.0) for n, t in server.study.initial.items()}
    updates = server.updates(5, scale=2.0**-9)
    for n in updates["site_02"].tensors:
        updates["site_02"].tensors[n].mul_(2.0**-9)  # in the middle of all
    moved, _ = server.step(1, {}, model, updates)
    wanted = rows(server, model, updates)[2]
    assert krum(rows(server, model, updates), 1, 1) == [2]
    assert flat(server, moved) == pytest.approx(wanted, rel=1e-7)


@pytest.mark.parametrize("q", [0.0, 0.1, 1.0, 2.0])
def test_q_fedavg_is_the_papers(q: float) -> None:
    """Li et al., 2020, Algorithm 2: w - Σ F_k^q L (w - w_k) / Σ (q F_k^(q-1) |L (w - w_k)|² + L F_k^q)."""
    server = Server("flower_qfedavg", {"q": q, "lr": 0.5}, task="quadratic")
    model = server.study.initial
    updates = server.updates(4)
    start = flat(server, model)
    step, total = [0.0] * len(start), 0.0
    for row, (_, update) in zip(rows(server, model, updates), sorted(updates.items()), strict=True):
        loss, slope = float(update.tensors["loss/train"]), 1 / 0.5
        gradient = [slope * (a - b) for a, b in zip(start, row, strict=True)]
        step = [s + loss**q * g for s, g in zip(step, gradient, strict=True)]
        total += q * loss ** (q - 1) * sum(g * g for g in gradient) + slope * loss**q
    moved, _ = server.step(1, {}, model, updates)
    expected = [a - s / total for a, s in zip(start, step, strict=True)]
    assert flat(server, moved) == pytest.approx(expected, abs=1e-6)


# ---- server optimisers (Reddi et al., 2021, Algorithm 2; Hsu et al., 2019)

Moments = tuple[float, float]


def momentum(x: float, d: float, held: Moments, r: int) -> tuple[float, Moments]:
    m = 0.9 * held[0] + d
    return x + 1.0 * m, (m, 0.0)


def adagrad(x: float, d: float, held: Moments, r: int) -> tuple[float, Moments]:
    v = held[1] + d * d
    return x + 0.1 * d / (math.sqrt(v) + 1e-3), (d, v)


def adam(x: float, d: float, held: Moments, r: int) -> tuple[float, Moments]:
    m, v = 0.9 * held[0] + 0.1 * d, 0.99 * held[1] + 0.01 * d * d
    rate = 0.1 * math.sqrt(1 - 0.99 ** (r + 1)) / (1 - 0.9 ** (r + 1))  # Flower's bias correction
    return x + rate * m / (math.sqrt(v) + 1e-3), (m, v)


def yogi(x: float, d: float, held: Moments, r: int) -> tuple[float, Moments]:
    m = 0.9 * held[0] + 0.1 * d
    v = held[1] - 0.01 * d * d * math.copysign(1.0, held[1] - d * d)
    return x + 0.01 * m / (math.sqrt(v) + 1e-3), (m, v)


RULES = {
    "flower_fedavgm": momentum,
    "flower_fedadagrad": adagrad,
    "flower_fedadam": adam,
    "flower_fedyogi": yogi,
}


@pytest.mark.parametrize("name", RULES)
def test_a_server_optimiser_goes_on_from_its_state(name: str) -> None:
    server = Server(name, {}, task="quadratic")
    model, state = server.study.initial, dict[str, Any]()
    expected, held = flat(server, model), [(0.0, 0.0)] * 3
    for r in (1, 2, 3, 4):
        updates = server.updates(3, seed=r)
        average = mean(rows(server, model, updates), weights(updates))
        before = flat(server, model)
        steps = [RULES[name](x, a - x, h, r) for x, a, h in zip(before, average, held, strict=True)]
        expected, held = [x for x, _ in steps], [h for _, h in steps]
        model, state = server.step(r, state, model, updates)  # a new object of Flower's every time
        assert flat(server, model) == pytest.approx(expected, abs=1e-6)
    assert state


@pytest.mark.parametrize("name", [*RULES, "flower_qfedavg"])
def test_running_statistics_take_the_plain_mean(name: str) -> None:
    server = Server(name, {})
    updates = server.updates(3)
    moved, _ = server.step(1, {}, server.study.initial, updates)
    buffers = [n for n in moved if "running" in n]
    assert buffers
    for n in buffers:
        parts = [u.weight * u.tensors[f"delta/{n}"].double() for u in updates.values()]
        expected = server.study.initial[n].double() + torch.stack(parts).sum(0) / 6
        torch.testing.assert_close(moved[n], expected.float())


# ---- every one of them


@pytest.mark.parametrize("name", FLOWER)
def test_the_order_of_answers_is_irrelevant(name: str) -> None:
    server = Server(name, ROBUST.get(name, ({}, 1))[0])
    updates = server.updates(7)
    endings = set()
    for seed in range(4):
        order = random.Random(seed).sample(list(updates), len(updates))
        model, state = server.step(1, {}, server.study.initial, updates, order)
        endings.add(pack({"model": model, "state": state}))
    assert len(endings) == 1


@pytest.mark.parametrize("name", FLOWER)
def test_scalars_and_a_single_answer_are_no_special_case(name: str) -> None:
    server = Server(name, {})
    server.study.initial["layers.0.bias"] = torch.tensor(0.25)
    server.spec = server.strategy.spec(server.study, "train")
    moved, _ = server.step(1, {}, server.study.initial, server.updates(1))
    assert moved["layers.0.bias"].shape == ()


@pytest.mark.parametrize("name", FLOWER)
def test_flower_says_nothing(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    server = Server(name, {})
    server.step(1, {}, server.study.initial, server.updates(3))
    assert capfd.readouterr() == ("", "")


def test_a_model_that_is_not_finite_is_no_model() -> None:
    server = Server("flower_qfedavg", {"q": 1e4}, task="quadratic")
    with pytest.raises(Abandon, match="NaN or infinity"):
        server.step(1, {}, server.study.initial, server.updates(3))


def test_ours_is_the_same_median(ram: Path) -> None:
    cases = toy_cases(5, 2)
    models = [Toys(ram / name, toy_plan(name), cases).train()["w"] for name in ("median", "flower_median")]
    torch.testing.assert_close(models[0], models[1])


def test_a_site_needs_no_flower(ram: Path) -> None:
    """Built and answered: flwr is loaded when the coordinator adds up, not before."""
    script = (
        "import sys, torch; from pathlib import Path; import tests; from tests.client.desk import Desk\n"
        "from tests.toys import TOYS, toy_plan; from tasks import TASKS; TASKS._entries.update(TOYS)\n"
        f"for name in {FLOWER}:\n"
        f"    desk = Desk(Path({str(ram)!r}) / name, toy_plan(name)); desk.ask()\n"
        "assert 'flwr' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---- a hostile site


@dataclass
class Hostile:
    """Changes what its site says."""

    site: Handler
    spoil: Callable[[Update], Update]

    def handle(self, instruction: Instruction, common: Tree) -> Reply:
        reply = self.site.handle(instruction, common)
        if instruction.stage != "train" or not isinstance(reply.body, Update):
            return reply
        return replace(reply, body=self.spoil(reply.body))


def with_tensors(change: Callable[[Tensor], Tensor]) -> Callable[[Update], Update]:
    return lambda update: Update({n: change(t) for n, t in update.tensors.items()}, update.weight)


SPOILT: dict[str, tuple[str, Callable[[Update], Update]]] = {
    "boosted": ("", with_tensors(lambda t: (t * 1e6).clamp(-64, 64))),
    "boosted, with all the weight it may have": (
        "",
        lambda u: Update({n: (t * -1e6).clamp(-64, 64) for n, t in u.tensors.items()}, 4096),
    ),
    "NaN": ("finite", with_tensors(lambda t: t * torch.nan)),
    "wrong shape": ("shape", with_tensors(lambda t: t[None])),
    "more weight than it may have": ("weight", lambda u: Update(u.tensors, 10**9)),
    "less weight than none": ("weight", lambda u: Update(u.tensors, -900)),
    "other names": ("names", lambda u: Update({"delta/x": torch.zeros(1)}, 1)),
}


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in FLOWER for case in SPOILT if name in ROBUST or case == "NaN"],
)
def test_a_hostile_site_neither_stops_nor_steers_a_run(name: str, case: str, ram: Path) -> None:
    refused, spoil = SPOILT[case]
    settings = ROBUST.get(name, ({}, 1))[0]
    said: list[tuple[Instruction, Tree, Reply]] = []

    def wrap(site: Handler, name: str) -> Handler:
        return Hostile(site, spoil) if name == "site_3" else Recorder(site, said)

    toys = Toys(
        ram,
        toy_plan(name, strategy=settings, federation={"rounds": 2, "evaluate_every": 0}),
        toy_cases(8, 1),
        wrap=wrap,
    )
    model = toys.train()
    assert bool(model["w"].isfinite().all())
    assert ((toys.folder / "journal.jsonl").read_text().count(f'"code": "{refused}"') == 2) == bool(refused)
    if name in ROBUST:
        last = [(c, r.body) for i, c, r in said if (i.stage, i.round) == ("train", 2)]
        assert len(last) == 7
        honest = torch.stack(
            [c["model"]["w"] + b.tensors["delta/w"] for c, b in last if isinstance(b, Update)]
        )
        assert bool((honest.amin(0) - 1e-5 <= model["w"]).all())
        assert bool((model["w"] <= honest.amax(0) + 1e-5).all())


# ---- too few


@pytest.mark.parametrize("name", [name for name in ROBUST if name != "flower_median"])
def test_too_few_sites_for_the_hostile_ones_is_one_line_at_the_start(name: str, ram: Path) -> None:
    settings, needed = ROBUST[name]
    for cases, cohort in ((toy_cases(needed - 1, 1), 0), (toy_cases(8, 1), needed - 1)):
        plan = toy_plan(name, strategy=settings, federation={"cohort": cohort})
        line = rf"^strategy {name} with strategy\.hostile 1.* needs {needed} sites in a round; there are "
        with pytest.raises(Stop, match=line + rf"{needed - 1}: [^\n]*federation\.cohort[^\n]*$") as stop:
            Toys(ram / str(cohort), plan, cases).train()
        assert stop.value.exit is Exit.CONFIG
    Toys(ram / "enough", toy_plan(name, strategy=settings), toy_cases(needed, 1)).train()


def test_more_models_than_there_are_cannot_be_selected(ram: Path) -> None:
    plan = toy_plan("flower_multi_krum", strategy={"hostile": 1, "select": 7})
    with pytest.raises(Stop, match=r"strategy\.select 7 needs 8 sites in a round; there are 7"):
        Toys(ram, plan, toy_cases(7, 1)).train()


@dataclass
class Ill:
    site: Handler

    def handle(self, instruction: Instruction, common: Tree) -> Reply:
        if instruction.stage == "train":
            return Reply(instruction.site, Failure("memory"))
        return self.site.handle(instruction, common)


@pytest.mark.parametrize("name", [name for name in ROBUST if name != "flower_median"])
def test_too_few_answers_end_the_round_and_not_quietly(name: str, ram: Path) -> None:
    settings, needed = ROBUST[name]
    toys = Toys(ram, toy_plan(name, strategy=settings), toy_cases(needed, 1))
    toys.wrap = lambda site, name: Ill(site) if name == "site_0" else site
    with pytest.raises(Stop, match=f"{needed - 1} valid replies, need {needed}: memory: site_0") as stop:
        toys.train()
    assert stop.value.exit is Exit.TOO_FEW_REPLIES


# ---- the one value that leaves a site beside its change


def test_the_loss_is_that_of_the_rounds_model_over_all_training_patients(ram: Path) -> None:
    cases = toy_cases(1, 4)
    desk = Desk(ram, toy_plan("flower_qfedavg", local={"batch_size": 3}), cases=cases)
    start = torch.tensor([0.5, -1.0, 2.0])
    whole = desk.ask(model={"w": start})
    assert isinstance(whole.body, Update)
    pairs = [case.images["image"].double() for case in cases["site_0"]["train"]]
    losses = [0.5 * float((a * (start.double() - t) ** 2).sum()) for a, t in pairs]
    batches = desk.study.plan.local.batch_size
    assert batches == 3
    assert min(losses) <= float(whole.body.tensors["loss/train"]) <= max(losses)
    full = Desk(ram / "full", toy_plan("flower_qfedavg", local={"batch_size": 0}), cases=cases)
    exact = full.ask(model={"w": start})
    assert isinstance(exact.body, Update)
    assert float(exact.body.tensors["loss/train"]) == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_a_private_run_sends_no_loss() -> None:
    plan = toy_plan("flower_qfedavg")
    private = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"mode": "patient"})})
    build_strategy(plan)
    line = (
        r"^strategy flower_qfedavg sends each site's mean training loss, which privacy\.mode patient [^\n]*$"
    )
    with pytest.raises(Stop, match=line) as stop:
        build_strategy(private)
    assert stop.value.exit is Exit.CONFIG


@pytest.mark.parametrize("policy", [Policy(statistics="none"), Policy(minimum_cell=10)])
def test_no_loss_leaves_where_the_hospital_keeps_its_statistics(policy: Policy, ram: Path) -> None:
    assert code(Desk(ram, toy_plan("flower_qfedavg"), policy=policy).ask()) == "policy"
    assert isinstance(Desk(ram / "other", toy_plan("flower_krum"), policy=policy).ask().body, Update)
