"""Every check, by name, in the order in which they are told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from client.doctor import machine, network, stores
from client.doctor.finding import Check, Finding, problem

if TYPE_CHECKING:
    from client.sitefile import SiteFile

CHECKS: Mapping[str, Check] = {
    "python": machine.python,
    "gpu": machine.gpu,
    "disk": machine.disk,
    "memory": machine.memory,
    "files": machine.files,
    "clock": network.clock,
    "certificates": network.certificates,
    "coordinator": network.coordinator,
    "pacs": network.pacs,
    "trainer": network.trainer,
    "data": stores.data,
    "labels": stores.labels,
    "cache": stores.cache,
    "audit": stores.audit,
    "ledger": stores.ledger,
    "permissions": stores.permissions,
}


def examine(site: SiteFile) -> Iterator[tuple[str, Finding]]:
    """Run every check; one that fails itself is a problem, and the others still run."""
    for name, check in CHECKS.items():
        try:
            yield name, check(site)
        except Exception as error:  # noqa: BLE001  an engineer needs the other lines too
            seen = f"could not be checked ({type(error).__name__}: {error})"
            yield name, problem(seen, "run with --debug, and report it")
