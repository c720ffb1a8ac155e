"""A trainer process over a toy site: the product's own trainer, with faults and a record of its work."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from client.train import Bench, Session
from client.trainer import leave_network, serve
from strategies.base import Tensors
from tasks import TASKS
from tests.toys import TOYS, Toys, toy_cases, toy_plan


def main() -> None:
    folder, name, socket = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    leave_network()
    TASKS._entries.update(TOYS)
    sites = folder / "sites"
    own = sites / name
    own.mkdir(parents=True, exist_ok=True)
    orders = folder / "orders.json"
    fit = Session.fit

    def told(session: Session, *arguments: Any, **named: Any) -> Tensors:
        """Train as always, after noting it and doing what `orders.json` says of this round."""
        with (own / "trained").open("a") as file:
            file.write(f"{session.round}\n")
        order = json.loads(orders.read_text()).get(str(session.round), {}) if orders.exists() else {}
        if "raise" in order:
            raise RuntimeError(order["raise"])
        until = time.monotonic() + order.get("sleep", 0.0)
        while time.monotonic() < until:
            session._bench.halt()
            time.sleep(0.02)
        return fit(session, *arguments, **named)

    Session.fit = told  # type: ignore[assignment, method-assign]
    bench = Bench("cpu")
    serve(Toys(folder, toy_plan(), toy_cases(), durable=True).site(name, bench), bench, socket)


if __name__ == "__main__":
    main()
