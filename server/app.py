"""The same coordinator for a stock `flower-superexec`: an ordinary ServerApp."""

import json
import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.coordinator import Coordinator

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the directory that the run's settings name, below `WARDROUND_RUNS`."""
    sites = json.loads(Path(os.environ["WARDROUND_SITES"]).read_text())
    Coordinator(Path(os.environ["WARDROUND_RUNS"]), sites).take(grid, context.run_config)
