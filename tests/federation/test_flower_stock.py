"""Flower's own processes can host both ends: `flower-superexec` the one, `flower-supernode` the other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from deploy.loopback import free_port
from tests.federation.loop import PROJECT, SITES, ToyLoop
from tests.toys import Toys, toy_cases, toy_plan

pytestmark = pytest.mark.federation

BIN = Path(sys.executable).parent


class StockLoop(ToyLoop):
    """One toy site; coordinator and agent are Flower's programs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sites = SITES[:1]

    def coordinator(self) -> list[str]:
        toys = self.folder / "toys"
        toys.mkdir()
        install = "from tasks import TASKS\nfrom tests.toys import TOYS\nTASKS._entries.update(TOYS)\n"
        (toys / "sitecustomize.py").write_text(install)
        return [
            *("env", f"PYTHONPATH={toys}:{PROJECT}", f"WARDROUND_RUNS={self.folder / 'runs'}"),
            f"WARDROUND_SITES={self.folder / 'sites.json'}",
            *(str(BIN / "flower-superexec"), "--runtime-api-address", f"127.0.0.1:{self.port}"),
            *("--root-certificates", str(self.folder / "keys" / "ca.crt")),
            *("--superexec-auth-secret-file", str(self.folder / "keys" / "superexec")),
        ]

    def agent(self, site: str) -> Sequence[str]:
        return [
            *(str(BIN / "flower-supernode"), "--superlink", f"127.0.0.1:{self.port}"),
            *("--root-certificates", str(self.folder / "keys" / "ca.crt")),
            *("--auth-supernode-private-key", str(self.folder / "keys" / site)),
            *("--host", "127.0.0.1", "--port", str(free_port())),
            *("--node-config", f'socket="{self.socket(site)}"'),
        ]


def test_stock_processes_host_both_ends(ram: Path) -> None:
    plan = toy_plan(federation={"rounds": 1})
    with StockLoop(ram / "loop") as loop:
        assert loop.finish(loop.submit("stock", plan), 120) == "completed", loop.logs()
        cases = {site: toy_cases()[site] for site in loop.sites}
        made = Toys(ram / "here", plan, cases)
        made.train()
        assert loop.result("stock") == made.ending()
