"""The local loop, against closed forms and whole batches."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from client.policy import Policy
from client.step import ahead, channels_last
from client.train import Archive, Bench, Session
from conf.schema import Plan
from strategies.base import Study, fresh_model
from strategies.protocol import Instruction, Refused
from tasks.base import Batch, Case, Phase, Task
from tests.toys import Quadratic, TinyNet, toy_archive, toy_case, toy_cases, toy_plan

NONE = toy_plan().model


def session(
    task: Task | None = None,
    plan: Plan | None = None,
    *,
    cases: Mapping[str, Sequence[Case]] | None = None,
    site: str = "site_0",
    round: int = 1,
    bench: Bench | None = None,
    archive: Archive | None = None,
) -> Session:
    """One stage at a site; the study is that of the plan, unless a task of its own is given."""
    plan = plan or toy_plan()
    study = Study.of(plan) if task is None else study_of(task, plan)
    asked = Instruction("run", round, 0, "train", site, None, plan.digest, "code", "")
    archive = archive or toy_archive(cases or toy_cases()[site])
    return Session(bench or Bench("cpu"), study, archive, Policy(minimum_cell=1), asked, {}, {})


def study_of(task: Task, plan: Plan) -> Study:
    model = fresh_model(plan, task)
    floats = {n: t.detach().clone() for n, t in model.state_dict().items() if t.is_floating_point()}
    return Study(plan, task, floats, frozenset(n for n, _ in model.named_parameters()), frozenset())


def patient(name: str, a: float, t: float, case: int = 0) -> Case:
    made = toy_case(f"{name}{case}", torch.full((3,), a), torch.full((3,), t))
    return replace(made, patient=name)


# ---- sampling


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=7),  # cases of each patient
    st.integers(0, 9),
    st.integers(1, 8),
    st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_every_patient_once_before_any_twice_and_none_twice_in_a_batch(
    counts: list[int], size: int, steps: int, seed: int
) -> None:
    cases = [patient(f"p{i}", i, c, c) for i, n in enumerate(counts) for c in range(n)]
    drawn: list[list[tuple[int, int]]] = []

    class Watched(Quadratic):
        def batch(self, examples: Sequence[Mapping[str, Tensor]], draw: torch.Generator) -> Batch:
            drawn.append([(int(e["a"][0]), int(e["t"][0])) for e in examples])
            return super().batch(examples, draw)

    plan = toy_plan(local={"batch_size": size, "steps": steps}).model_copy(update={"seed": seed})
    here = session(Watched(NONE, NONE), plan, cases={"train": cases})
    here.fit({"w": torch.zeros(3)})
    assert len(drawn) == steps
    seen = Counter(dict.fromkeys(range(len(counts)), 0))
    for batch in drawn:
        patients = [p for p, _ in batch]
        assert len(patients) == min(size or len(counts), len(counts))
        assert len(set(patients)) == len(patients)
        assert all(case < counts[p] for p, case in batch)
        seen.update(patients)
        assert max(seen.values()) - min(seen.values()) <= 1


def test_all_cases_of_a_patient_are_drawn_in_the_long_run_and_alike() -> None:
    cases = [patient("p", 1, c, c) for c in range(4)]
    found: Counter[float] = Counter()

    class Watched(Quadratic):
        def batch(self, examples: Sequence[Mapping[str, Tensor]], draw: torch.Generator) -> Batch:
            found.update(float(e["t"][0]) for e in examples)
            return super().batch(examples, draw)

    plan = toy_plan(local={"steps": 400})
    session(Watched(NONE, NONE), plan, cases={"train": cases}).fit({"w": torch.zeros(3)})
    # 100 ± 8.7 each: five standard deviations
    assert sorted(found) == [0, 1, 2, 3]
    assert all(abs(n - 100) < 44 for n in found.values())


def test_draws_come_from_plan_site_round_and_purpose_and_from_nothing_else() -> None:
    plan, start = toy_plan(task="tiny_net"), Study.of(toy_plan(task="tiny_net")).initial
    cases = toy_cases()["site_0"]

    def fitted(seed: int = 7, site: str = "site_0", round: int = 1, purpose: str = "train") -> Tensor:
        here = session(plan=plan.model_copy(update={"seed": seed}), cases=cases, site=site, round=round)
        return here.fit(start, purpose=purpose)["layers.0.weight"]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    once = fitted()
    assert torch.get_rng_state().equal(before)  # the global generator is left as it was
    torch.manual_seed(2)
    assert fitted().equal(once)
    others = [fitted(seed=8), fitted(site="site_9"), fitted(round=2), fitted(purpose="personal")]
    for i, other in enumerate(others):
        assert not any(other.equal(one) for one in (once, *others[:i]))


def test_layers_that_draw_are_seeded_too() -> None:
    class Dropped(TinyNet):
        def build_model(self) -> nn.Module:
            model = super().build_model()
            model.layers.append(nn.Dropout(0.5))  # type: ignore[union-attr, operator]
            return model

    task = Dropped(NONE, NONE, norm=False)
    start = study_of(task, toy_plan()).initial
    torch.manual_seed(1)
    once = session(task).fit(start)["layers.0.weight"]
    torch.manual_seed(2)
    assert session(task).fit(start)["layers.0.weight"].equal(once)
    assert not session(task, round=2).fit(start)["layers.0.weight"].equal(once)


# ---- weight


@pytest.mark.parametrize(
    ("federation", "weight"),
    [({}, 5), ({"max_weight": 4}, 4), ({"max_weight": 5}, 5), ({"weight": "equal"}, 1)],
)
def test_a_site_counts_its_training_patients_capped(federation: dict[str, Any], weight: int) -> None:
    cases = [patient(f"p{i}", 1, 1, c) for i in range(5) for c in range(2)]  # ten cases, five patients
    assert session(plan=toy_plan(federation=federation), cases={"train": cases}).weight == weight


# ---- steps


def one_patient(a: float = 1.5, t: float = 2.0) -> Mapping[str, Sequence[Case]]:
    return {"train": [patient("p", a, t)]}


@pytest.mark.parametrize("round", [1, 2, 3])
def test_the_cosine_schedule_runs_over_all_rounds(round: int) -> None:
    plan = toy_plan(local={"schedule": "cosine", "steps": 5, "lr": 0.3}, federation={"rounds": 3})
    got = session(plan=plan, cases=one_patient(), round=round).fit({"w": torch.zeros(3)})["w"]
    w = 0.0
    for step in range(5):
        rate = 0.3 * (1 + math.cos(math.pi * (5 * (round - 1) + step) / 15)) / 2
        w -= rate * 1.5 * (w - 2.0)
    assert got.tolist() == pytest.approx([w] * 3, abs=1e-6)


def test_momentum_and_decay_are_torchs_and_start_anew_every_round() -> None:
    plan = toy_plan(local={"steps": 3, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.05})
    here = session(plan=plan, cases=one_patient())
    w, v = 1.0, 0.0
    for _ in range(3):
        v = 0.9 * v + 1.5 * (w - 2.0) + 0.05 * w
        w -= 0.1 * v
    for _ in range(2):
        got = here.fit({"w": torch.ones(3)})
        assert got["w"].tolist() == pytest.approx([w] * 3, abs=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adams_first_step_has_the_length_of_the_rate(optimizer: str) -> None:
    plan = toy_plan(local={"optimizer": optimizer, "steps": 1, "lr": 0.01, "weight_decay": 0.0})
    got = session(plan=plan, cases=one_patient()).fit({"w": torch.zeros(3)})["w"]
    assert got.tolist() == pytest.approx([0.01] * 3, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 4, 5, 9])
def test_chunks_of_a_batch_add_up_to_it(chunk: int) -> None:
    local = {"batch_size": 5, "steps": 3, "clip_norm": 0.2, "momentum": 0.5}
    whole, parts = (
        session(plan=toy_plan(task="tiny_net", toy={"norm": False}, local={**local, "micro_chunk": size}))
        for size in (0, chunk)
    )
    a, b = whole.fit(whole.study.initial), parts.fit(whole.study.initial)
    for name, tensor in a.items():
        assert (tensor - b[name]).abs().max() < 1e-6, name


def test_gradients_are_clipped_by_their_norm_and_corrected_after() -> None:
    plan = toy_plan(local={"steps": 1, "lr": 1.0, "clip_norm": 0.5})
    norms: list[float] = []

    def correct(parameters: Mapping[str, nn.Parameter]) -> None:
        (gradient,) = (p.grad for p in parameters.values())
        assert gradient is not None
        norms.append(float(gradient.norm()))
        gradient.add_(7.0)

    got = session(plan=plan, cases=one_patient()).fit({"w": torch.zeros(3)}, correct=correct)["w"]
    # the gradient is (-3, -3, -3)
    assert norms == pytest.approx([0.5])
    assert got.tolist() == pytest.approx([0.5 / math.sqrt(3) - 7.0] * 3, abs=1e-5)
    short = toy_plan(local={"steps": 1, "lr": 1.0, "clip_norm": 50.0})
    got = session(plan=short, cases=one_patient()).fit({"w": torch.zeros(3)})["w"]
    assert got.tolist() == pytest.approx([3.0] * 3)


# ---- two phases, as a GAN has them


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Parameter(torch.zeros(3))
        self.maker = nn.Parameter(torch.zeros(3))


@dataclass(frozen=True)
class Pair(Quadratic):
    """A private phase at every step and a public one at every second."""

    seen: Callable[[str, Batch | None], None] = lambda *_: None

    @property
    def phases(self) -> tuple[Phase, ...]:
        def critic(model: nn.Module, batch: Batch | None) -> Tensor:
            self.seen("critic", batch)
            assert batch is not None
            here = dict(model.named_parameters())
            # the maker takes part, so it gets gradients here that are not its own
            return (0.5 * batch["a"] * (here["critic"] - batch["t"]) ** 2 + here["maker"]).sum(-1)

        def maker(model: nn.Module, batch: Batch | None) -> Tensor:
            self.seen("maker", batch)
            here = dict(model.named_parameters())
            return (0.5 * (here["maker"] - here["critic"].detach()) ** 2).sum()[None]

        return (
            Phase("critic", critic, "critic".__eq__),
            Phase("maker", maker, "maker".__eq__, private=False, every=2),
        )

    def build_model(self) -> nn.Module:
        return _Pair()


def test_phases_have_their_own_parameters_rhythm_and_batches() -> None:
    seen: list[tuple[str, bool]] = []
    task = Pair(NONE, NONE, seen=lambda phase, batch: seen.append((phase, batch is None)))
    plan = toy_plan(local={"steps": 5, "lr": 0.1, "micro_chunk": 1})
    corrected: list[tuple[str, ...]] = []
    got = session(task, plan, cases=one_patient()).fit(
        {"critic": torch.zeros(3), "maker": torch.zeros(3)}, correct=lambda p: corrected.append(tuple(p))
    )
    c = m = 0.0
    for step in range(5):
        c -= 0.1 * 1.5 * (c - 2.0)
        if step % 2 == 0:
            m -= 0.1 * (m - c)
    assert got["critic"].tolist() == pytest.approx([c] * 3, abs=1e-6)
    assert got["maker"].tolist() == pytest.approx([m] * 3, abs=1e-6)
    order = ["critic", "maker", "critic", "critic", "maker", "critic", "critic", "maker"]
    assert seen == [(phase, phase == "maker") for phase in order]
    assert corrected == [(phase,) for phase in order]


# ---- one model for many sites


class Counting(TinyNet):
    """Running statistics as a cumulative mean: they depend on an integer buffer."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        model.layers[1].momentum = None  # type: ignore[index, union-attr]
        return model


@pytest.mark.parametrize("kind", [TinyNet, Counting])
def test_a_model_that_serves_many_sites_carries_nothing_from_one_to_the_next(kind: type[TinyNet]) -> None:
    task, cases, shared = kind(NONE, NONE), toy_cases(), Bench("cpu")
    start = study_of(task, toy_plan()).initial
    alone = {site: session(task, cases=cases[site], site=site).fit(start) for site in cases}
    turns = [*cases, *reversed(list(cases)), *cases]
    kept = []
    for site in turns:
        here = session(task, cases=cases[site], site=site, bench=shared)
        fitted = here.fit(start)
        kept.append((site, {name: tensor.clone() for name, tensor in fitted.items()}))
        here.score(fitted, "val")
    for site, fitted in kept:
        for name, tensor in alone[site].items():
            assert fitted[name].equal(tensor), (site, name)
    assert all(start[name].equal(t) for name, t in study_of(task, toy_plan()).initial.items())


def test_a_model_in_parts_is_refused() -> None:
    here = session(plan=toy_plan(task="tiny_net"))
    some = {n: t for n, t in here.study.initial.items() if n != "layers.1.running_mean"}
    with pytest.raises(
        ValueError, match=r"weights lack \['layers\.1\.running_mean'\]; a whole model is needed"
    ):
        here.fit(some)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_stage_runs_on_the_plans_threads(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        session(plan=toy_plan(local={"threads": threads}))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_bench_of_many_runs_does_not_grow_with_them() -> None:
    bench, cases = Bench("cpu"), {"train": [patient("p", 1.0, 1.0)]}
    plans = [toy_plan(local={"lr": 0.1 / n}) for n in range(1, 40)]
    for plan in plans:
        study, strategy = bench.study(plan)
        bench.spec(study, strategy, "train")
        session(cases=cases, plan=plan, bench=bench).fit({"w": torch.zeros(3)})
        assert len(bench._prepared) == len(bench._optimizers) == 1
        assert max(len(bench._plans), len(bench._studies), len(bench._specs)) <= 8
    assert bench._held == sum(t.nbytes for t in next(iter(bench._prepared.values())).values())
    assert bench.study(plans[0])[0].plan == plans[0]


@pytest.mark.parametrize(("capacity", "loads"), [(2**20, 2), (48, 2), (24, 1 + 4), (0, 8)])
def test_prepared_cases_are_kept_up_to_the_capacity(capacity: int, loads: int) -> None:
    cases = [patient(f"p{i}", 1.0 + i, 1.0) for i in range(2)]
    held = {case.key: case for case in cases}
    loaded: list[str] = []

    def load(entry: Any) -> Case:
        loaded.append(entry.key)
        return held[entry.key]

    archive = replace(toy_archive({"train": cases}), load=load)
    here = session(archive=archive, bench=Bench("cpu", capacity), plan=toy_plan(local={"batch_size": 0}))
    got = here.fit({"w": torch.zeros(3)})
    assert len(loaded) == loads
    assert got["w"].equal(
        session(cases={"train": cases}, plan=toy_plan(local={"batch_size": 0})).fit({"w": torch.zeros(3)})[
            "w"
        ]
    )


@pytest.mark.parametrize("steps", [1, 4])
def test_batches_made_ahead_are_the_same_batches(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    true = TinyNet.batch

    def batch(self: TinyNet, *given: Any) -> Batch:
        made.append(threading.current_thread().name)
        return true(self, *given)

    monkeypatch.setattr(TinyNet, "batch", batch)
    plan = toy_plan(task="tiny_net", local={"steps": steps})
    trained = []
    for prefetch in (False, True):
        bench = Bench("cpu")
        bench.prefetch = prefetch
        here = session(plan=plan, bench=bench)
        got = here.fit(here.study.initial)
        trained.append({name: tensor.clone() for name, tensor in got.items()})
    assert all(tensor.equal(trained[1][name]) for name, tensor in trained[0].items())
    assert [name == "MainThread" for name in made] == [True] * steps + [False] * steps  # none for nothing
    assert not [t for t in threading.enumerate() if "ThreadPool" in t.name]


def test_what_fails_in_a_batch_made_ahead_is_raised() -> None:
    def batches() -> Iterator[Batch]:
        yield {"a": torch.ones(1)}
        raise MemoryError("second")

    coming = ahead(batches())
    assert next(coming)["a"] == 1
    with pytest.raises(MemoryError, match="second"):
        next(coming)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", "float32"), ("float32", "float32"), ("bfloat16",) * 2]
)
def test_the_plan_says_how_precisely_the_network_computes(precision: str, dtype: str) -> None:
    seen: list[torch.dtype] = []

    class Watching(Quadratic):
        @property
        def phases(self) -> tuple[Phase, ...]:
            def loss(model: nn.Module, batch: Batch | None) -> Tensor:
                assert batch is not None
                seen.append((batch["a"] @ batch["t"].T).dtype)
                value: Tensor = model(batch["a"], batch["t"])
                return value

            return (Phase("train", loss),)

    plan = toy_plan(local={"precision": precision})
    session(Watching(NONE, NONE), plan).fit({"w": torch.zeros(3)})
    assert set(seen) == {getattr(torch, dtype)}


# ---- scores


def test_scores_and_sums_are_those_of_numpy() -> None:
    cases = toy_cases(1, 4)["site_0"]
    here = session(cases=cases)
    w = torch.tensor([0.5, -1.0, 2.0])
    images = {split: np.stack([c.images["image"].numpy() for c in cases[split]]) for split in cases}
    got = here.study.task.statistics().from_vector(here.score({"w": w}, "val"))
    losses = (0.5 * images["val"][:, 0] * (w.numpy() - images["val"][:, 1]) ** 2).sum(-1)
    assert got.patients == 2
    assert got.value()["loss"] == pytest.approx(losses.mean(), abs=1e-5)
    sums = here.accumulate("constant", {})
    assert sums["target"].numpy() == pytest.approx(images["train"][:, 1].astype(np.float64).sum(0))
    assert float(sums["count"]) == 4
    trivial = here.study.task.statistics().from_vector(here.score_sums("constant", sums, "val"))
    mean = images["train"][:, 1].mean(0)
    losses = (0.5 * images["val"][:, 0] * (mean - images["val"][:, 1]) ** 2).sum(-1)
    assert trivial.value()["loss"] == pytest.approx(losses.mean(), abs=1e-5)


def test_without_patients_there_is_nothing_to_do() -> None:
    here = session(cases={"val": toy_cases()["site_0"]["val"]})
    with pytest.raises(Refused, match="data: no training patient"):
        here.fit({"w": torch.zeros(3)})
    with pytest.raises(Refused, match="data: no patient"):
        here.score({"w": torch.zeros(3)}, "test")
    with pytest.raises(Refused, match="data: no patient"):
        here.accumulate("constant", {})


@pytest.mark.parametrize(("dimensions", "layout"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_weights_are_laid_out_for_a_gpu_without_changing_the_model(
    dimensions: int, layout: torch.memory_format
) -> None:
    first = nn.Conv2d(2, 3, 3) if dimensions == 2 else nn.Conv3d(2, 3, 3)
    model = nn.Sequential(first, nn.Flatten(), nn.LazyLinear(1))
    image = torch.randn(1, 2, *[5] * dimensions)
    before = model(image)
    channels_last(model)
    assert first.weight.is_contiguous(memory_format=layout)
    assert torch.allclose(model(image), before, atol=1e-6)
