"""What leaves a site: an answer of the plan's form, or a code. Nothing of what went wrong, or of where."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.exchange.crew import accepted
from strategies.mean import FedAvg
from strategies.protocol import Failure, Refused, Reply, Update, pack
from tests.client.desk import Desk, blob, code
from tests.toys import Quadratic, toy_plan

CANARY = "/home/ward7/Mustermann_Erika_1961/ct.dcm"


def raised() -> dict[str, tuple[BaseException, str]]:
    chained = RuntimeError("while reading " + CANARY)
    chained.__cause__ = ValueError(CANARY)
    return {
        "ValueError": (ValueError(f"cannot read {CANARY}"), "internal"),
        "KeyError": (KeyError(CANARY), "internal"),
        "OSError": (OSError(errno.EIO, "input/output error", CANARY), "internal"),
        "full disk": (OSError(errno.ENOSPC, "no space left", CANARY), "disk"),
        "memory": (MemoryError(CANARY), "memory"),
        "unicode": (UnicodeDecodeError("utf-8", CANARY.encode(), 0, 1, CANARY), "internal"),
        "Refused with a detail": (Refused("data", CANARY), "data"),
        "Refused with a wild code": (Refused(CANARY), "internal"),
        "chained": (chained, "internal"),
        "no text of its own": (AssertionError(CANARY), "internal"),
        "StopIteration": (StopIteration(CANARY), "internal"),
    }


@pytest.mark.parametrize("where", ["batch", "load", "score"])
@pytest.mark.parametrize("kind", raised())
def test_nothing_of_an_exception_leaves_but_its_code(
    kind: str, where: str, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, wanted = raised()[kind]
    desk = Desk(ram, toy_plan())

    def fail(*_: object) -> Any:
        raise error

    if where == "load":
        archive = replace(desk.site.archive.of("r"), load=fail)
        desk.site = replace(desk.site, archive=archive)
    else:
        monkeypatch.setattr(Quadratic, where, fail)
    if where == "score":
        reply = desk.ask(desk.asked("evaluate/federated/val"), kind="federated", split="val")
    else:
        reply = desk.ask()
    assert code(reply) == wanted
    assert isinstance(reply.body, Failure)
    sent = pack(reply.to_tree())
    for part in (CANARY, "Mustermann", "ct.dcm", str(ram), "Traceback"):
        assert part.encode() not in sent
    (incident,) = desk.incidents()
    assert incident["incident"] == reply.body.incident
    assert incident["code"] == wanted
    assert CANARY in incident["detail"]
    assert desk.files() == {}
    with pytest.raises(Refused, match=wanted):
        accepted(Reply.from_tree(reply.to_tree()), "site_0", desk.strategy.spec(desk.study, "train"))


def test_a_log_that_cannot_be_written_does_not_hide_the_code(ram: Path) -> None:
    desk = Desk(ram, toy_plan())
    desk.site = replace(desk.site, folder=ram / "file")
    (ram / "file").write_text("in the way")
    assert code(desk.ask(desk.asked(code="0"))) == "code"


def test_a_reply_that_cannot_be_kept_does_not_leave(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(ram, toy_plan())

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("client.state.write_atomic", full)
        assert code(desk.ask()) == "disk"
    blob(desk.ask())


# ---- egress


def extra(update: Update) -> Update:
    return replace(update, tensors={**update.tensors, "private/w": torch.zeros(3)})


def lacking(update: Update) -> Update:
    return replace(update, tensors={n: t for n, t in update.tensors.items() if n != "delta/w"})


def changed(value: Any) -> Callable[[Update], Update]:
    return lambda update: replace(update, tensors={**update.tensors, "delta/w": value})


EGRESS: dict[str, tuple[Callable[[Update], Update], str]] = {
    "one more tensor": (extra, "names"),
    "one tensor less": (lacking, "names"),
    "NaN": (changed(torch.tensor([0.0, torch.nan, 0.0])), "finite"),
    "Inf": (changed(torch.tensor([0.0, 0.0, -torch.inf])), "finite"),
    "out of range": (changed(torch.full((3,), 65.0)), "range"),
    "another shape": (changed(torch.zeros(1, 3)), "shape"),
    "another type": (changed(torch.zeros(3, dtype=torch.float64)), "shape"),
    "weight 0": (lambda update: replace(update, weight=0), "weight"),
    "weight True": (lambda update: replace(update, weight=True), "weight"),
    "too much weight": (lambda update: replace(update, weight=5000), "weight"),
}


@pytest.mark.parametrize("case", EGRESS)
def test_an_answer_of_another_form_than_the_plans_does_not_leave(
    case: str, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, wanted = EGRESS[case]
    desk = Desk(ram, toy_plan())
    true = FedAvg.report
    with monkeypatch.context() as patch:
        patch.setattr(FedAvg, "report", lambda *given: spoil(true(*given)))
        assert code(desk.ask()) == wanted
    assert desk.files() == {}
    blob(desk.ask())  # and nothing was remembered of it


def test_a_diverging_model_is_refused(ram: Path) -> None:
    desk = Desk(ram, toy_plan())
    assert code(desk.ask(model={"w": torch.full((3,), 1e4)})) == "range"
    assert code(desk.ask(desk.asked(attempt=1), model={"w": torch.full((3,), torch.nan)})) == "finite"
