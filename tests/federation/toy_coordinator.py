"""The product's coordinator, where the toys are installed; it may be told to die as it keeps its token."""

import json
import os
import signal
import sys
from pathlib import Path

from tests.federation.short_superlink import shorten

if __name__ == "__main__":
    if os.environ.get("WARDROUND_SHORT_LEASE"):
        shorten()
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
