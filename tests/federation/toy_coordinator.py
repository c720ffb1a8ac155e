"""The product's coordinator, where the toys are installed; it may be told to die as it keeps its token."""

import json
import os
import signal
import sys
from pathlib import Path

from flwr.common import constant

from tests.federation.short_superlink import LEASE_S

if __name__ == "__main__":
    if os.environ.get("WARDROUND_SHORT_LEASE"):
        constant.HEARTBEAT_DEFAULT_INTERVAL = LEASE_S / 2  # type: ignore[assignment]
    from conf.console import ended
    from server import link
    from server.coordinator import main
    from tasks import TASKS
    from tests.toys import TOYS

    keep = link._keep
    orders = Path(sys.argv[sys.argv.index("--runs") + 1]).parent / "die.json"

    def dying(token: Path, kept: dict[str, str]) -> None:
        """Keep it, unless `die.json` names a word that is to be kept: then die once, before."""
        if orders.exists() and json.loads(orders.read_text()) in kept:
            orders.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        keep(token, kept)

    link._keep = dying
    TASKS._entries.update(TOYS)
    ended(lambda: main(preload=()))
