"""A loopback federation of toys, and what the tests look at in it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conf.schema import Plan
from deploy.loopback import Loopback
from server.house import PROJECT
from tests.toys import Toys, toy_cases

SITES = list(toy_cases())


class ToyLoop(Loopback):
    """Three toy sites; `orders` slow a round's training down or make it fail."""

    def __init__(self, folder: Path) -> None:
        trainer = [sys.executable, "-m", "tests.federation.toy_trainer", str(folder)]
        super().__init__(
            folder,
            SITES,
            lambda site, socket: [*trainer, site, str(socket)],
            coordinator="tests.federation.toy_coordinator",
            wait_s=3.0,
        )

    def orders(self, **rounds: dict[str, Any]) -> None:
        """What the next trainings do: `r1={"sleep": 2}`, `{"raise": TEXT}`."""
        (self.folder / "orders.json").write_text(json.dumps({k[1:]: v for k, v in rounds.items()}))

    def trained(self, site: str) -> list[int]:
        """The rounds a site has trained in, as often as it did; forgotten with the reading."""
        path = self.folder / "sites" / site / "trained"
        rounds = [int(line) for line in path.read_text().split()] if path.exists() else []
        path.unlink(missing_ok=True)
        return rounds

    def result(self, name: str) -> dict[str, bytes]:
        """What two equal runs share."""
        return Toys(self.folder / "runs" / name, None, {}).ending()  # type: ignore[arg-type]

    def training(self, site: str, count: int = 1) -> None:
        """Wait until a site has begun to train."""
        path = self.folder / "sites" / site / "trained"
        self.until(f"training at {site}", lambda: path.exists() and len(path.read_text().split()) >= count)

    def journal(self, name: str) -> list[dict[str, Any]]:
        """The journal of a run."""
        lines = (self.folder / "runs" / name / "journal.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@contextmanager
def toy_loop(folder: Path) -> Iterator[ToyLoop]:
    loop = ToyLoop(folder / "loop")
    with loop:
        try:
            yield loop
        except BaseException:
            print(loop.logs())
            raise


def locally(folder: Path, plan: Plan) -> dict[str, bytes]:
    """The same run in this process."""
    made = Toys(folder, plan, toy_cases())
    made.train()
    return made.ending()


__all__ = ["PROJECT", "SITES", "ToyLoop", "locally", "toy_loop"]
