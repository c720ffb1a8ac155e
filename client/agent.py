"""The agent: the network side of a site. It carries calls from SuperLink to the trainer, and answers back.

It speaks Flower's Fleet protocol, outbound only. It reads no patient and no tree, imports no torch, and
runs nothing that arrives: no bundle is unpacked, no ClientApp is started. Several calls are carried at
once, so that a `cancel` overtakes the `train` that it ends.
"""

from __future__ import annotations

import argparse
import logging
import signal
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from client.door import Door, Given
from client.fleet import Fleet, Gone, Letter, read_key
from client.telemetry import Meter
from conf.console import ended
from conf.exits import Exit, Stop
from strategies.letter import Answer, Call, Unreadable

_AT_ONCE = 8
_SHORTEST_S, _LONGEST_S = 0.15, 2.0
_SHARE = 0.05
"""A poll waits this share of the time since the last letter: brisk in a run, quiet between runs."""

log = logging.getLogger(__name__)


@dataclass
class Agent:
    """Carries between a fleet connection and a door.

    Attributes:
        bundles: SHA-256 of the bundles whose runs may speak to this site.
    """

    fleet: Fleet
    door: Door
    bundles: Collection[str]
    meter: Meter = field(default_factory=Meter)

    def run(self) -> NoReturn:
        """Carry until the process ends.

        Raises:
            Gone: the lease was lost.
        """
        heard = time.monotonic()
        room = threading.Semaphore(_AT_ONCE)
        while True:
            letter = self.fleet.receive()
            if letter is None:
                since = time.monotonic() - heard
                time.sleep(min(max(_SHORTEST_S, _SHARE * since), _LONGEST_S))
                continue
            heard = time.monotonic()
            room.acquire()
            # daemons: a long wait for the trainer must not keep an agent that is told to stop
            threading.Thread(target=self._thread, args=(letter, room), daemon=True).start()

    def _thread(self, letter: Letter, room: threading.Semaphore) -> None:
        try:
            self.carry(letter)
        finally:
            room.release()

    def carry(self, letter: Letter) -> None:
        """Bring one letter to the trainer, and its answer back. Never raises."""
        began = time.monotonic()
        try:
            given = self._given(letter)
            self.fleet.answer(letter, given.answer.to_content(), time.monotonic() - began)
        except Exception as error:  # noqa: BLE001  the coordinator asks again; the next call must not suffer
            log.warning("a call is lost: %s", type(error).__name__)

    def _given(self, letter: Letter) -> Given:
        if self.fleet.bundle(letter) not in self.bundles:
            return Given(Answer("policy", ""))
        try:
            call = Call.from_content(self.fleet.open(letter).content)
        except Unreadable:
            return Given(Answer("payload", ""))
        given = self.door.ask(call)
        self.meter.carried(call.operation, given, len(call.instruction) + len(call.common))
        return given


def main(arguments: list[str] | None = None) -> None:
    """`python -m client.agent --superlink HOST:PORT …`: carry until told to stop."""
    parser = argparse.ArgumentParser(prog="client.agent", description="Carry between SuperLink and trainer.")
    parser.add_argument("--superlink", required=True, help="host:port")
    parser.add_argument("--certificates", type=Path, required=True, help="of SuperLink's authority, PEM")
    parser.add_argument("--key", type=Path, required=True, help="this node's private key, PEM")
    parser.add_argument("--bundles", type=Path, required=True, help="file of allowed bundles' SHA-256")
    parser.add_argument("--socket", type=Path, required=True, help="the trainer's")
    parser.add_argument("--lease", type=Path, required=True, help="file for this node's number")
    parser.add_argument("--metrics", type=int, help="port on 127.0.0.1 for Prometheus")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    def told(*_: object) -> None:
        raise SystemExit(0)  # also out of waiting for a SuperLink that is away

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told)
    meter = Meter()
    if asked.metrics:
        meter.serve(asked.metrics)
    fleet = Fleet(asked.superlink, asked.certificates.read_bytes(), read_key(asked.key), asked.lease)
    with fleet:
        log.info("agent is ready")
        try:
            bundles = frozenset(asked.bundles.read_text().split())
            Agent(fleet, Door(asked.socket), bundles, meter).run()
        except Gone:
            raise Stop(Exit.LINK, "SuperLink has ended this node's lease; start again") from None


if __name__ == "__main__":
    ended(main)
