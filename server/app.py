"""The same coordinator for a stock `flower-superexec`: an ordinary ServerApp."""

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.coordinator import Coordinator
from server.house import read_sites

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the directory that the run's settings name, below `WARDROUND_RUNS`."""
    sites = read_sites(Path(os.environ["WARDROUND_SITES"]))
    Coordinator(Path(os.environ["WARDROUND_RUNS"]), sites).take(grid, context.run_config)
